"""Prompts made ready for a first forward, as `generate()` makes them: the seam to private methods of transformers.

Read from 5.23.0, and run with 5.19.0 too: `_prepare_position_ids_for_generation`, `_maybe_prepare_encoder_kwargs_for_generation`,
`_expand_inputs_for_generation`, `_validate_model_kwargs`. What they return is what `generate()` calls model_kwargs. Nothing
else in contralto calls them, but for `_update_model_kwargs_for_generation` and `_supports_logits_to_keep` in `branches`.
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
    "is_multimodal",
    "prepare_images",
    "prepare_positions",
    "stack",
    "takes_positions",
]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs with a value per token, besides the mask and the positions."""

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id")
"""Where configurations name the token that stands for a piece of an image."""


class Prompts(NamedTuple):
    """Rows that are ready for a first forward."""

    ids: Tensor
    """`(R, T)`."""
    kwargs: dict[str, Any]
    """What goes with them: attention mask, positions, token types, encoded images or encoded source texts."""


def is_multimodal(model: Any) -> bool:
    """Whether a model reads more than text."""
    modalities = model.input_modalities
    return bool({modalities} - {"text"} if isinstance(modalities, str) else set(modalities) - {"text"})


def check_images(model: Any, ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if prompts hold images that the model would not be given, which transformers lets pass in silence."""
    if not is_multimodal(model):
        return
    model._validate_model_kwargs(dict(inputs))  # names that it does not know would be ignored
    named = (getattr(model.config, name, None) for name in IMAGE_TOKENS)
    tokens = torch.tensor([token for token in named if token is not None], dtype=ids.dtype, device=ids.device)
    if torch.isin(ids, tokens).any() and not any("pixel_values" in name for name in inputs):
        raise ValueError(
            f"the prompts of a branch hold images, and {type(model).__name__} is not given them: pass pixel_values and what "
            "else its processor returns"
        )
    if "image_grid_thw" in inputs and "mm_token_type_ids" not in inputs:
        raise ValueError(
            "image_grid_thw needs mm_token_type_ids beside it, or the image would be read as text positions"
        )


def takes_positions(model: Any) -> bool:
    """Whether a model is told where its tokens stand; the others find out by themselves."""
    return "position_ids" in inspect.signature(model.forward).parameters


def prepare_positions(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The position ids of whole rows. Models with multimodal positions leave a note of them on the model; it is put back."""
    backbone = getattr(model, "model", None)
    note = getattr(backbone, "rope_deltas", None)
    without_cache = {name: value for name, value in kwargs.items() if "past" not in name and "cache" not in name}
    positions: Tensor = model._prepare_position_ids_for_generation(ids, without_cache)
    if backbone is not None and hasattr(backbone, "rope_deltas"):
        backbone.rope_deltas = note
    return positions


@torch.no_grad()
def prepare_images(model: Any, ids: Tensor, inputs: Mapping[str, Any], rows: int) -> Prompts:
    """Prompts with images, each repeated for its share of `rows`: images are encoded once, and repeated then."""
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
    """Rows of one model as one batch, left-padded to one width; None if their inputs cannot be joined."""
    width = max(part.ids.shape[1] for part in parts)
    kwargs: dict[str, Any] = {}
    for name in sorted({name for part in parts for name in part.kwargs}):
        joined = _join(name, parts, width)
        if joined is None:
            return None
        kwargs[name] = joined
    return Prompts(torch.cat([_widen(part.ids, width) for part in parts]), kwargs)


def _join(name: str, parts: Sequence[Prompts], width: int) -> Any:
    """One input of all parts together; None if that cannot be."""
    values: list[Any] = [part.kwargs.get(name) for part in parts]
    if name == "mm_encoder_outputs":
        return _join_images([value for value in values if value is not None])
    if name in TOKEN_TYPES:  # a part without images may come without them: all text
        values = [torch.zeros_like(p.ids) if v is None else v for p, v in zip(parts, values, strict=True)]
    if any(value is None for value in values):
        return None
    if name == "encoder_outputs":
        return _join_encoded(values)
    if name == "position_ids":
        rows = [v.expand(*v.shape[:-2], len(p.ids), -1) for p, v in zip(parts, values, strict=True)]
        return torch.cat([_widen(row, width) for row in rows], dim=-2) if len({row.ndim for row in rows}) == 1 else None
    if name == "attention_mask" or name in TOKEN_TYPES:
        if "encoder_outputs" in parts[0].kwargs:  # the source texts', padded on the right
            longest = max(value.shape[1] for value in values)
            return torch.cat([pad(value, (0, longest - value.shape[1])) for value in values])
        return torch.cat([_widen(value, width) for value in values])
    return None


def _widen(rows: Tensor, width: int) -> Tensor:
    return pad(rows, (width - rows.shape[-1], 0))


def _join_images(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Encoded images one after another, in the order of the rows whose placeholders they fill."""
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
    """Tensors, or sequences of them, joined along the images."""
    return (
        torch.cat(list(values)) if isinstance(values[0], Tensor) else [tensor for value in values for tensor in value]
    )


def _join_encoded(outputs: Sequence[Any]) -> Any:
    """Encoded source texts of unequal length, padded on the right."""
    longest = max(output.last_hidden_state.shape[1] for output in outputs)
    hidden = [pad(o.last_hidden_state, (0, 0, 0, longest - o.last_hidden_state.shape[1])) for o in outputs]
    return type(outputs[0])(last_hidden_state=torch.cat(hidden))
