"""`PreferenceTrainer`: TRL's `DPOTrainer` with contralto's losses and a leaner step."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedModel

from contralto.align.caches.blocks import ID_COLUMNS, TokenRows, default_folder
from contralto.align.caches.reference import ReferenceCache
from contralto.align.losses.divergences import Head
from contralto.align.losses.masks import Activations, DensityMonitor, LearnedMask, Masks, mapo, record
from contralto.align.losses.objective import Losses, Objective, Pairs
from contralto.align.losses.preference import length_desensitized, per_token, wpo_weights
from contralto.align.monitoring.monitor import Monitor
from contralto.align.trainers.base import StagedTrainer
from contralto.align.trainers.batches import PAIR_COLUMNS, PairBatch
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.heads import head_of
from contralto.align.trainers.layouts import LAYOUTS, refusal
from contralto.align.trainers.scoring import Scoring, TokenScores
from contralto.align.trl_compat import NoReference, attention_of, default_attention
from contralto.common.hashing import model_digest
from contralto.common.hub import from_pretrained

__all__ = ["PreferenceTrainer", "Reference"]

HEAD_METRICS = ("entropy", "mean_logits", "is_top1")
MASK_FILE = "sparsepo_mask"


class Reference(NamedTuple):
    """What the reference says of a batch; what no loss needs is None."""

    token_logps: Tensor | None = None
    """`(2B, T - 1)`."""
    states: tuple[Tensor, Head | None] | None = None
    """`(N, H)` hidden states of the tokens that count, and the head."""
    masks: Masks | None = None
    """SparsePO's, `(2B, T - 1)`."""
    blind: Tensor | None = None
    """`token_logps` of the texts without an image."""


class PreferenceTrainer(StagedTrainer):
    """Trains a language model, or a vision-language model, on pairs of a chosen and a rejected text.

    Everything that TRL's `DPOTrainer` takes, it takes: data, collators, callbacks, PEFT, saving, accelerate. With TRL's losses it gives TRL's
    loss, gradients and metrics. What differs:

    - `loss_type` also takes contralto's losses, see `contralto.align.losses.registry.LOSSES`. Those that need margins or advantages read the columns
      `margin` and `chosen_advantage` of the data.
    - A loss that needs no reference loads none. Its rewards are logged as `beta log pi(y)`, per token where the loss normalises.
    - Only tokens of completions go through the language-model head, on every device; entropy, mean logits and accuracy are computed
      when they are logged (`head_metrics`).
    - `precompute_ref_log_probs` keeps a number per token, on disk, see `contralto.align.caches.reference`; a streamed data set is read once for it.
    - `prefix_sharing` computes what the two texts of a pair begin with, prompt and all, once; `padding_free` lays all texts of a batch end to
      end. Neither changes a number, see `contralto.align.trainers.layouts`; a model that would is refused, by its configuration or in the first step.
    - `svco` takes rows with two lists of images, `images` and `rejected_images`, and reads each text under its own, under the other, and
      under none; chosen and rejected then mean its own image and the other one in what is logged.
    - On an accelerator a model that is given by name is loaded in bfloat16 when only an adapter is trained.

    A step has four stages, each a method to override: `reference`, `score`, `loss`, `report`.

    Args:
        model: a name or folder, a model of transformers, or one with an adapter of peft.
        ref_model: a loaded model; None takes the model before training, or the adapter switched off.
        args: a `PreferenceConfig`.
        how: the other arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, `callbacks`,
            `data_collator`, `compute_metrics`, `optimizers`, `quantization_config`.

    Raises:
        ValueError: whatever is wrong, in one sentence; before a model is loaded where that can be.

    Examples:
        >>> PreferenceTrainer("any", args=PreferenceConfig("out", loss_type=["cpo"], report_to="none"))
        Traceback (most recent call last):
            ...
        ValueError: train_dataset is missing: give the pairs to train on
    """

    _tag_names = ["trl", "contralto"]  # noqa: RUF012
    _name = "PreferenceTrainer"  # in the model card, with no paper: which one it is depends on the loss
    _paper: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, model: Any, ref_model: Any = None, args: PreferenceConfig | None = None, **how: Any) -> None:
        if not isinstance(args, PreferenceConfig):
            raise ValueError(f"args must be a PreferenceConfig, not {type(args).__name__}")
        self.objective: Objective = args.objective
        self.needs = self.objective.needs
        self.uses_reference = bool({"reference", "kl"} & self.needs)
        self.has_views = "images" in self.needs
        _check(model, ref_model, args, self.objective.loss_types, self.needs, how)
        if not self.uses_reference and args.deepspeed_plugin is None:
            ref_model = NoReference()
        if isinstance(model, str) and how.get("peft_config") is not None and torch.accelerator.is_available():
            args = copy.copy(args)  # the caller's stays as it was
            args.model_init_kwargs = {"dtype": "bfloat16"} | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        self.arrange = next((LAYOUTS[option] for option in LAYOUTS if getattr(args, option)), None)
        if self.has_views:
            args = copy.copy(args)
            args.monitor_pairs, args.report = 0, False  # they compare the texts of a pair under one image
        if args.audit != "off" or args.monitor_pairs:
            monitor = Monitor(self, {name: how.get(name) for name in ("train_dataset", "eval_dataset")})
            how["callbacks"] = [*(how.get("callbacks") or ()), monitor]
        super().__init__(model, ref_model, args=args, **how)
        if not self.uses_reference:
            self.ref_model = None
        if args.freeze_vision_encoder:
            self._freeze_vision_encoder()
        self._watch_mask = DensityMonitor()
        if "masks" in self.needs and args.mask == "learned":
            self._make_mask()

    # ------------------------------------------------------------------------------------------------------ the stages

    def reference(self, batch: PairBatch) -> Reference:
        """What the losses need of the reference, without gradients."""
        if not self.uses_reference:
            return Reference()
        if batch.ref_token_logps is not None:
            return Reference(batch.ref_token_logps)
        kl, sparse = "kl" in self.needs, "masks" in self.needs
        learned, by_activation = sparse and self.args.mask == "learned", sparse and self.args.mask == "mapo"
        with self.reference_model() as (model, bare):
            recording = record(bare, kinds=self.args.mask_kinds) if by_activation else nullcontext()
            with recording as activations:
                scored = self.score_tokens(model, batch, Scoring(hidden=kl, states=learned))
            blind = None if batch.blind is None else self.score_tokens(model, batch.blind).logps
            states = (scored.hidden, head_of(bare)) if kl and scored.hidden is not None else None
        masks = None
        if learned:
            assert scored.states is not None
            masks = self.side_modules[MASK_FILE].train(self.model.training)(scored.states, batch.mask)
        elif sparse:
            ones = batch.mask.float() if activations is None else mapo(_in_place(activations, batch), batch.mask)
            masks = Masks(ones, ones)
        return Reference(scored.logps, states, masks, blind)

    def score(self, model: Any, batch: PairBatch, reference: Reference) -> TokenScores:
        """The policy's forward."""
        also = HEAD_METRICS if self.reports_head() else ()
        if self.args.use_weighting:
            also = (*also, "log_sum_sq_probs")
        if self.aux_loss_enabled:
            batch = batch._replace(inputs=batch.inputs | {"output_router_logits": True})
        # DDP looks for unused parameters after the last forward: that has to be the one with images
        blind = None if batch.blind is None else self.score_tokens(model, batch.blind).logps
        return self.score_tokens(model, batch, Scoring(also=also, teacher=reference.states))._replace(blind=blind)

    def loss(self, batch: PairBatch, policy: TokenScores, reference: Reference) -> Losses:
        """The losses of the batch, by `contralto.align.losses.preference`."""
        return self.objective(self.pairs(batch, policy, reference))

    def pairs(self, batch: PairBatch, policy: TokenScores, reference: Reference) -> Pairs:
        """The batch as the losses take it."""
        assert policy.logps is not None
        if batch.blind is not None:
            return self._views(batch, policy, reference)
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
            weights=self._weights(batch, policy),
            f_divergence=self.args.f_divergence_type,
            f_alpha=self.args.f_alpha_divergence_coef,
            **{name: batch.columns[name] for name in PAIR_COLUMNS if name in batch.columns},
        )

    @staticmethod
    def _views(batch: PairBatch, policy: TokenScores, reference: Reference) -> Pairs:
        """Of a batch of `TwoImageCollator`, each text under its own image, with its log-ratios under the other one and under none."""
        logps, ref_logps, blind, ref_blind = (
            torch.as_tensor(each).sum(-1)
            for each in (policy.logps, reference.token_logps, policy.blind, reference.blind)
        )
        return Pairs.stacked(
            logps=_own(logps),
            ref_logps=_own(ref_logps),
            lengths=_own(batch.lengths),
            blind_logratios=blind - ref_blind,
            swapped_logratios=_swapped(logps - ref_logps),
        )

    def report(self, batch: PairBatch, policy: TokenScores, reference: Reference, loss: Losses) -> None:
        """TRL's metrics and those of the losses in use.

        For `svco` chosen is what a text has under its own image, rejected what the same text has under the other one.
        """
        pairs = self.pairs(batch, policy, reference)
        per_pair, rows = self._rewards(pairs, batch, policy), batch.inputs["attention_mask"].sum()
        if batch.blind is not None:
            rows = rows + batch.blind.inputs["attention_mask"].sum()
            batch, policy = _own_rows(batch, policy)
        if policy.kl is not None:
            per_pair |= {"kl/chosen": pairs.chosen.kl, "kl/rejected": pairs.rejected.kl}
        if len(loss.terms) > 1:
            per_pair |= {f"loss/{name}": term for name, term in loss.terms.items()}
        sums = {name: value.float().sum() for name, value in per_pair.items() if value is not None}
        sums |= _head_sums(batch, policy)
        count = len(per_pair["rewards/chosen"])
        sums |= {"pairs": torch.tensor(count), "tokens": rows}
        if policy.aux_loss is not None:
            sums["aux_loss"] = policy.aux_loss * count
        totals = self.sum_over_processes(sums)
        self.count_tokens(round(totals["tokens"]))
        self.record_metrics(
            **{name: totals[name] / totals["pairs"] for name in (*per_pair, "aux_loss") if name in totals}
        )
        self.record_metrics(**_head_metrics(totals))
        if reference.masks is not None and self.args.mask != "ones" and self.is_logging_step():
            self.record_metrics(**self._watch_mask(reference.masks, batch.mask))

    # --------------------------------------------------------------------------------------------------------- helpers

    def _rewards(self, pairs: Pairs, batch: PairBatch, policy: TokenScores) -> dict[str, Any]:
        """What is logged of rewards and log-probabilities, `(B,)`; `(2B,)` for `svco`."""
        if batch.blind is None:
            more: dict[str, Any] = {}
            rewards = [self._reward(side) for side in (pairs.chosen, pairs.rejected)]
            logps = [pairs.chosen.logps, pairs.rejected.logps]
        else:
            fields = ("logratios", "swapped_logratios", "blind_logratios")
            *rewards, blind = (torch.cat([getattr(side, f) for side in (pairs.chosen, pairs.rejected)]) for f in fields)
            sums = torch.as_tensor(policy.logps).sum(-1)
            more, logps = {"rewards/blind": self.args.beta * blind}, [_own(sums), _swapped(sums)]
        chosen, rejected = (self.args.beta * reward for reward in rewards)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        } | more

    def reports_head(self) -> bool:
        """Whether this step computes the metrics that need the whole vocabulary."""
        return bool(self.args.head_metrics == "all" or (self.args.head_metrics == "logged" and self.is_logging_step()))

    def _sums(self, token_logps: Tensor, batch: PairBatch) -> Tensor:
        if self.args.ld_alpha is None:
            return token_logps.sum(-1)
        lengths = batch.mask.sum(-1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        return length_desensitized(token_logps, batch.mask, shared, alpha=self.args.ld_alpha)

    def _weights(self, batch: PairBatch, policy: TokenScores) -> Tensor | None:
        if policy.log_sum_sq_probs is None or policy.logps is None:
            return None
        chosen, rejected = wpo_weights(policy.logps, policy.log_sum_sq_probs, batch.mask).chunk(2)
        return chosen * rejected

    def _reward(self, side: Any) -> Tensor:
        """`(B,)` what beta multiplies."""
        if self.uses_reference:
            return side.logratios  # type: ignore[no-any-return]
        if self.objective.length_normalised:
            return per_token(side.logps, side.lengths)
        return side.logps  # type: ignore[no-any-return]

    def _freeze_vision_encoder(self) -> None:
        encoder = self.policy.get_encoder(modality="image")
        if encoder is self.policy or encoder is self.policy.base_model:  # what get_encoder gives where there is none
            name = type(self.policy).__name__
            raise ValueError(f"freeze_vision_encoder is set, and {name} has no vision encoder: leave it out")
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
        """The learned mask's parameters, with their own learning rate and weight decay."""
        rate = self.args.mask_learning_rate
        how = {
            "lr": self.args.learning_rate if rate is None else rate,
            "weight_decay": self.args.mask_weight_decay,
        }
        return [{"params": list(module.parameters()), **how} for module in self.side_modules.values()]

    # --------------------------------------------------------------------------------------- the precomputed reference

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the reference's log-probabilities of every token, from disk or computed now."""
        model = self.unwrap(self.model if self.ref_model is None else self.ref_model)
        precision = (self.accelerator.mixed_precision, self.args.max_length, self.args.truncation_mode, "measured head")
        key = model_digest(model, frozen_only=is_peft_model(model), extra=precision)
        cache = ReferenceCache(
            self.args.reference_cache or default_folder("reference"),
            self.broadcast(key),
            lambda rows: self._reference_of(rows, batch_size),
            self.processes(),
        )
        return cache.add(dataset, name)

    def _reference_of(self, rows: TokenRows, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's log-probabilities of rows, in batches of similar length, spread over the processes."""
        order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i][name]) for name in ID_COLUMNS))
        sides: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        training = self.model.training
        self.model.eval()
        for start in range(0, len(rows), batch_size * processes):
            own = order[start + rank * batch_size :][:batch_size] or order[:1]  # every process runs as many forwards
            logps, mask = self._reference_batch([rows[i] for i in own])
            found = self._gather_rows(own, logps, mask) if processes > 1 else [(own, logps, mask)]
            for indices, values, valid in found:
                for side, half, where in zip(sides, values.chunk(2), valid.chunk(2), strict=True):
                    side.update({i: row[m].cpu() for i, row, m in zip(indices, half, where, strict=True)})
        self.model.train(training)
        return [sides[0][i] for i in range(len(rows))], [sides[1][i] for i in range(len(rows))]

    def _reference_batch(self, rows: TokenRows) -> tuple[Tensor, Tensor]:
        batch = PairBatch.of(self.to_device(self.data_collator([dict(row) for row in rows])), self.arrange)
        with self.reference_model() as (model, _):
            logps = self.score_tokens(model, batch).logps
        assert logps is not None
        return logps, batch.mask

    def _gather_rows(self, own: Sequence[int], logps: Tensor, mask: Tensor) -> list[tuple[Any, Tensor, Tensor]]:
        """The same from every process."""
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, (list(own), logps.cpu(), mask.cpu()))
        return gathered


def _own(values: Tensor) -> Tensor:
    """Of the 4B rows of `TwoImageCollator`, those of a text under its own image."""
    views = values.chunk(4)
    return torch.cat([views[0], views[3]])


def _swapped(values: Tensor) -> Tensor:
    """Of the 4B rows of `TwoImageCollator`, those of a text under the other one's image."""
    views = values.chunk(4)
    return torch.cat([views[1], views[2]])


def _own_rows(batch: PairBatch, policy: TokenScores) -> tuple[PairBatch, TokenScores]:
    """What metrics of the head are computed of."""
    kept: dict[str, Any] = {name: _own(value) for name in HEAD_METRICS if (value := getattr(policy, name)) is not None}
    return batch._replace(mask=_own(batch.mask)), policy._replace(**kept)


def _in_place(activations: Activations, batch: PairBatch) -> Activations:
    """What was recorded in another layout, in the padded one."""
    layout = batch.layout
    if layout is None:
        return activations
    return {kind: [layout.back(place) for place in places] for kind, places in activations.items()}


def _head_sums(batch: PairBatch, policy: TokenScores) -> dict[str, Tensor]:
    """Sums over tokens of what was computed over the vocabulary."""
    if policy.entropy is None or policy.mean_logits is None or policy.is_top1 is None:
        return {}
    chosen, rejected = batch.mask.chunk(2)
    chosen_logits, rejected_logits = policy.mean_logits.chunk(2)
    return {
        "entropy": policy.entropy.sum(),
        "correct": policy.is_top1.chunk(2)[0].sum(),
        "chosen_logits": chosen_logits.sum(),
        "rejected_logits": rejected_logits.sum(),
        "chosen_tokens": chosen.sum(),
        "rejected_tokens": rejected.sum(),
    }


def _head_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    if "entropy" not in totals:
        return {}
    chosen, rejected = (max(1.0, totals[f"{side}_tokens"]) for side in ("chosen", "rejected"))
    return {
        "entropy": totals["entropy"] / max(1.0, totals["chosen_tokens"] + totals["rejected_tokens"]),
        "logits/chosen": totals["chosen_logits"] / chosen,
        "logits/rejected": totals["rejected_logits"] / rejected,
        "mean_token_accuracy": totals["correct"] / chosen,
    }


# --------------------------------------------------------------------------------------- what can be seen before loading


def _check(
    model: Any,
    ref_model: Any,
    args: PreferenceConfig,
    names: Sequence[str],
    needs: frozenset[str],
    how: Mapping[str, Any],
) -> None:
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ValueError(f"model must be a name, a folder or a loaded model, not a {type(model).__name__}")
    _check_reference(model, ref_model, names, needs)
    _check_adapter(model, how.get("peft_config"), needs)

    if "kl" in needs and args.head_in_shards:
        raise ValueError(
            f"{', '.join(names)} reads the reference's whole head, which ZeRO 3 and FSDP 1 keep in shards: use FSDP 2 or ZeRO 2"
        )
    for name, dataset, first in args.checked_pairs(how.get("train_dataset"), how.get("eval_dataset")):
        _check_data(name, dataset, first, args, needs)
    _check_layout(model, args, how.get("peft_config"))


def _check_reference(model: Any, ref_model: Any, names: Sequence[str], needs: frozenset[str]) -> None:
    if ref_model is None:
        return
    if not needs & {"reference", "kl"}:
        raise ValueError(f"{', '.join(names)} uses no reference: leave ref_model out")
    if not isinstance(ref_model, nn.Module):
        raise ValueError(f"ref_model must be a loaded model, not a {type(ref_model).__name__}")
    if ref_model is model:
        raise ValueError("ref_model is the model itself, and would be trained with it: leave it out to take a copy")


def _check_adapter(model: Any, config: Any, needs: frozenset[str]) -> None:
    if config is None:
        return
    if not isinstance(config, PeftConfig):
        raise ValueError(f"peft_config must be a configuration of peft, not a {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, and peft_config asks for another: leave peft_config out")
    targets = config.target_modules if isinstance(config, LoraConfig) else None
    if targets and not isinstance(targets, str) and "lm_head" in targets:
        raise ValueError("an adapter on lm_head would not be trained, since only its weight is read: leave lm_head out")
    if config.is_prompt_learning and "kl" in needs:
        raise ValueError(
            "prompts that are learned change which tokens stand where, and a divergence compares them: use LoRA"
        )


def _check_layout(model: Any, args: PreferenceConfig, adapter: Any) -> None:
    option = next((option for option in LAYOUTS if getattr(args, option)), None)
    if option is None:
        return
    if isinstance(adapter, PeftConfig) and adapter.is_prompt_learning:
        raise ValueError(
            f"{option} moves tokens, and prompts that are learned stand before each row: leave one of them out"
        )
    kind, config, attention = _architecture(model, args)
    if kind is None:
        return  # of a repository's own code: what it computes is compared in the first step
    if why := refusal(option, kind, config, attention):
        raise ValueError(f"{option} is set, and {why}: leave {option} out")
    text: Any = config.get_text_config()
    balance = (
        getattr(text, "router_aux_loss_coef", 0.0) if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    )
    if option == "prefix_sharing" and balance and hasattr(text, "output_router_logits"):
        raise ValueError(
            "prefix_sharing counts a prompt once where router_aux_loss_coef balances the experts over both copies: set one of them to 0"
        )


def _architecture(model: Any, args: PreferenceConfig) -> tuple[Any, Any, str]:
    """Class, configuration and attention of a model, loaded or not; no class if it is not one of transformers."""
    if not isinstance(model, str):
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return type(bare), bare.config, attention_of(bare.config)
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    code = given.get("trust_remote_code", args.trust_remote_code)
    config = from_pretrained(AutoConfig, model, revision=given.get("revision"), trust_remote_code=code)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    return kind, config, given.get("attn_implementation") or default_attention(kind)


def _check_data(
    name: str,
    dataset: Dataset | IterableDataset,
    first: Mapping[str, Any],
    args: PreferenceConfig,
    needs: frozenset[str],
) -> None:
    if "margin" in needs and "margin" not in first:
        wants = next(loss.name for loss in args.objective.losses if "margin" in loss.needs)
        raise ValueError(
            f"{name} has no column margin, which {wants} needs: how much better chosen is, a number per row"
        )
    if isinstance(dataset, Dataset):
        for column in {"margin", "chosen_advantage"} & set(dataset.column_names):
            _check_numbers(
                name,
                column,
                dataset[column],
                positive=column == "margin" and "positive_margin" in args.objective.requires,
            )
    if "images" in needs:
        _check_views(name, first)
    if args.precompute_ref_log_probs and {"image", "images"} & set(first):
        raise ValueError(
            f"{name} has images, which are read as they come: precompute_ref_log_probs is for text, set it to False"
        )
    if (args.prefix_sharing or args.padding_free) and {"image", "images"} & set(first):
        option = "prefix_sharing" if args.prefix_sharing else "padding_free"
        raise ValueError(f"{name} has images, whose tokens {option} cannot move: leave it out")
    if args.monitor_generate and {"image", "images"} & set(first):
        raise ValueError(
            f"{name} has images, and monitor_generate writes texts from prompts of text alone: leave it at 0"
        )
    if args.truncation_mode == "keep_end" and args.max_length and {"image", "images"} & set(first):
        raise ValueError(f"{name} has images, and truncation_mode keep_end would cut them away: use keep_start")


def _check_views(name: str, row: Mapping[str, Any]) -> None:
    for column in ("images", "rejected_images"):
        if not row.get(column) or not isinstance(row[column], list | tuple):
            raise ValueError(
                f"{name} has no column {column} with a list of images in each row: svco needs images, of which chosen is true, and "
                "rejected_images, of which rejected is"
            )
    if not isinstance(row.get("prompt"), list):
        raise ValueError(
            f"{name} has prompts of bare text: svco takes the images out of a prompt, which must be a list of messages"
        )


def _check_numbers(name: str, column: str, values: Sequence[Any], *, positive: bool) -> None:
    for at, value in enumerate(values, 1):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}, row {at}, column {column}: {value!r} is not a finite number")
        if positive and value <= 0:
            raise ValueError(
                f"{name}, row {at}, column {column}: odpo takes its logarithm, so it must be above 0, not {value}"
            )
