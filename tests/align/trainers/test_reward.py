"""Reward models with margins: the loss, the margins, the trainer."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from trl import RewardConfig

from contralto import testbed
from contralto.align.trainers.reward import MarginRewardConfig, MarginRewardTrainer, agreement, margin_loss
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS


def pairs(margins, column="margin"):
    problems = list(itertools.islice(worlds.problems(0, "train"), len(margins)))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": problem.solution()}],
                "rejected": [{"role": "assistant", "content": problems[i - 1].solution()[:20]}],
                column: margins[i],
            }
            for i, problem in enumerate(problems)
        ]
    )


def trainer(folder, dataset, *, lora=None, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "gradient_checkpointing": False}
    args = MarginRewardConfig(str(folder), **quiet | small | options)
    return MarginRewardTrainer(str(testbed.path("amateur")), args, train_dataset=dataset, peft_config=lora)


def test_the_loss_is_the_formula():
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 20, dtype=torch.float64) * 3
    expected = [math.log(1 + math.exp(-(c - r - m))) for c, r, m in zip(chosen, rejected, margin, strict=True)]
    assert margin_loss(chosen, rejected, margin).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("votes", "net"),
    [
        (["chosen"], 1.0),
        (["rejected", "chosen"], 0.0),
        (["tie", "chosen"], 0.5),
        ([False, False, True], -1 / 3),
        ([0.5, 1], 0.75),
    ],
)
def test_agreement_is_the_net_vote(votes, net):
    assert agreement(votes) == pytest.approx(net)


def test_the_trainers_loss_has_the_margins_of_the_votes(tmp_path):
    votes = [["chosen"] * 3, ["chosen", "rejected", "rejected"], ["tie", "tie", "chosen"], ["rejected"] * 3]
    one = trainer(tmp_path, pairs(votes), margin_scale=2.5)
    batch = one._prepare_inputs(one.data_collator([dict(row) for row in one.train_dataset]))
    assert batch["margin"].tolist() == pytest.approx([2.5, -2.5 / 3, 2.5 / 3, -2.5])
    with torch.no_grad():
        loss = one.compute_loss(one.model.eval(), dict(batch))
        plain = {name: value for name, value in batch.items() if name != "margin"}
        chosen, rejected = one.model(**plain).logits.squeeze(-1).chunk(2)
    assert loss.item() == pytest.approx(margin_loss(chosen, rejected, batch["margin"]).mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(margin_loss(chosen, rejected, torch.zeros(4)).mean().item(), rel=1e-3)


def test_the_callers_configuration_can_be_used_again(tmp_path):
    """It stays one for language models, of no particular modules."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    before = copy.deepcopy(lora)
    one = trainer(tmp_path, pairs([0.5] * 4), lora=lora)
    assert lora == before
    assert one.model.peft_config["default"].task_type == "SEQ_CLS"


def test_numbers_of_another_column(tmp_path):
    one = trainer(tmp_path, pairs([1.5, 0.25], "reward_margin"), margin_column="reward_margin", margin_scale=2.0)
    assert one.train_dataset["margin"][:] == [3.0, 0.5]


@pytest.mark.slow
def test_pairs_that_annotators_disagree_with_are_pulled_apart_less(tmp_path):
    """Two kinds of pairs that a model can tell apart: texts that break off, and whole wrong ones, whose label nobody shares."""
    rows = pairs([["chosen"] * 4, ["rejected"] * 4] * 6)
    solutions = [row["chosen"][0]["content"] for row in rows]
    rejected = [row["rejected"] for row in rows]
    for at in range(1, len(rows), 2):
        rejected[at] = [{"role": "assistant", "content": solutions[at - 1]}]
    rows = rows.remove_columns("rejected").add_column("rejected", rejected)
    gaps = []
    for scale in (4.0, 1e-6):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        one = trainer(tmp_path, rows, lora=config, max_steps=30, learning_rate=3e-3, margin_scale=scale)
        one.train()
        batch = one.data_collator([dict(row) for row in one.train_dataset])
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            chosen, rejected = one.model.eval()(**plain).logits.squeeze(-1).chunk(2)
        gaps.append((chosen - rejected)[1::2].mean().item())
        assert one.model.peft_config["default"].task_type == "SEQ_CLS"
    assert gaps[0] < 0.5 * gaps[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: trainer(f, pairs([1.0, 2.0], "other")), "train_dataset has no column margin: give votes"),
        (
            lambda f: trainer(f, pairs([["chosen"], ["nobody"]])),
            "row 2, column margin: a vote is chosen, rejected or tie",
        ),
        (lambda f: trainer(f, pairs([["chosen"], []])), "row 2, column margin: .* at least one vote"),
        (lambda f: trainer(f, pairs([1.0, math.nan])), "row 2, column margin: a margin is a finite number or a list"),
        (lambda f: trainer(f, pairs([1.0, None])), "row 2, column margin: a margin is"),
        (lambda f: trainer(f, pairs([1.0]), margin_scale=0.0), "margin_scale must be a finite number above 0"),
        (lambda f: trainer(f, None), "train_dataset is missing"),
        (
            lambda f: MarginRewardTrainer("model", RewardConfig(str(f), report_to="none", bf16=False)),
            "not RewardConfig",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
