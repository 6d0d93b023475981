"""Figures of answers with retrieved passages: are they right, and do the passages that they cite support them?"""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from contralto.data_gen.scorers import answer_matches
from contralto.data_gen.strategies.c_rag import answer_forms, gold_passages, parse_demonstration
from contralto.eval.stats.proportions import Proportion, proportion

__all__ = ["RagFigures", "rag_figures"]


class RagFigures(NamedTuple):
    """Figures of answers with retrieved passages, as demonstrations of C-RAG give them (arXiv 2410.22874)."""

    accuracy: Proportion
    """The share of replies whose answer contains a form of the right one, with its interval."""
    support: float | None
    """The mean share of cited passages that are gold ones, of the replies that cite some; None where that is not known."""
    citing: float
    """The share of replies that cite passages."""
    readable: float
    """The share of replies with a contrast, an explanation and an answer."""

    def __str__(self) -> str:
        support = "" if self.support is None else f", support {self.support:.3f}"
        return f"accuracy {self.accuracy} of {self.accuracy.n}{support}, citing {self.citing:.3f}, readable {self.readable:.3f}"


def rag_figures(
    rows: Iterable[Mapping[str, Any]],
    *,
    completion: str = "text",
    answers: str = "answers",
    gold: str | None = "gold",
    passages: str = "passages",
) -> RagFigures:
    """Measure replies to questions with passages.

    A reply without the headings of C-RAG is an answer as a whole, and cites nothing: `readable` says how many have them.

    Args:
        rows: with a reply, the right answer or its forms, the passages, and those of them that hold the answer, as the strategy `c_rag` reads
            them and `contralto generate --file --output` copies them.
        completion: the column of the reply; `text` is that of `contralto generate`.
        answers: the column of the right answer.
        gold: the column of the passages that hold it; None measures no support.
        passages: the column of the passages.

    Raises:
        ValueError: there are no rows, or a column is missing or has another form.

    Examples:
        >>> reply = "{contrast}:\\n[1] relevant: it says so.\\n{explanation}:\\nBy [1] and [2].\\n{answer}:\\nLima"
        >>> row = {"id": "1", "passages": ["Lima is in Peru.", "So is Cusco."], "answers": "Lima", "gold": [0], "text": reply}
        >>> print(rag_figures([row, {**row, "text": "Quito"}]))
        accuracy 0.500 [0.095, 0.905] of 2, support 0.500, citing 0.500, readable 0.500
    """
    right, shares, readable, citing = [], [], 0, 0
    for row in rows:
        reply = row.get(completion)
        if not isinstance(reply, str):
            raise ValueError(f"row {row.get('id')} has no reply in its column {completion}")  # noqa: TRY004
        read = parse_demonstration(reply, len(row[passages]))
        readable += read is not None
        right.append(answer_matches(reply if read is None else read.answer, answer_forms(row, answers)))
        helpful = gold_passages(row, gold, passages)
        if read is not None and read.cited:
            citing += 1
            shares += [] if helpful is None else [len({*read.cited} & {*helpful}) / len(read.cited)]
    if not right:
        raise ValueError("there are no rows to measure")
    n = len(right)
    return RagFigures(proportion(right), fmean(shares) if shares else None, citing / n, readable / n)
