"""Comparisons of different vocabularies: float64 references, autograd over whole logits, one vocabulary, and TRL's GOLD."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from oracles import align as reference
from torch.testing import assert_close

from contralto.align.losses.cross_tokenizer import (
    MatchedTokens,
    SpanDistributions,
    chunked_comparison,
    gold,
    hybrid,
    sorted_distance,
    universal_logit_distance,
)
from contralto.align.losses.divergences import jensen_shannon
from contralto.common.head import Head

ROWS, WIDTH, SIZES = 7, 5, (11, 14)
PAIRS = [(0, 3), (2, 2), (5, 13), (10, 0)]
MATCHED = MatchedTokens(*torch.tensor(PAIRS).T)
OPTIONS = [
    {},
    {"beta": 0.2, "matched_weight": 0.6, "unmatched_weight": 0.4},
    {"beta": 0.0, "matched_weight": 0.5, "unmatched_weight": 0.0},
    {"beta": 1.0},
]


def _random(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _logits(exchanged=False):
    student, teacher = (_random(ROWS, size, seed=i) for i, size in enumerate(SIZES[::-1] if exchanged else SIZES))
    return student, teacher


def _scales():
    """Log-scales of both, 0 for the first half."""
    return (_random(ROWS, seed=i).abs().neg() * (torch.arange(ROWS) > 2) for i in (2, 3))


def _plain(options):
    options = dict(options)
    weights = options.pop("matched_weight", None), options.pop("unmatched_weight", None)
    return options | ({} if weights[0] is None else {"weights": weights})


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("exchanged", [False, True])
def test_uld_equals_the_reference(exchanged, temperature):
    student, teacher = _logits(exchanged)
    c, d = _scales()
    found = universal_logit_distance(
        student, teacher, student_log_scale=c, teacher_log_scale=d, temperature=temperature
    )
    rows = zip(
        *(each.tolist() for each in (student / temperature, teacher / temperature, c.exp(), d.exp())), strict=True
    )
    assert_close(found, torch.tensor([reference.uld(*row) for row in rows], dtype=torch.float64))
    assert ((found >= 0) & (found <= 2)).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("exchanged", [False, True])
def test_gold_equals_the_reference(exchanged, options):
    student, teacher = _logits(exchanged)
    pairs, (c, d) = [(b, a) for a, b in PAIRS] if exchanged else PAIRS, _scales()
    matched = MatchedTokens(*torch.tensor(pairs).T)
    found = gold(student, teacher, matched, student_log_scale=c, teacher_log_scale=d, temperature=1.4, **options)
    rows = zip(*(each.tolist() for each in (student / 1.4, teacher / 1.4, c.exp(), d.exp())), strict=True)
    expected = [reference.gold(q, p, pairs, *scales, **_plain(options)) for q, p, *scales in rows]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_gold_of_one_vocabulary_is_the_divergence(beta):
    """Values and gradients, in float32."""
    q, p = (_random(3, ROWS, 13, seed=seed, dtype=torch.float32) for seed in (0, 1))
    ids = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    student = [q.clone().requires_grad_(), q.clone().requires_grad_()]
    found = gold(student[0], p[..., ids], MatchedTokens(ids, torch.arange(13)), beta=beta)
    expected = jensen_shannon(student[1], p, beta=beta)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(each.sum(), leaf)[0] for each, leaf in zip((found, expected), student, strict=True)]
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_what_tokens_are_does_not_count_for_uld():
    student, teacher = _logits()
    moved = student[:, torch.randperm(SIZES[0])]
    assert_close(universal_logit_distance(student, teacher), universal_logit_distance(moved, teacher))
    padded = torch.cat([student.log_softmax(-1), torch.full((ROWS, 3), -1e4)], dim=-1)
    assert_close(universal_logit_distance(padded, padded[:, :11]), torch.zeros(ROWS, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- from hidden states

HEADS = {"plain": {}, "bias": {"bias": True}, "capped": {"bias": True, "scale": 1.7, "softcap": 3.0}}


def _head(size, width, seed, *, bias=False, **more):
    return Head(_random(size, width, seed=seed), _random(size, seed=seed + 9) if bias else None, **more)


def _through(hidden, head):
    z = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["uld", "gold"])
def test_gradients_equal_autograd_over_whole_logits(name, kind, trained):
    """By hidden states, weight, bias and scales; chunks that do not divide the spans; without a head, too."""
    hidden, head = _random(ROWS, WIDTH, seed=4).requires_grad_(), _head(SIZES[0], WIDTH, 5, **HEADS[kind])
    leaves = [hidden]
    if trained:
        leaves += [each.requires_grad_() for each in (head.weight, head.bias) if each is not None]
    teacher_hidden, teacher_head = _random(ROWS, 3, seed=6), _head(SIZES[1], 3, 7, bias=True)
    c, d = _scales()
    c, weights = c.requires_grad_(), torch.linspace(0.1, 1.0, ROWS, dtype=torch.float64)
    options = {"beta": 0.3, "matched_weight": 0.7, "unmatched_weight": 0.9}
    compare = {"uld": sorted_distance, "gold": hybrid(MATCHED, **options)}[name]
    student, teacher = _through(hidden, head), _through(teacher_hidden, teacher_head)
    scales = {"student_log_scale": c, "teacher_log_scale": d, "temperature": 1.3}
    expected = (
        universal_logit_distance(student, teacher, **scales)
        if name == "uld"
        else gold(student, teacher, MATCHED, **scales, **options)
    )
    wanted = torch.autograd.grad(3 * (weights * expected).sum(), [*leaves, c], retain_graph=True)
    of_teacher = SpanDistributions(teacher_hidden, teacher_head, d)
    for chunk_size in (1, 3, None):
        total, values = chunked_comparison(
            compare,
            SpanDistributions(hidden, head, c),
            of_teacher,
            weights=weights,
            temperature=1.3,
            chunk_size=chunk_size,
        )
        assert_close(values, expected.detach())
        assert not values.requires_grad
        for one, other in zip(torch.autograd.grad(3 * total, [*leaves, c]), wanted, strict=True):
            assert_close(one, other)
    z, x = (each.detach() for each in (student, teacher))
    total, _ = chunked_comparison(
        compare,
        SpanDistributions(z.requires_grad_(), None, c),
        SpanDistributions(x, None, d),
        weights=weights,
        temperature=1.3,
    )
    assert_close(total, (weights * expected).sum())
    by_logits = torch.autograd.grad((weights * expected).sum(), student)[0]
    assert_close(torch.autograd.grad(total, z)[0], by_logits)


def test_half_precision_and_no_spans():
    """Sums are in float32, gradients have the dtype of what they belong to; without spans everything is 0."""
    hidden = _random(ROWS, WIDTH, seed=4).bfloat16().requires_grad_()
    head = Head(_random(SIZES[0], WIDTH, seed=5).bfloat16().requires_grad_())
    teacher = SpanDistributions(_random(ROWS, SIZES[1], seed=1).float(), None, torch.zeros(ROWS))
    student = SpanDistributions(hidden, head, torch.zeros(ROWS))
    total, values = chunked_comparison(sorted_distance, student, teacher, weights=torch.ones(ROWS), chunk_size=2)
    grads = torch.autograd.grad(total, [hidden, head.weight])
    assert values.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    none = (SpanDistributions(each.hidden[:0], each.head, torch.zeros(0)) for each in (student, teacher))
    total, values = chunked_comparison(sorted_distance, *none, weights=torch.zeros(0))
    assert (total.item(), len(values)) == (0.0, 0)
    assert_close(torch.autograd.grad(total, head.weight)[0], torch.zeros_like(head.weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"matched_weight": 1.0}, "belong together: set both, or neither"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
)
def test_wrong_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        gold(*_logits(), MATCHED, **options)
    with pytest.raises(ValueError, match="differ in shape"):
        universal_logit_distance(torch.zeros(2, 3), torch.zeros(3, 3))


# ------------------------------------------------------------------------------------------------------------ TRL's GOLD


def _vocabulary(prefix, shared):
    """Names of tokens; those of `shared` by their ids."""
    return SimpleNamespace(get_vocab=lambda: {shared.get(i, f"{prefix}{i}"): i for i in range(14)})


@pytest.fixture(scope="module")
def trl_gold():
    """TRL's module, which warns that it is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gold import gold_trainer
    return gold_trainer


def _after_prompt(tensor, value):
    """Put one token of a prompt before a completion."""
    return torch.cat([torch.full_like(tensor[:, :1], value), tensor], dim=1)


RUNS = [([0], [0]), ([1, 2], [1]), ([3], [2, 3, 4]), ([4], [5])]
"""Spans of five tokens of the student and six of the teacher, by their places."""
ENDS = [[2, 3, 6, 9, 11], [2, 6, 7, 8, 9, 11]]
"""Where these tokens end in the bytes of the text."""


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize("is_hybrid", [False, True])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_values_equal_trl(trl_gold, merge, is_hybrid, options):
    """For `observed` TRL 1.16 reads the distribution after each token in place of that before it, so the logits are moved for it."""
    numbers = {"uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0}
    numbers |= {"uld_student_temperature": 1.3, "uld_teacher_temperature": 1.3}
    flags = {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False, "use_extended_uld": True}
    config = SimpleNamespace(
        **numbers,
        **flags,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=is_hybrid,
        uld_hybrid_matched_weight=options.get("matched_weight"),
        uld_hybrid_unmatched_weight=options.get("unmatched_weight"),
        beta=options.get("beta", 0.5),
    )
    shared = {i: f"both{k}" for k, (i, _) in enumerate(PAIRS)}, {j: f"both{k}" for k, (_, j) in enumerate(PAIRS)}
    loss = trl_gold.ULDLoss(config, *map(_vocabulary, ("s", "t"), shared))
    logits = [_random(1, len(ends), size, seed=i) for i, (ends, size) in enumerate(zip(ENDS, SIZES, strict=True))]
    ids = [_random(1, len(ends), seed=9 + i).abs().long() for i, ends in enumerate(ENDS)]
    offsets = [torch.tensor([[[0, end] for end in ends]]) for ends in ENDS]
    none = [torch.zeros_like(each[:, :1]) for each in logits]
    order = 1 if merge == "observed" else -1
    moved = [torch.cat([none[side], logits[side]][::order], dim=1) for side in (0, 1)]
    found = loss(
        *moved,
        *(_after_prompt(each, -100) for each in ids),
        *(_after_prompt(each, 0) for each in ids),
        student_byte_offsets=_after_prompt(offsets[0], 0),
        teacher_byte_offsets=_after_prompt(offsets[1], 0),
    )
    at = 0 if merge == "observed" else -1
    rows, scales = ([], []), ([], [])
    for run in RUNS:
        for side in (0, 1):
            rows[side].append(run[side][at])
            log_probabilities = (logits[side][0] / 1.3).log_softmax(-1)
            others = [i for i in run[side] if i != run[side][at]]
            scales[side].append(math.fsum(log_probabilities[i, ids[side][0, i]].item() for i in others))
    student, teacher = (each[0][at] for each, at in zip(logits, rows, strict=True))
    own, other = torch.tensor(scales, dtype=torch.float64)
    scaled = {"student_log_scale": own, "teacher_log_scale": other}
    expected = (
        gold(student, teacher, MATCHED, **scaled, temperature=1.3, **options)
        if is_hybrid
        else universal_logit_distance(student, teacher, **scaled, temperature=1.3)
    )
    assert_close(found, expected.mean(), rtol=1e-6, atol=1e-8)
