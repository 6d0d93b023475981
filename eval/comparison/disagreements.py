"""Documents on which the rows of a comparison get different scores."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from contralto.eval.comparison.answers import Answers, TaskFrame
from contralto.eval.comparison.columns import Column
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.samples import Sample
from contralto.eval.metrics import MetricCounts
from contralto.eval.stats.counts import Array

__all__ = ["disagreements"]

THUMBNAIL, ENLARGED = 320, 192
"""The largest side of an image on the page, and the side up to which small drawings are enlarged, in pixels."""


def disagreements(
    frame: TaskFrame,
    rows: Iterable[ComparisonRow],
    column: Column,
    answers: Mapping[str, Answers],
    limit: int,
) -> list[dict[str, Any]]:
    """Return documents on which deterministic rows get different scores, chosen by the largest differences.

    Args:
        frame: The task.
        rows: The rows of the comparison.
        column: The runs of a model.
        answers: The answers of its rows.
        limit: The number of documents that a row gains, and of those that it loses, against the first row.

    Returns:
        Plain data for the page, sorted by number.
    """
    names = [row.name for row in rows if row.name in column.runs and not row.is_sampled]
    scores = np.stack([_per_document(answers[name].measures[frame.metric]) for name in names])  # (rows, documents)
    order = np.argsort(-np.ptp(scores, axis=0), kind="stable")
    baseline = scores[0]
    gained = [i for i in order if scores[1:, i].max(initial=-np.inf) > baseline[i]][:limit]
    lost = [i for i in order if scores[1:, i].min(initial=np.inf) < baseline[i] and i not in gained][:limit]
    chosen = sorted({int(i) for i in (*gained, *lost)})
    return [_document(frame, column, names, scores, i) for i in chosen]


def _per_document(measurement: MetricCounts) -> Array:
    return np.asarray(measurement.metric(measurement.table), dtype=np.float64)


def _document(frame: TaskFrame, column: Column, names: Sequence[str], scores: Array, i: int) -> dict[str, Any]:
    sample = column.runs[names[0]][0].samples[i]
    own = [column.runs[name][0].samples[i] for name in names]
    texts = [each.chosen.get(frame.metric, each.answer) for each in own]
    answers = [
        {"row": name, "text": text, "score": float(score)}
        for name, text, score in zip(names, texts, scores[:, i], strict=True)
    ]
    document = {"number": sample.number, "prompt": sample.prompt, "target": _target(sample), "said": answers}
    if frame.buckets:
        document["bucket"] = frame.buckets[i]
    if column.images:
        document["pictures"] = [_data_address(image) for image in column.images[i]]
    return document


def _data_address(image: Any) -> str:
    """Return a small copy of an image as a data address; drawings of few pixels are enlarged without loss."""
    from PIL.Image import Resampling

    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    zoom = max(1, ENLARGED // max(small.size))
    form = "PNG" if max(image.size) <= 256 else "JPEG"
    small.resize((zoom * small.width, zoom * small.height), Resampling.NEAREST).save(file, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _target(sample: Sample) -> str:
    """Return the correct answer; for multiple-choice tasks, the text of the option."""
    options = next((each for each in sample.doc.values() if isinstance(each, list)), [])
    is_index = sample.target.isdigit() and options and int(sample.target) < len(options)
    return str(options[int(sample.target)]).strip() if is_index else sample.target
