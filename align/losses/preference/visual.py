"""Losses that compare the images of a completion."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.align.losses.preference.settings import check_settings

__all__ = ["mdpo", "svco"]


def mdpo(
    chosen_logratios: Tensor,
    chosen_swapped_logratios: Tensor,
    rejected_swapped_logratios: Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
) -> Tensor:
    """Compute the loss of multimodal DPO, mDPO (Wang et al. 2024, arXiv 2406.11839, equations 3 to 5).

        L = -log sigmoid(beta (r(y_w | m) - r(y_l | m)))
            -log sigmoid(beta (r(y_w | m) - r(y_w | m')))
            -log sigmoid(beta r(y_w | m) - delta)

    m is the image, the column `images` of a row, and m' one that does not show what the chosen completion says, its column
    `rejected_images`: in the paper a crop of m of at most a fifth of its area. Both completions are read under m.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions with the image.
        chosen_swapped_logratios: `(B,)` log-ratios of the chosen completions with the other image.
        rejected_swapped_logratios: `(B,)` log-ratios of the rejected completions with the image of the chosen ones.
        beta: of all three terms, above 0.
        delta: the anchor that the reward of the chosen completion should reach, at least 0; 0 in the paper.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> mdpo(*torch.zeros(3, 1))  # 3 log 2
        tensor([2.0794])
    """
    check_settings(beta=beta, delta=delta)
    response = logsigmoid(beta * (chosen_logratios - rejected_swapped_logratios))
    image = logsigmoid(beta * (chosen_logratios - chosen_swapped_logratios))
    return -(response + image + logsigmoid(beta * chosen_logratios - delta))


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
