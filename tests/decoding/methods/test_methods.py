"""Every method, through the processor, the loop and the scorer, on every text architecture, against float64 references.

The executors work in float32 with caches on batches padded on both sides of the contrast; the reference works in float64 on
each row alone, unpadded, without a cache. One text per row, contrast prompts of other lengths, in another order of length.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from oracles import decoding as reference
from oracles import rules as oracle

from contralto import decoding
from contralto.decoding.executors.score import score
from contralto.decoding.methods import METHODS as declared

STEPS = 8


class Method(NamedTuple):
    build: Callable[..., Any]
    """The processor, from the model, the contrast inputs (two of them), two other models, and the main inputs."""
    oracle: Callable[..., list[float]]
    """The reference scores from the main logits and those of the branches."""
    views: tuple[str, ...]
    """What the branches are."""
    unmasked: Callable[..., list[float]] | None = None
    """The reference without its plausibility constraint, if it has one."""


METHODS = {
    "vcd": Method(
        lambda s: decoding.VisualContrastiveDecodingLogitsProcessor(s.model, s.one, alpha=0.7, beta=0.05),
        lambda e, a: oracle.vcd(e, a, alpha=0.7, beta=0.05),
        ("one",),
        lambda e, a: oracle.vcd(e, a, alpha=0.7, beta=0),
    ),
    "icd": Method(
        lambda s: decoding.InstructionContrastiveDecodingLogitsProcessor(s.model, s.one),
        oracle.vcd,
        ("one",),
        lambda e, a: oracle.vcd(e, a, beta=0),
    ),
    "ritual": Method(
        lambda s: decoding.RitualLogitsProcessor(s.model, s.one, kappa=1.5, normalize=True),
        lambda e, a: oracle.ritual(e, a, kappa=1.5, normalise=True),
        ("one",),
        lambda e, a: oracle.ritual(e, a, kappa=1.5, normalise=True, beta=0),
    ),
    "ritual_vcd": Method(
        lambda s: decoding.RitualVCDLogitsProcessor(s.model, s.one, s.two, kappa=1.0),
        lambda e, t, n: oracle.vcd_ritual(e, n, t, kappa=1.0),
        ("one", "two"),
        lambda e, t, n: oracle.vcd_ritual(e, n, t, kappa=1.0, beta=0),
    ),
    "m3id": Method(
        lambda s: decoding.M3IDLogitsProcessor(s.model, s.one, lam=0.2),
        lambda e, a, step: oracle.m3id(e, a, step, lam=0.2),
        ("one",),
        lambda e, a, step: oracle.m3id(e, a, step, lam=0.2, alpha=0),
    ),
    "cid": Method(
        lambda s: decoding.ContrastiveInputDecodingLogitsProcessor(s.model, s.one, lam=5.0),
        lambda e, a: oracle.cid(e, a, lam=5.0),
        ("one",),
    ),
    "cid_log_ratio": Method(
        lambda s: decoding.ContrastiveInputDecodingLogitsProcessor(s.model, s.one, form="log_ratio"),
        oracle.cid_log_ratio,
        ("one",),
        lambda e, a: oracle.cid_log_ratio(e, a, alpha=0),
    ),
    "cad": Method(
        lambda s: decoding.ContextAwareDecodingLogitsProcessor(s.model, s.one, alpha=1.0),
        lambda e, a: oracle.cad(e, a, alpha=1.0),
        ("one",),
    ),
    "cfg": Method(
        lambda s: decoding.ClassifierFreeGuidanceLogitsProcessor(s.model, s.one, guidance_scale=2.0),
        lambda e, a: oracle.cfg(e, a, gamma=2.0),
        ("one",),
    ),
    "cfg_last_token": Method(
        lambda s: decoding.ClassifierFreeGuidanceLogitsProcessor(s.model, attention_mask=s.inputs["attention_mask"]),
        oracle.cfg,
        ("last",),
    ),
    "cd": Method(
        lambda s: decoding.ContrastiveDecodingLogitsProcessor(s.others[0], **s.extra),
        reference.contrastive_decoding,
        ("other",),
        lambda e, a: reference.contrastive_decoding(e, a, alpha=0),
    ),
    "proxy": Method(
        lambda s: decoding.ProxyTuningLogitsProcessor(*s.others, **s.extra), oracle.proxy_tuning, ("other", "another")
    ),
    "dola": Method(
        lambda s: decoding.DoLaLogitsProcessor(
            s.model, layers=layers(s.family), attention_mask=s.inputs["attention_mask"]
        ),
        lambda e, *layers: oracle.dola(e, layers),
        ("layers",),
        lambda e, *layers: oracle.dola(e, layers, relative_top=0),
    ),
}


def layers(family):
    """DoLa's candidates: all but the last; Mamba's states begin after its first layer."""
    depth = zoo.FAMILIES[family](32).num_hidden_layers
    return list(range(family == "mamba", depth))


DECODER_ONLY = {name for name, method in declared.items() if not method.encoder_decoder} | {"cfg_last_token"}


class Setting(NamedTuple):
    """A family's models and a batch of prompts with two contrast prompts each."""

    family: str
    model: Any
    others: tuple[Any, Any]
    inputs: dict[str, torch.Tensor]
    one: dict[str, torch.Tensor]
    two: dict[str, torch.Tensor]
    extra: dict[str, Any]
    rows: dict[str, list[torch.Tensor]]


def _setting(family, batch):
    encoded = family in zoo.ENCODER_DECODERS
    side = "right" if encoded else "left"
    rows = {
        "main": zoo.prompts(batch, seed=3),
        "one": zoo.prompts(batch + 1, seed=4)[:0:-1],
        "two": zoo.prompts(batch, seed=5),
    }
    main, one, two = (zoo.pad(rows[name], side=side) for name in ("main", "one", "two"))
    others = model(family, 16, 2), model(family, 16, 3)
    extra = {"encoder_inputs": main} if encoded else {"attention_mask": main["attention_mask"]}
    return Setting(family, model(family), others, main, one, two, extra, rows)


@functools.cache
def model(family, hidden=32, seed=1):
    """A float32 model; nothing changes it, so every test may have the same."""
    return zoo.build(family, hidden=hidden, seed=seed)


@functools.cache
def double(family, hidden=32, seed=1):
    return zoo.build(family, hidden=hidden, seed=seed).double()


class Oracle:
    """Reference logits of one row's branches, from float64 models."""

    def __init__(self, setting, row):
        self.family, self.rows = setting.family, {name: rows[row] for name, rows in setting.rows.items()}
        family = self.family
        self.encoded = family in zoo.ENCODER_DECODERS
        self.model = double(family)
        self.others = {"other": double(family, 16, 2), "another": double(family, 16, 3)}
        self.start = [setting.model.config.decoder_start_token_id] if self.encoded else self.rows["main"].tolist()

    def logits(self, view, generated):
        """Main or contrast logits after some generated tokens; for "layers" one list per layer."""
        new = torch.tensor(generated, dtype=torch.long)
        model = self.others.get(view, self.model)
        source = self.rows[view if view in self.rows else "main"]
        if self.encoded:
            ids = torch.cat([torch.tensor(self.start), new])
            return [reference.next_logits(model, ids, source)]
        if view == "layers":
            return zoo.layer_logits(model, self.family, torch.cat([source, new]), layers(self.family))
        return [reference.next_logits(model, torch.cat([source[-1:] if view == "last" else source, new]))]

    def scores(self, name, generated, *, masked=True, gate=None):
        method = METHODS[name]
        branches = [row for view in ("main", *method.views) for row in self.logits(view, generated)]
        rule = method.oracle if masked or method.unmasked is None else method.unmasked
        scores = rule(*branches, len(generated)) if name == "m3id" else rule(*branches)
        return scores if gate is None else oracle.gated(scores, branches[0], len(generated), gate=gate)

    def certainty(self, generated):
        """The largest probability of the main model."""
        return math.exp(max(reference.log_softmax(self.logits("main", generated)[0])))


def _greedy(name, setting, row, gate=None):
    found, teller = [], Oracle(setting, row)
    for _ in range(STEPS):
        scores = teller.scores(name, found, gate=gate)
        found.append(scores.index(max(scores)))
        if found[-1] == zoo.EOS:
            break
    return found


def _trim(rows):
    return [row[: row.index(zoo.EOS) + 1] if zoo.EOS in row else row for row in rows]


def _middle_gate(name, setting, batch):
    """A gate in the widest gap between certainties of the method's own texts, without a quarter at either end."""
    texts = [(Oracle(setting, row), _greedy(name, setting, row)) for row in range(batch)]
    found = sorted(teller.certainty(text[:t]) for teller, text in texts for t in range(1, len(text)))
    below = max(range(len(found) // 4, 3 * len(found) // 4), key=lambda i: found[i + 1] - found[i])
    return (found[below] + found[below + 1]) / 2


def _built(name, setting, gate):
    method = METHODS[name].build(setting)
    return method if gate is None else decoding.GatedLogitsProcessor(method, gate=gate)


def _check(name, family, batch, *, is_gated=False):
    setting = _setting(family, batch)
    if name in DECODER_ONLY and family in zoo.ENCODER_DECODERS:
        with pytest.raises(ValueError, match="encoder"):
            METHODS[name].build(setting)
        return
    gate = _middle_gate(name, setting, batch) if is_gated else None
    expected = [_greedy(name, setting, row, gate) for row in range(batch)]
    start = 1 if family in zoo.ENCODER_DECODERS else setting.inputs["input_ids"].shape[1]
    how = {"max_new_tokens": STEPS, "do_sample": False}
    slow = setting.model.generate(**setting.inputs, logits_processor=[_built(name, setting, gate)], **how)
    fast = setting.model.generate(**setting.inputs, custom_generate=_built(name, setting, gate).loop(), **how)
    assert _trim(slow[:, start:].tolist()) == expected
    assert torch.equal(slow, fast)
    _check_score(name, setting, expected, gate)


def _check_score(name, setting, expected, gate):
    """Both scores of the greedy texts, with a wrong token in the middle, and of unequal length."""
    texts = [[*text[:2], 7, *text[2:]] for text in expected]
    longest = max(map(len, texts))
    padded = torch.tensor([text + [zoo.PAD] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    for renormalized in (True, False):
        found = score(
            _built(name, setting, gate),
            setting.model,
            setting.inputs,
            padded,
            continuation_mask=mask,
            renormalized=renormalized,
        )
        for row, text in enumerate(texts):
            teller, total = Oracle(setting, row), 0.0
            for t, token in enumerate(text):
                scores = teller.scores(name, text[:t], masked=False, gate=gate)
                total += (reference.log_softmax(scores) if renormalized else scores)[token]
            assert found.total[row].item() == pytest.approx(total, abs=5e-3, rel=1e-4)
    assert found.length.tolist() == [len(text) for text in texts]


QUICK = {
    ("llama", "cd"),
    ("llama", "cad"),
    ("llama", "dola"),
    ("llama", "cid"),
    ("llama", "proxy"),
    ("gpt2", "m3id"),
    ("t5", "cad"),
    ("granite", "cd"),
}
"""Some methods on Llama, one on absolute positions, one on an encoder-decoder, one on scaled logits."""


GATED = {("llama", "cd"), ("llama", "cfg_last_token"), ("t5", "cad"), ("mamba", "cid")}
"""Another model, a window, an encoder-decoder, and a cache that takes one token at a time."""


def grid(quick):
    """Yield every method on every family; but for a few they are slow."""
    for family in zoo.FAMILIES:
        for name in METHODS:
            fast = (family, name) in quick
            yield pytest.param(name, family, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.covering
@pytest.mark.parametrize(("name", "family"), list(grid(QUICK)))
def test_methods(name, family):
    _check(name, family, batch=3)


@pytest.mark.covering
@pytest.mark.parametrize(("name", "family"), list(grid(GATED)))
def test_gated_methods(name, family):
    """With a gate, branches miss steps at which all rows are sure: the reference computes everything, and applies the gate."""
    _check(name, family, batch=2, is_gated=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("is_gated", [False, True])
def test_one_prompt(name, is_gated):
    _check(name, "qwen2", batch=1, is_gated=is_gated)
