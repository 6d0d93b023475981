"""Contrastive decoding through `generate()` against the reference, for one family of models."""

import torch
import zoo
from oracles import decoding as reference

from contralto.decoding import ContrastiveDecodingLogitsProcessor

STEPS = 10
RULE = {"beta": 0.7, "alpha": 0.05}


def build_pair(family):
    """Return a family's name, its expert and a smaller amateur, and the same two in float64."""
    return family, *_models(family), [model.double() for model in _models(family)]


def _models(family):
    return zoo.build(family, seed=1), zoo.build(family, hidden=16, seed=2)


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


def greedy(pair, batch):
    """Return the tokens of greedy search, and the reference's."""
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = [reference.greedy(s, p, STEPS, zoo.EOS) for s, p in zip(scorers, prompts, strict=True)]
    return _generate(pair, inputs, extra, do_sample=False), expected


def sampled(pair, batch):
    """Return sampled tokens, and the reference's."""
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = reference.sample(scorers, prompts, STEPS, zoo.EOS, seed=5)
    torch.manual_seed(5)
    return _generate(pair, inputs, extra, do_sample=True), expected


def beams(pair, batch):
    """Return the tokens of beam search, and the reference's."""
    inputs, extra, scorers, prompts = _setting(pair, batch)
    expected = [reference.beam(s, p, STEPS, zoo.EOS, num_beams=3) for s, p in zip(scorers, prompts, strict=True)]
    return _generate(pair, inputs, extra, do_sample=False, num_beams=3), expected
