"""The losses of single completions against float64 references in plain Python, and their objective."""

import math
import random

import pytest
import torch
from oracles import align as reference
from torch.testing import assert_close

from contralto.align.losses import unpaired
from contralto.align.losses.unpaired import BOTH, UNPAIRED, LabelledRows, UnpairedLoss, UnpairedObjective

LABELS = [True, False, False, True, False]
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
OF_QCRD = {"qcrd_beta": 0.7, "qcrd_delta": 1.9}
SETTINGS = {"kto": WEIGHTS, "apo_zero_unpaired": WEIGHTS, "qcrd": OF_QCRD}
Z = 0.4
QUALITIES = [0.9, 0.2, 0.6, 0.1, 1.0]


def _texts(seed=0):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 6) for _ in LABELS]
    return [reference.Text(*([rng.uniform(-4, 0) for _ in range(n)] for _ in range(2))) for n in sizes]


def _rows(texts, labels=LABELS):
    return LabelledRows(
        logps=torch.tensor([t.logp for t in texts], dtype=torch.float64),
        lengths=torch.tensor([t.n for t in texts]),
        label=torch.tensor(labels),
        ref_logps=torch.tensor([t.ref for t in texts], dtype=torch.float64),
        reference_point=torch.tensor(Z, dtype=torch.float64),
        quality=torch.tensor(QUALITIES, dtype=torch.float64),
    )


def _expected(name, texts, beta):
    forget = [t for t, label in zip(texts, LABELS, strict=True) if not label]
    keep = [t for t, label in zip(texts, LABELS, strict=True) if label]
    if name in ("kto", "apo_zero_unpaired"):
        z = Z if name == "kto" else 0.0
        return [reference.kto(t, label, z, beta=beta, **WEIGHTS) for t, label in zip(texts, LABELS, strict=True)]
    if name == "qcrd":
        rows = zip(texts, LABELS, QUALITIES, strict=True)
        return [reference.qcrd(t, label, s, beta=0.7, delta=1.9) for t, label, s in rows]
    if name == "npo":
        return [reference.npo(t, beta=beta) for t in forget]
    if name == "gradient_ascent":
        return [reference.mean_logp(forget)] * len(forget)
    return [-reference.mean_logp(keep)] * len(keep)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", UNPAIRED)
def test_equals_the_reference(name, beta):
    settings = SETTINGS.get(name, {}) | ({"beta": beta} if "beta" in UNPAIRED[name].settings else {})
    assert settings.keys() == UNPAIRED[name].settings.keys()
    for seed in range(3):
        texts = _texts(seed)
        term = UnpairedObjective([name], **settings)(_rows(texts)).terms[name]
        assert_close(term, torch.tensor(_expected(name, texts, beta), dtype=torch.float64))


def test_the_reference_point_has_no_gradient():
    r, z = (
        torch.ones(2, dtype=torch.float64, requires_grad=True),
        torch.ones((), dtype=torch.float64, requires_grad=True),
    )
    unpaired.kto(r, torch.tensor([True, False]), z).sum().backward()
    assert z.grad is None
    assert r.grad[0] < 0 < r.grad[1]


def test_the_gradient_of_npo_is_that_of_gradient_ascent_where_beta_is_small():
    r = torch.tensor([-3.0, 2.0], dtype=torch.float64, requires_grad=True)
    (small,) = torch.autograd.grad(unpaired.npo(r, beta=1e-6).sum(), r)
    assert_close(small, torch.ones_like(r), rtol=1e-5, atol=0)
    (large,) = torch.autograd.grad(unpaired.npo(r, beta=2.0).sum(), r)
    assert_close(large, 2 * torch.sigmoid(2.0 * r.detach()))


def test_an_objective_is_the_weighted_sum_of_means_over_the_rows_read():
    texts = _texts(4)
    total, terms = UnpairedObjective(["npo", "retain"], [0.5, 2.0], beta=0.3)(_rows(texts))
    assert {name: len(term) for name, term in terms.items()} == {"npo": 3, "retain": 2}
    means = [sum(values) / len(values) for values in (_expected(name, texts, 0.3) for name in terms)]
    assert total.item() == pytest.approx(0.5 * means[0] + 2 * means[1])


def test_a_batch_without_rows_of_a_label_counts_nothing_for_it():
    texts = _texts(4)
    rows = _rows(texts, [True] * len(texts))
    rows.logps.requires_grad_()
    total, terms = UnpairedObjective(["npo"])(rows)
    assert (total.item(), len(terms["npo"])) == (0.0, 0)
    total.backward()
    assert rows.logps.grad.tolist() == [0.0] * len(texts)


def test_needs_and_labels():
    assert UnpairedObjective(["kto"]).needs == {"reference", "kl"}
    assert UnpairedObjective(["npo"]).needs == {"reference"}
    difference = UnpairedObjective(["gradient_ascent", "retain"])
    assert (difference.needs, difference.labels, difference.forgets) == (frozenset(), BOTH, True)
    assert not UnpairedObjective(["kto"]).forgets


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnpairedObjective(["nto"]), "there is no unpaired loss 'nto'"),
        (lambda: UnpairedObjective([]), "at least one loss"),
        (lambda: UnpairedObjective(["npo", "npo"]), "each once"),
        (lambda: UnpairedObjective(["npo", "retain"], [1.0]), "loss_weights must be one per loss: 2, not 1"),
        (lambda: UnpairedObjective(["npo"], [math.nan]), "loss_weights must be finite"),
        (lambda: UnpairedObjective(["npo"], gamma=1.0), "npo do not read gamma"),
        (lambda: UnpairedObjective(["npo"], beta=0.0), "beta must be a finite number above 0"),
        (
            lambda: UnpairedObjective(["kto"], desirable_weight=-1.0),
            "desirable_weight must be a finite number of at least 0",
        ),
        (lambda: unpaired.kto(torch.zeros(1), torch.tensor([True]), torch.tensor(0.0), beta=-1.0), "beta must"),
        (lambda: unpaired.npo(torch.zeros(1), beta=math.inf), "beta must"),
        (lambda: UNPAIRED.register(len, name="length"), "must be an UnpairedLoss, not a builtin_function"),
        (
            lambda: UnpairedLoss(name="x", description="", function=lambda smell: smell, labels=BOTH),
            "unknown input smell; inputs are logps",
        ),
        (
            lambda: UnpairedLoss(name="x", description="", function=lambda logps, *, k: k, labels=BOTH),
            "setting k of the loss 'x' has no default",
        ),
        (
            lambda: UnpairedLoss(name="x", description="", function=lambda logps: logps, labels=frozenset()),
            "labels of the loss 'x' must be true, false or both",
        ),
        (
            lambda: UnpairedObjective(["npo"])(
                LabelledRows(logps=torch.zeros(1), lengths=torch.ones(1), label=torch.zeros(1).bool())
            ),
            "needs logratios, which these rows do not have",
        ),
    ],
)
def test_mistakes_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
