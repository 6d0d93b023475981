"""The engine that decodes with a local model of transformers, by plain or contrastive decoding."""

import threading
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

from contralto.common.hashing import content_digest, weights_digest
from contralto.data_gen.engines.base import Outcome
from contralto.data_gen.engines.batching import batches
from contralto.data_gen.ranges import check_batch
from contralto.data_gen.types import Answer, Failure, Request, Sampling

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """A local model, by plain or contrastive decoding, in left-padded batches of similar length.

    Every request has a random stream of its own (`SeededSampling`), so its answer depends on neither batch nor order, as far
    as the model's own numbers do not. They do in their last bits; so a round is always cut into the same batches, and a
    batch is recorded whole: a resumed run computes what the interrupted one would have.

    Args:
        model: a folder, a hub id, or `testbed:NAME`.
        batch_size: requests decoded together.
        adapter: a LoRA adapter on top of the model, a folder or a hub id. Engines of the same model share its weights.
        raw: feed messages as they are, even if there is a chat template.
        dtype, device: as for `contralto generate`.
        options: how to decode: `method` and its parameters, those of `contralto.decoding.methods`.

    Raises:
        ValueError: options that do not go together; at the first answer, a model that cannot be loaded.
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
        from contralto.cli.options import check_dtype
        from contralto.decoding import methods

        check_batch(batch_size)
        check_dtype(dtype)
        self._how = methods.choice(**options)
        self._how.executor = "processor" if self._how.method == "none" else "loop"
        for name, value in {
            "model": model,
            "dtype": dtype,
            "device": device,
            "raw": raw,
            "seed": 0,
            "beams": 1,
        }.items():
            setattr(self._how, name, value)
        self._adapter, self._batch_size = adapter, batch_size
        self.rows_together = 4 * batch_size  # enough to find rows of similar length

    @staticmethod
    def option_names() -> tuple[str, ...]:
        """Return the names of the decoding options."""
        from contralto.decoding import methods

        return methods.OPTIONS

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model, the other models of the method with their weights, and the decoding options."""
        from contralto.decoding import methods

        how = self._how
        others = [getattr(how, name) for name in methods.METHODS[how.method].models if getattr(how, name)]
        names = [how.model, *others, *([self._adapter] if self._adapter else [])]
        options = {n: v for n in methods.OPTIONS if n != "method" and (v := getattr(how, n)) is not None}
        return {
            "engine": "transformers",
            "model": how.model,
            "adapter": self._adapter,
            "weights": [weights_digest(name) for name in names],
            "dtype": how.dtype,
            "raw": how.raw,
            "method": how.method,
            "options": options | methods.parameters(how),
        }

    def check(self, sampling: Sampling) -> None:
        """Refuse a sampling that the method does not know.

        Raises:
            ValueError: contrastive search with a temperature, speculative decoding with one, log-probs of either.
        """
        if self._how.method in ("search", "scd") and sampling.temperature:
            why = "is deterministic" if self._how.method == "search" else "draws random numbers of its own"
            raise ValueError(f"method {self._how.method!r} {why}: set temperature to 0, or choose another method")
        if self._how.method == "search" and sampling.logprobs:
            raise ValueError("method 'search' tells no log-probabilities: leave logprobs out")

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Batch after batch; batches whose requests are all known are left out."""
        for batch in batches(requests, self._batch_size):
            if not all(request.known for request in batch):
                with _ONE_AT_A_TIME:
                    answers = self._answers(batch)
                yield [(r, a) for r, a in zip(batch, answers, strict=True) if not r.known]

    def _answers(self, batch: Sequence[Request]) -> list[Answer | Failure]:
        """The answers of one batch, each as long as the contexts of the models let it be."""
        from contralto.decoding.branches.context import rooms

        sampling = batch[0].sampling
        self.check(sampling)
        models = _load(_Names.of(self._how, sees=bool(batch[0].images)))
        _use_adapter(models.main, self._adapter)
        setting = _setting(batch, models, self._how)
        found = rooms(setting, window=self._how.amateur_window)
        limits = [min(sampling.max_new_tokens, *(room.left() for room in branches)) for branches in found]
        if min(limits) < 1:
            rest = [request for request, limit in zip(batch, limits, strict=True) if limit >= 1]
            answered = iter(self._answers(rest) if rest else ())
            return [next(answered) if n >= 1 else _too_long(row) for n, row in zip(limits, found, strict=True)]
        answers = self._decode(batch, models, setting, int(min(limits)))
        return [
            # a longer prompt of the batch ended it too early
            self._answers([request])[0] if _is_cut(answer, below=limit) and len(batch) > 1 else answer
            for request, answer, limit in zip(batch, answers, limits, strict=True)
        ]

    def _decode(self, batch: Sequence[Request], models: Any, setting: Any, max_new_tokens: int) -> list[Answer]:
        from contralto.cli import generate
        from contralto.decoding import SeededSampling, methods
        from contralto.decoding.stopping import StopStrings

        sampling = batch[0].sampling
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        how |= {"return_dict_in_generate": True, "output_logits": sampling.logprobs}
        if sampling.stop:
            start = generate.prompt_length(setting)
            how["stopping_criteria"] = [StopStrings(models.tokenizer, sampling.stop, start, skip_special_tokens=True)]
        how |= {n: v for n, v in methods.arguments(self._how, setting, executor=self._how.executor).items() if v}
        if sampling.temperature:
            drawn: dict[str, Any] = {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
            how["logits_processor"] = [
                *how.get("logits_processor", ()),
                SeededSampling([request.seed for request in batch], **drawn),
            ]
        output = models.main.generate(**setting.inputs, **how)
        start = generate.prompt_length(setting)
        return [
            _read(
                row[start:],
                models,
                sampling,
                _logprobs(output, i, start),
                int(setting.inputs["attention_mask"][i].sum()),
            )
            for i, row in enumerate(output.sequences)
        ]


def _too_long(branches: Sequence[Any]) -> Failure:
    """Say why no token fits after a prompt."""
    room = min(branches, key=lambda room: room.left())
    return Failure(
        f"the {room.what} has {room.tokens:,} tokens, and {room.name} reads {room.context:,} with the answer: shorten it, or "
        "take a model of a longer context"
    )


def _is_cut(answer: Answer, *, below: float) -> bool:
    """Whether an answer was ended by its length, and has fewer tokens than it may have."""
    return answer.finish_reason == "length" and (answer.completion_tokens or 0) < below


_ONE_AT_A_TIME = threading.Lock()
"""Local models share the accelerator, and engines of one model its weights and their adapters."""


class _Names(NamedTuple):
    """Which models to load: engines of equal names share them."""

    method: str
    model: str
    amateur: str | None
    expert: str | None
    antiexpert: str | None
    adapters_off: bool | None
    dtype: str
    device: str | None
    sees: bool

    @classmethod
    def of(cls, how: Namespace, *, sees: bool) -> "_Names":
        without = {n: None for n in ("amateur", "expert", "antiexpert", "adapters_off")}
        own = {n: getattr(how, n) for n in without}
        method = how.method if any(own.values()) else "none"  # the other methods need the model alone
        return cls(**{**without, **own}, method=method, model=how.model, dtype=how.dtype, device=how.device, sees=sees)


@cache
def _load(names: _Names) -> Any:
    from contralto.cli import generate

    return generate.load_models(Namespace(**names._asdict()), sees=names.sees)


def _use_adapter(model: Any, adapter: str | None) -> None:
    """Switch a model to an adapter, or to none; adapters are loaded once."""
    if adapter is None:
        if _loaded_adapters(model):
            model.disable_adapters()
        return
    name = content_digest(adapter, 8)
    if name not in _loaded_adapters(model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            model.load_adapter(adapter, adapter_name=name)
        model.eval()
    model.enable_adapters()
    model.set_adapter(name)


def _loaded_adapters(model: Any) -> Sequence[str]:
    return list(getattr(model, "peft_config", {}))


def _setting(batch: Sequence[Request], models: Any, how: Namespace) -> Any:
    """A batch as the method's branches read it; noise and transformations have the requests' seeds."""
    from contralto.cli import generate

    how = Namespace(**{**vars(how), "raw": how.raw or batch[0].prompt is not None})
    prompts = [_prompt(request, how, models) for request in batch]
    return generate.setting(prompts, models, how, [request.seed % 2**31 for request in batch])


def _prompt(request: Request, how: Namespace, models: Any) -> Any:
    from contralto.cli.prompts_file import Prompt

    content: Any = request.prompt
    if request.messages is not None:
        content = [dict(message) for message in request.messages]
        bare = how.raw or (models.processor or models.tokenizer).chat_template is None
        if bare and len(content) == 1 and isinstance(content[0]["content"], str):
            content = content[0]["content"]
    return Prompt(content, tuple(request.images), how.contrast_prompt)


def _logprobs(output: Any, row: int, start: int) -> list[float] | None:
    """Log-probabilities of a row's tokens under the model, before the method, temperature and truncation."""
    if output.logits is None:
        return None
    tokens = output.sequences[row, start:].tolist()
    return [float(step[row].float().log_softmax(-1)[token]) for step, token in zip(output.logits, tokens, strict=True)]


def _read(tokens: Any, models: Any, sampling: Sampling, logprobs: list[float] | None, prompt_tokens: int) -> Answer:
    """An answer from the tokens after the prompt: what follows its end is padding."""
    ids: list[int] = tokens.tolist()
    ends = models.main.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = models.tokenizer.decode(ids[:end], skip_special_tokens=True)
    count = len(ids) if end is None else end + 1
    cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if cuts and end is None:  # the row waited for the others, padded
        pad = models.tokenizer.pad_token_id
        count = next((i + 1 for i in reversed(range(len(ids))) if ids[i] != pad), 0)
    return Answer(
        text=text[: min(cuts)] if cuts else text,
        finish_reason="stop" if cuts or end is not None else "length",
        prompt_tokens=prompt_tokens,
        completion_tokens=count,
        logprobs=None if logprobs is None else tuple(logprobs[:count]),
    )
