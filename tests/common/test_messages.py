"""Messages: what is a conversation, where its question stands, and how another branch reads it."""

import pytest

from contralto.common import messages

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
BEGUN = {"role": "assistant", "content": "Because"}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is this?"}
SEEN = {"role": "user", "content": [IMAGE, TEXT]}


@pytest.mark.parametrize(
    "conversation",
    [
        [USER],
        [SYSTEM, USER, BEGUN],
        [SEEN],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
        [{"role": "user", "content": []}],
        [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
    ],
)
def test_conversations(conversation):
    messages.check_messages(conversation, "a.jsonl:1")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Why?", ": messages must be a list of at least one message, not 'Why?'"),
        ([], ": messages must be a list of at least one message, not []"),
        ((USER,), ": messages must be a list"),
        (["Why?"], ", message 1: a message has a role and a content, not 'Why?'"),
        ([USER, {"content": "Why?"}], ", message 2: a message has a role and a content, not {'content': 'Why?'}"),
        ([USER, {"role": 1, "content": "Why?"}], ", message 2: a message has a role"),
        ([{"role": "user"}], ", message 1: content must be a string or a list of parts"),
        ([{"role": "user", "content": None}], "'text': '...'}, not None"),
        ([{"role": "user", "content": 7, "tool_calls": [1]}], "'text': '...'}, not 7"),
        (
            [{"role": "user", "content": [TEXT, "x"]}],
            ", message 1: a part of the content has a type, text or image, and",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "and this one is {'text': 'x'}"),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            ": a part of type 'audio' cannot be read: text and image can",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], ": a part of type text needs a text, not None"),
        ("x" * 78, f", not '{'x' * 78}'"),
        ("x" * 79, f", not '{'x' * 76}..."),
    ],
)
def test_other_values_are_rejected(value, said):
    with pytest.raises(ValueError, match=r"^a.jsonl:1") as error:
        messages.check_messages(value, "a.jsonl:1")
    assert said in str(error.value)


def test_the_question():
    other = {"role": "user", "content": "Where?"}
    assert messages.text_of("Who?") == "Who?"
    assert messages.text_of([SYSTEM, USER, BEGUN, other]) == "Where?"
    assert messages.text_of([SYSTEM, USER, BEGUN]) == "Why?"
    assert messages.text_of([SEEN]) == "What is this?"
    assert messages.text_of([BEGUN, {**BEGUN, "content": "of"}]) == "Because"
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages.text_of([{"role": "user", "content": two}]) == "ab"
    assert messages.text_of([{"role": "user", "content": [two[0], IMAGE, two[1]]}]) == "a b"
    assert messages.text_of([{"role": "user", "content": None}]) == ""
    assert [messages.begins_answer(each) for each in ("a", [USER], [USER, BEGUN])] == [False, False, True]


def test_texts_of_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "user", "content": parts, "name": "n"}, USER, {"role": "assistant", "tool_calls": [1]}]
    found = messages.flattened(given)
    assert found == [{"role": "user", "content": "ab", "name": "n"}, USER, {"role": "assistant", "tool_calls": [1]}]
    assert found[1] is not USER


def test_images_have_places():
    assert messages.with_images([SYSTEM, USER, USER], 2) == [
        SYSTEM,
        {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Why?"}]},
        USER,
    ]
    assert messages.with_images([SEEN], 1) == [SEEN]
    assert messages.with_images([USER], 0) == [USER]
    assert messages.with_images([{"role": "user", "content": [TEXT]}], 1) == [SEEN]
    assert messages.with_images([SYSTEM, BEGUN], 1)[1]["content"] == [IMAGE, {"type": "text", "text": "Because"}]
    assert messages.with_images([{"role": "user", "content": None}], 1)[0]["content"][1] == {"type": "text", "text": ""}
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"^{count} images for 1 places in the messages: give each image a part"):
            messages.with_images([SEEN], count)
    held = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}, TEXT]}]
    with pytest.raises(ValueError, match=r"^a part of type image_url is not read here"):
        messages.with_images(held, 0)
    assert messages.with_images(held, 0, own=True) == held
    assert USER["content"] == "Why?"


def test_another_prompt_takes_the_place_of_the_question():
    assert messages.contrasted("Who?", "No. {prompt}") == "No. Who?"
    assert messages.contrasted([SYSTEM, USER, BEGUN], "{prompt}!") == [SYSTEM, {**USER, "content": "Why?!"}, BEGUN]
    assert messages.contrasted([SEEN], "{prompt}?")[0]["content"] == [IMAGE, {**TEXT, "text": "What is this??"}]
    assert messages.contrasted([{"role": "user", "content": [TEXT]}], "x")[0]["content"] == "x"
    assert messages.contrasted([USER], "{a} {prompt}", {"a": 1}) == [{"role": "user", "content": "1 Why?"}]
    assert USER["content"] == "Why?"


def test_names_in_braces():
    assert messages.fill("{prompt} {x} {}", "Why?") == "Why? {x} {}"
    assert messages.fill("{x}", "Why?", {"x": "{prompt}"}) == "{prompt}"
    assert messages.fill("{prompt}", "{x}", {"x": 1, "prompt": 2}) == "{x}"
    with pytest.raises(
        ValueError, match=r"^contrast_prompt has {y}, and the documents have no such field: they have prompt, x$"
    ):
        messages.fill("{y}", "Why?", {"x": 1})
