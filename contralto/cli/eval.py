"""`contralto eval`: lm-eval's own command line, with contralto's models and tasks in it.

Every flag is lm-eval's. Beyond that: `--model` defaults to `contralto`; contralto's tasks are known; a decoder's answers
are cached (`--use_cache`) and its results written (`--output_path`) under names of its own, since lm-eval names both by the
model alone, and two decoders of one model would share them; `--data_dir` reads data sets from local files; and `--backend vllm`
answers through vLLM.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contralto.common.hashing import json_digest
from contralto.common.outputs import check_output_folder

__all__ = ["run"]

MODELS = ("contralto", "contralto-vlm", "contralto-vllm")
BACKENDS = {"transformers": "contralto", "vllm": "contralto-vllm"}


def run(argv: Sequence[str]) -> None:
    """Run lm-eval's command line.

    Raises:
        OSError: the results could not be written.
        ValueError: what lm-eval or contralto refuse, in one sentence.
    """
    try:
        from lm_eval._cli.harness import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig
    except ImportError as error:
        raise ImportError("contralto eval runs lm-eval: pip install 'contralto[eval]'") from error
    argv, data_dir = _take(list(argv), "--data_dir", "a folder")
    argv, backend = _take(argv, "--backend", " or ".join(BACKENDS))
    if backend not in (None, *BACKENDS):
        raise ValueError(f"--backend must be {' or '.join(BACKENDS)}, not {backend!r}")
    sys.argv = ["contralto eval", *(argv or ["--help"])]  # lm-eval's parser reads no other
    command = HarnessCLI()
    args = command.parse_args()
    with TemporaryDirectory() as folder:
        if getattr(args, "command", None) == "run":
            config = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}
            _complete(args, config, data_dir, Path(folder), backend)
        before = _written(args)
        command.execute(args)
    if before is not None and os.environ.get("RANK", "0") == "0" and _written(args) == before:
        raise OSError(
            f"the results could not be written to {args.output_path}: lm-eval's warning above says so, not why"
        )


def _written(args: Namespace) -> set[Path] | None:
    """Return the files of results in the output path; None if there is none."""
    if not getattr(args, "output_path", None):
        return None
    path = Path(args.output_path)
    if path.suffix == ".json":
        return set(path.parent.glob(f"{path.stem}_*.json"))
    return set(path.rglob("results_*.json"))


def _take(argv: list[str], flag: str, what: str) -> tuple[list[str], str | None]:
    """A flag and its value out of the arguments."""
    for i, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return argv[:i] + argv[i + 1 :], word.removeprefix(f"{flag}=")
        if word == flag:
            if i + 1 == len(argv):
                raise ValueError(f"{flag} needs {what}")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
    return argv, None


def _complete(
    args: Namespace, config: dict[str, Any], data_dir: str | None, folder: Path, backend: str | None = None
) -> None:
    """Fill in contralto's defaults; `folder` lives until the run ends."""
    import torch

    from contralto.eval.data import TASKS, local_tasks
    from contralto.eval.metrics import register_in_lm_eval
    from contralto.eval.models import lm, vlm  # noqa: F401  importing registers the models

    def given(name: str) -> Any:
        found = getattr(args, name, None)
        return config.get(name) if found in (None, {}) else found

    register_in_lm_eval()
    paths = given("include_path") or []
    args.include_path = [str(TASKS), *([paths] if isinstance(paths, str) else paths)]
    if data_dir is not None:
        tasks = given("tasks") or []
        names = tasks.split(",") if isinstance(tasks, str) else [name for task in tasks for name in task.split(",")]
        options = given("metadata") or {}
        local = local_tasks(names, Path(data_dir), folder, options)
        args.tasks, args.metadata = ",".join(local.tasks), {**local.metadata, **options}
    args.model = given("model") or BACKENDS[backend or "transformers"]
    if backend is not None and args.model != BACKENDS[backend]:
        raise ValueError(f"--backend {backend} has a model of its own: leave --model {args.model} out")
    if args.model == BACKENDS["vllm"]:
        import_module("contralto.eval.models.vllm")
    if args.model in MODELS and not given("device"):  # lm-eval's own default is cuda:0, whatever the machine has
        args.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    own = own_name(given("model_args")) if args.model in MODELS else ""
    if own and "pretrained" not in parsed(given("model_args")):
        raise ValueError("which model? give --model_args pretrained=MODEL: a folder, a hub id, or testbed:NAME")
    if given("wandb_args") and find_spec("wandb") is None:
        raise ImportError("--wandb_args needs the package wandb: pip install wandb")
    if given("use_cache"):
        args.use_cache = f"{given('use_cache')}-{own}" if own else given("use_cache")
        check_output_folder(Path(args.use_cache).parent, "--use_cache")
    if given("output_path"):
        args.output_path = str(_apart(Path(given("output_path")), own) if own else given("output_path"))
        path = Path(args.output_path)
        check_output_folder(path.parent if path.suffix == ".json" else path, "--output_path")


def own_name(model_args: Any) -> str:
    """A name for a decoder that no other has: its method, and a hash of all model arguments.

    Examples:
        >>> own_name({"pretrained": "a", "method": "cd", "amateur": "b"}) != own_name({"pretrained": "a", "method": "cd"})
        True
    """
    args = parsed(model_args)
    digest = json_digest(args, 8, default=str)
    return f"{args.get('method') or ('cd' if args.get('amateur') else 'plain')}-{digest}"


def parsed(model_args: Any) -> dict[str, Any]:
    """Read model arguments.

    Args:
        model_args: as lm-eval's parser or a configuration file gives them: a text, a mapping or None.
    """
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(model_args) if isinstance(model_args, str) else dict(model_args or {})


def _apart(path: Path, own: str) -> Path:
    """An output path of one's own; lm-eval takes a folder or a JSON file."""
    return path.with_name(f"{path.stem}-{own}.json") if path.suffix == ".json" else path / own
