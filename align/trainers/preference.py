"""`PreferenceTrainer`: TRL's `DPOTrainer` with contralto's losses and a leaner step."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contralto.align.caches.blocks import default_folder
from contralto.align.caches.image_reference import ImageReferenceCache, processor_digest
from contralto.align.caches.reference import ReferenceCache
from contralto.align.cards.methods import preference_methods, preference_notation
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.activations import Activations, record
from contralto.align.losses.chunked import Head
from contralto.align.losses.masks import DensityMonitor, LearnedMask, Masks, mapo
from contralto.align.losses.objective import Losses, Objective, Pairs
from contralto.align.losses.preference import length_desensitized, per_token, wpo_weights
from contralto.align.monitoring.monitor import Monitor
from contralto.align.trainers.base import StagedTrainer
from contralto.align.trainers.batches import PAIR_COLUMNS, PairBatch
from contralto.align.trainers.checks import located
from contralto.align.trainers.config import PreferenceConfig, require_config, with_adapter_dtype
from contralto.align.trainers.preference_checks import check_preference, checked_arrangement
from contralto.align.trainers.preference_metrics import (
    HEAD_METRICS,
    head_metrics,
    head_sums,
    other_image,
    own_image,
    own_image_batch,
    reward_metrics,
)
from contralto.align.trainers.reference_pass import ReferencePass, starting_size
from contralto.align.trainers.scoring import Scoring, TokenScores
from contralto.align.trl_compat import NoReference, gathered
from contralto.common.hashing import model_digest
from contralto.common.head import head_of

__all__ = ["PreferenceTrainer", "ReferenceScores"]

MASK_FILE = "sparsepo_mask"


class ReferenceScores(NamedTuple):
    """The reference's scores of a batch, with None for what no loss needs."""

    token_logps: Tensor | None = None
    """`(2B, T - 1)`."""
    states: tuple[Tensor, Head | None] | None = None
    """Hidden states `(N, H)` at the scored tokens, and the head."""
    masks: Masks | None = None
    """Masks of SparsePO, `(2B, T - 1)`."""
    blind: Tensor | None = None
    """`token_logps` of the completions without an image."""


class PreferenceTrainer(StagedTrainer):
    """Trains a language model, or a vision-language model, on pairs of a chosen and a rejected completion.

    It takes everything that TRL's `DPOTrainer` takes: data, collators, callbacks, PEFT, saving, accelerate. With TRL's losses it has TRL's
    loss, gradients and metrics. Differences:

    - `loss_type` also takes contralto's losses, see `contralto.align.losses.registry.LOSSES`. Those that need margins or advantages read
      the columns `margin` and `chosen_advantage` of the data.
    - A loss that needs no reference loads none. Its rewards are logged as `beta log pi(y)`, per token where the loss normalises.
    - Only tokens of completions go through the language-model head, on every device; entropy, mean logits and accuracy are computed
      when they are logged (`head_metrics`).
    - `precompute_ref_log_probs` keeps a number per token on disk, see `contralto.align.caches.reference`, also for rows with images; a
      streamed data set of texts is read once for it.
    - `prefix_sharing` computes once what the two rows of a pair begin with, prompt and all; `padding_free` lays all rows of a batch end
      to end; `packing` puts several pairs, or several sequences, into each row. None changes a number, see
      `contralto.align.trainers.layouts`. A model for which one would is rejected by its configuration; if the first batch shows it, batches
      stay padded, with a warning.
    - `svco` and `mdpo` take rows with two lists of images, `images` and `rejected_images`, and read each completion under its own, under the
      other, and under none (`mdpo` does not use the last). In metrics, chosen and rejected then stand for its own image and the other one.
    - On an accelerator a model that is given by name is loaded in bfloat16 if only an adapter is trained.

    A step has four stages, each a method to override: `reference`, `score`, `loss`, `report`.

    Args:
        model: a folder, a hub id or `testbed:NAME`, a model of transformers, or one with an adapter of peft.
        ref_model: a loaded model; None takes the model before training, or the adapter switched off.
        args: a `PreferenceConfig`.
        kwargs: the other arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, `callbacks`,
            `data_collator`, `compute_metrics`, `optimizers`, `quantization_config`.

    Raises:
        ValueError: an argument is wrong; before a model is loaded where that can be.

    Examples:
        >>> PreferenceTrainer("any", args=PreferenceConfig("out", loss_type=["cpo"], report_to="none"))
        Traceback (most recent call last):
            ...
        ValueError: train_dataset is missing: give the pairs to train on
    """

    _tag_names = ["trl", "contralto"]  # noqa: RUF012
    monitor: Monitor | None = None
    """The callback that audits and measures, if there is one."""

    def __init__(self, model: Any, ref_model: Any = None, args: PreferenceConfig | None = None, **kwargs: Any) -> None:
        args, model = require_config(args, PreferenceConfig), located(model)
        self.objective: Objective = args.objective
        self.needs = self.objective.needs
        self.uses_reference = bool({"reference", "kl"} & self.needs)
        self.has_views = "images" in self.needs
        check_preference(model, ref_model, args, kwargs)
        if not self.uses_reference and args.deepspeed_plugin is None:
            ref_model = NoReference()
        args = with_adapter_dtype(args, model, kwargs.get("peft_config"))
        self.arrange = checked_arrangement(model, args, kwargs.get("peft_config"))
        if self.has_views:
            args = copy.copy(args)
            args.monitor_pairs, args.report = 0, False  # they compare the completions of a pair under one image
        if args.audit != "off" or args.monitor_pairs:
            self.monitor = Monitor(self, {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")})
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self.monitor]
        super().__init__(model, ref_model, args=args, **kwargs)
        if not self.uses_reference:
            self.ref_model = None
        if args.freeze_vision_encoder:
            self._freeze_vision_encoder()
        self._density = DensityMonitor()
        if "masks" in self.needs and args.mask == "learned":
            self._make_mask()

    def describe_training(self) -> TrainedCard:
        """Return the losses, with their papers and formulas, for the model card."""
        losses = list(self.args.loss_type)
        return TrainedCard(
            methods=preference_methods(losses),
            weights=[None] if len(losses) == 1 else list(self.objective.weights),
            verb="trained on preference pairs",
            notation=preference_notation(),
            tags=["preference", *losses],
            findings=[] if self.monitor is None else self.monitor.findings,
            record=None if self.monitor is None else self.monitor.record,
        )

    # ------------------------------------------------------------------------------------------------------ the stages

    def reference(self, batch: PairBatch) -> ReferenceScores:
        """Return the outputs of the reference that the losses need, without gradients.

        Args:
            batch: the pairs.
        """
        if not self.uses_reference:
            return ReferenceScores()
        if batch.ref_token_logps is not None:
            return ReferenceScores(batch.ref_token_logps)
        self._check_reference_is_there()
        kl, sparse = "kl" in self.needs, "masks" in self.needs
        learned, by_activation = sparse and self.args.mask == "learned", sparse and self.args.mask == "mapo"
        with self.reference_model() as (model, bare):
            recording = record(bare, kinds=self.args.mask_kinds) if by_activation else nullcontext()
            with recording as activations:
                scores = self.score_tokens(model, batch, Scoring(hidden=kl, states=learned))
            blind = None if batch.blind is None else self.score_tokens(model, batch.blind).logps
            states = (scores.hidden, head_of(bare, gather=gathered)) if kl and scores.hidden is not None else None
        masks = None
        if learned:
            assert scores.states is not None
            masks = self.side_modules[MASK_FILE].train(self.model.training)(scores.states, batch.mask)
        elif sparse:
            ones = batch.mask.float() if activations is None else mapo(_padded(activations, batch), batch.mask)
            masks = Masks(ones, ones)
        return ReferenceScores(scores.logps, states, masks, blind)

    def score(self, model: Any, batch: PairBatch, reference: ReferenceScores) -> TokenScores:
        """Run the policy's forward pass, and return its scores.

        Args:
            model: the policy, with wrappers.
            batch: the pairs.
            reference: the result of the first stage.
        """
        also = HEAD_METRICS if self.reports_head() else ()
        if self.args.use_weighting:
            also = (*also, "log_sum_sq_probs")
        if self.aux_loss_enabled:
            batch = batch._replace(inputs=batch.inputs | {"output_router_logits": True})
        # DDP looks for unused parameters after the last forward: that has to be the one with images
        blind = None if batch.blind is None else self.score_tokens(model, batch.blind).logps
        scores = self.score_tokens(model, batch, Scoring(also=also, teacher=reference.states))
        return scores._replace(blind=blind)

    def loss(self, batch: PairBatch, policy: TokenScores, reference: ReferenceScores) -> Losses:
        """Compute the losses of the batch, see `contralto.align.losses`.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
        """
        return self.objective(self.pairs(batch, policy, reference))

    def pairs(self, batch: PairBatch, policy: TokenScores, reference: ReferenceScores) -> Pairs:
        """Return the batch as `Pairs`, the input of the losses.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
        """
        assert policy.logps is not None
        if batch.blind is not None:
            return _views(batch, policy, reference)
        ref_tokens = policy.teacher_logps if reference.token_logps is None else reference.token_logps
        masks = reference.masks
        return Pairs.stacked(
            logps=self._sums(policy.logps, batch),
            ref_logps=None if ref_tokens is None else self._sums(ref_tokens, batch),
            lengths=batch.lengths,
            token_logps=policy.logps,
            ref_token_logps=ref_tokens,
            token_kl=policy.kl,
            mask=batch.mask,
            reward_mask=None if masks is None else masks.reward,
            kl_mask=None if masks is None else masks.kl,
            weights=_pair_weights(batch, policy),
            f_divergence=self.args.f_divergence_type,
            f_alpha=self.args.f_alpha_divergence_coef,
            **{name: batch.columns[name] for name in PAIR_COLUMNS if name in batch.columns},
        )

    def report(self, batch: PairBatch, policy: TokenScores, reference: ReferenceScores, loss: Losses) -> None:
        """Record TRL's metrics and those of the losses in use.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
            loss: the result of the third stage.
        """
        pairs = self.pairs(batch, policy, reference)
        per_pair = reward_metrics(pairs, batch, policy, self._reward, beta=self.args.beta)
        tokens = batch.inputs["attention_mask"].sum()
        if batch.blind is not None:
            tokens = tokens + batch.blind.inputs["attention_mask"].sum()
            batch, policy = own_image_batch(batch, policy)
        if policy.kl is not None:
            per_pair |= {"kl/chosen": pairs.chosen.kl, "kl/rejected": pairs.rejected.kl}
        if len(loss.terms) > 1:
            per_pair |= {f"loss/{name}": term for name, term in loss.terms.items()}
        sums = {name: value.float().sum() for name, value in per_pair.items() if value is not None}
        sums |= head_sums(batch, policy)
        count = len(per_pair["rewards/chosen"])
        sums |= {"pairs": torch.tensor(count), "tokens": tokens}
        if policy.aux_loss is not None:
            sums["aux_loss"] = policy.aux_loss * count
        totals = self.sum_over_processes(sums)
        self.count_tokens(round(totals["tokens"]))
        means = {name: totals[name] / totals["pairs"] for name in (*per_pair, "aux_loss") if name in totals}
        self.record_metrics(**means, **head_metrics(totals))
        if reference.masks is not None and self.args.mask != "ones" and self.is_logging_step():
            self.record_metrics(**self._density(reference.masks, batch.mask))

    # --------------------------------------------------------------------------------------------------------- helpers

    def _check_reference_is_there(self) -> None:
        """Reject rows whose reference was not precomputed once the policy is all that is left of it."""
        if self.args.precompute_ref_log_probs and self.ref_model is None and not is_peft_model(self.unwrap(self.model)):
            raise ValueError(
                "the reference is gone, since precompute_ref_log_probs is set, and these rows were not among its data sets: pass them as "
                "eval_dataset when the trainer is made"
            )

    def reports_head(self) -> bool:
        """Return whether this step computes the metrics that need the whole vocabulary."""
        return bool(self.args.head_metrics == "all" or (self.args.head_metrics == "logged" and self.is_logging_step()))

    def _sums(self, token_logps: Tensor, batch: PairBatch) -> Tensor:
        """Sum log-probabilities `(2B, T - 1)` over the tokens of each completion."""
        if self.args.ld_alpha is None:
            return token_logps.sum(-1)
        lengths = batch.mask.sum(-1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        return length_desensitized(token_logps, batch.mask, shared, alpha=self.args.ld_alpha)

    def _reward(self, side: Any) -> Tensor:
        """Return the logged rewards of a side divided by beta, `(B,)`."""
        if self.uses_reference:
            return side.logratios  # type: ignore[no-any-return]
        if self.objective.length_normalised:
            return per_token(side.logps, side.lengths)
        return side.logps  # type: ignore[no-any-return]

    def _freeze_vision_encoder(self) -> None:
        encoder = self.policy.get_encoder(modality="image")
        if encoder is self.policy or encoder is self.policy.base_model:  # what get_encoder returns if there is none
            name = type(self.policy).__name__
            raise ValueError(f"freeze_vision_encoder is set, but {name} has no vision encoder: leave it out")
        encoder.requires_grad_(False)

    def _make_mask(self) -> None:
        config = self.policy.config.get_text_config()
        torch.manual_seed(self.args.seed)
        mask = LearnedMask(
            config.num_hidden_layers,
            config.hidden_size,
            independent=self.args.mask_independent,
            dropout=self.args.mask_dropout,
        ).to(self.accelerator.device)
        self.side_modules[MASK_FILE] = mask
        if self.accelerator.num_processes > 1:
            self.side_modules[MASK_FILE] = DistributedDataParallel(mask)

    def side_groups(self) -> list[dict[str, Any]]:
        """Return the learned mask's parameters, with their own learning rate and weight decay."""
        rate = self.args.mask_learning_rate
        options = {
            "lr": self.args.learning_rate if rate is None else rate,
            "weight_decay": self.args.mask_weight_decay,
        }
        return [{"params": list(module.parameters()), **options} for module in self.side_modules.values()]

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the data set with the reference's log-probabilities of all tokens; compute those not on disk.

        Args:
            dataset: a tokenised data set, or one with images.
            name: its name, for the progress bar.
            batch_size: rows per forward pass in training, or `precompute_ref_batch_size`.
        """
        model = self.unwrap(self.model if self.ref_model is None else self.ref_model)
        precision = (self.accelerator.mixed_precision, self.args.max_length, self.args.truncation_mode, "measured head")
        reads = (processor_digest(self.processing_class),) if self.has_images else ()
        key = model_digest(model, frozen_only=is_peft_model(model), extra=(*precision, *reads))
        cache = (ImageReferenceCache if self.has_images else ReferenceCache)(
            self.args.reference_cache or default_folder("reference"),
            self.broadcast(key),
            ReferencePass(self, starting_size(self.args, batch_size, self.accelerator.device.type)),
            self.processes(),
        )
        return cache.add(dataset, name)


def _views(batch: PairBatch, policy: TokenScores, reference: ReferenceScores) -> Pairs:
    """Return each completion under its own image, with its log-ratios under the other image and under none."""
    logps, ref_logps, blind, ref_blind = (
        torch.as_tensor(each).sum(-1) for each in (policy.logps, reference.token_logps, policy.blind, reference.blind)
    )
    return Pairs.stacked(
        logps=own_image(logps),
        ref_logps=own_image(ref_logps),
        lengths=own_image(batch.lengths),
        blind_logratios=blind - ref_blind,
        swapped_logratios=other_image(logps - ref_logps),
    )


def _pair_weights(batch: PairBatch, policy: TokenScores) -> Tensor | None:
    """Return the weights of WPO, `(B,)`, None unless they are used."""
    if policy.log_sum_sq_probs is None or policy.logps is None:
        return None
    chosen, rejected = wpo_weights(policy.logps, policy.log_sum_sq_probs, batch.mask).chunk(2)
    return chosen * rejected


def _padded(activations: Activations, batch: PairBatch) -> Activations:
    """Return activations that were recorded in another layout at the positions of the padded batch."""
    layout = batch.layout
    if layout is None:
        return activations
    return {kind: [layout.to_padded(place) for place in places] for kind, places in activations.items()}
