"""The expert's texts: data-free, of the requested number, written once; figures of the report by plain arithmetic."""

import math

import pytest
import torch
import zoo

from contralto import testbed
from contralto.align.amateur.report import compare_models, token_batches
from contralto.align.amateur.texts import Text, opening_words, user_turn, write_texts
from contralto.data_gen.store import Store
from contralto.data_gen.types import Answer, Sampling

SAMPLING = Sampling(max_new_tokens=8, temperature=0.8)


class Echo:
    """An engine that answers with the number of the request, and counts what it was given; `limit` ends it."""

    identity = {"engine": "echo", "model": "echo"}  # noqa: RUF012
    rows_together = 2

    def __init__(self, limit=None):
        self.answered, self.limit = [], limit

    def answer(self, requests):
        for request in requests:
            if request.known:
                continue
            if self.limit is not None and len(self.answered) >= self.limit:
                raise KeyboardInterrupt
            self.answered.append(request)
            prompt = request.prompt if request.prompt is not None else request.messages[-1]["content"]
            yield [(request, Answer(text=f" after {len(prompt)}."))]


def test_half_of_the_texts_are_chats_that_the_expert_begins(tmp_path):
    tokenizer = testbed.tokenizer()
    engine = Echo()
    with Store(tmp_path / "answers.sqlite") as store:
        texts = write_texts(engine, tokenizer, store, count=7, sampling=SAMPLING)
    turn = user_turn(tokenizer)
    chats = [text for text in texts if text.prompt == turn]
    assert (len(texts), len(chats), len(engine.answered)) == (7, 3, 4 + 3 + 3)
    question = f"after {len(turn)}."
    answer = f" after {len(question)}."
    whole = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(whole, tokenize=False)
    assert all(rendered.endswith(text.prompt + text.completion) for text in chats)
    assert {text.prompt for text in texts} - {turn} <= set(opening_words(tokenizer))


def test_an_interrupted_run_asks_for_the_missing_texts_alone(tmp_path):
    tokenizer, first, second, whole = testbed.tokenizer(), Echo(limit=5), Echo(), Echo()
    with Store(tmp_path / "answers.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            write_texts(first, tokenizer, store, count=6, sampling=SAMPLING)
        resumed = write_texts(second, tokenizer, store, count=6, sampling=SAMPLING)
    with Store(tmp_path / "other.sqlite") as store:
        assert write_texts(whole, tokenizer, store, count=6, sampling=SAMPLING) == resumed
    keys = [request.key for request in (*first.answered, *second.answered)]
    assert sorted(keys) == sorted(request.key for request in whole.answered)


def test_prompts_of_the_user_are_answered_in_turn(tmp_path):
    tokenizer = testbed.tokenizer()
    rows = [{"prompt": [{"role": "user", "content": content}]} for content in ("one", "three")]
    with Store(tmp_path / "answers.sqlite") as store:
        texts = write_texts(Echo(), tokenizer, store, count=3, sampling=SAMPLING, rows=rows)
    assert [text.completion for text in texts] == [" after 3.", " after 5.", " after 3."]
    assert all(text.prompt.startswith(user_turn(tokenizer)) for text in texts)


@torch.no_grad()
def test_figures_are_those_of_plain_arithmetic():
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    texts = [Text("Ben went", " out to the barn."), Text("Mia", " saw a fox. Ben went out.")]
    figures = compare_models(expert, amateur, token_batches(tokenizer, texts, max_length=64, batch_size=2))
    nll, other, agree, kl, sizes, changed = [], [], [], [], [], []
    for text in texts:
        start, ids = len(tokenizer(text.prompt)["input_ids"]), tokenizer(text.prompt + text.completion)["input_ids"]
        both = [model.double()(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (expert, amateur)]
        for place in range(start, len(ids)):
            p, q = (logs[place - 1] for logs in both)
            nll.append(-float(p[ids[place]]))
            other.append(-float(q[ids[place]]))
            agree.append(int(p.argmax() == q.argmax()))
            kl.append(sum(math.exp(x) * (x - y) for x, y in zip(p.tolist(), q.tolist(), strict=True)))
            kept = [v for v in range(len(p)) if math.exp(p[v]) >= 0.1 * math.exp(p.max())]
            sizes += [abs(float(p[v] - q[v])) for v in kept]
            best = max(kept, key=lambda v, p=p, q=q: 1.5 * float(p[v]) - 0.5 * float(q[v]))
            changed.append(int(best != int(p.argmax())))
    count = len(nll)
    assert figures.tokens == count
    expected = [math.exp(sum(nll) / count), math.exp(sum(other) / count), sum(agree) / count, sum(kl) / count]
    expected += [sum(sizes) / len(sizes), len(sizes) / count, sum(changed) / count]
    assert list(figures[1:]) == pytest.approx(expected, rel=1e-3)


def test_a_vocabulary_without_words_is_rejected(tmp_path):
    class Numbers:
        all_special_ids, chat_template = (0,), None

        def __len__(self):
            return zoo.VOCAB

        def decode(self, ids):
            return str(ids[0])

    with Store(tmp_path / "answers.sqlite") as store, pytest.raises(ValueError, match="no words to begin texts with"):
        write_texts(Echo(), Numbers(), store, count=2, sampling=SAMPLING)
