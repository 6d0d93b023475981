"""Contrastive search as a logits processor, for an unmodified greedy `generate()`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from contralto.decoding.branches.padding import PromptMask, padding_of, source_padding
from contralto.decoding.branches.prompts import IMAGE_TOKENS
from contralto.decoding.executors.order import check_mode
from contralto.decoding.executors.search import check_search
from contralto.decoding.executors.search_state import SearchState, check_parameters

__all__ = ["ContrastiveSearchLogitsProcessor"]


class ContrastiveSearchLogitsProcessor(LogitsProcessor):
    """Contrastive search in an unmodified greedy `generate()`, for a second cache and one more forward per token.

        model.generate(**inputs, logits_processor=[ContrastiveSearchLogitsProcessor(model)], do_sample=False)

    The tokens are those of `ContrastiveSearch`, which is faster; use this where the decoding loop cannot be replaced. The
    processors that `generate()` puts before it act on the model's logits before the candidates are chosen.

    Rows that continue the last call by one token, whichever it is, reuse the cache; other rows are read from their beginning.
    One object may serve many calls, also in turn.

    Args:
        model: the model that generates.
        alpha: weight of the degeneration penalty, in [0, 1].
        k: number of candidates, at least 1.
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. Required where padding cannot be told from
            leading pad tokens, that is for several prompts of a model without a pad token. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder, the inputs of its encoder, as given to `generate()`.
        vision_inputs: for an image-text model, the inputs besides the tokens: `pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ...

    Raises:
        TypeError: `model` cannot generate.
        ValueError: a parameter outside its range, or encoder inputs that are missing or that the model cannot use; when called,
            rows in another order as in beam search, prompts that contain images without `vision_inputs` or are padded on the
            right, or a mask that belongs to other prompts.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveSearch
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
            reason = "it has no encoder" if encoder_inputs else "pass encoder_inputs=, the inputs of its encoder"
            raise ValueError(f"encoder_inputs do not fit {type(model).__name__}: {reason}")
        self._model, self._alpha, self._k = model, alpha, k
        self._prompt_mask = None if attention_mask is None else PromptMask(attention_mask)
        self._encoder_inputs, self._vision_inputs = encoder_inputs, vision_inputs
        self.reset()

    def reset(self) -> None:
        """Discard the last call and its cache."""
        self._seen: Tensor | None = None
        self._state: SearchState | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return contrastive scores.

        Args:
            input_ids: `(B, T)` int64.
            scores: `(B, V)` of the model.

        Returns:
            `(B, V)`, `-inf` except for the candidates.
        """
        self._state = self._continued(input_ids) or self._start(input_ids)
        self._seen = input_ids.clone()
        return self._state.score(scores)

    def _continued(self, ids: Tensor) -> SearchState | None:
        """Return the state of the last call after the next token of each row; None if the rows do not continue it."""
        state, seen = self._state, self._seen
        if state is None or seen is None or seen.shape != (len(ids), ids.shape[1] - 1):
            return None
        if not torch.equal(seen, ids[:, :-1]):
            _check_order(seen, ids)
            return None
        state.advance(ids[:, -1])
        return state

    def _start(self, ids: Tensor) -> SearchState:
        """Return the state after whole rows, whose inputs `generate()` prepares for the model."""
        options = {
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_new_tokens": 1,
            "use_cache": True,
        }
        inputs = self._encoder_rows(ids, self._encoder_inputs) if self._encoder_inputs else self._decoder_rows(ids)
        state: SearchState = self._model.generate(**inputs, **options, custom_generate=self._begin)
        return state

    def _encoder_rows(self, ids: Tensor, encoder_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the inputs of an encoder-decoder, its source texts repeated for the rows of each prompt."""
        inputs = dict(encoder_inputs)
        if inputs.get("attention_mask") is None and "input_ids" in inputs:
            inputs["attention_mask"] = source_padding(self._model, inputs["input_ids"])
        repeats = len(ids) // len(next(iter(inputs.values())))
        return {
            "decoder_input_ids": ids,
            **{name: value.repeat_interleave(repeats, 0) for name, value in inputs.items()},
        }

    def _decoder_rows(self, ids: Tensor) -> dict[str, Any]:
        """Return the inputs of a decoder-only model."""
        mask = padding_of(self._model, ids) if self._prompt_mask is None else self._prompt_mask.fit(ids)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._vision_inputs is None:
            _check_no_images(self._model, ids)
            return inputs
        for name, value in self._vision_inputs.items():  # generated tokens are text, type 0
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


def _check_order(seen: Tensor, ids: Tensor) -> None:
    """Raise ValueError if rows `(B, T + 1)` continue the rows `seen` `(B, T)` in another order."""
    rows = {row.tobytes() for row in seen.cpu().numpy()}
    if all(row.tobytes() in rows for row in ids[:, :-1].contiguous().cpu().numpy()):
        raise ValueError(
            "the rows came back in another order, as in beam search, but contrastive search is greedy and its "
            "scores cannot be summed over steps: pass num_beams=1"
        )


def _check_no_images(model: Any, ids: Tensor) -> None:
    """Raise ValueError if prompts contain images, which `generate()` does not hand to a logits processor."""
    named = (getattr(model.config, name, None) for name in (*IMAGE_TOKENS, "audio_token_id"))
    tokens = torch.tensor([token for token in named if token is not None], dtype=ids.dtype, device=ids.device)
    if torch.isin(ids, tokens).any():
        raise ValueError(
            "the prompt contains images, which a logits processor does not receive: pass vision_inputs=, the "
            "model inputs other than the token ids"
        )
