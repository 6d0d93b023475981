"""A teacher to be learned from: loaded, perhaps quantised; or its last hidden states, kept on disk while it is out of memory.

A distribution over the vocabulary is the head applied to one hidden state. For a model of 7B that is 7 KB per token in half precision,
where the logits over 152 000 tokens would be 300 KB. So the states of all texts are computed once, and the head is kept beside them.
They lie in blocks of rows, each a file named by a hash of all that it depends on: the teacher, how rows are cut, the ids of the
block's rows. A killed pass goes on where it was, another run on the same rows finds them again, and then does not load the teacher.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from contralto.align.losses.divergences import Head
from contralto.align.trainers.batches import STATES
from contralto.common.files import replace_file

__all__ = ["IDS", "TeacherStates", "WithStates", "default_folder", "load_head", "save_head"]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
BLOCK = 64
"""Rows per file: what a kill can lose, and what is held in memory at once."""

Rows = Sequence[dict[str, list[int]]]
"""Tokenised rows: `IDS` each."""


def default_folder() -> Path:
    """Where states are kept unless told otherwise: beside the caches of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "contralto-teacher"


class TeacherStates:
    """The blocks of one teacher.

    Args:
        folder: where the states of all teachers are kept.
        key: a hash of the teacher and of how rows are cut.
        compute: asks the teacher: for each row the states of its texts one below the other `(n, H)`, and how many belong to each text.
        bytes_per_token: asks how large a state is; called before anything is computed.
        rank, processes: this process computes every so-manieth block.
        wait: returns when all processes have come so far.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: str,
        compute: Callable[[Rows], list[tuple[Tensor, list[int]]]],
        bytes_per_token: Callable[[], int],
        *,
        rank: int = 0,
        processes: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.key, self.compute, self.bytes_per_token = (
            Path(folder) / key[:32],
            key,
            compute,
            bytes_per_token,
        )
        self.rank, self.processes, self.wait = rank, processes, wait

    def add(self, dataset: Dataset, name: str) -> Dataset:
        """A tokenised data set with the column `STATES`: for each row a file, where in it, and how many states each text has.

        Args:
            dataset: with `IDS`.
            name: what the progress bar calls it.

        Raises:
            OSError: the disk has no room for what is missing.
        """
        paths = [self.folder / f"{_digest(rows)}.safetensors" for rows in _blocks(dataset)]
        self._check_room(
            sum(_tokens(rows) for path, rows in zip(paths, _blocks(dataset), strict=True) if not path.is_file())
        )
        with tqdm(total=len(dataset), desc=f"teacher on {name}", unit="row", disable=self.rank > 0) as bar:
            for number, (path, rows) in enumerate(zip(paths, _blocks(dataset), strict=True)):
                if number % self.processes == self.rank and not path.is_file():
                    _write(path, self.compute(rows))
                bar.update(len(rows))
        self.wait()
        places = [place for path in paths for place in _places(path)]
        return dataset.add_column(STATES, places)

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


def _blocks(dataset: Dataset) -> Iterator[Rows]:
    ids = dataset.select_columns(list(IDS))
    for start in range(0, len(ids), BLOCK):
        columns = ids[start : start + BLOCK]
        yield [dict(zip(IDS, row, strict=True)) for row in zip(*(columns[name] for name in IDS), strict=True)]


def _digest(rows: Rows) -> str:
    return sha256(repr([[list(row[name]) for name in IDS] for row in rows]).encode()).hexdigest()[:32]


def _tokens(rows: Rows) -> int:
    return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def _write(path: Path, found: list[tuple[Tensor, list[int]]]) -> None:
    states = torch.cat([states for states, _ in found])
    _save({"states": states, "counts": torch.tensor([counts for _, counts in found])}, path)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    with replace_file(path) as unfinished:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished, metadata)


def _places(path: Path) -> Iterator[dict[str, Any]]:
    with safe_open(path, "pt") as file:
        counts = file.get_tensor("counts").tolist()
    start = 0
    for each in counts:
        yield {"file": str(path), "start": start, "counts": each}
        start += sum(each)


class WithStates:
    """A collator that reads the states of its rows from disk: `(N, H)`, all chosen texts first, then all rejected ones.

    Args:
        collator: what makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        places = [example[STATES] for example in examples if STATES in example]
        rest = [{name: value for name, value in example.items() if name != STATES} for example in examples]
        batch: dict[str, Any] = self.collator(rest)
        if places:
            sides = zip(*(_read(place) for place in places), strict=True)
            batch[STATES] = torch.cat([states for side in sides for states in side])
        return batch


def _read(place: Mapping[str, Any]) -> Sequence[Tensor]:
    """The states of a row's texts. Only their part of the file is read."""
    with safe_open(place["file"], "pt") as file:
        states: Tensor = file.get_slice("states")[place["start"] : place["start"] + sum(place["counts"])]
    return torch.split(states, list(place["counts"]))


def save_head(head: Head, path: Path) -> None:
    """Keep a head as a safetensors file."""
    numbers = {"scale": repr(head.scale), "softcap": repr(head.softcap or 0.0)}
    _save({"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias}), path, numbers)


def load_head(path: Path, device: str | torch.device) -> Head:
    """A head that `save_head` kept."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        numbers = {name: float(value) for name, value in file.metadata().items()}
    return Head(tensors["weight"], tensors.get("bias"), numbers["scale"], numbers["softcap"] or None)
