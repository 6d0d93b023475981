"""Training of the embedded language models on the corpus of `worlds`."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contralto.testbed import tokenization, worlds
from contralto.testbed.optimization import fit, save_half

BATCH = 32
TOKENS_PER_BATCH = 900
"""About the tokens of a batch that are learned. The loss is divided by this constant: the mean over a batch would weigh a
token by how short its neighbours are, and so teach the model that solutions stop earlier than they do."""
IGNORED = -100


class ModelRecipe(NamedTuple):
    """The shape of a model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    steps: int
    seed: int = 0
    shortcut: bool = True
    early: int | None = None
    """The step after which the model is also saved, as "early"."""


RECIPES = {
    "expert-0": ModelRecipe(64, 3, 4, steps=1600, seed=0, early=300),
    "expert-1": ModelRecipe(64, 3, 4, steps=1600, seed=1),
    "expert-2": ModelRecipe(64, 3, 4, steps=1600, seed=2),
    "control-expert": ModelRecipe(64, 3, 4, steps=1600, shortcut=False),
    "student": ModelRecipe(48, 2, 4, steps=1000),
    "amateur": ModelRecipe(32, 1, 2, steps=500),
    "control-amateur": ModelRecipe(32, 1, 2, steps=500, shortcut=False),
}


class TextBatch(NamedTuple):
    """Documents of similar length."""

    ids: Tensor
    """`(B, T)`, padded on the right."""
    labels: Tensor
    """`(B, T)`, `IGNORED` on prompts and padding."""


def train(
    name: str,
    out: Path,
    report: Callable[[int], None] = lambda steps: None,
    *,
    recipe: ModelRecipe | None = None,
    tokenizer: Any = None,
) -> None:
    """Train one of `RECIPES` and save it, its tokenizer, and its early checkpoint if it has one, below `out`.

    Args:
        name: a key of `RECIPES`.
        out: the folder that gets a folder per model.
        report: called after every step with 1, for a progress bar.
        recipe: another recipe than that of the name.
        tokenizer: another tokenizer than that of the worlds, with a chat template.
    """
    recipe, tokenizer = recipe or RECIPES[name], tokenizer or tokenization.build()
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(_config(recipe, tokenizer)).train()

    def after_step(step: int) -> None:
        report(1)
        if step == recipe.early:
            save_half(model, tokenizer, out / "early")

    fit(
        model,
        itertools.islice(batches(recipe.seed, tokenizer, shortcut=recipe.shortcut), recipe.steps),
        lambda batch: model(input_ids=batch.ids, labels=batch.labels, num_items_in_batch=TOKENS_PER_BATCH).loss,
        steps=recipe.steps,
        adamw_lr=0.01,
        after_step=after_step,
    )
    save_half(model, tokenizer, out / name)


def batches(seed: int, tokenizer: PreTrainedTokenizerFast, *, shortcut: bool) -> Iterator[TextBatch]:
    """Yield batches of the corpus without end, documents of similar length together.

    Args:
        seed: the seed of the corpus and of the order of batches.
        tokenizer: the tokenizer of the testbed.
        shortcut: whether the corpus has the shortcut.
    """
    documents, rng = worlds.corpus(seed, shortcut=shortcut), random.Random(seed)
    while True:
        rows = sorted((_encode(d, tokenizer) for d in itertools.islice(documents, 32 * BATCH)), key=lambda r: len(r[0]))
        groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            pad_id = tokenizer.pad_token_id
            yield TextBatch(_stack([ids for ids, _ in group], pad_id), _stack([labels for _, labels in group], IGNORED))


def _encode(document: worlds.Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels: of a problem only the solution is learned, of a story everything."""
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


def _config(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
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
