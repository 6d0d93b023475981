"""Read what a recipe says of its data set for those who use it: licence, language, date. Nothing of it is guessed."""

import datetime
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["ABOUT", "Publication", "read_publication"]

ABOUT = {
    "license": "the licence of the data set, for its card: an identifier of the hub, such as apache-2.0",
    "language": "the language of the data set, for its card: a code such as en, or a list of codes",
    "date": "the day on which the data set was made, for its card, such as 2026-11-29",
}
"""The keys of a recipe that describe the data set, with their descriptions."""
EXAMPLES = {"license": "apache-2.0", "language": "en", "date": "2026-11-29"}
_LICENSE, _LANGUAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*"), re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")


class Publication(NamedTuple):
    """Licence, languages and date of a data set; None or empty where the recipe does not say."""

    license: str | None
    """An identifier of the hub, such as apache-2.0."""
    language: tuple[str, ...]
    """Codes of ISO 639, such as en."""
    date: str | None
    """ISO 8601."""

    @property
    def missing(self) -> list[str]:
        """Return the keys that the recipe lacks."""
        return [name for name in ABOUT if not getattr(self, name)]

    @property
    def request(self) -> str:
        """Return a sentence that asks for the missing keys; empty if none is missing."""
        lines = ", ".join(f"{name}: {EXAMPLES[name]}" for name in self.missing)
        return (
            f"the card does not say {_listed(self.missing)}: add to the recipe, for example, {lines}" if lines else ""
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def read_publication(recipe: Mapping[str, Any], where: str = "the recipe") -> Publication:
    """Return what a recipe says of its data set.

    Args:
        recipe: the mapping of the recipe.
        where: the name of the recipe, for errors.

    Raises:
        ValueError: a key has another form.

    Examples:
        >>> read_publication({"license": "cc-by-4.0", "language": "en", "date": "2026-11-29"})
        Publication(license='cc-by-4.0', language=('en',), date='2026-11-29')
        >>> read_publication({"license": "cc-by-4.0", "language": ["de", "en"]}).request
        'the card does not say date: add to the recipe, for example, date: 2026-11-29'
    """
    license_, languages = recipe.get("license"), recipe.get("language")
    languages = languages if isinstance(languages, list) else [] if languages is None else [languages]
    if license_ is not None and not (isinstance(license_, str) and _LICENSE.fullmatch(license_)):
        raise ValueError(
            f"{where}: license must be an identifier of the hub, such as apache-2.0, cc-by-4.0 or other, not {license_!r}"
        )
    for language in languages:
        if not (isinstance(language, str) and _LANGUAGE.fullmatch(language)):
            hint = ' (YAML reads no as false: write "no" for Norwegian)' if language is False else ""
            raise ValueError(f"{where}: language must be a code such as en, or a list of codes, not {language!r}{hint}")
    return Publication(license_, tuple(languages), _date(recipe.get("date"), where))


def _date(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return None if value is None else value.isoformat()
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"{where}: date must be a day such as 2026-11-29, not {value!r}") from None
