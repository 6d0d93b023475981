"""The token masks of SparsePO: the weight of each token of a completion (Christopoulou et al. 2024, arXiv 2410.05102).

Three kinds: ones, with which SparsePO is TDPO (`completion_mask` itself serves as such); `mapo`, from the reference model's
activations; and `LearnedMask`, a small network on the reference's hidden states. All are `(B, T)`, where the entry of position t belongs
to the token that the model predicts there: activations and hidden states of position t, like its logits, are about token t + 1.
The last position predicts nothing: if the mask of valid tokens is one shorter than the sequence, it is left out.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from contralto.align.losses.activations import Activations

__all__ = ["Density", "DensityMonitor", "LearnedMask", "Masks", "density", "mapo"]


def mapo(activations: Activations, valid: Tensor) -> Tensor:
    """Return the fixed mask of SparsePO's MaPO: the reference's activations, scaled to [0, 1] over the tokens of each completion.

        a_t = mean_features activation_t;    m_t = (a_t - min a) / (max a - min a);    mean over modules, then over kinds

    The official code standardises before it scales, which changes nothing: scaling to [0, 1] undoes any shift and any positive
    factor. Where all tokens have the same activation (a completion of one token) the official code divides by 0; here the mask is 1.

    Args:
        activations: activations from `contralto.align.losses.activations.record`, `(B, T)` each.
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
        """Return the mask `(B, T)` of the hidden states `(B, T, H)` of each layer."""
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
