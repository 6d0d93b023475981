"""CHAIR for lm-eval."""

from typing import Any

from contralto.eval import data
from contralto.eval.metrics import chair

_given: dict[str, Any] = {}
"""The vocabulary and the folder of the images. Not in the documents, whose hashes should not depend on paths."""


def captions(**options: Any) -> Any:
    """The images to describe."""
    found, vocabulary = data.chair_documents(**options)
    _given.update(images=found.images, vocabulary=vocabulary)
    return data.dataset({"test": found.rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """The image to describe."""
    return [data.image(_given["images"] / doc["image"])]


def results(doc: dict[str, Any], said: list[str]) -> dict[str, Any]:
    """The measures of a caption."""
    return chair.document_metrics(said[0], chair.count(said[0], doc["objects"], _given["vocabulary"]))
