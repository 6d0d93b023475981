"""The spellings of options: dashes, underscores, names of other tools, and suggestions for unknown names."""

import argparse
from pathlib import Path

import pytest

from contralto import cli
from contralto.cli import options, spellings
from contralto.cli.parser import Parser
from contralto.cli.spellings import respelled, spelled
from contralto.common.suggestions import closest, did_you_mean
from contralto.common.versions import versions
from contralto.decoding.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parsers():
    return {parser.prog.removeprefix("contralto "): parser for parser in options.command_parsers()}


def test_every_option_is_accepted_with_dashes_and_with_underscores(parsers):
    count = 0
    for parser in parsers.values():
        for option in spellings.options_of(parser):
            if option.startswith("--"):
                other = "--" + option[2:].replace("-", "_")
                assert spelled([f"{other}=x"], parser)[:1] == [f"{option}=x"] or option.startswith("--no-")
                assert respelled([other, "a-b_c"], [option]) == [option, "a-b_c"]
                count += other != option
    assert count > 60


def test_help_shows_one_spelling_of_each_option(parsers):
    for parser in parsers.values():
        for action in parser._actions:
            long = [option for option in action.option_strings if option.startswith("--")]
            assert len([option for option in long if not option.startswith("--no-")]) <= 1
            assert not any("_" in option for option in long)


def test_the_page_of_names(parsers):
    page = spellings.page(parsers.values())
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page, "python -m contralto.cli.options"
    assert all(f"`--{alias.name}`" in page for alias in spellings.ALIASES)


def test_an_alias_that_brings_a_method_names_one_with_its_parameter():
    for alias in spellings.ALIASES:
        if alias.implies:
            option, method = alias.implies
            assert option == "--method"
            assert alias.option in METHODS[method].parameters("") or alias.option in METHODS[method].parameters("kl")


SPELLED = {
    "generate --model_name_or_path m --num_beams 2 x": "generate --model m --beams 2 x",
    "generate --model m --do_sample True --top_k 4 --top_p=0.9 x": "generate --model m --sample --top-k 4 --top-p=0.9 x",
    "generate --model m --do_sample=false x": "generate --model m x",
    "generate --model m --adapters_off false --normalize False x": "generate --model m --no-normalize x",
    "generate --model m --no_normalize x": "generate --model m --no-normalize x",
    "generate --model m --max_tokens 3 x": "generate --model m --max-new-tokens 3 x",
    "generate --model m --penalty_alpha 0.6 --top_k 4 x": "generate --model m --alpha 0.6 --k 4 x --method search",
    "generate --model m --method search --penalty_alpha=0.6 x": "generate --model m --method search --alpha=0.6 x",
    "generate --model m --dola_layers high x": "generate --model m --layers high x --method dola",
    "generate --model m -- --do_sample": "generate --model m -- --do_sample",
    "generate --model m --sample Truely": "generate --model m --sample Truely",
    "compare --model_name_or_path a b --tasks t --output_path o": "compare --model a b --tasks t --output o",
    "amateur --output_dir o --model_name_or_path m": "amateur m --output o",
    "amateur --model=m --output o --max_steps 3": "amateur m --output o --steps 3",
    "data run --recipe r.yaml --output_dir o": "data run r.yaml --output o",
    "serve --port 8001 --model m": "serve m --port 8001",
}


@pytest.mark.parametrize("given", SPELLED)
def test_names_of_other_tools(parsers, given):
    """Both command lines mean the same to the parser."""
    expected = SPELLED[given]
    name = " ".join(given.split()[: 2 if given.startswith("data") else 1])
    parser, count = parsers[name], len(name.split())
    plain = argparse.ArgumentParser.parse_known_args(parser, expected.split()[count:])
    assert argparse.ArgumentParser.parse_known_args(parser, spelled(given.split()[count:], parser)) == plain


MISTAKES = {
    "generate --model m --betta 1 x": "there is no option --betta (did you mean --beta?); contralto generate --help lists them",
    "generate --model m --num_beam 1 x": "there is no option --num_beam (did you mean --num_beams?)",
    "generate --model m --top 3 x": "there is no option --top",
    "generate --model m --method rituall x": "(did you mean 'ritual'?)",
    "generate --model m --penalty_alpha 0.6 --method cd x": "--penalty_alpha is an option of --method search, and --method is cd",
    "generate --model m --no_normalize=false x": "argument --normalize/--no-normalize: ignored explicit argument 'false'",
    "genrate --model m": "(did you mean 'generate'?)",
    "compare --tasks t --model m --seed 3": "there is no option --seed (did you mean --seeds?)",
    "generate --output_dir o --model m x": "there is no option --output_dir",
    "data rn r.yaml": "(did you mean 'run'?)",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_unknown_names_are_one_sentence_with_a_suggestion(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert MISTAKES[argv] in said
    assert said.count("\n") == 1


EVAL = {
    "--model_name_or_path m --tasks t": "--model_name_or_path is an argument of the model here: --model_args pretrained=VALUE",
    "--guidance-scale 3 --tasks t": "--guidance-scale is an argument of the model here: --model_args guidance_scale=VALUE",
    "--taks t": "there is no flag --taks (did you mean --tasks?); contralto eval --help lists them",
    "--backend vlm --tasks t": "--backend must be transformers or vllm, not 'vlm' (did you mean 'vllm'?)",
    "--model-args method=cd --tasks t --batch-size 4": "no model: set --model_args pretrained=MODEL",
}


@pytest.mark.parametrize(
    "argv", [pytest.param(argv, marks=[pytest.mark.slow] if "-args" in argv else []) for argv in EVAL]
)
def test_flags_of_eval(argv, capsys):
    assert cli.main(["eval", *argv.split()]) == 2
    assert EVAL[argv] in capsys.readouterr().err


def test_the_help_of_eval_names_what_contralto_adds_first(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    own, _, others = capsys.readouterr().out.partition("-- flags of lm-eval --")
    for word in ("contralto-vlm", "pretrained", "amateur", "contrast_prompt", "--data_dir", "pope_coco", "ritual-vcd"):
        assert word in own
    assert "--num_fewshot" in others
    assert "_world" not in own


def test_versions(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines == versions()
    assert {"contralto", "python", "torch", "transformers", "trl", "lm_eval"} <= lines.keys()


def test_a_library_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr("contralto.common.versions.LIBRARIES", ("torch", "no_such_library"))
    assert list(versions()) == ["contralto", "python", "torch"]


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("apo-zeor", ["apo_zero", "dpo"], "apo_zero"),
        ("VCD", ["cd", "vcd"], "vcd"),
        ("nothing", ["apo_zero", "dpo", "cd"], None),
        ("x", [], None),
        (3, ["30", "x"], "30"),
    ],
)
def test_suggestions(name, names, found):
    assert closest(name, names) == found
    assert did_you_mean(name, names) == (f" (did you mean {found!r}?)" if found else "")


def test_a_parser_without_arguments_reads_those_of_the_process(monkeypatch):
    parser = Parser("contralto x")
    parser.add_argument("--beta-one")
    monkeypatch.setattr("sys.argv", ["contralto", "--beta_one", "2"])
    assert parser.parse_args().beta_one == "2"
