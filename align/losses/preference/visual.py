"""Losses that compare the images of a completion."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.align.losses.preference.settings import check_settings

__all__ = ["svco"]


def svco(
    chosen_logratios: Tensor,
    chosen_blind_logratios: Tensor,
    chosen_swapped_logratios: Tensor,
    rejected_logratios: Tensor,
    rejected_blind_logratios: Tensor,
    rejected_swapped_logratios: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute the loss of symmetrical visual contrastive optimization, S-VCO (Wu et al. 2025, arXiv 2502.13928).

        L = sum over y in (y_w, y_l) of  -log sigmoid(beta (r(y | its image) - r(y | no image)))
                                         -log sigmoid(beta (r(y | no image) - r(y | the other image)))

    Both completions are true of one image of the pair and false of the other: each is preferred with its own image.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions with their own image.
        chosen_blind_logratios: `(B,)` log-ratios of the chosen completions without an image.
        chosen_swapped_logratios: `(B,)` log-ratios of the chosen completions with the image of the rejected ones.
        rejected_logratios: `(B,)` log-ratios of the rejected completions with their own image.
        rejected_blind_logratios: `(B,)` log-ratios of the rejected completions without an image.
        rejected_swapped_logratios: `(B,)` log-ratios of the rejected completions with the image of the chosen ones.
        beta: of all four terms, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> svco(*torch.zeros(6, 1))  # 4 log 2
        tensor([2.7726])
    """
    check_settings(beta=beta)
    chosen = logsigmoid(beta * (chosen_logratios - chosen_blind_logratios))
    chosen = chosen + logsigmoid(beta * (chosen_blind_logratios - chosen_swapped_logratios))
    rejected = logsigmoid(beta * (rejected_logratios - rejected_blind_logratios))
    rejected = rejected + logsigmoid(beta * (rejected_blind_logratios - rejected_swapped_logratios))
    return -(chosen + rejected)
