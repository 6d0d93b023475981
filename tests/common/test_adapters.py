"""Adapters as users name them: as the model or beside it, in every command; and those of another model, which are rejected."""

import json
import re
import shutil

import pytest
import torch

from contralto import cli, testbed
from contralto.common import adapters, hub
from contralto.common.options import OptionError

QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"
LENGTH = ["--max-new-tokens", "12"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def run(capsys):
    """Run a command; give its status, its standard output and its standard error."""

    def call(*argv):
        status = cli.main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return call


def _tuned(name, seed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = testbed.load(name)
    model.config._name_or_path = model.name_or_path = str(testbed.path(name))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for key, weight in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.5)
    return tuned


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of the expert, the same merged into it, and adapters of the amateur and of another expert."""
    root = tmp_path_factory.mktemp("adapters")
    tuned = _tuned("expert", 0)
    tuned.save_pretrained(root / "adapter")
    tuned.merge_and_unload().save_pretrained(root / "merged")
    for file in TOKENIZER:
        shutil.copy(testbed.path("expert") / file, root / "merged" / file)
    for name in ("amateur", "expert-1"):
        _tuned(name, 1).save_pretrained(root / name)
    return root


def test_an_adapter_as_model_or_beside_it_is_the_merged_model(run, folders):
    texts = [
        run("generate", *how, *LENGTH, QUESTION)
        for how in (
            ["--model", folders / "adapter"],
            ["--model", "testbed:expert", "--adapter", folders / "adapter"],
            ["--model", folders / "merged"],
            ["--model", "testbed:expert"],
        )
    ]
    assert [status for status, _, _ in texts] == [0] * 4
    first, second, merged, base = (out for _, out, _ in texts)
    assert first == second == merged != base


@pytest.mark.slow
def test_every_model_of_a_method_may_be_an_adapter(run, folders):
    texts = [
        run("generate", *how, *LENGTH, "--beta", "2", QUESTION)[1]
        for model in (folders / "adapter", folders / "merged")
        for how in (
            ["--model", "testbed:expert", "--amateur", model],
            ["--model", model, "--amateur", "testbed:amateur"],
        )
    ]
    assert texts[:2] == texts[2:]
    beside = ["--model", "testbed:expert", "--adapter", folders / "adapter", "--adapters-off"]
    switched = run("generate", *beside, *LENGTH, "--beta", "2", QUESTION)
    assert switched[0] == 0
    assert switched[2].startswith("cd: 2 models per token; amateur is the same model without its adapters")
    named = run(
        "generate", "--model", folders / "merged", "--amateur", "testbed:expert", *LENGTH, "--beta", "2", QUESTION
    )
    assert named[1] == switched[1]


def test_rows_of_another_adapter_are_not_resumed(run, folders, tmp_path):
    output = ["--output", tmp_path / "texts.jsonl", *LENGTH, QUESTION]
    assert run("generate", "--model", "testbed:expert", "--adapter", folders / "adapter", *output)[0] == 0
    status, _, err = run("generate", "--model", "testbed:expert", *output, "--resume")
    assert status == 2
    assert "made with another adapter: use the same, or name another file" in err


@pytest.mark.parametrize(
    ("model", "adapter", "message"),
    [
        (
            "testbed:expert",
            "amateur",
            "was trained on .*, and the model is testbed:expert, whose weights are others: use",
        ),
        ("testbed:expert", "expert-1", "was trained on .*, and the model is testbed:expert, whose weights are others"),
        ("testbed:expert", "merged", "is no adapter: there is no adapter_config.json in it"),
        ("ADAPTER", "adapter", r"is an adapter of .*, and --adapter names another one: give .* as --model with one"),
    ],
)
def test_wrong_adapters_are_rejected_before_anything_is_loaded(run, folders, model, adapter, message):
    model = folders / "adapter" if model == "ADAPTER" else model
    status, _, err = run("generate", "--model", model, "--adapter", folders / adapter, "x")
    assert status == 2
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1


def _without_base(folders, tmp_path, name, base):
    """A copy of an adapter with another name of its base."""
    folder = shutil.copytree(folders / name, tmp_path / name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return str(folder)


def test_sizes_tell_an_adapter_of_another_model(folders, tmp_path):
    foreign = _without_base(folders, tmp_path, "amateur", "org/model")
    adapters.check_base("testbed:expert", foreign)  # a base on the hub may be this model
    with pytest.raises(
        ValueError, match=r"amateur is an adapter of another model: there is no layer .* trained on org/mod"
    ):
        hub.with_adapter(testbed.load("expert"), foreign)


def test_an_adapter_of_fewer_layers_is_rejected(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    short = _without_base(folders, tmp_path, "adapter", "org/model")
    weights = load_file(f"{short}/adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0." in k}, f"{short}/adapter_model.safetensors")
    with pytest.raises(ValueError, match="it has no weights for some layers of the model, so it is of another model"):
        hub.with_adapter(testbed.load("expert"), short)


def test_a_base_that_is_gone(folders, tmp_path, run):
    for base, message in (
        ("/gone/model", "whose base /gone/model does not exist"),
        (None, "that does not name its base"),
    ):
        moved = _without_base(folders, tmp_path / str(bool(base)), "adapter", base)
        status, _, err = run("generate", "--model", moved, "x")
        assert status == 2
        assert f"is an adapter {message}: give the base as --model, and {moved} as --adapter" in err
        assert run("generate", "--model", "testbed:expert", "--adapter", moved, "--max-new-tokens", "1", "x")[0] == 0
    with pytest.raises(OptionError, match="give the base as model"):
        hub.adapter_base(moved)


def test_adapters_off_needs_an_adapter(run):
    status, _, err = run("generate", "--model", "testbed:expert", "--adapters-off", "x")
    assert status == 2
    assert err == (
        "contralto generate: --adapters-off contrasts a model with itself without its adapter, and testbed:expert has none: give a "
        "folder with an adapter in its place, or --adapter\n"
    )


def test_parts_come_from_the_adapter_or_from_its_base(folders, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    folder = shutil.copytree(folders / "adapter", tmp_path / "own")
    assert hub.from_pretrained(AutoConfig, str(folder)).hidden_size == testbed.load("expert").config.hidden_size
    base = hub.from_pretrained(AutoTokenizer, str(folder))
    base.chat_template = "mine"
    base.save_pretrained(folder)
    assert hub.from_pretrained(AutoTokenizer, str(folder)).chat_template == "mine"


def test_evaluation_reads_adapters(folders):
    from contralto.eval import ContraltoLM

    models = [
        ContraltoLM(str(folders / "adapter"), device="cpu"),
        ContraltoLM("testbed:expert", peft=str(folders / "adapter"), device="cpu"),
        ContraltoLM(str(folders / "merged"), device="cpu"),
    ]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        first, second, merged = (lm.model(ids).logits for lm in models)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, merged, atol=1e-4, rtol=1e-4)
    assert models[0].configuration["weights"] == models[1].configuration["weights"]
    with pytest.raises(ValueError, match="whose weights are others"):
        ContraltoLM("testbed:expert", peft=str(folders / "amateur"), device="cpu")


@pytest.mark.full
@pytest.mark.slow
def test_comparisons_read_adapters(folders, tmp_path, run):
    how = ["--tasks", "testbed_arithmetic", "--methods", "cd", "--limit", 4, "--seeds", 0, "--metadata", '{"n": 4}']
    beside = ["--model", "testbed:expert", "--adapter", folders / "adapter", "--adapters-off"]
    assert run("compare", *how, *beside, "--output", tmp_path / "1")[0] == 0
    assert run("compare", *how, "--model", folders / "adapter", "--adapters-off", "--output", tmp_path / "2")[0] == 0
    both = [json.loads((tmp_path / n / "compare.json").read_text()) for n in "12"]
    scores = [
        [[cell["score"] for cell in row["cells"].values()] for task in each["tasks"] for row in task["rows"]]
        for each in both
    ]
    assert scores[0] == scores[1] != []
    assert both[0]["models"]["expert"]["adapter"] == str(folders / "adapter")


@pytest.mark.slow
def test_data_engines_read_adapters(folders):
    from contralto.data_gen.engines.transformers import TransformersEngine
    from contralto.data_gen.types import Ask, Sampling, make_request

    def answer(**options):
        engine = TransformersEngine(**options)
        ask = Ask(role="r", messages=[{"role": "user", "content": QUESTION}])
        request = make_request(ask, engine=engine.identity, sampling=Sampling(max_new_tokens=12), seed=0, row="0")
        ((_, answered),) = next(iter(engine.answer([request])))
        return answered.text

    adapter, merged = str(folders / "adapter"), str(folders / "merged")
    wanted = answer(model=merged)
    assert answer(model=adapter) == answer(model="testbed:expert", adapter=adapter) == wanted
    assert answer(model="testbed:expert") != wanted
    off = answer(model="testbed:expert", adapter=adapter, method="cd", adapters_off=True)
    assert off == answer(model=adapter, method="cd", adapters_off=True)
    assert off == answer(model=merged, method="cd", amateur="testbed:expert")
    with pytest.raises(ValueError, match="whose weights are others"):
        answer(model="testbed:expert", adapter=str(folders / "amateur"))


def test_the_server_serves_an_adapter_under_its_own_name(folders, monkeypatch):
    from contralto.cli import serve

    monkeypatch.setattr(serve, "cpu_options", lambda options: options)  # needs vLLM
    folder = str(folders / "adapter")
    for argv in ([folder], ["testbed:expert", "--adapter", folder]):
        command, _ = serve.prepare([*argv, "--marker", "7"])
        words = " ".join(command)
        assert f"--lora-modules adapter={folder} --max-lora-rank 8" in words
        assert "--enable-lora" in words
        assert f"--model {testbed.path('expert')}" in words
    with pytest.raises(ValueError, match="an adapter is given, and --lora-modules names others"):
        serve.prepare([folder, "--lora-modules", "x=/x"])


def test_training_says_how_to_go_on_with_an_adapter(folders, tmp_path, run):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    how = [
        "--dataset_name",
        tmp_path / "pairs.jsonl",
        "--output_dir",
        tmp_path / "out",
        "--use_cpu",
        "--report_to",
        "none",
    ]
    status, _, err = run("align", "--model_name_or_path", folders / "adapter", *how)
    assert status == 2
    assert f"and adapter {folders / 'adapter'}" in err
