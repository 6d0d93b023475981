"""The last hidden states of a teacher, kept on disk so that the teacher need not be in memory.

A distribution over the vocabulary is the head applied to one hidden state. For a model of 7B that is 7 KB per token in half precision,
where the logits over 152 000 tokens would be 300 KB. So the states of all completions are computed once, and the head is kept beside
them. Another run on the same rows finds them again, and then does not load the teacher.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from contralto.align.caches.blocks import ID_COLUMNS, BlockCache, Processes, TokenRows
from contralto.align.losses.chunked import Head
from contralto.align.trainers.batches import STATES
from contralto.common.files import replace_file
from contralto.common.hashing import content_digest

__all__ = ["TeacherStates", "load_head", "read_states", "save_head"]

RowStates = list[tuple[Tensor, list[int]]]
"""For each row the states of its completions one below the other `(tokens, H)`, and the number of states of each completion."""


class TeacherStates(BlockCache[RowStates]):
    """The blocks of one teacher, each a safetensors file of states `(N, H)` and of counts `(rows, completions)`.

    Args:
        folder: the folder of all teachers.
        key: a hash of the teacher and of the truncation of rows.
        states_of: return the teacher's states of rows.
        bytes_per_token: return the size of a state; called before anything is computed.
        processes: the processes that fill the cache.
    """

    rows_per_block = 64
    suffix = ".safetensors"
    is_joint = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: str,
        states_of: Callable[[TokenRows], RowStates],
        bytes_per_token: Callable[[], int],
        processes: Processes | None = None,
    ) -> None:
        super().__init__(folder, key, processes)
        self.states_of, self.bytes_per_token = states_of, bytes_per_token

    def add(self, dataset: Dataset, name: str) -> Dataset:
        """Return a tokenised data set with the column `STATES`: for each row a file, its first state in it, and states per completion.

        Args:
            dataset: a data set with `ID_COLUMNS`.
            name: its name, for the progress bar.

        Raises:
            OSError: the disk has no room for what is missing.
        """
        self._check_room(sum(_tokens(rows) for rows in self.blocks(dataset) if not self.is_complete(rows)))
        paths = self.fill(self.blocks(dataset), f"teacher on {name}", len(dataset))
        places = [place for path in paths for place in _places(path)]
        return dataset.add_column(STATES, places)

    def block_hash(self, rows: TokenRows) -> str:
        """Return a hash of the token ids of rows.

        Args:
            rows: the rows of a block.
        """
        return content_digest(repr([[list(row[name]) for name in ID_COLUMNS] for row in rows]))

    def compute(self, rows: TokenRows) -> RowStates:
        """Return the teacher's states.

        Args:
            rows: the rows of a block.
        """
        return self.states_of(rows)

    def write(self, path: Path, content: RowStates) -> None:
        """Write a block.

        Args:
            path: the file.
            content: the states.
        """
        states = torch.cat([states for states, _ in content])
        _save({"states": states, "counts": torch.tensor([counts for _, counts in content])}, path)

    def count_rows(self, path: Path) -> int:
        """Return the number of rows in a block.

        Args:
            path: the file.

        Raises:
            OSError: the file is damaged.
        """
        return len(_counts(path))

    def _check_room(self, tokens: int) -> None:
        if not tokens:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = tokens * self.bytes_per_token(), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the teacher's states of {tokens:,} tokens take {needed / 1e9:.1f} GB, and {self.folder} has {free / 1e9:.1f} GB "
                "left: name another folder (teacher_cache), train on fewer rows, or keep the teacher in memory"
            )


def _tokens(rows: TokenRows) -> int:
    return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    with replace_file(path) as unfinished:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file; errors name it, which are RuntimeErrors where it cannot be mapped into memory."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{os.fspath(path)} cannot be read: {error}") from error


def _counts(path: Path) -> list[list[int]]:
    with _opened(path) as file:
        counts: list[list[int]] = file.get_tensor("counts").tolist()
    return counts


def _places(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the location of each row's states in the file of a block."""
    start = 0
    for counts in _counts(path):
        yield {"file": str(path), "start": start, "counts": counts}
        start += sum(counts)


def read_states(place: Mapping[str, Any]) -> Sequence[Tensor]:
    """Read the states of a row's completions, each `(tokens, H)`, without reading the rest of the file.

    Args:
        place: a value of the column `STATES`.

    Raises:
        OSError: the file cannot be read.
    """
    with _opened(place["file"]) as file:
        states: Tensor = file.get_slice("states")[place["start"] : place["start"] + sum(place["counts"])]
    return torch.split(states, list(place["counts"]))


def save_head(head: Head, path: Path) -> None:
    """Write a head to a safetensors file.

    Args:
        head: the head.
        path: the file.
    """
    numbers = {"scale": repr(head.scale), "softcap": repr(head.softcap or 0.0)}
    _save({"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias}), path, numbers)


def load_head(path: Path, device: str | torch.device) -> Head:
    """Read a head that `save_head` wrote.

    Args:
        path: the file.
        device: the device of its tensors.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        numbers = {name: float(value) for name, value in file.metadata().items()}
    return Head(tensors["weight"], tensors.get("bias"), numbers["scale"], numbers["softcap"] or None)
