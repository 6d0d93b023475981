"""The parts that contralto's models in lm-eval share: decoder, requests with seeds, cache of answers.

Read from lm_eval 0.4.13: `CacheHook.dbdict`, a `SqliteDict` that has not been read yet, and that sampled answers are not cached.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from contralto.common.hashing import json_digest, tokenizer_digest
from contralto.decoding.methods import option_names
from contralto.eval.models.conversations import Conversations
from contralto.eval.models.decoder import SAMPLING, Decoder, seed_of
from contralto.eval.models.generation_options import GenerationOptions
from contralto.eval.models.requests import EvalRequest, images_of
from contralto.eval.models.stored_answers import read_answer

__all__ = ["ContrastiveEvalModel", "decoder_options", "describe_arguments", "take_options"]

IDENTITY = "contralto"
"""The key under which a cache of answers names the configuration that it belongs to."""
DECODER_OPTIONS = tuple(name for name in inspect.signature(Decoder.of).parameters if name != "options")
"""Options of the decoder besides those of methods."""


def decoder_options() -> tuple[str, ...]:
    """Return the model arguments that select the decoder, those of methods that were registered later among them."""
    return (*option_names(), *DECODER_OPTIONS)


def take_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of the decoder from model arguments, and return them.

    Args:
        kwargs: The model arguments; changed in place.
    """
    return {name: kwargs.pop(name) for name in decoder_options() if name in kwargs}


def describe_arguments(kwargs: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """Return model arguments as strings for the configuration; a tokenizer by its content, wherever its folder is.

    Args:
        kwargs: The model arguments.
        tokenizer: The tokenizer that was loaded.
    """
    described = {name: repr(value) for name, value in sorted(kwargs.items())}
    return described | ({"tokenizer": tokenizer_digest(tokenizer)} if kwargs.get("tokenizer") else {})


class ContrastiveEvalModel(Conversations):
    """A model of lm-eval with a contrastive decoder; a mixin before one of lm-eval's model classes."""

    cache_hook: Any
    decoder: Decoder
    """The method, its sampling, and the kind of likelihood."""

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the settings that determine an answer, besides the request."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Return a short hash of the configuration."""
        return json_digest(self.configuration, 12)

    def decoder_info(self) -> dict[str, Any]:
        """Return the entries for lm-eval's results."""
        own = self.configuration
        return {"decoder": self.decoder.describe(), "configuration": own, "key": json_digest(own, 12)}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use a cache of answers, if it belongs to this configuration.

        Args:
            cache_hook: lm-eval's hook.

        Raises:
            ValueError: The cache holds answers of another configuration, or more than answers.
        """
        if cache_hook.dbdict is not None:
            cache_hook.dbdict.decode = read_answer
            owner, own = cache_hook.dbdict.get(IDENTITY), self.configuration
            if owner is None and len(cache_hook.dbdict):
                raise ValueError("use_cache names a cache of another model's answers: name another file")
            if owner is not None and owner != own:
                changed = sorted(k for k in {*owner, *own} if owner.get(k) != own.get(k))
                raise ValueError(f"use_cache names a cache made with another {', '.join(changed)}: name another file")
            cache_hook.dbdict[IDENTITY] = own
        super().set_cache_hook(cache_hook)  # type: ignore[misc]

    def eval_requests(self, requests: Sequence[Any]) -> Iterator[EvalRequest]:
        """Yield requests with their seeds.

        The repetitions of a request that its task repeats have different seeds; a copy that only fills up a rank has the seed
        of its original.

        Args:
            requests: lm-eval's instances.

        Raises:
            ValueError: A repeated request would be sampled through a cache.
        """
        seen: Counter[int] = Counter()
        for request in requests:
            context, gen_kwargs, *media = request.args
            repeats = request.repeats or 1
            if repeats > 1 and self.decoder.temperature and self.cache_hook.dbdict is not None:
                raise ValueError(
                    "a task that repeats its requests cannot be sampled through a cache, which would repeat the answer: "
                    "leave use_cache out, or sample by gen_kwargs do_sample=True"
                )
            images = images_of(media)
            seed = self.seed_of(context, images, seen[id(request)] % repeats)
            seen[id(request)] += 1
            yield EvalRequest(context, request.args, request.doc, seed, images, gen_kwargs)

    def seed_of(self, context: Any, images: Sequence[Any], repeat: int) -> int:
        """Return the seed of a request.

        Args:
            context: The prompt.
            images: Its images.
            repeat: The number of the repetition.
        """
        return seed_of(self.decoder.seed, context, images, repeat)

    def check_options(self, requests: Sequence[EvalRequest]) -> None:
        """Parse the generation options of all requests, so that invalid ones raise before the first answer.

        Args:
            requests: The requests.

        Raises:
            TypeError: See `read_options`.
            ValueError: See `read_options`; or the decoder is a control of likelihoods.
        """
        if self.decoder.control:
            raise ValueError(
                f"control={self.decoder.control!r} is for likelihoods, and the task generates: leave it out, and sample with min_p and "
                "temperature for the same controls"
            )
        for request in {repr(request.gen_kwargs): request for request in requests}.values():
            self.options_of(request)

    def options_of(self, request: EvalRequest) -> GenerationOptions:
        """Return the generation options of a request.

        Args:
            request: The request.
        """
        raise NotImplementedError

    def sampling_of(self, options: GenerationOptions) -> Mapping[str, Any]:
        """Return the sampling options: those of the decoder if it samples, else those of the task.

        Args:
            options: The generation options of the task.
        """
        if self.decoder.temperature:
            return {name: getattr(self.decoder, name) for name in SAMPLING}
        return options.sampling

    def contrasted(self, request: EvalRequest) -> EvalRequest:
        """Return a request with the contrast prompt of the decoder in place of its prompt.

        Args:
            request: The request.
        """
        return self.with_contrast_prompt(request, self.decoder.config.contrast_prompt or "")

    def keep_answers(self, requests: Sequence[EvalRequest], answers: Sequence[Any]) -> None:
        """Write the answers of a batch to the cache, in one transaction.

        Args:
            requests: The requests.
            answers: Their answers.
        """
        cache = self.cache_hook.dbdict
        if cache is not None:
            cache.autocommit = False
        for request, answer in zip(requests, answers, strict=True):
            self.keep_answer(request, answer)
        if cache is not None:
            cache.commit(blocking=True)
            cache.autocommit = True

    def keep_answer(self, request: EvalRequest, answer: Any) -> None:
        """Add an answer to the cache, unless it is sampled, as in lm-eval.

        Args:
            request: The request.
            answer: Its answer.
        """
        if request.arguments and not request.gen_kwargs.get("do_sample"):
            kind = "loglikelihood" if request.tokens else "generate_until"
            self.cache_hook.add_partial(kind, request.arguments, answer)
