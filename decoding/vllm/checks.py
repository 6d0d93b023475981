"""Reject engine options of vLLM that do not work with completions whose branches are requests."""

from typing import Any

__all__ = ["DEFAULT_TIMEOUT", "check_config", "timeout_of"]

DEFAULT_TIMEOUT = 10.0
"""Seconds that a request waits for the other branches of its completion."""


def check_config(vllm_config: Any) -> None:
    """Reject engine options that could schedule the branches of a completion apart.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        ValueError: speculative decoding, data parallelism, sampling sharded by requests, prompts cut at a threshold, KV
            connectors, priorities, a pooling model.
    """
    parallel, schedule = vllm_config.parallel_config, vllm_config.scheduler_config
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "the branches of a completion cannot be combined with speculative decoding, which verifies several "
            "tokens of a request at once: leave speculative_config out"
        )
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size must be 1, not {parallel.data_parallel_size}: the branches of a completion would "
            "be sent to different engines; start several servers, or use tensor_parallel_size"
        )
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise ValueError("enable_batch_sharded_sampling separates the branches of a completion: leave it out")
    if schedule.long_prefill_token_threshold > 0:
        raise ValueError(
            "long_prefill_token_threshold must be 0: otherwise a long prompt is prefilled in chunks, out of step "
            "with its partner"
        )
    if schedule.policy != "fcfs":
        raise ValueError(
            f"scheduling_policy must be fcfs, not {schedule.policy}: priorities could separate the branches of a "
            "completion"
        )
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("kv_transfer_config fetches the branches of a completion at different times: leave it out")


def timeout_of(vllm_config: Any) -> float:
    """Return the seconds that a request waits for its partners: `additional_config={"contrast_timeout": ...}`.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        ValueError: not above 0.
    """
    config = vllm_config.additional_config
    timeout = config.get("contrast_timeout", DEFAULT_TIMEOUT) if isinstance(config, dict) else DEFAULT_TIMEOUT
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"contrast_timeout must be a number of seconds above 0, not {timeout!r}")
    return float(timeout)
