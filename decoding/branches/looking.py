"""Variants of a model that choose by its own attention which image tokens they see, as SID, AVISC and PAI do.

Each is written where a model of a branch is expected: `InputBranch(LeastAttended(model, prompt_length=T), inputs)`. The choice is a function
of the row up to the token that looks, so that logits do not depend on cache, batch or beams. The functions that choose are pure.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.head import find_layers
from contralto.common.head.hooks import hooked, in_this_thread
from contralto.common.placement import input_device
from contralto.common.ranges import check_share
from contralto.decoding.branches.attention import AttentionPass, Change, changed_attention, check_implementation
from contralto.decoding.branches.marks import TokenMarks, find_image_token
from contralto.decoding.branches.prompts import prepare_images
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.steering import chosen_layers, layers_of
from contralto.decoding.branches.variants import ModelVariant, inner_model

__all__ = [
    "AmplifiedImage",
    "ImageAttention",
    "LeastAttended",
    "ZeroedTokens",
    "least_attended",
    "not_blind",
    "prompt_attention",
]


class ImageAttention(ModelVariant):
    """A model whose attention is changed in some layers, by functions that know the image tokens of the prompts.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        prompt_length: number of columns of the prompts, padding included: image tokens are among them, and queries from the last one on
            are those that predict tokens.
        token_id: the image token; None reads it from the configuration.

    Raises:
        ValueError: no image token, no prompt, or attention that takes no float mask.
    """

    def __init__(self, model: Any, *, prompt_length: int, token_id: int | None = None) -> None:
        self.model = inner_model(model)
        check_implementation(self.model)
        if prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, not {prompt_length}")
        self.prompt_length = prompt_length
        token = find_image_token(self.model) if token_id is None else token_id
        self._marks = TokenMarks(token, prompt_length=prompt_length)

    @abstractmethod
    def changes(self) -> Mapping[int, Change]:
        """Return the functions that make attention weights, by number of a layer."""

    @contextmanager
    def context(self) -> Iterator[None]:
        """Change the attention in this thread."""
        with hooked(self._marks.hooks(self.model)), changed_attention(self.model, self.changes()):
            yield

    def image_keys(self, own: AttentionPass) -> Tensor:
        """Return which keys are image tokens, `(B, keys)` bool.

        Args:
            own: the attention of a layer.
        """
        rows, _, _, keys = own.scores.shape
        assert self._marks.current is not None, "the forward pass has begun"
        start = max(0, self._marks.current.shape[1] - keys)  # a sliding window holds the last keys alone
        return self._marks.of_keys(start, keys, rows=rows).to(own.scores.device)

    def predicting(self, own: AttentionPass) -> Tensor:
        """Return which queries predict a token, `(q,)` bool: the last one of the prompt, and those after it.

        Args:
            own: the attention of a layer.
        """
        columns = torch.arange(own.scores.shape[2], device=own.scores.device) + self._marks.past
        return columns >= self.prompt_length - 1


def least_attended(attention: Tensor, image: Tensor, *, keep: int) -> Tensor:
    """Return the image tokens that SID hides: all but those of the least attention (Huo et al. 2024, arXiv 2408.02032).

        hidden = image tokens without the `keep` tokens of the smallest a_j

    Args:
        attention: `(..., T)` attention of a query to the tokens, the mean over the heads.
        image: `(..., T)` bool, the image tokens.
        keep: number of image tokens that stay, at least 1.

    Returns:
        `(..., T)` bool.

    Raises:
        ValueError: `keep` below 1, or a row whose image tokens would all stay.

    Examples:
        >>> attention = torch.tensor([0.5, 0.1, 0.2, 0.05, 0.15])
        >>> least_attended(attention, torch.tensor([False, True, True, True, True]), keep=2).tolist()
        [False, False, True, False, True]
    """
    check_keep(keep)
    fewest = int(image.sum(-1).min())
    if fewest <= keep:
        raise ValueError(
            f"keep={keep} image tokens would stay, and a prompt has {fewest}: nothing would be hidden; set keep below that"
        )
    least = attention.masked_fill(~image, torch.inf).topk(keep, dim=-1, largest=False).indices
    kept = torch.zeros_like(image.expand(attention.shape)).scatter(-1, least, torch.ones_like(least, dtype=torch.bool))
    return image & ~kept


def check_keep(keep: int) -> int:
    """Return the number of image tokens that stay, or raise ValueError for a number below 1.

    Args:
        keep: the number.
    """
    if keep < 1 or keep != int(keep):
        raise ValueError(f"keep must be a whole number of at least 1, not {keep}")
    return keep


class LeastAttended(ImageAttention):
    r"""A model that sees, from a layer on, only the image tokens to which it attends least: the contrast branch of SID (arXiv 2408.02032).

    The layer before `start_layer` looks at the whole image. Its attention at a query, the mean over its heads, chooses the `keep`
    image tokens of the least attention; the others are hidden from this query in all layers from `start_layer` on. Every generated
    token chooses anew, as in the released code ("context and text-aware token selection"); the tokens of the prompt see what its last
    token has chosen. A query that would see no token at all, such as an image at the very beginning, sees what it saw.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        prompt_length: number of columns of the prompts, padding included.
        start_layer: number of the first layer that hides tokens, from 1. Default 2, as in the released code.
        keep: number of image tokens that stay. Default 100, as in the released code, of the 576 of LLaVA-1.5.
        token_id: the image token; None reads it from the configuration.

    Raises:
        ValueError: a layer or a number out of range; when called, a prompt of no more image tokens than stay, or one whose image the
            choosing layer does not see.

    Examples:
        >>> from contralto import testbed
        >>> model = testbed.load("vision-0")
        >>> LeastAttended(model, prompt_length=20, start_layer=1, keep=4).description
        'the same model, which sees 4 image tokens from layer 1 on'
    """

    def __init__(
        self, model: Any, *, prompt_length: int, start_layer: int = 2, keep: int = 100, token_id: int | None = None
    ) -> None:
        super().__init__(model, prompt_length=prompt_length, token_id=token_id)
        self.layers = layers_from(self.model, start_layer, least=1)
        self.keep = check_keep(keep)
        self._hidden: Tensor | None = None  # (B, q, columns) of the current forward pass
        self.description = f"the same model, which sees {keep} image tokens from layer {start_layer} on"

    def changes(self) -> Mapping[int, Change]:
        """Return the layer that chooses, and those that hide."""
        return {self.layers[0] - 1: self._choose, **dict.fromkeys(self.layers, self._hide)}

    def _choose(self, own: AttentionPass) -> Tensor:
        weights, image, predicting = own.weights(), self.image_keys(own), self.predicting(own)
        first = int((~predicting).sum())  # queries before the last token of the prompt
        attention = weights.mean(1)[:, first:]
        seen = (own.scores[:, 0, first:] > torch.finfo(own.scores.dtype).min / 2) | ~image[:, None]
        if not seen.all() or (self._marks.current is not None and self._marks.current.shape[1] > image.shape[1]):
            raise ValueError(
                f"layer {own.layer} has a sliding window that does not reach the image, and cannot choose image tokens: set another "
                "start_layer"
            )
        hidden = least_attended(attention, image[:, None].expand(attention.shape), keep=self.keep)
        self._hidden = torch.cat([hidden[:, :1].expand(-1, first, -1), hidden], dim=1)
        return weights

    def _hide(self, own: AttentionPass) -> Tensor:
        assert self._hidden is not None, "an earlier layer has chosen"
        hidden = self._hidden[:, :, -own.scores.shape[-1] :].to(own.scores.device)
        low = torch.finfo(own.scores.dtype).min
        scores = own.scores.masked_fill(hidden[:, None], low)
        blank = (scores <= low / 2).all(-1, keepdim=True)
        return own.weights(torch.where(blank, own.scores, scores))


class AmplifiedImage(ImageAttention):
    r"""A model that attends to the image more while it predicts: the inference intervention of PAI (Liu et al. 2024, arXiv 2407.21771).

        w'_j = w_j + alpha |w_j|    for the score w_j of every image token j, in all layers from `start_layer` on

    at the last token of the prompt and at every generated token, before the softmax.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        prompt_length: number of columns of the prompts, padding included.
        alpha: strength, at least 0; 0 is the model.
        start_layer: number of the first layer that is changed, from 0. Default 2, as in the released code.
        token_id: the image token; None reads it from the configuration.

    Raises:
        ValueError: `alpha` or a layer out of range.

    Examples:
        >>> from contralto import testbed
        >>> AmplifiedImage(testbed.load("vision-0"), prompt_length=20, alpha=0.5, start_layer=1).description
        'the same model with its attention to the image amplified by 0.5 from layer 1 on'
    """

    def __init__(
        self,
        model: Any,
        *,
        prompt_length: int,
        alpha: float = 0.2,
        start_layer: int = 2,
        token_id: int | None = None,
    ) -> None:
        super().__init__(model, prompt_length=prompt_length, token_id=token_id)
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number of at least 0, not {alpha}")
        self.alpha, self.layers = float(alpha), layers_from(self.model, start_layer, least=0)
        self.description = (
            f"the same model with its attention to the image amplified by {alpha:g} from layer {start_layer} on"
        )

    def changes(self) -> Mapping[int, Change]:
        """Return the layers that are changed."""
        return dict.fromkeys(self.layers, self._amplify)

    def _amplify(self, own: AttentionPass) -> Tensor:
        scores = own.scores
        chosen = self.image_keys(own)[:, None, None] & self.predicting(own)[:, None]
        chosen = chosen & (scores > torch.finfo(scores.dtype).min / 2)
        return own.weights(torch.where(chosen, scores + self.alpha * scores.abs(), scores))


def layers_from(model: Any, start: int, *, least: int) -> list[int]:
    """Return the numbers of the layers from one on.

    Args:
        model: a decoder-only transformers model.
        start: the first one.
        least: the smallest number that is valid.

    Raises:
        ValueError: the model has no such layer.
    """
    depth = find_layers(model).depth
    if start != int(start) or not least <= start < depth:
        raise ValueError(
            f"start_layer must be a number from {least} to {depth - 1} in this model of {depth} layers, not {start}"
        )
    return list(range(int(start), depth))


def not_blind(attention: Tensor, image: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return the image tokens that AVISC zeroes: all but its "blind" tokens (Woo et al. 2024, arXiv 2405.17820).

    Layers with the largest share of attention to the image are taken until their shares sum to `gamma`. A token is blind, that is,
    attended to whatever is asked, if its attention in these layers is at least `mean + lam * std` of the image tokens':

        zeroed = { j : a_j < mean(a) + lam * std(a) },      a_j = mean over the layers of a_j

    Args:
        attention: `(L, B, T)` attention of the prompts' last tokens by layer, the mean over the heads.
        image: `(B, T)` bool, the image tokens.
        gamma: share of the attention to the image by which layers are chosen, in (0, 1]. 0.5 in the released scripts.
        lam: standard deviations above the mean from which a token is blind. 1 in the released scripts.

    Returns:
        `(B, T)` bool.

    Raises:
        ValueError: `gamma` out of range, or a prompt with fewer than 2 image tokens, which have no deviation.

    Examples:
        >>> attention = torch.tensor([[[0.1, 0.1, 0.1, 0.6]], [[0.02, 0.02, 0.02, 0.02]]])
        >>> not_blind(attention, torch.ones(1, 4, dtype=torch.bool), gamma=0.5, lam=1.0).tolist()
        [[True, True, True, False]]
    """
    check_share("gamma", gamma)
    if int(image.sum(-1).min()) < 2:
        raise ValueError(f"a prompt has {int(image.sum(-1).min())} image tokens, and blind tokens are those of several")
    shown = attention.double() * image
    shares = shown.sum(-1) / shown.sum(-1).sum(0)  # (L, B)
    ranked, order = shares.sort(dim=0, descending=True, stable=True)
    count = ((ranked.cumsum(0) < gamma).sum(0) + 1).clamp(max=len(attention))  # (B,)
    chosen = order.argsort(0) < count  # (L, B)
    mean_attention = (shown * chosen[..., None]).sum(0) / count[:, None]
    number = image.sum(-1, keepdim=True)
    mean = mean_attention.sum(-1, keepdim=True) / number
    variance = ((mean_attention - mean).square() * image).sum(-1, keepdim=True) / (number - 1)
    return image & (mean_attention < mean + lam * variance.sqrt())


@torch.no_grad()
def prompt_attention(model: Any, inputs: Mapping[str, Any], *, layers: Sequence[int] | None = None) -> Tensor:
    """Return the attention of the prompts' last tokens, the mean over the heads, from one forward pass.

    Args:
        model: a decoder-only transformers model, whose attention is `eager` or `sdpa`.
        inputs: prompts as a processor returns them, padded on the left, with their images.
        layers: numbers of layers, from 0; None for all.

    Returns:
        `(L, B, T)` in float32 or float64; 0 for tokens outside a sliding window.

    Raises:
        ValueError: layers out of range, or attention that takes no float mask.

    Examples:
        >>> from contralto import testbed
        >>> prompt = testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> prompt_attention(testbed.load("expert"), prompt).sum(-1).round(decimals=3).flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    model, ids = inner_model(model), inputs["input_ids"]
    found: dict[int, Tensor] = {}

    def keep(own: AttentionPass) -> Tensor:
        weights = own.weights()
        last = weights[:, :, -1].to(torch.promote_types(weights.dtype, torch.float32)).mean(1)
        found[own.layer] = pad(last, (ids.shape[1] - last.shape[-1], 0))
        return weights

    chosen = chosen_layers(model, layers)
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    with changed_attention(model, dict.fromkeys(chosen, keep)):
        CachedReader(model).prefill(prepare_images(model, ids.to(input_device(model)), given, len(ids)))
    return torch.stack([found[layer] for layer in chosen])


class ZeroedTokens(ModelVariant):
    """A model for which some tokens of the prompts are zeros: what it reads in their place before its first layer.

    With `not_blind(prompt_attention(model, inputs), ...)` it is the contrast branch of AVISC (arXiv 2405.17820), whose released scripts
    zero the embeddings of image tokens; they keep their positions, and are attended to.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        tokens: `(prompts, T)` bool, the tokens of the prompts, before they are expanded to beams.

    Raises:
        ValueError: when called, tokens of other prompts, or a cache that the variant has not filled.

    Examples:
        >>> from contralto import testbed
        >>> model, ids = testbed.load("expert"), torch.tensor([[5, 6, 7]])
        >>> variant = ZeroedTokens(model, torch.tensor([[False, True, False]]))
        >>> with torch.no_grad(), variant.context():
        ...     one, other = (model(row).logits for row in (ids, torch.tensor([[5, 9, 7]])))
        >>> torch.equal(one, other)
        True
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = inner_model(model)
        self._marks = TokenMarks(-1, tokens=tokens)
        self._first = layers_of(self.model)[0]
        self.description = f"the same model with {int(tokens.sum())} tokens zeroed"

    @contextmanager
    def context(self) -> Iterator[None]:
        """Zero the tokens in this thread."""
        zero = self._first.register_forward_pre_hook(in_this_thread(self._zero), with_kwargs=True)
        with hooked([*self._marks.hooks(self.model), zero]):
            yield

    def _zero(self, _module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        marked = self._marks.of_keys(self._marks.past, states.shape[1], rows=len(states)).to(states.device)
        blank = states.masked_fill(marked[..., None], 0)
        return (
            ((blank, *args[1:]), kwargs)
            if "hidden_states" not in kwargs
            else (args, {**kwargs, "hidden_states": blank})
        )
