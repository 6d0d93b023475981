"""The card describes the data set: every figure is recomputed, every number of the summary is shown."""

import re
import statistics
from functools import partial

import pytest
import yaml

from contralto.common.hashing import source_digest
from contralto.data_gen import card, checks
from contralto.data_gen import dataset as rows
from contralto.data_gen.score_memory import noted_scorers
from contralto.data_gen.scorers import chrf, score_answers
from contralto.testbed import questions as world
from contralto.testbed import worlds

pytestmark = pytest.mark.slow


def _pairs(count=24):
    """Revisions of solutions that stop early, and pairs of two styles, as strategies would make them."""
    made = []
    for number, problem in zip(range(count), worlds.problems(5, "test"), strict=False):
        whole, early = problem.solution(), problem.solution(stop_after=max(0, len(problem.steps) - 2))
        other = problem.solution("brief", stop_after=len(problem.steps) - 1)
        for strategy, rejected in (("clair", early), ("stronger_preferred", other)):
            made.append(
                {
                    "id": f"{number}-{strategy}",
                    "prompt": [{"role": "user", "content": problem.question}],
                    "chosen": [{"role": "assistant", "content": whole}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "strategy": strategy,
                    "chosen_finish_reason": "stop",
                    "rejected_finish_reason": "length" if number == 0 else "stop",
                }
            )
            if strategy == "clair":
                made[-1]["direction"] = "chosen" if number % 6 else "unclear"
    return made


SUMMARY = {
    "recipe": {"rows": "prompts.jsonl", "strategies": ["clair", "stronger_preferred"], "checks": {"contrast": {}}},
    "models": {
        "target": {"engine": "transformers", "model": "some/model"},
        "reviser": {"engine": "openai", "model": "a|b", "base_url": "x"},
    },
    "counts": {
        "rows": 30,
        "pairs": 48,
        "rejected": {"no heading | at all": 3, "all 8 answers score the same": 2},
        "failed": {"HTTP 500 five times": 1},
        "dropped": {"levenshtein above 800": 6},
    },
    "costs": [
        {
            "role": "target",
            "requests": 30,
            "prompt_tokens": 1111,
            "completion_tokens": 2222,
            "money": 0,
            "currency": "USD",
        },
        {
            "role": "reviser",
            "requests": 29,
            "prompt_tokens": 3333,
            "completion_tokens": 4444,
            "money": 1.2345,
            "currency": "EUR",
        },
    ],
    "templates": {"clair@0123456789ab": 29},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set's folder with its card, as `contralto data export` leaves it."""
    folder = tmp_path_factory.mktemp("cards") / "sums-and-differences"
    pairs = checks.annotate(
        _pairs(), {"contrast": {}, "finish": {}, "reward": {"scorer": "contralto.testbed.questions:score"}}
    )
    (folder / "data").mkdir(parents=True)
    rows.to_dataset(pairs).to_parquet(folder / "data" / "train.parquet")
    path = card.write(folder, pairs, SUMMARY)
    return folder, pairs, path.read_text()


def _table(page, head):
    """The lines of the table under a heading, as lists of cells."""
    lines = page.partition(f"## {head}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]


def test_every_contrast_is_recomputed(made):
    _, pairs, page = made
    head, _, *lines = _table(page, "Contrast")
    assert head == [
        "strategy",
        "pairs",
        "Jaccard, mean",
        "Levenshtein, mean",
        "length, median",
        "the same",
        "whole",
        "direction",
        "margin, mean",
    ]
    for line, name in zip(lines, ("clair", "stronger_preferred"), strict=True):
        mine = [pair for pair in pairs if pair["strategy"] == name]
        texts = [[pair[side][0]["content"] for side in ("chosen", "rejected")] for pair in mine]
        words = [[set(text.split()) for text in both] for both in texts]
        shared = statistics.mean(len(a & b) / len(a | b) for a, b in words)
        margins = [a - b for a, b in (world.score(p, t) for p, t in zip(mine, texts, strict=True))]
        assert line[:3] == [name, "24", f"{shared:.3f}"]
        assert line[4] == f"{statistics.median(len(a) / len(b) for a, b in texts):.2f}"
        assert line[5] == f"{sum(a == b for a, b in texts) / 24:.1%}"
        assert line[6] == f"{23 / 24:.1%}"
        assert line[7] == ("20 of 24" if name == "clair" else "")
        assert line[8] == f"{statistics.mean(margins):.3g}"


def test_scorers_and_functions_have_the_hash_of_their_code(tmp_path, made):
    _, pairs, page = made
    assert "## Scorers" not in page
    assert (
        "*Margin* is the score of the chosen answer minus that of the rejected one, in the unit of the scorer below."
        in page
    )
    models = {**SUMMARY["models"], "reviser": {"engine": "function", "model": "mine:revise", "source": "ab12"}}
    about = SUMMARY | {"scorers": {"mine:shortest": "0123", "mine:partial": ""}, "models": models}
    card.write(tmp_path, pairs, about)
    page = (tmp_path / "README.md").read_text()
    assert _table(page, "Scorers")[2:] == [["mine:shortest", "0123"], ["mine:partial", "not known"]]
    assert _table(page, "Who wrote it, and what it cost")[3][1] == "mine:revise @ ab12"
    assert "scorers below" in page
    assert "from contralto.data_gen import load_pairs" in page


def test_the_scorers_of_an_export_are_noted():
    row = {"id": "a", "reference": "x"}
    with noted_scorers() as used:
        assert score_answers(chrf, row, ["x"]) == [100.0]
        score_answers(partial(chrf), row, ["x"])
    assert used == {"contralto.data_gen.scorers:chrf": source_digest(chrf), "functools:partial": ""}
    score_answers(chrf, row, ["y"])
    assert len(used) == 2


def test_what_is_not_known_is_left_out():
    pairs = _pairs(3)
    for pair in pairs:
        del pair["chosen_finish_reason"], pair["strategy"]
        pair.pop("direction", None)
    (found,) = card.contrastiveness(pairs)
    assert (found.strategy, found.pairs, found.finished, found.agreed, found.judged) == ("unknown", 6, None, None, 0)
    assert card.markdown([found]).splitlines()[0].count("|") == 7
    assert "direction" not in card.markdown([found])


def test_counts_costs_and_prompts(made):
    page = made[2]
    assert _table(page, "What became of the rows")[2:] == [
        ["prompts", "30"],
        ["pairs", "48"],
        ["no pair: no heading \\| at all", "3"],
        ["no pair: all 8 answers score the same", "2"],
        ["no answer: HTTP 500 five times", "1"],
        ["dropped by a filter: levenshtein above 800", "6"],
    ]
    assert _table(page, "Who wrote it, and what it cost")[2:] == [
        ["target", "some/model", "transformers", "30", "1111", "2222", "-"],
        ["reviser", "a\\|b", "openai", "29", "3333", "4444", "1.23 EUR"],
    ]
    assert _table(page, "Prompts")[2:] == [["clair@0123456789ab", "29"]]
    assert yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0]) == SUMMARY["recipe"]
    assert "words, split at white space" in page


def test_the_header_is_what_the_hub_reads(made):
    from datasets import load_dataset

    folder, _, page = made
    header = yaml.safe_load(page.split("---\n")[1])
    assert header["pretty_name"] == "sums-and-differences"
    assert header["size_categories"] == ["n<1K"]
    assert load_dataset(str(folder), split="train").num_rows == 48
    (folder / "data" / "train.jsonl").write_text("{}\n")
    assert load_dataset(str(folder), split="train").num_rows == 48


def test_examples_are_quoted_as_they_are(tmp_path):
    pair = {**_pairs(1)[0], "chosen": [{"role": "assistant", "content": "# <b>big</b> | ``` \n\n" + "x" * 2000}]}
    page = card.write(tmp_path, [pair], {**SUMMARY, "costs": [], "templates": {}, "name": "my pairs"}).read_text()
    assert "\n# my pairs\n" in page
    assert "\n    # <b>big</b> | ```\n\n    xxx" in page
    assert "x [...]\n" in page
    assert "## Prompts" not in page
    assert "`images`" not in page


def test_the_plot_has_a_panel_for_each_measure(made):
    from PIL import Image

    folder = made[0]
    with Image.open(folder / "plots" / "contrast.png") as image:
        assert image.format == "PNG"
        assert image.size[0] > 1000
    page = made[2]
    assert "](plots/contrast.png)" in page


def test_a_card_needs_pairs(tmp_path):
    with pytest.raises(ValueError, match="at least one pair"):
        card.write(tmp_path, [], SUMMARY)


def test_licence_language_and_date_are_those_of_the_recipe(tmp_path, made):
    _, pairs, page = made
    front = yaml.safe_load(page.split("---\n")[1])
    assert "license" not in front
    assert "language" not in front
    assert "| not stated | not stated | not stated |" in page
    assert "The recipe does not say license, language, date, and nothing was guessed." in page
    said = yaml.safe_load("{license: cc-by-4.0, language: [en, 'no'], date: 2026-11-29}")
    page = card.write(tmp_path, pairs, {**SUMMARY, "recipe": SUMMARY["recipe"] | said}).read_text()
    front = yaml.safe_load(page.split("---\n")[1])
    assert (front["license"], front["language"]) == ("cc-by-4.0", ["en", "no"])
    assert "| cc-by-4.0 | en, no | 2026-11-29 |" in page
    assert "nothing was guessed" not in page


def test_the_plot_can_be_read_on_dark_paper(made):
    from PIL import Image

    folder, _, _ = made
    with Image.open(folder / "plots" / "contrast.png") as image:
        corner = image.convert("RGBA").getpixel((0, 0))
    assert corner == (255, 255, 255, 255)
