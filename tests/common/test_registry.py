"""The registry that losses, decoding methods, strategies, engines, checks and metrics share."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contralto.common.registry import Registry

GROUP = "contralto.test_entries"


@pytest.fixture
def registry() -> Registry[Any]:
    registry: Registry[Any] = Registry("loss", group=GROUP)
    registry.register(SimpleNamespace(name="first"))
    registry.register(SimpleNamespace(name="second"))
    return registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package with a valid entry point and three broken ones."""
    (tmp_path / "toy_losses.py").write_text(
        "import types\nmine = object()\nother = types.SimpleNamespace(name='another')\n", encoding="utf-8"
    )
    info = tmp_path / "toy_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-losses\nVersion: 1.0\n", encoding="utf-8")
    points = [f"{name} = toy_losses:{name}" for name in ("mine", "moved", "other")] + ["absent = toy_losses_absent:x"]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(points) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("toy_losses", None)


def test_entries_keep_their_order(registry: Registry[Any]) -> None:
    assert registry.names() == ("first", "second") == tuple(registry)
    assert len(registry) == 2
    assert [entry.name for _, entry in registry.items()] == ["first", "second"]
    assert registry.get("first") is registry["first"]


def test_an_unknown_name_is_one_sentence(registry: Registry[Any]) -> None:
    with pytest.raises(ValueError, match=r"^there is no loss 'third'; there are first, second$"):
        registry.get("third")
    assert "third" not in registry


def test_a_name_is_taken_once(registry: Registry[Any]) -> None:
    first = registry.get("first")
    assert registry.register(first) is first  # a module that is imported twice
    with pytest.raises(ValueError, match="there is already a loss 'first'"):
        registry.register(SimpleNamespace(name="first"))
    registry.unregister("first")
    assert registry.names() == ("second",)
    with pytest.raises(ValueError, match="there is no loss 'first'"):
        registry.unregister("first")


def test_an_invalid_entry_is_rejected() -> None:
    def check(entry: Any) -> None:
        if entry < 2:
            raise ValueError("a loss must be a number of at least 2")

    registry: Registry[Any] = Registry("loss", group=GROUP, check=check)
    with pytest.raises(ValueError, match="must be a number"):
        registry.register(1, name="one")
    assert registry.names() == ()


@pytest.mark.usefixtures("package")
def test_an_entry_point_is_imported_when_it_is_used(registry: Registry[Any]) -> None:
    assert registry.names() == ("first", "second", "absent", "mine", "moved", "other")
    assert "mine" in registry
    assert "toy_losses" not in sys.modules
    entry = registry.get("mine")
    assert entry is sys.modules["toy_losses"].mine
    assert registry.get("mine") is entry


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["moved", "absent", "other"])
def test_a_broken_entry_point_is_one_sentence(registry: Registry[Any], name: str) -> None:
    assert registry.get("first").name == "first"  # the others still work
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^the loss '{name}' of the package toy-losses cannot be loaded: "):
            registry.get(name)


def test_an_entry_point_without_a_package_is_named_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="lost", value="nowhere_at_all:x", group=GROUP)
    monkeypatch.setattr("contralto.common.registry.entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=r"^the loss 'lost' of the package nowhere_at_all cannot be loaded: "):
        Registry("loss", group=GROUP).get("lost")
