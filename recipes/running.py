"""Run the commands of a paper's recipe one after the other in a folder, keep what each printed, and go on after an interruption."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import locked_folder, read_text, replace_text
from contralto.recipes.papers import PaperRecipe
from contralto.recipes.steps import RecipeStep, brought, is_hub, steps_of, substituted

__all__ = ["Commands", "files_of", "missing", "on_hub", "prepare", "run"]

STATE = "reproduce.json"
PATIENCE = 5.0
"""Seconds that the hub may take to answer about a name."""


class Commands(NamedTuple):
    """Commands, and the files that they need."""

    steps: list[RecipeStep]
    files: dict[str, str]
    places: dict[str, str]
    """Where things are that the user brings."""


def prepare(recipe: PaperRecipe, *, is_small: bool, places: Mapping[str, str]) -> Commands:
    """Return the commands of a recipe, with what the user brings in its place.

    Args:
        recipe: the paper.
        is_small: those on the embedded models.
        places: where things are that the user brings, by name.

    Raises:
        ValueError: nothing in the recipe has one of these names.
    """
    text, files = (recipe.here, recipe.files) if is_small else (recipe.hub, recipe.hub_files)
    wanted = brought(recipe, steps_of(text, files))
    if unknown := [name for name in places if name not in wanted]:
        names = f"; it takes {', '.join(wanted)}" if wanted else "; it takes nothing"
        raise ValueError(f"--set {unknown[0]}=...: the recipe of {recipe.name} needs no {unknown[0]}{names}")
    files = {name: substituted(content, places) for name, content in files.items()}
    return Commands(steps_of(substituted(text, places), files), files, dict(places))


def missing(recipe: PaperRecipe, commands: Commands) -> list[str]:
    """Return what the user has to bring and did not name; a file beside the recipe's own is no exception, its folder is new.

    Args:
        recipe: the paper.
        commands: see `prepare`.
    """
    own = {*commands.files, *recipe.files, *commands.places.values()}
    return [name for name in brought(recipe, commands.steps) if name not in own]


@contextmanager
def files_of(recipe: PaperRecipe, *, is_small: bool, places: Mapping[str, str]) -> Iterator[None]:
    """Make a folder with the files of a recipe the working directory, within the block.

    Args:
        recipe: the paper.
        is_small: those of the commands on the embedded models.
        places: where things are that the user brings, by name.
    """
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        _write(prepare(recipe, is_small=is_small, places=places).files, Path(folder))
        yield


def on_hub(steps: Iterable[RecipeStep]) -> dict[str, str]:
    """Return for each model and data set of the hub whether it is there.

    Args:
        steps: the commands.
    """
    models = dict.fromkeys(name for step in steps for name in step.models if is_hub(name))
    data = dict.fromkeys(name for step in steps for name in step.data if is_hub(name))
    kinds = {**dict.fromkeys(models, "model"), **dict.fromkeys(data, "dataset")}
    states: dict[str, str] = {}
    is_reached = True
    for name, kind in kinds.items():
        states[name] = _state(name, kind) if is_reached else "not looked up: the hub cannot be reached"
        is_reached = is_reached and not states[name].startswith("not looked up")
    return states


def _state(name: str, kind: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "not looked up: HF_HUB_OFFLINE is set"
    try:
        info = HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except GatedRepoError:
        return f"is there, and its licence has to be accepted on its page before `hf auth login`: huggingface.co/{name}"
    except RepositoryNotFoundError:
        return f"is not on the hub as a {kind}, or your token may not see it"
    except Exception as error:  # noqa: BLE001 (the errors of whichever HTTP client huggingface_hub has)
        return f"not looked up: the hub cannot be reached ({type(error).__name__})"
    return f"is there{', and asks for a licence' if getattr(info, 'gated', False) else ''}"


# ------------------------------------------------------------------------------------------------------------------- the run


def run(commands: Commands, folder: Path) -> None:
    """Run all commands that are not done.

    Each prints to the terminal and into `step-N.log`. `reproduce.json` says which are done; a changed command is run again, and so are those
    after it.

    Args:
        commands: see `prepare`.
        folder: working directory of all commands; made if it is missing.

    Raises:
        ValueError: a command ends with another status than 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, f"another run works in {folder}: wait for it, or give another --output"):
        _write(commands.files, folder)
        done = _done(folder)
        for number, step in enumerate(commands.steps):
            line = shlex.join(step.words)
            if number < len(done) and done[number]["command"] == line:
                print(f"[{number + 1}/{len(commands.steps)}] done before: {line}")
                continue
            done = done[:number]
            print(f"[{number + 1}/{len(commands.steps)}] {line}", flush=True)
            start = time.monotonic()
            status = _execute(_resumed(step, folder), folder, folder / f"step-{number + 1}.log")
            if status:
                raise ValueError(
                    f"command {number + 1} of {len(commands.steps)} ended with status {status}: {line}; see above and "
                    f"{folder / f'step-{number + 1}.log'}. The same `contralto reproduce` goes on with it"
                )
            done.append({"command": line, "seconds": round(time.monotonic() - start, 1)})
            replace_text(folder / STATE, json.dumps({"done": done}, indent=1))


def _done(folder: Path) -> list[dict[str, Any]]:
    path = folder / STATE
    found: list[dict[str, Any]] = json.loads(read_text(path))["done"] if path.exists() else []
    return found


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or read_text(path) != text:
            replace_text(path, text)


def _resumed(step: RecipeStep, folder: Path) -> list[str]:
    """Return the words of a command, with the option by which it goes on where an earlier run of it stopped."""
    words = list(step.words)
    output = folder / step.option("output", "none")
    if step.name == "generate" and output.is_file() and "--resume" not in words:
        words.append("--resume")
    if step.name == "align" and "--rounds" not in words and (folder / step.option("output_dir")).is_dir():
        words += ["--resume_from_checkpoint", "last"]
    if step.name == "eval" and "--use_cache" not in words:
        words += ["--use_cache", "answers"]
    return words


def _execute(words: list[str], folder: Path, log: Path) -> int:
    """Run a command in a process of its own; its standard output goes to the log, too."""
    program = [sys.executable, "-m", "contralto"] if words[0] == "contralto" else [sys.executable]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*program, *words[1:]]
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            file.write(line)
    return child.returncode
