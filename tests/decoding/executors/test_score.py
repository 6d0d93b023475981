"""Inputs of `score`: the tokenizer's output, padding, and what is rejected."""

import pytest
import torch

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor, SpeculativeContrastiveDecoding, score
from contralto.decoding.branches.padding import check_unpadded

HOW = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
ANSWERS = [" barn door.", " barn barn barn barn.", " river."]


@pytest.fixture(scope="module")
def scored():
    """Return a function that scores continuations of one prompt, and the tokenizer."""
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    method = ContrastiveDecodingLogitsProcessor(amateur)

    def run(continuations, *, rows=3, prompts=None, **how):
        inputs = tokenizer(["Ben went out to the"] * rows, return_tensors="pt") if prompts is None else prompts
        return score(method, expert, inputs, continuations, **how)

    return run, tokenizer


def test_the_output_of_the_tokenizer_is_scored_without_its_padding(scored):
    run, tokenizer = scored
    batch = tokenizer(ANSWERS, **HOW)
    together = run(batch)
    explicit = run(batch["input_ids"], continuation_mask=batch["attention_mask"])
    assert torch.equal(together.total, explicit.total)
    for row, answer in enumerate(ANSWERS):
        alone = run(tokenizer([answer], **HOW)["input_ids"], rows=1)
        assert together.total[row].item() == pytest.approx(alone.total.item(), abs=1e-4)
        assert together.length[row] == alone.length


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda batch, _: batch["input_ids"],
            ValueError,
            "end in pad tokens, which would be scored: pass the tokenizer's",
        ),
        (lambda *_: ANSWERS, TypeError, "must be token ids .*, not list: pass tokenizer"),
        (lambda *_: "river", TypeError, "must be token ids .*, not str: pass tokenizer"),
        (lambda batch, _: list(batch["input_ids"]), TypeError, "must be token ids .*, not list"),
        (lambda _, tokenizer: tokenizer(ANSWERS), TypeError, "must be token ids .*, not list"),
        (
            lambda _, tokenizer: tokenizer(ANSWERS, **{**HOW, "padding_side": "left"}),
            ValueError,
            "padded on the left: pass padding_side='right'",
        ),
        (lambda batch, _: batch["input_ids"][0], ValueError, r"shape \(rows, length\) with tokens, not \(5?"),
    ],
)
def test_wrong_continuations_are_rejected(scored, wrong, error, message):
    run, tokenizer = scored
    with pytest.raises(error, match=message):
        run(wrong(tokenizer(ANSWERS, **HOW), tokenizer))


@pytest.mark.parametrize("method", ["cd", ContrastiveDecodingLogitsProcessor, SpeculativeContrastiveDecoding])
def test_methods_without_likelihoods_are_rejected(scored, method):
    _, tokenizer = scored
    model, prompt = testbed.load("expert"), tokenizer("Ben", return_tensors="pt")
    made = method(model) if method is SpeculativeContrastiveDecoding else method
    with pytest.raises(TypeError, match=r"score needs a logits processor such as .*, not (str|Con|Spec)"):
        score(made, model, prompt, prompt)


def test_empty_continuations_are_rejected_and_special_tokens_warned_of(scored):
    run, tokenizer = scored
    batch = tokenizer(ANSWERS, **HOW)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        run(batch)
    with pytest.raises(TypeError, match="must be token ids, not float32"):
        run(batch["input_ids"].float())
    with pytest.warns(UserWarning, match="begins with the beginning-of-text token 2, which is scored too"):
        run(tokenizer(ANSWERS, **{**HOW, "add_special_tokens": True}))


def test_two_masks_and_masks_of_another_shape_are_rejected(scored):
    run, tokenizer = scored
    batch = tokenizer(ANSWERS, **HOW)
    with pytest.raises(ValueError, match="an attention_mask of their own: leave continuation_mask out"):
        run(batch, continuation_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="the mask of the continuations has shape"):
        run(batch["input_ids"], continuation_mask=batch["attention_mask"][:, 1:])


@pytest.mark.parametrize(
    "prompts", ["Ben went", ["Ben went"], torch.ones(1, 2, dtype=torch.long), {"input_ids": [[1]]}]
)
def test_prompts_that_are_not_encoded_are_rejected(scored, prompts):
    run, tokenizer = scored
    with pytest.raises(TypeError, match=r"the prompts must be .*, not \w+: pass tokenizer\(texts, return_tensors='pt'"):
        run(tokenizer(ANSWERS[:1], **HOW), prompts=prompts)


def test_ends_of_text_are_part_of_answers_where_all_have_one(pad_config):
    with_pad, without = pad_config(0), pad_config(None)
    check_unpadded(with_pad, torch.tensor([[5, 0], [6, 0]]))
    check_unpadded(with_pad, torch.tensor([[5, 0]]))
    check_unpadded(without, torch.tensor([[5, 7, 7, 7]]))
    for model, rows in (
        (with_pad, [[5, 0, 0], [6, 5, 0]]),
        (with_pad, [[5, 0, 0]]),
        (without, [[5, 7, 7, 7], [5, 6, 7, 8]]),
    ):
        with pytest.raises(ValueError, match="end in pad tokens"):
            check_unpadded(model, torch.tensor(rows))


@pytest.fixture
def pad_config():
    """Return a function that makes a model with a pad token."""
    from types import SimpleNamespace

    def make(pad):
        config = SimpleNamespace(pad_token_id=pad, eos_token_id=None if pad is None else 1)
        config.get_text_config = lambda decoder: config
        return SimpleNamespace(config=config)

    return make
