"""The settings of an amateur that is made of its expert, checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contralto.align.amateur.choice import CHOICES, check_keep
from contralto.common.options import Option, OptionError

__all__ = ["AmateurConfig", "check_making", "fast_bfloat16"]


def fast_bfloat16() -> bool:
    """Return whether the machine multiplies bfloat16 matrices in hardware: an accelerator, or a CPU with AMX."""
    import torch

    return torch.accelerator.is_available() or bool(torch.cpu._is_amx_tile_supported())


def check_making(config: Any, least: Mapping[str, float]) -> None:
    """Check the settings that models which are made in stages share, and choose the dtype where none is given.

    Args:
        config: a frozen dataclass with `learning_rate`, `epochs`, `temperature`, `held_out` and `bf16`.
        least: the least value of further settings, by name.

    Raises:
        OptionError: a setting is out of its range.
    """
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise OptionError(
                "{name} must be at least {bound}, not {value}",
                name=Option(name),
                bound=bound,
                value=getattr(config, name),
            )
    for name in ("learning_rate", "epochs", "temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise OptionError(
                "{name} must be a finite number above 0, not {value}", name=Option(name), value=getattr(config, name)
            )
    if not 0 < config.held_out < 1:
        raise OptionError("{name} must lie in (0, 1), not {value}", name=Option("held_out"), value=config.held_out)
    if config.bf16 is None:
        object.__setattr__(config, "bf16", fast_bfloat16())


@dataclass(frozen=True, kw_only=True)
class AmateurConfig:
    """An amateur to be made.

    Args:
        model: the expert: a folder, a hub id, or `testbed:NAME`.
        output: the folder of the amateur.
        layers: number of layers that are kept; None if `keep` lists them.
        keep: how they are chosen: a name in `CHOICES`, or numbers such as 0,4,9.
        texts: number of texts that the expert writes; 0 leaves the amateur untrained.
        steps: number of training steps; None goes through the texts `epochs` times, 0 leaves the amateur untrained.
        epochs: number of times that training goes through the texts.
        batch_size: number of texts per training step.
        learning_rate: the highest rate. A model that lost layers has to be healed, at rates as in pretraining.
        max_new_tokens: largest number of tokens of a text.
        temperature: of the expert when it writes.
        prompts: a file, folder or hub id with prompts; None for openings of the expert's own.
        prompt_column: the column of the prompts.
        held_out: share of the texts on which the amateur is compared with the expert, and not trained.
        bf16: write and train in bfloat16, with float32 weights for the optimizer; None where the machine is fast at it.
        seed: of texts and training.

    Raises:
        OptionError: a value out of range, or options that exclude each other.

    Examples:
        >>> AmateurConfig(model="testbed:expert", output="out")
        Traceback (most recent call last):
            ...
        contralto.common.options.OptionError: layers is missing: give the number of layers to keep, or list them in keep
    """

    model: str
    output: str
    layers: int | None = None
    keep: str = "spread"
    texts: int = 2000
    steps: int | None = None
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 1e-3
    max_new_tokens: int = 192
    temperature: float = 0.8
    prompts: str | None = None
    prompt_column: str = "prompt"
    held_out: float = 0.05
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep in CHOICES and self.layers is None:
            raise OptionError(
                "{layers} is missing: give the number of layers to keep, or list them in {keep}",
                layers=Option("layers"),
                keep=Option("keep"),
            )
        least = {"texts": 0, "batch_size": 1, "max_new_tokens": 1} | ({"steps": 0} if self.steps is not None else {})
        check_making(self, least)

    @property
    def trains(self) -> bool:
        """Return whether the amateur is trained."""
        return self.texts > 0 and self.steps != 0

    @property
    def reads_texts(self) -> bool:
        """Return whether texts are needed before the layers are chosen."""
        return self.keep in CHOICES and CHOICES[self.keep].reads_texts

    @property
    def max_length(self) -> int:
        """Return the largest number of tokens of a text in training, prompt and question included."""
        return 2 * self.max_new_tokens + 64

    @property
    def work(self) -> Path:
        """Return the folder of everything that an interrupted run resumes from."""
        return Path(self.output) / "work"

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the amateur, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "output"}
