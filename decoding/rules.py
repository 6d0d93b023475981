"""The mathematics of contrastive decoding: pure functions of next-token logits, in the papers' own letters.

Every rule takes the logits of its branches, `(..., V)`, main branch first, and returns scores of the same shape, dtype
and device: unnormalised log-probabilities, `-inf` where a token is ruled out. Nothing is changed in place.

Notation: `p_k = softmax(branches[k])`, `V` the vocabulary size. Logits may be shifted by any constant per row and branch
without changing the scores, because the rules speak of log-probabilities; so raw logits and log-probabilities are both
welcome, and scores can be summed over steps (beam search) without a bias.

`-inf` is the logit of an impossible token. Logits with NaN or `+inf` are the caller's to reject, see `validity`: the rules
would rule out what these touch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, threshold

__all__ = [
    "classifier_free_guidance",
    "combine",
    "context_aware_decoding",
    "contrastive_decoding",
    "contrastive_decoding_li",
    "contrastive_input_decoding",
    "contrastive_input_decoding_log_ratio",
    "contrastive_search",
    "critic_guided",
    "degeneration_penalty",
    "dola",
    "dola_jsd",
    "instruction_contrastive_decoding",
    "m3id",
    "plausible",
    "proxy_tuning",
    "ritual",
    "ritual_vcd",
    "visual_contrastive_decoding",
]


def plausible(logits: Tensor, *, alpha: float, min_tokens_to_keep: int = 1) -> Tensor:
    """The adaptive plausibility constraint: which tokens the model finds likely enough to be chosen.

        V_head = { v : p(v) >= alpha * max_w p(w) }

    Li et al. 2022 (arXiv 2210.15097), equation 2. In log space it reads `logits >= log(alpha) + max(logits)`, which does
    not depend on the normaliser. A token of probability zero is never plausible.

    Args:
        logits: `(..., V)`, raw or normalised.
        alpha: in [0, 1]. 0 keeps every possible token, 1 only the likeliest.
        min_tokens_to_keep: at least so many tokens stay, the likeliest ones (ties may keep more).

    Returns:
        `(..., V)` bool.

    Raises:
        ValueError: `alpha` outside [0, 1], or `min_tokens_to_keep` below 1.

    Examples:
        >>> p = torch.tensor([0.6, 0.3, 0.1])
        >>> plausible(p.log(), alpha=0.25).tolist()
        [True, True, False]
    """
    return _margin(logits, alpha=alpha, min_tokens_to_keep=min_tokens_to_keep) >= 0


def _margin(logits: Tensor, *, alpha: float, min_tokens_to_keep: int) -> Tensor:
    """How far each token lies above the plausibility threshold; negative or NaN if it is not plausible."""
    check_threshold("alpha", alpha)
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep must be at least 1, not {min_tokens_to_keep}")
    least = logits.amax(-1, keepdim=True) + (math.log(alpha) if alpha > 0 else -math.inf)
    if min_tokens_to_keep > 1:
        kept = logits.topk(min(min_tokens_to_keep, logits.shape[-1]), dim=-1).values
        least = torch.minimum(least, kept[..., -1:])
    return logits - least


def combine(
    branches: Sequence[Tensor], weights: Sequence[float | Tensor], *, alpha: float = 0.0, min_tokens_to_keep: int = 1
) -> Tensor:
    """A weighted sum of log-probabilities on the tokens that the main branch finds plausible.

        scores(v) = sum_k weights[k] * log p_k(v)    if v is plausible under branches[0], else -inf

    Nearly every contrastive decoding method is this sum with its own branches and weights.

    A token that any branch of non-zero weight rules out (`-inf`) is ruled out, whatever the sign of the weight: so
    `-inf - -inf` and `+inf` never arise. A row in which that would leave nothing falls back on the plausible tokens of
    the main branch, with its log-probabilities: no row is all `-inf` unless the main branch's is.

    Args:
        branches: logits, each `(..., V)`, the main branch first.
        weights: one per branch: a number, or a tensor that broadcasts, such as `(..., 1)` for a weight per row. A branch
            of weight 0 has no influence at all.
        alpha: the plausibility threshold in [0, 1], see `plausible`; 0 (default) is no constraint.
        min_tokens_to_keep: see `plausible`.

    Raises:
        ValueError: no branch, another number of weights, branches of different shapes, `alpha` outside [0, 1].

    Examples:
        >>> main, contrast = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> combine((main, contrast), (2, -1), alpha=0.2).softmax(-1)  # p^2 / q, without the third token
        tensor([[0.5333, 0.4667, 0.0000]])
    """
    if not branches or len(branches) != len(weights):
        raise ValueError(f"combine needs one weight per branch, not {len(weights)} for {len(branches)}")
    main = branches[0]
    if any(branch.shape != main.shape for branch in branches):
        raise ValueError(f"the branches' logits differ in shape: {[tuple(branch.shape) for branch in branches]}")
    log_p = main.log_softmax(-1)
    margin = _margin(log_p, alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)
    # 0 where plausible, -inf elsewhere. Added up it does what a masked fill does, in a fifth of the time on a CPU.
    penalty = threshold(margin.clamp_(max=0), -torch.finfo(margin.dtype).tiny, -math.inf)
    scores = weights[0] * log_p
    for branch, weight in zip(branches[1:], weights[1:], strict=True):
        if isinstance(weight, Tensor):
            weighted = weight * branch.log_softmax(-1)
            scores.add_(torch.where(weight == 0, torch.zeros_like(weighted), weighted))
        elif weight:
            scores.add_(branch.log_softmax(-1), alpha=weight)
    _rule_out_(scores.add_(penalty))
    alive = scores.amax(-1, keepdim=True) > -math.inf
    return scores if alive.all() else torch.where(alive, scores, _rule_out_(log_p + penalty))


def _rule_out_(scores: Tensor) -> Tensor:
    """Whatever is not finite (`-inf`, or an infinity less another) becomes `-inf`, in place."""
    return scores.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def contrastive_decoding(
    expert: Tensor, amateur: Tensor, *, beta: float = 0.5, alpha: float = 0.1, min_tokens_to_keep: int = 1
) -> Tensor:
    """Contrastive decoding as O'Brien & Lewis 2023 write it (arXiv 2309.09117, section 2.2).

        scores(v) = (1 + beta) * log p_expert(v) - beta * log p_amateur(v)    if v is plausible, else -inf

    so that `softmax(scores)` is proportional to `p_expert * (p_expert / p_amateur) ** beta` on the plausible tokens. The
    paper writes raw logits; log-probabilities differ by a constant per row, which no softmax or argmax sees, and which
    would bias the sums that beam search compares.

    Args:
        expert: `(..., V)` logits of the stronger model.
        amateur: `(..., V)` logits of the weaker model, same vocabulary.
        beta: contrast strength, at least 0; 0 is the expert under the mask.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        min_tokens_to_keep: see `plausible`.

    Raises:
        ValueError: `beta` negative, `alpha` outside [0, 1], different shapes.

    Examples:
        With odds 3:1 for the expert, 1:1 for the amateur, and beta 1, the odds become 3^2 / 1 = 9:1.

        >>> expert, amateur = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> contrastive_decoding(expert, amateur, beta=1).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("beta", beta)
    return combine((expert, amateur), (1 + beta, -beta), alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)


def contrastive_decoding_li(
    expert: Tensor,
    amateur: Tensor,
    *,
    alpha: float = 0.1,
    amateur_temperature: float = 1.0,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Contrastive decoding as Li et al. 2022 introduced it (arXiv 2210.15097, equation 3).

        scores(v) = log p_expert(v) - log p_amateur(v; tau)    if v is plausible, else -inf

    with `p_amateur(.; tau) = softmax(amateur / tau)`. The expert's own probability enters only through the mask: among
    plausible tokens the log-ratio alone decides. The official code divides after the softmax, which differs by a constant
    per row that biases beams; this is the paper's formula.

    Args:
        expert: `(..., V)` logits of the stronger model.
        amateur: `(..., V)` logits of the weaker model, same vocabulary.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        amateur_temperature: `tau` > 0; the paper uses 0.5 for GPT-2 and 1.0 for OPT.
        min_tokens_to_keep: see `plausible`; the official code keeps 2 under beam search.

    Raises:
        ValueError: `amateur_temperature` not positive, `alpha` outside [0, 1], different shapes.

    Examples:
        >>> expert, amateur = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.75, 0.15, 0.1]]).log()
        >>> contrastive_decoding_li(expert, amateur, alpha=0.25).exp()  # 0.6 / 0.75, 0.3 / 0.15, implausible
        tensor([[0.8000, 2.0000, 0.0000]])
    """
    check_temperature(amateur_temperature)
    branches = (expert, amateur / amateur_temperature)
    return combine(branches, (1, -1), alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)


def visual_contrastive_decoding(
    original: Tensor, distorted: Tensor, *, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Visual contrastive decoding, VCD (Leng et al. 2024, arXiv 2311.16922, equations 3 and 4).

        scores(v) = (1 + alpha) * log p(v | image) - alpha * log p(v | distorted image)    if v is plausible, else -inf

    In VCD's letters `alpha` is the contrast strength and `beta` the plausibility threshold (`cd_alpha`, `cd_beta` in its
    code, whose evaluation script sets `cd_beta` 0.2). Temperature and top-p belong after it.

    Args:
        original: `(..., V)` logits given the image.
        distorted: `(..., V)` logits given the distorted image, see `images.diffusion_noise`.
        alpha: contrast strength, at least 0.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> original, distorted = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> visual_contrastive_decoding(original, distorted).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("alpha", alpha)
    check_threshold("beta", beta)
    return combine((original, distorted), (1 + alpha, -alpha), alpha=beta)


def instruction_contrastive_decoding(
    instructed: Tensor, disturbed: Tensor, *, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Instruction contrastive decoding, ICD (Wang et al. 2024, arXiv 2403.18715).

        scores(v) = (1 + alpha) * log p(v | instruction) - alpha * log p(v | disturbed instruction)    if plausible

    VCD's formula with a disturbed instruction ("You are a confused object detector ...") in place of a distorted image.

    Args:
        instructed: `(..., V)` logits given the instruction.
        disturbed: `(..., V)` logits given the instruction with a disturbing prefix.
        alpha: contrast strength, at least 0.
        beta: plausibility threshold in [0, 1] on `instructed`, see `plausible`.

    Raises:
        ValueError: `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> instructed, disturbed = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> instruction_contrastive_decoding(instructed, disturbed).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    return visual_contrastive_decoding(instructed, disturbed, alpha=alpha, beta=beta)


def ritual(
    original: Tensor, transformed: Tensor, *, kappa: float = 3.0, beta: float = 0.1, normalize: bool = False
) -> Tensor:
    """RITUAL: the view of a randomly transformed image is added, not subtracted (Woo et al. 2024, arXiv 2405.17821).

        scores(v) = log p(v | image) + kappa * log p(v | transformed image)    if v is plausible, else -inf

    The weights sum to `1 + kappa`, so the method also sharpens: with equal branches it is sampling at temperature
    `1 / (1 + kappa)`, a quarter by default. `normalize=True` divides by that sum, which the official code does not.

    Args:
        original: `(..., V)` logits given the image.
        transformed: `(..., V)` logits given the transformed image, see `images.ritual_transform`.
        kappa: weight of the transformed view, at least 0 (`ritual_alpha_pos` in the official code).
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.
        normalize: divide by `1 + kappa`.

    Raises:
        ValueError: `kappa` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> original, transformed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> ritual(original, transformed, kappa=1).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("kappa", kappa)
    check_threshold("beta", beta)
    scale = 1 / (1 + kappa) if normalize else 1.0
    return combine((original, transformed), (scale, scale * kappa), alpha=beta)


def ritual_vcd(
    original: Tensor,
    transformed: Tensor,
    distorted: Tensor,
    *,
    kappa: float = 3.0,
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Tensor:
    """RITUAL and VCD together: one view added, another subtracted.

        scores(v) = (1 + alpha) log p(v | image) + kappa log p(v | transformed) - alpha log p(v | distorted)    if plausible

    Woo et al. (arXiv 2405.17821) report the combination, but neither print this formula nor release code for it: it is the
    sum of the two methods' contrasts on one main branch.

    Args:
        original, transformed, distorted: `(..., V)` logits given the three images.
        kappa: weight of the transformed view, at least 0.
        alpha: contrast strength against the distorted view, at least 0.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: `kappa` or `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> uniform, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> ritual_vcd(sure, uniform, sure, kappa=1).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("kappa", kappa)
    check_strength("alpha", alpha)
    check_threshold("beta", beta)
    return combine((original, transformed, distorted), (1 + alpha, kappa, -alpha), alpha=beta)


def m3id(
    conditioned: Tensor, unconditioned: Tensor, *, step: int | Tensor, lam: float = 0.02, beta: float = 0.1
) -> Tensor:
    """M3ID: the longer the text, the stronger the contrast with the view that has no image (Favero et al. 2024).

        scores(v) = log p(v | image) + (1 - g) / g * (log p(v | image) - log p(v | no image)),    g = exp(-lam * step)

    arXiv 2403.14003. The paper gates the contrast by the main model's certainty and has no official code; this is the
    form of its reimplementations, with VCD's plausibility constraint in place of the gate. The first token (step 0) has no
    contrast at all.

    Args:
        conditioned: `(..., V)` logits given the image.
        unconditioned: `(..., V)` logits of the same model without the image.
        step: how many tokens were generated before this one, from 0; a tensor must broadcast, such as `(T, 1)`.
        lam: how fast the contrast grows, at least 0.
        beta: plausibility threshold in [0, 1] on `conditioned`, see `plausible`.

    Raises:
        ValueError: `lam` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> seen, unseen = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> m3id(seen, unseen, step=0).softmax(-1), m3id(seen, unseen, step=50).softmax(-1)
        (tensor([[0.7500, 0.2500]]), tensor([[0.9520, 0.0480]]))
    """
    check_strength("lam", lam)
    check_threshold("beta", beta)
    exponent = lam * torch.as_tensor(step, dtype=torch.float64, device=conditioned.device)
    weight = torch.expm1(exponent).to(conditioned.dtype)
    return combine((conditioned, unconditioned), (1 + weight, -weight), alpha=beta)


def contrastive_input_decoding(original: Tensor, contrast: Tensor, *, lam: float = 10.0) -> Tensor:
    """Contrastive input decoding, CID (Yona et al. 2023, arXiv 2305.07378), in its probability-difference form.

        scores(v) = log p(v | x) + lam * (p(v | x) - p(v | x'))

    `x` is the prompt, `x'` a contrasting one; `lam` 0 is plain decoding, and larger values surface subtler differences.
    A difference of probabilities is bounded, so tokens that are rare under both prompts cannot win and no plausibility
    constraint is needed. The paper re-weighs `p(v | x)` by that difference; its normalisation may differ from this one.

    The default of `lam` is ours, not the paper's: a tenth of probability is worth one nat. With 1 a whole unit of
    probability would be worth no more than that, and greedy texts hardly ever change.

    Args:
        original: `(..., V)` logits given the prompt.
        contrast: `(..., V)` logits of the same model given the contrasting prompt.
        lam: contrast strength, at least 0. Default 10.

    Raises:
        ValueError: `lam` negative, different shapes.

    Examples:
        >>> original, contrast = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.8, 0.2]]).log()
        >>> contrastive_input_decoding(original, contrast, lam=2)  # log 0.6 - 0.4, log 0.4 + 0.4
        tensor([[-0.9108, -0.5163]])
    """
    check_strength("lam", lam)
    if original.shape != contrast.shape:
        raise ValueError(f"the branches' logits differ in shape: {[tuple(b.shape) for b in (original, contrast)]}")
    log_p = _rule_out_(original.log_softmax(-1))
    return log_p + lam * (log_p.exp() - contrast.softmax(-1).nan_to_num_(nan=0.0))


def contrastive_input_decoding_log_ratio(
    original: Tensor, contrast: Tensor, *, lam: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Contrastive input decoding as a log-ratio, like the other methods of this family.

        scores(v) = (1 + lam) * log p(v | x) - lam * log p(v | x')    if v is plausible, else -inf

    Not a formula of Yona et al. (arXiv 2305.07378), whose idea it serves: without the plausibility constraint it would
    prefer tokens that are rare under both prompts.

    Args:
        original: `(..., V)` logits given the prompt.
        contrast: `(..., V)` logits of the same model given the contrasting prompt.
        lam: contrast strength, at least 0.
        alpha: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: `lam` negative, `alpha` outside [0, 1], different shapes.

    Examples:
        >>> original, contrast = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.8, 0.2]]).log()
        >>> contrastive_input_decoding_log_ratio(original, contrast).softmax(-1)  # 0.6^2 / 0.8 : 0.4^2 / 0.2
        tensor([[0.3600, 0.6400]])
    """
    check_strength("lam", lam)
    return combine((original, contrast), (1 + lam, -lam), alpha=alpha)


def context_aware_decoding(with_context: Tensor, without_context: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Context-aware decoding, CAD (Shi et al. 2023, arXiv 2305.14739, equation 2).

        scores(v) = (1 + alpha) * log p(v | context, question) - alpha * log p(v | question)

    Without a plausibility constraint, as in the paper.

    Args:
        with_context: `(..., V)` logits given the context and the question.
        without_context: `(..., V)` logits of the same model given the question alone.
        alpha: contrast strength, at least 0: 0.5 for summaries, 1 for questions that contradict what the model knows.

    Raises:
        ValueError: `alpha` negative, different shapes.

    Examples:
        >>> context, plain = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
        >>> context_aware_decoding(context, plain, alpha=1).softmax(-1)  # 0.5^2 / 0.8 : 0.5^2 / 0.2
        tensor([[0.2000, 0.8000]])
    """
    check_strength("alpha", alpha)
    return combine((with_context, without_context), (1 + alpha, -alpha))


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, *, guidance_scale: float = 1.5) -> Tensor:
    """Classifier-free guidance of language models, CFG (Sanchez et al. 2023, arXiv 2306.17806, equation 7).

        scores(v) = log p(v | negative) + gamma * (log p(v | prompt) - log p(v | negative))

    Args:
        conditional: `(..., V)` logits given the prompt.
        unconditional: `(..., V)` logits of the same model given the negative prompt, or nothing.
        guidance_scale: `gamma`, at least 0; 1 is plain decoding, more follows the prompt more closely.

    Raises:
        ValueError: `guidance_scale` negative, different shapes.

    Examples:
        >>> conditional, unconditional = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> classifier_free_guidance(conditional, unconditional, guidance_scale=2).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("guidance_scale", guidance_scale)
    return combine((conditional, unconditional), (guidance_scale, 1 - guidance_scale))


def proxy_tuning(base: Tensor, expert: Tensor, antiexpert: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Proxy tuning: what tuning did to a small model, applied to a large one (Liu et al. 2024, arXiv 2401.08565).

        scores(v) = log p_base(v) + alpha * (log p_expert(v) - log p_antiexpert(v))

    DExperts (Liu et al. 2021, arXiv 2105.03023) is the same sum. No plausibility constraint, as in the paper.

    Args:
        base: `(..., V)` logits of the large model.
        expert: `(..., V)` logits of the small tuned model.
        antiexpert: `(..., V)` logits of the small model before tuning.
        alpha: strength, at least 0.

    Raises:
        ValueError: `alpha` negative, different shapes.

    Examples:
        >>> base, tuned, untuned = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.75, 0.25], [0.5, 0.5]))
        >>> proxy_tuning(base, tuned, untuned).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("alpha", alpha)
    return combine((base, expert, antiexpert), (1, alpha, -alpha))


def dola(final: Tensor, layers: Tensor, *, relative_top: float = 0.1) -> Tensor:
    """DoLa: the last layer against the earlier layer that differs from it most (Chuang et al. 2024, arXiv 2309.03883).

        A_j = (p_final + p_j) / 2,    M = argmax_j [KL(A_j || p_final) + KL(A_j || p_j)] / 2
        scores(v) = log p_final(v) - log p_M(v)    if v is plausible, else -inf

    The divergence is the one that the official code ranks layers by. The paper's equation 4 has the Jensen-Shannon
    divergence, whose terms are `KL(p || A_j)`, see `dola_jsd`; the two often choose different layers. It is taken over the
    tokens that `final` does not rule out. Every row chooses its own layer: the official code averages the divergence over
    the batch and masks only its first row, so that a text would depend on its neighbours.

    Args:
        final: `(..., V)` logits of the last layer.
        layers: `(..., L, V)` logits of the candidate layers, by the same head.
        relative_top: plausibility threshold in [0, 1] on `final`, see `plausible`.

    Raises:
        ValueError: no candidate layer, `relative_top` outside [0, 1], different shapes.

    Examples:
        >>> final = torch.tensor([[0.6, 0.4]]).log()
        >>> layers = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
        >>> dola(final, layers).exp()  # the second layer: 0.6 / 0.9, 0.4 / 0.1
        tensor([[0.6667, 4.0000]])
    """
    return _dola(final, layers, relative_top, lambda p, log_p, a, log_a: _kl(a, log_a, log_p))


def dola_jsd(final: Tensor, layers: Tensor, *, relative_top: float = 0.1) -> Tensor:
    """DoLa with the paper's choice of the layer (Chuang et al. 2024, arXiv 2309.03883, equations 3 to 6).

        M = argmax_j JSD(p_final || p_j),    scores(v) = log p_final(v) - log p_M(v)    if v is plausible, else -inf

    See `dola`, which chooses as the official code does.

    Args:
        final: `(..., V)` logits of the last layer.
        layers: `(..., L, V)` logits of the candidate layers, by the same head.
        relative_top: plausibility threshold in [0, 1] on `final`, see `plausible`.

    Raises:
        ValueError: no candidate layer, `relative_top` outside [0, 1], different shapes.

    Examples:
        Here the two choose different layers.

        >>> final = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> layers = torch.tensor([[[0.2, 0.4, 0.4], [0.3, 0.2, 0.5]]]).log()
        >>> dola_jsd(final, layers).exp(), dola(final, layers).exp()
        (tensor([[3.0000, 0.7500, 0.2500]]), tensor([[2.0000, 1.5000, 0.2000]]))
    """
    return _dola(final, layers, relative_top, lambda p, log_p, a, log_a: _kl(p, log_p, log_a))


def _dola(final: Tensor, layers: Tensor, relative_top: float, distance: Callable[..., Tensor]) -> Tensor:
    """DoLa with a distance of a distribution `p` from the average `a` of two, both given with their logarithms."""
    check_threshold("relative_top", relative_top)
    if layers.ndim != final.ndim + 1 or not layers.shape[-2]:
        raise ValueError(f"dola needs layers of shape (..., L, V) with L >= 1, not {tuple(layers.shape)}")
    main = final.unsqueeze(-2)
    log_p, log_q = main.log_softmax(-1), layers.masked_fill(main == -math.inf, -math.inf).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    average = (p + q) / 2
    log_average = average.log()
    divergence = distance(p, log_p, average, log_average) + distance(q, log_q, average, log_average)
    chosen = divergence.argmax(-1)[..., None, None].expand(*layers.shape[:-2], 1, layers.shape[-1])
    return combine((final, layers.gather(-2, chosen).squeeze(-2)), (1, -1), alpha=relative_top)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), where 0 log 0 = 0."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def critic_guided(logits: Tensor, values: Tensor, candidates: Tensor) -> Tensor:
    """Critic-guided decoding: the likeliest tokens weighed by a critic (Kim et al. 2023, arXiv 2212.10938, section 3).

        scores(v) = log p(v) + log sigmoid(Q(v))    for the k candidates, else -inf

    so that `softmax(scores)` is proportional to `p(v) * sigmoid(Q(v))`. The paper divides by `sigmoid` of the state's own
    value, a constant per row, which changes nothing.

    Args:
        logits: `(..., V)` of the language model.
        values: `(..., k)` the critic's logit for the text with each candidate appended.
        candidates: `(..., k)` int64, the candidates, such as the k likeliest tokens.

    Raises:
        ValueError: `values` and `candidates` of different shapes.

    Examples:
        >>> log_p, candidates = torch.tensor([[0.5, 0.4, 0.1]]).log(), torch.tensor([[0, 1]])
        >>> critic_guided(log_p, torch.tensor([[-3.0, 3.0]]), candidates).softmax(-1)
        tensor([[0.0586, 0.9414, 0.0000]])
    """
    if values.shape != candidates.shape:
        raise ValueError(
            f"critic_guided needs a value per candidate, not {tuple(values.shape)} for {tuple(candidates.shape)}"
        )
    log_p = _rule_out_(logits.log_softmax(-1))
    weighed = log_p.gather(-1, candidates) + torch.nn.functional.logsigmoid(values.to(log_p))
    return torch.full_like(log_p, -math.inf).scatter(-1, candidates, weighed)


def contrastive_search(logits: Tensor, candidates: Tensor, penalty: Tensor, *, alpha: float = 0.6) -> Tensor:
    """Return the scores of contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5).

        scores(v) = (1 - alpha) * p(v) - alpha * max_j cos(h_v, h_{x_j})    if v is a candidate, else -inf

    with `p = softmax(logits)` over the whole vocabulary. The token of the largest score comes next. The scores are not
    log-probabilities: there is nothing to sample from, and no sum of them that beams could compare.

    Args:
        logits: `(..., V)`.
        candidates: `(..., k)` int64, different tokens of each row, usually the k likeliest.
        penalty: `(..., k)`, the largest cosine of each candidate, see `degeneration_penalty`.
        alpha: weight of the penalty, in [0, 1]. The paper uses 0.6; 0 is greedy search.

    Returns:
        `(..., V)` in the dtype of `logits`. A candidate of probability zero (logit `-inf`) stays at `-inf`.

    Raises:
        ValueError: `alpha` outside [0, 1].

    Examples:
        The likelier of two tokens repeats the context, the other one is new.

        >>> logits, candidates = torch.tensor([0.6, 0.4]).log(), torch.tensor([0, 1])
        >>> contrastive_search(logits, candidates, torch.tensor([1.0, 0.5]), alpha=0.5)
        tensor([-0.2000, -0.0500])
    """
    check_penalty_weight(alpha)
    log_p = logits.log_softmax(-1).gather(-1, candidates)
    scores = (1 - alpha) * log_p.exp() - alpha * penalty.to(log_p.dtype)
    scores = scores.masked_fill(logits.gather(-1, candidates) == -torch.inf, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)


def degeneration_penalty(hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the cosine of each candidate with the most similar token of the context: `max_j cos(h_v, h_{x_j})`.

    Su et al. 2022 (arXiv 2202.06417), equation 5, second term. The context is the prompt and all tokens generated so far.

    Args:
        hidden: `(..., k, d)`, the last layer's hidden state of each candidate as the next token of the context.
        context: `(..., T, d)`, those of the context's tokens.
        mask: `(..., T)`, 0 for padding, which is excluded.

    Returns:
        `(..., k)` in [-1, 1], float32 at least.

    Examples:
        >>> penalty = degeneration_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> penalty  # the cosines are 0.6 and 0.8
        tensor([0.8000])
    """
    return largest_cosine(unit_vectors(hidden), unit_vectors(context), mask)


def unit_vectors(hidden: Tensor) -> Tensor:
    """Scale vectors `(..., d)` to length 1, in float32 at least."""
    return normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)


def largest_cosine(candidates: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """Return `degeneration_penalty` of unit vectors `(..., k, d)` and `(..., T, d)`."""
    cosines = candidates @ context.mT  # (..., k, T)
    if mask is not None:
        cosines = cosines.masked_fill(mask[..., None, :].to(cosines.device) == 0, -torch.inf)
    return cosines.amax(-1)


def check_penalty_weight(alpha: float) -> None:
    """Raise ValueError unless the weight of a degeneration penalty lies in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (the weight of the degeneration penalty), not {alpha}")


def check_threshold(name: str, value: float) -> None:
    """Raise ValueError unless a plausibility threshold lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1] (a share of the likeliest token's probability), not {value}")


def check_strength(name: str, value: float) -> None:
    """Raise ValueError unless a contrast strength is a finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0 (the contrast strength), not {value}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is a finite positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"amateur_temperature must be a finite number above 0, not {temperature}")
