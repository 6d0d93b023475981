"""The real server process of `contralto serve`: its client, raw requests, streams, and 20 invalid requests."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time

import aiohttp
import pytest
from engines import EOS, MARKER, has_ended, model64, oracle, prompts

from contralto.decoding.vllm import PairClient

pytestmark = pytest.mark.runner("v1")
LENGTH = 16
KEY = "open sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HOW = {"method": "cad", "alpha": 1.0}
SERVE = "import sys; from contralto.cli.serve import run; run(sys.argv[1:])"
FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "256",
    "--block-size",
    "32",
    "--max-num-seqs",
    "17",
]
FLAGS += ["--max-num-batched-tokens", "128", "--contrast-timeout", "2"]


@pytest.fixture(scope="module")
def server(expert, tmp_path_factory):
    """Its address, without /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-c", SERVE, expert, "--port", str(port), "--api-key", KEY, *FLAGS]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        yield asyncio.run(_ready(f"http://127.0.0.1:{port}", process, log))
    finally:
        process.terminate()
        process.wait(60)


async def _ready(url, process, log):
    end = time.monotonic() + 400
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and process.poll() is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return url
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")


def ask(server, expert, work):
    """Run `work(client)`."""

    async def go():
        async with PairClient(f"{server}/v1", expert, api_key=KEY) as client:
            return await work(client)

    return asyncio.run(go())


def check(expert, some, found, **how):
    for branches, output in zip(some, found, strict=True):
        text, logs = oracle([model64(expert)] * 2, branches, output.tokens, **{**HOW, **how})
        assert output.tokens == text
        assert has_ended(output, LENGTH)
        assert output.rounds == 1
        for mine, theirs in zip(output.logprobs, logs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
        assert output.prompt_tokens == tuple(map(len, branches))


def test_many_at_once(server, expert):
    some = prompts(20)

    async def work(client):
        return await asyncio.gather(*(client.generate(each, max_tokens=LENGTH, **HOW) for each in some))

    found = ask(server, expert, work)
    check(expert, some, found)
    assert {output.finish_reason for output in found} == {"stop", "length"}


def test_one_at_a_time(server, expert):
    some = prompts(6)

    async def work(client):
        return [await client.generate(each, max_tokens=LENGTH, **HOW) for each in some]

    check(expert, some, ask(server, expert, work))


def test_streams(server, expert):
    """Many at once; every piece is a part of the text, in order."""
    some = prompts(6)

    async def one(client, each):
        return [piece async for piece in client.stream(each, max_tokens=LENGTH, **HOW)]

    async def work(client):
        return await asyncio.gather(*(one(client, each) for each in some))

    for pieces, each in zip(ask(server, expert, work), some, strict=True):
        output = pieces[-1].output
        check(expert, [each], [output])
        assert "".join(piece.text for piece in pieces) == output.text
        assert [token for piece in pieces for token in piece.tokens if token != EOS] == [
            t for t in output.tokens if t != EOS
        ]
        assert len(pieces) > 2


def test_texts_and_conversations(server, expert):
    """The server reads texts and chats as its tokenizer does."""
    chat = [{"role": "user", "content": "Mia has 3 coins. She finds 4. How many coins?"}]
    other = [{"role": "user", "content": "How many coins?"}]

    async def work(client):
        chats = await client.generate([chat, other], max_tokens=LENGTH, **HOW)
        pieces = [piece async for piece in client.stream([chat, other], max_tokens=LENGTH, **HOW)]
        texts = await client.generate(["Ben went", "went"], max_tokens=LENGTH, **HOW)
        return chats, pieces, texts

    chats, pieces, texts = ask(server, expert, work)
    assert pieces[-1].output.tokens == chats.tokens
    assert "".join(piece.text for piece in pieces) == chats.text
    assert chats.text.strip()
    assert len(texts.tokens) == LENGTH
    assert len(chats.logprobs[1]) == len(chats.tokens)


def test_grammar_and_sampling(server, expert):
    choices = {"structured_outputs": {"choice": ["▁barn", "▁old▁river"]}}

    async def work(client):
        chosen = [await client.generate(each, max_tokens=LENGTH, main_body=choices, **HOW) for each in prompts(3)]
        drawn = [await client.generate(prompts(2)[1], max_tokens=8, temperature=1.5, seed=s, **HOW) for s in (1, 2, 1)]
        return chosen, drawn

    chosen, drawn = ask(server, expert, work)
    assert {output.text.strip() for output in chosen} <= {"barn", "old river"}
    assert drawn[0] == drawn[2]
    assert drawn[0].tokens != drawn[1].tokens


GOOD = {"contrast_id": "x", "contrast_branch": 0, "contrast_marker": MARKER, "contrast_method": "cad"}


def body(expert, values=(), **fields):
    given = {n: v for n, v in {**GOOD, **dict(values)}.items() if v is not None}
    base = {"model": expert, "prompt": "Ben went", "max_tokens": 4, "temperature": 0, "stop_token_ids": [MARKER]}
    return {**base, "return_token_ids": True, "vllm_xargs": given, **fields}


def post(server, *bodies, pause=0.0, headers=HEADERS):
    """The statuses and answers of requests that are sent together, or one after a pause."""

    async def one(session, wait, content):
        await asyncio.sleep(wait)
        async with session.post(f"{server}/v1/completions", json=content) as response:
            return response.status, json.loads(await response.text())

    async def go():
        async with aiohttp.ClientSession(headers=headers) as session:
            return await asyncio.gather(*(one(session, i * pause, content) for i, content in enumerate(bodies)))

    return asyncio.run(go())


@pytest.mark.parametrize("pause", [0.0, 0.05, 1.0])
def test_the_other_request_comes_late(server, expert, pause):
    two = [body(expert, {"contrast_branch": b, "contrast_alpha": 1.0}, prompt=prompts(2)[1][b]) for b in (0, 1)]
    for some in (two, two[::-1]):
        answers = post(server, *some, pause=pause)
        assert [status for status, _ in answers] == [200, 200]
        tokens = [answer["choices"][0]["token_ids"] for _, answer in answers]
        assert tokens[0] == tokens[1] == oracle([model64(expert)] * 2, prompts(2)[1], tokens[0], **HOW)[0]


MISTAKES = {
    "no partner": ([({}, {})], "branch 1 did not arrive within 2 seconds"),
    "no id": ([({"contrast_id": None}, {})], "needs contrast_id"),
    "no marker": ([({"contrast_marker": None}, {})], "needs contrast_marker"),
    "an unknown branch": ([({"contrast_branch": 5}, {})], "contrast_branch must be 0 or 1"),
    "an unknown role": ([({"contrast_branch": "main"}, {})], "contrast_branch must be a whole number"),
    "an unknown method": ([({"contrast_method": "search"}, {})], "contrast_method must be one of"),
    "an unknown form": ([({"contrast_form": "li"}, {})], "contrast_form of cad must be left out"),
    "another's parameter": ([({"contrast_lam": 1.0}, {})], "cad has no contrast_lam"),
    "a negative strength": ([({"contrast_alpha": -1.0}, {})], "alpha must be"),
    "a word for a number": ([({"contrast_alpha": "much"}, {})], "contrast_alpha must be a number"),
    "a top-p above 1": ([({"contrast_temperature": 1.0, "contrast_top_p": 2.0}, {})], "contrast_top_p must lie in"),
    "top-k without temperature": ([({"contrast_top_k": 3}, {})], "set contrast_temperature above 0"),
    "n=2": ([({}, {"n": 2}), ({"contrast_branch": 1}, {"n": 2})], "n must be 1"),
    "vLLM's sampling": (
        [({}, {"temperature": 1}), ({"contrast_branch": 1}, {"temperature": 1})],
        "temperature must be 0",
    ),
    "no temperature": (
        [({}, {"temperature": None}), ({"contrast_branch": 1}, {"temperature": None})],
        "temperature must be 0",
    ),
    "a penalty": (
        [({}, {"repetition_penalty": 1.1}), ({"contrast_branch": 1}, {"repetition_penalty": 1.1})],
        "must be 1.0",
    ),
    "a marker that ends nothing": (
        [({}, {"stop_token_ids": []}), ({"contrast_branch": 1}, {"stop_token_ids": []})],
        "stop_token_ids must contain contrast_marker 0",
    ),
    "unequal max_tokens": (
        [({}, {}), ({"contrast_branch": 1}, {"max_tokens": 9})],
        "the branches differ in max_tokens (4 and 9)",
    ),
    "the same branch twice": ([({}, {}), ({}, {})], "two requests have branch 0"),
    "other parameters": (
        [({"contrast_alpha": 1.0}, {}), ({"contrast_branch": 1, "contrast_alpha": 2.0}, {})],
        "the branches differ in contrast_alpha (1.0 and 2.0)",
    ),
    "other methods": ([({}, {}), ({"contrast_branch": 1, "contrast_method": "cfg"}, {})], "differ in contrast_method"),
    "several prompts": ([({}, {"prompt": ["a", "b"]})], "one prompt, not 2"),
    "prompts longer than a step": (
        [({}, {"prompt": [20] * 70}), ({"contrast_branch": 1}, {"prompt": [20] * 70})],
        "its prompts have 140 tokens, but a step processes at most 128: raise max_num_batched_tokens",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_status_400(server, expert, name):
    requests, message = MISTAKES[name]
    bodies = [
        body(expert, {**values, "contrast_id": values.get("contrast_id", name)}, **fields)
        for values, fields in requests
    ]
    for status, answer in post(server, *bodies):
        assert status == 400, answer
        assert message in answer["error"]["message"]
    if name == "prompts longer than a step":  # where the answer is a stream, too
        for status, answer in post(server, *({**each, "stream": True} for each in bodies)):
            assert status == 400
            assert answer["error"]["message"].startswith(
                "the engine rejected this request: its prompts do not fit a step"
            )


def test_strangers_are_turned_away_before_they_wait(server, expert):
    two = [body(expert, {"contrast_branch": b}) for b in (0, 1)]
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        start = time.monotonic()
        assert [status for status, _ in post(server, *two, two[0], headers=headers)] == [401] * 3
        assert time.monotonic() - start < 1.5  # seconds; a half waits for two
    assert [status for status, _ in post(server, *two)] == [200, 200]


def test_the_engine_is_told_ids_of_its_own(server, expert):
    """Texts of equal ids that end at different times, and ids of both types."""
    for name in (0, "0", ""):
        two = [body(expert, {"contrast_branch": b, "contrast_id": name}) for b in (0, 1)]
        assert [status for status, _ in post(server, *two)] == [200, 200]
    mixed = [body(expert, {"contrast_branch": b, "contrast_id": name}) for b, name in ((0, 1), (1, "1"))]
    assert [status for status, _ in post(server, *mixed)] == [400, 400]


def test_it_goes_on_serving(server, expert):
    """After all mistakes: plain requests, and texts."""
    (status, answer), *_ = post(server, {k: v for k, v in body(expert).items() if k != "vllm_xargs"})
    assert (status, len(answer["choices"][0]["token_ids"])) == (200, 4)
    some = prompts(2)

    async def work(client):
        with pytest.raises(ValueError, match="contrast_alpha must be a number"):
            await client.generate(some[0], method="cad", alpha="much")
        with pytest.raises(ValueError, match="its prompts have 140 tokens"):
            await client.generate([[20] * 70] * 2, method="cad")
        return await asyncio.gather(*(client.generate(each, max_tokens=LENGTH, **HOW) for each in some))

    check(expert, some, ask(server, expert, work))
