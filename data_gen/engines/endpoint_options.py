"""Options of endpoints: address, API key, further fields. Recorded options must not contain secrets."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from contralto.common.texts import secret_name, short

__all__ = ["check_address", "check_extra_body", "read_key"]

OWN_FIELDS = ("messages", "prompt", "stream", "n")
"""Fields of a request that `extra_body` may not set: they would change the prompt, or the form of the reply."""


def check_address(base_url: Any) -> None:
    """Reject an address that contains secrets or is not a URL.

    Args:
        base_url: the option of a recipe.

    Raises:
        ValueError: it is no address, or holds what may be secret; a secret is not repeated in the error.
    """
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (ValueError, AttributeError, TypeError):
        is_address = False
    is_plain = not (set("@?#") & set(str(base_url)))
    if is_address and is_plain:
        return
    if not is_plain:
        raise ValueError(
            "base_url contains a user, a password or a query, which would be written to the store: "
            "put the key into an environment variable and name it in key_env"
        )
    raise ValueError(f"base_url must be an address such as http://localhost:8000/v1, not {short(repr(base_url))}")


def read_key(key_env: Any) -> tuple[str, str]:
    """Return the API key and the reason why it is missing; one is empty, or both if no key is sent.

    Args:
        key_env: the option of a recipe: the name of a variable, empty for the default one, None for no key.

    Raises:
        ValueError: `key_env` is no name, and may be the key itself; it is not repeated in the error.
    """
    if key_env is None:
        return "", ""
    name = key_env or "OPENAI_API_KEY"
    key = os.environ.get(name, "").strip() if isinstance(name, str) and "\0" not in name else ""
    is_name = isinstance(name, str) and bool(re.fullmatch(r"[A-Z][A-Z]*(_[A-Z0-9]+)+", name))
    if key and not (key.isascii() and key.isprintable()):
        return "", "the API key contains characters that cannot be sent in a header: set it again"
    if key or not key_env:
        return key, ""
    if is_name:
        return (
            "",
            f"key_env names {name}, but that environment variable is not set: set it, or use key_env: null to send no key",
        )
    raise ValueError(
        "key_env must be the name of an environment variable that is set, such as OPENAI_API_KEY, never the key itself; "
        "null sends no key"
    )


def check_extra_body(extra_body: Any) -> dict[str, Any]:
    """Return the further fields of requests.

    Args:
        extra_body: the option of a recipe; None is no fields.

    Raises:
        ValueError: they are not JSON, hold a key, or are fields that the engine sets.
    """
    extra = {} if extra_body is None else extra_body
    if not isinstance(extra, Mapping):
        raise ValueError(f"extra_body must be a mapping, not {short(repr(extra))}")  # noqa: TRY004 - a recipe's mistake
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra_body must contain only JSON values: {error}") from error
    if own := [name for name in OWN_FIELDS if name in extra]:
        raise ValueError(f"extra_body must not set {own[0]}, which the engine sets")
    if name := secret_name(extra):
        raise ValueError(
            f"extra_body contains {name}, which would be recorded: put the key into an environment variable and name it in key_env"
        )
    return dict(extra)
