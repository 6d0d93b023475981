"""POPE: yes-or-no questions about objects in an image (Li et al. 2023, arXiv 2305.10355), as pure functions.

Published figures differ in what follows the question (`SUFFIXES`) and in what counts as an answer (`PARSERS`), by more
than many methods gain: a result has to name both.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["PARSERS", "SUFFIXES", "Pair", "Rates", "answer", "rates"]

Pair = tuple[bool, bool | None]
"""The right answer, and what was answered: True is yes, None is neither yes nor no."""

ONE_WORD = " Please answer this question with one word."
SHORT = "\nAnswer the question using a single word or phrase."
SUFFIXES = {"official": "", "vcd": ONE_WORD, "ritual": "", "llava": SHORT}
"""What stands after the question.

- `official`: nothing, as in the benchmark's files;
- `vcd`: what the code of VCD appends (Leng et al. 2023, arXiv 2311.16922);
- `ritual`: nothing (Woo et al. 2024, arXiv 2405.17821);
- `llava`: what LLaVA-1.5 was trained and evaluated with, lmms-eval too (Liu et al. 2023, arXiv 2310.03744).
"""


class Rates(NamedTuple):
    """The measures of the paper, positive meaning yes."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """Share of the questions that were answered with yes; half of POPE's right answers are."""
    unparsed: float
    """Share of the questions whose answer is neither yes nor no."""


def _words(text: str, label: bool) -> bool | None:
    said = set(re.findall(r"\w+", text.lower())) & {"yes", "no"}
    return "yes" in said if len(said) == 1 else None


def _official(text: str, label: bool) -> bool | None:
    first = text.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(first.split(" "))


def _vcd(text: str, label: bool) -> bool | None:
    return "yes" in text.lower() if label else "no" not in text.lower()


def _ritual(text: str, label: bool) -> bool | None:
    words = re.sub("[.,]", "", text).split(" ")
    return not any(word in {"No", "not", "no", "NO"} or word.endswith("n't") for word in words)


PARSERS: dict[str, Callable[[str, bool], bool | None]] = {
    "words": _words,
    "official": _official,
    "llava": _official,
    "vcd": _vcd,
    "ritual": _ritual,
}
"""What an answer says: by the text and, for VCD alone, the right answer.

- `words`: yes if the text has the word yes and not the word no, no the other way round, otherwise neither. The only one
  that admits that an answer was not understood.
- `official`: no if the first sentence has one of the words No, no, not; otherwise yes, whatever the text. LLaVA's
  evaluation does the same, so `llava` is another name of it.
- `vcd`: if yes is right, yes if the letters "yes" occur; if no is right, no if the letters "no" occur, as they do in "not
  sure" and in "I know". All else is the wrong answer.
- `ritual`: no if any word is No, no, NO, not, or ends in n't; otherwise yes.
"""


def answer(text: str, label: bool, *, parser: str = "words") -> bool | None:
    """What a text answers, by the rule of one of the codebases.

    Args:
        text: what the model said.
        label: the right answer, which VCD's rule asks for.
        parser: a key of `PARSERS`.

    Returns:
        True for yes, False for no, None for neither.

    Raises:
        ValueError: no such parser.

    Examples:
        >>> [answer("I am not sure.", True, parser=name) for name in ("words", "official", "vcd")]
        [None, False, False]
    """
    if parser not in PARSERS:
        raise ValueError(f"there is no POPE parser {parser!r}; there are {', '.join(PARSERS)}")
    return PARSERS[parser](text, label)


def rates(pairs: Sequence[Pair]) -> Rates:
    """The measures of POPE (Li et al. 2023, arXiv 2305.10355), over questions.

        accuracy = (TP + TN) / N    precision = TP / (TP + FP)    recall = TP / P
        F1 = 2 TP / (TP + FP + P)   yes-ratio = (TP + FP) / N

    N are the questions, P those whose right answer is yes. An answer that is neither yes nor no counts as wrong, and not
    as yes. Where a quotient is 0 / 0, it is 0, as in scikit-learn.

    Args:
        pairs: per question the right answer and the given one.

    Raises:
        ValueError: no questions.

    Examples:
        >>> rates([(True, True), (True, None), (False, True), (False, False)])
        Rates(accuracy=0.5, precision=0.5, recall=0.5, f1=0.5, yes_ratio=0.5, unparsed=0.25)
    """
    if not pairs:
        raise ValueError("POPE's measures need at least one question, not none")
    n, positive = len(pairs), sum(label for label, _ in pairs)
    yes = sum(said is True for _, said in pairs)
    hits = sum(label and said is True for label, said in pairs)
    return Rates(
        accuracy=sum(said is label for label, said in pairs) / n,
        precision=hits / yes if yes else 0.0,
        recall=hits / positive if positive else 0.0,
        f1=2 * hits / (yes + positive) if yes + positive else 0.0,
        yes_ratio=yes / n,
        unparsed=sum(said is None for _, said in pairs) / n,
    )


def measures(label: bool, said: bool | None) -> dict[str, Any]:
    """What lm-eval keeps of one question; precision, recall and F1 are made of the pairs of all."""
    pair = (label, said)
    return {
        "acc": float(said is label),
        "precision": pair,
        "recall": pair,
        "f1": pair,
        "yes_ratio": float(said is True),
        "unparsed": float(said is None),
    }


def precision(pairs: Sequence[Pair]) -> float:
    """`Rates.precision`, for lm-eval."""
    return rates(pairs).precision


def recall(pairs: Sequence[Pair]) -> float:
    """`Rates.recall`, for lm-eval."""
    return rates(pairs).recall


def f1(pairs: Sequence[Pair]) -> float:
    """`Rates.f1`, for lm-eval, which bootstraps its own F1 for hours."""
    return rates(pairs).f1
