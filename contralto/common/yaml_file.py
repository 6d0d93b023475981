"""Read YAML files of recipes; duplicate keys, excessive aliases and excessive merges are errors.

YAML lets the last of two equal keys win, and lets a few lines with aliases stand for billions of values, or for themselves. A merge
(`<<`) copies the keys of what it names while the file is read, so that merges are counted before they are made.
"""

import os
from collections.abc import Hashable
from typing import Any

import yaml

from contralto.common.files import read_text

__all__ = ["parse_yaml", "read_yaml"]

MOST_VALUES = 100_000
DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """A loader of plain values that rejects duplicate keys; keys of a merge (`<<`) may be overridden."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy the keys of merges into a mapping, as PyYAML does, after they have been counted."""
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(each, yaml.MappingNode):
                        self.flatten_mapping(each)
                        self._merged += len(each.value)
                    if self._merged > MOST_VALUES:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"merges (<<) copy more than {MOST_VALUES:,} keys", name.start_mark
                        )
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping, as PyYAML does, unless it gives a key twice."""
        seen: dict[str, Any] = {}
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(name, yaml.ScalarNode) or name.tag == "tag:yaml.org,2002:merge":
                continue
            if name.value in seen and seen[name.value] is not name:  # a merge puts the same keys in again
                line = seen[name.value].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name.value!r} is given twice, first in line {line}", name.start_mark
                )
            seen[name.value] = name
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the value of a YAML file.

    Args:
        path: the file, in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or not YAML, a key is given twice, or aliases make it too large.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML document.

    Args:
        text: the text.
        name: what errors call it.

    Raises:
        ValueError: it is not YAML, a key is given twice, or aliases make it too large.

    Examples:
        >>> parse_yaml("seed: 1\\nseed: 2", "recipe.yaml")
        Traceback (most recent call last):
            ...
        ValueError: recipe.yaml is not YAML: the key 'seed' is given twice, first in line 1 (line 2, column 1)
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # also a date that does not exist
        raise ValueError(f"{name} is not YAML: {_problem(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    _check_size(value, name)
    return value


def _problem(error: Exception) -> str:
    """Return what is wrong and where, without the line itself: a secret may stand there."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    text = ": ".join(each for each in (error.context, error.problem, error.note) if each)
    mark = error.problem_mark or error.context_mark
    return text if mark is None else f"{text} (line {mark.line + 1}, column {mark.column + 1})"


def _check_size(document: Any, name: str) -> None:
    """Reject values that aliases expand too far, and values that contain themselves."""
    left, count = [(document, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise ValueError(
                f"{name} is too large: at most {MOST_VALUES:,} values, {DEEPEST} deep, each alias (*name) counted as what it stands for"
            )
        if isinstance(value, dict):
            left += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | tuple | set):
            left += [(each, depth + 1) for each in value]
