"""POPE for lm-eval."""

from pathlib import Path
from typing import Any

from contralto.eval import data
from contralto.eval.metrics import pope

_folders: dict[str, Path] = {}
"""Where the images of a source are. Not in the documents, so that their hashes are the same wherever the images are."""


def questions(**options: Any) -> Any:
    """The documents of a split."""
    found = data.pope_documents(**options)
    _folders[options["source"]] = found.images
    return data.dataset({"test": found.rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """The image of a question."""
    return [data.image(_folders[doc["source"]] / doc["image"])]


def results(doc: dict[str, Any], said: list[str]) -> dict[str, Any]:
    """The measures of an answer."""
    label = doc["label"] == "yes"
    return pope.document_metrics(label, pope.parse_answer(said[0], label, parser=doc["parser"]))
