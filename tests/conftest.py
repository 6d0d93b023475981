"""Shared settings: one thread (tiny models), no network, GPU tests only where there is one, real models only where `make real` put them."""

import gc
import os
import shutil
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from covering import covering

LONGEST = (
    "test_testbed_card_compares_with_the_card",
    "test_demo",
    "test_a_sample_of_changes_is_noticed",
    "test_kills_and_the_same_weights",
    "test_tutorials",
    "test_the_commands_of_the_page_run_in_their_order",
    "test_kills_and_the_same_model",
    "test_two_processes_equal_one",
)
"""Tests of tens of seconds, which begin first: a worker that meets one last keeps the others waiting."""

REAL = Path(__file__).parents[1] / ".cache" / "real"
"""The folder of real models."""

gc.disable()  # while everything is imported: nothing of it is garbage; `pytest_collection_finish` enables it
CONNECTIONS = Path(tempfile.mkdtemp(prefix="contralto-tests-")) / "connections"
"""The file of the connections that a test tried to make to other machines."""
OFFLINE = Path(__file__).parent / "helpers" / "offline"
os.environ["CONTRALTO_TEST_CONNECTIONS"] = str(CONNECTIONS)  # read by the module, here and in other processes
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
from helpers.offline import sitecustomize  # noqa: F401

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read when transformers is imported
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def connections():
    """Fail a test that tries to leave this machine, also by a process that it starts; yield the file of what it tried."""
    yield CONNECTIONS
    if CONNECTIONS.exists():
        tried = CONNECTIONS.read_text(encoding="utf-8")
        CONNECTIONS.unlink()
        pytest.fail(f"tests have no network, and this one tried:\n{tried}")


def pytest_sessionfinish():
    shutil.rmtree(CONNECTIONS.parent, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if not _runs_kernels():
        for item in items:
            if item.get_closest_marker("kernel"):
                item.add_marker(pytest.mark.skip(reason="needs Triton: run make test-kernels"))
    if not (REAL / "smollm2" / "config.json").is_file():
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="there is no real model: run make real"))
    _leave_to_the_full_suite(items)
    items.sort(key=lambda item: item.name.split("[")[0] not in LONGEST)


def _runs_kernels():
    """Return whether Triton is installed, and runs on a GPU or in its interpreter."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (torch.cuda.is_available() or is_interpreted)


def pytest_collection_finish():
    """Let garbage collections, which lm-eval asks for at every batch, pass over the million objects of the libraries."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _leave_to_the_full_suite(items):
    """Mark as `full` what the covering part of a product of parameters does without."""
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering"):
            products[item.nodeid.split("[")[0]].append(item)
    for product in products.values():
        strength = product[0].get_closest_marker("covering").kwargs.get("strength", 2)
        rows = [_values(item) for item in product]
        always = [i for i, item in enumerate(product) if "slow" not in item.keywords]
        for i in set(range(len(product))) - set(covering(rows, strength=strength, chosen=always)):
            product[i].add_marker("full")


def _values(item):
    """Return a test's parameters, those that are tuples part by part, as something that can be hashed."""
    found = {}
    for name, value in item.callspec.params.items():
        for i, part in enumerate(value if isinstance(value, tuple) else [value]):
            simple = isinstance(part, (str, int, float, bool, type(None)))
            found[name, i] = part if simple else getattr(part, "__name__", item.callspec.indices[name])
    return found


@pytest.fixture
def one_metered(monkeypatch):
    """Count the costs of a comparison on one document; most of its time goes there."""
    monkeypatch.setattr("contralto.eval.comparison.runs.METERED", 1)


@pytest.fixture
def registered():
    """Register decoding methods for one test."""
    from contralto.decoding.methods import METHODS, register

    names = []
    yield lambda method: names.append(method.name) or register(method)
    for name in names:
        METHODS.unregister(name)


@pytest.fixture(scope="session")
def smollm2():
    """Return the folder of SmolLM2-135M-Instruct, for tests marked `real`."""
    return REAL / "smollm2"
