"""Read the answers that lm-eval keeps (`--use_cache`) without running what else such a file may hold.

lm-eval keeps them in a `SqliteDict`, each as a pickle, and a pickle can call any function while it is read. Answers are texts, numbers
and tuples, whose pickles name no function.
"""

import io
import pickle
from typing import Any

__all__ = ["read_answer"]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Reject every function and class that a pickle names."""
        raise ValueError(
            f"use_cache names a file that holds more than answers: reading it would call {module_name}.{global_name}; name another file"
        )


def read_answer(stored: bytes) -> Any:
    """Return a value that a `SqliteDict` stored; the `decode` of one.

    Args:
        stored: the pickle.

    Raises:
        ValueError: it is not made of plain values alone.

    Examples:
        >>> read_answer(pickle.dumps((-1.5, True)))
        (-1.5, True)
        >>> read_answer(pickle.dumps(print))
        Traceback (most recent call last):
            ...
        ValueError: use_cache names a file that holds more than answers: reading it would call builtins.print; name another file
    """
    return _PlainUnpickler(io.BytesIO(bytes(stored))).load()
