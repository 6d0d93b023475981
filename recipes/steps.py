"""The commands of a paper's recipe, read: which models and data they take, what they make, and what the user has to bring."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import yaml

from contralto.common.files import lines_of
from contralto.recipes.papers import PaperRecipe

__all__ = ["RecipeStep", "brought", "is_hub", "steps_of", "substituted"]

MODELS = ("model_name_or_path", "teacher_model_name_or_path", "model", "amateur", "critic", "expert", "antiexpert")
"""Options, and arguments of `--model_args`, that name models."""
DATA = ("dataset_name", "file", "data_dir", "prompts")
MADE = ("output", "output_dir", "output_path")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
LOCAL = ("testbed:", "self:")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+")
"""Names such as `DIR` that stand for what the user brings."""


class RecipeStep(NamedTuple):
    """A command of a recipe."""

    words: tuple[str, ...]
    models: tuple[str, ...]
    """Names of models: the one that is trained or decodes comes first."""
    data: tuple[str, ...]
    """Names of data sets, files and folders that it reads, for evaluations the tasks."""
    made: tuple[str, ...]
    """Files and folders that it writes."""

    @property
    def name(self) -> str:
        """Return the command: `align`, `eval`, `data`, ...; `python` for a script."""
        return self.words[1] if self.words[0] == "contralto" else self.words[0]

    def option(self, name: str, default: str = "") -> str:
        """Return the value of an option.

        Args:
            name: without dashes before it, and with underscores.
            default: returned if the command does not have it.
        """
        return next(_values(self.words, (name,)), default)


def steps_of(commands: str, files: Mapping[str, str]) -> list[RecipeStep]:
    """Return the commands of a recipe, in their order.

    Args:
        commands: one per line.
        files: files beside them, by name: data recipes are read.

    Examples:
        >>> step = steps_of("contralto align dpo --model_name_or_path a/b --dataset_name c.jsonl --output_dir d", {})[0]
        >>> step.name, step.models, step.data, step.made
        ('align', ('a/b',), ('c.jsonl',), ('d',))
    """
    return [_step(tuple(shlex.split(line)), files) for line in lines_of(commands) if line.strip()]


def _step(words: tuple[str, ...], files: Mapping[str, str]) -> RecipeStep:
    models, data, made = (list(_values(words, names)) for names in (MODELS, DATA, MADE))
    pairs = dict(word.split("=", 1) for word in _model_args(words) if "=" in word)
    if words[1:2] in (("amateur",), ("critic",)):
        models.insert(0, words[2])
    if words[1:2] == ("judge",):
        models += [name for name in _judges(words) if is_hub(name)]  # others are those of an endpoint
        data += [*_values(words, ("questions", "pairs")), *takewhile(lambda word: word[:2] != "--", words[2:])]
    if words[1:2] == ("eval",):  # its --model is a kind of models
        models = [pairs[name] for name in ("pretrained", *MODELS) if name in pairs]
    recipe = yaml.safe_load(files[words[3]]) if words[1:3] == ("data", "run") and words[3] in files else {}
    if recipe:
        models += [role["model"] for role in recipe.get("roles", {}).values() if "model" in role]
        models += _scorers(recipe)
        data.append(recipe["rows"]["source"])
        made.append(recipe.get("output", "pairs"))
    data += [name for names in _values(words, ("tasks",)) for name in names.split(",")]
    return RecipeStep(words, tuple(dict.fromkeys(models)), tuple(data), tuple(made))


def _judges(words: Sequence[str]) -> Iterator[str]:
    """Yield the models of judges and reward models."""
    yield from (word.partition("=")[2] for word in words if word.startswith("model="))
    yield from _values(words, ("reward_model",))


def _scorers(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield the models of scorers and checks."""
    for strategy in recipe.get("strategies", ()):
        scorer = strategy.get("scorer") if isinstance(strategy, Mapping) else None
        if isinstance(scorer, Mapping) and "reward_model" in scorer:
            yield scorer["reward_model"]
    for check in recipe.get("checks", {}).values():
        if isinstance(check, Mapping) and "model" in check:
            yield check["model"]


def _values(words: Sequence[str], names: Iterable[str]) -> Iterator[str]:
    """Yield the values of options by the names, in the order of the names."""
    spelled = [
        word.partition("=")[0].removeprefix("--").replace("-", "_") if word[:2] == "--" else "" for word in words
    ]
    for name in names:
        for place, option in enumerate(spelled):
            if option == name:
                yield words[place].partition("=")[2] or words[place + 1]


def _model_args(words: Sequence[str]) -> list[str]:
    if "--model_args" not in words:
        return []
    after = words[words.index("--model_args") + 1 :]
    end = next((place for place, word in enumerate(after) if word.startswith("--")), len(after))
    return [pair for word in after[:end] for pair in word.split(",")]


def is_hub(name: str) -> bool:
    """Return whether a name is that of a repository of the hub.

    Args:
        name: of a model or data set.
    """
    return bool(HUB_ID.match(name)) and not name.startswith((".", "tests/", "examples/"))


def brought(recipe: PaperRecipe, steps: Iterable[RecipeStep]) -> list[str]:
    """Return what the user has to bring: files, folders and models that no command makes, and that are not on the hub.

    Args:
        recipe: the paper.
        steps: its commands.

    Examples:
        >>> from contralto.recipes.papers import find
        >>> paper = find("vcd")
        >>> brought(paper, steps_of(paper.hub, paper.hub_files))
        ['DIR']
    """
    made = set(recipe.hub_files)
    found = []
    for step in steps:
        tasks = set(step.option("tasks").split(","))
        scripts = [name for name in step.words[1:2] if step.name == "python" and name not in (*recipe.files, *made)]
        for name in (*step.models, *step.data, *scripts):
            is_known = is_hub(name) or name.startswith(LOCAL) or ":" in name or name.partition("/")[0] in made
            if not is_known and name not in tasks:
                found.append(name)
        found += [word for word in step.words if PLACEHOLDER.fullmatch(word)]
        made.update(step.made)
    return list(dict.fromkeys(found))


def substituted(text: str, values: Mapping[str, str]) -> str:
    """Return a text with names that the user brings replaced by their places.

    Args:
        text: commands, or a file of a recipe.
        values: places by name.

    Examples:
        >>> substituted("--data-dir DIR --file a.jsonl", {"DIR": "/data", "a.jsonl": "b.jsonl"})
        '--data-dir /data --file b.jsonl'
    """
    for name, place in values.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", lambda _, place=place: place, text)  # type: ignore[misc]
    return text
