"""Metrics of open-ended text that need another model: coherence and MAUVE."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from contralto.common.placement import input_device
from contralto.decoding.branches.context import context_length

__all__ = ["coherence", "mauve"]

TokenizedPair = tuple[list[int], list[int]]
"""The tokens of a prompt and of its continuation."""


def coherence(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[float]:
    """Return the mean log-likelihood of continuations after their prompts (Su & Collier 2023, arXiv 2210.14140).

        coherence(x | prompt) = 1 / |x| sum_i log p(x_i | prompt, x_<i)

    The paper's judge is OPT-2.7B. Greedy completions score best of all, because repetition is likely: report it beside
    `diversity`.

    Args:
        model: A causal language model, the judge.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        continuations: The continuations. With its prompt each must fit the context of the judge.
        batch_size: Continuations per forward pass.

    Returns:
        One value per continuation, in nats per token, at most 0; the papers print the mean.

    Raises:
        ValueError: The numbers of prompts and continuations differ, one of them is empty, or a text is too long.

    Examples:
        >>> from contralto import testbed
        >>> judge, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> told, shuffled = coherence(judge, tokenizer, ["Ben went"] * 2, [" out to the barn door.", " barn to door the out."])
        >>> told > shuffled
        True
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"there are {len(prompts)} prompts but {len(continuations)} continuations: give one for each")
    pairs = [
        (tokenizer(prompt)["input_ids"], tokenizer(continuation, add_special_tokens=False)["input_ids"])
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    _check_lengths(pairs, context_length(model) or math.inf)
    values: list[float] = []
    with torch.no_grad(), tqdm(total=len(pairs), desc="coherence", unit="text", leave=False) as bar:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            values += _mean_log_probabilities(model, batch)
            bar.update(len(batch))
    return values


def _check_lengths(pairs: Sequence[TokenizedPair], limit: float) -> None:
    for number, (prompt, continuation) in enumerate(pairs):
        if not prompt or not continuation:
            raise ValueError(f"text {number} has no {'continuation' if prompt else 'prompt'}: coherence needs both")
        length = len(prompt) + len(continuation)
        if length > limit:
            raise ValueError(
                f"text {number} has {length} tokens, more than the {limit} that the judge can read: cut it"
            )


def _mean_log_probabilities(model: Any, pairs: Sequence[TokenizedPair]) -> list[float]:
    """Score one batch, padded on the right, which causal attention ignores."""
    longest = max(len(prompt) + len(continuation) for prompt, continuation in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, continuation) in enumerate(pairs):
        ids[row, : len(prompt) + len(continuation)] = torch.tensor([*prompt, *continuation])
        mask[row, : len(prompt) + len(continuation)] = 1
    device, begin = input_device(model), min(len(prompt) for prompt, _ in pairs) - 1  # the first column that is read
    takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": longest - begin} if takes_keep else {}
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    logits = output.logits[:, begin - longest :]  # (rows, longest - begin, vocabulary)
    means = []
    for row, (prompt, continuation) in enumerate(pairs):
        first = len(prompt) - 1 - begin
        predicted = slice(first, first + len(continuation))
        log_probs: Tensor = logits[row, predicted].float().log_softmax(-1)
        means.append(float(log_probs.gather(-1, torch.tensor(continuation, device=log_probs.device)[:, None]).mean()))
    return means


def mauve(
    texts: Sequence[str],
    references: Sequence[str],
    *,
    model: str = "gpt2-large",
    max_length: int = 256,
    seed: int = 25,
    **options: Any,
) -> float:
    """Compute MAUVE, a similarity of the distributions of generated and human texts (Pillutla et al. 2021, arXiv 2102.01454).

    It is computed by the authors' package `mauve-text`, which has to be installed. The figure depends on the number of texts (a
    few thousand are usual), on their length, and on the model that embeds them: Li et al. 2022 (arXiv 2210.15097) cut texts
    at 128 tokens of `gpt2`. Compare only figures with equal settings.

    Args:
        texts: The generated texts, with their prompts if `references` have them.
        references: Human texts.
        model: The model whose hidden states embed the texts: a GPT-2 or BERT, by name or folder.
        max_length: Texts are cut after so many of its tokens.
        seed: The seed of the clustering.
        options: Passed on to `mauve.compute_mauve`.

    Returns:
        A value in [0, 1], the higher the closer.

    Raises:
        ImportError: mauve-text is not installed.
        ValueError: There are no texts, or no references.
    """
    if not texts or not references:
        raise ValueError(f"MAUVE compares texts with references, but there are {len(texts)} and {len(references)}")
    try:
        from mauve import compute_mauve  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise ImportError(
            "MAUVE is computed by the package mauve-text, which is missing: pip install mauve-text"
        ) from error
    arguments = {"featurize_model_name": model, "max_text_length": max_length, "seed": seed, "verbose": False}
    arguments = {**arguments, "device_id": 0 if torch.cuda.is_available() else -1, **options}
    return float(compute_mauve(p_text=list(texts), q_text=list(references), **arguments).mauve)
