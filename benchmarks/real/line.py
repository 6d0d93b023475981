"""Define a line of the card of real models, and the context in which it runs.

A line is a module in `lines/` that defines `LINE`:

    LINE = Line(
        name="hellaswag",
        title="HellaSwag",
        question="Does contrastive decoding choose better endings?",
        order=10,
        needs=("model",),
        full={"rows": 2000},
        small={"rows": 4},
        revision=1,
        run=run,
        render=render,
    )

`run(context)` computes units, which `context.units()` keeps on disk; `render(context)` makes the section from them, and returns None
while nothing is there.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from pathlib import Path
from platform import machine
from typing import Any, NamedTuple

import torch

from contralto.common.hashing import weights_digest
from contralto.common.hub import from_pretrained
from contralto.common.versions import versions
from real import lines as line_modules
from real.units import Units

__all__ = ["ROLES", "Context", "Figure", "Line", "Section", "lines"]

ROLES: dict[str, str] = {
    "model": "the model that is measured",
    "amateur": "a trained amateur of its tokenizer",
    "pruned": "an untrained amateur: the model with layers left out",
    "judge": "the model that judges coherence",
    "embedder": "the sentence embedder of MAUVE's features",
}
"""The models of the card, each an option of the command."""
PACKAGES = ("contralto", "torch", "transformers", "trl", "peft", "lm_eval", "mauve-text", "python")


class Figure(NamedTuple):
    """A measured value with its interval, by which another run can be compared with the card."""

    value: float
    low: float
    high: float


class Section(NamedTuple):
    """The section of a line in the card."""

    lines: list[str]
    """Markdown."""
    figures: Mapping[str, Figure] = {}
    """The values that another run can be compared with, by name."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the card.

    Args:
        name: What the command calls it; also its folder of results.
        title: The heading of its section.
        question: One or two sentences, printed below the heading.
        order: The place of its section in the card.
        needs: The roles of `ROLES` without which it cannot run.
        full: The sizes of the published figures, by name.
        small: The sizes of a trial run of a few seconds, same names.
        revision: To be raised when the line computes something else, so that older results are not found.
        run: Computes all units.
        render: Makes the section from the units that are there; None if there are too few.
        flags: The options besides those of `needs` that its command takes, for the printed command.

    Raises:
        ValueError: A role is unknown, or the sizes differ in their names.
    """

    name: str
    title: str
    question: str
    order: int
    needs: tuple[str, ...]
    full: Mapping[str, Any]
    small: Mapping[str, Any]
    revision: int
    run: Callable[["Context"], None]
    render: Callable[["Context"], Section | None]
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [role for role in self.needs if role not in ROLES]:
            raise ValueError(f"line {self.name!r} needs {unknown[0]!r}, and there are only {', '.join(ROLES)}")
        if set(self.full) != set(self.small):
            raise ValueError(f"line {self.name!r} must name the same sizes in full and in small")


@dataclass
class Context:
    """The models, files and sizes with which a line runs.

    Args:
        line: The line.
        models: Names or folders of models by role; roles that are not given are left out.
        data: The folder of public evaluation files; None if it is not given.
        folder: The folder of results of all lines.
        is_small: Whether to take the line's small sizes.
    """

    line: Line
    models: Mapping[str, str]
    data: Path | None
    folder: Path
    is_small: bool
    _units: dict[str, Units] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """Return the sizes of the run."""
        return self.line.small if self.is_small else self.line.full

    @property
    def scratch(self) -> Path:
        """Return the line's own folder, which holds its units and anything else that it keeps."""
        return self.folder / self.line.name

    def units(self, name: str = "units") -> Units:
        """Return the results of the line.

        Args:
            name: The name of the file, for lines that keep several.
        """
        if name not in self._units:
            self._units[name] = Units(self.scratch / f"{name}.jsonl", self.describe_run())
        return self._units[name]

    def key(self, *roles: str, **settings: Any) -> dict[str, Any]:
        """Return the key of a unit: the revision of the line, the digests of the models, and the settings.

        Args:
            roles: The roles of the models that determine the result.
            settings: Everything else that does.
        """
        return {"revision": self.line.revision, **{role: self.digest(role) for role in roles}, **settings}

    def has(self, role: str) -> bool:
        """Return True if a model is given for a role.

        Args:
            role: The role.
        """
        return role in self.models

    def path(self, role: str) -> str:
        """Return the name or folder of a model.

        Args:
            role: The role.

        Raises:
            ValueError: No model is given for it.
        """
        if role not in self.models:
            raise ValueError(f"line {self.line.name!r} needs {ROLES[role]}: set --{role} to a folder or a hub id")
        return self.models[role]

    def digest(self, role: str) -> str:
        """Return 12 hexadecimal digits of the digest of a model's files.

        Args:
            role: The role.
        """
        return weights_digest(self.path(role))[:12]

    def model(self, role: str = "model") -> Any:
        """Return a model in float32, loaded once.

        Args:
            role: The role.
        """
        return _model(self.path(role))

    def tokenizer(self, role: str = "model") -> Any:
        """Return the tokenizer of a model, padding on the left, loaded once.

        Args:
            role: The role.
        """
        return _tokenizer(self.path(role))

    def file(self, *parts: str) -> Path:
        """Return a file of the data folder.

        Args:
            parts: Its path in the folder.

        Raises:
            ValueError: No data folder is given, or the file is missing.
        """
        if self.data is None:
            raise ValueError(f"line {self.line.name!r} reads {'/'.join(parts)}: set --data to the folder that holds it")
        path = self.data.joinpath(*parts)
        if not path.is_file():
            raise ValueError(f"line {self.line.name!r} reads {path}, which does not exist")
        return path

    def describe_run(self) -> dict[str, Any]:
        """Return versions, machine and date of this run."""
        known = versions("mauve-text")
        named = {name: known[name] for name in PACKAGES if name in known}
        machine_line = f"{machine()} CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        return named | {"machine": machine_line, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


@cache
def _model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32).eval()


@cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lines() -> dict[str, Line]:
    """Return the lines of all modules in `lines/`, by name, in the order of their sections.

    Raises:
        ValueError: Two modules define lines of the same name.
    """
    found: dict[str, Line] = {}
    for module in pkgutil.iter_modules(line_modules.__path__):
        line = getattr(import_module(f"{line_modules.__name__}.{module.name}"), "LINE", None)
        if line is None:  # helpers of a line
            continue
        if line.name in found:
            raise ValueError(f"two modules define a line {line.name!r}")
        found[line.name] = line
    return dict(sorted(found.items(), key=lambda item: item[1].order))
