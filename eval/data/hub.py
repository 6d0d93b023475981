"""GSM8K and HellaSwag from local files: lm-eval's own tasks with other data."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from contralto.eval.data.rows import Document, check_text_fields, dataset, rows_of

__all__ = ["hub_tasks", "jsonl_dataset", "local_task"]


def _check_gsm8k(row: Document) -> str | None:
    """Return an error message for a row that is not one of GSM8K's, else None."""
    if error := check_text_fields(row, "question", "answer"):
        return error
    if not re.search(r"####\s*\S", row["answer"]):
        return "the field answer must end in #### and the number, as GSM8K's answers do"
    return None


def _check_hellaswag(row: Document) -> str | None:
    """Return an error message for a row that is not one of HellaSwag's, else None."""
    if error := check_text_fields(row, "activity_label", "ctx_a", "ctx_b"):
        return error
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(each, str) for each in endings):
        return f"the field endings must be a list of four texts, not {endings!r}"
    if str(row.get("label")) not in {"0", "1", "2", "3"}:
        return f"the field label must be 0, 1, 2 or 3, not {row.get('label')!r}"
    return None


class _Benchmark(NamedTuple):
    """A benchmark that lm-eval loads from the Hugging Face Hub."""

    folder: str
    """The name of its folder within the data folder, and within the tasks of lm-eval."""
    check: Callable[[Document], str | None]
    metadata: Mapping[str, Any]


_BENCHMARKS = {
    "openai/gsm8k": _Benchmark("gsm8k", _check_gsm8k, {"main_metric": "exact_match", "higher_is_better": True}),
    "Rowan/hellaswag": _Benchmark(
        "hellaswag", _check_hellaswag, {"main_metric": "acc_norm", "higher_is_better": True, "bucket": "split_type"}
    ),
}


def hub_tasks() -> dict[str, Path]:
    """Return lm-eval's own task files of the benchmarks that can be read from local files, by task name."""
    paths = {}
    for benchmark in _BENCHMARKS.values():
        for path in _lm_eval_folder(benchmark).glob("*.yaml"):
            config = _load_yaml(path)
            if config.get("dataset_path") in _BENCHMARKS:
                paths[str(config["task"])] = path
    return paths


def _lm_eval_folder(benchmark: _Benchmark) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / benchmark.folder


def _load_yaml(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml  # lm-eval 0.4.13 has no public name for it

    config: dict[str, Any] = load_yaml(path, resolve_func=False)
    return config


def local_task(task: str, path: Path, data_dir: Path) -> str:
    """Return the YAML of a task that includes lm-eval's own file and reads local rows.

    Args:
        task: The name of the task.
        path: lm-eval's own file.
        data_dir: The data folder.

    Raises:
        ValueError: A file of the data folder is missing or has an invalid row.
    """
    config = _load_yaml(path)
    benchmark = _BENCHMARKS[config["dataset_path"]]
    files: dict[str, Path] = {}
    for role in ("test_split", "validation_split", "fewshot_split", "training_split"):
        file = _split_file(data_dir / benchmark.folder, config.get(role))
        if config.get(role) and (file.is_file() or role != "training_split"):
            files[config[role]] = file
    for file in files.values():
        rows_of(file, benchmark.check)
    settings = {
        "include": str(path),
        "task": task,
        "tag": None,
        "dataset_kwargs": {
            "benchmark": config["dataset_path"],
            "files": {split: str(file) for split, file in files.items()},
        },
        "metadata": {**config.get("metadata", {}), **benchmark.metadata},
    }
    if config.get("training_split") not in files:
        settings["training_split"] = None
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([*lines, "custom_dataset: !function contralto.eval.data.jsonl_dataset", ""])


def _split_file(folder: Path, split: str | None) -> Path:
    """Return the file of a split: JSON Lines, or the same compressed by gzip where only that is there.

    Raises:
        ValueError: Both files are there.
    """
    plain, packed = folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"
    if plain.is_file() and packed.is_file():
        raise ValueError(f"there are both {plain} and {packed.name}: remove the one that is not meant")
    return packed if packed.is_file() else plain


def jsonl_dataset(*, benchmark: str, files: Mapping[str, str], **_: Any) -> Any:
    """Load local files by split; lm-eval calls this function for tasks of `local_task`.

    Args:
        benchmark: The Hub name of the benchmark, whose rows are checked.
        files: The file of each split.

    Returns:
        A `datasets.DatasetDict`.
    """
    check = _BENCHMARKS[benchmark].check
    return dataset({split: rows_of(Path(file), check) for split, file in files.items()})
