"""The output folder of a training in which an earlier run has left measurements and checkpoints.

A run that starts anew must neither be described by what another run measured nor resumed from its checkpoints.
"""

import json
import logging
import os
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto.align.monitoring.log_report import LOG
from contralto.align.monitoring.record import RECORD
from contralto.align.monitoring.report import PAGE, PICTURE
from contralto.common.files import replace_text, set_aside

__all__ = ["EARLIER", "OutputFolder", "checkpoints", "last_checkpoint", "set_adapter_aside"]

logger = logging.getLogger(__name__)

EARLIER = "_earlier_runs"
"""The folder for measurements of earlier runs; `push_to_hub` leaves out names that begin with `_`."""
MEASURED = (RECORD, LOG, PAGE, PICTURE)
"""The files that a card or a report is made of, and the report."""
OTHERS = "checkpoints.json"
"""The file in `EARLIER` with the names of checkpoints that do not belong to the latest run."""


class OutputFolder(TrainerCallback):
    """Set aside what an earlier run measured, unless this run resumes it, and record which checkpoints are of other runs."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the measurements of another run aside.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`; its step is that of the checkpoint which is resumed, or 0.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if not state.is_world_process_zero:
            return
        folder, step = Path(args.output_dir or "."), state.global_step
        others = _of_other_runs(folder)
        if not step or _name(step) in others:
            _set_measurements_aside(folder)
        later = {path.name for at, path in checkpoints(folder).items() if at > step}
        _write(folder, (others | later) - {_name(step)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Count the checkpoint that was just written as one of this run.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".")
        others = _of_other_runs(folder)
        if _name(state.global_step) in others:
            _write(folder, others - {_name(state.global_step)})


def checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the checkpoints that were written completely, by their steps.

    `trainer_state.json` is what the Trainer writes last. A run that is killed while it saves leaves a checkpoint without it, which
    `get_last_checkpoint` of transformers 5.23 would choose: see https://github.com/huggingface/transformers/issues/35782.

    Args:
        folder: the run's `output_dir`.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    steps = {path.name.removeprefix("checkpoint-"): path for path in complete}
    return {int(step): path for step, path in steps.items() if step.isdecimal()}


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint of the latest run, None if there is none.

    Args:
        folder: the run's `output_dir`.

    Examples:
        >>> last_checkpoint("no/such/folder")
    """
    others = _of_other_runs(Path(folder))
    own = {step: path for step, path in checkpoints(folder).items() if path.name not in others}
    return str(own[max(own)]) if own else None


def set_adapter_aside(folder: Path) -> None:
    """Rename an adapter in the folder of a whole model, which `from_pretrained` would load on top of the model.

    Args:
        folder: where a model without an adapter has been saved.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            set_aside(folder / name)


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _of_other_runs(folder: Path) -> set[str]:
    """Return the names of checkpoints of other runs than the latest."""
    path = folder / EARLIER / OTHERS
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def _write(folder: Path, names: set[str]) -> None:
    path = folder / EARLIER / OTHERS
    if names or path.is_file():
        replace_text(path, json.dumps(sorted(names)))


def _set_measurements_aside(folder: Path) -> None:
    """Move the measurements and reports in the folder into a new one, with a note."""
    found = [folder / name for name in MEASURED if (folder / name).is_file()]
    if not found:
        return
    taken = [int(path.name) for path in (folder / EARLIER).glob("*") if path.name.isdecimal()]
    target = folder / EARLIER / str(max(taken, default=0) + 1)
    target.mkdir(parents=True)
    for path in found:
        set_aside(path, into=target)
    logger.warning(
        "%s holds measurements of an earlier run, which this run does not resume: %s moved into %s",
        *(folder, ", ".join(path.name for path in found), target),
    )
