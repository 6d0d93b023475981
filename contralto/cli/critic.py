"""`contralto critic`: train the critic of critic-guided decoding on rewards of finished texts.

    contralto critic MODEL --prompts prompts.jsonl --scorer rules:is_polite --output critic
    contralto critic MODEL --prompts prompts.jsonl --reward-model NAME --sigmoid --output critic
    contralto generate --model MODEL --method critic --critic critic PROMPT

The model writes texts, a function or a reward model scores them, and a copy of the model with one value per token learns to predict
the score from the beginning of a text. An interrupted run goes on with the same command: no text is written or scored twice, and
training resumes from its last checkpoint.
"""

import argparse
from dataclasses import fields

from contralto.cli.flags import add_fields, add_making_flags, errors_with_flags

__all__ = ["add_arguments", "run"]

HELP = {
    "prompts": "a file, folder, hub id or module:function with prompts that the model answers",
    "prompt_column": "the column of the prompts (default %(default)s)",
    "texts": "a JSONL file with columns prompt, completion and reward, in place of texts that the model writes; with a scorer no reward",
    "scorer": "the reward of a finished text: module:function of a row and its completions, one number for each",
    "reward_model": "a reward model in place of a function: a folder or a hub id of a sequence classifier with one output",
    "threshold": "make the reward 1 from this score on, else 0 (default: the score, which must lie in [0, 1])",
    "samples": "completions per prompt (default %(default)s)",
    "max_new_tokens": "largest number of tokens of a completion (default %(default)s)",
    "temperature": "temperature of the completions (default %(default)s)",
    "lam": "1: Monte-Carlo returns (default), 0: the next value as target (TD), between them: their mixture",
    "gamma": "discount per token (default %(default)s)",
    "lora_r": "rank of the adapters, merged when the critic is saved (default %(default)s); 0: train the head alone",
    "epochs": "number of times that training goes through the texts (default %(default)s)",
    "batch_size": "texts per training step (default %(default)s)",
    "learning_rate": "the highest learning rate (default %(default)s)",
    "held_out": "share of the prompts to measure on (default %(default)s)",
    "seed": "seed of texts and training (default %(default)s)",
}
KINDS = {"threshold": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, whose defaults are those of `CriticConfig`.

    Args:
        parser: the parser of the command.
    """
    from contralto.align.critic.settings import CriticConfig

    parser.add_argument("model", metavar="MODEL", help="the model to guide: a folder, a hub id, or testbed:NAME")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the critic")
    add_fields(parser, CriticConfig, HELP, KINDS)
    parser.add_argument(
        "--sigmoid", action="store_true", help="make the reward the sigmoid of the score, for reward models"
    )
    parser.add_argument("--raw", action="store_true", help="feed prompts as they are, even if there is a chat template")
    add_making_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Train the critic, and print what it is worth.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: an invalid option, scores that are no rewards, or a model that cannot have a head.
    """
    from contralto.align.critic import CriticConfig, make_critic
    from contralto.align.critic.card import critic_table
    from contralto.common.errors import require

    require("accelerate", "peft")  # the critic trains only after minutes in which the model writes texts
    with errors_with_flags():
        made = make_critic(CriticConfig(**{field.name: getattr(args, field.name) for field in fields(CriticConfig)}))
    print(f"{made.folder}: trained on {made.texts:,} texts\n")
    print(critic_table(made.figures))
