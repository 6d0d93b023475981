"""Comparisons of decoders on the same documents, with the controls that could explain a gain away.

- `compare`: the entry point; `planning`, `tasks`, `runs` and `columns` run the decoders and keep their answers.
- `decoders`, `rows`, `controls`: the rows of a comparison.
- `samples`: documents with their answers, as lm-eval logs them.
- `summary`, `answers`, `significance`, `disagreements`: the figures, as plain data.
- `report`: tables for the terminal, and a page with plots.
- `cost`: forward passes and operations, counted.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.comparison.controls import generation_rows as generation_rows
    from contralto.eval.comparison.controls import ranking_rows as ranking_rows
    from contralto.eval.comparison.decoders import DecoderChoice as DecoderChoice
    from contralto.eval.comparison.decoders import parse_decoder as parse_decoder
    from contralto.eval.comparison.planning import Subject as Subject
    from contralto.eval.comparison.rows import ComparisonRow as ComparisonRow
    from contralto.eval.comparison.summary import summarise as summarise
    from contralto.eval.comparison.tasks import Conditions as Conditions

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "controls": ["generation_rows", "ranking_rows"],
        "decoders": ["DecoderChoice", "parse_decoder"],
        "planning": ["Subject"],
        "rows": ["ComparisonRow"],
        "summary": ["summarise"],
        "tasks": ["Conditions"],
    },
)
