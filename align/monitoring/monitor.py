"""`Monitor`: what a preference training does to the texts it trains on, watched on a fixed set of pairs and said in words.

Preference losses raise the margin of two texts, and may do so by making both less likely: likelihood displacement (Razin et al. 2024,
arXiv 2410.08847). The loss does not show it. So the log-probabilities of some pairs, held-out ones where there are any, are
measured before training and about twenty times in its course, and with them the divergence from the reference.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.models.utils import unwrap_model_for_generation

from contralto.align.monitoring.data_audit import audit_dropped, audit_rows
from contralto.align.monitoring.findings import Finding, row_name
from contralto.align.monitoring.model_audit import audit_model
from contralto.align.monitoring.record import RECORD, Point, Record, symptoms
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.scoring import Scoring
from contralto.align.trainers.specials import end_tokens
from contralto.align.trl_compat import gathered
from contralto.common.head import head_of
from contralto.common.placement import input_device
from contralto.data_gen.checks.ches import ches

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

MEASUREMENTS = 20
"""In the course of a training, about."""
AUDITED = 4
"""Pairs that policy and reference are compared on."""
SHOWN = 2000
"""Characters of a text that are kept for the report."""


class Measured(NamedTuple):
    """Log-probabilities of all pairs, `(n,)` each, and the divergence."""

    chosen: Tensor
    rejected: Tensor
    kl: float | None


class Monitor(TrainerCallback):
    """Audits a `PreferenceTrainer` before its first step, measures it in its course, and writes a report at its end.

    `PreferenceTrainer` makes one, as its options say: `audit`, `monitor_pairs`, `monitor_generate`, `report`.

    Args:
        trainer: the trainer, which need not be ready yet.
        given: its data sets before preparation, by name.
    """

    def __init__(self, trainer: Any, given: Mapping[str, Any]) -> None:
        splits = given.get("eval_dataset")
        self.trainer, self.given = trainer, {**given, **(splits if isinstance(splits, dict) else {})}
        self.findings: list[Finding] = []
        self.record: Record | None = None
        self.batches: list[Mapping[str, Any]] = []
        self.seconds = 0.0
        self.began = 0.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The audit of the data, before a reference is precomputed."""
        if self.trainer.args.audit == "off":
            return
        for name, dataset in self._datasets().items():
            self.findings += self._audit_rows(name, dataset)
        self._act(self.findings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The audit of the model; the first measurement."""
        self.began = time.monotonic()
        source, dataset = self._source()
        rows = _spread(dataset, self.trainer.args.monitor_pairs or AUDITED)
        self.batches = self._collated(rows)
        if self.trainer.args.audit != "off" and state.global_step == 0:
            with _at_rest(self.trainer.model):
                found = audit_model(self.trainer, self._some_batches())
            self.findings += found
            self._act(found)
        if self.trainer.args.monitor_pairs:
            self._begin(source, rows, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A measurement, about twenty times in all."""
        if self.record is not None and (state.global_step % self._every(state) == 0 or control.should_training_stop):
            self._measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last measurement, and the report."""
        if self.record is None:
            return
        if self.record.points[-1].step != state.global_step:
            self._measure(state)
        self._warn(state, is_last=True)
        self._save(state)
        if self.trainer.args.report and state.is_world_process_zero:
            self._report()

    # ------------------------------------------------------------------------------------------------------------ audit

    def _datasets(self) -> dict[str, Any]:
        """Prepared, by name."""
        evaluation = self.trainer.eval_dataset
        splits = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
        return {
            name: data
            for name, data in {"train_dataset": self.trainer.train_dataset, **splits}.items()
            if data is not None
        }

    def _audit_rows(self, name: str, dataset: Any) -> list[Finding]:
        args, how = self.trainer.args, self.trainer.processing_class
        shows = self.trainer.state.is_world_process_zero and not args.disable_tqdm
        ends = end_tokens(self.trainer.policy, how)
        limits: dict[str, Any] = {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
        found = audit_rows(dataset, how, name=name, ends=ends, progress=shows, **limits)
        return found + audit_dropped(
            self.given.get(name), dataset, how, name=name, max_length=args.max_length, progress=shows
        )

    def _act(self, findings: Sequence[Finding]) -> None:
        """Say what was found; errors end the run."""
        errors = [found for found in findings if found.level == "error"]
        for found in findings:
            if self.trainer.state.is_world_process_zero and (found not in errors or self.trainer.args.audit == "warn"):
                logger.warning("audit: %s", found)
        if errors and self.trainer.args.audit == "stop":
            more = f" ({len(errors) - 1} more errors after it)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0]}{more} To train all the same, set audit to warn.")

    def _some_batches(self) -> list[Mapping[str, Any]]:
        pairs, kept = 0, []
        for batch in self.batches:
            kept.append(batch)
            pairs += len(batch["input_ids"]) // 2
            if pairs >= AUDITED:
                break
        return kept

    # ---------------------------------------------------------------------------------------------------------- measure

    def _source(self) -> tuple[str, Any]:
        """The data set that pairs are taken from: the first held-out one, or what is trained on."""
        held = {name: data for name, data in self._datasets().items() if name != "train_dataset"}
        return next(iter(held.items()), ("train_dataset", self.trainer.train_dataset))

    def _collated(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        size = self.trainer.args.per_device_eval_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self.trainer.data_collator([dict(row) for row in batch]) for batch in batches]

    def _begin(self, source: str, rows: Sequence[Mapping[str, Any]], state: TrainerState) -> None:
        key = sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in self.batches)).hexdigest()[:16]
        if state.global_step and self._resumed(key, state):
            return
        with _at_rest(self.trainer.model):
            start = self._measured()
            scores = self._ches()
        self.record = Record(
            key=key,
            source=source,
            pairs=self._pairs(rows),
            start_chosen=start.chosen.tolist(),
            start_rejected=start.rejected.tolist(),
            ches=scores,
            findings=self.findings,
            about=self._about(source),
        )
        self._add(state, start)
        self._save(state)

    def _resumed(self, key: str, state: TrainerState) -> bool:
        """Go on with the record of the run that is resumed, if it is of the same pairs."""
        folder = Path(self.trainer.args.output_dir)
        found = state.is_world_process_zero and (folder / RECORD).is_file()
        box = [Record.load(folder) if found else None]
        broadcast_object_list(box, from_process=0)  # all processes measure, or none
        record = box[0]
        if record is None or record.key != key:
            if state.is_world_process_zero:
                logger.warning(
                    "monitor: there is no record of this run's start; changes are counted from step %s on.",
                    state.global_step,
                )
            return False
        record.points = [point for point in record.points if point.step <= state.global_step]
        record.warnings = [each for each in record.warnings if each["step"] <= state.global_step]
        self.record, self.seconds, self.findings = record, record.about.get("seconds", 0.0), record.findings
        return True

    def _every(self, state: TrainerState) -> int:
        """Steps between measurements: a multiple of those between logs, where the measurements are logged."""
        logged = max(1, round(state.logging_steps)) if self.trainer.args.logging_strategy == "steps" else 1
        return logged * max(1, round(state.max_steps / MEASUREMENTS / logged))

    def _measure(self, state: TrainerState) -> None:
        assert self.record is not None
        with _at_rest(self.trainer.model):
            now = self._measured()
        self._add(state, now)
        self.trainer.record_metrics(**self.record.points[-1].metrics())
        self._warn(state)
        self._save(state)

    def _add(self, state: TrainerState, now: Measured) -> None:
        assert self.record is not None
        chosen = now.chosen - torch.tensor(self.record.start_chosen)
        rejected = now.rejected - torch.tensor(self.record.start_rejected)
        with _at_rest(self.trainer.model):
            length = self._length() if self.trainer.args.monitor_generate else None
        point = Point(state.global_step, state.epoch or 0.0, chosen.tolist(), rejected.tolist(), now.kl, length)
        self.record.points.append(point)

    def _measured(self) -> Measured:
        """The log-probabilities of all pairs now."""
        sums: list[Tensor] = []
        divergence, tokens = 0.0, 0
        for inputs in self.batches:
            batch = PairBatch.of(self.trainer.to_device(inputs))
            with torch.no_grad(), self.trainer.accelerator.autocast():
                scored = self.trainer.score_tokens(self.trainer.model, batch, Scoring(teacher=self._teacher(batch)))
            sums.append(scored.logps.double().sum(-1).cpu())
            tokens += int(batch.mask.sum())
            if scored.kl is not None:
                divergence += float(scored.kl.double().sum())
        halves = [each.chunk(2) for each in sums]
        chosen, rejected = (torch.cat([half[side] for half in halves]).float() for side in (0, 1))
        kl = max(0.0, divergence / max(1, tokens)) if self._has_divergence() else None  # rounding may go below 0
        return Measured(chosen, rejected, kl)

    def _has_divergence(self) -> bool:
        """Whether there is a reference, and its head is in one piece."""
        trainer = self.trainer
        model = trainer.unwrap(trainer.model)
        adapter = is_peft_model(model)
        if trainer.ref_model is None and not adapter:
            return False
        if adapter and any(config.is_prompt_learning for config in model.peft_config.values()):
            return False
        in_shards = trainer.is_fsdp_enabled or trainer.args.deepspeed_plugin is not None
        return not in_shards

    def _teacher(self, batch: PairBatch) -> Any:
        """The reference's hidden states and head."""
        if not self._has_divergence():
            return None
        with self.trainer.reference_model() as (model, bare):
            return self.trainer.score_tokens(model, batch, Scoring(hidden=True)).hidden, head_of(bare, gather=gathered)

    def _ches(self) -> list[float | None]:
        """ln-CHES of every pair, from the policy's hidden states; they say what displacement to expect."""
        scores: list[float | None] = []
        for inputs in self.batches:
            batch = PairBatch.of(self.trainer.to_device(inputs))
            with torch.no_grad(), self.trainer.accelerator.autocast():
                rows = self.trainer.score_tokens(self.trainer.model, batch, Scoring(hidden=True)).hidden
            if head_of(self.trainer.policy, gather=gathered) is None:  # then these are logits
                return [None] * sum(len(each["completion_mask"]) // 2 for each in self.batches)
            states = rows.new_zeros(*batch.mask.shape, rows.shape[-1])
            states[batch.mask] = rows
            has_tokens = batch.mask.any(-1).chunk(2)
            usable = has_tokens[0] & has_tokens[1]
            (chosen, rejected), (chosen_mask, rejected_mask) = states.chunk(2), batch.mask.chunk(2)
            found = ches(chosen[usable], rejected[usable], chosen_mask[usable], rejected_mask[usable]).ln_ches.tolist()
            scores += [found.pop(0) if each else None for each in usable.tolist()]
        return scores

    def _length(self) -> float:
        """How many tokens the policy writes for the first prompts, greedily."""
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        limit = 2 * max(int(batch["completion_mask"].sum(-1).max()) for batch in self.batches)
        prompts = [prompt for batch in self.batches for prompt in _prompts(batch)][: args.monitor_generate]
        written = 0
        with (
            unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as model,
            torch.no_grad(),
        ):
            for start in range(0, len(prompts), args.per_device_eval_batch_size):
                batch = prompts[start : start + args.per_device_eval_batch_size]
                ids = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(
                    input_device(model)
                )
                texts = model.generate(
                    **ids, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
                written += int(
                    _lengths_of(texts[:, ids["input_ids"].shape[1] :], end_tokens(self.trainer.policy, tokenizer))
                )
        return written / len(prompts)

    # ------------------------------------------------------------------------------------------------------------- tell

    def _warn(self, state: TrainerState, *, is_last: bool = False) -> None:
        """Each kind of warning once."""
        assert self.record is not None
        told = {each["kind"] for each in self.record.warnings}
        args = self.trainer.args
        for kind, text in symptoms(self.record, loss_types=args.loss_type, beta=args.beta, is_last=is_last):
            if kind not in told:
                self.record.warnings.append({"step": state.global_step, "kind": kind, "text": text})
                if state.is_world_process_zero:
                    logger.warning("step %s: %s", state.global_step, text)

    def _save(self, state: TrainerState) -> None:
        assert self.record is not None
        self.record.logs = state.log_history
        seconds = self.seconds + time.monotonic() - self.began
        self.record.about |= {"seconds": seconds, "steps": state.max_steps}
        if state.is_world_process_zero:
            self.record.save(Path(self.trainer.args.output_dir))

    def _report(self) -> None:
        from contralto.align.monitoring.report import write_report

        folder = Path(self.trainer.args.output_dir)
        try:
            path = write_report(folder)
        except Exception as error:  # noqa: BLE001 (a plot that fails must not cost a trained model)
            logger.warning(
                "the report could not be written: %s; contralto.align.monitoring.report.write_report(%r) tries again",
                error,
                str(folder),
            )
            return
        if not self.trainer.args.disable_tqdm:
            tqdm.write(f"report: {path}")

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        lengths = [batch["completion_mask"].sum(-1).chunk(2) for batch in self.batches]
        chosen, rejected = (torch.cat([each[side] for each in lengths]).tolist() for side in (0, 1))
        return [
            {"name": row_name(row, at), "chosen_tokens": chosen[at - 1], "rejected_tokens": rejected[at - 1]}
            | {side: _shown(row.get(side)) for side in ("prompt", "chosen", "rejected")}
            for at, row in enumerate(rows, 1)
        ]

    def _about(self, source: str) -> dict[str, Any]:
        from contralto.align.monitoring.report import versions

        trainer, args = self.trainer, self.trainer.args
        defaults = {each.name: _default(each) for each in dataclasses.fields(args)}
        changed = {
            name: value
            for name, value in args.to_dict().items()
            if name in defaults and value != defaults[name] and name not in ("output_dir", "hub_token")
        }
        model = trainer.unwrap(trainer.model)
        sizes = {name: len(data) if isinstance(data, Dataset) else None for name, data in self._datasets().items()}
        return {
            "model": _named(str(trainer.policy.config.name_or_path)),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "adapter": bool(is_peft_model(model)),
            "device": str(trainer.accelerator.device.type),
            "processes": trainer.accelerator.num_processes,
            "datasets": sizes,
            "losses": list(args.loss_type),
            "beta": args.beta,
            "learning_rate": args.learning_rate,
            "batch": args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * trainer.accelerator.num_processes,
            "source": source,
            "settings": changed,
            "versions": versions(),
        }


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """A model in evaluation mode for a moment, after which random numbers go on as if nothing had been."""
    training, device = model.training, input_device(model)
    own = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(own, device_type="cuda" if device.type == "cpu" else device.type):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _spread(dataset: Any, count: int) -> list[Mapping[str, Any]]:
    """So many rows, from all parts of a data set; of a stream the first."""
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, count))
    size = len(dataset)
    places = [at * size // min(count, size) for at in range(min(count, size))]
    names = {} if "id" in dataset.column_names else {"id": [str(at + 1) for at in places]}
    return [
        dict(row) | {name: values[at] for name, values in names.items()}
        for at, row in enumerate(dataset.select(places))
    ]


def _prompts(batch: Mapping[str, Any]) -> list[list[int]]:
    """The prompts of a batch, without padding, as they stand before the chosen texts."""
    ids, seen, completion = (batch[name].chunk(2)[0] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [row[(a > 0) & (c == 0)].tolist() for row, a, c in zip(ids, seen, completion, strict=True)]


def _lengths_of(texts: Tensor, ends: set[int]) -> int:
    """All tokens of texts up to their end."""
    ended = torch.isin(texts, torch.tensor(sorted(ends), device=texts.device))
    return int((ended.cumsum(-1) - ended.long() == 0).sum())


def _shown(text: Any) -> str:
    """A text, or what messages say, for the report."""
    if isinstance(text, list):
        text = "\n".join(f"{each.get('role')}: {_content(each.get('content'))}" for each in text)
    return str(text or "")[:SHOWN]


def _content(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "[image]") for part in parts)


def _named(model: str) -> str:
    """A folder by its name alone."""
    return Path(model).name if Path(model).is_dir() else model


def _default(option: Any) -> Any:
    return (
        option.default_factory()
        if option.default is dataclasses.MISSING and callable(option.default_factory)
        else option.default
    )
