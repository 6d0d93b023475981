"""Scripts and modules run as forks of the test's process, which has imported the heavy libraries already."""

import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile

from helpers.ranks import forget_ranks


def run_script(path, *arguments):
    """Run a script with arguments in a forked process, as `python path arguments...` would.

    Args:
        path: the script.
        *arguments: its arguments.

    Returns:
        A `subprocess.CompletedProcess` with the status, and the texts written to standard output and error.
    """
    argv = [str(path), *map(str, arguments)]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _become(argv, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return CompletedProcess(argv, status, *texts)


def _become(argv, out, err):
    """Run the script in this process, and end it."""
    status = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        os.environ["OMP_NUM_THREADS"] = "1"
        forget_ranks()
        warnings.simplefilter("default")  # as in a process of its own
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 (the child must not go on with the test run)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
