"""The model card of a critic."""

import shlex
from importlib import metadata
from typing import TYPE_CHECKING

from contralto import __version__
from contralto.align.cards.front_matter import base_model_of, card_text, hub_ids, public_name
from contralto.align.cards.papers import PAPERS
from contralto.align.critic.settings import CriticConfig
from contralto.data_gen.escaping import fenced, inline

if TYPE_CHECKING:
    from contralto.align.critic.making import TrainedCritic
    from contralto.align.critic.report import CriticFigures

__all__ = ["critic_card", "critic_table"]

PAPER = "2212.10938"
NOT_SHOWN = ("model", "bf16", "raw", "sigmoid")


def critic_table(figures: "CriticFigures") -> str:
    """Return a Markdown table of the figures of a critic.

    Args:
        figures: on held-out texts.
    """
    heads = ("end of the prompt", "a quarter", "half", "three quarters", "end")
    rows = {
        "squared error of the value (Brier)": [f"{value:.3f}" for value in figures.brier],
        "pairs of texts in the right order (AUC)": [
            "-" if value is None else f"{value:.3f}" for value in figures.order
        ],
    }
    first = f"{figures.texts:,} held-out texts, mean reward {figures.reward:.3f}, after"
    lines = [f"| {first} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines.append(f"\nSquared error of the mean reward of the training texts: {figures.base:.3f}.")
    return "\n".join(lines)


def critic_card(config: CriticConfig, made: "TrainedCritic") -> str:
    """Return the card of a critic in Markdown, with what the hub reads at its head.

    Args:
        config: the settings that it was trained with.
        made: the critic.
    """
    model, name = public_name(config.model), public_name(config.output)
    data = config.prompts or config.texts or ""
    front = {
        "base_model": base_model_of(config.model),
        "datasets": hub_ids([data]),
        "library_name": "transformers",
        "pipeline_tag": "token-classification",
        "model_name": name,
        "tags": ["contralto", "critic", "controlled-generation"],
    }
    parts = [
        f"# A critic of {inline(model)}",
        _meaning(model),
        "    p'(v) ~ p(v) sigmoid(Q(v))    for the k most likely tokens v",
        f"    contralto generate --model {shlex.quote(model)} --method critic --critic {shlex.quote(name)}{' --raw' * config.raw} PROMPT",
        _training(config, made),
        "    L = mean over states of cross-entropy(G_t, sigmoid(V_t)),    G_T = R,    G_t = gamma ((1 - lam) sigmoid(V_{t+1}) + lam G_{t+1})",
        "## Figures\n\n" + critic_table(made.figures),
        "## Settings and versions\n\n" + _made_by(config),
        "## Citation\n\n" + fenced(PAPERS[PAPER].bibtex, "bibtex"),
    ]
    return card_text(front, "\n\n".join(parts))


def _meaning(model: str) -> str:
    return (
        f"The sigmoid of its value of a token is the reward that it expects of a text of {inline(model)} after that token. It weights "
        "the candidates of the next token:"
    )


def _training(config: CriticConfig, made: "TrainedCritic") -> str:
    """Return what the critic was trained on, and how."""
    source = f"of {inline(public_name(config.texts))}" if config.texts else "of the model"
    reward = config.reward_model and public_name(config.reward_model)
    reward = reward or (str(config.describe()["scorer"]) if config.scorer is not None else "the column `reward`")
    parts = f"adapters of rank {config.lora_r}, merged, and the head" if config.lora_r else "the head alone"
    kind = {1.0: "Monte-Carlo returns", 0.0: "one-step bootstrapped targets"}.get(config.lam, "lambda-returns")
    return (
        f"Trained: {parts}, on {made.texts:,} texts {source} (reward: {inline(reward)}), by {kind} (lam {config.lam:g}, gamma "
        f"{config.gamma:g}): {config.epochs:g} epochs of {config.batch_size} texts per step, learning rate {config.learning_rate:g}, "
        f"seed {config.seed}."
    )


def _made_by(config: CriticConfig) -> str:
    """Return the versions and the command that trains the critic again."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    options = config.describe()
    options |= {name: public_name(options[name]) for name in ("prompts", "texts", "reward_model") if options[name]}
    command = " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in options.items()
        if name not in NOT_SHOWN and value is not None
    )
    switches = " --raw" * config.raw + " --sigmoid" * config.sigmoid + (" --bf16" if config.bf16 else " --no-bf16")
    model, output = shlex.quote(public_name(config.model)), shlex.quote(public_name(config.output))
    return f"Made by contralto {__version__} ({versions}):\n\n    contralto critic {model} {command}{switches} --output {output}"
