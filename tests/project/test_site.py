"""The documentation site: links between documents, and what a build makes of them."""

import os
import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generators import architecture, links, reference, tables

DOCUMENTS = [
    "README.md",
    *links.OUTSIDE,
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
GENERATED = {"docs/architecture.md"}
"""Pages that only the site has."""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    text = "\n".join(line for line, prose in links.prose((ROOT / document).read_text()) if prose)
    for _, target in links.LINK.findall(text):
        if "://" in target or target.startswith("#"):
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), target.partition("#")[0]))
        assert path in GENERATED or (ROOT / path).exists(), (document, target)


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_pages(notebook):
    targets = [target for _, target in links.LINK.findall(notebook.read_text()) if "://" not in target]
    assert targets
    assert all((notebook.parent / target.partition("#")[0]).exists() for target in targets), targets


def test_links_are_rewritten_to_pages():
    text = "[one](../testbed/README.md#a), [two](methods.md), [three](../Makefile), `[x](y.md)`\n\n```\n[a](b.md)\n```"
    new = links.rewritten(text, "papers.md", None)
    assert new.startswith("[one](repository/testbed.md#a), [two](methods.md), three, ")
    assert new.endswith("```\n[a](b.md)\n```")


@pytest.mark.slow  # parses every module
def test_every_public_module_has_a_page():
    pages = reference.pages()
    assert "reference/index.md" in pages
    assert (
        "[`ContrastiveSearch`][contralto.decoding.executors.search.ContrastiveSearch]"
        in pages["reference/decoding/index.md"]
    )
    assert "::: contralto.decoding.sampling" in pages["reference/decoding/sampling.md"]
    assert len(pages) == len(reference.shown()) > 150


def test_a_part_is_above_what_it_imports():
    edges = {("cli", "eval"), ("cli", "common"), ("eval", "common")}
    assert architecture.layers(edges) == [["cli"], ["eval"], ["common"]]
    assert architecture.reduced(edges) == {("cli", "eval"), ("eval", "common")}


@pytest.mark.slow  # parses every module
def test_the_drawing_has_every_part():
    drawing = architecture.diagram()
    assert all(f">{part}<" in drawing for part in ("cli", "align", "data_gen", "decoding", "eval", "testbed", "common"))


class Addresses(HTMLParser):
    """The addresses that a page links to, those that it loads, and its anchors."""

    def __init__(self):
        super().__init__()
        self.links, self.assets, self.anchors = [], [], {"", "__top"}

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values.get("id", ""), values.get("name", "")}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe") and values.get("src"):
            self.assets.append(values["src"])
        elif tag == "link" and values.get("href") and "prev" not in values["rel"] and "next" not in values["rel"]:
            self.assets.append(values["href"])


@pytest.mark.slow
@pytest.mark.full  # `make docs` builds it, too
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_built_site_has_no_broken_link_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    pages = {}
    for path in tmp_path.rglob("*.html"):
        pages[path] = Addresses()
        pages[path].feed(path.read_text())
    assert len(pages) > 200
    broken = [
        (str(page.relative_to(tmp_path)), address) for page in pages for address in _broken(page, pages, tmp_path)
    ]
    assert broken == []


def _broken(page, pages, site):
    for address in pages[page].assets:
        if urlsplit(address).netloc:
            yield address
    for address in [*pages[page].links, *pages[page].assets]:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        inner = unquote(parts.path)
        target = site / inner.lstrip("/") if inner.startswith("/") else Path(os.path.normpath(page.parent / inner))
        target = page if not inner else target / "index.html" if target.is_dir() else target
        if not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
            yield address


@pytest.mark.slow  # imports TRL
def test_tables_restate_the_declarations_of_today():
    pages = tables.pages()
    assert {name for page in pages for _, name, _ in tables.PLACE.findall(page.read_text())} == set(tables.TABLES)
    for page in pages:
        assert page.read_text() == tables.filled(page.read_text()), f"{page}: python docs/generators/tables.py"


def test_a_table_takes_its_rows_from_a_signature_and_its_docstring():
    def grown(*, size: int = 3, mode: str | None = None) -> None:
        """Grow.

        Args:
            size: the number
                of a|b.
            mode: left out.
        """

    rows = tables.parameters(grown)
    assert rows == [("`size`", "`3`", "the number of a|b"), ("`mode`", "", "left out")]
    assert tables.table(("a", "b", "c"), rows).splitlines()[2] == "| `size` | `3` | the number of a\\|b |"
