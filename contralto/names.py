"""Models as users name them: a folder, a hub id, or `testbed:NAME` for an embedded model."""

from typing import Any

__all__ = ["from_pretrained", "locate"]


def locate(name: str) -> str:
    """The folder or hub id of a model's name.

    Example:
        >>> locate("testbed:expert").endswith("expert-0"), locate("org/model")
        (True, 'org/model')
    """
    if not name.startswith("testbed:"):
        return name
    from contralto import testbed

    return str(testbed.path(name.removeprefix("testbed:")))


def from_pretrained(auto: Any, name: str, **how: Any) -> Any:
    """`auto.from_pretrained` of a named model; an error says which model."""
    try:
        return auto.from_pretrained(locate(name), **how)
    except OSError as error:  # it does not always say which model
        raise OSError(f"cannot load {name}: {error}") from error
