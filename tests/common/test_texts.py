"""Texts of others: surrogates, control characters, secrets."""

import json
import sys
from types import MappingProxyType

import pytest

from contralto.common import texts


def test_lone_surrogates():
    assert texts.clean("a\ud800b\udfffc\ud7ff\ue000") == "a\ufffdb\ufffdc\ud7ff\ue000"
    deep = [{"a": [1, ({"b": "x\udc00"},)]}]
    assert texts.has_lone_surrogate(deep)
    assert texts.has_lone_surrogate({"x\ud800": 1})
    assert texts.has_lone_surrogate({("x", "\ud800"): 1})
    assert texts.has_lone_surrogate(MappingProxyType({"x": [object(), MappingProxyType({"y": ("\udfff",)})]}))
    assert not texts.has_lone_surrogate([object(), b"\xed\xa0\x80", "\\ud800", float("nan")])
    assert not texts.has_lone_surrogate([{"a": [1, None, ("é",)]}, 2.5, {"😀": "😀"}])


def test_control_characters_are_shown():
    assert texts.printable("a\tb\nc\x1b[2J\x07\x7f\x9b\u202e\u2066") == r"a" "\tb\nc" r"\x1b[2J\x07\x7f\x9b\u202e\u2066"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"headers": [{"X-Api-Key": "1"}]}, "X-Api-Key"),
        ({"a": ({"hf_token": "1"},)}, "hf_token"),
        ({"Authorization": "Bearer 1"}, "Authorization"),
        ({"api_key": "", "token": None, "max_tokens": 5, 7: "x", "tokens": ["x"], "model": "m"}, None),
        ("api_key", None),
    ],
)
def test_names_of_secrets(value, name):
    assert texts.secret_name(value) == name


def test_lines_of_values():
    assert texts.short(" a  long\n story") == "a long story"
    assert texts.short("x" * 300) == "x" * 300
    assert texts.short("x" * 301) == "x" * 297 + "..."
    assert texts.short("12345", 4) == "1..."
    assert texts.short({"a": [1, "é"]}) == json.dumps({"a": [1, "é"]})
    assert texts.short({1: object}).startswith('{"1": "<class')


def test_secrets_are_hidden(monkeypatch):
    key = 'sk/01234"6789'
    hidden = texts.Secrets("", key)
    assert hidden.hide(f"401: {key}.") == "401: ***."
    assert hidden.hide("?key=sk%2F01234%226789&x") == "?key=***&x"
    assert hidden.hide(json.dumps({"key": key})) == '{"key": "***"}'
    assert (
        hidden.hide("it ends in sk/0123") == "it ends in sk/0123"
    )  # seven characters are too few to be told from others
    assert hidden.hide('it ends in sk/01234"6 and sk/01234"') == "it ends in *** and ***"
    assert texts.Secrets("EMPTY").hide("EMPTY") == "***"
    assert texts.Secrets("EMPTY").hide_in_completion("EMPTY") == "EMPTY"
    assert hidden.hide_in_completion(f"{key} it") == "*** it"
    assert [each.occur_in(f"a {key} EMPTY") for each in (hidden, texts.Secrets("EMPTY"))] == [True, False]
    monkeypatch.setenv("A_TEST_KEY", "abcdefgh")
    monkeypatch.setenv("B_TEST_TOKEN", "short")
    monkeypatch.setenv("TEST_NAME", "plain text")
    monkeypatch.setenv("TEST_PROXY", "http://me:pass-word@proxy:8080")
    monkeypatch.setenv("A_FILE_KEY", "/home/me/key.json")
    shown = "abcdefgh short plain text http://me:pass-word@proxy:8080 /home/me/model"
    hidden = "*** short plain text http://me:***@proxy:8080 /home/me/model"
    assert texts.Secrets.of_process().hide(shown) == hidden
    argv = ["contralto", "--api-key", "first-key", "other-key", "--hub_token=the-token", "--pad_token", "<|im_end|>"]
    monkeypatch.setattr(sys, "argv", [*argv, "--model", "http://me:pass-wort@host/model"])
    shown = "first-key other-key the-token <|im_end|> http://me:pass-wort@host/model"
    assert texts.Secrets.of_process().hide(shown) == "*** *** *** <|im_end|> http://me:***@host/model"
    assert texts.Secrets("12345678").hide_in_completion("a 12345678") == "a ***"
    two = texts.Secrets("first-0123456789", "second-0123456789")
    assert two.hide("second-01 and first-01 and second-0123") == "*** and *** and ***"
    assert two.hide("first-01second-01") == "******"
    for longer in ("abcdefghij", "Aabcdefgh"):
        assert texts.Secrets("abcdefgh", longer).hide(longer) == "***"


class _Tokenizer:
    bos_token, bos_token_id = "<s>", 1

    def __init__(self, adds):
        self.adds = adds

    def __call__(self, _text):
        return {"input_ids": self.adds}


def test_the_beginning_of_a_prompt():
    for adds in ([1], [1, 2]):
        assert texts.without_bos("<s>a<s>", _Tokenizer(adds)) == "a<s>"
    for adds in ([], [2]):
        assert texts.without_bos("<s>a", _Tokenizer(adds)) == "<s>a"
    without = _Tokenizer([1])
    without.bos_token = None
    assert texts.without_bos("<s>a", without) == "<s>a"
