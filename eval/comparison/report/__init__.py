"""Reports of a comparison: tables for the terminal, in Markdown, CSV and LaTeX, and an HTML page with plots.

Everything here is made of the plain data that `compare` returns and `contralto compare` keeps as JSON.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.comparison.report.formats import render as render
    from contralto.eval.comparison.report.html import page as page
    from contralto.eval.comparison.report.tabulate import Cell as Cell
    from contralto.eval.comparison.report.tabulate import Table as Table
    from contralto.eval.comparison.report.tabulate import glance as glance
    from contralto.eval.comparison.report.tabulate import tables as tables
    from contralto.eval.comparison.report.terminal import show as show

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"formats": ["render"], "html": ["page"], "tabulate": ["Cell", "Table", "glance", "tables"], "terminal": ["show"]},
)
