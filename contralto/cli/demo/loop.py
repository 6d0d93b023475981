"""The loop of `contralto demo`: an expert's own answers, revised where they are wrong, align it; then it is compared with itself."""

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

PAIRS, STEPS, BATCH = 160, 60, 16
ROWS_PER_PAIR = 4
"""Problems that are asked for a pair: most answers need no revision."""
SEED = 2030
"""Of the problems, which are training problems of the world."""
LEARNING_RATE = "1e-4"
"""Chosen on dev problems, see testbed/ALIGNMENT.md."""
NAME = "aligned"


def align(expert: str, folder: Path) -> Path:
    """An embedded expert aligned by CLAIR pairs and APO-zero, through `contralto data run` and `contralto align`.

    Args:
        expert: its name in the testbed.
        folder: where pairs, adapter and model go.

    Returns:
        The folder of the aligned model, whole.
    """
    pairs, adapter, whole = folder / "pairs", folder / "adapter", folder / NAME
    model = f"testbed:{expert}"
    recipe = folder / "clair.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(model, pairs)), encoding="utf-8")
    with _one_thread(), contextlib.redirect_stdout(sys.stderr):
        command = argparse.ArgumentParser()
        data.add_arguments(command)
        data.run(command.parse_args(["run", str(recipe)]))
        _keep(pairs / "dataset" / "data" / "train.jsonl", folder / "pairs.jsonl")
        train.run(["apo_zero", *_flags(model, folder / "pairs.jsonl", adapter)])
        _merge(expert, adapter, whole)
    return whole


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model is slower on two."""
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


def _keep(made: Path, kept: Path) -> None:
    """The first pairs, as many as are wanted."""
    kept.write_text("".join(f"{line}\n" for line in read_lines(made)[:PAIRS]), encoding="utf-8")


def _flags(model: str, pairs: Path, output: Path) -> list[str]:
    said = {
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
    return [word for name, value in said.items() for word in (f"--{name}", str(value))]


def _merge(expert: str, adapter: Path, whole: Path) -> None:
    """The adapter put into the weights, so that every part of contralto takes the model by its folder."""
    with_adapter(testbed.load(expert), str(adapter)).merge_and_unload().save_pretrained(str(whole))
    testbed.tokenizer().save_pretrained(str(whole))


def logged(output: Path, model: Path, task: str) -> dict[str, Path]:
    """The answers that a comparison kept of a model, greedy and by cd, as samples that another comparison takes in.

    Args:
        output: the comparison's folder.
        model: the model's.
        task: which answers.
    """
    found = {}
    for about in sorted((output / "runs").glob(f"*/{task}.json")):
        configuration = json.loads(about.read_text(encoding="utf-8"))["configuration"]
        if configuration["pretrained"] != str(model) or "temperature" in configuration:
            continue
        method = METHODS[configuration["method"]]
        label = f"{NAME}, {method.name}" if method.contrasts else NAME
        folder = output / "logged" / label.replace(", ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(about.with_suffix(".jsonl"), folder / f"samples_{task}_0.jsonl")
        found[label] = folder
    return found
