"""A branch that hears the text more than the image, from one layer's attention, as ONLY does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from contralto.common.head import find_path
from contralto.common.head.hooks import hooked, in_this_thread, probe_ids
from contralto.decoding.branches.attention import AttentionPass, Change, attention_module
from contralto.decoding.branches.looking import ImageAttention
from contralto.decoding.branches.steering import chosen_layers, layers_of

__all__ = ["TextEnhanced", "text_enhanced_weights"]

RESIDUAL, HIDDEN = 0.2, 0.5
"""What of the last layer's input and of the final hidden states the released code adds."""
TINY = 1e-6
"""The number that the released code adds before a logarithm."""
TOLERANCE = 1e-3


def text_enhanced_weights(weights: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Return attention weights of the heads that attend to the text with more entropy than to the image, 0 in the others.

        w'_j = w_j if w_j <= mean(w) + std(w) else 0      within the text, and within the image
        ratio_h = E(w' over the text) / E(w' over the image),    E(w) = - sum_j p_j log(p_j + 1e-6),   p = w / sum(w)

    Heads whose ratio is below the mean over the heads are removed: the text-to-visual entropy ratio of ONLY (Wan et al. 2025, arXiv
    2507.00898).

    Args:
        weights: `(B, H, q, keys)` attention weights.
        text: `(B, 1, q, keys)` bool, the text tokens that a query sees, without the first token of the row.
        image: `(B, 1, q, keys)` bool, the image tokens that it sees.

    Returns:
        `(B, H, q, keys)`, not normalised.

    Examples:
        >>> weights = torch.tensor([[[[0.4, 0.3, 0.3]]], [[[0.1, 0.2, 0.7]]]]).transpose(0, 1)
        >>> text, image = torch.tensor([[[[True, True, False]]]]), torch.tensor([[[[False, False, True]]]])
        >>> text_enhanced_weights(weights, text, image)[0, :, 0]
        tensor([[0.0000, 0.0000, 0.0000],
                [0.1000, 0.2000, 0.7000]])
    """
    kept = _without_peaks(_without_peaks(weights, text), image)
    in_text, in_image = _entropy(kept, text, empty=0.0), _entropy(kept, image, empty=torch.inf)
    ratio = in_text / in_image
    return kept * ~(ratio < ratio.mean(1, keepdim=True))


def _without_peaks(weights: Tensor, part: Tensor) -> Tensor:
    """Return weights in which those of a part above its mean by a standard deviation are 0."""
    count = part.sum(-1, keepdim=True)
    inside = weights * part
    mean = inside.sum(-1, keepdim=True) / count
    variance = ((inside - mean).square() * part).sum(-1, keepdim=True) / (count - 1)
    return weights.masked_fill(part & (weights > mean + variance.sqrt()), 0)


def _entropy(weights: Tensor, part: Tensor, *, empty: float) -> Tensor:
    """Return the entropy of the weights of a part, `(B, H, q, 1)` in double; `empty` where they sum to 0.

    That of a single token is about `-TINY`, whose sign, and with it that of a ratio, single precision cannot tell.
    """
    inside = (weights * part).double()
    p = inside / inside.sum(-1, keepdim=True)
    return -(p * (p + TINY).log()).sum(-1, keepdim=True).nan_to_num(nan=-empty)


class TextEnhanced(ImageAttention):
    """A model whose final states are those of one layer's text-enhanced attention: the other branch of ONLY (arXiv 2507.00898).

    The attention of `layer` also runs with `text_enhanced_weights`. Its output `c` passes no further layer but the last,

        h = 0.2 x + norm_1(c),    h' = h + mlp(norm_2(h)),    logits = head(norm(h') + 0.5 norm(y))

    where `x` is the last layer's input, `y` its output, `norm_1`, `norm_2` and `mlp` its parts, as in the released code. The cache is
    that of the model.

    Args:
        model: a decoder-only transformers model whose layers are those of Llama: a norm before the attention, one before the MLP.
        prompt_length: number of columns of the prompts, padding included.
        layer: number of the layer, from 0. Default 0, as in the released scripts.
        token_id: the image token; None reads it from the configuration.

    Raises:
        ValueError: a layer out of range, or layers of another structure.

    Examples:
        >>> from contralto import testbed
        >>> TextEnhanced(testbed.load("vision-0"), prompt_length=20).description
        'the same model with text-enhanced attention of layer 0'
    """

    def __init__(self, model: Any, *, prompt_length: int, layer: int = 0, token_id: int | None = None) -> None:
        super().__init__(model, prompt_length=prompt_length, token_id=token_id)
        (self.layer,) = chosen_layers(self.model, [layer])
        self._last = layers_of(self.model)[-1]
        self._norm = self.model.get_submodule(_check_structure(self.model))
        self._output: Tensor | None = None
        self._residual: Tensor | None = None
        self.description = f"the same model with text-enhanced attention of layer {layer}"

    def changes(self) -> Mapping[int, Change]:
        """Return the layer whose attention runs twice."""
        return {self.layer: self._enhance}

    @contextmanager
    def context(self) -> Iterator[None]:
        """Replace the final states in this thread."""
        own = [
            self._last.register_forward_pre_hook(in_this_thread(self._keep_residual), with_kwargs=True),
            self._norm.register_forward_hook(in_this_thread(self._replace)),
        ]
        with super().context(), hooked(own):
            yield

    def _enhance(self, own: AttentionPass) -> Tensor:
        weights, image = own.weights(), self.image_keys(own)
        seen = own.scores[:, :1] > torch.finfo(own.scores.dtype).min / 2
        if self._marks.current is not None and self._marks.current.shape[1] > image.shape[1]:
            raise ValueError(f"layer {own.layer} has a sliding window: set another layer")
        first = torch.arange(seen.shape[-1], device=seen.device) == seen.int().argmax(-1, keepdim=True)
        is_image = image[:, None, None]
        enhanced = text_enhanced_weights(weights, seen & ~is_image & ~first, seen & is_image)
        output = (enhanced.to(own.values.dtype) @ own.values).transpose(1, 2).flatten(2)
        module: Any = own.module
        self._output = module.o_proj(output)
        return weights

    def _keep_residual(self, _module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._residual = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def _replace(self, norm: Any, _args: Any, output: Tensor) -> Tensor:
        """Return the states that the head reads in place of the normalised output of the last layer."""
        assert self._output is not None, "a layer has kept its output"
        assert self._residual is not None, "the last layer has kept its input"
        states = RESIDUAL * self._residual + self._last.input_layernorm(self._output)
        states = states + self._last.mlp(self._last.post_attention_layernorm(states))
        final: Tensor = (
            norm.forward(states) + HIDDEN * output
        )  # `forward`, since calling the module would run this hook
        return final


@torch.no_grad()
def _check_structure(model: Any) -> str:
    """Return the name of the final norm of a model, after a test that its last layer is one of Llama's."""
    last, path = layers_of(model)[-1], find_path(model)
    problem = ValueError(
        f"the layers of {type(model).__name__} are not those of Llama (a norm, attention, a norm, an MLP, each added to its input), "
        "and ONLY is defined for these alone"
    )
    if len(path.final) != 1 or not all(
        hasattr(last, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp")
    ):
        raise problem
    attention = attention_module(last, len(layers_of(model)) - 1)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[f"{name} input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[f"{name} output"] = output[0] if isinstance(output, tuple) else output

        return in_this_thread(hook)

    handles = [
        part.register_forward_hook(note(name), with_kwargs=True)
        for name, part in (("attention", attention), ("layer", last))
    ]
    with hooked(handles):
        model(input_ids=probe_ids(model), use_cache=False)
    states = seen["layer input"] + seen["attention output"]
    rest = last.mlp(last.post_attention_layernorm(states))
    same = isinstance(rest, Tensor) and torch.allclose(
        states + rest, seen["layer output"], rtol=TOLERANCE, atol=TOLERANCE
    )
    if not (same and hasattr(attention, "o_proj")) or not torch.allclose(
        last.input_layernorm(seen["layer input"]), seen["attention input"], rtol=TOLERANCE, atol=TOLERANCE
    ):
        raise problem
    return path.final[0]
