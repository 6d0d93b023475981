"""The pages about reproducing papers, from the recipes in `recipes/reproduce/`.

python docs/generators/papers.py     write them anew into docs/reproduce/

What contralto implements of a paper is not written in its recipe but found in declarations, recipes and docstrings, see `declared`.
"""

import ast
import html
import json
import os.path
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
for _folder in (ROOT, ROOT / "tests", ROOT / "docs"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from project import structure

from contralto.recipes.papers import PARTS, PaperRecipe, paper_recipes
from generators import links, tables

PAGES = ROOT / "docs" / "reproduce"
TABLE = {"alignment": "alignment", "data": "preference-pairs"}
"""The section of docs/papers.md with the table of a part, preferred where several sections name a paper."""
NUMBER = re.compile(r"\b\d{4}\.\d{5}\b")
FIGURES = re.compile(r"<!-- figures (\{.*?\}) -->")
HEADING = re.compile(r"^(#{2,4}) (.+)$", re.MULTILINE)


class Declaration(NamedTuple):
    """A thing of contralto that cites a paper."""

    kind: str
    """`method`, `loss`, `recipe`, `strategy`, `check`, or `code`."""
    name: str


# -------------------------------------------------------------------------------------------------------------- declarations


@cache
def declared() -> dict[str, list[Declaration]]:
    """Return what cites each paper: methods, losses, recipes, strategies, checks, and code.

    A method declares its papers; a loss cites them in its description, a recipe of `contralto align` in its comment. Of strategies,
    checks, modules and public functions and classes, the first paragraph of the docstring counts: what comes later is background.
    """
    found: dict[str, list[Declaration]] = {}
    for kind, name, text in [*_registered(), *_documented()]:
        for number in dict.fromkeys(NUMBER.findall(text)):
            found.setdefault(number, []).append(Declaration(kind, name))
    return found


def _registered() -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and text of everything with a name that users write."""
    from contralto.align.losses.registry import LOSSES
    from contralto.data_gen.checks import CHECKS
    from contralto.data_gen.strategies import STRATEGIES
    from contralto.decoding.methods import METHODS

    for name in METHODS.names():
        yield "method", name, " ".join(METHODS.get(name).papers)
    for name in LOSSES.names():
        yield "loss", name, LOSSES.get(name).description
    for path in sorted((ROOT / "align" / "recipes").glob("*.yaml")):
        comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        yield "recipe", path.stem, " ".join(comment)
    for kind, registry in (("strategy", STRATEGIES), ("check", CHECKS)):
        for name, entry in tables._own(registry).items():
            yield kind, name, (entry.__doc__ or "").split("\n\n")[0]


def _documented() -> Iterator[tuple[str, str, str]]:
    """Yield the modules of the library, and their public functions and classes, with the first paragraphs of their docstrings."""
    for name, module in structure.modules().items():
        if name.startswith("contralto.cli"):
            continue
        for node in (module.tree, *module.tree.body):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                own = getattr(node, "name", "")
                if not own.startswith("_"):
                    text = (ast.get_docstring(node) or "").split("\n\n")[0]
                    yield "code", f"{name}.{own}".rstrip("."), text


# --------------------------------------------------------------------------------------------------- links into other documents


def anchor(heading: str) -> str:
    """Return the anchor of a heading in the site.

    Examples:
        >>> anchor("O'Brien & Lewis 2023, *Contrastive Decoding*, arXiv 2309.09117")
        'obrien-lewis-2023-contrastive-decoding-arxiv-230909117'
    """
    plain = re.sub(r"[^\w\s-]", "", html.unescape(re.sub(r"[*`]", "", heading))).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


@cache
def sections(document: str) -> dict[str, str]:
    """Return the sections of a document by their anchors.

    Args:
        document: its path in the repository.
    """
    return split((ROOT / document).read_text(encoding="utf-8"))


def split(text: str) -> dict[str, str]:
    """Return the sections of a text by their anchors, each up to the next heading of its level or a higher one."""
    marks = [*HEADING.finditer(text)]
    found = {}
    for place, mark in enumerate(marks):
        after = (each.start() for each in marks[place + 1 :] if len(each[1]) <= len(mark[1]))
        found[anchor(mark[2])] = text[mark.start() : next(after, len(text))]
    return found


def difference(entry: PaperRecipe) -> str:
    """Return the anchor of the section of docs/papers.md about a paper: of its own heading, or of the table that names it.

    Raises:
        ValueError: docs/papers.md does not name the paper.
    """
    found = {name: text for name, text in sections("docs/papers.md").items() if entry.arxiv in text}
    if not found:
        raise ValueError(f"docs/papers.md does not name {entry.arxiv} ({entry.name}): add a row with what is different")
    own = [name for name, text in found.items() if entry.arxiv in text.splitlines()[0]]
    table = TABLE.get(entry.part)
    return own[0] if own else table if table in found else [*found][-1]


def figures(text: str, link: str) -> str:
    """Return a sentence with its figures filled in from the section that a link leads to.

    Args:
        text: `{NAME}` stands for a figure in the JSON of the section; other decimal numbers must stand in the section.
        link: `DOCUMENT#SECTION`.

    Raises:
        ValueError: there is no such section, or it does not have the number.
    """
    document, _, name = link.partition("#")
    section = sections(document).get(name)
    if section is None:
        raise ValueError(f"{document} has no section {name}; there are {', '.join(sections(document))}")
    known = FIGURES.search(section)
    table = json.loads(known[1]) if known else {}
    names = re.findall(r"\{([^{}]+)\}", text)
    if any(each not in table for each in names):
        return "not measured yet"
    bare = re.sub(r"\{[^{}]+\}", "", text)
    for number in re.findall(r"\d+\.\d+", bare):
        if number not in section:
            raise ValueError(f"{link} does not have {number}: {text}")
    return re.sub(r"\{([^{}]+)\}", lambda place: f"{table[place[1]][0]:.3f}", text)


# --------------------------------------------------------------------------------------------------------------------- pages

LISTS = {
    "method": ("method", "methods", "docs/methods.md"),
    "loss": ("loss", "losses", "docs/losses.md"),
    "recipe": ("recipe", "recipes", "docs/guides/training_options.md"),
    "strategy": ("strategy", "strategies", "docs/guides/data_recipes.md#strategies"),
    "check": ("check", "checks", "docs/guides/data_recipes.md#checks"),
}


def page_of(entry: PaperRecipe) -> Path:
    """Return the page of a paper.

    Args:
        entry: the paper.
    """
    return PAGES / f"{entry.arxiv}.md"


def implemented(entry: PaperRecipe) -> str:
    """Return a sentence that says what contralto has of a paper."""
    things = declared()[entry.arxiv]
    parts = []
    for kind, (one, many, document) in LISTS.items():
        names = [thing.name for thing in things if thing.kind == kind]
        if names:
            label = f"[{one if len(names) == 1 else many}]({_relative(document)})"
            parts.append(f"the {label} {', '.join(f'`{name}`' for name in names)}")
    code = [thing.name.removeprefix("contralto.") for thing in things if thing.kind == "code"]
    classes = [name.rpartition(".")[2] for name in code if name.rpartition(".")[2][:1].isupper()]
    if parts and classes:
        parts.append(f"the class{'es' if len(classes) > 1 else ''} {', '.join(f'`{name}`' for name in classes)}")
    if not parts:
        parts = [", ".join(f"`contralto.{name}`" for name in code[:4])]
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _relative(document: str) -> str:
    return os.path.relpath(ROOT / document, PAGES)


RUN = (
    "`contralto reproduce {}` runs these commands; with `--dry-run` it checks every name, and estimates hours and cost."
)
"""What a page says about the command that runs its recipe."""


def document(entry: PaperRecipe) -> str:
    """Return the page of a paper."""
    authors = ", ".join(entry.authors.split(" and ")).replace(", others", " et al.")
    link = f"[arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"
    differs = f"{_relative('docs/papers.md')}#{difference(entry)}"
    lines = [
        "<!-- written by docs/generators/papers.py -->",
        f"# {entry.name}",
        "",
        f"{authors}, *{entry.title}*, {entry.year}, {link}.",
        "",
        f"**Claim.** {_line(entry.claim)}",
        "",
        f"**In contralto.** {implemented(entry)}. [Differences from the paper]({differs}).",
        "",
        "## With models of the hub",
        "",
        _line(entry.models),
        *(["", RUN.format(entry.key)] if entry.hub else []),
        "",
        *_blocks(entry.hub_files),
        *(_commands(entry.hub, "needs models from the hub") if entry.hub else []),
    ]
    if entry.here:
        lines += ["## With the embedded models", ""]
        lines += [_line(entry.note), ""] if entry.note else []
        lines += [*_blocks(entry.files), *_commands(entry.here, entry.not_run)]
    return "\n".join([*lines, "## Figures", "", *_figures(entry)]) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _blocks(files: dict[str, str]) -> Iterator[str]:
    for name, text in files.items():
        language = {"jsonl": "json", "py": "python"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        yield from (f'```{language} title="{name}"', text.rstrip("\n"), "```", "")


def _commands(text: str, reason: str) -> list[str]:
    mark = [f"<!-- not run: {reason} -->"] if reason else []
    return [*mark, "```sh", *(wrapped(line) for line in text.splitlines()), "```", ""]


def wrapped(command: str, width: int = 88) -> str:
    """Return a command in lines that end before an option where they would be longer than `width`.

    Examples:
        >>> print(wrapped("contralto align dpo --beta 0.1 --output_dir out", width=32))
        contralto align dpo --beta 0.1 \\
          --output_dir out
    """
    first, *others = re.split(r" (?=--)", command)
    lines = [first]
    for option in others:
        if len(lines[-1]) + len(option) + 3 > width:
            lines.append(f"  {option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines)


def _figures(entry: PaperRecipe) -> Iterator[str]:
    rows = [(_line(place), _line(figure)) for figure, place in entry.published]
    for text, link in entry.measured:
        path, _, name = link.partition("#")
        rows.append((f"here, [{links.title(path)}]({_relative(path)}#{name})", figures(_line(text), link)))
    if not entry.published:
        yield from ("No figure of the paper is quoted here: none was checked against its text.", "")
    if rows:
        yield tables.table(("source", "figure"), rows)
    if not entry.measured:
        yield from (
            ["", "contralto has not measured this method."] if rows else ["contralto has not measured this method."]
        )


HEAD = """<!-- written by docs/generators/papers.py -->
# Reproducing papers

A page for each paper that contralto implements: its claim, commands with models from the hub, commands that run on a laptop with the
embedded models, and the figures to compare with. The commands with embedded models show that a method runs; what it changes there
is measured in [Controlled experiments](../controlled_experiments.md), and with pretrained models in [Real models](../real_models.md).
[Papers](../papers.md) lists every formula, and where contralto differs.

A figure of a paper is quoted only where its text, its repository or its abstract was read. To reach one takes GPUs, and often
checkpoints that the authors did not release; nothing here claims that a figure was reproduced.

`contralto reproduce --list` lists the recipes behind these pages with the GPU hours that they take, `contralto reproduce NAME --dry-run`
checks one, `contralto reproduce NAME` runs it in a folder, command by command, and goes on there after an interruption; `--small` runs the
same methods on the embedded models. The recipes are `recipes/reproduce/*.yaml`; estimates follow from sizes alone, and are right within a
factor of about three.
"""


def index() -> str:
    """Return the page with the table of all papers."""
    lines = [HEAD]
    for part, title in PARTS.items():
        rows = [
            (f"[{entry.name}]({page_of(entry).name})", f"{_cited(entry)}, arXiv {entry.arxiv}", implemented(entry))
            for entry in paper_recipes().values()
            if entry.part == part
        ]
        if rows:
            lines += [f"## {title}", "", tables.table(("page", "paper", "in contralto"), rows), ""]
    return "\n".join(lines)


def _cited(entry: PaperRecipe) -> str:
    names = [name.split()[-1] for name in entry.authors.split(" and ")]
    authors = f"{names[0]} et al." if names[-1] == "others" or len(names) > 2 else " & ".join(names)
    return f"{authors} {entry.year}"


def pages() -> dict[Path, str]:
    """Return the texts of all pages."""
    return {PAGES / "index.md": index()} | {page_of(entry): document(entry) for entry in paper_recipes().values()}


def navigation() -> list[Any]:
    """Return the pages for the navigation of the site, by part."""
    groups: list[Any] = [{"All papers": "reproduce/index.md"}]
    for part, title in PARTS.items():
        inner = [
            {entry.name: f"reproduce/{page_of(entry).name}"} for entry in paper_recipes().values() if entry.part == part
        ]
        groups += [{title: inner}] if inner else []
    return groups


def main() -> None:
    """Write the pages anew, and remove those of papers that are gone."""
    texts = pages()
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    for path in set(PAGES.glob("*.md")) - set(texts):
        path.unlink()
        print(path.relative_to(ROOT), "removed")


if __name__ == "__main__":
    main()
