"""How the embedded models were trained: a plain loop over the corpus of `worlds`, one thread per model."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contralto.testbed import tokenization, worlds

BATCH = 32
TOKENS_PER_BATCH = 900
"""About the tokens of a batch that are learned. The loss is divided by this constant: the mean over a batch would weigh a
token by how short its neighbours are, and so teach the model that solutions stop earlier than they do."""
IGNORED = -100


class Recipe(NamedTuple):
    """The shape of a model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    steps: int
    seed: int = 0
    shortcut: bool = True
    early: int | None = None
    """Also save the model after so many steps, as "early"."""


RECIPES = {
    "expert-0": Recipe(64, 3, 4, steps=1600, seed=0, early=300),
    "expert-1": Recipe(64, 3, 4, steps=1600, seed=1),
    "expert-2": Recipe(64, 3, 4, steps=1600, seed=2),
    "control-expert": Recipe(64, 3, 4, steps=1600, shortcut=False),
    "student": Recipe(48, 2, 4, steps=1000),
    "amateur": Recipe(32, 1, 2, steps=500),
    "control-amateur": Recipe(32, 1, 2, steps=500, shortcut=False),
}


class Batch(NamedTuple):
    ids: Tensor
    """`(B, T)`, padded on the right."""
    labels: Tensor
    """`(B, T)`, `IGNORED` on prompts and padding."""


def train(name: str, out: Path, report: Callable[[int], None] = lambda steps: None) -> None:
    """Train one of `RECIPES` and save it, its tokenizer, and its early checkpoint if it has one, below `out`.

    Args:
        name: a key of `RECIPES`.
        out: the folder that gets a folder per model.
        report: called after every step with 1, for a progress bar.
    """
    recipe, tokenizer = RECIPES[name], tokenization.build()
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(_config(recipe, tokenizer)).train()
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe.steps)) for o in optimizers]
    data = batches(recipe.seed, tokenizer, shortcut=recipe.shortcut)
    for step, batch in enumerate(itertools.islice(data, recipe.steps), 1):
        loss = model(input_ids=batch.ids, labels=batch.labels, num_items_in_batch=TOKENS_PER_BATCH).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        report(1)
        if step == recipe.early:
            _save(model, tokenizer, out / "early")
    _save(model, tokenizer, out / name)


def batches(seed: int, tokenizer: PreTrainedTokenizerFast, *, shortcut: bool) -> Iterator[Batch]:
    """Endless batches of the corpus, documents of like length together."""
    documents, rng = worlds.corpus(seed, shortcut=shortcut), random.Random(seed)
    while True:
        rows = sorted((_encode(d, tokenizer) for d in itertools.islice(documents, 32 * BATCH)), key=lambda r: len(r[0]))
        groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            pad_id = tokenizer.pad_token_id
            yield Batch(_stack([ids for ids, _ in group], pad_id), _stack([labels for _, labels in group], IGNORED))


def _encode(document: worlds.Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels: of a problem only the solution is learned, of a story everything."""
    if document.prompt is None:
        ids = [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
        return ids, ids
    chat = [{"role": "user", "content": document.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    solution = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + solution, [IGNORED] * len(prompt) + solution


def _stack(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=0.006, weight_decay=0.0),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: 50 steps of warm-up, constant for 30% of the steps, then linearly down to 2%."""
    return min((step + 1) / 50, max(0.02, (1 - step / steps) / 0.7), 1.0)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half-precision weights, to be loaded in single precision."""
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
