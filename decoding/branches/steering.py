"""Variants of a model that look at images less or more, or whose hidden states are steered, as branches that need no second model.

Both are written where an amateur is expected: `ContrastiveDecodingLogitsProcessor(HiddenImage(model), vision_inputs=...)`. What they change
is changed by hooks while the branch runs, so that the model itself stays as it is.

Read from transformers 5.23.0: attention modules take `attention_mask` by name, None, bool or float, `(B, 1, q, keys)`, and
`Cache.get_mask_sizes` returns the number of keys and the position of the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from contralto.common.head import find_layers
from contralto.common.head.hooks import hooked, in_this_thread
from contralto.common.placement import input_device
from contralto.decoding.branches.attention import attention_module, check_implementation
from contralto.decoding.branches.marks import TokenMarks, find_image_token
from contralto.decoding.branches.variants import ModelVariant, inner_model

__all__ = ["HiddenImage", "Steered", "chosen_layers", "layers_of", "mean_difference"]


def chosen_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """Return the numbers of layers, all of them for None.

    Args:
        model: a decoder-only transformers model.
        layers: numbers of layers, from 0.

    Raises:
        ValueError: no layers, or numbers out of range.
    """
    depth = find_layers(model).depth
    chosen = list(range(depth)) if layers is None else list(layers)
    if not chosen or any(layer != int(layer) or not 0 <= layer < depth for layer in chosen):
        raise ValueError(f"layers must be numbers from 0 to {depth - 1}, not {chosen}")
    return chosen


def layers_of(model: Any) -> Any:
    """Return the list of layers of a model.

    Args:
        model: a decoder-only transformers model.
    """
    return model.get_submodule(find_layers(model).name)


class HiddenImage(ModelVariant):
    r"""A model whose attention to image tokens is scaled or hidden in some layers.

        a'_ij = s_j a_ij / sum_k s_k a_ik,      s_j = scale for image tokens, else 1

    for the attention weights `a` of each head, that is `log(scale)` added to their scores; `scale=0` hides the image. The
    image is encoded, and takes its positions, as in the model. As the subtracted branch, `scale=0` in all layers is a contrast with
    a model that cannot see (compare no image at all, `--method vdd`); with `scale > 1` it looks at the image more. Variants that choose
    tokens by their attention, or amplify by the score, are in `looking`.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        scale: factor of the attention weights, at least 0.
        layers: numbers of layers, from 0; None for all.
        tokens: `(prompts, T)` bool, the tokens of the prompts to scale, before they are expanded to beams; None for all image tokens.
        token_id: the image token; None reads it from the configuration. Any other token can be scaled, too.

    Raises:
        ValueError: `scale` below 0, layers out of range, no image token, or attention that takes no float mask; when called, `tokens` of
            other prompts, or a cache that the variant has not filled.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompt = tokenizer("Ben went out to the", return_tensors="pt")
        >>> unseen = HiddenImage(model, token_id=int(prompt["input_ids"][0, 1]))  # a word in place of an image
        >>> output = model.generate(
        ...     **prompt, logits_processor=[ContrastiveDecodingLogitsProcessor(unseen)], max_new_tokens=4
        ... )
    """

    def __init__(
        self,
        model: Any,
        *,
        scale: float = 0.0,
        layers: Sequence[int] | None = None,
        tokens: Tensor | None = None,
        token_id: int | None = None,
    ) -> None:
        self.model = inner_model(model)
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale must be a finite number of at least 0, not {scale}")
        check_implementation(self.model)
        self.scale, self.layers = float(scale), chosen_layers(self.model, layers)
        token = find_image_token(self.model) if token_id is None else token_id
        self._marks = TokenMarks(token, tokens=tokens)
        self._modules = [attention_module(layers_of(self.model)[layer], layer) for layer in self.layers]
        self.description = f"the same model with its attention to images times {scale:g} in {len(self.layers)} layers"

    @contextmanager
    def context(self) -> Iterator[None]:
        """Scale the attention in this thread."""
        scale = in_this_thread(self._scale)
        own = [module.register_forward_pre_hook(scale, with_kwargs=True) for module in self._modules]
        with hooked([*self._marks.hooks(self.model), *own]):
            yield

    def _scale(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Add the logarithm of the scale to the mask of an attention module."""
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache, count = kwargs.get("past_key_values"), states.shape[1]
        keys, start = (count, 0) if cache is None else cache.get_mask_sizes(count, module.layer_idx)
        mask = _float_mask(kwargs.get("attention_mask"), states, keys, count)
        low = torch.finfo(states.dtype).min
        own = self._marks.of_keys(start, keys, rows=len(states)).to(mask.device)
        bias = torch.zeros(own.shape, dtype=mask.dtype, device=mask.device)
        bias = bias.masked_fill(own, low if self.scale == 0 else float(torch.tensor(self.scale).log()))
        return args, {**kwargs, "attention_mask": (mask + bias[:, None, None]).clamp(min=low)}


def _float_mask(mask: Tensor | None, states: Tensor, keys: int, count: int) -> Tensor:
    """Return the mask that attention adds to its scores, `(B or 1, 1, count, keys)`, causal where there is none."""
    low = torch.finfo(states.dtype).min
    if mask is None:
        rows = torch.arange(keys - count, keys, device=states.device)[:, None]
        mask = (torch.arange(keys, device=states.device)[None] <= rows)[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=states.dtype, device=mask.device).masked_fill(~mask, low)
    return mask[..., :keys].to(states.dtype)


class Steered(ModelVariant):
    """A model to whose hidden states vectors are added, a contrast of activations.

        h'_l = h_l + scale * v_l    for each of the chosen layers l, at every token

    As the subtracted branch with `-scale`, or as the branch of its own that `combine` adds, it expresses steering of modalities as in
    MC2 and activation addition (Turner et al. 2023, arXiv 2308.10248). `mean_difference` makes vectors of two sets of prompts.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        vectors: `(d,)` for each layer by its number, from 0, added to what the layer returns.
        scale: factor of all vectors.

    Raises:
        ValueError: no vectors, layers out of range, vectors of another size, or values that are not finite.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> model, prompt = testbed.load("expert"), testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> steered = Steered(model, {1: torch.ones(64)}, scale=0.1)
        >>> contrast = ContrastiveDecodingLogitsProcessor(steered)
        >>> output = model.generate(**prompt, logits_processor=[contrast], max_new_tokens=4)
    """

    def __init__(self, model: Any, vectors: Mapping[int, Tensor], *, scale: float = 1.0) -> None:
        self.model = inner_model(model)
        if not vectors:
            raise ValueError("vectors is empty: give a vector for each layer that is steered")
        self.layers = chosen_layers(self.model, list(vectors))
        size = self.model.config.get_text_config(decoder=True).hidden_size
        for layer, vector in vectors.items():
            if tuple(vector.shape) != (size,) or not vector.isfinite().all():
                raise ValueError(
                    f"the vector of layer {layer} must hold {size} finite numbers, as many as the model has features, and has shape "
                    f"{tuple(vector.shape)}"
                )
        self.scale = float(scale)
        self.vectors = {layer: vector.detach().double() for layer, vector in vectors.items()}
        self.description = f"the same model steered in {len(vectors)} layers by {scale:g}"

    @contextmanager
    def context(self) -> Iterator[None]:
        """Add the vectors in this thread."""
        parts = layers_of(self.model)
        with hooked(parts[layer].register_forward_hook(self._hook(layer)) for layer in self.layers):
            yield

    def _hook(self, layer: int) -> Any:
        def steer(_module: Any, _args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            moved = states + (self.scale * self.vectors[layer]).to(states)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return in_this_thread(steer)


@torch.no_grad()
def mean_difference(
    model: Any, positive: Mapping[str, Any], negative: Mapping[str, Any], *, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """Return steering vectors: the mean difference of hidden states at the last tokens of two sets of prompts.

        v_l = mean over positive of h_l(last token) - mean over negative of h_l(last token)

    Args:
        model: a decoder-only transformers model.
        positive: prompts as a tokenizer or processor returns them, padded on the left.
        negative: other prompts.
        layers: numbers of layers, from 0; None for all.

    Returns:
        `(d,)` float64 by layer, for `Steered`.

    Raises:
        ValueError: layers out of range, or prompts that are padded on the right.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> one, other = (tokenizer(text, return_tensors="pt") for text in ("Ben went to the barn.", "Mia ran home."))
        >>> sorted(mean_difference(model, one, other, layers=[0, 2]))
        [0, 2]
    """
    from contralto.decoding.branches.padding import check_mask

    model = inner_model(model)
    chosen, means = chosen_layers(model, layers), []
    for inputs in (positive, negative):
        if inputs.get("attention_mask") is not None:
            check_mask(inputs["attention_mask"])
        seen: dict[int, Tensor] = {}
        handles = [layers_of(model)[layer].register_forward_hook(_last_token(layer, seen)) for layer in chosen]
        with hooked(handles):
            model(**{name: value.to(input_device(model)) for name, value in inputs.items()})
        means.append({layer: states.double().mean(0) for layer, states in seen.items()})
    return {layer: means[0][layer] - means[1][layer] for layer in chosen}


def _last_token(layer: int, seen: dict[int, Tensor]) -> Any:
    """Return a hook that keeps the last token's states `(B, d)` of a layer."""

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen[layer] = (output[0] if isinstance(output, tuple) else output)[:, -1]

    return in_this_thread(keep)
