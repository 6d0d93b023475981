"""Constrained and contrastive rewards for GRPO, in TRL's own trainer."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from contralto import testbed
from contralto.align.trainers.grpo import ConstrainedRewards, ContrastiveReward, dual_step
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS


KEPT = SimpleNamespace(scale_rewards="none")


def some(completions, **_):
    return [1.0 if "a" in text else None for text in completions]


def letters(completions, **_):
    return [float(len(text)) for text in completions]


def vowels(completions, **_):
    return [sum(text.count(each) for each in "aeiou") / max(1, len(text)) for text in completions]


def trainer(folder, *rewards, **options):
    problems = list(itertools.islice(worlds.problems(0, "train"), 6))
    rows = [
        {"prompt": problem.question, "baselines": [problem.solution()[: 5 * at + 2], "Tom"]}
        for at, problem in enumerate(problems)
    ]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12, "logging_steps": 1}
    small |= {
        "scale_rewards": "none",
        "max_steps": 1,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "temperature": 1.5,
    }
    args = GRPOConfig(str(folder), **quiet | small | options)
    model = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    return GRPOTrainer(model, list(rewards), args, Dataset.from_list(rows), processing_class=testbed.tokenizer())


def advantages(one):
    one.train()
    return torch.tensor(list(one._logs["advantages"])), list(one._logs["completion"])


# ------------------------------------------------------------------------------------------------------------ baselines


def test_centred_on_its_prompt_a_number_per_prompt_is_nothing():
    """The advantage of GRPO and RLOO, in plain Python."""

    def centred(rewards):
        mean = sum(rewards) / len(rewards)
        return [reward - mean for reward in rewards]

    texts, baseline = ["a", "abc", "abcde"], ["ab" * 40]
    plain = letters(texts)
    less = [reward - len(baseline[0]) for reward in plain]
    bent = ContrastiveReward(letters, args=KEPT, temperature=10.0)(
        prompts=["p"] * 3, completions=texts, baselines=[baseline] * 3
    )
    assert centred(less) == pytest.approx(centred(plain))
    assert max(map(abs, centred(bent))) < 0.01 < max(map(abs, centred(plain)))


# ------------------------------------------------------------------------------------------------ the scale of rewards

UNDONE = [
    (GRPOConfig, {}, "scale_rewards is 'group', which divides advantages by the deviation of the rewards"),
    (GRPOConfig, {"scale_rewards": True}, "scale_rewards is 'group'"),
    (GRPOConfig, {"scale_rewards": "batch"}, "scale_rewards is 'batch', which divides advantages"),
    (
        GRPOConfig,
        {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation is 'normalize_then_sum', which divides each reward by its own deviation",
    ),
    (
        RLOOConfig,
        {"normalize_advantages": True},
        "normalize_advantages is True, which divides advantages by their deviation",
    ),
    (RLOOConfig, {"reward_clip_range": (-1.0, 1.0)}, "reward_clip_range is .* clips the weighted rewards"),
]


@pytest.mark.parametrize(("kind", "options", "message"), UNDONE, ids=lambda value: str(value)[:40])
def test_options_that_divide_the_scale_out_are_refused(tmp_path, kind, options, message):
    args = kind(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    one = fake("a", "b")
    one.args = args
    for user, act in (
        ("ContrastiveReward", lambda: ContrastiveReward(letters, args=args)),
        ("ConstrainedRewards", lambda: ConstrainedRewards(one, thresholds={"a": 0.5}, task="b")),
    ):
        with pytest.raises(ValueError, match=f"{message}.* undoes {user}") as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(GRPOConfig, {"scale_rewards": False}), (GRPOConfig, {"scale_rewards": "none"}), (RLOOConfig, {})],
)
def test_options_that_keep_the_scale_are_taken(tmp_path, kind, options):
    args = kind(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    assert ContrastiveReward(letters, args=args)(prompts=["p"], completions=["abc"], baselines=[["abc"]]) == [0.5]


def test_advantages_have_the_weight_of_the_constraint(tmp_path):
    """In TRL's trainer: sigmoid(0) of the centred reward."""
    one = trainer(tmp_path, letters, beta=0.1)
    one.add_callback(ConstrainedRewards(one, thresholds={"letters": 1.0}))
    found, texts = advantages(one)
    groups = torch.tensor(letters(texts)).view(-1, 4)
    torch.testing.assert_close(found, (0.5 * (groups - groups.mean(1, keepdim=True))).flatten(), rtol=1e-4, atol=1e-4)


def digits(completions, **_):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


@pytest.mark.slow
def test_a_constraint_holds_and_not_where_the_scale_is_divided_out(tmp_path, monkeypatch):
    """The reward climbs over its threshold in both runs, and comes back in one."""
    monkeypatch.setattr("contralto.align.trainers.grpo.check_scale", lambda *_: None)
    ends = {}
    for scale in ("none", "group"):
        size = {"per_device_train_batch_size": 32, "num_generations": 8, "max_steps": 60}
        one = trainer(tmp_path, digits, scale_rewards=scale, beta=0.1, learning_rate=3e-4, **size)
        one.add_callback(ConstrainedRewards(one, thresholds={"digits": 0.3}, lr=20.0))
        one.train()
        means = [line[key] for line in one.state.log_history if (key := "rewards/digits/mean") in line]
        assert max(means) > 0.4
        ends[scale] = sum(means[-10:]) / 10
    assert ends["none"] < 0.45
    assert ends["group"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_plain_baseline_cancels_and_a_bent_one_does_not(tmp_path, scale):
    """The same texts under the reward, under the reward less its baseline, and under the bent difference."""

    def less_baseline(completions, baselines, **_):
        means = [sum(letters(texts)) / len(texts) for texts in baselines]
        return [reward - mean for reward, mean in zip(letters(completions), means, strict=True)]

    bent = ContrastiveReward(letters, args=KEPT, temperature=10.0)
    found = [advantages(trainer(tmp_path, each, scale_rewards=scale)) for each in (letters, less_baseline, bent)]
    assert found[0][1] == found[1][1] == found[2][1]
    assert found[0][0].abs().max() > 0.5
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    assert (found[2][0] - found[0][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "f"), [("sigmoid", lambda x: 1 / (1 + math.exp(-x))), ("clip", lambda x: max(-1, min(1, x)))]
)
def test_contrastive_rewards_are_the_formula(shape, f):
    texts = ["a", "abcd", "abcdefghijklm", ""]
    baselines = [["ab", "abcd"], ["ab", "abcd"], ["x"], ["xyz", "x", "xy"]]
    reward = ContrastiveReward(letters, args=KEPT, shape=shape, temperature=2.5, column="before")
    found = reward(prompts=list("ppqr"), completions=texts, before=baselines, completion_ids=[[1]] * 4)
    expected = [f((len(text) - sum(map(len, b)) / len(b)) / 2.5) for text, b in zip(texts, baselines, strict=True)]
    assert found == pytest.approx(expected)


def test_a_sigmoid_does_not_overflow():
    reward = ContrastiveReward(letters, args=KEPT, temperature=1e-3)
    assert reward(prompts=["p"] * 2, completions=["a" * 9, ""], baselines=[["ab"]] * 2) == [1.0, 0.0]


def test_baselines_are_rewarded_once_with_their_row():
    asked = []

    def seen(prompts, completions, answer, **rest):
        asked.append((list(prompts), list(completions), list(answer), "completion_ids" in rest, rest["trainer_state"]))
        return [1.0 if text == goal else 0.0 for text, goal in zip(completions, answer, strict=True)]

    reward = ContrastiveReward(seen, args=KEPT, shape="clip")
    how = {"completion_ids": [[1], [2]], "answer": ["x", "y"], "trainer_state": "s", "baselines": [["x", "z"], ["q"]]}
    for _ in range(2):
        assert reward(prompts=["p", "q"], completions=["x", "y"], **how) == [0.5, 1.0]
    rows = [each for each in asked if not each[3]]
    assert rows == [(["p", "p"], ["x", "z"], ["x", "x"], False, "s"), (["q"], ["q"], ["y"], False, "s")]


def test_unrewarded_texts_stay_so():
    reward = ContrastiveReward(
        lambda completions, **_: [None if text == "" else 1.0 for text in completions], args=KEPT
    )
    assert reward(prompts=["p", "p"], completions=["", "a"], baselines=[["a", ""]] * 2) == [None, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ContrastiveReward(letters, args=KEPT, shape="linear"),
            "a plain difference cancels where advantages are centred",
        ),
        (lambda: ContrastiveReward(letters, args=KEPT, shape="tanh"), "shape must be one of sigmoid, clip, not 'tanh'"),
        (lambda: ContrastiveReward(letters, args=KEPT, temperature=0.0), "temperature must be a finite number above 0"),
        (lambda: ContrastiveReward(letters), "args is missing: give the GRPOConfig of the trainer"),
        (lambda: ContrastiveReward("model"), "reward must be a function, not a str"),
        (
            lambda: ContrastiveReward(letters, args=KEPT)(prompts=["p"], completions=["a"]),
            "the data have no column baselines",
        ),
        (
            lambda: ContrastiveReward(letters, args=KEPT)(prompts=["p"], completions=["a"], baselines=[[]]),
            "needs one at least: 'p'",
        ),
        (
            lambda: ContrastiveReward(some, args=KEPT)(prompts=["p"], completions=["a"], baselines=[["b"]]),
            "no reward to any baseline",
        ),
    ],
)
def test_mistakes_in_contrasts_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ multipliers


def test_the_dual_step_is_the_gradient():
    for multiplier, mean, threshold in ((0.0, 0.2, 0.6), (1.3, 2.0, 0.5), (-2.0, -1.0, 3.0)):
        value = torch.tensor(multiplier, dtype=torch.float64, requires_grad=True)
        (value.sigmoid() * (mean - threshold)).backward()
        expected = multiplier - 0.3 * value.grad.item()
        assert dual_step(multiplier, mean, threshold, lr=0.3) == pytest.approx(expected)


def fake(*names, beta=0.0, weights=None, **options):
    args = SimpleNamespace(**{"logging_strategy": "steps"} | options)
    given = torch.ones(len(names)) if weights is None else torch.tensor(weights)
    return SimpleNamespace(reward_func_names=list(names), reward_weights=given, beta=beta, args=args)


def _tell(callback, state, **means):
    line = {f"rewards/{name}/mean": value for name, value in means.items()}
    state.log_history.append(dict(line))
    callback.on_log(None, state, None, logs=line)


def test_weights_settle_where_rewards_meet_their_thresholds():
    """A reward above its threshold loses weight to the task, one below gains; what is left is N less their sum."""
    one, state = fake("task", "over", "under", "free"), SimpleNamespace(log_history=[])
    callback = ConstrainedRewards(one, thresholds={"over": 0.5, "under": 0.5}, task="task", lr=5.0)
    assert one.reward_weights.tolist() == [1.0, 0.5, 0.5, 1.0]
    for _ in range(20):
        _tell(callback, state, task=3.0, over=0.9, under=0.1, free=2.0)
    over, under = (callback.weights[name] for name in ("over", "under"))
    assert (over < 0.1, under > 0.9) == (True, True)
    assert one.reward_weights.tolist() == pytest.approx([2 - over - under, over, under, 1.0])
    assert state.log_history[-1]["constraints/over"] == over
    _tell(callback, state, task=3.0)  # an evaluation, or a log without rewards
    assert callback.weights["over"] == over


def test_the_kl_term_takes_the_rest():
    one, state = fake("r", beta=0.04), SimpleNamespace(log_history=[])
    callback = ConstrainedRewards(one, thresholds={"r": 0.0}, lr=1.0)
    assert one.beta == pytest.approx(0.02)
    _tell(callback, state, r=1.0)
    weight = 1 / (1 + math.exp(0.25))
    assert (one.beta, one.reward_weights.item()) == (pytest.approx(0.04 * (1 - weight)), pytest.approx(weight))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"thresholds": {"c": 1.0}, "task": "a"}, "there is no reward 'c'; the trainer has a, b"),
        ({"thresholds": {"a": 1.0}, "task": "d"}, "there is no reward 'd'"),
        ({"thresholds": {}, "task": "a"}, "thresholds must name one reward or more"),
        ({"thresholds": {"a": 1.0}, "task": "a"}, "and not the task"),
        ({"thresholds": {"a": 1.0}}, "beta is 0, so there is no KL term"),
        (
            {"thresholds": {"a": 1.0}, "task": "b", "weights": [2.0, 1.0]},
            "reward_weights gives a the weight 2, and ConstrainedRewards sets it",
        ),
        ({"thresholds": {"a": 1.0}, "task": "b", "weights": [1.0, 0.5]}, "reward_weights gives b the weight 0.5"),
        ({"thresholds": {"a": 1.0}, "task": "b", "logging_strategy": "no"}, "logging_strategy is 'no'"),
        ({"thresholds": {"a": 1.0}, "task": "b", "lr": 0.0}, "lr must be a finite number above 0"),
    ],
)
def test_mistakes_in_constraints_are_one_sentence(how, message):
    made = {name: how[name] for name in ("weights", "logging_strategy") if name in how}
    given = {name: value for name, value in how.items() if name not in made}
    with pytest.raises(ValueError, match=message) as error:
        ConstrainedRewards(fake("a", "b", **made), **given)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_multipliers_move_in_training_and_come_back(tmp_path):
    """In TRL's trainer: by the means it logs, in the rewards it computes, and the same after a resumed run."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.0, "learning_rate": 1e-4}
    how = {"thresholds": {"letters": 10.0}, "task": "vowels", "lr": 0.5}
    one = trainer(tmp_path, vowels, letters, **options)
    callback = ConstrainedRewards(one, **how)
    one.add_callback(callback)
    one.train()
    lines = [line for line in one.state.log_history if "rewards/letters/mean" in line]
    multiplier, weight = 0.0, 0.5
    for line in lines[:4]:
        expected = (2 - 1 - weight) * line["rewards/vowels/mean"] + weight * line["rewards/letters/mean"]
        assert line["reward"] == pytest.approx(expected, rel=1e-4)
        multiplier = dual_step(multiplier, line["rewards/letters/mean"], 10.0, lr=0.5)
        weight = 1 / (1 + math.exp(-multiplier))
        assert line["constraints/letters"] == pytest.approx(weight)
    assert len({line["constraints/letters"] for line in lines}) > 2
    again = trainer(tmp_path, vowels, letters, **options)
    second = ConstrainedRewards(again, **how)
    again.add_callback(second)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.multipliers == pytest.approx(callback.multipliers, rel=1e-3)
