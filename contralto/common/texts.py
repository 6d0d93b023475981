"""Sanitise untrusted strings: remove lone surrogates, secrets, control sequences and overlong lines."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any
from urllib.parse import quote

__all__ = ["Secrets", "amount", "clean", "has_lone_surrogate", "printable", "secret_name", "short", "without_bos"]

_LONE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, all but tab and line feed, and those that change the direction of writing."""
SHORTEST_SECRET = 8
"""Shorter keys, such as EMPTY, are placeholders of local servers: they are hidden in errors, but not cut out of completions."""
_SECRET_NAME = re.compile(
    r"(?i)api[-_]?key|authorization|bearer|passw(or)?d|client[-_]?secret|secret[-_]?key|(access|auth|api|hf|hub)[-_]?token|^token$"
)

_SECRET_VARIABLE = re.compile(r"(?i)(key|token|secret|password)$")
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/@]+)@")
"""The password of an address."""


def clean(text: str) -> str:
    """Replace lone surrogates by U+FFFD: no encoding can store them.

    Args:
        text: any string, such as one that was read from JSON.

    Returns:
        A string that can be encoded.

    Examples:
        >>> ascii(clean("a\\ud800b"))
        "'a\\\\ufffdb'"
    """
    return _LONE.sub("\ufffd", text)


def printable(text: str) -> str:
    r"""Replace control characters by their escape sequences.

    Args:
        text: any text.

    Examples:
        >>> print(printable("one\x1b[2Jtwo"))
        one\x1b[2Jtwo
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def amount(money: float) -> str:
    """Return an amount of money with two decimals, a small one with four.

    Args:
        money: the amount.

    Examples:
        >>> amount(12.345), amount(0.0123), amount(0)
        ('12.35', '0.0123', '0.00')
    """
    return f"{money:.4f}" if 0 < money < 0.1 else f"{money:.2f}"


def has_lone_surrogate(value: Any) -> bool:
    """Return whether a JSON value holds a lone surrogate in any of its strings or names.

    Args:
        value: a string, or mappings and sequences of values of any depth. Other values hold no strings.

    Examples:
        >>> has_lone_surrogate({"prompt": [{"content": "a\\udc00"}]}), has_lone_surrogate(["a", 1])
        (True, False)
    """
    # JSON in ASCII spells out every surrogate; values that are too deep for it, or have names that are no strings, are searched anyway
    with suppress(RecursionError, TypeError, ValueError):
        if "\\ud" not in _IN_ASCII(value):
            return False
    left = [value]
    while left:  # a stack of our own, since the depth is not ours
        one = left.pop()
        if isinstance(one, str):
            if _LONE.search(one):
                return True
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            left += one
    return False


def _parts(value: Any) -> Any:
    """Return what JSON can write of another value: the contents of a mapping, nothing of an image."""
    return dict(value) if isinstance(value, Mapping) else None


_IN_ASCII = json.JSONEncoder(default=_parts).encode


def secret_name(value: Any) -> str | None:
    """Return the first name in a JSON value under which a secret stands: `api_key`, `Authorization`, `hf_token`, ...

    Args:
        value: mappings and sequences of any depth.

    Examples:
        >>> secret_name({"headers": [{"X-Api-Key": "123"}]}), secret_name({"max_tokens": 5, "api_key": None})
        ('X-Api-Key', None)
    """
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            for name, held in one.items():
                if isinstance(held, str) and held and isinstance(name, str) and _SECRET_NAME.search(name):
                    return name
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
    return None


def short(value: Any, limit: int = 300) -> str:
    """Return a value as one line of at most `limit` characters.

    Args:
        value: a string, or a JSON value.
        limit: characters of the result.

    Examples:
        >>> short("a  long\\n story", 8), short({"a": [1]})
        ('a lon...', '{"a": [1]}')
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    line = clean(re.sub(r"\s+", " ", text).strip())
    return line if len(line) <= limit else line[: limit - 3] + "..."


class Secrets:
    """API keys, with methods that hide them in stored, logged and shown strings.

    Args:
        keys: the keys; empty ones are left out.

    Examples:
        >>> Secrets("sk-12345678").hide("401: no such key: sk-12345678")
        '401: no such key: ***'
    """

    def __init__(self, *keys: str) -> None:
        self._keys = [key for key in keys if key]
        forms = {form for key in self._keys for form in (key, quote(key, safe=""), json.dumps(key)[1:-1])}
        self._forms = sorted(forms, key=len, reverse=True)

    @classmethod
    def of_process(cls) -> "Secrets":
        """Return the secrets in environment variables and in the flags of the command.

        They are the variables that are named `..._KEY`, `..._TOKEN`, `..._SECRET` or `..._PASSWORD`, unless they are the paths of files,
        flags such as `--api-key` and `--hub_token`, and the passwords in addresses, such as that of `HTTPS_PROXY`. Libraries and the
        code of others, such as a scorer that asks an endpoint, may show them in their errors.
        """
        named = [
            value
            for name, value in os.environ.items()
            if _SECRET_VARIABLE.search(name) and not value.startswith(("/", "~", "./"))
        ]
        passwords = [password for value in (*os.environ.values(), *sys.argv) for password in _PASSWORD.findall(value)]
        found = (*named, *_flag_values(sys.argv), *passwords)
        return cls(*(value for value in found if len(value) >= SHORTEST_SECRET))

    def hide(self, text: str) -> str:
        """Replace the keys in an error or a log line by `***`. Call it before the text is cut.

        Beginnings of keys are replaced, too: whoever made the text may have cut it.

        Args:
            text: the whole text.

        Examples:
            >>> Secrets("sk-0123456789").hide("401: no such key: sk-0123456...")
            '401: no such key: ***...'
        """
        for form in self._forms:
            text = text.replace(form, "***")
        return _without_beginnings(text, self._forms)

    def hide_in_completion(self, text: str) -> str:
        """Replace the keys in a completion, where a placeholder such as EMPTY may be a word.

        Args:
            text: the completion.
        """
        for form in self._forms:
            text = text.replace(form, "***") if len(form) >= SHORTEST_SECRET else text
        return text

    def occur_in(self, text: str) -> bool:
        """Return whether a text holds a key that is no placeholder.

        Args:
            text: such as a recipe.
        """
        return self.hide_in_completion(text) != text


def _flag_values(words: Sequence[str]) -> Iterator[str]:
    """Yield the values of flags under whose names secrets stand."""
    is_secret = False
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            is_secret = bool(_SECRET_NAME.search(name.lstrip("-")))
            word = value
        if is_secret:
            yield word


def _without_beginnings(text: str, secrets: Sequence[str]) -> str:
    """Replace truncated copies of secrets, each by the longest beginning that is there."""
    heads = {secret[:SHORTEST_SECRET] for secret in secrets if len(secret) >= SHORTEST_SECRET}
    at = 0
    while found := [place for head in heads if (place := text.find(head, at)) >= 0]:
        at = min(found)
        length = max(_length_in_common(text[at:], secret) for secret in secrets)
        text, at = f"{text[:at]}***{text[at + length :]}", at + 3
    return text


def _length_in_common(text: str, secret: str) -> int:
    """Return the number of characters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, secret, strict=False)))


def without_bos(text: str, tokenizer: Any) -> str:
    """Return a prompt without the beginning-of-text token that it spells out, where the tokenizer adds one.

    Args:
        text: a prompt, such as one that a chat template rendered.
        tokenizer: a transformers tokenizer.

    Returns:
        A prompt that begins once when the tokenizer encodes it with special tokens.

    Examples:
        >>> from contralto import testbed
        >>> without_bos("<bos>Ben went", testbed.tokenizer())
        'Ben went'
    """
    adds = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds else text
