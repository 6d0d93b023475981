"""The model card of an amateur."""

import shlex
from importlib import metadata
from typing import TYPE_CHECKING

from contralto import __version__
from contralto.align.amateur.settings import AmateurConfig

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


def amateur_card(config: AmateurConfig, made: "Amateur", depth: int, texts: int, held_out: int) -> str:
    """Return the card of an amateur in Markdown.

    Args:
        config: the settings that it was made with.
        made: the amateur.
        depth: number of layers of the expert.
        texts: number of texts that the expert wrote.
        held_out: number of those that it was measured on.
    """
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    source = f"prompts of {config.prompts}" if config.prompts else "openings of its own"
    training = "It was not trained."
    if config.trains:
        amount = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
        training = (
            f"All its parameters were then trained by forward KL on {texts - held_out:,} texts of the expert ({source}, at most "
            f"{config.max_new_tokens} tokens, temperature {config.temperature:g}): {amount} of {config.batch_size} texts, learning rate "
            f"{config.learning_rate:g}{', bfloat16' if config.bf16 else ''}, seed {config.seed}."
        )
    described = (
        f"A model for contrastive decoding against {config.model}, of which it has {len(made.kept)} of {depth} layers "
        f"({', '.join(map(str, made.kept))}; chosen by: {config.keep}) and {made.share:.0%} of the parameters ({made.parameters:,}). "
    )
    parts = [
        "---\ntags: [contralto, contrastive-decoding, amateur]\n---",
        f"# An amateur of {config.model}",
        described + training,
        f"    contralto generate --model {shlex.quote(config.model)} --amateur {shlex.quote(config.output)} PROMPT",
    ]
    if made.figures:
        parts.append(figures_table(made.figures, made.untrained))
    options = {"layers": config.layers if config.layers is not None else len(made.kept)} | config.describe()
    command = " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in options.items()
        if name not in ("model", "bf16") and value is not None
    )
    flag = "--bf16" if config.bf16 else "--no-bf16"
    parts.append(
        f"Made by contralto {__version__} ({versions}):\n\n"
        f"    contralto amateur {shlex.quote(config.model)} {command} {flag} --output {shlex.quote(config.output)}"
    )
    return "\n\n".join(parts) + "\n"
