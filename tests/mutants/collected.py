"""Run tests that a process has collected once against many changes, each in a child of that process.

The code of a function is exchanged in place, which spares a child the imports and the collection of its tests. A module may
have called the function while it was imported, so a change that survives here is run once more by `runner.run`, which
imports the changed module.
"""

import gc
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import runner

LEAST = 20.0
"""Seconds that every change gets before it counts as endless."""
SLOWER = 10.0
"""How many times as long as the unchanged tests a change may take beyond that."""


def run(changes: Sequence[tuple[Path, str]], tests: Sequence[str], *, timeout: float) -> Iterator[bool | None]:
    """Yield for each change whether a test failed, or None where that has to be found out by `runner.run`.

    Args:
        changes: files, and the texts that stand in their places.
        tests: pytest's arguments, see `runner.run`.
        timeout: seconds for one change.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        runner.enter(lambda: [_Loop(changes, writer, timeout)], tests)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as answers:
        for _ in changes:
            yield {b"1": True, b"0": False}.get(answers.read(1))
    os.waitpid(child, 0)


class _Loop:
    """A plugin of pytest that runs the collected tests once per change."""

    def __init__(self, changes: Sequence[tuple[Path, str]], writer: int, timeout: float) -> None:
        self.changes, self.writer, self.timeout = changes, writer, timeout
        self.failed = mmap.mmap(-1, 8)  # shared with the children: the number of the test that failed

    def pytest_runtestloop(self, session: Any) -> bool:
        began = time.monotonic()
        is_sound = not session.testsfailed and self._in_child(session, [], self.timeout) == 0
        limit = min(self.timeout, LEAST + SLOWER * (time.monotonic() - began))
        for path, source in self.changes:
            swaps = exchanges(path, source) if is_sound else []
            failed = self._in_child(session, swaps, limit) if swaps else None
            os.write(self.writer, b"?" if failed is None else b"%d" % (failed != 0))
        return True

    def _in_child(self, session: Any, swaps: Sequence[tuple[FunctionType, CodeType]], limit: float) -> int:
        """Return the status of a child that runs the tests with other code in the functions."""
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            for function, code in swaps:
                function.__code__ = code
            os._exit(self._tests(session))
        status = runner.wait(child, limit)
        if status == 1:  # what noticed one change probably notices the next one
            number = int.from_bytes(self.failed[:], "little")
            session.items.insert(0, session.items.pop(number))
        return status

    def _tests(self, session: Any) -> int:
        """Run the tests up to the first that fails."""
        for number, (item, after) in enumerate(zip(session.items, [*session.items[1:], None], strict=True)):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.testsfailed:
                self.failed[:] = number.to_bytes(8, "little")
                return 1
        return 0


def exchanges(path: Path, source: str) -> list[tuple[FunctionType, CodeType]]:
    """Return the functions that a change concerns, with their new code; none if it also concerns what is run at import.

    Args:
        path: a module's file, which has been imported.
        source: its changed text.
    """
    old, new = (compile(text, str(path), "exec", dont_inherit=True) for text in (path.read_text("utf-8"), source))
    before, after = list(_functions(old)), list(_functions(new))
    if _shape(old, inside=False) != _shape(new, inside=False) or len(before) != len(after):
        return []
    changed = [(b, a) for b, a in zip(before, after, strict=True) if _shape(b, inside=True) != _shape(a, inside=True)]
    if any((b.co_qualname, b.co_freevars) != (a.co_qualname, a.co_freevars) for b, a in changed):
        return []
    codes = {(b.co_qualname, b.co_firstlineno): a for b, a in changed}
    return [
        (f, codes[key]) for f in _living(path) if (key := (f.__code__.co_qualname, f.__code__.co_firstlineno)) in codes
    ]


def _living(path: Path) -> list[FunctionType]:
    """Return the functions that were defined in a file."""
    kept = _FOUND.get(path)
    if kept is None:
        gc.unfreeze()  # the tests' conftest.py hides what collections need not look at
        functions = [f for f in gc.get_objects() if type(f) is FunctionType]
        kept = _FOUND[path] = [f for f in functions if os.path.realpath(f.__code__.co_filename) == str(path.resolve())]
    return kept


_FOUND: dict[Path, list[FunctionType]] = {}


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions of a module and its classes, not those inside functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if _is_function(constant):
                yield constant
            else:
                yield from _functions(constant)


def _is_function(code: CodeType) -> bool:
    """Return whether this is a function with a name: neither the body of a class, nor a comprehension or lambda."""
    return bool(code.co_flags & CO_OPTIMIZED) and not code.co_name.startswith("<")


def _shape(code: CodeType, *, inside: bool) -> tuple[Any, ...]:
    """Return what a piece of code does, but for its place in the file; functions by their names alone unless `inside`."""
    constants = []
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            constants.append((type(constant), repr(constant)))
        elif not inside and _is_function(constant):
            constants.append((CodeType, constant.co_qualname))
        else:
            constants.append((CodeType, _shape(constant, inside=inside)))
    return code.co_code, tuple(constants), code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable
