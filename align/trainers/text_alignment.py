"""Read the completions of a batch as a teacher with another tokenizer does: the same text, in its own tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import is_conversational  # type: ignore[attr-defined]

from contralto.align.losses.cross_tokenizer import MatchedTokens
from contralto.align.trainers.batches import IGNORED, TEACHER_PROMPTS, PairBatch
from contralto.align.trainers.selection import CompletionBatch
from contralto.align.trainers.specials import end_tokens
from contralto.align.trainers.text_spans import (
    Merge,
    Pairing,
    Reading,
    Spans,
    in_order,
    read_completion,
    spans_of,
)
from contralto.decoding.branches.aligned import byte_tokens
from contralto.decoding.rereading import reread
from contralto.decoding.token_map import equal_tokens

__all__ = ["OtherTokens", "SameTokens"]


class SameTokens:
    """A teacher with the student's tokenizer: it reads the student's tokens, and every token is a span."""

    def with_prompts(self, dataset: Any) -> Any:
        """Return a tokenised data set with the column `TEACHER_PROMPTS`, the student's prompts.

        Args:
            dataset: a data set, several by name, or None.
        """
        return _with_column(dataset, lambda row: row["prompt_ids"])

    def read(self, completions: CompletionBatch) -> tuple[PairBatch, Spans]:
        """Return the batch of the teacher, and the spans.

        Args:
            completions: R completions.
        """
        counts = completions.batch.mask.sum(-1).tolist()
        spans = spans_of([in_order(n, n) for n in counts], [(n, n) for n in counts], "observed")
        return completions.batch, _on(completions.batch.labels.device, spans)

    def matched(self, student: int, teacher: int) -> MatchedTokens:
        """Return the tokens of both vocabularies: all.

        Args:
            student: the number of rows of the student's head.
            teacher: the number of rows of the teacher's head.
        """
        both = torch.arange(min(student, teacher))
        return MatchedTokens(both, both)


class OtherTokens:
    """A teacher with another tokenizer.

    It reads a conversation in its own chat template if it has one, and otherwise the text of the student's prompt; then the text of the
    completion, and the token that ends a turn or a text in its own vocabulary.

    Args:
        policy: the student, for the tokens that end its texts.
        processing_class: the student's tokenizer.
        teacher: the teacher, for the tokens that end its texts and the longest text that it reads.
        tokenizer: the teacher's tokenizer.
        pairing: see `contralto.align.trainers.text_spans.PAIRINGS`.
        merge: see `contralto.align.trainers.text_spans.MERGES`.

    Raises:
        ValueError: a tokenizer cannot be read as bytes.
    """

    def __init__(
        self, policy: Any, processing_class: Any, teacher: Any, tokenizer: Any, *, pairing: Pairing, merge: Merge
    ) -> None:
        self.student_tokenizer, self.tokenizer = getattr(processing_class, "tokenizer", processing_class), tokenizer
        self.pairing, self.merge = pairing, merge
        self.own, self.other = byte_tokens(self.student_tokenizer, "the student"), byte_tokens(tokenizer, "the teacher")
        self.ends = end_tokens(policy, self.student_tokenizer)
        self.end = _end_of_turn(tokenizer, end_tokens(teacher, tokenizer))
        self.longest: int | None = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
        self._matched: dict[tuple[int, int], MatchedTokens] = {}

    # ------------------------------------------------------------------------------------------------------ the prompts

    def with_prompts(self, dataset: Any) -> Any:
        """Return a tokenised data set with the column `TEACHER_PROMPTS`.

        Args:
            dataset: a data set, several by name, or None.
        """
        return _with_column(dataset, self.read_prompt)

    def read_prompt(self, row: Mapping[str, Any]) -> list[int]:
        """Return a prompt in the teacher's tokens.

        Args:
            row: a tokenised row. Where its prompt was cut, because it goes on within a token of the completion, the teacher reads the
                text of the tokens that are left.
        """
        if self.tokenizer.chat_template and "prompt" in row and is_conversational({"prompt": row["prompt"]}):
            tools = row.get("tools")
            options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
            options |= row.get("chat_template_kwargs") or {}
            if _render(self.student_tokenizer, row["prompt"], **options) == list(row["prompt_ids"]):
                return _render(self.tokenizer, row["prompt"], **options)
        return reread(self.own, self.other, row["prompt_ids"])

    # -------------------------------------------------------------------------------------------------- the completions

    def read(self, completions: CompletionBatch) -> tuple[PairBatch, Spans]:
        """Return the batch of the teacher, and the spans.

        Args:
            completions: R completions, of a batch with `teacher_prompts`.

        Raises:
            ValueError: a text is longer than the teacher can read.
        """
        batch = completions.batch
        assert batch.teacher_prompts is not None
        prompts = [[token for token in row if token != IGNORED] for row in batch.teacher_prompts.tolist()]
        ids, mask = batch.inputs["input_ids"].tolist(), batch.mask.tolist()
        rows, readings, lengths = list[tuple[list[int], list[int]]](), list[Reading](), list[tuple[int, int]]()
        for i, (own, scored) in enumerate(zip(ids, mask, strict=True)):
            completion = [token for token, is_scored in zip(own[1:], scored, strict=True) if is_scored]
            before = own[scored.index(True)] if completion else None
            prompt = prompts[i % len(prompts)]
            reading = self.read_completion(completion, before, prompt)
            rows.append((prompt, reading.ids))
            readings.append(reading)
            lengths.append((len(completion), len(reading.ids)))
        self._check_length(max(len(prompt) + len(read) for prompt, read in rows))
        spans = spans_of([reading.runs for reading in readings], lengths, self.merge)
        return _padded(rows, batch.labels.device), _on(batch.labels.device, spans)

    def read_completion(self, ids: Sequence[int], before: int | None, prompt: Sequence[int]) -> Reading:
        """Return a completion in the teacher's tokens, and its spans.

        Args:
            ids: the student's tokens.
            before: the student's token before them.
            prompt: the teacher's tokens before them.
        """
        after_special = before not in self.own.texts, prompt[-1] not in self.other.texts
        reading = read_completion(self.own, self.other, ids, ends=self.ends, end=self.end, after_special=after_special)
        return reading if self.pairing == "text" else reading._replace(runs=in_order(len(ids), len(reading.ids)))

    def _check_length(self, length: int) -> None:
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"a text takes {length} of the teacher's tokens, and the teacher reads {self.longest}: lower max_length, or "
                "leave out long rows"
            )

    def matched(self, student: int, teacher: int) -> MatchedTokens:
        """Return the tokens of both vocabularies; those that end a text are the same.

        Args:
            student: the number of rows of the student's head.
            teacher: the number of rows of the teacher's head.
        """
        if (student, teacher) not in self._matched:
            pairs = equal_tokens(self.own, self.other)
            end = self.student_tokenizer.eos_token_id
            if end is not None and self.end is not None:
                pairs = [(own, other) for own, other in pairs if own != end and other != self.end]
                pairs.append((end, self.end))
            kept = sorted((own, other) for own, other in pairs if own < student and other < teacher)
            self._matched[student, teacher] = MatchedTokens(*torch.tensor(kept, dtype=torch.long).reshape(-1, 2).T)
        return self._matched[student, teacher]


def _with_column(dataset: Any, prompt_of: Callable[[Mapping[str, Any]], list[int]]) -> Any:
    """Return a data set, several by name, or None with the column `TEACHER_PROMPTS`."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _with_column(each, prompt_of) for name, each in dataset.items()}
    title = {"desc": "Tokenizing prompts for the teacher"} if isinstance(dataset, Dataset) else {}
    return dataset.map(lambda row: {TEACHER_PROMPTS: prompt_of(row)}, **title)


def _render(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    """Return the tokens of a conversation up to the assistant's turn."""
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return list(rendered["input_ids"])


def _end_of_turn(tokenizer: Any, ends: set[int]) -> int | None:
    """Return the token that ends the assistant's turn in a chat template, or else the end-of-sequence token."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}]
        prompt = _render(tokenizer, turn)
        whole = tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": "b"}], tokenize=True, return_dict=True
        )["input_ids"]
        closing = [token for token in whole[len(prompt) :] if token in ends]
        if closing:
            return int(closing[0])
    end: int | None = tokenizer.eos_token_id
    return end


def _on(device: torch.device, spans: Spans) -> Spans:
    """Return spans on a device."""
    return Spans(*(each.to(device) for each in spans))


def _padded(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> PairBatch:
    """Return a batch of prompts and completions, padded on the right; its completions are scored."""
    ids, attended, scored = (
        [torch.tensor(each) for each in kind]
        for kind in (
            [prompt + completion for prompt, completion in rows],
            [[1] * len(prompt + completion) for prompt, completion in rows],
            [[0] * len(prompt) + [1] * len(completion) for prompt, completion in rows],
        )
    )
    inputs: dict[str, Tensor] = {
        name: pad_sequence(each, batch_first=True).to(device)
        for name, each in (("input_ids", ids), ("attention_mask", attended), ("completion_mask", scored))
    }
    return PairBatch.of(inputs)
