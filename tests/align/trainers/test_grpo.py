"""Constrained and contrastive rewards for GRPO, in TRL's own trainer."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from contralto import cli, testbed
from contralto.align import prompt_data
from contralto.align.trainers.constraints import ConstrainedRewards, ThresholdSearch, dual_step, nelder_mead
from contralto.align.trainers.grpo import ContrastiveReward
from contralto.align.trainers.grpo_trainer import RewardsConfig, RewardsTrainer, reward_function
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
    monkeypatch.setattr("contralto.align.trainers.constraints.check_scale", lambda *_: None)
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
    for weight, equality in ((torch.sigmoid, False), (torch.tanh, True)):
        for multiplier, mean, threshold in ((0.0, 0.2, 0.6), (1.3, 2.0, 0.5), (-2.0, -1.0, 3.0)):
            value = torch.tensor(multiplier, dtype=torch.float64, requires_grad=True)
            (weight(value) * (mean - threshold)).backward()
            expected = multiplier - 0.3 * value.grad.item()
            assert dual_step(multiplier, mean, threshold, lr=0.3, equality=equality) == pytest.approx(expected)


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


def test_an_equality_pushes_a_reward_down_that_is_far_above():
    one, state = fake("task", "over"), SimpleNamespace(log_history=[])
    callback = ConstrainedRewards(one, thresholds={"over": 0.5}, task="task", lr=0.5, equality=True)
    assert one.reward_weights.tolist() == [1.0, 0.0]
    _tell(callback, state, task=1.0, over=2.5)
    weight = math.tanh(-1.0)
    assert one.reward_weights.tolist() == pytest.approx([1 - weight, weight])


# ------------------------------------------------------------------------------------------------------------- the search


def evaluated(search, function, most):
    """The points that a search asks for, with their values."""
    points, point = [], next(search)
    for _ in range(most):
        points.append((point, function(point)))
        try:
            point = search.send(points[-1][1])
        except StopIteration:
            break
    return points


@pytest.mark.parametrize("simplex", [[[0.0, 0.0], [1.0, 0.2], [0.1, 1.0]], [[3.0], [2.0]]])
def test_the_search_asks_for_the_points_of_scipy(simplex):
    """Where the contraction is inside, scipy's points; it also contracts outside, which the paper's code does not."""
    from scipy.optimize import minimize

    def bowl(point):
        return sum((each - 0.4) ** 2 for each in point) + 0.1 * point[0]

    points = evaluated(nelder_mead(simplex, tolerance=1e-9), bowl, 200)
    found = minimize(bowl, simplex[0], method="Nelder-Mead", options={"initial_simplex": simplex})
    assert min(value for _, value in points) == pytest.approx(found.fun, abs=1e-6)
    assert min(points, key=lambda each: each[1])[0] == pytest.approx(list(found.x), abs=1e-3)
    assert len(points) < 200


def test_a_step_of_the_search_by_hand():
    search = nelder_mead([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    points = [next(search)]
    points += [search.send(value) for value in (1.0, 2.0, 3.0)]  # the last corner is the worst: reflected at (.5, 0)
    assert points[3] == [1.0, -1.0]
    assert search.send(0.5) == [1.5, -2.0]  # better than the best: expanded
    assert search.send(0.6) == [0.0, -1.0]  # no better: the reflected point stays; now (1, 0) is reflected at (.5, -.5)
    assert search.send(5.0) == [0.75, -0.25]  # worse than all: contracted
    assert search.send(5.0) == [0.5, -0.5]  # no better: all shrink towards (1, -1)
    assert search.send(9.0) == [1.0, -0.5]


def searching(state, steps=12, best=0.7):
    """A search over a reward that follows its threshold; the objective is highest where the reward is `best`."""
    one = fake("proxy", "gold", beta=0.1, weights=[1.0, 0.0])
    callback = ThresholdSearch(one, bounds={"proxy": (0.1, 0.4)}, objective="gold", steps=steps, averaged=2)
    value = 0.0
    for _ in range(400):
        value += 0.5 * (callback.thresholds["proxy"] - value)
        _tell(callback, state, proxy=value, gold=-10 * (value - best) ** 2)
    return callback


def test_the_thresholds_end_where_the_objective_is_highest(tmp_path):
    state = SimpleNamespace(log_history=[], is_world_process_zero=True)
    callback = searching(state)
    assert callback.best["proxy"] == pytest.approx(0.7, abs=0.06)
    assert callback.thresholds == callback.best, "the search has ended, and the best thresholds stay"
    callback.on_train_end(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    written = json.loads((tmp_path / "thresholds.json").read_text())
    assert written["best"] == callback.best
    assert written["has_ended"]
    assert [each["thresholds"] for each in written["tried"]] == [point for point, _ in callback.tried]
    assert state.log_history[-1]["thresholds/proxy"] == callback.thresholds["proxy"]

    again = ThresholdSearch(
        fake("proxy", "gold", beta=0.1, weights=[1.0, 0.0]),
        bounds={"proxy": (0.1, 0.4)},
        objective="gold",
        steps=12,
        averaged=2,
    )
    again.on_train_begin(None, state, None)
    assert (again.tried, again.thresholds, again.multipliers) == (
        callback.tried,
        callback.thresholds,
        callback.multipliers,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": {"a": (1.0, 1.0)}, "objective": "b"}, "the range of a is empty: 1 is not below 1"),
        (
            {"bounds": {"a": (0.0, 1.0)}, "objective": "b", "steps": 0},
            "steps and averaged must be at least 1, not 0 and 5",
        ),
        (
            {"bounds": {"a": (0.0, 1.0)}, "objective": "b"},
            "the objective 'b' must be a reward whose weight in reward_weights is 0",
        ),
        ({"bounds": {"a": (0.0, 1.0)}, "objective": "d"}, "the objective 'd' must be a reward whose weight"),
    ],
)
def test_mistakes_in_a_search_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ThresholdSearch(fake("a", "b", "c", beta=0.1), **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": ["a:b"], "baselines": 2}, "baselines are for contrastive rewards: give contrast"),
        (
            {"reward_funcs": ["a:b"], "constraints": ["b"]},
            "a constraint is NAME=THRESHOLD, such as length=0.5, not 'b'",
        ),
        ({"reward_funcs": ["a:b"], "constraints": ["b=x"]}, "a constraint is NAME=THRESHOLD"),
        (
            {"reward_funcs": ["a:b"], "constraints": ["b=1"], "search_objective": "c"},
            "a constraint is NAME=LOW..HIGH, such as length=0.2..0.8, not 'b=1'",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_one_sentence(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        RewardsConfig(str(tmp_path), report_to="none", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accuracy_rewrd", r"there is no reward 'accuracy_rewrd' \(did you mean 'accuracy_reward'\?\)"),
        ("no_module:f", "the reward no_module:f: there is no module no_module"),
        ("math:nothing", "the reward math:nothing: the module math has no function nothing"),
    ],
)
def test_rewards_that_are_not_there_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        reward_function(name)


def test_rewards_are_found_by_name_and_by_dotted_path():
    assert reward_function("math.sqrt") is reward_function("math:sqrt") is math.sqrt
    assert reward_function("get_soft_overlong_punishment")(completion_ids=[[1] * 1300], completions=["a"])[0] == -1


def test_rewards_of_one_name_and_scales_that_are_divided_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no reward: give reward_funcs \(module:function\)"):
        RewardsTrainer("x", RewardsConfig(str(tmp_path), report_to="none"))
    for option in ({"task_reward": "b"}, {"equality_constraints": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for constrained rewards: give constraints"):
            RewardsTrainer("x", RewardsConfig(str(tmp_path), report_to="none", reward_funcs=["math:sqrt"], **option))
    with pytest.raises(ValueError, match="two rewards are called sqrt"):
        RewardsTrainer("x", RewardsConfig(str(tmp_path), report_to="none", reward_funcs=["math:sqrt", "cmath:sqrt"]))
    with pytest.raises(ValueError, match=r"scale_rewards is .group., .* undoes contrast: set it to .none."):
        RewardsTrainer("x", RewardsConfig(str(tmp_path), report_to="none", reward_funcs=["math:sqrt"], contrast="clip"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "row 1: a row needs a column `prompt`, a text or a list of messages, not None"),
        ([{"prompt": "a"}, {"prompt": " "}], "row 2: a row needs a column `prompt`"),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}],
            "some prompts are texts and some are messages",
        ),
    ],
)
def test_rows_without_prompts_are_named(rows, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        prompt_data.load_prompts(str(file))


def test_columns_of_every_row_are_kept_for_rewards(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "c"}\n{"prompt": "b", "answer": 3}\n')
    rows = prompt_data.load_prompts(str(file), conversations=True)
    assert rows.to_list() == [
        {"prompt": [{"role": "user", "content": "a"}], "source_chosen": "c", "answer": None},
        {"prompt": [{"role": "user", "content": "b"}], "source_chosen": None, "answer": 3},
    ]


REWARDS = """
def _texts(completions):
    return [each if isinstance(each, str) else each[-1]["content"] for each in completions]

def length(completions, **_):
    return [len(text) / 40 for text in _texts(completions)]

def digits(completions, **_):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in _texts(completions)]
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a recipe on four prompts, and return the lines of its log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    problems = itertools.islice(worlds.problems(0, "train"), 4)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each.question}) + "\n" for each in problems))

    def run(recipe, *more):
        words = ["--model_name_or_path", "testbed:expert", "--dataset_name", "prompts.jsonl", "--conversations"]
        words += [
            "--use_peft",
            "--max_steps",
            "3",
            "--gradient_accumulation_steps",
            "1",
            "--max_completion_length",
            "12",
        ]
        words += [
            "--num_generations",
            "4",
            "--per_device_train_batch_size",
            "8",
            "--report_to",
            "none",
            "--use_cpu",
            "true",
        ]
        words += ["--save_strategy", "no", "--output_dir", "out", *more]
        assert cli.main(["align", recipe, *words]) == 0
        return words

    return run


@pytest.mark.slow
def test_the_command_takes_rewards_in_contrast_to_texts_of_the_untrained_model(command, tmp_path, capfd):
    command("grpo_contrastive", "--reward_funcs", "my_rewards:length", "--baselines", "2")
    printed = capfd.readouterr()
    assert "batch: 8 completions per step" in printed.out
    assert "rewards/contrastive_length/mean" in printed.out
    assert "deprecated" not in printed.err
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert "2403.07708" in (tmp_path / "out/README.md").read_text()
    command("grpo_contrastive", "--reward_funcs", "my_rewards:length", "--baselines", "2")
    assert "baselines: 100%" in (again := capfd.readouterr().err)
    assert "0/8 [" in again or "8/8 [00:00" in again  # all of them were kept


@pytest.mark.slow
def test_the_command_searches_thresholds(command, tmp_path):
    rewards = ["--reward_funcs", "my_rewards:length", "my_rewards:digits"]
    command(
        "grpo_constrained",
        *rewards,
        "--constraints",
        "length=0.2..0.8",
        "--search_objective",
        "digits",
        "--search_steps",
        "1",
    )
    written = json.loads((tmp_path / "out/thresholds.json").read_text())
    assert len(written["tried"]) in (2, 3)
    assert "2310.04373" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_the_command_holds_one_reward_and_maximises_another(command, capfd):
    rewards = ["--reward_funcs", "my_rewards:length", "my_rewards:digits"]
    command("grpo_constrained", *rewards, "--constraints", "length=0.5", "--task_reward", "digits")
    assert "rewards/digits/mean" in capfd.readouterr().out
