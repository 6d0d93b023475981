"""Find the padding of a batch from its tokens, and replace tokens outside a model's vocabulary."""

import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KnownTokens",
    "PromptMask",
    "check_mask",
    "check_unpadded",
    "find_padding",
    "fit_mask",
    "padding_of",
    "refuse_unknown_padding",
    "source_padding",
    "warn_of_start",
]


def _configured(model: Any, name: str) -> list[int]:
    """Return the ids of a special token, from the generation configuration or else from the model's; [] without any."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True))
    special: Any = next((ids for config in configs if (ids := getattr(config, name, None)) is not None), [])
    return [special] if isinstance(special, int) else list(special)


def padding_of(model: Any, ids: Tensor) -> Tensor:
    """Find the padding of left-padded prompts from the special tokens of a model's configuration.

    Prompts are padded with the model's pad token, or with its end-of-text token, as `generate()` does for models without a pad
    token. Such a model's tokenizer may pad with any other token as well.

    Args:
        model: a transformers model.
        ids: `(B, T)`.

    Returns:
        `(B, T)` in the dtype of `ids`, 0 for padding and 1 for text.

    Raises:
        ValueError: see `find_padding`; several prompts for a model without a pad token, none of which begins with its end
            token.
    """
    own, bos = _configured(model, "pad_token_id"), _configured(model, "bos_token_id")
    pads, bos_id = own or _configured(model, "eos_token_id"), bos[0] if bos else None
    if not own and not torch.isin(ids[:, 0], torch.tensor(pads, dtype=ids.dtype, device=ids.device)).any():
        refuse_unknown_padding(ids, type(model).__name__, bos_id)
        return torch.ones_like(ids)
    return find_padding(ids, pads, bos_id)


def refuse_unknown_padding(ids: Tensor, name: str, bos_id: int | None = None) -> None:
    """Raise an error for prompts that may be padded with an unknown token, which cannot be distinguished from text.

    Args:
        ids: `(B, T)`.
        name: the class of the model without a pad token, for error messages.
        bos_id: the beginning-of-text token, if there is one.

    Raises:
        ValueError: the prompts differ, or a prompt begins with one token twice, has only one token repeated before its
            beginning-of-text token, or ends with one token three times.
    """
    first, length = ids[:, :1], ids.shape[1]
    late = bool((_lead(ids, bos_id) > 0).any())
    twice = length > 1 and bool((first == ids[:, 1:2]).any())
    ends = length > 3 and bool((ids[:, -3:] == ids[:, -1:]).all(-1).any())
    several = not torch.equal(ids, ids[:1].expand_as(ids))
    if several or late or twice or ends:
        what = "several prompts" if several else "a prompt whose first or last tokens look like padding"
        raise ValueError(
            f"{name} has no pad token, so padding cannot be distinguished from text in {what}: pass "
            "attention_mask= (a loop() receives it automatically)"
        )


def _lead(ids: Tensor, bos_id: int | None) -> Tensor:
    """Return the number of equal tokens `(B,)` before the first beginning-of-text token of each row; 0 without such a token."""
    if bos_id is None:
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    same = (ids == ids[:, :1]).cumprod(-1).sum(-1)
    after = ids.gather(-1, same.clamp(max=ids.shape[1] - 1)[:, None]).squeeze(-1)
    return torch.where((after == bos_id) & (ids[:, 0] != bos_id), same, 0)


def find_padding(ids: Tensor, pad_ids: Collection[int], bos_id: int | None = None) -> Tensor:
    """Return the attention mask of left-padded prompts: leading pad tokens are padding, all other tokens are text.

    Args:
        ids: `(B, T)`.
        pad_ids: the tokens that may be padding.
        bos_id: the beginning-of-text token, if there is one.

    Returns:
        `(B, T)` in the dtype of `ids`, 0 for padding and 1 for text. A prompt's last token is always text.

    Raises:
        ValueError: some prompts, but not all, end in a pad token, or all do and one ends in several (they are padded on the
            right); the pad token is also the beginning-of-text token and every prompt begins with it, so that it may be either; or
            some prompts have another token before their beginning-of-text token, with which other prompts begin.

    Warns:
        UserWarning: some prompts, but not all, begin with another token twice, which looks like padding.

    Examples:
        >>> find_padding(torch.tensor([[0, 0, 5], [6, 0, 7]]), pad_ids=[0])
        tensor([[0, 0, 1],
                [1, 1, 1]])
    """
    is_pad = torch.isin(ids, torch.tensor(list(pad_ids), dtype=ids.dtype, device=ids.device))
    if _ends_in_padding(is_pad):
        raise ValueError(
            "some prompts end in pad tokens, so they are padded on the right: set tokenizer.padding_side = "
            "'left', or pass attention_mask= if these tokens are part of the prompt"
        )
    is_pad[:, -1] = False
    if bos_id in pad_ids and is_pad[:, 0].all():
        raise ValueError(
            f"every prompt starts with token {bos_id}, which is both the pad token and the BOS token, so padding "
            "cannot be distinguished from text: pass attention_mask="
        )
    if bos_id is not None and (late := (_lead(ids, bos_id) > 0) & ~is_pad[:, 0]).any() and (ids[:, 0] == bos_id).any():
        raise ValueError(
            f"some prompts have token {int(ids[late][0, 0])} before the BOS token {bos_id}, with which other "
            f"prompts start, and it is not a pad token of the model ({_shown(pad_ids)}): pass attention_mask="
        )
    repeated = (ids[:, 0] == ids[:, min(1, ids.shape[1] - 1)]) & ~is_pad[:, 0]
    if ids.shape[1] > 1 and repeated.any() and not repeated.all():
        warnings.warn(
            f"some prompts start with token {int(ids[repeated][0, 0])} twice, which is not the amateur's pad "
            f"token ({_shown(pad_ids)}): if it is padding, pass attention_mask=",
            stacklevel=2,
        )
    return 1 - is_pad.cumprod(-1).to(ids.dtype)


def _ends_in_padding(is_pad: Tensor) -> bool:
    """Return whether some rows, but not all, of a mask of pad tokens `(B, T)` end in one, or one row in several."""
    several = is_pad.shape[1] > 1 and bool((is_pad[:, -2:].all(-1) & ~is_pad.all(-1)).any())
    ends = is_pad[:, -1]
    return bool(ends.any()) and (several or not bool(ends.all()))


def check_unpadded(model: Any, ids: Tensor) -> None:
    """Raise ValueError if continuations without a mask may be padded on the right.

    Args:
        model: a transformers model, whose pad token, or else end-of-text token, may be padding.
        ids: `(B, S)` the continuations.

    Raises:
        ValueError: some rows, but not all, end in that token, or one in several; or, for a model without a pad token, one of
            several rows ends with any token three times.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(pad_token_id=0, get_text_config=lambda decoder: config)
        >>> check_unpadded(SimpleNamespace(config=config), torch.tensor([[5, 6, 7], [8, 9, 0]]))
        Traceback (most recent call last):
            ...
        ValueError: some continuations end in pad tokens, which would be scored: pass the tokenizer's whole output in place of its input_ids, or continuation_mask= (of ones if these tokens are part of them)
    """
    own = _configured(model, "pad_token_id")
    pads = own or _configured(model, "eos_token_id")
    repeated = not own and len(ids) > 1 and ids.shape[1] > 3 and bool((ids[:, -3:] == ids[:, -1:]).all(-1).any())
    if repeated or _ends_in_padding(torch.isin(ids, torch.tensor(pads, dtype=ids.dtype, device=ids.device))):
        raise ValueError(
            "some continuations end in pad tokens, which would be scored: pass the tokenizer's whole output in place of its "
            "input_ids, or continuation_mask= (of ones if these tokens are part of them)"
        )


def warn_of_start(model: Any, ids: Tensor) -> None:
    """Warn if every continuation begins with the beginning-of-text token, which a tokenizer adds to texts by default.

    Args:
        model: a transformers model.
        ids: `(B, S)` the continuations.

    Warns:
        UserWarning: they do, and the model has another end-of-text token.
    """
    starts = [token for token in _configured(model, "bos_token_id") if token not in _configured(model, "eos_token_id")]
    if starts and (ids[:, 0] == starts[0]).all():
        warnings.warn(
            f"every continuation begins with the beginning-of-text token {starts[0]}, which is scored too: pass "
            "add_special_tokens=False to the tokenizer",
            stacklevel=4,
        )


def _shown(pad_ids: Collection[int]) -> str:
    """Format pad tokens for an error message."""
    return ", ".join(map(str, pad_ids)) or "it has none"


def source_padding(model: Any, ids: Tensor) -> Tensor:
    """Find the padding of source texts, on either side.

    Args:
        model: an encoder-decoder.
        ids: `(B, T)`.

    Returns:
        `(B, T)` in the dtype of `ids`, 0 for padding and 1 for text.

    Raises:
        ValueError: several source texts for a model without a pad token.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(pad_token_id=0, get_text_config=lambda decoder: config)
        >>> source_padding(SimpleNamespace(config=config), torch.tensor([[5, 0, 6], [7, 0, 0]]))
        tensor([[1, 1, 1],
                [1, 0, 0]])
    """
    pads = _configured(model, "pad_token_id")
    if not pads:
        refuse_unknown_padding(ids, type(model).__name__)
    is_pad = torch.isin(ids, torch.tensor(pads, dtype=ids.dtype, device=ids.device))
    leading, trailing = is_pad.cumprod(-1), is_pad.flip(-1).cumprod(-1).flip(-1)
    return 1 - (leading | trailing).to(ids.dtype)


def check_mask(attention_mask: Tensor) -> None:
    """Raise ValueError unless a mask is that of prompts padded on the left.

    Args:
        attention_mask: `(prompts, T)`, 0 for padding.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor (prompts, length), not {type(attention_mask).__name__}")
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be of shape (prompts, length), not {tuple(attention_mask.shape)}")
    if not attention_mask[:, -1].all():
        raise ValueError(
            "attention_mask ends in 0, so the prompts are padded on the right: set tokenizer.padding_side = 'left'"
        )


def fit_mask(mask: Tensor, length: int) -> Tensor:
    """Cut a mask `(B, T)` to `length` columns, or extend it by ones for further tokens.

    Args:
        mask: 0 for padding.
        length: number of columns.
    """
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


class PromptMask:
    """The attention mask of one batch of prompts, for rows that continue them.

    Args:
        mask: `(prompts, T)`, 0 for padding.

    Raises:
        ValueError: right padding, or another number of dimensions.
    """

    def __init__(self, mask: Tensor) -> None:
        check_mask(mask)
        self.mask = mask
        self._ids: Tensor | None = None

    def fit(self, ids: Tensor) -> Tensor:
        """Return the mask of rows.

        Args:
            ids: `(B, T')` int64, `B / prompts` rows of each prompt; at first call the prompts themselves.

        Returns:
            `(B, T')` in the dtype of `ids`, 1 for the tokens after the prompts.

        Raises:
            ValueError: the rows do not continue the prompts of the first call.
        """
        prompts, length = self.mask.shape
        copies, rest = divmod(len(ids), prompts)
        prompt_ids = ids[:: copies or 1, :length]
        if self._ids is None and ids.shape[1] == length:
            self._ids = prompt_ids.clone()
        if rest or self._ids is None or not torch.equal(prompt_ids, self._ids):
            raise ValueError(
                f"attention_mask has shape {tuple(self.mask.shape)} and does not belong to these prompts of shape "
                f"{tuple(ids.shape)}: a mask belongs to one batch of prompts, so create a new processor for each batch"
            )
        return fit_mask(self.mask.to(ids).repeat_interleave(copies, dim=0), ids.shape[1])

    def agrees(self, mask: Tensor) -> bool:
        """Return whether a mask is that of the prompts, each repeated for its rows.

        Args:
            mask: `(B, T)`, 0 for padding.

        Examples:
            >>> own = PromptMask(torch.tensor([[0, 1], [1, 1]]))
            >>> own.agrees(torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]])), own.agrees(torch.tensor([[1, 1], [1, 1]]))
            (True, False)
        """
        copies, rest = divmod(len(mask), len(self.mask))
        return not rest and torch.equal(self.mask.repeat_interleave(copies, 0).to(mask) != 0, mask != 0)


class KnownTokens(NamedTuple):
    """The vocabulary of a model. Padding may have larger ids, such as a pad token that was added for another model.

    Examples:
        >>> tokens = KnownTokens(size=8, pad=0, ends=(1,), name="Amateur")
        >>> tokens.replace(torch.tensor([[9, 9, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([[0, 0, 5, 6]])
        >>> tokens.replace(torch.tensor([[5, 9]]), torch.tensor([[1, 1]]))
        Traceback (most recent call last):
            ...
        ValueError: the sequence contains token 9, but the vocabulary of Amateur has only 8 tokens: all branches must share one tokenizer
    """

    size: int
    pad: int
    """The token that replaces padding."""
    ends: tuple[int, ...]
    """The end-of-text tokens: a row has ended after one of them, whatever fills it."""
    name: str

    @classmethod
    def of(cls, model: Any) -> "KnownTokens":
        """Return the vocabulary of a transformers model."""
        size = int(model.config.get_text_config(decoder=True).vocab_size)
        pads = [token for token in _configured(model, "pad_token_id") if 0 <= token < size]
        return cls(size, pads[0] if pads else 0, tuple(_configured(model, "eos_token_id")), type(model).__name__)

    def replace(self, ids: Tensor, mask: Tensor, fills: Collection[int] = (), over: Tensor | None = None) -> Tensor:
        """Replace padding, before the prompts and after finished rows, by a known token.

        Args:
            ids: `(B, T)`.
            mask: `(B, T)`, 0 for the padding before the prompts.
            fills: tokens that `generate()` pads ended rows with.
            over: `(B,)` bool, the rows that have ended; None to infer them from the tokens.

        Returns:
            `(B, T)` tokens that the model knows.

        Raises:
            ValueError: the text holds a token that the model does not know.
        """
        unseen, foreign = mask == 0, ids >= self.size
        if (in_text := foreign & ~unseen).any():
            ended = self._ended(ids, fills) if over is None else over[:, None].expand_as(ids)
            if (wrong := in_text & ~ended).any():
                raise ValueError(
                    f"the sequence contains token {int(ids[wrong][0])}, but the vocabulary of {self.name} has only "
                    f"{self.size} tokens: all branches must share one tokenizer"
                )
        return ids.masked_fill(unseen | foreign, self.pad)

    def _ended(self, ids: Tensor, fills: Collection[int]) -> Tensor:
        """Return a mask `(B, T)` of trailing padding: the last token repeated after an end or pad token."""
        fill = (ids == ids[:, -1:]).flip(-1).cumprod(-1).flip(-1).bool()
        before = (ids.shape[1] - fill.sum(-1, keepdim=True) - 1).clamp(min=0)
        after_end = torch.isin(ids.gather(-1, before), torch.tensor(self.ends, dtype=ids.dtype, device=ids.device))
        known = torch.isin(ids[:, -1:], torch.tensor(list(fills), dtype=ids.dtype, device=ids.device))
        return fill & (after_end | known)
