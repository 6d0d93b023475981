"""Model cards: the papers, the formulas, what the hub reads, and nothing of the machine."""

import json
import re
from types import SimpleNamespace

import pytest
from helpers.records import full
from huggingface_hub import ModelCard
from torch import nn

from contralto.align.amateur.card import amateur_card
from contralto.align.amateur.making import Amateur
from contralto.align.amateur.settings import AmateurConfig
from contralto.align.cards import front_matter, methods, model_card
from contralto.align.cards.papers import PAPERS
from contralto.align.losses.registry import BUILT_IN
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.distillation import DistillationPairTrainer
from contralto.align.trainers.distillation_config import DISTILLATION_LOSSES, DistillationConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.reward import margin_loss
from contralto.align.trainers.settings import changed_settings, freeze_settings
from contralto.align.trainers.sft import CALConfig, CALTrainer, SimCTGConfig, SimCTGTrainer
from contralto.cli import main

PLAIN = {"report_to": "none", "seed": 3}


@pytest.mark.parametrize("loss", BUILT_IN, ids=lambda loss: loss.name)
def test_every_loss_has_a_formula_and_its_papers_are_known(loss):
    (method,) = methods.preference_methods([loss.name])
    assert method.formula.startswith(("L = ", "L_i = "))
    cited = re.findall(r"(\w+)(?: & \w+| et al\.)? (\d{4}), arXiv (\d{4}\.\d{5})", loss.description)
    assert set(re.findall(r"\d{4}\.\d{5}", loss.description)) <= {paper.arxiv for paper in method.papers}
    for surname, year, number in cited:
        assert surname in PAPERS[number].authors
        assert PAPERS[number].year == int(year)


def test_every_divergence_has_a_paper():
    for name, kind in DISTILLATION_LOSSES.items():
        found = methods.distillation_methods(
            name, {"chosen": kind.chosen, "rejected": kind.rejected}, follows_curriculum=kind.follows_curriculum
        )
        assert all(method.papers for method in found), name
    assert {paper.arxiv for paper in methods.describe_function("margin", margin_loss).papers} == {
        "2307.09288",
        "2412.03822",
    }


@pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.arxiv)
def test_citations_are_whole(paper):
    assert paper.year - 2000 - int(paper.arxiv[:2]) in (0, 1)
    assert paper.bibtex.count("{") == paper.bibtex.count("}")
    assert re.match(r"@misc\{[a-z]+\d{4}_\d{4}_\d{5},\n", paper.bibtex)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("gpt2", True),
        ("a/b", True),
        ("a/b/c", False),
        ("/a/b", False),
        ("~/b", False),
        ("../b", False),
        ("data.jsonl", False),
    ],
)
def test_hub_ids_are_told_from_paths(name, is_id):
    assert front_matter.is_hub_id(name) == is_id
    assert front_matter.hub_ids([name, name]) == ([name] if is_id else [])


def test_a_folder_has_the_base_that_its_card_names(tmp_path):
    assert front_matter.base_model_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(front_matter.card_text({"base_model": "some/model", "tags": []}, "text"))
    assert front_matter.base_model_of(str(tmp_path)) == "some/model"
    assert front_matter.base_model_of("some/model") == "some/model"


class Stub(nn.Module):
    """A model of a name."""

    def __init__(self, name):
        super().__init__()
        self.config = SimpleNamespace(name_or_path=name)


def trained(trainer, args, *, base="some/model", logs=(), **attributes):
    """A trainer after a training that never was."""
    made = object.__new__(trainer)
    model = Stub(base)
    made.__dict__ |= {"args": args, "_modules": {}, "model": model, "is_world_process_zero": lambda: True, **attributes}
    made.accelerator = SimpleNamespace(unwrap_model=lambda model: model, num_processes=2)
    made.state = SimpleNamespace(log_history=list(logs))
    return made


def preference(folder, **how):
    args = PreferenceConfig(
        str(folder), report_to="none", loss_type=["apo_zero", "sft"], loss_weights=[1.0, 0.2], seed=7
    )
    logs = [{"step": 1, "loss": 0.7}, {"step": 9, "loss": 0.25}]
    return trained(PreferenceTrainer, args, logs=logs, objective=args.objective, train_dataset=[0] * 1234, **how)


def test_the_card_has_method_data_figures_settings_and_versions(tmp_path):
    one = preference(tmp_path, monitor=SimpleNamespace(record=full(), findings=full().findings))
    one.card_datasets = ["some/pairs"]
    one.create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/model"
    assert card.data.datasets == ["some/pairs"]
    assert card.data.library_name == "transformers"
    assert {"contralto", "trl", "mine", "apo_zero", "base_model:finetune:some/model"} <= set(card.data.tags)
    text = card.text
    assert (
        "A model made from [some/model](https://huggingface.co/some/model), trained on preference pairs by apo_zero, sft"
        in text
    )
    for shown in (
        "L = 1 - sigmoid(beta r_w) + sigmoid(beta r_l)",
        "**sft** (weight 0.2)",
        "r(y) = log pi(y | x) - log pi_ref(y | x)",
        "[some/pairs](https://huggingface.co/datasets/some/pairs): 1,234 rows of train_dataset",
        "| training loss | 0.7 (step 1) | 0.25 (step 9) |",
        "| change of log p of chosen completions, nats | +0.00 ± 0.00 (step 0) | -2.75 ± 1.04 (step 16) |",
        "the baseline is the model before training",
        "The audit before the training warned:\n\n- Found \\<this\\>.\n",
        "| rows per step | 16 |",
        "| seed | 7 |",
        "eprint        = {2408.06266}",
        "transformers 5.",
    ):
        assert shown in text, shown


@pytest.mark.parametrize("trainer", [PreferenceTrainer, SimCTGTrainer])
def test_the_card_shows_no_measurements_of_another_run(tmp_path, trainer):
    """Such as one that was killed, and whose monitor.json is still in the folder."""
    full().save(tmp_path)
    made = preference(tmp_path)
    one = made if trainer is PreferenceTrainer else trained(trainer, SimCTGConfig(str(tmp_path)), train_dataset=[0])
    one.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "likelier" not in text
    assert "change of log p" not in text


def test_the_card_calls_equal_rewards_tied(tmp_path):
    """Policy and reference are equal in step 1, where an accuracy of 0 would read as wrong throughout."""
    one = preference(tmp_path)
    one.state.log_history = [
        {"step": 1, "rewards/accuracies": 0.0, "rewards/margins": 0.0},
        {"step": 9, "rewards/accuracies": 0.75, "rewards/margins": 0.1},
    ]
    one.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| training accuracy of rewards | all tied (step 1) | 0.75 (step 9) |" in text


def test_the_card_says_nothing_of_the_machine(tmp_path):
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    args = DistillationConfig(
        str(tmp_path / "out"), report_to="none", teacher_model_name_or_path=str(base), hub_token="hf_x"
    )
    one = trained(
        DistillationPairTrainer,
        args,
        base=str(base),
        divergences={"chosen": "skew_kl"},
        audit=SimpleNamespace(findings=[]),
        train_dataset=None,
        eval_dataset=None,
    )
    (tmp_path / "out").mkdir()
    one.create_model_card(dataset_name=[str(tmp_path / "secret" / "pairs.jsonl"), "some/pairs"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "hf_x" not in text
    assert "A model made from base, distilled with the teacher base by distillm2" in text
    assert "| beta |" not in text  # an option of another loss
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert ModelCard(text).data.datasets == ["some/pairs"]


def test_the_card_lists_what_was_set_alone(tmp_path):
    """Not what transformers and TRL derive, nor what a trainer writes into its configuration."""
    args = PreferenceConfig(str(tmp_path), seed=7, warmup_steps=0.1, include_num_input_tokens_seen=False)
    args.weight_decay = 0.5
    assert {*changed_settings(args)} == {"output_dir", "seed", "warmup_steps", "weight_decay"}
    freeze_settings(args)
    args.pad_token, args.max_length = "<pad>", 5
    assert {*changed_settings(args)} == {"output_dir", "seed", "warmup_steps", "weight_decay"}
    logs = [{"step": 8, "loss": 0.7}]
    one = trained(PreferenceTrainer, args, logs=logs, objective=args.objective, train_dataset=[0])
    one.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert not {"| bf16 |", "| pad_token |", "| activation_checkpointing |", "| debug |"} & {
        line[: line.index("|", 2) + 1] for line in text.splitlines() if line.startswith("| ")
    }
    assert "| weight_decay | 0.5 |" in text
    assert "| training loss | logged once | 0.7 (step 8) |" in text


@pytest.mark.parametrize(
    ("trainer", "config", "method"), [(SimCTGTrainer, SimCTGConfig, "SimCTG"), (CALTrainer, CALConfig, "CAL")]
)
def test_fine_tuning_has_a_card_too(tmp_path, trainer, config, method):
    args = config(str(tmp_path), report_to="none")
    assert {*changed_settings(args)} == {"output_dir"}
    trained(trainer, args, train_dataset=[0]).create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "contralto" in card.data.tags
    assert f"- **{method}**" in card.text
    assert "eprint " in card.text


def test_a_recipe_gives_the_rate_of_what_is_trained():
    adapter, full = (DistillationConfig.from_recipe("distill", "out", use_peft=on, **PLAIN) for on in (True, False))
    assert adapter.learning_rate == 10 * full.learning_rate
    assert (full.warmup_steps, full.loss_type, full.seed) == (0.1, ["distillm2"], 3)
    assert PreferenceConfig.from_recipe("cpo", "out", use_peft=True, **PLAIN).cpo_alpha == 1.0
    for name, message in (
        ("distill", "the recipe distill is for DistillationConfig, not for PreferenceConfig"),
        ("on_policy", "the recipe on_policy sets rounds, which is no option of PreferenceConfig"),
        ("dppo", "there is no recipe dppo .did you mean .dpo"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceConfig.from_recipe(name, "out", use_peft=False)


def test_rounds_say_who_wrote_the_pairs(tmp_path):
    (tmp_path / "round-2" / "pairs" / "dataset").mkdir(parents=True)
    (tmp_path / "round-2" / "round.json").write_text(
        '{"number": 2, "rounds": 3, "data_recipe": "/home/me/judged.yaml", "role": "target", "model": "some/model", "adapter": null}'
    )
    one = preference(tmp_path)
    one.create_model_card(dataset_name=str(tmp_path / "round-2" / "pairs" / "dataset"))
    text = (tmp_path / "README.md").read_text()
    assert (
        "These are the pairs of round 2 of 3, on policy: some/model wrote them in the role target of the recipe judged.yaml."
        in text
    )
    assert "/home" not in text


def test_a_card_that_fails_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(model_card, "replace_text", broken)
    preference(tmp_path).create_model_card()
    assert "the model card could not be written: disk full" in caplog.text


def test_text_of_others_is_no_markdown(tmp_path):
    one = preference(tmp_path, base="<script>x</script>/[a](b)|c")
    one.create_model_card(model_name="<b>name</b>")
    text = ModelCard.load(tmp_path / "README.md").text
    assert "<script>" not in text
    assert "<b>" not in text


def test_a_function_without_a_docstring_has_no_formula():
    def flat(chosen_logps, rejected_logps, *, beta=0.1):
        return beta * (rejected_logps - chosen_logps)

    method = methods.describe_function("flat", flat, "a linear loss")
    assert (method.formula, method.papers, method.description) == ("", [], "a linear loss")


def test_the_amateurs_card_names_its_expert_by_its_folder(tmp_path):
    expert = tmp_path / "secret" / "expert"
    expert.mkdir(parents=True)
    config = AmateurConfig(
        model=str(expert), output=str(tmp_path / "amateur"), layers=2, prompts=str(tmp_path / "p.txt")
    )
    text = amateur_card(config, Amateur(tmp_path, [0, 3], 1000, 0.4, None, None), 6, 100, 5)
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "A model for contrastive decoding against expert, of which it has 2 of 6 layers" in text
    assert "--prompts p.txt" in text
    assert "eprint        = {2210.15097}" in text
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert data.base_model is None
    hub = AmateurConfig(model="some/model", output="amateur", layers=2, texts=0)
    text = amateur_card(hub, Amateur(tmp_path, [0, 3], 1000, 0.4, None, None), 6, 0, 0)
    assert ModelCard(text).data.base_model == "some/model"
    assert "It was not trained." in text
    assert "1503.02531" not in text


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--use_peft"], []], ids=["adapter", "whole model"])
def test_the_command_saves_a_card(tmp_path, flags):
    rows = [{"prompt": f"{i}:", "chosen": f" {i} coins.", "rejected": f" {i + 1} coins."} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": "testbed:amateur",
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "mine",
        "max_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "eval_strategy": "no",
        "report_to": "none",
        "monitor_pairs": 2,
        "audit": "off",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["align", "apo_zero", *words, *flags]) == 0
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == ("peft" if flags else "transformers")
    assert card.data.base_model is None  # an embedded model has no hub id
    assert card.data.datasets is None
    assert ("lora" in card.data.tags) == bool(flags)
    text = str(card)
    assert "pairs.jsonl: 4 rows of train_dataset" in text
    assert str(tmp_path) not in text
    assert "amateur, trained on preference pairs by apo_zero" in text
