"""Compute hidden states at the endings of multiple-choice rows: the context is read once for all endings of its row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from contralto.common.files import replace_file

__all__ = ["Choice", "encode", "hidden_states", "logits_of"]


class Choice(NamedTuple):
    """A row of a multiple-choice task in tokens."""

    number: int
    """Its number in the file."""
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]
    """Characters of each ending, by which acc_norm divides."""
    label: int

    @property
    def chosen(self) -> Tensor:
        """Return the tokens of all endings, one after the other."""
        return torch.tensor([token for ending in self.endings for token in ending])

    @property
    def spans(self) -> list[int]:
        """Return the number of tokens of each ending."""
        return [len(ending) for ending in self.endings]


def encode(tokenizer: Any, number: int, query: str, endings: Sequence[str], label: int) -> Choice:
    """Split contexts and endings into tokens as lm-eval does.

    Args:
        tokenizer: The tokenizer.
        number: The number of the row.
        query: The context.
        endings: The endings, without the space before them.
        label: The number of the right one.
    """
    context = tokenizer(query)["input_ids"]
    whole = [tokenizer(f"{query} {ending}")["input_ids"] for ending in endings]
    return Choice(number, context, [each[len(context) :] for each in whole], [len(each) for each in endings], label)


@torch.no_grad()
def hidden_states(model: Any, choices: Sequence[Choice], folder: Path, *, batch_size: int, title: str) -> None:
    """Write the last hidden states at the positions that predict the endings' tokens, a file of float32 for each row.

    Args:
        model: A decoder-only model.
        choices: The rows.
        folder: The folder of the files; rows that are there are not read again.
        batch_size: Rows per forward pass; rows of similar length are read together.
        title: The title of the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [choice for choice in choices if not _path(folder, choice).exists()]
    missing.sort(key=lambda choice: (len(choice.context), max(choice.spans)), reverse=True)
    with tqdm(total=len(choices), initial=len(choices) - len(missing), desc=title, unit="row") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for choice, states in zip(batch, _read(model, batch), strict=True):
                with replace_file(_path(folder, choice)) as unfinished, unfinished.open("wb") as file:
                    np.save(file, states.numpy())
            bar.update(len(batch))


def logits_of(model: Any, folder: Path, choice: Choice) -> Tensor:
    """Return the logits `(tokens of all endings, V)` of a row from its hidden states.

    Args:
        model: The model, whose head is applied.
        folder: The folder that `hidden_states` filled for it.
        choice: The row.
    """
    states = torch.from_numpy(np.load(_path(folder, choice)))
    with torch.no_grad():
        logits: Tensor = model.get_output_embeddings()(states)
    return logits


def _path(folder: Path, choice: Choice) -> Path:
    return folder / f"{choice.number}.npy"


def _read(model: Any, batch: Sequence[Choice]) -> list[Tensor]:
    """Return the states `(tokens of all endings, width)` of each row."""
    ids, mask = _padded([choice.context for choice in batch], left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    body = model.get_decoder()
    first = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, last = first.past_key_values, first.last_hidden_state[:, -1]
    each = len(batch[0].endings)
    cache.batch_repeat_interleave(each)
    # The last token of an ending predicts nothing.
    endings = [ending[:-1] or ending for choice in batch for ending in choice.endings]
    more, more_mask = _padded(endings, left=False)
    lengths = mask.sum(-1).repeat_interleave(each)[:, None]
    states = body(
        input_ids=more,
        attention_mask=torch.cat([mask.repeat_interleave(each, 0), more_mask], 1),
        position_ids=lengths + torch.arange(more.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return [
        torch.cat(
            [
                part
                for j, span in enumerate(choice.spans)
                for part in (last[i : i + 1], states[i * each + j, : span - 1])
            ]
        )
        for i, choice in enumerate(batch)
    ]


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask
