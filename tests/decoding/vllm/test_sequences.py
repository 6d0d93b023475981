"""The sequences of an engine read by another model: its logits equal those of whole forward passes."""

import random
import re

import pytest
import torch
import zoo

from contralto.decoding.vllm.sequences import SequenceReader, token_bytes

STEPS = 14


def schedule(seed):
    """The sequences of each step: most grow by a token; some leave, join, stay, fork, or repeat another."""
    rng = random.Random(seed)
    running = []
    for _ in range(STEPS):
        grown = [[*sequence, rng.randrange(4, zoo.VOCAB)] if rng.random() < 0.8 else sequence for sequence in running]
        kept = [sequence for sequence in grown if rng.random() < 0.9]
        forked = [[*sequence[:-1], rng.randrange(4, zoo.VOCAB)] for sequence in kept if rng.random() < 0.2]
        new = [[rng.randrange(4, zoo.VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(0, 2))]
        running = [*kept, *forked, *new, *kept[:1]][:8]
        rng.shuffle(running)
        if running:
            yield running


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mamba",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bloom", "mistral", "gemma3")),
    ],
)
def test_logits_are_those_of_whole_forwards(family):
    model = zoo.build(family, seed=1).eval()
    reader = SequenceReader(model)
    for sequences in schedule(seed=3):
        logits = reader(sequences, zoo.VOCAB + 3)
        assert logits[:, zoo.VOCAB :].eq(-torch.inf).all()
        for sequence, row in zip(sequences, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([sequence])).logits[0, -1]
            torch.testing.assert_close(row[: zoo.VOCAB], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_does_not_outlive_its_sequence(family):
    """An engine that is never idle: the cache is as long as the longest running sequence, whatever has left."""
    model = zoo.build(family, seed=1).eval()
    reader, rng, running = SequenceReader(model), random.Random(0), []
    for step in range(40):
        running = [[*sequence, rng.randrange(4, zoo.VOCAB)] for sequence in running if len(sequence) < 9]
        running += [[rng.randrange(4, zoo.VOCAB)]] if step % 2 == 0 else []
        logits = reader(running, zoo.VOCAB)
        assert sum(batch.reader.length * len(batch.sequences) for batch in reader._batches) <= 10 * len(running)
        for sequence, row in zip(running, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([sequence])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "most"), [("llama", 24), ("llama", 60), ("mamba", 40)])
def test_a_full_cache(family, most):
    """The cache never holds more than it may, and logits are the same; the first time there is a warning."""
    model, warned = zoo.build(family, seed=1).eval(), []
    reader = SequenceReader(model, most=most, warn=warned.append)
    for sequences in schedule(seed=3):
        logits = reader(sequences, zoo.VOCAB)
        held = sum(layer.keys.shape[0] * layer.keys.shape[2] for layer in layers_of(reader)) if family == "llama" else 0
        assert held <= most * model.config.num_hidden_layers
        for sequence, row in zip(sequences, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([sequence])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    assert len(warned) == 1
    assert re.match(
        rf"\d+ sequences of up to \d+ tokens do not fit the {most} tokens of the cache: \d+ of them are", warned[0]
    )


def layers_of(reader):
    return [layer for batch in reader._batches for layer in batch.reader.cache.layers]


def test_the_size_of_a_cache_is_computed_in_advance():
    model = zoo.build("llama", seed=1).eval()
    reader = SequenceReader(model)
    for sequences in ([[5, 6, 7], [8, 9, 4]], [[5, 6, 7, 8], [8, 9, 4, 4]]):
        reader(sequences, zoo.VOCAB)
    held = sum(states.nbytes for layer in layers_of(reader) for states in (layer.keys, layer.values))
    assert held == 8 * token_bytes(model)


def test_only_new_tokens_are_read(monkeypatch):
    """Two sequences that grow cost one forward of one token each; one that joins is read beside them."""
    model = zoo.build("llama", seed=1).eval()
    reader, forward, shapes = SequenceReader(model), model.forward, []
    monkeypatch.setattr(
        model,
        "forward",
        lambda *args, **kwargs: shapes.append(tuple(kwargs["input_ids"].shape)) or forward(*args, **kwargs),
    )
    for sequences in (
        [[5, 6, 7], [8]],
        [[5, 6, 7, 9], [8, 4]],
        [[8, 4, 5], [9, 9], [5, 6, 7, 9]],
        [[8, 4, 5, 6], [9, 9, 7]],
    ):
        reader(sequences, zoo.VOCAB)
    assert shapes == [(2, 3), (2, 1), (1, 1), (1, 2), (2, 1)]
