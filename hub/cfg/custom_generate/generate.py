"""Classifier-free guidance as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    negative_prompt_ids=None,
    negative_prompt_attention_mask=None,
    guidance_scale=1.5,
    gate=None,
    **kwargs,
):
    """Generate by classifier-free guidance.

    Args:
        model: the model that generates.
        negative_prompt_ids: `(prompts, T)` the negative prompts, padded on the left; one may serve all rows. None
            stands for the last token of each prompt, as in transformers.
        negative_prompt_attention_mask: `(prompts, T)` their mask; None if there is no padding.
        guidance_scale: `gamma`, at least 0; 1 is plain decoding, larger values follow the prompt more closely.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see
            `rules.sure`.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "cfg",
        model,
        kwargs,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        guidance_scale=guidance_scale,
        gate=gate,
    )
