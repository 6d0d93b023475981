"""The metrics of `PreferenceTrainer`, and the rows of batches with two images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from contralto.align.losses.objective import Completions, Pairs
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.scoring import TokenScores

__all__ = ["HEAD_METRICS", "head_metrics", "head_sums", "other_image", "own_image", "own_image_batch", "reward_metrics"]

HEAD_METRICS = ("entropy", "mean_logits", "is_top1")
"""Statistics of `chunked_logps` that are computed for metrics alone."""


def own_image(values: Tensor) -> Tensor:
    """Select the rows whose completion is read under its own image.

    Args:
        values: `(4B, ...)` in the order of `TwoImageCollator`.

    Returns:
        `(2B, ...)`.
    """
    views = values.chunk(4)
    return torch.cat([views[0], views[3]])


def other_image(values: Tensor) -> Tensor:
    """Select the rows whose completion is read under the image of the other completion.

    Args:
        values: `(4B, ...)` in the order of `TwoImageCollator`.

    Returns:
        `(2B, ...)`.
    """
    views = values.chunk(4)
    return torch.cat([views[1], views[2]])


def own_image_batch(batch: PairBatch, policy: TokenScores) -> tuple[PairBatch, TokenScores]:
    """Select the rows under their own image where metrics of the head are computed from them.

    Args:
        batch: a batch of `TwoImageCollator`.
        policy: the policy's scores of the batch.
    """
    statistics = {name: getattr(policy, name) for name in HEAD_METRICS}
    kept: dict[str, Any] = {name: own_image(value) for name, value in statistics.items() if value is not None}
    return batch._replace(mask=own_image(batch.mask)), policy._replace(**kept)


def reward_metrics(
    pairs: Pairs, batch: PairBatch, policy: TokenScores, reward_of: Callable[[Completions], Tensor], *, beta: float
) -> dict[str, Any]:
    """Return the metrics of rewards and log-probabilities by name, `(B,)`; `(2B,)` for a batch of two images.

    With two images, chosen is a completion under its own image and rejected the same completion under the other one.

    Args:
        pairs: the batch as the losses take it.
        batch: the batch.
        policy: the policy's scores of the batch.
        reward_of: return what beta multiplies, `(B,)`.
        beta: the scale of rewards.
    """
    both = (pairs.chosen, pairs.rejected)
    if batch.blind is None:
        extra: dict[str, Any] = {}
        rewards = [reward_of(side) for side in both]
        logps = [side.logps for side in both]
    else:
        fields = ("logratios", "swapped_logratios", "blind_logratios")
        *rewards, blind = (torch.cat([getattr(side, field) for side in both]) for field in fields)
        sums = torch.as_tensor(policy.logps).sum(-1)
        extra, logps = {"rewards/blind": beta * blind}, [own_image(sums), other_image(sums)]
    chosen, rejected = (beta * reward for reward in rewards)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    } | extra


def head_sums(batch: PairBatch, policy: TokenScores) -> dict[str, Tensor]:
    """Return sums over the tokens of a batch for `head_metrics`; empty if the statistics were not computed.

    Args:
        batch: the batch.
        policy: the policy's scores of the batch.
    """
    if policy.entropy is None or policy.mean_logits is None or policy.is_top1 is None:
        return {}
    chosen, rejected = batch.mask.chunk(2)
    chosen_logits, rejected_logits = policy.mean_logits.chunk(2)
    return {
        "entropy": policy.entropy.sum(),
        "correct": policy.is_top1.chunk(2)[0].sum(),
        "chosen_logits": chosen_logits.sum(),
        "rejected_logits": rejected_logits.sum(),
        "chosen_tokens": chosen.sum(),
        "rejected_tokens": rejected.sum(),
    }


def head_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Return means per token of entropy, logits and accuracy.

    Args:
        totals: `head_sums` of all processes, among other sums.
    """
    if "entropy" not in totals:
        return {}
    chosen, rejected = (max(1.0, totals[f"{side}_tokens"]) for side in ("chosen", "rejected"))
    return {
        "entropy": totals["entropy"] / max(1.0, totals["chosen_tokens"] + totals["rejected_tokens"]),
        "logits/chosen": totals["chosen_logits"] / chosen,
        "logits/rejected": totals["rejected_logits"] / rejected,
        "mean_token_accuracy": totals["correct"] / chosen,
    }
