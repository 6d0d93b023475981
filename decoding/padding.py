"""Which tokens of a batch of prompts are padding, when nothing but the tokens is known."""

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["find_padding", "pad_tokens"]


def pad_tokens(model: Any) -> list[int]:
    """What the prompts of a model are padded with: its pad token, else its end-of-text tokens, as in `generate()`."""
    generation, config = model.generation_config, model.config.get_text_config(decoder=True)
    for ids in (generation.pad_token_id, config.pad_token_id, generation.eos_token_id, config.eos_token_id):
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def find_padding(ids: Tensor, pad_ids: Collection[int], bos_id: int | None = None) -> Tensor:
    """The attention mask of left-padded prompts: leading pad tokens are padding, all else is text.

    Args:
        ids: `(B, T)`.
        pad_ids: the tokens that may be padding.
        bos_id: the beginning-of-text token, if there is one.

    Returns:
        `(B, T)` in the dtype of `ids`, 0 for padding and 1 for text. A prompt's last token is always text.

    Raises:
        ValueError: some prompts, but not all, end in a pad token (they are padded on the right); or the pad token is also
            the beginning-of-text token and every prompt begins with it, so that it may be either.

    Warns:
        UserWarning: some prompts, but not all, begin with some other token twice, which looks like padding.

    Example:
        >>> find_padding(torch.tensor([[0, 0, 5], [6, 0, 7]]), pad_ids=[0])
        tensor([[0, 0, 1],
                [1, 1, 1]])
    """
    is_pad = torch.isin(ids, torch.tensor(list(pad_ids), dtype=ids.dtype, device=ids.device))
    if (ends := is_pad[:, -1]).any() and not ends.all():
        raise ValueError(
            "some prompts end in pad tokens, so they are padded on the right: set tokenizer.padding_side = 'left', "
            "or pass attention_mask= if these tokens are meant"
        )
    is_pad[:, -1] = False
    if bos_id in pad_ids and is_pad[:, 0].all():
        raise ValueError(
            f"every prompt begins with token {bos_id}, which is both the pad token and the beginning-of-text token, so "
            "padding cannot be told from text: pass attention_mask="
        )
    repeated = (ids[:, 0] == ids[:, min(1, ids.shape[1] - 1)]) & ~is_pad[:, 0]
    if ids.shape[1] > 1 and repeated.any() and not repeated.all():
        warnings.warn(
            f"some prompts begin with token {int(ids[repeated][0, 0])} twice, which is not the amateur's pad token "
            f"({', '.join(map(str, pad_ids)) or 'it has none'}): if it is padding, pass attention_mask=",
            stacklevel=2,
        )
    return 1 - is_pad.cumprod(-1).to(ids.dtype)
