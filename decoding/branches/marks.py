"""Find the image tokens, or other marked tokens, of the rows that a model reads, from its inputs and its cache."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.head.hooks import in_this_thread
from contralto.decoding.branches.prompts import IMAGE_TOKENS

__all__ = ["TokenMarks", "find_image_token"]


def find_image_token(model: Any) -> int:
    """Return the placeholder token of images that the configuration of a model names.

    Args:
        model: a transformers model.

    Raises:
        ValueError: it names none.
    """
    found = (getattr(model.config, name, None) for name in IMAGE_TOKENS)
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise ValueError(f"{type(model).__name__} names no image token: pass token_id=")
    return int(token)


class TokenMarks:
    """The marked tokens of the rows of a forward pass: of whole prompts in their tokens, of later tokens by their cache.

    Args:
        token_id: the token that is marked.
        tokens: `(prompts, T)` bool, the marks themselves, before they are expanded to beams; None finds them by `token_id`.
        prompt_length: the number of columns in which tokens are marked; None is all, and a generated token that would be marked is an error.

    Attributes:
        current: `(B, past + q)` bool, the marks of the rows of the current forward pass.
        past: number of tokens that were read before the current forward pass.
    """

    def __init__(self, token_id: int, *, tokens: Tensor | None = None, prompt_length: int | None = None) -> None:
        self.token_id, self.prompt_length, self._tokens = token_id, prompt_length, tokens
        self._known: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        self.current: Tensor | None = None
        self.past = 0

    def hooks(self, model: Any) -> list[Any]:
        """Return the handles of hooks that find the marks in every forward pass of this thread.

        Args:
            model: the transformers model.
        """
        return [
            model.register_forward_pre_hook(in_this_thread(self._begin), with_kwargs=True),
            model.register_forward_hook(in_this_thread(self._end), with_kwargs=True),
        ]

    def of_keys(self, start: int, count: int, *, rows: int) -> Tensor:
        """Return the marks of keys, `(B, count)` bool.

        Args:
            start: the position of the first key.
            count: number of keys; those after the tokens of the rows are not marked.
            rows: number of rows of the attention.

        Raises:
            ValueError: another number of rows.
        """
        assert self.current is not None, "the forward pass has begun"
        if len(self.current) != rows:
            raise ValueError(f"the marked tokens are those of {len(self.current)} rows, not of {rows}")
        missing = max(0, start + count - self.current.shape[1])
        return pad(self.current, (0, missing))[:, start : start + count]

    def _begin(self, _module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        if ids is None:
            raise ValueError("image tokens are found in input_ids: pass them, not inputs_embeds")
        self.past = past = 0 if cache is None else int(cache.get_seq_length())
        if past and cache not in self._known:
            raise ValueError("the cache was filled without this variant: read the prompts with it first")
        if self._tokens is not None:
            self.current = self._own(ids, past + ids.shape[1])
            return
        new = ids == self.token_id
        if self.prompt_length is not None:
            new[:, max(0, self.prompt_length - past) :] = False
        elif past and ids.shape[1] == 1 and new.any():
            raise ValueError(
                f"token {self.token_id} was generated, and only tokens of prompts can be scaled: pass tokens="
            )
        self.current = new if not past else torch.cat([self._known[cache][:, :past], new], dim=1)

    def _own(self, ids: Tensor, length: int) -> Tensor:
        """Return the marks that the caller has given, `(B, length)`."""
        assert self._tokens is not None
        repeats, rest = divmod(len(ids), len(self._tokens))
        if rest or self._tokens.shape[1] > length:
            raise ValueError(
                f"tokens of shape {tuple(self._tokens.shape)} do not fit rows of shape {(len(ids), length)}: they belong to one batch of prompts"
            )
        marked = self._tokens.to(ids.device).bool().repeat_interleave(repeats, dim=0)
        return pad(marked, (0, length - marked.shape[1]))

    def _end(self, _module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        """Remember the marks with the cache that the pass has filled."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.current is not None:
            self._known[cache] = self.current
