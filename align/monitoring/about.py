"""The description of a run in its report: model, data, settings, versions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset

from contralto.align.trainers.settings import adapter_settings, changed_settings
from contralto.common.versions import versions

__all__ = ["describe_run", "model_label"]

LEFT_OUT = ("output_dir", "hub_token", "report")
"""Options that are not listed: where the report is, that there is one, and a secret."""


def describe_run(trainer: Any, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is trained with, as values that JSON holds.

    Args:
        trainer: the trainer.
        datasets: its prepared datasets by name.
    """
    args = trainer.args
    changed = {name: value for name, value in changed_settings(args).items() if name not in LEFT_OUT}
    model = trainer.unwrap(trainer.model)
    return {
        "model": model_label(str(trainer.policy.config.name_or_path)),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "adapter": bool(is_peft_model(model)),
        "device": str(trainer.accelerator.device.type),
        "processes": trainer.accelerator.num_processes,
        "datasets": {name: len(data) if isinstance(data, Dataset) else None for name, data in datasets.items()},
        "losses": list(args.loss_type),
        "beta": args.beta,
        "learning_rate": args.learning_rate,
        "batch": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * trainer.accelerator.num_processes,
        "settings": {name: _shown(value) for name, value in changed.items() if value not in ([], {})}
        | adapter_settings(model),
        "versions": versions(),
    }


def _shown(value: Any) -> Any:
    """Return a whole number that a parser reads as a float, such as 10.0 steps, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and value >= 1 else value


def model_label(model: str) -> str:
    """Return the name of a folder without its path, or the id of a model.

    Args:
        model: a folder or a hub id.
    """
    return Path(model).name if Path(model).is_dir() else model
