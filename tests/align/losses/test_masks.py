"""SparsePO's masks and DistiLLM-2's curriculum against references in plain Python, and the hooks on every family."""

import math
import random

import pytest
import torch
import zoo
from oracles import align as reference
from torch.testing import assert_close

from contralto import testbed
from contralto.align.losses import preference as losses
from contralto.align.losses.activations import KINDS, record
from contralto.align.losses.curriculum import PAPER, RELEASED, RELEASED_GRADUAL, Curriculum
from contralto.align.losses.masks import DensityMonitor, LearnedMask, Masks, density, mapo

DECODERS = sorted(set(zoo.FAMILIES) - zoo.ENCODER_DECODERS)


def _rows(batch=2, length=6):
    return torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def _means(values):
    return values.mean(-1)


@pytest.fixture(scope="module")
def expert():
    return testbed.load("expert")


def test_mapo_equals_the_reference():
    """Two kinds with unlike numbers of places; what stands outside the completions must not matter."""
    rng, lengths = random.Random(0), (6, 3, 4)
    kinds = {"mlp": 2, "residual": 3}
    texts = [
        {kind: [[[rng.gauss(0, 1) for _ in range(4)] for _ in range(n)] for _ in range(k)] for kind, k in kinds.items()}
        for n in lengths
    ]
    outside = torch.tensor([-99.0] + [99.0] * 7).repeat(3, 1)
    activations = {kind: [outside.clone() for _ in range(k)] for kind, k in kinds.items()}
    valid = torch.zeros(3, 8, dtype=torch.bool)
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        valid[row, 1 : 1 + n] = True
        for kind, places in text.items():
            for k, place in enumerate(places):
                activations[kind][k][row, 1 : 1 + n] = torch.tensor(place).mean(-1)
    found = mapo(activations, valid)
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        assert_close(found[row, 1 : 1 + n], torch.tensor(reference.mapo(list(text.values()))), rtol=1e-4, atol=1e-5)
    assert found[~valid].eq(0).all()
    assert found.max() <= 1
    assert_close(mapo(activations, valid[:, :-1]), found[:, :-1])


def test_mapo_of_a_single_token_is_1():
    assert mapo({"mlp": [torch.tensor([[3.0, 4.0]])]}, torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]


def _places_by_hand(model, ids):
    """The activations that the released code reads of a model like Llama, `(B, T, features)`, from its weights alone."""
    config, base = model.config, model.model
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotated(x):  # (B, T, n, size)
        half = torch.arange(0, size, 2, dtype=torch.float64) / size
        angle = torch.arange(x.shape[1])[:, None] / config.rope_parameters["rope_theta"] ** half
        cos, sin = (f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    h = base.embed_tokens.weight[ids]
    found = {"residual": [h], "attention": [], "mlp": [], "logits": []}
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = norm(h, layer.input_layernorm.weight)
        q, k, v = (normed @ p.weight.T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        rows, length = ids.shape
        q_turned, k_turned = rotated(q.view(rows, length, heads, size)), rotated(k.view(rows, length, groups, size))
        keys, values = (x.repeat_interleave(heads // groups, 2) for x in (k_turned, v.view(rows, length, groups, size)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q_turned, keys) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores, values).flatten(2)
        found["attention"] += [q, k, v, q_turned.flatten(2), k_turned.flatten(2), mixed]
        out = mixed @ attention.o_proj.weight.T
        between = h + out
        second = norm(between, layer.post_attention_layernorm.weight)
        inner = torch.nn.functional.silu(second @ mlp.gate_proj.weight.T) * (second @ mlp.up_proj.weight.T)
        delta = inner @ mlp.down_proj.weight.T
        found["mlp"].append(inner)
        h = between + delta
        found["residual"] += [normed, out, between, second, delta, h]
    last = norm(h, base.norm.weight)
    found["residual"].append(last)
    found["logits"].append(last @ model.lm_head.weight.T)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_equal_those_computed_from_the_weights_by_hand(attention):
    """The released recipe of MaPO: the places, the mean over features, z-norm and scaling over tokens, means of places and kinds."""
    model, ids = zoo.build("llama").double(), _rows()
    model.set_attn_implementation(attention)
    valid = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    with torch.no_grad(), record(model) as activations:
        model(input_ids=ids)
        places = _places_by_hand(model, ids)
    assert {kind: len(each) for kind, each in activations.items()} == {kind: len(each) for kind, each in places.items()}
    for kind, each in places.items():
        for mine, theirs in zip(
            sorted(activations[kind], key=torch.sum), sorted(map(_means, each), key=torch.sum), strict=True
        ):
            assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)
    found = mapo(activations, valid)
    for row in range(2):
        kinds = [[place[row][valid[row]].tolist() for place in each] for each in places.values()]
        assert_close(found[row][valid[row]], torch.tensor(reference.mapo(kinds)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "attention", "stream"), [("gpt2", 4, 6), ("gpt_neox", 6, 5), ("qwen3", 6, 6)])
def test_places_of_families_of_the_released_code(family, attention, stream):
    """GPT-2 has no rotary embedding; a layer of GPT-NeoX whose MLP reads what the attention reads has no sum in between."""
    model, ids = zoo.build(family), _rows()
    with torch.no_grad(), record(model) as activations:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    assert [len(activations[kind]) for kind in KINDS] == [attention * layers, layers, stream * layers + 2, 1]
    residual = [place.sum().item() for place in activations["residual"]]
    for state in states:  # the last one is normalised
        assert any(total == pytest.approx(_means(state).sum().item(), rel=1e-4) for total in residual)


def test_a_fused_projection_is_split_into_queries_keys_and_values():
    for family in ("gpt2", "gpt_neox"):
        model, ids, seen = zoo.build(family), _rows(), []
        layer = (model.transformer.h if family == "gpt2" else model.gpt_neox.layers)[0]
        fused = layer.attn.c_attn if family == "gpt2" else layer.attention.query_key_value
        handle = fused.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad(), record(model, kinds=["attention"]) as activations:
            model(input_ids=ids)
        handle.remove()
        heads = model.config.num_attention_heads
        parts = seen[0].chunk(3, -1) if family == "gpt2" else seen[0].view(*ids.shape, heads, 3, -1).unbind(-2)
        for mine, part in zip(activations["attention"], parts, strict=False):
            assert_close(mine, _means(part.reshape(*ids.shape, -1)))


def test_the_attention_functions_are_restored():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own(*args, **kwargs):
        raise AssertionError

    ALL_ATTENTION_FUNCTIONS["own"] = own
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with record(zoo.build("llama")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before["sdpa"]
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    del ALL_ATTENTION_FUNCTIONS["own"]
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_routers_and_experts_are_passed_over():
    """What a router reads is not the feature of an MLP, and what an expert sees has no row per token."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    more = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=zoo.VOCAB, **small, **more)).eval()
    with torch.no_grad(), record(model) as activations:
        model(input_ids=_rows())
    assert {kind: len(places) for kind, places in activations.items()} == {"attention": 12, "residual": 14, "logits": 1}


class _Tower(torch.nn.Module):
    """A model of three layers of one projection, called by keyword, in bfloat16, beside a list of two."""

    def __init__(self, sizes=(2, 3)):
        super().__init__()
        kinds = [[torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)}) for _ in range(size)] for size in sizes]
        self.lists = torch.nn.ModuleDict({str(i): torch.nn.ModuleList(layers) for i, layers in enumerate(kinds)})
        for layer in self.lists.modules():
            if isinstance(layer, torch.nn.ModuleDict) and "proj" in layer:
                layer.forward = lambda hidden_states, layer=layer: layer["proj"](hidden_states)
        self.to(torch.bfloat16)

    def forward(self, hidden):
        for layers in self.lists.values():
            for layer in layers:
                hidden = layer(hidden_states=hidden)
        return hidden


def test_record_reads_the_longest_list_of_layers_and_keeps_float32():
    for sizes, expected in (((2, 3), 3), ((3, 2), 3), ((1,), 1)):
        model = _Tower(sizes)
        with torch.no_grad(), record(model, kinds=["residual"]) as activations:
            model(torch.ones(2, 3, 4, dtype=torch.bfloat16))
        assert len(activations["residual"]) == 1 + expected
        assert {place.dtype for place in activations["residual"]} == {torch.float32}


def test_record_takes_only_the_kinds_asked_for(expert):
    with torch.no_grad(), record(expert, kinds=["mlp"]) as activations:
        expert(input_ids=_rows())
    assert set(activations) == {"mlp"}


@pytest.mark.parametrize("family", DECODERS)
def test_record_finds_its_places_in_every_family(family):
    model, ids = zoo.build(family), _rows()
    with torch.no_grad(), record(model) as activations:
        model(input_ids=ids)
        model(input_ids=ids)  # the second forward starts over
    layers = model.config.num_hidden_layers
    assert len(activations["residual"]) >= 3 * layers + 2
    assert len(activations["attention"]) >= 3 * layers
    assert len(activations["logits"]) == 1
    assert len(activations.get("mlp", [])) == (0 if family == "mamba" else layers)
    assert all(place.shape == ids.shape for places in activations.values() for place in places)
    mask = mapo(activations, torch.ones_like(ids[:, 1:]))
    assert mask.shape == (2, 5)
    assert 0.1 < mask.mean() < 0.9


def test_record_reads_the_language_model_of_a_vision_language_model():
    """And not the vision tower, whatever its depth: one number per token of the text, image tokens included."""
    zoo_vision = pytest.importorskip("zoo_vision")
    model = zoo_vision.build("llava")
    inputs = zoo_vision.batch([case[0] for case in zoo_vision.cases("llava", 2)])
    with torch.no_grad(), record(model) as activations:
        model(**inputs)
    assert len(activations["residual"]) == 6 * model.config.get_text_config().num_hidden_layers + 2
    assert activations["mlp"][0].shape == inputs["input_ids"].shape


def test_record_reads_the_base_under_adapters():
    """With the adapters off the activations are the base model's; with them on they are not."""
    peft = pytest.importorskip("peft")
    ids, plain = _rows(), zoo.build("llama")
    with torch.no_grad(), record(plain) as expected:
        plain(input_ids=ids)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    with torch.no_grad(), record(model) as adapted:
        model(input_ids=ids)
    with torch.no_grad(), model.disable_adapter(), record(model) as found:
        model(input_ids=ids)
    assert {kind: len(places) for kind, places in found.items()} == {
        kind: len(places) for kind, places in expected.items()
    }
    for kind, places in expected.items():
        assert_close(found[kind], places)
    assert not torch.allclose(adapted["mlp"][-1], expected["mlp"][-1])


def test_hooks_are_gone_afterwards(expert):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in expert.modules())

    before = hooks()
    with record(expert):
        assert hooks() > before
    with pytest.raises(RuntimeError, match="stop"), record(expert) as activations:
        raise RuntimeError("stop")
    expert(input_ids=_rows())
    assert not activations
    assert hooks() == before


def _reference_network(network, states):
    """ReLU(sum_l v_l ReLU(w_l LayerNorm(h) + b_l)) in plain floats, of one token's states."""
    total = 0.0
    for h, w, b, v in zip(states, network.weight.tolist(), network.bias.tolist(), network.mixer.tolist(), strict=True):
        mean = sum(h) / len(h)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in h) / len(h) + network.norm.eps)
        scale, shift = network.norm.weight.tolist(), network.norm.bias.tolist()
        normed = [(x - mean) / deviation * s + t for x, s, t in zip(h, scale, shift, strict=True)]
        total += v * max(0.0, sum(x * y for x, y in zip(normed, w, strict=True)) + b)
    return max(0.0, total)


@pytest.mark.parametrize("independent", [False, True])
def test_learned_masks_equal_the_reference(independent):
    generator = torch.Generator().manual_seed(0)
    network = LearnedMask(3, 4, independent=independent).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    states = [torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    masks = network(states, valid)
    assert (masks.reward is masks.kl) == (not independent)
    for mask, own in zip(masks, (network.networks[0], network.networks[-1]), strict=True):
        for b in range(2):
            expected = [_reference_network(own, [h[b, t].tolist() for h in states]) * valid[b, t] for t in range(5)]
            assert_close(mask[b], torch.tensor([float(x) for x in expected], dtype=torch.float64))
        assert mask.eq(0).any()
        assert mask.gt(0).any()
    assert_close(network(states, valid[:, :4]).reward, masks.reward[:, :4])


@pytest.mark.parametrize("independent", [False, True])
def test_a_learned_mask_begins_as_tdpo_with_every_layer_alive(independent):
    """The mask is 1 on every token, and the loss has a gradient by every layer's weights and by the policy."""
    generator = torch.Generator().manual_seed(1)
    network = LearnedMask(4, 8, independent=independent)
    states = [torch.randn(4, 5, 8, generator=generator) for _ in range(4)]
    valid = torch.ones(4, 5)
    masks = network(states, valid)
    ratios, kl = torch.randn(4, 5, generator=generator, requires_grad=True), torch.rand(4, 5, generator=generator)
    halves = [x.chunk(2) for x in (ratios, kl, masks.reward, masks.kl)]
    loss = losses.sparsepo(*(half for pair in halves for half in pair))
    assert_close(loss, losses.tdpo1(*(x.sum(-1) for pair in halves[:2] for x in pair)))
    loss.mean().backward()
    assert ratios.grad.abs().gt(0).all()
    assert all(own.weight.grad.abs().gt(0).any(-1).all() for own in network.networks)


def test_dropout_drops_in_training_alone():
    network, states, valid = LearnedMask(1, 4, dropout=0.5), [torch.randn(1, 200, 4)], torch.ones(1, 200)
    torch.manual_seed(0)
    trained = network(states, valid).reward
    assert set(trained.unique().tolist()) == {0.0, 4.0}  # kept twice, each time doubled
    assert network.eval()(states, valid).reward.eq(1).all()


def test_the_l1_penalty_makes_a_learned_mask_sparse_where_tokens_do_not_matter():
    """Half of the tokens carry the preference, and their states say so: training keeps those and drops the others."""
    generator = torch.Generator().manual_seed(2)
    matters = (torch.rand(16, 10, generator=generator) < 0.5).float()
    noise = 0.3 * torch.randn(16, 10, 6, generator=generator)
    states = [noise + (2 * matters - 1)[..., None] * torch.tensor([2.0, 0, -1, 0, 0, -1])]
    ratios = matters * torch.tensor([1.0] * 8 + [-1.0] * 8)[:, None]  # chosen up, rejected down
    network, valid, zero = LearnedMask(1, 6), torch.ones(16, 10), torch.zeros(8, 10)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(60):
        mask = network(states, valid).reward
        (chosen, rejected), (r_w, r_l) = mask.chunk(2), ratios.chunk(2)
        loss = losses.sparsepo(
            r_w, r_l, zero, zero, chosen, rejected, chosen, rejected, beta=0.5, lambda_u=0.02, lambda_d=0.02
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert mask[matters == 0].eq(0).float().mean() > 0.9
    assert mask[matters == 1].mean() > 0.5


def test_the_released_curricula_keep_alpha():
    own, other = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.5])
    for curriculum in (RELEASED, RELEASED_GRADUAL):
        assert curriculum.alpha(own, other, epoch=2).tolist() == pytest.approx([curriculum.alpha_0] * 2)
    assert PAPER.alpha(own, other, epoch=2).tolist() != pytest.approx([PAPER.alpha_0] * 2)


def test_density_and_its_warning():
    valid = torch.tensor([[True, True, True, False]])
    thin, full = torch.tensor([[0.0, 0.0, 0.3, 5.0]]), torch.tensor([[2.0, 1.0, 3.0, 0.0]])
    assert density(thin, valid) == pytest.approx((1 / 3, 0.1))
    monitor = DensityMonitor(floor=0.5)
    with pytest.warns(UserWarning, match=r"SparsePO's mask_d is 0 on 66.7% of the tokens") as warned:
        found = monitor(Masks(full, thin), valid)
    assert warned[0].filename == __file__
    assert found == pytest.approx({"mask_u/share": 1.0, "mask_u/mean": 2.0, "mask_d/share": 1 / 3, "mask_d/mean": 0.1})
    assert monitor(Masks(full, full), valid) == pytest.approx({"mask/share": 1.0, "mask/mean": 2.0})  # one for both
    monitor(Masks(full, thin), valid)  # once is enough: a second warning would be an error here


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: record(torch.nn.Linear(2, 2), kinds=["norms"]).__enter__(),
            "kinds must be of attention, mlp, residual, logits, not norms",
        ),
        (lambda: record(torch.nn.Linear(2, 2)).__enter__(), "no decoder layers found in Linear"),
        (lambda: mapo({}, torch.ones(1, 1)), "nothing was recorded"),
        (
            lambda: mapo({"mlp": [torch.ones(2, 3)]}, torch.ones(2, 1)),
            r"do not fit: they are of shape \(2, 3\) and \(2, 1\)",
        ),
        (lambda: LearnedMask(0, 4), "at least one layer"),
        (lambda: LearnedMask(2, 4, dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (
            lambda: LearnedMask(2, 4)([torch.ones(1, 2, 4)], torch.ones(1, 2)),
            "made for 2 layers of hidden states, not 1",
        ),
        (lambda: DensityMonitor(floor=2), "floor must lie"),
        (lambda: Curriculum(alpha_0=0.5), "alpha_0 must lie between low and high"),
        (lambda: Curriculum(low=0.5), "low and high must be ordered"),
        (lambda: Curriculum(high=1.0), "low and high must be ordered"),
        (lambda: Curriculum(beta_0=2), "beta_0 must lie"),
        (lambda: Curriculum(beta_max=0.2), "beta_max must lie between beta_0, 0.5, and 1, not 0.2"),
        (lambda: Curriculum(beta_max=1.5), "beta_max must lie between beta_0, 0.5, and 1, not 1.5"),
        (lambda: Curriculum(ramp=1.5), "ramp must lie in"),
        (lambda: Curriculum(ramp=0.0), "ramp must lie in"),
        (lambda: Curriculum(factor=0), "factor must be above 0"),
        (lambda: PAPER.beta(epoch=0, epochs=3, step=0, steps=1), "epoch must lie in 1 to 3, not 0"),
        (lambda: PAPER.beta(epoch=1, epochs=3, step=5, steps=4), "step must lie in 0 to 4"),
        (lambda: PAPER.beta(epoch=1, epochs=1, step=0, steps=0), "step must lie in 0 to 0"),
        (lambda: PAPER.alpha(torch.ones(2), torch.ones(3), epoch=1), "differ in shape"),
    ],
)
def test_mistakes_are_told(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_ends_of_ranges_are_allowed():
    """No warning either for a mask that is as dense as the floor, which would be an error here."""
    ones = torch.ones(1, 2)
    for floor in (0.0, 1.0):
        DensityMonitor(floor=floor)(Masks(ones, ones), ones)
    assert LearnedMask(1, 1)([torch.ones(1, 2, 1)], ones).reward.tolist() == [[1.0, 1.0]]
    Curriculum(low=0.0, alpha_0=0.0, beta_0=1.0, beta_max=1.0, ramp=1.0)


# DistiLLM-2's curriculum


def test_alpha_equals_the_reference():
    rng = random.Random(0)
    for size in (2, 5, 9):
        p, q = ([rng.uniform(0.01, 0.99) for _ in range(size)] for _ in range(2))
        found = PAPER.alpha(*(torch.tensor(x, dtype=torch.float64).log() for x in (p, q)), epoch=2)
        assert_close(found, torch.tensor(reference.alpha(p, q), dtype=torch.float64))
    wide = Curriculum(alpha_0=0.3, low=0.0, high=0.9)
    p, q = [0.5, 0.6, 0.7], [0.2, 0.25, 0.3]
    found = wide.alpha(*(torch.tensor(x, dtype=torch.float64).log() for x in (p, q)), epoch=2)
    assert_close(found, torch.tensor(reference.alpha(p, q, alpha_0=0.3, low=0.0, high=0.9), dtype=torch.float64))
    assert found.unique().numel() == 3


def test_hard_texts_are_skewed_more():
    """And the product that the paper keeps constant is constant where nothing is clipped."""
    wide, gaps = Curriculum(alpha_0=0.4, low=0.0, high=0.99), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    q = torch.full((3,), 0.1, dtype=torch.float64)
    alpha = wide.alpha((q + gaps).log(), q.log(), epoch=3)
    assert alpha.diff().gt(0).all()
    assert_close((1 - alpha) * gaps, torch.full_like(gaps, 0.6 * gaps.mean()))
    assert_close(
        wide.alpha((q + gaps).log(), q.log(), epoch=3, mean_gap=0.2)[0], torch.tensor(0.4, dtype=torch.float64)
    )


def test_alpha_rests_in_the_first_epoch_and_in_the_released_setting():
    p, q = torch.tensor([0.9, 0.3]).log(), torch.tensor([0.1, 0.2]).log()
    assert PAPER.alpha(p, q, epoch=1).tolist() == pytest.approx([0.1, 0.1])
    assert RELEASED.alpha(p, q, epoch=3).tolist() == pytest.approx([0.1, 0.1])
    assert PAPER.alpha(p, q, epoch=2).tolist() == pytest.approx([0.1, 0.01])
    assert PAPER.alpha(p, p, epoch=2).tolist() == pytest.approx([0.1, 0.1])


def test_beta_equals_the_reference_and_never_falls():
    found = []
    for step in range(301):
        epoch = min(step // 100 + 1, 3)
        found.append(PAPER.beta(epoch=epoch, epochs=3, step=step, steps=300))
        assert found[-1] == pytest.approx(reference.beta(epoch, 3, step, 300))
    assert found[0] == 0.5
    assert found[-1] == 1.0
    assert found == sorted(found)
    assert len(set(found)) > 40


def test_weights():
    """The paper's halves; the released code's plain sum, at any time."""
    assert PAPER.weights(epoch=2, epochs=2, step=2, steps=2) == (0.0, 0.5)
    assert PAPER.weights(epoch=1, epochs=4, step=0, steps=2) == (0.25, 0.25)
    assert (
        RELEASED.weights(epoch=2, epochs=2, step=2, steps=2)
        == (1.0, 1.0)
        == RELEASED.weights(epoch=1, epochs=4, step=0, steps=2)
    )


def test_the_released_path_of_beta():
    """(2 - b) SKL + b SRKL with b = 1 + min(1, 2 step / steps) / 2, as jongwooko/distillm-2 has it behind its switch."""
    for step in range(0, 301, 50):
        b = 1 + 0.5 * min(1, 2 * step / 300)
        found = RELEASED_GRADUAL.weights(epoch=1, epochs=1, step=step, steps=300)
        assert found == pytest.approx((2 - b, b))
    assert RELEASED_GRADUAL.idle(3) == (0, 0)


@pytest.mark.parametrize(("epochs", "share"), [(1, 1.0), (2, 0.5), (3, 2 / 3), (4, 0.5), (5, 0.6), (7, 4 / 7)])
def test_the_papers_beta_leaves_the_teachers_texts_without_weight(epochs, share):
    """Counted step by step with the reference; beta_max keeps every step."""
    ends = [reference.beta(i // 60 + 1, epochs, i, 60 * epochs) for i in range(60 * epochs)]
    assert sum(beta == 1 for beta in ends) / len(ends) == pytest.approx(share, abs=0.02)
    assert PAPER.idle(epochs).skew_kl == pytest.approx(share, abs=0.01)
    assert PAPER.idle(epochs).skew_reverse_kl == 0
    assert Curriculum(beta_max=0.9).idle(epochs) == (0, 0)
    assert Curriculum(beta_0=0.0, beta_max=0.9, ramp=1.0).idle(epochs).skew_reverse_kl == 0.01 / epochs


def test_the_share_without_weight_is_exact():
    assert PAPER.idle(2).skew_kl == 0.5
