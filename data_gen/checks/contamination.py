"""The check for text that a pair shares with a test set."""

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contralto.common.files import read_json_lines, read_lines, read_text
from contralto.common.suggestions import did_you_mean
from contralto.data_gen.checks.base import Columns, PairRows, answer_text, writes
from contralto.data_gen.ranges import check_number
from contralto.data_gen.templates import as_text

__all__ = ["BENCHMARKS", "contamination"]

BENCHMARKS = {"gsm8k": ("openai/gsm8k", "main", "test"), "hellaswag": ("Rowan/hellaswag", None, "validation")}
"""Test sets of the Hub by their usual names: repository, configuration, split."""
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@writes("contamination", "contaminated_by")
def contamination(rows: PairRows, *, against: Sequence[str], n: int = 13) -> Columns:
    """Count the n-grams of words that a pair shares with test sets (Brown et al. 2020, arXiv 2005.14165, appendix C: n = 13).

    Words are compared in lower case without ASCII punctuation. lm-eval's Janitor does the same to test sets; it cleans the
    texts in question after cutting them into n-grams, so that a dash between two words hides a copy from it. Texts of fewer
    than n words have no n-gram.

    Args:
        rows: the pairs.
        against: `gsm8k`, `hellaswag` (from the Hub), or files: .jsonl and .json (every text in them), .parquet, .txt (a text per
            line).
        n: words of an n-gram, at least 1.

    Returns:
        `contamination`, the number of different n-grams of prompt and answers in the test sets; `contaminated_by`, the first
        test set that has one, or None.

    Raises:
        ValueError: there is no such file, it cannot be read, or `n` is below 1.
    """
    _check_contamination(against, n)
    if not rows:
        return {"contamination": [], "contaminated_by": []}
    tests = {name: {gram for text in _test_texts(name) for gram in _ngrams(text, n)} for name in against}
    counts, names = [], []
    for row in tqdm(rows, desc="contamination", unit="row"):
        texts = [as_text([message]) for message in row["prompt"]]
        texts += [answer_text(row, "chosen"), answer_text(row, "rejected")]
        grams = {gram for text in texts for gram in _ngrams(text, n)}
        counts.append(len(set().union(*(grams & test for test in tests.values()))))
        names.append(next((name for name, test in tests.items() if grams & test), None))
    return {"contamination": counts, "contaminated_by": names}


def _check_contamination(against: Any, n: int) -> None:
    check_number("contamination: n", n, least=1, most=10_000, whole=True)
    if isinstance(against, str) or not against:
        raise ValueError(
            f"contamination: against must be a list of files or of {', '.join(BENCHMARKS)}, not {against!r}"
        )
    for name in against:
        if name not in BENCHMARKS and not Path(name).is_file():
            raise ValueError(
                f"contamination: there is no file {name}{did_you_mean(name, BENCHMARKS)}; known by name are {', '.join(BENCHMARKS)}"
            )


def _ngrams(text: str, n: int) -> Iterator[str]:
    words = text.lower().translate(_WITHOUT_PUNCTUATION).split()
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _test_texts(name: str) -> Iterator[str]:
    """Yield every text of a test set."""
    path = Path(name)
    if name in BENCHMARKS:
        from datasets import load_dataset

        repository, configuration, split = BENCHMARKS[name]
        yield from (text for row in load_dataset(repository, configuration, split=split) for text in _texts(row))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        yield from (text for row in Dataset.from_parquet(name) for text in _texts(row))
    elif path.suffix == ".json":
        yield from _texts(_parsed(read_text(path), name))
    elif path.suffix == ".jsonl":
        for _, row in read_json_lines(path):
            yield from _texts(row)
    else:
        yield from read_lines(path)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"contamination: {where}: not JSON: {error}") from error


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)
