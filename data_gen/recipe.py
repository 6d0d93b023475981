"""Recipes: a YAML file that says which rows, which strategies, who answers, and what is checked.

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

Files that strategies and checks name (templates, test sets) are looked for beside the recipe. Images that rows name must lie below
the recipe's folder, or below the folder that `rows: {image_folder: ...}` names. Everything is read and checked
before anybody is asked; every mistake is one sentence that says where it is.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from contralto.common.errors import during
from contralto.common.files import read_json_lines, read_lines, read_text
from contralto.common.texts import has_lone_surrogate, secret_name
from contralto.common.yaml_file import parse_yaml
from contralto.data_gen.engines.base import Engine
from contralto.data_gen.engines.registry import ENGINES
from contralto.data_gen.functions import find_function
from contralto.data_gen.image_files import images_of, placed, with_located
from contralto.data_gen.ranges import check_number, check_texts
from contralto.data_gen.settings import check_call
from contralto.data_gen.strategies.registry import STRATEGIES, StrategyFunction, check_strategy
from contralto.data_gen.types import Row, Sampling, Strategy, digest

__all__ = ["Price", "Recipe", "Role", "Rows", "Use", "load_recipe", "read_rows"]

FILES = (".txt", ".json", ".jsonl", ".parquet")
"""What a setting ends in that names a file."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """Money per million tokens.

    Raises:
        ValueError: below 0.
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
                    f"price {name} must be money per million tokens, not {getattr(self, name)!r}: {error}"
                ) from error

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost.

        Examples:
            >>> Price(input=2.5, output=10).of(2_000_000, 1_000_000)
            15.0
        """
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


@dataclass(frozen=True, kw_only=True)
class Role:
    """Who answers, and how."""

    name: str
    engine: Engine
    sampling: Sampling
    price: Price


@dataclass(frozen=True, kw_only=True)
class Use:
    """A strategy with its settings."""

    name: str
    """Unique in the recipe; the column `strategy` of its pairs."""
    start: Callable[[Row], Strategy]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the rows come from.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet, .txt with a prompt per line), a data set's folder or hub id, or
            `module:function`, called with `arguments`, for rows that are computed.
        prompt: the column with the prompt, a text or messages.
        id: the column with a unique id; default: `id`, and if there is none, the id is a hash of the row.
        images: the column with the images; default: `images` or `image`, if there is one.
        image_folder: the folder below which all images must lie, and from which their paths are read; default: that of the recipe.
        split, name: of a data set.
        limit: only the first so many rows.
        arguments: of a function.
    """

    source: str
    prompt: str = "prompt"
    id: str | None = None
    images: str | None = None
    image_folder: str | None = None
    split: str = "train"
    name: str | None = None
    limit: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, read and checked."""

    path: Path
    output: Path
    seed: int
    rows: Rows
    strategies: tuple[Use, ...]
    roles: Mapping[str, Role]
    checks: Mapping[str, Any]
    filters: Mapping[str, Any]
    said: Mapping[str, Any]
    """The YAML, as it was read."""

    @property
    def engines(self) -> list[Engine]:
        """The engines, each once."""
        return list({id(role.engine): role.engine for role in self.roles.values()}.values())


def load_recipe(
    path: Path, *, output: Path | None = None, seed: int = 0, roles: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """Read a recipe and check it. Models are not loaded and nobody is asked.

    Args:
        path: the YAML file.
        output: instead of the recipe's own.
        seed: added to the recipe's own.
        roles: options that stand in place of those of a role, by the role's name.

    Raises:
        OSError: there is no such file.
        ValueError: a mistake in the recipe: where, what was given, what is allowed.
    """
    said = parse_yaml(text := read_text(path), str(path))
    _check_keys(said, str(path), needed=["rows", "strategies", "roles"], more=["output", "seed", "checks", "filters"])
    if type(said.get("seed", 0)) is not int:
        raise ValueError(f"{path}: seed must be a whole number, not {said['seed']!r}")
    check_texts(said, str(path), "output")
    engines: dict[str, Engine] = {}
    made = {
        name: _role(name, given, path, engines)
        for name, given in _with_options(_mapping(said["roles"], f"{path}: roles"), roles or {}, path).items()
    }
    _check_text(path, text, said, engines.values())
    return Recipe(
        path=path,
        output=output or path.parent / said.get("output", path.stem),
        seed=said.get("seed", 0) + seed,
        rows=_rows(said["rows"], path),
        strategies=_strategies(said["strategies"], path),
        roles=made,
        checks=_beside(path.parent, _mapping(said.get("checks") or {}, f"{path}: checks")),
        filters=_mapping(said.get("filters") or {}, f"{path}: filters"),
        said=said,
    )


def _check_text(path: Path, text: str, said: Any, engines: Iterable[Engine]) -> None:
    """Require of the text of a recipe that it can be recorded: it becomes a part of the data set's card."""
    if has_lone_surrogate(said):
        raise ValueError(f"{path} holds a lone surrogate, which cannot be written to the data set")
    if name := secret_name(said):
        raise ValueError(
            f"{path} holds {name}, and the whole recipe is written to the data set: keep secrets in environment variables"
        )
    if any(engine.secrets.occur_in(text) for engine in engines if hasattr(engine, "secrets")):
        raise ValueError(
            f"{path} holds an API key, which would be written to the data set: name its environment variable in key_env"
        )


def _with_options(said: dict[str, Any], roles: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """The roles with other options."""
    if unknown := [name for name in roles if name not in said]:
        raise ValueError(f"{path}: there is no role {unknown[0]!r}; the recipe has {', '.join(said)}")
    return said | {name: dict(_mapping(said[name], f"{path}: role {name!r}")) | dict(roles[name]) for name in roles}


# ------------------------------------------------------------------------------------------------------- what YAML may say


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where} must be a mapping of names, not {given!r}")
    return given


def _check_keys(given: Any, where: str, *, needed: list[str], more: list[str]) -> None:
    """A mapping with all of the needed keys and none that nobody reads."""
    known = [*needed, *more]
    for name in _mapping(given, where):
        if name not in known:
            raise ValueError(f"{where} has no {name!r}; it may have {', '.join(known)}")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where} needs {', '.join(missing)}")


def _at(where: str, make: Callable[..., Any], **given: Any) -> Any:
    """Make something, and say where in the recipe it could not be made."""
    try:
        return make(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _role(name: str, given: Any, path: Path, engines: dict[str, Engine]) -> Role:
    """A role; roles whose engines are equal share one."""
    where = f"{path}: role {name!r}"
    given = dict(_mapping(given, where))
    if "engine" not in given:
        raise ValueError(f"{where} needs an engine: {', '.join(ENGINES)}, or module:class")
    sampling = {f.name: given.pop(f.name) for f in fields(Sampling) if f.name in given}
    if "stop" in sampling:
        sampling["stop"] = [sampling["stop"]] if isinstance(sampling["stop"], str) else sampling["stop"]
    price = given.pop("price", {})
    _check_keys(price, f"{where}: price", needed=[], more=[f.name for f in fields(Price)])
    same = json.dumps(given, sort_keys=True, default=str)
    if same not in engines:
        engines[same] = _engine(where, **given, folder=path.parent)
    made = _at(where, Sampling, **sampling)
    engine = engines[same]
    if hasattr(engine, "check"):
        _at(where, engine.check, sampling=made)
    return Role(name=name, engine=engine, sampling=made, price=_at(where, Price, **price))


def _engine(where: str, *, engine: Any, folder: Path, **options: Any) -> Engine:
    """Construct the engine of a role from its options."""
    kind = _engine_class(where, engine, folder)
    for name in getattr(kind, "function_options", ()):
        if name in options:  # the function may lie beside the recipe
            _at(where, find_function, name=options[name], folder=folder)
    extra = kind.option_names() if hasattr(kind, "option_names") else ()
    hint = f"; and of sampling {', '.join(f.name for f in fields(Sampling))}"
    check_call(kind, options, f"{where}: engine {engine!r}", extra=extra, noun="", hint=hint)
    made: Engine = _at(where, kind, **options)
    return made


def _engine_class(where: str, engine: Any, folder: Path) -> Any:
    """Return an engine by its name, or by `module:class`."""
    if ":" in str(engine):
        return _at(where, find_function, name=engine, folder=folder)
    try:
        return ENGINES.get(engine)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or module:class") from error


def _rows(given: Any, path: Path) -> Rows:
    where = f"{path}: rows"
    given = {"source": given} if isinstance(given, str) else given
    _check_keys(given, where, needed=["source"], more=[f.name for f in fields(Rows) if f.name != "source"])
    check_texts(given, where, "source", "prompt", "split")
    check_texts({k: v for k, v in given.items() if v is not None}, where, "id", "images", "image_folder", "name")
    rows = Rows(**given)
    if rows.limit is not None and (not isinstance(rows.limit, int) or isinstance(rows.limit, bool) or rows.limit < 1):
        raise ValueError(f"{where}: limit must be a whole number of at least 1, not {rows.limit!r}")
    return rows


def _strategies(given: Any, path: Path) -> tuple[Use, ...]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{path}: strategies must be a list of at least one, not {given!r}")
    uses = tuple(_use(each, f"{path}: strategy {number}", path.parent) for number, each in enumerate(given, 1))
    names = [use.name for use in uses]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: two strategies are called {double!r}: give one of them another name with name: ...")
    return uses


def _use(given: Any, where: str, folder: Path) -> Use:
    given = dict(_mapping({"use": given} if isinstance(given, str) else given, where))
    use = str(given.pop("use", "")) or None
    if use is None:
        raise ValueError(f"{where} needs use: the name of a strategy, or module:function")
    name = str(given.pop("name", use.rpartition(":")[2]))
    function = _strategy(use, where, folder)
    check_call(function, given, f"{where}: {use}", skip=1)
    return Use(name=name, start=partial(function, **_beside(folder, given)))


def _beside(folder: Path, given: Any) -> Any:
    """Settings with their files looked for beside the recipe."""
    if isinstance(given, dict):
        return {name: _beside(folder, value) for name, value in given.items()}
    if isinstance(given, list):
        return [_beside(folder, value) for value in given]
    return str(folder / given) if isinstance(given, str) and Path(given).suffix in FILES else given


def _strategy(use: str, where: str, folder: Path) -> StrategyFunction:
    """Return a strategy by its name, or by `module:function`."""
    if ":" in use:
        function = _at(where, find_function, name=use, folder=folder)
        try:
            check_strategy(function)
        except ValueError as error:
            raise ValueError(f"{where}: {use} {error}") from error
        return function  # type: ignore[no-any-return]
    try:
        return STRATEGIES.get(use)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or module:function") from error


# ------------------------------------------------------------------------------------------------------------------ rows


def read_rows(rows: Rows, *, folder: Path) -> list[dict[str, Any]]:
    """The rows of a recipe, in their order: each with `id`, `prompt` as messages, `images`, and its other columns.

    Args:
        rows: where they come from.
        folder: of the recipe: files and modules are looked for here.

    Raises:
        OSError: there is no such file or data set.
        ValueError: a row without a prompt, two rows of one id, no rows: file, row and column are named.
    """
    found: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_source(rows, folder), 1):
        if rows.limit is not None and number > rows.limit:
            break
        found.append(_row(rows, row, number, seen, folder))
    if not found:
        raise ValueError(f"{rows.source} holds no rows")
    return found


def _source(rows: Rows, folder: Path) -> Iterator[dict[str, Any]]:
    file = folder / rows.source
    if ":" in rows.source and not file.exists():
        yield from find_function(rows.source, folder=folder)(**rows.arguments)
    elif file.suffix == ".jsonl":
        yield from (row for _, row in read_json_lines(file))
    elif file.suffix == ".txt":
        yield from ({rows.prompt: line} for line in read_lines(file) if line.strip())
    else:
        yield from _dataset(rows, file, folder)


def _dataset(rows: Rows, file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    import datasets

    folders = [_image_folder(rows, folder)]
    if file.suffix in (".json", ".csv", ".parquet"):
        if not file.exists():
            raise FileNotFoundError(f"there is no file {file}")
        kind = file.suffix.removeprefix(".")
        with during(str(file)):
            found = datasets.load_dataset(kind, data_files=str(file), split="train")
    elif (file / "dataset_info.json").exists() or (file / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(file))
        found = saved[rows.split] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        name = str(file) if file.is_dir() else rows.source
        with during(name):
            found = datasets.load_dataset(name, rows.name, split=rows.split)
        folders += [file] if file.is_dir() else [Path(datasets.config.HF_CACHE_HOME)]  # where it was downloaded to
    yield from with_located(found, folders=folders, where=rows.source)


def _image_folder(rows: Rows, folder: Path) -> Path:
    return folder if rows.image_folder is None else folder / rows.image_folder


def _row(rows: Rows, row: Any, number: int, seen: dict[str, int], folder: Path) -> dict[str, Any]:
    where = f"{rows.source}, row {number}"
    if type(row) is not dict:
        raise ValueError(f"{where} is no mapping of columns: {str(row)[:80]!r}")
    prompt = _prompt(row.get(rows.prompt), f"{where}, column {rows.prompt!r}", row)
    prompt, pictures = _pictures(rows, row, prompt, where, [_image_folder(rows, folder)])
    named = rows.id or ("id" if row.get("id") is not None else None)
    if named and row.get(named) is None:
        raise ValueError(f"{where} has no id in column {named!r}; it has {', '.join(row)}")
    name = str(row[named]).encode("utf-8", "backslashreplace").decode() if named else digest(_plain(row))[:16]
    seen[name] = seen.get(name, 0) + 1
    if seen[name] > 1:
        if named:
            raise ValueError(f"{where}: the id {name!r} was there before, and ids must be unique")
        name = f"{name}-{seen[name]}"  # the same row again
    kept = {key: value for key, value in row.items() if key not in (rows.prompt, _image_column(rows, row), named)}
    return {**kept, **pictures, "id": name, "prompt": prompt}


def _image_column(rows: Rows, row: Mapping[str, Any]) -> str | None:
    return rows.images or next((name for name in ("images", "image") if name in row), None)


def _pictures(
    rows: Rows, row: Mapping[str, Any], prompt: Sequence[Mapping[str, Any]], where: str, folders: Sequence[Path]
) -> tuple[list[dict[str, Any]], dict[str, tuple[Any, ...]]]:
    """Return the prompt without the images in its parts, and the columns of images, all of them checked."""
    column = _image_column(rows, row)
    if rows.images and rows.images not in row:
        raise ValueError(f"{where} has no column {rows.images!r}; it has {', '.join(row)}")
    kept, images = placed(prompt, folders=folders, where=f"{where}, column {rows.prompt!r}")
    read = {"images": column, "rejected_images": "rejected_images" if "rejected_images" in row else None}
    columns = {
        name: images_of(row[of], folders=folders, where=f"{where}, column {of!r}") for name, of in read.items() if of
    }
    if images and columns.get("images"):
        raise ValueError(f"{where} names images in its messages and in column {column!r}: leave one of them out")
    return kept, {"images": (), **columns, **({"images": images} if images else {})}


def _prompt(given: Any, where: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages; a text is one of the user's."""
    if given is None:
        raise ValueError(f"{where} is missing; the row has {', '.join(row) or 'nothing'}")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} must be a text or a list of messages, not {str(given)[:80]!r}")
    for message in given:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: a message has a role and a content, and this one is {str(message)[:80]!r}")
    if not any(str(message["content"]).strip() for message in given):
        raise ValueError(f"{where} is empty")
    return [dict(message) for message in given]


def _plain(row: Mapping[str, Any]) -> list[str]:
    """A row for its hash: texts, whatever is in it; images by their pixels."""
    return [f"{name}={digest_of(value)}" for name, value in sorted(row.items())]


def digest_of(value: Any) -> str:
    """A hash of any column's value."""
    if hasattr(value, "tobytes"):
        return digest([str(getattr(value, "size", "")), value.tobytes().hex()])
    if isinstance(value, list | tuple):
        return digest([digest_of(each) for each in value])
    return digest(str(value))
