"""The completion head against a model's own logits, in every causal family of transformers that can be built small."""

import copy
import itertools
import logging

import pytest
import torch
import zoo
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2VisionConfig,
    LlavaNextConfig,
    ProphetNetConfig,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from contralto import testbed
from contralto.align.losses.chunked import chunked_divergence
from contralto.align.trainers.batches import IGNORED, PairBatch
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.distillation import DistillationPairTrainer
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.scoring import Scoring, install_head
from contralto.common.head import HeadForm, head_of
from contralto.testbed import worlds

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.tensor([[2], [4]]) > torch.arange(9), IGNORED)
VALID = LABELS[:, 1:] != IGNORED
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def own_logps(model):
    """With whole logits."""
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1).masked_fill(~VALID, 0)


def scored(model, **request):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS, scoring=Scoring(**request))


def sharpened(model):
    """Logits far enough apart for a factor to show."""
    set_seed(0)
    layer = model.get_output_embeddings()
    torch.nn.init.normal_(layer.weight, std=1.0)
    return model.eval()


def assert_same(model, *, again=2):
    """Log-probabilities and gradients, in the call that measures and in a later one."""
    expected = own_logps(model)
    model.zero_grad()
    expected.sin().sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    install_head(model)
    for _ in range(again):
        model.zero_grad()
        found = scored(model).logps
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        found.sin().sum().backward()
        for name, grad in grads.items():
            assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-6, atol=1e-8)


def small(family, **more):
    config = AutoConfig.for_model(family, **SHAPE | SPECIAL | more)
    set_seed(0)
    return sharpened(AutoModelForCausalLM.from_config(config)).double()


FAMILIES = {  # what stands between hidden state and logits
    "modernbert-decoder": ({}, HeadForm("head", 1.0, None, direct=False)),
    "cohere": ({"logit_scale": 0.3}, HeadForm("head", 0.3)),
    "granite": ({"logits_scaling": 4.0}, HeadForm("head", 0.25)),
    "gemma2": ({"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 2}, HeadForm("head", 1.0, 3.0)),
    "phi": ({}, HeadForm("head")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_the_models_own(family):
    more, expected = FAMILIES[family]
    model = small(family, **more)
    assert_same(model)
    found = model.measured_head
    assert (found.kind, found.direct) == (expected.kind, expected.direct)
    assert found.scale == pytest.approx(expected.scale, rel=1e-9)
    assert found.softcap == (None if expected.softcap is None else pytest.approx(expected.softcap, rel=1e-9))


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


def _wrapper(name):
    """Wrappers of a text model whose logits are scaled: one does as it does, one does not."""
    if name == "llava_next":
        text = AutoConfig.for_model("granite", logits_scaling=8.0, **SHAPE, **SPECIAL)
        return LlavaNextConfig(
            text_config=text,
            vision_config=AutoConfig.for_model("clip_vision_model", patch_size=14, **VISION),
            image_token_index=47,
        )
    text = AutoConfig.for_model("cohere2", logit_scale=0.0625, **SHAPE, **SPECIAL)
    vision = AutoConfig.for_model("siglip_vision_model", patch_size=14, **VISION)
    return Cohere2VisionConfig(text_config=text, vision_config=vision, image_token_id=47)


@pytest.mark.parametrize("name", ["llava_next", "cohere2_vision"])
def test_a_wrapper_of_several_models_counts_as_it_is(name):
    set_seed(0)
    model = sharpened(AutoModelForImageTextToText.from_config(_wrapper(name))).double()
    assert_same(model)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_half_precision_measures_as_exactly(family):
    more, expected = FAMILIES[family]
    model = small(family, **more).bfloat16()
    install_head(model)
    with torch.no_grad():
        assert (scored(model).logps - own_logps(model)).abs().mean() < 0.05
    assert model.measured_head == expected._replace(scale=pytest.approx(expected.scale, rel=1e-6))
    again = small(family, **more).float()
    install_head(again)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (scored(again).logps - own_logps(again)).abs().mean() < 0.05
    assert again.measured_head.kind == "head"


@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_on_the_output_layer_counts(how):
    """Also after training has moved it: at first it changes nothing."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | how)
    model = get_peft_model(zoo.build("llama", hidden=16).double(), lora).eval()
    bare = model.get_base_model()
    install_head(bare)
    for _ in range(2):
        with torch.no_grad():
            assert_close(scored(bare).logps, own_logps(bare), rtol=1e-9, atol=1e-9)
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    set_seed(len(name))
                    weight += 0.3 * torch.randn_like(weight)
        bare.zero_grad()


class Shifted(torch.nn.Module):
    """A forward that adds to the logits, which is neither a factor nor a cap."""

    def __init__(self, forward):
        super().__init__()
        self.stock = forward

    def forward(self, *args, **kwargs):
        out = self.stock(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 3, out.logits.shape[-1], dtype=out.logits.dtype)
        return out


def odd(family="llama", seed=0, **more):
    model = zoo.build(family, hidden=16, seed=seed, **more).double()
    model.forward = Shifted(model.forward).forward
    return model


def test_other_logits_are_taken_from_the_models_forward(caplog):
    model = odd()
    assert_same(model)
    assert model.measured_head.kind == "rows"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(
        "the logits of LlamaForCausalLM are more than its output layer's weight with a factor or a cap"
    )
    assert head_of(model) is None
    also = scored(model, also=("entropy",)).entropy
    logs = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    assert_close(also, -(logs.exp() * logs).sum(-1).masked_fill(~VALID, 0), rtol=1e-6, atol=1e-6)


def test_models_without_one_output_layer_are_read_whole():
    shape = {"hidden_size": 16, "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = ProphetNetConfig(
        **shape, **SPECIAL, vocab_size=48, is_decoder=True, is_encoder_decoder=False, add_cross_attention=False
    )
    set_seed(0)
    model = sharpened(AutoModelForCausalLM.from_config(config)).float()  # its mask is too small for float64
    with torch.no_grad():
        expected = own_logps(model)
        install_head(model)
        assert_close(scored(model).logps, expected, rtol=1e-6, atol=1e-6)
    assert model.measured_head.kind == "whole"


def test_divergences_between_odd_models_are_those_of_their_logits():
    """Whether the student, the teacher or both have no head."""
    for student, of_teacher in (
        (odd(), small("granite", logits_scaling=4.0)),
        (zoo.build("llama").double(), odd(seed=1)),
    ):
        with torch.no_grad():
            z, x = (model(input_ids=IDS).logits[:, :-1][VALID] for model in (student, of_teacher))
            size = min(z.shape[-1], x.shape[-1])
            p, q = (each[:, :size].log_softmax(-1) for each in (x, z))
            install_head(student)
            install_head(of_teacher)
            states = scored(of_teacher, hidden=True).hidden
            found = scored(
                student,
                function=lambda rows, head, _, states=states, teacher=of_teacher: chunked_divergence(
                    "forward_kl", rows, head, states, head_of(teacher)
                ),
            ).result
        assert_close(found.divergence, (p.exp() * (p - q)).sum(-1), rtol=1e-6, atol=1e-8)


class Casts(TorchDispatchMode):
    """Counts what is cast or copied from a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.count += copies and any(
            isinstance(arg, torch.Tensor) and arg.data_ptr() == self.weight.data_ptr() for arg in args
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_models_own_head_neither_multiplies_nor_casts(is_trained):
    """Where the head is applied to the scored tokens alone: autocast would cast the weight twice, once for nothing."""
    model = small("llama").float()
    weight = model.get_output_embeddings().weight.requires_grad_(is_trained)
    install_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored(model)
        with Casts(weight) as casts:
            found = scored(model).logps
    assert casts.count == 1
    assert (found - own_logps(model)).abs().mean() < 0.05


def test_autocast_and_hooks_are_as_before_where_the_forward_fails():
    """As accelerate switches autocast on, around the forward; a later forward is whole."""
    model = small("llama").float()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    install_head(model)
    scored(model)
    layer = model.get_output_embeddings()
    failing = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scored(model)
    assert not torch.is_autocast_enabled("cpu")
    failing.remove()
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 0
    assert scored(model).logps.isfinite().all()
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_is_measured_in_the_forward_that_is_made_anyway(monkeypatch):
    model, calls = zoo.build("llama"), []
    stock = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: calls.append(1) or stock(*a, **k))
    install_head(model)
    for _ in range(3):
        scored(model)
    assert len(calls) == 3


def test_no_token_to_score_settles_nothing():
    model = small("granite", logits_scaling=4.0)
    install_head(model)
    empty = model(input_ids=IDS, labels=torch.full_like(IDS, IGNORED), scoring=Scoring())
    assert not empty.logps.any()
    assert getattr(model, "measured_head", None) is None


# ----------------------------------------------------------------------------------------------------------- the trainers


def folder(family, root, **more):
    tokenizer = testbed.tokenizer()
    ids = {name: getattr(tokenizer, name) for name in SPECIAL}
    shape = SHAPE | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 256} | more
    set_seed(0)
    model = sharpened(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)))
    model.save_pretrained(root / family)
    tokenizer.save_pretrained(root / family)
    return str(root / family)


def pairs(size=4):
    problems = list(itertools.islice(worlds.problems(0, "train"), size))
    return Dataset.from_list(
        [
            {"prompt": one.question, "chosen": one.solution()[: 30 + i], "rejected": one.solution()[: 12 + 3 * i]}
            for i, one in enumerate(problems)
        ]
    )


QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("modernbert-decoder", {"gradient_checkpointing": True}),
        pytest.param("granite", {"prefix_sharing": True, "logits": 8.0}, marks=pytest.mark.slow),
        pytest.param("cohere", {"padding_free": True}, marks=pytest.mark.slow),
        pytest.param("modernbert-decoder", {"loss_type": "sparsepo", "mask": "learned"}, marks=pytest.mark.slow),
        pytest.param("modernbert-decoder", {"loss_type": "tdpo2"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_preference_trainer_has_the_models_log_probabilities(tmp_path, family, options):
    """Of policy and reference, with an adapter, whatever the loss asks of the head; the first loss of a policy that has not moved is log 2."""
    options = dict(options)
    more = {"logits_scaling": options.pop("logits")} if "logits" in options else {}
    args = PreferenceConfig(
        str(tmp_path), per_device_train_batch_size=2, audit="off", monitor_pairs=2, **QUIET, **options
    )
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    one = PreferenceTrainer(folder(family, tmp_path, **more), args=args, train_dataset=pairs(), peft_config=lora)
    raw = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    batch = PairBatch.of(raw, one.arrange)
    one.model.eval()
    with torch.no_grad():
        found = one.score(one.model, batch, one.reference(batch))
        logits = one.model(**batch.inputs).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, batch.inputs["input_ids"][:, 1:, None]).squeeze(-1).masked_fill(~batch.mask, 0)
    assert_close(found.logps, expected, rtol=1e-4, atol=1e-4)
    assert one.policy.measured_head.kind == "head"
    one.train()  # with monitors, which read hidden states and head too


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kept", [False, True])
def test_a_student_learns_the_teachers_own_distribution(tmp_path, kept):
    """Where both have more than a last hidden state and a weight; from memory and from disk."""
    student = folder("cohere", tmp_path, logit_scale=0.25)
    of_teacher = folder("modernbert-decoder", tmp_path)
    args = DistillationConfig(
        str(tmp_path),
        loss_type="forward_kl",
        teacher_model_name_or_path=of_teacher,
        precompute_teacher=kept,
        teacher_cache=str(tmp_path / "cache") if kept else None,
        per_device_train_batch_size=2,
        **QUIET,
    )
    one = DistillationPairTrainer(student, args=args, train_dataset=pairs())
    batch = PairBatch.of(one._prepare_inputs(next(iter(one.get_train_dataloader()))))
    one.model.eval()
    with torch.no_grad():
        found = one.score(one.model, batch, one.reference(batch)).result
        models = (one.model, AutoModelForCausalLM.from_pretrained(of_teacher))
        q, p = (model(**batch.inputs).logits[:2, :-1].log_softmax(-1) for model in models)
    per_token = (p.exp() * (p - q)).sum(-1) * batch.mask[:2]
    assert_close(found.total, (per_token.sum(-1) / batch.mask[:2].sum(-1)).mean(), rtol=1e-4, atol=1e-5)


def test_states_of_an_odd_teacher_are_not_kept(tmp_path):
    args = DistillationConfig(
        str(tmp_path), loss_type="forward_kl", precompute_teacher=True, teacher_cache=str(tmp_path / "cache"), **QUIET
    )
    tokens = len(testbed.tokenizer())
    of_teacher = odd(vocab_size=tokens).float()
    with pytest.raises(ValueError, match="precompute_teacher keeps hidden states, and the logits of LlamaForCausalLM"):
        DistillationPairTrainer(folder("phi", tmp_path), of_teacher, args=args, train_dataset=pairs())


# ------------------------------------------------------------------------------------------------------------ all of them

SMALL = SPECIAL | {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "encoder_attention_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "vocab_size": 48,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def _shrunk(config):
    for one in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, value in SMALL.items():
            if getattr(one, name, None) is not None or name in SPECIAL:
                setattr(one, name, value)
        if kinds := getattr(one, "layer_types", None):
            one.layer_types = (list(dict.fromkeys(kinds)) * 2)[:2]
    return config


def _smallest(kind):
    """A model of the family, None if it cannot be made small in this way."""
    try:
        config = _shrunk(kind())
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
        if size > 3_000_000:
            return None
        set_seed(0)
        model = sharpened(AutoModelForCausalLM.from_config(config)).float()
        with torch.no_grad():
            own_logps(model)
    except Exception:  # noqa: BLE001 (whatever a family's code has against such a shape)
        return None
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_causal_family_is_read_as_it_is():
    built, wrong = 0, {}
    for name, kind in CONFIG_MAPPING.items():
        model = _smallest(kind) if kind in MODEL_FOR_CAUSAL_LM_MAPPING else None
        if model is None:
            continue
        built += 1
        with torch.no_grad():
            expected = own_logps(model)
            install_head(model)
            off = (scored(model).logps - expected).abs().max().item()
        if not off < 1e-3:
            wrong[name] = off
    assert not wrong
    assert built > 120
