"""Spans of two tokenizers: the same bytes on both sides, whatever the tokens are; what is in none, and what each merge takes."""

import itertools
import random

import pytest
import torch
from helpers.vocabularies import byte_level, fallback, merging
from tokenizers import AddedToken

from contralto import testbed
from contralto.align.trainers.text_spans import Reading, in_order, read_completion, same_bytes, spans_of
from contralto.decoding.byte_tokens import ByteTokens
from contralto.decoding.rereading import reread
from contralto.decoding.token_map import equal_tokens

TEXTS = ["the cat thought", " naïve 😀 hats", "12 hats\n\n and  345", "the", "😀😀"]
TOKENIZERS = {
    "large": byte_level(290),
    "small": byte_level(262),
    "fallback": fallback(),
    "spaced": fallback(prepend=True),
}
TOKENS = {name: ByteTokens(tokenizer, name) for name, tokenizer in TOKENIZERS.items()}
EOS = 1
PAIRS = [pytest.param(*pair, id="-".join(pair)) for pair in itertools.permutations(TOKENS, 2)]


def _read(own, other, ids, **options):
    return read_completion(TOKENS[own], TOKENS[other], ids, **{"ends": {EOS}, "end": EOS} | options)


def _spelled(tokens, ids, run):
    return b"".join(tokens.texts[ids[i]] for i in run)


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_the_same_bytes_and_all_of_the_text(own, other, text):
    ids = TOKENS[own].encode(text.encode())
    reading = _read(own, other, [*ids, EOS])
    assert reading.ids == [*TOKENS[other].encode(text.encode()), EOS]
    *runs, end = reading.runs
    assert end == (range(len(ids), len(ids) + 1), range(len(reading.ids) - 1, len(reading.ids)))
    for run, of_teacher in runs:
        assert _spelled(TOKENS[own], ids, run) == _spelled(TOKENS[other], reading.ids, of_teacher) != b""
    for side, count in ((0, len(ids)), (1, len(reading.ids) - 1)):  # without gaps, and as short as they can be
        assert [i for each in runs for i in each[side]] == list(range(count))
    inner = [
        {len(b) for b in itertools.accumulate(TOKENS[name].texts[t] for t in tokens)}
        for name, tokens in ((own, ids), (other, reading.ids[:-1]))
    ]
    assert len(runs) == len(inner[0] & inner[1])


def test_tokens_that_hold_a_part_of_a_character_are_exact():
    """The student's four bytes of an emoji against one token, and against two tokens of other parts."""
    emoji = "😀".encode()
    own = TOKENS["fallback"]
    assert len(own.encode(emoji)) == 4
    joined = byte_level(290, ["😀 😀 😀"])
    (run,) = read_completion(own, ByteTokens(joined, "it"), own.encode(emoji), ends=(), end=None).runs
    assert run == (range(4), range(1))
    cut = [own.encode(emoji)[:3], own.encode(emoji)[3:]]  # a completion that was cut within the character
    assert _read("fallback", "small", cut[0]).runs == in_order(3, 3)


def test_random_bytes():
    rng = random.Random(0)
    for _ in range(50):
        data = bytes(rng.randrange(256) for _ in range(12))
        ids = TOKENS["large"].encode(data)
        reading = _read("large", "fallback", ids)
        assert b"".join(TOKENS["fallback"].texts[token] for token in reading.ids) == data
        assert sum(len(run) for run, _ in reading.runs) == len(ids)


def test_special_tokens_of_one_vocabulary_are_in_no_span_and_read_as_characters():
    own, other = byte_level(290, special=["<think>", "<both>"]), byte_level(270, special=["<both>"])
    (think, both), the = own.convert_tokens_to_ids(["<think>", "<both>"]), own(" the")["input_ids"]
    tokens = ByteTokens(own, "own"), ByteTokens(other, "other")
    reading = read_completion(*tokens, [*the, think, both, *the, EOS, *the], ends={EOS}, end=EOS)
    text, name = tokens[1].encode(b" the"), tokens[1].encode(b"<think>")
    assert reading.ids == [*text, *name, 2, *text, EOS]  # nothing is read after the end
    places = [[i for run in reading.runs for i in run[side]] for side in (0, 1)]
    assert places[0] == [i for i in range(2 * len(the) + 3) if i != len(the)]
    assert places[1] == [i for i in range(len(reading.ids)) if not 0 <= i - len(text) < len(name)]


def test_without_an_end_of_its_own_the_teacher_is_not_compared_at_the_end():
    assert _read("large", "small", [EOS], end=None) == Reading([], [])


def test_spaces_after_special_tokens_are_no_text():
    """The testbed's tokenizer, and Llama's, put a space after each; others do not."""
    words, spaced = ByteTokens(testbed.tokenizer(), "it"), TOKENS["spaced"]
    ids = testbed.tokenizer()("finds 4", add_special_tokens=False)["input_ids"]
    assert words.texts[ids[0]] == b" finds"
    plain = read_completion(words, TOKENS["small"], ids, ends=(), end=None, after_special=(True, True))
    assert plain.ids == TOKENS["small"].encode(b"finds 4")
    assert plain.runs[0] == (range(1), range(len(plain.ids) - 2))
    inside = read_completion(words, TOKENS["small"], ids, ends=(), end=None)
    assert inside.ids == TOKENS["small"].encode(b" finds 4")
    both = read_completion(words, spaced, ids, ends=(), end=None, after_special=(True, True))
    assert both.ids == spaced.encode(b" finds 4")
    back = read_completion(TOKENS["small"], words, plain.ids, ends=(), end=None, after_special=(True, True))
    assert back.ids == ids
    assert [len(run) for run, _ in back.runs] == [len(run) for _, run in plain.runs]


def test_text_that_the_teacher_cannot_spell_is_in_no_span():
    """A word that the testbed does not know; letters without a token."""
    words = ByteTokens(testbed.tokenizer(), "it")
    ids = TOKENS["small"].encode(b" finds zebras")
    assert read_completion(TOKENS["small"], words, [*ids, EOS], ends={EOS}, end=3) == Reading(
        [*words.encode(b" finds"), 3], [(range(len(ids), len(ids) + 1), range(1, 2))]
    )
    letters = ByteTokens(merging(("a", "b")), "it")
    assert read_completion(TOKENS["small"], letters, TOKENS["small"].encode(b"abxc"), ends=(), end=None).runs == []


def test_prompts_are_read_in_the_other_tokens():
    """What begins texts is exchanged, spaces after special tokens too; special tokens of one vocabulary are spelled."""
    words, small = ByteTokens(testbed.tokenizer(), "it"), TOKENS["small"]
    ids = testbed.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Mia has 4"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert reread(words, small, ids) == small.encode(b"<|user|>Mia has 4<|assistant|>")
    assert reread(small, words, small.encode(b" Mia has 4")) == testbed.tokenizer()("Mia has 4")["input_ids"]
    chat = byte_level(290, special=["<|user|>"])
    read = reread(words, ByteTokens(chat, "it"), ids)
    assert read[0] == chat.convert_tokens_to_ids("<|user|>")
    back = reread(ByteTokens(chat, "it"), words, [2, *chat("Mia has 4")["input_ids"]])
    assert back == [2, *ids[1:5]]


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_spans_of_a_batch(merge):
    """Places go on from completion to completion; the row, the other tokens and how many tokens are compared."""
    first = [(range(1), range(2)), (range(1, 3), range(2, 3))]
    second = [(range(1), range(1, 2)), (range(1, 2), range(2, 4))]
    spans = spans_of([first, [], second], [(3, 4), (0, 0), (2, 4)], merge)
    assert spans.row.tolist() == [0, 0, 2, 2]
    assert spans.tokens.tolist() == [3, 0, 2]
    own = {"observed": ([0, 1, 3, 4], [[2], [1]]), "bayesian": ([0, 2, 3, 4], [[1], [1]])}[merge]
    assert (spans.student.tolist(), spans.student_others.tolist()) == own
    other = {"observed": ([0, 2, 5, 6], [[1, 7], [0, 3]]), "bayesian": ([1, 2, 5, 7], [[0, 6], [0, 3]])}[merge]
    assert (spans.teacher.tolist(), spans.teacher_others.tolist()) == other
    assert all(each.dtype == torch.long for each in spans)


def test_tokens_without_bytes_belong_to_the_span_after_them():
    assert same_bytes([0, 3], [3]) == [(range(2), range(1))]
    assert same_bytes([3, 0], [3]) == [(range(1), range(1))]
    assert same_bytes([1, 0, 2], [1, 2]) == [(range(1), range(1)), (range(1, 3), range(1, 2))]
    assert same_bytes([], []) == same_bytes([2], [3]) == []


def test_equal_tokens_are_the_same_bytes_or_names():
    """One to one, in both directions; of two tokens of the same bytes that which the tokenizer takes."""
    for one, other in itertools.permutations(TOKENS, 2):
        pairs = equal_tokens(TOKENS[one], TOKENS[other])
        names = ({at: name for name, at in TOKENS[each].special.items()} for each in (one, other))
        own, of_other = (TOKENS[each].texts | name for each, name in zip((one, other), names, strict=True))
        assert all(own[a] == of_other[b] for a, b in pairs)
        assert pairs == sorted((a, b) for b, a in equal_tokens(TOKENS[other], TOKENS[one]))
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        whole = set(TOKENS[one].texts.values()) & set(TOKENS[other].texts.values())
        assert len(pairs) == len(whole) + len(TOKENS[one].special.keys() & TOKENS[other].special.keys())
    doubled = dict(zip("te", TOKENIZERS["fallback"].convert_tokens_to_ids(["t", "<0x74>"]), strict=True))
    taken = dict(equal_tokens(TOKENS["fallback"], TOKENS["small"]))
    assert doubled["t"] in taken
    assert doubled["e"] not in taken


def test_added_tokens_are_text():
    tokenizer = byte_level(262)
    tokenizer.add_tokens([AddedToken(" the cat", special=False)])
    reading = read_completion(ByteTokens(tokenizer, "it"), TOKENS["small"], [len(tokenizer) - 1], ends=(), end=None)
    assert reading.runs == [(range(1), range(len(TOKENS["small"].encode(b" the cat"))))]
