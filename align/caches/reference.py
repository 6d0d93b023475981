"""The reference's log-probabilities of a data set, kept on disk token by token.

Training needs them in every epoch and every run, and they never change. Their key is a hash of the reference's weights (the base model
and whatever adapter is part of the reference) and of its precision.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor

from contralto.align.caches.blocks import ID_COLUMNS, BlockCache, Processes, TokenRows
from contralto.align.trainers.batches import REFERENCE_COLUMNS
from contralto.common.files import replace_file
from contralto.common.hashing import content_digest

__all__ = ["ReferenceCache"]

SideLogps = tuple[list[Tensor], list[Tensor]]
"""Log-probabilities `(tokens,)` of each row's chosen and of each row's rejected completion."""


class ReferenceCache(BlockCache[SideLogps]):
    """The blocks of one reference, each an Arrow stream with `REFERENCE_COLUMNS`.

    Args:
        folder: the folder of all references.
        key: the hash of the reference, see `contralto.common.hashing.model_digest`.
        logps_of: return the reference's log-probabilities of rows. All processes call it with the same rows and get the same result.
        processes: the processes that call `logps_of`.
    """

    rows_per_block = 1024
    suffix = ".arrow"
    is_joint = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: str,
        logps_of: Callable[[TokenRows], SideLogps],
        processes: Processes | None = None,
    ) -> None:
        super().__init__(folder, key, processes)
        self.logps_of = logps_of

    def add(self, dataset: Any, name: str) -> Any:
        """Return a tokenised data set with `REFERENCE_COLUMNS`.

        A streamed data set is read once from beginning to end. Its rows are found by their ids afterwards, in whatever order they come.

        Args:
            dataset: a `Dataset` or an `IterableDataset` with `ID_COLUMNS`.
            name: its name, for the progress bar.
        """
        title = f"reference on {name}"
        if not isinstance(dataset, IterableDataset):
            columns = _read(self.fill(self.blocks(dataset), title, len(dataset)))
            return concatenate_datasets([dataset.flatten_indices(), columns], axis=1)
        hashes: list[bytes] = []

        def hashed_blocks() -> Iterator[TokenRows]:
            for rows in self.blocks(dataset):
                hashes.extend(map(_row_hash, rows))
                yield rows

        columns = _read(self.fill(hashed_blocks(), title, None))
        index = {key: at for at, key in enumerate(hashes)}
        return dataset.map(lambda row: columns[_position(index, row)])

    def block_hash(self, rows: TokenRows) -> str:
        """Return a hash of the token ids of rows.

        Args:
            rows: the rows of a block.
        """
        return content_digest(b"".join(map(_row_hash, rows)))

    def compute(self, rows: TokenRows) -> SideLogps:
        """Return the reference's log-probabilities.

        Args:
            rows: the rows of a block.
        """
        return self.logps_of(rows)

    def write(self, path: Path, content: SideLogps) -> None:
        """Write a block.

        Args:
            path: the file.
            content: the log-probabilities.
        """
        kind = pa.list_(pa.float32())
        sides = zip(REFERENCE_COLUMNS, content, strict=True)
        table = pa.table({name: pa.array([row.tolist() for row in side], kind) for name, side in sides})
        with (
            replace_file(path) as unfinished,
            pa.OSFile(str(unfinished), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def count_rows(self, path: Path) -> int:
        """Return the number of rows in a block.

        Args:
            path: the file.

        Raises:
            OSError: the file is damaged.
            ValueError: likewise.
        """
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return int(reader.read_all().num_rows)


def _read(paths: Sequence[Path]) -> Dataset:
    """Return the rows of blocks, mapped from disk into memory."""
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def _row_hash(row: dict[str, list[int]]) -> bytes:
    return bytes.fromhex(content_digest(repr([list(row[name]) for name in ID_COLUMNS])))


def _position(index: dict[bytes, int], row: dict[str, list[int]]) -> int:
    key = _row_hash(row)
    if key not in index:
        raise ValueError(
            "the streamed data set now gives a row that it did not give when the reference was computed: "
            "stream the same rows every time, or set precompute_ref_log_probs to False"
        )
    return index[key]
