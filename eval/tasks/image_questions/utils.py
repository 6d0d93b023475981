"""MME, MMVP, AMBER and HallusionBench for lm-eval."""

from functools import partial
from pathlib import Path
from typing import Any

from contralto.eval import data
from contralto.eval.metrics import image_questions

_folders: dict[str, Path] = {}
"""Where the images of a benchmark are. Not in the documents, so that their hashes are the same wherever the images are."""


LOGGED = {
    "mme": ("acc", "image_acc", "perception", "cognition", "unparsed"),
    "mmvp": ("acc", "pair_acc", "unparsed"),
    "amber": ("acc", "precision", "recall", "f1", "unparsed"),
    "hallusionbench": ("acc", "figure_acc", "question_acc", "unparsed"),
}
"""The metrics of each benchmark's tasks: lm-eval aggregates every value that it gets."""


def questions(**options: Any) -> Any:
    """Return the questions of a split.

    Args:
        options: See `contralto.eval.data.question_documents`.
    """
    rows, folder = data.question_documents(**options)
    _folders[options["benchmark"]] = folder
    return data.dataset({"test": [{**row, "benchmark": options["benchmark"]} for row in rows]})


def images(doc: dict[str, Any]) -> list[Any]:
    """Return the image of a question; an empty list for a question without one.

    Args:
        doc: The document.
    """
    return [data.image(_folders[doc["benchmark"]] / doc["image"])] if doc["image"] else []


def _results(doc: dict[str, Any], responses: list[str], *, parser: str) -> dict[str, Any]:
    values = image_questions.results(doc, responses[0], parser=parser)
    values |= {"perception": values["mme"], "cognition": values["mme"]}
    return {name: values[name] for name in LOGGED[doc["benchmark"]]}


by_words, by_start, by_choice = (partial(_results, parser=name) for name in ("words", "start", "choice"))
