"""Layouts of a batch of pairs: the log-probabilities and gradients of every architecture that obeys them are those of the padded rows."""

from functools import partial

import pytest
import torch
import zoo
from torch.testing import assert_close

from contralto.align.trainers.batches import IGNORED
from contralto.align.trainers.layouts import LAYOUTS, Layout, packed, shared_prefixes, unsupported_reason
from contralto.align.trainers.packing import packed_rows
from contralto.align.trainers.scoring import Scoring, install_head

ARRANGEMENTS = {
    **LAYOUTS,
    "packing": partial(packed_rows, share=False),
    "packing and sharing": packed_rows,
    "rows of 12": partial(packed_rows, pack_length=12),
}
OBEY = [
    (family, name) for family in ("llama", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma3") for name in ARRANGEMENTS
]
OBEY += [("opt", name) for name in ARRANGEMENTS if name != "padding_free"]
QUICK = {("llama", "rows of 12"), ("gpt2", "packing"), ("gemma3", "packing and sharing"), ("mistral", "prefix_sharing")}
PAIRS = [
    ([5, 6, 7], [8, 9, 10, 11], [8, 9, 12]),  # the texts begin alike
    ([5, 6], [13], [14, 15, 16, 17]),
    ([20, 21, 22, 23], [7, 8], [7, 8, 9]),  # one is the beginning of the other
    ([24], [25, 26], [25, 26]),  # the same twice
]


def padded(pairs=PAIRS):
    """Ids, attention mask and labels of the rows that TRL's collator makes."""
    rows = [(prompt, text) for side in (1, 2) for prompt, text in ((pair[0], pair[side]) for pair in pairs)]
    width = max(len(prompt) + len(text) for prompt, text in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, text) in enumerate(rows):
        ids[i, : len(prompt) + len(text)] = torch.tensor(prompt + text)
        labels[i, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
    return ids, (ids > 0).long(), labels


def scored(model, layout=None, **more):
    ids, mask, labels = padded()
    request = Scoring(also=("entropy", "is_top1"), layout=layout, **more)
    return model(input_ids=ids, attention_mask=mask, labels=labels, scoring=request)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "name"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in OBEY]
)
def test_every_architecture_that_obeys_computes_the_same(family, name, attention):
    model = zoo.build(family).double()  # but norms and eager softmax, which are in float32
    model.set_attn_implementation(attention)
    install_head(model)
    assert unsupported_reason(type(model), model.config, attention, masked=True) is None
    layout = ARRANGEMENTS[name](*padded()[:2])
    found = []
    for each in (None, layout):
        model.zero_grad()
        one = scored(model, each, states=True)
        one.logps.sin().sum().backward()
        found.append((one, [weight.grad for weight in model.parameters()]))
    (stock, grads), (own, own_grads) = found
    valid = padded()[2][:, 1:] != IGNORED
    for value in ("logps", "entropy", "is_top1"):
        assert_close(getattr(own, value), getattr(stock, value), rtol=1e-6, atol=1e-5)
    for states, others in zip(own.states, stock.states, strict=True):
        assert_close(states[valid], others[valid], rtol=1e-6, atol=1e-5)
    for grad, other in zip(own_grads, grads, strict=True):
        assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_shared_tokens_are_computed_and_scored_once():
    layout = shared_prefixes(*padded()[:2])
    assert layout.inputs["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [5, 6, 13, 14, 15, 16, 17, 0],
        [20, 21, 22, 23, 7, 8, 9, 0],
        [24, 25, 26, 0, 0, 0, 0, 0],
    ]
    valid = padded()[2][:, 1:] != IGNORED
    assert (layout.without_copies(valid).sum(), valid.sum()) == (15, 21)
    model = zoo.build("llama")
    install_head(model)
    assert len(scored(model, layout, hidden=True).hidden) == 15


def test_padding_is_nothing_in_common():
    ids, mask, _ = padded([([5, 6], [7, 8], [7, 8])])
    layout = shared_prefixes(*(torch.nn.functional.pad(each, (0, 3)) for each in (ids, mask)))
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 7, 8]]


def test_tokens_that_only_one_text_counts_are_scored():
    """A text that was cut in front may begin with tokens that are the other's prompt."""
    ids, mask, labels = padded([([5, 6, 7], [8, 9], [8, 10])])
    labels[0, 3] = IGNORED
    layout = shared_prefixes(ids, mask)
    assert layout.without_copies(labels[:, 1:] != IGNORED).sum() == (labels != IGNORED).sum()


REFUSED = {
    "mamba": "carries a state from token to token",
    "bloom": "takes no position_ids",
}


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("masked", [False, True])
def test_other_architectures_are_refused(family, masked):
    model = zoo.build(family)
    assert REFUSED[family] in unsupported_reason(type(model), model.config, "sdpa", masked=masked)


def test_kinds_of_layers_without_a_mask_are_refused():
    model = zoo.build("llama", layer_types=["chunked_attention", "full_attention"])
    assert "has layers of chunked_attention, for which no mask is made" in unsupported_reason(
        type(model), model.config, "sdpa", masked=True
    )
    assert unsupported_reason(type(model), model.config, "sdpa", masked=False) is None


def test_flash_attention_takes_no_mask():
    model = zoo.build("llama")
    assert "flash_attention_2 takes no mask" in unsupported_reason(
        type(model), model.config, "flash_attention_2", masked=True
    )
    assert unsupported_reason(type(model), model.config, "flash_attention_2", masked=False) is None


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_hold_in_a_packed_row(family):
    model = zoo.build(family)
    install_head(model)
    with torch.no_grad():
        stock, own = scored(model), scored(model, packed(*padded()[:2]))
    assert_close(own.logps, stock.logps, rtol=1e-5, atol=1e-5)
    assert isinstance(packed(*padded()[:2]), Layout)
