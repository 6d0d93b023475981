"""The curriculum of DistiLLM-2: the skew of the divergences, and the weight of the student's own completions.

Ko et al. 2025 (arXiv 2503.07067), algorithm 1. The released code (jongwooko/distillm-2, `src/distillm_trainer.py`) has both parts
switched off, and the path for alpha does not work when switched on. Here both work, and three settings are presets: `PAPER`; `RELEASED`,
the loss of the released code; `RELEASED_GRADUAL`, that with its switch `gradual_beta` on.

In the paper's formula beta reaches 1 early: with 2, 3 or 5 epochs the teacher's completions have no weight in 50, 67 or 60 % of the steps.
`Curriculum.idle` computes this share, and `beta_max` keeps them in the loss.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PAPER", "RELEASED", "RELEASED_GRADUAL", "Curriculum", "Weights"]


class Weights(NamedTuple):
    """`loss = skew_kl * SKL(teacher's completion) + skew_reverse_kl * SRKL(student's completion)`."""

    skew_kl: float
    skew_reverse_kl: float


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The schedules of alpha and beta.

        loss  = 1/2 [(1 - beta) SKL_alpha(y_t) + beta SRKL_alpha(y_s)]                         (equation 2)
        beta  = clip(e / E + tau / T, beta_0, beta_max)                                        (beta_max is 1 in the paper)
              = beta_0 + (beta_max - beta_0) min(1, tau / (ramp T))                            with a ramp
        alpha = clip(1 - (1 - alpha_0) m / (p(y) - q(y)), low, high),    m the mean of p(y) - q(y) over the batch

    with p the teacher, q the student, y_t a completion by the teacher, y_s one by the student, e of E epochs, tau of T steps.
    To first order `log(p / m_alpha)` is `(1 - alpha) (p - q)`: alpha keeps that product the same for all completions, so easy ones
    are skewed little and hard ones more.

    Args:
        alpha_0: the skew if it does not adapt, and that of a completion whose gap is the mean of the batch.
        low: the least alpha.
        high: the greatest alpha.
        beta_0: the least beta; 0.5 gives both completions the same weight.
        beta_max: the greatest beta; at 1 the teacher's completions have no weight.
        ramp: share of the steps over which beta grows linearly from beta_0 to beta_max, in (0, 1]; None takes the paper's
            e / E + tau / T.
        adaptive_alpha: alpha adapts, from the second epoch on; else it is alpha_0.
        gradual_beta: beta grows; else it is beta_0.
        factor: the factor of the loss: 1/2 in the paper.

    Raises:
        ValueError: a parameter is out of range.

    Examples:
        >>> PAPER.beta(epoch=3, epochs=3, step=0, steps=300)
        1.0
        >>> RELEASED.weights(epoch=3, epochs=3, step=0, steps=300)
        Weights(skew_kl=1.0, skew_reverse_kl=1.0)
        >>> RELEASED_GRADUAL.weights(epoch=1, epochs=1, step=75, steps=300)
        Weights(skew_kl=0.75, skew_reverse_kl=1.25)
    """

    alpha_0: float = 0.1
    low: float = 0.01
    high: float = 0.1
    beta_0: float = 0.5
    beta_max: float = 1.0
    ramp: float | None = None
    adaptive_alpha: bool = True
    gradual_beta: bool = True
    factor: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low and high must be ordered and lie in [0, 1), not {self.low} and {self.high}")
        if not self.low <= self.alpha_0 <= self.high:
            raise ValueError(f"alpha_0 must lie between low and high, {self.low} and {self.high}, not {self.alpha_0}")
        if not 0 <= self.beta_0 <= 1:
            raise ValueError(f"beta_0 must lie in [0, 1] (the least weight of own completions), not {self.beta_0}")
        if not self.beta_0 <= self.beta_max <= 1:
            raise ValueError(f"beta_max must lie between beta_0, {self.beta_0}, and 1, not {self.beta_max}")
        if self.ramp is not None and not 0 < self.ramp <= 1:
            raise ValueError(f"ramp must lie in (0, 1] (a share of the steps), not {self.ramp}")
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, not {self.factor}")

    def beta(self, *, epoch: int, epochs: int, step: int, steps: int) -> float:
        """Return beta, the weight of the student's completions.

        The paper does not say what T counts. With the steps of all epochs, as here, beta never falls; with those of one
        epoch it would fall back at every epoch's end.

        Args:
            epoch: e, from 1, as in algorithm 1.
            epochs: E.
            step: tau, from 0, counted over all epochs.
            steps: T, of all epochs.

        Raises:
            ValueError: the epoch lies outside 1 to `epochs`, or the step outside 0 to `steps`.
        """
        if not 1 <= epoch <= epochs:
            raise ValueError(f"epoch must lie in 1 to {epochs}, not {epoch}")
        if not 0 <= step <= steps or not steps:
            raise ValueError(f"step must lie in 0 to {steps} (the steps of all epochs), not {step}")
        if not self.gradual_beta:
            return self.beta_0
        if self.ramp is not None:
            return self.beta_0 + (self.beta_max - self.beta_0) * min(1.0, step / (self.ramp * steps))
        return min(max(epoch / epochs + step / steps, self.beta_0), self.beta_max)

    def weights(self, *, epoch: int, epochs: int, step: int, steps: int) -> Weights:
        """Return the weights of the two divergences.

        Args:
            epoch: see `beta`.
            epochs: see `beta`.
            step: see `beta`.
            steps: see `beta`.

        Raises:
            ValueError: see `beta`.
        """
        beta = self.beta(epoch=epoch, epochs=epochs, step=step, steps=steps)
        return Weights(self.factor * (1 - beta), self.factor * beta)

    def idle(self, epochs: int) -> Weights:
        """Return the share of the steps in which each divergence has no weight.

        Args:
            epochs: E.

        Returns:
            Two shares in [0, 1], for the completions of the teacher and of the student.

        Examples:
            >>> [round(PAPER.idle(epochs).skew_kl, 2) for epochs in (2, 3, 5)]
            [0.5, 0.67, 0.6]
            >>> Curriculum(beta_max=0.75).idle(3)
            Weights(skew_kl=0.0, skew_reverse_kl=0.0)
        """
        steps = 100 * epochs
        moments = ({"epoch": i // 100 + 1, "epochs": epochs, "step": i, "steps": steps} for i in range(steps))
        without = [[weight == 0 for weight in self.weights(**moment)] for moment in moments]
        return Weights(*(sum(side) / steps for side in zip(*without, strict=True)))

    @torch.no_grad()
    def alpha(
        self, own_logps: Tensor, other_logps: Tensor, *, epoch: int, mean_gap: Tensor | float | None = None
    ) -> Tensor:
        """Return the skew of every completion of a batch.

        The gap of a completion is its probability under the model that generated it minus that under the other model: p - q for the
        teacher's completions, q - p for the student's. The probability of a completion is the geometric mean of its tokens', as in the
        released code: the product over a long completion is 0 in any precision. Where the other model gives a completion a higher
        probability than its author, and the mean gap is positive, the formula gives more than 1, and so `high`.

        Args:
            own_logps: `(B,)` mean log-probability per token under the model that generated the completions.
            other_logps: `(B,)` mean log-probability per token under the other model.
            epoch: from 1. In the first epoch alpha is alpha_0.
            mean_gap: m; None takes the mean over this batch. In a batch of one completion the gap is its own mean and alpha is
                alpha_0, so pass the mean over the whole step if a step has several batches or processes.

        Returns:
            `(B,)` alpha.

        Raises:
            ValueError: the shapes differ.

        Examples:
            >>> p, q = torch.tensor([0.30, 0.32, 0.34]), torch.tensor([0.20, 0.20, 0.20])
            >>> PAPER.alpha(p.log(), q.log(), epoch=2)  # gaps 0.10, 0.12, 0.14 of mean 0.12
            tensor([0.0100, 0.1000, 0.1000])
        """
        if own_logps.shape != other_logps.shape:
            raise ValueError(f"the models' texts differ in shape: {tuple(own_logps.shape)}, {tuple(other_logps.shape)}")
        if not self.adaptive_alpha or epoch == 1:
            return torch.full_like(own_logps, self.alpha_0)
        gap = own_logps.exp() - other_logps.exp()
        ratio = (gap.mean() if mean_gap is None else mean_gap) / gap
        # 0 / 0: all completions are equally likely under both models, and none is harder than another
        return (1 - (1 - self.alpha_0) * ratio).nan_to_num(nan=self.alpha_0).clamp(self.low, self.high)


PAPER = Curriculum()
"""Algorithm 1 of the paper."""

RELEASED = Curriculum(adaptive_alpha=False, gradual_beta=False, factor=2.0)
"""The loss of the released code, whatever its options: SKL + SRKL, alpha 0.1."""

RELEASED_GRADUAL = Curriculum(adaptive_alpha=False, beta_max=0.75, ramp=0.5, factor=2.0)
"""The loss of the released code with `gradual_beta` on: (2 - b) SKL + b SRKL, b growing from 1 to 1.5 over half of the steps."""
