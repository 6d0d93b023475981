"""Recipes: YAML files that name rows, strategies, the engines of roles, checks and filters.

    output: out/clair                      # a folder beside the recipe
    seed: 0
    rows:
      source: prompts.jsonl                # .jsonl .json .csv .parquet .txt, a data set's folder or hub id, or module:function
      prompt: instruction                  # the column with the prompt (default: prompt)
    strategies:
      - clair                              # with its defaults
      - {use: best_of_n, n: 8, scorer: my_scorer:reward}
      - {use: my_strategy:worsened}        # a function in my_strategy.py beside the recipe
    roles:
      target: {engine: transformers, model: my-model, temperature: 1.0, max_new_tokens: 512}
      reviser: {engine: openai, base_url: "https://...", model: ..., price: {input: 2.5, output: 10}}
    checks: {...}                          # see `checks`
    filters: {...}
    ray: {concurrency: 8, num_gpus: 1}     # the workers of contralto data run --runner ray
    license: cc-by-4.0                     # of the data set, for its card: an identifier of the hub
    language: en                           # a code, or a list of codes
    date: 2026-11-29                       # when it was made

Files that strategies and checks name (templates, test sets) are relative to the recipe's folder. Images that rows name must lie below
the recipe's folder, or below the folder that `rows: {image_folder: ...}` names. Everything is read and checked
before the first request; every mistake is one sentence that names its place, and all mistakes are reported together.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from contralto.common.errors import Mistakes, raise_mistakes
from contralto.common.files import read_text
from contralto.common.suggestions import did_you_mean
from contralto.common.texts import has_lone_surrogate, secret_name
from contralto.common.yaml_file import parse_yaml
from contralto.data_gen.engines.base import Engine
from contralto.data_gen.engines.registry import ENGINES
from contralto.data_gen.functions import find_function, search_folder
from contralto.data_gen.publication import ABOUT, read_publication
from contralto.data_gen.ranges import check_number, check_texts
from contralto.data_gen.ray_settings import read_ray_settings
from contralto.data_gen.rows import RowSource
from contralto.data_gen.settings import check_call
from contralto.data_gen.strategies.registry import STRATEGIES, StrategyFunction, check_strategy
from contralto.data_gen.types import Row, Sampling, Strategy

__all__ = ["Price", "Recipe", "Role", "Use", "load_recipe", "read_role"]

KEYS = {
    "rows": "the rows to make pairs of: a source, or a mapping with `source` and the options below",
    "strategies": "a list of strategies: names, or mappings with `use`, settings, and `name` where one is used twice",
    "roles": "the engines that generate text, by the names that strategies give to roles",
}
"""The keys that every recipe has, with their descriptions."""
OPTIONAL_KEYS = {
    "output": "the folder of the data set and its answers, beside the recipe (default: the name of the recipe)",
    "seed": "added to the seed of every request (default: 0)",
    "checks": "checks by name, each with its settings; they write columns",
    "filters": "conditions by column; pairs that fail one are dropped",
    "ray": "the workers of `run --runner ray`: concurrency (default: 2), num_cpus (1) and num_gpus (0) of each",
    **ABOUT,
}
"""The keys that a recipe may have, with their descriptions."""
FILES = (".txt", ".json", ".jsonl", ".parquet")
"""Suffixes of settings that name a file."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """A price per million tokens.

    Args:
        input: of prompts.
        output: of completions.
        currency: the unit of money.

    Raises:
        ValueError: a price below 0.
    """

    input: float = 0.0
    output: float = 0.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            try:
                check_number(name, getattr(self, name), most=1e9)
            except ValueError as error:
                raise ValueError(
                    f"price {name} must be an amount of money per million tokens, not {getattr(self, name)!r}: {error}"
                ) from error

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the cost of tokens.

        Args:
            prompt_tokens: the number of tokens in prompts.
            completion_tokens: the number of tokens in completions.

        Examples:
            >>> Price(input=2.5, output=10).of(2_000_000, 1_000_000)
            15.0
        """
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role of a recipe: an engine with a sampling."""

    name: str
    engine: Engine
    sampling: Sampling
    price: Price


@dataclass(frozen=True, kw_only=True)
class Use:
    """A strategy with its settings, as a recipe uses it."""

    name: str
    """Unique in the recipe; the column `strategy` of its pairs."""
    start: Callable[[Row], Strategy]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe that was read and checked."""

    path: Path
    output: Path
    seed: int
    rows: RowSource
    strategies: tuple[Use, ...]
    roles: Mapping[str, Role]
    checks: Mapping[str, Any]
    filters: Mapping[str, Any]
    mapping: Mapping[str, Any]
    """The mapping of the YAML file."""

    @property
    def engines(self) -> list[Engine]:
        """Return the engines of all roles, each once."""
        return list({id(role.engine): role.engine for role in self.roles.values()}.values())


def load_recipe(
    path: Path, *, output: Path | None = None, seed: int = 0, roles: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """Read and check a recipe. No model is loaded and no request is sent.

    Args:
        path: the YAML file.
        output: replaces the recipe's own folder.
        seed: added to the recipe's own.
        roles: options by the name of a role, which replace those of the recipe.

    Raises:
        OSError: there is no such file.
        ValueError: a mistake in the recipe; the message names the place and the allowed values.
    """
    mapping = _mapping(parse_yaml(text := read_text(path), str(path)), str(path))
    search_folder(path.parent)
    mistakes, engines = Mistakes(), dict[str, Engine]()
    with mistakes.collected():
        _check_keys(mapping, str(path), needed=[*KEYS], optional=[*OPTIONAL_KEYS])
    for check in (read_publication, read_ray_settings, _check_values):
        with mistakes.collected():
            check(mapping, str(path))
    roles_by_name: dict[str, Role] = {}
    with mistakes.collected():
        own = _mapping(mapping.get("roles", {}), f"{path}: roles")
        for name, options in _with_options(own, roles or {}, path).items():
            with mistakes.collected():
                where = f"{path}: role {name!r}"
                roles_by_name[name] = read_role(name, options, where=where, folder=path.parent, engines=engines)
    with mistakes.collected():
        _check_text(path, text, mapping, engines.values())
    rows: RowSource | None = None
    uses: tuple[Use, ...] = ()
    if "rows" in mapping:
        with mistakes.collected():
            rows = _row_source(mapping["rows"], path)
    if "strategies" in mapping:
        with mistakes.collected():
            uses = _strategies(mapping["strategies"], path)
    named = {}
    for key in ("checks", "filters"):
        with mistakes.collected():
            named[key] = _mapping(mapping.get(key) or {}, f"{path}: {key}")
    mistakes.report()
    assert rows is not None
    return Recipe(
        path=path,
        output=output or path.parent / mapping.get("output", path.stem),
        seed=mapping.get("seed", 0) + seed,
        rows=rows,
        strategies=uses,
        roles=roles_by_name,
        checks=_with_paths(path.parent, named["checks"]),
        filters=named["filters"],
        mapping=mapping,
    )


def _check_values(mapping: Mapping[str, Any], where: str) -> None:
    """Check the values of plain keys."""
    if type(mapping.get("seed", 0)) is not int:
        raise ValueError(f"{where}: seed must be a whole number, not {mapping['seed']!r}")
    check_texts(mapping, where, "output")


def _check_text(path: Path, text: str, mapping: Any, engines: Iterable[Engine]) -> None:
    """Reject a recipe that cannot be recorded, since its text becomes a part of the data set's card."""
    if has_lone_surrogate(mapping):
        raise ValueError(f"{path} contains a lone surrogate, which cannot be written to the data set")
    if name := secret_name(mapping):
        raise ValueError(
            f"{path} contains {name}, and the whole recipe is written to the data set: keep secrets in environment variables"
        )
    if any(engine.secrets.occur_in(text) for engine in engines if hasattr(engine, "secrets")):
        raise ValueError(
            f"{path} contains an API key, which would be written to the data set: name its environment variable in key_env"
        )


def _with_options(mapping: dict[str, Any], roles: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Return the roles with replaced options."""
    if unknown := [name for name in roles if name not in mapping]:
        raise ValueError(
            f"{path}: there is no role {unknown[0]!r}{did_you_mean(unknown[0], mapping)}; the recipe has {', '.join(mapping)}"
        )
    return mapping | {
        name: dict(_mapping(mapping[name], f"{path}: role {name!r}")) | dict(roles[name]) for name in roles
    }


# ------------------------------------------------------------------------------------------------------- what YAML may say


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where} must be a mapping of names, not {value!r}")
    return value


def _check_keys(value: Any, where: str, *, needed: list[str], optional: list[str]) -> None:
    """Require a mapping with all needed keys and no unknown ones."""
    known = [*needed, *optional]
    unknown = [name for name in _mapping(value, where) if name not in known]
    raise_mistakes(
        [f"{where} has no {name!r}{did_you_mean(name, known)}; it may have {', '.join(known)}" for name in unknown]
    )
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"{where} needs {', '.join(missing)}")


def _call_at(where: str, make: Callable[..., Any], **arguments: Any) -> Any:
    """Call `make`, and prefix error messages with the location in the recipe."""
    try:
        return make(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_role(name: str, options: Any, *, where: str, folder: Path, engines: dict[str, Engine]) -> Role:
    """Return a role with its engine; roles with equal engines share one.

    Args:
        name: the name of the role.
        options: `engine` with the options of its class, those of `Sampling`, and `price`.
        where: the beginning of errors.
        folder: the folder in which functions may lie.
        engines: the engines so far, by their options; the role's own is added.

    Raises:
        ValueError: an option is unknown or has a wrong value.
    """
    options = dict(_mapping(options, where))
    if "engine" not in options:
        raise ValueError(f"{where} needs an engine: {', '.join(ENGINES)}, or module:class")
    sampling = {f.name: options.pop(f.name) for f in fields(Sampling) if f.name in options}
    if "stop" in sampling:
        sampling["stop"] = [sampling["stop"]] if isinstance(sampling["stop"], str) else sampling["stop"]
    price = options.pop("price", {})
    _check_keys(price, f"{where}: price", needed=[], optional=[f.name for f in fields(Price)])
    key = json.dumps(options, sort_keys=True, default=str)
    if key not in engines:
        engines[key] = _engine(where, **options, folder=folder)
    sampled = _call_at(where, Sampling, **sampling)
    engine = engines[key]
    if hasattr(engine, "check"):
        _call_at(where, engine.check, sampling=sampled)
    return Role(name=name, engine=engine, sampling=sampled, price=_call_at(where, Price, **price))


def _engine(where: str, *, engine: Any, folder: Path, **options: Any) -> Engine:
    """Construct the engine of a role from its options."""
    kind = _engine_class(where, engine, folder)
    for name in getattr(kind, "function_options", ()):
        if name in options:  # the function may lie beside the recipe
            _call_at(where, find_function, name=options[name], folder=folder)
    extra = kind.option_names() if hasattr(kind, "option_names") else ()
    sampling = [f.name for f in fields(Sampling)]
    hint = f"; and of sampling {', '.join(sampling)}"
    near = [*sampling, "price", "engine"]
    check_call(kind, options, f"{where}: engine {engine!r}", extra=extra, noun="", hint=hint, near=near)
    constructed: Engine = _call_at(where, kind, **options)
    return constructed


def _engine_class(where: str, engine: Any, folder: Path) -> Any:
    """Return an engine by its name, or by `module:class`."""
    if ":" in str(engine):
        return _call_at(where, find_function, name=engine, folder=folder)
    try:
        return ENGINES.get(str(engine))
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or module:class") from error


def _row_source(value: Any, path: Path) -> RowSource:
    where = f"{path}: rows"
    value = {"source": value} if isinstance(value, str) else value
    _check_keys(value, where, needed=["source"], optional=[f.name for f in fields(RowSource) if f.name != "source"])
    check_texts(value, where, "source", "prompt", "split")
    check_texts({k: v for k, v in value.items() if v is not None}, where, "id", "images", "image_folder", "name")
    columns = _mapping(value.get("columns", {}), f"{where}: columns")
    check_texts(columns, f"{where}: columns", *columns)
    if type(value.get("pairs", False)) is not bool:
        raise ValueError(f"{where}: pairs must be true or false, not {value['pairs']!r}")
    rows = RowSource(**value)
    if rows.limit is not None and (not isinstance(rows.limit, int) or isinstance(rows.limit, bool) or rows.limit < 1):
        raise ValueError(f"{where}: limit must be a whole number of at least 1, not {rows.limit!r}")
    return rows


def _strategies(value: Any, path: Path) -> tuple[Use, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: strategies must be a non-empty list, not {value!r}")
    mistakes, used = Mistakes(), list[Use]()
    for number, each in enumerate(value, 1):
        with mistakes.collected():
            used.append(_use(each, f"{path}: strategy {number}", path.parent))
    mistakes.report()
    uses = tuple(used)
    names = [use.name for use in uses]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"{path}: two strategies have the name {double!r}: set another name for one of them with name: ..."
        )
    return uses


def _use(settings: Any, where: str, folder: Path) -> Use:
    settings = dict(_mapping({"use": settings} if isinstance(settings, str) else settings, where))
    use = str(settings.pop("use", "")) or None
    if use is None:
        raise ValueError(f"{where} needs use: the name of a strategy, or module:function")
    name = str(settings.pop("name", use.rpartition(":")[2]))
    function = _strategy(use, where, folder)
    check_call(function, settings, f"{where}: {use}", skip=1)
    return Use(name=name, start=partial(function, **_with_paths(folder, settings)))


def _with_paths(folder: Path, value: Any) -> Any:
    """Return settings with the names of files resolved in the recipe's folder."""
    if isinstance(value, dict):
        return {name: _with_paths(folder, each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_paths(folder, each) for each in value]
    return str(folder / value) if isinstance(value, str) and Path(value).suffix in FILES else value


def _strategy(use: str, where: str, folder: Path) -> StrategyFunction:
    """Return a strategy by its name, or by `module:function`."""
    if ":" in use:
        function = _call_at(where, find_function, name=use, folder=folder)
        try:
            check_strategy(function)
        except ValueError as error:
            raise ValueError(f"{where}: {use} {error}") from error
        return function  # type: ignore[no-any-return]
    try:
        return STRATEGIES.get(use)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or module:function") from error
