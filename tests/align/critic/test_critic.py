"""Critics: their targets against float64 references, what they learn from, and `contralto critic` from texts to card."""

import json
import math

import pytest
import torch
from oracles import align as oracle
from transformers import AutoModelForTokenClassification

from contralto import cli, testbed
from contralto.align.critic import CriticConfig, lambda_returns, make_critic, making
from contralto.align.critic.report import PLACES, concordance, measure_critic
from contralto.align.critic.returns import critic_loss
from contralto.align.critic.texts import ScoredText, read_texts, split_rows
from contralto.align.critic.training import collate_texts, untrained_critic
from contralto.common.options import OptionError
from contralto.data_gen.store import Store

CONFIG = {"model": "testbed:amateur", "output": "out", "bf16": False}


def is_short(row, completions):
    """Reward completions of few words."""
    return [float(len(text.split()) < 12) for text in completions]


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_mixtures_of_n_step_returns(lam, gamma):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    rewards = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
    found = lambda_returns(values, rewards, mask, lam=lam, gamma=gamma)
    for row in range(3):
        inside = mask[row].nonzero()[:, 0].tolist()
        own = values[row, inside].tolist()
        expected = [oracle.lambda_return(own, rewards[row].item(), t, lam=lam, gamma=gamma) for t in range(len(own))]
        assert found[row, inside].tolist() == pytest.approx(expected, abs=1e-12)
        assert found[row][mask[row] == 0].eq(0).all()


def test_the_loss_is_the_cross_entropy_against_constant_targets():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards, mask = torch.tensor([1.0, 0.3], dtype=torch.float64), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    loss = critic_loss(logits, rewards, mask, lam=0.5)
    total, count = 0.0, 0
    for row in range(2):
        inside = mask[row].nonzero()[:, 0].tolist()
        own = [1 / (1 + math.exp(-logits[row, at].item())) for at in inside]
        for t, v in enumerate(own):
            target = oracle.lambda_return(own, rewards[row].item(), t, lam=0.5, gamma=1.0)
            total -= target * math.log(v) + (1 - target) * math.log(1 - v)
            count += 1
    assert loss.item() == pytest.approx(total / count, abs=1e-12)
    loss.backward()
    targets = lambda_returns(logits.sigmoid(), rewards, mask, lam=0.5)
    assert torch.allclose(logits.grad, (logits.sigmoid() - targets) * mask / count)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lam": 1.1}, "lam must lie in"), ({"gamma": 0}, "gamma must lie in"), ({"mask": [[0, 0]]}, "no states")],
)
def test_returns_reject(options, message):
    mask = torch.tensor(options.pop("mask", [[1, 1]]))
    with pytest.raises(ValueError, match=message):
        lambda_returns(torch.zeros(1, 2), torch.zeros(1), mask, **options)


# -------------------------------------------------------------------------------------------------------------- texts


def test_states_begin_at_the_end_of_the_prompt():
    texts = [ScoredText("a", [5, 6], [7, 8, 9], 1.0), ScoredText("b", [5, 6, 7], [8], 0.0)]
    batch = collate_texts(texts, pad=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 3]]
    assert batch["states"].tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_no_prompt_is_in_both_parts():
    texts = [ScoredText(row, [1], [2], 0.0) for row in "aabbccdd"]
    held_out, rest = split_rows(texts, 0.3)
    assert {text.row for text in held_out} == {"a"}
    assert len(held_out) + len(rest) == 8
    assert len(split_rows(texts[:4], 0.99)[1]) == 2


def _read(tmp_path, rows, **options):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Store(tmp_path / "answers.sqlite") as store:
        return read_texts(CriticConfig(**CONFIG, texts=str(path), **options), testbed.tokenizer(), store)


ROWS = [
    {"prompt": "Mia has 9 coins.", "completion": "She finds 4", "reward": 1, "finished": False},
    {"prompt": "Tom has 3 coins.", "completion": "He finds 4", "reward": False},
]


def test_a_file_of_texts_with_rewards(tmp_path):
    tokenizer = testbed.tokenizer()
    first, second = _read(tmp_path, ROWS)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ROWS[0]["prompt"]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert first.prompt == prompt
    assert first.completion == tokenizer("She finds 4", add_special_tokens=False)["input_ids"]
    assert second.completion[-1] == tokenizer.eos_token_id
    assert (first.reward, second.reward) == (1.0, 0.0)
    assert _read(tmp_path, ROWS, raw=True)[0].prompt == tokenizer(ROWS[0]["prompt"])["input_ids"]
    assert [text.reward for text in _read(tmp_path, ROWS, threshold=0.5)] == [1, 0]
    scored = _read(
        tmp_path, ROWS, scorer=lambda row, texts: [3.0 if "She" in text else -2.0 for text in texts], sigmoid=True
    )
    assert [text.reward for text in scored] == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(2))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": 3}, r"texts.jsonl, row 2 has no text in column 'completion'"),
        ({"reward": "good"}, "row 2 has no number in column 'reward': add it, or give scorer"),
        ({"reward": 7}, r"the score 7.0 lies outside \[0, 1\].*: give threshold, .*, or sigmoid"),
        ({"reward": 1}, "all 2 texts have the reward 1, so that a critic has nothing to learn"),
        ({"finished": "no"}, "finished must be true or false"),
        ({"prompt": ROWS[0]["prompt"], "images": ["x.png"]}, "image"),
    ],
)
def test_texts_that_cannot_be_learned_from(tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        _read(tmp_path, [ROWS[0], ROWS[1] | change])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prompts is missing: give prompts that the model answers, or texts"),
        ({"prompts": "p", "texts": "t"}, "prompts and texts are both given"),
        ({"prompts": "p"}, "scorer is missing: give a function"),
        ({"prompts": "p", "scorer": "a:b", "reward_model": "m"}, "scorer and reward_model are both given"),
        ({"texts": "t", "threshold": 0.0, "sigmoid": True}, "threshold and sigmoid are both given"),
        ({"texts": "t", "lam": 2}, r"lam must lie in \[0, 1\]"),
        ({"texts": "t", "samples": 0}, "samples must be at least 1"),
        ({"texts": "t", "held_out": 0}, r"held_out must lie in \(0, 1\)"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(OptionError, match=message):
        CriticConfig(**CONFIG, **options)


# ------------------------------------------------------------------------------------------------------------- critics


def test_an_untrained_critic_expects_the_mean_everywhere():
    critic = untrained_critic(CriticConfig(**CONFIG, texts="t"), 0.3).eval()
    with torch.no_grad():
        values = critic(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.sigmoid()
    assert torch.allclose(values, torch.tensor(0.3))
    texts = [ScoredText("a", [5, 6], [7, 8, 9], 1.0), ScoredText("b", [5], [7, 8], 0.0)]
    figures = measure_critic(critic, texts, 0.3)
    assert figures.brier == pytest.approx([(0.7**2 + 0.3**2) / 2] * len(PLACES))
    assert figures.base == pytest.approx(figures.brier[0])
    assert figures.order == [0.5] * len(PLACES)


def test_concordance_counts_pairs():
    values, rewards = [0.3, 0.1, 0.3, 0.9], [1, 0, 0, 1]
    both = list(zip(values, rewards, strict=True))
    pairs = [(v > w) + 0.5 * (v == w) for v, r in both for w, s in both if r > s]
    assert concordance(values, rewards) == sum(pairs) / len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_r": 0, "lam": 0.5}], ids=["adapters", "head"])
def test_a_critic_from_prompts_to_card(tmp_path, monkeypatch, options):
    """It predicts a rule that its texts follow, resumes, and guides."""
    config = CriticConfig(
        **CONFIG | {"output": str(tmp_path / "critic")},
        **{"lora_r": 8, "epochs": 4, "learning_rate": 5e-3} | options,
        scorer=is_short,
        prompts="contralto.testbed.questions:problems",
        samples=3,
        batch_size=16,
    )
    measure = making.measure_critic

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "measure_critic", stopped)
    with pytest.raises(KeyboardInterrupt):  # after the training
        make_critic(config)
    monkeypatch.setattr(making, "measure_critic", measure)
    monkeypatch.setattr(making, "train_critic", lambda *_: pytest.fail("trained again"))
    made = make_critic(config)
    assert made.figures.brier[-1] < made.figures.base
    assert made.figures.order[-1] > 0.9 if config.lora_r else made.figures.order[-1] > 0.6
    critic, loaded = AutoModelForTokenClassification.from_pretrained(made.folder, output_loading_info=True)
    assert (critic.config.num_labels, loaded["missing_keys"]) == (1, set())
    base = testbed.load("amateur")
    same = torch.equal(critic.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert same == (not config.lora_r)
    card = (made.folder / "README.md").read_text()
    assert "--method critic --critic critic PROMPT" in card
    assert "tests.align.critic.test_critic:is_short" in card or "test_critic:is_short" in card
    assert not list(config.work.glob("training/checkpoint-*"))
    how = ["generate", "--model", "testbed:amateur", "--method", "critic", "--critic", str(made.folder)]
    assert cli.main([*how, "--max-new-tokens", "8", "Mia has 9 coins. She finds 4. How many coins does Mia have?"]) == 0


@pytest.mark.slow
def test_the_command_keeps_texts_until_the_training_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rules.py").write_text("def length(row, texts):\n    return [len(text) / 10 for text in texts]\n")
    argv = [
        "critic",
        "testbed:amateur",
        "--prompts",
        "contralto.testbed.questions:problems",
        "--scorer",
        "own_rules:length",
    ]
    argv += ["--samples", "1", "--max-new-tokens", "16", "--epochs", "1", "--output", "critic", "--no-bf16"]
    assert cli.main(argv) == 2
    assert "lies outside [0, 1], and a critic learns rewards in it: give --threshold" in capsys.readouterr().err
    assert cli.main([*argv, "--threshold", "4"]) == 0
    assert "| 10 held-out texts, mean reward" in capsys.readouterr().out
    assert cli.main([*argv, "--threshold", "5"]) == 2
    assert "was begun with another threshold" in capsys.readouterr().err
