"""YAML of recipes: no key twice, and no more values than the file shows."""

from itertools import pairwise

import pytest

from contralto.common.yaml_file import parse_yaml, read_yaml

NINE = "[" + ", ".join(["{0}"] * 9) + "]"
LAUGHS = "\n".join(
    [f"a: &a {NINE.format('x')}", *(f"{n}: &{n} {NINE.format('*' + m)}" for m, n in pairwise("abcdefgh"))]
)
MERGES = "\n".join(
    ["a: &a {k: 1, l: 2}", *(f"{n}: &{n} {{<<: [{', '.join(['*' + m] * 9)}]}}" for m, n in pairwise("abcdefghijklm"))]
)
"""Half a trillion pairs of keys and values, were they made."""
WRONG = {
    "twice": ("seed: 1\nrows: a\nseed: 2\n", r"the key 'seed' is given twice, first in line 1 \(line 3, column 1\)"),
    "twice within": ("roles:\n  target: {model: a, model: b}\n", "the key 'model' is given twice"),
    "two roles": ("roles:\n  target: {model: a}\n  target: {model: b}\n", "the key 'target' is given twice"),
    "quoted": ("seed: 1\n'seed': 2\n", "the key 'seed' is given twice"),
    "laughs": (LAUGHS, "too large: at most 100,000 values"),
    "merges": (MERGES, r"is not YAML: merges \(<<\) copy more than 100,000 keys"),
    "a merge of itself": ("a: &a {<<: *a}", "is nested too deeply|is too large|is not YAML"),
    "itself": ("checks: &x {a: *x}", "too large"),
    "itself in a list": ("&x [*x]", "too large"),
    "deep": ("[" * 3000 + "]" * 3000, "nested too deeply"),
    "tab": ("a:\n\tb: 1", "is not YAML"),
    "no such day": ("a: 2020-13-45", "is not YAML: month must be"),
    "a list as a mapping": ("a: !!map [1]", "is not YAML: expected a mapping"),
    "a list as a key": ("? [a]\n: b", "is not YAML: .*unhashable key"),
    "code": ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_yaml_is_one_sentence(name):
    text, message = WRONG[name]
    with pytest.raises(ValueError, match=r"^r.yaml (is not YAML|is too large|is nested).*") as error:
        parse_yaml(text, "r.yaml")
    assert error.match(message)
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_yaml_is_not_repeated():
    """A secret may stand there."""
    with pytest.raises(
        ValueError, match=r"s.yaml is not YAML: mapping values are not allowed here \(line 2, column 18\)$"
    ):
        parse_yaml("port: 1\napi-key: sk-12345: 8001", "s.yaml")


def test_merges_and_aliases_are_yaml_as_ever(tmp_path):
    text = (
        "base: &b {engine: openai, model: m}\none: *b\ntwo: {<<: *b, model: n}\nthree: {<<: [*b, {k: 1}], model: o}\n"
    )
    (tmp_path / "r.yaml").write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    base = {"engine": "openai", "model": "m"}
    two, three = base | {"model": "n"}, base | {"k": 1, "model": "o"}
    assert read_yaml(tmp_path / "r.yaml") == {"base": base, "one": base, "two": two, "three": three}


def test_the_most_keys_that_merges_copy():
    """400 times the same 250 keys."""
    wide = "a: &a {" + ", ".join(f"k{i}: 0" for i in range(250)) + "}\n"
    assert len(parse_yaml(f"{wide}b: {{<<: [{', '.join(['*a'] * 400)}]}}", "r.yaml")["b"]) == 250
    with pytest.raises(ValueError, match="copy more than"):
        parse_yaml(f"{wide}b: {{<<: [{', '.join(['*a'] * 401)}]}}", "r.yaml")


def test_the_largest_that_is_read():
    """A list of 271 lists of 368 values is 100,000 values."""
    wide = "[&a [" + ", ".join("0" * 368) + "]" + ", *a" * 270
    assert len(parse_yaml(wide + "]", "r.yaml")) == 271
    with pytest.raises(ValueError, match="too large"):
        parse_yaml(wide + ", 0]", "r.yaml")
    assert parse_yaml("[" * 50 + "0" + "]" * 50, "r.yaml")
    with pytest.raises(ValueError, match="too large"):
        parse_yaml("[" * 51 + "0" + "]" * 51, "r.yaml")
