"""Chunked divergences and log-probabilities against float64 references, against autograd over whole logits, and by memory."""

import pytest
import torch
from oracles import align as reference
from torch.testing import assert_close

from contralto import testbed
from contralto.align.losses import divergences, workspace
from contralto.align.losses.chunked import Head, chunked_divergence, chunked_logps
from contralto.align.losses.formulas import DIVERGENCES, STATISTICS

OF_LOGITS = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jensen_shannon,
    "tvd": divergences.total_variation,
    "skew_kl": divergences.skew_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
}
TOKENS, WIDTH, VOCABULARY = 7, 5, 11
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def _random(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _head(vocabulary=VOCABULARY, width=WIDTH, seed=1, *, bias=False, dtype=torch.float64, **more):
    weight = _random(vocabulary, width, seed=seed, dtype=dtype)
    return Head(weight, _random(vocabulary, seed=seed + 9, dtype=dtype) if bias else None, **more)


def _logits(hidden, head):
    """What a model does with its head, in plain torch."""
    z = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _naive(name, student, teacher, *, alpha=0.1, beta=0.5, srkl="full"):
    """The divergence over whole logits, by autograd."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    alpha = torch.as_tensor(alpha, dtype=q.dtype).expand(q.shape[:-1])[..., None]
    match name:
        case "forward_kl":
            terms = p * (log_p - log_q)
        case "reverse_kl":
            terms = q * (log_q - log_p)
        case "jsd":
            log_m = (beta * p + (1 - beta) * q).log()
            terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        case "tvd":
            terms = (p - q).abs() / 2
        case "skew_kl":
            terms = p * (log_p - (alpha * p + (1 - alpha) * q).log())
        case "skew_reverse_kl":
            mixed = q.detach() if srkl == "detached" else q
            terms = q * (log_q - ((1 - alpha) * p + alpha * mixed).log())
    return terms.sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_equal_the_reference(name, temperature):
    student, teacher = _random(TOKENS, VOCABULARY), _random(TOKENS, VOCABULARY, seed=1)
    for alpha, beta in ((0.1, 0.5), (0.35, 0.2)):
        own = {"alpha": alpha} if "skew" in name else {"beta": beta} if name == "jsd" else {}
        rows = zip((student / temperature).tolist(), (teacher / temperature).tolist(), strict=True)
        expected = [reference.divergence(name, q, p, alpha=alpha, beta=beta) for q, p in rows]
        found = OF_LOGITS[name](student, teacher, temperature=temperature, **own)
        assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_with_more_axes_are_those_of_each_row(name):
    """`(2, TOKENS, V)` logits, of unlike vocabularies, and a skew per token."""
    student, teacher = _random(2, TOKENS, VOCABULARY), _random(2, TOKENS, VOCABULARY + 2, seed=1)
    alpha = torch.linspace(0, 0.9, 2 * TOKENS, dtype=torch.float64).view(2, TOKENS)
    own = [{"alpha": alpha[i]} if "skew" in name else {} for i in range(2)]
    expected = torch.stack([OF_LOGITS[name](student[i], teacher[i], **own[i]) for i in range(2)])
    found = OF_LOGITS[name](student, teacher, **({"alpha": alpha} if "skew" in name else {}))
    assert_close(found, expected)
    assert found.shape == (2, TOKENS)


def test_alpha_keeps_its_precision_and_every_alpha_is_checked():
    student, teacher = _random(TOKENS, VOCABULARY), _random(TOKENS, VOCABULARY, seed=1)
    expected = _naive("skew_kl", student, teacher, alpha=torch.tensor(0.1, dtype=torch.float64))
    assert_close(divergences.skew_kl(student, teacher, alpha=0.1), expected, rtol=1e-13, atol=0)
    for wrong in (-0.1, 1.0):
        alpha = torch.full((TOKENS,), 0.5)
        alpha[3] = wrong
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\)"):
            divergences.skew_kl(student, teacher, alpha=alpha)


@pytest.mark.parametrize("beta", [0, 1])
def test_the_ends_of_jensen_shannon_are_the_two_kls(beta):
    student, teacher = _random(TOKENS, VOCABULARY), _random(TOKENS, VOCABULARY, seed=1)
    expected = [
        reference.divergence("jsd", q, p, beta=beta) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert_close(divergences.jensen_shannon(student, teacher, beta=beta), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_hidden_states_equal_the_reference(name, kind):
    """Alpha per token, a teacher of another width, chunks that do not divide the tokens."""
    hidden, teacher_hidden = _random(TOKENS, WIDTH), _random(TOKENS, 3, seed=2)
    head, teacher_head = _head(**HEADS[kind]), _head(width=3, seed=3, bias=True, scale=0.5)
    alpha = torch.linspace(0.01, 0.6, TOKENS, dtype=torch.float64)
    biases = [torch.zeros(VOCABULARY) if h.bias is None else h.bias for h in (head, teacher_head)]
    expected = []
    for t in range(TOKENS):
        q, p = (
            reference.head(h[t].tolist(), each.weight.tolist(), bias.tolist(), each.scale, each.softcap)
            for h, each, bias in ((hidden, head, biases[0]), (teacher_hidden, teacher_head, biases[1]))
        )
        expected.append(
            reference.divergence(name, [z / 1.3 for z in q], [z / 1.3 for z in p], alpha=float(alpha[t]), beta=0.3)
        )
    for chunk_size in (1, 3, None):
        found = chunked_divergence(
            name,
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            alpha=alpha,
            beta=0.3,
            temperature=1.3,
            chunk_size=chunk_size,
        )
        assert_close(found.divergence, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("srkl", ["full", "detached"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_equal_autograd_over_whole_logits(name, kind, trained, srkl):
    """By hidden states, weight and bias, of divergence and target log-probabilities together, each token weighed on its own."""
    teacher_hidden, teacher_head = _random(TOKENS, 3, seed=2), _head(width=3, seed=3)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(4))
    weights = _random(2, TOKENS, seed=5)

    def leaves():
        head = _head(**HEADS[kind])
        moving = [_random(TOKENS, WIDTH).requires_grad_()]
        moving += [x.requires_grad_() for x in (head.weight, head.bias) if trained and x is not None]
        return head, moving

    head, found = leaves()
    ours = chunked_divergence(
        name,
        found[0],
        head,
        teacher_hidden,
        teacher_head,
        targets=targets,
        alpha=0.2,
        beta=0.3,
        srkl=srkl,
        chunk_size=3,
    )
    (weights[0] @ ours.divergence + weights[1] @ ours.logps).backward()
    head, expected = leaves()
    student, teacher = _logits(expected[0], head), _logits(teacher_hidden, teacher_head)
    values = _naive(name, student, teacher, alpha=0.2, beta=0.3, srkl=srkl)
    logps = student.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (weights[0] @ values + weights[1] @ logps).backward()
    assert_close(ours.divergence, values)
    assert_close(ours.logps, logps)
    assert_close(ours.teacher_logps, teacher.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_weights_known_beforehand_change_nothing(kind, trained):
    """The weighted sum and its gradients are those of the values weighed afterwards; the values are the same."""
    teacher_hidden, teacher_head = _random(TOKENS, 3, seed=2), _head(width=3, seed=3)
    weights, found = _random(TOKENS, seed=5), []
    for early in (False, True):
        head, hidden = _head(**HEADS[kind]), _random(TOKENS, WIDTH).requires_grad_()
        moving = [hidden, *(x.requires_grad_() for x in (head.weight, head.bias) if trained and x is not None)]
        ours = chunked_divergence(
            "skew_kl", hidden, head, teacher_hidden, teacher_head, weights=weights if early else None, chunk_size=3
        )
        total = ours.total if early else weights @ ours.divergence
        assert ours.divergence.requires_grad != early
        (2 * total).backward()
        found.append([total.detach(), ours.divergence.detach(), *(x.grad for x in moving)])
    assert_close(found[1], found[0])


@pytest.mark.parametrize("early", [False, True])
def test_blocks_within_a_chunk_change_nothing(early, monkeypatch):
    """A cache of two tokens, chunks of five: values, statistics and gradients are those of one block."""
    targets, other, found = torch.arange(TOKENS), _random(TOKENS, 3, seed=2), []
    alpha, weights = torch.linspace(0.1, 0.6, TOKENS), _random(TOKENS, seed=5)
    for cache in (2**21, 2 * 8 * VOCABULARY):
        monkeypatch.setattr(workspace, "_BLOCK_BYTES", {"cpu": cache})
        hidden, head = _random(TOKENS, WIDTH).requires_grad_(), _head(**HEADS["capped"])
        how = {"weights": weights} if early else {"targets": targets}
        ours = chunked_divergence(
            "skew_kl", hidden, head, other, _head(width=3, seed=3), alpha=alpha, chunk_size=5, **how
        )
        (ours.total if early else weights @ ours.divergence + ours.logps.sum()).backward()
        more = chunked_logps(hidden.detach(), head, targets, also=STATISTICS, chunk_size=5)
        found.append([x.detach() for x in (*ours, *more, hidden.grad) if x is not None])
    assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_half_precision_rounds_products_and_gradients_alone(kind, monkeypatch):
    """On a CPU, in blocks of two tokens: logits are those of the rounded products, their gradient is rounded once, all else is not."""
    monkeypatch.setattr(workspace, "_BLOCK_BYTES", {"cpu": 2 * 4 * VOCABULARY})
    half, targets = torch.bfloat16, torch.arange(TOKENS)
    hidden = _random(TOKENS, WIDTH, dtype=torch.float32).to(half)
    head = _head(**HEADS[kind], dtype=torch.float32)
    head = head._replace(weight=head.weight.to(half), bias=None if head.bias is None else head.bias.to(half))
    moving = hidden.clone().requires_grad_()
    logps = chunked_logps(moving, head, targets, chunk_size=5).logps
    logps.sum().backward()
    product = torch.mm(hidden, head.weight.t()).double().requires_grad_()
    rest = head._replace(weight=torch.eye(VOCABULARY).double(), bias=None if head.bias is None else head.bias.double())
    expected = _logits(product, rest).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (grad,) = torch.autograd.grad(expected.sum(), product)
    assert_close(logps.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_close(moving.grad, torch.mm(grad.to(half), head.weight), rtol=2e-2, atol=2e-2)


def test_a_teacher_in_full_precision_is_not_rounded():
    """Its logits do not pass through the half precision of the student."""
    half, (teacher, teacher_head) = torch.bfloat16, (_random(TOKENS, 3, seed=2, dtype=torch.float32), _head(width=3))
    teacher_head = teacher_head._replace(weight=teacher_head.weight.float())
    hidden, head = _random(TOKENS, WIDTH).to(half), _head()._replace(weight=_random(VOCABULARY, WIDTH).to(half))
    targets = torch.arange(TOKENS)
    found = chunked_divergence("forward_kl", hidden, head, teacher, teacher_head, targets=targets).teacher_logps
    expected = _logits(teacher.double(), teacher_head._replace(weight=teacher_head.weight.double())).log_softmax(-1)
    assert_close(found.double(), expected.gather(-1, targets[:, None]).squeeze(-1), rtol=1e-5, atol=1e-5)


def test_several_divergences_at_once():
    """Each for its own tokens, whatever the chunks: as one call each."""
    other, heads, grads = _random(TOKENS, 3, seed=2), (_head(), _head(width=3, seed=3)), []
    counts, targets = {"skew_kl": 3, "tvd": 0, "skew_reverse_kl": 4}, torch.arange(TOKENS)
    for chunk_size in (2, None, "apart"):
        hidden = _random(TOKENS, WIDTH).requires_grad_()
        if chunk_size == "apart":
            parts = (("skew_kl", slice(3)), ("skew_reverse_kl", slice(3, None)))
            found = [
                chunked_divergence(n, hidden[at], heads[0], other[at], heads[1], targets=targets[at]) for n, at in parts
            ]
            values, logps = (torch.cat([getattr(each, name) for each in found]) for name in ("divergence", "logps"))
        else:
            found = chunked_divergence(
                counts, hidden, heads[0], other, heads[1], targets=targets, chunk_size=chunk_size
            )
            values, logps = found.divergence, found.logps
        (values.square().sum() + logps.sum()).backward()
        grads.append([values.detach(), logps.detach(), hidden.grad])
    assert_close(grads[0], grads[2])
    assert_close(grads[1], grads[2])


def test_weighted_gradients_are_handed_out_once():
    hidden = _random(TOKENS, WIDTH).requires_grad_()
    found = chunked_divergence("tvd", hidden, _head(), hidden.detach(), _head(seed=3), weights=torch.ones(TOKENS))
    found.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        found.total.backward()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    """Against finite differences: of logits, of hidden states, of a trained head."""
    student, teacher = _random(3, 6).requires_grad_(), _random(3, 6, seed=1)
    assert torch.autograd.gradcheck(OF_LOGITS[name], (student, teacher))
    hidden, weight, bias = (_random(*shape, seed=7).requires_grad_() for shape in ((3, 2), (6, 2), (6,)))
    other = _head(6, 2, seed=3)

    def of(hidden, weight, bias):
        found = chunked_divergence(
            name,
            hidden,
            Head(weight, bias, softcap=4.0),
            hidden.detach() + 1,
            other,
            targets=torch.tensor([0, 5, 2]),
            chunk_size=2,
        )
        return found.divergence, found.logps

    frozen = weight.detach(), bias.detach()
    moved = hidden.detach() + 1

    def of_states(hidden):
        return chunked_divergence(name, hidden, Head(*frozen, softcap=4.0), moved, other).divergence

    def of_head(weight, bias):
        return chunked_divergence(name, moved, Head(weight, bias, softcap=4.0), moved, other).divergence

    assert torch.autograd.gradcheck(of_states, (hidden,))
    assert torch.autograd.gradcheck(of_head, (weight, bias))


def test_the_detached_gradient_is_that_of_jensen_shannon():
    """The official SRKL's gradient is grad JSD(beta = 1 - alpha) / alpha, and not the gradient of its value."""
    student, teacher, alpha = _random(TOKENS, VOCABULARY).requires_grad_(), _random(TOKENS, VOCABULARY, seed=1), 0.2
    detached, full, jsd = (
        torch.autograd.grad(values.sum(), student)[0]
        for values in (
            divergences.skew_reverse_kl(student, teacher, alpha=alpha, gradient="detached"),
            divergences.skew_reverse_kl(student, teacher, alpha=alpha),
            divergences.jensen_shannon(student, teacher, beta=1 - alpha) / alpha,
        )
    )
    assert_close(detached, jsd)
    assert (detached - full).norm() > 0.1 * full.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_do_not_diverge(name):
    logits = _random(TOKENS, VOCABULARY).requires_grad_()
    shift = 0 if name == "tvd" else 3  # the sign of a rounding error is not 0
    values = OF_LOGITS[name](logits, logits.detach() + shift)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert_close(values, torch.zeros_like(values))
    assert_close(gradient, torch.zeros_like(gradient))


def test_alpha_0_is_unskewed():
    student, teacher = _random(TOKENS, VOCABULARY), _random(TOKENS, VOCABULARY, seed=1)
    assert_close(divergences.skew_kl(student, teacher, alpha=0), divergences.forward_kl(student, teacher))
    assert_close(divergences.skew_reverse_kl(student, teacher, alpha=0), divergences.reverse_kl(student, teacher))


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_probabilities_too_small_for_the_dtype(name, alpha):
    """Logits that differ by hundreds: exp underflows in float32, the divergence must not."""
    student, teacher = 100 * _random(TOKENS, VOCABULARY), 100 * _random(TOKENS, VOCABULARY, seed=1)
    own = {"alpha": alpha} if "skew" in name else {}
    precise, leaf = OF_LOGITS[name](student, teacher, **own), student.float().requires_grad_()
    values = OF_LOGITS[name](leaf, teacher.float(), **own)
    assert_close(values, precise.float(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert gradient.isfinite().all()


def test_a_larger_vocabulary_is_cut():
    """As if the tokens beyond were not there, for logits and heads, on either side; the padding rows get no gradient."""
    small, large, hidden = _head(VOCABULARY), _head(VOCABULARY + 4, seed=3, bias=True), _random(TOKENS, WIDTH)
    cut = Head(large.weight[:VOCABULARY], large.bias[:VOCABULARY])
    expected = chunked_divergence("skew_kl", hidden, small, hidden, cut).divergence
    assert_close(chunked_divergence("skew_kl", hidden, small, hidden, large).divergence, expected)
    logits = _logits(hidden, small), _logits(hidden, large)
    assert_close(divergences.skew_kl(*logits), expected)
    large.weight.requires_grad_()
    chunked_divergence("skew_kl", hidden, large, hidden, small).divergence.sum().backward()
    assert large.weight.grad[:VOCABULARY].abs().gt(0).all()
    assert large.weight.grad[VOCABULARY:].eq(0).all()


@pytest.mark.parametrize("kind", HEADS)
def test_logps_and_statistics(kind):
    hidden, head = _random(TOKENS, WIDTH), _head(**HEADS[kind])
    targets = _logits(hidden, head).argmax(-1).where(torch.arange(TOKENS) % 2 == 0, torch.tensor(3))
    log_q = (_logits(hidden, head) / 0.8).log_softmax(-1)
    found = chunked_logps(hidden, head, targets, temperature=0.8, also=STATISTICS, chunk_size=3)
    assert_close(found.logps, log_q.gather(-1, targets[:, None]).squeeze(-1))
    assert_close(found.entropy, torch.distributions.Categorical(logits=log_q).entropy())
    assert_close(found.log_sum_sq_probs, log_q.exp().square().sum(-1).log())
    assert_close(found.mean_logits, (_logits(hidden, head) / 0.8).mean(-1))
    assert found.is_top1.tolist() == (log_q.argmax(-1) == targets).tolist()
    assert found.is_top1.any()
    assert not found.is_top1.all()
    plain = chunked_logps(hidden, head, targets, temperature=0.8)
    assert plain[1:] == (None, None, None, None)
    assert_close(plain.logps, found.logps)


@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck_of_logps(trained):
    hidden, weight = _random(4, 3).requires_grad_(), _random(6, 3, seed=1).requires_grad_(trained)

    def of(hidden, weight):
        return chunked_logps(
            hidden, Head(weight, softcap=5.0), torch.tensor([0, 5, 2, 2]), temperature=0.7, chunk_size=3
        ).logps

    assert torch.autograd.gradcheck(of, (hidden, weight))


def test_no_tokens_are_no_error():
    hidden = _random(0, WIDTH).requires_grad_()
    found = chunked_divergence(
        "skew_kl", hidden, _head(), hidden, _head(seed=3), targets=torch.zeros(0, dtype=torch.long)
    )
    assert [len(each) for each in found[:3]] == [0, 0, 0]
    (found.divergence.sum() + found.logps.sum()).backward()
    assert hidden.grad.shape == hidden.shape


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        found = chunked_divergence("skew_kl", _random(TOKENS, WIDTH), _head(), _random(TOKENS, WIDTH), _head(seed=3))
    assert not found.divergence.requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast_it_is_the_models_own_head(trained):
    """bf16 products as in the model's forward, sums in float32, gradients in the parameters' dtype."""
    hidden, head = _random(64, 32, dtype=torch.float32) / 8, _head(100, 32, dtype=torch.float32)
    teacher = _head(100, 32, seed=3, dtype=torch.float32)
    grads, results = [], []
    for run in range(2):
        leaf, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(trained)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if run:
                student, target = (torch.nn.functional.linear(leaf, w).float() for w in (weight, teacher.weight))
                values = _naive("skew_kl", student, target.detach())
            else:
                values = chunked_divergence("skew_kl", leaf, Head(weight), hidden, teacher, chunk_size=10).divergence
        assert values.dtype == torch.float32
        values.mean().backward()
        grads.append([leaf.grad, *([weight.grad] if trained else [])])
        results.append(values)
    assert_close(*results, rtol=1e-2, atol=1e-2)  # the last bit of bf16, by the order of the sums
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, rtol=0.05, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_under_autocast_a_model_does_not_differ_from_itself(trained, states):
    """Products of policy and reference in the same dtype: what rounding alone makes of one of them looks like a divergence."""
    hidden, head = _random(64, 32, dtype=torch.float32) / 8, _head(100, 32, dtype=torch.float32)
    hidden = hidden.to(states)
    leaf, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = chunked_divergence("reverse_kl", leaf, Head(weight), hidden, head, chunk_size=10).divergence
    values.sum().backward()
    for found in (values, leaf.grad, *([weight.grad] if trained else [])):
        assert_close(found.detach().float(), torch.zeros(found.shape), rtol=0, atol=1e-6)


def test_trained_models_of_unlike_width():
    """The embedded expert teaches the student: values as from the models' own logits, and the gradient leads downhill."""
    expert, student = testbed.load("expert"), testbed.load("student")
    ids = testbed.tokenizer()(["Ben went out to the barn and saw a cow."], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p, teacher = expert(input_ids=ids).logits[0, :-1], expert.base_model(input_ids=ids).last_hidden_state[0, :-1]

    def loss():
        hidden = student.base_model(input_ids=ids).last_hidden_state[0, :-1]
        heads = (Head(m.get_output_embeddings().weight) for m in (student, expert))
        return chunked_divergence(
            "skew_kl", hidden, next(heads), teacher, next(heads), targets=ids[0, 1:], chunk_size=4
        )

    found, log_q = loss(), student(input_ids=ids).logits[0, :-1].log_softmax(-1)
    assert_close(found.divergence, _naive("skew_kl", log_q, p))
    assert_close(found.logps, log_q.gather(-1, ids[0, 1:, None]).squeeze(-1))
    assert_close(found.teacher_logps, p.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss().divergence.mean().backward()
        optimizer.step()
    assert loss().divergence.mean() < 0.8 * found.divergence.mean()


def peak_bytes(work):
    """The most that is alive at once in torch's CPU allocator, over what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peak_memory(trained):
    """At most a sixth of the whole-logits implementation, and no tensor of the size of the logits is kept for backward."""
    tokens, vocabulary, width = 256, 4000, 32
    hidden, teacher_hidden = (_random(tokens, width, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    head, teacher = (_head(vocabulary, width, seed=s, dtype=torch.float32) for s in (2, 3))
    head.weight.requires_grad_(trained)
    kept = []

    def ours():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            found = chunked_divergence("skew_kl", hidden, head, teacher_hidden, teacher, chunk_size=16)
        found.divergence.mean().backward()

    def whole():
        with torch.no_grad():
            target = _logits(teacher_hidden, teacher)
        _naive("skew_kl", _logits(hidden, head), target).mean().backward()

    mine, theirs = peak_bytes(ours), peak_bytes(whole)
    assert theirs > 5 * 4 * tokens * vocabulary  # the yardstick really is several copies of the logits
    assert mine < theirs / 6
    assert max(kept) <= max(hidden.numel(), head.weight.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_on_a_gpu(name, dtype):
    """Value and gradients as on the CPU, up to what the dtype of the products rounds."""
    tensors = [
        _random(*shape, seed=i) / 3 for i, shape in enumerate([(64, 32), (100, 32), (100,), (64, 16), (100, 16)])
    ]
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, weight, bias, other, other_weight = (x.to(device, kind) for x in tensors)
        moving = [x.requires_grad_() for x in (hidden, weight, bias)]
        values = chunked_divergence(
            name, hidden, Head(weight, bias), other, Head(other_weight), chunk_size=10
        ).divergence
        values.sum().backward()
        found.append([values.detach().cpu().double(), *(x.grad.cpu().double() for x in moving)])
    loose = 0.05 if dtype == torch.bfloat16 else 1e-4
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, rtol=loose, atol=loose * theirs.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_equals_trls_kernel(name, beta):
    """TRL 1.16's ChunkedDivergenceFunction has three of the six; values and gradients are the same."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, teacher_hidden = (_random(TOKENS, WIDTH, seed=s, dtype=torch.float32) for s in (0, 1))
    head = _head(bias=True, scale=0.7, softcap=4.0, dtype=torch.float32)
    teacher = _head(seed=3, dtype=torch.float32)
    leaves = [[x.clone().requires_grad_() for x in (hidden, head.weight, head.bias)] for _ in range(2)]
    mine, theirs = leaves
    ours = chunked_divergence(
        name, mine[0], head._replace(weight=mine[1], bias=mine[2]), teacher_hidden, teacher, beta=beta, temperature=1.5
    ).divergence
    other, _ = ChunkedDivergenceFunction.apply(*theirs, teacher_hidden, teacher.weight, None, beta, 1.5, 0.7, 4.0)
    assert_close(ours, other)
    for values in (ours, other):
        values.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_logps_equal_trls_kernel():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, head = _random(TOKENS, WIDTH, dtype=torch.float32), _head(bias=True, dtype=torch.float32)
    targets = torch.arange(TOKENS)
    ours = chunked_logps(hidden, head, targets, temperature=1.5, also=STATISTICS)
    logps, *more = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, targets, 1.5, 4, None, 1.0)
    assert_close(ours.logps, logps)
    for mine, theirs in zip(ours[1:], more, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": {"tvd": 3}}, r"the divergences \{'tvd': 3\} must be for 7 tokens"),
        ({"divergence": "kl"}, "there is no divergence 'kl'; there are forward_kl, reverse_kl"),
        ({"alpha": 1.0}, r"alpha must lie in \[0, 1\)"),
        ({"alpha": torch.tensor([0.1, 0.2])}, r"alpha must be a number or of the shape \(7,\), not \(2,\)"),
        ({"divergence": "jsd", "beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"divergence": "skew_reverse_kl", "srkl": "none"}, '"full" or "detached", not \'none\''),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, not 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"hidden": _random(TOKENS, 3)}, r"hidden states must be of shape \(7, 5\) for this head, not \(7, 3\)"),
        ({"teacher_hidden": _random(2, WIDTH)}, r"must be of shape \(7, 5\)"),
        ({"targets": torch.tensor([1])}, r"targets must be of shape \(7,\)"),
        ({"weights": torch.ones(3)}, r"weights must be of shape \(7,\), one per hidden state, and without targets"),
        ({"weights": torch.ones(7), "targets": torch.ones(7).long()}, "and without targets"),
    ],
)
def test_mistakes_are_told(change, message):
    arguments = {
        "divergence": "skew_kl",
        "hidden": _random(TOKENS, WIDTH),
        "head": _head(),
        "teacher_hidden": _random(TOKENS, WIDTH),
        "teacher_head": _head(),
    }
    with pytest.raises(ValueError, match=message):
        chunked_divergence(**(arguments | change))


def test_mistakes_elsewhere_are_told():
    with pytest.raises(ValueError, match=r"`also` may hold entropy, .*, not perplexity"):
        chunked_logps(_random(2, WIDTH), _head(), torch.tensor([0, 1]), also=["perplexity"])
    with pytest.raises(ValueError, match="logits differ in shape"):
        divergences.forward_kl(_random(2, 5), _random(3, 5))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_divergences_of_logits_with_axes_before_the_last(name):
    student, teacher = _random(2, 3, VOCABULARY), _random(2, 3, VOCABULARY, seed=1)
    found = OF_LOGITS[name](student, teacher)
    assert found.shape == (2, 3)
    assert_close(found, torch.stack([OF_LOGITS[name](q, p) for q, p in zip(student, teacher, strict=True)]))


@pytest.mark.parametrize("is_larger", [False, True])
def test_logits_without_a_head(is_larger):
    """Logits in place of hidden states, on both sides or beside a head without a bias whose vocabulary is larger."""
    student, teacher = _random(TOKENS, VOCABULARY), _random(TOKENS, WIDTH, seed=1)
    head = _head(VOCABULARY + 2 * is_larger)
    expected = _naive("forward_kl", student, _logits(teacher, head)[:, :VOCABULARY])
    assert_close(chunked_divergence("forward_kl", student, None, teacher, head).divergence, expected)
    both = chunked_divergence("forward_kl", student, None, _logits(teacher, head), None).divergence
    assert_close(both, expected)
