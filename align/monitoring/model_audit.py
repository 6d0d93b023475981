"""The audit of policy, reference and adapter before the first step, on a few pairs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from contralto.align.monitoring.findings import IDLE, Finding
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.reach import reach
from contralto.align.trainers.settings import changed_settings

__all__ = ["audit_model", "policy_logps", "reference_logps"]

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""The largest difference of policy and reference before training, in nats per token, by dtype."""
HALF_TOLERANCE = 0.02
"""The same in half precision, where batches of another shape round differently."""
NUDGE = 0.02
"""The standard deviation of the noise that shows what depends on the trained weights."""


def audit_model(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Audit policy and reference before the first step.

    The weights of an adapter are changed for a moment, and restored.

    Args:
        trainer: a `PreferenceTrainer`, on its device.
        batches: batches of its collator.

    Returns:
        Findings: log-probabilities that are not finite; a policy that differs from its reference; an adapter that nothing depends on, or
        that the reference depends on although it should be off; one that the learning rates of all steps cannot move.
    """
    policy, reference = policy_logps(trainer, batches), reference_logps(trainer, batches)
    for model, logps in (("policy", policy), ("reference", reference)):
        if logps is not None and not logps.isfinite().all():
            text = f"The log-probabilities of the {model} are not finite before the first step."
            return [
                Finding("error", text, "Check the weights and the dtype: float16 overflows where bfloat16 does not.")
            ]
    return [
        *_start_findings(trainer, policy, reference),
        *_adapter_findings(trainer, batches, policy, reference),
        *_learning_rate_findings(trainer),
    ]


def _learning_rate_findings(trainer: Any) -> Iterator[Finding]:
    """Yield warnings if the rate is one for all weights, is never reached, or is too small in all steps to move the adapter."""
    if is_peft_model(trainer.unwrap(trainer.model)) and "learning_rate" not in changed_settings(trainer.args):
        yield Finding(
            "warning",
            f"An adapter is trained with the default learning_rate, {trainer.args.learning_rate:g}, which is one for all weights.",
            "Set learning_rate, to 5e-5 or so, or take a recipe's: contralto align dpo --use_peft, or in a script "
            "PreferenceConfig.from_recipe('dpo', ..., use_peft=True).",
        )
    steps = trainer.state.max_steps
    warmup, rate = trainer.args.get_warmup_steps(steps), f"{trainer.args.learning_rate:g}"
    reached = list(reach(trainer))
    if 0 < steps <= warmup and all(change >= IDLE for change, _ in reached):
        text = f"The warmup ({warmup} steps) is not shorter than the training ({steps} steps): the rate never reaches {rate}."
        yield Finding("warning", text, "Lower warmup_steps, or train longer.")
    for change, total in reached:
        if change < IDLE:
            text = (
                f"The learning rates of all {steps} steps add up to {total:.1g}, which can change texts by no more "
                f"than {change:.1g} nats per token: nothing is going to move."
            )
            advice = (
                f"The warmup ({warmup} steps) never ends, so that the rate stays below {rate}: lower warmup_steps, or train longer."
                if warmup >= steps
                else f"Raise learning_rate ({rate}), or train longer: an adapter needs ten to a hundred times the rate of full training."
            )
            yield Finding("warning", text, advice)


def _start_findings(trainer: Any, policy: Tensor, reference: Tensor | None) -> Iterator[Finding]:
    """Yield a warning if policy and reference differ before the first step."""
    if reference is None:
        return
    gap = float((policy - reference).abs().mean())
    dtype = next(trainer.model.parameters()).dtype if trainer.accelerator.mixed_precision == "no" else None
    if gap <= (TOLERANCE.get(dtype, HALF_TOLERANCE) if dtype else HALF_TOLERANCE):
        return
    text = f"Policy and reference differ before the first step, by {gap:.3g} nats per token."
    if trainer.ref_model is not None:
        advice = (
            "Fine if ref_model is another model on purpose; else give the same weights, dtype and attention to both."
        )
    elif trainer.args.precompute_ref_log_probs:
        advice = "The precomputed reference is of other weights or another precision: empty reference_cache, and compare dtypes."
    else:
        advice = (
            "The reference is the model with its adapter off: start the adapter at zero (init_lora_weights True), since others, "
            "such as PiSSA, also change the weights below."
        )
    yield Finding("warning", text, advice)


def _adapter_findings(
    trainer: Any, batches: Sequence[Mapping[str, Any]], policy: Tensor, reference: Tensor | None
) -> Iterator[Finding]:
    """Yield an error if the policy does not depend on the trained weights, or if the reference does."""
    if not is_peft_model(trainer.unwrap(trainer.model)) or trainer.args.deepspeed_plugin is not None:
        return
    weights = [_local_shard(weight) for weight in trainer.model.parameters() if weight.requires_grad]
    originals = [weight.detach().clone() for weight in weights]
    try:
        _add_noise(weights)
        moved = (policy_logps(trainer, batches) - policy).abs().max()
        is_live = reference is not None and not trainer.args.precompute_ref_log_probs
        again = reference_logps(trainer, batches) if is_live else None
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, originals, strict=True):
                weight.copy_(value)
    if not moved > 0:
        text = "The policy's log-probabilities do not depend on the weights that are trained."
        yield Finding("error", text, "Check that the adapter is active, and that target_modules names layers in use.")
    if again is not None and reference is not None and (again - reference).abs().max() > 0.01 * moved:
        text = "The reference moves with the weights that are trained: switching the adapter off does not restore it."
        advice = 'Train no weights outside the adapter (bias "none", no unfrozen layers), or give a ref_model.'
        yield Finding("error", text, advice)


def _local_shard(weight: Tensor) -> Tensor:
    """Return the shard of a weight that FSDP 2 keeps in this process."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _add_noise(weights: Sequence[Tensor]) -> None:
    """Add noise from generators that the training does not use."""
    with torch.no_grad():
        for seed, weight in enumerate(weights):
            generator = torch.Generator(weight.device).manual_seed(seed)
            noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
            weight += NUDGE * noise.to(weight.dtype)


def policy_logps(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the log-probabilities of all tokens of completions under the policy.

    Args:
        trainer: a `PreferenceTrainer`.
        batches: batches of its collator.

    Returns:
        `(N,)` float32, batch after batch.
    """
    logps = []
    with torch.no_grad(), trainer.accelerator.autocast():
        for inputs in batches:
            batch = PairBatch.of(trainer.to_device(inputs))
            logps.append(trainer.score_tokens(trainer.model, batch).logps[batch.mask].float())
    return torch.cat(logps)


def reference_logps(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Return the log-probabilities of all tokens of completions under the reference; None without a reference.

    Args:
        trainer: a `PreferenceTrainer`.
        batches: batches of its collator.

    Returns:
        `(N,)` float32, batch after batch.
    """
    if not trainer.uses_reference:
        return None
    logps = []
    for inputs in batches:
        batch = PairBatch.of(trainer.to_device(inputs))
        if batch.ref_token_logps is not None:
            logps.append(batch.ref_token_logps[batch.mask].float())
            continue
        with trainer.reference_model() as (model, _):
            logps.append(trainer.score_tokens(model, batch).logps[batch.mask].float())
    return torch.cat(logps)
