"""The mathematics of preference optimisation: pure functions of log-probabilities, one loss per pair.

Notation, in nats, for a prompt x with a chosen completion `y_w` and a rejected one `y_l`:

    r(y) = log pi(y | x) - log pi_ref(y | x)    the log-ratio, summed over the tokens of y; r_w, r_l for the two
    s(y) = f'(pi / pi_ref)                      the score: r itself, unless an f-divergence transforms it
    |y|                                         the number of tokens of y

Every loss takes tensors of shape `(B,)`, or `(B, T)` for values per token, and returns `(B,)`; a trainer takes the mean. The positional
parameters of a loss name the data that it needs (`objective.Pairs`); the keyword-only ones are its settings, by the paper's letters.

- `pairwise`: losses of the difference of two scores: DPO and its variants.
- `pointwise`: losses that compare each completion with the reference: APO, BCO, NCA, SPPO.
- `transport`: losses that sort the batch: AOT.
- `reference_free`: losses without a reference model: SFT, CPO, SimPO, ARPO, ORPO, AlphaPO, SimPER.
- `token_level`: losses with a divergence or a mask per token: TDPO, SparsePO.
- `visual`: losses that compare images: S-VCO, mDPO.
- `transforms`: what is done to log-probabilities before and after: f-divergences, LD-DPO, WPO.
- `settings`: the ranges of the settings.

`contralto.align.losses.registry` names the losses, and `contralto.align.losses.objective` combines several by weight.
"""

from contralto.align.losses.preference.pairwise import (
    cal_dpo,
    discopop,
    dpop,
    exo_pair,
    hinge,
    ipo,
    margin,
    odpo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from contralto.align.losses.preference.pointwise import (
    apo_auto,
    apo_down,
    apo_down_norm,
    apo_zero,
    apo_zero_norm,
    bco_pair,
    nca_pair,
    sppo_hard,
)
from contralto.align.losses.preference.reference_free import (
    alphapo,
    arpo,
    cpo,
    cpo_simpo,
    orpo,
    sft,
    simper,
    simpo,
)
from contralto.align.losses.preference.settings import check_setting, check_settings
from contralto.align.losses.preference.token_level import sparsepo, tdpo1, tdpo2
from contralto.align.losses.preference.transforms import (
    F_DIVERGENCES,
    f_divergence_scores,
    length_desensitized,
    per_token,
    wpo_weights,
)
from contralto.align.losses.preference.transport import aot, aot_unpaired
from contralto.align.losses.preference.visual import mdpo, svco

__all__ = [
    "F_DIVERGENCES",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_auto",
    "apo_down",
    "apo_down_norm",
    "apo_zero",
    "apo_zero_norm",
    "arpo",
    "bco_pair",
    "cal_dpo",
    "check_setting",
    "check_settings",
    "cpo",
    "cpo_simpo",
    "discopop",
    "dpop",
    "exo_pair",
    "f_divergence_scores",
    "hinge",
    "ipo",
    "length_desensitized",
    "margin",
    "mdpo",
    "nca_pair",
    "odpo",
    "orpo",
    "per_token",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simper",
    "simpo",
    "sparsepo",
    "sppo_hard",
    "svco",
    "tdpo1",
    "tdpo2",
    "wpo_weights",
]
