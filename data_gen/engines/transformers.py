"""The engine that decodes with a local model of transformers, by plain or contrastive decoding."""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from contralto.common.adapters import split_adapter
from contralto.common.hashing import content_digest, weights_digest
from contralto.common.hub import adapter_base, check_fit, locate
from contralto.data_gen.engines.base import Outcome
from contralto.data_gen.engines.batching import batches
from contralto.data_gen.ranges import check_batch
from contralto.data_gen.types import Answer, Failure, Request, Sampling

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """Decode with a local model, with or without contrast, in left-padded batches of similar length.

    Every request has a random stream of its own (`SeededSampling`), so its answer depends on neither batch nor order beyond
    the model's logits. Their last bits do depend on the batch; so a round is always cut into the same batches, and a batch is
    recorded whole: a resumed run computes what the interrupted one would have.

    Args:
        model: a folder, a hub id, or `testbed:NAME`; also a LoRA adapter, which is put onto its base.
        batch_size: requests decoded together.
        adapter: a LoRA adapter on top of the model, a folder or a hub id. Engines of the same model share its weights.
        raw: feed messages as they are, even if there is a chat template.
        dtype: auto (as stored), or a torch dtype such as bfloat16.
        device: such as cuda:1, or auto to spread the models; None is a GPU if there is one.
        options: the options of `DecodingConfig`: `method` and its parameters; `load_in_4bit`, `amateur_load_in_8bit`, ..., see
            `contralto.decoding.quantization`.

    Raises:
        ModuleNotFoundError: models are quantised, and bitsandbytes is not installed.
        ValueError: options contradict each other; at the first answer, a model cannot be loaded.
    """

    def __init__(
        self,
        *,
        model: str,
        batch_size: int = 16,
        adapter: str | None = None,
        raw: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        from contralto.decoding.loading import check_dtype
        from contralto.decoding.methods import DecodingConfig
        from contralto.decoding.quantization import check_bits, take_bits

        check_batch(batch_size)
        check_dtype(dtype)
        self._bits = take_bits(options)
        self._config = DecodingConfig.from_options(**options)
        check_bits(self._bits, self._config.models)
        self._config.check_contrast_prompt()
        # options that a recipe turns off explicitly are a part of keys in existing stores
        self._off = {
            name: options[name] for name in ("adapters_off", "contrast_prompt") if options.get(name) in (False, "")
        }
        self._model, self._dtype, self._device, self._raw = model, dtype, device, raw
        self._adapter, self._batch_size = adapter, batch_size
        self.rows_together = 4 * batch_size  # enough to find rows of similar length

    @staticmethod
    def option_names() -> tuple[str, ...]:
        """Return the names of the options of decoding and of quantisation."""
        from contralto.decoding.methods import option_names
        from contralto.decoding.quantization import quantization_options

        return (*option_names(), *quantization_options())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the models with digests of their weights, and the decoding options; keys include them."""
        from contralto.decoding.methods.variants import is_variant

        config = self._config
        names = [self._model, *config.models.values(), *([self._adapter] if self._adapter else [])]
        whole = [name for name in names if name != self._adapter and not is_variant(name)]
        names += [base for name in whole if (base := adapter_base(name)) is not None]
        options = self._off | {name: value for name, value in config.describe().items() if name != "method"}
        return {
            "engine": "transformers",
            "model": self._model,
            "adapter": self._adapter,
            "weights": [weights_digest(name) for name in names],
            "dtype": self._dtype,
            "raw": self._raw,
            "method": config.method,
            "options": options,
            **({"bits": self._bits} if self._bits else {}),
        }

    def check(self, sampling: Sampling) -> None:
        """Reject sampling options that the method does not support.

        Args:
            sampling: of requests.

        Raises:
            ValueError: a temperature, and the method cannot sample every row from a random stream of its own; log-probabilities of a
                method that has none.
        """
        method = self._config.declaration
        if sampling.temperature and not method.row_seeds:
            why = method.row_seeds.reason
            raise ValueError(f"method {method.name!r} {why}: set temperature to 0, or choose another method")
        if sampling.logprobs and not method.likelihoods:
            raise ValueError(f"method {method.name!r} returns no log-probabilities: leave logprobs out")

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Decode batch by batch, without batches whose requests are all recorded.

        Args:
            requests: a round of requests.
        """
        for batch in batches(requests, self._batch_size):
            if not all(request.known for request in batch):
                with _ONE_AT_A_TIME:
                    answers = self._answers(batch)
                yield [(r, a) for r, a in zip(batch, answers, strict=True) if not r.known]

    def _answers(self, batch: Sequence[Request]) -> list[Answer | Failure]:
        """Return the answers of one batch, each as long as the contexts of the models allow."""
        from contralto.decoding.branches.context import rooms

        sampling = batch[0].sampling
        self.check(sampling)
        if (
            self._config.declaration.reads_images and not batch[0].images
        ):  # the requests of a batch all have images, or none has
            raise ValueError(
                f"method {self._config.method!r} contrasts images, but a request has none: choose another method"
            )
        models = self._models(with_images=bool(batch[0].images))
        if self._shares_base:
            _use_adapter(models.main, self._adapter)
        inputs = self._batch(batch, models)
        branch_rooms = rooms(inputs, window=self._config.parameters.get("amateur_window"))
        limits = [min(sampling.max_new_tokens, *(room.left() for room in branches)) for branches in branch_rooms]
        if min(limits) < 1:
            rest = [request for request, limit in zip(batch, limits, strict=True) if limit >= 1]
            answered = iter(self._answers(rest) if rest else ())
            return [next(answered) if n >= 1 else _too_long(row) for n, row in zip(limits, branch_rooms, strict=True)]
        answers = self._decode(batch, models, inputs, int(min(limits)))
        return [
            # decode it alone: a longer prompt of the batch limited its tokens
            self._answers([request])[0] if _is_cut(answer, below=limit) and len(batch) > 1 else answer
            for request, answer, limit in zip(batch, answers, limits, strict=True)
        ]

    @cached_property
    def _shares_base(self) -> bool:
        """Return True if other engines use the same base, with other adapters or none."""
        if self._adapter is not None:
            split_adapter(self._model, self._adapter)  # raises if the adapter is of another model
        return not self._config.adapters_off and adapter_base(self._model) is None

    def _models(self, *, with_images: bool) -> Any:
        """Return the models; engines of equal names share them."""
        config = self._config
        return _load(
            # other methods need the model alone
            method=config.method if config.models or config.adapters_off else "",
            models=tuple(config.models.items()),
            vocabulary=config.parameters.get("vocabulary"),
            adapters_off=config.adapters_off,
            model=self._model,
            dtype=self._dtype,
            device=self._device,
            with_images=with_images,
            adapter=None if self._shares_base else self._adapter,
            bits=tuple(self._bits.items()),
        )

    def _batch(self, batch: Sequence[Request], models: Any) -> Any:
        """Return a batch with the inputs of the method's branches; noise uses the requests' seeds."""
        from contralto.decoding.inputs import batch_of

        raw = self._raw or batch[0].prompt is not None
        prompts = [_prompt(request, self._config.contrast_prompt, models, raw=raw) for request in batch]
        seeds = [request.seed % 2**31 for request in batch]
        return batch_of(prompts, models, self._config, seeds=seeds, raw=raw)

    def _decode(self, batch: Sequence[Request], models: Any, inputs: Any, max_new_tokens: int) -> list[Answer]:
        from contralto.decoding import SeededSampling
        from contralto.decoding.inputs import prompt_length
        from contralto.decoding.methods import generate_kwargs
        from contralto.decoding.stopping import StopStrings

        sampling = batch[0].sampling
        start = prompt_length(inputs)
        arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        arguments |= {"return_dict_in_generate": True, "output_logits": sampling.logprobs}
        if sampling.stop:
            stop = StopStrings(models.tokenizer, sampling.stop, start, skip_special_tokens=True)
            arguments["stopping_criteria"] = [stop]
        arguments |= {name: value for name, value in generate_kwargs(self._config, inputs).items() if value}
        if sampling.temperature:
            options: dict[str, Any] = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
            seeded = SeededSampling([request.seed for request in batch], **options)
            arguments["logits_processor"] = [*arguments.get("logits_processor", ()), seeded]
        output = models.main.generate(**inputs.inputs, **arguments)
        return [
            _read(
                row[start:],
                models,
                sampling,
                _logprobs(output, i, start),
                int(inputs.inputs["attention_mask"][i].sum()),
            )
            for i, row in enumerate(output.sequences)
        ]


def _too_long(branches: Sequence[Any]) -> Failure:
    """Return the failure of a prompt that fills the context."""
    room = min(branches, key=lambda room: room.left())
    return Failure(
        f"the {room.text_name} has {room.tokens:,} tokens, but prompt and answer together may have {room.context:,} with {room.name}: shorten it, or "
        "use a model with a longer context"
    )


def _is_cut(answer: Answer, *, below: float) -> bool:
    """Return True if an answer was truncated before its own limit of tokens."""
    return answer.finish_reason == "length" and (answer.completion_tokens or 0) < below


_ONE_AT_A_TIME = threading.Lock()
"""Held while a batch is decoded: local models share the accelerator, and engines of one model its weights and adapters."""


@cache
def _load(
    *,
    method: str,
    models: tuple[tuple[str, Any], ...],
    vocabulary: str | None,
    adapters_off: bool,
    model: str,
    dtype: str,
    device: str | None,
    with_images: bool,
    adapter: str | None,
    bits: tuple[tuple[str, int], ...],
) -> Any:
    from contralto.decoding.loading import load_models
    from contralto.decoding.methods import DecodingConfig

    parameters = {} if vocabulary is None else {"vocabulary": vocabulary}
    config = DecodingConfig(method=method, models=dict(models), parameters=parameters, adapters_off=adapters_off)
    return load_models(
        model, config, with_images=with_images, dtype=dtype, device=device, adapter=adapter, bits=dict(bits)
    )


def _use_adapter(model: Any, adapter: str | None) -> None:
    """Activate an adapter of a model, or disable adapters; each adapter is loaded once."""
    if adapter is None:
        if _loaded_adapters(model):
            model.disable_adapters()
        return
    name = content_digest(adapter, 8)
    if name not in _loaded_adapters(model):
        check_fit(model, adapter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            model.load_adapter(locate(adapter), adapter_name=name)
        model.eval()
    model.enable_adapters()
    model.set_adapter(name)


def _loaded_adapters(model: Any) -> Sequence[str]:
    return list(getattr(model, "peft_config", {}))


def _prompt(request: Request, contrast_prompt: str | None, models: Any, *, raw: bool) -> Any:
    from contralto.decoding.inputs import Prompt

    content: Any = request.prompt
    if request.messages is not None:
        content = [dict(message) for message in request.messages]
        bare = raw or (models.processor or models.tokenizer).chat_template is None
        if bare and len(content) == 1 and isinstance(content[0]["content"], str):
            content = content[0]["content"]
    return Prompt(content, tuple(request.images), contrast_prompt)


def _logprobs(output: Any, row: int, start: int) -> list[float] | None:
    """Return log-probabilities of a row's tokens under the model, before the method, temperature and truncation."""
    if output.logits is None:
        return None
    tokens = output.sequences[row, start:].tolist()
    return [float(step[row].float().log_softmax(-1)[token]) for step, token in zip(output.logits, tokens, strict=True)]


def _read(tokens: Any, models: Any, sampling: Sampling, logprobs: list[float] | None, prompt_tokens: int) -> Answer:
    """Return the answer in the tokens after the prompt; tokens after its end are padding."""
    ids: list[int] = tokens.tolist()
    ends = models.main.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = models.tokenizer.decode(ids[:end], skip_special_tokens=True)
    count = len(ids) if end is None else end + 1
    cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if cuts and end is None:  # the row was padded while others of its batch continued
        pad = models.tokenizer.pad_token_id
        count = next((i + 1 for i in reversed(range(len(ids))) if ids[i] != pad), 0)
    return Answer(
        text=text[: min(cuts)] if cuts else text,
        finish_reason="stop" if cuts or end is not None else "length",
        prompt_tokens=prompt_tokens,
        completion_tokens=count,
        logprobs=None if logprobs is None else tuple(logprobs[:count]),
    )
