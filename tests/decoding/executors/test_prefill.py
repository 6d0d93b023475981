"""Prompts of very different lengths are read in passes of their own, with the same tokens."""

import pytest
import torch
import zoo
from zoo import vision as zoo_vision

from contralto import decoding
from contralto.decoding.executors import prefill
from contralto.decoding.executors.prefill import partition

STEPS = 8


@pytest.fixture
def free_passes(monkeypatch):
    """A pass costs nothing but its tokens, so that any padding is worth another one."""
    monkeypatch.setattr(prefill, "pass_tokens", lambda device: 0)


def _prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return zoo.pad([torch.randint(3, zoo.VOCAB, (length,), generator=generator) for length in lengths])


def _generate(model, inputs, method, *, fast, **how):
    executor = {"custom_generate": method.loop()} if fast else {"logits_processor": [method]}
    return model.generate(**inputs, **executor, max_new_tokens=STEPS, do_sample=False, min_new_tokens=STEPS, **how)


def _forwards(model):
    """Record rows and columns of every forward pass of a model."""
    shapes = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(
    ("shapes", "overhead", "sizes"),
    [
        ([(1, 1024), (1, 512)], 511, [1, 1]),
        ([(1, 1024), (1, 512)], 512, [2]),
        ([(8, 64), (8, 8)], 256, [1, 1]),
        ([(1, 8), (1, 900), (1, 901)], 32, [1, 2]),
        ([(1, 900), (1, 8), (1, 9)], 32, [1, 2]),
        ([(1, 10), (1, 10), (1, 10)], 0, [3]),
        ([(2, 10), (1, 20), (3, 30)], 0, [1, 1, 1]),
        ([(5, 7)], 0, [1]),
    ],
)
def test_the_cheapest_groups(shapes, overhead, sizes):
    assert [group.stop - group.start for group in partition(shapes, overhead)] == sizes


@pytest.mark.parametrize("longer", [False, True], ids=["short contrast", "long contrast"])
@pytest.mark.parametrize("family", zoo.families(quick=("gpt2", "mistral", "mamba"), without=zoo.ENCODER_DECODERS))
def test_the_tokens_are_those_of_the_processor(family, longer, free_passes):
    """Two left-padded prompts; windows of 5 tokens are full, or are not, in one branch or in both."""
    model = zoo.build(family, seed=1)
    for lengths in ((3, 2), (19, 12)):
        inputs, contrast = _prompts((9, 6), seed=2), _prompts([each + 20 * longer for each in lengths], seed=3)
        methods = [
            decoding.VisualContrastiveDecodingLogitsProcessor(model, contrast, alpha=0.8, beta=0.02) for _ in range(2)
        ]
        slow = _generate(model, inputs, methods[0], fast=False)
        shapes = _forwards(model)
        fast = _generate(model, inputs, methods[1], fast=True)
        assert torch.equal(fast, slow)
        width = contrast["input_ids"].shape[1]
        together = [(4, max(9, width))]
        assert shapes == (together if family == "mamba" else [(2, 9), (2, width)]) + [(4, 1)] * (STEPS - 1)


def test_three_branches_of_which_two_are_read_together(free_passes):
    model = zoo.build("llama", seed=1)
    inputs, long, short = (_prompts(lengths, seed) for seed, lengths in enumerate([(9, 6), (30, 30), (30, 4)]))
    slow, fast = (decoding.RitualVCDLogitsProcessor(model, long, short, beta=0.02) for _ in range(2))
    expected = _generate(model, inputs, slow, fast=False)
    shapes = _forwards(model)
    assert torch.equal(_generate(model, inputs, fast, fast=True), expected)
    assert shapes == [(2, 9), (4, 30)] + [(6, 1)] * (STEPS - 1)


@pytest.mark.parametrize(("family", "first"), [("llama", [(2, 9), (2, 30)]), ("mistral", [(4, 30)])])
def test_a_static_cache_is_filled_or_read_together(family, first, free_passes):
    """A static window takes the tokens in turn, so that its prompts are padded as before."""
    model = zoo.build(family, seed=1)
    inputs, contrast = _prompts((9, 6), seed=2), _prompts((30, 17), seed=3)
    slow, fast = (decoding.ClassifierFreeGuidanceLogitsProcessor(model, contrast) for _ in range(2))
    expected = _generate(model, inputs, slow, fast=False)
    shapes = _forwards(model)
    assert torch.equal(_generate(model, inputs, fast, fast=True, cache_implementation="static"), expected)
    assert shapes[: len(first)] == first
    assert shapes[len(first) :] == [(4, 1)] * (STEPS - 1)


def test_scores_are_those_of_prompts_read_together(monkeypatch):
    model = zoo.build("mistral", seed=1)
    inputs, contrast = _prompts((9, 6), seed=2), _prompts((30, 17), seed=3)
    found = []
    for cost in (0, 10_000):
        monkeypatch.setattr(prefill, "pass_tokens", lambda device, cost=cost: cost)
        method = decoding.ClassifierFreeGuidanceLogitsProcessor(model, contrast)
        found.append(
            _generate(model, inputs, method, fast=True, output_scores=True, return_dict_in_generate=True).scores
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", zoo_vision.families())
def test_a_prompt_without_its_image(family, free_passes):
    model = zoo_vision.build(family, seed=6)
    cases = zoo_vision.cases(family, 2, seed=3)
    inputs, blind = (zoo_vision.batch([getattr(case, view) for case in cases]) for view in ("original", "text_only"))
    slow, fast = (decoding.M3IDLogitsProcessor(model, blind, lam=0.5) for _ in range(2))
    banned = {"suppress_tokens": zoo_vision.SPECIAL}
    expected = _generate(model, inputs, slow, fast=False, **banned)
    shapes = _forwards(model)
    assert torch.equal(_generate(model, inputs, fast, fast=True, **banned), expected)

    assert shapes[:2] == [tuple(part["input_ids"].shape) for part in (inputs, blind)]


def test_a_contrast_prompt_beyond_the_context_is_rejected(free_passes):
    model = zoo.build("llama", seed=1)  # reads 128 tokens
    method = decoding.ClassifierFreeGuidanceLogitsProcessor(model, _prompts((130,), seed=3))
    with pytest.raises(
        ValueError, match="row 0 has 130 tokens, more than the context of 128 tokens of LlamaForCausalLM"
    ):
        _generate(model, _prompts((9,), seed=2), method, fast=True)


def test_a_main_prompt_beyond_the_context_is_left_to_generate(free_passes):
    model = zoo.build("llama", seed=1)
    method = decoding.ClassifierFreeGuidanceLogitsProcessor(model, _prompts((9,), seed=3))
    assert _generate(model, _prompts((130,), seed=2), method, fast=True).shape == (1, 130 + STEPS)
