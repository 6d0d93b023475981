"""CHES: an estimate, before training, of how strongly a pair lowers the probability of its chosen answer.

Preference training raises the margin between two answers, and often lowers the likelihood of both (likelihood displacement).
Razin et al. (ICLR 2025, arXiv 2410.08847) trace it to pairs whose answers the model embeds alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from contralto.common.placement import input_device
from contralto.data_gen.dataset import template_options
from contralto.data_gen.ranges import check_batch

__all__ = ["Ches", "ches", "score_rows"]


class Ches(NamedTuple):
    """The centred hidden embedding similarity of pairs; the higher, the likelier displacement."""

    ches: Tensor
    """`(B,)`, float64. Grows with the square of the answers' lengths."""
    ln_ches: Tensor
    """`(B,)`, float64, by mean hidden states: the one to compare pairs of different lengths by."""


def ches(chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> Ches:
    """Compute the CHES score and its length-normalised form (Razin et al., arXiv 2410.08847).

        CHES    = <H+, H-> - ||H+||^2,                                H = sum_k h_k
        ln-CHES = <H+, H-> / (|y+| |y-|) - ||H+||^2 / |y+|^2

    `h_k` are last-layer hidden states from the last token of the prompt to the last but one of the answer: the states that
    predict the answer's tokens. Both are computed as `<H+, H- - H+>` in float64, since for pairs that differ little the two
    terms nearly cancel.

    The official code takes the lengths from the padded shapes and does not mask the padding, which is right only for one pair
    at a time.

    Args:
        chosen: `(B, S, H)` hidden states of the prompt with the chosen answer.
        rejected: `(B, T, H)` of the prompt with the rejected answer.
        chosen_mask: `(B, S)`, true at the positions `k`.
        rejected_mask: `(B, T)`.

    Raises:
        ValueError: a mask has another shape, or a row without a position.

    Examples:
        >>> h, mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[True, True]])
        >>> other = torch.tensor([[[0.0, 2.0], [9.0, 9.0]]])
        >>> found = ches(h, other, mask, torch.tensor([[True, False]]))
        >>> found.ches.item(), found.ln_ches.item()  # <(2, 0), (0, 2)> - 4, <(1, 0), (0, 2)> - 1
        (-4.0, -1.0)
    """
    sums, lengths = [], []
    for name, states, mask in (("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask)):
        if mask.shape != states.shape[:2]:
            raise ValueError(
                f"the {name} mask has shape {tuple(mask.shape)}, but its hidden states have shape {tuple(states.shape)}"
            )
        kept = mask.bool()
        if not kept.any(-1).all():
            raise ValueError(f"a {name} answer has no token, and CHES needs at least one")
        sums.append(torch.where(kept[..., None], states, 0.0).sum(1, dtype=torch.float64))
        lengths.append(kept.sum(-1, keepdim=True))
    return _of_sums(*sums, *lengths)


def _of_sums(good: Tensor, bad: Tensor, good_length: Tensor, bad_length: Tensor) -> Ches:
    mean_good, mean_bad = good / good_length, bad / bad_length
    return Ches((good * (bad - good)).sum(-1), (mean_good * (mean_bad - mean_good)).sum(-1))


@torch.inference_mode()
def score_rows(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 8, max_length: int | None = None
) -> Ches:
    """Compute both scores of every row under the model that is to be trained.

    The tokens are those that TRL trains on: the chat template of the prompt and the answer, with the row's tools, or texts as they
    are; the answer begins at the first token in which the prompt alone differs from the prompt with the answer. Rows are batched
    by length, and memory is needed for one batch at a time.

    Args:
        model: a causal language model, with or without adapter.
        tokenizer: with a chat template, where rows are messages.
        rows: with `prompt`, `chosen` and `rejected` as messages or as texts.
        batch_size: answers per forward pass.
        max_length: tokens; longer texts are truncated at their end, as in training. None is no limit.

    Returns:
        `Ches`, `(len(rows),)`, on the CPU.

    Raises:
        ValueError: the answer of a row has no token within `max_length`, a row has images, or a batch size or length is below 1.
    """
    check_batch(batch_size, max_length)
    texts = [
        _tokens(tokenizer, row, at, name, max_length) for at, row in enumerate(rows) for name in ("chosen", "rejected")
    ]
    sums = torch.empty(len(texts), model.config.get_text_config().hidden_size, dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="CHES", unit="batch"):
        batch = order[start : start + batch_size]
        sums[batch] = _summed(model, [texts[i] for i in batch])
    lengths = torch.tensor([len(text.ids) - text.prompt for text in texts], dtype=torch.float64)[:, None]
    return _of_sums(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2])


class _TokenizedAnswer(NamedTuple):
    ids: list[int]
    """The tokens of prompt and answer."""
    prompt: int
    """The number of tokens of the prompt."""


def _tokens(tokenizer: Any, row: Mapping[str, Any], at: int, name: str, max_length: int | None) -> _TokenizedAnswer:
    if row.get("images"):
        raise ValueError(f"row {row.get('id', at)} has images, but CHES supports only text")
    prompt, ids = _prompt_and_whole(tokenizer, row, name)
    shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    ids = ids[:max_length]
    if not 0 < shared < len(ids):
        raise ValueError(f"the {name} answer of row {row.get('id', at)} has no token (within max_length)")
    return _TokenizedAnswer(ids, shared)


def _prompt_and_whole(tokenizer: Any, row: Mapping[str, Any], name: str) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, and of prompt and answer; texts end with the end of sequence, as in TRL."""
    prompt, answer = row["prompt"], row[name]
    if isinstance(prompt, str):
        end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(prompt)["input_ids"], tokenizer(prompt + answer + end)["input_ids"]
    options = {"tokenize": True, "return_dict": True, **template_options(row)}
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    return encoded["input_ids"], tokenizer.apply_chat_template([*prompt, *answer], **options)["input_ids"]


def _summed(model: Any, texts: Sequence[_TokenizedAnswer]) -> Tensor:
    """Return the sums of the hidden states that predict the answers, `(B, H)`."""
    longest = max(len(text.ids) for text in texts)
    device = input_device(model)
    ids = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in texts], device=device)
    places = torch.arange(longest, device=device)
    lengths = torch.tensor([len(text.ids) for text in texts], device=device)[:, None]
    prompts = torch.tensor([text.prompt for text in texts], device=device)[:, None]
    states = model.get_decoder()(input_ids=ids, attention_mask=(places < lengths).long()).last_hidden_state
    kept = (places >= prompts - 1) & (places < lengths - 1)
    return torch.where(kept[..., None], states, 0.0).sum(1, dtype=torch.float64).cpu()
