"""The documents of the repository, the pages that they become, and the links between them."""

import logging
import os.path
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("mkdocs.hooks.links")
OUTSIDE = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "eval/tasks/README.md",
        "testbed/*.md",
        "tests/mutants/README.md",
        "benchmarks/results/*.md",
    )
    for path in ROOT.glob(pattern)
)
"""Documents that are pages of the site and lie outside of `docs/`."""
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def page_of(path: str) -> str:
    """Return the page that a document of the repository becomes.

    Args:
        path: relative to the repository, such as `docs/methods.md` or `testbed/VISION.md`.

    Returns:
        The page's path in the sources of the site.
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    # a README would become the index of its section in the navigation
    return f"repository/{path.removesuffix('/README.md') + '.md' if path.endswith('/README.md') else path}"


def document_of(page: str) -> str:
    """Return the path of a page's document in the repository: the inverse of `page_of`."""
    if not page.startswith("repository/"):
        return f"docs/{page}"
    path = page.removeprefix("repository/")
    return (
        f"{path.removesuffix('.md')}/README.md"
        if (ROOT / path.removesuffix(".md")).is_dir() and path.endswith(".md")
        else path
    )


def title(path: str) -> str:
    """Return the heading of a document of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    heading = next((line for line in text.splitlines() if line.startswith("# ")), f"# {Path(path).stem}")
    return heading.removeprefix("# ").replace("`", "")


def documents(folder: str) -> list[str]:
    """Return the documents in a folder of the site's sources, as paths in the repository."""
    place = document_of(folder)
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / place).glob("*.md"))


def prose(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a document, each with whether it is prose and not code."""
    fence = ""
    for line in markdown.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
            yield line, False
        elif mark and mark[1].startswith(fence):
            fence = ""
            yield line, False
        else:
            yield line, not fence and not line.startswith("    ")


def rewritten(markdown: str, page: str, repo_url: str | None) -> str:
    """Point the links of a page to pages of the site.

    Args:
        markdown: the text of the page.
        page: its path in the sources of the site.
        repo_url: address of the repository, for links to files that are no pages; without one they become text.

    Returns:
        The text with its links resolved. A link to a file that does not exist is a warning.
    """
    lines = (_line(line, page, repo_url) if is_prose else line for line, is_prose in prose(markdown))
    return "\n".join(lines)


def _line(line: str, page: str, repo_url: str | None) -> str:
    def resolve(link: re.Match[str]) -> str:
        """Return a link of Markdown with the address of its target in the site or the repository."""
        text, target = link[1], link[2]
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        path, _, anchor = target.partition("#")
        document = posixpath.normpath(posixpath.join(posixpath.dirname(document_of(page)), path))
        if document.endswith(".md") and (document.startswith("docs/") or document in OUTSIDE):
            relative = os.path.relpath(page_of(document), posixpath.dirname(page) or ".")
            return f"[{text}]({relative}{'#' + anchor if anchor else ''})"
        if not (ROOT / document).exists():
            log.warning("%s links to %s, which does not exist", page, target)
        return f"[{text}]({repo_url}/blob/main/{document})" if repo_url else text

    return LINK.sub(resolve, line)
