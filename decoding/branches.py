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
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

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
        >>> prompt = testbed.tokenizer()("Ben went to the", return_tensors="pt")
        >>> text = tuned.generate(**prompt, logits_processor=[processor], max_new_tokens=4)
    """

    def __init__(self, peft_model: Any) -> None:
        if not (hasattr(peft_model, "disable_adapter") and hasattr(peft_model, "get_base_model")):
            raise TypeError(
                f"AdaptersOff needs a peft.PeftModel, whose adapters it can turn off, not {type(peft_model).__name__}"
            )
        self.peft_model = peft_model


class _Resume(NamedTuple):
    """How the rows of a call go on from those of the last call."""

    rows: Tensor | None
    """Which cached row each row goes on from; None if the rows are in order."""
    length: int
    """How many of the cached tokens still hold."""


class ModelBranch:
    """The next-token logits of a model for rows of tokens that another model is writing.

    The rows may come from greedy search, sampling or beam search, from several calls in turn, and from texts that extend
    or share a beginning with the last one. Whatever comes, the logits are those of the model on the whole row.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        attention_mask: `(prompts, T)`, 1 for tokens and 0 for padding, of the prompts before they are expanded to beams
            or several sequences each. Without it the padding is found in the prompts: leading pad tokens (leading end
            tokens for a model without a pad token).
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
        self._model, self._adapters = _unwrap(model)
        self._config = self._model.config.get_text_config(decoder=True)
        self._is_encoder_decoder = bool(self._model.config.is_encoder_decoder)
        self._parameters = inspect.signature(self._model.forward).parameters
        _check_arguments(type(self._model).__name__, self._is_encoder_decoder, attention_mask, window, encoder_inputs)
        self._window = window
        self._given_mask = attention_mask
        self._given_prompt: Tensor | None = None
        self._encoder_inputs = encoder_inputs
        self._encoder_outputs: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget the last call: the next one is a new prompt."""
        self._seen: Tensor | None = None
        self._prompt_length = self._offset = 0
        self._kwargs: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """The model's logits for the token after each row.

        Args:
            input_ids: `(B, T)` int64, on any device.

        Returns:
            `(B, V)` logits in the model's dtype, on the model's device. They may be views; do not change them in place.
        """
        ids = input_ids.to(self._model.device, copy=True)
        resume = self._find(ids)
        if resume is None or not self._rewind(ids, resume):
            return self._start(ids)
        return self._forward(ids, new=ids.shape[1] - resume.length)

    def _find(self, ids: Tensor) -> _Resume | None:
        """Compare with the last call. At least the last token of `ids` is always fed again, for its logits."""
        seen = self._seen
        if seen is None or self._cache is None or len(seen) != len(ids):
            return None
        length = min(seen.shape[1], ids.shape[1] - 1)
        if torch.equal(seen[:, :length], ids[:, :length]):
            return _Resume(None, length)
        if seen.shape[1] < ids.shape[1] and (rows := self._match_rows(seen, ids)) is not None:
            return _Resume(rows, seen.shape[1])
        shared = (seen[:, :length] == ids[:, :length]).all(0).cumprod(0).sum().item()
        return _Resume(None, int(shared)) if shared else None

    def _match_rows(self, seen: Tensor, ids: Tensor) -> Tensor | None:
        """For each row the cached row it goes on from, among those of the same prompt, if every row has one."""
        per_prompt = len(ids) // self._prompts
        place = {(i // per_prompt, row.tobytes()): i for i, row in enumerate(seen.cpu().numpy())}
        starts = ids[:, : seen.shape[1]].cpu().numpy()
        rows = [place.get((i // per_prompt, row.tobytes()), -1) for i, row in enumerate(starts)]
        return None if -1 in rows else torch.tensor(rows, device=ids.device)

    @property
    def _prompts(self) -> int:
        """How many prompts the rows are known to belong to: 1 where rows of equal tokens are interchangeable."""
        if self._encoder_inputs is not None:
            return len(next(iter(self._encoder_inputs.values())))
        return 1 if self._given_mask is None else len(self._given_mask)

    @property
    def _cache(self) -> Any:
        return next((self._kwargs[name] for name in ALL_CACHE_NAMES if self._kwargs.get(name) is not None), None)

    def _rewind(self, ids: Tensor, resume: _Resume) -> bool:
        """Bring the cache to the state after `resume.length` tokens of `ids`; False if it cannot be brought there."""
        assert self._seen is not None
        drop, new = self._seen.shape[1] - resume.length, ids.shape[1] - resume.length
        if resume.rows is not None:
            self._cache.reorder_cache(resume.rows)
        if drop == 0 and new == 1:
            return True
        if self._window is not None:
            if self._prompt_length <= resume.length and drop:
                raise ValueError(
                    "with a window, a branch cannot follow a text whose end was taken back, as assisted decoding does, "
                    "or tell it from a new prompt: decode without the window or without an assistant, or call reset()"
                )
            return False
        mask = self._padding_mask(ids)
        if not torch.equal(mask[:, : resume.length], self._mask[:, : resume.length]):
            return False
        if not _crop(self._cache, drop, new):
            return False
        self._set_positions(ids, mask)
        return True

    def _start(self, ids: Tensor) -> Tensor:
        """Read whole prompts."""
        self.reset()
        if (largest := int(ids.max())) >= self._config.vocab_size:
            raise ValueError(
                f"the prompt holds token {largest}, but {type(self._model).__name__} knows only "
                f"{self._config.vocab_size} tokens: all branches must share one tokenizer"
            )
        mask = self._padding_mask(ids)
        self._prompt_length = ids.shape[1]
        self._offset = 0 if self._window is None else max(0, ids.shape[1] - self._window)
        self._kwargs = {"use_cache": True}
        if self._model._supports_logits_to_keep():
            self._kwargs["logits_to_keep"] = 1
        if self._encoder_inputs is not None:
            self._kwargs |= self._encode(self._encoder_inputs, rows=len(ids))
        self._set_positions(ids, mask)
        return self._forward(ids, new=None)

    def _set_positions(self, ids: Tensor, mask: Tensor) -> None:
        """Attention mask and position ids for all of `ids`, made as `generate()` makes them."""
        self._mask = mask
        if self._is_encoder_decoder:
            if self._given_mask is not None:
                self._kwargs["decoder_attention_mask"] = mask
            return
        visible = mask[:, self._offset :]
        if "position_ids" in self._parameters:
            self._kwargs["position_ids"] = self._model._prepare_position_ids_for_generation(
                ids[:, self._offset :], {**self._kwargs, "attention_mask": visible}
            )
        self._kwargs["attention_mask"] = None if visible.all() else visible

    def _forward(self, ids: Tensor, *, new: int | None) -> Tensor:
        """Feed the last `new` tokens (None: all of them, for the first time) and keep the cache."""
        inputs = self._model.prepare_inputs_for_generation(
            ids[:, self._offset :], next_sequence_length=new, is_first_iteration=new is None, **self._kwargs
        )
        try:
            with self._adapters():
                outputs = self._model(**inputs, return_dict=True)
        except torch.OutOfMemoryError as error:
            self.reset()
            raise torch.OutOfMemoryError(
                f"no memory is left for {type(self._model).__name__} ({self._model.num_parameters():,} parameters) beside "
                "the main model: load it quantized or on another device, use AdaptersOff, or lower the batch size"
            ) from error
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=self._is_encoder_decoder
        )
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), ids.shape[1] - self._mask.shape[1])], dim=1)
        self._seen = ids
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _encode(self, inputs: Mapping[str, Tensor], *, rows: int) -> dict[str, Any]:
        """The encoder's output, computed once, and its mask, both repeated for every row of each prompt."""
        repeats, rest = divmod(rows, self._prompts)
        if rest:
            raise ValueError(f"the encoder inputs hold {self._prompts} prompts, which cannot make {rows} rows")
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        if self._encoder_outputs is None:
            with self._adapters():
                self._encoder_outputs = self._model.get_encoder()(**inputs, return_dict=True)
        hidden = self._encoder_outputs.last_hidden_state.repeat_interleave(repeats, dim=0)
        mask = inputs.get("attention_mask")
        return {
            "encoder_outputs": type(self._encoder_outputs)(last_hidden_state=hidden),
            "attention_mask": None if mask is None else mask.repeat_interleave(repeats, dim=0),
        }

    def _padding_mask(self, ids: Tensor) -> Tensor:
        """`(B, T)`, 1 for tokens and 0 for the padding before the prompt."""
        if self._given_mask is not None:
            return self._extend_given_mask(ids, self._given_mask.to(ids.device))
        pad_ids = None if self._is_encoder_decoder else _pad_ids(self._model, self._config)
        if pad_ids is None:
            return torch.ones_like(ids)
        is_pad = torch.isin(ids, torch.tensor(pad_ids, device=ids.device))
        is_pad[:, -1] &= ~is_pad[:, -1].all()  # every prompt ends in a pad token: then it is meant
        if is_pad[:, -1].any():
            raise ValueError(
                "some prompts end in pad tokens, so they are padded on the right: set tokenizer.padding_side = 'left', "
                "or pass attention_mask= if these tokens are meant"
            )
        padding = is_pad.cumprod(-1)
        if set(pad_ids) & set(_as_list(self._config.bos_token_id)) and padding[:, 0].all():
            raise ValueError(
                f"every prompt begins with token {int(ids[0, 0])}, which is both the pad token and the beginning-of-text "
                "token, so the padding cannot be told from the text: pass attention_mask="
            )
        if ids.shape[1] > 1 and (repeated := (ids[:, 0] == ids[:, 1]) & ~is_pad[:, 0]).any() and not repeated.all():
            warnings.warn(
                f"some prompts begin with token {int(ids[repeated][0, 0])} twice, which is not the pad token "
                f"({_list_of(pad_ids)}) of {type(self._model).__name__}: if it is padding, pass attention_mask=",
                stacklevel=2,
            )
        return 1 - padding

    def _extend_given_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mask that was given for the prompts, for every row, with ones for what comes after the prompts."""
        prompts, length = mask.shape
        repeats, rest = divmod(len(ids), prompts)
        prompt = ids[::repeats, :length] if repeats else ids
        if self._given_prompt is None:
            self._given_prompt = prompt if ids.shape[1] == length else None
        if rest or self._given_prompt is None or not torch.equal(prompt, self._given_prompt):
            raise ValueError(
                f"attention_mask is of shape {tuple(mask.shape)} and was given for other prompts than these, of shape "
                f"{tuple(ids.shape)}: a mask belongs to one batch of prompts, so make a new processor for each"
            )
        mask = mask.repeat_interleave(repeats, dim=0).to(ids.dtype)
        return torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - length)], dim=1)


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


def _unwrap(model: Any) -> tuple[Any, Any]:
    """The transformers model inside, and the context to run it in."""
    context: Any = nullcontext
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


def _check_arguments(
    name: str,
    is_encoder_decoder: bool,
    attention_mask: Tensor | None,
    window: int | None,
    encoder_inputs: Mapping[str, Tensor] | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 (the prompt's last token), or None for the whole prompt, not {window}"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be of shape (prompts, length), not {tuple(attention_mask.shape)}")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("attention_mask ends in 0, so the prompts are padded on the right: set padding_side = 'left'")
    if is_encoder_decoder and not encoder_inputs:
        raise ValueError(f"{name} is an encoder-decoder: pass encoder_inputs=, what its encoder is to read")
    if encoder_inputs and not is_encoder_decoder:
        raise ValueError(f"{name} has no encoder, so it cannot use encoder_inputs")


def _crop(cache: Any, drop: int, new: int) -> bool:
    """Take the last `drop` tokens off a cache that is to be fed `new` tokens; False if the cache cannot do that."""
    if any(cache.is_linear):
        return not drop and new == 1  # recurrent states cannot go back, and some models restart them for several tokens
    try:
        if drop:
            cache.crop(-drop)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return True


def _pad_ids(model: Any, config: Any) -> list[int] | None:
    """What the prompts of a model are padded with: its pad token, else its end-of-text tokens, as in `generate()`."""
    generation = model.generation_config
    for ids in (generation.pad_token_id, config.pad_token_id, generation.eos_token_id, config.eos_token_id):
        if _as_list(ids):
            return _as_list(ids)
    return None


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _list_of(ids: list[int]) -> str:
    return ", ".join(map(str, ids))
