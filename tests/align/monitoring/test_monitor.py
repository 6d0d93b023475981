"""The audit, the monitor and the report of a preference training."""

import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.records import full
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from contralto import testbed
from contralto.align.monitoring import data_audit, monitor, report
from contralto.align.monitoring.about import describe_run
from contralto.align.monitoring.data_audit import audit_rows
from contralto.align.monitoring.findings import Finding
from contralto.align.monitoring.model_audit import _learning_rate_findings, audit_model, policy_logps, reference_logps
from contralto.align.monitoring.monitor import Monitor
from contralto.align.monitoring.record import RECORD, Point, Record
from contralto.align.monitoring.symptoms import symptoms
from contralto.align.trainers import reach
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.settings import changed_settings
from contralto.common.columns import as_dataset
from contralto.common.hub import adapter_base
from contralto.data_gen.checks import ches
from contralto.testbed import worlds

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def pairs(size=6, start=0, **columns):
    """Right solutions, and those of other problems."""
    problems = list(itertools.islice(worlds.problems(0, "train"), start, start + size))
    rows = [
        {
            "id": f"p{start + i}",
            "prompt": [{"role": "user", "content": problem.question}],
            "chosen": [{"role": "assistant", "content": problem.solution()}],
            "rejected": [{"role": "assistant", "content": problems[i - 1].solution()[: 12 + 3 * i]}],
        }
        for i, problem in enumerate(problems)
    ]
    return Dataset.from_list(
        [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]
    )


def trainer(folder, *, model=None, dataset=None, lora=None, evaluation=None, callbacks=None, ref_model=None, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    small = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    args = PreferenceConfig(str(folder), **quiet | small | {"gradient_checkpointing": False} | options)
    return PreferenceTrainer(
        model or str(testbed.path("amateur")),
        ref_model,
        args=args,
        train_dataset=dataset or pairs(),
        eval_dataset=evaluation,
        peft_config=None if lora is None else LoraConfig(**LORA | lora),
        callbacks=callbacks,
    )


def watch(one):
    """Its monitor."""
    return next(each for each in one.callback_handler.callbacks if isinstance(each, Monitor))


def batches(one, size=4):
    return [one.data_collator([dict(row) for row in one.train_dataset.select(range(size))])]


# ------------------------------------------------------------------------------------------------------- audit: the data

END = 2
GOOD = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, END], "rejected_ids": [9, END]}


def found_in(rows, *, tokenizer=None, **how):
    how = {"name": "data", "ends": {END}, "max_length": None, "progress": False} | how
    return audit_rows(as_dataset(rows), tokenizer or testbed.tokenizer(), **how)


@pytest.mark.parametrize(
    ("fault", "level", "said"),
    [
        ({"chosen_ids": []}, "error", "a text has no token"),
        ({"rejected_ids": []}, "error", "a text has no token"),
        ({"rejected_ids": [7, 8, END]}, "warning", "chosen and rejected are the same"),
        ({"prompt_ids": []}, "warning", "the prompt has no token"),
        ({"rejected_ids": [9, END] * 3}, "warning", "lose their end"),
        ({"rejected_ids": [9, 9]}, "warning", "a completion does not end"),
        ({"chosen_ids": [END, 7, 7, 7, 7]}, "warning", "a completion does not end"),
    ],
)
def test_a_fault_is_found_in_its_row(fault, level, said):
    rows = [{"id": f"r{at}", **GOOD} for at in range(5)]
    rows[3] |= fault
    found = [each for each in found_in(rows, max_length=7) if said in each.text]
    assert [(each.level, each.rows, each.seen) for each in found] == [(level, ("r3",), 1)]
    assert "1 of 5 rows" in found[0].text
    assert found_in([{"id": f"r{at}", **GOOD} for at in range(5)], max_length=7) == []


def test_kinds_of_faults_can_be_left_out():
    """Where teacher and student wrote the same, a distillation has nothing to report."""
    rows = [GOOD | {"rejected_ids": GOOD["chosen_ids"]}] * 3
    assert [each.level for each in found_in(rows)] == ["error"]
    assert found_in(rows, skip={"same"}) == []


def test_ends_may_stand_before_a_line_break():
    """As in Qwen's template."""
    assert found_in([GOOD | {"chosen_ids": [7, END, 4], "rejected_ids": [8, END, 4]}]) == []


def test_a_text_that_is_cut_off_is_not_said_to_lack_its_end_too():
    (found,) = found_in([GOOD | {"chosen_ids": [7] * 9}], max_length=8)
    assert "lose their end" in found.text
    (found,) = found_in([GOOD | {"chosen_ids": [7] * 8 + [END]}], max_length=8, truncation_mode="keep_end")
    assert "lose their beginning" in found.text


def test_texts_that_differ_where_they_are_cut_off_are_the_same():
    row = GOOD | {"chosen_ids": [7, 7, 7, 8, END], "rejected_ids": [7, 7, 7, 9, END]}
    assert found_in([row]) == []
    assert ["are the same" in each.text for each in found_in([row], max_length=5)] == [True, False]
    assert "are the same" not in found_in([row], max_length=6)[0].text
    assert "are the same" not in found_in([row], max_length=5, truncation_mode="keep_end")[0].text
    end = GOOD | {"chosen_ids": [7, 5, END], "rejected_ids": [8, 5, END]}
    assert "are the same" in found_in([end], max_length=2, truncation_mode="keep_end")[0].text


def test_rows_are_named_by_number_and_the_first_few_alone():
    (found,) = found_in([GOOD] + [GOOD | {"chosen_ids": []}] * 20)
    assert found.rows == tuple(str(at) for at in range(2, 10))
    assert found.seen == 20
    assert str(found).endswith("Rows: 2, 3, 4, 5, 6, 7, 8, 9 and 12 more.")


def test_pairs_without_a_difference_are_an_error_where_they_are_many():
    same = GOOD | {"rejected_ids": GOOD["chosen_ids"]}
    assert [each.level for each in found_in([GOOD, GOOD, same])] == ["warning"]
    assert [each.level for each in found_in([GOOD, same, same])] == ["error"]


def test_texts_without_words():
    row = GOOD | {"prompt": "a", "chosen": "b", "rejected": "  \n"}
    assert "a text says nothing" in found_in([row])[0].text
    spoken = [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    silent = [{"role": "assistant", "content": ""}]
    call = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]
    assert data_audit._content_of(spoken) == "b"
    assert data_audit._content_of(silent) == ""
    assert data_audit._content_of(call)


def test_prompts_that_merge_with_their_completion():
    tokenizer = testbed.tokenizer()
    tokenizer.chat_template = None
    ids = tokenizer("Tom has")["input_ids"]
    whole = GOOD | {"prompt": "Tom has", "prompt_ids": ids}
    assert found_in([whole], tokenizer=tokenizer) == []
    (found,) = found_in([whole, whole | {"prompt_ids": ids[:-1]}], tokenizer=tokenizer)
    assert found.rows == ("2",)
    assert repr(tokenizer.decode(ids[-1:])) in found.text


def test_prompts_of_a_template_end_with_the_assistants_turn():
    tokenizer = testbed.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} has five{% endif %}"
    message = {"prompt": [{"role": "user", "content": "Tom"}]}
    ids = tokenizer("Tom has five", add_special_tokens=False)["input_ids"]
    assert found_in([GOOD | message | {"prompt_ids": ids}], tokenizer=tokenizer) == []
    (found,) = found_in([GOOD | message | {"prompt_ids": ids[:-1]}], tokenizer=tokenizer)
    assert "left out of training" in found.text


def messages(prompt, chosen="It is 4.", rejected="It is 5."):
    asked = [{"role": "user", "content": prompt}]
    return GOOD | {
        "prompt": asked,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.mark.parametrize(
    ("row", "level", "said"),
    [
        (
            messages("<bos><|user|>2 + 2?<|assistant|>"),
            "error",
            "a message holds <bos>, as text does that a chat template",
        ),
        (
            messages("2 + 2?", chosen="It is 4.<eos>"),
            "error",
            "a message holds <eos>, as text does that a chat template",
        ),
        (messages("2 <unk> 2?"), "warning", r"a message holds <unk>, which is a special token"),
        (
            {**messages("2?"), "prompt_ids": [2, 2, 6]},
            "error",
            "the beginning-of-sequence token stands twice at the beginning",
        ),
        (
            {**messages("2?"), "prompt_ids": [2], "chosen_ids": [2, 7, 3]},
            "error",
            "the beginning-of-sequence token stands twice",
        ),
        ({**messages("2?"), "rejected_ids": [7, 3, 3]}, "warning", "an end-of-sequence token stands twice at the end"),
        ({**messages("2?"), "chosen_ids": [7, 3, 5, 3]}, "warning", "an end-of-sequence token stands twice at the end"),
    ],
)
def test_what_a_template_has_rendered_already_is_found(row, level, said):
    assert [each.level for each in found_in([row], ends={3}) if said in each.text] == [level]
    clean = [messages(f"{at} < 2 <b>?", chosen="<bos", rejected="eos>") for at in range(3)]
    clean = [each | {"chosen_ids": [7, 3], "rejected_ids": [8, 2, 3]} for each in clean]
    (found,) = [each for each in found_in([*clean, row], ends={3}) if said in each.text]
    assert (found.level == "error", found.rows) == (False, ("4",))


def test_texts_beside_a_chat_template_are_a_note():
    row = {**GOOD, "prompt": "2?", "chosen": "4", "rejected": "5"}
    (found,) = [each for each in found_in([row]) if "chat template is not applied" in each.text]
    assert (found.level, "--conversations" in found.advice) == ("note", True)
    rendered = {**row, "prompt": "<bos><|user|>2?<|assistant|>"}
    assert not [each for each in found_in([rendered]) if "chat template" in each.text]
    bare = testbed.tokenizer()
    bare.chat_template = None
    assert not [each for each in found_in([row], tokenizer=bare) if "chat template" in each.text]


def test_nulls_in_tools_and_calls_are_found():
    def called(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return messages("2?") | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [called({"city": "Oslo", "x": None}), messages("3?") | {"tools": [{"name": "f", "default": None}]}]
    for row in rows:
        assert ["holds null" in each.text for each in found_in([row]) if "left out" not in each.text] == [True]
    assert not [each for each in found_in([called({"city": "Oslo"})]) if "null" in each.text]


def test_a_stream_is_looked_at_for_a_while(monkeypatch):
    monkeypatch.setattr(data_audit, "STREAMED_ROWS", 3)
    rows = [GOOD | {"id": f"r{at}"} for at in range(2)] + [GOOD | {"id": "bad", "chosen_ids": []}] * 2
    stream = IterableDataset.from_generator(lambda: iter(rows))
    (found,) = audit_rows(stream, testbed.tokenizer(), name="data", ends={END}, max_length=None, progress=False)
    assert (found.rows, found.seen) == (("bad",), 1)
    assert "in 1 of the first 3 rows" in found.text


@pytest.mark.slow
def test_rows_that_trl_drops_are_named(tmp_path, caplog):
    long = pairs(4)
    words = [
        [{"role": "user", "content": row["prompt"][0]["content"] * (1 + 9 * (i == 2))}] for i, row in enumerate(long)
    ]
    long = long.remove_columns("prompt").add_column("prompt", words)
    one = trainer(tmp_path, dataset=long, evaluation={"dev": long}, max_length=90)
    assert len(one.train_dataset) == 3
    found = [each for each in watch(one).findings if "dropped" in each.text]
    assert [each.rows for each in found] == [("p2",)] * 2
    assert [f"{name}: TRL dropped 1 of 4 rows" in caplog.text for name in ("train_dataset", "dev")] == [True, True]


@pytest.mark.slow
def test_errors_end_the_run_unless_told_otherwise(tmp_path, caplog):
    same = pairs(3)
    same = same.remove_columns("rejected").add_column("rejected", same["chosen"][:])
    with pytest.raises(ValueError, match=r"3 of 3 rows chosen and rejected are the same.*set audit to warn") as error:
        trainer(tmp_path, dataset=same)
    assert "\n" not in str(error.value)
    assert trainer(tmp_path, dataset=same, audit="warn").train_dataset
    assert "chosen and rejected are the same" in caplog.text
    caplog.clear()
    assert watch(trainer(tmp_path, dataset=same, audit="off")).findings == []
    assert "audit" not in caplog.text


# ------------------------------------------------------------------------------------------------------ audit: the model


@pytest.mark.parametrize(
    "kind",
    ["adapter", pytest.param("full", marks=pytest.mark.slow), pytest.param("precomputed", marks=pytest.mark.slow)],
)
def test_a_sound_start_has_no_findings_and_changes_nothing(tmp_path, kind):
    cached = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "c")}
    one = trainer(tmp_path, lora=None if kind == "full" else {}, **cached if kind == "precomputed" else {})
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    state = torch.get_rng_state()
    assert audit_model(one, batches(one)) == []
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_policy_that_is_not_its_reference(tmp_path):
    one = trainer(tmp_path, lora={"init_lora_weights": False})
    (found,) = audit_model(one, batches(one))
    assert (found.level, found.text[:40]) == ("warning", "Policy and reference differ before the f")
    assert "adapter off" in found.advice
    other = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.05)
    two = trainer(tmp_path, ref_model=other)
    (found,) = audit_model(two, batches(two))
    gap = (policy_logps(two, batches(two)) - reference_logps(two, batches(two))).abs().mean()
    assert f"{gap:.3g} nats per token" in found.text
    assert "ref_model" in found.advice


def test_an_adapter_that_no_step_can_move(tmp_path):
    """By the rate of full training it moves less than what counts, by another schedule or in a longer training more."""
    one = trainer(tmp_path, lora={}, learning_rate=2e-8, max_steps=10)
    one.state.max_steps = 10
    before = [weight.clone() for weight in one.model.parameters()]
    (found,) = audit_model(one, batches(one))
    assert (found.level, "nothing is going to move" in found.text, "2e-07" in found.text) == ("warning", True, True)
    assert "Raise learning_rate (2e-08)" in found.advice
    assert all(torch.equal(*each) for each in zip(before, one.model.parameters(), strict=True))
    one.args.warmup_steps = 150
    assert "The warmup (150 steps) never ends" in next(_learning_rate_findings(one)).advice
    one.args.warmup_steps = 0
    one.state.max_steps = 100_000
    assert audit_model(one, batches(one)) == []
    one.args.learning_rate, one.state.max_steps = 1e-4, 10
    assert audit_model(one, batches(one)) == []
    one.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD(one.model.parameters(), 1e-4), lambda step: step / 10
    )
    assert reach.total_rate(one) == pytest.approx(4.5e-4)
    one.args.learning_rate, one.args.optim = 2e-8, "sgd"
    assert audit_model(one, batches(one)) == []


def test_an_adapter_with_the_rate_of_full_training(tmp_path):
    one = trainer(tmp_path, lora={}, learning_rate=PreferenceConfig.__dataclass_fields__["learning_rate"].default)
    one.state.max_steps = 100_000
    (found,) = _learning_rate_findings(one)
    assert found.text.startswith("An adapter is trained with the default learning_rate, 1e-06")
    one.state.max_steps, one.args.warmup_steps = 100_000, 100_000
    assert "The warmup (100000 steps) is not shorter than the training" in list(_learning_rate_findings(one))[1].text
    one.args.learning_rate = 1e-4  # after the trainer was made
    assert "learning_rate" not in changed_settings(one.args)
    args = PreferenceConfig.from_recipe("dpo", str(tmp_path), use_peft=True, report_to="none")
    assert "learning_rate" in changed_settings(args)


def test_a_report_has_the_adapter_and_no_empty_settings(tmp_path):
    one = trainer(tmp_path, lora={}, debug=[], logging_steps=1.0, weight_decay=0.5)
    settings = describe_run(one, {})["settings"]
    assert (settings["lora_r"], settings["lora_alpha"], settings["target_modules"]) == (2, 8, ["q_proj", "v_proj"])
    assert "debug" not in settings
    assert str(settings["logging_steps"]) == "1"
    assert settings["weight_decay"] == 0.5


def test_the_audit_says_what_it_looked_at(capsys):
    """Also where it finds nothing."""
    args = SimpleNamespace(disable_tqdm=False)
    state, data = SimpleNamespace(is_world_process_zero=True), Dataset.from_list([{"a": 1}] * 5)
    one = SimpleNamespace(args=args, state=state, train_dataset=data, eval_dataset=None)
    seen = Monitor(one, {})
    seen.batches = [{"input_ids": torch.zeros(6, 2)}, {"input_ids": torch.zeros(6, 2)}]
    seen.report_audit()
    assert capsys.readouterr().out == "audit of 5 rows of train_dataset, and of the model on 6 pairs: nothing found\n"
    seen.findings = [Finding("note", "a", "b")]
    seen.report_audit()
    assert capsys.readouterr().out.endswith("6 pairs: 1 finding, see above\n")


def test_an_adapter_that_is_not_off_in_the_reference(tmp_path):
    one = trainer(tmp_path, lora={})
    one.policy.lm_head.weight.requires_grad_(True)
    (found,) = audit_model(one, batches(one))
    assert found.level == "error"
    assert "The reference moves with the weights that are trained" in found.text


def test_an_adapter_that_nothing_depends_on(tmp_path):
    one = trainer(tmp_path, lora={})
    for module in one.model.modules():
        if hasattr(module, "lora_A"):
            module._disable_adapters = True  # as a forgotten disable_adapters() would
    (found,) = (each for each in audit_model(one, batches(one)) if each.level == "error")
    assert "do not depend on the weights that are trained" in found.text


@pytest.mark.slow
def test_weights_that_are_not_finite(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    one = trainer(tmp_path, model=model)
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    (found,) = audit_model(one, batches(one))
    assert (found.level, "policy are not finite" in found.text) == ("error", True)
    with pytest.raises(ValueError, match="not finite"):
        one.train()


# -------------------------------------------------------------------------------------------------------------- symptoms


def record(chosen, rejected, *, tokens=10, source="eval_dataset", **how):
    count = len(chosen)
    each = [{"chosen_tokens": tokens, "rejected_tokens": tokens}] * count
    first = Point(0, 0.0, [0.0] * count, [0.0] * count, length=how.pop("first_length", None))
    points = [first, Point(8, 1.0, chosen, rejected, **how)]
    return Record("", source, each, [0.0] * count, [0.0] * count, [None] * count, points)


FALLING, STEADY, RISING = [-2.0, -3.0, -2.5, 1.0], [-0.1, 0.2, -0.2, 0.1], [2.0, 3.0, 2.5, 2.0]


@pytest.mark.parametrize(
    ("how", "options", "kinds"),
    [
        ({"chosen": [-2.0, -3.0, -2.5], "rejected": [-9.0] * 3}, {}, ["displacement"]),
        ({"chosen": [-2.0, -3.0, -2.5], "rejected": [-9.0] * 3}, {"loss_types": ["apo_down"]}, []),
        ({"chosen": [-0.2, -0.3, -0.25], "rejected": [-9.0] * 3}, {}, []),
        ({"chosen": [-9.0, 1.0, 1.0], "rejected": [-9.0] * 3}, {}, []),
        ({"chosen": [-9.0, -0.1, 2.0], "rejected": [-12.0] * 3}, {}, []),
        ({"chosen": [-3.0] * 9 + [0.1] * 11, "rejected": [-9.0] * 20}, {}, []),
        ({"chosen": RISING, "rejected": [4.0, 5.0, 4.5, 4.0]}, {}, ["reversed"]),
        ({"chosen": RISING, "rejected": STEADY, "kl": 0.6}, {}, ["far"]),
        ({"chosen": RISING, "rejected": STEADY, "kl": 0.4}, {}, []),
        ({"chosen": [50.0] * 3, "rejected": [-60.0, -50.0, -55.0]}, {"loss_types": ["apo_zero"]}, ["flat"]),
        ({"chosen": [50.0] * 3, "rejected": [-60.0, -50.0, -55.0]}, {"loss_types": ["sigmoid"]}, []),
        ({"chosen": [50.0] * 3, "rejected": [-60.0, -50.0, -55.0]}, {"loss_types": ["apo_zero"], "beta": 0.05}, []),
        ({"chosen": [0.004] * 3, "rejected": [-0.004] * 3}, {"is_last": True}, ["idle"]),
        ({"chosen": [0.004] * 3, "rejected": [-0.004] * 3}, {}, []),
        ({"chosen": [0.004] * 3, "rejected": [-0.004] * 3, "tokens": 1}, {"is_last": True}, []),
        ({"chosen": RISING, "rejected": STEADY, "first_length": 20.0, "length": 31.0}, {}, ["length"]),
        ({"chosen": RISING, "rejected": STEADY, "first_length": 20.0, "length": 13.0}, {}, ["length"]),
        ({"chosen": RISING, "rejected": STEADY, "first_length": 20.0, "length": 29.0}, {}, []),
        ({"chosen": [math.nan, 1.0], "rejected": [0.0, 0.0]}, {}, ["broken"]),
    ],
)
def test_symptoms(how, options, kinds):
    assert [kind for kind, _ in symptoms(record(**how), **options)] == kinds


def test_symptoms_say_figures():
    (text,) = (said for _, said in symptoms(record([-2.0, -3.0, -2.5], [-9.0] * 3)))
    assert "100% of 3 held-out pairs, -2.5 nats on average (rejected -9)" in text
    (text,) = (said for _, said in symptoms(record([-2.0, -3.0, -2.5], [-9.0] * 3, source="train_dataset")))
    assert "3 training pairs" in text


def test_a_point_counts_pairs():
    point = Point(1, 0.5, [-1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 1.0, -5.0], kl=0.25)
    assert (point.displaced, point.won) == (0.25, 0.5)
    means = {"monitor/chosen": 1.0, "monitor/rejected": -0.75}
    assert point.metrics() == means | {"monitor/displaced": 0.25, "monitor/won": 0.5, "monitor/kl": 0.25}


# ----------------------------------------------------------------------------------------------------------- measurements


def _by_hand(model, row, side):
    """Log-probabilities of a text's tokens, and the whole distribution at each, in float64."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
    return logs.gather(-1, torch.tensor(row[f"{side}_ids"])[:, None]).squeeze(-1), logs


def test_measurements_are_those_of_plain_forwards(tmp_path):
    held = pairs(5, start=50)
    one = trainer(
        tmp_path, lora={}, evaluation=held, eval_strategy="steps", eval_steps=50, max_steps=2, monitor_generate=3
    )
    seen = watch(one)
    base = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    one.train()
    kept = Record.load(tmp_path)
    rows = list(one.eval_dataset)
    assert (kept.source, [each["name"] for each in kept.pairs]) == ("eval_dataset", held["id"][:])
    divergence = []
    for at, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            before, p = _by_hand(base, row, side)
            after, q = _by_hand(one.model, row, side)
            assert getattr(kept, f"start_{side}")[at] == pytest.approx(before.sum().item(), abs=2e-4)
            change = getattr(kept.points[-1], side)[at]
            assert change == pytest.approx((after - before).sum().item(), abs=2e-4)
            assert change != 0
            divergence += (p.exp() * (p - q)).sum(-1).tolist()
    assert kept.points[0].chosen == [0.0] * 5
    assert kept.points[0].kl == pytest.approx(0, abs=1e-6)
    assert kept.points[-1].kl == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    expected = ches.score_rows(base, testbed.tokenizer(), list(held)).ln_ches.tolist()
    assert kept.ches == pytest.approx(expected, rel=1e-3, abs=1e-4)
    tokenizer, lengths = testbed.tokenizer(), []
    limit = 2 * max(len(row[f"{side}_ids"]) for row in rows[:] for side in ("chosen", "rejected"))
    for row in rows[:3]:
        text = one.model.generate(torch.tensor([row["prompt_ids"]]), max_new_tokens=limit, do_sample=False)[0]
        text = text[len(row["prompt_ids"]) :].tolist()
        lengths.append(text.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in text else len(text))
    assert kept.points[-1].length == pytest.approx(sum(lengths) / 3)
    assert seen.record.points[-1].step == 2


@pytest.mark.slow
def test_measurements_are_logged_about_twenty_times(tmp_path):
    one = trainer(tmp_path, lora={}, max_steps=9, logging_steps=2, monitor_pairs=3)
    one.train()
    assert [point.step for point in Record.load(tmp_path).points] == [0, 2, 4, 6, 8, 9]
    logged = [line for line in one.state.log_history if "monitor/chosen" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 9]  # the last line is the summary
    assert logged[-2]["monitor/chosen"] == pytest.approx(_mean(Record.load(tmp_path).points[4].chosen))
    seen = watch(one)
    for steps, logging_steps, every in ((1000, 10, 50), (1000, 500, 500), (30, 1, 2), (5, 1, 1), (230, 10, 10)):
        one.state.max_steps, one.state.logging_steps = steps, logging_steps
        assert seen._measurement_interval(one.state) == every


def _mean(values):
    return sum(values) / len(values)


@pytest.mark.slow
def test_watching_changes_nothing(tmp_path, monkeypatch):
    """Bit for bit, with dropout, which draws from the generator that a watch must leave alone; writing texts may draw from it."""
    length, made = Monitor._length, []
    monkeypatch.setattr(Monitor, "_length", lambda self: length(self) + 0 * torch.rand(()).item())
    for options in ({"monitor_pairs": 4, "monitor_generate": 2}, {"monitor_pairs": 0, "audit": "off"}):
        one = trainer(tmp_path, lora={"lora_dropout": 0.3}, disable_dropout=False, max_steps=3, **options)
        one.train()
        made.append(one.model.state_dict())
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cpo", "tdpo1"])
def test_losses_without_a_reference_and_losses_with_its_distribution(tmp_path, loss):
    one = trainer(tmp_path, loss_type=[loss], max_steps=1)
    one.train()
    point = Record.load(tmp_path).points[-1]
    assert (point.kl is None) == (loss == "cpo")
    assert any(point.chosen)


@pytest.mark.slow
def test_each_warning_is_given_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(monitor, "symptoms", lambda *_, **__: iter([("far", "too far")]))
    one = trainer(tmp_path, lora={}, max_steps=3)
    one.train()
    assert [(each["step"], each["kind"]) for each in Record.load(tmp_path).warnings] == [(1, "far")]
    assert [each.getMessage() for each in caplog.records if "too far" in each.getMessage()] == ["step 1: too far"]


@pytest.mark.slow
def test_a_resumed_run_counts_from_the_start(tmp_path, caplog):
    options = {"lora": {}, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    whole = Record.load(tmp_path)
    trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = Record.load(tmp_path)
    assert [point.step for point in again.points] == [0, 1, 2, 3, 4]
    assert again.points[-1].chosen == pytest.approx(whole.points[-1].chosen, abs=1e-4)
    assert "no record of this run's start" not in caplog.text
    (tmp_path / RECORD).unlink()
    trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [point.step for point in Record.load(tmp_path).points] == [2, 3, 4]
    assert "no record of this run's start" in caplog.text


@pytest.mark.slow
def test_a_second_training_is_not_described_by_the_first(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "report": True}
    trainer(tmp_path, lora={}, max_steps=4, **options).train()
    second = trainer(tmp_path, max_steps=3, monitor_pairs=0, save_strategy="no")
    second.train()
    second.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "likelier" not in card
    assert "(step 3)" in card
    assert not (tmp_path / "monitor.json").exists()
    with pytest.raises(ValueError, match=r"the latest run in .* has no complete checkpoint"):
        second.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_model_is_saved_over_an_adapter(tmp_path):
    for lora, expected in (({}, True), (None, False)):
        one = trainer(tmp_path, lora=lora, max_steps=1, monitor_pairs=0)
        one.train()
        one.save_model()
        assert (adapter_base(str(tmp_path)) is not None) is expected


# ------------------------------------------------------------------------------------------------------------ the report


@pytest.mark.slow
def test_the_report_says_what_the_record_holds(tmp_path):
    full().save(tmp_path)
    page = report.write_report(tmp_path).read_text()
    assert (
        "16 steps the chosen texts of 12 held-out pairs are 2.75 nats less likely, the rejected ones 6.5 nats less likely"
        in page
    )
    assert "Found &lt;this&gt;. Do that. Rows: a, b and 1 more." in page
    assert "<b>Step 8.</b> chosen texts lose likelihood" in page
    assert page.count("<svg") == 8
    assert "&lt;r11&gt;: chosen −5.50, rejected −12.00 nats" in page  # noqa: RUF001 (a minus sign)
    assert page.index("&lt;r11&gt;") < page.index("&lt;r10&gt;")
    assert "<dt>seed</dt><dd>3</dd>" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert (tmp_path / report.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Record.load(tmp_path) == full()


@pytest.mark.slow
def test_the_report_correlates_ches_with_displacement():
    """Spearman's rho by hand, of ranks."""
    made = full()
    made.ches = [each**3 for each in (3.0, 1.0, 2.0, 9.0, 5.0, 4.0, 8.0, 6.0, 7.0, 11.0, 10.0)] + [None]
    ranks, n = [sorted(made.ches[:11]).index(each) for each in made.ches[:11]], 11
    squares = sum((rank - (10 - i)) ** 2 for i, rank in enumerate(ranks))  # the changes fall in order
    found = report.ches_correlation(made)
    assert found.rho == pytest.approx(1 - 6 * squares / (n * (n * n - 1)))
    assert found.n == n
    assert "lost likelihood, as Razin et al. expect" in report._ches_sentence(made)
    made.ches = [1.0] * 12
    assert report.ches_correlation(made) is None
    assert report._ches_sentence(made) == ""


@pytest.mark.slow
def test_a_run_writes_its_report_and_a_killed_one_can(tmp_path):
    one = trainer(tmp_path, lora={}, max_steps=2, report=True)
    one.train()
    assert "amateur" in (tmp_path / report.PAGE).read_text()
    (tmp_path / report.PAGE).unlink()
    assert report.write_report(tmp_path) == tmp_path / report.PAGE
    with pytest.raises(ValueError, match=r"there is no monitor\.json in .*: train with monitor_pairs above 0"):
        report.write_report(tmp_path / "elsewhere")


@pytest.mark.slow
def test_a_report_that_fails_costs_no_model(tmp_path, monkeypatch, caplog):
    def broken(folder):
        raise OSError("disk full")

    monkeypatch.setattr(report, "write_report", broken)
    one = trainer(tmp_path, lora={}, max_steps=1, report=True)
    one.train()
    assert "the report could not be written: disk full" in caplog.text


def test_the_record_is_whole_or_not_there(tmp_path, monkeypatch):
    full().save(tmp_path)
    kept = json.loads((tmp_path / RECORD).read_text())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    broken = full()
    broken.points = broken.points[:1]
    with pytest.raises(KeyboardInterrupt):
        broken.save(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text()) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audit": "on"}, "audit must be one of stop, warn, off, not 'on'"),
        ({"monitor_pairs": -1}, "monitor_pairs must be at least 0"),
        ({"monitor_pairs": 4, "monitor_generate": 5}, r"monitor_generate must lie in 0 to monitor_pairs \(4\)"),
        ({"monitor_pairs": 0, "report": True}, "report is made of what was measured, and monitor_pairs is 0"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        PreferenceConfig(str(tmp_path), report_to="none", **options)
    assert "\n" not in str(error.value)


def test_no_texts_are_written_for_pictures(tmp_path):
    rows = pairs(2, images=[["a"], ["b"]])
    with pytest.raises(ValueError, match="monitor_generate writes texts from prompts of text alone"):
        trainer(tmp_path, model=str(tmp_path / "nothing"), dataset=rows, monitor_generate=2)


@pytest.mark.slow
def test_it_is_one_monitor_among_callbacks(tmp_path):
    one = trainer(tmp_path, lora={}, callbacks=[logging_callback := TrainerCallback()])
    kinds = [each for each in one.callback_handler.callbacks if isinstance(each, Monitor) or each is logging_callback]
    assert len(kinds) == 2
    off = trainer(tmp_path, lora={}, audit="off", monitor_pairs=0)
    assert not any(isinstance(each, Monitor) for each in off.callback_handler.callbacks)


@pytest.mark.slow
def test_adapters_that_were_trained_before(tmp_path):
    """The reference is a frozen copy of the adapter: nothing to be found."""
    base = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    one = trainer(tmp_path, model=get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)))
    assert audit_model(one, batches(one)) == []


logging.getLogger("trl").setLevel(logging.ERROR)  # its own warnings of dropped rows
