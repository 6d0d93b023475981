"""Malformed replies: each fails its own request with a reason; the others are recorded.

The server is real (`serving`), and sends what a broken, a hostile or merely another endpoint sends.
"""

import asyncio
import gzip
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest
import yaml
from aiohttp import web
from helpers.serving import Server, words

from contralto import cli
from contralto.common.texts import Secrets, has_lone_surrogate, short
from contralto.common.web import retry_after
from contralto.data_gen import pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.checks import check_settings
from contralto.data_gen.engines import FunctionEngine, outcomes
from contralto.data_gen.engines import openai as engines_openai
from contralto.data_gen.engines.limiter import Limiter
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.outcomes import MOST_TOKENS, checked
from contralto.data_gen.ranges import check_number
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.strategies.verdicts import compare_answers
from contralto.data_gen.types import Answer, Ask, Failure, Pair, Rejected, Sampling, drive, make_request

pytestmark = pytest.mark.slow

KEY = "sk-0123456789abcdefghijklmnopqrstuvwxyz"
DEEP = "[" * 100_000
GOOD = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}


def request_for(text="?", **sampling):
    ask = Ask(role="r", messages=[{"role": "user", "content": text}])
    return make_request(ask, engine={}, sampling=Sampling(max_new_tokens=16, **sampling), seed=0, row=text)


def respond(body=None, *, status=200, **headers):
    """A response maker: JSON, a string or bytes, for requests that say "odd"."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}

    async def raw(request, asked):
        return web.Response(body=data, status=status, headers=headers) if "odd" in str(asked) else None

    return raw


def asked_odd(raw, *, key=None, **how):
    """What became of an odd request, and of a good one beside it; the retries do not pause."""
    with Server(raw=raw) as server:
        engine = OpenAIEngine(
            **{"base_url": server.url, "model": "m", "key_env": key, "attempts": 2, "timeout": 5} | how
        )
        engine._pause = lambda attempt: 0.0
        odd, good = request_for("odd", logprobs=True), request_for("good")
        found = {request.key: said for some in engine.answer([odd, good]) for request, said in some}
        assert found[good.key].text == words(next(s.body for s in server.seen if "odd" not in str(s.body)))
        return found[odd.key], sum("odd" in str(seen.body) for seen in server.seen)


def choice(content=None, finish_reason="stop", usage=None, **message):
    return {
        "choices": [{"message": {"role": "assistant", "content": content} | message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 16} if usage is None else usage,
    }


# --------------------------------------------------------------------------------------------------- replies without text


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (choice(None, "length"), r"^no text \(finish_reason length after 16 tokens\)$"),
        (choice(""), "no text .*finish_reason stop"),
        (choice(" \n\t"), "no text"),
        (choice("\u200b\u2003 ".strip("\u200b")), "no text"),
        (choice(None, refusal="I will not."), r"the model refused \(I will not.\): no text"),
        (choice(None, "tool_calls", tool_calls=[{"id": "1"}]), "called tools instead of answering"),
        (choice("", "length", reasoning_content="Let me think"), "only reasoning: raise max_new_tokens"),
        (choice(None, reasoning="Hm"), "contains only reasoning"),
        (choice("As I was say", "content_filter"), "cut off by content_filter after 16 tokens"),
        (choice("As I was say", "abort"), "cut off by abort"),
        (choice("As I was say", "ERROR"), "cut off by ERROR"),
        (choice([], "length"), "no text"),
    ],
)
def test_a_reply_without_text_is_a_failure_that_says_why(reply, reason):
    """Asked once: it was paid for, and would come again."""
    said, count = asked_odd(respond(reply))
    assert isinstance(said, Failure)
    assert re.search(reason, said.reason)
    assert count == 1


def test_content_in_parts_is_read():
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "four"}, {"type": "text", "text": "teen"}]
    said, _ = asked_odd(respond(choice(parts)))
    assert said.text == "fourteen"


def test_a_cut_answer_stays_one_and_says_so():
    said, _ = asked_odd(respond(choice("It is fo", "length")))
    assert (said.text, said.is_cut, said.is_whole) == ("It is fo", True, False)


def test_no_engine_s_empty_answer_becomes_a_pair(folder):
    """Local engines, functions and endpoints alike; and a strategy that makes an empty answer itself has no pair."""
    (folder / "strategies.py").write_text(STRATEGY + "def silent(request):\n    return ' '\n")
    results = run(folder, {"engine": "function", "use": "strategies:silent"})
    assert {result.failed for result in results} == {"target: no text (finish_reason stop after 0 tokens)"}

    def emptied(row):
        yield Ask(role="r", prompt="?")
        return [Pair(prompt=[], chosen=" ", rejected=""), Pair(prompt=[], chosen="a", rejected="")]

    driven = drive(emptied({}))
    next(driven)
    with pytest.raises(StopIteration) as end:
        driven.send([Answer(text="x")])
    assert end.value.value == [
        Rejected("the chosen and the rejected answer of the pair is empty"),
        Rejected("the rejected answer of the pair is empty"),
    ]


@pytest.mark.slow
def test_pairs_with_a_cut_answer_are_counted(folder, capsys):
    """They stay, since a filter drops them where it is asked to; but not without a word."""

    async def raw(request, asked):
        number = asked["messages"][0]["content"][-1]
        return web.json_response(choice(f"the sum {number}", "length" if number in "13" else "stop"))

    with Server(raw=raw) as server:
        path = write(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": None})
        recipe = yaml.safe_load(path.read_text()) | {"strategies": ["stronger_preferred"]}
        recipe["roles"]["stronger"] = {"engine": "function", "use": "strategies:echo"}
        path.write_text(yaml.safe_dump(recipe))
        assert cli.main(["data", "run", str(path)]) == 0
        assert "2 pairs with an answer that was cut off at max_new_tokens" in capsys.readouterr().out
        path.write_text(yaml.safe_dump(recipe | {"checks": {"finish": {}}, "filters": {"finished": True}}))
        assert cli.main(["data", "export", str(path)]) == 0
        out = capsys.readouterr().out
        assert "2 pairs, 0 rejected, 0 failed, 2 dropped by filters" in out
        assert "cut off" not in out


def test_a_judge_that_was_cut_off_has_no_verdict():
    """It may have been about to weigh the other side."""
    comparing = compare_answers({"id": "1", "prompt": [{"role": "user", "content": "?"}]}, "one", "other")
    next(comparing)
    cut = Answer(text="Judging by length alone: Verdict: A", finish_reason="length")
    brief = Answer(text="Verdict: B", finish_reason="length")  # all that one token more would have added is its end
    with pytest.raises(StopIteration) as end:
        comparing.send([cut, brief])
    assert end.value.value.winner is None
    assert end.value.value.verdicts == (None, "first")


# -------------------------------------------------------------------------------------------------------------- odd replies


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (respond(DEEP), "RecursionError"),
        (respond(DEEP, status=500), r"status 500: \[\[\["),
        (respond(choice("x", usage={"prompt_tokens": "three"})), "prompt_tokens is 'three', not a whole number"),
        (
            respond('{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}'),
            "inf, not a whole",
        ),
        (
            respond(choice("x", usage={"completion_tokens": 10**20})),
            "completion_tokens is 1000.*not a number of tokens",
        ),
        (respond(choice("x", usage={"completion_tokens": -1})), "not a number of tokens"),
        (respond(choice("x", usage={"completion_tokens": True})), "True, not a whole number"),
        (respond(choice("x", usage=[1])), "not a reply of the OpenAI protocol"),
        (respond(choice("x", {"type": "stop"})), "finish_reason is a value of type dict"),
        (respond({"choices": [choice("x")["choices"][0] | {"logprobs": {"content": [{"logprob": "low"}]}}]}), "'low'"),
        (respond({"choices": [choice("x")["choices"][0] | {"logprobs": {"content": 5}}]}), "OpenAI protocol"),
        (respond('{"choices": [{"message": {"content": "x"}, "logprobs": {"token_logprobs": [NaN]}}]}'), "is NaN"),
        (respond({"choices": {"0": 1}}), "OpenAI protocol"),
        (respond("9" * 5000), "integer string conversion"),
        (respond(b"\xff\xfe\xfd"), "not UTF-8"),
        (respond(choice("x"), Content_Encoding="br"), "'br', which was not asked for"),
        (respond(choice("x"), Content_Encoding="gzip"), "not compressed as its Content-Encoding says"),
        (respond(gzip.compress(b"{}" * 99)[:20], Content_Encoding="gzip"), "the gzip of the reply is cut off"),
        (respond(b"", status=204), "^status 204, with an empty reply$"),
        (respond(b" ", Content_Type="text/html"), "the reply is empty, not JSON: text/html"),
        (respond("<html>Sign in</html>", Content_Type="text/html"), "not JSON: text/html, '<html>Sign in</html>'"),
        (respond(f"data: {json.dumps(GOOD)}\n\n", Content_Type="text/event-stream"), "text/event-stream, 'data: {"),
        (respond('{"choices": [{"mess'), r"not JSON from character \d+ on: application/json, '{\"choices"),
    ],
)
def test_an_odd_reply_is_its_request_s_failure(raw, reason):
    said, _ = asked_odd(raw)
    assert isinstance(said, Failure), said
    assert re.search(reason, said.reason), said.reason
    assert len(said.reason) < 400


@pytest.mark.parametrize(
    "headers",
    [{"Content_Type": "application/json; charset=hex"}, {"Content_Type": "text/x; charset=no-such"}, {"X_Odd": "\xe9"}],
)
def test_headers_do_not_matter_to_an_answer(headers):
    said, _ = asked_odd(respond(choice("f\u00fcnf"), **headers))
    assert said.text == "f\u00fcnf"


def test_a_compressed_answer_is_read():
    for name, data in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        said, _ = asked_odd(respond(data(json.dumps(choice("fine")).encode()), Content_Encoding=name))
        assert said.text == "fine"


def test_the_status_of_a_failure_stays_visible(folder, capsys):
    """Other numbers in the words of an endpoint are left out of what is counted."""

    async def raw(request, asked):
        number = int(asked["messages"][0]["content"][-1])
        body = {"error": {"message": f"limit of {1000 + number}"}}
        return web.json_response(body, status=429) if number % 2 else web.Response(status=204)

    with Server(raw=raw) as server:
        path = write(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": None, "attempts": 1})
        cli.main(["data", "run", str(path)])
        capsys.readouterr()
        assert cli.main(["data", "status", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 times: target: status 429: limit of … (after 1 attempts)" in out
    assert "2 times: target: status 204, with an empty reply" in out


def test_every_string_can_be_recorded(folder):
    """Lone surrogates in an answer, its finish reason, an error: recorded, exported. NUL is a character like others."""
    replies = {
        "0": choice("a\ud800b\x00c"),
        "1": choice("x", "st\udfffop"),
        "2": {"error": {"message": "no \ud800 here"}},
        "3": choice("fine"),
    }

    async def raw(request, asked):
        number = asked["messages"][0]["content"][-1]
        return web.json_response(replies[number], status=400 if number == "2" else 200)

    with Server(raw=raw) as server:
        results = run(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": None})
    assert [result.answered[0][1].text if result.answered else None for result in results] == [
        "a\ufffdb\x00c",
        "x",
        None,
        "fine",
    ]
    assert results[1].answered[0][1].finish_reason == "st\ufffdop"
    assert results[2].failed == "target: status 400: no \ufffd here"
    assert cli.main(["data", "export", str(folder / "recipe.yaml")]) == 0
    [line] = (folder / "recipe/dataset/failed.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == results[2].failed


def test_a_row_with_half_a_character_costs_its_row(folder):
    """Wherever it stands, in the first row or a later one."""
    rows = [{"id": "a\ud800", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "c", "prompt": "x\udc00"}]
    rows += [{"id": "d", "prompt": "four", "more": {"deep": ["\ud999"]}}, {"id": "e", "prompt": "five"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run(folder, {"engine": "function", "use": "strategies:echo"})
    assert [bool(result.failed) for result in results] == [False, False, True, True, False]
    assert results[0].row["id"] == "a\\ud800", "an id is written with its escape"
    assert "lone surrogate" in results[2].failed
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows[1:3])))
    assert [bool(result.failed) for result in run(folder, {"engine": "function", "use": "strategies:echo"})] == [
        True,
        False,
    ]


def mutated(rng):
    """A reply that is nearly one: a value put somewhere in it, or bytes changed."""
    values = [None, "", "x", -1, 0, 10**30, 1.5, True, [], {}, [[]], "\ud800", [None], {"a": {}}, "0" * 9999]
    body = json.loads(json.dumps(choice("fine") | {"id": "1"}))
    body["choices"][0]["logprobs"] = {"content": [{"token": "f", "logprob": -0.5}]}
    places = []

    def walk(value):
        for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, name))
            walk(value[name])

    walk(body)
    for _ in range(rng.randint(1, 2)):
        holder, name = rng.choice(places)
        holder[name] = rng.choice(values)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    return bytes(data)


HEADERS = [
    {"Content-Type": "application/json; charset=rot13"},
    {"Content-Type": "\xff"},
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "zstd"},
    {"Retry-After": "inf"},
    {"Retry-After": "-3"},
    {"Location": "http://[::1"},
    {},
]


def test_no_reply_ends_a_run(tmp_path, monkeypatch):
    """Some hundred near-replies, seeded: each request has an outcome that the store can hold, and a reason that can be read."""
    rng = random.Random(13)
    monkeypatch.setattr(engines_openai, "LONGEST_HOLD", 0.0)
    made = [(mutated(rng), rng.choice([200] * 6 + [201, 400, 429, 500, 599]), rng.choice(HEADERS)) for _ in range(300)]

    async def raw(request, asked):
        data, status, headers = made[int(asked["messages"][0]["content"])]
        return web.Response(body=data, status=status, headers=headers)

    requests = [request_for(str(i), logprobs=i % 2 == 0) for i in range(len(made))]
    with Server(raw=raw) as server, Store(tmp_path / "answers.sqlite") as store:
        engine = OpenAIEngine(base_url=server.url, model="m", key_env=None, attempts=1, timeout=20)
        said = {r.key: (r, s) for some in engine.answer(requests) for r, s in some}
        assert len(said) == len(made)
        store.record([(TrackedRequest(request=r, row="a", strategy="s", role="r"), s) for r, s in said.values()])
        kept = store.get([request.key for request in requests])
    assert kept == {key: s for key, (_, s) in said.items()}
    failed = [s for s in kept.values() if isinstance(s, Failure)]
    assert 60 < len(failed) < 280
    assert all(s.reason.strip() and len(s.reason) < 400 for s in failed)
    assert all(s.text.strip() for s in kept.values() if isinstance(s, Answer))


def test_batch_files_take_odd_lines(folder, capsys):
    """Every line is its own: those that can be read are recorded."""
    path = write(folder, {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": None})
    asked, said = folder / "asked.jsonl", folder / "said.jsonl"
    assert cli.main(["data", "batch", str(path), "--role", "target", "--write", str(asked)]) == 0
    ids = [json.loads(line)["custom_id"] for line in asked.read_text().splitlines()]
    bodies = [choice(None, "length"), choice("two\u2028lines"), choice("x", {"a": 1}), {"choices": 3}]
    lines = [{"custom_id": i, "response": {"status_code": 200, "body": b}} for i, b in zip(ids, bodies, strict=True)]
    text = (
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        + "\n"
        + DEEP
        + '\n{"custom_id": ["x"]}\n{"cut'
    )
    said.write_text(text)
    capsys.readouterr()
    assert cli.main(["data", "batch", str(path), "--role", "target", "--read", str(said)]) == 0
    out, err = capsys.readouterr()
    assert "1 answer, 3 failed, 0 not asked for" in out
    assert "3 lines could not be read, the first of them" in err
    with Store(folder / "recipe/answers.sqlite") as store:
        assert sum(isinstance(each, Answer) for each in store.get(ids).values()) == 1


# ------------------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e9", 1e9),
        ("inf", float("inf")),
        ("-5", 0),
        ("nan", 0),
        ("soon", 0),
        ("", 0),
        ("Thu, 01 Jan 2099 00:00:00 GMT", 4070908800 - 1e9),
        ("Sat, 01 Jan 2000 00:00:00 GMT", 0),
        ("Thu, 01 Jan 99999 00:00:00 GMT", 0),
        ("Fri, 32 Foo 2099", 0),
    ],
)
def test_what_retry_after_says(said, seconds):
    assert retry_after({"Retry-After": said}, now=1e9) == seconds


def within(seconds, engine, requests):
    """The outcomes of an engine that has to come to an end."""
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(o for some in engine.answer(requests) for o in some), daemon=True
    )
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return found


@pytest.mark.parametrize("asked", ["inf", "1e9", "Thu, 01 Jan 2099 00:00:00 GMT"])
def test_an_endpoint_cannot_ask_to_wait_for_ever(asked, monkeypatch, caplog):
    """The wait is bounded, and said once."""
    monkeypatch.setattr(engines_openai, "LONGEST_HOLD", 0.2)
    monkeypatch.setattr(engines_openai, "LOGGED_HOLD", 0.1)
    count = {"odd": 0}

    async def raw(request, body):
        count["odd"] += 1
        return web.Response(status=429, headers={"Retry-After": asked}) if count["odd"] == 1 else None

    with Server(raw=raw) as server:
        engine = OpenAIEngine(base_url=server.url, model="m", key_env=None)
        engine._pause = lambda attempt: 0.0
        start = time.monotonic()
        [(_, said)] = within(4, engine, [request_for()])
        assert isinstance(said, Answer)
        assert time.monotonic() - start > 0.15
    assert caplog.text.count("no requests are sent to it for 0.2 s") <= 1


def test_a_long_wait_is_said(caplog):
    engine = OpenAIEngine(base_url="http://host/v1", model="m", key_env=None)
    limiter = Limiter()
    for asked in (float("inf"), 1e9):
        engine._hold(limiter, asked)
    [record] = caplog.records
    assert record.getMessage() == "http://host/v1 asks to wait inf s: no requests are sent to it for 300 s"


def test_stopping_gives_up_what_waits_and_keeps_what_is_under_way():
    """A request in its pause ends without an outcome; one that the server works on is answered."""
    is_asked = threading.Event()

    async def raw(request, body):
        if "odd" in str(body):
            return web.Response(status=429, headers={"Retry-After": "1e9"})
        is_asked.set()
        await asyncio.sleep(0.3)
        return None

    with Server(raw=raw) as server:
        engine = OpenAIEngine(base_url=server.url, model="m", key_env=None, concurrency=2)
        good = request_for("good")
        threading.Thread(target=lambda: (is_asked.wait(10), time.sleep(0.1), engine.stop()), daemon=True).start()
        found = within(5, engine, [good, request_for("odd")])
    assert [request.key for request, _ in found] == [good.key]


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["inf", "Thu, 01 Jan 2099 00:00:00 GMT"])
def test_one_ctrl_c_ends_a_run_that_waits(folder, asked):
    async def raw(request, body):
        return web.Response(status=429, headers={"Retry-After": asked})

    with Server(raw=raw) as server:
        path = write(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": None})
        command = [sys.executable, "-m", "contralto", "data", "run", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
        while not server.seen and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "no requests are sent to it for 300 s" in out + err
    with Store(folder / "recipe/answers.sqlite") as store:
        assert list(store.failures()) == [], "the rows have not failed: they were not answered"


# -------------------------------------------------------------------------------------------------------------------- secrets


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    return "MY_KEY"


def parts_of_key(text):
    """Runs of the key that are too long to be chance."""
    return [KEY[i : i + 8] for i in range(len(KEY) - 7) if KEY[i : i + 8] in text]


@pytest.mark.parametrize("pad", [0, 250, 270, 285, 297])
@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_is_hidden_before_an_error_is_cut(key, pad, status):
    for body in ({"error": {"message": "x" * pad + KEY}}, "y" * pad + KEY, {"detail": ["z" * pad, KEY]}):
        said, _ = asked_odd_or_all(respond(body, status=status), key=key)
        assert parts_of_key(said.reason) == []
        assert len(said.reason) < 500


def asked_odd_or_all(raw, **how):
    """As `asked_odd`, where a refusal may end the other request, too."""
    with Server(raw=raw) as server:
        engine = OpenAIEngine(
            base_url=server.url, model="m", key_env=how.pop("key"), attempts=1, timeout=5, concurrency=1, **how
        )
        [[(_, said)]] = engine.answer([request_for("odd")])
        return said, server.seen


@pytest.mark.parametrize(
    "raw",
    [
        respond({}, status=302, Location=f"https://elsewhere.example/{KEY}/v1?k={KEY}"),
        respond({}, status=307, Location=f"https://me:{KEY}@elsewhere.example/v1"),
        respond({}, status=308, Location="x" * 290 + KEY),
        respond(choice(None, refusal=f"never: {KEY}")),
        respond({"choices": KEY}),
        respond(choice("x", usage={"prompt_tokens": KEY})),
        respond(b"x", Content_Encoding=KEY),
        respond("<p>" + "x" * 100 + KEY, Content_Type="text/html"),
        respond("<p>", Content_Type="a" * 50 + KEY),
    ],
)
def test_a_key_is_in_no_failure(key, raw):
    said, _ = asked_odd_or_all(raw, key=key)
    assert isinstance(said, Failure)
    assert parts_of_key(said.reason) == []


def test_a_key_is_in_no_answer(key):
    said, _ = asked_odd(respond(choice(f"You are Bearer {KEY}!", f"because {KEY}")), key=key)
    assert (said.text, said.finish_reason) == ("You are Bearer ***!", "because ***")


def test_a_placeholder_is_a_word_in_answers(monkeypatch):
    monkeypatch.setenv("MY_KEY", "EMPTY")
    said, _ = asked_odd(respond(choice("The set is EMPTY.")), key="MY_KEY")
    assert said.text == "The set is EMPTY."


def test_what_is_secret_in_a_redirect_is_not_shown(key):
    location = "https://me:swordfish@elsewhere.example/v1/chat?signature=sesame#mellon"
    said, _ = asked_odd_or_all(respond({}, status=302, Location=location), key=key)
    assert "redirects to https://elsewhere.example/v1/chat:" in said.reason
    assert not any(word in said.reason for word in ("me:", "swordfish", "sesame", "mellon"))


def test_a_redirect_does_not_get_the_key(key):
    with Server() as other:

        async def raw(request, body):
            return web.Response(status=307, headers={"Location": other.url + "/chat/completions"})

        said, seen = asked_odd_or_all(raw, key=key)
        assert said.stops
        assert other.url in said.reason
        assert other.seen == []
        assert len(seen) == 1


@pytest.mark.parametrize(
    "key_env", [KEY, "hf_AbCdEfGhIjKl", "abc", "AKIA0123456789ABCDEF", 5, ["x"], "x" * 10_000, "A\0B"]
)
def test_a_key_in_place_of_its_name_is_refused_and_not_repeated(folder, key_env, capsys):
    path = write(folder, {"engine": "openai", "base_url": "http://h/v1", "model": "m", "key_env": key_env})
    for action in ("run", "export", "status"):
        assert cli.main(["data", action, str(path)]) == 2
        err = capsys.readouterr().err
        assert "key_env must be the name of an environment variable that is set" in err
        assert str(key_env) not in err or key_env == 5


def test_a_key_that_is_not_set_is_refused_before_anybody_is_asked(folder, monkeypatch, capsys):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with Server() as server:
        path = write(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": "NO_SUCH_KEY"})
        for value in (None, "", "  "):
            if value is not None:
                monkeypatch.setenv("NO_SUCH_KEY", value)
            assert cli.main(["data", "run", str(path)]) == 2
            assert "key_env names NO_SUCH_KEY, but that environment variable is not set" in capsys.readouterr().err
        monkeypatch.setenv("NO_SUCH_KEY", "two\nlines")
        assert cli.main(["data", "run", str(path)]) == 2
        assert "cannot be sent in a header" in capsys.readouterr().err
        assert server.seen == []
        assert cli.main(["data", "estimate", str(path)]) == 0, "what asks nobody needs no key"


@pytest.mark.parametrize(
    "how",
    [
        {"base_url": f"https://host/{KEY}/v1"},
        {"served_by": KEY},
        {"extra_body": {"metadata": {"who": KEY}}},
    ],
)
def test_a_key_in_an_option_is_refused_and_not_repeated(key, how):
    with pytest.raises(ValueError, match="contains the API key itself") as error:
        OpenAIEngine(**{"base_url": "https://host/v1", "model": "m", "key_env": key} | how)
    assert parts_of_key(str(error.value)) == []


@pytest.mark.parametrize("base_url", ["me:word@host/v1", "https://host/v1?api-key=word", "https://host/v1#word"])
def test_an_address_with_a_secret_is_not_repeated(base_url):
    with pytest.raises(ValueError, match="would be written to the store") as error:
        OpenAIEngine(base_url=base_url, model="m")
    assert "word" not in str(error.value).replace("password", "")


def test_a_recipe_with_a_key_in_it_is_refused(folder, key, capsys):
    path = write(folder, {"engine": "openai", "base_url": "http://h/v1", "model": "m", "key_env": key})
    path.write_text(path.read_text() + f"# {KEY}\n")
    assert cli.main(["data", "run", str(path)]) == 2
    err = capsys.readouterr().err
    assert "contains an API key" in err
    assert parts_of_key(err) == []


@pytest.mark.parametrize(
    "more",
    [
        {"rows": {"source": "strategies:rows", "arguments": {"auth_token": "z"}}},
        {"checks": {"reward": {"scorer": "x:y", "headers": {"Authorization": "z"}}}},
        {"strategies": [{"use": "strategies:answered", "api_key": "z"}]},
    ],
)
def test_a_secret_anywhere_in_a_recipe_is_refused(folder, more, capsys):
    """The recipe is copied into the data set's card."""
    path = write(folder, {"engine": "function", "use": "strategies:echo"})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | more))
    assert cli.main(["data", "run", str(path)]) == 2
    assert "the whole recipe is written to the data set" in capsys.readouterr().err


def test_a_key_is_in_no_file(folder, key, capsys):
    """An endpoint that repeats the key wherever it can: store, data set, card, batch file and terminal do not have it."""

    async def raw(request, body):
        number = int(body["messages"][0]["content"][-1])
        if number == 1:
            return web.json_response({"error": {"message": "x" * 280 + request.headers["Authorization"]}}, status=400)
        return web.json_response(choice(f"answer {number}: {request.headers['Authorization']}"))

    with Server(raw=raw) as server:
        path = write(folder, {"engine": "openai", "base_url": server.url, "model": "m", "key_env": key})
        assert cli.main(["data", "batch", str(path), "--role", "target", "--write", str(folder / "b.jsonl")]) == 0
        assert cli.main(["data", "run", str(path)]) == 0
        assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert cli.main(["data", "status", str(path)]) == 0
    texts = [file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file()]
    assert any("answer 3" in text for text in texts)
    assert [parts for text in [*texts, *capsys.readouterr()] if (parts := parts_of_key(text))] == []


# --------------------------------------------------------------------------------------------------------------------- limits


async def endless(request, body):
    if "odd" not in str(body):
        return None
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(1000):
        await response.write(b" " * 2**16)
    return response


@pytest.mark.parametrize(
    "raw", [endless, respond(gzip.compress(b" " * 2**27), Content_Encoding="gzip")], ids=["endless", "bomb"]
)
def test_a_reply_is_read_up_to_a_limit(raw):
    said, _ = asked_odd(raw, attempts=1)
    assert said.reason == "BadReplyError: the reply is larger than 1,064,960 bytes (after 1 attempts)"


def test_a_reply_that_drips_ends_with_its_timeout():
    async def dripping(request, body):
        if "odd" not in str(body):
            return None
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(200):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    said, _ = asked_odd(dripping, attempts=1, timeout=0.5)
    assert said.reason == "no answer within 0.5 s (after 1 attempts)"


def test_many_and_long_headers_are_a_failure():
    said, _ = asked_odd(respond(choice("x"), X_Long="x" * 100_000), attempts=1)
    assert isinstance(said, Failure)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"concurrency": 1_000_000_000}, "concurrency must be at most 10,000, not 1000000000"),
        ({"concurrency": 2.5}, "concurrency must be a whole number, not 2.5"),
        ({"concurrency": "8"}, "concurrency must be a whole number, not '8'"),
        ({"concurrency": True}, "concurrency must be a whole number, not True"),
        ({"timeout": float("inf")}, "timeout must be at most 86,400, not inf"),
        ({"timeout": float("nan")}, "timeout must be a number, not nan"),
        ({"attempts": 10**9}, "attempts must be at most 1,000"),
        ({"rpm": 0.5}, "rpm must be a whole number, not 0.5"),
        ({"tpm": 10**18}, "tpm must be at most 1,000,000,000"),
        ({"temperature": float("nan")}, "temperature must be a number, not nan"),
        ({"temperature": float("inf")}, "temperature must be at most 100, not inf"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_p": float("nan")}, r"top_p must lie in \(0, 1\], not nan"),
        ({"top_p": "0.9"}, r"top_p must lie in \(0, 1\], not '0.9'"),
        ({"top_k": 10**20}, "top_k must be at most 2,147,483,647"),
        ({"max_new_tokens": 10**12}, "max_new_tokens must be at most 1,048,576"),
        ({"stop": 3}, "stop must be a list of"),
        ({"logprobs": 1}, "logprobs must be true or false, not 1"),
        ({"price": {"input": float("nan")}}, "input must be a number, not nan"),
        ({"price": {"output": True}}, "output must be a number, not True"),
        ({"extra_body": {"stream": True}}, "extra_body must not set stream"),
        ({"extra_body": {"n": 5}}, "extra_body must not set n"),
        ({"extra_body": {"x": float("nan")}}, "extra_body must contain only JSON values"),
        ({"extra_body": {"a": {"api_key": "z"}}}, "extra_body contains api_key, which would be recorded"),
        ({"extra_body": [1]}, "extra_body must be a mapping"),
        ({"base_url": "http://h:99999/v1"}, "base_url must be an address"),
        ({"base_url": 5}, "base_url must be an address"),
    ],
)
def test_absurd_values_of_a_recipe(folder, how, message, capsys):
    path = write(folder, {"engine": "openai", "base_url": "http://h/v1", "model": "m", "key_env": None} | how)
    assert cli.main(["data", "run", str(path)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert "role 'target'" in err
    assert err.count("\n") == 1 + ("contains api_key" in message)  # which is a mistake of the whole recipe, too


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"use": "best_of_n", "n": 10**9}, "best_of_n: n must be at most 10,000, not 1000000000"),
        ({"use": "best_of_n", "n": 2.5}, "best_of_n: n must be a whole number, not 2.5"),
        ({"use": "con_j", "most": -1}, "con_j: most must be at least 1, not -1"),
        ({"use": "teacher_student", "temperature": float("nan")}, "temperature must be a number, not nan"),
    ],
)
def test_absurd_values_of_a_strategy(folder, strategy, message, capsys):
    echo = {"engine": "function", "use": "strategies:echo"}
    path = write(folder, echo)
    roles = {"roles": {name: echo for name in ("target", "scorer", "teacher", "student")}}
    (folder / "rows.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\n')
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"strategies": [strategy]} | roles))
    assert cli.main(["data", "run", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"ches": {"model": "testbed:student", "batch_size": -1}}, "batch_size must be at least 1, not -1"),
        ({"ches": {"model": "testbed:student", "max_length": 0}}, "max_length must be at least 1, not 0"),
        ({"duplicates": {"shingle": 0}}, "duplicates: shingle must be at least 1, not 0"),
        ({"duplicates": {"permutations": 10**9}}, "duplicates: permutations must be at most 65,536"),
        ({"duplicates": {"threshold": True}}, "threshold must lie between 0 and 1"),
        ({"contamination": {"against": ["gsm8k"], "n": 1.5}}, "contamination: n must be a whole number, not 1.5"),
    ],
)
def test_absurd_values_of_a_check(check, message):
    with pytest.raises(ValueError, match=message):
        check_settings(check, {})


@pytest.mark.parametrize("value", [10**400, -(10**400), float("-inf"), None, [], "1"])
def test_no_value_is_too_odd_for_a_check(value):
    with pytest.raises(ValueError, match="x must be"):
        check_number("x", value, least=1, most=9)


# ------------------------------------------------------------------------------------------------------------------ functions

STRATEGY = """
from contralto.data_gen.types import Answer, Ask, Failure, Pair

def answered(row):
    answer = yield Ask(role="target", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=answer.text, rejected="no")

def echo(request):
    return request.messages[-1]["content"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strategies", raising=False)
    (tmp_path / "strategies.py").write_text(STRATEGY)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "question {i}"}}\n' for i in range(4)))
    yield tmp_path
    sys.modules.pop("strategies", None)


def write(folder, target):
    path = folder / "recipe.yaml"
    recipe = {"rows": "rows.jsonl", "strategies": ["strategies:answered"], "roles": {"target": target}}
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(folder, target):
    """The results of a run."""
    recipe = recipes.load_recipe(write(folder, target))
    rows = read_rows(recipe.rows, folder=folder)
    with Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store, is_shown=False)
        return list(pipeline.replay(recipe, rows, store))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return None", "returned None: it must return a string, an Answer or a Failure"),
        ("return 42", "returned a value of type int"),
        ("return ['a', 'b']", "returned a value of type list"),
        ("return (word for word in 'ab')", "returned a value of type generator"),
        ("return b'bytes'", "returned a value of type bytes"),
        ("return Answer(text=None)", "text is None, not a string"),
        ("return Answer(text='x', completion_tokens='many')", "completion_tokens is 'many'"),
        ("return Answer(text='x', logprobs=['low'])", "a log-probability is 'low'"),
        ("return Answer(text='x', logprobs=3)", "not iterable"),
        ("return Failure(None)", "no reason given"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise ValueError('y' * 10**6)", "raised ValueError: yyy"),
    ],
)
def test_a_function_that_misbehaves_is_asked_once_per_request(folder, body, reason):
    (folder / "strategies.py").write_text(
        STRATEGY + f"calls = []\ndef odd(request):\n    calls.append(1)\n    {body}\n"
    )
    results = run(folder, {"engine": "function", "use": "strategies:odd"})
    assert all(reason in result.failed and len(result.failed) < 600 for result in results), results[0].failed
    assert len(sys.modules["strategies"].calls) == 4


@pytest.mark.parametrize("pad", [0, 470, 990])
def test_errors_of_functions_and_strategies_do_not_show_keys(folder, key, pad):
    code = f"def odd(request):\n    import os\n    raise OSError('x' * {pad} + os.environ['MY_KEY'])\n"
    code += f"def said(request):\n    import os\n    return Failure('x' * {pad} + os.environ['MY_KEY'])\n"
    code += f"def broken(row):\n    import os\n    yield Ask(role='target', prompt='?')\n    raise OSError('x' * {pad} + os.environ['MY_KEY'])\n"
    (folder / "strategies.py").write_text(STRATEGY + code)
    for use in ("odd", "said"):
        results = run(folder, {"engine": "function", "use": f"strategies:{use}"})
        assert [parts_of_key(result.failed) for result in results] == [[]] * 4
    path = write(folder, {"engine": "function", "use": "reprlib:repr"})
    recipe = yaml.safe_load(path.read_text()) | {"strategies": ["strategies:broken"], "output": "other"}
    path.write_text(yaml.safe_dump(recipe))
    loaded = recipes.load_recipe(path)
    rows = read_rows(loaded.rows, folder=folder)
    with Store(loaded.output / "answers.sqlite") as store:
        pipeline.run(loaded, rows, store, is_shown=False)
        failed = [result.failed for result in pipeline.replay(loaded, rows, store)]
    assert all("broken raised OSError" in reason and not parts_of_key(reason) for reason in failed)


@pytest.mark.parametrize("head", ["async def odd(request): return 'x'", "def odd(request): yield 'x'", "odd = 3"])
def test_what_is_no_plain_function_is_refused(folder, head):
    (folder / "strategies.py").write_text(STRATEGY + head)
    with pytest.raises(ValueError, match=r"must return a string|has no function odd"):
        FunctionEngine(use="strategies:odd")


ODD_ENGINES = {
    "nothing at all": ("return iter(())", "without an answer to this request|ended before its requests"),
    "one too few": ("yield [(r, Answer(text='x')) for r in list(requests)[1:]]", "without an answer to this request"),
    "an answer alone": ("yield Answer(text='x')", "an engine must yield lists of"),
    "no pairs": ("yield [3]", "an engine must yield lists of"),
    "one twice": ("yield [(r, Answer(text='x')) for r in list(requests) * 2]", "unknown request, or one request twice"),
    "a string": ("yield [(r, 'x') for r in requests]", "returned a value of type str, not an Answer"),
}


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("name", list(ODD_ENGINES))
def test_an_engine_that_breaks_the_protocol_does_not_hang_the_run(folder, name, together):
    """One that yields too little, too much, or other things than it should: failures, or an error that says so."""
    code, reason = ODD_ENGINES[name]
    if together == 1 and "requests" in code:
        code = code.replace("list(requests)", "[next(requests)]").replace("in requests", "in [next(requests)]")
    engine = (
        f"class Odd:\n    identity, rows_together = {{}}, {together}\n    def answer(self, requests):\n        {code}\n"
    )
    (folder / "strategies.py").write_text(STRATEGY + engine)
    if together == 1 or name in ("an answer alone", "no pairs", "one twice"):
        with pytest.raises((TypeError, ValueError), match=f"{reason}|ended before its requests"):
            run(folder, {"engine": "strategies:Odd"})
        return
    results = run(folder, {"engine": "strategies:Odd"})
    assert any(result.failed and re.search(reason, result.failed) for result in results)


def test_what_was_recorded_is_not_asked_again(folder, monkeypatch):
    """A store that loses what it was given ends the run with a sentence, not with asking for ever."""
    monkeypatch.setattr(Store, "record", lambda self, said: None)
    with pytest.raises(OSError, match="does not contain the answer to request"):
        run(folder, {"engine": "function", "use": "strategies:echo"})


# ---------------------------------------------------------------------------------------------------------------------- texts


def test_secrets_are_found_in_every_form():
    secret = 'a+b/"c"=\\d1234'
    hidden = Secrets(secret).hide(f"{secret} {json.dumps(secret)} a%2Bb%2F%22c%22%3D%5Cd1234")
    assert hidden == '*** "***" ***'


def test_surrogates_are_found_at_any_depth():
    deep = "\ud800"
    for _ in range(2000):
        deep = [deep]
    assert has_lone_surrogate(deep)
    assert not has_lone_surrogate({"a": ["\U0001f600", 1, None]})


def test_a_line_is_short_after_all():
    assert len(short({"a": "x" * 1000})) == 300
    assert checked(Failure("z" * 10**6)).reason.endswith("...")


PLAIN = [
    Answer(text="red", prompt_tokens=3, completion_tokens=1),
    Answer(text=" \n", finish_reason="length", completion_tokens=MOST_TOKENS),
    Answer(text="a\x00b", prompt_tokens=0),
]
UNUSUAL = [
    Answer(text="gr\u00fcn"),
    Answer(text="half \ud800"),
    Answer(text="red", finish_reason="end_turn"),
    Answer(text="red", finish_reason=" "),
    Answer(text="red", prompt_tokens=True),
    Answer(text="red", completion_tokens=2.0),
    Answer(text="red", completion_tokens=-1),
    Answer(text="red", prompt_tokens=MOST_TOKENS + 1),
    Answer(text="red", logprobs=[-1]),
    Answer(text=None),
]


@pytest.mark.parametrize("answer", PLAIN + UNUSUAL)
def test_the_short_way_for_usual_answers_changes_none(answer, monkeypatch):
    short_way = checked(answer)
    assert outcomes._is_plain(answer) == (answer in PLAIN)
    monkeypatch.setattr(outcomes, "_is_plain", lambda answer: False)
    assert checked(answer) == short_way
