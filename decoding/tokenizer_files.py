"""Read the vocabulary that a tokenizer's files declare, without loading the tokenizer.

Loading the tokenizer of a large vocabulary takes seconds, most of them for its merges and its conversion. Comparing two vocabularies
takes less: `tokenizer.json` lists every token with its id, and other files can only add to them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache

__all__ = ["Declared", "local_file", "read_vocabulary"]

ADDING = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose tokens are added to the vocabulary where it lacks them."""


class Declared(NamedTuple):
    """The vocabulary that a tokenizer's files declare."""

    ids: dict[str, int]
    """Ids of the tokens in `tokenizer.json`."""
    is_complete: bool
    """Whether no other file names a token that is not among them."""


def read_vocabulary(name: str) -> Declared | None:
    """Read the vocabulary of a model's tokenizer from its files, without a download.

    Args:
        name: a folder or the name of a repository.

    Returns:
        The vocabulary, or None where there is no `tokenizer.json` on this machine, or one of an unknown format.

    Examples:
        >>> from contralto import testbed
        >>> read_vocabulary(str(testbed.path("expert"))).ids == testbed.tokenizer().get_vocab()
        True
        >>> read_vocabulary("nobody/none")
    """
    path = local_file(name, "tokenizer.json")
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = content["model"]["vocab"]
        ids = dict(tokens) if isinstance(tokens, dict) else {token: at for at, (token, _) in enumerate(tokens)}
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return Declared(ids, all(token in ids for token in _named(name)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _named(name: str) -> Iterator[str]:
    """Iterate over the tokens that a tokenizer's other files name."""
    for file in ADDING:
        if (path := local_file(name, file)) is not None:
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                if "token" in key and not key.startswith("tokenizer"):
                    yield from _strings(value)
    if (path := local_file(name, "added_tokens.json")) is not None:
        yield from json.loads(path.read_text(encoding="utf-8"))


def _strings(value: Any) -> Iterator[str]:
    """Iterate over all strings in nested lists and in the values of nested dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def local_file(name: str, file: str) -> Path | None:
    """Return the path of a model's file on this machine, or None.

    Args:
        name: a folder or the name of a repository.
        file: the name of the file.

    Examples:
        >>> from contralto import testbed
        >>> local_file(str(testbed.path("expert")), "config.json").name
        'config.json'
    """
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # not the name of a repository
        return None
    return Path(found) if isinstance(found, str) else None
