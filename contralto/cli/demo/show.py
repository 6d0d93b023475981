"""The work of `contralto demo`, whose imports take seconds."""

import logging
import os
import textwrap
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.cli.demo import alignment, page
from contralto.cli.demo.comparison import PAIRS, PROBLEM_SEED, compare_models
from contralto.cli.demo.examples import describe_cost, find_examples, format_example, measure_cost
from contralto.common.files import replace_text
from contralto.eval.comparison import report
from contralto.testbed import worlds

__all__ = ["show"]

TIMED = 10
"""Problems on which the cost of a token is measured."""
WIDTH = 110


def show(html: Path, count: int) -> None:
    """Align an expert, compare, print examples and tables, and write the page.

    Args:
        html: the file of the page.
        count: the number of held-out problems per model.
    """
    started = time.perf_counter()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading, which takes no time here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        aligned = alignment.align(PAIRS[0].expert, Path(folder))
        comparison = compare_models(count, Path(folder) / "answers", aligned)
    tokenizer = testbed.tokenizer()
    expert, amateur = testbed.load(PAIRS[0].expert), testbed.load(PAIRS[0].amateur)
    problems = list(islice(worlds.problems(PROBLEM_SEED, "test"), count))
    examples = find_examples(problems, expert, amateur, tokenizer)
    cost = measure_cost(problems[:TIMED], expert, amateur, tokenizer)
    for number, example in enumerate(examples, 1):
        print(format_example(number, example, tokenizer))
    report.show(comparison)
    for paragraph in (describe_cost(cost), f"How to read it. {page.READING}"):
        print("\n" + textwrap.fill(paragraph, WIDTH))
    replace_text(html, page.render(comparison, examples, cost, tokenizer))
    print(f"\n{html} shows the same with plots. It took {time.perf_counter() - started:.0f} s.")
