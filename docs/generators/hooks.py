"""Hooks of MkDocs: add the pages that are derived from the sources, and the documents that lie beside `docs/`."""

import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[2]
for _folder in (ROOT, ROOT / "tests", ROOT / "docs"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from generators import architecture, links, papers, reference


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
    if value == "reproduce/":
        return {title: papers.navigation()}
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


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of notebooks, which are not Markdown to MkDocs, to their pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def resolve(link: re.Match[str]) -> str:
        target = files.get_file_from_path(
            posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        )
        if target is None:
            log.warning("%s links to %s, which is no page", page.file.src_uri, link[1])
            return link[0]
        return f'href="{target.url_relative_to(page.file)}{link[2] or ""}"'

    return re.sub(r'href="([^":#]+\.md)(#[^"]*)?"', resolve, html)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links between documents of the repository to their pages."""
    return links.rewritten(markdown, page.file.src_uri, config.repo_url)
