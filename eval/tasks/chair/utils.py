"""CHAIR for lm-eval."""

from typing import Any

from contralto.eval import data
from contralto.eval.metrics import chair

_given: dict[str, Any] = {}
"""The vocabulary and the folder of the images. Not in the documents, whose hashes should not depend on paths."""


def captions(**options: Any) -> Any:
    """Return the documents of CHAIR: images to describe.

    Args:
        options: See `contralto.eval.data.chair_documents`.
    """
    found, vocabulary = data.chair_documents(**options)
    _given.update(images=found.images, vocabulary=vocabulary, words=options.get("chair_words", 30))
    return data.dataset({"test": found.rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """Return the image to describe.

    Args:
        doc: The document.
    """
    return [data.image(_given["images"] / doc["image"])]


def results(doc: dict[str, Any], responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for a caption.

    Args:
        doc: The document.
        responses: The caption, as the only member.
    """
    named = (responses[0], doc["objects"], _given["vocabulary"])
    return chair.document_metrics(responses[0], chair.count(*named)) | chair.cut_metrics(*named, words=_given["words"])
