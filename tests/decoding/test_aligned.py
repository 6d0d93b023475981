"""Contrast across vocabularies: the map against sums by hand and over all texts, equal vocabularies, rejected tokenizers."""

import itertools
import json

import pytest
import torch
import zoo
from helpers.vocabularies import byte_level, fallback, merging
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.branches.aligned import AlignedBranch
from contralto.decoding.byte_tokens import ByteTokens
from contralto.decoding.executors.score import score
from contralto.decoding.token_extensions import TokenExtensions
from contralto.decoding.token_map import TokenMap
from contralto.decoding.trace import trace

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}


def _model(size, seed):
    return zoo.build("llama", seed=seed, vocab_size=size, pad_token_id=0, eos_token_id=1)


LARGE, SMALL, SPELLING = byte_level(290), byte_level(270), fallback()


def _inputs(*texts):
    return LARGE(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize("tokenizer", [LARGE, SMALL, SPELLING], ids=["large", "small", "fallback"])
def test_tokens_spell_any_bytes(tokenizer):
    tokens = ByteTokens(tokenizer, "it")
    for text in (b"the cat", " naïve 😀".encode(), "😀".encode()[:3], b"\xff the \xe2", b"<eos>"):
        assert b"".join(tokens.texts[token] for token in tokens.encode(text)) == text


def test_bytes_without_a_token_are_left_out_as_the_tokenizer_does():
    tokenizer = merging(("a", "b"))
    assert ByteTokens(tokenizer, "it").encode(b"abxc") == tokenizer("abxc")["input_ids"] == [4, 3]
    assert ByteTokens(tokenizer, "it").split([b"abxc", b"abc", b"ab"]) == [[], [4, 3], [4]]


def _by_hand(expert, amateur, main, logits):
    """Return the mapped distribution in float64, by sums over dictionaries."""
    p_e, p_a = (each.double().softmax(-1).tolist() for each in (main, logits))
    pairs = {(1, 1), (0, 0), (0, 1)}  # <eos> and <pad> of both; <pad> of the amateur ends texts, too
    for t, text in expert.texts.items():
        equal = [a for a, other in amateur.texts.items() if other == text]
        pairs |= {(a, t) for a in equal} or {(amateur.encode(text)[0], t)}
    for a, text in amateur.texts.items():
        if text not in expert.texts.values():
            pairs.add((a, expert.encode(text)[0]))
    found = [0.0] * len(p_e)
    for a, t in pairs:
        found[t] += p_a[a] * p_e[t] / sum(p_e[u] for b, u in pairs if b == a)
    mapped = {t for _, t in pairs}
    rest, total = sum(p for t, p in enumerate(p_e) if t not in mapped), sum(found)
    result = [found[t] / total * (1 - rest) if t in mapped else p_e[t] for t in range(len(p_e))]
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(("one", "other"), [(LARGE, SMALL), (SMALL, LARGE), (SMALL, SPELLING), (SPELLING, SMALL)])
def test_map_equals_sums_by_hand(one, other):
    expert, amateur = ByteTokens(one, "one"), ByteTokens(other, "other")
    size, noise = len(one) + 3, torch.Generator().manual_seed(0)
    main = 3 * torch.randn(2, size, generator=noise, dtype=torch.float64)
    logits = 3 * torch.randn(2, len(other), generator=noise, dtype=torch.float64)
    made = TokenMap(expert, amateur, (size, len(other)), ([1], [0, 1]))
    mapped = made.resolve(main, logits.log_softmax(-1)).exp()
    for row in range(2):
        torch.testing.assert_close(mapped[row], _by_hand(expert, amateur, main[row], logits[row]), rtol=1e-9, atol=0)
    assert made.unmapped == (int((~made.mapped).sum()), 0 if one is not SMALL or other is not SPELLING else 1)


def test_equal_vocabularies_are_mapped_to_themselves():
    tokens, noise = ByteTokens(LARGE, "it"), torch.Generator().manual_seed(0)
    main, logits = 30 * torch.randn(2, 1, len(LARGE), generator=noise, dtype=torch.float64)
    made = TokenMap(tokens, tokens, (len(LARGE), len(LARGE)))
    mapped = made.resolve(main, logits.log_softmax(-1))
    torch.testing.assert_close(mapped, logits.log_softmax(-1), rtol=0, atol=1e-12)
    ruled_out = made.resolve(main.masked_fill(main < main.max(), -torch.inf), logits.log_softmax(-1))
    torch.testing.assert_close(ruled_out, logits.log_softmax(-1), rtol=0, atol=1e-12)


def test_equal_tokenizers_are_contrasted_as_ever():
    expert, amateur = _model(len(LARGE), 1), _model(len(LARGE), 2)
    inputs = _inputs("the cat thought", "a dog")
    aligned = ContrastiveDecodingLogitsProcessor(
        amateur, vocabulary="aligned", tokenizer=LARGE, amateur_tokenizer=byte_level(290)
    )
    plain = ContrastiveDecodingLogitsProcessor(amateur)
    main = expert(**inputs).logits[:, -1]
    assert torch.equal(aligned(inputs["input_ids"], main), plain(inputs["input_ids"], main))


# ------------------------------------------------------------------------------------------------- against all texts


class _Table:
    """An amateur that knows the distribution of texts: all texts of a length, with random weights."""

    def __init__(self, tokenizer, length):
        noise = torch.Generator().manual_seed(1)
        texts = ["".join(letters) for letters in itertools.product("abc", repeat=length)]
        weights = (2 * torch.randn(len(texts), generator=noise, dtype=torch.float64)).exp().tolist()
        self.texts = {text: weight / sum(weights) for text, weight in zip(texts, weights, strict=True)}
        self.size = len(tokenizer)
        self.rows = self.encoded(tokenizer)
        self._known = {}

    def encoded(self, tokenizer):
        return [(tokenizer(text)["input_ids"], weight) for text, weight in self.texts.items()]

    @staticmethod
    def next(rows, begun, size):
        found = torch.zeros(size, dtype=torch.float64)
        for ids, weight in rows:
            if ids[: len(begun)] == list(begun) and len(ids) > len(begun):
                found[ids[len(begun)]] += weight
        return found / found.sum()

    def read(self, ids, lengths):
        keys = [tuple(ids[:length]) for length in lengths]
        for key in keys:
            if key not in self._known:
                self._known[key] = self.next(self.rows, key, self.size).log()
        return [self._known[key] for key in keys]


MERGES = [
    ([("a", "b")], [("a", "b"), ("b", "c"), ("ab", "c")]),
    ([], [("a", "b"), ("ab", "a"), ("aba", "b")]),
    ([("a", "b"), ("ab", "c"), ("c", "c")], []),
    ([("a", "b"), ("c", "c")], [("b", "c"), ("a", "a"), ("bc", "a")]),
]


def _distances(expert, amateur, rewound, monkeypatch, counts=(1, 2)):
    """Return the distances in total variation between the map and sums over all texts, for all beginnings of `counts` tokens."""
    monkeypatch.setattr("contralto.decoding.branches.aligned.REWOUND", rewound)
    table = _Table(amateur, 6)
    branch = AlignedBranch(_model(len(amateur), 0), tokenizer=expert, amateur_tokenizer=amateur)
    branch.limit_tokens(len(expert))
    rows, found = table.encoded(expert), []
    for begun in sorted({tuple(ids[:count]) for ids, _ in rows for count in counts if len(ids) > count}):
        exact = table.next(rows, begun, len(expert))
        ids = branch.encode(list(begun))
        if len(ids) == 1 or not any(own[: len(ids)] == ids for own, _ in table.rows):
            continue  # the amateur never ends a token there, or there is nothing before the token
        mapped = branch.resolve(exact.log(), branch._predict(table, ids, list(begun))).exp() * (exact > 0)
        mapped = mapped / mapped.sum()
        found.append(float((mapped - exact).abs().sum() / 2))
    return found


@pytest.mark.parametrize("case", range(3))
def test_map_is_exact_where_tokens_of_one_vocabulary_are_joined_in_the_other(case, monkeypatch):
    expert, amateur = (merging(*merges) for merges in MERGES[case])
    assert max(_distances(expert, amateur, 4, monkeypatch)) < 1e-12
    if case < 2:  # the amateur joins tokens of the expert
        assert max(_distances(expert, amateur, 0, monkeypatch)) > 0.5


def test_map_is_exact_within_a_token_of_the_last_two_tokens(monkeypatch):
    expert, amateur = merging(), merging(("b", "c"), ("a", "bc"))  # "ab" is two tokens, "abc" is one
    assert max(_distances(expert, amateur, 4, monkeypatch, counts=(3,))) < 1e-12
    assert max(_distances(expert, amateur, 1, monkeypatch, counts=(3,))) > 0.5


def test_longer_tokens_that_the_expert_splits_elsewhere_are_left_out():
    expert = ByteTokens(merging(("a", "b")), "it")
    b, c, ab = (expert.encode(text)[0] for text in (b"b", b"c", b"ab"))
    extensions = TokenExtensions([(9, b"abc", [ab, c])], expert)
    found = extensions.find(b"ab", ab)
    assert (found.tokens.tolist(), found.next.tolist()) == ([9], [c])
    assert extensions.find(b"ab", b) is None  # a text of "a" and "b" is not inside of it


@pytest.mark.slow
def test_map_is_closer_with_longer_tokens_where_tokens_overlap(monkeypatch):
    expert, amateur = (merging(*merges) for merges in MERGES[3])
    found, without = (_distances(expert, amateur, rewound, monkeypatch) for rewound in (4, 0))
    assert sum(found) / len(found) < 0.24
    assert sum(without) / len(without) > 0.28


# ---------------------------------------------------------------------------------------------------------- processors


def _aligned(amateur, other, **options):
    return ContrastiveDecodingLogitsProcessor(
        amateur, vocabulary="aligned", tokenizer=LARGE, amateur_tokenizer=other, **options
    )


@pytest.mark.parametrize("other", [SMALL, SPELLING], ids=["small", "fallback"])
def test_processor_loop_and_batch_give_the_same_tokens(other):
    expert, amateur = _model(len(LARGE), 1), _model(len(other), 2)
    inputs = _inputs("the cat thought", "a dog")
    method = _aligned(amateur, other)
    output = expert.generate(**inputs, logits_processor=[method], **GREEDY)
    assert torch.equal(output, expert.generate(**inputs, custom_generate=method.loop(), **GREEDY))
    alone = {name: value[:1] for name, value in inputs.items()}
    single = expert.generate(**alone, logits_processor=[_aligned(amateur, other)], **GREEDY)
    assert torch.equal(output[:1, : single.shape[1]], single)
    steps = trace(_aligned(amateur, other), expert, alone, single[0, -10:])
    kept = score(method, expert, alone, single[:, -10:], masked=True)
    torch.testing.assert_close(kept.tokens[0], torch.tensor([step.log_p[-1] for step in steps]))
    beams = {"num_beams": 2, **GREEDY}
    searched = expert.generate(**alone, logits_processor=[method], **beams)
    assert torch.equal(
        searched, expert.generate(**alone, logits_processor=[lambda *args: (method.reset(), method(*args))[1]], **beams)
    )


def test_amateur_reads_its_own_prompts():
    amateur, ids = _model(len(SMALL), 2), _inputs("the cat", "a dog")["input_ids"]
    own = SMALL(["they had", "345"], return_tensors="pt", padding=True)
    branch = AlignedBranch(amateur, tokenizer=LARGE, amateur_tokenizer=SMALL, amateur_inputs=own)
    branch(ids)
    longer = torch.cat([ids, torch.tensor([LARGE(" cat")["input_ids"][:1]] * 2)], dim=1)
    rows = [
        SMALL(text)["input_ids"] + branch.encode(longer[0, -1:].tolist(), begins=False) for text in ("they had", "345")
    ]
    expected = [amateur(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows]
    torch.testing.assert_close(branch(longer)[:, : len(SMALL)].log_softmax(-1), torch.stack(expected))


def test_special_tokens_padding_and_spaces_of_a_row():
    branch = AlignedBranch(_model(len(SPELLING), 2), tokenizer=LARGE, amateur_tokenizer=SPELLING)
    the = LARGE("the")["input_ids"]
    both = branch.encode([*the, LARGE.eos_token_id, *the])  # the end of a turn is not the end of the text
    assert both == [*branch.encode(the), SPELLING.eos_token_id, *branch.encode(the)]
    back = AlignedBranch(_model(len(LARGE), 2), tokenizer=SPELLING, amateur_tokenizer=LARGE)
    assert back.encode([SPELLING.unk_token_id, *SPELLING(" the")["input_ids"]]) == ByteTokens(LARGE, "it").encode(
        b"<unk> the"
    )
    spaced = fallback(prepend=True)
    assert spaced("the")["input_ids"] == SPELLING(" the")["input_ids"]
    read = AlignedBranch(_model(len(spaced), 2), tokenizer=LARGE, amateur_tokenizer=spaced)
    assert read.encode(the) == spaced("the")["input_ids"]
    written = AlignedBranch(_model(len(LARGE), 2), tokenizer=spaced, amateur_tokenizer=LARGE)
    assert written.encode(spaced("the")["input_ids"]) == the
    padded = _inputs("the", "the cat thought")["input_ids"]
    torch.testing.assert_close(branch(padded)[:1], branch(torch.tensor([the])))


def test_rows_may_lack_the_token_that_the_tokenizer_begins_texts_with():
    begun = byte_level(290)
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 0)])
    branch = AlignedBranch(_model(len(SMALL), 2), tokenizer=begun, amateur_tokenizer=SMALL)
    assert begun("the cat")["input_ids"] == [0, *LARGE("the cat")["input_ids"]]
    expected = SMALL("the cat")["input_ids"]
    assert branch.encode(begun("the cat")["input_ids"]) == branch.encode(LARGE("the cat")["input_ids"]) == expected


def test_rows_that_have_ended_are_not_read(monkeypatch):
    branch = AlignedBranch(_model(len(SMALL), 2), tokenizer=LARGE, amateur_tokenizer=SMALL)
    the = LARGE("the cat")["input_ids"]
    ids = torch.tensor([[*the, 1, 0], [*the, *the[:2]]])
    read = []
    monkeypatch.setattr(
        branch, "_predict", lambda _row, ids, _own: read.append(ids) or torch.zeros(len(SMALL) + len(LARGE))
    )
    branch.begin(ids[:, : len(the)], torch.ones(2, len(the)))
    branch(ids)
    assert read == [branch.encode(ids[1].tolist())]


def test_what_cannot_be_right_is_rejected():
    amateur = _model(len(SMALL), 2)
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1})))
    for other in (pieces, words):  # words without their spaces
        with pytest.raises(ValueError, match="neither"):
            ByteTokens(other, "it")
    with pytest.raises(ValueError, match="needs both tokenizers"):
        ContrastiveDecodingLogitsProcessor(amateur, vocabulary="aligned", tokenizer=LARGE)
    with pytest.raises(ValueError, match="alone: leave it out"):
        ContrastiveDecodingLogitsProcessor(amateur, amateur_tokenizer=SMALL)
    with pytest.raises(ValueError, match="must be 'aligned'"):
        ContrastiveDecodingLogitsProcessor(amateur, vocabulary="bytes", tokenizer=LARGE, amateur_tokenizer=SMALL)
    with pytest.raises(ValueError, match="leave it or amateur_window out"):
        _aligned(amateur, SMALL, amateur_window=1)
    lowered = byte_level(270)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="changes text"):
        ByteTokens(lowered, "it")
    state = json.loads(SMALL.backend_tokenizer.to_str())
    assert ByteTokens(SMALL, "it").texts.keys() == set(state["model"]["vocab"].values()) - {0, 1}
