"""Documents with their answers, as lm-eval logs them.

Read from lm_eval 0.4.13: the form of logged samples.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.utils import handle_non_serializable, hash_dict_images

from contralto.common.hashing import content_digest
from contralto.common.suggestions import did_you_mean

__all__ = [
    "Identity",
    "Sample",
    "check_same_documents",
    "document_digest",
    "first_response",
    "read_samples",
    "request_arguments",
    "value_digest",
]

INVALID = "[invalid]"
"""The answer that lm-eval's filters return where they find none."""


class Identity(NamedTuple):
    """Hashes of a document, its prompt and its target: two answers are paired if all three agree."""

    document: str
    prompt: str
    target: str


class Sample(NamedTuple):
    """One document with its answer."""

    identity: Identity
    number: int
    doc: dict[str, Any]
    prompt: str
    target: str
    answer: str
    """The completion, or the option with the highest likelihood."""
    chosen: Mapping[str, str]
    """The option that a metric counts as the answer, by metric, where it is another score that decides."""
    is_invalid: bool
    """True if the task's filter found no answer in the completion."""
    metrics: dict[str, Any]


def read_samples(
    lines: Iterable[Mapping[str, Any]], *, filter_name: str | None = None, delimiter: str = " "
) -> list[Sample]:
    """Read the documents of a run as lm-eval logged them, sorted by number.

    Args:
        lines: The rows of a `samples_*.jsonl`.
        filter_name: The filter whose answers to read; None for the first one.
        delimiter: What stands between a prompt and an option, and is no part of the option.

    Returns:
        One sample per document.

    Raises:
        ValueError: There are no rows, or there is no such filter.
    """
    rows = list(lines)
    names = list(dict.fromkeys(row["filter"] for row in rows))
    if not names:
        raise ValueError("there are no samples: run lm-eval with --log_samples")
    if filter_name and filter_name not in names:
        raise ValueError(
            f"the task has no filter {filter_name!r}{did_you_mean(filter_name, names)}: it has {', '.join(names)}"
        )
    chosen = [_sample(row, delimiter) for row in rows if row["filter"] == (filter_name or names[0])]
    return sorted(chosen, key=lambda sample: sample.number)


def _sample(row: Mapping[str, Any], delimiter: str) -> Sample:
    requests = request_arguments(row["arguments"])
    filtered = row["filtered_resps"]
    chosen: dict[str, str] = {}
    if len(requests) > 1 or isinstance(requests[0][1] if len(requests[0]) > 1 else {}, str):
        answer, chosen = _best_options(requests, row, delimiter)
    else:
        answer = first_response(row["resps"])
    return Sample(
        Identity(document_digest(row["doc"]), value_digest(requests), row["target_hash"]),
        int(row["doc_id"]),
        row["doc"],
        str(requests[0][0]),
        str(row["target"]),
        answer,
        chosen,
        INVALID in (filtered if isinstance(filtered, list) else [filtered]),
        {name: row[name] for name in row["metrics"]},
    )


def request_arguments(arguments: Any) -> list[list[Any]]:
    """Return the arguments of requests without images: prompts, continuations, generation options.

    Args:
        arguments: A sequence per request, or the mappings that lm-eval writes into files.
    """
    if isinstance(arguments, Mapping):
        arguments = [list(each.values()) for each in arguments.values()]
    media = {"visual", "audio"}
    return [[part for part in each if not (isinstance(part, Mapping) and media & set(part))] for each in arguments]


def _best_options(
    requests: Sequence[Sequence[Any]], row: Mapping[str, Any], delimiter: str
) -> tuple[str, dict[str, str]]:
    """Return the likeliest option, and those that lm-eval's other metrics take: per character or byte, and less the one without prompt."""
    scores = np.array([_likelihood(response) for response in row["resps"]])
    options = [str(each[1] if len(each) > 1 else each[0]) for each in requests]
    found = {}
    if "acc_mutual_info" in row["metrics"] and len(options) % 2 == 0:  # the second half has no prompt
        half = len(options) // 2
        scores, alone = scores[:half], scores[half:]
        found["acc_mutual_info"] = options[int(np.argmax(scores - alone))].strip()
    texts = [option.removeprefix(delimiter) for option in options[: len(scores)]]
    for name, length in (("acc_norm", len), ("acc_bytes", lambda text: len(text.encode()))):
        sizes = np.array([max(1, length(text)) for text in texts])
        found[name] = options[int(np.argmax(scores / sizes))].strip()
    return options[int(np.argmax(scores))].strip(), {
        name: text for name, text in found.items() if name in row["metrics"]
    }


def _likelihood(response: Any) -> float:
    """Return the log-likelihood in `[[log-likelihood, is_greedy]]`, whose members may be strings."""
    while isinstance(response, list | tuple):
        response = response[0]
    return float(response)


def first_response(responses: Any) -> str:
    """Return the first completion in nested lists of responses.

    Args:
        responses: The `resps` of a logged sample.
    """
    while isinstance(responses, list | tuple):
        responses = responses[0]
    return str(responses)


def value_digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the hash of a JSON value, without the memory addresses of objects in it.

    Args:
        value: Any value; objects that JSON does not know are converted as lm-eval does.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=handle_non_serializable)
    return content_digest(re.sub(r" at 0x[0-9a-fA-F]+", "", text), 16)


def document_digest(doc: Any) -> str:
    """Return the hash of a document, images by their pixels; lm-eval's own hash depends on memory addresses.

    Args:
        doc: The document.
    """
    return value_digest(hash_dict_images({"doc": doc}))


def check_same_documents(expected: Sequence[Identity], actual: Sequence[Identity], *, task: str, source: str) -> None:
    """Raise an error if two runs do not answer the same questions in the same order.

    Args:
        expected: The documents of the comparison.
        actual: The documents of the other run.
        task: The name of the task, for the message.
        source: Where the other run comes from, for the message.

    Raises:
        ValueError: Documents, prompts or targets differ, or their order.
    """
    if len(expected) != len(actual):
        raise ValueError(f"{source} answers {len(actual)} documents of {task}, and the comparison has {len(expected)}")
    if differing := [i for i, pair in enumerate(zip(expected, actual, strict=True)) if pair[0] != pair[1]]:
        a, b = expected[differing[0]], actual[differing[0]]
        parts = [name for name, x, y in zip(Identity._fields, a, b, strict=True) if x != y]
        raise ValueError(
            f"{source} answers other questions of {task}: {len(differing)} of {len(expected)} differ, the first (number "
            f"{differing[0]}) in its {' and '.join(parts)}; only answers to the same questions can be paired"
        )
