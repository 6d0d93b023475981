"""`contralto amateur`: make a smaller model of a model, to contrast it with.

    contralto amateur MODEL --layers 10 --output amateur
    contralto amateur MODEL --layers 10 --texts 0 --output pruned

The amateur has some of the model's layers, and is trained on texts that the model writes. An interrupted run goes on with the same
command: no text is written twice, and training resumes from its last checkpoint.
"""

import argparse
from dataclasses import fields

from contralto.cli.flags import add_fields, add_making_flags, errors_with_flags

__all__ = ["add_arguments", "run"]

HELP = {
    "layers": "number of layers to keep",
    "keep": "which: spread (default: evenly spaced, with the first and the last), first, influence (those that change their "
    "input most), or numbers such as 0,4,9",
    "texts": "number of texts that the model writes (default %(default)s); 0: no training",
    "steps": "number of training steps (default: that of --epochs); 0: no training",
    "epochs": "number of times that training goes through the texts (default %(default)s)",
    "batch_size": "texts per training step (default %(default)s)",
    "learning_rate": "the highest learning rate (default %(default)s)",
    "max_new_tokens": "largest number of tokens of a text (default %(default)s)",
    "temperature": "temperature of the texts (default %(default)s)",
    "prompts": "a file, folder or hub id with prompts to answer (default: texts and chats that the model begins itself)",
    "prompt_column": "the column of the prompts (default %(default)s)",
    "held_out": "share of the texts to measure on (default %(default)s)",
    "seed": "seed of texts and training (default %(default)s)",
}
KINDS = {"layers": int, "steps": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, whose defaults are those of `AmateurConfig`.

    Args:
        parser: the parser of the command.
    """
    from contralto.align.amateur.settings import AmateurConfig

    parser.add_argument("model", metavar="MODEL", help="the expert: a folder, a hub id, or testbed:NAME")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the amateur")
    add_fields(parser, AmateurConfig, HELP, KINDS)
    add_making_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Make the amateur, and print what it is.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: an invalid option, or a model whose layers cannot be removed.
    """
    from contralto.align.amateur import AmateurConfig, make_amateur
    from contralto.align.amateur.card import figures_table
    from contralto.common.errors import require

    require("datasets", "trl")  # the amateur trains on its texts only after minutes in which the model writes them
    with errors_with_flags():
        config = AmateurConfig(**{field.name: getattr(args, field.name) for field in fields(AmateurConfig)})
        made = make_amateur(config)
    print(
        f"{made.folder}: layers {', '.join(map(str, made.kept))}, {made.parameters:,} parameters, {made.share:.0%} of the expert's"
    )
    if made.figures:
        print(figures_table(made.figures, made.untrained))
