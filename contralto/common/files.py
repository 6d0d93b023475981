"""Read, lock and replace files, the same way in every command.

Text is UTF-8 whatever the locale says, and a line ends at `\\n` alone. `str.splitlines` also splits at form feeds, U+0085 and
U+2028, which are ordinary characters of prompts and of JSON strings.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "decode",
    "earlier",
    "lines_of",
    "locked",
    "locked_folder",
    "naming",
    "new_folder",
    "read_json_lines",
    "read_lines",
    "read_text",
    "remove_unfinished",
    "replace_file",
    "replace_text",
    "set_aside",
]


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file with its line ends as they are; a byte-order mark is dropped.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8; the message names the line.
    """
    with naming(Path(path)):
        content = Path(path).read_bytes()
    return decode(content, str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in errors of the operating system that name none, as those of `read`, `write`, `fsync` and of libraries.

    Args:
        path: the file.

    Raises:
        OSError: raised within the block.

    Examples:
        >>> import errno
        >>> with naming(Path("a.bin")):
        ...     raise OSError(errno.ENOSPC, "Error writing bytes to file")
        Traceback (most recent call last):
            ...
        OSError: [Errno 28] No space left on device: 'a.bin'
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def decode(content: bytes, name: str) -> str:
    """Decode UTF-8 and drop a byte-order mark.

    Args:
        content: the bytes of a file or stream.
        name: what the error message calls it.

    Raises:
        ValueError: the bytes are not UTF-8; the message names the line.

    Examples:
        >>> decode(b"one\\ntw\\xff", "notes.txt")
        Traceback (most recent call last):
            ...
        ValueError: notes.txt:2: not UTF-8 text: byte 0xff; save the file as UTF-8
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ValueError(f"{name}:{line}: not UTF-8 text: byte {byte:#04x}; save the file as UTF-8") from error


def lines_of(text: str) -> list[str]:
    r"""Split a text at `\n` and `\r\n`, unlike `str.splitlines`, which splits at more characters.

    Args:
        text: any text; a last line without an end counts too.

    Examples:
        >>> lines_of("one\x0c\u2028still one\r\ntwo\n")
        ['one\x0c\u2028still one', 'two']
    """
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a UTF-8 file.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8.
    """
    return lines_of(read_text(path))


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield the line numbers and values of a JSONL file; blank lines are skipped.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, or a line is not JSON; the message names file and line.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise ValueError(f"{path}:{number}: not JSON: {why}; each line holds one JSON value") from error


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically.

    Args:
        path: the file; an older one is replaced, and a missing folder is created.
        text: the new content. Line ends are written as they are.

    Raises:
        OSError: the file cannot be written; an older one is unchanged.
    """
    with replace_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and move its file to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of it. Processes that replace the same file at the same time do not
    disturb each other: the last one wins.

    Args:
        path: the file; an older one is replaced, and a missing folder is created.

    Yields:
        A path in the same folder, for libraries that open files themselves, such as `save_file` of safetensors.

    Raises:
        OSError: the file cannot be written; an older one is unchanged. The error names a file.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, replace_file(Path(folder, "new", "a.bin")) as unfinished:
        ...     unfinished.write_bytes(b"content")
        7
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
            unfinished.unlink(missing_ok=True)  # a link that somebody put there would be written through
            yield unfinished
            with unfinished.open("rb+") as file:
                # Else the name can reach the disk before the content, and a crash leaves an empty file.
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of `replace_file` that processes of this machine left when they were killed.

    Args:
        folder: the folder, with those below it; the caller replaces no file in it at the moment.

    Raises:
        OSError: a file cannot be removed.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, f"a.jsonl.{os.getpid()}.part").touch()
        ...     remove_unfinished(Path(folder))
        ...     os.listdir(folder)
        []
    """
    import psutil

    for unfinished in folder.rglob("*.part"):
        number = unfinished.stem.rpartition(".")[2]
        if not unfinished.is_file() or not number.isdecimal():
            continue
        if int(number) == os.getpid() or not psutil.pid_exists(int(number)):
            unfinished.unlink(missing_ok=True)


def set_aside(path: Path, *, into: Path | None = None) -> None:
    """Rename a file so that its name ends in `.earlier`; one that was set aside before is replaced.

    Args:
        path: the file.
        into: a folder to which the file is moved with its own name instead.

    Raises:
        OSError: the file does not exist, or cannot be renamed.
    """
    path.replace(earlier(path) if into is None else into / path.name)


def earlier(path: Path) -> Path:
    """Return the path to which `set_aside` renames a file.

    Args:
        path: the file.

    Examples:
        >>> earlier(Path("train.jsonl")).name
        'train.jsonl.earlier'
    """
    return path.with_name(f"{path.name}.earlier")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move it to `path` when the block ends without an error.

    Args:
        path: the folder to make; an empty one is replaced, and a missing folder above it is created.

    Yields:
        A folder beside `path`, which is removed if the block raises.

    Raises:
        OSError: the folder exists and is not empty, or cannot be made.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with new_folder(Path(folder, "new")) as unfinished:
        ...         _ = (unfinished / "a.txt").write_text("content")
        ...     Path(folder, "new", "a.txt").read_text()
        'content'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for file in filter(Path.is_file, unfinished.rglob("*")):
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(file: IO[Any], busy: str) -> Iterator[None]:
    """Hold the lock of an open file; the operating system releases it even if the process is killed.

    Args:
        file: the file, open for writing. Child processes that inherit it hold the lock as well.
        busy: the error message while another process holds the lock; `{pid}` in it is the text of the file.

    Raises:
        OSError: another process holds the lock.
    """
    import fcntl  # not on Windows, where the rest of this module works

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise OSError(busy.replace("{pid}", str(file.read(20)).strip() or "?")) from error
    yield


@contextmanager
def locked_folder(folder: Path, busy: str) -> Iterator[IO[str]]:
    """Hold the lock of a folder, whose file `.lock` names the process that holds it.

    Args:
        folder: the folder; it is created if it is missing.
        busy: the error message while another process holds the lock; `{pid}` in it is the number of that process.

    Yields:
        The open lock file. A child process that inherits its descriptor holds the lock as well.

    Raises:
        OSError: another process holds the lock, or the lock file is a symbolic link, through which another file would be emptied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8", opener=_without_links) as file, locked(file, busy):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _without_links(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"{path} is a symbolic link, and the file behind it would be emptied: remove the link") from error
