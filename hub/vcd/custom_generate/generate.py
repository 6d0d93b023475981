"""Visual contrastive decoding as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    seed=None,
    alpha=1.0,
    beta=0.1,
    noise_step=500,
    gate=None,
    **kwargs,
):
    """Generate by visual contrastive decoding.

    Args:
        model: the model that generates.
        seed: of the noise: one for all images, or one per image, so that an image's noise does not depend on its
            batch. None draws from torch's global generator.
        alpha: contrast strength, at least 0.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.
        noise_step: t in 0..999; the paper's 500 leaves 86% of the amplitude, 999 leaves 29%.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see
            `rules.sure`.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "vcd",
        model,
        kwargs,
        seed=seed,
        alpha=alpha,
        beta=beta,
        noise_step=noise_step,
        gate=gate,
    )
