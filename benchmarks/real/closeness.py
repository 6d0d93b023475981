"""Compare the distributions of generated and human texts by MAUVE, over seeds and resamples of whole articles."""

import random
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contralto.common.hub import from_pretrained
from contralto.eval.metrics import mauve

__all__ = ["Closeness", "can_compare", "closeness", "embed", "last_states"]

Closeness = dict[str, list[float]]
"""MAUVE for each seed of the clustering, and for each resample."""
SEEDS = 10
RESAMPLES = 100


def can_compare() -> bool:
    """Return True if the package of MAUVE's authors is installed."""
    return find_spec("mauve") is not None


def closeness(texts: np.ndarray[Any, Any], references: np.ndarray[Any, Any], clusters: Sequence[int]) -> Closeness:
    """Return MAUVE of features of texts and references.

    Args:
        texts: `(n, d)` features of generated texts.
        references: `(n, d)` features of the human texts of the same prompts.
        clusters: The article of each prompt; resamples draw whole articles, the same for all systems.
    """
    rows = [[i for i, name in enumerate(clusters) if name == each] for each in dict.fromkeys(clusters)]
    draws = random.Random(0)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = [i for group in draws.choices(rows, k=len(rows)) for i in group]
        resampled.append(_mauve(texts[drawn], references[drawn], seed=0))
    return {"seeds": [_mauve(texts, references, seed=seed) for seed in range(SEEDS)], "resampled": resampled}


def _mauve(texts: np.ndarray[Any, Any], references: np.ndarray[Any, Any], *, seed: int) -> float:
    unused = [""] * len(texts)
    return round(mauve(unused, unused, p_features=texts, q_features=references, seed=seed), 5)


@torch.no_grad()
def embed(name: str, texts: Sequence[str], *, batch_size: int) -> np.ndarray[Any, Any]:
    """Return the sentence embeddings `(n, d)` of texts: the mean of the last states, of length 1.

    Args:
        name: The sentence embedder.
        texts: The texts, of which the first 256 tokens are read.
        batch_size: Texts per forward pass.
    """
    model, tokenizer = _embedder(name)
    found = []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        inputs = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return np.asarray(torch.cat(found))


@torch.no_grad()
def last_states(model: Any, ids: Tensor, *, batch_size: int) -> np.ndarray[Any, Any]:
    """Return the last hidden state at the last token of each text, `(n, d)`, which is the feature of MAUVE's authors.

    Args:
        model: A decoder-only model.
        ids: `(n, T)` tokens.
        batch_size: Texts per forward pass.
    """
    body = model.get_decoder()
    return np.asarray(
        torch.cat([body(input_ids=part).last_hidden_state[:, -1] for part in torch.split(ids, batch_size)])
    )


@cache
def _embedder(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, padding_side="right")
    return from_pretrained(AutoModel, name, dtype=torch.float32).eval(), tokenizer
