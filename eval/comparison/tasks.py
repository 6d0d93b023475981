"""Tasks of lm-eval in a comparison.

Read from lm_eval 0.4.13: the steps of `simple_evaluate` between loading a task and `evaluate`.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

from contralto.common.suggestions import did_you_mean
from contralto.eval.comparison.samples import (
    Identity,
    Sample,
    document_digest,
    read_samples,
    request_arguments,
    value_digest,
)
from contralto.eval.data import TASKS, local_tasks
from contralto.eval.metrics import register_in_lm_eval

__all__ = ["Conditions", "Task", "load_tasks", "missing_task"]

FEWSHOT_SEED = 1234
"""lm-eval's own default."""
PREFERRED_METRICS = ("exact_match", "acc_norm", "acc")
"""The metrics to compare where neither the task nor the user names one, in this order."""


@dataclass(frozen=True)
class Conditions:
    """The settings of a task that all decoders share."""

    limit: float | None = None
    num_fewshot: int | None = None
    chat: bool = False
    """Render prompts with the model's chat template."""
    system: str | None = None
    """The system message."""
    seeds: tuple[int, ...] = (0,)
    """The seeds of sampled rows."""
    metric: str | None = None
    """The metric to compare in place of the task's own: a name, or "metric,filter" as lm-eval writes it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Options of tasks."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that determine an answer; their hash names run folders."""
        return {
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "chat": self.chat,
            "system": self.system,
            "metadata": dict(self.metadata),
        }


class Task:
    """A task of lm-eval with the settings of a comparison.

    Args:
        name: Its name.
        task: lm-eval's task.
        conditions: The settings.
    """

    def __init__(self, name: str, task: Any, conditions: Conditions) -> None:
        self.name, self.task, self.conditions = name, task, conditions
        config = task.config.metadata or {}
        self.cluster: str | None = config.get("cluster")
        """The field of a document that names its cluster."""
        self.bucket: str | None = config.get("bucket")
        """The field of a document by which results are broken down."""
        self.yes_no: list[str] | None = config.get("yes_no")
        """The words of the answers yes and no; None for other tasks."""
        self.hint: str | None = config.get("yes_hint")
        """The sentence after a question that asks for yes; None if the task has none."""
        self.metric: str | None = config.get("main_metric")
        self.higher_is_better = bool(config.get("higher_is_better", True))
        self.filter: str | None = None
        if conditions.metric:
            self.metric, _, filter_name = conditions.metric.partition(",")
            self.filter = filter_name or None
        self.part = name
        """The name of the files in which answers are kept."""
        self.has_images = bool(getattr(task, "MULTIMODAL", False))
        self.is_ranking = task.OUTPUT_TYPE != "generate_until"
        self._set_fewshot()

    def _set_fewshot(self) -> None:
        """Set the few-shot examples as `simple_evaluate` does."""
        requested, default = self.conditions.num_fewshot, self.task.get_config("num_fewshot")
        if requested is not None and default != 0:
            self.task.set_config(key="num_fewshot", value=requested)
        elif requested is None and default is None:
            self.task.set_config(key="num_fewshot", value=0)
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def hinted(self, hint: str) -> "Task":
        """Return the same task with a sentence appended to every question.

        Args:
            hint: The sentence, with the space before it.
        """
        other, task, original = copy.copy(self), copy.copy(self.task), self.task.doc_to_text
        task.doc_to_text = lambda *args, **kwargs: original(*args, **kwargs) + hint
        other.task, other.part = task, f"{self.name}-{value_digest(hint)[:8]}"
        return other

    def requests(self, lm: Any) -> list[Any]:
        """Build the requests of the task for a model.

        Args:
            lm: The model, whose chat template may be applied.

        Returns:
            lm-eval's instances.
        """
        chat = self.conditions.chat
        self.task.build_all_requests(
            limit=get_sample_size(self.task, self.conditions.limit),
            rank=0,
            world_size=1,
            system_instruction=self.conditions.system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=lm.apply_chat_template if chat else None,
            tokenizer_name=lm.tokenizer_name if chat else "",
        )
        return list(self.task.instances)

    def identities(self, requests: Sequence[Any]) -> list[Identity]:
        """Return the identities of documents before they are answered.

        Args:
            requests: The requests, of `requests`.
        """
        by_doc: dict[int, list[Any]] = {}
        for request in requests:
            by_doc.setdefault(request.doc_id, []).append(request)
        identities = []
        for group in by_doc.values():
            prompts = request_arguments([request.args for request in group])
            target = hash_string(str(self.task.doc_to_target(group[0].doc)))
            identities.append(Identity(document_digest(group[0].doc), value_digest(prompts), target))
        return identities

    def read(self, lines: Iterable[Mapping[str, Any]]) -> list[Sample]:
        """Read logged samples of this task.

        Args:
            lines: The rows of a `samples_*.jsonl`.
        """
        config = getattr(self.task, "config", None)
        return read_samples(lines, filter_name=self.filter, delimiter=getattr(config, "target_delimiter", " "))

    def metric_of(self, samples: Sequence[Sample]) -> str:
        """Return the metric to compare: the requested one, the task's main one, or the first of the usual ones.

        Args:
            samples: Samples of the task.

        Raises:
            ValueError: The samples do not have the metric.
        """
        known = samples[0].metrics
        name = self.metric or next((name for name in (*PREFERRED_METRICS, *known) if name in known), None)
        if name not in known:
            raise ValueError(
                f"{self.name} has no metric {name!r}{did_you_mean(name, known)}: its samples have {', '.join(known)}"
            )
        return name


def missing_task(name: str, known: Sequence[str]) -> str:
    """Return the error about an unknown task, with tasks that were probably meant.

    Args:
        name: The name, or a pattern that matches no name.
        known: The names of all tasks and groups.

    Examples:
        >>> missing_task("hellaswagg", ["gsm8k", "hellaswag"])
        "there is no task 'hellaswagg' (did you mean 'hellaswag'?); contralto eval ls tasks lists them all"
        >>> missing_task("hella", ["arabic_hellaswag", "hellaswag_light", "hellaswag"])
        "there is no task 'hella' (did you mean hellaswag, hellaswag_light, arabic_hellaswag?); contralto eval ls tasks lists them all"
    """
    within = sorted((each for each in known if name in each), key=lambda each: (not each.startswith(name), len(each)))[
        :5
    ]
    hint = f" (did you mean {', '.join(within)}?)" if within else did_you_mean(name, known)
    return f"there is no task {name!r}{hint}; contralto eval ls tasks lists them all"


def load_tasks(
    names: Sequence[str], conditions: Conditions, include_path: Sequence[str], data_dir: Path | None, output: Path
) -> list[Task]:
    """Load tasks, and the tasks of groups.

    Args:
        names: Names of tasks or groups, or YAML files.
        conditions: The settings of the comparison.
        include_path: Folders with further tasks.
        data_dir: A folder with local data, see `contralto.eval.data`; None to load data as the tasks define.
        output: The folder of the comparison, where task files for local data are written.

    Raises:
        ValueError: There is no such task, or a local file is missing or invalid.
    """
    register_in_lm_eval()
    metadata = dict(conditions.metadata)
    if data_dir:
        folder = output / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        names, data_options = local_tasks(names, data_dir, folder, metadata)
        metadata |= data_options
    places = [str(TASKS), *include_path]
    manager = TaskManager(include_path=places, include_defaults=False, metadata=metadata)
    known = set(manager.all_tasks)
    if any(
        name not in known and not Path(name).is_file() for name in names
    ):  # lm-eval's index of all its tasks is slow
        manager = TaskManager(include_path=places, metadata=metadata)
        known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not Path(name).is_file()]:
        raise ValueError(missing_task(unknown[0], manager.all_tasks))
    loaded = manager.load(list(names))["tasks"]
    return [Task(name, task, conditions) for name, task in loaded.items()]
