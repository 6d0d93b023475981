"""The token masks of SparsePO: the weight of each token of a completion (Christopoulou et al. 2024, arXiv 2410.05102).

Three kinds: ones, with which SparsePO is TDPO (`completion_mask` itself serves as such); `mapo`, from the reference model's
activations; and `LearnedMask`, a small network on the reference's hidden states. All are `(B, T)`, where the entry of position t belongs
to the token that the model predicts there: activations and hidden states of position t, like its logits, are about token t + 1.
The last position predicts nothing: if the mask of valid tokens is one shorter than the sequence, it is left out.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Activations", "Density", "DensityMonitor", "LearnedMask", "Masks", "density", "mapo", "record"]

Kind = Literal["attention", "mlp", "residual"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "residual")
Activations = dict[str, list[Tensor]]
"""By kind: for each hooked module `(B, T)` float32, the mean of the activation over its features."""

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_ROUTER = re.compile(r"(^|[._])(gate|router)$")


@contextmanager
def record(model: nn.Module, *, kinds: Sequence[Kind] = KINDS) -> Iterator[Activations]:
    """Record the activations of every forward pass within the context, for `mapo`.

    Works on any decoder of transformers, wrapped by PEFT or not, by hooks:

        attention   outputs of every projection but the last, and inputs of the last: queries, keys, values, mixed values
        mlp         inputs of the MLP's last projection: the features after the non-linearity
        residual    outputs of every layer

    Only means over features are kept, one number per token and hook. Modules without a vector per token (experts that get
    some of the tokens) are skipped. The official code needs its own model files, and hooks a few more modules around the norms.

    Args:
        model: the model, to be run within the context: `model(input_ids=..., attention_mask=...)`.
        kinds: some of `KINDS`.

    Yields:
        The activations by kind, filled by the forward pass; a second forward pass within the context starts over.

    Raises:
        ValueError: a kind is unknown, or no decoder layers are found in the model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5, bos_token_id=0, eos_token_id=0))
        >>> with torch.no_grad(), record(model) as activations:
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> {kind: [tuple(place.shape) for place in places] for kind, places in sorted(activations.items())}
        {'attention': [(1, 3), (1, 3), (1, 3), (1, 3)], 'mlp': [(1, 3), (1, 3)], 'residual': [(1, 3), (1, 3)]}
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, not {', '.join(unknown)}")
    recorder, layers = _Recorder(), _layers(model)
    handles = [layers[0].register_forward_pre_hook(recorder.start, with_kwargs=True)]
    for layer in layers:
        handles += [hook for kind in kinds for hook in recorder.hooks(layer, kind)]
    try:
        yield recorder.activations
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model: its longest list of modules that contain projections."""
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    lists: list[Any] = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and m and _projections(m[0])]
    if not lists:
        raise ValueError(
            f"no decoder layers found in {type(model).__name__}: it has no list of modules with projections"
        )
    longest: list[nn.Module] = max(lists, key=len)
    return list(longest)


def _projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a weight matrix by name, except routers; an adapter around a projection counts as that projection."""
    projections: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        inside = any(name.startswith(f"{outer}.") for outer in projections)
        if name and is_matrix and not inside and not _ROUTER.search(name):
            projections[name] = module
    return projections


class _Recorder:
    """The store of the hooks."""

    def __init__(self) -> None:
        self.activations: Activations = {}
        self.shape = torch.Size()

    def start(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Clear the store, and keep the numbers of rows and tokens of the new forward pass."""
        self.activations.clear()
        self.shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def keep(self, kind: Kind, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if value.shape[:-1] in (self.shape, (self.shape.numel(),)):  # some layers flatten rows and tokens
            mean = value.detach().mean(-1, dtype=torch.float32).view(self.shape)
            self.activations.setdefault(kind, []).append(mean)

    def hooks(self, layer: nn.Module, kind: Kind) -> list[Any]:
        if kind == "residual":
            return [layer.register_forward_hook(lambda module, args, output: self.keep(kind, output))]
        is_attention = kind == "attention"
        chosen = [m for name, m in _projections(layer).items() if bool(_ATTENTION.search(name)) == is_attention]
        hooks: list[Any] = [
            m.register_forward_pre_hook(lambda module, args: self.keep(kind, args[0])) for m in chosen[-1:]
        ]
        if is_attention:
            hooks += [m.register_forward_hook(lambda module, args, out: self.keep(kind, out)) for m in chosen[:-1]]
        return hooks


def mapo(activations: Activations, valid: Tensor) -> Tensor:
    """Return the fixed mask of SparsePO's MaPO: the reference's activations, scaled to [0, 1] over the tokens of each completion.

        a_t = mean_features activation_t;    m_t = (a_t - min a) / (max a - min a);    mean over modules, then over kinds

    The official code standardises before it scales, which changes nothing: scaling to [0, 1] undoes any shift and any positive
    factor. Where all tokens have the same activation (a completion of one token) the official code divides by 0; here the mask is 1.

    Args:
        activations: activations from `record`, `(B, T)` each.
        valid: `(B, T)` or `(B, T - 1)`, true at positions that predict a token of the completion.

    Returns:
        float32 in [0, 1] of the shape of `valid`, 0 where not valid; no gradient.

    Raises:
        ValueError: nothing was recorded, or the shapes do not match.

    Examples:
        >>> seen = {"residual": [torch.tensor([[3.0, 5.0, 4.0, 9.0]])]}
        >>> mapo(seen, torch.tensor([[True, True, True, False]]))
        tensor([[0.0000, 1.0000, 0.5000, 0.0000]])
    """
    if not activations:
        raise ValueError("nothing was recorded: run the model within record()")
    by_kind = [[_rescaled(_fit(place, valid), valid) for place in places] for places in activations.values()]
    return torch.stack([torch.stack(places).mean(0) for places in by_kind]).mean(0)


def _fit(values: Tensor, valid: Tensor) -> Tensor:
    """Return values `(B, T, ...)` at the positions of `valid`, which may lack the last one."""
    rows, width = valid.shape
    if values.shape[:2] not in ((rows, width), (rows, width + 1)):
        shapes = f"{tuple(values.shape[:2])} and {tuple(valid.shape)}"
        raise ValueError(f"the reference's states and the mask of valid tokens do not fit: they are of shape {shapes}")
    return values[:, :width]


def _rescaled(activation: Tensor, valid: Tensor) -> Tensor:
    """Rescale to [0, 1] over the valid tokens of each row."""
    valid = valid.bool()
    low = activation.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    span = activation.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
    scaled = torch.where(span > 0, (activation - low) / span, 1.0)
    return torch.where(valid, scaled, 0.0)


class Masks(NamedTuple):
    """The masks of SparsePO, `(B, T)`, at least 0. A common mask is one tensor twice."""

    reward: Tensor
    """m_u, on the log-ratios."""
    kl: Tensor
    """m_d, on the divergence."""


class LearnedMask(nn.Module):
    """The learned masks of SparsePO, from the reference's hidden states.

        m_t = ReLU(sum_l v_l ReLU(w_l LayerNorm(h_t^l) + b_l))

    as in the official code, except for the initialisation. There w and v are random, so that a mask is 0 on every token in 8 to 31 % of
    seeds; then neither policy nor mask has a gradient, and the loss stays log 2. Here w is 0, b is 1, v is 1 / L: every
    mask starts as ones, that is as TDPO, and every layer has a gradient. A mask can still die later, under a large L1 penalty: watch
    `density`. Because the mask starts at 1 and not near 0.1, beta should be that of TDPO, not the paper's 0.8.

    Args:
        layers: L, the number of hidden states.
        hidden_size: the width of the hidden states.
        independent: use two networks, for `m_u` and `m_d`; else one mask for both.
        dropout: dropout on each layer's score and on the mask; 0.01 in the official configurations. It rescales the tokens that it keeps.

    Raises:
        ValueError: there are no layers, or `dropout` lies outside [0, 1).

    Examples:
        >>> mask = LearnedMask(2, 4)
        >>> mask([torch.randn(1, 3, 4), torch.randn(1, 3, 4)], torch.tensor([[True, True, False]])).reward.tolist()
        [[1.0, 1.0, 0.0]]
    """

    def __init__(self, layers: int, hidden_size: int, *, independent: bool = False, dropout: float = 0.0) -> None:
        if layers < 1 or hidden_size < 1:
            raise ValueError(f"a learned mask needs at least one layer and feature, not {layers} and {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        super().__init__()
        self.layers = layers
        self.networks = nn.ModuleList(_MaskNetwork(layers, hidden_size, dropout) for _ in range(1 + independent))

    def forward(self, hidden_states: Sequence[Tensor], valid: Tensor) -> Masks:
        """Compute the weight of every token from the hidden states of the reference.

        Args:
            hidden_states: L tensors `(B, T, H)` of the reference, without the embeddings: `outputs.hidden_states[1:]`. They are
                detached.
            valid: `(B, T)` or `(B, T - 1)`, true at positions that predict a token of the completion.

        Raises:
            ValueError: the number of layers or the shapes do not match.
        """
        if len(hidden_states) != self.layers:
            raise ValueError(f"the mask was made for {self.layers} layers of hidden states, not {len(hidden_states)}")
        states = [_fit(states, valid).detach() for states in hidden_states]
        masks = [network(states) * valid for network in self.networks]
        return Masks(masks[0], masks[-1])


class _MaskNetwork(nn.Module):
    def __init__(self, layers: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.weight = nn.Parameter(torch.zeros(layers, hidden_size))
        self.bias = nn.Parameter(torch.ones(layers))
        self.mixer = nn.Parameter(torch.full((layers,), 1 / layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        dtype = self.weight.dtype
        scores = [self.norm(h.to(dtype)) @ w + b for h, w, b in zip(hidden_states, self.weight, self.bias, strict=True)]
        mixed = sum(v * self.dropout(score.relu()) for v, score in zip(self.mixer, scores, strict=True))
        mask: Tensor = self.dropout(torch.as_tensor(mixed).relu())
        return mask


class Density(NamedTuple):
    """The density of a mask."""

    share: float
    """The share of valid tokens with a mask above 0."""
    mean: float
    """The mean of the mask over the valid tokens: in effect, the factor of beta."""


def density(mask: Tensor, valid: Tensor) -> Density:
    """Return the density of a mask over the valid tokens of a batch.

    Args:
        mask: `(B, T)`.
        valid: `(B, T)`, true at the tokens of the completion.

    Examples:
        >>> density(torch.tensor([[0.5, 0.0, 7.0]]), torch.tensor([[True, True, False]]))
        Density(share=0.5, mean=0.25)
    """
    values = mask.detach()[valid.bool()].float()
    return Density((values > 0).float().mean().item(), values.mean().item())


class DensityMonitor:
    """The monitor of masks in training: metrics to log, and a warning when a mask becomes 0 almost everywhere.

    Args:
        floor: the share of tokens above 0 below which there is a warning.

    Raises:
        ValueError: `floor` lies outside [0, 1].

    Examples:
        >>> ones = torch.ones(1, 2)
        >>> DensityMonitor()(Masks(ones, ones), ones)
        {'mask/share': 1.0, 'mask/mean': 1.0}
    """

    def __init__(self, *, floor: float = 0.05) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must lie in [0, 1] (a share of tokens), not {floor}")
        self.floor = floor
        self._warned: set[str] = set()

    def __call__(self, masks: Masks, valid: Tensor) -> dict[str, float]:
        """Return the densities by name, `mask/...` for a common mask, `mask_u/...` and `mask_d/...` for two. Warn once per mask.

        Args:
            masks: the masks of a batch.
            valid: `(B, T)`, true at the tokens of the completions.
        """
        named = {"mask": masks.reward} if masks.reward is masks.kl else {"mask_u": masks.reward, "mask_d": masks.kl}
        densities = {name: density(mask, valid) for name, mask in named.items()}
        for name, each in densities.items():
            self._warn_once(name, each)
        return {f"{name}/{key}": value for name, each in densities.items() for key, value in each._asdict().items()}

    def _warn_once(self, name: str, density: Density) -> None:
        if density.share < self.floor and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"SparsePO's {name} is 0 on {1 - density.share:.1%} of the tokens, which teach the policy nothing; "
                "lower its L1 weight (lambda_u, lambda_d) or the learning rate of the mask",
                stacklevel=3,
            )
