"""The preference losses against float64 references in plain Python, against TRL's own code, and by their gradients."""

import math
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import align as reference
from torch.testing import assert_close

from contralto.align.losses import preference as losses
from contralto.align.losses.objective import Completions, Objective, Pairs
from contralto.align.losses.registry import BUILT_IN, LOSSES

SETTINGS = {
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"epsilon": 0.1},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "discopop": {"tau": 0.7},
    "odpo": {"alpha": 0.6},
    "cpo": {"alpha": 0.7, "label_smoothing": 0.1},
    "simpo": {"gamma": 0.4, "label_smoothing": 0.1},
    "cpo_simpo": {"gamma": 0.4, "label_smoothing": 0.1, "alpha": 0.7},
    "arpo": {"eta": 0.4, "scale": 0.9, "label_smoothing": 0.1, "alpha": 0.7},
    "dpop": {"penalty": 0.7},
    "cal_dpo": {"alpha": 0.6},
    "mdpo": {"delta": 0.3},
    "alphapo": {"alpha": 0.4, "gamma": 0.3},
    "tdpo2": {"alpha": 0.3},
    "sparsepo": {"lambda_u": 0.02, "lambda_d": 0.05},
}
"""In letters; beta comes on top."""
BETAS = (0.1, 1.0)
TRL_LOSSES = [loss.name for loss in BUILT_IN if loss.from_trl]


def _settings(name, beta):
    return SETTINGS.get(name, {}) | ({} if name in ("sft", "simper") else {"beta": beta})


def _by_option(name, settings):
    return {LOSSES[name].options.get(letter, letter): value for letter, value in settings.items()}


def _text(rng):
    n = rng.randint(1, 6)
    policy, ref, kl, m_u, m_d = (
        [rng.uniform(*ends) for _ in range(n)] for ends in ((-4, 0), (-4, 0), (0, 2), (0, 1), (0, 2))
    )
    return reference.Text(policy, ref, kl, m_u, m_d, rng.uniform(-3, 3), rng.uniform(-3, 3))


def _sample(size=7, seed=0):
    rng = random.Random(seed)
    return [reference.Pair(_text(rng), _text(rng), rng.uniform(0.2, 3)) for _ in range(size)]


def _completions(texts, dtype=torch.float64):
    """Right-padded to 8 tokens; what padding holds must not matter, where a mask tells."""

    def rows(values, padding):
        return torch.tensor([[*v, *[padding] * (8 - len(v))] for v in values], dtype=dtype)

    return {
        "logps": torch.tensor([t.logp for t in texts], dtype=dtype),
        "ref_logps": torch.tensor([t.ref for t in texts], dtype=dtype),
        "lengths": torch.tensor([t.n for t in texts]),
        "token_logps": rows([t.policy for t in texts], -7.0),
        "ref_token_logps": rows([t.reference for t in texts], -9.0),
        "token_kl": rows([t.kl for t in texts], 5.0),
        "mask": rows([[1] * t.n for t in texts], 0).bool(),
        "reward_mask": rows([t.m_u for t in texts], 0),
        "kl_mask": rows([t.m_d for t in texts], 0),
        "blind_logratios": torch.tensor([t.blind for t in texts], dtype=dtype),
        "swapped_logratios": torch.tensor([t.swapped for t in texts], dtype=dtype),
    }


def _pairs(sample, **changes):
    chosen, rejected = ([getattr(pair, side) for pair in sample] for side in ("w", "l"))
    margin = torch.tensor([pair.margin for pair in sample], dtype=torch.float64)
    known = [pair.advantage for pair in sample]
    advantage = None if None in known else torch.tensor(known)
    sides = {"chosen": Completions(**_completions(chosen)), "rejected": Completions(**_completions(rejected))}
    return replace(Pairs(**sides, margin=margin, chosen_advantage=advantage), **changes)


def _value(name, sample, **settings):
    return Objective([name], **_by_option(name, settings))(_pairs(sample)).terms[name]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_reference(name, beta):
    settings = _settings(name, beta)
    for seed in range(3):
        sample = _sample(seed=seed)
        expected = reference.loss(name, sample, **settings)
        assert_close(_value(name, sample, **settings), torch.tensor(expected, dtype=torch.float64))


def test_every_setting_of_every_loss_is_tried():
    """And tried away from its default, so that a setting that does nothing would show."""
    for name, loss in LOSSES.items():
        letters = {letter: default for letter, default in loss.settings.values()}
        tried = _settings(name, 1.0)
        assert tried.keys() == letters.keys()
        assert all(value != letters[letter] or letter in ("eta", "scale") for letter, value in tried.items())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    """The gradient by everything that a loss reads, finite differences against autograd."""
    loss, pairs = LOSSES[name], _pairs(_sample(4, seed=5))
    found = [pairs.find(each) for each in loss.inputs]
    moving = [i for i, value in enumerate(found) if value.is_floating_point() and loss.inputs[i] != "advantage"]
    stopped = name == "tdpo2" and loss.inputs.index("chosen_kl")
    moving = [i for i in moving if not (name == "tdpo2" and i == stopped)]

    def of(*values):
        whole = [values[moving.index(i)] if i in moving else value for i, value in enumerate(found)]
        return loss.function(*whole, **_settings(name, 0.3))

    assert torch.autograd.gradcheck(of, [found[i].clone().requires_grad_() for i in moving])


def test_tdpo2_does_not_drive_the_divergence_of_the_chosen_text():
    r, kl_w, kl_l = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    losses.tdpo2(r, -r, kl_w, kl_l).sum().backward()
    assert kl_w.grad is None
    assert kl_l.grad.gt(0).all()


@pytest.mark.parametrize("given", [True, False])
def test_apo_auto_takes_zero_where_the_chosen_text_is_better(given):
    sample = _sample(12, seed=3)
    rng = random.Random(0)
    if given:
        sample = [pair._replace(advantage=rng.choice([-1.0, 0.0, 2.0])) for pair in sample]
    zero, down = (
        torch.tensor([f(p, beta=0.5) for p in sample], dtype=torch.float64)
        for f in (reference.apo_zero, reference.apo_down)
    )
    mixed = _value("apo_auto", sample, beta=0.5)
    assert_close(mixed, torch.tensor(reference.loss("apo_auto", sample, beta=0.5), dtype=torch.float64))
    assert {True, False} == set((mixed == zero).tolist())
    assert ((mixed == zero) | (mixed == down)).all()


def test_sparsepo_of_ones_is_tdpo1():
    sample = [
        pair._replace(
            w=pair.w._replace(m_u=[1] * pair.w.n, m_d=[1] * pair.w.n),
            l=pair.l._replace(m_u=[1] * pair.l.n, m_d=[1] * pair.l.n),
        )
        for pair in _sample()
    ]
    assert_close(_value("sparsepo", sample, beta=0.4), _value("tdpo1", sample, beta=0.4))


def test_sparsepo_of_a_common_mask_counts_its_norm_half():
    sample = _sample()
    sample = [p._replace(w=p.w._replace(m_d=p.w.m_u), l=p.l._replace(m_d=p.l.m_u)) for p in sample]
    halves = [_completions([getattr(pair, side) for pair in sample]) for side in ("w", "l")]
    stacked = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    stacked["kl_mask"] = stacked["reward_mask"]
    value = Objective(["sparsepo"], lambda_u=0.1, lambda_d=0.3)(Pairs.stacked(**stacked)).terms["sparsepo"]
    expected = [reference.sparsepo(p, beta=0.1, lambda_u=0.1, lambda_d=0.3, common=True) for p in sample]
    assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_limits():
    """alpha 0 makes DPO of TDPO2 and ODPO, margin 0 of the margin loss; SimPO without margin and lengths 1 is CPO's term."""
    sample = _sample()
    dpo = _value("sigmoid", sample, beta=0.3)
    assert_close(_value("tdpo2", sample, beta=0.3, alpha=0), dpo)
    assert_close(_value("odpo", sample, beta=0.3, alpha=0), dpo)
    assert_close(_value("margin", [p._replace(margin=0) for p in sample], beta=0.3), dpo)
    assert_close(_value("robust", sample, beta=0.3, label_smoothing=0), dpo)
    short = [
        p._replace(w=reference.Text([p.w.logp], [p.w.ref]), l=reference.Text([p.l.logp], [p.l.ref])) for p in sample
    ]
    cpo = _value("cpo", short, beta=0.3, alpha=0)
    assert_close(_value("simpo", short, beta=0.3, gamma=0), cpo)
    assert_close(_value("arpo", short, beta=0.3, alpha=0, eta=0, scale=2), cpo)
    assert_close(_value("dpop", sample, beta=0.3, penalty=0), dpo)
    assert_close(_value("cal_dpo", sample, beta=0.3, alpha=0), _value("sigmoid", sample, beta=1.0))
    assert_close(_value("alphapo", sample, beta=0.3, alpha=0, gamma=0.2), _value("simpo", sample, beta=0.3, gamma=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_a_certain_completion_are_finite(dtype):
    certain, mask = torch.zeros(2, dtype=dtype, requires_grad=True), torch.ones(2, 1).bool()
    loss = losses.orpo(certain, certain - 3, mask.sum(-1), mask.sum(-1), certain[:, None], mask).sum()
    loss.backward()
    assert loss.isfinite()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("divergence", losses.F_DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_f_divergence_scores(divergence, alpha):
    r = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expected = [reference.score(x, divergence, alpha) for x in r.tolist()]
    assert_close(
        losses.f_divergence_scores(r, divergence=divergence, alpha=alpha), torch.tensor(expected, dtype=r.dtype)
    )


def test_alpha_divergence_of_1_is_the_log_ratio_and_none_overflows():
    r = torch.tensor([-500.0, 0.0, 500.0])
    assert_close(losses.f_divergence_scores(r, divergence="alpha_divergence", alpha=1.0), r)
    near = torch.tensor([-4.0, 4.0], dtype=torch.float64)  # an alpha that is not taken for 1
    scores = losses.f_divergence_scores(near, divergence="alpha_divergence", alpha=1 + 1.5e-6)
    assert_close(scores, torch.expm1(1.5e-6 * near) / 1.5e-6, rtol=1e-9, atol=0)
    small = torch.tensor([0.01], dtype=torch.bfloat16)  # the exponential is computed in float32
    scores = losses.f_divergence_scores(small, divergence="alpha_divergence", alpha=2.0)
    assert_close(scores.float(), torch.expm1(small.float()), rtol=4e-3, atol=0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = losses.f_divergence_scores(r.to(dtype) * 100, divergence="alpha_divergence", alpha=2.0)
        assert scores.isfinite().all()
        assert scores.dtype == dtype


def test_length_desensitized():
    sample = _sample()
    found = _pairs(sample)
    shared = torch.minimum(found.chosen.lengths, found.rejected.lengths)
    for side, texts in ((found.chosen, [(p.w, p.l) for p in sample]), (found.rejected, [(p.l, p.w) for p in sample])):
        expected = torch.tensor([reference.ld(y, other, 0.3) for y, other in texts], dtype=torch.float64)
        assert_close(losses.length_desensitized(side.token_logps, side.mask, shared, alpha=0.3), expected)


def test_wpo_weights():
    """Completions of no token, of one and of several; the weight of an empty one is 1, whatever padding holds."""
    sample, mask = torch.rand(3, 4, dtype=torch.float64), torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    squares = torch.rand(3, 4, dtype=torch.float64)
    gaps = (sample - squares).tolist()
    expected = [1.0, math.exp(gaps[1][0]), math.exp(sum(gaps[2][:3]) / 3)]
    found = losses.wpo_weights(sample.requires_grad_(), squares, mask)
    assert found.tolist() == pytest.approx(expected)
    assert not found.requires_grad


def test_empty_completions_count_as_one_token():
    one, none = torch.tensor([[-2.0, -9.0]]), torch.tensor([[-9.0, -9.0]])
    assert losses.sft(one, torch.tensor([[True, False]])).tolist() == [2.0]
    assert losses.sft(none, torch.tensor([[False, False]])).tolist() == [0.0]
    assert losses.per_token(torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0, 1, 2])).tolist() == [3.0, 3.0, 1.5]


def test_sums_over_tokens_are_over_the_last_axis():
    """Also of values with an axis before that of the rows, where a sum over another axis gives other numbers."""
    one, two = ([pairs.chosen, pairs.rejected] for pairs in (_pairs(_sample(seed=seed)) for seed in (1, 2)))

    def stacked(name):
        return [torch.stack([getattr(a, name), getattr(b, name)]) for a, b in zip(one, two, strict=True)]  # (2, B, T)

    names = ("token_logratios", "token_kl", "reward_mask", "kl_mask")
    inputs = [value for name in names for value in stacked(name)]
    each = [losses.sparsepo(*(value[i] for value in inputs), lambda_u=0.2, lambda_d=0.3) for i in range(2)]
    assert_close(losses.sparsepo(*inputs, lambda_u=0.2, lambda_d=0.3), torch.stack(each))
    logps, mask, lengths = (stacked(name)[0] for name in ("token_logps", "mask", "lengths"))
    shared = lengths // 2
    each = [losses.length_desensitized(logps[i], mask[i], shared[i], alpha=0.3) for i in range(2)]
    assert_close(losses.length_desensitized(logps, mask, shared, alpha=0.3), torch.stack(each))
    each = [losses.wpo_weights(logps[i], logps[i] / 2, mask[i]) for i in range(2)]
    assert_close(losses.wpo_weights(logps, logps / 2, mask), torch.stack(each))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_checks_its_settings(name):
    """Also where it is called without an objective."""
    loss, pairs = LOSSES[name], _pairs(_sample(2))
    inputs = [pairs.find(each) for each in loss.inputs]
    for letter, _ in loss.settings.values():
        for wrong in (-1.0, math.inf):
            with pytest.raises(ValueError, match=f"^{letter} must"):
                loss.function(*inputs, **{letter: wrong})


@pytest.mark.parametrize(
    ("letters", "inside", "outside"),
    [
        ("beta tau scale", (1e-9, 1e9), (0.0, math.inf, math.nan)),
        ("epsilon", (1e-9, 0.4999), (0.0, 0.5)),
        ("label_smoothing", (0.0, 0.4999), (-1e-9, 0.5)),
        ("alpha gamma eta lambda_u lambda_d penalty delta", (0.0, 1e9), (-1e-9, math.inf, math.nan)),
    ],
)
def test_ranges_of_settings(letters, inside, outside):
    for letter in letters.split():
        losses.check_settings(**{letter: inside[0]})
        losses.check_settings(**{letter: inside[1]})
        for value in outside:
            with pytest.raises(ValueError, match=f"the option must .*, not {value}"):
                losses.check_setting("the option", letter, value)


def test_an_objective_is_the_weighted_sum_of_means():
    sample = _sample()
    objective = Objective(["apo_zero", "sft", "simpo"], [1.0, 0.5, 2.0], beta=0.4, simpo_gamma=0.3)
    total, terms = objective(_pairs(sample))
    expected = {
        "apo_zero": reference.loss("apo_zero", sample, beta=0.4),
        "sft": reference.loss("sft", sample),
        "simpo": reference.loss("simpo", sample, beta=0.4, gamma=0.3, label_smoothing=0.0),
    }
    assert {name: term.tolist() for name, term in terms.items()} == {n: pytest.approx(v) for n, v in expected.items()}
    means = [sum(values) / len(values) for values in expected.values()]
    assert total.item() == pytest.approx(means[0] + 0.5 * means[1] + 2 * means[2])


def test_pair_weights_multiply_every_loss():
    weights = torch.rand(7, dtype=torch.float64)
    plain, weighted = (Objective(["hinge"])(_pairs(_sample(), weights=w)) for w in (None, weights))
    assert_close(weighted.terms["hinge"], plain.terms["hinge"] * weights)
    assert_close(weighted.total, (plain.terms["hinge"] * weights).mean())


def test_stacked_pairs_are_the_same_pairs():
    sample = _sample()
    halves = [_completions([getattr(pair, side) for pair in sample]) for side in ("w", "l")]
    stacked = Pairs.stacked(**{name: torch.cat([half[name] for half in halves]) for name in halves[0]})
    for name, loss in LOSSES.items():
        for each in loss.inputs:
            if each != "margin":
                assert_close(stacked.find(each), _pairs(sample).find(each), msg=f"{name}: {each}")


def test_needs():
    needs = {name: set(loss.needs) for name, loss in LOSSES.items()}
    free = {name for name, need in needs.items() if not need & {"reference", "reference_tokens", "kl"}}
    assert free == {"sft", "cpo", "simpo", "cpo_simpo", "arpo", "orpo", "alphapo", "simper"}
    assert needs["sigmoid"] == needs["apo_zero"] == {"reference"}
    assert needs["ipo"] == {"reference", "lengths"} == needs["apo_auto"]
    assert needs["cpo"] == {"tokens"}
    assert needs["tdpo1"] == {"reference", "kl"}
    assert needs["sparsepo"] == {"reference", "reference_tokens", "tokens", "kl", "masks"}
    assert needs["odpo"] == {"reference", "margin"}
    assert needs["svco"] == needs["mdpo"] == {"reference", "images"}
    assert Objective(["tdpo1", "sft"]).needs == {"reference", "kl", "tokens"}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((["dpo"],), {}, "there is no loss 'dpo' .did you mean 'odpo'... there are sigmoid, hinge"),
        (([],), {}, "at least one loss"),
        ((["sft", "sft"],), {}, "each once"),
        ((["sft", "sigmoid"], [1.0]), {}, "one per loss: 2, not 1"),
        ((["sft"], [math.nan]), {}, "finite"),
        ((["sigmoid"],), {"cpo_alpha": 1.0}, "sigmoid do not read cpo_alpha; they read beta"),
        ((["sigmoid"],), {"beta": 0.0}, "beta must be a finite number above 0, not 0.0"),
        (
            (["exo_pair"],),
            {"label_smoothing": 0.0},
            r"label_smoothing must lie in \(0, 0.5\), such as EXO's 1e-3, not 0.0",
        ),
        ((["robust"],), {"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ((["simpo"],), {"simpo_gamma": -1.0}, "simpo_gamma must be a finite number of at least 0"),
        ((["sparsepo"],), {"lambda_u": math.inf}, "lambda_u must"),
    ],
)
def test_mistakes_are_told_at_construction(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments, **settings)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_weight_of_a_tail(alpha):
    logps, mask = torch.tensor([[-1.0, -2.0, -4.0]]), torch.ones(1, 3)
    assert losses.length_desensitized(logps, mask, torch.tensor([2]), alpha=alpha).tolist() == [-3 - 4 * alpha]


def test_mistakes_in_the_data_are_told():
    with pytest.raises(ValueError, match="margin, which must be above 0, not 0"):
        losses.odpo(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(
        ValueError, match="'sigmoid' needs chosen_scores, rejected_scores, which these pairs do not have"
    ):
        Objective(["sigmoid"])(Pairs(chosen=Completions(), rejected=Completions()))
    with pytest.raises(ValueError, match="margin, which must be above 0, not -1"):
        losses.odpo(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"divergence must be one of reverse_kl, .*, not 'kl'"):
        losses.f_divergence_scores(torch.zeros(2), divergence="kl")
    with pytest.raises(ValueError, match=r"ld_alpha must lie in \[0, 1\]"):
        losses.length_desensitized(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), alpha=2)


# TRL's own code on the same numbers


def _batch(seed=0, pairs=5, prompt=3, completion=6):
    """What TRL's collator and its patched forward would give: rows [chosen; rejected], right-padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, completion + 1, (2 * pairs,), generator=generator)
    positions = torch.arange(prompt + completion)[None]
    mask = ((positions >= prompt) & (positions < prompt + lengths[:, None])).long()
    logps, sums = (torch.rand(2 * pairs, prompt + completion - 1, generator=generator) for _ in range(2))
    leaf = (-3 * logps).requires_grad_()
    logps = leaf * mask[:, 1:]  # TRL's forward gives 0 outside the completion
    ref = logps.detach().sum(-1).view(2, pairs) + 2 * torch.randn(2, pairs, generator=generator)
    return SimpleNamespace(leaf=leaf, mask=mask, logps=logps, sums=-sums * mask[:, 1:], ref=ref, lengths=lengths)


def _trl_loss(batch, loss_types, weights, **options):
    """DPOTrainer._compute_loss with a trainer and a model of straw around the numbers."""
    from trl import DPOTrainer

    defaults = {
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "ld_alpha": None,
    }
    options = {"beta": 0.1, "use_weighting": False, "discopop_tau": 0.05, **defaults, **options}
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=loss_types,
        loss_weights=weights,
        args=SimpleNamespace(discopop_tau=options.pop("discopop_tau")),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )
    nothing = torch.zeros_like(batch.logps)
    outputs = SimpleNamespace(
        log_probs=batch.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=batch.sums
    )
    inputs = {
        "input_ids": batch.mask,
        "attention_mask": batch.mask,
        "completion_mask": batch.mask,
        "ref_chosen_logps": batch.ref[0],
        "ref_rejected_logps": batch.ref[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def _our_loss(
    batch, loss_types, weights, *, ld_alpha=None, wpo=False, f_divergence="reverse_kl", f_alpha=0.5, **options
):
    mask = batch.mask[:, 1:].bool()
    shared = torch.minimum(*batch.lengths.chunk(2)).repeat(2)
    alpha = 1.0 if ld_alpha is None else ld_alpha
    weigh = losses.wpo_weights(batch.logps, batch.sums, mask).chunk(2) if wpo else None
    pairs = Pairs.stacked(
        logps=losses.length_desensitized(batch.logps, mask, shared, alpha=alpha),
        ref_logps=batch.ref.flatten(),
        lengths=batch.lengths,
        token_logps=batch.logps,
        mask=mask,
        weights=None if weigh is None else weigh[0] * weigh[1],
        f_divergence=f_divergence,
        f_alpha=f_alpha,
    )
    return Objective(loss_types, weights, **options)(pairs).total


def _assert_same(batch, ours, theirs):
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, batch.leaf, retain_graph=True)[0] for loss in (ours, theirs)))


@pytest.mark.slow
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_equals_trl(name, beta):
    """Loss and gradient of every loss that TRL 1.16 has."""
    smoothing = {"label_smoothing": 0.15} if name in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
    own = smoothing | ({} if name == "sft" else {"beta": beta}) | ({"discopop_tau": 0.3} if name == "discopop" else {})
    for seed in range(3):
        batch = _batch(seed)
        _assert_same(batch, _our_loss(batch, [name], None, **own), _trl_loss(batch, [name], [1.0], **own))


@pytest.mark.slow
def test_trl_has_no_other_losses():
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        _trl_loss(_batch(), ["none of them"], [1.0])
    assert str(error.value).count("', '") == len(TRL_LOSSES) - 1
    assert all(f"'{name}'" in str(error.value) for name in TRL_LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", losses.F_DIVERGENCES)
@pytest.mark.parametrize("name", [name for name in TRL_LOSSES if "f_divergence_type" not in LOSSES[name].forbids])
def test_f_divergences_equal_trl(name, divergence):
    batch, smoothing = _batch(2), {"label_smoothing": 0.15} if name in ("exo_pair", "robust") else {}
    options = smoothing | ({} if name == "sft" else {"beta": 0.4})
    ours = _our_loss(batch, [name], None, f_divergence=divergence, f_alpha=0.3, **options)
    theirs = _trl_loss(batch, [name], [1.0], f_divergence_type=divergence, f_alpha_divergence_coef=0.3, **options)
    _assert_same(batch, ours, theirs)


@pytest.mark.slow
def test_losses_that_take_an_f_divergence_are_those_of_trl():
    allowed = {
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "exo_pair",
        "robust",
        "discopop",
        "sft",
    }  # dpo_trainer.py, 1.16
    assert {name for name in TRL_LOSSES if "f_divergence_type" not in LOSSES[name].forbids} == allowed


@pytest.mark.slow
def test_mixtures_weights_and_tails_equal_trl():
    """Several losses, LD-DPO and WPO at once. WPO scales in place, so its losses are summed one by one."""
    batch, names, weights = _batch(4), ["sigmoid", "apo_down", "sft"], [1.0, 0.3, 0.2]
    _assert_same(batch, _our_loss(batch, names, weights, ld_alpha=0.4), _trl_loss(batch, names, weights, ld_alpha=0.4))
    ours = _our_loss(batch, ["sigmoid"], None, wpo=True, ld_alpha=0.4)
    _assert_same(batch, ours, _trl_loss(batch, ["sigmoid"], [1.0], use_weighting=True, ld_alpha=0.4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpo", "simpo", "alphapo"])
def test_equals_trls_cpo(name, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    smoothing = 0.0 if name == "alphapo" else 0.1
    trainer = SimpleNamespace(
        alpha=0.3 if name == "alphapo" else 0.0,
        beta=0.7,
        simpo_gamma=0.4,
        label_smoothing=smoothing,
        loss_type={"cpo": "sigmoid"}.get(name, "simpo"),
        accelerator=SimpleNamespace(device="cpu"),
    )
    pairs = _pairs(_sample())
    sums = [pairs.chosen.logps, pairs.rejected.logps]
    if name != "cpo":
        sums = [pairs.chosen.logps / pairs.chosen.lengths, pairs.rejected.logps / pairs.rejected.lengths]
    settings = {
        "cpo": {"cpo_alpha": 0.0, "label_smoothing": smoothing},
        "simpo": {"simpo_gamma": 0.4, "label_smoothing": smoothing},
        "alphapo": {"simpo_gamma": 0.4, "alphapo_alpha": 0.3},
    }[name]
    ours = Objective([name], beta=0.7, **settings)(pairs).terms[name]
    assert_close(ours, CPOTrainer.cpo_loss(trainer, *sums)[0])


@pytest.mark.slow
def test_equals_trls_orpo(monkeypatch):
    """But for the likelihood, which TRL computes from the logits of prompt and completion; its odds are in float32."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    pairs = _pairs(_sample())
    means = [side.logps / side.lengths for side in (pairs.chosen, pairs.rejected)]
    weighted = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    ours = Objective(["orpo"], beta=0.7)(pairs).terms["orpo"] - Objective(["sft"])(pairs).terms["sft"]
    assert_close(ours.float(), -weighted)
