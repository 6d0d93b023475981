"""Contrastive search as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    penalty_alpha=0.6,
    top_k=4,
    **kwargs,
):
    """Generate by contrastive search.

    Args:
        model: the model that generates.
        penalty_alpha: weight of the degeneration penalty, in [0, 1]. The paper uses 0.6; 0 is greedy search.
        top_k: number of candidates, at least 1. The papers use 3 to 10; 1 is greedy search.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "contrastive-search",
        model,
        kwargs,
        penalty_alpha=penalty_alpha,
        top_k=top_k,
    )
