"""Write texts with the expert, for the amateur to learn from: data-free, resumable, each answer on disk before it is used.

- Plain texts: the expert continues a word of its own vocabulary, drawn at random, as LLM-QAT does (Liu et al. 2023,
  arXiv 2305.17888, section 2.1).
- Chats, if the tokenizer has a chat template: the expert continues the template's opening of a user turn, so that it writes
  the question itself, and then answers it, as in Magpie (Xu et al. 2024, arXiv 2406.08464).
- With prompts of the user's, it answers those instead.

Engine, store and keys are those of `contralto data`: an interrupted run goes on where it stopped, with the same texts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from contralto.common.texts import without_bos
from contralto.data_gen.engines.base import Engine
from contralto.data_gen.engines.recorded import recorded_answers
from contralto.data_gen.store import Store
from contralto.data_gen.types import Answer, Ask, Row, Sampling

__all__ = ["Text", "opening_words", "user_turn", "write_texts"]

ROLE = "expert"
MARK = "\u2402"
"""Stands for the content of a message while the chat template is taken apart."""
SHORTEST_WORD = 2
QUESTION_TOKENS = 96
"""Largest number of tokens of a question that the expert asks itself."""


class Text(NamedTuple):
    """A text of the expert's, as the trainer reads it: strings, without a chat template."""

    prompt: str
    completion: str


def opening_words(tokenizer: Any) -> list[str]:
    """Return the words among the tokens of a vocabulary, capitalised where their script has capitals.

    Args:
        tokenizer: a transformers tokenizer.

    Examples:
        >>> from contralto import testbed
        >>> "Ben" in opening_words(testbed.tokenizer())
        True
    """
    special = set(tokenizer.all_special_ids)
    decoded = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special)
    return sorted({word[0].upper() + word[1:] for word in decoded if len(word) >= SHORTEST_WORD and word.isalpha()})


def user_turn(tokenizer: Any) -> str | None:
    """Return what the chat template puts before the first question; None without a template that has such a place.

    Args:
        tokenizer: a transformers tokenizer.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": MARK}]
    rendered: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    before, mark, _ = rendered.partition(MARK)
    return without_bos(before, tokenizer) if mark and without_bos(before, tokenizer) else None


def write_texts(
    engine: Engine,
    tokenizer: Any,
    store: Store,
    *,
    count: int,
    sampling: Sampling,
    seed: int = 0,
    rows: Sequence[Row] = (),
) -> list[Text]:
    """Let the expert write texts, except those that the store already holds, and return all of them.

    Args:
        engine: the expert.
        tokenizer: of the expert.
        store: where every answer is recorded before it is used.
        count: number of requested texts. Requests that fail are left out.
        sampling: of the texts.
        seed: of the draws of words and samples.
        rows: prompts of the user's, as `read_rows` returns them, used in turn; empty for openings of the expert's own.

    Raises:
        ValueError: the vocabulary has no words, and there are no prompts.
    """
    if rows:
        asks = [Ask(role=ROLE, messages=rows[i % len(rows)]["prompt"], seed=i, tag="answer") for i in range(count)]
        answers = _answers(engine, store, asks, sampling, seed, "answers")
        return [_of_prompt(tokenizer, ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer]
    turn = user_turn(tokenizer)
    chats = count // 2 if turn else 0
    texts = list(_plain(engine, tokenizer, store, count - chats, sampling, seed))
    if turn:
        texts += _chats(engine, tokenizer, store, turn, chats, sampling, seed)
    random.Random(seed).shuffle(texts)
    return texts


def _plain(engine: Engine, tokenizer: Any, store: Store, count: int, sampling: Sampling, seed: int) -> Iterator[Text]:
    """Yield texts that begin with a word of the vocabulary."""
    words = opening_words(tokenizer)
    if not words:
        raise ValueError("the tokenizer has no words to begin texts with: give prompts")
    draws = random.Random(seed)
    asks = [Ask(role=ROLE, prompt=draws.choice(words), seed=i, tag="text") for i in range(count)]
    for ask, answer in zip(asks, _answers(engine, store, asks, sampling, seed, "texts"), strict=True):
        if answer:
            yield Text(str(ask.prompt), answer.text)


def _chats(
    engine: Engine, tokenizer: Any, store: Store, turn: str, count: int, sampling: Sampling, seed: int
) -> Iterator[Text]:
    """Yield conversations in which the expert writes the question as well."""
    short = replace(sampling, max_new_tokens=min(QUESTION_TOKENS, sampling.max_new_tokens))
    asks = [Ask(role=ROLE, prompt=turn, seed=i, tag="question", sampling=short) for i in range(count)]
    questions = [each.text.strip() for each in _answers(engine, store, asks, sampling, seed, "questions") if each]
    chats = [[{"role": "user", "content": question}] for question in questions]
    asks = [Ask(role=ROLE, messages=chat, seed=i, tag="answer") for i, chat in enumerate(chats)]
    for chat, answer in zip(chats, _answers(engine, store, asks, sampling, seed, "answers"), strict=True):
        if answer is None:
            continue
        whole = [*chat, {"role": "assistant", "content": answer.text}]
        rendered = without_bos(tokenizer.apply_chat_template(whole, tokenize=False), tokenizer)
        if rendered.startswith(turn):  # else the template depends on later messages
            yield Text(turn, rendered.removeprefix(turn))


def _answers(
    engine: Engine, store: Store, asks: Sequence[Ask], sampling: Sampling, seed: int, title: str
) -> list[Answer | None]:
    rows = [f"{ask.tag}-{ask.seed}" for ask in asks]
    return recorded_answers(
        engine, store, asks, rows=rows, strategy="amateur", sampling=sampling, seed=seed, title=title
    )


def _of_prompt(tokenizer: Any, ask: Ask, answer: Answer) -> Text:
    """Return the answer to a prompt of the user's, with the prompt as the expert read it."""
    messages = list(ask.messages or ())
    if tokenizer.chat_template is None:
        return Text(str(messages[-1]["content"]), answer.text)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Text(without_bos(rendered, tokenizer), answer.text)
