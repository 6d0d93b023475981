"""Contrastive decoding through `generate()` gives the reference's tokens: every family, strategy and batch.

The processor works on a left-padded batch with caches, in float32. The reference works on each row alone, unpadded,
without a cache, in float64. test_mutations.py breaks the adapter on purpose and sees this matrix go red.
"""

import pytest
import torch
import zoo
from oracles import decoding as reference

from contralto.decoding import ContrastiveDecodingLogitsProcessor

STEPS = 10
RULE = {"beta": 0.7, "alpha": 0.05}


@pytest.fixture(params=zoo.families())
def pair(request):
    """A family's expert and a smaller amateur, and the same two in float64."""
    family = request.param
    expert, amateur = zoo.build(family, seed=1), zoo.build(family, hidden=16, seed=2)
    return family, expert, amateur, doubles(family)


def doubles(family):
    """The same expert and amateur in float64."""
    return zoo.build(family, seed=1).double(), zoo.build(family, hidden=16, seed=2).double()


def _setting(pair, batch):
    """Inputs of generate(), the processor's extra inputs, and one reference scorer and prompt per row."""
    family, _, _, doubles = pair
    rows = zoo.prompts(batch, seed=batch)
    inputs = zoo.pad(rows, side="right" if family in zoo.ENCODER_DECODERS else "left")
    if family not in zoo.ENCODER_DECODERS:
        given = {"attention_mask": inputs["attention_mask"]} if family in zoo.WITHOUT_PAD else {}
        return inputs, given, [reference.scorer(*doubles, **RULE) for _ in rows], rows
    start = torch.tensor([pair[1].config.decoder_start_token_id])
    scorers = [reference.scorer(*doubles, encoder_ids=row, **RULE) for row in rows]
    return inputs, {"encoder_inputs": inputs}, scorers, [start for _ in rows]


def _generate(pair, inputs, extra, **how):
    expert, amateur = pair[1:3]
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE, **extra)
    output = expert.generate(**inputs, logits_processor=[processor], max_new_tokens=STEPS, **how)
    skip = 1 if "encoder_inputs" in extra else inputs["input_ids"].shape[1]
    return [_trim(row[skip:].tolist()) for row in output]


def _trim(tokens):
    """Without what follows the end token."""
    return tokens[: tokens.index(zoo.EOS) + 1] if zoo.EOS in tokens else tokens


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy(pair, batch):
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = [reference.greedy(s, p, STEPS, zoo.EOS) for s, p in zip(scorers, prompts, strict=True)]
    assert _generate(pair, inputs, extra, do_sample=False) == expected


@pytest.mark.covering
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_sampling(pair, batch):
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = reference.sample(scorers, prompts, STEPS, zoo.EOS, seed=5)
    torch.manual_seed(5)
    assert _generate(pair, inputs, extra, do_sample=True) == expected


@pytest.mark.covering
@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_beam_search(pair, batch):
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = [reference.beam(s, p, STEPS, zoo.EOS, num_beams=3) for s, p in zip(scorers, prompts, strict=True)]
    assert _generate(pair, inputs, extra, do_sample=False, num_beams=3) == expected
