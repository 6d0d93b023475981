"""The versions that determine a result: those of Python, of contralto and of the libraries it runs in."""

import platform
from importlib import metadata

from contralto import __version__

__all__ = ["LIBRARIES", "versions"]

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "vllm")


def versions(*more_libraries: str) -> dict[str, str]:
    """Return the versions by name, without those of libraries that are not installed. Nothing is imported.

    Args:
        more_libraries: names of distributions besides `LIBRARIES`.

    Examples:
        >>> list(versions())[:4]
        ['contralto', 'python', 'torch', 'transformers']
    """
    found = {"contralto": __version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *more_libraries):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
