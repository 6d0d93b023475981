"""Models that think before they answer: stopping, and separating the answer from the thought."""

import random
from functools import cache
from itertools import islice

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from contralto import testbed
from contralto.decoding.stopping import StopStringsAfterThought
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.thinking import answer_text, end_of_thought
from contralto.testbed import worlds

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
END, STOP = "</think>", "\n\n"
PIECES = ["a", "7", " ", "\n", STOP, END, "</th", "ink>", "<", "é", f"{END}{STOP}b", f"{END}\n", "\nQ", f"x{END}", "."]


@cache
def spelled():
    """A tokenizer of bytes with some longer tokens, which begin and end within thoughts, answers and stop strings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_tokens([piece for piece in PIECES if len(piece) > 2])
    return tokenizer


def _ids(text, tokenizer=None):
    return (tokenizer or spelled()).encode(text, add_special_tokens=False)


def _ends(prompts, rows, strings, end=END, tokenizer=None):
    """After how many tokens each row is over, as `generate()` asks step by step."""
    tokenizer = tokenizer or spelled()
    width, found = max(map(len, prompts)), [None] * len(rows)
    filled = [[_ids("a")[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    criterion = StopStringsAfterThought(tokenizer, strings, width, end=end)
    for length in range(1, max(map(len, rows)) + 1):
        grown = [p + (row + [_ids("a")[0]] * length)[:length] for p, row in zip(filled, rows, strict=True)]
        for i, over in enumerate(criterion(torch.tensor(grown), None).tolist()):
            found[i] = length if over and found[i] is None and length <= len(rows[i]) else found[i]
    return found


def _by_definition(row, strings, end=END, before=""):
    """The same, from the whole text at every step."""
    for length in range(1, len(row) + 1):
        _, ends, answer = (before + spelled().decode(row[:length])).rpartition(end)
        if ends and any(string in answer.lstrip() for string in strings):
            return length
    return None


@pytest.mark.parametrize(
    ("text", "strings", "left"),
    [
        (f"one{STOP}two{END}{STOP}three{STOP}four", [STOP], "three"),
        (f"{STOP}{END}7{STOP}", [STOP], "7"),
        (f"a{END}\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\nb{STOP}", [STOP], "b"),
        (f"a{END}b\n\nc", ["Q:", "\n\n"], "b"),
        (f"Q: a{END}b\nQ: c", [STOP, "Q:"], "b\n"),
        (f"a{END}{'b' * 60}{STOP}", [STOP], "b" * 60),
    ],
)
def test_stop_strings_count_after_the_thought(text, strings, left):
    row = _ids(text)
    (end,) = _ends([_ids("a")], [row], strings)
    assert end == _by_definition(row, strings)
    assert answer_text(row[:end], spelled().decode, strings, END) == left


def test_a_thought_without_end_stops_nowhere():
    assert _ends([_ids("a")], [_ids(f"one{STOP}two{STOP}")], [STOP]) == [None]


@pytest.mark.slow
@pytest.mark.parametrize("end", [END, None])
def test_every_step_is_as_the_whole_text_says(end):
    """Random rows of pieces that straddle tokens, ends and stop strings, in batches."""
    choose = random.Random(3)
    strings = [STOP, "Q", "7a"]
    end = end or _ids("7")[0]
    for _ in range(60):
        rows = [_ids("".join(choose.choices(PIECES, k=choose.randint(1, 30)))) for _ in range(3)]
        expected = [_by_definition(row, strings, end if isinstance(end, str) else "7") for row in rows]
        assert _ends([_ids("a")] * 3, rows, strings, end=end) == expected


def test_prompts_that_close_the_thought():
    """As chat templates do to switch thinking off; another row of the batch still thinks, and an open thought is none."""
    prompts = [_ids(f"Q<think>{STOP}{END}{STOP}"), _ids("Q<think>\n"), _ids(f"x{END} Q: ")]
    row = _ids(f"one{STOP}two{END}three{STOP}")
    assert _ends(prompts, [row] * 3, [STOP]) == [
        _by_definition(row, [STOP], before=END),
        _by_definition(row, [STOP]),
        _by_definition(row, [STOP]),
    ]
    assert _ends(prompts, [row] * 3, [STOP])[0] < len(row) - 8


def test_reordered_rows_are_read_anew():
    """Beams change places from step to step."""
    prompt, thinking, over = _ids("a"), _ids(f"b{STOP}"), _ids(f"{END}c")
    width = max(len(thinking), len(over))
    thinking, over = (row + _ids("d") * (width - len(row)) for row in (thinking, over))
    criterion = StopStringsAfterThought(spelled(), [STOP], len(prompt), end=END)
    assert criterion(torch.tensor([prompt + thinking, prompt + over]), None).tolist() == [False, False]
    swapped = [prompt + over + _ids(STOP), prompt + thinking + _ids(STOP)]
    assert criterion(torch.tensor(swapped), None).tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------------- in lm-eval


@cache
def lm(**arguments):
    return ContraltoLM("testbed:expert", device="cpu", batch_size=3, **arguments)


def _asks(model, until, count=3, **more):
    asked = {"until": until, "max_gen_toks": 60, **more}
    texts = [
        model.apply_chat_template([{"role": "user", "content": problem.question}])
        for problem in islice(worlds.problems(5, "test"), count)
    ]
    return [Instance("generate_until", {}, (text, asked), 0) for text in texts]


def _thinking(end, method=None):
    model = lm().decoding_by(**(method or {}))
    model.think_end_token = end_of_thought(end, model.tokenizer)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "end"),
    [
        ({}, "####"),
        ({"method": "cd", "amateur": "testbed:amateur"}, "id"),
        ({"method": "scd", "amateur": "testbed:amateur"}, "####"),
        ({"method": "search"}, "id"),
    ],
    ids=["none", "cd", "scd", "search"],
)
def test_answers_come_after_the_thought(method, end):
    """The testbed's solutions hold full stops before the mark of their result."""
    end = testbed.tokenizer().convert_tokens_to_ids("▁####") if end == "id" else end
    plain, thinking = lm().decoding_by(**method), _thinking(end, method)
    whole = plain.generate_until(_asks(plain, []), True)
    assert all("." in text.split("####")[0] for text in whole)
    stopped = thinking.generate_until(_asks(plain, [".", "1", "3"]), True)
    assert stopped == [text.split("####")[1].strip().split("1")[0].split("3")[0] for text in whole]


def test_answers_do_not_depend_on_the_batch():
    thinking = _thinking("####")
    together = thinking.generate_until(_asks(thinking, ["."]), True)
    assert together == [thinking.generate_until([ask], True)[0] for ask in _asks(thinking, ["."])]


def test_beams():
    thinking = _thinking("####")
    asks = _asks(thinking, ["."], count=2, num_beams=2)
    assert all(text.strip().isdigit() for text in thinking.generate_until(asks, True))


def test_endless_thoughts_are_counted(caplog):
    thinking = _thinking("</think>")
    said = thinking.generate_until(_asks(thinking, ["."], count=2), True)
    plain = lm().generate_until(_asks(thinking, ["."], count=2), True)
    assert said == plain  # as lm-eval's own models, since a model may answer without a thought
    assert "2 of 2 answers hold no think_end_token" in caplog.text


def test_a_row_ends_soon_after_its_answer():
    """Stop strings are not only cut off at the end: nothing is written after them."""
    thinking = _thinking(".")
    thinking.generate_until(_asks(thinking, ["####", "="], count=3), True)
    plain = lm().decoding_by()
    plain.generate_until(_asks(plain, [], count=3), True)
    assert thinking.generated < 3 / 4 * plain.generated


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (True, "must be a string or the id of a token, not True"),
        (1.5, "must be a string or the id of a token, not 1.5"),
        ("", "is an empty string"),
        (9999, "is 9999, and the tokenizer has tokens 0 to 159"),
        (-1, "is -1, and the tokenizer"),
        ("<eos>end", "holds the special token '<eos>', which answers are decoded without"),
    ],
)
def test_wrong_ends(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        end_of_thought(given, testbed.tokenizer())


def test_a_special_token_is_looked_for_by_its_id():
    tokenizer = testbed.tokenizer()
    end = end_of_thought("<|user|>", tokenizer)
    tokens = tokenizer("3 + 4 <|user|> 7", add_special_tokens=False)["input_ids"]
    assert "<|user|>" not in tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer_text(tokens, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), [], end) == "7"


def test_the_last_thought_is_the_one_that_counts():
    spell = {1: "a", 2: "b", 3: "c", 9: "|"}
    tokens = [1, 9, 2, 9, 3]
    assert answer_text(tokens, lambda ids: "".join(spell[each] for each in ids), [], 9) == "c"
