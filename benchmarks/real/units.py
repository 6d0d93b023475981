"""Keep the results of units of work on disk, so that a run that is stopped anywhere goes on where it was."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contralto.common.files import read_json_lines

__all__ = ["Key", "Units"]

Key = Mapping[str, Any]
"""Everything that determines the result of a unit, as JSON values: digests of models, settings, seeds, the row."""


class Units:
    """Append the results of units to a JSONL file, one line per unit, and find them again by their keys.

    A line that a kill cut short is dropped when the file is next written. Before its first result a run writes a line with its
    versions, so that the card can say with what the results were made.

    Args:
        path: The file; it is created with the first result.
        run: Versions and machine of this run.

    Examples:
        >>> units = Units(folder / "units.jsonl", {"torch": "2"})
        >>> units.fill([{"row": 0}, {"row": 1}], lambda batch: [10 * i for i in batch], title="rows", batch_size=2)
        >>> Units(folder / "units.jsonl", {})[{"row": 1}]
        10
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self._run = path, dict(run)
        self.runs: list[dict[str, Any]] = []
        """The versions of every run that wrote into the file, without repetitions."""
        self._values: dict[str, Any] = {}
        self._is_begun = False
        for record in self._records():
            if "run" in record:
                self.runs += [record["run"]] if record["run"] not in self.runs else []
            else:
                self._values[_text(record["key"])] = record["value"]

    def _records(self) -> list[dict[str, Any]]:
        """Return the complete lines of the file."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        if whole and not whole.endswith(b"\n"):
            complete = whole[: whole.rfind(b"\n") + 1]
            return [json.loads(line) for line in complete.decode().split("\n") if line]
        return [record for _, record in read_json_lines(self.path)]

    def __contains__(self, key: Key) -> bool:
        return _text(key) in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[_text(key)]

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Any:
        """Return the result of a unit, None if there is none yet.

        Args:
            key: The key of the unit.
        """
        return self._values.get(_text(key))

    def of(self, keys: Sequence[Key]) -> list[Any] | None:
        """Return the results of all units, None unless all of them are there.

        Args:
            keys: The keys of the units.
        """
        found = [self._values.get(_text(key)) for key in keys]
        return None if any(value is None for value in found) else found

    def add(self, key: Key, value: Any) -> None:
        """Write a result to disk.

        Args:
            key: The key of the unit.
            value: A JSON value other than None.

        Raises:
            ValueError: The value is None, which stands for a missing result.
        """
        if value is None:
            raise ValueError("a result must not be None, which stands for a missing one")
        if not self._is_begun:
            self._begin()
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps({"key": key, "value": value}), file=file)
        self._values[_text(key)] = value

    def fill(
        self,
        keys: Sequence[Key],
        compute: Callable[[list[int]], Sequence[Any]],
        *,
        title: str,
        batch_size: int = 1,
    ) -> None:
        """Compute the units that have no result yet, in batches, each written as soon as it is done.

        Args:
            keys: The keys of all units, in the order in which they are to be computed.
            compute: Returns the results of a batch, from the positions of its units in `keys`.
            title: The title of the progress bar.
            batch_size: The largest number of units in a batch.
        """
        missing = [i for i, key in enumerate(keys) if key not in self]
        with tqdm(total=len(keys), initial=len(keys) - len(missing), desc=title, unit="unit") as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                for i, value in zip(batch, compute(batch), strict=True):
                    self.add(keys[i], value)
                bar.update(len(batch))

    def _begin(self) -> None:
        """Cut the file behind its last complete line, and write the versions of this run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
            file.write(json.dumps({"run": self._run}).encode() + b"\n")
        self.runs += [self._run] if self._run not in self.runs else []
        self._is_begun = True


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
