"""Load the documents of POPE and CHAIR from local files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.suggestions import did_you_mean
from contralto.eval.data.rows import Document, check_text_fields, rows_of
from contralto.eval.metrics import pope
from contralto.eval.metrics.chair import cut
from contralto.eval.metrics.coco import coco_objects
from contralto.eval.metrics.vocabulary import ObjectVocabulary, read_synonyms

__all__ = ["NEGATIVES", "SOURCES", "ImageDocuments", "chair_documents", "pope_documents", "pope_tasks"]

SOURCES, NEGATIVES = ("coco", "aokvqa", "gqa"), ("random", "popular", "adversarial")
"""The sources of POPE's images, and its strategies to choose objects that are not in an image."""

IMAGE_FOLDERS = {"coco": "coco/val2014", "aokvqa": "coco/val2014", "gqa": "gqa/images"}
"""The folder of each source's images within the data folder."""


def pope_tasks() -> dict[str, list[tuple[str, str]]]:
    """Return POPE's tasks and groups with the splits of each: pairs of an image source and a strategy for negatives.

    Examples:
        >>> pope_tasks()["pope_gqa"]
        [('gqa', 'random'), ('gqa', 'popular'), ('gqa', 'adversarial')]
    """
    splits = [(source, negatives) for source in SOURCES for negatives in NEGATIVES]
    groups = {f"pope_{source}": [split for split in splits if split[0] == source] for source in SOURCES}
    return {"pope": splits, **groups, **{f"pope_{'_'.join(split)}": [split] for split in splits}}


class ImageDocuments(NamedTuple):
    """Documents of a task, and the folder of their images."""

    rows: list[Document]
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
) -> ImageDocuments:
    """Read the questions of an official POPE file, each with its `prompt` and the name of the `parser` for its answer.

    Args:
        source: One of `SOURCES`.
        negatives: One of `NEGATIVES`.
        data_dir: The data folder, see `contralto.eval.data.local`.
        coco_images: A folder of images; None for that of `data_dir`.
        gqa_images: A folder of images; None for that of `data_dir`.
        pope_prompt: A key of `pope.SUFFIXES`.
        pope_parser: A key of `pope.PARSERS`.

    Raises:
        ValueError: The prompt or parser is unknown, the question file is missing or ambiguous, a row is invalid, or images are missing.
    """
    root = _root(data_dir)
    if pope_prompt not in pope.SUFFIXES:
        raise ValueError(
            f"there is no POPE prompt {pope_prompt!r}{did_you_mean(pope_prompt, pope.SUFFIXES)}; there are {', '.join(pope.SUFFIXES)}"
        )
    if pope_parser not in pope.PARSERS:
        raise ValueError(
            f"there is no POPE parser {pope_parser!r}{did_you_mean(pope_parser, pope.PARSERS)}; there are {', '.join(pope.PARSERS)}"
        )
    images = Path((gqa_images if source == "gqa" else coco_images) or root / IMAGE_FOLDERS[source])
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
        for row in rows_of(_pope_file(source, negatives, root), _check_pope)
    ]
    _check_images(images, [row["image"] for row in rows])
    return ImageDocuments(rows, images)


def _pope_file(source: str, negatives: str, data_dir: Path) -> Path:
    pattern = f"{source}_pope*_{negatives}.json*"
    paths = sorted((data_dir / "pope").rglob(pattern))
    if len(paths) != 1:
        count = f"several: {', '.join(map(str, paths))}" if paths else "none"
        raise ValueError(f"POPE needs one question file {pattern} in {data_dir / 'pope'}, and there are {count}")
    return paths[0]


def _check_pope(row: Document) -> str | None:
    """Return an error message for a row that is not one of POPE's, else None."""
    if error := check_text_fields(row, "image", "text", "label"):
        return error
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
    chair_words: int = 30,
    n: int = 500,
    **_: Any,
) -> tuple[ImageDocuments, ObjectVocabulary]:
    """Read images of COCO val2014 to describe, each with the objects in it, and the vocabulary of object names.

    Args:
        data_dir: The data folder, see `contralto.eval.data.local`.
        coco_images: A folder of images; None for that of `data_dir`.
        coco_annotations: A folder of annotations; None for that of `data_dir`.
        chair_synonyms: A synonym list; None for that of `data_dir`.
        chair_prompt: The prompt for every image.
        chair_seed: The seed of the choice of images.
        chair_words: The number of words at the beginning of captions whose CHAIR is computed, too.
        n: The number of images.

    Raises:
        ValueError: See `read_synonyms` and `coco_objects`; or images are missing.
    """
    cut("", chair_words)  # checks the number
    root = _root(data_dir)
    vocabulary = read_synonyms(Path(chair_synonyms or root / "chair/synonyms.txt"))
    folder = Path(coco_annotations or root / "coco/annotations")
    files = [folder / f"{kind}_val2014.json" for kind in ("instances", "captions")]
    objects_of = coco_objects(files[0], files[1], vocabulary, n=n, seed=chair_seed)
    rows = [{"image": name, "objects": objects, "prompt": chair_prompt} for name, objects in objects_of.items()]
    images = Path(coco_images or root / IMAGE_FOLDERS["coco"])
    _check_images(images, list(objects_of))
    return ImageDocuments(rows, images), vocabulary


def _root(data_dir: str | None) -> Path:
    if not data_dir:
        raise ValueError(
            'POPE and CHAIR read local files: name the folder as data_dir, or in metadata as {"data_dir": "DIR"}'
        )
    return Path(data_dir)


def _check_images(folder: Path, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}, where the images should be: put them there, or name their folder as coco_images or "
            "gqa_images in metadata"
        )
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in dict.fromkeys(names) if name not in present]
    if missing:
        raise ValueError(f"{len(missing)} of {len(set(names))} images are not in {folder}, the first is {missing[0]}")
