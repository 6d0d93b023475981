"""The reference's log-probabilities of a data set, kept on disk token by token.

Training needs them in every epoch and every run, and they never change. They are kept in blocks of rows, each a file named by a hash
of all that it depends on: the reference's weights (the base model and whatever adapter is part of the reference), its precision, and the
ids of the block's rows, in which prompts, texts, chat template, tokenizer and truncation come together. So another seed, loss or
learning rate finds the files again, and so does a data set that grew at its end; a killed pass goes on where it was.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor
from tqdm import tqdm

from contralto.common.files import replace_file

__all__ = ["COLUMNS", "ReferenceCache", "default_folder"]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
BLOCK = 1024
"""Rows per file: what a kill can lose."""

Rows = Sequence[dict[str, list[int]]]
"""Tokenised rows: `IDS` each."""
Compute = Callable[[Rows], tuple[list[Tensor], list[Tensor]]]
"""The reference's log-probabilities of the chosen and the rejected tokens of each row."""


def default_folder() -> Path:
    """Where references are kept unless told otherwise: beside the caches of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "contralto-reference"


class ReferenceCache:
    """The blocks of one reference.

    Args:
        folder: where all references are kept.
        key: the hash of the reference, see `contralto.common.hashing.model_digest`.
        compute: asks the reference. All processes call it with the same rows and get the same answer.
        writes: whether this process writes the files; one does.
        share: what the writing process says, told to all: `share(value) -> value`.
        wait: returns when all processes have come so far.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: str,
        compute: Compute,
        *,
        writes: bool = True,
        share: Callable[[Any], Any] = lambda value: value,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.compute, self.writes, self.share, self.wait = (
            Path(folder) / key[:32],
            compute,
            writes,
            share,
            wait,
        )

    def add(self, dataset: Any, name: str) -> Any:
        """A tokenised data set with `COLUMNS`.

        A streamed data set is read once from its beginning to its end; its rows are then known by their ids, in whatever order they
        come.

        Args:
            dataset: a `Dataset` or an `IterableDataset` with `IDS`.
            name: what the progress bar calls it.
        """
        streamed = isinstance(dataset, IterableDataset)
        total = None if streamed else len(dataset)
        with tqdm(total=total, desc=f"reference on {name}", unit="row", disable=not self.writes) as bar:
            paths, hashes = [], []
            for rows in _blocks(dataset):
                own = [_row_hash(row) for row in rows]
                paths.append(self._block(rows, sha256(b"".join(own)).hexdigest()))
                hashes += own
                bar.update(len(rows))
        found = concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
        if not streamed:
            return concatenate_datasets([dataset.flatten_indices(), found], axis=1)
        index = {key: at for at, key in enumerate(hashes)}
        return dataset.map(lambda row: found[_known(index, row)])

    def _block(self, rows: Rows, key: str) -> Path:
        path = self.folder / f"{key[:32]}.arrow"
        if not self.share(path.is_file()):
            chosen, rejected = self.compute(rows)
            if self.writes:
                _write(path, chosen, rejected)
            self.wait()
        return path


def _blocks(dataset: Iterable[Any]) -> Iterator[list[dict[str, list[int]]]]:
    rows = iter(dataset.select_columns(list(IDS)))  # type: ignore[attr-defined]
    while block := list(islice(rows, BLOCK)):
        yield block


def _row_hash(row: dict[str, list[int]]) -> bytes:
    return sha256(repr([list(row[name]) for name in IDS]).encode()).digest()


def _known(index: dict[bytes, int], row: dict[str, list[int]]) -> int:
    key = _row_hash(row)
    if key not in index:
        raise ValueError(
            "the streamed data set now gives a row that it did not give when the reference was computed: "
            "stream the same rows every time, or set precompute_ref_log_probs to False"
        )
    return index[key]


def _write(path: Path, chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> None:
    kind = pa.list_(pa.float32())
    sides = zip(COLUMNS, (chosen, rejected), strict=True)
    table = pa.table({name: pa.array([t.tolist() for t in side], kind) for name, side in sides})
    with (
        replace_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
