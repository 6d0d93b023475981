"""Start vLLM for completions whose branches are requests: in this process, or by flags of its server."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from contralto.common.hub import locate
from contralto.decoding.vllm.checks import DEFAULT_TIMEOUT

__all__ = [
    "AMATEUR",
    "PROCESSOR",
    "SCHEDULER",
    "amateur_options",
    "cpu_options",
    "engine_options",
    "make_llm",
    "marker_of",
    "server_flags",
]

PROCESSOR = "contralto.decoding.vllm:PairedContrast"
AMATEUR = "contralto.decoding.vllm:AmateurContrast"
SCHEDULER = "contralto.decoding.vllm.pair_scheduler"
MINE = {"scheduler_cls": SCHEDULER, "scheduling_policy": "fcfs", "long_prefill_token_threshold": 0}


def make_llm(
    model: str,
    *,
    amateur: str | Mapping[str, Any] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    **options: Any,
) -> Any:
    """Return a `vllm.LLM` for `generate_pairs`, with the processor and the scheduler that it needs; or with an amateur.

    Options that cannot work raise an error before anything is loaded.

    Args:
        model: a folder, a hub id, or `testbed:NAME`.
        amateur: another model, which contrasts single requests; a name, or the settings of `AmateurContrast`. `generate_pairs` does not
            work with such an engine.
        timeout: seconds that a request waits for the other branches of its completion.
        options: further arguments of `vllm.LLM`, such as `tensor_parallel_size=2`, `enable_lora=True, max_loras=2`. A
            completion starts when its prompts fit `max_num_batched_tokens` together.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: options that could schedule branches apart, see `engine_options`.
    """
    checked = engine_options(timeout=timeout, **options) if amateur is None else amateur_options(amateur, **options)
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError("make_llm needs vLLM: pip install 'contralto[vllm]'") from error
    return LLM(locate(model), **(cpu_options(checked) if checked.get("enable_lora") else checked))


def amateur_options(amateur: str | Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for requests that are contrasted with another model.

    Args:
        amateur: its name, or the settings of `AmateurContrast`.
        options: further arguments.

    Raises:
        ValueError: speculative decoding.

    Examples:
        >>> amateur_options("small", max_num_seqs=8)["additional_config"]
        {'contrast_amateur': {'model': 'small'}}
        >>> amateur_options("small", speculative_config={"method": "ngram", "num_speculative_tokens": 2})
        Traceback (most recent call last):
            ...
        ValueError: speculative_config: the contrast with an amateur cannot be combined with speculative decoding: leave it out
    """
    _check_speculative(options, "the contrast with an amateur")
    processors = [p for p in options.pop("logits_processors", None) or () if p != AMATEUR]
    settings = {"model": amateur} if isinstance(amateur, str) else dict(amateur)
    more = dict(options.pop("additional_config", None) or {}) | {"contrast_amateur": settings}
    return {**options, "logits_processors": [*processors, AMATEUR], "additional_config": more}


def _check_speculative(options: Mapping[str, Any], title: str) -> None:
    """Reject speculative decoding, which verifies several tokens of a request in one step."""
    for name in ("speculative_config", "spec_method", "spec_model", "spec_tokens"):
        if options.get(name):
            raise ValueError(f"{name}: {title} cannot be combined with speculative decoding: leave it out")


def cpu_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options for LoRA. On CPUs a slot stays empty, since requests without an adapter use the last slot there.

    Args:
        options: from `engine_options`.
    """
    from vllm.platforms import current_platform

    return {**options, "max_loras": options.get("max_loras", 1) + 1} if current_platform.is_cpu() else options


def engine_options(*, timeout: float = DEFAULT_TIMEOUT, **options: Any) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`, or of its server, for completions whose branches are requests.

    Args:
        timeout: seconds that a request waits for the other branches of its completion.
        options: further arguments.

    Raises:
        ValueError: speculative decoding, data parallelism, sampling sharded by requests, a scheduler or policy of one's own,
            a KV connector, fewer than two requests at a time, a step that reads less than two tokens, a timeout not above 0.

    Examples:
        >>> engine_options(max_num_seqs=64)["scheduler_cls"]
        'contralto.decoding.vllm.pair_scheduler'
        >>> engine_options(data_parallel_size=2)
        Traceback (most recent call last):
            ...
        ValueError: data_parallel_size must be 1, not 2: the branches of a completion would be in different engines; start several servers, or use tensor_parallel_size
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds above 0, not {timeout}")
    _check_speculative(options, "the branches of a completion")
    if (options.get("data_parallel_size") or 1) > 1:
        raise ValueError(
            f"data_parallel_size must be 1, not {options['data_parallel_size']}: the branches of a completion "
            "would be in different engines; start several servers, or use tensor_parallel_size"
        )
    for name in ("enable_batch_sharded_sampling", "kv_transfer_config"):
        if options.get(name):
            raise ValueError(f"{name} separates the branches of a completion: leave it out")
    for name, value in MINE.items():
        if options.get(name, value) not in (None, value):
            raise ValueError(f"{name} must be {value!r} with contrastive branches, not {options[name]!r}: leave it out")
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if options.get(name) is not None and options[name] < 2:
            raise ValueError(f"{name} must be at least 2, one for each branch of a completion, not {options[name]}")
    processors = [p for p in options.pop("logits_processors", None) or () if p != PROCESSOR]
    more = dict(options.pop("additional_config", None) or {}) | {"contrast_timeout": timeout}
    return {
        **options,
        "logits_processors": [*processors, PROCESSOR],
        "scheduler_cls": SCHEDULER,
        "additional_config": more,
    }


def server_flags(options: Mapping[str, Any]) -> list[str]:
    """Return engine options as flags of vLLM's server.

    Args:
        options: from `engine_options`.

    Examples:
        >>> server_flags({"max_num_seqs": 8, "enable_lora": True, "logits_processors": ["a:B"]})
        ['--max-num-seqs', '8', '--enable-lora', '--logits-processors', 'a:B']
    """
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def marker_of(tokenizer: Any, *, vocabulary: int, ends: Sequence[int] = ()) -> int:
    """Return a token id that no completion contains, which ends branches whose partners are missing.

    It is a row of the embedding without a token if there is one, else the token for padding, for unknown words, or for the
    beginning of a sequence.

    Args:
        tokenizer: of the model.
        vocabulary: number of rows of the model's embedding.
        ends: end-of-sequence tokens, which cannot be the marker.

    Raises:
        ValueError: there is no such token, so `marker` is required.

    Examples:
        >>> from contralto import testbed
        >>> marker_of(testbed.tokenizer(), vocabulary=160, ends=[3]), marker_of(testbed.tokenizer(), vocabulary=192)
        (0, 191)
    """
    if vocabulary > len(tokenizer):
        return vocabulary - 1
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if token is not None and token not in (tokenizer.eos_token_id, *ends):
            return int(token)
    raise ValueError(
        "this tokenizer has no token that never occurs in text: pass marker, a token that never occurs in completions"
    )
