"""`torch_compile` of trainers on pairs: the losses of a training without it, and graphs that further batches use again."""

from itertools import islice

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from contralto import testbed
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.testbed import worlds

pytestmark = [
    *RENAMED_OPTIONS,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # read by torch's compiler
]


MOST = 10
"""Graphs of the layers of one model: for each kind of pass, for the size that the first batch has, for any size, and for a single row."""


def _pairs(size):
    """Pairs of many lengths, of which a pack holds one to three."""
    rows = [
        {"prompt": each.question, "chosen": f" {each.solution()}", "rejected": f" {each.solution()[: 6 + 5 * (i % 7)]}"}
        for i, each in enumerate(islice(worlds.problems(0, "train"), size))
    ]
    return Dataset.from_list(rows)


class Graphs(TrainerCallback):
    """Notes how many graphs there are after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *_args, **_kwargs):
        self.counts.append(counters["stats"]["unique_graphs"])


def _trained(folder, *, adapter=True, steps=6, **options):
    """A training of some steps, and the graphs after each of them."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "max_steps": steps, "logging_steps": 1, "learning_rate": 1e-3}
    layout = {"packing": True, "prefix_sharing": True, "pack_length": 128, "max_length": 128}
    args = PreferenceConfig(str(folder), **(quiet | small | layout | {"gradient_checkpointing": False} | options))
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    graphs = Graphs()
    one = PreferenceTrainer(
        "testbed:expert",
        args=args,
        train_dataset=_pairs(3 * steps),
        eval_dataset=_pairs(3),
        peft_config=LoraConfig(**lora) if adapter else None,
        callbacks=[graphs],
    )
    one.train()
    return one, graphs.counts


def _values(one, *names):
    return [line[name] for line in one.state.log_history for name in names if name in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"packing": False, "prefix_sharing": False, "pack_length": None},
        {"adapter": False},
        {"precompute_ref_log_probs": True},
    ],
    ids=["packed", "checkpoints", "padded", "whole", "kept"],
)
def test_losses_are_those_without_and_graphs_are_used_again(tmp_path, options):
    """The reference is away from the policy; `eager` traces as every backend does, and compiles nothing."""
    own = {"reference_cache": str(tmp_path / "kept")} if options.get("precompute_ref_log_probs") else {}
    plain, none = _trained(tmp_path, **options, **own)
    compiled, counts = _trained(tmp_path, **options, **own, torch_compile_backend="eager")
    assert set(none) == {0}
    assert 0 < counts[0] < counts[3] == counts[-1] <= MOST
    assert not counters["graph_break"]
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert _values(compiled, name) == pytest.approx(_values(plain, name), rel=1e-5, abs=1e-6)
    if not options.get("adapter", True):
        assert any(margin != 0 for margin in _values(plain, "rewards/margins"))
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # read by inductor
def test_code_that_was_compiled_gives_the_same_losses(tmp_path):
    plain, _ = _trained(tmp_path, steps=3)
    compiled, counts = _trained(tmp_path, steps=3, torch_compile=True)
    assert counts[-1] > 0
    for name in ("loss", "grad_norm"):
        assert _values(compiled, name) == pytest.approx(_values(plain, name), rel=1e-4, abs=1e-5)


def test_only_layers_are_compiled(tmp_path):
    """Head and layout stay what they are, and nothing is compiled before a step is trained."""
    args = {"report_to": "none", "use_cpu": True, "bf16": False, "torch_compile_backend": "eager"}
    one = PreferenceTrainer(
        "testbed:expert", args=PreferenceConfig(str(tmp_path), **args), train_dataset=_pairs(2), eval_dataset=_pairs(2)
    )
    layers = [*one.model.model.layers, *one.ref_model.model.layers]
    one.evaluate()
    assert [layer._compiled_call_impl for layer in layers] == [None] * len(layers)
    one.model.train()
    one.compute_loss(one.model, one._prepare_inputs(next(iter(one.get_train_dataloader()))))
    compiled = [
        module
        for part in (one.model, one.ref_model)
        for module in part.modules()
        if module._compiled_call_impl is not None
    ]
    assert compiled == layers


@pytest.mark.parametrize(
    "option", [{"torch_compile": True}, {"torch_compile_backend": "eager"}, {"torch_compile_mode": "default"}]
)
@pytest.mark.parametrize("mask", ["mapo", "learned"])
def test_masks_that_hooks_read_are_rejected(option, mask):
    with pytest.raises(ValueError, match=f"the mask {mask} is read by hooks that a compiled layer does not call"):
        PreferenceConfig("out", loss_type=["sparsepo"], mask=mask, report_to="none", use_cpu=True, **option)
    PreferenceConfig("out", loss_type=["sparsepo"], mask="ones", report_to="none", use_cpu=True, **option)


def test_a_load_balancing_loss_is_rejected(tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = testbed.tokenizer()
    config = MixtralConfig(
        **shape, num_key_value_heads=2, vocab_size=len(tokenizer), num_local_experts=2, output_router_logits=True
    )
    args = PreferenceConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, torch_compile_backend="eager", loss_type=["cpo"]
    )
    with pytest.raises(ValueError, match="the load-balancing loss is read by hooks"):
        PreferenceTrainer(MixtralForCausalLM(config), args=args, train_dataset=_pairs(2), processing_class=tokenizer)
