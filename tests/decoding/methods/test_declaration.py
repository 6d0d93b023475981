"""Declarations of decoding methods: a toy method works everywhere, an incomplete or wrong declaration is an error."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from contralto import cli
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.types import Request, Sampling
from contralto.decoding import ContrastiveLogitsProcessor, rules
from contralto.decoding.branches import InputBranch
from contralto.decoding.executors.score import score
from contralto.decoding.inputs import Prompt, batch_of
from contralto.decoding.loading import load_models
from contralto.decoding.methods import (
    METHODS,
    DecodingConfig,
    Form,
    Method,
    Unsupported,
    cost,
    generate_kwargs,
    likelihood_processor,
    logits_processor,
    option_names,
    table,
)
from contralto.decoding.vllm import settings
from contralto.eval.comparison.controls import generation_rows, ranking_rows
from contralto.eval.comparison.decoders import parse_decoder

ROOT = Path(__file__).parents[3]
EXPERT = ["--model", "testbed:expert"]
QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5. How many coins does Mia have?"


def toy_rule(main, other, *, gamma: float = 2.0, floor: float = 0.05):
    """Subtract another prompt.

    Args:
        gamma: how much is subtracted.
        floor: plausibility threshold.
    """
    rules.base.check_strength("gamma", gamma)
    return rules.combine((main, other), (1 + gamma, -gamma), alpha=floor)


class ToyProcessor(ContrastiveLogitsProcessor):
    def __init__(self, model, inputs, *, gamma=2.0, floor=0.05):
        super().__init__(partial(toy_rule, gamma=gamma, floor=floor), [InputBranch(model, inputs)])


FORM = Form(
    rule=toy_rule, internal=(), stacked=False, mask="floor", weight=lambda gamma, **_: 1 + gamma, off={"gamma": 0}
)
TOY = Method(
    name="toy", description="a toy", papers=("0000.00000",), processor=ToyProcessor, loop=None, likelihoods=ToyProcessor,
    forms={"": FORM}, branches=("prompt", "other prompt"), models={}, views=("prompt",), contrast_prompt_optional=False,
    extra={}, beams=Unsupported("has no beams"), sampling=True, row_seeds=True, streaming=True,
    encoder_decoder=Unsupported("is for decoder-only models"), vllm=True,
    cost={"loop": "{rows} rows, gamma {gamma}", "processor": "{rows} forwards"},
)  # fmt: skip


@pytest.fixture
def toy(registered):
    return registered(TOY)


@pytest.fixture
def run(capsys):
    def call(*argv):
        status = cli.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        return status, out, err

    return call


# --------------------------------------------------------------------------------------------------------- a toy method


def test_it_is_run_by_every_executor(toy):
    config = DecodingConfig(method="toy", parameters={"gamma": 1}, contrast_prompt="Tom has 3 coins.")
    models = load_models("testbed:expert", config, with_images=False, dtype="float32", device="cpu")
    prompt = Prompt(QUESTION, contrast=config.contrast_prompt)
    batch = batch_of([prompt], models, config, seeds=[0], raw=False)
    search = {"max_new_tokens": 12, "do_sample": False}
    texts = [
        models.main.generate(
            **batch.inputs, **search, **generate_kwargs(dataclasses.replace(config, executor=name), batch)
        )
        for name in toy.executors
    ]
    assert torch.equal(texts[0], texts[1])
    by_hand = ToyProcessor(models.main, batch.views[0], gamma=1.0)
    assert torch.equal(texts[0], models.main.generate(**batch.inputs, **search, logits_processor=[by_hand]))
    start = batch.inputs["input_ids"].shape[1]
    found = score(likelihood_processor(config, batch), models.main, batch.inputs, texts[0][:, start:])
    assert found.is_greedy.all()
    assert isinstance(logits_processor(config, batch), ToyProcessor)
    assert cost(config, models.main, ()) == "toy: 2 rows, gamma 1.0"


def test_it_is_a_choice_of_the_commands(toy, run, tmp_path):
    how = [*EXPERT, "--method", "toy", "--contrast-prompt", "Tom has 3 coins.", "--max-new-tokens", 4]
    status, out, err = run("generate", *how, "--gamma", 1, QUESTION)
    assert (status, err) == (0, "toy: 2 rows, gamma 1.0\n")
    page = tmp_path / "page.html"
    assert run("explain", *how, "--gamma", 1, "--html", page, QUESTION)[:2] == (
        0,
        out + f"\n{page} shows why; " + _last(page, out),
    )
    assert "gamma 1.0, floor 0.05" in page.read_text()


def _last(page, out):
    changed = page.read_text().count('class="changed"')
    return f"tokens that greedy search would not have chosen: {changed} of 4\n"


def test_its_flags_are_in_the_help(toy, run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("generate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "toy a toy --contrast-prompt --gamma 2.0 --floor 0.05" in text
    assert "; how much is subtracted (toy)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kappa", "1"], "--method toy has no --kappa; its own are --contrast-prompt, --gamma, --floor, --gate"),
        (["--gamma", "-1"], "gamma must be a finite number of at least 0"),
        (["--beams", "2"], "--method toy has no beams: leave --beams out"),
        ([], "--method toy contrasts prompts, and prompt 0 has no contrast prompt: set --contrast-prompt"),
    ],
)
def test_its_errors(toy, run, flags, message):
    status, _, err = run("generate", *EXPERT, "--method", "toy", *flags, QUESTION)
    assert status == 2
    assert message in err


def test_it_is_known_to_vllm_and_the_documentation(toy):
    values = {
        "contrast_id": 1,
        "contrast_branch": 1,
        "contrast_marker": 0,
        "contrast_method": "toy",
        "contrast_gamma": 3,
    }
    row = settings.Row.of(values)
    assert row.rule.parameters == (("gamma", 3.0), ("floor", 0.05))
    logits = list(torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(row.rule(logits, torch.zeros(3)), toy_rule(*logits, gamma=3.0))
    parameters = "`gamma=2.0`, `floor=0.05`, `gate=None`"
    assert table.row(toy)[:5] == ["toy", "a toy", "0000.00000", "prompt, other prompt", parameters]
    assert {"gamma", "floor"} <= set(option_names())


def test_it_has_all_controls_of_a_comparison(toy):
    choice = parse_decoder("toy gamma=1", {"contrast_prompt": "{prompt}"})
    names = {row.name for row in generation_rows([choice], sampled=True)}
    assert {"greedy, mask 0.05", "sampling, mask 0.05", "sampling, mask 0.05, T 0.5", "toy gamma=1, sampling"} <= names
    off = next(row for row in ranking_rows([choice]) if row.name == "plain, mask 0.05")
    assert (off.options["control"], off.options["masked"]) == ("mask", True)


def test_it_makes_data(toy):
    with pytest.raises(ValueError, match="method='toy' contrasts prompts: set contrast_prompt"):
        TransformersEngine(model="testbed:expert", method="toy")
    engine = TransformersEngine(model="testbed:expert", method="toy", gamma=1, contrast_prompt="Tom has 3 coins.")
    assert engine.identity["options"] == {"contrast_prompt": "Tom has 3 coins.", "gamma": 1.0, "floor": 0.05}
    messages, sampling = [{"role": "user", "content": QUESTION}], Sampling(max_new_tokens=4)
    request = Request(key="0", messages=messages, prompt=None, images=(), sampling=sampling, seed=0)
    ((pair,),) = engine.answer([request])
    assert pair[1].completion_tokens == 4


# --------------------------------------------------------------------------------------------------- wrong declarations


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Method) if each.init])
def test_every_field_of_a_method_is_required(name):
    values = {each.name: getattr(TOY, each.name) for each in dataclasses.fields(Method) if each.init}
    del values[name]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
        Method(**values)


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Form)])
def test_every_field_of_a_form_is_required(name):
    values = {each.name: getattr(FORM, each.name) for each in dataclasses.fields(Form)}
    del values[name]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
        Form(**values)


def untyped_rule(main, other, *, gamma=2.0):
    return main


def gated_rule(main, other, *, gamma: float = 2.0, floor: float = 0.05, gate: float = 0.9):
    """Have a gate of its own.

    Args:
        gamma: how much is subtracted.
        floor: plausibility threshold.
        gate: where nothing is subtracted.
    """
    return main


def bare_rule(main, other, *, gamma: float):
    return main


class DeafProcessor(ContrastiveLogitsProcessor):
    def __init__(self, model, inputs, *, gamma=2.0):
        raise NotImplementedError


WRONG = [
    ({"branches": ("prompt",)}, "it has 1 branches, but 1 models or views in addition to the main branch"),
    ({"views": ("upside down",)}, "there is no view 'upside down'; there are noised, transformed, blind, prompt"),
    ({"models": {"amateur": "x"}}, "a method may have models or views, not both"),
    ({"forms": {}}, "a method with a form needs a processor or a loop, and only such a method"),
    ({"forms": {"": FORM, "other": FORM}}, "each form of a method with several forms needs a name"),
    (
        {"views": ("blind",), "contrast_prompt_optional": True},
        "contrast_prompt_optional is only for methods with the view 'prompt'",
    ),
    ({"processor": DeafProcessor}, "has no parameter 'floor'"),
    ({"cost": {"loop": "1"}}, "cost must have a line for each of loop, processor, not for loop"),
    ({"cost": {"loop": "{kappa}", "processor": "1"}}, "cost names 'kappa', which is not a parameter"),
    ({"extra": {"gamma_2": METHODS["search"].extra["k"]}}, "extra 'gamma_2' is not a parameter of"),
    ({"mask": "alpha"}, "mask names 'alpha', which is not a parameter of the rule"),
    ({"off": {"alpha": 0}}, "off names 'alpha', which is not a parameter of the rule"),
    ({"internal": ("step",)}, "internal names 'step', which is not a parameter of the rule"),
    ({"weight": lambda alpha, **_: alpha}, "weight cannot be computed from the parameters of the rule"),
    ({"rule": untyped_rule, "mask": None}, "the parameter 'gamma' must be annotated as one of float, int, bool"),
    ({"rule": gated_rule}, "'gate' names the gate of every method with branches"),
    ({"rule": bare_rule, "mask": None}, "the parameter 'gamma' needs a default"),
    (
        {"rule": rules.ritual_vcd},
        r"the rule has the branches \('original', 'transformed', 'distorted'\), and the method has 2",
    ),
    ({"rule": "contralto.decoding.rules:no_such_rule"}, "defines no function or class 'no_such_rule'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_declaration_is_an_error(changes, message):
    of_form = {
        name: value for name, value in changes.items() if name in {each.name for each in dataclasses.fields(Form)}
    }
    changes = {"forms": {"": dataclasses.replace(FORM, **of_form)}} if of_form else changes
    with pytest.raises(ValueError, match=f"method 'toy': .*{message}"):
        dataclasses.replace(TOY, **changes)


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="there is already a method 'toy'"):
        METHODS.register(dataclasses.replace(TOY, description="another"))
    with pytest.raises(ValueError, match=r"it must be a Method of contralto\.decoding\.methods, not a dict"):
        METHODS.register({"name": "x"})


# -------------------------------------------------------------------------------------------------------- other packages


def _install(folder, points):
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[contralto.methods]\n{points}\n")
    code = "from dataclasses import replace\nfrom contralto.decoding.methods import METHODS\n"
    (folder / "toys.py").write_text(f"{code}AGAIN = replace(METHODS['vcd'], name='again')\n")


def _in_another_process(folder, code):
    path = f"import sys; sys.path.insert(0, {str(folder)!r}); "
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_method_of_another_package_is_found(tmp_path):
    _install(tmp_path, "again = toys:AGAIN")
    code = "from contralto.decoding.methods import *; print(DecodingConfig(method='again', parameters={'alpha': 2}).parameters)"
    done = _in_another_process(tmp_path, code)
    assert done.stdout == "{'alpha': 2.0, 'beta': 0.1, 'noise_step': 500, 'gate': None}\n", done.stderr


def test_a_broken_package_is_named(tmp_path):
    _install(tmp_path, "again = toys:MOVED")
    done = _in_another_process(
        tmp_path, "from contralto.cli import main; sys.exit(main(['generate', '--model', 'x', 'y']))"
    )
    assert done.returncode == 2
    assert "the method 'again' of the package toys cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------- built-in methods


def test_the_documentation_is_that_of_the_declarations():
    assert (ROOT / "docs" / "methods.md").read_text() == table.document(), "python -m contralto.decoding.methods.table"


def test_the_documentation_shows_prompts_that_may_be_left_out_and_the_scripts_of_a_class():
    (cfg,) = re.findall(r"^\| cfg \| `Cl.*$", table.document(), re.MULTILINE)
    (cd,) = re.findall(r"^\| cd \| `Co.*$", table.document(), re.MULTILINE)
    assert "LogitsProcessor(model, negative_inputs=None)`" in cfg
    assert cfg.endswith("[cfg.py](../examples/cfg.py) |")
    assert "[cd.py]" in cd
    assert "vcd.py" not in cd


def test_the_readme_names_the_class_of_every_method():
    readme = (ROOT / "README.md").read_text()
    for method in METHODS.values():
        for target in filter(None, (method.processor, method.loop)):
            assert f"`{target.split(':')[1]}`" in readme


def test_parsed_signatures_are_those_of_the_imported_functions():
    from contralto.decoding.methods.reference import argument_docs, load, signature_of

    for method in METHODS.values():
        targets = [form.rule for form in method.forms.values()] + [t for t in (method.processor, method.loop) if t]
        for target in targets:
            parsed, real = signature_of(target).parameters, signature_of(load(target)).parameters
            assert {n: (p.kind, p.default) for n, p in parsed.items()} == {
                n: (p.kind, p.default) for n, p in real.items()
            }
            assert argument_docs(target) == argument_docs(load(target))
        for form in method.forms:
            assert all(parameter.description for parameter in method.parameters(form).values())


def test_a_configuration_is_data():
    config = DecodingConfig.from_options(method="cd", amateur="testbed:amateur", beta=1)
    assert json.loads(json.dumps(config.describe()))["beta"] == 1.0
    assert dataclasses.replace(config, beams=3, executor=None).executor == "processor"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beams = 2
