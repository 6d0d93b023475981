"""Masks that are found from tokens, and the errors and warnings about tokens that may be padding."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from contralto.decoding.branches.padding import (
    KnownTokens,
    PromptMask,
    find_padding,
    refuse_unknown_padding,
    source_padding,
)

BOS = 2


def _model(**special):
    config = SimpleNamespace(vocab_size=8, **special)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: config if decoder else None))


def test_source_texts_are_padded_on_either_side():
    ids = torch.tensor([[5, 0, 6], [7, 0, 0], [0, 0, 7], [0, 7, 0]])
    expected = [[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert source_padding(_model(pad_token_id=0), ids).tolist() == expected


def test_the_error_says_what_looks_like_padding():
    refuse_unknown_padding(torch.tensor([[5, 7, 5]]), "Model")
    for row in ([5], [5, 6], [5, 7, 5, 6], [5, 6, 6], [5, 6, 7, 7], [5, 6, 7, 8, 9]):
        refuse_unknown_padding(torch.tensor([row]), "Model")
    for row in ([5, 5], [5, 6, 6, 6], [9, 2, 5]):
        with pytest.raises(ValueError, match="in a prompt whose first or last tokens look like padding: "):
            refuse_unknown_padding(torch.tensor([row, row]), "Model", BOS)
    with pytest.raises(ValueError, match="in a prompt whose first or last tokens look like padding: "):
        refuse_unknown_padding(torch.tensor([[5, 5, 7]]), "Model")
    with pytest.raises(ValueError, match="in several prompts: "):
        refuse_unknown_padding(torch.tensor([[5, 6, 7], [7, 6, 5]]), "Model")


@pytest.mark.parametrize("late", [[9, 2, 5, 6], [9, 9, 2, 5], [9, 9, 9, 2]])
def test_other_tokens_before_the_beginning_of_a_text_are_found_in_every_row(late):
    rows = torch.tensor([[2, 5, 6, 7], [2, 4, 4, 4], late])
    with pytest.raises(ValueError, match="have token 9 before the BOS token 2"):
        find_padding(rows, [0], bos_id=BOS)
    assert find_padding(rows[:2], [0], bos_id=BOS).all()


def test_rows_of_one_token_have_no_beginning_of_a_text():
    with pytest.warns(UserWarning, match="token 9 twice"):
        assert find_padding(torch.tensor([[9, 9], [2, 5]]), [0], bos_id=BOS).all()
    assert find_padding(torch.tensor([[9, 2, 5], [9, 2, 6]]), [0], bos_id=BOS).all()  # no prompt begins with it


def test_padding_on_the_right_is_rejected():
    assert find_padding(torch.tensor([[5, 0], [7, 0]]), [0]).all()  # a text may end with the token
    assert find_padding(torch.tensor([[0, 0], [7, 0]]), [0]).tolist() == [[0, 1], [1, 1]]
    for rows in ([[5, 6], [7, 0]], [[5, 0, 0], [7, 6, 0]], [[5, 6, 0], [0, 7, 8]]):
        with pytest.raises(ValueError, match="some prompts end in pad tokens, so they are padded on the right"):
            find_padding(torch.tensor(rows), [0])


def test_a_pad_token_that_begins_texts_is_ambiguous_only_if_every_prompt_begins_with_it():
    assert find_padding(torch.tensor([[0, 5], [6, 7]]), [0], bos_id=0).tolist() == [[0, 1], [1, 1]]
    with pytest.raises(ValueError, match="both the pad token and the BOS token"):
        find_padding(torch.tensor([[0, 5], [0, 7]]), [0], bos_id=0)


@pytest.mark.parametrize(("pads", "shown"), [([0], "0"), ([0, 1], "0, 1"), ([], "it has none")])
def test_a_repeated_first_token_is_a_warning_if_not_all_prompts_have_it(pads, shown):
    for ids in ([[5, 5, 6], [7, 8, 9]], [[7, 8], [5, 5]]):
        with pytest.warns(UserWarning, match=rf"token 5 twice, .* pad token \({shown}\)") as warned:
            find_padding(torch.tensor(ids), pads)
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in ([[5, 5, 6], [5, 5, 7]], [[5, 6, 5], [7, 8, 9]], [[5], [6]]):
            assert find_padding(torch.tensor(ids), pads).all()


def test_the_mask_of_prompts_is_that_of_rows_which_continue_them():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    known = PromptMask(mask)
    with pytest.raises(ValueError, match="does not belong to these prompts"):
        PromptMask(mask).fit(torch.cat([ids, ids], dim=1))
    assert torch.equal(known.fit(ids), mask)
    longer = torch.cat([ids.repeat_interleave(3, 0), torch.arange(6)[:, None]], dim=1)
    assert known.fit(longer).tolist() == [[0, 1, 1, 1]] * 3 + [[1, 1, 1, 1]] * 3
    for others in (ids.flip(0), longer[:5], longer.flip(0)):
        with pytest.raises(ValueError, match="does not belong to these prompts"):
            known.fit(others)
    assert known.agrees(5 * mask.repeat_interleave(2, 0))
    assert not known.agrees(mask.flip(0))
    assert not known.agrees(mask[[0, 0, 1]])
    assert not known.agrees(mask[:1])


def test_padding_is_replaced_by_the_models_pad_token_or_the_first_token():
    assert KnownTokens.of(_model(pad_token_id=3, eos_token_id=[1, 4])) == (8, 3, (1, 4), "SimpleNamespace")
    assert KnownTokens.of(_model(pad_token_id=9, eos_token_id=1)) == (8, 0, (1,), "SimpleNamespace")
