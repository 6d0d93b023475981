"""The rules of every contrastive method as their papers write them: plain Python floats, one row at a time.

Nothing here imports contralto or torch. `e` is the main branch, a list of raw logits over the vocabulary; so is every other
branch. Three conventions hold for all of them, because the papers are silent:

- a token that is impossible (`-inf`) under the main branch, or under any branch of non-zero weight, is ruled out;
- a row in which that leaves nothing is the main branch's log-probabilities on its plausible tokens;
- a row that is all `-inf` in the main branch stays so.
"""

import math
from collections.abc import Callable, Sequence

from oracles.decoding import log_softmax, plausible

Logits = Sequence[float]


def weighted(branches: Sequence[Logits], weights: Sequence[float], threshold: float = 0.0) -> list[float]:
    """sum_k w_k log p_k(v) for each token v that the first branch finds plausible."""
    allowed = plausible(branches[0], threshold) if max(branches[0]) > -math.inf else [False] * len(branches[0])
    logs = [log_softmax(branch) for branch in branches]
    scores = []
    for v, keep in enumerate(allowed):
        terms = [(w, log_p[v]) for w, log_p in zip(weights, logs, strict=True) if w != 0]
        possible = keep and all(log_p > -math.inf for _, log_p in terms)
        scores.append(math.fsum(w * log_p for w, log_p in terms) if possible else -math.inf)
    if max(scores) > -math.inf:
        return scores
    return [log_p if keep else -math.inf for log_p, keep in zip(logs[0], allowed, strict=True)]


def vcd(e: Logits, a: Logits, *, alpha: float = 1.0, beta: float = 0.1) -> list[float]:
    """VCD (2311.16922, equations 3 and 4), and ICD (2403.18715): (1 + alpha) log p - alpha log p'."""
    return weighted([e, a], [1 + alpha, -alpha], beta)


def cd_released(
    e: Logits, a: Logits, *, alpha: float = 0.1, amateur_temperature: float = 1.0, st_coef: float = 1.0
) -> list[float]:
    """The score in the beam search of the code of Li et al. (2210.15097): log p_e - st_coef log p_a / tau."""
    return weighted([e, a], [1, -st_coef / amateur_temperature], alpha)


def ritual(e: Logits, t: Logits, *, kappa: float = 3.0, beta: float = 0.1, normalise: bool = False) -> list[float]:
    """RITUAL (2405.17821): log p + kappa log p_T, the mask from p; divided by 1 + kappa where asked for."""
    scale = 1 / (1 + kappa) if normalise else 1
    return weighted([e, t], [scale, scale * kappa], beta)


def vcd_ritual(
    e: Logits, noised: Logits, transformed: Logits, *, alpha: float = 1.0, kappa: float = 3.0, beta: float = 0.1
) -> list[float]:
    """Both at once: log p + kappa log p_T + alpha (log p - log p_noised)."""
    return weighted([e, transformed, noised], [1 + alpha, kappa, -alpha], beta)


def m3id(e: Logits, a: Logits, step: int, *, lam: float = 0.02, alpha: float = 0.1) -> list[float]:
    """M3ID (2403.14003) without its gate: log p + (1 - g) / g (log p - log p'), g = exp(-lam step), step from 0."""
    g = math.exp(-lam * step)
    strength = (1 - g) / g
    return weighted([e, a], [1 + strength, -strength], alpha)


def gated(scores: Sequence[float], e: Logits, step: int, *, gate: float) -> list[float]:
    """M3ID's gate (2403.14003) on any scores: log p where the largest p is at least the gate, but not for the first token."""
    if max(e) == -math.inf or step == 0 or math.exp(max(log_softmax(e))) < gate:
        return list(scores)
    return log_softmax(e)


def pai(e: Logits, amplified: Logits, blind: Logits, *, gamma: float = 1.1, beta: float = 0.1) -> list[float]:
    """PAI (2407.21771), CFG.py: gamma (log p_a - log p_0) + log p_0 on the plausible tokens of p_a; none that is impossible for the model."""
    possible = [a if x > -math.inf else -math.inf for x, a in zip(e, amplified, strict=True)]
    possible = possible if max(possible) > -math.inf else list(amplified)
    return weighted([possible, blind], [gamma, 1 - gamma], beta)


def only(
    e: Logits, h: Logits, *, alpha_pos: float = 3.0, alpha_neg: float = 1.0, gamma: float = 0.2, beta: float = 0.1
) -> list[float]:
    """ONLY (2507.00898), only_sample.py: added where the distributions are closer than gamma, subtracted otherwise."""
    pairs = zip(log_softmax(e), log_softmax(h), strict=True)
    distance = math.fsum(abs(math.exp(x) - math.exp(y)) for x, y in pairs)
    weights = [1, alpha_pos] if distance < gamma else [1 + alpha_neg, -alpha_neg]
    return weighted([e, h], weights, beta)


def cid(e: Logits, a: Logits, *, lam: float = 10.0) -> list[float]:
    """CID as a difference of probabilities: log p + lam (p - p'). No mask; p' = 0 rules nothing out."""
    log_p, log_q = log_softmax(e), log_softmax(a)
    pairs = zip(log_p, log_q, strict=True)
    return [x + lam * (math.exp(x) - math.exp(y)) if x > -math.inf else -math.inf for x, y in pairs]


def cid_log_ratio(e: Logits, a: Logits, *, lam: float = 1.0, alpha: float = 0.1) -> list[float]:
    """CID as a log-ratio, with a mask: log p + lam (log p - log p')."""
    return weighted([e, a], [1 + lam, -lam], alpha)


def cad(e: Logits, a: Logits, *, alpha: float = 0.5) -> list[float]:
    """CAD (2305.14739, equation 2): (1 + alpha) log p(. | context) - alpha log p(. | no context). No mask."""
    return weighted([e, a], [1 + alpha, -alpha])


def cfg(conditional: Logits, unconditional: Logits, *, gamma: float = 1.5) -> list[float]:
    """CFG (2306.17806, equation 7): log p_u + gamma (log p_c - log p_u). No mask; the conditional branch is the main one."""
    return weighted([conditional, unconditional], [gamma, 1 - gamma])


def proxy_tuning(base: Logits, expert: Logits, antiexpert: Logits, *, alpha: float = 1.0) -> list[float]:
    """Proxy tuning (2401.08565), DExperts (2105.03023): log p + alpha (log p_expert - log p_antiexpert). No mask."""
    return weighted([base, expert, antiexpert], [1, alpha, -alpha])


def kl(p: Sequence[float], log_p: Logits, log_q: Logits) -> float:
    """sum_v p_v (log p_v - log q_v), with 0 log 0 = 0."""
    return math.fsum(x * (y - z) for x, y, z in zip(p, log_p, log_q, strict=True) if x > 0)


def jsd(log_p: Logits, log_q: Logits) -> float:
    """The Jensen-Shannon divergence of two distributions: (KL(p || m) + KL(q || m)) / 2, m their mean."""
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    log_m = [math.log((x + y) / 2) if x + y > 0 else -math.inf for x, y in zip(p, q, strict=True)]
    return (kl(p, log_p, log_m) + kl(q, log_q, log_m)) / 2


def kl_from_mean(log_p: Logits, log_q: Logits) -> float:
    """What DoLa's official code ranks layers by: (KL(m || p) + KL(m || q)) / 2, m their mean."""
    m = [(math.exp(x) + math.exp(y)) / 2 for x, y in zip(log_p, log_q, strict=True)]
    log_m = [math.log(x) if x > 0 else -math.inf for x in m]
    return (kl(m, log_m, log_p) + kl(m, log_m, log_q)) / 2


def dola_layer(final: Logits, layers: Sequence[Logits], form: str = "kl") -> int:
    """The candidate layer that differs most from the last one, on the tokens that the last one allows; the first of equals."""
    allowed = [v for v, x in enumerate(final) if x > -math.inf]
    log_p = log_softmax([final[v] for v in allowed])
    distance = {"kl": kl_from_mean, "jsd": jsd}[form]
    divergences = [distance(log_p, log_softmax([layer[v] for v in allowed])) for layer in layers]
    return divergences.index(max(divergences))


def dola(final: Logits, layers: Sequence[Logits], *, relative_top: float = 0.1, form: str = "kl") -> list[float]:
    """DoLa (2309.03883): log p_final - log p_M where p_final >= relative_top max p_final.

    The divergence that chooses M comes before the mask, as in the official code, and here of this row alone.
    """
    return weighted([final, layers[dola_layer(final, layers, form)]], [1, -1], relative_top)


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x)))."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def critic_guided(logits: Logits, critic: Callable[[int], float], *, k: int = 10) -> list[float]:
    """Critic-guided decoding (2212.10938): log p_v + log sigmoid(Q_v) for the k likeliest tokens v.

    `critic(v)` is Q_v, the critic's logit for the text with v appended.
    """
    log_p = log_softmax(logits)
    top = sorted(range(len(log_p)), key=lambda v: -log_p[v])[:k]
    return [x + log_sigmoid(critic(v)) if v in top else -math.inf for v, x in enumerate(log_p)]
