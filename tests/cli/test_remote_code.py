"""Code that comes with a model runs only if the user has said so, in every command, and pickles never run any."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.task_index import one_index  # noqa: F401  for every test here
from transformers import dynamic_module_utils

from contralto import cli, testbed
from contralto.cli import serve
from contralto.common import hub as names

ROOT = Path(__file__).parents[2]
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig

class StrangeScorer(LlamaForSequenceClassification):
    config_class = StrangeConfig

class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""


def strange(folder, marker, *, model=True, tokenizer=True):
    """A copy of an embedded model that brings code for its configuration and model, or for its tokenizer."""
    shutil.copytree(testbed.path("expert"), folder)
    (folder / "strange.py").write_text(CODE.format(marker=str(marker)))
    maps = {"AutoConfig": "StrangeConfig", "AutoModelForCausalLM": "StrangeModel", "AutoModel": "StrangeModel"}
    maps["AutoModelForSequenceClassification"] = "StrangeScorer"
    change = {"model_type": "strange", "auto_map": {kind: f"strange.{name}" for kind, name in maps.items()}}
    wanted = {"config.json": change if model else {}}
    if tokenizer:
        own = {"tokenizer_class": "StrangeTokenizer", "auto_map": {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}}
        wanted["tokenizer_config.json"] = own
    for name, changed in wanted.items():
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | changed))
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models that bring code, whose mark is `ran`, and somebody who types "y" at every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    strange(tmp_path / "model", tmp_path / "ran")
    strange(tmp_path / "tokenizer", tmp_path / "ran", model=False)
    pair = {"prompt": "How many?", "chosen": "It is 4.", "rejected": "It is 5.", "margin": 1.0}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 8)
    shutil.copytree(
        testbed.path("expert"), tmp_path / "adapter", ignore=shutil.ignore_patterns("config.json", "model*")
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "model"), "r": 1}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    recipe = {"rows": "pairs.jsonl", "strategies": ["verify_direction"], "output": "out"}
    for name, changed in RECIPES.items():
        text = json.dumps({**recipe, **changed}).replace("PLACE", str(tmp_path))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(text)))
    (tmp_path / "always.py").write_text("def agree(request):\n    return 'Answer A'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


LOCAL = {"engine": "transformers", "model": "testbed:expert", "max_new_tokens": 2}
JUDGE = {"judge": {"engine": "function", "use": "always:agree"}}
RECIPES = {
    "engine": {"roles": {"judge": {**LOCAL, "model": "PLACE/model"}}},
    "amateur": {"roles": {"judge": {**LOCAL, "method": "cd", "amateur": "PLACE/tokenizer"}}},
    "contrast": {"roles": JUDGE, "checks": {"contrast": {"tokenizer": "PLACE/tokenizer"}}},
    "ches": {"roles": JUDGE, "checks": {"ches": {"model": "PLACE/model"}}},
    "reward": {"roles": JUDGE, "checks": {"reward": {"scorer": {"reward_model": "PLACE/model"}}}},
}
ALIGN = "--dataset_name PLACE/pairs.jsonl --output_dir PLACE/out --use_cpu true --max_steps 1 --report_to none"
TASK = "--tasks testbed_arithmetic --limit 1"
COMMANDS = {
    "generate": "generate --model PLACE/model --method none hello --max-new-tokens 2",
    "generate, tokenizer": "generate --model PLACE/tokenizer --method none hello --max-new-tokens 2",
    "generate, amateur": "generate --model testbed:expert --amateur PLACE/model hello --max-new-tokens 2",
    "generate, base of an adapter": "generate --model PLACE/adapter --adapters-off hello --max-new-tokens 2",
    "generate, image": "generate --model PLACE/model --method vcd --image PLACE/one.png hello",
    "explain": "explain --model PLACE/model --amateur testbed:amateur hello --html PLACE/p.html --max-new-tokens 2",
    "eval": f"eval --model_args pretrained=PLACE/model {TASK}",
    "eval, amateur": f"eval --model_args pretrained=testbed:expert,amateur=PLACE/model {TASK}",
    "compare": f"compare --model PLACE/model --methods dola --output PLACE/compare {TASK}",
    "compare, amateur": f"compare --model testbed:expert --amateur PLACE/tokenizer --methods cd --output PLACE/compare {TASK}",
    "judge": "judge --pairs PLACE/pairs.jsonl --reward-model PLACE/model --output PLACE/judged",
    "align": f"align dpo --model_name_or_path PLACE/model {ALIGN}",
    "align, tokenizer": f"align dpo --model_name_or_path PLACE/tokenizer {ALIGN}",
    "align distill, teacher": f"align distill --model_name_or_path testbed:amateur --teacher_model_name_or_path PLACE/model {ALIGN}",
    "align reward": f"align --trainer reward --model_name_or_path PLACE/model {ALIGN}",
    "align rounds": "align dpo --data_recipe PLACE/engine.yaml --policy_role judge --model_name_or_path PLACE/model "
    "--output_dir PLACE/rounds --use_cpu true --max_steps 1",
    "serve": "serve PLACE/model",
    **{f"data, {name}": f"data run PLACE/{name}.yaml" for name in RECIPES},
}


OTHERWISE = ("generate, image", "align, tokenizer")
"""What transformers rejects in words of its own: it finds no processor."""
QUICK = ("generate", "generate, amateur", "align", "serve", "data, engine")
OFTEN = ("explain", "eval", "compare", "align rounds")
"""One more command of each kind in `make test`."""


def _marks(command):
    return () if command in QUICK else pytest.mark.slow if command in OFTEN else (pytest.mark.slow, pytest.mark.full)


@pytest.mark.parametrize("command", [pytest.param(c, marks=_marks(c)) for c in COMMANDS])
def test_code_of_a_model_does_not_run(place, capfd, command):
    argv = COMMANDS[command].replace("PLACE", str(place)).split()
    (place / "one.png").write_bytes(b"")
    assert cli.main(argv) != 0
    said = capfd.readouterr().err
    assert "trust_remote_code" in said.replace("-", "_") or command in OTHERWISE, said
    assert not (place / "ran").exists()


TRUSTING = ("generate", "generate, tokenizer", "eval", "compare", "align", "data, engine", "data, ches", "serve")


@pytest.mark.slow
@pytest.mark.parametrize("command", TRUSTING)
def test_code_of_a_model_runs_if_the_user_says_so(place, command, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: None)
    monkeypatch.setattr(serve, "find_spec", lambda _: True)
    argv = COMMANDS[command].replace("PLACE", str(place)).split()
    flag = "--trust_remote_code" if argv[0] in ("align", "eval") else "--trust-remote-code"
    cli.main([*argv, flag])
    assert (place / "ran").exists()
    assert not names.trusts_remote_code()


class Evil:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_pickled_weights_run_nothing(tmp_path, capsys):
    for name, file in (("model", "pytorch_model.bin"), ("adapter", "adapter_model.bin")):
        folder = tmp_path / name
        shutil.copytree(testbed.path("expert"), folder)
        (folder / "model.safetensors").unlink()
        for each in (file, "training_args.bin"):
            torch.save(Evil(tmp_path / "ran"), folder / each)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(testbed.path("expert"))}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    for name, more in (("model", ["--method", "none"]), ("adapter", ["--adapters-off"])):
        with pytest.raises((pickle.UnpicklingError, ValueError, OSError)):
            raise_of(["generate", "--model", str(tmp_path / name), *more, "hello"])
    assert not (tmp_path / "ran").exists()


def raise_of(argv):
    """Run a command; what it says becomes an error."""
    if cli.main(argv):
        raise ValueError("it ended with a sentence")


# ------------------------------------------------------------------------------------------------------------- the source

FOLDERS = ("decoding", "align", "data_gen", "eval", "testbed", "benchmarks")
LOADERS = {"from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module"}
UNPICKLERS = {"load": {"torch", "pickle", "joblib", "dill", "cloudpickle"}, "loads": {"pickle", "dill", "cloudpickle"}}


@pytest.fixture(scope="module")
def calls():
    """All calls of attributes in the sources that call one of those below: their file, and what is called."""
    files = {path.resolve() for folder in ("contralto", *FOLDERS) for path in (ROOT / folder).rglob("*.py")}
    words = LOADERS | UNPICKLERS.keys()
    texts = {path: text for path in sorted(files) if any(f".{word}(" in (text := path.read_text()) for word in words)}
    trees = {path: ast.walk(ast.parse(text)) for path, text in texts.items()}
    found = [
        (path.relative_to(ROOT), node) for path, nodes in trees.items() for node in nodes if isinstance(node, ast.Call)
    ]
    return [(path, node) for path, node in found if isinstance(node.func, ast.Attribute)]


def test_models_are_loaded_in_one_place(calls):
    """Of a model, and of an adapter, which brings no code. What reads GGUF files forbids the code of files beside them."""
    gguf = [call for path, call in calls if path.name == "gguf.py" and call.func.attr in LOADERS]
    assert [[k.value.value for k in call.keywords if k.arg == "trust_remote_code"] for call in gguf] == [[False]] * 3
    found = [(str(path), call.func.attr) for path, call in calls if call.func.attr in LOADERS and call not in gguf]
    assert found == [("contralto/common/hub.py", "from_pretrained")] * 2


def test_nothing_is_unpickled(calls):
    """But for the rows that a command sends to its own workers through Ray, whose messages are pickles anyway."""
    named = [(path, call) for path, call in calls if isinstance(call.func.value, ast.Name)]
    unsafe = [path for path, call in named if call.func.value.id in UNPICKLERS.get(call.func.attr, ())]
    assert unsafe == [Path("data_gen/pipeline/shards.py")]
