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

from contralto.align.trainers import packing
from contralto.align.trainers.layout_masks import attends, dense_mask, layer_windows, model_mask
from contralto.align.trainers.layouts import Sharing, packed, shared_prefixes
from contralto.align.trainers.packing import LEAST, arrangement, first_fit_decreasing, joined, packed_rows
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
    assert all((tight.owners[row] == row).all() for i in split for row in (i, i + 6))


def _last_tokens(layout, lengths):
    """The number of tokens that nothing but themselves attends to, which look like padding."""
    ends, width = layout.ends.flatten(), layout.ends.shape[1]
    used = {int(at) for row, n in zip(layout.source, lengths, strict=True) for at in row[:n]}
    return sum(int(ends[at]) == at % width + 1 for at in used)


def random_trees(seed, size=5):
    """Pairs of conversations: of few prompts, on which completions follow that others go on from, behind one system prompt."""
    generator = random.Random(seed)

    def ids(least, most):
        return [generator.randint(3, 6) for _ in range(generator.randint(least, most))]

    system, texts = ids(0, 3), [ids(1, 4) for _ in range(3)]
    for _ in range(2 * size - len(texts)):
        texts.append(generator.choice(texts) + ids(0, 3))
    generator.shuffle(texts)
    rows = [torch.tensor(system + text) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, (tokens > 0).long()


@pytest.mark.parametrize("pack_length", [None, 14, 40])
@pytest.mark.parametrize("seed", range(12))
def test_trees_of_any_shape_lie_in_rows(seed, pack_length):
    ids, valid = random_trees(seed)
    layout = packed_rows(ids, valid, pack_length=pack_length)
    tokens, width = layout.inputs["input_ids"], layout.inputs["input_ids"].shape[1]
    mask = dense_mask(layout.ends, layout.inputs["position_ids"])
    paths = [layout.source[i, : valid[i].sum()].tolist() for i in range(len(ids))]
    for path, own in zip(paths, ids.tolist(), strict=True):
        assert tokens.flatten()[path].tolist() == own[: len(path)]
        assert len({at // width for at in path}) == 1
    for row in range(len(tokens)):
        assert mask[row, 0].tolist() == attended(
            [[at - row * width for at in path] for path in paths if path[0] // width == row], width
        )
    prefixes = {tuple(own[: i + 1]) for path, own in zip(paths, ids.tolist(), strict=True) for i in range(len(path))}
    computed = len({at for path in paths for at in path})
    assert computed == len(prefixes) if pack_length == 40 else computed >= len(prefixes)
    owners = torch.arange(len(ids))[:, None].expand(-1, ids.shape[1] - 1) if layout.owners is None else layout.owners
    for path, row in zip(paths, owners.tolist(), strict=True):
        assert path[1:] == [paths[owner][at] for at, owner in enumerate(row[: len(path) - 1], 1)]


def test_a_tree_that_is_too_long_is_divided_where_least_is_in_common():
    sharing = Sharing([0, 1, 2, 3], [0, 4, 2, 4])  # two pairs of a prompt of 4 tokens, which begin alike
    assert joined(sharing, [6, 6, 6, 6], 24).common == [0, 4, 2, 4]
    assert joined(sharing, [6, 6, 6, 6], 14).common == [0, 4, 2, 4]
    assert joined(sharing, [6, 6, 6, 6], 13).common == [0, 4, 0, 4]
    assert joined(sharing, [6, 6, 6, 6], 24, least=3).common == [0, 4, 0, 4]
    assert joined(sharing, [6, 6, 6, 6], 7).common == [0, 0, 0, 0]


def test_trees_are_left_small_where_that_fills_rows_better(monkeypatch):
    """Six sequences behind one token fill three rows of 10 as they are, and four if as many as possible are put into trees."""
    lengths, second = (6, 7, 4, 2, 8, 3), (18, 40, 34, 35, 25, 12)  # trees are made in the order of the second tokens
    ids = torch.zeros(6, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 0], ids[row, 1:length] = 7, second[row]
    shapes = {}
    for least in ((1,), LEAST):
        monkeypatch.setattr(packing, "LEAST", least)
        shapes[least] = tuple(packed_rows(ids, (ids > 0).long(), pack_length=10).inputs["input_ids"].shape)
    assert shapes == {(1,): (4, 10), LEAST: (3, 10)}


def test_completions_of_one_prompt_are_scored_once():
    """Four completions make six pairs, twelve sequences of which four are computed."""
    prompt, texts = [5, 6, 7], [[8, 9], [8, 10, 11], [12], [13, 14]]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    rows = [torch.tensor(prompt + texts[pair[side]]) for side in (0, 1) for pair in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counted = torch.arange(ids.shape[1]) >= 3
    labels, valid = ids.masked_fill((ids == 0) | ~counted, -100), (ids > 0).long()
    layout = packed_rows(ids, valid, pack_length=32)
    assert (layout.inputs["input_ids"] > 0).sum() == 3 + 7
    assert layout.without_copies(labels[:, 1:] != -100).sum() == 7
    assert (labels != -100).sum() == 24
    _assert_same_scores("llama", ids, valid, labels, layout)


def test_what_one_counts_and_another_reads_is_scored_where_it_counts():
    """A conversation that goes on has the answer of the shorter one in its prompt, or counts what is a prompt elsewhere."""
    no = -100
    ids = torch.tensor([[5, 6, 8, 0, 0], [5, 6, 8, 9, 10], [5, 6, 7, 4, 0], [5, 6, 7, 9, 11]])
    labels = torch.tensor([[no, no, 8, no, no], [no, no, no, no, 10], [no, no, no, 4, no], [no, no, 7, 9, 11]])
    valid = (ids > 0).long()
    layout = packed_rows(ids, valid, pack_length=16)
    assert (layout.inputs["input_ids"] > 0).sum() == 9
    assert layout.without_copies(labels[:, 1:] != no).equal(labels[:, 1:] != no)
    _assert_same_scores("llama", ids, valid, labels, layout)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_trees_change_no_score_and_no_gradient(family, seed):
    ids, valid = random_trees(seed)
    labels = ids.masked_fill((ids == 0) | (torch.rand(ids.shape) < 0.4), -100)
    for pack_length in (None, 14, 64):
        _assert_same_scores(family, ids, valid, labels, packed_rows(ids, valid, pack_length=pack_length))


def _assert_same_scores(family, ids, valid, labels, layout):
    """Log-probabilities and gradients in float64 are those of padded rows."""
    model = zoo.build(family).double()
    _without_float32(model)
    install_head(model)
    found = []
    for each in (None, layout):
        model.zero_grad()
        scores = model(input_ids=ids, attention_mask=valid, labels=labels, scoring=Scoring(layout=each))
        scores.logps.sin().sum().backward()
        found.append((scores.logps, *(weight.grad for weight in model.parameters())))
    for own, stock in zip(*found[::-1], strict=True):
        assert_close(own, stock, rtol=1e-10, atol=1e-10)


def test_pairs_that_share_nothing_are_packed_apart():
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
    both = packed_rows(ids[[0, 1]], torch.ones(2, 3))
    assert both.inputs["input_ids"].shape == (1, 5)
    apart = packed_rows(torch.tensor([[5, 6, 7], [4, 8, 9]]), torch.ones(2, 3))
    assert (apart.inputs["input_ids"].shape, apart.owners) == ((2, 3), None)


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
    ids, valid = random_pairs()
    _assert_same_scores(family, ids, valid, ids.masked_fill(ids == 0, -100), arrange(ids, valid))


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
