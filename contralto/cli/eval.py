"""`contralto eval`: lm-eval's own command line with contralto's models and tasks.

Every flag of lm-eval works. Beyond that, `--model` defaults to `contralto`, contralto's tasks are known, `--data_dir` reads data
sets from local files, and `--backend vllm` generates in vLLM. Answers are cached (`--use_cache`) and results written
(`--output_path`) under a name per decoder: lm-eval names both by the model alone, so that two decoders of one model would share
them.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from contralto.cli.eval_help import FLAGS, MODELS, argument_names, help_text
from contralto.cli.outputs import check_output_folder
from contralto.cli.spellings import options_of, respelled
from contralto.common.hashing import json_digest
from contralto.common.quiet import quiet
from contralto.common.suggestions import closest, did_you_mean
from contralto.decoding.methods import model_options

__all__ = ["run"]

MISSING_TASKS = "Tasks not found: "
"""The beginning of lm-eval's error about tasks that it does not know."""
METADATA_HINT = ("lm_eval.api.task", "Custom kwargs can be passed to `--metadata`")
"""lm-eval's logger and message about options of data sets that a function makes, such as those of local files, which take none."""
BACKENDS = {"transformers": "contralto", "vllm": "contralto-vllm"}


def run(argv: Sequence[str]) -> None:
    """Run lm-eval's command line.

    Args:
        argv: The flags.

    Raises:
        ImportError: lm-eval is not installed.
        OSError: The results could not be written.
        ValueError: lm-eval or contralto reject a flag, in one sentence.
    """
    try:
        from lm_eval._cli.harness import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig
    except ImportError as error:
        raise ImportError("contralto eval runs lm-eval: pip install 'contralto[eval]'") from error
    command = HarnessCLI()
    argv = _checked_words(command, argv)
    argv, data_dir = take(argv, "--data_dir", "a folder")
    argv, backend = take(argv, "--backend", " or ".join(BACKENDS))
    if backend not in (None, *BACKENDS):
        raise ValueError(f"--backend must be {' or '.join(BACKENDS)}, not {backend!r}{did_you_mean(backend, BACKENDS)}")
    sys.argv = ["contralto eval", *argv]  # lm-eval's parser reads no other
    args = command.parse_args()
    with TemporaryDirectory() as folder:
        if getattr(args, "command", None) == "run":
            config = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}
            _complete(_Settings(args, config), data_dir, Path(folder), backend)
        before = _written(args)
        with _no_git_message(), _suggestions(args), quiet(METADATA_HINT if data_dir else None):
            command.execute(args)
    if before is not None and os.environ.get("RANK", "0") == "0" and _written(args) == before:
        raise OSError(f"the results could not be written to {args.output_path}: see lm-eval's warning above")


def _checked_words(command: Any, argv: Sequence[str]) -> list[str]:
    """Return the command line in lm-eval's spelling; print the help and exit if it asks for it.

    Args:
        command: lm-eval's command line.
        argv: the flags.

    Raises:
        ValueError: a flag is unknown.
    """
    parsers = command._subparsers.choices
    if not argv or ({*argv} & {"-h", "--help"} and argv[0] not in parsers.keys() - {"run"}):
        print(help_text(parsers["run"], [name for name in parsers if name != "run"]))
        raise SystemExit(0)
    known = [
        *(flag.split()[0] for flag in FLAGS),
        *(flag for parser in parsers.values() for flag in options_of(parser)),
    ]
    words = respelled(argv, known)
    for word in words[: words.index("--") if "--" in words else None]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not any(each.startswith(flag) for each in known):
            _reject(flag, known)
    return words


def _reject(flag: str, known: Sequence[str]) -> None:
    """Raise ValueError for an unknown flag, which may be an argument of the model."""
    name = flag[2:].replace("-", "_")
    name = {"model_name_or_path": "pretrained"}.get(name, name)
    if name in argument_names():
        raise ValueError(f"{flag} is an argument of the model here: --model_args {name}=VALUE, beside the others")
    meant = closest(flag, known)
    hint = f" (did you mean {meant}?)" if meant else ""
    raise ValueError(f"there is no flag {flag}{hint}; contralto eval --help lists them")


@contextmanager
def _no_git_message() -> Iterator[None]:
    """Keep lm-eval from asking git for a commit outside of a repository, where git prints "fatal: not a git repository"."""
    from lm_eval import evaluator

    ask, here = evaluator.get_git_commit_hash, Path.cwd()
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


@contextmanager
def _suggestions(args: Namespace) -> Iterator[None]:
    """Add tasks that were probably meant to lm-eval's error about an unknown one."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(MISSING_TASKS):
            raise
        from lm_eval.tasks import TaskManager

        from contralto.eval.comparison.tasks import missing_task

        known = TaskManager(include_path=args.include_path).all_tasks
        raise ValueError(missing_task(str(error).removeprefix(MISSING_TASKS).split(", ")[0], known)) from error


def _written(args: Namespace) -> set[Path] | None:
    """Return the files of results in the output path; None if there is none."""
    if not getattr(args, "output_path", None):
        return None
    path = Path(args.output_path)
    if path.suffix == ".json":
        return set(path.parent.glob(f"{path.stem}_*.json"))
    return set(path.rglob("results_*.json"))


def take(argv: list[str], flag: str, expected: str) -> tuple[list[str], str | None]:
    """Return the arguments without one of contralto's flags, and the value of that flag."""
    for i, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return argv[:i] + argv[i + 1 :], word.removeprefix(f"{flag}=")
        if word == flag:
            if i + 1 == len(argv):
                raise ValueError(f"{flag} needs {expected}")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
    return argv, None


class _Settings(NamedTuple):
    """The settings of lm-eval: its flags, and the file that `--config` names."""

    args: Namespace
    config: dict[str, Any]

    def get(self, name: str) -> Any:
        """Return the value of a flag, or that of the file."""
        value = getattr(self.args, name, None)
        return self.config.get(name) if value in (None, {}) else value


def _complete(settings: _Settings, data_dir: str | None, folder: Path, backend: str | None) -> None:
    """Fill in contralto's defaults.

    Args:
        settings: The settings, whose flags are changed in place.
        data_dir: The value of `--data_dir`.
        folder: A folder for task files, which lives until the run ends.
        backend: The value of `--backend`.
    """
    from contralto.eval.data import TASKS
    from contralto.eval.metrics import register_in_lm_eval
    from contralto.eval.models import lm, vlm  # noqa: F401  importing registers the models

    register_in_lm_eval()
    if (limit := settings.get("limit")) is not None and not float(limit) > 0:
        raise ValueError(f"--limit must be above 0, not {limit}")
    paths = settings.get("include_path") or []
    settings.args.include_path = [str(TASKS), *([paths] if isinstance(paths, str) else paths)]
    if data_dir is not None:
        _use_local_data(settings, Path(data_dir), folder)
    _select_model(settings, backend)
    own = own_name(settings.get("model_args")) if settings.args.model in MODELS else ""
    if own and "pretrained" not in parsed(settings.get("model_args")):
        raise ValueError("no model: set --model_args pretrained=MODEL, a folder, a hub id, or testbed:NAME")
    if settings.get("wandb_args") and find_spec("wandb") is None:
        raise ImportError("--wandb_args needs the package wandb: pip install wandb")
    _name_outputs(settings, own)


def _use_local_data(settings: _Settings, data_dir: Path, folder: Path) -> None:
    """Redirect the tasks to local files."""
    from contralto.eval.data import local_tasks

    tasks = settings.get("tasks") or []
    names = tasks.split(",") if isinstance(tasks, str) else [name for task in tasks for name in task.split(",")]
    options = settings.get("metadata") or {}
    local = local_tasks(names, data_dir, folder, options)
    settings.args.tasks, settings.args.metadata = ",".join(local.tasks), {**local.metadata, **options}


def _select_model(settings: _Settings, backend: str | None) -> None:
    """Set the model of the backend, and a device that the machine has."""
    import torch

    args = settings.args
    args.model = settings.get("model") or BACKENDS[backend or "transformers"]
    if backend is not None and args.model != BACKENDS[backend]:
        raise ValueError(f"--backend {backend} sets --model itself: leave --model {args.model} out")
    if args.model == BACKENDS["vllm"]:
        import_module("contralto.eval.models.vllm")
    if args.model in MODELS and not settings.get("device"):  # lm-eval's own default is cuda:0 on any machine
        args.device = "cuda:0" if torch.cuda.is_available() else "cpu"


def _name_outputs(settings: _Settings, own: str) -> None:
    """Give the cache and the results of a decoder names of their own, and check that they can be written."""
    args = settings.args
    if cache := settings.get("use_cache"):
        args.use_cache = f"{cache}-{own}" if own else cache
        check_output_folder(Path(args.use_cache).parent, "--use_cache")
    if output := settings.get("output_path"):
        args.output_path = str(_own_path(Path(output), own) if own else output)
        path = Path(args.output_path)
        check_output_folder(path.parent if path.suffix == ".json" else path, "--output_path")


def own_name(model_args: Any) -> str:
    """Return a unique name for a decoder: its method, and a hash of all model arguments.

    Args:
        model_args: See `parsed`.

    Examples:
        >>> own_name({"pretrained": "a", "method": "cd"}) != own_name({"pretrained": "a", "method": "dola"})
        True
    """
    args = parsed(model_args)
    return f"{_method_name(args)}-{json_digest(args, 8, default=str)}"


def _method_name(args: dict[str, Any]) -> str:
    """Return the method, or the one that the other models select if it is left out."""
    methods = [methods for option, methods in model_options().items() if args.get(option)]
    return str(args.get("method") or (methods[0][0].name if methods else "plain"))


def parsed(model_args: Any) -> dict[str, Any]:
    """Read model arguments.

    Args:
        model_args: A string, a mapping or None, from lm-eval's parser or a configuration file.
    """
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(model_args) if isinstance(model_args, str) else dict(model_args or {})


def _own_path(path: Path, own: str) -> Path:
    """Return the output path of a decoder; lm-eval takes a folder or a JSON file."""
    return path.with_name(f"{path.stem}-{own}.json") if path.suffix == ".json" else path / own
