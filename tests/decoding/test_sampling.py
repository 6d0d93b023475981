"""Sampling with a stream per row: its distribution, its independence, and its invariance to the batch."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor, SpeculativeContrastiveDecoding
from contralto.decoding.sampling import SeededSampling, gumbel_noise, wrapped_seed


def draw(logits, seeds, step=0, **how):
    """One token per seed, from one distribution."""
    scores = torch.tensor(logits).expand(len(seeds), -1)
    sampling = SeededSampling(seeds, **how)
    for length in range(1, 2 + step):  # zeros, one more each time: one text that goes on
        found = sampling(torch.zeros(len(seeds), length, dtype=torch.long), scores)
    return found.argmax(-1)


@pytest.mark.parametrize("step", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_draws_have_the_distribution(temperature, step):
    logits = [1.0, 0.0, -1.0, 2.0, -math.inf]
    tokens = draw(logits, range(20000), step, temperature=temperature)
    weights = [math.exp(x / temperature) for x in logits]
    expected = [20000 * w / sum(weights) for w in weights]
    counts = torch.bincount(tokens, minlength=5).tolist()
    assert counts[4] == 0
    assert chisquare(counts[:4], expected[:4]).pvalue > 1e-3


def test_noise_is_gumbel_and_of_each_stream_its_own():
    noise = gumbel_noise(torch.arange(100), 0, 1000)
    assert kstest(noise.flatten().numpy(), lambda x: math.e ** -(math.e**-x)).pvalue > 1e-3
    later = gumbel_noise(torch.arange(100), 1, 1000)
    for other in (noise.roll(1, 0), noise.roll(1, 1), later):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.015


@pytest.mark.parametrize("size", [1, 7, 160, 4099, 2**15 + 1])
def test_noise_does_not_depend_on_the_rows_that_are_computed_together(size):
    """Bitwise, below, at and above a block: recorded answers stand."""
    rows = 2 + 2 * 2**15 // size if size > 1 else 40
    noise = gumbel_noise(torch.arange(rows), 5, size)
    for row in (0, 1, rows // 2, rows - 1):
        assert torch.equal(noise[row : row + 1], gumbel_noise(torch.tensor([row]), 5, size))


def test_the_hash_is_splitmix64():
    """Against the algorithm in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    golden, seed, step, token = 0x9E3779B97F4A7C15, 2**64 - 5, 6, 11
    key = mix(mix(seed) + (step + 1) * golden & mask)
    uniform = ((mix(key + (token + 1) * golden & mask) >> 11) + 0.5) / 2**53
    noise = gumbel_noise(torch.tensor([seed - 2**64]), step, token + 1)[0, token]
    assert noise.item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_each_row_has_its_own_step_and_a_temperature_of_two_divides():
    seeds, logits = torch.arange(50), torch.tensor([2.0, 1.0, 0.0, -1.0])
    steps = torch.arange(50) % 3
    noise = gumbel_noise(seeds, steps, 4)
    for i in range(3):
        assert torch.equal(noise[i], gumbel_noise(seeds[i : i + 1], i, 4)[0])
    halved = draw((logits / 2).tolist(), range(50))
    assert torch.equal(draw(logits.tolist(), range(50), temperature=2.0), halved)
    assert not torch.equal(draw(logits.tolist(), range(50)), halved)
    assert (SeededSampling.supports_continuous_batching, SeededSampling.follows_contrast) == (False, True)


def test_a_text_that_goes_on_has_later_noise_and_another_text_begins_anew():
    sampling, scores = SeededSampling([7]), torch.zeros(1, 4)
    ids = torch.tensor([[1, 2, 3, 4]])
    first, second = gumbel_noise(torch.tensor([7]), 0, 4), gumbel_noise(torch.tensor([7]), 1, 4)
    base = scores.double().log_softmax(-1)
    for rows, noise in ((ids[:, :3], first), (ids, second), (torch.tensor([[1, 2, 9, 4, 5]]), first)):
        torch.testing.assert_close(sampling(rows, scores).double(), base + noise)
    other = torch.tensor([[5, 6]])
    torch.testing.assert_close(sampling(other, scores).double(), base + first)


def test_warpers_come_before_the_noise():
    seeds, logits = range(500), [1.0, 0.9, 0.5, -2.0]
    assert set(draw(logits, seeds, top_k=2).tolist()) == {0, 1}
    assert set(draw(logits, seeds, top_p=0.3).tolist()) == {0}
    assert set(draw(logits, seeds, min_p=0.5).tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_a_text_does_not_depend_on_its_batch():
    """Four prompts of unequal length together, in another order, and each alone; by contrast too."""
    model, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    texts = ["Ben went out to the", "One day Mia", "Tom", "It was sunny. Zoe came back to the barn door. She"]
    seeds = [5, 2**64 - 1, -3, 5]

    def write(order, contrast):
        inputs = tokenizer([texts[i] for i in order], return_tensors="pt", padding=True, padding_side="left")
        before = [ContrastiveDecodingLogitsProcessor(amateur)] if contrast else []
        sampling = SeededSampling([seeds[i] for i in order], temperature=0.9)
        for _ in range(2):  # the same object again: the same texts
            output = model.generate(**inputs, logits_processor=[*before, sampling], max_new_tokens=20)
        said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return dict(zip(order, said, strict=True))

    for contrast in (False, True):
        together = write([0, 1, 2, 3], contrast)
        assert write([3, 1, 0, 2], contrast) == together
        assert {i: write([i], contrast)[i] for i in range(4)} == together
        assert len(set(together.values())) == 4


def test_seeds_of_any_size_are_wrapped_to_64_bits():
    assert [wrapped_seed(seed) for seed in (-3, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5)] == [
        -3,
        2**63 - 1,
        -(2**63),
        -1,
        5,
    ]


def test_refusals():
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, not 0"):
        SeededSampling([1], temperature=0)
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        SeededSampling([1, 2])(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 4))


@pytest.mark.parametrize("how", ["loop", "speculative", "processor"])
def test_a_second_draw_is_rejected(how):
    model, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    inputs = tokenizer("Ben went out to the", return_tensors="pt")
    ways = {
        "loop": lambda: {"custom_generate": ContrastiveDecodingLogitsProcessor(amateur).loop()},
        "speculative": lambda: {"custom_generate": SpeculativeContrastiveDecoding(amateur)},
        "processor": dict,
    }
    torch.manual_seed(0)
    sampling = {"logits_processor": [SeededSampling([1], temperature=2.0)], "do_sample": True}
    with pytest.raises(ValueError, match=r"SeededSampling dr.* pass do_sample=False") as error:
        model.generate(**inputs, **ways[how](), **sampling, max_new_tokens=12)
    assert ("would draw again" in str(error.value)) == (how != "processor")


def test_rows_that_were_not_drawn_are_rejected_and_padding_is_not():
    scores = torch.tensor([[0.0, 90.0, 0.0, 0.0]] * 2)
    sampling = SeededSampling([1, 2])
    rows = torch.tensor(
        [[3, 1, 1, 1, 0, 0, 0], [3, 1, 0, 1, 0, 0, 1]]
    )  # the first ends, the second has one other token
    for length in range(1, 8):
        sampling(rows[:, :length], scores)
    with pytest.raises(ValueError, match=r"drew token 1 for row 1, and generate\(\) went on with token 2"):
        sampling(torch.cat([rows, torch.tensor([[0], [2]])], dim=1), scores)
    sampling(rows[:, :1], scores)  # another text
    sampling(torch.tensor([[3, 2], [3, 2]]), scores)
