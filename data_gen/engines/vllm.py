"""The engine that runs vLLM in this process (`pip install 'contralto[vllm]'`), on machines with a GPU."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from functools import cached_property
from typing import Any

from contralto.common.adapters import split_adapter
from contralto.common.hashing import weights_digest
from contralto.common.hub import locate, trusts_remote_code
from contralto.data_gen.engines.base import Outcome
from contralto.data_gen.engines.bodies import chat_messages, raw_prompt
from contralto.data_gen.ranges import check_number
from contralto.data_gen.types import Answer, Failure, Request, Sampling

__all__ = ["VLLMEngine"]


class VLLMEngine:
    """Decode with vLLM: `LLM.chat` for messages, `LLM.generate` for raw prompts, with a seed per request.

    vLLM forms batches as requests come and go, and answers may differ in near ties between two runs, unless the environment
    has `VLLM_BATCH_INVARIANT=1`. The unanswered requests of an interrupted round are sent again.

    With a `method` it decodes by contrast: methods that contrast prompts with a `contrast_prompt`, those that contrast models
    with LoRA adapters of the model. Every request has a random stream of its own then, that of the engine `transformers`, and
    answers do not depend on the batch except in near ties.

    Args:
        model: a folder, a hub id, or `testbed:NAME`; also a LoRA adapter, which is put onto its base.
        adapter: a LoRA adapter, a folder or a hub id; with `adapters_off` the other branch is the model without it.
        rows_together: rows whose requests are handed over together; an interrupted run loses at most their answers.
        options: further arguments of `vllm.LLM`, such as `{"tensor_parallel_size": 2}`.
        decoding: the options of `DecodingConfig`: `method` and its parameters.

    Raises:
        ValueError: `rows_together` is below 1, the method does not run in vLLM, or options contradict each other.
        ImportError: at the first answer, vLLM is not installed.
    """

    def __init__(
        self,
        *,
        model: str,
        adapter: str | None = None,
        rows_together: int = 256,
        options: Mapping[str, Any] | None = None,
        **decoding: Any,
    ) -> None:
        check_number("rows_together", rows_together, least=1, most=1_000_000, whole=True)
        model, adapter = split_adapter(model, None) if adapter is None else (model, adapter)
        self._config = _config_of(decoding)
        self._adapters = _adapters(self._config, adapter)
        self._model, self._adapter, self._options = model, adapter, dict(options or {})
        self.rows_together = rows_together

    @staticmethod
    def option_names() -> tuple[str, ...]:
        """Return the names of the decoding options."""
        from contralto.decoding.methods import option_names

        return option_names()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the model, adapter, weights, and the options of `LLM`; keys of answers include them."""
        folders = self._adapters if self._config is not None else [self._adapter]
        names = [self._model, *(name for name in dict.fromkeys(folders) if name)]
        identity = {
            "engine": "vllm",
            "model": self._model,
            "adapter": self._adapter,
            "weights": [weights_digest(name) for name in names],
            "options": self._options,
        }
        return identity if self._config is None else identity | {"decoding": self._config.describe()}

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Decode the requests that are not known yet, first those with messages, then raw prompts.

        Args:
            requests: a round of requests.
        """
        new = [request for request in requests if not request.known]
        if self._config is not None:
            yield from self._by_contrast(new)
            return
        for group in ([r for r in new if r.prompt is None], [r for r in new if r.prompt is not None]):
            if group:
                outputs = self._run(group)
                yield [(request, _read(output)) for request, output in zip(group, outputs, strict=True)]

    def _by_contrast(self, requests: list[Request]) -> Iterator[list[Outcome]]:
        """Decode by contrast; requests of the same sampling are handed over together."""
        from contralto.decoding.vllm import generate_pairs
        from contralto.decoding.vllm.adapters import loras

        config: Any = self._config
        parameters = {name: value for name, value in config.parameters.items() if value is not None}
        alike: dict[Any, list[Request]] = {}
        for request in requests:
            alike.setdefault(astuple(request.sampling), []).append(request)
        for group in alike.values():
            sampling = group[0].sampling
            outputs = generate_pairs(
                self._llm,
                [_branches(request, config) for request in group],
                method=config.method,
                form=config.form,
                adapters=loras(self._adapters),
                seed=[request.seed for request in group],
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k if sampling.temperature else 0,
                top_p=sampling.top_p if sampling.temperature else 1.0,
                logprobs=sampling.logprobs,
                sampling={"stop": list(sampling.stop)},
                use_tqdm=False,
                **parameters,
            )
            yield [(request, _answer(output, sampling)) for request, output in zip(group, outputs, strict=True)]

    def _run(self, requests: list[Request]) -> Any:
        options = {"sampling_params": [_sampling(request) for request in requests], "use_tqdm": False}
        if self._adapter:
            from vllm.lora.request import LoRARequest

            options["lora_request"] = LoRARequest(self._adapter, 1, self._adapter)
        if requests[0].prompt is not None:
            return self._llm.generate([raw_prompt(request) for request in requests], **options)
        return self._llm.chat([chat_messages(request) for request in requests], **options)

    @cached_property
    def _llm(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("engine vllm needs vLLM: pip install 'contralto[vllm]'") from error
        options = {"trust_remote_code": trusts_remote_code(), **self._options}
        if self._config is not None:
            from contralto.decoding.vllm import make_llm
            from contralto.decoding.vllm.adapters import lora_options

            return make_llm(self._model, **{**lora_options(self._adapters), **options})
        return LLM(model=locate(self._model), **({"enable_lora": True} if self._adapter else {}), **options)


def _config_of(decoding: Mapping[str, Any]) -> Any:
    """Return the configuration of a method; None for decoding without contrast."""
    if not decoding:
        return None
    from contralto.decoding.methods import DecodingConfig

    config = DecodingConfig.from_options(**decoding)
    return config if config.contrasts else None


def _adapters(config: Any, adapter: str | None) -> list[str | None]:
    """Return the adapter of every branch; None is the model without adapters."""
    if config is None:
        return [adapter]
    from contralto.decoding.vllm.adapters import adapters_of

    config.check_contrast_prompt(always=True)
    return adapters_of(config, adapter)


def _branches(request: Request, config: Any) -> list[Any]:
    """Return the prompt of each branch, as messages or as text."""
    from contralto.common.messages import contrasted

    if request.images:
        raise ValueError("engine vllm does not support prompts with images: use engine transformers")
    first: Any = request.prompt if request.prompt is not None else [dict(message) for message in request.messages or ()]
    if not config.declaration.views:
        return [first] * len(config.declaration.branches)
    return [first, contrasted(first, config.contrast_prompt)]


def _answer(output: Any, sampling: Sampling) -> Answer:
    """Return the answer in an output of `generate_pairs`; its log-probabilities are those of the main branch."""
    return Answer(
        text=output.text,
        finish_reason=output.finish_reason,
        prompt_tokens=sum(output.prompt_tokens),
        completion_tokens=len(output.tokens),
        logprobs=tuple(output.logprobs[0]) if sampling.logprobs else None,
    )


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    sampling = request.sampling
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop) or None,
        logprobs=0 if sampling.logprobs else None,
        seed=request.seed % 2**31,
    )


def _read(output: Any) -> Answer | Failure:
    completion = output.outputs[0]
    logprobs = None
    if completion.logprobs is not None:
        logprobs = tuple(
            step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        )
    return Answer(
        text=completion.text,
        finish_reason=completion.finish_reason or "unknown",
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(completion.token_ids),
        logprobs=logprobs,
    )
