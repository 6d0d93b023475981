"""Every method's rule against its float64 reference in plain Python, with impossible tokens too."""

import inspect
import math
from functools import partial

import pytest
import torch
from helpers.two_branch_rules import TWO_BRANCH_RULES
from oracles import rules as oracle
from torch.testing import assert_close

from contralto.decoding import rules

VOCAB, ROWS = 13, 7
TWO = {
    "visual_contrastive_decoding": (oracle.vcd, [{}, {"alpha": 0.3, "beta": 0.4}, {"alpha": 0.0, "beta": 0.0}]),
    "instruction_contrastive_decoding": (oracle.vcd, [{}, {"alpha": 2.0, "beta": 0.02}]),
    "contrastive_decoding_released": (
        oracle.cd_released,
        [{}, {"amateur_temperature": 0.5, "st_coef": 0.8, "alpha": 0.3}, {"st_coef": 0.0}],
    ),
    "ritual": (oracle.ritual, [{}, {"kappa": 0.5, "beta": 0.3}, {"kappa": 0.0}]),
    "m3id": (oracle.m3id, [{"step": 0}, {"step": 1}, {"step": 40, "lam": 0.05, "beta": 0.01}]),
    "contrastive_input_decoding": (oracle.cid, [{}, {"lam": 7.0}, {"lam": 0.0}]),
    "contrastive_input_decoding_log_ratio": (oracle.cid_log_ratio, [{}, {"lam": 0.2, "alpha": 0.5}]),
    "context_aware_decoding": (oracle.cad, [{}, {"alpha": 1.0}, {"alpha": 0.0}]),
    "classifier_free_guidance": (oracle.cfg, [{}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}]),
    "one_layer_intervention": (
        oracle.only,
        [{}, {"gamma": 1.2}, {"alpha_pos": 0.5, "alpha_neg": 2.0, "gamma": 0.9, "beta": 0.3}],
    ),
}
THREE = {
    "ritual_vcd": (
        lambda e, t, n, **k: oracle.vcd_ritual(e, n, t, **k),
        [{}, {"alpha": 0.5, "kappa": 1.0, "beta": 0.3}],
    ),
    "proxy_tuning": (oracle.proxy_tuning, [{}, {"alpha": 2.5}, {"alpha": 0.0}]),
    "pay_attention_to_image": (oracle.pai, [{}, {"gamma": 2.5, "beta": 0.3}, {"gamma": 1.0, "beta": 0.0}]),
}
RENAMED = {"guidance_scale": "gamma", "normalize": "normalise"}
CASES = [(name, *rest) for name, rest in [*TWO.items(), *THREE.items()]]


def _branches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * torch.randn(count, ROWS, VOCAB, generator=generator, dtype=torch.float64)
    rows[:, 1, 3] = -math.inf  # impossible everywhere
    rows[0, 2, 4] = rows[1, 2, 5] = -math.inf  # impossible in one branch
    rows[1:, 3] = -math.inf
    rows[1:, 3, 0], rows[0, 3, 0] = 0.0, -math.inf  # nothing is possible in all branches
    rows[1:, 5] = -math.inf  # a contrast that knows nothing at all
    rows[:, 6] = -math.inf
    return list(rows)


def _renamed(name, settings):
    """The same settings in the reference's words."""
    settings = {RENAMED.get(key, key): value for key, value in settings.items()}
    if name == "m3id" and "beta" in settings:
        settings["alpha"] = settings.pop("beta")
    return settings


@pytest.mark.parametrize(("name", "reference", "grid"), CASES, ids=[case[0] for case in CASES])
def test_equals_the_reference(name, reference, grid):
    branches = _branches(3 if name in THREE else 2)
    for settings in grid:
        expected = [
            reference(*row, **_renamed(name, settings)) for row in zip(*(b.tolist() for b in branches), strict=True)
        ]
        found = getattr(rules, name)(*branches, **settings)
        assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("gate", [1e-6, 0.5, 0.9, 1.0])
def test_gated_equals_the_reference(gate, step):
    main, other = _branches(2)
    scores = rules.contrastive_decoding(main, other)
    rows = zip(scores.tolist(), main.tolist(), strict=True)
    expected = [oracle.gated(row, e, step, gate=gate) for row, e in rows]
    assert_close(rules.gated(scores, main, gate=gate, step=step), torch.tensor(expected, dtype=torch.float64))


def test_gated_takes_a_step_per_position():
    main, scores = torch.zeros(1, 2, 2).double(), torch.tensor([[[-2.0, 0.0]] * 2]).double()
    # A probability that equals the gate is sure.
    found = rules.gated(scores, main, gate=0.5, step=torch.arange(2)[:, None])
    assert_close(found, torch.stack([scores[:, 0], main[:, 1].log_softmax(-1)], dim=1))


def test_impossible_or_invalid_rows_are_not_sure():
    logits = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf], [0.0, -math.inf]])
    assert rules.sure(logits, gate=1e-6).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="differ in shape"):
        rules.gated(logits, logits[:1], gate=0.5, step=1)


def test_ritual_normalized():
    original, transformed = _branches(2)
    rows = zip(original.tolist(), transformed.tolist(), strict=True)
    expected = [oracle.ritual(e, t, kappa=2.0, normalise=True) for e, t in rows]
    assert_close(rules.ritual(original, transformed, kappa=2.0, normalize=True), torch.tensor(expected).double())


def test_m3id_takes_a_step_per_position():
    conditioned, unconditioned = _branches(2)
    steps = torch.arange(ROWS)[:, None] * 10
    together = rules.m3id(conditioned, unconditioned, step=steps)
    for i, (c, u) in enumerate(zip(conditioned, unconditioned, strict=True)):
        assert_close(together[i], rules.m3id(c, u, step=10 * i))


def test_m3id_computes_its_weight_in_the_precision_of_the_logits():
    conditioned, unconditioned = torch.tensor([0.75, 0.25]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    expected = math.exp(0.02 * 41) * math.log(0.75) - math.expm1(0.02 * 41) * math.log(0.5)
    found = rules.m3id(conditioned, unconditioned, step=41)[0].item()
    assert found == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("rule", "form"), [(rules.dola, "kl"), (rules.dola_jsd, "jsd")])
def test_dola_chooses_a_layer_per_row(rule, form):
    final, *layers = _branches(5)
    final, stacked = final[:-1], torch.stack(layers, dim=1)[:-1]  # the last row allows nothing
    rows = list(zip(final.tolist(), stacked.tolist(), strict=True))
    expected = [oracle.dola(f, row, form=form) for f, row in rows]
    assert_close(rule(final, stacked), torch.tensor(expected, dtype=torch.float64))
    assert len({oracle.dola_layer(f, row, form) for f, row in rows}) > 1  # or the test could not tell
    assert rule(torch.full((1, VOCAB), -math.inf), stacked[:1]).max() == -math.inf


def test_dola_forms_choose_different_layers():
    torch.manual_seed(0)
    final, layers = torch.randn(200, VOCAB).double(), torch.randn(200, 4, VOCAB).double()
    final[:, 0] = -math.inf  # a token that is ruled out, as by a processor
    rows = zip(final.tolist(), layers.tolist(), strict=True)
    differ = [oracle.dola_layer(f, row, "kl") != oracle.dola_layer(f, row, "jsd") for f, row in rows]
    found = (rules.dola(final, layers) != rules.dola_jsd(final, layers)).any(-1)
    assert found.tolist() == differ
    assert 10 < sum(differ) < 100


def test_critic_guided_equals_the_reference():
    logits, _ = _branches(2)
    values = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    candidates = logits.topk(4).indices
    found = rules.critic_guided(logits, values.gather(-1, candidates), candidates)
    expected = [
        oracle.critic_guided(row, v.__getitem__, k=4) for row, v in zip(logits.tolist(), values.tolist(), strict=True)
    ]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def _examples():
    """Each rule of the package with arguments of 6 rows."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 6, VOCAB, generator=generator, dtype=torch.float64)
    states = torch.randn(6, 9, 5, generator=generator, dtype=torch.float64)
    candidates, layers = logits[0].topk(4).indices, logits[1:].movedim(0, 1)
    for count, names in ((2, (*TWO, *TWO_BRANCH_RULES)), (3, THREE)):
        for name in names:
            settings = {"step": 30} if name == "m3id" else {}
            yield name, partial(getattr(rules, name), **settings), logits[:count]
    yield "combine", lambda a, b: rules.combine((a, b), (1.5, -0.5), alpha=0.1, min_tokens_to_keep=3), logits[:2]
    yield "plausible", partial(rules.plausible, alpha=0.1, min_tokens_to_keep=3), logits[:1]
    yield "sure", partial(rules.sure, gate=0.5), logits[:1]
    yield "gated", partial(rules.gated, gate=0.5, step=1), logits[:2]
    yield "dola", rules.dola, (logits[0], layers)
    yield "dola_jsd", rules.dola_jsd, (logits[0], layers)
    yield "critic_guided", rules.critic_guided, (logits[0], states[:, :4, 0], candidates)
    yield "contrastive_search", rules.contrastive_search, (logits[0], candidates, states[:, :4, 0])
    mask = torch.arange(6) % 6 < torch.arange(1, 7)[:, None]
    yield "degeneration_penalty", rules.degeneration_penalty, (states[:, :3], states[:, 3:], mask)


@pytest.mark.parametrize(
    ("rule", "arguments"), [example[1:] for example in _examples()], ids=[e[0] for e in _examples()]
)
def test_every_row_is_scored_as_if_alone_in_any_shape(rule, arguments):
    together = rule(*arguments)
    alone = torch.stack([rule(*(argument[row] for argument in arguments)) for row in range(6)])
    assert_close(together, alone)
    assert_close(rule(*(argument.unflatten(0, (2, 3)) for argument in arguments)), together.unflatten(0, (2, 3)))


def test_search_and_its_penalty_equal_their_formulas():
    probabilities, candidates = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).double(), torch.tensor([[0, 2, 3]])
    penalty = torch.tensor([[0.9, 0.1, 0.0]]).double()
    scores = rules.contrastive_search(probabilities.log(), candidates, penalty, alpha=0.25)
    assert_close(
        scores, torch.tensor([[0.75 * 0.5 - 0.25 * 0.9, -math.inf, 0.75 * 0.2 - 0.25 * 0.1, -math.inf]]).double()
    )
    hidden, context = torch.tensor([[3.0, 4.0], [-2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 12.0]])
    found = rules.degeneration_penalty(hidden.bfloat16(), context.bfloat16(), torch.tensor([1, 1, 0]))
    assert_close(found, torch.tensor([0.8, 0.0]))
    assert_close(rules.degeneration_penalty(hidden, context), torch.tensor([63 / 65, 0.0]))


def test_only_adds_a_branch_that_agrees_and_subtracts_one_that_differs():
    p, near, far = (torch.tensor(row).double().log() for row in ([0.75, 0.25], [0.7, 0.3], [0.5, 0.5]))
    for other, weights in ((near, (1, 3)), (far, (2, -1))):  # distances 0.1 and 0.5
        assert_close(rules.one_layer_intervention(p, other), rules.combine((p, other), weights, alpha=0.1))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_penaltys_weight_are_greedy_and_the_penalty_alone(alpha):
    logits, candidates, penalty = torch.tensor([0.6, 0.4]).log(), torch.tensor([0, 1]), torch.tensor([0.3, 0.2])
    found = rules.contrastive_search(logits, candidates, penalty, alpha=alpha)
    assert_close(found, -penalty if alpha else logits.exp())


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_the_weight_of_the_penalty_has_a_range(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\] \(the weight of the degeneration penalty\)"):
        rules.contrastive_search(torch.zeros(3), torch.tensor([0]), torch.zeros(1), alpha=alpha)


def test_every_rule_is_in_a_contract():
    public = {name for name in rules.__all__ if inspect.isfunction(getattr(rules, name))}
    assert public == {name for name, *_ in _examples()}


@pytest.mark.parametrize(("name", "reference", "grid"), CASES, ids=[case[0] for case in CASES])
def test_nothing_is_changed_in_place_and_dtypes_stay(name, reference, grid):
    for dtype in (torch.float32, torch.bfloat16):
        branches = [b.to(dtype) for b in _branches(3 if name in THREE else 2)]
        before = [b.clone() for b in branches]
        found = getattr(rules, name)(*branches, **grid[0])
        assert found.dtype == dtype
        assert not found.isnan().any()
        assert all(torch.equal(b, c) for b, c in zip(branches, before, strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("visual_contrastive_decoding", {"alpha": -1}, "alpha must be a finite number of at least 0"),
        ("visual_contrastive_decoding", {"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ("instruction_contrastive_decoding", {"alpha": math.inf}, "alpha must be a finite number"),
        ("ritual", {"kappa": -0.1}, "kappa must be a finite number"),
        ("m3id", {"lam": -1, "step": 0}, "lam must be a finite number"),
        ("one_layer_intervention", {"alpha_pos": -1}, "alpha_pos must be a finite number of at least 0"),
        ("one_layer_intervention", {"alpha_neg": -1}, "alpha_neg must be a finite number of at least 0"),
        ("one_layer_intervention", {"gamma": -1}, "gamma must be a finite number of at least 0"),
        ("pay_attention_to_image", {"gamma": 0.5}, "gamma must be a finite number of at least 1"),
        ("pay_attention_to_image", {"beta": 2}, r"beta must lie in \[0, 1\]"),
        ("contrastive_input_decoding", {"lam": math.nan}, "lam must be a finite number"),
        ("contrastive_input_decoding_log_ratio", {"alpha": -0.1}, r"alpha must lie in \[0, 1\]"),
        ("context_aware_decoding", {"alpha": -1}, "alpha must be a finite number"),
        ("classifier_free_guidance", {"guidance_scale": -1}, "guidance_scale must be a finite number"),
    ],
)
def test_ranges(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(rules, name)(*_branches(3 if name in THREE else 2), **settings)


def test_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        rules.contrastive_input_decoding(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"layers of shape \(..., L, V\)"):
        rules.dola(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one value per candidate"):
        rules.critic_guided(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.long))
