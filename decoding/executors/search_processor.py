"""Contrastive search as a logits processor, for an unmodified greedy `generate()`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from contralto.decoding.branches.padding import check_mask, padding_of, source_padding
from contralto.decoding.executors.order import check_mode
from contralto.decoding.executors.search import check_search
from contralto.decoding.executors.search_state import SearchState, check_parameters

__all__ = ["ContrastiveSearchLogitsProcessor"]


class ContrastiveSearchLogitsProcessor(LogitsProcessor):
    """Contrastive search in an unmodified greedy `generate()`, for a second cache and one more forward per token.

        model.generate(**inputs, logits_processor=[ContrastiveSearchLogitsProcessor(model)], do_sample=False)

    The tokens are those of `ContrastiveSearch`, which is faster. Use this where the loop itself cannot be replaced. The
    processors that `generate()` puts before it act on the model's logits before the candidates are chosen.

    Rows that go on from the last call by one token, whichever, reuse the cache; any other rows are read afresh. One
    object may serve many calls, also in turn.

    Args:
        model: the model that generates.
        alpha: weight of the degeneration penalty, in [0, 1].
        k: number of candidates, at least 1.
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. Needed where padding cannot be seen from
            leading pad tokens, that is for several prompts of a model without a pad token. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder, what its encoder reads, the inputs of `generate()`.
        vision_inputs: for an image-text model, what it reads with the prompts, the other inputs of `generate()`:
            `pixel_values`, `image_grid_thw`, `mm_token_type_ids`, ...

    Raises:
        TypeError: `model` cannot generate.
        ValueError: a parameter outside its range, encoder inputs missing or not wanted; when called, rows that a beam
            search reordered, prompts that hold images without `vision_inputs` or are padded on the right, a mask that
            belongs to other prompts.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt")
        >>> processor = ContrastiveSearchLogitsProcessor(model, alpha=0.4)
        >>> output = model.generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=16)
        >>> search = ContrastiveSearch(alpha=0.4)
        >>> torch.equal(output, model.generate(**inputs, custom_generate=search, max_new_tokens=16))
        True
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: Any,
        *,
        alpha: float = 0.6,
        k: int = 4,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        check_parameters(alpha, k)
        if not hasattr(model, "generate"):
            raise TypeError(
                f"contrastive search needs a transformers model that can generate, not {type(model).__name__}"
            )
        if bool(model.config.is_encoder_decoder) != bool(encoder_inputs):
            wanted = "pass encoder_inputs=, what its encoder is to read" if not encoder_inputs else "it has no encoder"
            raise ValueError(f"encoder_inputs do not fit {type(model).__name__}: {wanted}")
        if attention_mask is not None:
            check_mask(attention_mask)
        self._model, self._alpha, self._k = model, alpha, k
        self._prompt_mask = attention_mask
        self._prompt_ids: Tensor | None = None
        self._encoder_inputs, self._vision_inputs = encoder_inputs, vision_inputs
        self.reset()

    def reset(self) -> None:
        """Forget the last call, and free the cache."""
        self._seen: Tensor | None = None
        self._search: SearchState | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` from the model's `scores` `(B, V)`, for the rows `(B, T)`."""
        search = self._follow(input_ids)
        self._search, self._seen = search, input_ids.clone()
        return search.score(scores)

    def _follow(self, ids: Tensor) -> SearchState:
        """The search that has read these rows."""
        search, seen = self._search, self._seen
        if search is None or seen is None or seen.shape != (len(ids), ids.shape[1] - 1):
            return self._start(ids)
        if not torch.equal(seen, ids[:, :-1]):
            self._refuse_beams(seen, ids)
            return self._start(ids)
        search.advance(ids[:, -1])
        return search

    @staticmethod
    def _refuse_beams(seen: Tensor, ids: Tensor) -> None:
        rows = {row.tobytes() for row in seen.cpu().numpy()}
        if all(row.tobytes() in rows for row in ids[:, :-1].contiguous().cpu().numpy()):
            raise ValueError(
                "the rows came back in another order, as in beam search, but contrastive search is greedy and its "
                "scores cannot be summed over steps: pass num_beams=1"
            )

    def _start(self, ids: Tensor) -> SearchState:
        """Read whole rows, which `generate()` itself prepares for the model."""
        how = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1, "use_cache": True}
        inputs = self._encoder_rows(ids) if self._encoder_inputs else self._text_rows(ids)
        search: SearchState = self._model.generate(**inputs, **how, custom_generate=self._begin)
        return search

    def _encoder_rows(self, ids: Tensor) -> dict[str, Any]:
        assert self._encoder_inputs is not None
        given = dict(self._encoder_inputs)
        if given.get("attention_mask") is None and "input_ids" in given:
            given["attention_mask"] = source_padding(self._model, given["input_ids"])
        repeats = len(ids) // len(next(iter(given.values())))
        inputs = {name: value.repeat_interleave(repeats, 0) for name, value in given.items()}
        return {"decoder_input_ids": ids, **inputs}

    def _text_rows(self, ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": self._find_mask(ids)}
        if self._vision_inputs is None:
            _refuse_images(self._model, ids)
            return inputs
        for name, value in self._vision_inputs.items():  # what was generated is text, type 0
            inputs[name] = pad(value, (0, ids.shape[1] - value.shape[1])) if "token_type" in name else value
        return inputs

    def _begin(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> SearchState:
        """Return the state after the prompts; `generate()` calls this in place of a decoding loop."""
        check_mode(generation_config)
        check_search(generation_config, model_kwargs, self._k)
        return SearchState(model, input_ids, model_kwargs, alpha=self._alpha, k=self._k, path="auto")

    def _find_mask(self, ids: Tensor) -> Tensor:
        """`(B, T)`, 0 for the padding before the prompts."""
        if self._prompt_mask is None:
            return padding_of(self._model, ids)
        prompts, length = self._prompt_mask.shape
        repeats, rest = divmod(len(ids), prompts)
        prompt_ids = ids[:: repeats or 1, :length]
        if self._prompt_ids is None and ids.shape[1] == length:
            self._prompt_ids = prompt_ids.clone()
        if rest or self._prompt_ids is None or not torch.equal(prompt_ids, self._prompt_ids):
            raise ValueError(
                f"attention_mask is of shape {tuple(self._prompt_mask.shape)} and was given for other prompts than "
                f"these, of shape {tuple(ids.shape)}: a mask belongs to one batch of prompts, so make a new processor "
                "for each"
            )
        mask = self._prompt_mask.to(ids).repeat_interleave(repeats, dim=0)
        return pad(mask, (0, ids.shape[1] - length), value=1)


def _refuse_images(model: Any, ids: Tensor) -> None:
    """A logits processor is given no images, so it cannot read prompts that hold some."""
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    held = [found for name in names if (found := getattr(model.config, name, None)) is not None]
    if held and torch.isin(ids, torch.tensor(held, device=ids.device)).any():
        raise ValueError(
            "the prompt holds images, which a logits processor is not given: pass vision_inputs=, what the model reads "
            "besides the text"
        )
