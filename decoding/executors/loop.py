"""The fast path: a method as a `custom_generate` callable, with all branches of one model in one forward per token.

    model.generate(**inputs, custom_generate=method.loop())

A logits processor cannot see the forward that `generate()` made, so its branches cost forwards of their own. Here the
branches that are other inputs of the same model (another prompt, another image) become rows of one batch: one forward
per token, whose cost is that of a batch of two. Branches that are other models run after it, in turn.

Processors, rule and warpers act in the order of `order`, as they do where the method is a logits processor; then one
token is drawn per row, and all branches read it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation.utils import ALL_CACHE_NAMES, GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from contralto.decoding.branches import InputBranch, LayerBranch, ModelBranch, Reader
from contralto.decoding.branches.context import context_length
from contralto.decoding.branches.padding import check_mask
from contralto.decoding.branches.prompts import Prompts, linear_layers, prepare_positions, stack, takes_positions
from contralto.decoding.executors.order import check_mode, split_processors

if TYPE_CHECKING:
    from contralto.decoding.processors import ContrastiveLogitsProcessor

__all__ = ["ContrastiveLoop"]

NOT_INPUTS = {"use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", *ALL_CACHE_NAMES}


class ContrastiveLoop:
    """A contrastive method as `custom_generate`. Greedy tokens are those of the method as a logits processor.

    All processors of `generate()` and the caller's `logits_processor` list act on the main model's logits before the rule,
    the warpers (temperature, top-k, ...) after it, see `order`.

    Greedy search and sampling, left-padded batches, several returned sequences, stopping criteria, streaming, static
    caches (compiled where `generate()` would compile), `return_dict_in_generate` with scores and logits.

    Args:
        method: any of `processors`.
        streamer: `generate()` does not hand its own on to a callable, so it is given here.

    Raises:
        ValueError: at the call: beams, a cache from an earlier call, attentions or hidden states asked for.

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

    def __init__(self, method: "ContrastiveLogitsProcessor", *, streamer: Any = None) -> None:
        self._method = method
        self._streamer = streamer

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate()` calls; returns what `generate()` returns."""
        _check(model, input_ids, generation_config, model_kwargs)
        _check_once(self._method, logits_processor)
        self._method.check_model(model)
        main = _main_prompts(model, input_ids, model_kwargs)
        with _told(self._method, main, generation_config):
            return self._run(model, main, logits_processor, stopping_criteria, generation_config)

    def _run(
        self, model: Any, prompts: Prompts, processors: Any, stopping_criteria: Any, generation_config: Any
    ) -> Any:
        """Write one token after another."""
        input_ids = prompts.ids
        before, after = split_processors(model, processors, generation_config, input_ids)
        forward = _Forward(self._method, model, prompts, generation_config)
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())
        pad_id = generation_config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        running = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        tokens = None
        while running.any():
            main, contrasts = forward(input_ids, tokens)
            raw = main.to(device=input_ids.device, dtype=torch.float32, copy=True)
            kept["logits"] += [raw.clone()] if generation_config.output_logits else []
            scores = self._method.combine(before(input_ids, raw), contrasts, forward.generated)
            scores = after(input_ids, scores)
            kept["scores"] += [scores] if generation_config.output_scores else []
            tokens = _choose(scores, sample=generation_config.do_sample)
            if ends:
                tokens = tokens * running + pad_id.to(tokens.device) * (1 - running)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            if self._streamer is not None:
                self._streamer.put(tokens.cpu())
            running = running & ~stopping_criteria(input_ids, tuple(kept["scores"]) or None)
        if self._streamer is not None:
            self._streamer.end()
        return _output(model, input_ids, generation_config, kept)


@contextmanager
def _told(method: "ContrastiveLogitsProcessor", main: Prompts, config: Any) -> Iterator[None]:
    """Let every branch that can take it know the mask of the prompts, and what ended rows are padded with."""
    name = "decoder_attention_mask" if "encoder_outputs" in main.kwargs else "attention_mask"
    mask = main.kwargs.get(name)
    mask = torch.ones_like(main.ids) if mask is None else mask
    branches: list[Any] = [branch for branch in method.branches if hasattr(branch, "begin")]
    try:
        for branch in branches:
            branch.begin(main.ids, mask, _fills(config))
        yield
    finally:
        for branch in branches:
            branch.end()


def _fills(config: Any) -> list[int]:
    """The tokens that `generate()` pads ended rows with."""
    pad = config._pad_token_tensor
    return [] if pad is None else pad.flatten().tolist()


class _Forward:
    """The logits of the main branch and of all others for the next token: few forwards, no comparisons of rows."""

    def __init__(self, method: "ContrastiveLogitsProcessor", model: Any, main: Prompts, generation_config: Any) -> None:
        self._branches = method.branches
        self._model, self._config = model, generation_config
        self._rows = len(main.ids)
        self.generated = 0
        self._layered = next((b for b in self._branches if isinstance(b, LayerBranch) and b.model is model), None)
        own = (b for b in self._branches if isinstance(b, InputBranch | ModelBranch) and b is not self._layered)
        inside = [branch for branch in own if branch.model is model and branch.is_adapted]
        parts = [main, *(branch.prompts(main.ids) for branch in inside)]
        together = stack(parts) if inside and self._layered is None else None
        self._stacked = inside if together is not None else []
        self._prompts = main if together is None else together
        self._reader = self._layered or Reader(model)
        if self._stacked:
            self._reader.context, self._reader.unlimited = context_length(model), self._rows
            self._reader._fills = tuple(_fills(generation_config))

    def __call__(self, input_ids: Tensor, tokens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Main logits `(B, V)` and those of every branch, after `tokens` (None: after the prompts)."""
        if tokens is None:
            logits = self._reader.start(self._prompts, cache=self._cache())
            self._reader.compiled = self._compiled()
        else:
            self.generated += 1
            logits = self._reader.extend(tokens.repeat(1 + len(self._stacked)))
        if self._layered is not None:
            assert self._layered.final is not None
            main, read = self._layered.final[:, -1], {id(self._layered): logits}
        else:
            main, *others = torch.split(logits, self._rows)
            read = {id(branch): other for branch, other in zip(self._stacked, others, strict=True)}
        return main, [read[id(b)] if id(b) in read else b(input_ids) for b in self._branches]

    def _cache(self) -> Any:
        """A static cache for all rows, if one was asked for."""
        if self._config.cache_implementation is None:
            return None
        length = self._prompts.ids.shape[1] + self._config.max_length
        return StaticCache(config=self._model.config.get_text_config(decoder=True), max_cache_len=length)

    def _compiled(self) -> Callable[..., Any] | None:
        """The compiled forward, where `generate()` would compile. Hooks, which read early layers, are not compiled."""
        if self._layered is not None or not self._model._valid_auto_compile_criteria(self._reader.kwargs, self._config):
            return None
        compiled: Callable[..., Any] = self._model.get_compiled_call(self._config.compile_config)
        return compiled


def _check(model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams > 1:
        raise ValueError("the loop knows no beam search: pass the method as logits_processor=[method] for beams")
    check_mode(config)
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("the loop returns scores and logits, not attentions or hidden states")
    if config.cache_implementation not in (None, "static", "dynamic"):
        raise ValueError(f"the loop knows static and dynamic caches, not {config.cache_implementation!r}")
    if config.cache_implementation == "static" and model.config.is_encoder_decoder:
        raise ValueError("the loop has no static cache for encoder-decoders: leave cache_implementation out")
    if not model.config.is_encoder_decoder and model_kwargs.get("attention_mask") is not None:
        check_mask(model_kwargs["attention_mask"])
    cache = next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)
    if cache is not None and _is_used(cache):
        raise ValueError("the loop cannot go on from a cache: pass the method as logits_processor=[method]")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("the loop needs input_ids, which the branches share, not inputs_embeds")


def _check_once(method: Any, processors: Any) -> None:
    """Raise ValueError if the method would act twice."""
    if any(processor is method for processor in processors):
        raise ValueError(
            "the method is given twice, as custom_generate=method.loop() and in logits_processor: leave it out of the list"
        )


def _is_used(cache: Any) -> bool:
    """Whether a cache holds anything; recurrent layers know no length."""
    linear = linear_layers(cache)
    return bool(cache.has_previous_state() if linear and all(linear) else cache.get_seq_length() > 0)


def _main_prompts(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompts:
    """The main rows as `generate()` prepared them, with the mask that it drops where there is no padding."""
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


def _choose(scores: Tensor, *, sample: bool) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)


def _output(model: Any, sequences: Tensor, config: Any, kept: dict[str, list[Tensor]]) -> Any:
    if not config.return_dict_in_generate:
        return sequences
    form: Any = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
    return form(sequences=sequences, **{name: tuple(steps) or None for name, steps in kept.items()})
