"""The options of a training: those of a recipe, and those that were set, in contrast to defaults and derived values."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Self

from accelerate.utils import is_peft_model
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from contralto.align.recipe_files import recipe_options

__all__ = [
    "RecipeOptions",
    "adapter_settings",
    "changed_settings",
    "freeze_settings",
    "option_values",
    "records_settings",
]

GIVEN, DERIVED = "_given_settings", "_derived_settings"
"""Attributes of a configuration: names of options that were set, and the values of the others after `__post_init__`."""


def records_settings(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap the `__post_init__` of a configuration, so that it records which options were set.

    transformers and TRL replace many values there: None by a value, a string by an enumeration, a dictionary by an object. Afterwards
    such options look like options that were set.

    Args:
        post_init: the method. Those of base classes may be wrapped as well.
    """

    @wraps(post_init)
    def recorded(args: Any) -> None:
        """Run the `__post_init__`, and record which options were set before it."""
        if GIVEN in vars(args):  # the outermost class records
            post_init(args)
            return
        defaults = {each.name: _default(each) for each in dataclasses.fields(args)}
        given = {name for name, default in defaults.items() if _differs(getattr(args, name), default)}
        setattr(args, GIVEN, frozenset(given))
        post_init(args)
        values = option_values(args)
        given = {name for name in given if _differs(values.get(name), defaults[name])}  # a parser reads "no" as False
        setattr(args, GIVEN, frozenset(given))
        setattr(args, DERIVED, {name: value for name, value in values.items() if name not in given})

    return recorded


def freeze_settings(args: Any) -> None:
    """Count options that were assigned after construction as set, and those that are assigned from now on as derived.

    A trainer calls this before TRL writes into the configuration.

    Args:
        args: a configuration whose `__post_init__` is wrapped by `records_settings`.
    """
    if GIVEN in vars(args):
        setattr(args, GIVEN, frozenset(_set_names(args)))
        setattr(args, DERIVED, {})


def changed_settings(args: Any) -> dict[str, Any]:
    """Return the options that were set to another value than their default, with their values.

    Args:
        args: a configuration. Without a record, as for `trl.DPOConfig`, options count that differ from the defaults of the class.
    """
    names = _set_names(args)
    return {name: value for name, value in option_values(args).items() if name in names}


def option_values(args: Any) -> dict[str, Any]:
    """Return all options as values that JSON holds; the hub's token is hidden, other tokens, such as `pad_token`, are not.

    Args:
        args: a configuration. Its `to_dict` hides every option whose name ends with `_token`.
    """
    values: dict[str, Any] = args.to_dict()
    shown = {name: getattr(args, name) for name in ("pad_token", "eos_token") if name in values}
    return values | shown


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return rank, alpha, dropout and modules of a model's LoRA adapter by the names of their options; empty without one.

    Args:
        model: a model without wrappers of accelerate.
    """
    config = next(iter(model.peft_config.values())) if is_peft_model(model) else None
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    values = {
        label: getattr(config, name, None) for name, label in {**names, "target_modules": "target_modules"}.items()
    }
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None}


def _set_names(args: Any) -> set[str]:
    values = option_values(args)
    if GIVEN not in vars(args):
        return {each.name for each in dataclasses.fields(args) if _differs(values.get(each.name), _default(each))}
    derived = getattr(args, DERIVED)
    return {*getattr(args, GIVEN), *(name for name, value in derived.items() if values[name] != value)}


def _differs(value: Any, default: Any) -> bool:
    """Return whether a value is not the default, also where a parser made a string of it."""
    return bool(value != default) and str(value) != str(default)


def _default(option: Any) -> Any:
    """Return the declared default of a field of a dataclass."""
    factory = option.default_factory
    return factory() if option.default is dataclasses.MISSING and callable(factory) else option.default


class _HubToken(str):
    """A token of the Hub that is pickled as `<HUB_TOKEN>`, the word by which `to_dict` shows it.

    transformers writes the configuration beside every checkpoint and model (`training_args.bin`), and uploads it with them.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("<HUB_TOKEN>",)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class RecipeOptions:
    """Add `from_recipe` to a configuration, keep its `hub_token` out of files, and check its arguments of `from_pretrained`.

    Raises:
        ValueError: `model_init_kwargs`, or that of a teacher, asks for `use_kernels`, and there is no package to fetch kernels.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        hidden = name == "hub_token" and isinstance(value, str)
        super().__setattr__(name, _HubToken(value) if hidden else value)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the configuration of TRL or transformers
        given = {name: value for name, value in vars(self).items() if name.endswith("model_init_kwargs")}
        for name, value in given.items():
            if isinstance(value, Mapping) and value.get("use_kernels") and not is_kernels_available():
                raise ValueError(
                    f"{name} sets use_kernels, and the package that fetches kernels is missing or of another version: "
                    f"pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}', or leave use_kernels out"
                )

    @classmethod
    def from_recipe(cls, recipe: str, output_dir: str, *, use_peft: bool, **options: Any) -> Self:
        """Return the configuration with the options of a recipe of `contralto align`.

        The learning rate depends on what is trained: an adapter needs ten to a hundred times the rate of a whole model.

        Args:
            recipe: the name of a recipe that comes with contralto, such as `dpo`, or a YAML file.
            output_dir: the folder for the model.
            use_peft: whether the trainer gets a `peft_config`. The adapter itself is described there; options of the recipe such as
                `lora_r` are not used.
            options: options that win over the recipe's.

        Raises:
            ValueError: there is no such recipe, it is for another trainer or for rounds, or an option is invalid.

        Examples:
            >>> from contralto.align import PreferenceConfig
            >>> args = PreferenceConfig.from_recipe("dpo", "out", use_peft=True, max_steps=8, report_to="none")
            >>> args.learning_rate, args.max_steps
            (5e-05, 8)
        """
        kinds = [each.__name__ for each in cls.__mro__]
        known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]  # subclasses are dataclasses
        values = recipe_options(recipe, kinds=kinds, known=known, use_peft=use_peft)
        return cls(**{"output_dir": output_dir} | values | options)
