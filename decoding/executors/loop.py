"""Run a method as a `custom_generate` callable, with all branches of one model in one forward pass per token.

    model.generate(**inputs, custom_generate=method.loop())

A logits processor cannot take part in the forward pass of `generate()`, so that its branches need passes of their own. Here the
branches that are other inputs of the same model (another prompt, another image) become rows of one batch: one forward pass
per token, at the cost of a batch of two. Their prompts are read in passes of their own where padding would cost more, see `prefill`. Branches that are other models run after it, in turn.

Processors, rule and warpers act in the order of `order`, as they do where the method is a logits processor; then one
token is chosen per row, which all branches continue with.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

from contralto.decoding.branches.base import Branch
from contralto.decoding.branches.cache import find_cache, linear_layers
from contralto.decoding.branches.context import ContextLimit, context_length
from contralto.decoding.branches.padding import check_mask
from contralto.decoding.branches.prompts import Prompts, prepare_positions, stack, takes_positions
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.static import StaticSteps
from contralto.decoding.executors.generation import CustomGenerate, Generation
from contralto.decoding.executors.prefill import fits_static, prefill_apart, prefill_groups

if TYPE_CHECKING:
    from contralto.decoding.processors import ContrastiveLogitsProcessor

__all__ = ["ContrastiveLoop"]

NOT_INPUTS = {"use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", *ALL_CACHE_NAMES}


class ContrastiveLoop(CustomGenerate):
    """A contrastive method as `custom_generate`. Greedy tokens are those of the method as a logits processor.

    All processors of `generate()` and the caller's `logits_processor` list act on the main model's logits before the rule,
    the warpers (temperature, top-k, ...) after it, see `order`.

    Supports greedy search and sampling, left-padded batches, several returned sequences, stopping criteria, streaming, static
    caches (compiled where `generate()` would compile), and `return_dict_in_generate` with scores and logits.

    Args:
        method: a processor of `processors`.
        streamer: `generate()` does not hand its own to a callable, so it is given here.

    Raises:
        ValueError: when called, for beams, a cache from an earlier call, or attentions or hidden states as outputs.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContextAwareDecodingLogitsProcessor
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> full, bare = (tokenizer(t, return_tensors="pt") for t in ("Ben saw a fox. Ben went", "Ben went"))
        >>> method = ContextAwareDecodingLogitsProcessor(model, bare)
        >>> fast = model.generate(**full, custom_generate=method.loop(), max_new_tokens=5)
        >>> torch.equal(fast, model.generate(**full, logits_processor=[method], max_new_tokens=5))
        True
    """

    name = "the loop"
    alternative = "pass the method as logits_processor=[method]"
    compiles = True

    def __init__(self, method: "ContrastiveLogitsProcessor", *, streamer: Any = None) -> None:
        super().__init__(streamer=streamer)
        self._method = method

    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        method, prompts = self._method, _main_prompts(model, generation.ids, model_kwargs)
        with _prompts_known(method, prompts, generation.config):
            forward = _BranchForward(method, model, prompts, generation.config)
            generation.run(lambda: self._advance(forward, generation))
        return {}

    def _advance(self, forward: "_BranchForward", generation: Generation) -> None:
        main, joint = forward(generation)

        def contrast(scores: Tensor) -> Tensor:
            return self._method.contrast_where_needed(
                generation.ids,
                scores,
                lambda: forward.run_branches(generation, joint),
                generation.generated,
                generation.unfinished,
            )

        generation.step(main, contrast)

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        super()._check(model, config, model_kwargs, processors)
        if config.cache_implementation not in (None, "static", "dynamic"):
            raise ValueError(
                "the loop supports only static and dynamic caches, not "
                f"cache_implementation={config.cache_implementation!r}"
            )
        if config.cache_implementation == "static" and model.config.is_encoder_decoder:
            raise ValueError(
                "the loop does not support a static cache for encoder-decoders: leave cache_implementation out"
            )
        if not model.config.is_encoder_decoder and model_kwargs.get("attention_mask") is not None:
            check_mask(model_kwargs["attention_mask"])
        cache = find_cache(model_kwargs)
        if cache is not None and _is_used(cache):
            raise ValueError(f"the loop cannot continue from a cache: {self.alternative}")
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("the loop needs input_ids, which all branches read, not inputs_embeds")
        if any(processor is self._method for processor in processors):
            raise ValueError(
                "the method is passed twice, as custom_generate=method.loop() and in logits_processor: remove it "
                "from logits_processor"
            )
        self._method.check_model(model)


@contextmanager
def _prompts_known(method: "ContrastiveLogitsProcessor", main: Prompts, config: Any) -> Iterator[None]:
    """Give every branch the mask of the prompts and the tokens that pad finished rows during the call."""
    name = "decoder_attention_mask" if "encoder_outputs" in main.kwargs else "attention_mask"
    mask = main.kwargs.get(name)
    mask = torch.ones_like(main.ids) if mask is None else mask
    try:
        for branch in method.branches:
            branch.begin(main.ids, mask, _fills(config))
        yield
    finally:
        for branch in method.branches:
            branch.end()


def _fills(config: Any) -> list[int]:
    """Return the token ids that `generate()` pads finished rows with."""
    pad = config._pad_token_tensor
    return [] if pad is None else pad.flatten().tolist()


class _BranchForward:
    """The forward passes of a step: one for all branches of a model, without comparing rows to the cache.

    Args:
        method: whose branches run.
        model: the model that generates.
        main: its prompts.
        config: the prepared generation configuration.
    """

    def __init__(self, method: "ContrastiveLogitsProcessor", model: Any, main: Prompts, config: Any) -> None:
        self._branches: Sequence[Branch] = method.branches
        self._model, self._config = model, config
        self._rows, self._groups = len(main.ids), [main]
        self._stacked: list[Branch] = []
        self._layered: Branch | None = None
        self._reader = CachedReader(model)
        for branch in self._branches:
            if (reader := branch.joint_reader(model)) is not None:
                self._layered, self._reader = branch, reader
                break
        else:
            self._stack()
        if (static := self._static) is not None:
            for branch in self._branches:
                if branch is not self._layered and branch not in self._stacked:
                    branch.fix_shapes(static)

    def _stack(self) -> None:
        """Stack the rows of the main model's branches below the main rows, if their inputs can be joined."""
        main = self._groups[0]
        joined = [(branch, branch.joint_prompts(self._model, main.ids)) for branch in self._branches]
        own = {branch: prompts for branch, prompts in joined if prompts is not None}
        together = stack([main, *own.values()]) if own else None
        if together is None:
            return
        self._stacked, self._groups = list(own), prefill_groups(self._model, [main, *own.values()])
        if (cache := self._cache()) is not None and not fits_static(cache):
            self._groups = [together]
        if (length := context_length(self._model)) is not None:
            ends = tuple(_fills(self._config))
            self._reader.limit = ContextLimit(type(self._model).__name__, length, exempt=self._rows, ends=ends)

    def __call__(self, generation: Generation) -> tuple[Tensor, dict[Branch, Tensor]]:
        """Return the next-token logits `(B, V)` of the main model and of the branches that share its forward pass."""
        if not generation.generated:
            logits = self._prefill()
            if self._static is not None and self._layered is None:  # hooks, which read early layers, are not compiled
                self._reader.compiled = self._static.compiled(self._reader)
        else:
            last = generation.ids[:, -1:]
            logits = self._reader.read(last.repeat(1 + len(self._stacked), 1) if self._stacked else last)
        if self._layered is not None:
            main, own = (part[:, -1] for part in self._layered.split_joint(logits))
            return main, {self._layered: own}
        main, *others = torch.split(logits[:, -1], self._rows)
        return main, dict(zip(self._stacked, others, strict=True))

    def run_branches(self, generation: Generation, joint: Mapping[Branch, Tensor]) -> list[Tensor]:
        """Return the next-token logits `(B, V)` of every branch, after a run of those that have forward passes of their own."""
        ids, begun = generation.ids, generation.generated > 0
        return [joint[b] if b in joint else b.catch_up(ids) if begun else b(ids) for b in self._branches]

    def _prefill(self) -> Tensor:
        """Read the prompts of all rows, and return their logits `(R, 1, V)`."""
        if len(self._groups) > 1:
            readers = [self._reader, *(CachedReader(self._model) for _ in self._groups[1:])]
            logits = prefill_apart(readers, self._groups, self._reader.limit, static=self._cache())
            if logits is not None:
                return logits
        together = stack(self._groups) if len(self._groups) > 1 else self._groups[0]
        assert together is not None, "groups of prompts that were joined can be joined"
        return self._reader.prefill(together, cache=self._cache())

    def _cache(self) -> Any:
        """Return a static cache for all rows, if one was requested."""
        return None if self._static is None else self._static.cache(self._model)

    @property
    def _static(self) -> StaticSteps | None:
        """Return the steps of one shape, if they were requested."""
        if self._config.cache_implementation != "static":
            return None
        return StaticSteps(max(group.ids.shape[1] for group in self._groups) + self._config.max_length, self._config)


def _is_used(cache: Any) -> bool:
    """Return whether a cache holds tokens; recurrent layers have no length."""
    linear = linear_layers(cache)
    return bool(cache.has_previous_state() if linear and all(linear) else cache.get_seq_length() > 0)


def _main_prompts(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompts:
    """Return the main rows as `generate()` prepared them, with the mask that it drops without padding."""
    kwargs = {name: value for name, value in model_kwargs.items() if name not in NOT_INPUTS and value is not None}
    if model.config.is_encoder_decoder:
        kwargs.setdefault(
            "attention_mask", torch.ones(kwargs["encoder_outputs"].last_hidden_state.shape[:2]).to(input_ids)
        )
    else:
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        if "position_ids" not in kwargs and takes_positions(model):
            kwargs["position_ids"] = prepare_positions(model, input_ids, kwargs)
    return Prompts(input_ids, kwargs)
