"""Load benchmarks of short questions about images from their published files.

These are MME (arXiv 2306.13394), MMVP (arXiv 2401.06209), AMBER (arXiv 2311.07397) and HallusionBench (arXiv 2310.14566):

DIR/mme/CATEGORY/**/NAME.txt and NAME.jpg or .png       two lines per image: question, tab, Yes or No (the release, either of its layouts)
DIR/mmvp/Questions.csv, "MMVP Images"/1.jpg             Index, Question, Options, Correct Answer
DIR/amber/data/annotations.json, data/query/query_discriminative.json, image/AMBER_1.jpg
DIR/hallusionbench/HallusionBench.json, VD/SUBCATEGORY/SET_FIGURE.png, VS/...
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import lines_of, read_text
from contralto.common.suggestions import did_you_mean
from contralto.eval.data.rows import Document, check_text_fields, rows_of
from contralto.eval.metrics import pope

__all__ = ["BENCHMARKS", "Benchmark", "question_documents", "question_tasks"]

YES_NO = " Please answer yes or no."
"""The end of every question of MME's release."""
AMBER_KINDS = {
    "existence": ("discriminative-hallucination",),
    "attribute": (
        "discriminative-attribute-state",
        "discriminative-attribute-number",
        "discriminative-attribute-action",
    ),
    "relation": ("discriminative-relation", "relation"),
}
"""The types of annotations of each dimension of AMBER."""


class Benchmark(NamedTuple):
    """A benchmark of questions about images."""

    folder: str
    """Its folder in the data folder."""
    read: Callable[..., Iterator[Document]]
    """Yields documents: `id`, `image` (a path below the folder, or empty), `question`, `label`, and `groups`, the names of the groups of
    questions that count together, by the metric."""
    options: tuple[str, ...] = ()
    """The splits that tasks name as `part`."""


def _mme(root: Path, part: str) -> Iterator[Document]:
    """Yield MME's questions, two per image (Fu et al. 2023, arXiv 2306.13394)."""
    categories = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for category in categories:
        pictures = {
            path.stem: path for path in sorted(category.rglob("*")) if path.suffix.lower() in (".jpg", ".png", ".jpeg")
        }
        for file in sorted(category.rglob("*.txt")):
            if file.stem not in pictures:
                raise ValueError(f"{file} has questions, and there is no image {file.stem}.jpg or .png in {category}")
            image = pictures[file.stem].relative_to(root).as_posix()
            for number, line in enumerate(filter(str.strip, lines_of(read_text(file))), 1):
                question, tab, label = line.partition("\t")
                if not tab or label.strip().lower() not in ("yes", "no"):
                    raise ValueError(
                        f"{file}, line {number}: a line is a question, a tab, and Yes or No, not {line!r:.80}"
                    )
                name = f"{category.name}/{file.stem}"
                yield {
                    "id": f"{name}-{number}",
                    "image": image,
                    "question": question.strip(),
                    "label": label.strip().lower(),
                    "category": category.name,
                    "groups": {"image": name},
                }


def _mmvp(root: Path, part: str) -> Iterator[Document]:
    """Yield the questions of MMVP, of which two belong together (Tong et al. 2024, arXiv 2401.06209)."""
    path = root / "Questions.csv"
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    for row in csv.DictReader(io.StringIO(read_text(path))):
        named = {name.strip(): (value or "").strip() for name, value in row.items() if name}
        if error := check_text_fields(named, "Index", "Question", "Options", "Correct Answer"):
            raise ValueError(f"{path}: {error}")
        index, label = int(named["Index"]), named["Correct Answer"].strip("() ").lower()
        if label not in ("a", "b"):
            raise ValueError(
                f"{path}, index {index}: the correct answer must be (a) or (b), not {named['Correct Answer']!r}"
            )
        yield {
            "id": index,
            "image": f"MMVP Images/{index}.jpg",
            "question": f"{named['Question']} {named['Options']}",
            "label": label,
            "category": "",
            "groups": {"pair": str((index + 1) // 2)},
        }


def _amber(root: Path, part: str) -> Iterator[Document]:
    """Yield the discriminative questions of AMBER about one dimension (Wang et al. 2023, arXiv 2311.07397)."""
    query = root / "data" / "query" / "query_discriminative.json"
    truths = {row["id"]: row for row in rows_of(root / "data" / "annotations.json", lambda _: None)}
    for row in rows_of(query, lambda row: check_text_fields(row, "image", "query")):
        truth = truths.get(row.get("id"))
        if truth is None:
            raise ValueError(f"{query}: annotations.json has no id {row.get('id')!r}")
        kind = truth["type"]
        is_relation = not any(kind in kinds for name, kinds in AMBER_KINDS.items() if name != "relation")
        if kind in AMBER_KINDS[part] or (
            part == "relation" and is_relation
        ):  # the released code takes all others as relations
            yield {
                "id": row["id"],
                "image": f"image/{row['image']}",
                "question": row["query"],
                "label": str(truth["truth"]).strip().lower(),
                "category": kind,
                "groups": {},
            }


def _hallusion(root: Path, part: str) -> Iterator[Document]:
    """Yield the questions of HallusionBench, some of them without an image (Guan et al. 2024, arXiv 2310.14566)."""
    path = root / "HallusionBench.json"
    fields = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "visual_input")
    for row in rows_of(path, lambda row: check_text_fields(row, *fields)):
        category, subject, number, figure = (row[name] for name in ("category", "subcategory", "set_id", "figure_id"))
        has_image = row["visual_input"] != "0"
        name = f"{category}_{subject}_{number}"
        is_figure = category != "VS" or figure != "0"  # a question without an image belongs to no figure
        yield {
            "id": f"{name}_{figure}_{row['question_id']}",
            "image": f"{category}/{subject}/{number}_{figure}.png" if has_image else "",
            "question": row["question"],
            "label": {"1": "yes", "0": "no"}.get(row["gt_answer"], row["gt_answer"]),
            "category": f"{category}/{subject}",
            "groups": {"figure": f"{name}_{figure}" if is_figure else "", "question": f"{name}_{row['question_id']}"},
        }


BENCHMARKS = {
    "mme": Benchmark("mme", _mme),
    "mmvp": Benchmark("mmvp", _mmvp),
    "amber": Benchmark("amber", _amber, tuple(AMBER_KINDS)),
    "hallusionbench": Benchmark("hallusionbench", _hallusion),
}
"""The benchmarks by name."""


def question_tasks() -> dict[str, list[dict[str, str]]]:
    """Return the tasks and groups with the options of `question_documents` for each of their splits.

    Examples:
        >>> question_tasks()["mmvp"], len(question_tasks()["amber"])
        ([{'benchmark': 'mmvp'}], 3)
    """
    found: dict[str, list[dict[str, str]]] = {}
    for name, benchmark in BENCHMARKS.items():
        parts = [{"benchmark": name, "part": part} for part in benchmark.options]
        found[name] = parts or [{"benchmark": name}]
        found |= {f"{name}_{each['part']}": [each] for each in parts}
    return found


def question_documents(
    *,
    benchmark: str,
    part: str = "",
    data_dir: str | None = None,
    question_prompt: str = "",
    **_: Any,
) -> tuple[list[Document], Path]:
    """Return the documents of a benchmark, each with its `prompt`, and the folder of its images.

    Args:
        benchmark: A key of `BENCHMARKS`.
        part: One of its splits, if it has any.
        data_dir: The data folder.
        question_prompt: What follows the question, a key of `pope.SUFFIXES`: `official` is the benchmark as it is (default for MME and
            MMVP), `llava` an instruction to answer in a word (default for the others). MME's own "Please answer yes or no." gives way to
            another.

    Raises:
        ValueError: A file or an image is missing, a row is invalid, or the prompt is unknown.
    """
    if not data_dir:
        raise ValueError(
            f'{benchmark} reads local files: name the folder as data_dir, or in metadata as {{"data_dir": "DIR"}}'
        )
    suffix = question_prompt or ("official" if benchmark in ("mme", "mmvp") else "llava")
    if suffix not in pope.SUFFIXES:
        raise ValueError(
            f"there is no question_prompt {suffix!r}{did_you_mean(suffix, pope.SUFFIXES)}; there are {', '.join(pope.SUFFIXES)}"
        )
    root = Path(data_dir) / BENCHMARKS[benchmark].folder
    rows = list(BENCHMARKS[benchmark].read(root, part))
    if not rows:
        raise ValueError(f"{root} has no questions of {benchmark}{f' ({part})' if part else ''}")
    for row in rows:
        _check(row, root)
        question = row["question"].removesuffix(YES_NO) if suffix != "official" else row["question"]
        row["prompt"] = ("<image>" if row["image"] else "") + question + pope.SUFFIXES[suffix]
    return rows, root


def _check(row: Mapping[str, Any], root: Path) -> None:
    if row["label"] not in ("yes", "no", "a", "b"):
        raise ValueError(f"{root}, question {row['id']}: the right answer must be yes or no, not {row['label']!r}")
    if row["image"] and not (root / row["image"]).is_file():
        raise ValueError(f"question {row['id']}: there is no image {root / row['image']}")
