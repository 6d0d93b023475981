"""The rules against float64 references in plain Python, their closed forms, and the contract that every rule keeps."""

import math
from functools import partial

import pytest
import torch
from helpers.two_branch_rules import TWO_BRANCH_RULES
from oracles import decoding as reference
from torch.testing import assert_close

from contralto.decoding import rules

INF = math.inf
ALPHAS = (0.0, 0.05, 0.1, 0.5, 1.0)


@pytest.fixture(params=TWO_BRANCH_RULES)
def rule(request):
    return TWO_BRANCH_RULES[request.param][0]


def _branches(rows=6, vocabulary=17, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("name", TWO_BRANCH_RULES)
def test_equals_the_reference(name, alpha, keep):
    rule, oracle, grid = TWO_BRANCH_RULES[name]
    ((parameter, values),) = grid.items()
    expert, amateur = _branches()
    for value in values:
        settings = {parameter: value, "alpha": alpha, "min_tokens_to_keep": keep}
        rows = [oracle(e, a, **settings) for e, a in zip(expert.tolist(), amateur.tolist(), strict=True)]
        assert_close(rule(expert, amateur, **settings), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keep", [1, 3])
def test_plausible_equals_the_reference(alpha, keep):
    logits = _branches()[0]
    expected = [reference.plausible(row, alpha, keep) for row in logits.tolist()]
    assert rules.plausible(logits, alpha=alpha, min_tokens_to_keep=keep).tolist() == expected


def test_plausible_keeps_ties_and_the_exact_threshold():
    logits = torch.tensor([[2.0, 2.0, 2.0 + math.log(0.5), 1.0]], dtype=torch.float64)
    assert rules.plausible(logits, alpha=0.5).tolist() == [[True, True, True, False]]
    assert rules.plausible(logits, alpha=1.0).tolist() == [[True, True, False, False]]


def test_closed_form():
    """Odds 3:1 against 1:1 with beta 1 are 3^2 / 1; Li's ratio is 3:1 over 1:1."""
    expert, amateur = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert_close(rules.contrastive_decoding(expert, amateur, beta=1).softmax(-1), torch.tensor([0.9, 0.1]))
    assert_close(rules.contrastive_decoding_li(expert, amateur).softmax(-1), torch.tensor([0.75, 0.25]))


def test_combine_is_the_weighted_sum_of_three_branches():
    """Proxy tuning's shape, base + expert - antiexpert: p q / r in probabilities."""
    p, q, r = (torch.tensor(x, dtype=torch.float64) for x in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]))
    scores = rules.combine((p.log(), q.log(), r.log()), (1, 1, -1))
    assert_close(scores, (p * q / r).log())


def test_a_weight_per_row_of_0_has_no_effect():
    """Also where the branch excludes tokens; a weight of 1 stays a weight."""
    expert, amateur = _branches(rows=3)
    amateur[:, 3] = -INF
    weights = torch.tensor([[0.0], [1.0], [-0.5]], dtype=torch.float64)
    each = [rules.combine((e, a), (1, w.item())) for e, a, w in zip(expert, amateur, weights, strict=True)]
    assert_close(rules.combine((expert, amateur), (1, weights)), torch.stack(each))


def test_beta_0_is_the_expert(rule):
    expert, amateur = _branches()
    amateur[:, 3] = -INF
    assert_close(rules.contrastive_decoding(expert, amateur, beta=0, alpha=0), expert.log_softmax(-1))
    assert_close(rules.combine((expert, amateur), (1, 0)), expert.log_softmax(-1))


def test_a_sum_of_branches_has_gradients():
    """Of plausible tokens, at whose threshold the sum is not continuous."""
    generator = torch.Generator().manual_seed(0)
    branches = [torch.randn(2, 6, generator=generator, dtype=torch.double, requires_grad=True) for _ in range(2)]

    def plausible_scores(*logits):
        scores = rules.combine(logits, (1.5, -0.5), alpha=0.05)
        return scores[scores > -math.inf]

    assert torch.autograd.gradcheck(plausible_scores, branches)


def test_equal_branches_do_not_change_the_ranking():
    expert = _branches()[0]
    scores = rules.contrastive_decoding(expert, expert, alpha=0)
    assert_close(scores, expert.log_softmax(-1))
    assert_close(rules.contrastive_decoding_li(expert, expert, alpha=0), torch.zeros_like(expert))


def test_shift_invariance(rule):
    expert, amateur = _branches()
    shift = torch.arange(len(expert), dtype=expert.dtype)[:, None]
    assert_close(rule(expert + 7 * shift, amateur - 3 * shift), rule(expert, amateur))


def test_permutation_equivariance(rule):
    expert, amateur = _branches()
    order = torch.randperm(expert.shape[-1], generator=torch.Generator().manual_seed(1))
    assert_close(rule(expert[:, order], amateur[:, order]), rule(expert, amateur)[:, order])


def test_rows_are_independent(rule):
    expert, amateur = _branches()
    assert_close(rule(expert[2], amateur[2]), rule(expert, amateur)[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept_and_nothing_changes_in_place(rule, dtype):
    expert, amateur = _branches(dtype=dtype)
    before = expert.clone(), amateur.clone()
    scores = rule(expert, amateur)
    assert (scores.dtype, scores.device, scores.shape) == (dtype, expert.device, expert.shape)
    assert_close((expert, amateur), before, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_minus_infinity_in_any_branch_is_minus_infinity_out(rule, alpha):
    expert, amateur = _branches()
    expert[:, 0] = amateur[:, 0] = -INF
    expert[:, 1] = amateur[:, 2] = -INF
    expert[:, 3] = expert.amax(-1)  # at least one plausible token that both branches allow
    scores = rule(expert, amateur, alpha=alpha)
    assert (scores[:, :3] == -INF).all()
    assert not scores.isnan().any()
    assert (scores.amax(-1) > -INF).all()


def test_a_row_with_nothing_in_common_falls_back_on_the_expert(rule):
    expert = torch.tensor([[0.0, -1.0, -INF, -INF], [0.0, -1.0, -2.0, -3.0]])
    amateur = torch.tensor([[-INF, -INF, 0.0, 0.0], [-INF, -INF, -INF, -INF]])
    scores = rule(expert, amateur, alpha=0.1)
    expected = expert.log_softmax(-1).masked_fill(~rules.plausible(expert, alpha=0.1), -INF)
    assert_close(scores, expected)


def test_a_row_with_nothing_in_common_falls_back_beside_rows_with_tokens_left():
    first = torch.tensor([[0.0, -1.0, -INF], [0.0, -1.0, -2.0]])
    second = torch.tensor([[-INF, -INF, 0.0], [0.0, 0.0, 0.0]])
    scores = rules.combine((first, second), (1, 2), alpha=0.1)
    assert_close(scores[0], first[0].log_softmax(-1))
    assert_close(scores[1], first[1].log_softmax(-1) + 2 * second[1].log_softmax(-1))


def test_a_dead_row_of_the_expert_stays_dead(rule):
    expert, amateur = torch.full((1, 4), -INF), torch.zeros(1, 4)
    assert (rule(expert, amateur) == -INF).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_out_of_range(rule, alpha):
    for call in (partial(rule, alpha=alpha), lambda e, _: rules.plausible(e, alpha=alpha)):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\].*not (-0.1|1.5|nan)"):
            call(torch.zeros(3), torch.zeros(3))


def test_other_bad_arguments():
    zeros = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"beta must be .* at least 0 .*, not -1"):
        rules.contrastive_decoding(zeros, zeros, beta=-1)
    with pytest.raises(ValueError, match=r"amateur_temperature must be .* above 0, not 0"):
        rules.contrastive_decoding_li(zeros, zeros, amateur_temperature=0)
    with pytest.raises(ValueError, match="min_tokens_to_keep must be at least 1, not 0"):
        rules.plausible(zeros, alpha=0.1, min_tokens_to_keep=0)
    with pytest.raises(ValueError, match=r"differ in shape: \[\(1, 3\), \(3,\)\]"):
        rules.combine((zeros, zeros[0]), (1, -1))
    with pytest.raises(ValueError, match="one weight per branch, not 1 for 2"):
        rules.combine((zeros, zeros), (1,))
