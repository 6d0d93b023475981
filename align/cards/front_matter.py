"""Write what the hub reads of a card, and turn names into ones that may be published: hub ids, or folders without their paths."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from contralto.common.hub import adapter_base

__all__ = ["base_model_of", "card_text", "hub_ids", "is_hub_id", "public_name", "public_value"]


def is_hub_id(name: str) -> bool:
    """Return whether a name is the id of a repository on the hub, and no folder or embedded model.

    Args:
        name: as users name models and data sets.

    Examples:
        >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("testbed:expert"), is_hub_id("./out"), is_hub_id("/data/out")
        (True, False, False, False)
    """
    has_form = 1 <= len(name.split("/")) <= 2 and not name.startswith((".", "~", "/")) and ":" not in name
    return (
        has_form
        and "\\" not in name
        and not Path(name).exists()
        and not name.endswith((".jsonl", ".json", ".parquet", ".csv", ".yaml"))
    )


def public_name(name: str) -> str:
    """Return a name that says nothing of the machine: a hub id, an embedded model, or the name of a folder or file.

    Args:
        name: as users name models and data sets.

    Examples:
        >>> public_name("Qwen/Qwen3-0.6B"), public_name("testbed:expert"), public_name("/home/me/models/mine/")
        ('Qwen/Qwen3-0.6B', 'testbed:expert', 'mine')
    """
    if is_hub_id(name) or (":" in name and not Path(name).exists()):
        return name
    return Path(name).resolve().name


def public_value(value: Any) -> Any:
    """Return a setting with every path in it replaced by the name of its folder or file.

    Args:
        value: a setting, also a list or a mapping.

    Examples:
        >>> public_value({"teacher": "/home/me/big", "rate": 0.1})
        {'teacher': 'big', 'rate': 0.1}
    """
    if isinstance(value, dict):
        return {name: public_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(each) for each in value]
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value)):
        return public_name(str(value))
    return value


def base_model_of(name: str) -> str | None:
    """Return the hub id of the model that a model is derived from, for `base_model` of a card.

    Args:
        name: the model that training began with: a hub id is its own base. A folder has the base that its adapter or its card names.

    Returns:
        None if nothing names a hub id.
    """
    if is_hub_id(name):
        return name
    card = Path(name) / "README.md"
    named = adapter_base(name) if Path(name).is_dir() else None
    if named is None and card.is_file():
        named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) and is_hub_id(named) else None


def card_text(data: dict[str, Any], body: str) -> str:
    """Return a card: the front matter, as `huggingface_hub.ModelCardData` writes it, and the text.

    Args:
        data: fields of `ModelCardData`; those that are None or empty are left out.
        body: the text in Markdown.
    """
    given = {name: value for name, value in data.items() if value not in (None, [], "")}
    front = ModelCardData(**given).to_yaml()
    return f"---\n{front}\n---\n\n{body.strip()}\n"


def hub_ids(names: Iterable[str]) -> list[str]:
    """Return those names that are hub ids, each once.

    Args:
        names: as users name models and data sets.
    """
    return [name for name in dict.fromkeys(names) if is_hub_id(name)]
