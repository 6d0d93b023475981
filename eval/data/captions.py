"""Load benchmarks whose answers are sentences about images: AMBER's generative part, and MMHal-Bench.

DIR/amber/data/annotations.json, relation.json, safe_words.txt, query/query_generative.json, image/AMBER_1.jpg
DIR/mmhal/response_template.json, images/NAME.jpg
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from contralto.common.files import read_lines, read_text
from contralto.eval.data.rows import Document, check_text_fields, rows_of
from contralto.eval.metrics.amber import AmberWords, NounReader, reader_of

__all__ = ["amber_documents", "check_mmhal", "mmhal_documents", "read_amber_words"]


def read_amber_words(folder: Path) -> AmberWords:
    """Read AMBER's word lists.

    Args:
        folder: AMBER's `data`.

    Raises:
        ValueError: A file is missing or has another form.
    """
    path, safe = folder / "relation.json", folder / "safe_words.txt"
    for each in (path, safe):
        if not each.is_file():
            raise ValueError(f"there is no file {each}")
    try:
        association = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(association, dict) or not all(isinstance(words, list) for words in association.values()):
        raise ValueError(f"{path} must map every object to a list of words")
    return AmberWords(association, frozenset(line.strip() for line in read_lines(safe) if line.strip()))


def amber_documents(
    *,
    data_dir: str | None = None,
    amber_words: str = "official",
    n: int | None = None,
    **_: Any,
) -> tuple[list[Document], Path, AmberWords, NounReader]:
    """Read the images of AMBER that are to be described (Wang et al. 2023, arXiv 2311.07397), its word lists, and the reader of nouns.

    Args:
        data_dir: The data folder.
        amber_words: How nouns are found and compared, a key of `contralto.eval.metrics.amber.READERS`.
        n: The number of images, the first ones; None for all.

    Raises:
        ModuleNotFoundError: NLTK or spaCy is not installed.
        ValueError: A file, an image, an annotation or data of the reader is missing.
    """
    if n is not None and (type(n) is not int or n < 1):
        raise ValueError(f"n must be a whole number of at least 1, or null for all images, not {n!r}")
    root = _root(data_dir, "AMBER") / "amber"
    words, reader = read_amber_words(root / "data"), reader_of(amber_words)
    query = root / "data" / "query" / "query_generative.json"
    truths = {row.get("id"): row for row in rows_of(root / "data" / "annotations.json", lambda _: None)}
    rows = []
    for row in rows_of(query, lambda row: check_text_fields(row, "image", "query"))[:n]:
        truth = truths.get(row.get("id"))
        if truth is None or truth.get("type") != "generative":
            raise ValueError(f"{query}: annotations.json has no generative row of id {row.get('id')!r}")
        objects = {name: [str(each) for each in truth[name]] for name in ("truth", "hallu")}
        if unknown := [name for names in objects.values() for name in names if name not in words.association]:
            raise ValueError(f"{root / 'data' / 'relation.json'} has no words for {unknown[0]!r} of image {row['id']}")
        image = f"image/{row['image']}"
        _check_image(root / image)
        rows.append({"id": row["id"], "image": image, "prompt": f"<image>{row['query']}", **objects})
    return rows, root, words, reader


def mmhal_documents(*, data_dir: str | None = None, **_: Any) -> tuple[list[Document], Path]:
    """Read the questions of MMHal-Bench (Sun et al. 2023, arXiv 2309.14525).

    Args:
        data_dir: The data folder.

    Raises:
        ValueError: A file or an image is missing, or a row is invalid.
    """
    root = _root(data_dir, "MMHal-Bench") / "mmhal"
    rows = []
    for number, row in enumerate(rows_of(root / "response_template.json", check_mmhal)):
        image = f"images/{Path(urlparse(row['image_src']).path).name}"
        _check_image(root / image)
        kept = {name: row[name] for name in ("question_type", "image_content", "question", "gt_answer")}
        rows.append({"id": number, "image": image, "prompt": f"<image>{row['question']}", **kept})
    return rows, root


def check_mmhal(row: Document) -> str | None:
    """Return an error message for a row that is not one of MMHal-Bench, else None.

    Args:
        row: The row.
    """
    contents = row.get("image_content")
    if not isinstance(contents, list) or not all(isinstance(each, str) for each in contents):
        return f"the field image_content must be a list of texts, not {contents!r}"
    return check_text_fields(row, "question_type", "question", "gt_answer", "image_src")


def _root(data_dir: str | None, name: str) -> Path:
    if not data_dir:
        raise ValueError(
            f'{name} reads local files: name the folder as data_dir, or in metadata as {{"data_dir": "DIR"}}'
        )
    return Path(data_dir)


def _check_image(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no image {path}")
