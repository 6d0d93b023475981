"""Import Python functions that recipes name as `module:function`."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["find_function", "search_folder"]


def search_folder(folder: Path) -> None:
    """Search a folder for modules before the installed ones, from now on.

    Args:
        folder: that of a recipe, whose functions may lie beside it.
    """
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.insert(0, path)


def find_function(name: str, *, folder: Path | None = None) -> Callable[..., Any]:
    """Import a function, or a class, by its name.

    Args:
        name: `module:function`.
        folder: searched for modules before the installed ones.

    Raises:
        ValueError: the name has another form, or there is no such module or no such function in it.

    Examples:
        >>> find_function("math:sqrt")(4)
        2.0
    """
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"a function must be named as module:function, not {name!r}")
    if folder is not None:
        search_folder(folder)
    try:
        value = getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: there is no module {error.name}; install it, or place it next to the recipe"
        ) from error
    if not callable(value):
        raise ValueError(f"{name}: the module {module} has no function {function}")  # noqa: TRY004 - a recipe's mistake
    return value  # type: ignore[no-any-return]
