"""Runs in processes of their own that are killed at a chosen call."""

import itertools
import os
import signal


def killed_at(run, owner, name, count):
    """Fork, and call `run()` there; SIGKILL at call number `count` of `owner.name`, never if it is negative. The child's status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        left, stock = itertools.count(count, -1), getattr(owner, name)

        def deadly(*args, **how):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(*args, **how)

        if count >= 0:
            setattr(owner, name, deadly)
        run()
        os._exit(0)
    except BaseException:  # noqa: BLE001 (the child must not go on with the test run)
        import traceback

        traceback.print_exc()
        os._exit(1)
