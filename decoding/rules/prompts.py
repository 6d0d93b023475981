"""Define the rules that contrast the logits of one model given different prompts."""

from torch import Tensor

from contralto.decoding.rules.base import check_strength, combine, rule_out_

__all__ = [
    "classifier_free_guidance",
    "context_aware_decoding",
    "contrastive_input_decoding",
    "contrastive_input_decoding_log_ratio",
]


def contrastive_input_decoding(original: Tensor, contrast: Tensor, *, lam: float = 10.0) -> Tensor:
    """Score tokens by contrastive input decoding, CID (Yona et al. 2023, arXiv 2305.07378), as a difference of probabilities.

        scores(v) = log p(v | x) + lam * (p(v | x) - p(v | x'))

    `x` is the prompt, `x'` a contrasting one; `lam` 0 is plain decoding, and larger values show subtler differences. A
    difference of probabilities is bounded, so tokens that are rare under both prompts cannot be chosen and no plausibility
    constraint is needed. The paper reweights `p(v | x)` by that difference; its normalisation may differ from this one.

    The default of `lam` is not the paper's: here a difference of 0.1 in probability counts as one nat. With `lam` 1 a
    difference of 1 would count as no more than that, and greedy completions hardly ever change.

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
    log_p = rule_out_(original.log_softmax(-1))
    return log_p + lam * (log_p.exp() - contrast.softmax(-1).nan_to_num_(nan=0.0))


def contrastive_input_decoding_log_ratio(
    original: Tensor, contrast: Tensor, *, lam: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Score tokens by contrastive input decoding as a log-ratio, like the other methods of this family.

        scores(v) = (1 + lam) * log p(v | x) - lam * log p(v | x')    if v is plausible, else -inf

    This is not a formula of Yona et al. (arXiv 2305.07378), but a variant of their method: without the plausibility
    constraint it would prefer tokens that are rare under both prompts.

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
    """Score tokens by context-aware decoding, CAD (Shi et al. 2023, arXiv 2305.14739, equation 2).

        scores(v) = (1 + alpha) * log p(v | context, question) - alpha * log p(v | question)

    There is no plausibility constraint, as in the paper.

    Args:
        with_context: `(..., V)` logits given the context and the question.
        without_context: `(..., V)` logits of the same model given the question alone.
        alpha: contrast strength, at least 0: 0.5 for summaries, 1 for questions whose context contradicts the model's knowledge.

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
    """Score tokens by classifier-free guidance, CFG (Sanchez et al. 2023, arXiv 2306.17806, equation 7).

        scores(v) = log p(v | negative) + gamma * (log p(v | prompt) - log p(v | negative))

    Args:
        conditional: `(..., V)` logits given the prompt.
        unconditional: `(..., V)` logits of the same model given the negative prompt, or no prompt.
        guidance_scale: `gamma`, at least 0; 1 is plain decoding, larger values follow the prompt more closely.

    Raises:
        ValueError: `guidance_scale` negative, different shapes.

    Examples:
        >>> conditional, unconditional = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> classifier_free_guidance(conditional, unconditional, guidance_scale=2).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("guidance_scale", guidance_scale)
    return combine((conditional, unconditional), (guidance_scale, 1 - guidance_scale))
