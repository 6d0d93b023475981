"""The pages about reproducing papers: every paper has one, they are of today, and their commands name what exists."""

import sys
from pathlib import Path

import pytest
import yaml
from helpers.task_index import one_index  # noqa: F401  for every test here
from project.blocks import Block, blocks, command_blocks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generators import papers

from contralto.align.cards.papers import PAPERS
from contralto.recipes.papers import FOLDER, PARTS, expanded, paper_recipes

pytestmark = pytest.mark.slow

PAGES = [f"docs/reproduce/{path.name}" for path in sorted(papers.PAGES.glob("*.md"))]
REMAKE = "python docs/generators/papers.py"


@pytest.mark.slow
def test_every_paper_that_is_cited_as_implemented_has_a_page_and_no_other_has():
    declared, entries = papers.declared(), paper_recipes()
    assert {number: declared[number] for number in declared.keys() - entries.keys()} == {}, "write an entry"
    assert entries.keys() - declared.keys() == set(), "nothing implements these papers"


@pytest.mark.slow
def test_the_pages_are_of_today():
    texts = papers.pages()
    assert {path for path in papers.PAGES.glob("*.md")} == set(texts), REMAKE
    for path, text in texts.items():
        assert path.read_text() == text, f"{path.name}: {REMAKE}"


@pytest.mark.slow
def test_titles_are_written_once():
    for part in PARTS:
        for fields in yaml.safe_load((FOLDER / f"{part}.yaml").read_text()):
            given = fields.keys() & {"title", "authors", "year"}
            assert len(given) == (0 if fields["arxiv"] in PAPERS else 3), (
                fields["arxiv"],
                "see align.cards.papers.PAPERS",
            )


@pytest.mark.slow
def test_pages_are_short_and_whole():
    for entry in paper_recipes().values():
        text = papers.page_of(entry).read_text()
        assert len(text.splitlines()) <= 75, entry.name
        assert entry.here or entry.hub
        assert entry.claim.strip().endswith("."), entry.name


def test_a_paper_is_declared_by_what_implements_it():
    things = papers.declared()
    assert papers.Declaration("method", "cd") in things["2309.09117"]
    assert papers.Declaration("loss", "apo_zero") in things["2408.06266"]
    assert papers.Declaration("recipe", "distill_gkd") in things["2306.13649"]
    assert papers.Declaration("strategy", "clair") in things["2408.06266"]
    assert papers.Declaration("check", "contamination") in things["2005.14165"]
    assert papers.Declaration("code", "contralto.align.trainers.sft.CALTrainer") in things["2405.17871"]
    assert "1512.05287" not in things, "background of a docstring is no implementation"


def test_figures_are_those_of_the_section(monkeypatch):
    page = '# T\n\n## One *line*\n\nIt is 0.25.\n<!-- figures {"a, b": [0.5, 0.4, 0.6]} -->\n\n## Two\n\n0.75\n'
    monkeypatch.setattr(papers, "sections", lambda _: papers.split(page))
    assert papers.figures("{a, b} and 0.25", "x.md#one-line") == "0.500 and 0.25"
    assert papers.figures("{a, c}", "x.md#one-line") == "not measured yet"
    with pytest.raises(ValueError, match=r"does not have 0\.75"):
        papers.figures("0.75", "x.md#one-line")
    with pytest.raises(ValueError, match="has no section three; there are one-line, two"):
        papers.figures("1", "x.md#three")


def test_short_forms_stand_for_commands():
    fields = expanded({"align": "dpo --loss_type ipo", "run": True, "models": "Mine."})
    assert fields["here"].startswith("contralto align dpo --loss_type ipo --model_name_or_path testbed:expert")
    assert (fields["not_run"], fields["models"], fields["files"]) == ("", "Mine.", {"pairs.jsonl": None})
    fields = expanded({"recipe": "strategies: [clair]", "files": {"a.txt": "x"}})
    assert list(fields["files"]) == ["a.txt", "recipe.yaml"]
    assert yaml.safe_load(fields["files"]["recipe.yaml"])["rows"]["arguments"]["count"] == 8


def test_long_commands_are_wrapped_and_read_back():
    command = "contralto align dpo --model_name_or_path testbed:expert --dataset_name pairs.jsonl --conversations --output_dir out"
    text = papers.wrapped(command, width=60)
    assert all(len(line) <= 61 for line in text.splitlines())
    block = Block("page", 1, "sh", "", text + "\n", "")
    assert block.commands == [command.split()]


# ------------------------------------------------------------------------------------------- what the commands of the pages name


def of_program(page, *start):
    """The commands of a page that begin so."""
    commands = [command for block in command_blocks(page) for command in block.commands]
    return [command for command in commands if tuple(command[: len(start)]) == start]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if of_program(page, "contralto", "compare")])
def test_decoders_of_comparisons_exist(page):
    from contralto import cli
    from contralto.eval.comparison.decoders import parse_decoder

    for command in of_program(page, "contralto", "compare"):
        args = cli._parser([cli.COMMANDS["compare"]])[0].parse_args(command[1:])
        sources = {"amateur": (args.amateur or [None])[0], "contrast_prompt": args.contrast_prompt}
        for method in [*filter(None, (args.methods or "").split(",")), *args.decoder]:
            assert parse_decoder(method, sources).config


@pytest.mark.slow
def test_tasks_exist():
    import lm_eval
    from lm_eval.tasks import TaskManager

    from contralto.eval.data import TASKS

    named = [
        Path(lm_eval.__file__).parent / "tasks" / name
        for name in ("gsm8k", "hellaswag", "lambada", "truthfulqa", "ifeval")
    ]
    known = set(TaskManager(include_path=[str(TASKS), *map(str, named)]).all_tasks)
    for page in PAGES:
        for command in [*of_program(page, "contralto", "eval"), *of_program(page, "contralto", "compare")]:
            assert set(command[command.index("--tasks") + 1].split(",")) <= known, (page, command)


def recipes_of(page):
    """The data recipes that a page writes."""
    files = [block for block in blocks(page) if block.title.endswith(".yaml")]
    return [block.title for block in files if "strategies" in yaml.safe_load(block.text)]


STAND_IN = {
    "id": "a",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
    "passages": ["2 and 2 make 4."],
    "answers": ["4"],
    "gold": [0],
}


class StandIn:
    """In place of a reward model of the hub."""

    def __init__(self, name, **_):
        self.identity = ["stand-in", name]

    def load(self):
        pass

    def __call__(self, row, answers):
        return [0.0] * len(answers)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if recipes_of(page)])
def test_data_recipes_are_read_and_their_strategies_begin(page, tmp_path, monkeypatch):
    from contralto.data_gen import pipeline
    from contralto.data_gen.recipe import load_recipe
    from contralto.data_gen.rows import read_rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("contralto.data_gen.scorers.RewardModel", StandIn)
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    for name in recipes_of(page):
        recipe = load_recipe(Path(name))
        computed = ":" in recipe.rows.source
        pipeline.check(recipe, read_rows(recipe.rows, folder=tmp_path)[:1] if computed else [STAND_IN])
