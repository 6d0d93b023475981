"""The page of `contralto demo`: three problems token by token, then the page of the comparison."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from contralto.cli.demo.comparison import ALPHA, BETA
from contralto.cli.demo.examples import Example, TokenCost, describe_cost, space, word
from contralto.common.html import render_page
from contralto.eval.comparison import report
from contralto.testbed.measure import is_right

__all__ = ["READING", "render"]

LEAD = (
    "An expert of 170 thousand parameters solves word problems step by step. An amateur a tenth of its size shares its bad "
    f"habit, but not its skill. Contrastive decoding (beta {BETA}, alpha {ALPHA}) subtracts the amateur, inside an "
    "unmodified generate(). Seeds 0 to 2 are three trainings of the expert; the control world's corpus has no shortcut."
)
READING = (
    "The gain is built into the world. In the corpus of seeds 0 to 2, six of ten solutions of four or five "
    "steps stop too early. Expert and amateur both learned that mistake; only the expert learned how to go on, and the "
    "contrast brings that out. The control corpus has no such mistake, and there the contrast has nothing to repair. The "
    "mask alone never changes a greedy choice, so its row repeats greedy by definition. Under sampling it is a real baseline, "
    "and so is a lower temperature: a contrast also sharpens, by the factor 1 + beta, and a gain over plain sampling that "
    "T = 1 / (1 + beta) has too is no gain of the contrast."
)


def render(comparison: dict[str, Any], examples: Sequence[Example], cost: TokenCost, tokenizer: Any) -> str:
    """Return the page as HTML.

    Args:
        comparison: the comparison that the page shows.
        examples: problems that stand before it.
        cost: the cost of a token.
        tokenizer: the tokenizer of the testbed.
    """
    before = render_page(
        "contralto.cli.demo",
        "demo.html.j2",
        examples=examples,
        right=is_right,
        word=lambda token: word(token, tokenizer),
        space=lambda token: space(token, tokenizer),
    )
    return report.page(
        comparison,
        title="Contrastive decoding on models that really learned something",
        lead=LEAD,
        before=Markup(before),  # rendered with escapes above
        reading=[READING, describe_cost(cost)],
        made_by="contralto demo",
    )
