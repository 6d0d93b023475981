"""Run a function in a forked child in which one system call fails, and return what became of it.

`shim.c` stands before the C library (LD_PRELOAD), so that the calls of SQLite, Arrow, safetensors and torch fail as well as
Python's own. The process is started with it once, by `preloaded`; every trial is a fork, which has everything imported.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.errors import is_mistake, sentence

SOURCE = Path(__file__).with_name("shim.c")
LIBRARY = SOURCE.parents[2] / ".cache" / "faults" / "shim.so"
SECONDS = 120
"""After which a child that goes on is counted as hung."""


class Kind(IntEnum):
    """The kinds of faults, numbered as in shim.c."""

    FULL = 0
    """ENOSPC from the call on: whatever grows fails."""
    ERROR = 1
    """EIO, once; ENOMEM where a file is mapped."""
    TORN = 2
    """Half of the bytes are written, then EIO."""
    INTERRUPTED = 3
    """EINTR, once."""
    SHORT = 4
    """Half of the bytes are written, and their number is returned: no error by POSIX."""
    KILLED = 5
    """SIGKILL, in the middle of a write or before another call."""


class Outcome(NamedTuple):
    """What became of a child."""

    how: str
    """done, refused (an error of the user), bug (another exception), unread (`read` failed), killed, crashed, hung."""
    value: Any
    """What the function returned; the text of the error."""
    calls: int
    """Calls to which the kind of fault applies."""
    struck: str
    """The call that failed and its file; empty if none did."""


def preloaded() -> None:
    """Start this process again with the shim, unless it has it.

    Raises:
        OSError: there is no C compiler.
    """
    if str(LIBRARY) in os.environ.get("LD_PRELOAD", ""):
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(unfinished), str(SOURCE), "-ldl"], check=True)
    unfinished.replace(LIBRARY)
    os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": str(LIBRARY), "HF_HUB_OFFLINE": "1"})


def tried(run: Callable[[], Any], read: Callable[[Any], Any], folder: Path, kind: Kind, at: int) -> Outcome:
    """Call `run` in a child with a fault, and `read` with its result when there are faults no more.

    Args:
        run: the work.
        read: returns what a reader finds of the result, to be compared.
        folder: where calls fail.
        kind: the kind of fault.
        at: the number of the call that fails, from 0; no call if it is negative.
    """
    source, target = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        _serve(run, read, folder, kind, at, target)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        how = {signal.SIGKILL: "killed", signal.SIGALRM: "hung"}.get(signal.Signals(number), "crashed")
        return Outcome(how, signal.Signals(number).name, -1, "")
    return Outcome(*pickle.loads(said))


def _serve(run: Callable[[], Any], read: Callable[[Any], Any], folder: Path, kind: Kind, at: int, target: int) -> None:
    """Do the work of the child, tell the parent, and end."""
    shim = ctypes.CDLL(None)
    shim.faults_struck.restype, shim.faults_count.restype = ctypes.c_char_p, ctypes.c_long
    signal.alarm(SECONDS)
    try:
        shim.faults_arm(os.fsencode(folder), int(kind), ctypes.c_long(at))
        try:
            result = run()
        finally:
            shim.faults_disarm()
        how, value = _read(read, result)
    except BaseException as error:  # noqa: BLE001 (the child must not go on as its parent)
        is_clear = isinstance(error, Exception) and is_mistake(error)
        how, value = ("refused", sentence(error)) if is_clear else ("bug", traceback.format_exc())
    outcome = (how, value, shim.faults_count(), shim.faults_struck().decode())
    with os.fdopen(target, "wb") as pipe:
        pickle.dump(outcome, pipe)
    os._exit(0)


def _read(read: Callable[[Any], Any], result: Any) -> tuple[str, Any]:
    try:
        return "done", read(result)
    except Exception:  # noqa: BLE001 (whatever it is, the result cannot be read)
        return "unread", traceback.format_exc()
