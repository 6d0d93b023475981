"""Names of models: sources are found by their prefix, and the library imports none of them."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from contralto import testbed
from contralto.common import hub


def test_embedded_models_are_a_source():
    assert hub.locate("testbed:amateur") == str(testbed.path("amateur"))
    with pytest.raises(ValueError, match="the testbed has no model 'nobody'; it has expert, "):
        hub.locate("testbed:nobody")


@pytest.mark.parametrize("name", ["org/model", "/folder/a:b", "C:/models/one", "folder", "unknown:name"])
def test_other_names_stand_for_themselves(name):
    assert hub.locate(name) == name


def test_a_source_can_be_registered():
    hub.SOURCES.register(lambda name: f"/models/{name}", name="mine")
    try:
        assert hub.locate("mine:one") == "/models/one"
    finally:
        hub.SOURCES.unregister("mine")
    assert hub.locate("mine:one") == "mine:one"


@pytest.mark.parametrize("name", ["./missing", "missing/", "/nonexistent/one", "models/deep/one", "~/one", "../one"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_remote_adapter_config", lambda name: pytest.fail("the hub was asked"))
    if name == "missing/":
        name = f"{tmp_path}/{name}"
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {name}$"):
        hub.adapter_base(name)


def test_a_name_whose_first_part_is_a_folder_may_be_a_hub_id(tmp_path, monkeypatch):
    """The folder is said to be missing only if the hub cannot be asked; the nearest folder is suggested."""
    (tmp_path / "models" / "large").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "_remote_adapter_config", lambda name: asked.append(name))
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: asked.append(timeout))
    assert hub.adapter_base("models/one") is None
    assert hub.adapter_base("org/model") is None
    assert asked == [hub.PATIENCE, "models/one", "org/model"]

    def fail(self, name, timeout):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", fail)
    message = r"^there is no folder models/larg \(did you mean 'large'\?\), and the hub cannot be asked for it \(no route to host\)$"
    with pytest.raises(FileNotFoundError, match=message):
        hub.adapter_base("models/larg")
    assert hub.adapter_base("org/model") is None
    assert hub.adapter_base("testbed:expert") is None


def test_a_package_adds_a_source_by_an_entry_point(tmp_path):
    (tmp_path / "toy_models.py").write_text("def find(name):\n    return '/toys/' + name\n", encoding="utf-8")
    info = tmp_path / "toy_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-models\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[contralto.models]\ntoys = toy_models:find\n", encoding="utf-8")
    code = "from contralto.common.hub import locate; print(locate('toys:one'))"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout == "/toys/one\n"


def test_decoding_does_not_import_the_testbed():
    code = "import sys, contralto.decoding.processors; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "contralto.decoding.processors" in loaded
    assert not [name for name in loaded if name.startswith("contralto.testbed")]
