"""Generate completions by contrast with a vLLM engine in this process."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from contralto.decoding.vllm.engine import marker_of
from contralto.decoding.vllm.images import images_of
from contralto.decoding.vllm.session import (
    PATIENCE,
    BranchReply,
    PairOutput,
    PairProgress,
    RefusedError,
    check_prompts,
    contrast_values,
)
from contralto.decoding.vllm.settings import PREFIX

__all__ = ["generate_pairs"]


def generate_pairs(
    llm: Any,
    prompts: Sequence[Sequence[Any]],
    *,
    method: str,
    form: str | None = None,
    n: int = 1,
    max_tokens: int = 16,
    seed: int | Sequence[int] = 0,
    adapters: Sequence[Any] | None = None,
    marker: int | None = None,
    logprobs: bool = True,
    use_tqdm: bool = True,
    sampling: Mapping[str, Any] | None = None,
    main_sampling: Mapping[str, Any] | None = None,
    **values: Any,
) -> list[PairOutput]:
    """Generate completions by contrast. Branches that get out of step are detected, and the completion is resumed.

    Args:
        llm: from `make_llm`.
        prompts: for every completion the prompts of its branches, the main one first: strings, lists of token ids,
            conversations (lists of messages; images are parts `{"type": "image", "image": ...}`), or vLLM's own dictionaries.
        method: name of a method that vLLM supports, such as `cad`.
        form: form of the method; None for the default.
        n: number of completions for each entry of `prompts`; they follow each other in the result, as with
            `generate(num_return_sequences=n)`, and each is the one that its seed draws alone.
        max_tokens: maximum number of tokens of a completion.
        seed: of sampling: one per completion, or a number to which the completion's index in the result is added.
        adapters: a `LoRARequest` or None for every branch: `[tuned, None]` contrasts an adapter with the model without it.
        marker: a token id that no completion contains; None to find one.
        logprobs: whether outputs contain the log-probabilities of all branches.
        use_tqdm: whether to show vLLM's progress bar.
        sampling: further arguments of `SamplingParams` for all branches: `stop`, `ignore_eos`, `min_tokens`, ...
        main_sampling: those of the main branch alone: `structured_outputs`, `bad_words`, `logit_bias`, ...
        values: `temperature` (0, the default, is greedy), `top_k`, `top_p`, `min_p`, and parameters such as `alpha=0.5`.

    Raises:
        ValueError: options that exclude each other, a number of prompts other than that of the method's branches, or `n` above 1
            without a temperature.
        RefusedError: the engine rejected completions that can never start; its `outputs` has the others.
        RuntimeError: branches do not stay in step.
    """
    if marker is None:
        marker = marker_of(llm.get_tokenizer(), vocabulary=llm.model_config.get_vocab_size(), ends=_end_tokens(llm))
    arguments = contrast_values(method=method, form=form, marker=marker, **values)
    adapters = _adapters(adapters, check_prompts(prompts, arguments))
    _check_count(n, values, sampling)
    prompts = [branches for branches in prompts for _ in range(n)]
    requests = _Requests(
        llm, arguments, dict(sampling or {}), dict(main_sampling or {}), adapters, 0 if logprobs else None, use_tqdm
    )
    return _run(requests, prompts, _seeds(seed, len(prompts)), marker, max_tokens)


def _check_count(n: Any, values: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> None:
    """Reject a number of completions that cannot be meant."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, not {n!r}")
    if "n" in (sampling or {}):
        raise ValueError("n is an argument of its own: take it out of sampling")
    if n > 1 and not values.get("temperature"):
        raise ValueError(f"n={n} needs a temperature above 0: greedy decoding writes the same completion {n} times")


def _adapters(adapters: Sequence[Any] | None, branches: Sequence[str]) -> list[Any]:
    """Return the adapter of each branch."""
    adapters = list(adapters) if adapters is not None else [None] * len(branches)
    if len(adapters) != len(branches):
        raise ValueError(
            f"adapters must have one entry per branch ({', '.join(branches)}; None for no adapter), not {len(adapters)}"
        )
    return adapters


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return the seed of each completion."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(
            f"seed must be a number, or one number for each of the {count} completions, not {len(seeds)} numbers"
        )
    return seeds


def _end_tokens(llm: Any) -> list[int]:
    """Return the end-of-sequence tokens of the model's generation configuration."""
    ends = llm.model_config.try_get_generation_config().get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def _run(
    requests: "_Requests", prompts: Sequence[Sequence[Any]], seeds: Sequence[int], marker: int, max_tokens: int
) -> list[PairOutput]:
    """Run rounds of requests until every completion has ended or was rejected."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    tokenizer = requests.llm.get_tokenizer()
    whole = bool(requests.shared.get("stop") or {**requests.shared, **requests.main}.get("structured_outputs"))
    patience = PATIENCE + len(prompts)  # under vLLM's own scheduler one completion may have to wait for all others
    completions = [
        _Completion(branches, seed, tokenizer, PairProgress(marker, max_tokens, whole, patience))
        for branches, seed in zip(prompts, seeds, strict=True)
    ]
    active, rejection = completions, None
    while active:
        unfinished = []
        for completion, replies in zip(active, requests.send(active), strict=True):
            try:
                if not completion.progress.take(replies):
                    unfinished.append(completion)
            except RefusedError as error:
                rejection = rejection or error
        active = unfinished
    outputs = [completion.output(tokenizer) for completion in completions]
    if rejection is not None:
        rejection.outputs = outputs
        raise rejection
    return [output for output in outputs if output is not None]


class _Completion:
    """A completion, with the prompt tokens of its branches."""

    def __init__(self, prompts: Sequence[Any], seed: int, tokenizer: Any, progress: PairProgress) -> None:
        self.prompts = [_tokenized(prompt, tokenizer) for prompt in prompts]
        self.seed, self.progress = seed, progress
        self.prompt_lengths: list[int] = []

    def output(self, tokenizer: Any) -> PairOutput | None:
        """Return the output; None if the completion was rejected."""
        progress = self.progress
        if progress.ended is None:
            return None
        text = progress.ended.text
        if not progress.is_one_round:
            prompt = self.prompts[0]["prompt_token_ids"]
            prefix = tokenizer.decode(prompt, skip_special_tokens=True)
            text = tokenizer.decode([*prompt, *progress.tokens], skip_special_tokens=True)[len(prefix) :]
        return progress.output(text, self.prompt_lengths)


def _tokenized(prompt: Any, tokenizer: Any) -> dict[str, Any]:
    """Return a prompt in vLLM's format, with its token ids."""
    if isinstance(prompt, Mapping):
        text, rest = prompt.get("prompt"), {name: value for name, value in prompt.items() if name != "prompt"}
        return dict(prompt) if text is None else {**rest, "prompt_token_ids": tokenizer.encode(text)}
    if isinstance(prompt, str):
        return {"prompt_token_ids": tokenizer.encode(prompt)}
    if prompt and isinstance(prompt[0], Mapping):
        images = images_of(prompt)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        tokens = list(tokenizer.apply_chat_template(list(prompt), **options)["input_ids"])
        return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})
    return {"prompt_token_ids": list(prompt)}


class _Requests(NamedTuple):
    """The engine, and the options of all requests."""

    llm: Any
    values: Mapping[str, Any]
    """From `contrast_values`."""
    shared: Mapping[str, Any]
    """Arguments of `SamplingParams` for all branches."""
    main: Mapping[str, Any]
    """Those of the main branch alone."""
    adapters: Sequence[Any]
    logprobs: int | None
    use_tqdm: bool

    def send(self, completions: Sequence[_Completion]) -> list[list[BranchReply]]:
        """Run one round for unfinished completions, and return the replies by completion and branch."""
        count = len(self.adapters)
        prompts = [
            {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *completion.progress.tokens]}
            for completion in completions
            for prompt in completion.prompts
        ]
        params = [params for completion in completions for params in self._params(completion)]
        outputs = self.llm.generate(
            prompts, params, lora_request=list(self.adapters) * len(completions), use_tqdm=self.use_tqdm
        )
        grouped = [outputs[i : i + count] for i in range(0, len(outputs), count)]
        for completion, group in zip(completions, grouped, strict=True):
            completion.prompt_lengths = completion.prompt_lengths or [len(o.prompt_token_ids or ()) for o in group]
        return [[_reply(output.outputs[0]) for output in group] for group in grouped]

    def _params(self, completion: _Completion) -> list[Any]:
        """Return the `SamplingParams` of each branch, under a new id."""
        from vllm import SamplingParams

        progress, group = completion.progress, uuid.uuid4().hex
        stops = [*self.shared.get("stop_token_ids", ()), progress.marker]
        options = {**self.shared, "stop_token_ids": stops, "max_tokens": progress.remaining, "logprobs": self.logprobs}
        if "min_tokens" in options:
            options["min_tokens"] = max(0, options["min_tokens"] - len(progress.tokens))
        own = {
            f"{PREFIX}id": group,
            f"{PREFIX}seed": completion.seed,
            f"{PREFIX}start": len(progress.tokens),
        }
        return [
            SamplingParams(
                temperature=0,
                extra_args={**self.values, **own, f"{PREFIX}branch": branch},
                **(options if branch else {**options, **self.main}),
            )
            for branch in range(len(self.adapters))
        ]


def _reply(output: Any) -> BranchReply:
    """Return the reply to one request."""
    steps = output.logprobs or ()
    return BranchReply(
        tokens=list(output.token_ids),
        logprobs=[step[token].logprob for step, token in zip(steps, output.token_ids, strict=False)],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        text=output.text,
    )
