"""Write the JSONL of `contralto generate`: a row per prompt, as soon as it is decoded, and resume an interrupted file.

A run resumes a file only if every row in it is the row that the run would write: the same prompts, settings and contents of input
files. The only bytes that are ever removed are those of an incomplete row.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from contralto.cli.outputs import check_output_file
from contralto.common.files import decode, lines_of, locked

__all__ = ["COLUMNS", "OutputFile", "opened"]

COLUMNS = (
    *("index", "prompt", "image", "contrast_prompt", "chat_template_kwargs", "row"),
    *("text", "greedy", "plain", "digests", "settings"),
)
"""The columns of the output itself."""


Digests = Callable[[int], Mapping[str, Any]]


class OutputFile:
    """An open, locked output file.

    Args:
        path: of the file.
        file: the open file, unbuffered and in append mode.
        rows: the beginning of every row: its index and its prompt.
        settings: the options that determine the texts; the end of every row.
        digests: returns hashes of the files that a row is made with, by the row's index; None if there are none.
    """

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        rows: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        digests: Digests | None = None,
    ) -> None:
        self._path, self._file, self._rows, self._digests = path, file, rows, digests
        self._settings = json.loads(json.dumps(settings))
        self.done = 0
        """Number of rows in the file, which are not decoded again."""

    def resume(self) -> None:
        """Count the rows of an earlier run, and remove a row that it did not finish.

        Raises:
            ValueError: the file has other rows than this run would write.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._check_tail(content[whole:], content.count(b"\n"))
        for index, line in enumerate(lines_of(decode(content[:whole], str(self._path)))):
            self._check_row(index, line)
        self._file.truncate(whole)
        self.done = content.count(b"\n")

    def _check_row(self, index: int, line: str) -> None:
        where, row = f"{self._path}:{index + 1}", _parsed(line)
        if not isinstance(row, dict) or not {"index", "settings"} <= set(row):
            raise ValueError(f"{where}: not a row of contralto generate: name another --output file")
        if (earlier := row["settings"]) != self._settings:
            changed = sorted(k for k in {*earlier, *self._settings} if earlier.get(k) != self._settings.get(k))
            raise ValueError(f"{where}: made with another {', '.join(changed)}: use the same, or name another file")
        if index >= len(self._rows):
            raise ValueError(
                f"{where}: there are only {len(self._rows)} prompts: use the same prompts, or name another file"
            )
        expected = json.loads(json.dumps(self._rows[index]))
        if changed := [name for name in expected if _column(row, name, expected) != expected[name]]:
            raise ValueError(
                f"{where}: its {changed[0]} is not that of prompt {index}: use the same prompts in the same order, or name "
                "another file"
            )
        self._check_digests(where, index, row)

    def _check_digests(self, where: str, index: int, row: Mapping[str, Any]) -> None:
        """Reject a row that was made with other contents of the same files; rows of early versions have no digests."""
        earlier = row.get("digests")
        if self._digests is None or not isinstance(earlier, dict):
            return
        own = self._digests(index)
        changed = sorted(k for k in {*earlier, *own} if earlier.get(k) != own.get(k))
        if changed:
            raise ValueError(
                f"{where}: made with other files of {', '.join(changed)}, changed since: restore them, or name another file"
            )

    def _check_tail(self, tail: bytes, index: int) -> None:
        """Reject an unterminated last line, unless it is a prefix of the row that belongs there."""
        expected = _line(self._rows[index])[:-2] if index < len(self._rows) else b""  # without "}" and the line end
        if tail and not (tail.startswith(expected or b"\n") or expected.startswith(tail)):
            raise ValueError(f"{self._path}:{index + 1}: not a row of contralto generate: name another --output file")

    def write(self, result: Mapping[str, Any]) -> None:
        """Append the next row.

        Args:
            result: columns of the decoded texts.

        Raises:
            OSError: the row cannot be written; the rows before it are whole.
        """
        start = os.fstat(self._file.fileno()).st_size
        try:
            made = {**self._rows[self.done], **result, **self._digested(self.done), "settings": self._settings}
            left = memoryview(_line(made))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)
            kept = f"{error.strerror}; it holds {self.done} whole rows: make room, and go on with --resume"
            raise OSError(error.errno, kept, str(self._path)) from error
        self.done += 1

    def _digested(self, index: int) -> dict[str, Any]:
        return {} if self._digests is None else {"digests": dict(self._digests(index))}


@contextmanager
def opened(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    resume: bool,
    digests: Digests | None = None,
) -> Iterator[OutputFile]:
    """Open an output file and lock it for one run.

    Args:
        path: of the file, which is created or empty, or with `resume` has the rows of an earlier run.
        rows: the beginning of every row: its index and its prompt.
        settings: the options that determine the texts.
        resume: whether to continue a file that has rows.
        digests: returns hashes of the files that a row is made with, by the row's index.

    Raises:
        OSError: the file cannot be written, or another process writes it.
        ValueError: the file has rows, and `resume` is false or they are those of another run.
    """
    check_output_file(path, "--output")
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: {path} is a device or a pipe, and a file is needed")
    with path.open("a+b", buffering=0) as file, locked(file, f"another process is writing {path}: wait for it"):
        output = OutputFile(path, file, rows, settings, digests)
        if os.fstat(file.fileno()).st_size and not resume:
            raise ValueError(f"{path} exists: add --resume to go on with it, or name another file")
        output.resume()
        yield output


def _column(row: Mapping[str, Any], name: str, expected: Mapping[str, Any]) -> Any:
    """Return a column of a row in the file; rows of early versions have all columns of the user in `row`."""
    others = row.get("row")
    others = others if isinstance(others, dict) else {}
    if name == "row":
        return {name: value for name, value in others.items() if name in expected["row"]}
    return row[name] if name in row else others.get(name)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _parsed(line: str) -> Any:
    """Return the JSON value of a line, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
