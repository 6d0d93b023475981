"""Run tasks of lm-eval under several decoders and their controls on the same documents, and compare the answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contralto import __version__
from contralto.decoding.quantization import BITS, MAIN, check_bits, take_bits
from contralto.eval.comparison.columns import Column, gather
from contralto.eval.comparison.planning import (
    Subject,
    TaskPlan,
    check_decoders,
    count_runs,
    make_plans,
    short_names,
    takes_images,
)
from contralto.eval.comparison.runs import Runner
from contralto.eval.comparison.significance import adjust
from contralto.eval.comparison.summary import summarise
from contralto.eval.comparison.tasks import Conditions, load_tasks
from contralto.eval.comparison.verdict import conclude

__all__ = ["compare"]


def compare(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    decoders: Sequence[str],
    *,
    output: Path,
    conditions: Conditions | None = None,
    model_args: Mapping[str, Any] | None = None,
    include_path: Sequence[str] = (),
    data_dir: Path | None = None,
    reuse: Sequence[Path] = (),
    logged: Mapping[str, Path] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-eval under several decoders and their controls, and compare the answers.

    Nothing that was answered before is answered again. `planning.make_plans` assigns models and methods to tasks.

    Args:
        subjects: The models, a column each.
        tasks: Names of tasks or groups, or YAML files.
        decoders: Decoders such as "cd beta=0.5", see `parse_decoder`; the controls of a method are added.
        output: The folder in which all answers are kept.
        conditions: The settings of all tasks; None for the defaults.
        model_args: Arguments of `ContraltoLM` for all models: batch_size, device, dtype, load_in_4bit, amateur_load_in_8bit, ...
        include_path: Folders with further tasks.
        data_dir: A folder with local data, see `contralto.eval.data`.
        reuse: Folders of lm-eval's own results; runs of the same configuration are taken from there.
        logged: Further rows, by name, from folders in which any run of lm-eval logged its samples.
        quiet: Show no progress of single runs.

    Returns:
        Plain data: `models`, `decoders`, `conditions`, `tasks`, each from `summarise` with Holm's p, and verdicts, see `conclude`.

    Raises:
        ValueError: A task, method or option is unknown, a model or task has no partner, or kept answers are to other questions.
    """
    conditions, names = conditions or Conditions(), short_names(subjects)
    check_decoders(decoders, logged or {}, subjects)
    loaded = load_tasks(tasks, conditions, include_path, data_dir, output)
    plans = make_plans(loaded, subjects, decoders, sampled=bool(conditions.seeds))
    runner = Runner(output, conditions, reuse=reuse, quiet=quiet)
    columns, sizes = _run_all(plans, subjects, names, runner, model_args or {}, logged)
    summaries = [summarise(plan.task, plan.rows, columns[plan.task.name]) for plan in plans]
    adjust(summaries)
    about = {"models": sizes, "decoders": list(decoders), "reused": runner.reused}
    comparison = _about(conditions, model_args or {}, **about) | {"tasks": summaries}
    conclude(comparison)
    return comparison


def _run_all(
    plans: Sequence[TaskPlan],
    subjects: Sequence[Subject],
    names: Mapping[str, str],
    runner: Runner,
    model_args: Mapping[str, Any],
    logged: Mapping[str, Path] | None,
) -> tuple[dict[str, list[Column]], dict[str, dict[str, Any]]]:
    """Run all plans, one model in memory at a time; return the columns of each task, and the size of each model."""
    progress = _Progress(sum(count_runs(rows, runner.conditions) for plan in plans for _, rows in plan.subjects))
    columns: dict[str, list[Column]] = {plan.task.name: [] for plan in plans}
    sizes = {}
    for subject in subjects:
        own = [(plan.task, rows) for plan in plans for each, rows in plan.subjects if each is subject]
        lm = _load(subject, own[0][0].has_images or takes_images(subject), model_args)
        name = names[subject.name]
        sizes[name] = {"name": subject.name, "parameters": int(lm.model.num_parameters()), **subject.sources}
        sizes[name] |= {} if subject.adapter is None else {"adapter": subject.adapter}
        for row in (row for _, rows in own for row in rows if row.is_run):
            lm.decoding_by(
                **row.options
            )  # loads the other models, of which some may be missing or of another tokenizer
        for task, rows in own:
            columns[task.name].append(gather(lm, name, task, rows, runner, logged=logged, progress=progress))
    return columns, sizes


def _about(conditions: Conditions, model_args: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return the fields of the results that are common to all tasks."""
    settings = {**conditions.describe(), "seeds": list(conditions.seeds)}
    return {
        "contralto": __version__,
        **values,
        "conditions": settings,
        "batch_size": str(model_args.get("batch_size", 1)),
    }


class _Progress:
    """Print the title of each run with its number.

    Args:
        total: The number of runs.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, title: str) -> str:
        self.done += 1
        return f"[{self.done}/{self.total}] {title}"


def _load(subject: Subject, has_images: bool, model_args: Mapping[str, Any]) -> Any:
    from contralto.eval.models.lm import ContraltoLM
    from contralto.eval.models.vlm import ContraltoVLM

    own = dict(model_args)
    bits = take_bits(own)
    check_bits(bits, subject.sources)
    own |= {name: True for name, value in BITS.items() if bits.get(MAIN) == value}
    own |= {} if subject.adapter is None else {"peft": subject.adapter}
    lm = (ContraltoVLM if has_images else ContraltoLM)(pretrained=subject.name, **own)
    lm.bits = bits  # the other models are loaded with the decoders that read them
    return lm
