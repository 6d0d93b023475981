"""Tables of the documentation that are derived from declarations, signatures and docstrings.

python docs/generators/tables.py     write them anew into the pages

A page has a table between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages with tables."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if PLACE.search(path.read_text(encoding="utf-8"))]


def filled(text: str) -> str:
    """Return the text of a page with its tables.

    Args:
        text: the text with tables of any age.
    """
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        head: its column names.
        rows: its cells.
    """
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


# ------------------------------------------------------------------------------------------------- signatures and docstrings


def descriptions(thing: Any) -> dict[str, str]:
    """Return the descriptions of the parameters in a docstring, by name."""
    import griffe

    docstring = griffe.Docstring(inspect.getdoc(thing) or "", lineno=1)
    sections = docstring.parse("google", warnings=False)
    return {
        each.name: " ".join(each.description.split())
        for section in sections
        if section.kind.value == "parameters"
        for each in section.value
    }


def parameters(thing: Any, *, skip: int = 0) -> list[tuple[str, str, str]]:
    """Return name, default and description of each parameter of a function or class.

    Args:
        thing: the function or class.
        skip: the number of first parameters to leave out.
    """
    texts = descriptions(thing)
    given = [each for each in inspect.signature(thing).parameters.values() if each.kind is not each.VAR_KEYWORD][skip:]
    return [(f"`{each.name}`", _default(each.default), _cell(texts.get(each.name, ""))) for each in given]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return "required"
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "`{}`"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else _text(value)}`"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, frozenset)):
        return "[" + ", ".join(str(each) for each in value) + "]"
    return str(value) if str(value) else '""'


def _cell(text: str) -> str:
    text = text.rstrip(".")
    return text


def first_line(thing: Any) -> str:
    """Return the first line of a docstring, without its full stop."""
    return (inspect.getdoc(thing) or "").split("\n")[0].rstrip(".")


def sections(entries: Mapping[str, Any], *, skip: int) -> str:
    """Return for each entry of a registry a heading, its first line, and the table of its settings.

    Args:
        entries: functions and classes by name.
        skip: the number of first parameters that are no settings.
    """
    lines: list[str] = []
    for name, entry in entries.items():
        lines += [f"### {name}", "", f"{first_line(entry)}.", ""]
        if rows := parameters(entry, skip=skip):
            lines += [table(("setting", "default", "description"), rows), ""]
    return "\n".join(lines).rstrip()


# -------------------------------------------------------------------------------------------------------------- data recipes


def recipe_keys() -> str:
    """Return the keys of a recipe."""
    from contralto.data_gen.recipe import KEYS, OPTIONAL_KEYS

    rows = [(f"`{name}`", "required", text) for name, text in KEYS.items()]
    return table(("key", "", "description"), rows + [(f"`{name}`", "", text) for name, text in OPTIONAL_KEYS.items()])


def row_options() -> str:
    """Return the options of `rows`."""
    from contralto.data_gen.rows import RowSource

    return table(("option of `rows`", "default", "description"), parameters(RowSource))


def sampling_options() -> str:
    """Return the sampling options of a role, and its price."""
    from contralto.data_gen.recipe import Price
    from contralto.data_gen.types import Sampling

    price = [
        (f"`price: {{{name[1:-1]}}}`", default, f"per million tokens: {text}")
        for name, default, text in parameters(Price)
    ]
    return table(("option of a role", "default", "description"), [*parameters(Sampling), *price])


def engines() -> str:
    """Return the engines with their options."""
    from contralto.data_gen.engines import ENGINES

    return sections(_own(ENGINES), skip=0)


def strategies() -> str:
    """Return the strategies with their settings."""
    from contralto.data_gen.strategies import STRATEGIES

    return sections(_own(STRATEGIES), skip=1)


def replies() -> str:
    """Return the requests to roles, and the replies that strategies read."""
    from contralto.data_gen.strategies.replies import REPLIES

    head = ("role", "last message of the request", "reply")
    return table(head, [(", ".join(f"`{role}`" for role in each.roles), each.request, each.reply) for each in REPLIES])


def checks() -> str:
    """Return the checks with their settings."""
    from contralto.data_gen.checks import CHECKS

    return sections(_own(CHECKS), skip=1)


def _own(registry: Any) -> dict[str, Any]:
    """Return the entries of a registry that contralto itself defines."""
    entries = {name: registry.get(name) for name in registry.names()}
    return {name: entry for name, entry in entries.items() if entry.__module__.startswith("contralto.")}


# ------------------------------------------------------------------------------------------------------------------ training


def training_recipes() -> str:
    """Return the recipes of `contralto align` with their learning rates."""
    from contralto.align.parsing import read_recipe, recipes

    rows = []
    for name, path in recipes().items():
        recipe = read_recipe(str(path))
        size, accumulation = recipe.get("per_device_train_batch_size", 8), recipe.get("gradient_accumulation_steps", 1)
        losses = recipe.get("loss_type", "")
        rest = {key: value for key, value in recipe.items() if key not in SHOWN}
        rows.append(
            (
                f"`{name}`",
                recipe.get("trainer", "preference"),
                ", ".join(losses) if isinstance(losses, list) else str(losses),
                f"{recipe['learning_rate']:g}" if "learning_rate" in recipe else "",
                f"{recipe['lora_learning_rate']:g}" if "lora_learning_rate" in recipe else "",
                f"{size} x {accumulation} = {size * accumulation}",
                ", ".join(f"`{key}: {_text(value)}`" for key, value in rest.items()),
            )
        )
    head = (
        "recipe",
        "trainer",
        "loss",
        "rate, all weights",
        "rate, adapter",
        "per device x accumulation = pairs per step and process",
        "other options",
    )
    return table(head, rows)


SHOWN = (
    *("trainer", "loss_type", "learning_rate", "lora_learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type"),
)
"""Options of recipes that have a column, or are the same in nearly all."""


def recipe_sources() -> str:
    """Return the first comment of each recipe of `contralto align`: its paper, and where its values are from."""
    from contralto.align.parsing import recipes

    rows = []
    for name, path in recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [
            line.removeprefix("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[0] != "#")]
        ]
        rows.append((f"`{name}`", " ".join(comment)))
    return table(("recipe", "source of the values"), rows)


def training_options() -> str:
    """Return the options of `contralto align` that TRL does not have, by trainer, and those with another default."""
    from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments  # type: ignore[attr-defined]

    from contralto.align import DistillationConfig, MarginRewardConfig, PreferenceConfig, UnpairedConfig
    from contralto.align.arguments import DataArguments, ModelArguments

    groups = {
        "Data, trainer and rounds": (DataArguments, ScriptArguments),
        "Model": (ModelArguments, ModelConfig),
        "trainer: preference": (PreferenceConfig, DPOConfig),
        "trainer: distill": (DistillationConfig, DPOConfig),
        "trainer: reward": (MarginRewardConfig, RewardConfig),
        "trainer: unpaired": (UnpairedConfig, KTOConfig),
    }
    lines: list[str] = []
    for title, (kind, base) in groups.items():
        inherited = {each.name: _field_default(each) for each in dataclasses.fields(base)}
        new = [each for each in dataclasses.fields(kind) if each.name not in inherited]
        other = [
            each
            for each in dataclasses.fields(kind)
            if inherited.get(each.name, _field_default(each)) != _field_default(each)
        ]
        lines += [f"### {title}", ""]
        for each_title, fields in (("option", new), (f"option of {base.__name__} with another default", other)):
            if fields:
                cells = [(f"`{each.name}`", _default(_field_default(each)), _help(each)) for each in fields]
                lines += [table((each_title, "default", "description"), cells), ""]
    return "\n".join(lines).rstrip()


def _field_default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _help(field: Any) -> str:
    text = str(field.metadata.get("help", "")).replace("%%", "%").replace("\n", " ")
    choices = field.metadata.get("choices")
    return f"{text} One of {', '.join(map(str, choices))}." if choices else text


def audit_faults() -> str:
    """Return what the audit looks for in rows."""
    from contralto.align.monitoring.data_audit import FAULTS

    def level(fault: Any) -> str:
        return f"{fault.level}; an error in half of the rows" if fault.is_error_in_half else fault.level

    def text(fault: Any) -> str:
        return (
            fault.text.replace("{detail} with", "few completions end with")
            .replace("{detail} is", ": part of it is")
            .replace("{detail}", "marks")
        )

    return table(
        ("level", "observation", "what to do"), [(level(each), text(each), each.advice) for each in FAULTS.values()]
    )


def monitor_symptoms() -> str:
    """Return the warnings of the monitor."""
    from contralto.align.monitoring.symptoms import SYMPTOMS

    rows = [(f"`{kind}`", first_line(check).removeprefix("Describe ")) for kind, check in SYMPTOMS.items()]
    return table(("warning", "reason"), rows)


def commands() -> str:
    """Return the commands, each with the extra that installs what it needs."""
    from contralto.cli import COMMANDS

    return table(
        ("command", "purpose", "extra"),
        [(f"`contralto {each.name}`", each.purpose, f"`{each.extra}`") for each in COMMANDS.values()],
    )


def method_costs() -> str:
    """Return what each method of decoding costs and has gained."""
    if (folder := str(ROOT / "docs")) not in sys.path:
        sys.path.insert(0, folder)
    from generators import costs

    return costs.method_costs()


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipe-keys": recipe_keys,
    "row-options": row_options,
    "sampling-options": sampling_options,
    "engines": engines,
    "strategies": strategies,
    "replies": replies,
    "checks": checks,
    "training-recipes": training_recipes,
    "recipe-sources": recipe_sources,
    "training-options": training_options,
    "audit-faults": audit_faults,
    "monitor-symptoms": monitor_symptoms,
    "method-costs": method_costs,
}
"""The tables by the name in their place."""


def main() -> None:
    """Write the tables anew into their pages."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
