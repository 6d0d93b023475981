"""The code that a function uses: a change of it is another source, a change of other code is not."""

import importlib
import sys

import pytest

from contralto.common.hashing import source_digest

FILES = {
    "used_a": """
import random
from functools import partial, wraps

import used_b
from used_b import helper, other as renamed

LIMIT, OTHER = 3, 4
TABLE = {}
EXAMPLES = []


def register(f):
    TABLE[f.__name__] = f
    return f


@register
def shout(x):
    return x.upper()


def deep():
    return LIMIT


class Base:
    size = 1


class Reader(Base):
    def read(self):
        return deep()


def plain(x):
    return x


def judge(x):
    return x + 1


def revise(x):
    return Reader().read()


def table(x):
    return TABLE[x]


def lazily(x):
    import used_c

    return used_c.SIZE


def beside(x):
    return used_b.helper(x) + random.random()


def renaming(x):
    return renamed(x)


def hidden(x):
    return globals()[x]


def by_string(x):
    return getattr(used_b, x)


bound = partial(judge, 2)


class Scorer:
    def __init__(self, n):
        self.n = n

    def __call__(self, row, answers):
        return answers


scorer = Scorer(1)
random.seed(0)

if __name__ == "__main__":
    revise(judge(1))
""",
    "used_b": """
import used_c

COUNT = 1


def helper(x):
    return used_c.SIZE * x


def other(x):
    return COUNT


def unused(x):
    return x
""",
    "used_c": "SIZE = 1\nWEIGHT = 2\n",
    "used_star": "from used_c import *\n\n\ndef stars(x):\n    return SIZE\n\n\ndef unused(x):\n    return x\n",
}


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Return a function that writes the modules with changes, and hashes one of their functions."""
    folder = tmp_path / "beside"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def digest_of(name, *changes):
        codes = dict(FILES)
        for module, old, new in changes:
            assert old in codes[module]
            codes[module] = codes[module].replace(old, new)
        for module, code in codes.items():
            (folder / f"{module}.py").write_text(code)
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        module, _, function = name.partition(":")
        return source_digest(getattr(importlib.import_module(module), function))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield digest_of
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("used_a:revise", ("used_a", "Reader().read()", "Reader().read() + 1")),
        ("used_a:revise", ("used_a", "LIMIT, OTHER = 3, 4", "LIMIT, OTHER = 5, 4")),
        ("used_a:revise", ("used_a", "return deep()", "return -deep()")),
        ("used_a:revise", ("used_a", "size = 1", "size = 2")),
        ("used_a:table", ("used_a", "x.upper()", "x.lower()")),
        ("used_a:table", ("used_a", "TABLE = {}", "TABLE = {1: 2}")),
        ("used_a:lazily", ("used_c", "SIZE = 1", "SIZE = 2")),
        ("used_a:beside", ("used_c", "SIZE = 1", "SIZE = 2")),
        ("used_a:beside", ("used_a", "random.seed(0)", "random.seed(1)")),
        ("used_a:renaming", ("used_b", "COUNT = 1", "COUNT = 2")),
        ("used_a:renaming", ("used_a", "other as renamed", "helper as renamed")),
        ("used_a:hidden", ("used_a", "return x + 1", "return x + 2")),
        ("used_a:hidden", ("used_b", "def unused(x):\n    return x", "def unused(x):\n    return -x")),
        ("used_a:by_string", ("used_b", "def unused(x):\n    return x", "def unused(x):\n    return -x")),
        ("used_a:bound", ("used_a", "partial(judge, 2)", "partial(judge, 3)")),
        ("used_a:scorer", ("used_a", "Scorer(1)", "Scorer(2)")),
        ("used_star:stars", ("used_c", "SIZE = 1", "SIZE = 2")),
    ],
)
def test_a_change_of_used_code_is_another_source(digest, name, change):
    before = digest(name)
    assert digest(name) == before
    assert digest(name, change) != before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("used_a:revise", ("used_a", "return x + 1", "return x + 2")),
        ("used_a:revise", ("used_a", "EXAMPLES = []", "EXAMPLES = [1]")),
        ("used_a:revise", ("used_a", "x.upper()", "x.lower()")),
        ("used_a:revise", ("used_a", "    revise(judge(1))", "    revise(judge(2))")),
        ("used_a:revise", ("used_a", "    return deep()", "    return deep()  # a comment")),
        ("used_a:revise", ("used_a", "random.seed(0)", "random.seed(1)")),
        ("used_a:plain", ("used_b", "COUNT = 1", "COUNT = 2")),
        ("used_a:plain", ("used_a", "import helper, other as renamed", "import other as renamed, helper")),
        ("used_a:lazily", ("used_c", "WEIGHT = 2", "WEIGHT = 3")),
        ("used_a:beside", ("used_b", "COUNT = 1", "COUNT = 2")),
    ],
)
def test_a_change_of_other_code_is_the_same_source(digest, name, change):
    before = digest(name)
    assert digest(name, change) == before
