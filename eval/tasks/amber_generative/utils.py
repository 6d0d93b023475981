"""The generative part of AMBER for lm-eval."""

from typing import Any

from contralto.eval import data
from contralto.eval.metrics import amber

_given: dict[str, Any] = {}
"""The folder of the images, the word lists and the reader of nouns. Not in the documents, whose hashes should not depend on paths."""


def captions(**options: Any) -> Any:
    """Return the images of AMBER that are to be described.

    Args:
        options: See `contralto.eval.data.amber_documents`.
    """
    rows, folder, words, reader = data.amber_documents(**options)
    _given.update(folder=folder, words=words, reader=reader)
    return data.dataset({"test": rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """Return the image to describe.

    Args:
        doc: The document.
    """
    return [data.image(_given["folder"] / doc["image"])]


def results(doc: dict[str, Any], responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for a caption.

    Args:
        doc: The document.
        responses: The caption, as the only member.
    """
    words, reader = _given["words"], _given["reader"]
    nouns = reader.nouns(responses[0], words.vocabulary)
    counts = amber.count(nouns, doc["truth"], doc["hallu"], words, reader.similar)
    return amber.document_metrics(counts) | {"length": float(len(responses[0].split()))}
