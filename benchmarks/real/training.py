"""Run contralto's commands for the lines that train, and measure the models that come out."""

import contextlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timing import UNTUNED
from torch import Tensor

from contralto import cli
from contralto.common.files import replace_text
from contralto.common.hashing import content_digest
from contralto.testbed.instructions import parse_instruction
from real.line import Context

__all__ = ["command", "encode_reply", "fulfilled", "greedy", "pairs", "reply_logps", "trained"]

NEW_TOKENS = 32
"""Tokens of a reply at most: training on CPUs is slow."""
FLAGS = {"per_device_train_batch_size": "4", "dtype": "float32", "bf16": "false", "optim": "adamw_torch", **UNTUNED}
"""Options in which all trainings agree, whatever their recipes say."""


def command(*words: str) -> None:
    """Run a command of contralto in this process, without its output.

    Args:
        words: Its words, without `contralto`.

    Raises:
        RuntimeError: It fails; the message holds the end of its output.
    """
    output = io.StringIO()
    status: Any
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = cli.main(list(words))
    except SystemExit as error:
        status = error.code or 0
    if status:
        raise RuntimeError(f"contralto {' '.join(words)} failed:\n{output.getvalue()[-3000:]}")


def pairs(context: Context, name: str, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs of a recipe, which `contralto data run` makes; one that was stopped goes on.

    Args:
        context: The context of the line.
        name: The name of the recipe.
        recipe: The recipe without `output`.
    """
    key = content_digest(json.dumps([recipe, context.digest("model")], sort_keys=True), 12)
    path = context.scratch.absolute() / f"pairs-{name}-{key}.yaml"
    file = path.with_suffix("") / "dataset" / "data" / "train.jsonl"
    if not file.exists():
        replace_text(path, yaml.safe_dump({"output": str(path.with_suffix("")), **recipe}, sort_keys=False))
        command("data", "run", str(path))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def trained(
    context: Context, recipe: str, model: str, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> Path:
    """Return the folder of a model or adapter that `contralto align` trained.

    Args:
        context: The context of the line.
        recipe: The name of the recipe.
        model: The folder or name of the model.
        rows: The rows.
        options: Options beside `FLAGS`, which they override.
    """
    key = content_digest(
        json.dumps([context.line.revision, recipe, model, list(rows), dict(options)], sort_keys=True), 16
    )
    folder = context.scratch.absolute() / f"trained-{key}"
    if folder.is_dir():
        return folder
    file, unfinished = folder.with_suffix(".jsonl"), folder.with_suffix(".part")
    replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shutil.rmtree(unfinished, ignore_errors=True)
    flags = {"model_name_or_path": model, "dataset_name": file, "output_dir": unfinished, **FLAGS, **options}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command("align", recipe, *words)
    unfinished.rename(folder)
    return folder


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, processor: Any = None, batch_size: int = 80
) -> list[str]:
    """Return greedy replies of at most `NEW_TOKENS` tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which pads on the left.
        prompts: User messages.
        processor: A logits processor, such as a contrast; None is none.
        batch_size: Prompts per batch.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs,
            logits_processor=[processor] if processor else [],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def fulfilled(prompts: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Return whether each reply fulfils the instruction of its prompt.

    Args:
        prompts: The prompts.
        texts: The replies.
    """
    return [parse_instruction(p).is_fulfilled(t) for p, t in zip(prompts, texts, strict=True)]


def encode_reply(tokenizer: Any, prompt: str, text: str) -> tuple[Tensor, int]:
    """Return the tokens of a chat with its reply and the end-of-text token, and the number of those before the reply.

    Args:
        tokenizer: The tokenizer.
        prompt: The user's message.
        text: The reply.
    """
    chat = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    reply = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*head, *reply, tokenizer.eos_token_id]), len(head)


@torch.inference_mode()
def reply_logps(model: Any, ids: Tensor, start: int) -> Tensor:
    """Return the log-probabilities `(T, V)` at the positions that predict the tokens of a reply.

    Args:
        model: The model.
        ids: The tokens of the chat.
        start: The number of tokens before the reply.
    """
    logits: Tensor = model(ids[None], logits_to_keep=len(ids) - start + 1).logits[0, :-1]
    return logits.log_softmax(-1)
