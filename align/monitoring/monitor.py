"""`Monitor`: the audit before a preference training, its measurements on a fixed set of pairs, and its report.

Preference losses raise the margin of two texts, and may do so by making both less likely: likelihood displacement (Razin et al. 2024,
arXiv 2410.08847). The loss does not show it. So the log-probabilities of some pairs, held-out ones where there are any, are
measured before training, in up to 29 logged steps and in the last one, together with the divergence from the reference.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import IterableDataset
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.models.utils import unwrap_model_for_generation

from contralto.align.monitoring.about import describe_run
from contralto.align.monitoring.audit_callback import DataAudit
from contralto.align.monitoring.findings import row_name
from contralto.align.monitoring.model_audit import audit_model
from contralto.align.monitoring.record import RECORD, Point, Record
from contralto.align.monitoring.symptoms import symptoms
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.scoring import Scoring
from contralto.align.trainers.specials import end_tokens
from contralto.align.trl_compat import gathered
from contralto.common.hashing import content_digest
from contralto.common.head import head_of
from contralto.common.placement import input_device
from contralto.data_gen.checks.ches import ches

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

MEASUREMENTS = 20
"""The number of measurements in a training that is aimed at; see `Monitor._measurement_interval`."""
AUDITED_PAIRS = 4
"""Pairs on which policy and reference are compared."""
DELAY = 3.0
"""Seconds after which a progress bar of a measurement appears."""
REPORTED_CHARACTERS = 2000
"""Characters of a prompt or completion that are kept for the report."""


class PairMeasurement(NamedTuple):
    """Log-probabilities of all pairs, `(n,)` each, and the divergence in nats per token."""

    chosen: Tensor
    rejected: Tensor
    kl: float | None


class Monitor(DataAudit):
    """The callback that audits a `PreferenceTrainer` before its first step, measures it during training, and writes a report at its end.

    `PreferenceTrainer` creates one from its options `audit`, `monitor_pairs`, `monitor_generate` and `report`.

    Args:
        trainer: the trainer, which need not be initialised yet.
        originals: its datasets before preparation, by name.
    """

    def __init__(self, trainer: Any, originals: Mapping[str, Any]) -> None:
        super().__init__(trainer, originals)
        self.record: Record | None = None
        self.batches: list[Mapping[str, Any]] = []
        self.seconds = 0.0
        self.began = 0.0
        self.measured = 0.0
        """Seconds that measurements took."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the model, and measure for the first time."""
        self.began = time.monotonic()
        source, dataset = self._measured_dataset()
        rows = _spread_rows(dataset, self.trainer.args.monitor_pairs or AUDITED_PAIRS)
        self.batches = self._collated(rows)
        if self.trainer.args.audit != "off" and state.global_step == 0:
            with _evaluation_mode(self.trainer.model):
                findings = audit_model(self.trainer, self._audited_batches())
            self.findings += findings
            self.report_findings(findings)
            self.report_audit()
        if self.trainer.args.monitor_pairs:
            self._begin(source, rows, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the monitored pairs in every step that is a multiple of the interval, and in the last one."""
        if self.record is not None and (
            state.global_step % self._measurement_interval(state) == 0 or control.should_training_stop
        ):
            self._measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure for the last time, and write the report."""
        if self.record is None:
            return
        if self.record.points[-1].step != state.global_step:
            self._measure(state)
        self._warn(state, is_last=True)
        self._save(state)
        if state.is_world_process_zero and not self.trainer.args.disable_tqdm:
            tqdm.write(cost_line(self.measured, time.monotonic() - self.began, len(self.record.pairs)))
        if self.trainer.args.report and state.is_world_process_zero:
            self._report()

    # ------------------------------------------------------------------------------------------------------------ audit

    def audited(self) -> str:
        """Return what was audited: the rows, and the model on some pairs."""
        pairs = sum(len(batch["input_ids"]) // 2 for batch in self._audited_batches())
        return f"{super().audited()}, and of the model on {pairs} pairs"

    def _audited_batches(self) -> list[Mapping[str, Any]]:
        pairs, kept = 0, []
        for batch in self.batches:
            kept.append(batch)
            pairs += len(batch["input_ids"]) // 2
            if pairs >= AUDITED_PAIRS:
                break
        return kept

    # ---------------------------------------------------------------------------------------------------------- measure

    def _measured_dataset(self) -> tuple[str, Any]:
        """Return the dataset that pairs are taken from: the first one for evaluation, or else the training set."""
        evaluation = {name: data for name, data in self.datasets().items() if name != "train_dataset"}
        return next(iter(evaluation.items()), ("train_dataset", self.trainer.train_dataset))

    def _collated(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        size = self.trainer.args.per_device_eval_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self.trainer.data_collator([dict(row) for row in batch]) for batch in batches]

    def _begin(self, source: str, rows: Sequence[Mapping[str, Any]], state: TrainerState) -> None:
        key = content_digest(b"".join(batch["input_ids"].numpy().tobytes() for batch in self.batches), 16)
        if state.global_step and self._resumed(key, state):
            return
        began = time.monotonic()
        with _evaluation_mode(self.trainer.model):
            start = self._measurement()
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
        self.measured += time.monotonic() - began
        self._save(state)

    def _resumed(self, key: str, state: TrainerState) -> bool:
        """Continue the record of a resumed run if it measures the same pairs, and return whether it does."""
        folder = Path(self.trainer.args.output_dir)
        exists = state.is_world_process_zero and (folder / RECORD).is_file()
        box = [Record.load(folder) if exists else None]
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

    def _measurement_interval(self, state: TrainerState) -> int:
        """Return the number of steps between measurements, a multiple of that between logs, so that measurements are logged.

        A training that logs L times is measured L times if L is below 30, and 15 to 25 times otherwise.
        """
        logged = max(1, round(state.logging_steps)) if self.trainer.args.logging_strategy == "steps" else 1
        return logged * max(1, round(state.max_steps / MEASUREMENTS / logged))

    def _measure(self, state: TrainerState) -> None:
        assert self.record is not None
        began = time.monotonic()
        with _evaluation_mode(self.trainer.model):
            now = self._measurement()
        self._add(state, now)
        self.measured += time.monotonic() - began
        self.trainer.record_latest(**self.record.points[-1].metrics())
        self._warn(state)
        self._save(state)

    def _add(self, state: TrainerState, now: PairMeasurement) -> None:
        assert self.record is not None
        chosen = now.chosen - torch.tensor(self.record.start_chosen)
        rejected = now.rejected - torch.tensor(self.record.start_rejected)
        with _evaluation_mode(self.trainer.model):
            length = self._length() if self.trainer.args.monitor_generate else None
        point = Point(state.global_step, state.epoch or 0.0, chosen.tolist(), rejected.tolist(), now.kl, length)
        self.record.points.append(point)

    def _measurement(self) -> PairMeasurement:
        """Measure the log-probabilities of all pairs, and the divergence from the reference."""
        sums: list[Tensor] = []
        divergence, tokens = 0.0, 0
        for inputs in self._shown("monitored pairs"):
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
        return PairMeasurement(chosen, rejected, kl)

    def _shown(self, title: str) -> Iterable[Mapping[str, Any]]:
        """Return the batches, with a progress bar that appears after a few seconds."""
        is_shown = self.trainer.state.is_world_process_zero and not self.trainer.args.disable_tqdm
        return tqdm(self.batches, title, unit="batch", leave=False, delay=DELAY, disable=not is_shown)

    def _has_divergence(self) -> bool:
        """Return whether there is a reference, and its head is not sharded."""
        trainer = self.trainer
        model = trainer.unwrap(trainer.model)
        adapter = is_peft_model(model)
        if trainer.ref_model is None and not adapter:
            return False
        if adapter and any(config.is_prompt_learning for config in model.peft_config.values()):
            return False
        is_sharded = trainer.is_fsdp_enabled or trainer.args.deepspeed_plugin is not None
        return not is_sharded

    def _teacher(self, batch: PairBatch) -> Any:
        """Return the hidden states of the reference, `(N, H)`, and its head."""
        if not self._has_divergence():
            return None
        with self.trainer.reference_model() as (model, bare):
            return self.trainer.score_tokens(model, batch, Scoring(hidden=True)).hidden, head_of(bare, gather=gathered)

    def _ches(self) -> list[float | None]:
        """Return ln-CHES of every pair, from the policy's hidden states: a prediction of likelihood displacement."""
        scores: list[float | None] = []
        for inputs in self._shown("ln-CHES of monitored pairs"):
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
            values = ches(chosen[usable], rejected[usable], chosen_mask[usable], rejected_mask[usable]).ln_ches.tolist()
            scores += [values.pop(0) if each else None for each in usable.tolist()]
        return scores

    def _length(self) -> float:
        """Return the mean number of tokens that the policy generates greedily for the first prompts."""
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        limit = 2 * max(int(batch["completion_mask"].sum(-1).max()) for batch in self.batches)
        prompts = [prompt for batch in self.batches for prompt in _prompts(batch)][: args.monitor_generate]
        generated = 0
        with (
            unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as model,
            torch.no_grad(),
        ):
            for start in range(0, len(prompts), args.per_device_eval_batch_size):
                batch = prompts[start : start + args.per_device_eval_batch_size]
                ids = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(
                    input_device(model)
                )
                completions = model.generate(
                    **ids, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
                generated += int(
                    _total_length(
                        completions[:, ids["input_ids"].shape[1] :], end_tokens(self.trainer.policy, tokenizer)
                    )
                )
        return generated / len(prompts)

    # ---------------------------------------------------------------------------------------------------------- report

    def _warn(self, state: TrainerState, *, is_last: bool = False) -> None:
        """Log the symptoms, each kind once in a run."""
        assert self.record is not None
        reported = {each["kind"] for each in self.record.warnings}
        args = self.trainer.args
        for kind, text in symptoms(self.record, loss_types=args.loss_type, beta=args.beta, is_last=is_last):
            if kind not in reported:
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
            | {side: _report_text(row.get(side)) for side in ("prompt", "chosen", "rejected")}
            for at, row in enumerate(rows, 1)
        ]

    def _about(self, source: str) -> dict[str, Any]:
        return describe_run(self.trainer, self.datasets()) | {"source": source}


def cost_line(measured: float, total: float, pairs: int) -> str:
    """Return a line that says how long the monitor took.

    Args:
        measured: seconds that measurements took.
        total: seconds of the training, measurements included.
        pairs: the number of monitored pairs.

    Examples:
        >>> cost_line(3.2, 12.8, 32)
        'monitor: 3.2 of 12.8 seconds (25%) for 32 pairs; fewer monitor_pairs or a larger logging_steps take less'
    """
    return (
        f"monitor: {measured:.1f} of {total:.1f} seconds ({measured / max(total, 1e-9):.0%}) for {pairs} pairs; fewer monitor_pairs or a "
        "larger logging_steps take less"
    )


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Switch a model to evaluation mode, and restore the mode and the state of the random number generators afterwards."""
    training, device = model.training, input_device(model)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _spread_rows(dataset: Any, count: int) -> list[Mapping[str, Any]]:
    """Return `count` evenly spaced rows of a dataset; the first rows of a stream."""
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
    """Return the unpadded prompt ids of a batch, taken from the rows of the chosen completions."""
    ids, seen, completion = (batch[name].chunk(2)[0] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [row[(a > 0) & (c == 0)].tolist() for row, a, c in zip(ids, seen, completion, strict=True)]


def _total_length(completions: Tensor, ends: set[int]) -> int:
    """Return the total number of tokens of completions `(B, T)` up to their first end token."""
    ended = torch.isin(completions, torch.tensor(sorted(ends), device=completions.device))
    return int((ended.cumsum(-1) - ended.long() == 0).sum())


def _report_text(text: Any) -> str:
    """Return a string, or the content of messages, for the report."""
    if isinstance(text, list):
        text = "\n".join(f"{each.get('role')}: {_content(each.get('content'))}" for each in text)
    return str(text or "")[:REPORTED_CHARACTERS]


def _content(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "[image]") for part in parts)
