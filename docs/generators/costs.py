"""The table of docs/costs.md: what each method of decoding costs, and what it has gained where it was measured.

Costs are those of `benchmarks/results/method_costs.md`, gains the sentences of `measured` in `recipes/reproduce/`, whose figures are read from the
sections that they link to.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generators import links, papers, tables

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "method_costs.md"
MARK = "<!-- figures "


def method_costs() -> str:
    """Return the table."""
    from contralto.decoding.methods import METHODS

    figures = measured_costs()
    batches = sorted({each["batch"] for each in figures})
    times = [f"time, batch {batch}" for batch in batches]
    head = ["method", "passes", "tokens read", *times, "as a logits processor", "what it has gained here"]
    rows = [
        [f"`{name}`", *_costs(name, method.executors, figures, batches), gains(method.papers)]
        for name, method in METHODS.items()
        if method.contrasts
    ]
    return tables.table(head, rows)


def measured_costs() -> list[dict[str, Any]]:
    """Return the figures of the benchmark: method, gate, executor, size of the batch, counts per new token, and time over greedy search."""
    text = RESULTS.read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text.split(MARK)[1].split(" -->")[0])
    return found


def _costs(name: str, executors: tuple[str, ...], figures: list[dict[str, Any]], batches: list[int]) -> Iterator[str]:
    """Yield the cells of a method: counts and times of its default executor, then the times of its processor."""
    own: Mapping[tuple[str, int], dict[str, Any]] = {
        (each["executor"], each["batch"]): each for each in figures if each["method"] == name and each["gate"] is None
    }
    first = own[executors[0], batches[0]]
    yield f"{first['passes']:g}"
    yield f"{first['read']:g}" + (f" + {first['others']:g}" if first["others"] else "")
    yield from (f"{own[executors[0], batch]['time']:.2f}" for batch in batches)
    slow = [f"{own['processor', batch]['time']:.2f}" for batch in batches if ("processor", batch) in own]
    yield ", ".join(slow) or "-"


def gains(numbers: tuple[str, ...]) -> str:
    """Return what was measured of papers, sentence by sentence with its source.

    Args:
        numbers: arXiv numbers.
    """
    known = {entry.arxiv: entry for entry in papers.paper_recipes().values()}
    found = []
    for text, link in (each for number in numbers if number in known for each in known[number].measured):
        path, _, section = link.partition("#")
        place = Path(path).relative_to("docs") if path.startswith("docs/") else Path("..") / path
        found.append(f"{papers.figures(' '.join(text.split()), link)} ([{links.title(path)}]({place}#{section}))")
    return ". ".join(found) or "not measured"
