"""Benchmarks from local files: the data folder of `--data_dir DIR`, checked before any model is loaded.

DIR/gsm8k/train.jsonl, test.jsonl                                  question, answer
DIR/hellaswag/validation.jsonl, train.jsonl (optional)             activity_label, ctx_a, ctx_b, endings, label
DIR/pope/**/coco_pope_random.json, gqa_pope_seem_popular.json, ... the official files: JSON Lines or a JSON array
DIR/coco/val2014/*.jpg                                             images of POPE's COCO and A-OKVQA, and of CHAIR
DIR/coco/annotations/instances_val2014.json, captions_val2014.json
DIR/gqa/images/*.jpg                                               images of POPE's GQA
DIR/chair/synonyms.txt                                             names of objects, see `contralto.eval.metrics.vocabulary`
DIR/mme, DIR/mmvp, DIR/amber, DIR/hallusionbench                   see `contralto.eval.data.image_questions`
DIR/amber, DIR/mmhal                                               see `contralto.eval.data.captions`
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.eval.data.captions import amber_documents, mmhal_documents
from contralto.eval.data.documents import chair_documents, pope_documents, pope_tasks
from contralto.eval.data.hub import hub_tasks, local_task
from contralto.eval.data.image_questions import question_documents, question_tasks

__all__ = ["TASKS", "LocalTasks", "local_tasks"]

DOCUMENTS: Mapping[str, Callable[..., Any]] = {
    "chair": chair_documents,
    "amber_generative": amber_documents,
    "mmhal": mmhal_documents,
}
"""Functions that read and check the files of a task without splits."""
TASKS = Path(__file__).parents[1] / "tasks"
"""The folder of contralto's own tasks, for lm-eval's `include_path`."""


class LocalTasks(NamedTuple):
    """Task names and metadata for lm-eval."""

    tasks: list[str]
    """For `--tasks`: generated files in place of tasks that lm-eval would load from the Hub, and the other names unchanged."""
    metadata: dict[str, Any]
    """For `--metadata`."""


def local_tasks(
    tasks: Sequence[str], data_dir: Path, folder: Path, options: Mapping[str, Any] | None = None
) -> LocalTasks:
    """Redirect tasks to local files, after checking these files.

    GSM8K and HellaSwag, in all variants that lm-eval has, keep lm-eval's prompts, filters and metrics; a file in `folder` includes
    lm-eval's own and replaces the data. POPE, CHAIR and the benchmarks of `contralto.eval.data.image_questions` and `captions` receive the data folder as metadata. Other tasks are unchanged.

    Args:
        tasks: Names of tasks and groups, or shell patterns.
        data_dir: The data folder, laid out as the docstring of this module describes.
        folder: The folder for the generated task files, which lm-eval reads until it is done.
        options: Further `--metadata` that the checks need: other folders, the number of images, ...

    Raises:
        ValueError: A file that a task needs is missing or has an invalid row.
    """
    if not data_dir.is_dir():
        raise ValueError(f"data_dir must be a folder, and {data_dir} is none")
    data_dir, folder = data_dir.resolve(), folder.resolve()
    hub, settings = hub_tasks(), {**(options or {}), "data_dir": str(data_dir)}
    names = []
    known = sorted([*hub, *pope_tasks(), *question_tasks(), *DOCUMENTS])
    for task in [name for pattern in tasks for name in fnmatch.filter(known, pattern) or [pattern]]:
        path = folder / f"{task}.yaml"
        if task in hub:
            path.write_text(local_task(task, hub[task], data_dir), encoding="utf-8")
        names.append(str(path) if task in hub else task)
        for source, negatives in pope_tasks().get(task, []):
            pope_documents(source=source, negatives=negatives, **settings)
        for split in question_tasks().get(task, []):
            question_documents(**settings, **split)
        if task in DOCUMENTS:
            DOCUMENTS[task](**settings)
    return LocalTasks(names, {"data_dir": str(data_dir)})
