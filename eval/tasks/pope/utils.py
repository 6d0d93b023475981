"""POPE for lm-eval."""

from pathlib import Path
from typing import Any

from contralto.eval import data
from contralto.eval.metrics import pope

_folders: dict[str, Path] = {}
"""Where the images of a source are. Not in the documents, so that their hashes are the same wherever the images are."""


def questions(**options: Any) -> Any:
    """Return the questions of a split.

    Args:
        options: See `contralto.eval.data.pope_documents`.
    """
    found = data.pope_documents(**options)
    _folders[options["source"]] = found.images
    return data.dataset({"test": found.rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """Return the image of a question.

    Args:
        doc: The document.
    """
    return [data.image(_folders[doc["source"]] / doc["image"])]


def results(doc: dict[str, Any], responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for an answer.

    Args:
        doc: The document.
        responses: The answer, as the only member.
    """
    label = doc["label"] == "yes"
    return pope.document_metrics(label, pope.parse_answer(responses[0], label, parser=doc["parser"]))
