"""Provide the branch of a model that reads another prompt or image, followed by the same generated tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from contralto.common.placement import input_device
from contralto.decoding.branches.base import Branch, unwrap
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.branches.padding import fit_mask, padding_of
from contralto.decoding.branches.prompts import Prompts, check_images, check_inputs, is_multimodal, prepare_images

__all__ = ["GeneratedTokens", "InputBranch"]


class GeneratedTokens:
    """The main prompts of one batch, to find the number of generated tokens after them."""

    def __init__(self) -> None:
        self._prompt: Tensor | None = None  # the main rows at the first call

    def count(self, input_ids: Tensor) -> int:
        """Return the number of generated tokens in the rows, without the main prompts.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model; at first call the main prompts.

        Raises:
            ValueError: the rows belong to other main prompts.
        """
        if self._prompt is None:
            self._prompt = input_ids.clone()
        length = self._prompt.shape[1]
        prompt = input_ids[:, :length]
        if len(prompt) != len(self._prompt):  # another number of beams
            prompt, expected = torch.unique(prompt, dim=0), torch.unique(self._prompt, dim=0)
        else:
            expected = self._prompt
        if not torch.equal(prompt, expected):
            raise ValueError(
                "these rows do not start with the prompts with which the contrast inputs were first used: contrast "
                "inputs belong to one batch of prompts, so create a new processor for each batch"
            )
        return int(input_ids.shape[1]) - length


class InputBranch(Branch):
    """The logits of a model that reads another prompt or image, followed by the same generated tokens.

    The contrast prompts belong to one batch of main prompts. The first call must be at the end of the main prompts; the
    tokens that follow them from then on are put after the contrast prompts.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        inputs: the inputs of the model: `input_ids` `(prompts, T')` padded on the left, `attention_mask`, and for images
            `pixel_values` and the inputs that belong to them, as a processor returns them. One prompt may serve all rows.

    Raises:
        TypeError: `model` cannot generate, or `inputs` are not what a tokenizer or processor returns.
        ValueError: no `input_ids`, right padding, another batch of main prompts.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        check_inputs("the contrast inputs", inputs)
        self._ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        transformer, _ = unwrapped = unwrap(model)
        self._is_adapted = unwrapped.is_adapted
        if transformer.config.is_encoder_decoder:
            raise ValueError(
                f"{type(transformer).__name__} is an encoder-decoder, whose contrast inputs are another source text: "
                "use ModelBranch(model, encoder_inputs=...)"
            )
        self._mask = padding_of(transformer, self._ids) if mask is None else mask
        self._vision = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask") and v is not None}
        check_images(transformer, self._ids, self._vision)
        self._branch = ModelBranch(
            model,
            attention_mask=self._mask,
            vision_inputs=self._vision if is_multimodal(transformer) else None,
        )
        self._generated = GeneratedTokens()

    @property
    def model(self) -> Any:
        """Return the transformers model inside."""
        return self._branch.model

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:
        """Set the tokens that pad finished rows, until `end`; the contrast prompts have their own mask.

        Args:
            ids: `(B, T)` the main prompts.
            mask: `(B, T)`, 0 for padding.
            fills: token ids that pad the rows that have ended.
        """
        self._branch.set_fills(fills)

    def end(self) -> None:
        """Discard the tokens that pad finished rows."""
        self._branch.end()

    def limit_tokens(self, size: int) -> None:
        """Declare that ids of generated tokens are below `size`.

        Args:
            size: the vocabulary size of the main model.
        """
        self._branch.limit_tokens(size)

    def reset(self) -> None:
        """Discard the last call and its cache, but keep the main prompts."""
        self._branch.reset()

    def generated(self, input_ids: Tensor) -> int:
        """Return the number of generated tokens in the rows, without the main prompts.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model.

        Raises:
            ValueError: the rows belong to other main prompts.
        """
        return self._generated.count(input_ids)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the logits `(B, V)` of the token after each row, with the contrast prompt in place of the prompt.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model.
        """
        return self._branch(self._rows(input_ids, self.generated(input_ids)))

    def catch_up(self, input_ids: Tensor) -> Tensor:
        """Return the logits `(B, V)` after rows that continue those of the last call by any number of generated tokens.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model.
        """
        return self._branch.catch_up(self._rows(input_ids, self.generated(input_ids)))

    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the last `count` tokens of each row, with the contrast prompt in place of the prompt.

        Args:
            input_ids: `(B, T)` int64, main prompts and continuations.
            count: number of last tokens to predict, below `T`.
            attention_mask: `(B, T)`, 0 for padding; that of the main prompts is not used.

        Returns:
            `(B, count, V)`.
        """
        rows = self._rows(input_ids, count)
        mask = fit_mask(self._mask.repeat_interleave(len(rows) // len(self._mask), 0), rows.shape[1])
        if attention_mask is not None:
            mask[:, -count:] = attention_mask[:, -count:].to(mask)
        return self._branch.score(rows, count, mask)

    def joint_prompts(self, model: Any, ids: Tensor) -> Prompts | None:
        """Return the contrast prompts for a joint forward pass, if `model` is the branch's model with adapters enabled.

        Args:
            model: the main model.
            ids: `(B, T)` int64, its prompts.
        """
        return self.prompts(ids) if self.model is model and self._is_adapted else None

    def prompts(self, ids: Tensor) -> Prompts:
        """Return the contrast prompts of main prompts, ready for a first forward pass.

        Args:
            ids: `(B, T)` int64, the main prompts.
        """
        self.generated(ids)
        contrast = self._ids.to(input_device(self.model))
        self._rows(ids, 0)
        return prepare_images(self.model, contrast, {**self._vision, "attention_mask": self._mask}, len(ids))

    def _rows(self, input_ids: Tensor, generated: int) -> Tensor:
        """Return the contrast prompts `(B, T'')`, each followed by the generated tokens of its row."""
        repeats, rest = divmod(len(input_ids), len(self._ids))
        if rest:
            raise ValueError(
                f"the contrast inputs contain {len(self._ids)} prompts, which do not fit {len(input_ids)} rows"
            )
        prompts = self._ids.to(input_ids.device).repeat_interleave(repeats, dim=0)
        return torch.cat([prompts, input_ids[:, input_ids.shape[1] - generated :]], dim=1)
