"""`DataAudit`: the audit of the rows of a trainer, before its first step."""

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto.align.monitoring.data_audit import STREAMED_ROWS, audit_dropped, audit_rows
from contralto.align.monitoring.findings import Finding
from contralto.align.trainers.specials import end_tokens

__all__ = ["DataAudit"]

logger = logging.getLogger(__name__)


class DataAudit(TrainerCallback):
    """Audit the rows of a trainer of pairs as its option `audit` says, and log the findings.

    Args:
        trainer: the trainer, which need not be initialised yet.
        originals: its datasets before preparation, by name.
        skip: kinds of faults that are none for this trainer, see `contralto.align.monitoring.data_audit.FAULTS`.
    """

    def __init__(self, trainer: Any, originals: Mapping[str, Any], skip: Container[str] = ()) -> None:
        splits = originals.get("eval_dataset")
        self.trainer, self.originals = trainer, {**originals, **(splits if isinstance(splits, dict) else {})}
        self.skip = skip
        self.findings: list[Finding] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit the data, before a reference or a teacher is precomputed.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if self.trainer.args.audit == "off":
            return
        for name, dataset in self.datasets().items():
            self.findings += self._audit_rows(name, dataset)
        self.report_findings(self.findings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what was audited.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if self.trainer.args.audit != "off" and state.global_step == 0:
            self.report_audit()

    def datasets(self) -> dict[str, Any]:
        """Return the prepared datasets by name."""
        evaluation = self.trainer.eval_dataset
        splits = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
        return {
            name: data
            for name, data in {"train_dataset": self.trainer.train_dataset, **splits}.items()
            if data is not None
        }

    def audited(self) -> str:
        """Return what was audited, in words."""
        sizes = [
            f"{len(data)} rows of {name}" if isinstance(data, Dataset) else f"the first {STREAMED_ROWS} rows of {name}"
            for name, data in self.datasets().items()
        ]
        return ", ".join(sizes)

    def _audit_rows(self, name: str, dataset: Any) -> list[Finding]:
        args, processing_class = self.trainer.args, self.trainer.processing_class
        shows_progress = self.trainer.state.is_world_process_zero and not args.disable_tqdm
        ends = end_tokens(self.trainer.policy, processing_class)
        limits: dict[str, Any] = {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
        findings = audit_rows(
            dataset, processing_class, name=name, ends=ends, skip=self.skip, progress=shows_progress, **limits
        )
        return findings + audit_dropped(
            self.originals.get(name),
            dataset,
            processing_class,
            name=name,
            max_length=args.max_length,
            progress=shows_progress,
        )

    def report_findings(self, findings: Sequence[Finding]) -> None:
        """Log the findings; errors end the run.

        Args:
            findings: what the audit found.

        Raises:
            ValueError: one is an error, and the option `audit` is `stop`.
        """
        errors = [finding for finding in findings if finding.level == "error"]
        for finding in findings:
            if self.trainer.state.is_world_process_zero and (
                finding not in errors or self.trainer.args.audit == "warn"
            ):
                logger.warning("audit: %s", finding)
        if errors and self.trainer.args.audit == "stop":
            others = f" ({len(errors) - 1} more errors after it)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0]}{others} To train all the same, set audit to warn.")

    def report_audit(self) -> None:
        """Print one line that says what was audited, and how many findings there were."""
        if not self.trainer.state.is_world_process_zero or self.trainer.args.disable_tqdm:
            return
        count = len(self.findings)
        found = "nothing found" if not count else f"{count} finding{'s' * (count > 1)}, see above"
        tqdm.write(f"audit of {self.audited()}: {found}")
