"""Training on completions with labels: KTO, QCRD, and unlearning by NPO or gradient difference, on TRL's `KTOTrainer`."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from trl import unpair_preference_dataset  # type: ignore[attr-defined]

from contralto.align.cards.methods import describe_function
from contralto.align.cards.mixin import CardMixin
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.objective import Losses
from contralto.align.losses.unpaired import LabelledRows, UnpairedObjective
from contralto.align.trainers.batches import IGNORED
from contralto.align.trainers.checks import check_adapter, check_model, located
from contralto.align.trainers.config import require_config, with_adapter_dtype, with_own_peft_config
from contralto.align.trainers.unpaired_config import UnpairedConfig
from contralto.align.trl_compat import NoReference, RowTrainer, record_metrics

__all__ = ["ForgetAndRetain", "UnpairedTrainer"]

logger = logging.getLogger(__name__)

WORDS = {True: "true (desirable, to be retained)", False: "false (undesirable, to be forgotten)"}
COLUMNS = ("prompt", "completion", "label")
QUALITY = "quality"
"""The column with a number in [0, 1] for each row, and the need of losses that read it."""
BALANCE = (1.0, 4 / 3)
"""The range that TRL advises for the weight of desirable rows divided by that of undesirable ones (equation 8 of KTO)."""


class ForgetAndRetain(Sampler[int]):
    """Yield the indices of all rows to forget in random order, each followed by one of a row to retain.

    Rows to retain are drawn without repetition, anew when all have been drawn. An epoch is one pass over the rows to forget.

    Args:
        labels: of all rows, false for rows to forget.
        seed: of the order.
        epoch: returns the number of the epoch, on which the order depends, so that a resumed run goes on with the same rows.

    Raises:
        ValueError: all rows have one label.

    Examples:
        >>> list(ForgetAndRetain([False, True, True, True, False], seed=0, epoch=lambda: 0))
        [0, 1, 4, 3]
    """

    def __init__(self, labels: Sequence[bool], *, seed: int, epoch: Callable[[], int]) -> None:
        if set(labels) != {True, False}:
            raise ValueError(
                f"train_dataset has rows of one label alone{' once rows beyond max_length are dropped' if labels else ''}: rows to forget "
                "and rows to retain are needed"
            )
        self.labels, self.seed, self.epoch = torch.as_tensor(labels), seed, epoch

    def __len__(self) -> int:
        return 2 * int((~self.labels).sum())

    def __iter__(self) -> Iterator[int]:
        forget, retain = ((self.labels == label).nonzero().flatten() for label in (False, True))
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        first = forget[torch.randperm(len(forget), generator=generator)]
        rounds = -(-len(forget) // len(retain))
        second = torch.cat([retain[torch.randperm(len(retain), generator=generator)] for _ in range(rounds)])
        for pair in zip(first.tolist(), second.tolist(), strict=False):
            yield from pair


class UnpairedTrainer(CardMixin, RowTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """Trains a language model on completions with labels: KTO, NPO, gradient difference, APO-zero, QCRD.

    It takes what TRL's `KTOTrainer` takes, and with the losses `kto` and `apo_zero_unpaired` has its loss. Differences:

    - `loss_type` is a list of losses, see `contralto.align.losses.unpaired.UNPAIRED`; a loss that needs no reference loads none.
    - `kto` reads each row with the completion of its neighbour, in the order of the data. The rows are shuffled once, since pairs that
      are taken apart begin with all chosen completions.
    - Losses that forget and losses that retain get batches of half rows to forget and half rows to retain; an epoch is one pass over
      the rows to forget.
    - `qcrd` reads the column `quality`, a number in [0, 1] for each row.
    - Rows that no loss reads, labels that are missing, empty completions and images are rejected before a model is loaded.

    Logged as chosen and rejected are the rows of the labels true and false.

    Args:
        model: a folder, a hub id or `testbed:NAME`, a model of transformers, or one with an adapter of peft.
        ref_model: a loaded model; None takes the model before training, or the adapter switched off.
        args: an `UnpairedConfig`.
        kwargs: the other arguments of `trl.KTOTrainer`. Data sets have `prompt`, `completion` and `label`, or pairs.

    Raises:
        ValueError: an argument is wrong; before a model is loaded where that can be.

    Examples:
        >>> UnpairedTrainer("any", args=UnpairedConfig("out", report_to="none"))
        Traceback (most recent call last):
            ...
        ValueError: train_dataset is missing: give rows of prompt, completion and label
    """

    _tag_names = ["trl", "contralto"]  # noqa: RUF012
    objective: UnpairedObjective

    def __init__(self, model: Any, ref_model: Any = None, args: UnpairedConfig | None = None, **kwargs: Any) -> None:
        args, model = require_config(args, UnpairedConfig), located(model)
        self.args, self.objective = args, args.objective
        self.uses_reference = "reference" in self.objective.needs
        check_model(model)
        check_adapter(model, kwargs.get("peft_config"), compares_tokens=False)
        if not self.uses_reference and ref_model is not None:
            raise ValueError(f"{', '.join(args.loss_type)} uses no reference: leave ref_model out")
        if kwargs.get("train_dataset") is None:
            raise ValueError("train_dataset is missing: give rows of prompt, completion and label")
        train = _rows("train_dataset", kwargs["train_dataset"], args)
        if args.train_sampling_strategy == "sequential" and isinstance(train, Dataset):
            train = train.shuffle(seed=args.seed)
        self._advise_on_weights(train)
        kwargs["train_dataset"] = train
        if kwargs.get("eval_dataset") is not None:
            kwargs["eval_dataset"] = _rows("eval_dataset", kwargs["eval_dataset"], args)
        args = with_adapter_dtype(args, model, kwargs.get("peft_config"))
        if not self.uses_reference and args.deepspeed_plugin is None:  # DeepSpeed prepares no module without weights
            ref_model = NoReference()
        needs = {
            "reads_kl": "kl" in self.objective.needs,
            "numbers": [QUALITY] if QUALITY in self.objective.needs else [],
        }
        super().__init__(model, ref_model, **needs, args=args, **with_own_peft_config(kwargs))
        if not self.uses_reference:
            self.ref_model = None

    def _advise_on_weights(self, train: Any) -> None:
        """Warn if rows of one label outweigh those of the other, under losses that weigh them."""
        if not isinstance(train, Dataset) or not any(
            "desirable_weight" in loss.settings for loss in self.objective.losses
        ):
            return
        good = sum(train["label"])
        weights = self.args.desirable_weight * good, self.args.undesirable_weight * (len(train) - good)
        low, high = BALANCE
        if not low * 0.99 <= weights[0] / max(weights[1], 1e-9) <= high * 1.01:
            logger.warning(
                "%d rows are desirable and %d undesirable, and count %.3g to 1 with their weights: TRL advises %.3g to %.3g; set "
                "desirable_weight or undesirable_weight",
                *(good, len(train) - good, weights[0] / max(weights[1], 1e-9), low, high),
            )

    def describe_training(self) -> TrainedCard:
        """Return the losses, with their papers and formulas, for the model card."""
        losses = self.objective.losses
        return TrainedCard(
            methods=[describe_function(loss.name, loss.function, loss.description) for loss in losses],
            weights=[None] if len(losses) == 1 else list(self.objective.weights),
            verb="trained on completions with labels",
            tags=["unlearning" if self.objective.forgets else "preference", *self.objective.loss_types],
        )

    def train_sampler(self) -> Any:
        """Return the sampler of half rows to forget and half rows to retain, if the losses read both apart."""
        if not self.args.halves:
            return None
        labels = self.train_dataset["label"]  # type: ignore[index]  # streams are rejected
        return ForgetAndRetain(list(labels), seed=self.args.seed, epoch=lambda: int((self.state.epoch or 0) + 1e-6))

    def compute_step(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch, and record metrics.

        Args:
            model: the policy, with wrappers.
            batch: the batch as the collator returned it, on the device.
        """
        outputs, logps = self._score(model, batch)
        ref_logps, ref_kl = self.reference_logps(batch) if self.uses_reference else (None, None)
        rows = LabelledRows(
            logps=logps,
            lengths=batch["completion_mask"][:, 1:].sum(-1),
            label=batch["label"].bool(),
            ref_logps=ref_logps,
            reference_point=None if ref_kl is None else self._reference_point(self.kl_logps(model, batch), ref_kl),
            quality=batch.get(QUALITY),
        )
        losses = self.objective(rows)
        total = losses.total
        if self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * outputs.aux_loss
        with torch.no_grad():
            self._report(rows, losses, batch)
        return total

    def _score(self, model: Any, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return the policy's outputs, and the summed log-probabilities of the completions, `(n,)`."""
        scored = batch["completion_mask"].bool()
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(~scored, IGNORED),
            use_cache=False,
            fused_lm_head=True,
            **more,
        )
        # learned prompts stand before the tokens
        return outputs, outputs.log_probs[:, -(scored.shape[1] - 1) :].sum(-1)

    def _reference_point(self, kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
        """Return KTO's z: the mean log-ratio of mismatched completions of all processes, at least 0."""
        mean: Tensor = self.accelerator.gather((kl_logps - ref_kl_logps).mean().detach()).mean()
        return mean.clamp(min=0)

    def _report(self, rows: LabelledRows, losses: Losses, batch: Mapping[str, Any]) -> None:
        """Record TRL's metrics, and the losses if there are several."""
        sums = {"tokens": batch["attention_mask"].sum()}
        for side, of_side in (("chosen", rows.label), ("rejected", ~rows.label)):
            sums[side] = of_side.sum()
            sums[f"logps/{side}"] = rows.logps[of_side].sum()
            if rows.logratios is not None:
                sums[f"rewards/{side}"] = self.args.beta * rows.logratios[of_side].sum()
        for name, term in losses.terms.items():
            sums |= {f"loss/{name}": term.sum(), f"rows/{name}": torch.tensor(len(term))}
        values = torch.stack([value.to(self.accelerator.device, torch.float64) for value in sums.values()])
        totals = dict(zip(sums, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        self.count_tokens(round(totals["tokens"]))
        means = {
            name: totals[name] / totals[side]
            for side in ("chosen", "rejected")
            for name in (f"rewards/{side}", f"logps/{side}")
            if name in totals and totals[side]
        }
        if len(losses.terms) > 1:
            counted = [name for name in losses.terms if totals[f"rows/{name}"]]
            means |= {f"loss/{name}": totals[f"loss/{name}"] / totals[f"rows/{name}"] for name in counted}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        if rows.reference_point is not None:
            means["kl"] = rows.reference_point.item()
        record_metrics(self, self.mode, **means)


def _rows(name: str, dataset: Any, args: UnpairedConfig) -> Any:
    """Return a data set as rows of a prompt, a completion and a label, checked as far as it can be read now."""
    if isinstance(dataset, dict):
        return {key: _rows(f"{name}[{key!r}]", each, args) for key, each in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"{name} must be a datasets.Dataset or IterableDataset, not a {type(dataset).__name__}")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    if {"chosen", "rejected", "prompt"} <= first.keys() and "completion" not in first:
        dataset = unpair_preference_dataset(dataset)
        first = next(iter(dataset))
    if QUALITY in args.objective.needs and QUALITY not in first:
        names = ", ".join(loss.name for loss in args.objective.losses if QUALITY in loss.needs)
        raise ValueError(
            f"{name} has no column {QUALITY}, which {names} needs: a number in [0, 1] for each row, as the strategy qcrd of contralto data writes it"
        )
    if missing := [column for column in COLUMNS if column not in first]:
        raise ValueError(
            f"{name} has no column {missing[0]}; a row has {', '.join(COLUMNS)}, or prompt, chosen and rejected"
        )
    if images := [column for column in ("image", "images") if column in first]:
        raise ValueError(
            f"{name} has a column {images[0]}: completions with labels are read without images, drop the column"
        )
    if isinstance(dataset, IterableDataset):
        if args.halves:
            raise ValueError(
                f"{name} is a stream, and {', '.join(args.loss_type)} draw rows by their label: load it whole (load_unpaired)"
            )
        return dataset
    _check_labels(name, dataset, args)
    if QUALITY in args.objective.needs:
        _check_qualities(name, dataset)
    return dataset


def _check_qualities(name: str, dataset: Dataset) -> None:
    """Reject qualities that are no numbers in [0, 1]."""
    for at, value in enumerate(dataset[QUALITY], 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name}, row {at}, column {QUALITY}: it must be a number in [0, 1], not {value!r}")


def _check_labels(name: str, dataset: Dataset, args: UnpairedConfig) -> None:
    """Reject labels that are no truth values, labels that no loss reads or that are missing, and empty completions."""
    labels, read, losses = list(dataset["label"]), args.objective.labels, ", ".join(args.loss_type)
    for at, (label, completion) in enumerate(zip(labels, dataset["completion"], strict=True), 1):
        if not isinstance(label, bool):
            raise ValueError(f"{name}, row {at}, column label: it must be true or false, not {label!r}")
        if label not in read:
            raise ValueError(
                f"{name}, row {at}: its label is {WORDS[label]}, and {losses} reads no such rows: drop them, or add a loss that does"
            )
        if not completion:
            raise ValueError(f"{name}, row {at}, column completion: it is empty: drop such rows")
    if name == "train_dataset" and (absent := read - set(labels)):
        raise ValueError(
            f"{name} has no row with the label {WORDS[min(absent)]}, and {losses} reads such rows: add some"
        )
