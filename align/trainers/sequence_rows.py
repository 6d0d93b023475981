"""The tokens of prompts, references and candidates, and batches of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from contralto.decoding.executors.diverse import ENDED

__all__ = ["Tokenise", "Tokens", "pad_sequences", "pad_sources", "tokenised_rows"]

TOKENS = ("prompt_ids", "reference_ids", "candidate_ids")
"""Columns of tokens."""


class Tokens(NamedTuple):
    """The tokens of a sequence, and whether some were cut off."""

    ids: list[int]
    is_cut: bool


class Tokenise:
    """Make tokens of prompts and of answers, as decoding reads and writes them.

    A decoder reads a prompt, or a conversation in its template, and an answer that ends with the end token of the tokenizer. An
    encoder-decoder reads the prompt as its source, and writes the answer with the special tokens that its tokenizer gives to targets.

    Args:
        tokenizer: of the model.
        is_encoder_decoder: whether the model has an encoder.
        max_prompt_length: tokens of a prompt: a source is cut at its end, as in BRIO and CoNT; a prompt of a decoder is not, see
            `tokenised_rows`. None is no limit.
        max_completion_length: tokens of an answer, which is cut at its end.

    Raises:
        ValueError: the tokenizer has no end token.
    """

    def __init__(
        self, tokenizer: Any, *, is_encoder_decoder: bool, max_prompt_length: int | None, max_completion_length: int
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token, with which answers end: give one whose eos_token is set")
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length

    def prompt(self, prompt: Any) -> Tokens:
        """Return the tokens of a prompt.

        Args:
            prompt: a text, or messages.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
            if not self.is_encoder_decoder and ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
                ids = ids[:-1]  # some tokenizers end every text, and the answer is still to come
        else:
            ids = list(self.tokenizer(self._text(prompt), add_special_tokens=False)["input_ids"])
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return Tokens(ids, False)
        return Tokens([*ids[: limit - 1], ids[-1]] if self.is_encoder_decoder else ids, True)

    def answer(self, prompt: Any, answer: str) -> Tokens:
        """Return the tokens of an answer.

        Args:
            prompt: the text or the messages that it follows.
            answer: the text.
        """
        end = self.tokenizer.eos_token_id
        if self.is_encoder_decoder:
            ids = list(self.tokenizer(text_target=answer)["input_ids"])
        else:
            text = answer if isinstance(prompt, str) else self._turn(prompt, answer)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = ids[: ids.index(end)] if end in ids else ids
            ids = [*ids, end]
        if len(ids) <= self.max_completion_length:
            return Tokens(ids, False)
        return Tokens([*ids[: self.max_completion_length - 1], ids[-1]], True)

    def _text(self, messages: Any, *, opens: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        return text

    def _turn(self, prompt: Any, answer: str) -> str:
        """Return an answer as the template writes it after the prompt."""
        before = self._text(prompt)
        whole = self._text([*prompt, {"role": "assistant", "content": answer}], opens=False)
        if not whole.startswith(before):
            raise ValueError(
                "the chat template of the tokenizer writes a prompt differently once an answer follows, so that the answer cannot be told "
                "apart: give prompts as texts"
            )
        return whole[len(before) :]


def tokenised_rows(rows: Dataset, tokenise: Tokenise, name: str) -> tuple[Dataset, str]:
    """Return rows with the columns `TOKENS`, and a sentence about what was cut or dropped, empty if nothing was.

    A prompt of a decoder that exceeds its limit is dropped with its row, since its end is where the answer begins.

    Args:
        rows: as `contralto.data_gen.load_candidates` returns them.
        tokenise: makes the tokens.
        name: of the data set, for messages.

    Raises:
        ValueError: no row is left.
    """
    cut = {"prompts": 0, "answers": 0}
    tokens: dict[str, list[Any]] = {column: [] for column in TOKENS}
    kept = []
    for at, row in enumerate(rows):
        prompt = tokenise.prompt(row["prompt"])
        cut["prompts"] += prompt.is_cut
        if not prompt.ids or (prompt.is_cut and not tokenise.is_encoder_decoder):
            continue
        texts = [row.get("reference"), *(row.get("candidates") or ())]
        answers = [None if text is None else tokenise.answer(row["prompt"], text) for text in texts]
        cut["answers"] += sum(each.is_cut for each in answers if each is not None)
        ids = [None if each is None else each.ids for each in answers]
        for column, value in zip(TOKENS, (prompt.ids, ids[0], ids[1:]), strict=True):
            tokens[column].append(value)
        kept.append(at)
    if not kept:
        raise ValueError(
            f"{name} has no row left: all prompts are empty, or longer than max_prompt_length ({tokenise.max_prompt_length})"
        )
    rows = rows.select(kept)
    for column, values in tokens.items():
        rows = rows.remove_columns(column) if column in rows.column_names else rows
        rows = rows.add_column(column, values)
    what = "cut at" if tokenise.is_encoder_decoder else "dropped with their rows, beyond"
    prompts = f"{cut['prompts']} prompts are {what} max_prompt_length ({tokenise.max_prompt_length})"
    answers_cut = f"{cut['answers']} answers are cut at max_completion_length ({tokenise.max_completion_length})"
    said = [text for text, count in zip((prompts, answers_cut), cut.values(), strict=True) if count]
    return rows, f"{name}: {'; '.join(said)}" if said else ""


def pad_sources(ids: Sequence[Sequence[int]], *, pad: int, left: bool) -> dict[str, Tensor]:
    """Return prompts as `input_ids` and `attention_mask`, `(B, S)`.

    Args:
        ids: tokens of each prompt.
        pad: the token of the padding.
        left: pad on the left, as decoders generate.

    Examples:
        >>> pad_sources([[5, 6], [7]], pad=0, left=True)["attention_mask"]
        tensor([[1, 1],
                [0, 1]])
    """
    side = "left" if left else "right"
    rows = [torch.tensor(row) for row in ids]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }


def pad_sequences(rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return sequences as `(B, n, T)`, padded with `ENDED`; a row of fewer than n has sequences without tokens.

    Args:
        rows: the tokens of each sequence of each row.

    Examples:
        >>> pad_sequences([[[1, 2], [3]], [[4]]]).tolist()
        [[[1, 2], [3, -100]], [[4, -100], [-100, -100]]]
    """
    count = max(len(row) for row in rows)
    length = max((len(ids) for row in rows for ids in row), default=0)
    padded = torch.full((len(rows), count, length), ENDED)
    for at, row in enumerate(rows):
        for number, ids in enumerate(row):
            padded[at, number, : len(ids)] = torch.tensor(ids)
    return padded


def texts_of(tokenizer: Any, sequences: Tensor) -> list[list[str]]:
    """Return the texts of sequences.

    Args:
        tokenizer: of the model.
        sequences: `(B, n, T)`, padded with `ENDED`.
    """
    rows: list[list[list[int]]] = sequences.tolist()
    return [
        [tokenizer.decode([token for token in ids if token != ENDED], skip_special_tokens=True) for ids in row]
        for row in rows
    ]


def scored_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as scorers of `contralto.data_gen` read it: its prompt as messages, and without tokens.

    Args:
        row: a row of the data set.
    """
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {name: value for name, value in row.items() if name not in TOKENS} | {"prompt": messages}
