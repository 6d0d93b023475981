"""Padding is never read as text: the loop passes the mask on, and a processor rejects ambiguous padding.

Reference: float64, each row alone and unpadded.
"""

import copy

import pytest
import torch
import zoo
from oracles import decoding as reference
from transformers import AutoModelForTokenClassification, GPT2Config

from contralto import decoding
from contralto.decoding.branches import InputBranch, ModelBranch
from contralto.decoding.branches.padding import KnownTokens, find_padding, padding_of
from contralto.decoding.executors.score import score

STEPS = 6
RULE = {"beta": 0.7, "alpha": 0.05}
PADDED = {
    "input_ids": torch.tensor([[2, 5, 9, 11, 20], [0, 0, 2, 30, 12], [0, 2, 7, 30, 12]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
}


def without_pad_token(family="llama", **how):
    """A model as Llama's: a beginning and an end token, but no pad token."""
    model = zoo.build(family, hidden=16, seed=2, **how)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    return model


def alone(inputs):
    return [row[mask == 1] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def expected(expert, amateur, inputs):
    doubles = [copy.deepcopy(model).double() for model in (expert, amateur)]

    def scores(ids):
        main, other = (reference.next_logits(model, ids) for model in doubles)
        other += [-torch.inf] * (len(main) - len(other))
        return torch.tensor(reference.contrastive_decoding(main, other, **RULE))

    return [reference.greedy(scores, row, STEPS, zoo.EOS) for row in alone(inputs)]


def run(expert, amateur, inputs, name, *, masked=False, **how):
    mask = {"attention_mask": inputs["attention_mask"]} if masked else {}
    executor = {
        "processor": lambda: {
            "logits_processor": [decoding.ContrastiveDecodingLogitsProcessor(amateur, **RULE, **mask)]
        },
        "loop": lambda: {
            "custom_generate": decoding.ContrastiveDecodingLogitsProcessor(amateur, **RULE, **mask).loop()
        },
        "speculative": lambda: {
            "custom_generate": decoding.SpeculativeContrastiveDecoding(amateur, draft_length=2, **RULE)
        },
    }[name]()
    found = expert.generate(**inputs, **executor, max_new_tokens=STEPS, do_sample=False, **how)
    rows = found[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(zoo.EOS) + 1] if zoo.EOS in row else row for row in rows]


@pytest.fixture(scope="module")
def expert():
    return zoo.build("llama", seed=1)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "mistral", "opt", "bloom", "mamba"))],
)
def test_an_amateur_without_a_pad_token(expert, family):
    amateur = without_pad_token(family)
    wanted = expected(expert, amateur, PADDED)
    assert run(expert, amateur, PADDED, "loop") == wanted
    assert run(expert, amateur, PADDED, "processor", masked=True) == wanted
    if family != "mamba":
        assert run(expert, amateur, PADDED, "speculative") == wanted
    with pytest.raises(
        ValueError, match="has no pad token, so padding cannot be distinguished from text in several prompts"
    ):
        run(expert, amateur, PADDED, "processor")


@pytest.mark.parametrize("name", ["processor", "loop", "speculative"])
def test_a_pad_token_that_only_the_expert_knows(name):
    """`[PAD]` was added to the expert: it pads the prompts, and the rows that end first."""
    pad = zoo.VOCAB
    expert = zoo.build("llama", seed=1, vocab_size=pad + 1, pad_token_id=pad)
    with torch.no_grad():
        expert.lm_head.weight[pad] = 0
    amateur = without_pad_token()
    inputs = {**PADDED, "input_ids": PADDED["input_ids"].masked_fill(PADDED["attention_mask"] == 0, pad)}
    ended = expected(expert, amateur, inputs)
    end = ended[1][1]
    how = {"masked": name == "processor", "eos_token_id": [zoo.EOS, end], "pad_token_id": pad}
    found = run(expert, amateur, inputs, name, **how)
    ends = [next((i for i, token in enumerate(row) if token == end), STEPS) for row in ended]
    assert len(set(ends)) > 1
    assert [row[: i + 1] for row, i in zip(found, ends, strict=True)] == [
        row[: i + 1] for row, i in zip(ended, ends, strict=True)
    ]


def test_likelihoods_of_padded_prompts(expert):
    amateur, method = without_pad_token(vocab_size=zoo.VOCAB - 1), decoding.ContrastiveDecodingLogitsProcessor
    rows = {**PADDED, "input_ids": PADDED["input_ids"].masked_fill(PADDED["attention_mask"] == 0, 47)}
    options, kept = (
        torch.tensor([[5, 6, 7], [8, 47, 47], [9, 10, -100]]),
        torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    )
    found = score(method(amateur), expert, rows, options, continuation_mask=kept).total
    single = [
        score(method(amateur), expert, {"input_ids": row[None]}, option[None, : int(mask.sum())]).total[0]
        for row, option, mask in zip(alone(rows), options, kept, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(single), rtol=1e-4, atol=1e-4)
    padded = {"input_ids": PADDED["input_ids"]}  # the mask is found, by the pad token of the main model
    torch.testing.assert_close(score(method(amateur), expert, padded, options, continuation_mask=kept).total, found)


def test_the_handed_mask_is_of_one_call(expert):
    """A text may be continued by the processor, but other prompts and other masks are never taken for known ones."""
    amateur = without_pad_token()
    method = decoding.ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    how = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    visible = {**PADDED, "attention_mask": torch.ones_like(PADDED["input_ids"])}
    fresh = decoding.ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    for inputs in (PADDED, visible, PADDED):
        wanted = expert.generate(**inputs, custom_generate=fresh.loop(), **how)
        assert torch.equal(expert.generate(**inputs, custom_generate=method.loop(), **how), wanted)
        fresh = decoding.ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    with pytest.raises(ValueError, match="cannot be distinguished from text"):
        expert.generate(**PADDED, logits_processor=[method], **how)


def test_a_branch_with_another_mask_than_generate(expert):
    method = decoding.ContrastiveDecodingLogitsProcessor(
        without_pad_token(), attention_mask=torch.ones_like(PADDED["input_ids"])
    )
    with pytest.raises(ValueError, match="differs from the mask passed to generate"):
        expert.generate(**PADDED, custom_generate=method.loop(), max_new_tokens=2)


def test_right_padding_is_refused_where_the_mask_is_known(expert):
    inputs = zoo.pad(zoo.prompts(2), side="right")
    amateur = without_pad_token()
    contrast = decoding.ContextAwareDecodingLogitsProcessor(expert, zoo.pad(zoo.prompts(2)))
    for executor in (
        decoding.ContrastiveDecodingLogitsProcessor(amateur).loop(),
        contrast.loop(),
        decoding.SpeculativeContrastiveDecoding(amateur),
        decoding.ContrastiveSearch(),
    ):
        with pytest.raises(ValueError, match="padded on the right"):
            expert.generate(**inputs, custom_generate=executor, max_new_tokens=2)
    with pytest.raises(ValueError, match="padded on the right"):
        decoding.ContrastiveSearchLogitsProcessor(expert, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="padded on the right"):
        score(decoding.ContrastiveDecodingLogitsProcessor(amateur), expert, inputs, torch.tensor([[5], [6]]))


@pytest.mark.parametrize(
    "ids",
    [
        [[2, 5, 9, 11, 20], [0, 2, 7, 30, 12]],
        [[2, 5, 9, 11], [2, 7, 30, 0]],  # on the right
        [[5, 6, 7], [8, 9, 10]],
        [[0, 0, 2, 5, 9]],  # pad_to_multiple_of
        [[0, 2, 5, 9]],
        [[0, 0, 5, 9]],
        [[2, 5, 9, 0, 0, 0]],
    ],
)
def test_what_a_model_without_a_pad_token_cannot_know(ids):
    for reads in (lambda i: ModelBranch(without_pad_token())(i), lambda i: padding_of(without_pad_token(), i)):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no pad token"):
            reads(torch.tensor(ids))


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([[2, 5, 9, 11]], [[1, 1, 1, 1]]),
        ([[5, 9, 11]] * 3, [[1, 1, 1]] * 3),
        ([[1, 1, 5, 9], [6, 7, 8, 9]], [[0, 0, 1, 1], [1, 1, 1, 1]]),  # by the end token, as generate() does
        ([[1, 5, 1, 9]], [[0, 1, 1, 1]]),
    ],
)
def test_what_it_can_know(ids, mask):
    assert padding_of(without_pad_token(), torch.tensor(ids)).tolist() == mask


def test_no_special_token_at_all():
    model = without_pad_token()
    for name in ("eos_token_id", "bos_token_id"):
        setattr(model.config, name, None)
        setattr(model.generation_config, name, None)
    assert padding_of(model, torch.tensor([[5, 6, 7]])).all()
    with pytest.raises(ValueError, match="has no pad token"):
        padding_of(model, torch.tensor([[5, 6, 7], [6, 6, 7]]))


def test_beams_of_one_prompt_that_are_read_afresh():
    """Rows that differ by what was generated belong to one prompt, also where the branch begins again."""
    branch, ids = ModelBranch(without_pad_token()), torch.tensor([[2, 5, 9]] * 2)
    branch(ids)
    branch(torch.tensor([[2, 7, 9]] * 2))  # another text in between
    branch(ids)
    branch(torch.cat([ids, torch.tensor([[5], [6]])], dim=1))
    longer = torch.tensor([[2, 5, 9, 5, 7, 8], [2, 5, 9, 6, 9, 10]])
    other = ModelBranch(without_pad_token(), attention_mask=torch.ones(2, 3, dtype=torch.long))
    other(ids)
    torch.testing.assert_close(branch(longer), other(longer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("row", [[zoo.PAD] * 3 + [9], [zoo.PAD] * 2 + [9, 7], [zoo.PAD, 5, 6, 9]])
def test_a_shared_beginning_of_padding_is_no_text(family, row):
    """A prompt with more padding than the last one is read afresh: its cached beginning ends within the padding."""
    branch, others = ModelBranch(zoo.build(family, seed=1)), [7, 8, 9, 10]
    branch(torch.tensor([[zoo.PAD, zoo.PAD, 5, 6], others]))
    for ids in (torch.tensor([row, others]), torch.tensor([[zoo.PAD, zoo.PAD, 5, 6], others])):
        torch.testing.assert_close(branch(ids), ModelBranch(zoo.build(family, seed=1))(ids), atol=1e-4, rtol=1e-4)


def test_a_shared_beginning_that_was_text_may_be_padding():
    """Pad tokens that a mask declares to be text are padding in a later call without a mask."""
    branch, ids = ModelBranch(zoo.build("llama", seed=1)), torch.tensor([[zoo.PAD, zoo.PAD, 5, 6]])
    branch.begin(ids, torch.ones_like(ids))
    as_text = branch(ids)
    branch.end()
    later = torch.tensor([[zoo.PAD, zoo.PAD, 5, 9]])
    torch.testing.assert_close(branch(later), ModelBranch(zoo.build("llama", seed=1))(later), atol=1e-4, rtol=1e-4)
    assert (as_text - ModelBranch(zoo.build("llama", seed=1))(ids)).abs().max() > 0.1


def test_another_token_before_the_beginning_of_the_text():
    """The tokenizer pads with a token that the model does not call its pad token."""
    with pytest.raises(ValueError, match="have token 9 before the BOS token 2"):
        find_padding(torch.tensor([[2, 5, 6], [9, 2, 5]]), [0], bos_id=2)


def test_the_padding_of_contrast_prompts(expert):
    model = without_pad_token()
    with pytest.raises(ValueError, match="has no pad token"):
        InputBranch(model, {"input_ids": PADDED["input_ids"]})
    InputBranch(model, {"input_ids": PADDED["input_ids"][:1]})


def test_source_texts_without_a_mask():
    """An encoder is given the mask of what its pad token shows, on either side."""
    expert, amateur = zoo.build("t5", seed=1), zoo.build("t5", hidden=16, seed=2)
    rows = zoo.prompts(3, seed=3)
    inputs = zoo.pad(rows, side="right")
    how = {"max_new_tokens": STEPS, "do_sample": False}
    found = [
        expert.generate(
            **inputs,
            logits_processor=[decoding.ContrastiveDecodingLogitsProcessor(amateur, encoder_inputs=given, **RULE)],
            **how,
        )
        for given in (inputs, {"input_ids": inputs["input_ids"]})
    ]
    assert torch.equal(*found)
    search = decoding.ContrastiveSearchLogitsProcessor(expert, encoder_inputs={"input_ids": inputs["input_ids"]})
    looped = expert.generate(**inputs, custom_generate=decoding.ContrastiveSearch(), **how)
    assert torch.equal(expert.generate(**inputs, logits_processor=[search], **how), looped)
    amateur.config.pad_token_id = amateur.generation_config.pad_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no pad token"):
        ModelBranch(amateur, encoder_inputs={"input_ids": inputs["input_ids"]})(torch.zeros(3, 1, dtype=torch.long))


def test_critics(expert):
    """Absolute positions begin after the padding; a function is told the mask or refuses several prompts."""
    torch.manual_seed(3)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, **zoo.WIDE)
    critic = AutoModelForTokenClassification.from_config(config).eval()
    inputs = zoo.pad(zoo.prompts(3, seed=3))
    for mask in (inputs["attention_mask"], None):
        processor = decoding.CriticGuidedLogitsProcessor(critic, k=4, attention_mask=mask)
        together = processor(inputs["input_ids"], torch.randn(3, zoo.VOCAB, generator=torch.Generator().manual_seed(0)))
        for i, row in enumerate(alone(inputs)):
            single = decoding.CriticGuidedLogitsProcessor(critic, k=4)
            logits = torch.randn(3, zoo.VOCAB, generator=torch.Generator().manual_seed(0))[i : i + 1]
            torch.testing.assert_close(together[i : i + 1], single(row[None], logits), atol=1e-5, rtol=1e-4)
    function = decoding.CriticGuidedLogitsProcessor(lambda ids, mask: mask.sum(-1).float(), k=4)
    with pytest.raises(ValueError, match="a critic without a configuration has no pad token"):
        function(inputs["input_ids"], torch.zeros(3, zoo.VOCAB))
    function(inputs["input_ids"][2:].repeat(2, 1), torch.zeros(2, zoo.VOCAB))
    function(torch.cat([inputs["input_ids"][2:].repeat(2, 1), torch.tensor([[5], [6]])], 1), torch.zeros(2, zoo.VOCAB))


def test_a_text_with_a_token_that_the_amateur_does_not_know():
    """The expert alone decides where the amateur rules out all that is plausible; the next step cannot be contrasted."""
    expert, amateur = zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=2, vocab_size=47)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for name in ("processor", "loop", "speculative"):
        with pytest.raises(
            ValueError,
            match="the sequence contains token 47, but the vocabulary of LlamaForCausalLM has only 47 tokens",
        ):
            run(expert, amateur, inputs, name, sequence_bias=[[[47], 90.0]])


def test_what_fills_the_end_of_a_row():
    tokens = KnownTokens(size=8, pad=0, ends=(1,), name="Amateur")
    ids = torch.tensor([[9, 5, 6, 1, 9, 9], [5, 5, 6, 7, 6, 9]])
    mask = (torch.arange(6) > torch.tensor([[0], [-1]])).long()
    assert tokens.replace(ids[:1], mask[:1]).tolist() == [[0, 5, 6, 1, 0, 0]]
    with pytest.raises(ValueError, match="the sequence contains token 9"):
        tokens.replace(ids, mask)
    assert tokens.replace(ids, mask, fills=[9]).tolist() == [[0, 5, 6, 1, 0, 0], [5, 5, 6, 7, 6, 0]]
    with pytest.raises(ValueError, match="the sequence contains token 9"):
        tokens.replace(torch.tensor([[5, 9, 6]]), torch.ones(1, 3, dtype=torch.long), fills=[9])


def test_a_prompt_that_is_padded_on_the_right_alone(expert):
    """`padding="max_length"` with the tokenizer's default side; one end token that closes a turn is text."""
    ids = torch.tensor([[5, 9, 11, 20, zoo.PAD, zoo.PAD]])
    for reads in (lambda i: ModelBranch(expert)(i), lambda i: padding_of(expert, i)):
        with pytest.raises(ValueError, match="padded on the right"):
            reads(ids)
    with pytest.raises(ValueError, match="padded on the right"):
        find_padding(torch.tensor([[5, 6, 0], [5, 0, 0]]), [0])
    assert padding_of(expert, ids[:, :5]).all()
    assert find_padding(torch.tensor([[0, 0, 0], [5, 6, 0]]), [0]).tolist() == [[0, 0, 1], [1, 1, 1]]
