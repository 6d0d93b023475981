"""DoLa as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""

from contralto.decoding.hub import decode


def generate(
    model,
    *,
    form="kl",
    relative_top=0.1,
    dola_layers="high",
    final_norm=True,
    gate=None,
    **kwargs,
):
    """Generate by DoLa.

    Args:
        model: the model that generates.
        form: the formula: "kl" or "jsd", see below.
        relative_top: plausibility threshold in [0, 1] on `final`, see `plausible`.
        dola_layers: "low" or "high", every second layer of the lower or upper half (of 20 layers in models of over
            40), or numbers of layers, 1 for the first. The embeddings, 0, are a candidate only if they are listed.
        final_norm: whether early layers pass the final norm. Default yes; no, as in the official code.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see
            `rules.sure`.
        kwargs: the other arguments of `generate()`.

    Returns:
        What `generate()` returns.
    """
    return decode(
        "dola",
        model,
        kwargs,
        form=form,
        relative_top=relative_top,
        dola_layers=dola_layers,
        final_norm=final_norm,
        gate=gate,
    )
