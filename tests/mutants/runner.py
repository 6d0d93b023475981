"""Run tests against a changed module, in a child of a process that has the heavy libraries loaded.

The change is made where Python reads the module's source, so no file is touched. A child that is forked after torch and
transformers were imported starts within milliseconds.
"""

import importlib
import importlib.machinery
import linecache
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """What the tests said of a change."""

    killed: bool
    """Whether a test failed, the module could not be imported, or the time was up."""
    status: int
    """The exit status of pytest, or minus the signal that ended it."""
    seconds: float


def preload() -> None:
    """Import what all tests need, but nothing of contralto."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("datasets", "lm_eval.models.huggingface", "peft", "pytest", "scipy.stats", "trl"):
        importlib.import_module(name)
    import torch
    import transformers

    for name in ("AutoModelForCausalLM", "PreTrainedTokenizerFast", "Trainer", "LlamaForCausalLM"):
        getattr(transformers, name)  # transformers imports lazily
    torch.set_num_threads(1)
    loaded = [name for name in sys.modules if name.split(".")[0] == "contralto"]
    if loaded:
        raise RuntimeError(f"changes would come too late: {loaded[0]} is imported already")


def run(path: Path, source: str, tests: Sequence[str], *, timeout: float) -> Outcome:
    """Run tests with another source in place of a module's.

    Args:
        path: the module's file.
        source: the text that is compiled in its place.
        tests: pytest's arguments, files or test ids seen from the root of the repository.
        timeout: seconds; a change that makes a loop endless is killed by it.
    """
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        enter(lambda: _change(path, source), tests)
    code = wait(child, timeout)
    return Outcome(code != 0, code, time.monotonic() - began)


def wait(child: int, timeout: float) -> int:
    """Return the exit status of a child that leads a group of processes, which is killed after `timeout` seconds."""
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > timeout:
            os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)


def enter(prepare: Callable[[], Sequence[object]], tests: Sequence[str]) -> NoReturn:
    """Run pytest in a child, without its output, and exit with its status.

    Args:
        prepare: returns plugins; called before pytest is imported.
        tests: pytest's arguments.
    """
    null = os.open(os.devnull, os.O_RDWR)
    log = os.environ.get("MUTANTS_LOG")
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) if log else null
    for number, stream in enumerate((null, out, out)):
        os.dup2(stream, number)
    plugins = prepare()
    import pytest

    os.chdir(ROOT)
    named = all("::" in test for test in tests)  # a test that is named runs even if it is slow
    options = [
        "-x",
        "-q",
        "-m",
        "not gpu and not real" if named else "not slow and not full and not gpu and not real",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    os._exit(pytest.main([*options, "-W", "ignore:Module already imported", *tests], plugins=plugins))


def _change(path: Path, source: str) -> Sequence[object]:
    """Let Python read another text in place of a module's, and so what asks it for the source of a function, as Triton does."""
    read = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: Any, name: str) -> Any:
        if Path(loader.path).resolve() == path.resolve():
            linecache.cache[loader.path] = (len(source), None, source.splitlines(keepends=True), loader.path)
            return compile(source, loader.path, "exec")
        return read(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return ()
