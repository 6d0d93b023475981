"""The page of `contralto demo`: three problems token by token, then the page of the comparison."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from contralto.cli import demo
from contralto.common.html import render_page
from contralto.eval.comparison import report

LEAD = (
    "An expert of 170 thousand parameters solves word problems step by step. An amateur a tenth of its size shares its bad "
    f"habit, but not its skill. Contrastive decoding (beta {demo.BETA}, alpha {demo.ALPHA}) subtracts the amateur, inside an "
    "unmodified generate(). Seeds 0 to 2 are three trainings of the expert; the control world's corpus has no shortcut."
)


def render(comparison: dict[str, Any], examples: Sequence[demo.Example], cost: demo.Cost, tokenizer: Any) -> str:
    """The page as text."""
    before = render_page(
        "contralto.cli.demo",
        "demo.html.j2",
        examples=examples,
        right=demo.is_right,
        word=lambda token: demo.word(token, tokenizer),
        space=lambda token: demo.space(token, tokenizer),
    )
    return report.page(
        comparison,
        title="Contrastive decoding on models that really learned something",
        lead=LEAD,
        before=Markup(before),  # rendered with escapes above
        reading=[demo.READING, demo.price(cost)],
        made_by="contralto demo",
    )
