"""DistillationPairTrainer: loss and gradients from whole logits in float64, values in plain Python, its curriculum at work, a teacher on disk."""

import copy
import itertools
import json
import math
import os
import random
import signal
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import zoo
from datasets import Dataset
from helpers.kills import killed_at
from helpers.ranks import run_ranks
from oracles import align as plain
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from contralto import testbed
from contralto.align import parsing
from contralto.align import run as align_run
from contralto.align.data import training_data
from contralto.align.losses.curriculum import Curriculum
from contralto.align.trainers import distillation
from contralto.align.trainers.config import StagedConfig
from contralto.align.trainers.distillation import DistillationPairTrainer, IdleSides
from contralto.align.trainers.distillation_config import DISTILLATION_LOSSES, DistillationConfig
from contralto.align.trainers.on_policy import ROWS, _until_end, sampling_of, with_own_completions
from contralto.cli import align as cli_align
from contralto.data_gen.preference_rows import as_row
from contralto.testbed import worlds

TEACHER_VOCABULARY = 169
"""Padded, as the models of a family are: the student's and the tokenizer's is 160."""


def pairs(size=6, seed=0):
    """Rows with prompts and texts of different lengths."""
    problems = list(itertools.islice(worlds.problems(seed, "train"), size))
    rows = []
    for i, problem in enumerate(problems):
        chosen, rejected = problem.solution()[: 40 - 3 * (i % 6)], problems[i - 1].solution()[: 20 + 5 * (i % 6)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return Dataset.from_list(rows)


@cache
def _folder(family, root, *, vocabulary=160, hidden=16, seed=0):
    tokenizer, folder = testbed.tokenizer(), root / f"{family}-{vocabulary}-{seed}"
    model = zoo.build(
        family, vocab_size=vocabulary, hidden=hidden, seed=seed, max_position_embeddings=256, initializer_range=0.2
    )
    model.config.pad_token_id, model.config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def teacher_folder(root):
    return _folder("qwen3", root, vocabulary=TEACHER_VOCABULARY, hidden=24, seed=1)


def lora():
    shape = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(init_lora_weights=False, **shape)


def config(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "num_train_epochs": 3, "logging_steps": 1}
    kept = {"teacher_cache": str(folder / "cache")} if options.get("precompute_teacher") else {}
    return DistillationConfig(str(folder / "out"), **quiet | small | kept | options)


def trainer(folder, model, *, dataset=None, teacher=None, peft_config=None, **options):
    args = config(folder, **options)
    return DistillationPairTrainer(model, teacher, args=args, train_dataset=dataset or pairs(), peft_config=peft_config)


def _at(one, epoch, epochs, step, steps):
    """The trainer as if it stood there."""
    one.state.epoch, one.state.num_train_epochs = float(epoch - 1), epochs
    one.state.global_step, one.state.max_steps = step, steps


def _step(one):
    """What is found in a batch, gradients by name, and the metrics."""
    one.model.zero_grad()
    one._metrics["train"].clear()
    seen = []
    stage = one.loss
    one.loss = lambda *args: seen.append(stage(*args)) or seen[-1]
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    one._compute_loss(one.model.train(), dict(batch), return_outputs=False).backward()
    one.loss = stage
    grads = {name: weight.grad.clone() for name, weight in one.model.named_parameters() if weight.grad is not None}
    return seen[0], grads, {name: values[-1] for name, values in one._metrics["train"].items()}, batch


# ------------------------------------------------------------------------------------------- loss and gradients, exactly


def _logits(model, batch):
    """`(R, T - 1, V)` of the tokens that both vocabularies have."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits[:, :-1, :160]


def _divergence(name, z, x, alpha, args):
    """Of every token, with whole logits: `z` the student's, `x` the teacher's."""
    log_q, log_p = (z / args.temperature).log_softmax(-1), (x / args.temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if name == "skew_kl":
        return (p * (log_p - (alpha * p + (1 - alpha) * q).log())).sum(-1)
    if name == "skew_reverse_kl":
        inside = q.detach() if args.srkl_gradient == "detached" else q
        return (q * (log_q - ((1 - alpha) * p + alpha * inside).log())).sum(-1)
    if name == "jsd":
        m = args.beta * p + (1 - args.beta) * q
        return (args.beta * p * (log_p - m.log()) + (1 - args.beta) * q * (log_q - m.log())).sum(-1)
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    return (p * (log_p - log_q)).sum(-1) if name == "forward_kl" else (q * (log_q - log_p)).sum(-1)


def _plainly(name, z, x, alpha, args):
    """The mean divergence of a text in plain Python."""
    rows = zip((z / args.temperature).tolist(), (x / args.temperature).tolist(), strict=True)
    found = [plain.divergence(name, student, of_teacher, alpha=alpha, beta=args.beta) for student, of_teacher in rows]
    return math.fsum(found) / len(found)


def _expected(student, of_teacher, batch, args, weights, alpha):
    """The loss, and the mean divergence of every text, from whole logits; every text's is checked in plain Python."""
    mask = batch["completion_mask"][:, 1:].bool()
    z = _logits(student, batch)
    with torch.no_grad():
        x = None if of_teacher is None else _logits(of_teacher, batch)
    kind, size = DISTILLATION_LOSSES[args.loss_type[0]], len(mask) // 2
    total, values = 0.0, []
    for i, row in enumerate(mask):
        name, weight = (kind.chosen, weights[0]) if i < size else (kind.rejected, weights[1])
        if not weight:
            values.append(math.nan)
            continue
        if name == "nll":
            logps = z[i][row].log_softmax(-1)
            value = -logps.gather(-1, batch["input_ids"][i, 1:][row][:, None]).mean()
        else:
            value = _divergence(name, z[i][row], x[i][row], float(alpha[i]), args).mean()
            assert value.item() == pytest.approx(_plainly(name, z[i][row], x[i][row], float(alpha[i]), args), rel=1e-9)
        values.append(value.item())
        total = total + weight * value / size
    return total, values


@torch.no_grad()
def _mean_logps(model, batch):
    """`(R,)`."""
    mask = batch["completion_mask"][:, 1:]
    logps = _logits(model, batch).log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * mask).sum(-1) / mask.sum(-1)


CASES = [
    {"loss_type": "distillm2", "beta_max": 0.8},
    {"loss_type": "distillm2", "curriculum": "released"},
    {"loss_type": "distillm2", "temperature": 2.0, "srkl": "detached", "alpha_0": 0.05, "loss_factor": 1.0},
    {"loss_type": "skew_kl", "alpha_0": 0.3, "lmbda": 0.25},
    {"loss_type": "skew_reverse_kl"},
    {"loss_type": "jsd", "beta": 0.3},
    {"loss_type": "jsd", "lmbda": 0.0},
    {"loss_type": "forward_kl"},
    {"loss_type": "reverse_kl", "temperature": 0.7},
    {"loss_type": "tvd"},
    {"loss_type": "sft"},
    {"loss_type": "distillm2", "curriculum": "released_gradual"},
    {"loss_type": "distillm2"},  # at beta 1: the teacher's texts are skipped
]
SETTINGS = [("full", "live"), ("lora", "live"), ("lora", "cached"), ("full", "cached")]
FAST = {(0, 1), (1, 3), (7, 0), (10, 0), (12, 2)}
MATRIX = [
    pytest.param(
        options,
        setting,
        marks=() if (case, at) in FAST else pytest.mark.slow,
        id="-".join(map(str, [*options.values(), *setting])),
    )
    for case, options in enumerate(CASES)
    for at, setting in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("options", "setting"), MATRIX)
def test_loss_and_gradients_equal_whole_logits_in_float64(root, teacher_folder, tmp_path, options, setting):
    """With models in float64; the teacher's vocabulary is padded to another size. In the second of three epochs."""
    adapter, kept = setting
    student = AutoModelForCausalLM.from_pretrained(_folder("llama", root)).double()
    of_teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).double()
    alone = options["loss_type"] == "sft"
    if alone and kept == "cached":
        pytest.skip("sft has no teacher")
    more = {"precompute_teacher": kept == "cached"}
    peft_config = lora() if adapter == "lora" else None
    one = trainer(
        tmp_path,
        student,
        teacher=None if alone else copy.deepcopy(of_teacher),
        peft_config=peft_config,
        **options | more,
    )
    _at(one, 2, 3, 3, 6)
    found, grads, metrics, batch = _step(one)
    args = one.args
    weights, alpha = args.weights, [args.alpha] * 6
    if args.loss_type == ["distillm2"] and args.schedule.gradual_beta:
        beta = plain.beta(2, 3, 3, 6, beta_max=options.get("beta_max", 1.0))  # clip(2/3 + 3/6, 1/2, 1) = 1
        weights = (args.schedule.factor * (1 - beta), args.schedule.factor * beta)
        if options.get("curriculum") == "released_gradual":
            weights = (0.5, 1.5)
    rows = [i for i in range(6) if weights[i >= 3]]
    if found.alpha is not None:
        alpha = dict(zip(rows, found.alpha.tolist(), strict=True))
    one.model.zero_grad()
    for logps, model in ((found.logps, one.model), (found.teacher_logps, of_teacher)):
        if logps is not None:
            assert_close(logps, _mean_logps(model, batch)[rows], rtol=1e-7, atol=1e-9)
    expected, values = _expected(one.model, None if alone else of_teacher, batch, args, weights, alpha)
    assert_close(found.total.double(), expected.detach(), rtol=1e-7, atol=1e-12)
    expected.backward()
    compared = {name: weight.grad for name, weight in one.model.named_parameters() if weight.grad is not None}
    assert compared.keys() == grads.keys()
    for name, grad in compared.items():
        assert_close(grads[name], grad, rtol=1e-5, atol=1e-9)
    for side, part in (("chosen", values[:3]), ("rejected", values[3:])):
        if not any(map(math.isnan, part)):
            assert metrics[f"loss/{side}"] == pytest.approx(sum(part) / 3, rel=1e-6)


@pytest.mark.slow
def test_the_curriculum_works_in_training(root, teacher_folder, tmp_path):
    """Alpha of every text and beta of every step, against plain Python, over three epochs of four steps with accumulation."""
    one = trainer(
        tmp_path,
        _folder("llama", root),
        teacher=AutoModelForCausalLM.from_pretrained(teacher_folder),
        dataset=pairs(24),
        alpha_high=0.6,
        alpha_0=0.3,
        beta_max=0.9,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    seen, stage = [], one.loss
    one.loss = lambda *args: seen.append((one.state.global_step, stage(*args))) or seen[-1][1]
    one.train()
    assert [step for step, _ in seen] == [i // 2 for i in range(24)]
    free = 0
    for step, found in seen:
        epoch = step // 4 + 1
        beta = plain.beta(epoch, 3, step, 12, beta_max=0.9)
        expected = []
        for rows, author in ((slice(0, 3), found.teacher_logps), (slice(3, 6), found.logps)):
            own = author[rows].exp().tolist()
            other = (found.logps if author is found.teacher_logps else found.teacher_logps)[rows].exp().tolist()
            expected += [0.3] * 3 if epoch == 1 else plain.alpha(own, other, alpha_0=0.3, high=0.6)
        assert found.alpha.tolist() == pytest.approx(expected, abs=2e-4)
        free += sum(0.011 < each < 0.599 for each in expected) * (epoch > 1)
        whole = 0.5 * ((1 - beta) * found.values[:3].mean() + beta * found.values[3:].mean())
        assert found.total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert free > 5  # alphas that are not at an end of their range
    betas = [plain.beta(step // 4 + 1, 3, step, 12, beta_max=0.9) for step in range(12)]
    for name, values in (("beta", betas), ("weight/chosen", [0.5 * (1 - b) for b in betas])):
        assert [line[name] for line in one.state.log_history if name in line] == pytest.approx(values)


def test_alpha_reads_the_gap_of_the_author_over_the_other_model():
    """A text that both models find equally likely, on a side whose author prefers its own, is the hardest: alpha is low."""
    likely, unlikely = torch.tensor([0.5, 0.4, 0.3]).double().log(), torch.tensor([0.3, 0.3, 0.3]).double().log()
    straw = SimpleNamespace(
        args=SimpleNamespace(kind=SimpleNamespace(is_skewed=True), alpha=0.1, schedule=Curriculum(high=0.9)),
        _adapts_alpha=lambda: True,
        _process_mean=torch.mean,
        curriculum_position=lambda: {"epoch": 2},
    )
    completions = SimpleNamespace(rows={"chosen": slice(0, 3), "rejected": slice(3, 6)})
    student, of_teacher = torch.cat([unlikely, likely]), torch.cat([likely, unlikely])
    found = DistillationPairTrainer._alpha(straw, completions, student, of_teacher, like=torch.zeros(6).double())
    assert found.tolist() == pytest.approx(2 * [0.55, 0.1, 0.01])  # gaps 0.2, 0.1 and 0 of mean 0.1


def test_rounds_are_epochs_of_one_curriculum(root, teacher_folder, tmp_path):
    """The second of three rounds: alpha adapts from its first step on, beta goes on where the first round ended."""
    of_teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    options = {"num_train_epochs": 1, "first_epoch": 2, "all_epochs": 3, "beta_0": 0.1}
    one = trainer(tmp_path, _folder("llama", root), teacher=of_teacher, **options)
    _at(one, 1, 1, 1, 4)
    assert one.curriculum_position() == {"epoch": 2, "epochs": 3, "step": 5, "steps": 12}
    assert len(_step(one)[0].alpha.unique()) > 1


@pytest.mark.slow
def test_evaluation_compares_over_time(root, teacher_folder, tmp_path):
    """At beta_0 and alpha_0, whatever the step; with the same result from disk."""
    found = []
    for kept in (False, True):
        of_teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
        args = config(tmp_path, precompute_teacher=kept, eval_strategy="epoch")
        one = DistillationPairTrainer(
            _folder("llama", root), of_teacher, args=args, train_dataset=pairs(), eval_dataset=pairs(4, 5)
        )
        before = one.evaluate()
        _at(one, 3, 3, 5, 6)
        assert one.evaluate()["eval_loss"] == before["eval_loss"]
        sides = [before["eval_loss/chosen"], before["eval_loss/rejected"]]
        assert before["eval_loss"] == pytest.approx(sum(sides) / 4)
        found.append(before["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
def test_the_curriculum_needs_no_teacher_in_memory(root, teacher_folder, tmp_path):
    """Whole runs with the teacher in memory and on disk end in the same weights."""
    ends = []
    for kept in (False, True):
        one = trainer(
            tmp_path,
            _folder("llama", root),
            teacher_model_name_or_path=teacher_folder,
            precompute_teacher=kept,
            learning_rate=1e-3,
            peft_config=lora(),
        )
        assert (one.ref_model is None) == kept
        one.train()
        ends.append([weight.detach().clone() for weight in one.model.parameters()])
    for live, from_disk in zip(*ends, strict=True):
        assert_close(from_disk, live, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- a teacher on disk


def test_states_are_those_of_one_row_alone(root, teacher_folder, tmp_path):
    """Whatever their batch, their order or their padding; cut like the rows of the batches."""
    one = trainer(
        tmp_path,
        _folder("llama", root),
        teacher_model_name_or_path=teacher_folder,
        precompute_teacher=True,
        max_length=36,
    )
    alone = AutoModelForCausalLM.from_pretrained(teacher_folder)
    order = [4, 1, 2]
    batch = one.data_collator([dict(one.train_dataset[i]) for i in order])
    expected = []
    for side in ("chosen", "rejected"):
        for i in order:
            row = one.train_dataset[i]
            ids = torch.tensor([(row["prompt_ids"] + row[f"{side}_ids"])[:36]])
            with torch.no_grad():
                expected.append(alone.base_model(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1])
    assert_close(batch["teacher_states"], torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_second_run_does_not_load_the_teacher(root, teacher_folder, tmp_path, monkeypatch):
    how = {"teacher_model_name_or_path": teacher_folder, "precompute_teacher": True, "dataset": pairs()}
    first = trainer(tmp_path, _folder("llama", root), **how)
    monkeypatch.setattr(distillation, "load_teacher", lambda args: pytest.fail("the teacher was loaded"))
    again = trainer(tmp_path, _folder("llama", root), **how, seed=5)
    assert again.train_dataset["teacher_states"] == first.train_dataset["teacher_states"]
    assert_close(again._head.weight, first._head.weight)
    other = _folder("qwen3", root, vocabulary=TEACHER_VOCABULARY, hidden=24, seed=2)
    for changed in ({"max_length": 1000}, {"dataset": pairs(seed=3)}, {"teacher_model_name_or_path": other}):
        with pytest.raises(pytest.fail.Exception, match="was loaded"):
            trainer(tmp_path, _folder("llama", root), **how | changed)
    with pytest.raises(pytest.fail.Exception, match="was loaded"):  # states of one side are not those of both
        trainer(tmp_path, _folder("llama", root), **how, loss_type="forward_kl")


@pytest.mark.parametrize("options", [{"loss_type": "sft"}, {"loss_type": "jsd", "lmbda": 0.0}])
def test_rows_need_no_rejected_completion_where_it_has_no_weight(root, teacher_folder, tmp_path, options):
    if options["loss_type"] != "sft":
        options = options | {"teacher_model_name_or_path": teacher_folder}
    steps = []
    for dataset in (pairs(), pairs().remove_columns("rejected")):
        loss, grads, _, _ = _step(trainer(tmp_path, _folder("llama", root), dataset=dataset, **options))
        steps.append((loss.total, grads))
    assert_close(steps[0][0], steps[1][0])
    assert_close(steps[0][1], steps[1][1])


@pytest.mark.parametrize("row", [{"chosen": "2 + 2 is 4"}, {"chosen": "2 + 2 is 4", "rejected": None}])
def test_a_row_without_rejected_says_where_its_prompt_ends(root, tmp_path, row):
    with pytest.raises(ValueError, match="rows without rejected have a prompt"):
        trainer(tmp_path, _folder("llama", root), dataset=Dataset.from_list([row]), loss_type="sft")
    with pytest.raises(ValueError, match="column prompt: it is missing; a row without rejected needs a prompt"):
        as_row(row, needs_rejected=False)
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert as_row(row | {"chosen": messages}, needs_rejected=False)["rejected"] == messages[1:]


def test_rows_need_a_rejected_completion_that_has_a_weight(root, teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no column rejected"):
        trainer(
            tmp_path,
            _folder("llama", root),
            dataset=pairs().remove_columns("rejected"),
            loss_type="jsd",
            teacher_model_name_or_path=teacher_folder,
        )


@pytest.mark.parametrize(
    ("loss", "is_read"), [("sft", False), ("forward_kl", False), ("jsd", True), ("distillm2", True)]
)
def test_the_command_reads_rows_without_rejected_where_it_is_not_read(tmp_path, loss, is_read):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": None}) + "\n")
    args = config(tmp_path, loss_type=loss)
    assert args.reads_rejected == is_read
    data, _, _, mixture = parsing.parse(["--trainer", "distill", "--dataset_name", str(file), "--output_dir", "out"])[0]
    if is_read:
        with pytest.raises(ValueError, match="column rejected"):
            training_data(data, args, mixture)
    else:
        rows, _ = training_data(data, args, mixture)
        assert rows[0] == {"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}


def test_an_aligned_teacher_keeps_its_adapter(root, teacher_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(teacher_folder)
    losses = [
        _step(trainer(tmp_path, _folder("llama", root), teacher=each, loss_type="forward_kl"))[0].total
        for each in (copy.deepcopy(base), get_peft_model(base, lora()))
    ]
    assert (losses[0] - losses[1]).abs() > 1e-3


# ------------------------------------------------------------------------------------------------- what is not computed


def test_sft_loads_no_teacher_and_no_text_without_weight_is_run(root, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "load_teacher", lambda args: pytest.fail("a teacher was loaded"))
    one = trainer(tmp_path, _folder("llama", root), loss_type="sft")
    assert one.ref_model is None
    rows, stock = [], one.policy.base_model.forward
    monkeypatch.setattr(
        one.policy.base_model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or stock(*a, **k)
    )
    _step(one)
    assert rows == [3]


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_text_is_run_in_the_steps_in_which_it_has_no_weight(
    root, teacher_folder, tmp_path, monkeypatch, caplog, kept
):
    """By student and teacher; the log says so, and how much of the training it is."""
    one = trainer(
        tmp_path,
        _folder("llama", root),
        teacher=AutoModelForCausalLM.from_pretrained(teacher_folder),
        precompute_teacher=kept,
        dataset=pairs(6),
        per_device_train_batch_size=3,
    )
    rows = {}
    for name, model in (("student", one.policy), ("teacher", one.ref_model)):
        if model is not None:
            seen, stock = rows.setdefault(name, []), model.base_model.forward
            monkeypatch.setattr(
                model.base_model,
                "forward",
                lambda *a, seen=seen, stock=stock, **k: seen.append(len(k["input_ids"])) or stock(*a, **k),
            )
    one.train()  # 6 steps: beta is 1/2, 1/2, 1, 1, 1, 1
    assert all(seen == [6, 6, 3, 3, 3, 3] for seen in rows.values())
    assert [line["weight/chosen"] for line in one.state.log_history if "loss" in line] == [0.25, 0.25, 0, 0, 0, 0]
    assert ["loss/chosen" in line for line in one.state.log_history if "loss" in line] == [True, True, *[False] * 4]
    (said,) = [
        record.getMessage() for record in caplog.records if record.name == "contralto.align.trainers.distillation"
    ]
    assert said.startswith("with 3 epochs the teacher's texts have no weight in 67% of the steps")


def test_idle_sides_are_named_before_the_first_step(tmp_path, caplog):
    """By the callback that runs before it, from the schedule alone."""
    one = object.__new__(DistillationPairTrainer)
    one.args = DistillationConfig(str(tmp_path), max_steps=8, report_to="none", teacher_model_name_or_path="t")
    one.accelerator = SimpleNamespace(is_main_process=True)
    one.state = SimpleNamespace(epoch=0.0, max_steps=8, num_train_epochs=1, global_step=0)
    IdleSides(one).on_train_begin(one.args, one.state, None)
    assert "with 1 epoch the teacher's texts have no weight in any step" in caplog.text


@pytest.mark.slow
def test_pictures(tmp_path):
    """A vision-language student and teacher; with a loss on one side, whose other rows stay for the images' sake."""
    said = ["yes", "no", "no", "yes"]
    rows = [
        {
            "images": [Image.new("RGB", (32, 32), (60 * i, 255 - 60 * i, 90))],
            "prompt": [{"role": "user", "content": "is there a cat?"}],
            "chosen": [{"role": "assistant", "content": said[i]}],
            "rejected": [{"role": "assistant", "content": said[i - 1]}],
        }
        for i in range(4)
    ]
    for loss in ("skew_kl", "forward_kl"):
        one = trainer(
            tmp_path,
            str(testbed.path("vision-0")),
            dataset=Dataset.from_list(rows),
            teacher_model_name_or_path="testbed:vision-1",
            loss_type=loss,
        )
        found, _, metrics, batch = _step(one)
        of_teacher = testbed.load("vision-1")
        inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
        z, x = (model(**inputs).logits[:, :-1].detach() for model in (one.model, of_teacher))
        mask = batch["completion_mask"][:, 1:].bool()
        alpha = {"skew_kl": 0.1, "forward_kl": 0.0}[loss]
        values = [_plainly(loss, z[i][mask[i]], x[i][mask[i]], alpha, one.args) for i in range(6)]
        chosen, rejected = sum(values[:3]) / 3, sum(values[3:]) / 3
        expected = (chosen + rejected) / 2 if loss == "skew_kl" else chosen
        assert found.total.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert ("loss/rejected" in metrics) == (loss == "skew_kl")


class Int8(torch.nn.Module):
    """A linear layer in 8 bits, as quantising libraries put in the place of each but the head."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().amax() / 127
        self.weight = torch.nn.Parameter(
            (layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["live", "cached"])
def test_a_quantised_teacher(root, teacher_folder, tmp_path, kept):
    """Gives the loss of the same teacher with its rounded weights in float32."""
    quantised, rounded, whole = (AutoModelForCausalLM.from_pretrained(teacher_folder) for _ in range(3))
    for name, layer in list(quantised.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            quantised.model.set_submodule(name, Int8(layer))
            new = quantised.model.get_submodule(name)
            rounded.model.get_submodule(name).weight.data = new.weight * new.scale
    found = []
    for each, how in ((quantised, kept), (rounded, False), (whole, False)):
        one = trainer(tmp_path, _folder("llama", root), teacher=each, loss_type="jsd", precompute_teacher=how)
        found.append(_step(one)[0].total)
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert abs(found[0] - found[2]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_teacher_quantised_by_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    how = {"teacher_model_name_or_path": "testbed:expert", "loss_type": "forward_kl"}
    student = str(testbed.path("student"))
    whole = _step(trainer(tmp_path, student, **how))[0].total.item()
    for kept in (False, True):
        one = trainer(tmp_path, student, **how, precompute_teacher=kept, **{f"teacher_load_in_{bits}bit": True})
        assert 0 < abs(_step(one)[0].total.item() - whole) < 0.3 * whole


# -------------------------------------------------------------------------------------------------------- the command


QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
LORA = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    problems = list(itertools.islice(worlds.problems(0, "train"), 24))
    rows = [
        {"prompt": p.question, "chosen": p.solution(), "rejected": p.solution(stop_after=len(p.steps) // 2)}
        for p in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _argv(recipe, file, out, *more, adapter=LORA):
    data = ["--model_name_or_path", "testbed:student", "--dataset_name", file, "--output_dir", out]
    data += ["--teacher_model_name_or_path", "testbed:expert", "--per_device_train_batch_size", "4"]
    return [str(word) for word in (recipe, *data, *QUIET, *adapter, "--gradient_accumulation_steps", "1", *more)]


@pytest.mark.slow
def test_the_command_distils(file, tmp_path):
    more = [
        "--conversations",
        "--learning_rate",
        "0.0003",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "24",
    ]
    cli_align.run(
        _argv("distill", file, tmp_path / "out", *more, "--num_train_epochs", "12", "--beta_max", "0.8", adapter=[])
    )
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    lines = [line for line in state["log_history"] if "beta" in line]
    assert lines[0]["beta"] == 0.5
    assert lines[-1]["beta"] == 0.8
    first, last = (line["loss/chosen"] + line["loss/rejected"] for line in (lines[0], lines[-1]))
    assert last < 0.9 * first


def _killed_at(argv, point):
    """Run in a process of its own that is killed at `point`; how it ended."""
    return killed_at(lambda: cli_align.run(argv), DistillationPairTrainer, *point)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_kills_and_the_same_weights(file, tmp_path):
    """Killed at random micro-batches and while a checkpoint is written, resumed each time: the curriculum stands where it stood."""
    rng = random.Random(1)
    options = ["--num_train_epochs", "3", "--gradient_accumulation_steps", "2", "--save_strategy", "steps"]
    options += [
        "--save_steps",
        "1",
        "--learning_rate",
        "0.01",
        "--resume_from_checkpoint",
        "last",
        "--precompute_teacher",
    ]
    options += ["--teacher_cache", str(tmp_path / "cache"), "--save_total_limit", "3"]
    whole, broken = (_argv("distill", file, tmp_path / name, *options) for name in ("whole", "broken"))
    assert _killed_at(whole, ("training_step", -1)) == 0
    for kill in range(4):
        point = ("_save_rng_state", 0) if kill == 2 else ("training_step", rng.randint(2, 3))
        assert os.WTERMSIG(_killed_at(broken, point)) == signal.SIGKILL
    assert _killed_at(broken, ("training_step", 17)) == 0  # a run that started over would have 18 micro-batches
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "kept"), [(LORA, []), ([], ["--precompute_teacher"])], ids=["lora-live", "full-from-disk"]
)
def test_two_processes_equal_one_with_twice_the_batch(file, tmp_path, adapter, kept):
    """By gloo: alpha's mean gap is over the texts of both."""
    both = ["--learning_rate", "0.01", "--save_strategy", "no", "--gradient_checkpointing", "false", *kept]
    both += ["--num_train_epochs", "2", *(["--teacher_cache", str(tmp_path / "cache")] if kept else [])]
    one = _argv("distill", file, tmp_path / "one", *both, "--per_device_train_batch_size", "8", adapter=adapter)
    cli_align.run(one)
    recipe = str(parsing.recipes()["distill"])
    argv = _argv(recipe, file, tmp_path / "two", *both, adapter=adapter)
    run_ranks(lambda: align_run.run(argv, launched=True))
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert first.keys() == second.keys()
    for key, weight in first.items():
        assert_close(second[key], weight, rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------------------------------------------- wrong arguments

WRONG_CONFIGS = [
    ({"loss_type": "distilm"}, "loss_type must be one of distillm2, skew_kl"),
    ({"loss_type": ["jsd", "sft"]}, "loss_type must be one of .* not jsd, sft"),
    (
        {"loss_type": "sft", "temperature": 2.0},
        "temperature is set, but sft does not use it; it is an option of distillm2",
    ),
    ({"lmbda": 0.5}, "lmbda is set, but distillm2 does not use it; it is an option of skew_kl"),
    ({"loss_type": "jsd", "curriculum": "released"}, "curriculum is set, but jsd does not use it"),
    ({"loss_type": "jsd", "beta": 1.5}, r"beta must lie in \[0, 1\], not 1.5"),
    ({"loss_type": "jsd", "lmbda": -0.1}, r"lmbda must lie in \[0, 1\]"),
    ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    ({"label_smoothing": 0.1}, "label_smoothing is set, but is an option of preference losses"),
    ({"padding_free": True}, "padding_free is set, but is an option of preference losses"),
    ({"precompute_ref_log_probs": True}, "for a teacher set precompute_teacher"),
    ({"curriculum": "mine"}, "curriculum must be one of paper, released, released_gradual, not 'mine'"),
    ({"srkl": "half"}, "srkl must be full or detached"),
    ({"alpha_0": 0.5}, "alpha_0 must lie between low and high"),
    ({"loss_type": "skew_kl", "alpha_0": 1.0}, "low and high must be ordered"),
    ({"beta_max": 0.4}, "beta_max must lie between beta_0, 0.5, and 1, not 0.4"),
    ({"beta_ramp": 0.0}, r"ramp must lie in \(0, 1\]"),
    (
        {"curriculum": "released", "beta_max": 0.8},
        "beta_max is set, but is only used with gradual_beta, which is False",
    ),
    ({"gradual_beta": False, "beta_ramp": 0.8}, "beta_ramp is set, but is only used with gradual_beta"),
    ({"curriculum": "released", "alpha_high": 0.8}, "alpha_high is set, but is only used with adaptive_alpha"),
    ({"loss_type": "jsd", "beta_max": 0.8}, "beta_max is set, but jsd does not use it; it is an option of distillm2"),
    ({"num_train_epochs": 1}, "adaptive_alpha needs several epochs"),
    ({"num_train_epochs": 1, "adaptive_alpha": False}, "gradual_beta needs several epochs"),
    ({"per_device_train_batch_size": 1}, "adaptive_alpha compares completions of a batch"),
    ({"first_epoch": 3, "all_epochs": 2}, "at most all_epochs, not 3 of 2"),
    ({"teacher_cache": "x"}, "only used with precompute_teacher"),
    ({"teacher_load_in_4bit": True}, "teacher_load_in_4bit is set, but teacher_model_name_or_path"),
    (
        {"teacher_model_name_or_path": "t", "teacher_load_in_4bit": True, "teacher_load_in_8bit": True},
        "are both set: set one",
    ),
    ({"max_length": 1}, "max_length must be at least 2"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_CONFIGS, ids=lambda value: str(value)[:40])
def test_wrong_options_are_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["loss_weights", "ld_alpha", "use_weighting", "sync_ref_model", "discopop_tau", "of_a_new_version"]
)
def test_options_that_trl_has_for_preferences_are_rejected(tmp_path, monkeypatch, name):
    """All of `DPOConfig` that is not said to be read, whatever a new version adds."""
    if name == "of_a_new_version":
        monkeypatch.setattr(DPOConfig, "__annotations__", DPOConfig.__annotations__ | {"logging_first_step": bool})
        name = "logging_first_step"
    with pytest.raises(ValueError, match=f"{name} is set, but is an option of preference losses, not of distillation"):
        config(tmp_path, **{name: 0.25 if name == "discopop_tau" else True})


PROMPTS = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
# ------------------------------------------------------------------------------------------------------------ on policy


def test_completions_of_the_student_take_the_place_of_the_rejected_ones(root, tmp_path, teacher_folder):
    """They are what generate() samples; the step is that of a batch with these completions."""
    options = {"loss_type": "jsd", "on_policy": 1.0, "max_new_tokens": 7, "sampling_temperature": 1.3}
    one = trainer(
        tmp_path, _folder("llama", root), teacher_model_name_or_path=teacher_folder, peft_config=lora(), **options
    )
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    one.model.train()
    torch.manual_seed(5)
    fresh = with_own_completions(one.model, batch, sampling_of(one))
    assert one.model.training
    rows = len(batch["input_ids"]) // 2
    for row in range(rows):
        kept = batch["attention_mask"][row].bool()
        assert fresh["input_ids"][row][: kept.sum()].tolist() == batch["input_ids"][row][kept].tolist()
        assert fresh["completion_mask"][row].sum() == batch["completion_mask"][row].sum()
    torch.manual_seed(5)
    prompts = [
        ids[(mask == 1) & (scored == 0)]
        for ids, mask, scored in zip(*(batch[name][rows:] for name in ROWS), strict=True)
    ]
    longest = max(map(len, prompts))
    left = torch.stack(
        [torch.cat([torch.full((longest - len(p),), one.processing_class.pad_token_id), p]) for p in prompts]
    )
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    sampled = one.model.eval().generate(
        input_ids=left, attention_mask=mask, do_sample=True, top_k=0, temperature=1.3, max_new_tokens=7
    )[:, longest:]
    for row, prompt in enumerate(prompts):
        own = fresh["input_ids"][rows + row][fresh["completion_mask"][rows + row].bool()]
        assert own.tolist() == sampled[row][: len(own)].tolist()
        before = fresh["input_ids"][rows + row][: len(prompt)]
        assert before.tolist() == prompt.tolist()
        assert len(own) == 7 or own[-1] in sampling_of(one).end_tokens
    torch.manual_seed(5)
    anew = one._compute_loss(one.model.train(), dict(batch), return_outputs=False)
    one.args.on_policy = 0.0
    assert_close(anew, one._compute_loss(one.model, dict(fresh), return_outputs=False))
    assert anew != one._compute_loss(one.model, dict(batch), return_outputs=False)


@pytest.mark.slow
def test_the_student_writes_in_a_share_of_the_steps_and_needs_no_rejected_completions(
    root, tmp_path, teacher_folder, monkeypatch
):
    written = []
    monkeypatch.setattr(
        distillation, "with_own_completions", lambda model, batch, sampling: written.append(1) or dict(batch)
    )
    named = {"teacher_model_name_or_path": teacher_folder, "max_steps": 12, "loss_type": "reverse_kl"}
    trainer(tmp_path, _folder("llama", root), on_policy=0.5, **named).train()
    assert 2 <= len(written) <= 10
    monkeypatch.undo()
    alone = pairs().remove_columns("rejected")
    one = trainer(tmp_path, _folder("llama", root), dataset=alone, on_policy=1.0, max_new_tokens=4, **named)
    one.train()
    assert not one.args.reads_rejected
    assert one.state.log_history[0]["loss/rejected"] > 0


def test_new_completions_end_where_the_student_ends_and_where_the_rows_are_full():
    tokens = torch.tensor([4, 9, 7, 2, 2])
    assert _until_end(tokens, (2, 7)).tolist() == [4, 9, 7]
    assert _until_end(tokens, (3,)).tolist() == tokens.tolist() == _until_end(tokens, ()).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy": 1.5}, "on_policy must lie in"),
        ({"max_new_tokens": 9}, "max_new_tokens is set, but is only used with on_policy"),
        ({"on_policy": 0.5, "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"on_policy": 0.5, "sampling_temperature": 0.0}, "sampling_temperature must be"),
        ({"on_policy": 0.5, "loss_type": "forward_kl"}, "the student's completions have no weight: set lmbda above 0"),
        ({"on_policy": 0.5, "precompute_teacher": True}, "precompute_teacher reads the teacher on given ones"),
        ({"on_policy": 0.5, "loss_type": "sft"}, "on_policy is set, but sft does not use it"),
    ],
)
def test_wrong_options_of_on_policy_are_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, **{"loss_type": "jsd"} | options)
    assert "\n" not in str(error.value)


WRONG_TRAINERS = [
    ({"args": StagedConfig}, "args must be a DistillationConfig, not StagedConfig"),
    ({"model": 5}, "model must be a name, a folder or a loaded model"),
    ({"teacher": None}, "distillm2 needs a teacher"),
    ({"teacher": "name"}, "teacher must be a loaded model, not a str; a name goes into the config"),
    ({"teacher_model_name_or_path": "other"}, "there are two teachers"),
    ({"loss_type": "sft"}, "sft learns from the teacher's completions alone"),
    ({"train_dataset": None}, "train_dataset is missing"),
    ({"train_dataset": Dataset.from_dict({"chosen": [], "rejected": []})}, "train_dataset has no rows"),
    ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]})}, "has no column rejected"),
    ({"train_dataset": [1]}, "must be a datasets.Dataset"),
    ({"train_dataset": "stream"}, "a streamed train_dataset has no length"),
    ({"train_dataset": "stream", "max_steps": 2, "precompute_teacher": True}, "is streamed, and precompute_teacher"),
    ({"eval_strategy": "steps"}, "there is no eval_dataset"),
    ({"peft_config": {"r": 4}}, "peft_config must be a configuration of peft"),
    ({"peft_config": PROMPTS}, "use LoRA"),
    ({"fsdp": True, "fsdp_config": {"version": 1}}, "which ZeRO 3 and FSDP 1 keep in shards"),
    (
        {
            "train_dataset": Dataset.from_dict({"images": [1], "chosen": ["b"], "rejected": ["c"]}),
            "precompute_teacher": True,
        },
        "precompute_teacher is for text",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_TRAINERS, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_seen_before_a_model_is_loaded(tmp_path, wrong, message):
    wrong = dict(wrong)
    kind = wrong.pop("args", DistillationConfig)
    how = {name: wrong.pop(name) for name in ("train_dataset", "peft_config", "teacher") if name in wrong}
    if how.get("train_dataset", "") == "stream":
        how["train_dataset"] = pairs(2).to_iterable_dataset()
    model = wrong.pop("model", str(tmp_path / "nothing"))
    args = config(tmp_path, **wrong) if kind is DistillationConfig else kind(str(tmp_path), use_cpu=True, bf16=False)
    how = {"teacher": torch.nn.Linear(1, 1), "train_dataset": pairs(2)} | how
    with pytest.raises(ValueError, match=message) as error:
        DistillationPairTrainer(model, args=args, **how)
    assert "\n" not in str(error.value)


def test_another_tokenizer_or_a_smaller_vocabulary_is_refused(root, teacher_folder, tmp_path):
    other = testbed.tokenizer()
    other.add_tokens(["a new token"])
    student = tmp_path / "student"
    AutoModelForCausalLM.from_pretrained(_folder("llama", root)).save_pretrained(student)
    other.save_pretrained(student)
    with pytest.raises(
        ValueError, match=r"different tokenizers .1 tokens of the student's differ, such as 'a new token'"
    ):
        trainer(tmp_path, str(student), teacher_model_name_or_path=teacher_folder)
    renamed = tmp_path / "renamed"
    AutoModelForCausalLM.from_pretrained(teacher_folder).save_pretrained(renamed)
    testbed.tokenizer().save_pretrained(renamed)
    tokens = renamed / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"▁barn"', '"▁born"'))
    loaded = AutoModelForCausalLM.from_pretrained(renamed)  # of a size that fits
    for kept in (False, True):
        with pytest.raises(ValueError, match=r"renamed have different tokenizers .1 tokens of .* such as '▁barn'"):
            trainer(tmp_path, _folder("llama", root), teacher=loaded, precompute_teacher=kept)
    small = zoo.build("llama", vocab_size=100, hidden=16)
    for kept in (False, True):
        with pytest.raises(ValueError, match="has 160 tokens, and the teacher's head only 100"):
            trainer(tmp_path, _folder("llama", root), teacher=small, precompute_teacher=kept)
    packed = AutoModelForCausalLM.from_pretrained(teacher_folder)
    packed.lm_head.weight = torch.nn.Parameter(packed.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="the teacher's head is quantised"):
        trainer(tmp_path, _folder("llama", root), teacher=packed)
    same = AutoModelForCausalLM.from_pretrained(_folder("llama", root))
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        trainer(tmp_path, same, teacher=same)
    with pytest.raises(ValueError, match="has an adapter already"):
        trainer(tmp_path, get_peft_model(same, lora()), teacher=small, peft_config=lora())
