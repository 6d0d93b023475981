"""Packing of pairs into rows: bins, places, masks, and runs that end where padded ones end."""

import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import zoo
from helpers.trl_warnings import RENAMED_OPTIONS
from oracles.packing import attended, fewest_bins
from torch.nn.attention.flex_attention import BlockMask
from torch.testing import assert_close

from contralto.align.trainers.layout_masks import attends, dense_mask, layer_windows, model_mask
from contralto.align.trainers.layouts import packed, shared_prefixes
from contralto.align.trainers.packing import arrangement, first_fit_decreasing, packed_rows
from contralto.align.trainers.scoring import Scoring, install_head

pytestmark = RENAMED_OPTIONS


def random_pairs(size=6, seed=0):
    """Ids and mask of pairs of which some share much, some nothing, and one is twice the same."""
    generator = random.Random(seed)

    def ids(most):
        return [generator.randint(3, 40) for _ in range(generator.randint(1, most))]

    pairs = []
    for i in range(size):
        prompt = ids(9) if i else []
        chosen, rejected = [[1 + side, *ids(7)] for side in (0, 1)]
        pairs.append((prompt + chosen, prompt + (chosen if i == 1 else rejected)))
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    tokens = torch.zeros(2 * size, max(map(len, rows)), dtype=torch.long)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return tokens, (tokens > 0).long()


# ------------------------------------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_those_of_first_fit_decreasing(seed):
    generator = random.Random(seed)
    lengths, capacity = [generator.randint(1, 12) for _ in range(generator.randint(1, 8))], generator.randint(12, 20)
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(item for one in bins for item in one) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for number, one in enumerate(bins):
        assert sum(lengths[i] for i in one) <= capacity
        for item in one:
            before = set(order[: order.index(item)])  # what lay in an earlier bin when the item came
            for other in bins[:number]:
                assert sum(lengths[i] for i in other if i in before) + lengths[item] > capacity
    assert len(bins) <= math.floor(11 / 9 * fewest_bins(lengths, capacity) + 6 / 9)


def test_bins_of_nothing_and_of_too_much():
    assert first_fit_decreasing([], 5) == []
    assert first_fit_decreasing([5, 5], 5) == [[0], [1]]
    with pytest.raises(ValueError, match="a sequence of 6 tokens is longer than pack_length, 5: raise pack_length"):
        first_fit_decreasing([6, 1], 5)


# ------------------------------------------------------------------------------------------------------- places and masks


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pack_length", [None, 20, 64])
def test_every_token_attends_to_its_own_sequence(window, share, pack_length):
    ids, valid = random_pairs()
    layout = packed_rows(ids, valid, share=share, pack_length=pack_length)
    tokens, positions = layout.inputs["input_ids"], layout.inputs["position_ids"]
    width = tokens.shape[1]
    if pack_length is not None:
        assert width == pack_length
    mask = dense_mask(layout.ends, positions, window)
    paths = [layout.source[i, : valid[i].sum()] for i in range(len(ids))]
    for path, own in zip(paths, ids, strict=True):
        assert tokens.flatten()[path].tolist() == own[: len(path)].tolist()
        assert positions.flatten()[path].tolist() == list(range(len(path)))
        assert len(set((path // width).tolist())) == 1
    for row in range(len(tokens)):
        own = [(path - row * width).tolist() for path in paths if path[0] // width == row]
        assert mask[row, 0].tolist() == attended(own, width, window)


def test_shared_tokens_are_computed_once_and_pairs_that_are_too_long_twice():
    ids, valid = random_pairs()
    lengths = valid.sum(-1)
    shared = (ids[:6] == ids[6:])[:, :].long() * valid[:6] * valid[6:]
    common = shared.cumprod(-1).sum(-1)
    computed = [
        (layout.ends != torch.arange(1, layout.ends.shape[1] + 1)).sum() + _last_tokens(layout, lengths)
        for layout in (packed_rows(ids, valid), packed_rows(ids, valid, share=False))
    ]
    assert computed == [lengths.sum() - common.sum(), lengths.sum()]
    longest = int(lengths.max())
    tight = packed_rows(ids, valid, pack_length=longest)
    assert tight.inputs["input_ids"].shape[1] == longest
    fits = lengths[:6] + lengths[6:] - common <= longest
    assert fits.any()
    assert not fits.all()
    split = [i for i in range(6) if not fits[i]]
    assert all(tight.source[i, 0] != tight.source[i + 6, 0] for i in split)
    assert not tight.repeated[[i + 6 for i in split]].any()


def _last_tokens(layout, lengths):
    """The number of tokens that nothing but themselves attends to, which look like padding."""
    ends, width = layout.ends.flatten(), layout.ends.shape[1]
    used = {int(at) for row, n in zip(layout.source, lengths, strict=True) for at in row[:n]}
    return sum(int(ends[at]) == at % width + 1 for at in used)


def test_pairs_that_share_nothing_are_packed_apart():
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
    both = packed_rows(ids[[0, 1]], torch.ones(2, 3))
    assert both.inputs["input_ids"].shape == (1, 5)
    apart = packed_rows(torch.tensor([[5, 6, 7], [4, 8, 9]]), torch.ones(2, 3))
    assert (apart.inputs["input_ids"].shape, apart.repeated) == ((2, 3), None)


def test_a_sequence_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 3 tokens is longer than pack_length, 2"):
        packed_rows(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), pack_length=2)


# ------------------------------------------------------------------------------------------------------------- attentions


def test_masks_take_the_form_of_the_attention():
    layout = packed_rows(*random_pairs())
    seen = dense_mask(layout.ends, layout.inputs["position_ids"])
    forms = {}
    for attention in ("sdpa", "eager", "flex_attention"):
        model = zoo.build("llama")
        model.set_attn_implementation(attention)
        forms[attention] = layout.inputs_for(model)["attention_mask"]
    assert forms["sdpa"].equal(seen)
    assert forms["eager"].dtype == torch.float32
    assert (forms["eager"] == 0).equal(seen)
    assert isinstance(forms["flex_attention"], BlockMask)
    assert forms["flex_attention"].shape == (len(seen), 1, *seen.shape[2:])


def test_layers_with_a_window_have_a_mask_of_their_own():
    layout = packed_rows(*random_pairs())
    ends, positions = layout.ends, layout.inputs["position_ids"]
    both = model_mask(zoo.build("gemma3"), ends, positions)
    assert both["full_attention"].equal(dense_mask(ends, positions))
    assert both["sliding_attention"].equal(dense_mask(ends, positions, 5))
    assert not both["sliding_attention"].equal(both["full_attention"])
    assert model_mask(zoo.build("mistral"), ends, positions).equal(both["sliding_attention"])
    assert layer_windows(zoo.build("gemma3").config) == {"sliding_attention": 5, "full_attention": None}


def test_blocks_of_flex_attention_hold_the_mask():
    """A block is skipped if nothing in it is attended to, and full if everything is."""
    torch.manual_seed(0)
    prompt, tails = torch.randint(3, 40, (3, 1, 150)), torch.randint(3, 40, (3, 2, 200))
    tails[:, 0, 0], tails[:, 1, 0] = 1, 2
    ids = torch.cat([torch.cat([prompt, tails[:, side : side + 1]], -1)[:, 0] for side in (0, 1)])
    layout = packed_rows(ids, torch.ones_like(ids), pack_length=1200)
    model = zoo.build("llama")
    model.set_attn_implementation("flex_attention")
    blocks = layout.inputs_for(model)["attention_mask"]
    dense = dense_mask(layout.ends, layout.inputs["position_ids"])
    size = blocks.BLOCK_SIZE[0]
    tiles = (
        torch.nn.functional.pad(dense[0, 0], (0, -1200 % size, 0, -1200 % size))
        .unfold(0, size, size)
        .unfold(1, size, size)
    )
    assert blocks.to_dense()[0, 0].bool().equal(tiles.any(-1).any(-1))
    assert 0 < blocks.sparsity() < 100
    rows, at = torch.zeros(1, dtype=torch.long), torch.arange(1200)
    assert attends(layout.ends, layout.inputs["position_ids"])(rows, rows, at[:, None], at).equal(dense[0, 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, while it compiles
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_computes_the_same(family):
    """Forward, since it has no backward pass on a CPU; compiled there as on a GPU."""
    ids, valid = random_pairs()
    labels = ids.masked_fill(ids == 0, -100)
    found = []
    for attention, layout in (("sdpa", None), ("flex_attention", packed_rows(ids, valid))):
        model = zoo.build(family)
        model.set_attn_implementation(attention)
        install_head(model)
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=valid, labels=labels, scoring=Scoring(layout=layout))
        found.append(scores.logps)
    assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "arrange",
    [shared_prefixes, partial(packed_rows, share=False), packed_rows, partial(packed_rows, pack_length=24)],
    ids=["prefix_sharing", "packing", "both", "fixed"],
)
def test_log_probabilities_and_gradients_are_those_of_padded_rows(family, arrange):
    model = zoo.build(family).double()
    _without_float32(model)
    install_head(model)
    ids, valid = random_pairs()
    labels = ids.masked_fill(ids == 0, -100)
    found = []
    for layout in (None, arrange(ids, valid)):
        model.zero_grad()
        scores = model(input_ids=ids, attention_mask=valid, labels=labels, scoring=Scoring(layout=layout))
        scores.logps.sin().sum().backward()
        found.append((scores.logps, *(weight.grad for weight in model.parameters())))
    for own, stock in zip(*found[::-1], strict=True):
        assert_close(own, stock, rtol=1e-10, atol=1e-10)


def _without_float32(model):
    """Let the norms that compute in float32 compute in the dtype of their input."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, states):
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight if hasattr(module, "variance_epsilon") else 1 + module.weight  # Gemma's is around 0
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


# ---------------------------------------------------------------------------------------------------------------- options


def test_options_select_the_layout():
    options = {"prefix_sharing": False, "padding_free": False, "packing": False, "pack_length": None}

    def made(attention="sdpa", **given):
        return arrangement(SimpleNamespace(**options | given), attention)

    assert made() is None
    assert made(prefix_sharing=True) is shared_prefixes
    assert made(padding_free=True) is packed
    assert made(packing=True).keywords == {"share": False, "pack_length": None}
    both = made("flex_attention", packing=True, prefix_sharing=True, pack_length=512)
    assert (both.func, both.keywords) == (packed_rows, {"share": True, "pack_length": 512})
    assert made("flash_attention_2", packing=True) is packed  # by position_ids, without a mask


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch, while it compiles
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_on_a_gpu(family):
    """Gradients too, compiled, with windows."""
    ids, valid = (tensor.cuda() for tensor in random_pairs())
    labels = ids.masked_fill(ids == 0, -100)
    found = []
    for attention, arrange in (("sdpa", None), ("flex_attention", partial(packed_rows, pack_length=128))):
        model = zoo.build(family, hidden=64).cuda()  # heads of 16, the least that it compiles for
        model.set_attn_implementation(attention)
        install_head(model)
        layout = None if arrange is None else arrange(ids, valid)
        scores = model(input_ids=ids, attention_mask=valid, labels=labels, scoring=Scoring(layout=layout))
        scores.logps.sin().sum().backward()
        found.append((scores.logps.detach(), *(weight.grad for weight in model.parameters())))
    for own, stock in zip(*found[::-1], strict=True):
        assert_close(own, stock, rtol=1e-2, atol=1e-2 * stock.abs().max().item())
