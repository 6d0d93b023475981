"""The recipes and the parser of `contralto align`: turn command-line arguments into configurations.

A recipe is a YAML file of options, or the name of one in `contralto/align/recipes`. Options on the command line win. `TrlParser` reads
the options themselves; what has to be known before (which trainer, which learning rate) is looked up here by `option_value`.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from contralto.align.recipe_files import find_recipe, read_recipe, recipes
from contralto.align.trainers import TRAINERS
from contralto.common.suggestions import closest, did_you_mean
from contralto.common.texts import secret_name

__all__ = [
    "config_class",
    "is_true",
    "launch_options",
    "make_parser",
    "option_value",
    "option_values",
    "parse",
    "print_recipe",
    "read_recipe",
    "recipes",
    "resolve_learning_rate",
    "resolve_recipe",
    "trainer_class",
    "trainer_name",
    "with_underscores",
]


SHORT = {
    "--model": "--model_name_or_path",
    "--teacher": "--teacher_model_name_or_path",
    "--dataset": "--dataset_name",
    "--output": "--output_dir",
}
"""Spellings of other commands of contralto that are accepted."""
MEANT = {
    "--lr": "--learning_rate",
    "--epochs": "--num_train_epochs",
    "--batch_size": "--per_device_train_batch_size",
    "--lora": "--use_peft",
    "--lora_rank": "--lora_r",
    "--data": "--dataset_name",
}
"""Spellings of other tools that are suggested, where the most similar option is another one."""


def parse(argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """Parse options, and return separately the arguments that are not options of `contralto align`.

    Args:
        argv: words of the command line, with the recipe as `--config`.

    Returns:
        The data, training, model and mixture arguments; the unknown words of the recipe; and those of the command line.
    """
    *parsed, of_recipe, of_command = make_parser(trainer_name(argv)).parse_args_and_config(
        list(argv), return_remaining_strings=True, separate_remaining_strings=True
    )
    return tuple(parsed), of_recipe, of_command


def make_parser(trainer: str = "preference") -> Any:
    """Return the `trl.TrlParser` of a trainer.

    Args:
        trainer: a key of `TRAINERS`.

    Raises:
        ImportError: TRL is not installed.
    """
    try:
        from trl import DatasetMixtureConfig, TrlParser  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError("contralto align trains with TRL: pip install 'contralto[align]'") from error
    from contralto.align.arguments import DataArguments, ModelArguments

    kinds: Any = (DataArguments, config_class(trainer), ModelArguments, DatasetMixtureConfig)
    return TrlParser(
        kinds,
        prog="contralto align",
        usage="contralto align [RECIPE] [options]",
        epilog=f"Recipes: {', '.join(recipes())}.",
        allow_abbrev=False,  # `option_value` reads whole names
    )


def launch_options(of_recipe: list[str], of_command: list[str], names: Iterable[str] = ()) -> list[str]:
    """Return the arguments that are not options of `contralto align` as options of `accelerate launch`.

    Args:
        of_recipe: unknown options of the recipe.
        of_command: unknown words of the command line.
        names: the options of `contralto align`, for a suggestion.

    Raises:
        ValueError: one of them is no option of `accelerate launch` either, or asks for several processes on a CPU.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    words: list[str] = resolve_accelerate_config_argument(of_recipe + of_command)
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    unknown = next((word for word in words if word.startswith("--") and word.split("=")[0] not in known), None)
    if unknown is not None:
        name = unknown.split("=")[0]
        meant = MEANT.get(name) or closest(name, [*names, *known])
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ValueError(f"{unknown} is no flag of contralto align or of accelerate launch{hint}; --help lists them")
    if words:
        _check_processes(launch_command_parser().parse_args([*words, "script"]))
    return words


def _check_processes(args: argparse.Namespace) -> None:
    """Raise ValueError for several processes where accelerate would start one: it has no launcher for CPUs."""
    import torch

    own = (args.multi_gpu, args.tpu, args.use_deepspeed, args.use_fsdp, args.use_megatron_lm, args.mpirun_hostfile)
    on_cpu = args.cpu or not torch.accelerator.is_available()
    if on_cpu and not any(own) and (args.num_processes or 1) > 1:
        raise ValueError(
            f"accelerate launch starts one process on a CPU, not {args.num_processes}: leave --num_processes out, or write "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {args.num_processes} -m contralto.align in place of contralto align"
        )


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Return a command line whose options are spelled as TRL and accelerate declare them, with underscores and not by `SHORT`.

    Args:
        argv: words of the command line.

    Examples:
        >>> with_underscores(["dpo", "--model", "my-model", "--output=a-b"])
        ['dpo', '--model_name_or_path', 'my-model', '--output_dir=a-b']
        >>> with_underscores(["apo_zero", "--use-peft", "--output-dir=a-b", "--beta", "-1"])
        ['apo_zero', '--use_peft', '--output_dir=a-b', '--beta', '-1']
    """
    made = []
    for word in argv:
        name, equals, value = word.partition("=")
        option = "--" + name[2:].replace("-", "_")
        made.append(SHORT.get(option, option) + equals + value if word.startswith("--") else word)
    return made


def config_class(name: str) -> Any:
    """Return the class of a trainer's configuration.

    Args:
        name: a key of `TRAINERS`.

    Raises:
        ValueError: there is no such trainer.
    """
    return _imported(TRAINERS[_checked_trainer(name)][1])


def trainer_class(name: str) -> Any:
    """Return the class of a trainer.

    Args:
        name: a key of `TRAINERS`.
    """
    return _imported(TRAINERS[name][0])


def trainer_name(argv: Sequence[str]) -> str:
    """Return the value of the option `trainer`.

    Args:
        argv: words of the command line, with the recipe as `--config`.

    Raises:
        ValueError: the value is not a key of `TRAINERS`.

    Examples:
        >>> trainer_name(["--beta", "0.1"]), trainer_name(["--trainer=distill"])
        ('preference', 'distill')
    """
    name: str | None = option_value(argv, "trainer")
    return _checked_trainer(name or "preference")


def _checked_trainer(name: str) -> str:
    if name not in TRAINERS:
        raise ValueError(f"there is no trainer {name!r}{did_you_mean(name, TRAINERS)}; there are {', '.join(TRAINERS)}")
    return name


def option_value(argv: Sequence[str], name: str) -> Any:
    """Return the value of an option on the command line, or else in the recipe, or else None.

    Args:
        argv: words of the command line, with the recipe as `--config`.
        name: the name of the option, without dashes.

    Examples:
        >>> option_value(["--beta=0.1", "--use_peft"], "beta"), option_value(["--beta=0.1", "--use_peft"], "use_peft")
        ('0.1', 'true')
    """
    return option_values(argv, [name])[name]


def option_values(argv: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """Return the values of options on the command line, or else in the recipe, or else None, by name.

    Args:
        argv: words of the command line, with the recipe as `--config`.
        names: the names of the options, without dashes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in {*names, "config"}:
        parser.add_argument(f"--{name}", nargs="?", const="true")
    values = vars(parser.parse_known_args(list(argv))[0])
    missing = [name for name in names if values[name] is None]
    recipe = read_recipe(values["config"]) if missing and values["config"] is not None else {}
    return values | {name: recipe.get(name) for name in missing}


def is_true(value: Any) -> bool:
    """Return whether the value of an option is true, as `TrlParser` reads it.

    Args:
        value: a word of the command line, a value of YAML, or None.

    Examples:
        >>> is_true("True"), is_true(True), is_true("no"), is_true(None)
        (True, True, False, False)
    """
    return str(value).lower() in ("true", "1", "yes", "y", "t")


def resolve_recipe(argv: Sequence[str]) -> list[str]:
    """Replace a leading recipe by `--config` and its file; without arguments, return `--help`.

    Args:
        argv: words of the command line.

    Raises:
        ValueError: there are two recipes, or the recipe does not exist.
    """
    if not argv:
        return ["--help"]
    first, *others = argv
    if first.startswith("-"):
        return list(argv)
    if "--config" in argv:
        raise ValueError(f"there are two recipes, {first} and that of --config: give one")
    return ["--config", str(find_recipe(first)), *others]


def resolve_learning_rate(argv: Sequence[str]) -> list[str]:
    """Append the recipe's learning rate for adapters if an adapter is trained and the command line sets none.

    Without a rate on the command line, the rate and its origin are printed.

    Args:
        argv: words of the command line, with the recipe as `--config`.

    Raises:
        ValueError: the command line gives a rate for adapters, and no adapter is trained.
    """
    without_recipe = _without_config(argv)
    rate = option_value(argv, "lora_learning_rate")
    trains_adapter = is_true(option_value(argv, "use_peft")) or option_value(argv, "adapter") is not None
    if option_value(without_recipe, "lora_learning_rate") is not None and not trains_adapter:
        raise ValueError(
            "lora_learning_rate is for an adapter: give use_peft or adapter as well, or learning_rate instead"
        )
    if option_value(without_recipe, "learning_rate") is not None:
        return list(argv)
    if rate is not None and trains_adapter:
        _print_rate(rate, "the recipe's for adapters")
        return [*argv, "--learning_rate", str(rate)]
    if (own := option_value(argv, "learning_rate")) is not None:
        _print_rate(own, "the recipe's" if trains_adapter else "the recipe's for all weights")
    else:
        config = config_class(trainer_name(argv))
        _print_rate(config.__dataclass_fields__["learning_rate"].default, f"the default of {config.__name__}")
    return list(argv)


def print_recipe(argv: Sequence[str]) -> None:
    """Print the options that the recipe sets and the command line does not, but for learning rates.

    `resolve_learning_rate` prints the learning rate.

    Args:
        argv: words of the command line, with the recipe as `--config`.

    Examples:
        >>> print_recipe(resolve_recipe(["dpo", "--beta", "0.2", "--gradient_accumulation_steps=1"]))
        recipe dpo: loss_type sigmoid, optim rmsprop, lr_scheduler_type constant_with_warmup, warmup_steps 150, per_device_train_batch_size 4
    """
    path = option_value(argv, "config")
    if path is None or os.environ.get("RANK", "0") != "0":
        return
    recipe = read_recipe(path)
    given = option_values(_without_config(argv), recipe)
    hidden = {"trainer", "learning_rate", "lora_learning_rate", "hub_token"}
    values = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in recipe.items()
        if name not in hidden and given[name] is None and secret_name({name: value}) is None
    }
    if values:
        print(f"recipe {Path(path).stem}: {', '.join(f'{name} {value}' for name, value in values.items())}")


def _print_rate(rate: Any, origin: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"learning_rate {float(rate):g}: {origin}; --learning_rate gives another")


def _without_config(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    return parser.parse_known_args(list(argv))[1]


def _imported(path: str) -> Any:
    """Import the object of a `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
