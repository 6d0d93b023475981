"""The page of the architecture: the parts, their folders, and the imports between them, from the sources."""

import ast
from html import escape

from project import structure

from generators.reference import first_line, is_package, page_of, shown

WIDTH, HEIGHT, GAP = 150, 56, 74
HEAD = """# Architecture

contralto is one package of six parts, and the commands. The parts lie at the top of the repository and are imported as
`contralto.decoding`, `contralto.align` and so on. An arrow says that a part imports another; the number counts the imports. No two
modules import each other, and nothing imports the commands. `tests/project/structure.py` tests that; this page is written from
the sources at every build.
"""
BESIDE = {
    "tests": "the tests, in folders that mirror the sources; `oracles` holds float64 references, `zoo` makes tiny models of every family",
    "benchmarks": "measurements, each with the command that makes it; `real_card.py` measures real models",
    "examples": "a short script per method, and recipes of data",
    "docs": "the sources of this site; `decisions` holds the choices that somebody may question",
}


def document() -> str:
    """Return the page."""
    lines = [HEAD, diagram(), ""]
    parts = [
        "contralto.cli",
        *(f"contralto.{part}" for part in ("decoding", "align", "data_gen", "eval", "testbed", "common")),
    ]
    for part in parts:
        lines += ["", f"## {part}", "", _paragraph(part), "", *_folders(part)]
    lines += ["", "## Beside the package", "", "| folder | content |", "|---|---|"]
    lines += [f"| `{folder}/` | {content} |" for folder, content in BESIDE.items()]
    return "\n".join(lines) + "\n"


def _paragraph(name: str) -> str:
    doc = ast.get_docstring(structure.modules()[name].tree) or ""
    return " ".join(doc.split("\n\n")[0].split("\n"))


def _folders(part: str) -> list[str]:
    inner = sorted(
        name for name in structure.modules() if name.rpartition(".")[0] == part and not name.endswith("__main__")
    )
    folder = _place(part)
    lines = [f"| in `{folder}/` | content |", "|---|---|"]
    for name in inner:
        label = name.rpartition(".")[2] + ("/" if is_package(name) else ".py")
        cell = f"[`{label}`]({page_of(name)})" if name in shown() else f"`{label}`"
        lines.append(f"| {cell} | {first_line(structure.modules()[name].tree)} |")
    return lines


def _place(name: str) -> str:
    return str(structure.modules()[name].path.parent.relative_to(structure.ROOT))


def layers(edges: dict[tuple[str, str], int]) -> list[list[str]]:
    """Return the parts in layers: each imports only parts of the layers below its own.

    Args:
        edges: number of imports by importing and imported part.

    Returns:
        The layers from the top to the bottom.
    """
    nodes = sorted({node for edge in edges for node in edge})
    depth = {node: 0 for node in nodes}
    for _ in nodes:
        for above, below in edges:
            depth[below] = max(depth[below], depth[above] + 1)
    found = [[node for node in nodes if depth[node] == level] for level in range(max(depth.values()) + 1)]
    return [layer for layer in found if layer]


def diagram() -> str:
    """Return the drawing of the parts and the imports between them, as SVG that takes the colours of the page."""
    edges = {
        (one, other): count
        for (one, other), count in structure.graph().items()
        if "contralto" not in (one, other) and not one.startswith("__") and one != other
    }
    rows = layers(edges)
    columns = 5
    spots = {}
    for level, row in enumerate(rows):
        for place, node in enumerate(row):
            shift = (columns - len(row)) / 2 if len(row) > 1 else (0.5, 2.0, 3.5)[level % 3]
            if level in (0, len(rows) - 1):
                shift = 2.0
            spots[node] = ((place + shift) * (WIDTH + 20) + 10, level * (HEIGHT + GAP) + 10)
    width, height = columns * (WIDTH + 20), len(rows) * (HEIGHT + GAP) - GAP + 20
    body = [_arrow(spots[one], spots[other], count) for (one, other), count in sorted(edges.items())]
    body += [_box(node, *spot) for node, spot in spots.items()]
    title = "Parts of contralto, and the imports between them"
    return (
        f'<div class="diagram"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><defs>'
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{"".join(body)}</svg></div>\n'
    )


def _box(node: str, left: float, top: float) -> str:
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{left + WIDTH / 2:.0f}" y="{top + HEIGHT / 2 + 5:.0f}">{escape(node)}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], count: int) -> str:
    """Draw an arrow from the lower edge of a box to the upper edge of another."""
    one, other = start[0] + WIDTH / 2, end[0] + WIDTH / 2
    lean = max(-WIDTH * 0.4, min(WIDTH * 0.4, (other - one) * 0.18))
    x1, y1, x2, y2 = one + lean, start[1] + HEIGHT, other - lean, end[1]
    x, y = x1 + (x2 - x1) * 0.22, y1 + (y2 - y1) * 0.22
    return (
        f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" marker-end="url(#head)"/>'
        f'<text class="count" x="{x:.0f}" y="{y:.0f}">{count}</text>'
    )
