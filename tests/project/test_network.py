"""No network: the tests cannot leave this machine, and an import opens no connection and reads no file of the user."""

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.offline.sitecustomize import is_here

ROOT = Path(__file__).parents[2]
ADDRESSES = Path("/proc/net/fib_trie")
PARTS = ("align", "data_gen", "decoding", "eval", "recipes", "testbed")
OPENED = """
import importlib, json, os, sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.append([event, str(args[-1])])
    if event == "open" and isinstance(args[0], str | bytes):
        seen.append([event, os.path.abspath(os.fsdecode(args[0]))])
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn"):
        seen.append([event, str(args[1])])
sys.addaudithook(watch)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("contralto"):
            raise
print(json.dumps(seen))
"""
SYSTEM = ("/dev/null", "/proc/", "/sys/", "/etc/", "/usr/")
"""Where libraries look for the machine: its memory, its time zones."""


def modules():
    """Every module of the package that is not a script and needs no vLLM."""
    folders = [ROOT / "contralto" / "cli", ROOT / "contralto" / "common", *(ROOT / part for part in PARTS)]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not {"__main__", "vllm"} & set(name.split(".")):
                yield name if name.startswith("contralto.") else f"contralto.{name}"


def opened(names, home):
    """Import modules in a new process whose user has files, and return what it opened."""
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("hf_of_the_user")
    settings = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    (home / "tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", OPENED, *names]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | settings, cwd=home)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", ["parts", pytest.param("all", marks=pytest.mark.slow)])
def test_an_import_opens_no_connection_and_no_file_of_the_user(which, tmp_path):
    names = ["contralto", *(f"contralto.{part}" for part in PARTS), "contralto.cli"]
    names = names if which == "parts" else list(modules())
    home = tmp_path / "home"
    seen = opened(names, home)
    assert [each for each in seen if each[0] != "open"] == []
    packages = (str(ROOT), sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix))
    other = {path for _, path in seen if not path.startswith((*packages, *SYSTEM, str(home / "tmp")))}
    assert {
        path for path in other if which == "parts" or not path.startswith(str(home / ".cache" / "matplotlib"))
    } == set()


def test_the_test_of_imports_sees_what_they_open(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "bad.py").write_text(
        "import contextlib, pathlib, socket\n"
        "pathlib.Path('~/.cache/huggingface/token').expanduser().read_text()\n"
        "with contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9), 1)\n"
    )
    seen = opened(["bad"], home)
    assert ["open", str(home / ".cache" / "huggingface" / "token")] in seen
    assert "socket.connect" in {event for event, _ in seen}


@pytest.mark.parametrize(
    ("event", "host", "stays"),
    [
        ("socket.connect", ("127.0.0.1", 80), True),
        ("socket.connect", ("127.8.0.1", 80), True),
        ("socket.connect", ("203.0.113.7", 80), False),
        ("socket.connect", ("localhost", 80), True),
        ("socket.connect", ("localhost.example.org", 80), False),
        ("socket.getaddrinfo", "example.org", False),
        ("socket.getaddrinfo", b"127.0.0.1", True),
        ("socket.getaddrinfo", "::1", True),
        ("socket.getaddrinfo", "2001:db8::1", False),
        ("socket.getaddrinfo", None, True),
    ],
)
def test_addresses_of_this_machine(event, host, stays):
    with socket.socket() as one:
        assert is_here(event, (one, host) if event == "socket.connect" else (host, 80)) is stays
    with socket.socket(socket.AF_UNIX) as one:
        assert is_here("socket.connect", (one, "/run/s"))


def test_a_datagram_socket_that_asks_for_the_address_of_the_machine_fails_and_is_not_noted(connections):
    with socket.socket(type=socket.SOCK_DGRAM) as one, pytest.raises(OSError, match="may not leave this machine"):
        one.connect(("203.0.113.7", 80))
    assert not connections.exists()
    with socket.socket(type=socket.SOCK_DGRAM) as one, pytest.raises(OSError, match="may not leave this machine"):
        one.sendto(b"x", ("203.0.113.7", 80))
    assert connections.read_text().startswith("socket.sendto ('203.0.113.7', 80)")
    connections.unlink()  # else this test would fail


@pytest.mark.skipif(not ADDRESSES.exists(), reason="needs Linux")
def test_all_addresses_of_this_machine_are_here():
    lines = [line.split() for line in ADDRESSES.read_text().splitlines()]
    own = {before[1] for before, line in pairwise(lines) if line[:3] == ["/32", "host", "LOCAL"]}
    assert own
    assert all(is_here("socket.getaddrinfo", (number, 80)) for number in own)


def test_a_test_cannot_leave_this_machine(connections):
    with pytest.raises(OSError, match="a test may not leave this machine"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as one, pytest.raises(OSError, match="a test may not leave this machine"):
        one.connect(("203.0.113.7", 80))
    code = "import socket\ntry: socket.create_connection(('203.0.113.7', 80), timeout=1)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", code], check=True)  # an error that nobody sees
    tried = connections.read_text().splitlines()
    assert [line.split(" by ")[0] for line in tried] == [
        "socket.getaddrinfo example.org",
        "socket.connect ('203.0.113.7', 80)",
        "socket.getaddrinfo 203.0.113.7",
    ]
    connections.unlink()  # else this test would fail


def test_a_connection_fails_the_test_that_made_it(tmp_path):
    """In a run of its own, with the conftest of all tests."""
    (tmp_path / "test_one.py").write_text(
        "import contextlib, socket\n"
        "def test_tries():\n"
        "    with contextlib.suppress(OSError): socket.create_connection(('203.0.113.7', 80), 1)\n"
        "def test_does_not(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "-c", os.devnull]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    ran = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        check=False,
    )
    assert "tests have no network, and this one tried" in ran.stdout
    assert "2 passed, 1 error" in ran.stdout
