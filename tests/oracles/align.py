"""Preference losses, divergences, masks and schedules as their papers write them: plain Python floats, one text at a time.

Nothing here imports contralto or torch. A text carries one number per token; sums and means are taken here.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

Floats = Sequence[float]


class Text(NamedTuple):
    """A completion: log-probabilities under policy and reference, and more, per token."""

    policy: Floats
    reference: Floats
    kl: Floats = ()
    m_u: Floats = ()
    m_d: Floats = ()
    blind: float = 0.0
    swapped: float = 0.0

    @property
    def n(self) -> int:
        return len(self.policy)

    @property
    def logp(self) -> float:
        return math.fsum(self.policy)

    @property
    def ref(self) -> float:
        return math.fsum(self.reference)

    @property
    def r(self) -> float:
        return self.logp - self.ref


class Pair(NamedTuple):
    w: Text
    l: Text
    margin: float = 0.0
    advantage: float | None = None


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logsig(x: float) -> float:
    return math.log(sig(x))


def smoothed(x: float, eps: float) -> float:
    return -(1 - eps) * logsig(x) - eps * logsig(-x)


def score(r: float, divergence: str = "reverse_kl", alpha: float = 0.5) -> float:
    """f'(u) at u = exp(r), as TRL writes its constants."""
    u = math.exp(r)
    return {
        "reverse_kl": math.log(u),
        "forward_kl": 1 - 1 / u,
        "js_divergence": math.log(2 * u / (1 + u)),
        "alpha_divergence": (u ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence]


def nll(pairs: Sequence[Pair]) -> float:
    """Of all chosen tokens of the batch."""
    return -math.fsum(x for pair in pairs for x in pair.w.policy) / sum(pair.w.n for pair in pairs)


def loss(name: str, pairs: Sequence[Pair], **settings: float) -> list[float]:
    """The loss of every pair."""
    if name in ("aot", "aot_unpaired"):
        return aot(name, pairs, **settings)
    if name == "sft":
        return [nll(pairs)] * len(pairs)
    alpha = settings.pop("alpha", 1.0) if name in ("cpo", "cpo_simpo", "arpo", "orpo") else 0.0
    rule = {"cpo_simpo": simpo}.get(name) or globals()[name]
    return [rule(pair, **settings) + alpha * (nll(pairs) if alpha else 0.0) for pair in pairs]


def sigmoid(p: Pair, *, beta: float) -> float:
    return -logsig(beta * (p.w.r - p.l.r))


def hinge(p: Pair, *, beta: float) -> float:
    return max(0.0, 1 - beta * (p.w.r - p.l.r))


def ipo(p: Pair, *, beta: float) -> float:
    return (p.w.r / p.w.n - p.l.r / p.l.n - 1 / (2 * beta)) ** 2


def exo_pair(p: Pair, *, beta: float, epsilon: float) -> float:
    q = [math.exp(beta * p.w.r), math.exp(beta * p.l.r)]
    q = [x / sum(q) for x in q]
    return sum(x * math.log(x / y) for x, y in zip(q, (1 - epsilon, epsilon), strict=True))


def nca_pair(p: Pair, *, beta: float) -> float:
    return -logsig(beta * p.w.r) - sum(logsig(-beta * r) for r in (p.w.r, p.l.r)) / 2


def robust(p: Pair, *, beta: float, label_smoothing: float) -> float:
    x, eps = beta * (p.w.r - p.l.r), label_smoothing
    return (-(1 - eps) * logsig(x) + eps * logsig(-x)) / (1 - 2 * eps)


def bco_pair(p: Pair, *, beta: float) -> float:
    return -logsig(beta * p.w.r) - logsig(-beta * p.l.r)


def sppo_hard(p: Pair, *, beta: float) -> float:
    return (p.w.r - 1 / (2 * beta)) ** 2 + (p.l.r + 1 / (2 * beta)) ** 2


def aot(name: str, pairs: Sequence[Pair], *, beta: float, label_smoothing: float) -> list[float]:
    if name == "aot":
        a = sorted(p.w.logp - p.l.logp for p in pairs)
        b = sorted(p.w.ref - p.l.ref for p in pairs)
    else:
        a, b = sorted(p.w.r for p in pairs), sorted(p.l.r for p in pairs)
    return [smoothed(beta * (x - y), label_smoothing) for x, y in zip(a, b, strict=True)]


def apo_zero(p: Pair, *, beta: float) -> float:
    return 1 - sig(beta * p.w.r) + sig(beta * p.l.r)


def apo_down(p: Pair, *, beta: float) -> float:
    return sig(beta * p.w.r) + 1 - sig(beta * (p.w.r - p.l.r))


def apo_auto(p: Pair, *, beta: float) -> float:
    proxy = p.l.ref / p.l.n - p.w.ref / p.w.n
    better = (proxy if p.advantage is None else p.advantage) > 0
    return apo_zero(p, beta=beta) if better else apo_down(p, beta=beta)


def apo_zero_norm(p: Pair, *, beta: float) -> float:
    return 1 - sig(beta * p.w.r / p.w.n) + sig(beta * p.l.r / p.l.n)


def apo_down_norm(p: Pair, *, beta: float) -> float:
    w, l = p.w.r / p.w.n, p.l.r / p.l.n
    return sig(beta * w) + 1 - sig(beta * (w - l))


def discopop(p: Pair, *, beta: float, tau: float) -> float:
    rho = beta * (p.w.r - p.l.r)
    return (1 - sig(rho / tau)) * -logsig(rho) + sig(rho / tau) * math.exp(-rho)


def sigmoid_norm(p: Pair, *, beta: float) -> float:
    return -logsig(beta * (p.w.r / p.w.n - p.l.r / p.l.n))


def margin(p: Pair, *, beta: float) -> float:
    return -logsig(beta * (p.w.r - p.l.r) - p.margin)


def odpo(p: Pair, *, beta: float, alpha: float) -> float:
    return -logsig(beta * (p.w.r - p.l.r) - alpha * math.log(p.margin))


def cpo(p: Pair, *, beta: float, label_smoothing: float) -> float:
    return smoothed(beta * (p.w.logp - p.l.logp), label_smoothing)


def simpo(p: Pair, *, beta: float, gamma: float, label_smoothing: float) -> float:
    return smoothed(beta * mean(p.w.policy) - beta * mean(p.l.policy) - gamma, label_smoothing)


def arpo(p: Pair, *, beta: float, eta: float, scale: float, label_smoothing: float) -> float:
    tau = min(scale * math.exp(eta * abs(mean(p.w.policy) - mean(p.l.policy))) - 1, 1)
    return smoothed(beta * (p.w.logp - tau * p.l.logp), label_smoothing)


def tdpo1(p: Pair, *, beta: float) -> float:
    u = beta * p.w.r - beta * p.l.r
    delta = beta * sum(p.l.kl) - beta * sum(p.w.kl)
    return -logsig(u - delta)


def tdpo2(p: Pair, *, beta: float, alpha: float) -> float:
    u = beta * p.w.r - beta * p.l.r
    delta = beta * sum(p.l.kl) - beta * sum(p.w.kl)
    return -logsig(u - alpha * delta)


def sparsepo(p: Pair, *, beta: float, lambda_u: float, lambda_d: float, common: bool = False) -> float:
    def weighted(mask: Floats, values: Floats) -> float:
        return math.fsum(m * v for m, v in zip(mask, values, strict=True))

    def ratios(y: Text) -> list[float]:
        return [a - b for a, b in zip(y.policy, y.reference, strict=True)]

    u = beta * (weighted(p.w.m_u, ratios(p.w)) - weighted(p.l.m_u, ratios(p.l)))
    delta = beta * (weighted(p.l.m_d, p.l.kl) - weighted(p.w.m_d, p.w.kl))
    norms = lambda_u * (sum(p.w.m_u) + sum(p.l.m_u)) + lambda_d * (sum(p.w.m_d) + sum(p.l.m_d))
    return -logsig(u - delta) + (norms / 2 if common else norms)


def dpop(p: Pair, *, beta: float, penalty: float) -> float:
    fallen = max(0.0, p.w.ref - p.w.logp)
    return -logsig(beta * (p.w.r - p.l.r - penalty * fallen))


def cal_dpo(p: Pair, *, beta: float, alpha: float) -> float:
    squares = (p.w.r - 1 / (2 * beta)) ** 2 + (p.l.r - -1 / (2 * beta)) ** 2
    return -logsig(p.w.r - p.l.r) + alpha * squares


def orpo(p: Pair, *, beta: float) -> float:
    """Without the likelihood, which `loss` adds."""
    odds = [q / (1 - q) for q in (math.exp(mean(y.policy)) for y in (p.w, p.l))]
    return -beta * logsig(math.log(odds[0] / odds[1]))


def alphapo(p: Pair, *, beta: float, alpha: float, gamma: float) -> float:
    rewards = [beta * (1 - math.exp(mean(y.policy)) ** -alpha) / alpha for y in (p.w, p.l)]
    return -logsig(rewards[0] - rewards[1] - gamma)


def simper(p: Pair) -> float:
    """Of inverse perplexities."""
    w, l = (1 / math.exp(-mean(y.policy)) for y in (p.w, p.l))
    return l - w


def mdpo(p: Pair, *, beta: float, delta: float) -> float:
    """The rejected text under the image of the chosen one is its swapped form."""
    return (
        -logsig(beta * p.w.r - beta * p.l.swapped)
        - logsig(beta * p.w.r - beta * p.w.swapped)
        - logsig(beta * p.w.r - delta)
    )


def svco(p: Pair, *, beta: float) -> float:
    steps = [(y.r, y.blind) for y in (p.w, p.l)] + [(y.blind, y.swapped) for y in (p.w, p.l)]
    return sum(-logsig(beta * (a - b)) for a, b in steps)


def ld(y: Text, other: Text, alpha: float) -> float:
    """LD-DPO: what the longer text has beyond the shorter one counts alpha."""
    shared = min(y.n, other.n)
    return sum(y.policy[:shared]) + alpha * sum(y.policy[shared:])


# Single completions with a label


def kto(y: Text, label: bool, z: float, *, beta: float, desirable_weight: float, undesirable_weight: float) -> float:
    """KTO, equations 7 and 8: lambda_y - v(x, y)."""
    if label:
        return desirable_weight - desirable_weight * sig(beta * (y.r - z))
    return undesirable_weight - undesirable_weight * sig(beta * (z - y.r))


def npo(y: Text, *, beta: float) -> float:
    """NPO, equation 3: -2 / beta log sigmoid(-beta log ratio)."""
    ratio = math.exp(y.logp) / math.exp(y.ref)
    return 2 / beta * math.log(1 + ratio**beta)


def qcrd(y: Text, label: bool, quality: float, *, beta: float, delta: float) -> float:
    """QCRD: s CE of a positive text, -beta (1 - s) min(CE - delta, 0) of a negative one; CE is the mean over the tokens."""
    entropy = -mean(y.policy)
    return quality * entropy if label else -beta * (1 - quality) * min(entropy - delta, 0.0)


def mean_logp(texts: Sequence[Text]) -> float:
    """Of all tokens of all texts."""
    return mean([x for y in texts for x in y.policy])


# Divergences


def softmax(logits: Floats) -> list[float]:
    top = max(logits)
    e = [math.exp(z - top) for z in logits]
    return [x / math.fsum(e) for x in e]


def kl(p: Floats, q: Floats) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


def mix(share: float, p: Floats, q: Floats) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]


def divergence(name: str, student: Floats, teacher: Floats, *, alpha: float = 0.1, beta: float = 0.5) -> float:
    """Of two rows of logits."""
    q, p = softmax(student), softmax(teacher)
    if name == "jsd":
        m = mix(beta, p, q)
        return {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "tvd": math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "skew_kl": kl(p, mix(alpha, p, q)),
        "skew_reverse_kl": kl(q, mix(1 - alpha, p, q)),
    }[name]


def uld(student: Floats, teacher: Floats, c: float = 1.0, d: float = 1.0) -> float:
    """ULD's distance of rows of logits of any two sizes, of probabilities scaled by c (student) and d (teacher)."""
    return sorted_l1([c * x for x in softmax(student)], [d * x for x in softmax(teacher)])


def sorted_l1(q: Floats, p: Floats) -> float:
    size = max(len(q), len(p))
    q, p = (sorted([*x, *[0.0] * (size - len(x))], reverse=True) for x in (q, p))
    return math.fsum(abs(x - y) for x, y in zip(q, p, strict=True))


def gold(
    student: Floats,
    teacher: Floats,
    matched: Sequence[tuple[int, int]],
    c: float = 1.0,
    d: float = 1.0,
    *,
    beta: float = 0.5,
    weights: tuple[float, float] | None = None,
) -> float:
    """GOLD's hybrid loss of rows of logits; pairs are ids of student and teacher."""
    q, p = [c * x for x in softmax(student)], [d * x for x in softmax(teacher)]
    own, other = [q[i] for i, _ in matched], [p[j] for _, j in matched]
    m = mix(beta, other, own)
    jsd = {
        0: kl(other, own) - math.fsum(other) + math.fsum(own),
        1: kl(own, other) - math.fsum(own) + math.fsum(other),
    }.get(beta, beta * kl(other, m) + (1 - beta) * kl(own, m))
    share = len(matched) / len(p)
    w_m, w_u = weights or (share, 1 - share)
    rest = [x for i, x in enumerate(q) if i not in {i for i, _ in matched}]
    other_rest = [x for j, x in enumerate(p) if j not in {j for _, j in matched}]
    return w_m * jsd + w_u * sorted_l1(rest, other_rest)


def head(hidden: Floats, weight: Sequence[Floats], bias: Floats, scale: float, softcap: float | None) -> list[float]:
    """Logits of one hidden state."""
    z = [
        scale * (math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + b)
        for row, b in zip(weight, bias, strict=True)
    ]
    return z if softcap is None else [softcap * math.tanh(x / softcap) for x in z]


class TargetReference(NamedTuple):
    """The log-probability of a token, its gradient by the products with the head, and statistics of the distribution."""

    logp: float
    gradient: list[float]
    entropy: float
    log_sum_sq_probs: float
    mean_logits: float
    is_top1: bool


def target_passes(
    products: Floats, target: int, *, scale: float, softcap: float | None, temperature: float, factor: float
) -> TargetReference:
    """Of the products of one hidden state, with their bias; `factor` is that of the log-probability in the loss."""
    curves = [1.0 if softcap is None else 1 - math.tanh(scale * x / softcap) ** 2 for x in products]
    logits = [scale * x if softcap is None else softcap * math.tanh(scale * x / softcap) for x in products]
    z = [x / temperature for x in logits]
    top = max(z)
    log_sum = math.log(math.fsum(math.exp(x - top) for x in z))
    log_q = [x - top - log_sum for x in z]
    q = [math.exp(x) for x in log_q]
    by_logit = [factor * ((v == target) - x) / temperature for v, x in enumerate(q)]
    return TargetReference(
        log_q[target],
        [g * c * scale for g, c in zip(by_logit, curves, strict=True)],
        -math.fsum(x * y for x, y in zip(q, log_q, strict=True) if x > 0),
        math.log(math.fsum(x * x for x in q)),
        math.fsum(z) / len(z),
        z.index(top) == target,
    )


# Masks and schedules


def mapo(activations: Sequence[Sequence[Sequence[Floats]]]) -> list[float]:
    """By kind, by place, by token, by feature: mean over features, z-norm and rescaling over tokens, mean of places, of kinds."""

    def rescaled(place: Sequence[Floats]) -> list[float]:
        a = [mean(features) for features in place]
        deviation = math.sqrt(sum((x - mean(a)) ** 2 for x in a) / (len(a) - 1))
        z = [(x - mean(a)) / deviation for x in a]
        return [(x - min(z)) / (max(z) - min(z)) for x in z]

    kinds = [[mean(column) for column in zip(*map(rescaled, places), strict=True)] for places in activations]
    return [mean(column) for column in zip(*kinds, strict=True)]


def alpha(p: Floats, q: Floats, *, alpha_0: float = 0.1, low: float = 0.01, high: float = 0.1) -> list[float]:
    """DistiLLM-2, algorithm 1: 1 - (1 - alpha_0) m / (p - q), m the mean of the gaps."""
    gaps = [x - y for x, y in zip(p, q, strict=True)]
    return [min(max(1 - (1 - alpha_0) * mean(gaps) / gap, low), high) for gap in gaps]


def beta(epoch: int, epochs: int, step: int, steps: int, *, beta_0: float = 0.5, beta_max: float = 1.0) -> float:
    """DistiLLM-2, algorithm 1: clip(e / E + tau / T, beta_0, 1)."""
    return min(max(epoch / epochs + step / steps, beta_0), beta_max)


def lambda_return(values: Sequence[float], reward: float, t: int, *, lam: float, gamma: float) -> float:
    """The lambda-return of state t of a text with a reward at its end, as the mixture of n-step returns (Sutton & Barto, 12.3).

    `values[n]` is the value of state n; the last state's return is the reward. An n-step return goes n states on and takes that
    state's value, or the reward at the end; it has the weight `(1 - lam) lam^(n - 1)`, the one to the end all the rest.
    """
    last = len(values) - 1
    if t == last:
        return reward
    steps = last - t
    mixed = sum((1 - lam) * lam ** (n - 1) * gamma**n * values[t + n] for n in range(1, steps + 1))
    return mixed + lam**steps * gamma**steps * reward
