"""Training on completions with labels: the loss of TRL, batches of half and half, the order of rows, checks."""

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from helpers.ranks import run_ranks
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from trl import KTOTrainer

from contralto import testbed
from contralto.align import UnpairedConfig, UnpairedTrainer
from contralto.align import run as align_run
from contralto.align.trainers.unpaired import ForgetAndRetain
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
SMALL = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}


def rows(count=12, every=3):
    """Solutions; each third one breaks off and has the label false."""
    problems = itertools.islice(worlds.problems(0, "train"), count)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p.question}],
                "completion": [{"role": "assistant", "content": p.solution() if i % every else p.solution()[:20]}],
                "label": bool(i % every),
            }
            for i, p in enumerate(problems)
        ]
    )


def lora(*, zero=False):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=zero)


def trainer(folder, loss_type, dataset=None, adapter=None, **options):
    args = UnpairedConfig(str(folder), loss_type=loss_type, **QUIET | SMALL | options)
    data = rows() if dataset is None else dataset
    return UnpairedTrainer(str(testbed.path("amateur")), args=args, train_dataset=data, peft_config=adapter)


def _raise_likelihood_of_other_completions(one, batch):
    """Train until the reference point is above 0, where KTO differs from APO-zero."""
    others = {name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")}
    optimizer = torch.optim.Adam([p for p in one.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        (-one._score(one.model, others)[1].mean()).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradients_equal_trl(tmp_path, name, precomputed):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "precompute_ref_log_probs": precomputed}
    one = trainer(tmp_path, name, adapter=lora(zero=name == "kto"), **weights)
    batch = dict(next(iter(one.get_train_dataloader())))
    if name == "kto":
        _raise_likelihood_of_other_completions(one, batch)
    values, gradients = [], []
    for step in (one._compute_loss, lambda *args: KTOTrainer._compute_loss(one, *args)):
        one.model.zero_grad()
        loss = step(one.model, dict(batch), False)
        loss.backward()
        values.append(loss.item())
        gradients.append([p.grad.clone() for p in one.model.parameters() if p.grad is not None])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert_close(*gradients)
    both = one._metrics["train"]
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert both[metric][0] == pytest.approx(both[metric][1], rel=1e-5)
    if name == "kto":
        assert both["kl"][0] == pytest.approx(both["kl"][1], rel=1e-5)
        assert both["kl"][0] > 1


@pytest.mark.slow
def test_unlearning_equals_whole_logits(tmp_path):
    one = trainer(tmp_path, ["npo", "retain"], adapter=lora(), beta=0.3)
    batch = next(iter(one.get_train_dataloader()))
    loss = one._compute_loss(one.model, dict(batch), False)
    base = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    base.eval()
    scored = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logps = [
            torch.log_softmax(m(**inputs).logits[:, :-1].double(), -1).gather(-1, batch["input_ids"][:, 1:, None])[
                ..., 0
            ]
            for m in (one.model, base)
        ]
    policy, reference = (torch.where(scored, each, 0).sum(-1) for each in logps)
    keep = batch["label"].bool()
    assert keep.tolist() == [False, True, False, True]
    npo = -2 / 0.3 * torch.nn.functional.logsigmoid(-0.3 * (policy - reference)[~keep]).mean()
    retained = -policy[keep].sum() / scored[keep].sum()
    assert loss.item() == pytest.approx((npo + retained).item(), rel=1e-5)


@pytest.mark.slow
def test_unlearning_lowers_what_is_to_be_forgotten_alone(tmp_path):
    one = trainer(tmp_path, ["gradient_ascent", "retain"], max_steps=12, learning_rate=3e-4)
    assert one.ref_model is None
    one.train()
    first, last = one.state.log_history[0], one.state.log_history[-2]
    assert last["loss/gradient_ascent"] < first["loss/gradient_ascent"] - 0.5
    assert last["loss/retain"] < first["loss/retain"] + 0.5
    assert "rewards/chosen" not in first


@pytest.mark.slow
@pytest.mark.parametrize("losses", [["npo", "retain"], ["kto"]])
def test_two_processes_equal_one(losses, tmp_path, monkeypatch):
    """Each process gets whole batches of both labels. KTO has one reference point for all, which accumulation does not have: it only runs."""
    monkeypatch.chdir(tmp_path)
    rows().to_json("rows.jsonl")
    data = ["--trainer", "unpaired", "--dataset_name", "rows.jsonl", "--model_name_or_path", "testbed:student"]
    adapter = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no"]
    small = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "0.01",
        "--logging_steps",
        "1",
    ]
    same = [*data, *adapter, *quiet, *small, "--loss_type", *losses]
    align_run.run([*same, "--output_dir", "one", "--gradient_accumulation_steps", "2"], launched=True)
    both = [*same, "--output_dir", "two", "--gradient_accumulation_steps", "1"]
    run_ranks(lambda: align_run.run(both, launched=True))
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    if losses != ["kto"]:
        for key, weight in one.items():
            assert_close(two[key], weight, rtol=1e-4, atol=1e-5)


def with_qualities(values=None):
    data = rows()
    return data.add_column("quality", values or [round(0.05 + i / 13, 3) for i in range(len(data))])


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.5, 6.0])
def test_qcrd_equals_whole_logits_with_the_qualities_of_its_rows(tmp_path, delta):
    one = trainer(tmp_path, "qcrd", with_qualities(), adapter=lora(), qcrd_beta=0.7, qcrd_delta=delta)
    assert one.ref_model is None
    batch = next(iter(one.get_train_dataloader()))
    loss = one._compute_loss(one.model, dict(batch), False)
    scored = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logps = torch.log_softmax(one.model(**inputs).logits[:, :-1].double(), -1)
        logps = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    entropy = -torch.where(scored, logps, 0).sum(-1) / scored.sum(-1)
    quality_of = {tuple(row["completion_ids"]): row["quality"] for row in one.train_dataset}
    completions = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    expected = [
        quality_of[ids] * ce if label else 0.7 * (1 - quality_of[ids]) * max(0.0, delta - ce)
        for ids, ce, label in zip(completions, entropy.tolist(), batch["label"].tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.slow
def test_qcrd_avoids_what_it_finds_likely_and_leaves_the_rest_alone(tmp_path):
    data = with_qualities([1.0 if i % 3 else 0.0 for i in range(12)])
    for delta, falls in ((6.0, True), (0.0, False)):
        one = trainer(tmp_path, "qcrd", data, max_steps=20, learning_rate=3e-4, qcrd_beta=1.0, qcrd_delta=delta)
        one.train()
        logged = [entry["logps/rejected"] for entry in one.state.log_history if "logps/rejected" in entry]
        assert (logged[-1] < logged[0] - 5) is falls


def test_batches_are_half_to_forget_and_another_order_each_epoch():
    labels = [True, False, True, True, False, True, False]
    epochs = [list(ForgetAndRetain(labels, seed=1, epoch=lambda e=e: e)) for e in (0, 0, 1, 2, 3)]
    assert epochs[0] == epochs[1]
    assert len({tuple(order) for order in epochs}) > 2
    for order in epochs:
        assert [labels[i] for i in order] == [False, True] * 3
        assert sorted(order[::2]) == [1, 4, 6]
        assert len(set(order[1::2])) == 3
    few = list(ForgetAndRetain([False] * 5 + [True] * 2, seed=0, epoch=lambda: 0))
    assert sorted(few[1::2])[:2] == [5, 5]
    assert {5, 6} == set(few[1:5:2])
    with pytest.raises(ValueError, match="rows of one label alone"):
        ForgetAndRetain([True], seed=0, epoch=lambda: 0)


@pytest.mark.slow
def test_rows_of_kto_are_shuffled_and_each_is_read_with_its_neighbours_completion(tmp_path):
    data = Dataset.from_list(sorted(rows(), key=lambda row: row["label"]))
    one = trainer(tmp_path, "kto", data)
    labels = list(one.train_dataset["label"])
    assert labels != sorted(labels)
    completions, mismatched = one.train_dataset["completion_ids"][:4], one.train_dataset["KL_completion_ids"][:4]
    assert mismatched == [completions[-1], *completions[:-1]]


@pytest.mark.slow
def test_pairs_are_taken_apart_and_shuffled(tmp_path, caplog):
    single = rows(6, every=7)
    pairs = (
        single.rename_column("completion", "chosen")
        .add_column("rejected", single["completion"][::-1])
        .remove_columns("label")
    )
    with caplog.at_level(logging.WARNING):
        one = trainer(tmp_path, "kto", pairs)
    labels = list(one.train_dataset["label"])
    assert sorted(labels) == [False] * 6 + [True] * 6
    assert labels[:6] != [True] * 6
    assert "count" not in caplog.text


def test_unequal_weights_are_advised_on(tmp_path, caplog):
    one = object.__new__(UnpairedTrainer)
    one.args = UnpairedConfig(str(tmp_path), loss_type="kto", **QUIET)
    one.objective = one.args.objective
    for weight, said in ((1.0, True), (2.0, False)):
        caplog.clear()
        one.args.undesirable_weight = weight
        one._advise_on_weights(rows())
        assert ("8 rows are desirable and 4 undesirable" in caplog.text) == said


WRONG_OPTIONS = [
    ({"loss_type": "nto"}, "there is no unpaired loss 'nto'"),
    ({"loss_type": ["npo"], "desirable_weight": 2.0}, "desirable_weight is set, but npo does not use it"),
    ({"loss_type": ["retain"], "beta": 0.3}, "beta is set, but retain does not use it"),
    (
        {"loss_type": ["retain"], "precompute_ref_log_probs": True},
        "precompute_ref_log_probs is set, but retain uses no reference",
    ),
    ({"loss_type": ["kto"], "train_sampling_strategy": "random"}, "pairs each row with its neighbour"),
    ({"loss_type": ["kto"], "per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2, not 1"),
    (
        {"loss_type": ["npo", "retain"], "per_device_train_batch_size": 3},
        "per_device_train_batch_size must be even, not 3",
    ),
    ({"loss_type": ["npo", "retain"], "train_sampling_strategy": "random"}, "as many rows to retain as to forget"),
    ({"loss_type": ["npo"], "beta": -1.0}, "beta must be a finite number above 0"),
    ({"loss_type": ["kto"], "qcrd_delta": 1.0}, "qcrd_delta is set, but kto does not use it"),
    ({"loss_type": ["qcrd"], "beta": 0.3}, "beta is set, but qcrd does not use it"),
    ({"loss_type": ["qcrd"], "qcrd_beta": -1.0}, "qcrd_beta must be a finite number of at least 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=lambda value: str(value)[:40])
def test_wrong_options_are_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        UnpairedConfig(str(tmp_path), **QUIET | options)
    assert "\n" not in str(error.value)


WRONG_DATA = [
    ("kto", None, "train_dataset is missing"),
    ("kto", [], "must be a datasets.Dataset or IterableDataset, not a list"),
    ("kto", rows().remove_columns("label"), "train_dataset has no column label"),
    ("kto", rows().filter(lambda row: row["label"]), "has no row with the label false"),
    ("kto", rows().rename_column("prompt", "question"), "has no column prompt"),
    (["npo"], rows(), "row 2: its label is true .* and npo reads no such rows"),
    (["retain"], rows(), "row 1: its label is false"),
    (["npo", "retain"], rows().to_iterable_dataset(), "is a stream, and npo, retain draw rows by their label"),
    ("kto", rows().add_column("images", [[]] * 12), "has a column images"),
    ("kto", rows().map(lambda row: {"completion": []}), "row 1, column completion: it is empty"),
    (
        "kto",
        rows().remove_columns("label").add_column("label", ["yes"] * 12),
        "row 1, column label: it must be true or false, not",
    ),
    ("qcrd", rows(), "train_dataset has no column quality, which qcrd needs: a number in"),
    ("qcrd", with_qualities([0.5] * 11 + [1.5]), r"row 12, column quality: it must be a number in \[0, 1\], not 1.5"),
    ("qcrd", with_qualities([None] * 12), "row 1, column quality: it must be a number in"),
]


@pytest.mark.parametrize(("loss_type", "dataset", "message"), WRONG_DATA, ids=lambda value: str(value)[:30])
def test_wrong_data_are_one_sentence(tmp_path, loss_type, dataset, message):
    args = UnpairedConfig(str(tmp_path), loss_type=loss_type, **QUIET)
    with pytest.raises(ValueError, match=message) as error:
        UnpairedTrainer("no/such-model", args=args, train_dataset=dataset)
    assert "\n" not in str(error.value)
