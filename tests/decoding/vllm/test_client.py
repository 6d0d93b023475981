"""The client of `contralto serve` against a server that fails: each is a one-line error without the API key.

No vLLM: the server is `serving.Server`.
"""

import asyncio
import gzip
import json

import pytest
from aiohttp import web
from helpers.serving import Server

from contralto.decoding.vllm import PairClient, client, replies

pytestmark = pytest.mark.slow

KEY = "sk-0123456789abcdefghijklmnopqrstuvwxyz"


def generate(raw, *, stream=False, **how):
    """A completion by contrast from a server whose responses `raw` makes."""
    with Server(raw=raw) as server:

        async def go():
            async with PairClient(server.url, "m", api_key=KEY, marker=9, **how) as client:
                if stream:
                    return [piece async for piece in client.stream(["a", "b"], method="cad", max_tokens=4)][-1].output
                return await client.generate(["a", "b"], method="cad", max_tokens=4)

        return asyncio.run(go())


def respond(body, *, status=200, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def raw(request, asked):
        return web.Response(body=data, status=status, headers={n.replace("_", "-"): v for n, v in headers.items()})

    return raw


CHOICE = {"text": " fine", "token_ids": [3, 4], "finish_reason": "stop", "prompt_token_ids": [1], "logprobs": None}


def test_an_answer_is_read():
    assert generate(respond({"choices": [CHOICE]})).text == " fine"
    event = f"data: {json.dumps({'choices': [CHOICE | {'prompt_token_ids': [7] * 100_000}]})}\n\ndata: [DONE]\n\n"
    output = generate(respond(event.encode()), stream=True)
    assert (output.text, output.prompt_tokens) == (" fine", (100_000, 100_000)), "a long event is no error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (
            respond({}, status=307, Location=f"http://other/{KEY}"),
            ValueError,
            r"redirects to http://other/\*\*\*: use that",
        ),
        (respond({"error": {"message": "x" * 990 + KEY}}, status=400), ValueError, r"^x{990}\*\*\*$"),
        (respond(KEY.encode(), status=500), RuntimeError, r"failed with status 500: \*\*\*"),
        (respond(b"[" * 100_000, status=500), RuntimeError, "failed with status 500: "),
    ],
)
def test_a_refusal_is_a_sentence_without_the_key(raw, error, message, stream):
    with pytest.raises(error, match=message) as found:
        generate(raw, stream=stream)
    assert KEY[:12] not in str(found.value)
    assert len(str(found.value)) < 1200


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[" * 100_000,
        b"\xff",
        b"{}",
        {"choices": []},
        {"choices": ["x"]},
        {"choices": [CHOICE | {"token_ids": ["3"]}]},
        {"choices": [CHOICE | {"token_ids": {"3": 4}}]},
        {"choices": [CHOICE | {"text": ["x"]}]},
        {"choices": [CHOICE | {"finish_reason": {}}]},
        {"choices": [CHOICE | {"logprobs": {"content": [{}]}}]},
        {"choices": [CHOICE | {"logprobs": {"token_logprobs": ["low"]}}]},
    ],
)
def test_an_odd_reply_is_a_sentence(body):
    with pytest.raises(RuntimeError, match="sent an unreadable reply"):
        generate(respond(body))
    event = b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"
    if body not in (b"{}", {"choices": []}):  # events without a choice are left out
        with pytest.raises(RuntimeError, match="sent an unreadable reply"):
            generate(respond(event), stream=True)


@pytest.mark.parametrize(
    ("base_url", "api_key"),
    [
        (f"http://me:{KEY}@127.0.0.1:9/v1", None),
        (f"http://127.0.0.1:9/v1?api-key={KEY}", None),
        (f"http://127.0.0.1:9/v1#{KEY}", None),
        ("http://127.0.0.1:9/v1", f"{KEY}\nX-Other: 1"),
        ("http://127.0.0.1:9/v1", f"{KEY}€"),
    ],
)
def test_what_would_show_a_secret_is_refused_without_it(base_url, api_key):
    with pytest.raises(ValueError, match=r"^(base_url|api_key) ") as found:
        client.PairClient(base_url, "m", api_key=api_key)
    assert KEY[:8] not in str(found.value)


def test_a_page_instead_of_json_is_shown():
    with pytest.raises(RuntimeError, match=r"the reply is not JSON: text/html, '<html>\*\*\*</html>'"):
        generate(respond(f"<html>{KEY}</html>".encode(), Content_Type="text/html"))


def test_replies_have_a_limit(monkeypatch):
    for module in (client, replies):
        monkeypatch.setattr(module, "MOST_BYTES", 2**20)
        monkeypatch.setattr(module, "LONGEST_EVENT", 2**18)
    bomb = respond(gzip.compress(b" " * 2**24), Content_Encoding="gzip")
    with pytest.raises(RuntimeError, match="larger than 1,048,576 bytes"):
        generate(bomb)
    with pytest.raises(RuntimeError, match="a stream in Content-Encoding 'gzip'"):
        generate(bomb, stream=True)
    with pytest.raises(RuntimeError, match="a line of the stream is longer than 262,144 bytes"):
        generate(respond(b"data: " + b" " * 2**21), stream=True)
    with pytest.raises(RuntimeError, match="the stream is longer than 1,048,576 bytes"):
        generate(respond(b": ping\n" * 2**18), stream=True)


def test_a_server_that_does_not_answer():
    async def raw(request, body):
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match=r"did not answer in time \(timeout: 0.2 s\)"):
        generate(raw, timeout=0.2)
    with pytest.raises(ValueError, match="timeout must be above 0 and finite"):
        PairClient("http://h", "m", timeout=0)


def test_a_server_without_a_marker():
    with Server() as server:

        async def go():
            async with PairClient(server.url, "m") as client:
                await client.generate(["a", "b"], method="cad")

        with pytest.raises(ValueError, match="returns no marker token, so it is not a server of contralto serve"):
            asyncio.run(go())
