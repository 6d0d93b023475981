"""`contralto demo`: the comparison on its page equals direct decoding, and the examples are real completions."""

import re
from itertools import islice

import pytest

from contralto import cli, testbed
from contralto.cli.demo import alignment, comparison, examples, show
from contralto.decoding import methods
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right


def test_too_few_problems_are_refused(capsys):
    assert cli.main(["demo", "--problems", "3"]) == 2
    assert capsys.readouterr().err == "contralto demo: --problems must be at least 10, not 3: fewer say nothing\n"


def test_the_comparison_decodes_as_the_examples():
    parameters = methods.METHODS["cd"].forms["obrien"].parameters.values()
    assert {each.name: each.default for each in parameters} == {"beta": comparison.BETA, "alpha": comparison.ALPHA}


@pytest.mark.slow
def test_the_examples_are_the_first_problems_with_two_texts():
    expert, amateur, tokenizer = testbed.load("expert-0"), testbed.load("amateur"), testbed.tokenizer()
    problems = list(islice(worlds.problems(comparison.PROBLEM_SEED, "test"), 16))
    found = examples.find_examples(problems, expert, amateur, tokenizer)
    assert 0 < len(found) <= 3
    assert all(example.greedy != example.contrastive for example in found)
    texts = decode(expert, tokenizer, problems, processor=comparison.contrast_with(amateur))
    for example in found:
        assert texts[problems.index(example.problem)] == example.contrastive
        assert any(step.changed for step in example.steps)


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_demo(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # tests share the machine, and threads that wait spin
    pairs = [comparison.PAIRS[0], comparison.PAIRS[3]]
    monkeypatch.setattr(comparison, "PAIRS", pairs)
    monkeypatch.setattr(show, "PAIRS", pairs)
    monkeypatch.setattr(alignment, "PAIRS", 32)
    monkeypatch.setattr(alignment, "STEPS", 4)
    page = tmp_path / "demo.html"
    assert cli.main(["demo", "--problems", "16", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.count("Problem ") == 3
    assert "How to read it." in out

    tokenizer, problems = testbed.tokenizer(), list(islice(worlds.problems(comparison.PROBLEM_SEED, "test"), 16))
    greedy_row = next(line for line in out.splitlines() if line.startswith("greedy "))
    *shares, aligned = re.findall(r"(\d\.\d{3}) \[", greedy_row)
    for pair, shown in zip(pairs, shares, strict=True):
        texts = decode(testbed.load(pair.expert), tokenizer, problems)
        assert float(shown) == round(sum(map(is_right, problems, texts)) / 16, 3)

    aligned_row = next(line for line in out.splitlines() if line.startswith("aligned  "))
    assert aligned in aligned_row  # before and after: the same answers as in its own column
    assert any(line.startswith("aligned, cd over greedy ") for line in out.splitlines())

    html = page.read_text()
    assert html.count("<svg") == 4
    assert html.count('<section class="problem">') == 3
    assert "cd over greedy" in html
    assert not re.search(r'(?:href|src)="http', html)
