"""Context-aware decoding as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    contrast_inputs=None,
    alpha=0.5,
    gate=None,
    **kwargs,
):
    """Generate by context-aware decoding.

    Args:
        model: the model that generates.
        contrast_inputs: the prompts without their context, as the tokenizer returns them: `input_ids` and
            `attention_mask`. Required.
        alpha: contrast strength, at least 0: 0.5 for summaries, 1 for questions whose context contradicts the model's
            knowledge.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see
            `rules.sure`.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "cad",
        model,
        kwargs,
        contrast_inputs=contrast_inputs,
        alpha=alpha,
        gate=gate,
    )
