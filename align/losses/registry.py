"""The preference losses by name.

A loss of another package is a `Loss` that calls `register`, or that an entry point of the group `contralto.losses` names:

    [project.entry-points."contralto.losses"]
    mine = "my_package:MINE"

It can then be used as `loss_type` like the losses below.
"""

from contralto.align.losses import preference as losses
from contralto.align.losses.loss import Loss, check_loss
from contralto.common.registry import Registry

__all__ = ["BUILT_IN", "LOSSES", "register"]

_NO_SCORE = {"f_divergence_type": "has no f-divergence"}
"""For losses of log-ratios or log-probabilities themselves; losses of `scores` take any f-divergence."""
_SORTED = {"use_weighting": "sorts chosen and rejected completions apart, so that pairs have no weight"}
_DIVERGENCE = {
    "precompute_ref_log_probs": "needs the whole distribution of the reference at every token",
    "ld_alpha": "sums a divergence besides the log-ratios that ld_alpha weights",
}
_VISUAL = {
    "report": "compares images, and a report compares the two completions of a pair",
    "use_weighting": "compares images, and weights are those of two completions",
    "ld_alpha": "compares a completion with itself, so that lengths do not differ",
}

BUILT_IN = (
    Loss(
        name="sigmoid",
        description="DPO (Rafailov et al. 2023, arXiv 2305.18290)",
        function=losses.sigmoid,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="hinge",
        description="SLiC's hinge loss (Zhao et al. 2023, arXiv 2305.10425)",
        function=losses.hinge,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="ipo",
        description="IPO (Azar et al. 2023, arXiv 2310.12036)",
        function=losses.ipo,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=True,
        from_trl=True,
    ),
    Loss(
        name="exo_pair",
        description="EXO of a pair (Ji et al. 2024, arXiv 2402.00856)",
        function=losses.exo_pair,
        options={"epsilon": "label_smoothing"},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="nca_pair",
        description="NCA of a pair (Chen et al. 2024, arXiv 2402.05369)",
        function=losses.nca_pair,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="robust",
        description="rDPO, unbiased under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409)",
        function=losses.robust,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="bco_pair",
        description="BCO of a pair (Jung et al. 2024, arXiv 2404.04656)",
        function=losses.bco_pair,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="sppo_hard",
        description="SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675)",
        function=losses.sppo_hard,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="aot",
        description="AOT, paired (Melnyk et al. 2024, arXiv 2406.05882)",
        function=losses.aot,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE | _SORTED,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="aot_unpaired",
        description="AOT, unpaired (Melnyk et al. 2024, arXiv 2406.05882)",
        function=losses.aot_unpaired,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE | _SORTED,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="apo_zero",
        description="APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266)",
        function=losses.apo_zero,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="apo_down",
        description="APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266)",
        function=losses.apo_down,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="discopop",
        description="DiscoPOP (Lu et al. 2024, arXiv 2406.08414)",
        function=losses.discopop,
        options={"tau": "discopop_tau"},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="sft",
        description="likelihood of the chosen completions",
        function=losses.sft,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=False,
        from_trl=True,
    ),
    Loss(
        name="sigmoid_norm",
        description="length-normalised DPO (Tulu 3, Lambert et al. 2024, arXiv 2411.15124)",
        function=losses.sigmoid_norm,
        options={},
        requires=frozenset(),
        forbids={},
        length_normalised=True,
        from_trl=True,
    ),
    Loss(
        name="apo_auto",
        description="APO-zero or APO-down for each pair, by its advantage (ours)",
        function=losses.apo_auto,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="apo_zero_norm",
        description="length-normalised APO-zero (ours)",
        function=losses.apo_zero_norm,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=True,
        from_trl=False,
    ),
    Loss(
        name="apo_down_norm",
        description="length-normalised APO-down (ours)",
        function=losses.apo_down_norm,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=True,
        from_trl=False,
    ),
    Loss(
        name="margin",
        description="DPO with a margin per pair (Amini et al. 2024, arXiv 2402.10571)",
        function=losses.margin,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="odpo",
        description="ODPO (Amini et al. 2024, arXiv 2402.10571)",
        function=losses.odpo,
        options={"alpha": "odpo_alpha"},
        requires=frozenset({"positive_margin"}),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="cpo",
        description="CPO (Xu et al. 2024, arXiv 2401.08417)",
        function=losses.cpo,
        options={"alpha": "cpo_alpha"},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="simpo",
        description="SimPO (Meng et al. 2024, arXiv 2405.14734)",
        function=losses.simpo,
        options={"gamma": "simpo_gamma"},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=True,
        from_trl=False,
    ),
    Loss(
        name="cpo_simpo",
        description="SimPO with CPO's likelihood of the chosen completions",
        function=losses.cpo_simpo,
        options={"alpha": "cpo_alpha", "gamma": "simpo_gamma"},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=True,
        from_trl=False,
    ),
    Loss(
        name="arpo",
        description="ARPO (X-ALMA, Xu et al. 2024, arXiv 2410.03115)",
        function=losses.arpo,
        options={"alpha": "cpo_alpha", "eta": "arpo_eta", "scale": "arpo_scale"},
        requires=frozenset(),
        forbids=_NO_SCORE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="tdpo1",
        description="TDPO1 (Zeng et al. 2024, arXiv 2404.11999)",
        function=losses.tdpo1,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE | _DIVERGENCE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="tdpo2",
        description="TDPO2 (Zeng et al. 2024, arXiv 2404.11999)",
        function=losses.tdpo2,
        options={"alpha": "tdpo_alpha"},
        requires=frozenset(),
        forbids=_NO_SCORE | _DIVERGENCE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="sparsepo",
        description="SparsePO (Christopoulou et al. 2024, arXiv 2410.05102)",
        function=losses.sparsepo,
        options={},
        requires=frozenset(),
        forbids=_NO_SCORE | _DIVERGENCE,
        length_normalised=False,
        from_trl=False,
    ),
    Loss(
        name="svco",
        description="S-VCO (Wu et al. 2025, arXiv 2502.13928)",
        function=losses.svco,
        options={},
        requires=frozenset({"alone"}),
        forbids=_NO_SCORE | _VISUAL,
        length_normalised=False,
        from_trl=False,
    ),
)
"""The losses of contralto, those of TRL first."""

LOSSES: Registry[Loss] = Registry("loss", group="contralto.losses", check=check_loss)
"""All losses by name."""
for _loss in BUILT_IN:
    LOSSES.register(_loss)


def register(loss: Loss) -> Loss:
    """Add a loss.

    Args:
        loss: the declaration.

    Returns:
        The declaration.

    Raises:
        ValueError: there is another loss of that name.
    """
    return LOSSES.register(loss)
