"""Prepare prompts for a first forward pass as `generate()` does, with private methods of transformers.

Read from 5.23.0, and run with 5.19.0 too: `_prepare_position_ids_for_generation`, `_maybe_prepare_encoder_kwargs_for_generation`,
`_expand_inputs_for_generation`, `_validate_model_kwargs`. They return the keyword arguments that `generate()` calls
`model_kwargs`. No other module calls them; `reader` uses `_update_model_kwargs_for_generation`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL as MULTIMODAL_INPUTS

from contralto.common.placement import input_device

__all__ = [
    "IMAGE_TOKENS",
    "MULTIMODAL_INPUTS",
    "TOKEN_TYPES",
    "Prompts",
    "check_images",
    "check_inputs",
    "is_multimodal",
    "prepare_images",
    "prepare_positions",
    "stack",
    "takes_positions",
]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs with a value per token, besides mask and positions."""

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id")
"""The attributes of configurations that hold the placeholder token of an image or video."""


class Prompts(NamedTuple):
    """Rows that are ready for a first forward pass."""

    ids: Tensor
    """`(R, T)`."""
    kwargs: dict[str, Any]
    """The inputs that belong to them: attention mask, positions, token types, encoded images or encoded source texts."""


def is_multimodal(model: Any) -> bool:
    """Return whether a model takes inputs other than text.

    Args:
        model: a transformers model.
    """
    modalities = model.input_modalities
    return bool({modalities} - {"text"} if isinstance(modalities, str) else set(modalities) - {"text"})


def check_inputs(name: str, inputs: Any) -> None:
    """Raise an error unless inputs are prompts as a tokenizer or processor returns them.

    Args:
        name: what the inputs are, a plural noun for error messages.
        inputs: a mapping with `input_ids` `(prompts, T)`.

    Raises:
        TypeError: texts, token ids without a mapping, or lists in place of tensors.
        ValueError: no `input_ids`, or another number of dimensions.

    Examples:
        >>> check_inputs("the contrast inputs", ["a prompt"])
        Traceback (most recent call last):
            ...
        TypeError: the contrast inputs must be what the tokenizer or processor returns, not list: pass tokenizer(texts, return_tensors='pt', padding=True, padding_side='left')
    """
    call = "tokenizer(texts, return_tensors='pt', padding=True, padding_side='left')"
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"{name} must be what the tokenizer or processor returns, not {type(inputs).__name__}: pass {call}"
        )
    if (ids := inputs.get("input_ids")) is None:
        raise ValueError(f"{name} need input_ids, and contain only {', '.join(inputs) or 'nothing'}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"the input_ids of {name} must be a tensor, not {type(ids).__name__}: pass {call}")
    if ids.ndim != 2:
        raise ValueError(f"the input_ids of {name} must be of shape (prompts, length), not {tuple(ids.shape)}")


def check_images(model: Any, ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Raise an error if prompts have image tokens but no image inputs, which transformers does not check.

    Args:
        model: a transformers model.
        ids: `(B, T)` the prompts.
        inputs: the inputs besides the tokens.

    Raises:
        ValueError: image tokens without pixels, a grid without token types, or names that the model does not know.
    """
    if not is_multimodal(model):
        return
    model._validate_model_kwargs(dict(inputs))  # names that it does not know would be ignored
    named = (getattr(model.config, name, None) for name in IMAGE_TOKENS)
    tokens = torch.tensor([token for token in named if token is not None], dtype=ids.dtype, device=ids.device)
    if torch.isin(ids, tokens).any() and not any("pixel_values" in name for name in inputs):
        raise ValueError(
            f"the prompts of a branch contain image tokens, and the inputs of {type(model).__name__} contain no "
            "images: pass pixel_values and everything else that its processor returns"
        )
    if "image_grid_thw" in inputs and "mm_token_type_ids" not in inputs:
        raise ValueError("image_grid_thw needs mm_token_type_ids, or the image tokens would get text positions")


def takes_positions(model: Any) -> bool:
    """Return whether a model takes position ids; other models compute positions by themselves.

    Args:
        model: a transformers model.
    """
    return "position_ids" in inspect.signature(model.forward).parameters


def prepare_positions(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the position ids of whole rows, `(B, T)`, or `(3, B, T)` for multimodal positions.

    Models with multimodal positions store `rope_deltas` in the course of this; the former value is restored.

    Args:
        model: a transformers model that takes position ids.
        ids: `(B, T)`.
        kwargs: the other inputs, with the attention mask.
    """
    backbone = getattr(model, "model", None)
    former = getattr(backbone, "rope_deltas", None)
    without_cache = {name: value for name, value in kwargs.items() if "past" not in name and "cache" not in name}
    positions: Tensor = model._prepare_position_ids_for_generation(ids, without_cache)
    if backbone is not None and hasattr(backbone, "rope_deltas"):
        backbone.rope_deltas = former
    return positions


@torch.no_grad()
def prepare_images(model: Any, ids: Tensor, inputs: Mapping[str, Any], rows: int) -> Prompts:
    """Prepare prompts, with or without images, and repeat each to `rows` rows in all. Images are encoded once, then repeated.

    Args:
        model: a transformers model.
        ids: `(prompts, T)`.
        inputs: the other inputs, with the attention mask.
        rows: number of rows, a multiple of the number of prompts.
    """
    kwargs = {name: _to(value, input_device(model)) for name, value in inputs.items() if value is not None}
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    if takes_positions(model):
        kwargs["position_ids"] = prepare_positions(model, ids, kwargs)
    kwargs = model._maybe_prepare_encoder_kwargs_for_generation(ids, kwargs, "input_ids", model.generation_config)
    ids, kwargs = model._expand_inputs_for_generation(input_ids=ids, expand_size=rows // len(ids), **kwargs)
    return Prompts(ids, kwargs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def stack(parts: Sequence[Prompts]) -> Prompts | None:
    """Join rows of one model into one batch, left-padded to one width.

    Args:
        parts: `(R_i, T_i)` rows each, with their inputs.

    Returns:
        `(sum R_i, max T_i)` rows; None if their inputs cannot be joined.
    """
    width = max(part.ids.shape[1] for part in parts)
    kwargs: dict[str, Any] = {}
    for name in sorted({name for part in parts for name in part.kwargs}):
        joined = _join(name, parts, width)
        if joined is None:
            return None
        kwargs[name] = joined
    return Prompts(torch.cat([_widen(part.ids, width) for part in parts]), kwargs)


def _join(name: str, parts: Sequence[Prompts], width: int) -> Any:
    """Concatenate one input of all parts; None if that is not possible."""
    values: list[Any] = [part.kwargs.get(name) for part in parts]
    if name == "mm_encoder_outputs":
        return _join_images([value for value in values if value is not None])
    if name in TOKEN_TYPES:  # a part without images may come without them: all text
        values = [torch.zeros_like(p.ids) if v is None else v for p, v in zip(parts, values, strict=True)]
    if any(value is None for value in values):
        return None
    if name == "encoder_outputs":
        return _join_encoded(values)
    if name == "position_ids":  # (R, T), or (kinds, R, T) of models that also number places in images
        rows = [v.expand(*v.shape[:-2], len(p.ids), -1) for p, v in zip(parts, values, strict=True)]
        return torch.cat([_widen(row, width) for row in rows], dim=-2) if len({row.ndim for row in rows}) == 1 else None
    if name == "attention_mask" or name in TOKEN_TYPES:
        if "encoder_outputs" in parts[0].kwargs:  # the source texts', padded on the right
            longest = max(value.shape[1] for value in values)
            return torch.cat([pad(value, (0, longest - value.shape[1])) for value in values])
        return torch.cat([_widen(value, width) for value in values])
    return None


def _widen(rows: Tensor, width: int) -> Tensor:
    """Pad rows on the left with 0."""
    return pad(rows, (width - rows.shape[-1], 0))


def _join_images(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Concatenate encoded images in the order of the rows whose placeholders they fill."""
    joined: dict[str, Any] = {}
    for modality in {name for output in outputs for name in output if output[name] is not None}:
        features = [output[modality] for output in outputs if output.get(modality) is not None]
        fields = {}
        if "pooler_output" in features[0]:
            fields["pooler_output"] = _concatenate([feature["pooler_output"] for feature in features])
        if features[0].get("deepstack_features") is not None:
            layers = zip(*(feature["deepstack_features"] for feature in features), strict=True)
            fields["deepstack_features"] = [_concatenate(layer) for layer in layers]
        joined[modality] = type(features[0])(**fields)
    return joined


def _concatenate(values: Sequence[Any]) -> Any:
    """Concatenate tensors, or sequences of tensors, along the images."""
    return (
        torch.cat(list(values)) if isinstance(values[0], Tensor) else [tensor for value in values for tensor in value]
    )


def _join_encoded(outputs: Sequence[Any]) -> Any:
    """Concatenate encoded source texts of unequal length, padded on the right."""
    longest = max(output.last_hidden_state.shape[1] for output in outputs)
    hidden = [pad(o.last_hidden_state, (0, 0, 0, longest - o.last_hidden_state.shape[1])) for o in outputs]
    return type(outputs[0])(last_hidden_state=torch.cat(hidden))
