"""The model card of an amateur."""

import shlex
from importlib import metadata
from typing import TYPE_CHECKING

from contralto import __version__
from contralto.align.amateur.settings import AmateurConfig
from contralto.align.cards.front_matter import base_model_of, card_text, hub_ids, public_name
from contralto.align.cards.papers import PAPERS
from contralto.data_gen.escaping import fenced, inline

if TYPE_CHECKING:
    from contralto.align.amateur.making import Amateur
    from contralto.align.amateur.report import AmateurFigures

__all__ = ["amateur_card", "figures_table"]

FIGURES = (
    ("expert_perplexity", "perplexity of the expert", ".2f"),
    ("amateur_perplexity", "perplexity of the amateur", ".2f"),
    ("agreement", "share of tokens with the same likeliest token", ".3f"),
    ("divergence", "KL(expert, amateur), nats per token", ".3f"),
    ("plausible", "plausible tokens (at least 0.1 of the likeliest), mean number", ".2f"),
    ("contrast", "mean size of log p_expert - log p_amateur on them, nats", ".3f"),
    ("changed", "share of tokens that contrastive decoding (beta 0.5, alpha 0.1) changes", ".3f"),
)


def figures_table(figures: "AmateurFigures", untrained: "AmateurFigures | None" = None) -> str:
    """Return a Markdown table of the figures of an amateur.

    Args:
        figures: of the amateur.
        untrained: before its training, for a second column.
    """
    columns = [figures, *([untrained] if untrained else [])]
    heads = ["trained", "before training"][: len(columns)] if untrained else ["amateur"]
    lines = [f"| held-out texts, {figures.tokens:,} tokens | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    for name, label, form in FIGURES:
        lines.append(f"| {label} | {' | '.join(format(getattr(each, name), form) for each in columns)} |")
    return "\n".join(lines)


CITED = ("2210.15097", "2309.09117", "1503.02531")
"""Contrastive decoding, for which an amateur is made, and the distillation by which it is trained."""
CUTS = {"spread": "1910.01108", "influence": "2403.03853"}
"""The papers that cut layers in this way, by `keep`."""


def amateur_card(config: AmateurConfig, amateur: "Amateur", depth: int, texts: int, held_out: int) -> str:
    """Return the card of an amateur in Markdown, with what the hub reads at its head.

    Models and data are named by their hub ids, or by the names of their folders and files without a path.

    Args:
        config: the settings that it was made with.
        amateur: the amateur.
        depth: number of layers of the expert.
        texts: number of texts that the expert wrote.
        held_out: number of those that it was measured on.
    """
    expert, name = public_name(config.model), public_name(config.output)
    front = {
        "base_model": base_model_of(config.model),
        "datasets": hub_ids([config.prompts] if config.prompts else []),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": name,
        "tags": ["contralto", "contrastive-decoding", "amateur", *(["distillation"] if config.trains else [])],
    }
    parts = [
        f"# An amateur of {inline(expert)}",
        _description(config, amateur, depth) + " " + _training(config, texts - held_out),
        "    L = mean over tokens of KL(p_expert || p_amateur)" * config.trains,
        "Contrastive decoding takes the next token by the difference of both models, among those that the expert finds plausible:",
        "    (1 + beta) log p_expert - beta log p_amateur    where p_expert >= alpha max p_expert",
        f"    contralto generate --model {shlex.quote(expert)} --amateur {shlex.quote(name)} PROMPT",
        "## Figures\n\n"
        + (figures_table(amateur.figures, amateur.untrained) if amateur.figures else "Nothing was measured."),
        "## Settings and versions\n\n" + _made_by(config, amateur),
        "## Citation\n\n" + "\n\n".join(fenced(PAPERS[number].bibtex, "bibtex") for number in _cited(config)),
    ]
    return card_text(front, "\n\n".join(filter(None, parts)))


def _cited(config: AmateurConfig) -> list[str]:
    return [number for number in CITED if config.trains or number != CITED[-1]]


def _description(config: AmateurConfig, amateur: "Amateur", depth: int) -> str:
    cut = f", as in arXiv {CUTS[config.keep]}" if config.keep in CUTS else ""
    return (
        f"A model for contrastive decoding against {inline(public_name(config.model))}, of which it has {len(amateur.kept)} of {depth} layers "
        f"({', '.join(map(str, amateur.kept))}; chosen by: {config.keep}{cut}) and {amateur.share:.0%} of the parameters ({amateur.parameters:,})."
    )


def _training(config: AmateurConfig, texts: int) -> str:
    if not config.trains:
        return "It was not trained."
    source = f"prompts of {inline(public_name(config.prompts))}" if config.prompts else "openings of its own"
    amount = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    return (
        f"All its parameters were then trained by forward KL on {texts:,} texts of the expert ({source}, at most "
        f"{config.max_new_tokens} tokens, temperature {config.temperature:g}): {amount} of {config.batch_size} texts, learning rate "
        f"{config.learning_rate:g}{', bfloat16' if config.bf16 else ''}, seed {config.seed}."
    )


def _made_by(config: AmateurConfig, amateur: "Amateur") -> str:
    """Return the versions and the command that makes the amateur again."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    options = {"layers": config.layers if config.layers is not None else len(amateur.kept)} | config.describe()
    options |= {"prompts": public_name(config.prompts)} if config.prompts else {}
    command = " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in options.items()
        if name not in ("model", "bf16") and value is not None
    )
    flag = "--bf16" if config.bf16 else "--no-bf16"
    expert, output = shlex.quote(public_name(config.model)), shlex.quote(public_name(config.output))
    return f"Made by contralto {__version__} ({versions}):\n\n    contralto amateur {expert} {command} {flag} --output {output}"
