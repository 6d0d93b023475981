"""Benchmarks from local files: what `--data_dir DIR` reads, checked before any model is loaded.

DIR/gsm8k/train.jsonl, test.jsonl                                  question, answer
DIR/hellaswag/validation.jsonl, train.jsonl (optional)             activity_label, ctx_a, ctx_b, endings, label
DIR/pope/**/coco_pope_random.json, gqa_pope_seem_popular.json, ... the official files: JSON Lines or a JSON array
DIR/coco/val2014/*.jpg                                             images of POPE's COCO and A-OKVQA, and of CHAIR
DIR/coco/annotations/instances_val2014.json, captions_val2014.json
DIR/gqa/images/*.jpg                                               images of POPE's GQA
DIR/chair/synonyms.txt                                             what objects are called, see `chair.read_synonyms`
"""

import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import lines_of, read_text
from contralto.decoding.pictures import open_image
from contralto.eval.metrics import chair, pope

__all__ = ["TASKS", "LocalTasks", "local_tasks"]

TASKS = Path(__file__).parent / "tasks"
"""The folder of contralto's own tasks, for lm-eval's `include_path`."""
SOURCES, NEGATIVES = ("coco", "aokvqa", "gqa"), ("random", "popular", "adversarial")
"""POPE's images, and how it chooses objects that are not there."""

IMAGES = {"coco": "coco/val2014", "aokvqa": "coco/val2014", "gqa": "gqa/images"}
"""Where they are in the data folder."""

Row = dict[str, Any]


class LocalTasks(NamedTuple):
    """What to give to lm-eval."""

    tasks: list[str]
    """For `--tasks`: files made for tasks that lm-eval would load from the Hub, the other names as they were."""
    metadata: dict[str, Any]
    """For `--metadata`."""


def local_tasks(
    tasks: Sequence[str], data_dir: Path, folder: Path, options: Mapping[str, Any] | None = None
) -> LocalTasks:
    """Have tasks read their data from local files, after checking these.

    GSM8K and HellaSwag in all the forms that lm-eval has stay as lm-eval defines them, prompts, filters and metrics; a
    file in `folder` includes lm-eval's own and replaces the data. POPE and CHAIR are told where their files are. Other
    tasks are left alone.

    Args:
        tasks: names of tasks and groups, or patterns as of a shell.
        data_dir: a folder laid out as the head of this module says.
        folder: where the files for lm-eval go; it has to stay until lm-eval is done.
        options: what else `--metadata` says, for the checks: other folders, how many images, ...

    Raises:
        ValueError: a file that a task needs is missing, or has a row that is not as it should be.
    """
    if not data_dir.is_dir():
        raise ValueError(f"--data_dir must be a folder, and {data_dir} is none")
    data_dir, folder = data_dir.resolve(), folder.resolve()
    hub, given = _hub_tasks(), {**(options or {}), "data_dir": str(data_dir)}
    found = []
    known = sorted([*hub, *pope_tasks(), "chair"])
    for task in [name for pattern in tasks for name in fnmatch.filter(known, pattern) or [pattern]]:
        path = folder / f"{task}.yaml"
        if task in hub:
            path.write_text(_localised(task, hub[task], data_dir), encoding="utf-8")
        found.append(str(path) if task in hub else task)
        for source, negatives in pope_tasks().get(task, []):
            pope_documents(source=source, negatives=negatives, **given)
        if task == "chair":
            chair_documents(**given)
    return LocalTasks(found, {"data_dir": str(data_dir)})


# ----------------------------------------------------------------------------------------------------- GSM8K, HellaSwag


def _gsm8k(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str):
            return f"the field {field} must be a text, not {row.get(field)!r}"
    if not re.search(r"####\s*\S", row["answer"]):
        return "the field answer must end in #### and the number, as GSM8K's answers do"
    return None


def _hellaswag(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    for field in ("activity_label", "ctx_a", "ctx_b"):
        if not isinstance(row.get(field), str):
            return f"the field {field} must be a text, not {row.get(field)!r}"
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(each, str) for each in endings):
        return f"the field endings must be a list of four texts, not {endings!r}"
    if str(row.get("label")) not in {"0", "1", "2", "3"}:
        return f"the field label must be 0, 1, 2 or 3, not {row.get('label')!r}"
    return None


class _Benchmark(NamedTuple):
    """A benchmark that lm-eval loads from the Hub."""

    folder: str
    """Of its files in the data folder, and of its tasks in lm-eval."""
    check: Callable[[Row], str | None]
    metadata: Mapping[str, Any]


_BENCHMARKS = {
    "openai/gsm8k": _Benchmark("gsm8k", _gsm8k, {"main_metric": "exact_match", "higher_is_better": True}),
    "Rowan/hellaswag": _Benchmark(
        "hellaswag", _hellaswag, {"main_metric": "acc_norm", "higher_is_better": True, "bucket": "split_type"}
    ),
}


def _hub_tasks() -> dict[str, Path]:
    """lm-eval's own files of the tasks on these benchmarks."""
    found = {}
    for benchmark in _BENCHMARKS.values():
        for path in _lm_eval_folder(benchmark).glob("*.yaml"):
            config = _load_yaml(path)
            if config.get("dataset_path") in _BENCHMARKS:
                found[str(config["task"])] = path
    return found


def _lm_eval_folder(benchmark: _Benchmark) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / benchmark.folder


def _load_yaml(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml  # lm-eval 0.4.13 has no public name for it

    config: dict[str, Any] = load_yaml(path, resolve_func=False)
    return config


def _localised(task: str, path: Path, data_dir: Path) -> str:
    """A task file that includes lm-eval's own and reads local rows."""
    config = _load_yaml(path)
    benchmark = _BENCHMARKS[config["dataset_path"]]
    files = {}
    for role in ("test_split", "validation_split", "fewshot_split", "training_split"):
        file = data_dir / benchmark.folder / f"{config.get(role)}.jsonl"
        if config.get(role) and (file.is_file() or role != "training_split"):
            files[config[role]] = str(file)
    for path_of_rows in files.values():
        rows_of(Path(path_of_rows), benchmark.check)
    settings = {
        "include": str(path),
        "task": task,
        "tag": None,
        "dataset_kwargs": {"benchmark": config["dataset_path"], "files": files},
        "metadata": {**config.get("metadata", {}), **benchmark.metadata},
    }
    if config.get("training_split") not in files:
        settings["training_split"] = None
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([*lines, "custom_dataset: !function contralto.eval.data.jsonl_dataset", ""])


def jsonl_dataset(*, benchmark: str, files: Mapping[str, str], **_: Any) -> Any:
    """The rows of local files by split, for lm-eval."""
    check = _BENCHMARKS[benchmark].check
    return dataset({split: rows_of(Path(file), check) for split, file in files.items()})


# ------------------------------------------------------------------------------------------------------------ POPE, CHAIR


def pope_tasks() -> dict[str, list[tuple[str, str]]]:
    """POPE's tasks and groups, with the splits of each: a source of images and a kind of negatives.

    Examples:
        >>> pope_tasks()["pope_gqa"]
        [('gqa', 'random'), ('gqa', 'popular'), ('gqa', 'adversarial')]
    """
    splits = [(source, negatives) for source in SOURCES for negatives in NEGATIVES]
    groups = {f"pope_{source}": [split for split in splits if split[0] == source] for source in SOURCES}
    return {"pope": splits, **groups, **{f"pope_{'_'.join(split)}": [split] for split in splits}}


class Documents(NamedTuple):
    """What lm-eval asks about, and where the images are."""

    rows: list[Row]
    images: Path


def pope_documents(
    *,
    source: str,
    negatives: str,
    data_dir: str | None = None,
    coco_images: str | None = None,
    gqa_images: str | None = None,
    pope_prompt: str = "llava",
    pope_parser: str = "words",
    **_: Any,
) -> Documents:
    """The questions of an official POPE file, each with its `prompt` and the name of the `parser` for its answer.

    Args:
        source: one of `SOURCES`.
        negatives: one of `NEGATIVES`.
        data_dir: see the head of this module.
        coco_images, gqa_images: folders of images; None for those of `data_dir`.
        pope_prompt: a key of `pope.SUFFIXES`.
        pope_parser: a key of `pope.PARSERS`.

    Raises:
        ValueError: no such prompt or parser, no file or several, a row that is none of POPE's, images missing.
    """
    root = _root(data_dir)
    if pope_prompt not in pope.SUFFIXES:
        raise ValueError(f"there is no POPE prompt {pope_prompt!r}; there are {', '.join(pope.SUFFIXES)}")
    if pope_parser not in pope.PARSERS:
        raise ValueError(f"there is no POPE parser {pope_parser!r}; there are {', '.join(pope.PARSERS)}")
    images = Path((gqa_images if source == "gqa" else coco_images) or root / IMAGES[source])
    rows = [
        {
            "question_id": row["question_id"],
            "source": source,
            "image": row["image"],
            "text": row["text"],
            "label": row["label"].strip().lower(),
            "prompt": row["text"] + pope.SUFFIXES[pope_prompt],
            "parser": pope_parser,
        }
        for row in rows_of(_pope_file(source, negatives, root), _pope)
    ]
    _check_images(images, [row["image"] for row in rows])
    return Documents(rows, images)


def _pope_file(source: str, negatives: str, data_dir: Path) -> Path:
    pattern = f"{source}_pope*_{negatives}.json*"
    found = sorted((data_dir / "pope").rglob(pattern))
    if len(found) != 1:
        many = f"several: {', '.join(map(str, found))}" if found else "none"
        raise ValueError(f"POPE needs one question file {pattern} in {data_dir / 'pope'}, and there are {many}")
    return found[0]


def _pope(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    for field in ("image", "text", "label"):
        if not isinstance(row.get(field), str):
            return f"the field {field} must be a text, not {row.get(field)!r}"
    if not isinstance(row.get("question_id"), int):
        return f"the field question_id must be a number, not {row.get('question_id')!r}"
    if row["label"].strip().lower() not in {"yes", "no"}:
        return f"the field label must be yes or no, not {row['label']!r}"
    return None


def chair_documents(
    *,
    data_dir: str | None = None,
    coco_images: str | None = None,
    coco_annotations: str | None = None,
    chair_synonyms: str | None = None,
    chair_prompt: str = "Please describe this image in detail.",
    chair_seed: int = 0,
    n: int = 500,
    **_: Any,
) -> tuple[Documents, chair.Vocabulary]:
    """Images of COCO val2014 to describe, each with the objects that are there, and what objects are called.

    Args:
        data_dir: see the head of this module.
        coco_images, coco_annotations, chair_synonyms: folders and a file; None for those of `data_dir`.
        chair_prompt: what the model is asked.
        chair_seed: of the choice of images.
        n: how many.

    Raises:
        ValueError: what `chair.read_synonyms` and `chair.coco_objects` refuse, images missing.
    """
    root = _root(data_dir)
    vocabulary = chair.read_synonyms(Path(chair_synonyms or root / "chair/synonyms.txt"))
    folder = Path(coco_annotations or root / "coco/annotations")
    files = [folder / f"{kind}_val2014.json" for kind in ("instances", "captions")]
    there = chair.coco_objects(files[0], files[1], vocabulary, n=n, seed=chair_seed)
    rows = [{"image": name, "objects": objects, "prompt": chair_prompt} for name, objects in there.items()]
    images = Path(coco_images or root / IMAGES["coco"])
    _check_images(images, list(there))
    return Documents(rows, images), vocabulary


def _root(data_dir: str | None) -> Path:
    if not data_dir:
        raise ValueError(
            'POPE and CHAIR read local files: name the folder, --data_dir DIR or --metadata \'{"data_dir": "DIR"}\''
        )
    return Path(data_dir)


def _check_images(folder: Path, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}, where the images should be")
    there = {path.name for path in folder.iterdir()}
    missing = [name for name in dict.fromkeys(names) if name not in there]
    if missing:
        raise ValueError(f"{len(missing)} of {len(set(names))} images are not in {folder}, the first is {missing[0]}")


# ------------------------------------------------------------------------------------------------------------------- rows


def rows_of(path: Path, check: Callable[[Row], str | None]) -> list[Row]:
    """The rows of a file of JSON Lines, or of one JSON array.

    Args:
        path: the file.
        check: says what is wrong with a row, or None.

    Raises:
        ValueError: no file, no rows, not JSON, or what `check` says, with the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    text = read_text(path)
    numbered = list(_array(path, text) if text.lstrip().startswith("[") else _lines(path, text))
    if not numbered:
        raise ValueError(f"{path} has no rows")
    for where, row in numbered:
        wrong = check(row) if isinstance(row, dict) else f"a row must be a JSON object, not {row!r}"
        if wrong:
            raise ValueError(f"{path}, {where}: {wrong}")
    return [row for _, row in numbered]


def _array(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        return [(f"row {number}", row) for number, row in enumerate(json.loads(text), 1)]
    except ValueError as error:
        raise ValueError(f"{path} begins like a JSON array but is none: {error}") from error


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(lines_of(text), 1):
        try:
            found += [(f"line {number}", json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return found


def dataset(splits: Mapping[str, Sequence[Row]]) -> Any:
    """Rows as lm-eval takes them."""
    from datasets import Dataset, DatasetDict

    from contralto.data_gen.columns import as_dataset

    return DatasetDict({split: as_dataset(rows) if rows else Dataset.from_list([]) for split, rows in splits.items()})


# ----------------------------------------------------------------------------------------------------------------- images


@cache
def image(path: Path) -> Any:
    """An image in RGB, one object however many questions ask about it: lm-eval holds the images of all requests at once.

    Raises:
        ValueError: it cannot be read.
    """
    return open_image(path)
