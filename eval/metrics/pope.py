"""POPE: yes-or-no questions about objects in an image (Li et al. 2023, arXiv 2305.10355), as pure functions.

Published figures differ in the text after the question (`SUFFIXES`) and in the rule that reads the answer (`PARSERS`), by more
than many methods gain: a result has to name both.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from contralto.common.suggestions import did_you_mean
from contralto.eval import stats
from contralto.eval.metrics.base import Metric
from contralto.eval.stats.counts import Array, CountMetric

__all__ = ["METRICS", "PARSERS", "SUFFIXES", "Pair", "PopeRates", "document_metrics", "parse_answer", "rates"]

Pair = tuple[bool, bool | None]
"""The right answer and the given answer: True is yes, None is neither yes nor no."""

ONE_WORD = " Please answer this question with one word."
SHORT = "\nAnswer the question using a single word or phrase."
SUFFIXES = {"official": "", "vcd": ONE_WORD, "ritual": "", "llava": SHORT}
"""The text after the question.

- `official`: nothing, as in the benchmark's files;
- `vcd`: the sentence that the code of VCD appends (Leng et al. 2023, arXiv 2311.16922);
- `ritual`: nothing (Woo et al. 2024, arXiv 2405.17821);
- `llava`: the instruction that LLaVA-1.5 was trained and evaluated with, also in lmms-eval (Liu et al. 2023, arXiv 2310.03744).
"""


class PopeRates(NamedTuple):
    """The metrics of the paper, yes being positive."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """Share of the questions that were answered with yes; half of POPE's right answers are yes."""
    unparsed: float
    """Share of the questions whose answer is neither yes nor no."""


def _words(text: str, label: bool) -> bool | None:
    words = set(re.findall(r"\w+", text.lower())) & {"yes", "no"}
    return "yes" in words if len(words) == 1 else None


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
"""The rules that read an answer, from the text and, for VCD alone, the right answer.

- `words`: yes if the text has the word yes and not the word no, no the other way round, otherwise neither. The only rule
  that can return neither.
- `official`: no if the first sentence has one of the words No, no, not; otherwise yes, whatever the text. LLaVA's
  evaluation does the same, so `llava` is another name of it.
- `vcd`: if yes is right, yes if the letters "yes" occur; if no is right, no if the letters "no" occur, as they do in "not
  sure" and in "I know". All else is the wrong answer.
- `ritual`: no if any word is No, no, NO, not, or ends in n't; otherwise yes.
"""


def parse_answer(text: str, label: bool, *, parser: str = "words") -> bool | None:
    """Classify an answer as yes, no or neither, by the rule of one of the codebases.

    Args:
        text: The answer of the model.
        label: The right answer, which VCD's rule reads.
        parser: A key of `PARSERS`.

    Returns:
        True for yes, False for no, None for neither.

    Raises:
        ValueError: The parser is unknown.

    Examples:
        >>> [parse_answer("I am not sure.", True, parser=name) for name in ("words", "official", "vcd")]
        [None, False, False]
    """
    if parser not in PARSERS:
        raise ValueError(
            f"there is no POPE parser {parser!r}{did_you_mean(parser, PARSERS)}; there are {', '.join(PARSERS)}"
        )
    return PARSERS[parser](text, label)


def rates(pairs: Sequence[Pair]) -> PopeRates:
    """Return the metrics of POPE (Li et al. 2023, arXiv 2305.10355) over questions.

        accuracy = (TP + TN) / N    precision = TP / (TP + FP)    recall = TP / P
        F1 = 2 TP / (TP + FP + P)   yes-ratio = (TP + FP) / N

    N is the number of questions, P that of questions whose right answer is yes. An answer that is neither yes nor no counts as
    wrong, and not as yes. A quotient 0 / 0 is 0, as in scikit-learn.

    Args:
        pairs: The right answer and the given answer of each question.

    Returns:
        Shares in [0, 1].

    Raises:
        ValueError: There are no questions.

    Examples:
        >>> rates([(True, True), (True, None), (False, True), (False, False)])
        PopeRates(accuracy=0.5, precision=0.5, recall=0.5, f1=0.5, yes_ratio=0.5, unparsed=0.25)
    """
    if not pairs:
        raise ValueError("POPE's measures need at least one question, not none")
    counts = _table(pairs).sum(0)
    shares = {metric.name: float(metric.value(counts)) for metric in METRICS}
    return PopeRates(**shares, unparsed=sum(answer is None for _, answer in pairs) / len(pairs))


def _table(pairs: Sequence[Pair]) -> Array:
    return stats.yes_no_table([label for label, _ in pairs], [answer for _, answer in pairs])


def document_metrics(label: bool, answer: bool | None) -> dict[str, Any]:
    """Return the values that lm-eval logs for a question: numbers, and the counts behind precision, recall and F1.

    Args:
        label: The right answer, True for yes.
        answer: The given answer; None for neither yes nor no.
    """
    pair = (label, answer)
    return {
        "acc": float(answer is label),
        "precision": pair,
        "recall": pair,
        "f1": pair,
        "yes_ratio": float(answer is True),
        "unparsed": float(answer is None),
    }


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], bool)


def _declare(
    name: str, value: CountMetric, higher_is_better: bool | None, numerators: tuple[int, ...] | None
) -> Metric:
    return Metric(
        name=name,
        logged_as=name,
        description=f"{name.replace('_', '-')} of yes-or-no questions, yes being positive",
        accepts=_is_pair,
        table=_table,
        value=value,
        numerators=numerators,
        higher_is_better=higher_is_better,
        document=None,
    )


METRICS = (
    _declare("accuracy", stats.accuracy, True, (0, 2)),
    _declare("precision", stats.precision, True, None),
    _declare("recall", stats.recall, True, None),
    _declare("f1", stats.f1, True, None),
    _declare("yes_ratio", stats.yes_ratio, None, (0, 1)),
)
"""The fields of `PopeRates` but for `unparsed`. lm-eval keeps a pair per question: the right answer and the given answer."""
_BY_NAME = {metric.name: metric for metric in METRICS}
precision, recall = _BY_NAME["precision"].aggregate, _BY_NAME["recall"].aggregate
f1 = _BY_NAME["f1"].aggregate
"""In place of lm-eval's own F1, whose standard error it bootstraps for hours."""
