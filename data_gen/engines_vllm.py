"""vLLM in this process (`pip install vllm`), for machines with a GPU: continuous batching, LoRA adapters, seeds per request."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from contralto.data_gen.engines import Outcome, weights_digest
from contralto.data_gen.engines_openai import _with_images
from contralto.data_gen.requests import Answer, Failure, Request
from contralto.names import locate

__all__ = ["VLLMEngine"]


class VLLMEngine:
    """A model in vLLM's own loop: `LLM.chat` for messages, `LLM.generate` for raw prompts.

    vLLM forms batches as requests come and go, and answers may differ in near ties between two runs, unless the environment
    has `VLLM_BATCH_INVARIANT=1`. An interrupted round is asked again as far as it was not answered.

    Args:
        model: a folder, a hub id, or `testbed:NAME`.
        adapter: a LoRA adapter, a folder or a hub id.
        rows_together: rows whose requests are handed over together; an interrupted run loses at most their answers.
        options: further arguments of `vllm.LLM`, such as `{"tensor_parallel_size": 2}`.

    Raises:
        ValueError: `rows_together` below 1.
        ImportError: at the first answer, vLLM is not installed.
    """

    def __init__(
        self,
        *,
        model: str,
        adapter: str | None = None,
        rows_together: int = 256,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if rows_together < 1:
            raise ValueError(f"rows_together must be at least 1, not {rows_together}")
        self._model, self._adapter, self._options = model, adapter, dict(options or {})
        self.rows_together = rows_together

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Model, adapter, weights, and the options of `LLM`."""
        names = [self._model, *([self._adapter] if self._adapter else [])]
        return {
            "engine": "vllm",
            "model": self._model,
            "adapter": self._adapter,
            "weights": [weights_digest(name) for name in names],
            "options": self._options,
        }

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """The requests that are not known yet, messages and raw prompts in turn."""
        new = [request for request in requests if not request.known]
        for some in ([r for r in new if r.prompt is None], [r for r in new if r.prompt is not None]):
            if some:
                outputs = self._run(some)
                yield [(request, _read(output)) for request, output in zip(some, outputs, strict=True)]

    def _run(self, requests: list[Request]) -> Any:
        how = {"sampling_params": [_sampling(request) for request in requests], "use_tqdm": False}
        if self._adapter:
            from vllm.lora.request import LoRARequest

            how["lora_request"] = LoRARequest(self._adapter, 1, self._adapter)
        if requests[0].prompt is not None:
            return self._llm.generate([request.prompt for request in requests], **how)
        return self._llm.chat([_with_images(request) for request in requests], **how)

    @cached_property
    def _llm(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("engine vllm needs vLLM: pip install vllm") from error
        return LLM(model=locate(self._model), **({"enable_lora": True} if self._adapter else {}), **self._options)


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    how = request.sampling
    return SamplingParams(
        max_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        stop=list(how.stop) or None,
        logprobs=0 if how.logprobs else None,
        seed=request.seed % 2**31,
    )


def _read(output: Any) -> Answer | Failure:
    said = output.outputs[0]
    logprobs = None
    if said.logprobs is not None:
        logprobs = tuple(step[token].logprob for step, token in zip(said.logprobs, said.token_ids, strict=True))
    return Answer(
        text=said.text,
        finish_reason=said.finish_reason or "unknown",
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(said.token_ids),
        logprobs=logprobs,
    )
