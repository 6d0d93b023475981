"""The configuration of on-policy rounds, parsed once from the command line of `contralto align`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from contralto.align.parsing import config_class, is_true, option_values, read_recipe

__all__ = ["Round", "RoundsConfig", "parse_rounds"]

OWN_OPTIONS = (
    *("data_recipe", "rounds", "policy_role", "fresh_prompts", "config", "dataset_name", "output_dir"),
    *("model_name_or_path", "adapter", "resume_from_checkpoint", "first_epoch", "all_epochs"),
)
"""Options about the rounds, or that the rounds set themselves: those of a round's training are all others."""
READ_OPTIONS = (*OWN_OPTIONS, "use_peft", "trainer", "loss_type", "num_train_epochs", "trust_remote_code")
POLICY_ROLES = ("student", "target")
"""The roles of a data recipe whose text the model writes by default, the first that there is."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: the content of `round.json`.

    Args:
        number: the number of the round, from 1.
        rounds: the number of rounds.
        data_recipe: a recipe of `contralto data`.
        role: the role of the recipe whose text the model writes.
        model: a folder, a hub id, or `testbed:NAME`.
        adapter: a LoRA adapter of the model.
        fresh_prompts: take the prompts whose ids' hashes fall on this round, instead of all.
        trust_remote_code: run code that comes with the model.
    """

    number: int
    rounds: int
    data_recipe: str
    role: str
    model: str
    adapter: str | None = None
    fresh_prompts: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """All rounds of a command.

    Args:
        output: the folder of the rounds.
        rounds: the number of rounds.
        data_recipe: a recipe of `contralto data`.
        role: the role of the recipe whose text the model writes.
        model: the model that the first round begins with.
        adapter: its adapter that the first round begins with.
        trains_adapter: a round trains an adapter, and not the model.
        fresh_prompts: each round takes other prompts.
        trust_remote_code: run code that comes with the model.
        epochs: the epochs of a round, if rounds are epochs of one curriculum.
        recipe: the recipe of the training, without `OWN_OPTIONS`.
        flags: the words of the command line for the training, without `OWN_OPTIONS`.
    """

    output: Path
    rounds: int
    data_recipe: str
    role: str
    model: str
    adapter: str | None
    trains_adapter: bool
    fresh_prompts: bool
    trust_remote_code: bool
    epochs: int | None
    recipe: Mapping[str, Any]
    flags: Sequence[str]

    def folder(self, number: int) -> Path:
        """Return the folder of a round.

        Args:
            number: the number of the round, from 1.
        """
        return self.output / f"round-{number}"

    def round(self, number: int) -> Round:
        """Return a round, which starts from the model trained in the previous round.

        Args:
            number: the number of the round, from 1.
        """
        model, adapter = self.model, self.adapter
        if number > 1 and self.trains_adapter:
            adapter = str(self.folder(number - 1) / "model")
        elif number > 1:
            model = str(self.folder(number - 1) / "model")
        return Round(
            number=number,
            rounds=self.rounds,
            data_recipe=self.data_recipe,
            role=self.role,
            model=model,
            adapter=adapter,
            fresh_prompts=self.fresh_prompts,
            trust_remote_code=self.trust_remote_code,
        )

    def training_recipe(self, number: int) -> str:
        """Return the recipe of a round's training in YAML.

        Args:
            number: the number of the round, from 1.
        """
        folder, one = self.folder(number), self.round(number)
        options = {**self.recipe, "model_name_or_path": one.model, "dataset_name": str(folder / "pairs" / "dataset")}
        options |= {"output_dir": str(folder / "model"), "resume_from_checkpoint": "last"}
        options |= {} if one.adapter is None else {"adapter": one.adapter}
        if self.epochs is not None:
            options |= {"first_epoch": (number - 1) * self.epochs + 1, "all_epochs": self.rounds * self.epochs}
        return yaml.safe_dump(options, sort_keys=False)

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be the same in all rounds: the content of `settings.json`."""
        settings = {
            "recipe": dict(self.recipe),
            "flags": list(self.flags),
            "data_recipe": self.data_recipe,
            "policy_role": self.role,
            "model_name_or_path": self.model,
            "adapter": self.adapter,
            "fresh_prompts": self.fresh_prompts,
        }
        # elsewhere rounds can be added later
        fixed = self.fresh_prompts or self.epochs is not None
        return settings | ({"rounds": self.rounds} if fixed else {})


def parse_rounds(argv: Sequence[str]) -> RoundsConfig:
    """Parse the options of on-policy rounds.

    Args:
        argv: words of the command line, with the recipe as `--config`.

    Raises:
        ValueError: an option is missing or wrong.
    """
    options = option_values(argv, READ_OPTIONS)
    if options["model_name_or_path"] is None:
        raise ValueError("no model: set --model_name_or_path to a folder, a hub id, or testbed:NAME")
    if options["output_dir"] is None:
        raise ValueError("no output folder: set --output_dir to the folder of the rounds")
    if options["dataset_name"] is not None:
        raise ValueError("dataset_name is given, and data_recipe, which makes the data: give one of them")
    recipe = {} if options["config"] is None else read_recipe(options["config"])
    return RoundsConfig(
        output=Path(options["output_dir"]),
        rounds=_number_of_rounds(options["rounds"]),
        data_recipe=options["data_recipe"],
        role=options["policy_role"] or _policy_role(options["data_recipe"]),
        model=options["model_name_or_path"],
        adapter=options["adapter"],
        trains_adapter=options["adapter"] is not None or is_true(options["use_peft"]),
        fresh_prompts=is_true(options["fresh_prompts"]),
        trust_remote_code=is_true(options["trust_remote_code"]),
        epochs=_curriculum_epochs(options),
        recipe={name: value for name, value in recipe.items() if name not in OWN_OPTIONS},
        flags=without_options(argv, OWN_OPTIONS),
    )


def _curriculum_epochs(options: Mapping[str, Any]) -> int | None:
    """Return the epochs of a round if the training has a curriculum."""
    from contralto.align.trainers.distillation_config import DISTILLATION_LOSSES, DistillationConfig

    if config_class(options["trainer"] or "preference") is not DistillationConfig:
        return None
    losses = options["loss_type"] or DistillationConfig.default_loss
    name = losses[0] if isinstance(losses, list) else losses
    if name not in DISTILLATION_LOSSES or not DISTILLATION_LOSSES[name].follows_curriculum:
        return None
    return int(float(options["num_train_epochs"] or DistillationConfig.num_train_epochs))


def _number_of_rounds(value: Any) -> int:
    if value is None:
        return 1
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, not {value}")
    return int(value)


def _policy_role(data_recipe: str) -> str:
    roles = read_recipe(data_recipe).get("roles") or {}
    role = next((name for name in POLICY_ROLES if name in roles), None)
    if role is None:
        raise ValueError(
            f"{data_recipe} has neither a role student nor a role target: say whose text the model writes (policy_role)"
        )
    return role


def without_options(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a command line without some options and their values.

    Args:
        argv: the words.
        names: the options, without dashes.

    Examples:
        >>> without_options(["--beta", "0.1", "--rounds", "2", "--output_dir=x", "--use_peft"], ["rounds", "output_dir"])
        ['--beta', '0.1', '--use_peft']
    """
    kept: list[str] = []
    belongs = False
    for word in argv:
        if word.startswith("--"):
            belongs = word[2:].split("=")[0] in names
        if not belongs:
            kept.append(word)
    return kept
