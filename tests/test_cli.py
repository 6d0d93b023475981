"""The command line, in process, on the embedded models: what it prints, what it writes, how it fails.

Seen to go red with: the contrast left out of `generate`, a resumed run that decodes rows again, another seed after a
resume, a flag that is not passed on.
"""

import json

import pytest

from contralto import cli, generate, testbed

QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"
CONTRAST = ["--model", "testbed:expert", "--amateur", "testbed:amateur"]


@pytest.fixture
def run(capsys):
    """Run a command; give its status, its standard output and its standard error."""

    def call(*argv):
        status = cli.main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return call


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_streams_and_compares(run):
    status, out, _ = run("generate", *CONTRAST, "--compare", "greedy", QUESTION)
    assert status == 0
    contrastive, greedy = out.split("--- greedy\n")
    assert contrastive.startswith("--- cd\n")
    assert contrastive.endswith("sells 3: 16 - 3 = 13. #### 13\n")
    assert greedy.endswith("loses 2: 13 - 2 = 11. #### 11\n")


def test_several_prompts_are_shown_one_after_another(run):
    other = "Tom has 12 pens. He buys 8. How many pens does Tom have?"
    _, out, _ = run("generate", *CONTRAST, QUESTION, other)
    assert out.startswith(f"=== 0: {QUESTION}\n")
    assert out.endswith(f"=== 1: {other}\nbuys 8: 12 + 8 = 20. #### 20\n")


def test_without_an_amateur_it_is_plain(run):
    _, out, _ = run("generate", "--model", "testbed:expert", QUESTION)
    assert out.endswith("#### 11\n")


def test_raw_text_and_li_form_with_beams(run):
    how = ["--raw", "--form", "li", "--amateur-window", 1, "--beams", 3, "--max-new-tokens", 9]
    status, out, err = run("generate", *CONTRAST, *how, "Ben went out to the barn door.")
    assert (status, err) == (0, "")
    assert out.startswith("=== 0: Ben went out to the barn door.\nHe ")


def test_jsonl_from_a_file_with_comparison_and_resume(run, tmp_path, monkeypatch):
    problems = [f"Tom has {n} pens. He buys 3, sells 2. How many pens does Tom have?" for n in range(4, 9)]
    rows = [{"messages": [{"role": "user", "content": problems[0]}]}, *({"prompt": p} for p in problems[1:])]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = [*CONTRAST, "--file", source, "--batch-size", 2, "--sample", "--seed", 3, "--compare", "plain"]
    assert run("generate", *how, "--output", target)[0] == 0
    whole = _rows(target)
    assert [row["index"] for row in whole] == list(range(5))
    assert [row["prompt"] for row in whole] == [rows[0]["messages"], *problems[1:]]
    assert all({"text", "plain"} <= set(row) for row in whole)
    assert whole[0]["settings"]["seed"] == 3

    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][:40])  # killed in the middle of a row
    decoded = []
    decode = generate._decode
    monkeypatch.setattr(
        generate, "_decode", lambda batch, *a, **k: decoded.append(len(batch)) or decode(batch, *a, **k)
    )
    assert run("generate", *how, "--output", target, "--resume")[0] == 0
    assert decoded == [2, 1]
    assert _rows(target) == whole

    status, _, err = run("generate", *how, "--output", target)
    assert (status, err) == (
        2,
        f"contralto generate: {target} exists: add --resume to go on with it, or name another file\n",
    )
    status, _, err = run("generate", *how, "--beta", 1, "--output", target, "--resume")
    assert status == 2
    assert "was made with another beta: use the same, or name another file" in err


def test_prompts_from_standard_input(run, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n"))
    _, out, _ = run("generate", *CONTRAST)
    assert out.endswith("#### 13\n")


def test_adapters_off(run, tmp_path):
    """A folder with adapters whose effect is the amateur's habit turned off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=None)
    model = testbed.load("expert")
    model.config._name_or_path = str(testbed.path("expert"))
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    testbed.tokenizer().save_pretrained(tmp_path)
    status, out, _ = run("generate", "--model", tmp_path, "--adapters-off", QUESTION)
    assert status == 0
    assert out.endswith("#### 11\n")  # fresh adapters change nothing, so the branches are equal


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "testbed:expert", "--method", "cd", "x"], "give --amateur MODEL, or --adapters-off"),
        ([*CONTRAST, "--method", "none", "x"], "--method none uses no amateur"),
        ([*CONTRAST, "--adapters-off", "x"], "give either --amateur or --adapters-off, not both"),
        (["--model", "testbed:expert", "--compare", "greedy", "x"], "--method none has no contrast"),
        (["--model", "testbed:novice", "x"], "the testbed has no model 'novice'; it has expert,"),
        ([*CONTRAST, "--alpha", "2", "x"], "alpha must lie in [0, 1]"),
        ([*CONTRAST, "--form", "li", "--beta", "1", "x"], "form='li' has no beta"),
        ([*CONTRAST, "--sample", "--temperature", "0", "x"], "--temperature must be above 0, not 0.0"),
        ([*CONTRAST, "--top-p", "0", "x"], "--top-p must lie in (0, 1], not 0.0"),
        ([*CONTRAST, "--batch-size", "0", "x"], "--batch-size must be at least 1, not 0"),
        (
            [*CONTRAST, "--dtype", "float99", "x"],
            "--dtype must be auto or a torch dtype such as bfloat16, not 'float99'",
        ),
        ([*CONTRAST, "--resume", "x"], "--resume goes on with an --output file: name it"),
        ([*CONTRAST, "--file", "nowhere.txt"], "nowhere.txt"),
        ([*CONTRAST, "--file", "nowhere.txt", "x"], "either as arguments or with --file, not both"),
        ([*CONTRAST[:2], "--amateur", "no/such-model-here", "x"], "no/such-model-here"),
    ],
)
def test_mistakes_end_in_one_sentence(run, argv, message):
    status, out, err = run("generate", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("contralto generate: ")
    assert message in err
    assert "Traceback" not in err


def test_other_tokenizers_are_refused(run, tmp_path):
    tokenizer = testbed.tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    testbed.load("amateur").save_pretrained(tmp_path)
    _, _, err = run("generate", "--model", "testbed:expert", "--amateur", tmp_path, "x")
    assert "have different tokenizers (1 tokens differ, such as 'another')" in err


def test_an_amateur_that_does_not_fit_is_refused(run, monkeypatch):
    free = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    _, _, err = run("generate", *CONTRAST, "--device", "cpu", "x")
    assert "testbed:expert holds 0.0 GiB of weights, and 0.0 GiB of memory are free" in err


def test_rows_without_a_prompt_are_named(run, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    _, _, err = run("generate", *CONTRAST, "--file", source)
    assert f"{source}:2: a row needs a prompt or messages, and has only question" in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="alpha"):
        cli.main(["generate", "--debug", *CONTRAST, "--alpha", "2", "x"])


def test_help_and_version(capsys):
    for argv, expected in (
        (["--help"], "generate"),
        (["generate", "--help"], "--amateur-window"),
        (["--version"], "0."),
    ):
        with pytest.raises(SystemExit, match="0"):
            cli.main(argv)
        assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_demo(run, tmp_path):
    page = tmp_path / "demo.html"
    status, out, _ = run("demo", "--problems", 60, "--html", page)
    assert status == 0
    assert out.count("Problem ") == 3
    assert "contrastive over greedy" in out
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_demo_refuses_too_few_problems(run):
    _, _, err = run("demo", "--problems", 3)
    assert err == "contralto demo: --problems must be at least 10, not 3: fewer say nothing\n"
