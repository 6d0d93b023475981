"""The middleware of vLLM's server, without vLLM: authentication, limits, and pairing of requests."""

import asyncio
import itertools
import json
import os
from typing import NamedTuple

import pytest

from contralto.cli import serve
from contralto.decoding.vllm.middleware import PairMiddleware

pytestmark = pytest.mark.slow

GOOD = {"contrast_id": "x", "contrast_branch": 0, "contrast_marker": 0, "contrast_method": "cad"}


class App:
    """A server that answers with what it was asked, or with what it is told to; with a key, to those who have it."""

    def __init__(self, says=None, *, key=None):
        self.says, self.key, self.seen = says, key, []

    async def __call__(self, scope, receive, send):
        known = self.key is None or (b"authorization", f"Bearer {self.key}".encode()) in scope["headers"]
        if not known or scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 405 if known else 401, "headers": []})
            await send({"type": "http.response.body", "body": b"not allowed", "more_body": False})
            return
        body = (await receive()).get("body", b"")
        self.seen.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in self.says or [body]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Sent(NamedTuple):
    """A request: its body in parts, who sends it, and when the client hangs up."""

    parts: tuple
    key: str | None = None
    host: str = "127.0.0.1"
    hangs_up: float = 60.0
    headers: tuple = ()


async def sent(door, one, *, path="/v1/completions"):
    """Send a request, and return its status and body; None if there is no answer."""
    got, waiting = [], list(one.parts)

    async def receive():
        if waiting:
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting)}
        await asyncio.sleep(one.hangs_up)
        return {"type": "http.disconnect"}

    async def send(message):
        got.append(message)

    headers = [*one.headers, *([(b"authorization", f"Bearer {one.key}".encode())] if one.key else [])]
    scope = {"type": "http", "method": "POST" if one.parts[0] else "GET", "path": path, "headers": headers}
    await door({**scope, "client": (one.host, 1)}, receive, send)
    return (got[0]["status"], b"".join(message.get("body", b"") for message in got)) if got else None


def through(app, *asked, path="/v1/completions", pause=0.0, settings=()):
    """Statuses and bodies of requests through the middleware."""

    async def one(door, i, content):
        await asyncio.sleep(i * pause)
        return await sent(door, content if isinstance(content, Sent) else Sent((content,)), path=path)

    async def go():
        with pytest.MonkeyPatch.context() as patch:
            if os.environ.get("CONTRALTO_SERVE") is None:
                patch.setenv("CONTRALTO_SERVE", json.dumps({"timeout": 0.2, **dict(settings)}))
            door = PairMiddleware(app)
        found = await asyncio.gather(*(one(door, i, content) for i, content in enumerate(asked)))
        room = door._room
        assert (room._waiting, room._held, dict(room._coming), dict(room._live)) == (0, 0, {}, {})
        return found

    return asyncio.run(go())


def asked(changed=(), **fields):
    values = {**GOOD, **dict(changed)}
    return json.dumps({"prompt": "p", "max_tokens": 4, "vllm_xargs": values, **fields}).encode()


def test_branches_go_through_together():
    app = App()
    found = through(app, asked(), asked({"contrast_branch": 1}), pause=0.05)
    assert [status for status, _ in found] == [200, 200]
    assert [json.loads(body)["vllm_xargs"]["contrast_branch"] for _, body in found] == [0, 1]
    plain = json.dumps({"prompt": "p"}).encode()
    assert through(app, plain, b"no json")[0] == (200, plain)


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ([asked()], "branch 1 did not arrive within 0.2 seconds: send all branches of a completion together"),
        ([asked({"contrast_method": "proxy"})], "branch 1 and 2 did not arrive"),
        ([asked(), asked({"contrast_branch": 1}, max_tokens=9)], r"differ in max_tokens (4 and 9)"),
        ([asked(), asked()], "two requests have branch 0"),
        ([asked({"contrast_alpha": "x"})], "contrast_alpha must be a number"),
        ([asked(prompt=["a", "b"])], "one prompt, not 2"),
        ([asked(messages=[], max_tokens=None)], "needs max_tokens"),
        ([asked(use_beam_search=True)], "beam search is not supported with contrastive branches"),
    ],
)
def test_mistakes_do_not_reach_the_engine(bodies, message):
    app = App()
    for status, body in through(app, *bodies):
        assert status == 400
        assert message in json.loads(body)["error"]["message"]
    assert app.seen == []


def test_the_engines_refusals_are_status_400():
    pair = [asked(), asked({"contrast_branch": 1})]
    whole = json.dumps({"choices": [{"stop_reason": "contralto: too long", "text": ""}]}).encode()
    piece = b"data: " + whole + b"\n\n"
    for says, message in (([whole], "too long"), ([piece, b"data: [DONE]\n\n"], "too long")):
        for status, body in through(App(says), *pair):
            assert (status, json.loads(body)["error"]["message"]) == (400, message)
    for status, body in through(App([b"data: [DONE]\n\n"]), *pair):
        assert status == 400
        assert "without stream to get the reason" in json.loads(body)["error"]["message"]
    fine = json.dumps({"choices": [{"stop_reason": None, "text": "contralto: a text"}]}).encode()
    assert through(App([fine]), *pair)[0] == (200, fine)


def test_the_server_tells_its_marker(monkeypatch):
    monkeypatch.setenv("CONTRALTO_SERVE", '{"marker": 7}')
    (status, body) = through(App(), b"", path="/v1/contralto")[0]
    assert (status, json.loads(body)["marker"]) == (200, 7)


def pair(**changed):
    """The bodies of both branches of a text."""
    return [asked({"contrast_branch": branch, **changed}) for branch in (0, 1)]


def test_strangers_stand_outside():
    """The middleware must ask the server first."""
    one, two = pair()
    app = App(key="right")
    for some in ([Sent((one,))], [Sent((one,), key="wrong")], [Sent((one,)), Sent((two,))], [Sent((b"x" * 9999,))]):
        assert {found[0] for found in through(app, *some, settings={"body": 1000})} == {401}
    assert through(app, Sent((b"",)), path="/v1/contralto")[0][0] == 401
    assert app.seen == []
    assert through(app, Sent((b"",), key="right"), path="/v1/contralto")[0][0] == 200
    found = through(app, Sent((one,), key="right"), Sent((two,), key="right"))
    assert [status for status, _ in found] == [200, 200]


def test_texts_of_different_clients_never_meet():
    one, two = pair()
    for a, b in ({"key": "a"}, {"key": "b"}), ({"host": "1.1.1.1"}, {"host": "2.2.2.2"}), ({"key": "a"}, {}):
        for status, body in through(App(), Sent((one,), **a), Sent((two,), **b)):
            assert status == 400
            assert "did not arrive" in json.loads(body)["error"]["message"]
        both = [Sent((body,), **who) for who in (a, b) for body in pair()]
        app = App()
        assert [status for status, _ in through(app, *both)] == [200] * 4
        ids = [json.loads(body)["vllm_xargs"]["contrast_id"] for body in app.seen]
        assert sorted(ids.count(each) for each in set(ids)) == [2, 2]  # the engine tells them apart, too


def test_ids_have_a_type():
    found = through(App(), asked({"contrast_id": 1}), asked({"contrast_id": "1", "contrast_branch": 1}))
    assert [status for status, _ in found] == [400, 400]
    for name in (0, 1, "1", ""):
        assert [status for status, _ in through(App(), *pair(contrast_id=name))] == [200, 200]


def test_an_id_in_flight_is_not_taken_again():
    class Slow(App):
        async def __call__(self, scope, receive, send):
            if scope["method"] == "POST":
                await asyncio.sleep(0.05)
            await super().__call__(scope, receive, send)

    statuses = [status for status, _ in through(Slow(), *pair(), *pair(), pause=0.001)]
    assert statuses == [200, 200, 400, 400]


def test_requests_have_limits():
    small = {"body": 1000}
    large = b'{"prompt": "' + b"x" * 2000 + b'"}'
    told = (b"content-length", str(10**30).encode())
    for one in (Sent((large,)), Sent((large[:500], large[500:900], large[900:])), Sent((b"{}",), headers=(told,))):
        app = App()
        [(status, body)] = through(app, one, settings=small)
        assert (status, app.seen) == (413, [])
        assert "a request may have at most 1,000 bytes" in json.loads(body)["error"]["message"]
    halves = [asked({"contrast_id": number}) for number in range(5)]
    found = through(App(), *halves, settings={"waiting": 3})
    assert sorted(status for status, _ in found) == [400, 400, 400, 503, 503]
    found = through(App(), *halves, settings={"held": 2 * len(halves[0])})
    assert sorted(status for status, _ in found) == [400, 400, 503, 503, 503]
    others = [asked({"contrast_id": number, "contrast_branch": 1}) for number in range(3)]
    found = through(App(), *halves[:3], *others, settings={"waiting": 3})
    assert [status for status, _ in found] == [200] * 6  # what completes a text does not wait


def test_a_client_that_hangs_up_leaves_nothing():
    one, two = pair()
    assert through(App(), Sent((one,), hangs_up=0.02)) == [None]
    app = App()
    found = through(app, Sent((one,), hangs_up=0.02), one, two, pause=0.05)
    assert [each and each[0] for each in found] == [None, 200, 200]

    async def slow():
        door = PairMiddleware(App())
        object.__setattr__(door._limits, "reading", 0.05)

        async def receive():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        got = []

        async def send(message):
            got.append(message)

        await door({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
        return got[0]["status"]

    assert asyncio.run(slow()) == 408


MALFORMED = [
    {"vllm_xargs": ["contrast_id"]},
    {"vllm_xargs": "contrast_id"},
    {"vllm_xargs": {**GOOD, "contrast_method": ["cad"]}},
    {"vllm_xargs": {**GOOD, "contrast_form": {"a": 1}}},
    {"vllm_xargs": {**GOOD, "contrast_id": 1.5}},
    {"vllm_xargs": {**GOOD, "contrast_id": "x" * 300}},
    {"vllm_xargs": {**GOOD, "contrast_branch": True}},
    {"vllm_xargs": {**GOOD, "contrast_branch": 10**30}},
    {"vllm_xargs": {**GOOD, "contrast_marker": -1}},
    {"vllm_xargs": {**GOOD, "contrast_seed": 2**70}},
    {"vllm_xargs": {**GOOD, "contrast_alpha": float("nan")}},
    {"vllm_xargs": {**GOOD, "contrast_alpha": float("inf")}},
    {"vllm_xargs": {**GOOD, "contrast_alpha": 10**400}},
    {"vllm_xargs": {**GOOD, "contrast_start": [1]}},
    {"vllm_xargs": {"contrast_": 1}},
]


@pytest.mark.parametrize("fields", MALFORMED)
def test_malformed_values_are_status_400(fields):
    app = App()
    [(status, body)] = through(app, json.dumps({"prompt": "p", "max_tokens": 4, **fields}).encode())
    assert (status, app.seen) == (400, [])
    assert json.loads(body)["error"]["message"]


def test_what_is_no_request_is_left_to_the_server_or_refused():
    for body in (b"\xff\xfe", b"[1]", b"null", b'"x"', b"1" * 5000, b'{"a": 1'):
        assert through(App(), body) == [(200, body)]
    assert through(App(), b"[" * 10**5)[0][0] == 400


@pytest.mark.parametrize(
    ("flags", "host"),
    [
        ([], ["127.0.0.1"]),
        (["--host", "0.0.0.0"], ["0.0.0.0"]),
        (["--host=::"], []),
        (["--uds", "/run/s"], []),
        (["--config", "CONFIG"], []),
    ],
)
def test_the_server_listens_here_alone_unless_told(tmp_path, flags, host):
    (tmp_path / "config.yaml").write_text("host: 0.0.0.0\n")
    flags = [str(tmp_path / "config.yaml") if flag == "CONFIG" else flag for flag in flags]
    command, settings = serve.prepare(["testbed:expert", *flags])
    assert [after for word, after in itertools.pairwise(command) if word == "--host"] == host
    assert (settings["body"], settings["waiting"]) == (64 * 2**20, 1024)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (None, 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("10.0.0.7:8000", 421),
        ("[fe80::1]:8000", 421),
        ("", 421),
        ("[", 421),
        ("\xff", 421),
    ],
)
def test_a_page_under_another_name_reads_nothing(host, status):
    """DNS rebinding: a browser sends the page's own name, whatever address it stands for."""
    headers = () if host is None else ((b"host", host.encode("latin-1")),)
    plain, app = json.dumps({"prompt": "p"}).encode(), App()
    for path in ("/v1/completions", "/v1/models", "/v1/contralto"):
        one = Sent((plain if path != "/v1/contralto" else b"",), headers=headers)
        ((found, _),) = through(app, one, path=path, settings={"local": True})
        assert found == status
    assert bool(app.seen) == (status == 200)
    assert through(App(), Sent((plain,), headers=headers))[0][0] == 200  # a server with a key, or open to others


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://[::1]", 200),
        ("https://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("http://10.0.0.7:8000", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_site_reads_and_asks_nothing(origin, status):
    """CORS: vLLM lets pages of all sites read its replies. A form is sent without asking first."""
    headers, app = ((b"host", b"127.0.0.1:8000"), (b"origin", origin.encode())), App()
    one = Sent((json.dumps({"prompt": "p"}).encode(),), headers=headers)
    for path in ("/v1/completions", "/v1/models"):
        assert through(app, one, path=path, settings={"local": True})[0][0] == status
    assert bool(app.seen) == (status == 200)
    assert through(App(), one, settings={"local": True, "origins": True})[0][0] == 200  # vLLM's flag says who may
    assert through(App(), one)[0][0] == 200


def test_the_user_s_origins_are_left_to_the_server(tmp_path):
    (tmp_path / "flags.yaml").write_text('allowed_origins: ["https://app.example"]')
    for flags in (["--allowed-origins", '["https://app.example"]'], ["--config", str(tmp_path / "flags.yaml")]):
        command, settings = serve.prepare(["testbed:expert", *flags])
        assert settings["origins"]
        assert command[-2:] == flags
    assert not serve.prepare(["testbed:expert"])[1]["origins"]


@pytest.mark.parametrize(
    ("flags", "key", "is_local"),
    [
        ([], "", True),
        (["--host", "127.0.0.1"], "", True),
        (["--host", "0.0.0.0"], "", False),
        (["--uds", "/run/s"], "", False),
        (["--api-key", "sk-1"], "", False),
        ([], "sk-1", False),
    ],
)
def test_names_are_checked_where_nothing_else_keeps_strangers_out(flags, key, is_local, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    assert serve.prepare(["testbed:expert", *flags])[1]["local"] is is_local


def test_limits_of_the_server_are_checked():
    for flags in ("--contrast-timeout 0", "--contrast-timeout nan", "--contrast-timeout 1e9", "--contrast-waiting 0"):
        with pytest.raises(ValueError, match="must be above 0"):
            serve.prepare(["testbed:expert", *flags.split()])
    with pytest.raises(ValueError, match=r"^--contrast-max-body must be above 0, not 0$"):
        serve.prepare(["testbed:expert", "--contrast-max-body", "0"])
