"""Measures of open-ended text: repetition, diversity, coherence, MAUVE."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["coherence", "diversity", "mauve", "ngram_counts", "repetition"]

Counts = tuple[int, int]
"""How many different n-grams there are, and how many n-grams."""


def ngram_counts(text: str, *, n: int) -> Counts:
    """The different n-grams of a text, and all its n-grams, of words between white space.

    The code that the literature uses (SimCTG, `simctg/evaluation.py`) leaves out the last n-gram of every text; this does
    not.

    Examples:
        >>> ngram_counts("a b a b a", n=2)
        (2, 4)
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)), len(grams)


def repetition(counts: Iterable[Counts]) -> float:
    """rep-n, the share of n-grams that their own text has already had (Welleck et al. 2020, arXiv 1908.04319; Su et al.
    2022, arXiv 2202.06417).

        rep-n = 1 - sum_x |unique n-grams of x| / sum_x |n-grams of x|

    The sums run over texts, so that a repetition counts within its text alone, and long texts weigh more. Papers print 100
    times this. 0 if no text has an n-gram.

    Args:
        counts: of every text, from `ngram_counts`.

    Examples:
        >>> repetition([ngram_counts("a b a b a", n=2)])
        0.5
    """
    counts = list(counts)
    unique, total = sum(each for each, _ in counts), sum(each for _, each in counts)
    return 1 - unique / total if total else 0.0


def diversity(counts: Iterable[Sequence[Counts]]) -> float:
    """How little texts repeat themselves, at three lengths at once (Su et al. 2022, arXiv 2202.06417).

        diversity = (1 - rep-2) (1 - rep-3) (1 - rep-4)

    Args:
        counts: of every text three, from `ngram_counts` with n 2, 3 and 4.

    Examples:
        >>> diversity([[ngram_counts("a b c a b c", n=n) for n in (2, 3, 4)]])
        0.44999999999999996
    """
    return math.prod(1 - repetition(column) for column in zip(*counts, strict=True))


def coherence(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[float]:
    """How likely continuations are after their prompts, for a judge (Su & Collier 2023, arXiv 2210.14140).

        coherence(x | prompt) = 1 / |x| sum_i log p(x_i | prompt, x_<i)

    The paper's judge is OPT-2.7B. Greedy text scores best of all, because repetition is likely: read it beside `diversity`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: what the texts began with.
        continuations: what was written. With its prompt each must be within the model's context.
        batch_size: texts per forward.

    Returns:
        In nats per token, one per text, at most 0; the papers print the mean.

    Raises:
        ValueError: other numbers of prompts and continuations; an empty continuation; a text that is too long.

    Examples:
        >>> from contralto import testbed
        >>> judge, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> told, shuffled = coherence(judge, tokenizer, ["Ben went"] * 2, [" out to the barn door.", " barn to door the out."])
        >>> told > shuffled
        True
    """
    import torch
    from tqdm import tqdm

    from contralto.decoding.branches.context import context_length

    if len(prompts) != len(continuations):
        raise ValueError(f"there are {len(prompts)} prompts but {len(continuations)} continuations: give one for each")
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(told, add_special_tokens=False)["input_ids"])
        for prompt, told in zip(prompts, continuations, strict=True)
    ]
    limit = context_length(model) or math.inf
    for number, (before, after) in enumerate(rows):
        if not before or not after:
            raise ValueError(f"text {number} has no {'continuation' if before else 'prompt'}: coherence needs both")
        if len(before) + len(after) > limit:
            raise ValueError(
                f"text {number} has {len(before) + len(after)} tokens, more than the {limit} that the judge can read: cut it"
            )
    found: list[float] = []
    with torch.no_grad(), tqdm(total=len(rows), desc="coherence", unit="text", leave=False) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found += _mean_log_probabilities(model, batch)
            bar.update(len(batch))
    return found


def _mean_log_probabilities(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Padded on the right, where a causal model does not look."""
    import torch

    from contralto.decoding.placement import input_device

    longest = max(len(before) + len(after) for before, after in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (before, after) in enumerate(rows):
        ids[row, : len(before) + len(after)] = torch.tensor([*before, *after])
        mask[row, : len(before) + len(after)] = 1
    device = input_device(model)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    means = []
    for row, (before, after) in enumerate(rows):
        told: Tensor = logits[row, len(before) - 1 : len(before) + len(after) - 1].float().log_softmax(-1)
        means.append(float(told.gather(-1, torch.tensor(after, device=told.device)[:, None]).mean()))
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
    """MAUVE, how close the distribution of texts is to that of human texts (Pillutla et al. 2021, arXiv 2102.01454).

    Computed by the authors' package `mauve-text`, which has to be installed. The figure depends on the number of texts (a
    few thousand are usual), on their length, and on the model that embeds them: Li et al. 2022 (arXiv 2210.15097) cut texts
    at 128 tokens of `gpt2`. Compare only figures of like settings.

    Args:
        texts: what was written, prompts included if `references` have them.
        references: what people wrote.
        model: whose hidden states embed the texts: a GPT-2 or BERT, by name or folder.
        max_length: texts are cut after so many of its tokens.
        seed: of the clustering.
        options: passed on to `mauve.compute_mauve`.

    Returns:
        In 0..1, the higher the closer.

    Raises:
        ImportError: mauve-text is not installed.
        ValueError: no texts, or no references.
    """
    if not texts or not references:
        raise ValueError(f"MAUVE compares texts with references, but there are {len(texts)} and {len(references)}")
    try:
        from mauve import compute_mauve  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise ImportError(
            "MAUVE is computed by the package mauve-text, which is missing: pip install mauve-text"
        ) from error
    import torch

    how = {"featurize_model_name": model, "max_text_length": max_length, "seed": seed, "verbose": False}
    how = {**how, "device_id": 0 if torch.cuda.is_available() else -1, **options}
    return float(compute_mauve(p_text=list(texts), q_text=list(references), **how).mauve)
