"""MMHal-Bench for lm-eval: the answers, which `contralto judge --preset mmhal` rates."""

from typing import Any

from contralto.eval import data

_given: dict[str, Any] = {}
"""The folder of the images. Not in the documents, whose hashes should not depend on paths."""


def questions(**options: Any) -> Any:
    """Return the questions of MMHal-Bench.

    Args:
        options: See `contralto.eval.data.mmhal_documents`.
    """
    rows, folder = data.mmhal_documents(**options)
    _given["folder"] = folder
    return data.dataset({"test": rows})


def images(doc: dict[str, Any]) -> list[Any]:
    """Return the image of a question.

    Args:
        doc: The document.
    """
    return [data.image(_given["folder"] / doc["image"])]


def results(doc: dict[str, Any], responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for an answer: its length, since the rating is a judge's.

    Args:
        doc: The document.
        responses: The answer, as the only member.
    """
    return {"length": float(len(responses[0].split()))}
