"""Contrastive decoding as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    amateur=None,
    form="obrien",
    beta=None,
    alpha=0.1,
    amateur_window=None,
    gate=None,
    amateur_temperature=None,
    st_coef=None,
    **kwargs,
):
    """Generate by contrastive decoding.

    Args:
        model: the model that generates.
        amateur: the weaker model, loaded, on any device and in any dtype; or the model itself, weakened:
            `self:layers=8`, `self:dropout=0.3` or `self:int4`. Required.
        form: the formula: "obrien" or "li" or "released", see below.
        beta: contrast strength, at least 0; 0 is the expert with the constraint alone. Only for `form='obrien'`, where
            its default is 0.5.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        amateur_window: number of last prompt tokens that the amateur sees; None for all, 1 as in Li et al.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see
            `rules.sure`.
        amateur_temperature: `tau` > 0; the paper uses 0.5 for GPT-2 and 1.0 for OPT. Only for `form='li'`, where its
            default is 1.0.
        st_coef: weight of the amateur, at least 0; the released scripts use 1.0 or 0.8. Only for `form='released'`,
            where its default is 1.0.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "contrastive-decoding",
        model,
        kwargs,
        amateur=amateur,
        form=form,
        beta=beta,
        alpha=alpha,
        amateur_window=amateur_window,
        gate=gate,
        amateur_temperature=amateur_temperature,
        st_coef=st_coef,
    )
