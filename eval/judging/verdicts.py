"""Read verdicts of judges, in the forms that published prompts request."""

import re
from collections.abc import Callable
from typing import NamedTuple

from contralto.common.registry import Registry
from contralto.data_gen.strategies.con_j import parse_better
from contralto.data_gen.strategies.verdicts import parse_verdict

__all__ = ["VERDICTS", "VerdictForm", "Vote"]


class Vote(NamedTuple):
    """A judge's opinion of two answers, in the order in which it read them."""

    share: float
    """1 for the answer that was shown first, 0 for the other, 0.5 for a tie."""
    is_clear: bool = False
    """True if the judge called the difference significant."""


class VerdictForm(NamedTuple):
    """A form of verdicts."""

    name: str
    shape: str
    """The form in words, for errors."""
    example: str
    read: Callable[[str], Vote | None]
    """Returns None where a reply has no verdict, or contradictory ones."""


VERDICTS: Registry[VerdictForm] = Registry("form of verdicts", group="contralto.verdicts")
"""The forms by name. Packages add theirs by entry points of the group `contralto.verdicts`."""

_AT_END = re.compile(r"(?<![A-Za-z])([mM])[\s\"'`.*]*\Z")
_IS_BETTER = re.compile(r"(?<![A-Za-z])([mM])[\"'`*]*\s+is\s+(?:clearly\s+|slightly\s+|the\s+)*(?:better|best)\b")
_SHARES = {"A": 1.0, "tie": 0.5, "B": 0.0}
_FIVE = re.compile(r"\[\[([AB<>=]+)\]\]")
_FIVE_SHARES = {
    **dict.fromkeys(("A>B", "B<A"), Vote(1.0)),
    **dict.fromkeys(("A>>B", "B<<A"), Vote(1.0, is_clear=True)),
    **dict.fromkeys(("A=B", "B=A"), Vote(0.5)),
    **dict.fromkeys(("B>A", "A<B"), Vote(0.0)),
    **dict.fromkeys(("B>>A", "A<<B"), Vote(0.0, is_clear=True)),
}


def _letters(text: str) -> Vote | None:
    """Return the vote of `[[A]]`, `[[B]]`, `[[C]]` for a tie, and of all that `parse_verdict` reads."""
    verdict = parse_verdict(text.replace("[[C]]", "[[tie]]"))
    return None if verdict is None else Vote(_SHARES[verdict])


def _five(text: str) -> Vote | None:
    """Return the vote of `[[A>>B]]` and the like; two different ones contradict each other."""
    labels = set(_FIVE.findall(text))
    return _FIVE_SHARES.get(labels.pop()) if len(labels) == 1 else None


def _identifier(text: str) -> Vote | None:
    """Return the vote of a reply that ends with `m`, the first answer, or `M`, or says that one of them is better."""
    statements = _IS_BETTER.findall(text)[-1:] + _AT_END.findall(text)
    return Vote(1.0 if statements[0] == "m" else 0.0) if len(set(statements)) == 1 else None


def _better(text: str) -> Vote | None:
    """Return the vote of `"better": 1` or `"better": 2`."""
    better = parse_better(text)
    return None if better is None else Vote(float(better == 1))


for _form in (
    VerdictForm(
        "letters", 'a last line "Verdict: A", "Verdict: B" or "Verdict: tie", or [[A]], [[B]], [[C]]', "[[A]]", _letters
    ),
    VerdictForm("five", "one of [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]", "[[A>>B]]", _five),
    VerdictForm("identifier", "m for the first or M for the second answer as its end", "m", _identifier),
    VerdictForm("better", '"better": 1 or "better": 2', '{"better": 1}', _better),
):
    VERDICTS.register(_form)
