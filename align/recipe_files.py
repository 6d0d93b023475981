"""The recipes of `contralto align`: YAML files of options, those that come with contralto and a user's own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contralto.align.trainers import TRAINERS
from contralto.common.suggestions import did_you_mean

__all__ = ["find_recipe", "read_recipe", "recipe_options", "recipes"]

OF_ADAPTERS = ("use_peft", "lora_", "use_rslora", "use_dora")
"""The beginnings of names of options that describe an adapter, which a script passes as `peft_config`."""


def recipes() -> dict[str, Path]:
    """Return the recipes that come with contralto, by name.

    Examples:
        >>> "apo_zero" in recipes()
        True
    """
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: the name of one that comes with contralto, or a YAML file.

    Raises:
        ValueError: there is neither.
    """
    path = recipes().get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"there is no recipe {name}{did_you_mean(name, recipes())}: give a YAML file, or one of {', '.join(recipes())}"
        )
    return path


def read_recipe(path: str) -> dict[str, Any]:
    """Return the options in a recipe.

    Args:
        path: a YAML file.

    Raises:
        ValueError: the file holds no mapping.
    """
    from contralto.common.yaml_file import read_yaml

    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        text = f"{path} contains no options: a recipe is a YAML mapping such as `learning_rate: 1.0e-6`"
        raise ValueError(text)  # noqa: TRY004 (a wrong recipe is a ValueError like any other mistake in it)
    return recipe


def recipe_options(name: str, *, kinds: Iterable[str], known: Iterable[str], use_peft: bool) -> dict[str, Any]:
    """Return the options of a recipe for the configuration of a trainer.

    Args:
        name: see `find_recipe`.
        kinds: the names of the configuration's class and of its base classes.
        known: the options of the configuration.
        use_peft: an adapter is trained: `learning_rate` is the recipe's `lora_learning_rate` if it has one.

    Raises:
        ValueError: there is no such recipe, it is for another trainer, or it has options that the configuration does not have; those
            of an adapter are left out.
    """
    recipe, kinds, known = read_recipe(str(find_recipe(name))), list(kinds), set(known)
    trainer = recipe.pop("trainer", "preference")
    wanted = TRAINERS.get(trainer, ("", f":{trainer}"))[1].partition(":")[2]
    if wanted not in kinds:
        raise ValueError(f"the recipe {name} is for {wanted}, not for {kinds[0]}")
    rate = recipe.pop("lora_learning_rate", None)
    if use_peft and rate is not None:
        recipe["learning_rate"] = rate
    recipe = {option: value for option, value in recipe.items() if not option.startswith(OF_ADAPTERS)}
    if strange := [option for option in recipe if option not in known]:
        raise ValueError(
            f"the recipe {name} sets {strange[0]}, which is no option of {kinds[0]}: train with contralto align {name}, or "
            "take another recipe"
        )
    return recipe
