"""PreferenceTrainer against stock TRL, loss by loss, and its own losses against the same numbers made from whole logits."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from datasets import Dataset, IterableDataset
from helpers.ranks import run_ranks
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
)
from trl import DPOConfig, DPOTrainer

from contralto import testbed
from contralto.align import run as align_run
from contralto.align.losses.objective import Objective, Pairs
from contralto.align.losses.registry import BUILT_IN, LOSSES
from contralto.align.monitoring.output_folder import last_checkpoint
from contralto.align.trainers import layouts
from contralto.align.trainers.base import LastLog
from contralto.align.trainers.batches import IGNORED, PairBatch
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.packing import arrangement
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.preference_checks import check_preference
from contralto.align.trainers.scoring import Scoring, install_head
from contralto.cli import align as cli_align
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS

TRL_LOSSES = [loss.name for loss in BUILT_IN if loss.from_trl]
OWN_LOSSES = [loss.name for loss in BUILT_IN if not loss.from_trl and "alone" not in loss.requires]
FAMILIES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


def pairs(size=6, seed=0, **columns):
    """Rows with prompts and texts of different lengths."""
    problems = list(itertools.islice(worlds.problems(seed, "train"), size))
    rows = []
    for i, problem in enumerate(problems):
        chosen, rejected = problem.solution()[: 40 - 3 * i], problems[i - 1].solution()[: 20 + 5 * i]
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return Dataset.from_list(
        [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]
    )


@cache
def _folder(family, root):
    tokenizer = testbed.tokenizer()
    model = zoo.build(family, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.15)
    model.config.pad_token_id, model.config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    model.save_pretrained(root / family)
    tokenizer.save_pretrained(root / family)
    return str(root / family)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def lora(family="llama", **how):
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    shape = {"r": 2, "lora_alpha": 1, "target_modules": FAMILIES[family], "task_type": "CAUSAL_LM"}
    return LoraConfig(init_lora_weights=False, **shape, **fan, **how)


def config(kind, folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "max_steps": 2, "logging_steps": 1, "beta": 0.3}
    own = {"reference_cache": str(folder / "cache")} if options.get("precompute_ref_log_probs") else {}
    return kind(str(folder), **quiet | small | (own if kind is PreferenceConfig else {}) | options)


def trainer(folder, model, *, dataset=None, args=None, peft_config=None, **options):
    args = args or config(PreferenceConfig, folder, **options)
    return PreferenceTrainer(model, args=args, train_dataset=dataset or pairs(), peft_config=peft_config)


def _moved(model):
    """The policy away from its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.005 * torch.randn_like(weight)


FAST = {("llama", "lora", "live")}
MATRIX = list(itertools.product(FAMILIES, ("full", "lora"), ("live", "cached")))


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=() if each in FAST else pytest.mark.slow, id="-".join(each)) for each in MATRIX],
)
def both(request, root):
    """Stock TRL and PreferenceTrainer on the same weights and data, and a batch of either."""
    family, how, reference = request.param
    made = []
    for kind, trainer_class in ((DPOConfig, DPOTrainer), (PreferenceConfig, PreferenceTrainer)):
        args = config(
            kind, root / "-".join((*request.param, kind.__name__)), precompute_ref_log_probs=reference == "cached"
        )
        peft_config = lora(family) if how == "lora" else None
        made.append(trainer_class(_folder(family, root), args=args, train_dataset=pairs(), peft_config=peft_config))
        _moved(made[-1].model)
    return made


def _step(one, batch_index=0):
    """Loss, gradients by name and metrics of a batch."""
    one.model.zero_grad()
    one._metrics["train"].clear()
    batch = next(itertools.islice(iter(one.get_train_dataloader()), batch_index, None))
    loss = one._compute_loss(one.model.train(), one._prepare_inputs(batch), return_outputs=False)
    loss.backward()
    grads = {name: weight.grad for name, weight in one.model.named_parameters() if weight.grad is not None}
    return loss.detach(), grads, {name: values[-1] for name, values in one._metrics["train"].items()}


def _set(stock, own, names, **options):
    """Another loss in both."""
    stock.loss_types, stock.loss_weights = names, options.pop("loss_weights", [1.0] * len(names))
    for name, value in options.items():
        setattr(stock, name, value)
        setattr(stock.args, name, value)
    fresh = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "label_smoothing": 0.0,
    } | options
    args = copy.copy(own.args)
    for name, value in fresh.items():
        setattr(args, name, value)
        setattr(stock, name, value)
    args.head_metrics = "all"
    read = {option for name in names for option in LOSSES[name].settings}
    own.args = args
    own.objective = Objective(names, stock.loss_weights, **{option: getattr(args, option) for option in read})


def _assert_same(stock, own, *, atol=1e-5):
    expected, found = _step(stock), _step(own)
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(1.0, *(grad.abs().max().item() for grad in expected[1].values()))
    for name, grad in expected[1].items():
        assert_close(found[1][name] / largest, grad / largest, rtol=0, atol=atol)
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, rel=1e-5, abs=5e-5), name


@pytest.mark.covering
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_equals_stock_trl(both, name):
    smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo_pair", "aot", "aot_unpaired") else {}
    _set(*both, [name], **smoothing)
    _assert_same(*both, atol=1e-4 if name == "discopop" else 1e-5)  # it divides by a temperature of 0.05


@pytest.mark.covering
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.4},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence"},
        {"loss_weights": [0.7, 0.2]},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_equals_stock_trl_in_its_options(both, options):
    names = ["sigmoid", "sft"] if "loss_weights" in options else ["sigmoid"]
    if "ld_alpha" in options and both[1].args.precompute_ref_log_probs:
        pytest.skip("TRL's sums were precomputed without ld_alpha")
    _set(*both, names, **options)
    takes_exponential = options.get("f_divergence_type") in ("forward_kl", "alpha_divergence")
    _assert_same(*both, atol=1e-4 if takes_exponential else 1e-5)  # of differences of sums near -200, in float32


SELECTED = {
    "prefix_sharing": {"prefix_sharing": True},
    "padding_free": {"padding_free": True},
    "packing": {"packing": True},
    "both": {"packing": True, "prefix_sharing": True},
    "fixed": {"packing": True, "prefix_sharing": True, "max_length": 256, "pack_length": 256},
}
"""Options of layouts."""


@pytest.mark.covering
@pytest.mark.parametrize("options", SELECTED)
@pytest.mark.parametrize("name", ["sigmoid", "sft", "nca_pair"])
def test_layouts_equal_stock_trl(both, name, options, monkeypatch):
    chosen = {"prefix_sharing": False, "padding_free": False, "packing": False, "pack_length": None} | SELECTED[options]
    monkeypatch.setattr(both[1], "arrange", arrangement(SimpleNamespace(**chosen), "sdpa"))
    _set(*both, [name])
    _assert_same(*both)


@pytest.mark.parametrize(
    "options", [{"use_weighting": True}, {"max_length": 36}, {"max_length": 36, "truncation_mode": "keep_end"}]
)
@pytest.mark.filterwarnings("ignore:The .'keep_end'. truncation mode")
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
def test_equals_stock_trl_where_the_data_or_the_head_differ(root, tmp_path, options):
    made = []
    for kind, trainer_class in ((DPOConfig, DPOTrainer), (PreferenceConfig, PreferenceTrainer)):
        args = config(kind, tmp_path, **options | ({"head_metrics": "all"} if kind is PreferenceConfig else {}))
        made.append(trainer_class(_folder("llama", root), args=args, train_dataset=pairs(), peft_config=lora()))
    _assert_same(*made)


SCALED = {
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "opt": (OPTConfig, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
}


@pytest.mark.parametrize("name", SCALED)
def test_the_head_does_what_the_model_does(name):
    """Logits that are scaled, divided or capped, after the norm that a family has."""
    kind, more = SCALED[name]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=30, num_key_value_heads=2, **shape, **more)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    install_head(model)
    ids = torch.randint(3, 30, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, IGNORED)
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels, scoring=Scoring(also=("entropy",)))
        logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = logps.gather(-1, ids[:, 1:, None]).squeeze(-1).masked_fill(labels[:, 1:] == IGNORED, 0)
    assert_close(found.logps, expected, rtol=1e-5, atol=1e-5)
    assert (expected.abs() > 1).any()
    with torch.no_grad():
        assert model(input_ids=ids, labels=labels).loss is not None  # nothing changes without a request


@pytest.mark.slow
def test_whole_runs_end_in_the_same_weights(root, tmp_path):
    """Two epochs with evaluation: the stock trainer's logs and weights."""
    made = []
    for kind, trainer_class in ((DPOConfig, DPOTrainer), (PreferenceConfig, PreferenceTrainer)):
        more = {"head_metrics": "all"} if kind is PreferenceConfig else {}
        options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-3}
        args = config(kind, tmp_path, **options, **more)
        one = trainer_class(
            _folder("qwen3", root),
            args=args,
            train_dataset=pairs(),
            eval_dataset=pairs(4, 7),
            peft_config=lora("qwen3"),
        )
        one.train()
        made.append(one)
    for stock, own in zip(made[0].state.log_history, made[1].state.log_history, strict=True):
        numbers = {k: v for k, v in stock.items() if not k.endswith(("runtime", "per_second"))}
        assert {k: own[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    weights = zip(made[0].model.parameters(), made[1].model.parameters(), strict=True)
    for stock, own in weights:
        assert_close(own, stock, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- own losses


def _from_logits(one, batch, **more):
    """The same pairs in float64, from whole logits."""
    mask = batch["completion_mask"][:, 1:].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    policy = one.model(**inputs).logits.double()[:, :-1].log_softmax(-1)
    with torch.no_grad(), one.model.disable_adapter():
        reference = one.model(**inputs).logits.double()[:, :-1].log_softmax(-1)
    labels = batch["input_ids"][:, 1:, None]
    token, ref = (p.gather(-1, labels).squeeze(-1) * mask for p in (policy, reference))
    kl = (reference.exp() * (reference - policy)).sum(-1) * mask
    ones = mask.double()
    return Pairs.stacked(
        logps=token.sum(-1),
        ref_logps=ref.sum(-1),
        lengths=mask.sum(-1),
        token_logps=token,
        ref_token_logps=ref,
        token_kl=kl,
        mask=mask,
        **{"reward_mask": ones, "kl_mask": ones} | more,
        margin=batch.get("margin"),
        chosen_advantage=batch.get("chosen_advantage"),
    )


@pytest.fixture(scope="module")
def own(root):
    dataset = pairs(margin=[0.5, 1.0, 2.0, 0.25, 3.0, 1.5])
    args = config(PreferenceConfig, root / "own", loss_type=["odpo"])
    return PreferenceTrainer(_folder("llama", root), args=args, train_dataset=dataset, peft_config=lora())


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_own_losses_equal_whole_logits(own, name):
    options = {"beta": 0.3, "label_smoothing": 0.1}
    own.objective = Objective([name], **{key: options[key] for key in options if key in LOSSES[name].settings})
    own.needs = own.objective.needs
    own.uses_reference = bool({"reference", "kl"} & own.needs)
    loss, grads, metrics = _step(own)
    batch = next(iter(own.get_train_dataloader()))
    own.model.zero_grad()
    expected = own.objective(_from_logits(own, batch)).total
    assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward()
    for parameter, weight in own.model.named_parameters():
        if weight.grad is not None:
            assert_close(grads[parameter], weight.grad, rtol=1e-3, atol=2e-5)
    assert ("kl/chosen" in metrics) == ("kl" in own.needs)


def test_margins_stay_with_their_rows(own):
    batch = own.data_collator([dict(own.train_dataset[i]) for i in (2, 0)])
    assert batch["margin"].tolist() == [2.0, 0.5]
    assert set(next(iter(own.get_train_dataloader()))["margin"].tolist()) <= {0.5, 1.0, 2.0, 0.25, 3.0, 1.5}


def test_ones_make_tdpo1_of_sparsepo(root, tmp_path):
    made = [
        trainer(tmp_path, _folder("llama", root), peft_config=lora(), loss_type=[name])
        for name in ("tdpo1", "sparsepo")
    ]
    tdpo, sparse = (_step(one) for one in made)
    assert_close(tdpo[0], sparse[0])
    for name, grad in tdpo[1].items():
        assert_close(sparse[1][name], grad)


def test_mapo_masks_come_from_the_reference(root, tmp_path):
    """Not from the policy: with other adapter weights the masks are the same."""
    seen = []
    for seed in (0, 1):
        one = trainer(
            tmp_path, _folder("llama", root), peft_config=lora(), loss_type=["sparsepo"], mask="mapo", seed=seed
        )
        batch = PairBatch.of(one.data_collator([dict(row) for row in one.train_dataset.select(range(3))]))
        masks = one.reference(batch).masks
        assert ((masks.reward > 0) <= batch.mask).all()
        assert masks.reward.amax(-1).le(1).all()
        seen.append(masks.reward)
        one.state.logging_steps = 1
        assert "mask/share" in _step(one)[2]
    assert_close(seen[0], seen[1])
    assert seen[0].unique().numel() > 20


@pytest.mark.slow
def test_learned_masks_learn_are_saved_and_come_back(root, tmp_path):
    options = {"loss_type": ["sparsepo"], "mask": "learned", "lambda_u": 0.01, "learning_rate": 1e-2, "max_steps": 4}
    one = trainer(tmp_path, _folder("llama", root), peft_config=lora(), **options, save_strategy="steps", save_steps=2)
    one.train()
    (mask,) = one.side_modules.values()
    assert (mask.networks[0].bias - 1).abs().max() > 1e-4
    assert any("mask/mean" in line for line in one.state.log_history)
    whole = [weight.clone() for weight in (*one.model.parameters(), *mask.parameters())]
    again = trainer(tmp_path, _folder("llama", root), peft_config=lora(), **options, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (mask,) = again.side_modules.values()
    for one_weight, other in zip(whole, (*again.model.parameters(), *mask.parameters()), strict=True):
        assert_close(other, one_weight, rtol=0, atol=0)


def test_losses_without_reference_load_none(root, tmp_path, monkeypatch):
    import trl.trainer.dpo_trainer as stock

    loaded = []
    load = stock.create_model_from_path
    monkeypatch.setattr(stock, "create_model_from_path", lambda *a, **k: loaded.append(a) or load(*a, **k))
    one = trainer(tmp_path, _folder("llama", root), loss_type=["cpo"])
    assert (len(loaded), one.ref_model) == (1, None)
    metrics = _step(one)[2]
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * metrics["logps/chosen"])
    trainer(tmp_path, _folder("llama", root), loss_type=["sigmoid"])
    assert len(loaded) == 3


@pytest.mark.slow
def test_head_metrics_are_computed_when_logged(root, tmp_path):
    one = trainer(tmp_path, _folder("llama", root), peft_config=lora(), max_steps=4, logging_steps=2)
    asked = []
    score = one.score
    one.score = lambda *args: asked.append(one.reports_head()) or score(*args)
    one.train()
    assert asked == [False, True, False, True]
    logged = [line for line in one.state.log_history if "entropy" in line]
    assert len(logged) == 2
    assert all("rewards/margins" in line for line in logged)


def vision_pairs(size=4):
    """Questions about pictures, of one image and of none."""
    rows = []
    for i in range(size):
        picture = Image.new("RGB", (32, 32), (60 * i, 255 - 60 * i, 90))
        said = ["yes" if i % 2 else "no", "no" if i % 2 else "yes"]
        answers = {
            side: [{"role": "assistant", "content": text}]
            for side, text in zip(("chosen", "rejected"), said, strict=True)
        }
        rows.append({"images": [picture], "prompt": [{"role": "user", "content": "is there a cat?"}], **answers})
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apo_zero", pytest.param("tdpo1", marks=pytest.mark.slow)])
def test_vision_language_models(tmp_path, name):
    """Stock TRL's numbers, and a whole step, on pictures."""
    made = []
    for kind, trainer_class in ((DPOConfig, DPOTrainer), (PreferenceConfig, PreferenceTrainer)):
        options = {"loss_type": ["apo_zero" if kind is DPOConfig else name], "max_steps": 1}
        args = config(kind, tmp_path, **options | ({"head_metrics": "all"} if kind is PreferenceConfig else {}))
        lora_config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=1)
        model = str(testbed.path("vision-0"))
        made.append(trainer_class(model, args=args, train_dataset=vision_pairs(), peft_config=lora_config))
    if name == "apo_zero":
        _assert_same(*made)
    made[1].train()
    assert made[1].state.log_history[0]["grad_norm"] > 0


def view_pairs(size=4, *, structured=False):
    """Two pictures, and two texts of which each is true of one of them."""
    rows = []
    for i, row in enumerate(vision_pairs(size)):
        other = Image.new("RGB", (32, 32), (20 + 50 * i, 40, 250 - 60 * i))
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a cat?"}]}]
        rows.append(row | {"rejected_images": [other]} | ({"prompt": prompt} if structured else {}))
    return Dataset.from_list(rows)


def _alone(model, processor, row, image, side):
    """The log-probability of a text under an image, in float64, from whole logits."""
    question = row["prompt"][0]["content"]
    content = [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": [{"type": "image"}, *content] if image else content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    texts = [prompt, processor.apply_chat_template([*messages, *row[side]])]
    how = {"images": [image] if image else None, "return_tensors": "pt", "add_special_tokens": False}
    start, whole = (processor(text=[text], **how) for text in texts)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in whole.items()}
    logps = model(**inputs).logits[0, :-1].log_softmax(-1)
    targets = whole["input_ids"][0, 1:, None]
    return logps.gather(-1, targets).squeeze(-1)[start["input_ids"].shape[1] - 1 :].sum()


def test_svco_equals_six_forwards_in_float64(tmp_path):
    """Each text under its image, under the other one, and under none; policy and reference."""
    dataset = view_pairs(3)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=2)
    args = config(PreferenceConfig, tmp_path, loss_type=["svco"], head_metrics="all", max_length=None)
    one = PreferenceTrainer(str(testbed.path("vision-0")), args=args, train_dataset=dataset, peft_config=adapter)
    _moved(one.model)
    one._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(dataset)
    loss, grads, metrics = _step(one)
    base = AutoModelForImageTextToText.from_pretrained(testbed.path("vision-0"))
    model, processor = get_peft_model(base, adapter).double(), one.processing_class
    model.load_state_dict(one.model.state_dict())
    losses, own, swapped = [], [], []
    for row in dataset:
        images = {"chosen": row["images"][0], "rejected": row["rejected_images"][0]}
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            views = (images[side], None, images[other])
            policy = [_alone(model, processor, row, view, side) for view in views]
            with torch.no_grad(), model.disable_adapter():
                reference = [_alone(model, processor, row, view, side) for view in views]
            ratios = [0.3 * (p - r) for p, r in zip(policy, reference, strict=True)]
            losses += [-torch.nn.functional.logsigmoid(a - b) for a, b in itertools.pairwise(ratios)]
            own.append(ratios[0].item())
            swapped.append(ratios[2].item())
    expected = sum(losses) / len(dataset)
    expected.backward()
    assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert_close(grads[name].double(), weight.grad, rtol=1e-3, atol=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(sum(own) / 6, abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(sum(swapped) / 6, abs=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(sum(a > b for a, b in zip(own, swapped, strict=True)) / 6)
    assert metrics["entropy"] > 0


@pytest.mark.slow
def test_mdpo_reads_both_completions_under_the_image_and_the_chosen_one_under_the_other(tmp_path):
    dataset = view_pairs(3)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=2)
    args = config(PreferenceConfig, tmp_path, loss_type=["mdpo"], mdpo_delta=0.2, max_length=None)
    one = PreferenceTrainer(str(testbed.path("vision-0")), args=args, train_dataset=dataset, peft_config=adapter)
    one._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(dataset)
    loss = _step(one)[0]
    base = AutoModelForImageTextToText.from_pretrained(testbed.path("vision-0"))
    model, processor = get_peft_model(base, adapter).double(), one.processing_class
    model.load_state_dict(one.model.state_dict())
    expected = []
    with torch.no_grad():
        for row in dataset:
            image, other = row["images"][0], row["rejected_images"][0]
            views = [(image, "chosen"), (image, "rejected"), (other, "chosen")]
            policy = [_alone(model, processor, row, *view) for view in views]
            with model.disable_adapter():
                chosen, rejected, swapped = (
                    0.3 * (p - _alone(model, processor, row, *view)) for p, view in zip(policy, views, strict=True)
                )
            expected.append(sum(softplus(-x) for x in (chosen - rejected, chosen - swapped, chosen - 0.2)))
    assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_vision_encoder_stays_as_it_is(root, tmp_path):
    """And the projector and the language model do not."""
    options = {"loss_type": ["svco"], "freeze_vision_encoder": True, "max_steps": 1, "learning_rate": 1e-2}
    one = trainer(tmp_path, str(testbed.path("vision-0")), dataset=view_pairs(3), **options)
    before = {name: weight.clone() for name, weight in one.model.named_parameters()}
    one.train()
    moved = {name for name, weight in one.model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if "vision_tower" in name}.isdisjoint(moved)
    assert {"model.multi_modal_projector.linear_1.weight", "model.language_model.norm.weight"} <= moved
    with pytest.raises(ValueError, match="LlamaForCausalLM has no vision encoder: leave it out"):
        trainer(tmp_path, _folder("llama", root), peft_config=lora(), freeze_vision_encoder=True)


@pytest.mark.slow
def test_svco_learns_to_look(tmp_path):
    """With prompts that say where the image goes, and evaluation; a text gets likelier under its own image than under the other one."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"loss_type": ["svco"], "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    args = config(PreferenceConfig, tmp_path, **options, eval_strategy="steps", eval_steps=6)
    model, data = str(testbed.path("vision-0")), view_pairs(structured=True)
    one = PreferenceTrainer(model, args=args, train_dataset=data, eval_dataset=data, peft_config=adapter)
    one.train()
    found = [line for line in one.state.log_history if "eval_loss" in line]
    assert 4 * math.log(2) > found[0]["eval_loss"] > found[1]["eval_loss"]
    assert found[1]["eval_rewards/margins"] > found[0]["eval_rewards/margins"] > 0


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_callers_objects_can_be_used_again(root, tmp_path):
    """One LoRA configuration for two families, one set of arguments, rows of a collator."""
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM")  # which modules is up to the model
    before, args = copy.deepcopy(adapter), config(PreferenceConfig, tmp_path)
    settings = {name: copy.copy(getattr(args, name)) for name in args.__dataclass_fields__}
    made = [
        PreferenceTrainer(_folder(family, root), args=args, train_dataset=pairs(), peft_config=adapter)
        for family in ("llama", "gpt2")
    ]
    assert adapter == before
    assert [one.model.peft_config["default"].target_modules for one in made] == [{"q_proj", "v_proj"}, {"c_attn"}]
    assert {name: getattr(args, name) for name in settings} == settings
    rows = [dict(row) | {"margin": 1.0} for row in made[0].train_dataset]
    kept = copy.deepcopy(rows)
    assert "margin" in made[0].data_collator(rows)
    assert rows == kept


def test_reference_is_kept_across_seeds_and_found_again(root, tmp_path, monkeypatch):
    options = {"precompute_ref_log_probs": True, "peft_config": lora(), "reference_cache": str(tmp_path / "kept")}
    first = trainer(tmp_path, _folder("llama", root), **options)
    assert len(list((tmp_path / "kept").rglob("*.arrow"))) == 1

    def refuse(*args):
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr("contralto.align.trainers.reference_pass.ReferencePass.__call__", refuse)
    again = trainer(tmp_path, _folder("llama", root), **options, seed=5)
    assert again.train_dataset["ref_chosen_token_logps"] == first.train_dataset["ref_chosen_token_logps"]
    for changed in ({"max_length": 40}, {"dataset": pairs(seed=3)}):
        with pytest.raises(AssertionError, match="asked again"):
            trainer(tmp_path, _folder("llama", root), **options | changed)
    with pytest.raises(AssertionError, match="asked again"):
        trainer(tmp_path, str(testbed.path("expert")), **options | {"peft_config": lora()})


def test_reference_rows_are_those_of_one_row_alone(root, tmp_path):
    """Whatever their batch, their order or their padding."""
    one = trainer(tmp_path, _folder("llama", root), peft_config=lora(), precompute_ref_log_probs=True)
    base = AutoModelForCausalLM.from_pretrained(_folder("llama", root))
    for row in one.train_dataset:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = base(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            expected = logps[len(row["prompt_ids"]) - 1 :]
            assert_close(torch.tensor(row[f"ref_{side}_token_logps"]), expected, rtol=1e-4, atol=1e-4)


def test_a_streamed_data_set_is_precomputed_too(root, tmp_path):
    kept = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "kept"), "peft_config": lora()}
    stored = trainer(tmp_path, _folder("llama", root), dataset=pairs(), **kept)
    stream = trainer(tmp_path, _folder("llama", root), dataset=pairs().to_iterable_dataset(), **kept)
    for row, other in zip(stored.train_dataset, stream.train_dataset, strict=True):
        assert row["ref_chosen_token_logps"] == other["ref_chosen_token_logps"]
    assert isinstance(stream.train_dataset, IterableDataset)


def test_a_trained_adapter_is_its_own_reference(root, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(_folder("llama", root))
    one = trainer(tmp_path, get_peft_model(base, lora()))
    assert _step(one)[2]["rewards/margins"] == 0.0


def test_last_checkpoint_is_a_whole_one(tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# ---------------------------------------------------------------------------------------------------- wrong arguments

WRONG_CONFIGS = [
    ({"loss_type": ["dpo"]}, "there is no loss 'dpo'"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "each once"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must be one per loss: 2, not 1"),
    ({"loss_weights": [float("nan")]}, "loss_weights must be finite"),
    ({"beta": 0.0}, "beta must be a finite number above 0"),
    ({"loss_type": ["sigmoid", "simpo"], "beta": None}, "defaults of beta differ"),
    ({"loss_type": ["exo_pair"]}, "label_smoothing must lie in"),
    ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing must lie in"),
    ({"simpo_gamma": 1.0}, "simpo_gamma is set, but sigmoid does not use it; it is an option of simpo, cpo_simpo"),
    ({"loss_type": ["cpo"], "cpo_alpha": -1.0}, "cpo_alpha must be a finite number of at least 0"),
    (
        {"label_smoothing": 0.1},
        "label_smoothing is set, but sigmoid does not use it; it is an option of exo_pair, robust",
    ),
    (
        {"loss_type": ["sigmoid", "hinge"], "discopop_tau": 0.1},
        "sigmoid, hinge does not use it; it is an option of discopop",
    ),
    ({"f_alpha_divergence_coef": 0.3}, "f_divergence_type 'reverse_kl' does not use it"),
    ({"loss_settings": {"beta": 0.3}}, "loss_settings holds beta, which is an option of its own"),
    ({"loss_settings": '{"kappa": 0.3}'}, "sigmoid do not read kappa; they read beta"),
    ({"mask_weight_decay": 0.1}, "mask_weight_decay is set, but sigmoid uses no token masks"),
    ({"f_divergence_type": "tvd"}, "f_divergence_type must be one of"),
    (
        {"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"},
        "f_divergence_type is set, but apo_zero has no f-divergence",
    ),
    (
        {"loss_type": ["aot"], "use_weighting": True},
        "use_weighting is set, but aot sorts chosen and rejected completions apart",
    ),
    ({"loss_type": ["svco", "sigmoid"]}, "svco cannot be combined with other losses"),
    ({"loss_type": ["svco"], "report": True}, "report is set, but svco compares images"),
    ({"loss_type": ["svco"], "use_weighting": True}, "use_weighting is set, but svco compares images"),
    ({"loss_type": ["svco"], "ld_alpha": 0.5}, "ld_alpha is set, but svco compares a completion with itself"),
    ({"prefix_sharing": True, "padding_free": True}, "two layouts of a batch: set one of them"),
    ({"packing": True, "padding_free": True}, "packing and padding_free are two layouts of a batch: set one of them"),
    ({"pack_length": 2048}, "pack_length is set, but is only used with packing"),
    ({"packing": True, "pack_length": 512, "max_length": 513}, "pack_length is 512 and max_length 513"),
    ({"packing": True, "pack_length": 512, "max_length": None}, "set a max_length of at most pack_length"),
    ({"loss_type": ["cpo"], "precompute_ref_log_probs": True}, "cpo uses no reference"),
    ({"loss_type": ["simpo"], "sync_ref_model": True}, "simpo uses no reference"),
    ({"loss_type": ["tdpo2"], "precompute_ref_log_probs": True}, "tdpo2 needs the whole distribution of the reference"),
    ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "set one of them"),
    ({"reference_cache": "x"}, "only used with precompute_ref_log_probs"),
    ({"mask": "learned"}, "mask is set, but sigmoid uses no token masks: leave mask out"),
    ({"loss_type": ["sparsepo"], "mask": "random"}, "mask must be one of ones, mapo, learned"),
    ({"loss_type": ["sparsepo"], "mask": "mapo", "mask_kinds": ["heads"]}, "mask_kinds must name some of"),
    ({"loss_type": ["sparsepo"], "mask_kinds": ["mlp"]}, "mask_kinds is read with mask mapo alone"),
    ({"loss_type": ["sparsepo"], "mask": "mapo", "lambda_u": 0.1}, "lambda_u acts on learned masks alone"),
    ({"loss_type": ["sparsepo"], "mask": "learned", "mask_dropout": 1.0}, "mask_dropout must lie in"),
    ({"ld_alpha": 1.5}, "ld_alpha must lie in"),
    ({"loss_type": ["tdpo1"], "ld_alpha": 0.5}, "ld_alpha is set, but tdpo1 sums a divergence"),
    ({"max_length": 1}, "max_length must be at least 2"),
    ({"head_metrics": "some"}, "head_metrics must be one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_CONFIGS, ids=lambda value: str(value)[:40])
def test_wrong_options_are_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(PreferenceConfig, tmp_path, **options)
    assert "\n" not in str(error.value)


def _columns(**columns):
    return pairs(2, **columns)


WRONG_TRAINERS = [
    ({"args": DPOConfig}, "args must be a PreferenceConfig, not DPOConfig"),
    ({"model": 5}, "model must be a name, a folder or a loaded model"),
    ({"model": "testbed:nothing"}, "nothing"),
    ({"model": Path("any.txt"), "train_dataset": None}, "train_dataset is missing"),
    ({"train_dataset": None}, "train_dataset is missing"),
    ({"train_dataset": [1]}, "train_dataset must be a datasets.Dataset"),
    ({"train_dataset": Dataset.from_dict({"chosen": [], "rejected": []})}, "train_dataset has no rows"),
    ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]})}, "has no column rejected"),
    ({"train_dataset": "stream", "max_steps": -1}, "a streamed train_dataset has no length"),
    ({"eval_strategy": "steps"}, "there is no eval_dataset"),
    ({"eval_dataset": {"a": Dataset.from_dict({"prompt": ["a"], "rejected": ["b"]})}}, "a has no column chosen"),
    ({"loss_type": ["margin"]}, "has no column margin, which margin needs"),
    (
        {"loss_type": ["odpo"], "train_dataset": {"margin": [1.0, -1.0]}},
        "row 2, column margin: odpo takes its logarithm",
    ),
    (
        {"loss_type": ["margin"], "train_dataset": {"margin": [1.0, None]}},
        "row 2, column margin: None is not a finite number",
    ),
    ({"loss_type": ["apo_auto"], "train_dataset": {"chosen_advantage": [1.0, None]}}, "column chosen_advantage"),
    ({"loss_type": ["cpo"], "ref_model": torch.nn.Linear(1, 1)}, "cpo uses no reference"),
    ({"ref_model": "name"}, "ref_model must be a loaded model"),
    ({"peft_config": {"r": 4}}, "peft_config must be a configuration of peft"),
    ({"peft_config": LoraConfig(target_modules=["lm_head"])}, "leave lm_head out"),
    (
        {"loss_type": ["tdpo1"], "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
        "use LoRA",
    ),
    ({"loss_type": ["tdpo1"], "fsdp": True, "fsdp_config": {"version": 1}}, "which ZeRO 3 and FSDP 1 keep in shards"),
    (
        {
            "loss_type": ["svco"],
            "precompute_ref_log_probs": True,
            "train_dataset": {"images": [["a"], ["b"]], "rejected_images": [["c"], ["d"]], "prompt": [[], []]},
        },
        "is read under two images and none",
    ),
    ({"prefix_sharing": True, "train_dataset": {"images": [["a"], ["b"]]}}, "has images, whose tokens prefix_sharing"),
    ({"packing": True, "train_dataset": {"images": [["a"], ["b"]]}}, "has images, whose tokens packing cannot move"),
    (
        {"padding_free": True, "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
        "prompts that are learned stand before each row",
    ),
    ({"loss_type": ["svco"], "train_dataset": {"images": [["a"], ["b"]]}}, "has no column rejected_images with a list"),
    (
        {
            "loss_type": ["svco"],
            "train_dataset": {"images": [["a"], []], "rejected_images": [["a"], ["b"]], "prompt": ["a", "b"]},
        },
        "has prompts of bare text",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_TRAINERS, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_seen_before_a_model_is_loaded(tmp_path, wrong, message):
    wrong = dict(wrong)
    how = {
        name: wrong.pop(name) for name in ("train_dataset", "eval_dataset", "peft_config", "ref_model") if name in wrong
    }
    model, kind = wrong.pop("model", str(tmp_path / "nothing")), wrong.pop("args", PreferenceConfig)
    given = how.get("train_dataset", pairs(2))
    given = (
        _columns(**given) if isinstance(given, dict) else pairs(2).to_iterable_dataset() if given == "stream" else given
    )
    with pytest.raises(ValueError, match=message) as error:
        PreferenceTrainer(model, args=config(kind, tmp_path, **wrong), **how | {"train_dataset": given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "option"), [("bloom", "prefix_sharing"), ("mamba", "padding_free"), ("mamba", "packing")]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_layout_that_a_model_cannot_have_is_refused(tmp_path, family, option, loaded):
    """By the configuration alone, if the model is not loaded yet."""
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    args = config(PreferenceConfig, tmp_path / "out", **{option: True})
    with pytest.raises(
        ValueError, match=f"{option} is set, but {type(model).__name__} .*: leave {option} out"
    ) as error:
        PreferenceTrainer(model if loaded else str(tmp_path), args=args, train_dataset=pairs(2))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_experts_are_balanced_as_by_stock_trl(root, tmp_path):
    """By the loss that the model's own forward gives."""
    tokenizer = testbed.tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=len(tokenizer), **shape, **more))
    model.save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    made = []
    for kind, trainer_class in ((DPOConfig, DPOTrainer), (PreferenceConfig, PreferenceTrainer)):
        args = config(kind, tmp_path, **({"head_metrics": "all"} if kind is PreferenceConfig else {}))
        made.append(trainer_class(str(tmp_path / "experts"), args=args, train_dataset=pairs()))
        _moved(made[-1].model)
    _assert_same(*made)
    assert made[1]._metrics["train"]["aux_loss"][0] > 0


def test_experts_are_not_balanced_over_prompts_that_count_once(tmp_path):
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    MixtralConfig(**shape, router_aux_loss_coef=0.1, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    args = config(PreferenceConfig, tmp_path / "out", prefix_sharing=True)
    with pytest.raises(ValueError, match="router_aux_loss_coef balances the experts"):
        PreferenceTrainer(str(tmp_path), args=args, train_dataset=pairs(2))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("flex_attention", {"packing": True}, "flex_attention, which has no backward pass on a CPU: use sdpa"),
        ("flash_attention_2", {"packing": True, "prefix_sharing": True}, "flash_attention_2 takes no mask of pairs"),
        (
            "flash_attention_2",
            {"packing": True, "pack_length": 1024},
            "flash_attention_2 reads a batch as one row without padding: leave pack_length out",
        ),
    ],
)
def test_an_attention_that_cannot_have_a_layout_is_refused(root, tmp_path, attention, options, message):
    args = config(PreferenceConfig, tmp_path, model_init_kwargs={"attn_implementation": attention}, **options)
    with pytest.raises(ValueError, match=message) as error:
        PreferenceTrainer(_folder("llama", root), args=args, train_dataset=pairs(2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("padding_free", "packing")), "both"]
)
@pytest.mark.parametrize("reference", ["live", pytest.param("cached", marks=pytest.mark.slow)])
def test_batches_stay_padded_if_the_first_step_shows_that_a_layout_is_not_obeyed(
    root, tmp_path, name, reference, monkeypatch, caplog
):
    """OPT takes position_ids, and sees the other texts of a row all the same, unless a mask hides them.

    The first batch leaves each sequence a row of its own where they are packed, and shows it all the same.
    """
    if name != "padding_free":  # a mask, which OPT obeys
        monkeypatch.setattr(layouts, "model_mask", lambda model, ends, positions: None)
    how = {"precompute_ref_log_probs": reference == "cached", "learning_rate": 1e-2}
    ends = []
    for given in ({}, SELECTED[name]):
        one = trainer(tmp_path / str(len(ends)), _folder("opt", root), peft_config=lora(), **how, **given)
        one.train()
        assert one.arrange is None
        ends.append(one)
    assert caplog.text.count("OPTForCausalLM does not compute the same without padding") == 1
    for stock, own in zip(*(one.model.parameters() for one in ends), strict=True):
        assert_close(own, stock, rtol=0, atol=0)


def test_a_layout_is_compared_once(root, tmp_path, monkeypatch):
    one = trainer(tmp_path, _folder("llama", root), peft_config=lora(), packing=True, prefix_sharing=True)
    compared, error = [], one._layout_error
    monkeypatch.setattr(one, "_layout_error", lambda *of: compared.append(error(*of)) or compared[-1])
    one.train()
    assert one.arrange is not None
    assert len(compared) == 1
    assert max(compared[0]) < 1e-5


@pytest.mark.parametrize(("noise", "obeyed"), [(0.2, True), (0.1, False)])
def test_rounding_is_what_scoring_a_part_of_a_batch_changes(root, tmp_path, monkeypatch, noise, obeyed, caplog):
    """In half precision that can be more than a fixed limit: log-probabilities of unlikely tokens are rounded coarsely."""
    one = trainer(tmp_path, _folder("llama", root), packing=True)
    monkeypatch.setattr(one, "_layout_error", lambda *of: (0.5, noise))
    batch = one.arranged(one.model, one._prepare_inputs(next(iter(one.get_train_dataloader()))))
    assert (batch.layout is not None) == (one.arrange is not None) == obeyed
    assert ("0.5 nats per token off, of which rounding explains 0.3" in caplog.text) != obeyed


def test_halves_of_a_batch_are_scored_as_the_whole(root, tmp_path):
    one = trainer(tmp_path, _folder("llama", root))
    batch = PairBatch.of(one._prepare_inputs(next(iter(one.get_train_dataloader()))))
    with torch.no_grad():
        whole, *halves = (one.score_tokens(one.model, each).logps for each in (batch, batch.side(0), batch.side(1)))
    assert_close(torch.cat(halves), whole)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SELECTED)
def test_whole_runs_in_other_layouts_end_in_the_same_weights(root, tmp_path, name, checkpointing):
    """With a reference that is precomputed, in the same layout; MaPO's masks are put back in their places."""
    ends = []
    for given in ({}, SELECTED[name]):
        options = {"loss_type": ["sparsepo"], "mask": "mapo", "learning_rate": 1e-3, "monitor_pairs": 0} | given
        options |= {"gradient_checkpointing": checkpointing}
        one = trainer(tmp_path, _folder("llama", root), peft_config=lora(), **options)
        one.train()
        assert one.args.padding_free == ("padding_free" in given)
        assert (one.arrange is None) == (not given)
        ends.append(one)
    for stock, own in zip(*(one.model.parameters() for one in ends), strict=True):
        assert_close(own, stock, rtol=1e-4, atol=1e-6)
    made = [
        trainer(
            tmp_path,
            _folder("llama", root),
            precompute_ref_log_probs=True,
            reference_cache=str(tmp_path / folder),
            **given,
        )
        for folder, given in (("a", {}), ("b", SELECTED[name]))
    ]
    for row, other in zip(*(one.train_dataset for one in made), strict=True):
        assert_close(torch.tensor(row["ref_chosen_token_logps"]), torch.tensor(other["ref_chosen_token_logps"]))


def test_a_model_that_is_its_own_reference_is_refused(root, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(_folder("llama", root))
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        PreferenceTrainer(model, model, args=config(PreferenceConfig, tmp_path), train_dataset=pairs(2))
    with pytest.raises(ValueError, match="has an adapter already"):
        trainer(tmp_path, get_peft_model(model, lora()), peft_config=lora())


def test_a_reference_of_another_tokenizer_is_rejected(root, tmp_path):
    policy, reference = (AutoModelForCausalLM.from_pretrained(_folder("llama", root)) for _ in range(2))
    renamed = tmp_path / "renamed"
    testbed.tokenizer().save_pretrained(renamed)
    tokens = renamed / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"▁barn"', '"▁born"'))
    reference.save_pretrained(renamed)
    reference = AutoModelForCausalLM.from_pretrained(renamed)
    small = zoo.build("llama", vocab_size=100, hidden=16)
    for own in ({}, {"processing_class": testbed.tokenizer()}):
        own |= {"args": config(PreferenceConfig, tmp_path), "train_dataset": pairs(2)}
        with pytest.raises(ValueError, match=r"renamed, has another tokenizer .* \(1 tokens .* such as '▁barn'\)"):
            PreferenceTrainer(policy, reference, **own)
        with pytest.raises(ValueError, match="uses 160 tokens, and the head of ref_model has only 100"):
            PreferenceTrainer(policy, small, **own)
    longer = testbed.tokenizer()
    longer.add_tokens(["a new token"])  # and both models have a row for it
    policy, reference = (AutoModelForCausalLM.from_pretrained(_folder("llama", root)) for _ in range(2))
    for model in (policy, reference):
        model.resize_token_embeddings(len(longer))
    own = {"processing_class": longer, "train_dataset": pairs(2)}
    check_preference(policy, reference, config(PreferenceConfig, tmp_path), own)


# ------------------------------------------------------------------------------------------------------- two processes

FSDP2 = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
"""
"""As `accelerate config` writes it."""


def _files(folder):
    """Pairs of texts, and pairs of images, as files."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    rows = []
    for i, row in enumerate(view_pairs(6)):
        for column in ("images", "rejected_images"):
            row[column][0].save(folder / f"{i}-{column}.png")
            row[column] = [f"{i}-{column}.png"]
        rows.append(row)
    (folder / "views.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TWO = {
    "svco": "--dataset_name views.jsonl --model_name_or_path testbed:vision-0 --loss_type svco --use_peft --lora_r 2 "
    "--lora_target_modules q_proj v_proj",
    "fsdp2": "--dataset_name pairs.jsonl --model_name_or_path testbed:student --prefix_sharing true --packing true",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(name, tmp_path, monkeypatch):
    """By gloo: images, which are unused in every second forward; `accelerate launch` with shards by its file, prompts once."""
    monkeypatch.chdir(tmp_path)
    _files(tmp_path)
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no"]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--learning_rate", "0.01"]
    same = [*TWO[name].split(), *quiet, *small, "--gradient_checkpointing", "false", "--monitor_pairs", "0"]
    cli_align.run([*same, "--output_dir", "one", "--gradient_accumulation_steps", "2"])
    both = [*same, "--output_dir", "two", "--gradient_accumulation_steps", "1"]
    if name == "fsdp2":
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp2.yaml"]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*launch, "-m", "contralto.align", *both], check=True, env=variables, timeout=500)
    else:
        run_ranks(lambda: align_run.run(both, launched=True))
    file = "model.safetensors" if name == "fsdp2" else "adapter_model.safetensors"
    one, two = (load_file(folder + "/" + file) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        assert_close(two[key], weight, rtol=1e-4, atol=1e-5)


def test_a_run_shorter_than_its_logging_interval_logs_its_last_step():
    args = SimpleNamespace(logging_strategy="steps")
    for step, lines, logged in (
        (3, [], False),
        (4, [], True),
        (4, [{"loss": 1.0}], False),
        (4, [{"eval_loss": 1.0}], True),
    ):
        state = SimpleNamespace(global_step=step, max_steps=4, log_history=lines)
        control = SimpleNamespace(should_log=False)
        LastLog().on_step_end(args, state, control)
        assert control.should_log == logged


def test_measurements_between_logs_are_not_averaged():
    one = object.__new__(PreferenceTrainer)
    one.model, one._metrics = nn.Linear(1, 1), {"train": defaultdict(list)}
    one.record_latest(a=1.0)
    one.record_latest(a=3.0)
    assert one._metrics["train"] == {"a": [3.0]}


def test_the_names_of_earlier_versions_of_trl_are_explained(tmp_path):
    with pytest.raises(
        ValueError, match=r"args is missing: give a PreferenceConfig, such as args=PreferenceConfig\('out'\)"
    ):
        PreferenceTrainer("any", train_dataset=pairs(2))
    args = config(PreferenceConfig, tmp_path)
    with pytest.raises(ValueError, match="tokenizer is named processing_class"):
        PreferenceTrainer(
            str(testbed.path("amateur")), args=args, train_dataset=pairs(2), tokenizer=testbed.tokenizer()
        )
