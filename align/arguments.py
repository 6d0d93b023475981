"""The options of `contralto align` besides those of the trainer: data, model, rounds."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments  # type: ignore[attr-defined]

from contralto.align.trainers import TRAINERS
from contralto.align.trainers.config import option

__all__ = ["DataArguments", "ModelArguments"]


@dataclass
class DataArguments(ScriptArguments):
    """`trl.ScriptArguments` and the options that choose the trainer, the data and the rounds; `contralto align --help` explains each."""

    trainer: str = option(
        "preference", "The trainer, each with options of its own; recipes set it.", choices=list(TRAINERS)
    )
    eval_dataset_name: str | None = option(None, "Other data to evaluate on, spelled like dataset_name.")
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the data under other names: prompt=question chosen=good rejected=bad; also images, responses, scores, "
            "choice, response, score, completion, label, candidates, reference."
        },
    )
    conversations: bool = option(
        False,
        "Make conversations of strings: the prompt is the user's turn, chosen and rejected are the assistant's. Otherwise strings "
        "stay strings, as with trl dpo.",
    )
    lora_learning_rate: float | None = option(
        None,
        "The learning rate that a recipe sets for adapters; on the command line, learning_rate has the same effect.",
    )
    adapter: str | None = option(None, "A LoRA adapter of the model to continue training; use_peft is ignored then.")
    data_recipe: str | None = option(
        None, "A recipe of contralto data by which the model generates the pairs itself, round after round."
    )
    rounds: int = option(1, "With data_recipe: the number of rounds of generation and training.")
    policy_role: str | None = option(
        None, "With data_recipe: the role that the trained model takes (default: student, or else target)."
    )
    fresh_prompts: bool = option(
        False, "With data_recipe: each round takes other prompts; otherwise every round takes all prompts."
    )


@dataclass
class ModelArguments(ModelConfig):
    """`trl.ModelConfig`, whose `dtype` depends on the machine by default."""

    dtype: str | None = option(
        None,
        "The dtype of the weights (default: bfloat16 for an adapter on an accelerator, else float32).",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
