"""The page of the architecture: the parts, their folders, and the imports between them, from the sources."""

import ast
from html import escape

from project import structure

from generators.reference import first_line, is_package, page_of, shown

WIDTH, HEIGHT, GAP = 120, 44, 44
HEAD = """# Architecture

contralto is one package of six parts, and the commands. The parts lie at the top of the repository and are imported as
`contralto.decoding`, `contralto.align` and so on. A part imports the parts that arrows lead to, directly or over others; the table counts
the imports. No two modules import each other, and nothing imports the commands. `tests/project/structure.py` tests that; this page is
written from the sources at every build.
"""
BESIDE = {
    "tests": "the tests, in folders that mirror the sources; `oracles` holds float64 references, `zoo` makes tiny models of every family",
    "benchmarks": "measurements, each with the command that makes it; `real_card.py` measures real models",
    "examples": "a short script per method, and recipes of data",
    "docs": "the sources of this site; `decisions` holds the choices that somebody may question",
}


def document() -> str:
    """Return the page."""
    lines = [HEAD, diagram(), counts(), ""]
    parts = [
        "contralto.cli",
        *(f"contralto.{part}" for part in ("decoding", "align", "data_gen", "eval", "recipes", "testbed", "common")),
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


def layers(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Return the parts in layers: each imports only parts of the layers below its own.

    Args:
        edges: importing and imported parts.

    Returns:
        The layers from the top to the bottom.
    """
    depth = dict.fromkeys(sorted({node for edge in edges for node in edge}), 0)
    for _ in depth:
        for above, below in edges:
            depth[below] = max(depth[below], depth[above] + 1)
    found = [[node for node in depth if depth[node] == level] for level in range(max(depth.values()) + 1)]
    return [layer for layer in found if layer]


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the edges of a graph without circles that no path over other nodes stands for.

    Args:
        edges: pairs of nodes.
    """

    def reached(node: str) -> set[str]:
        direct = {below for above, below in edges if above == node}
        return direct.union(*(reached(below) for below in direct))

    return {
        (above, below)
        for above, below in edges
        if not any(below in reached(other) for one, other in edges if one == above and other != below)
    }


def imports() -> dict[tuple[str, str], int]:
    """Return the number of imports between the parts."""
    graph = structure.graph().items()
    return {edge: count for edge, count in graph if "contralto" not in edge and not edge[0].startswith("__")}


def counts() -> str:
    """Return the table of the imports between the parts."""
    edges = imports()
    order = [part for layer in layers(set(edges)) for part in layer]
    lines = [f"| imports of | {' | '.join(order[1:])} |", f"|---|{'---|' * len(order[1:])}"]
    for one in order[:-1]:
        lines.append(f"| {one} | {' | '.join(str(edges.get((one, other), '')) for other in order[1:])} |")
    return "\n".join(lines)


def diagram() -> str:
    """Return the drawing of the parts and the imports between them, as SVG that takes the colours of the page."""
    edges = reduced(set(imports()))
    rows = layers(set(imports()))
    spots, last = {}, 1.0
    for level, row in enumerate(rows):
        for place, node in enumerate(row):
            above = [spots[one][0] for one, other in edges if other == node]
            column = 2.0 * place if len(row) > 1 else sum(above) / len(above) if above else last
            spots[node] = (column, float(level))
    width, height = 3 * (WIDTH + GAP) - GAP, len(rows) * (HEIGHT + GAP) - GAP
    at = {node: (column * (WIDTH + GAP) + 2, level * (HEIGHT + GAP) + 2) for node, (column, level) in spots.items()}
    body = [_arrow(at[one], at[other]) for one, other in sorted(edges)] + [
        _box(node, *spot) for node, spot in at.items()
    ]
    title = "Parts of contralto, and the imports between them"
    return (
        f'<div class="diagram"><svg viewBox="0 0 {width + 4} {height + 4}" role="img" aria-label="{title}"><defs>'
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{"".join(body)}</svg></div>\n'
    )


def _box(node: str, left: float, top: float) -> str:
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{left + WIDTH / 2:.0f}" y="{top + HEIGHT / 2 + 5:.0f}">{escape(node)}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Draw an arrow from the lower edge of a box to the upper edge of another."""
    one, other = start[0] + WIDTH / 2, end[0] + WIDTH / 2
    lean = max(-WIDTH * 0.35, min(WIDTH * 0.35, (other - one) * 0.25))
    return (
        f'<line x1="{one + lean:.0f}" y1="{start[1] + HEIGHT:.0f}" x2="{other - lean:.0f}" y2="{end[1]:.0f}" '
        'marker-end="url(#head)"/>'
    )
