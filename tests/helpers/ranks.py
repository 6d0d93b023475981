"""Ranks of one run as forks of the test's process, which has imported everything already: no launcher, no start-up."""

import os
import socket
import sys
import traceback
import warnings

from accelerate.state import AcceleratorState, GradientState, PartialState


def run_ranks(run, count=2):
    """Call `run()` in `count` forked processes that find the variables torchrun sets.

    Args:
        run: called without arguments in every process.
        count: the world size.

    Raises:
        AssertionError: a process failed; its traceback is on stderr.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_fork(run, rank, count, port) for rank in range(count)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def _fork(run, rank, count, port):
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        forget_ranks()
        warnings.simplefilter("default")  # as in a process of its own
        run()
        status = 0
    except BaseException:  # noqa: BLE001 (the child must not go on with the test run)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def forget_ranks():
    """Reset what accelerate remembers of runs in the test's own process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
