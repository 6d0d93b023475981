"""`LogReport`: the report of a training whose trainer logs all that there is to say, such as a distillation.

The log is kept in `training_log.json` beside the checkpoints, rewritten whenever the trainer logs, so that `write_log_report(folder)` also
works for a run that was killed.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto import __version__
from contralto.align.monitoring.about import describe_run
from contralto.align.monitoring.panels import Panel, inline_svg, write_picture
from contralto.align.monitoring.report import PAGE, PICTURE
from contralto.common.files import replace_text
from contralto.common.html import render_page
from contralto.common.plots import BLUE, GREEN, ORANGE, PALETTE

__all__ = [
    "LOG",
    "ONCE",
    "PANELS",
    "Curve",
    "LogReport",
    "figures_of_log",
    "log_verdict",
    "logged_values",
    "read_log",
    "write_log_report",
]

logger = logging.getLogger(__name__)

LOG = "training_log.json"
AVERAGED = 5
"""The number of logged values, at most, whose mean is the figure of the beginning or the end of a training."""
ONCE = "not logged"
"""The start of a curve with one value."""
SAVED_EVERY = 10.0
"""Seconds between two writes of the log."""


class Curve(NamedTuple):
    """A line of a plot."""

    key: str
    """The key of the value in the trainer's log."""
    label: str


TEACHERS, STUDENTS = "the teacher's completions", "the student's completions"
PANELS: dict[str, tuple[Curve, ...]] = {
    "Loss": (Curve("loss", "training"), Curve("eval_loss", "held-out")),
    f"Divergence from the teacher on {TEACHERS}": (
        Curve("loss/chosen", "training"),
        Curve("eval_loss/chosen", "held-out"),
    ),
    f"Divergence from the teacher on {STUDENTS}": (
        Curve("loss/rejected", "training"),
        Curve("eval_loss/rejected", "held-out"),
    ),
    f"Log-probability per token of {TEACHERS}": (
        Curve("logps/chosen", "student"),
        Curve("teacher_logps/chosen", "teacher"),
        Curve("eval_logps/chosen", "student, held-out"),
    ),
    f"Log-probability per token of {STUDENTS}": (
        Curve("logps/rejected", "student"),
        Curve("teacher_logps/rejected", "teacher"),
        Curve("eval_logps/rejected", "student, held-out"),
    ),
    "alpha": (Curve("alpha/chosen", TEACHERS), Curve("alpha/rejected", STUDENTS)),
    "Weight in the loss": (Curve("weight/chosen", TEACHERS), Curve("weight/rejected", STUDENTS)),
    "Gradient norm": (Curve("grad_norm", "training"),),
    "Learning rate": (Curve("learning_rate", "training"),),
}
"""The curves of the report by the titles of their plots; a plot without values is left out."""


class LogReport(TrainerCallback):
    """Keep the log of a `DistillationPairTrainer`, and write a report at the end of the training.

    Args:
        trainer: the trainer, which need not be initialised yet.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.began = time.monotonic()
        self.before = 0.0
        """Seconds of the run before it was resumed."""
        self.saved = -SAVED_EVERY
        """When the log was written last."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, which goes on in a resumed run."""
        self.began = time.monotonic()
        path = Path(args.output_dir or ".") / LOG
        if state.global_step and path.is_file():
            self.before = float(read_log(path.parent)["about"].get("seconds", 0.0))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the log, at most every `SAVED_EVERY` seconds."""
        if state.is_world_process_zero and time.monotonic() - self.saved > SAVED_EVERY:
            self._save(args, state)
            self.saved = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report; a plot that fails does not cost the trained model."""
        if not state.is_world_process_zero:
            return
        folder = self._save(args, state)
        if not any("loss" in line for line in state.log_history):
            return  # the run was over before
        try:
            page = write_log_report(folder)
        except Exception as error:  # noqa: BLE001
            logger.warning("the report could not be written: %s; contralto align report %s tries again", error, folder)
            return
        if not args.disable_tqdm:
            tqdm.write(f"report: {page}")

    def _save(self, args: TrainingArguments, state: TrainerState) -> Path:
        trainer, folder = self.trainer, Path(args.output_dir or ".")
        data = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
        splits = data.pop("eval_dataset")
        data |= splits if isinstance(splits, dict) else {} if splits is None else {"eval_dataset": splits}
        about = describe_run(trainer, data) | {
            "teacher": getattr(trainer.args, "teacher_model_name_or_path", None) or "a loaded model",
            "findings": [{"level": each.level, "text": str(each)} for each in trainer.audit.findings],
            "seconds": self.before + time.monotonic() - self.began,
            "steps": state.max_steps,
            "done": state.global_step,
        }
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / LOG, json.dumps({"about": about, "logs": state.log_history}, default=str))
        return folder


def read_log(folder: Path) -> dict[str, Any]:
    """Return the description and the log of a run, `about` and `logs`.

    Args:
        folder: the run's `output_dir`.

    Raises:
        ValueError: the folder has no log.
    """
    path = folder / LOG
    if not path.is_file():
        raise ValueError(f"there is no {LOG} in {folder}: give the output_dir of a distillation with report set")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_log_report(folder: str | os.PathLike[str]) -> Path:
    """Write the report of a run.

    Args:
        folder: the run's `output_dir`, with its `training_log.json`.

    Returns:
        The path of the page; the picture is beside it.

    Raises:
        ValueError: the folder has no log, or nothing was logged.
        ImportError: matplotlib is not installed.
    """
    output = Path(folder)
    content = read_log(output)
    logs = content["logs"]
    panels = list(_panels(logs))
    if not panels:
        raise ValueError(f"{output / LOG} holds no step: train for more than logging_steps")
    write_picture(panels, output / PICTURE)
    page = render_page(
        "contralto.align.monitoring",
        "log_report.html.j2",
        about=content["about"],
        verdict=log_verdict(content["about"], logs),
        figures=figures_of_log(logs),
        plots=[inline_svg(panel) for panel in panels],
        version=__version__,
    )
    replace_text(output / PAGE, page)
    return output / PAGE


def log_verdict(about: Mapping[str, Any], logs: Sequence[Mapping[str, Any]]) -> str:
    """Return the result of the training in one sentence.

    The figures are held-out where there are several evaluations, else means of the first and last values of the training; the loss itself is
    not compared, since a curriculum changes what it is a sum of.

    Args:
        about: the description of the run.
        logs: the log history of the trainer.

    Examples:
        >>> log_verdict({"done": 2}, [{"step": 1, "loss/chosen": 0.5}, {"step": 2, "loss/chosen": 0.25}])
        "After 2 steps the divergence from the teacher on the teacher's completions is 0.25, and was 0.5 at the start (training)."
    """
    parts = []
    for key, name in (("loss/chosen", TEACHERS), ("loss/rejected", STUDENTS)):
        held = logged_values(logs, f"eval_{key}")
        values, of = (held, "held-out") if len(held) > 1 else (logged_values(logs, key), "training")
        if values:
            first, last = _ends([value for _, value in values])
            was = (
                f"logged once, in step {values[0][0]}" if first is None else f"and was {first:.3g} at the start ({of})"
            )
            parts.append(f"on {name} is {last:.3g}, {was}")
    if not parts:
        return f"After {about['done']} steps."
    return f"After {about['done']} steps the divergence from the teacher {'; '.join(parts)}."


def _ends(values: Sequence[float]) -> tuple[float | None, float]:
    """Return the means of the first and the last values, of at most a half of them each; None and the value if there is only one."""
    if len(values) == 1:
        return None, values[0]
    count = min(AVERAGED, len(values) // 2)
    return fmean(values[:count]), fmean(values[-count:])


def logged_values(logs: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return steps and values of a key of a trainer's log.

    Args:
        logs: the log history of the trainer.
        key: such as `eval_loss`.
    """
    return [(line["step"], float(line[key])) for line in logs if line.get(key) is not None and "step" in line]


def _panels(logs: Sequence[Mapping[str, Any]]) -> Sequence[Panel]:
    return [
        Panel(title, lambda axes, curves=curves: _draw(axes, logs, curves))  # type: ignore[misc]
        for title, curves in PANELS.items()
        if any(logged_values(logs, curve.key) for curve in curves)
    ]


def _draw(axes: Any, logs: Sequence[Mapping[str, Any]], curves: Sequence[Curve]) -> None:
    for colour, curve in zip((BLUE, ORANGE, GREEN, *PALETTE), curves, strict=False):
        if points := logged_values(logs, curve.key):
            marker = "." if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=curve.label, marker=marker)


def figures_of_log(logs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows of a table: the means of the first and the last values of each curve, and the number of its values.

    A curve with one value has no start.

    Args:
        logs: the log history of the trainer.
    """
    rows = [("", ["start", "end", "values"])]
    for title, curves in PANELS.items():
        for curve in curves:
            if values := [value for _, value in logged_values(logs, curve.key)]:
                first, last = _ends(values)
                label = title if len(curves) == 1 else f"{title}: {curve.label}"
                rows.append((label, [ONCE if first is None else f"{first:.4g}", f"{last:.4g}", str(len(values))]))
    return rows
