"""The alignment of `contralto demo`: an expert is trained on its own answers, revised where they are wrong."""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from contralto import testbed
from contralto.align import run as train
from contralto.cli import data
from contralto.common.files import read_lines
from contralto.common.hub import with_adapter
from contralto.decoding.methods import METHODS

__all__ = ["align", "logged"]

PAIRS, STEPS, BATCH = 160, 60, 16
ROWS_PER_PAIR = 4
"""Problems per pair: most answers need no revision."""
SEED = 2030
"""The seed of the problems, which are training problems of the world."""
LEARNING_RATE = "1e-4"
"""Chosen on dev problems, see testbed/ALIGNMENT.md."""
NAME = "aligned"
"""The label of the aligned expert in the comparison."""


def align(expert: str, folder: Path) -> Path:
    """Align an embedded expert by CLAIR pairs and APO-zero, with `contralto data run` and `contralto align`.

    Args:
        expert: the name of the expert in the testbed.
        folder: the folder for pairs, adapter and model.

    Returns:
        The folder of the aligned model, with the adapter merged into the weights.
    """
    pairs, adapter, whole = folder / "pairs", folder / "adapter", folder / NAME
    model = f"testbed:{expert}"
    recipe = folder / "clair.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(model, pairs)), encoding="utf-8")
    with _one_thread(), contextlib.redirect_stdout(sys.stderr):
        command = argparse.ArgumentParser()
        data.add_arguments(command)
        data.run(command.parse_args(["run", str(recipe)]))
        _keep_first(pairs / "dataset" / "data" / "train.jsonl", folder / "pairs.jsonl")
        train.run(["apo_zero", *_flags(model, folder / "pairs.jsonl", adapter)])
        _merge(expert, adapter, whole)
    return whole


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: for a model this small, two threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _recipe(model: str, output: Path) -> dict[str, Any]:
    problems = {"count": ROWS_PER_PAIR * PAIRS, "seed": SEED, "split": "train"}
    target = {"engine": "transformers", "model": model, "batch_size": 64, "max_new_tokens": 96, "temperature": 1.0}
    return {
        "output": str(output),
        "rows": {"source": "contralto.testbed.questions:problems", "arguments": problems},
        "strategies": ["clair"],
        "roles": {
            "target": target,
            "reviser": {"engine": "function", "use": "contralto.testbed.questions:revise"},
        },
        "checks": {"contrast": {}},
        "filters": {"no_op": False},
    }


def _keep_first(pairs: Path, kept: Path) -> None:
    """Copy the first `PAIRS` lines of a file."""
    kept.write_text("".join(f"{line}\n" for line in read_lines(pairs)[:PAIRS]), encoding="utf-8")


def _flags(model: str, pairs: Path, output: Path) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "output_dir": output,
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "all-linear",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "monitor_pairs": 0,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _merge(expert: str, adapter: Path, whole: Path) -> None:
    """Merge the adapter into the weights, so that every part of contralto loads the model from its folder."""
    with_adapter(testbed.load(expert), str(adapter)).merge_and_unload().save_pretrained(str(whole))
    testbed.tokenizer().save_pretrained(str(whole))


def logged(output: Path, model: Path, task: str) -> dict[str, Path]:
    """Copy the logged answers of a model from the folder of one comparison to that of another.

    Args:
        output: the folder of the comparison.
        model: the folder of the model.
        task: the task.

    Returns:
        The folders of the copies, by the label of their rows: unsampled answers, with and without the contrast.
    """
    folders = {}
    for about in sorted((output / "runs").glob(f"*/{task}.json")):
        configuration = json.loads(about.read_text(encoding="utf-8"))["configuration"]
        if configuration["pretrained"] != str(model) or "temperature" in configuration:
            continue
        method = METHODS[configuration["method"]]
        label = f"{NAME}, {method.name}" if method.contrasts else NAME
        folder = output / "logged" / label.replace(", ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(about.with_suffix(".jsonl"), folder / f"samples_{task}_0.jsonl")
        folders[label] = folder
    return folders
