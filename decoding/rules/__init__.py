"""Rules: pure functions of next-token logits that score tokens by contrast, in the notation of the papers.

Every rule takes the logits of its branches, `(..., V)`, main branch first, and returns scores of the same shape, dtype
and device: unnormalised log-probabilities, `-inf` where a token is excluded. Nothing is changed in place.

Notation: `p_k = softmax(branches[k])`, `V` the vocabulary size. Rules use log-probabilities, so a constant per row and branch
can be added to the logits without changing the scores: raw logits and log-probabilities are both accepted, and scores can be
summed over steps (beam search) without a bias.

`-inf` is the logit of an impossible token. The caller must reject logits with NaN or `+inf`, see `validity`: the rules would
exclude the tokens that these affect.
"""

from contralto.decoding.rules.base import combine, plausible
from contralto.decoding.rules.candidates import contrastive_search, critic_guided, degeneration_penalty
from contralto.decoding.rules.gate import gated, sure
from contralto.decoding.rules.images import (
    instruction_contrastive_decoding,
    m3id,
    one_layer_intervention,
    pay_attention_to_image,
    ritual,
    ritual_vcd,
    visual_contrastive_decoding,
)
from contralto.decoding.rules.layers import dola, dola_jsd
from contralto.decoding.rules.models import (
    contrastive_decoding,
    contrastive_decoding_li,
    contrastive_decoding_released,
    proxy_tuning,
)
from contralto.decoding.rules.prompts import (
    classifier_free_guidance,
    context_aware_decoding,
    contrastive_input_decoding,
    contrastive_input_decoding_log_ratio,
)

__all__ = [
    "classifier_free_guidance",
    "combine",
    "context_aware_decoding",
    "contrastive_decoding",
    "contrastive_decoding_li",
    "contrastive_decoding_released",
    "contrastive_input_decoding",
    "contrastive_input_decoding_log_ratio",
    "contrastive_search",
    "critic_guided",
    "degeneration_penalty",
    "dola",
    "dola_jsd",
    "gated",
    "instruction_contrastive_decoding",
    "m3id",
    "one_layer_intervention",
    "pay_attention_to_image",
    "plausible",
    "proxy_tuning",
    "ritual",
    "ritual_vcd",
    "sure",
    "visual_contrastive_decoding",
]
