"""Check, before a command does its work, that its outputs can be written."""

import os
from pathlib import Path
from tempfile import TemporaryFile

__all__ = ["check_output_file", "check_output_folder"]


def check_output_file(path: str | os.PathLike[str], flag: str) -> None:
    """Check that a file can be written, before its content is computed.

    Args:
        path: the file; it may exist. Its folder is made if it is missing.
        flag: the option that names the file, for the error.

    Raises:
        ValueError: the path is a folder, lies below a file, or may not be written to.

    Examples:
        >>> check_output_file("/", "--html")
        Traceback (most recent call last):
            ...
        ValueError: --html: / is a folder, and a file is needed
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{flag}: {file} is a folder, and a file is needed")
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError(f"{flag}: {file} cannot be written: permission denied")
    check_output_folder(file.parent, flag)


def check_output_folder(path: str | os.PathLike[str], flag: str) -> None:
    """Check that files can be written into a folder; create it if it is missing.

    Args:
        path: the folder.
        flag: the option that names it, for the error.

    Raises:
        ValueError: the path or a part of it is a file, or the folder may not be written to or is full.
    """
    folder = Path(path)
    taken = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)
    if taken is not None:
        raise ValueError(f"{flag}: {taken} is a file, and a folder is needed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # File modes do not tell of full or read-only disks. The file has no name, so that a killed process leaves none.
        with TemporaryFile(dir=folder) as trial:
            trial.write(b"\0" * 4096)
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        raise ValueError(f"{flag}: nothing can be written into {folder}: {error.strerror or error}") from error
