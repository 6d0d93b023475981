"""Every value of a column comes back as it was: the type is Arrow's where there is one, and JSON where there is none."""

import json

import pytest
from datasets import Json, List, Value

from contralto.common.columns import as_dataset, column


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([1, None, 2], Value("int64")),
        ([1, 2.5], Value("float64")),
        (["a", None], Value("string")),
        ([True, False], Value("bool")),
        ([None, None], Value("null")),
        ([[1, 2], None, []], List(Value("int64"))),
        ([[[1], []], [[2, 3]]], List(List(Value("int64")))),
        ([{"a": 1, "b": "x"}, None, {"b": "y", "a": 2}], {"a": Value("int64"), "b": Value("string")}),
        ([[{"a": 1}], [{"a": 2}, {"a": 3}]], List({"a": Value("int64")})),
    ],
)
def test_values_of_one_type_stay_as_they_are(values, feature):
    held, found = column(values)
    assert (held, found) == (values, feature)
    assert as_dataset([{"it": value, "n": 1} for value in values])["it"][:] == values


@pytest.mark.parametrize(
    "values",
    [
        [1, "a", None],
        [True, 1],
        ["a", [1]],
        [{"a": 1}, [1]],
        [{"a": 1}, "a"],
        [[1], {"a": 1}, 2],
        [{"city": "Oslo"}, {"x": 4}],
        [{"a": 1}, {"a": 1, "b": 2}, None],
        [{}, {}],
    ],
)
def test_values_of_several_types_are_json(values):
    held, found = column(values)
    assert found == Json()
    assert [each if each is None else json.loads(each) for each in held] == values
    assert as_dataset([{"it": value, "n": 1} for value in values])["it"][:] == values


def test_nested_values_of_several_types_are_json_at_their_place():
    values = [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {"x": [1, "2"]}}]
    held, feature = column(values)
    assert feature == {"name": Value("string"), "arguments": Json()}
    assert held[1] == {"name": "g", "arguments": '{"x": [1, "2"]}'}
    assert as_dataset([{"it": [value]} for value in values])["it"][:] == [[value] for value in values]


@pytest.mark.parametrize("value", [float("inf"), {"a": [float("nan"), "x"]}, ["\ud800", 1]])
def test_what_neither_holds_is_an_error(value):
    with pytest.raises(ValueError, match="a value that JSON does not hold"):
        column([value, "text", [value]])


def test_integers_beyond_64_bits():
    assert as_dataset([{"it": 2**63}])["it"][:] == [2**63]
    with pytest.raises(ValueError, match=r"^column it: a value that JSON does not hold"):
        as_dataset([{"it": 2**64}])


def test_columns_of_rows():
    found = as_dataset(
        [{"a": 1, "chat_template_kwargs": None}, {"b": "é"}], known={"c": (["x", "y"], Value("large_string"))}
    )
    assert found.column_names == ["a", "chat_template_kwargs", "b", "c"]
    assert found[:] == {"a": [1, None], "chat_template_kwargs": [{}, {}], "b": [None, "é"], "c": ["x", "y"]}
    assert as_dataset([{"a": 1, "c": "z"}], known={"c": (["x"], Value("string"))})[0] == {"a": 1, "c": "x"}
    with pytest.raises(ValueError, match=r"^a data set needs at least one row, and there is none$"):
        as_dataset([])
