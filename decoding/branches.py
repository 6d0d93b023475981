"""Where a contrast distribution comes from: a model that follows the same rows of tokens, with a cache of its own.

A logits processor is given nothing but `input_ids` at every step. So a branch finds out by itself what they mean: rows
that go on from the last call (feed the new tokens), rows that a beam search reordered (gather the cache first), rows that
share a beginning with the last call (crop the cache), or another text (start afresh). Every decision compares the tokens
themselves, so a cache is never silently stale.

This is the one module of the decoding part that leans on private methods of transformers. Read from 5.23.0:
`_prepare_position_ids_for_generation`, `_update_model_kwargs_for_generation`, `_supports_logits_to_keep`. With them a
branch prepares a forward just as `generate()` would, so every model that generates can be a branch.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

from contralto.decoding.padding import find_padding, pad_tokens

__all__ = ["AdaptersOff", "ModelBranch", "fit_vocabulary"]

MAX_PADDING_ROWS = 1024
"""Vocabularies of one tokenizer differ in size by the padding of the embedding matrix (Qwen2.5: 128, Pythia: 384)."""


class AdaptersOff:
    """A PEFT model seen without its adapters: its base model as a branch, with no second model in memory.

    Args:
        peft_model: a `peft.PeftModel`. While the branch runs, its adapters are disabled; then they are enabled again.

    Raises:
        TypeError: the model has no adapters to turn off.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> tuned = get_peft_model(testbed.load("expert"), LoraConfig(task_type="CAUSAL_LM"))
        >>> processor = ContrastiveDecodingLogitsProcessor(AdaptersOff(tuned))
        >>> prompt = testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> text = tuned.generate(**prompt, logits_processor=[processor], max_new_tokens=4)
    """

    def __init__(self, peft_model: Any) -> None:
        if not (hasattr(peft_model, "disable_adapter") and hasattr(peft_model, "get_base_model")):
            raise TypeError(
                f"AdaptersOff needs a peft.PeftModel, whose adapters it can turn off, not {type(peft_model).__name__}"
            )
        self.peft_model = peft_model


class _Continuation(NamedTuple):
    """How the rows of a call go on from those of the last call."""

    kept: int
    """How many of the cached tokens still hold."""
    rows: Tensor | None = None
    """Which cached row each row goes on from; None if the rows are in order."""


class ModelBranch:
    """The next-token logits of a model for rows of tokens that another model is writing.

    The rows may come from greedy search, sampling or beam search, from several calls in turn, and from texts that extend
    or share a beginning with the last one. Whatever comes, the logits are those of the model on the whole row.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        attention_mask: `(prompts, T)`, 1 for tokens and 0 for padding, of the prompts before they are expanded to beams
            or several sequences each. Without it the padding is found in the prompts, see `padding.find_padding`.
        window: how many of a prompt's last tokens the model sees; None for all. Generated tokens are always seen. What
            goes on from the last call by one token counts as generated, anything else as a new prompt.
        encoder_inputs: for an encoder-decoder model, what its encoder reads: `input_ids`, `attention_mask`, ...

    Raises:
        TypeError: `model` cannot generate.
        ValueError: `window` below 1, right padding, encoder inputs missing or not wanted.
    """

    def __init__(
        self,
        model: Any,
        *,
        attention_mask: Tensor | None = None,
        window: int | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._context = _unwrap(model)
        self._name = type(self._model).__name__
        self._is_encoder_decoder = bool(self._model.config.is_encoder_decoder)
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        if window is not None and window < 1:
            raise ValueError(
                f"window must be at least 1 (the prompt's last token), or None for all of it, not {window}"
            )
        if attention_mask is not None:
            _check_mask(attention_mask)
        if self._is_encoder_decoder and not encoder_inputs:
            raise ValueError(f"{self._name} is an encoder-decoder: pass encoder_inputs=, what its encoder is to read")
        if encoder_inputs and not self._is_encoder_decoder:
            raise ValueError(f"{self._name} has no encoder, so it cannot use encoder_inputs")
        self._window = window
        self._prompt_mask = attention_mask
        self._prompt_ids: Tensor | None = None
        self._encoder_inputs = encoder_inputs
        self._encoder_outputs: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget the last call and its cache: the next one is a new prompt."""
        self._seen: Tensor | None = None  # the rows of the last call
        self._mask: Tensor | None = None  # of their first columns; what came later is all text
        self._prompt_length = self._hidden = 0  # how long the prompts were, and how much of them the window hides
        self._kwargs: dict[str, Any] = {}  # what generate() calls model_kwargs, the cache among them

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """The model's logits for the token after each row.

        Args:
            input_ids: `(B, T)` int64, on any device.

        Returns:
            `(B, V)` in the model's dtype, on the model's device. They may be a view; do not change them in place.
        """
        ids = input_ids.to(self._model.device if self._seen is None else self._seen.device, copy=True)
        found = self._find(ids)
        if found is None or not self._rewind(ids, found):
            return self._start(ids)
        return self._forward(ids, new=ids.shape[1] - found.kept)

    def _find(self, ids: Tensor) -> _Continuation | None:
        """Compare with the last call. A row's last token is always fed again, for its logits."""
        seen = self._seen
        if seen is None or self._cache is None or len(seen) != len(ids):
            return None
        length = min(seen.shape[1], ids.shape[1] - 1)
        if torch.equal(seen[:, :length], ids[:, :length]):
            return _Continuation(length)
        if length == seen.shape[1] and (rows := self._match_rows(seen, ids)) is not None:
            return _Continuation(length, rows)
        shared = (seen[:, :length] == ids[:, :length]).all(0).cumprod(0).sum()
        return _Continuation(int(shared)) if shared else None

    def _match_rows(self, seen: Tensor, ids: Tensor) -> Tensor | None:
        """For each row the cached row of the same prompt that it goes on from, if every row has one."""
        per_prompt = len(ids) // self._prompts
        cached = {(i // per_prompt, row.tobytes()): i for i, row in enumerate(seen.cpu().numpy())}
        starts = ids[:, : seen.shape[1]].cpu().numpy()
        rows = [cached.get((i // per_prompt, row.tobytes()), -1) for i, row in enumerate(starts)]
        return None if -1 in rows else torch.tensor(rows, device=ids.device)

    @property
    def _prompts(self) -> int:
        """How many prompts the rows are known to belong to; 1 where rows of equal tokens are interchangeable."""
        if self._encoder_inputs is not None:
            return len(next(iter(self._encoder_inputs.values())))
        return 1 if self._prompt_mask is None else len(self._prompt_mask)

    @property
    def _cache(self) -> Any:
        return next((self._kwargs[name] for name in ALL_CACHE_NAMES if self._kwargs.get(name) is not None), None)

    def _rewind(self, ids: Tensor, found: _Continuation) -> bool:
        """Bring the cache to the state after the kept tokens of `ids`; False if it cannot be brought there."""
        assert self._seen is not None
        assert self._mask is not None
        dropped, new = self._seen.shape[1] - found.kept, ids.shape[1] - found.kept
        if not dropped and new == 1 and found.rows is None:
            return True
        if self._window is not None and (dropped or new > 1):
            if found.kept >= self._prompt_length and dropped:
                raise ValueError(
                    "with a window, a branch cannot follow a text whose end was taken back, as assisted decoding does, "
                    "or tell it from a new prompt: decode without the window or without an assistant, or call reset()"
                )
            return False
        mask = _fit_mask(self._mask, found.kept)
        if found.rows is not None:
            mask = mask[found.rows]
        if dropped or new > 1:
            same_padding = torch.equal(self._find_mask(ids)[:, : found.kept], mask)
            if not (same_padding and _crop(self._cache, dropped, new)):
                return False
        if found.rows is not None:
            self._cache.reorder_cache(found.rows)
        self._set_mask(ids, _fit_mask(mask, ids.shape[1]))
        return True

    def _start(self, ids: Tensor) -> Tensor:
        """Read whole prompts."""
        self.reset()
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        if (largest := int(ids.max())) >= vocabulary:
            raise ValueError(
                f"the prompt holds token {largest}, but {self._name} knows only {vocabulary} tokens: "
                "all branches must share one tokenizer"
            )
        self._prompt_length = ids.shape[1]
        self._hidden = 0 if self._window is None else max(0, ids.shape[1] - self._window)
        self._kwargs = {"use_cache": True}
        if self._model._supports_logits_to_keep():
            self._kwargs["logits_to_keep"] = 1
        if self._encoder_inputs is not None:
            self._kwargs |= self._encode(self._encoder_inputs, rows=len(ids))
        self._set_mask(ids, self._find_mask(ids))
        return self._forward(ids, new=None)

    def _forward(self, ids: Tensor, *, new: int | None) -> Tensor:
        """Feed the last `new` tokens (None: all of them, for the first time) and keep the cache."""
        inputs = self._model.prepare_inputs_for_generation(
            ids[:, self._hidden :], next_sequence_length=new, is_first_iteration=new is None, **self._kwargs
        )
        try:
            with self._context():
                outputs = self._model(**inputs, return_dict=True)
        except torch.OutOfMemoryError as error:
            self.reset()
            raise torch.OutOfMemoryError(
                f"no memory is left for {self._name} ({self._model.num_parameters():,} parameters) beside the main model: "
                "load it quantized or on another device, use AdaptersOff, or lower the batch size"
            ) from error
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=self._is_encoder_decoder
        )
        self._seen = ids
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _set_mask(self, ids: Tensor, mask: Tensor) -> None:
        """Attention mask and position ids for all of `ids`, made as `generate()` makes them."""
        self._mask = mask
        visible = mask[:, self._hidden :]
        if self._is_encoder_decoder:
            self._kwargs["decoder_attention_mask"] = visible if self._prompt_mask is not None else None
            return
        if self._takes_positions:
            self._kwargs["position_ids"] = self._model._prepare_position_ids_for_generation(
                ids[:, self._hidden :], {**self._kwargs, "attention_mask": visible}
            )
        self._kwargs["attention_mask"] = None if visible.all() else visible

    def _find_mask(self, ids: Tensor) -> Tensor:
        """`(B, T)`, 0 for the padding before the prompts."""
        if self._prompt_mask is not None:
            return self._extend(self._prompt_mask, ids)
        if self._is_encoder_decoder:  # its rows begin with a start token, which may well be the pad token
            return torch.ones_like(ids)
        bos_id = self._model.config.get_text_config(decoder=True).bos_token_id
        return find_padding(ids, pad_tokens(self._model), bos_id)

    def _extend(self, prompt_mask: Tensor, ids: Tensor) -> Tensor:
        """The given mask for every row of its prompts, with ones for what comes after the prompts."""
        prompts, length = prompt_mask.shape
        repeats, rest = divmod(len(ids), prompts)
        prompt_ids = ids[:: repeats or 1, :length]
        if self._prompt_ids is None and ids.shape[1] == length:
            self._prompt_ids = prompt_ids
        if rest or self._prompt_ids is None or not torch.equal(prompt_ids, self._prompt_ids):
            raise ValueError(
                f"attention_mask is of shape {tuple(prompt_mask.shape)} and was given for other prompts than these, of "
                f"shape {tuple(ids.shape)}: a mask belongs to one batch of prompts, so make a new processor for each"
            )
        return _fit_mask(prompt_mask.to(ids).repeat_interleave(repeats, dim=0), ids.shape[1])

    def _encode(self, inputs: Mapping[str, Tensor], *, rows: int) -> dict[str, Any]:
        """The encoder's output, computed once, and its mask, both repeated for every row of each prompt."""
        repeats, rest = divmod(rows, self._prompts)
        if rest:
            raise ValueError(f"the encoder inputs hold {self._prompts} prompts, which cannot make {rows} rows")
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        if self._encoder_outputs is None:
            with self._context():
                self._encoder_outputs = self._model.get_encoder()(**inputs, return_dict=True)
        hidden = self._encoder_outputs.last_hidden_state.repeat_interleave(repeats, dim=0)
        mask = inputs.get("attention_mask")
        return {
            "encoder_outputs": type(self._encoder_outputs)(last_hidden_state=hidden),
            "attention_mask": None if mask is None else mask.repeat_interleave(repeats, dim=0),
        }


def fit_vocabulary(logits: Tensor, size: int) -> Tensor:
    """Logits for the first `size` tokens; `-inf` for those that the model's embedding has no row for.

    Models of one tokenizer may pad their embeddings to different sizes. The rows in question belong to no token.

    Raises:
        ValueError: the sizes differ by more than padding explains.

    Example:
        >>> fit_vocabulary(torch.zeros(1, 3), 4)
        tensor([[0., 0., 0., -inf]])
    """
    extra = size - logits.shape[-1]
    if abs(extra) > MAX_PADDING_ROWS:
        raise ValueError(
            f"the branches' vocabularies have {size} and {logits.shape[-1]} tokens, more apart than padding explains: "
            "all branches must share one tokenizer"
        )
    if extra <= 0:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, extra), value=-torch.inf)


def _unwrap(model: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The transformers model inside, and the context to run it in."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if isinstance(model, AdaptersOff):
        model, context = model.peft_model.get_base_model(), model.peft_model.disable_adapter
    elif hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise TypeError(
                "a PEFT model with learned prompts cannot be a branch: its prompts are not in its base model"
            )
        model = model.get_base_model()
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(f"a branch needs a transformers model that can generate, not {type(model).__name__}")
    return model, context


def _check_mask(attention_mask: Tensor) -> None:
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be of shape (prompts, length), not {tuple(attention_mask.shape)}")
    if not attention_mask[:, -1].all():
        raise ValueError("attention_mask ends in 0, so the prompts are padded on the right: set padding_side = 'left'")


def _fit_mask(mask: Tensor, length: int) -> Tensor:
    """The mask of so many tokens: cut, or with ones for those that came after."""
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


def _crop(cache: Any, dropped: int, new: int) -> bool:
    """Take the last tokens off a cache that is to be fed `new` ones; False if the cache cannot do that."""
    if any(cache.is_linear):
        return not dropped and new == 1  # a recurrent state cannot go back, and Mamba drops it when fed several tokens
    try:
        if dropped:
            cache.crop(-dropped)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return True
