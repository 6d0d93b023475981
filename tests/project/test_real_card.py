"""The card of real models: results survive a kill, sections replace each other alone, and every line runs at toy size."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.scripts import run_script

from contralto.eval import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LINES = sorted(
    path.stem
    for path in (BENCHMARKS / "real" / "lines").glob("*.py")
    if "\nLINE = " in path.read_text(encoding="utf-8")
)
"""The modules that define a line."""


@pytest.fixture
def real(monkeypatch):
    """Import the framework as the script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from real import easy_vqa_data, line, report, tables, units

    parts = {"line": line, "report": report, "units": units, "tables": tables, "easy_vqa": easy_vqa_data}
    return type("Real", (), parts)


def make_line(real, name="counts", revision=1):
    def run(context):
        keys = [context.key(row=i) for i in range(context.sizes["rows"])]
        context.units().fill(keys, lambda batch: [10 * i for i in batch], title=name, batch_size=2)

    def render(context):
        values = context.units().of([context.key(row=i) for i in range(context.sizes["rows"])])
        if values is None:
            return None
        return real.line.Section([f"sum {sum(values)}"], {"sum": real.line.Figure(sum(values), 0, 50)})

    sizes = {"full": {"rows": 5}, "small": {"rows": 2}}
    own = {"name": name, "title": name.title(), "question": "How much?", "order": 1, "needs": (), "revision": revision}
    return real.line.Line(**own, **sizes, run=run, render=render)


def make_context(real, folder, **options):
    return real.line.Context(make_line(real, **options), {}, None, folder, False)


def test_a_run_that_was_cut_short_goes_on(real, tmp_path):
    """The line that a kill left half written is computed again; the others are not."""
    context = make_context(real, tmp_path)
    context.line.run(context)
    path = tmp_path / "counts" / "units.jsonl"
    whole = path.read_bytes()
    assert whole.count(b'"value"') == 5
    path.write_bytes(whole[: whole.rfind(b'{"key"') + 9])
    again, asked = make_context(real, tmp_path), []
    keys = [again.key(row=i) for i in range(5)]
    assert again.line.render(again) is None
    again.units().fill(keys, lambda batch: [asked.append(i) or 10 * i for i in batch], title="again")
    assert asked == [4]
    assert again.line.render(make_context(real, tmp_path)).lines == ["sum 100"]
    assert [json.loads(line)["value"] for line in path.read_text().splitlines() if "value" in line] == [
        0,
        10,
        20,
        30,
        40,
    ]


def test_a_raised_revision_does_not_find_older_results(real, tmp_path):
    context = make_context(real, tmp_path)
    context.line.run(context)
    assert context.line.render(make_context(real, tmp_path, revision=2)) is None


def test_a_missing_result_cannot_be_written(real, tmp_path):
    with pytest.raises(ValueError, match="must not be None"):
        make_context(real, tmp_path).units().add({"row": 0}, None)


def test_a_section_replaces_its_own_alone(real, tmp_path):
    card = tmp_path / "card.md"
    known = {name: make_line(real, name) for name in ("one", "two")}
    contexts = {name: real.line.Context(line, {}, None, tmp_path, False) for name, line in known.items()}
    real.report.write(card, known, {})
    assert card.read_text().count(real.report.NOT_RUN) == 2
    for name in ("one", "two"):
        real.report.write(card, known, {name: (contexts[name], real.line.Section([f"body of {name}"]))})
    first = card.read_text()
    assert "body of one" in first
    assert "body of two" in first
    assert real.report.NOT_RUN not in first
    real.report.write(card, known, {"two": (contexts["two"], real.line.Section(["another body"]))})
    assert card.read_text() == first.replace("body of two", "another body")


def test_another_run_is_compared_with_the_intervals_of_the_card(real, tmp_path, capsys):
    context, card = make_context(real, tmp_path), tmp_path / "card.md"
    with pytest.raises(ValueError, match="no figures of the line 'counts'"):
        real.report.compare(card, context, real.line.Section([]))
    figure = real.line.Figure
    real.report.write(
        card, {"counts": context.line}, {"counts": (context, real.line.Section([], {"a": figure(1, 0, 2)}))}
    )
    assert real.report.compare(card, context, real.line.Section([], {"a": figure(1.5, 1, 2)}))
    assert not real.report.compare(card, context, real.line.Section([], {"a": figure(2.5, 1, 3)}))
    assert capsys.readouterr().out.count("card 1 [0, 2]") == 2


def test_answers_of_several_models_are_compared_picture_by_picture(real):
    """One model and one question per picture give McNemar's test; two models that agree are no further evidence."""
    control, hits = np.zeros((1, 12), dtype=bool), np.zeros((1, 12), dtype=bool)
    control[0, 0], hits[0, 1:8] = True, True
    found = real.tables.against_clustered(control, hits, range(12))
    assert (found.won, found.lost, found.value) == (7, 1, 0.5)
    assert found.p == pytest.approx(stats.mcnemar_exact(control[0], hits[0]).p)
    assert found.detectable == pytest.approx(stats.detectable(12, 8 / 12), abs=1e-3)
    twice = real.tables.against_clustered(control.repeat(2, 0), hits.repeat(2, 0), range(12))
    assert (twice.won, twice.value, twice.p, twice.detectable) == (14, 0.5, found.p, found.detectable)
    together = real.tables.against_clustered(control, hits, [0] * 6 + [1] * 6)  # 5 - 1 and 2: p of two units
    assert together.p == pytest.approx(0.5)


def test_drawn_questions_are_balanced_within_both_wordings(real):
    asked = [real.easy_vqa.Asked(f"is there {'not ' * negated}a red shape?", answer, number)
             for number in range(30) for negated in (0, 1) for answer in ("yes", "no")
             if not (negated == 0 and answer == "yes" and number > 6)]  # fmt: skip
    asked.append(real.easy_vqa.Asked("what color is the shape?", "red", 1))
    drawn = real.easy_vqa.balanced(asked * 2, 20, seed=0)
    assert len(drawn) == len(set(drawn)) == 4 * 7
    assert Counter((q.is_negated, q.answer) for q in drawn) == dict.fromkeys(
        [(False, "yes"), (False, "no"), (True, "yes"), (True, "no")], 7
    )


@pytest.mark.slow
def test_every_line_is_found(real):
    found = real.line.lines()
    assert len(found) == len(LINES)
    assert len({line.order for line in found.values()}) == len(found)


@pytest.mark.slow
def test_the_card_in_the_docs_has_a_section_for_every_line(real):
    card = (BENCHMARKS.parent / "docs" / "real_models.md").read_text(encoding="utf-8")
    assert [f"<!-- line: {name} -->" in card for name in real.line.lines()] == [True] * len(LINES)


@pytest.mark.slow
def test_excerpts_are_detokenized_and_show_no_mark_of_rare_words(real, tmp_path):
    """A mark in the prefix rules a paragraph out, one behind it is left out; articles are counted, headings are not read."""
    from real.excerpts import excerpts

    from contralto import testbed

    good = "Ben went out to the barn door , and Mia went home . He saw the <unk> red cat in the half @-@ open yard ."
    bad = "Ben <unk> went out to the barn door , and Mia went home . He saw the red cat in the yard ."
    path = tmp_path / "wiki.txt"
    path.write_text(f" = One = \n \n = = Part = = \n \n {bad} \n \n = Two = \n \n {good} \n", encoding="utf-8")
    tokenizer = testbed.tokenizer()
    (found,) = excerpts(path, tokenizer, prefix=6, rest=12, count=1)
    whole = tokenizer("Ben went out to the barn door, and Mia went home. He saw the red cat in the half-open yard.")[
        "input_ids"
    ]
    assert found.article == 1
    assert [*found.prefix, *found.rest] == whole[:18]
    with pytest.raises(ValueError, match="has 1 paragraphs of 18 tokens or more, fewer than 2"):
        excerpts(path, tokenizer, prefix=6, rest=12, count=2)


# ---------------------------------------------------------------------------------------------------------- lines at toy size


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write public files in small: rows in HellaSwag's format and an article in WikiText's, from the embedded worlds."""
    from itertools import islice

    from contralto.testbed import worlds

    folder = tmp_path_factory.mktemp("data")
    (folder / "hellaswag").mkdir()
    with gzip.open(folder / "hellaswag" / "validation.jsonl.gz", "wt", encoding="utf-8") as file:
        for item in islice(worlds.items(2027, "test"), 8):
            first, second = (
                {"activity_label": "Story", "ctx_a": item.context, "ctx_b": "then"},
                {"label": str(item.label)},
            )
            print(json.dumps({**first, "endings": list(item.endings), **second}), file=file)
    (folder / "wikitext").mkdir()
    stories = [story.text.replace("\n", " ") for story in islice(worlds.stories(2027, "test"), 12)]
    articles = [f" = Tale {i} = \n \n {story} {story} {story} \n" for i, story in enumerate(stories)]
    for part in ("test", "valid"):
        (folder / "wikitext" / f"wikitext2_{part}.txt").write_text("\n".join(articles), encoding="utf-8")
    _draw_easy_vqa(folder / "easy_vqa")
    return folder


def _draw_easy_vqa(folder):
    """Draw pictures of one rectangle and write questions about them, in easy-VQA's format."""
    from PIL import Image

    for half in ("train", "test"):
        (folder / half / "images").mkdir(parents=True)
        asked = []
        for number in range(4):
            picture = Image.new("RGB", (64, 64), (240, 240, 250))
            picture.paste((255, 0, 0) if number % 2 else (0, 0, 255), (10 + number, 20, 30, 40))
            picture.save(folder / half / "images" / f"{number}.png")
            for colour, is_there in (("red", number % 2 == 1), ("blue", number % 2 == 0)):
                asked.append([f"is there a {colour} shape?", "yes" if is_there else "no", number])
                asked.append([f"is there not a {colour} shape?", "no" if is_there else "yes", number])
            asked.append(["what shape is in the image?", "rectangle", number])
        (folder / half / "questions.json").write_text(json.dumps(asked), encoding="utf-8")


MODELS = {"model": "expert", "amateur": "amateur", "pruned": "early", "judge": "expert-1", "embedder": "expert-1"}


OFTEN = ("hellaswag", "conflicts", "inputs")
"""The lines whose toy run is short; those that train or write long texts run in `make test-all`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in LINES]
)
def test_a_line_runs_at_toy_size_and_is_reported_again(module, data, tmp_path):
    """The figures of tiny models mean nothing; every step must run, and a second command must find the results."""
    source = (BENCHMARKS / "real" / "lines" / f"{module}.py").read_text(encoding="utf-8")
    name = source.split("LINE = ")[1].split('name="')[1].split('"')[0]
    models = [text for role, model in MODELS.items() for text in (f"--{role}", f"testbed:{model}")]
    common = [*models, "--data", str(data), "--folder", str(tmp_path), "--small"]
    card = tmp_path / "small" / "real_models.md"
    seen = []
    for command in ([name], ["--report"]):
        result = run_card(*command, *common)
        assert result.returncode == 0, result.stderr
        seen.append(card.read_text(encoding="utf-8").split(f"<!-- line: {name} -->")[1].split("<!-- end")[0])
    assert "Not run yet. Command" not in seen[0]
    assert "Models: " in seen[0]
    assert seen[0] == seen[1]


def run_card(*arguments):
    return run_script(BENCHMARKS / "real_card.py", *arguments)
