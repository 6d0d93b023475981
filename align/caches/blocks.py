"""A cache of blocks of rows on disk.

A block is a file named by a hash of everything that its content depends on: a key of the model and its settings, and the token ids of the
block's rows, in which prompt, completions, chat template, tokenizer and truncation come together. So another seed, loss or learning
rate finds the files again, and so does a data set that has grown at its end; a pass that was killed continues with the first
missing block.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from tqdm import tqdm

__all__ = ["ID_COLUMNS", "BlockCache", "Processes", "TokenRows", "default_folder"]

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TokenRows = Sequence[dict[str, list[int]]]
"""Tokenised rows with `ID_COLUMNS`."""
Content = TypeVar("Content")


def default_folder(name: str) -> Path:
    """Return the default folder of a cache, next to the caches of `datasets`.

    Args:
        name: the kind of cache.
    """
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / f"contralto-{name}"


class Processes(NamedTuple):
    """The processes that fill a cache together; by default one."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None
    """Return when all processes have called it."""
    broadcast: Callable[[Any], Any] = lambda value: value
    """Return the value of rank 0 on all processes."""


class BlockCache(ABC, Generic[Content]):
    """The blocks of one model in a folder of their own. A subclass computes and writes them.

    Args:
        folder: the folder of all models.
        key: a hash of the model and its settings.
        processes: the processes that fill the cache.

    Attributes:
        rows_per_block: what a kill can lose, and what is held in memory at once.
        is_joint: True if all processes compute every block together, because their forward passes communicate. Otherwise each
            process computes every `world_size`-th block alone.
    """

    rows_per_block: ClassVar[int]
    suffix: ClassVar[str]
    is_joint: ClassVar[bool]

    def __init__(self, folder: str | os.PathLike[str], key: str, processes: Processes | None = None) -> None:
        self.folder = Path(folder) / key[:32]
        self.processes = processes or Processes()

    @abstractmethod
    def block_hash(self, rows: TokenRows) -> str:
        """Return a hash of the rows of a block.

        Args:
            rows: the rows.
        """

    @abstractmethod
    def compute(self, rows: TokenRows) -> Content:
        """Compute the content of a block.

        Args:
            rows: the rows.
        """

    @abstractmethod
    def write(self, path: Path, content: Content) -> None:
        """Write a block, completely or not at all.

        Args:
            path: the file.
            content: as `compute` returned it.
        """

    @abstractmethod
    def count_rows(self, path: Path) -> int:
        """Return the number of rows in a block.

        Args:
            path: the file.

        Raises:
            OSError: the file is damaged.
            ValueError: likewise.
        """

    def path(self, rows: TokenRows) -> Path:
        """Return the path of the file that holds a block of rows.

        Args:
            rows: the rows.
        """
        return self.folder / f"{self.block_hash(rows)[:32]}{self.suffix}"

    def is_complete(self, rows: TokenRows) -> bool:
        """Return whether the file of a block exists and has all rows; warn if it is damaged.

        Args:
            rows: the rows.
        """
        path = self.path(rows)
        if not path.is_file():
            return False
        try:
            damage = None if self.count_rows(path) == len(rows) else "it has another number of rows"
        except (OSError, ValueError) as error:
            damage = str(error)
        if damage is not None:
            logger.warning("%s is damaged and is computed again: %s", path, damage)
        return damage is None

    def blocks(self, dataset: Iterable[Any]) -> Iterator[list[dict[str, list[int]]]]:
        """Yield the rows of a data set in blocks.

        Args:
            dataset: a `Dataset` or an `IterableDataset` with `ID_COLUMNS`.
        """
        rows = iter(dataset.select_columns(list(ID_COLUMNS)))  # type: ignore[attr-defined]
        while block := list(islice(rows, self.rows_per_block)):
            yield block

    def fill(self, blocks: Iterable[TokenRows], title: str, total: int | None) -> list[Path]:
        """Compute the blocks that are missing; return the files of all.

        Args:
            blocks: the rows of each block.
            title: the title of the progress bar.
            total: rows of all blocks, None if it is not known.
        """
        paths = []
        with tqdm(total=total, desc=title, unit="row", disable=self.processes.rank > 0) as bar:
            for number, rows in enumerate(blocks):
                if self.is_joint:
                    self._compute_jointly(rows)
                elif number % self.processes.world_size == self.processes.rank and not self.is_complete(rows):
                    self.write(self.path(rows), self.compute(rows))
                paths.append(self.path(rows))
                bar.update(len(rows))
        self.processes.wait()
        return paths

    def _compute_jointly(self, rows: TokenRows) -> None:
        is_first = self.processes.rank == 0
        if self.processes.broadcast(is_first and self.is_complete(rows)):
            return
        content = self.compute(rows)
        if is_first:
            self.write(self.path(rows), content)
        self.processes.wait()
