"""Hooks of MkDocs: add the pages that are derived from the sources, and the documents that lie beside `docs/`."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _folder in (ROOT, ROOT / "tests", ROOT / "docs"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from generators import architecture, links, reference


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the folders of the navigation by their pages."""
    config.nav = [_filled(item) for item in config.nav or []]
    return config


def _filled(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    ((title, value),) = item.items()
    if isinstance(value, list):
        return {title: [_filled(inner) for inner in value]}
    if value == "reference/":
        return {title: reference.navigation()}
    if value.endswith("/"):
        return {title: [{links.title(path): links.page_of(path)} for path in links.documents(value)]}
    return item


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {links.page_of(path): (ROOT / path).read_text(encoding="utf-8") for path in links.OUTSIDE}
    pages |= reference.pages() | {"architecture.md": architecture.document()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links between documents of the repository to their pages."""
    return links.rewritten(markdown, page.file.src_uri, config.repo_url)
