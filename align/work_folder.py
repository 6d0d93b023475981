"""The folder of a model that is made in stages, which an interrupted run resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contralto.common.files import read_text, replace_text

__all__ = ["check_begun", "record_settings"]

SETTINGS = Path("work") / "settings.json"


def check_begun(folder: Path, settings: Mapping[str, Any], purpose: str) -> None:
    """Raise ValueError for a folder that was begun with other settings, or that holds anything else.

    Args:
        folder: the output.
        settings: everything that determines the model, as JSON values.
        purpose: what the folder is for, such as "the amateur".

    Raises:
        ValueError: the folder cannot be continued.
    """
    if (folder / SETTINGS).is_file():
        earlier = json.loads(read_text(folder / SETTINGS))
        if changed := sorted(name for name in settings if earlier.get(name) != json.loads(json.dumps(settings[name]))):
            raise ValueError(
                f"{folder} was begun with another {', '.join(changed)}: use the same options, or name another folder"
            )
    elif folder.is_dir() and any(each.name != "work" for each in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name another folder for {purpose}")


def record_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings that a folder is begun with.

    Args:
        folder: the output.
        settings: everything that determines the model, as JSON values.
    """
    replace_text(folder / SETTINGS, json.dumps(settings, indent=1))
