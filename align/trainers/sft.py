"""Two losses on tokens for supervised fine-tuning: SimCTG's contrast between tokens, and CAL's weights by the effect of an image.

`SimCTGTrainer` and `CALTrainer` are TRL's `SFTTrainer` with another loss; data, collators, PEFT, metrics and saving are TRL's. They rely on
`SFTTrainer.compute_loss` (TRL 1.16) calling the model with `fused_lm_head` and reading `log_probs` of the result.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, relu
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from contralto.align.cards.methods import CardMethod, describe_function
from contralto.align.cards.mixin import CardMixin
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.chunked import Head
from contralto.align.trainers.batches import IGNORED
from contralto.align.trainers.config import apply_machine_defaults, option, require_config, with_own_peft_config
from contralto.align.trainers.scoring import Scoring, install_head
from contralto.align.trainers.settings import RecipeOptions, records_settings
from contralto.align.trainers.sharding import has_head_in_shards
from contralto.align.trl_compat import gathered, record_metrics
from contralto.common.head import head_of

__all__ = ["CALConfig", "CALTrainer", "SimCTGConfig", "SimCTGTrainer", "contrastive_loss", "image_weights", "isotropy"]


# ------------------------------------------------------------------------------------------------------------ the losses


def contrastive_loss(states: Tensor, mask: Tensor, *, rho: float = 0.5) -> Tensor:
    """Return SimCTG's contrastive loss (Su et al. 2022, arXiv 2202.06417, equation 2).

        L_CL = 1 / (|x| (|x| - 1)) sum_i sum_{j != i} max(0, rho - s(h_i, h_i) + s(h_i, h_j))

    `s` is the cosine, `h` the last hidden state. The loss pushes the tokens of a sequence apart, which contrastive search needs. The
    official code divides by the pairs of the whole batch, so that long sequences count for more; here every sequence counts alike, as in
    the equation.

    Args:
        states: `(B, T, H)`. Time and memory grow with `T` squared.
        mask: `(B, T)`, true for the tokens of x.
        rho: the margin, in [0, 2].

    Returns:
        `(B,)`, at least float32, 0 for a sequence of fewer than two tokens.

    Raises:
        ValueError: `rho` is out of range, or the mask has another shape.

    Examples:
        >>> states = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> contrastive_loss(states, torch.ones(1, 3))  # of 6 pairs, 2 are alike: 2 * rho / 6
        tensor([0.1667])
    """
    if not 0 <= rho <= 2:
        raise ValueError(f"rho must lie in [0, 2] (the margin between cosines), not {rho}")
    cosines, others = _cosines(states, mask)
    lost = relu(rho - 1 + cosines).masked_fill(~others, 0)
    return lost.sum((1, 2)) / others.sum((1, 2)).clamp(min=1)


def isotropy(states: Tensor, mask: Tensor) -> Tensor:
    """Return how far the tokens of a text point apart (Su & Collier 2023, arXiv 2210.14140, section 3.1).

        isotropy = 1 - 1 / (|x| (|x| - 1)) sum_i sum_{j != i} s(h_i, h_j)

    It is 1 less the mean of the cosines `s` of its last hidden states, and `contrastive_loss` at `rho = 1` unless a cosine is negative.
    Contrastive search needs a high one, which most models have as they are.

    Args:
        states: `(B, T, H)`. Time and memory grow with `T` squared.
        mask: `(B, T)`, true for the tokens of x.

    Returns:
        `(B,)`, at least float32, NaN for a sequence of fewer than two tokens.

    Raises:
        ValueError: the mask has another shape.

    Examples:
        >>> isotropy(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 3))
        tensor([0.6667])
    """
    cosines, others = _cosines(states, mask)
    return 1 - cosines.masked_fill(~others, 0).sum((1, 2)) / others.sum((1, 2))


def _cosines(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines `(B, T, T)` of the states, and which of them are of two tokens of x."""
    if mask.shape != states.shape[:2]:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the hidden states {tuple(states.shape)}")
    kept = mask.bool()
    directions = normalize(states if states.dtype == torch.float64 else states.float(), dim=-1)
    others = kept[:, :, None] & kept[:, None] & ~torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)
    return directions @ directions.transpose(1, 2), others


def image_weights(with_image: Tensor, without: Tensor, mask: Tensor, *, low: float = 1.0, high: float = 5.0) -> Tensor:
    """Return CAL's weights of tokens (Xiao et al. 2024, arXiv 2405.17871).

        w_t = mean over t - 1, t, t + 1 of clamp(z_t - z'_t, low, high)

    `z_t` is the logit of the token at t, `z'_t` the same where no token attends to the image. The mean is over neighbours that are
    trained on; the official code's mean includes tokens that are not, with the logit of token 0, and the next sequence.

    Args:
        with_image: `(B, T)` logits of the tokens.
        without: `(B, T)` logits of the tokens without the image.
        mask: `(B, T)`, true for tokens that are trained on.
        low: the weight of a token that does not depend on the image.
        high: the greatest weight.

    Returns:
        `(B, T)`, 0 where the mask is false.

    Raises:
        ValueError: the bounds are not ordered, or negative, or both 0.

    Examples:
        >>> image_weights(torch.tensor([[3.0, 9.0, 0.0]]), torch.zeros(1, 3), torch.ones(1, 3))  # 3, 5, 1
        tensor([[4., 3., 3.]])
    """
    if not 0 <= low <= high or not high > 0:
        raise ValueError(f"the weights' bounds must be ordered and not negative, not {low} and {high}")
    kept = mask.float()
    weights = (with_image.float() - without.float()).clamp(low, high) * kept
    pooled, count = (
        avg_pool1d(each[:, None], 3, stride=1, padding=1)[:, 0] for each in (weights, kept)
    )  # zeros all around
    return torch.where(mask.bool(), pooled / count.clamp(min=1e-9), 0.0)


# ---------------------------------------------------------------------------------------------------------- the trainers


@dataclass
class SimCTGConfig(RecipeOptions, SFTConfig):
    """The options of `SimCTGTrainer`: those of `trl.SFTConfig`, and the margin.

    Args:
        rho: the margin of `contrastive_loss`; the paper takes 0.5, and 0 to compare with likelihood alone.

    Raises:
        ValueError: `rho` is out of range, or an option puts several sequences into one row.
    """

    reads_texts: ClassVar[bool] = True
    unit: ClassVar[str] = "text"
    rho: float = option(0.5, "The margin of the contrastive loss, in [0, 2].")

    @records_settings
    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 2:
            raise ValueError(f"rho must lie in [0, 2] (the margin between cosines), not {self.rho}")
        if self.packing or self.padding_free:
            raise ValueError(
                "packing and padding_free put several texts into one row, and SimCTG contrasts the tokens of one: set both to False"
            )
        apply_machine_defaults(self)
        super().__post_init__()


class SimCTGTrainer(CardMixin, SFTTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """`SFTTrainer` with SimCTG's loss: `L = L_MLE + L_CL` (Su et al. 2022, arXiv 2202.06417, equation 3).

    The contrast is between the tokens that are trained on: with prompts and completions, those of the completion. Its mean is logged as
    `contrastive_loss`, and that of `isotropy` by its name. Hidden states are taken from the backbone's output, so the head still makes no logits.

    Args:
        model: see `trl.SFTTrainer`.
        args: a `SimCTGConfig`.
        kwargs: the other arguments of `trl.SFTTrainer`.

    Raises:
        ValueError: `args` has another type.
    """

    args: SimCTGConfig
    model: Any

    def __init__(self, model: Any, args: SimCTGConfig | None = None, **kwargs: Any) -> None:
        args = require_config(args, SimCTGConfig)
        super().__init__(model, args, **with_own_peft_config(kwargs))

    def describe_training(self) -> TrainedCard:
        """Return the two parts of the loss, with the paper and the formula, for the model card."""
        methods = [CardMethod("nll", "likelihood of the tokens", "", []), describe_function("SimCTG", contrastive_loss)]
        return TrainedCard(methods=methods, weights=[1.0, 1.0], verb="fine-tuned", tags=["simctg"])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the likelihood plus the contrastive loss.

        Args:
            model: the model, with wrappers.
            inputs: the batch.
            return_outputs: return the model's outputs as well.
            num_items_in_batch: tokens of all accumulated batches, see `transformers.Trainer.compute_loss`.
        """
        with _last_states(_policy(self)) as seen:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        mask = inputs["labels"] != IGNORED
        states = seen[0][:, -mask.shape[1] :]
        contrast = contrastive_loss(states, mask, rho=self.args.rho).mean()
        means = torch.stack([contrast.detach(), isotropy(states.detach(), mask).nanmean()])
        loss_mean, isotropy_mean = self.accelerator.gather(means[None]).nanmean(0).tolist()
        mode = "train" if self.model.training else "eval"
        record_metrics(self, mode, contrastive_loss=loss_mean, isotropy=isotropy_mean)
        if num_items_in_batch is not None:  # then the Trainer leaves gradient accumulation to the loss
            contrast = contrast / self.current_gradient_accumulation_steps
        return (loss[0] + contrast, loss[1]) if return_outputs else loss + contrast


@dataclass
class CALConfig(RecipeOptions, SFTConfig):
    """The options of `CALTrainer`: those of `trl.SFTConfig`, and the bounds of the weights.

    Args:
        cal_low: the argument `low` of `image_weights`; the paper takes 1.
        cal_high: the argument `high` of `image_weights`; the paper takes 5.

    Raises:
        ValueError: the bounds are not ordered, or the loss of tokens is another one.
    """

    reads_texts: ClassVar[bool] = True
    unit: ClassVar[str] = "text"
    cal_low: float = option(1.0, "Weight of a token that does not depend on the image.")
    cal_high: float = option(5.0, "Largest weight of a token.")

    @records_settings
    def __post_init__(self) -> None:
        if not 0 <= self.cal_low <= self.cal_high or not self.cal_high > 0:
            raise ValueError(
                f"cal_low and cal_high must be ordered and not negative, not {self.cal_low} and {self.cal_high}"
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"CAL weighs the likelihood of tokens, and loss_type {self.loss_type!r} weighs it already: use nll"
            )
        apply_machine_defaults(self)
        super().__post_init__()
        if has_head_in_shards(self):
            raise ValueError("CAL reads the whole head, which ZeRO 3 and FSDP 1 keep in shards: use FSDP 2 or ZeRO 2")


class CALTrainer(CardMixin, SFTTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """`SFTTrainer` that weights tokens by the effect of the image on them: CAL (Xiao et al. 2024, arXiv 2405.17871).

        L = sum_t w_t CE_t / sum_t w_t

    A step has one more forward pass, without gradients, in which no token attends to an image; see `image_weights`. The mean weight is
    logged as `cal_weight`. In evaluation the loss is not weighted, so that runs can be compared.

    Args:
        model: see `trl.SFTTrainer`.
        args: a `CALConfig`.
        kwargs: the other arguments of `trl.SFTTrainer`; the data have a column `images` or `image`.

    Raises:
        ValueError: `args` has another type, or the data have no images.
    """

    args: CALConfig
    model: Any

    def __init__(self, model: Any, args: CALConfig | None = None, **kwargs: Any) -> None:
        args = require_config(args, CALConfig)
        first: Any = next(iter(kwargs.get("train_dataset") or ()), {})
        if not {"image", "images"} & set(first):
            raise ValueError(
                "CAL weighs tokens by what an image does to them: give a train_dataset with a column images"
            )
        super().__init__(model, args, **with_own_peft_config(kwargs))
        install_head(_policy(self))

    def describe_training(self) -> TrainedCard:
        """Return the weighted likelihood, with the paper and the formula of the weights, for the model card."""
        method = describe_function(
            "CAL", image_weights, "likelihood of the tokens, weighted by the effect of the image"
        )
        return TrainedCard(methods=[method], weights=[None], verb="fine-tuned", tags=["cal"])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the likelihood, weighted in training.

        Args:
            model: the model, with wrappers.
            inputs: the batch.
            return_outputs: return the model's outputs as well.
            num_items_in_batch: tokens of all accumulated batches, see `transformers.Trainer.compute_loss`.
        """
        called = self._weighted(model) if self.model.training else model
        return super().compute_loss(called, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]

    def _weighted(self, model: Any) -> Any:
        """Return a function like the model whose log-probabilities are weighted, with weights of mean 1."""

        def forward(**inputs: Any) -> Any:
            """Call the model, and weight the log-probabilities of its output."""
            if not inputs.get("fused_lm_head"):
                return model(**inputs)
            with _last_states(_policy(self)) as seen:
                outputs = model(**inputs)
            weights = self._weights(seen[0].detach(), inputs)
            mean = weights.sum() / outputs.label_mask.sum().clamp(min=1)
            record_metrics(self, "train", cal_weight=self.accelerator.gather(mean).mean().item())
            outputs.log_probs = outputs.log_probs * (weights / mean.clamp(min=1e-9))
            return outputs

        return forward

    @torch.no_grad()
    def _weights(self, states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the weights `(B, T - 1)` from hidden states `(B, T, H)` with images, and from a forward pass without."""
        policy = _policy(self)
        labels = inputs["labels"][:, 1:]
        mask = labels != IGNORED
        plain = {name: value for name, value in inputs.items() if name not in ("fused_lm_head", "output_router_logits")}
        with _blind(policy, inputs["input_ids"]), self.accelerator.autocast():
            hidden = self.model(**plain, scoring=Scoring(hidden=True)).hidden
        head = head_of(policy, gather=gathered)
        if head is None or not policy.measured_head.direct:
            raise ValueError(
                f"CAL reads the logits of the last hidden states, and {type(policy).__name__} does more to these than its output layer"
            )
        kept = states[:, :-1][mask]
        seen, unseen = (
            rows.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(
                mask, _label_logits(rows, head, labels[mask])
            )
            for rows in (kept, hidden)
        )
        return image_weights(seen, unseen, mask, low=self.args.cal_low, high=self.args.cal_high)


def _label_logits(rows: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the logits of the labels alone, `(N,)`."""
    logits = (rows.float() * head.weight[targets].float()).sum(-1)
    if head.bias is not None:
        logits = logits + head.bias[targets].float()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _policy(trainer: Any) -> Any:
    """Return the model of a trainer as transformers loaded it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if is_peft_model(model) else model


@contextmanager
def _last_states(policy: Any) -> Iterator[list[Tensor]]:
    """Collect the last hidden states `(B, T, H)` of the forward passes within the context."""
    seen: list[Tensor] = []
    handle = policy.base_model.register_forward_hook(lambda _module, _args, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _blind(policy: Any, input_ids: Tensor) -> Iterator[None]:
    """Hide images in the forward passes within the context: the attention mask is changed after positions were computed from it."""
    hidden = input_ids == policy.config.image_token_id

    def cover(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hide the images in the attention mask that the language model gets."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != hidden.shape:
            raise ValueError(
                f"CAL hides images in the attention mask, and {type(policy).__name__} gives its language model another kind of mask"
            )
        return args, kwargs | {"attention_mask": mask * ~hidden}

    handle = policy.get_decoder().register_forward_pre_hook(cover, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
