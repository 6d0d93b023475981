"""`contralto judge --rating NAME`: rate the answers of one or several systems one by one, as MMHal-Bench does.

contralto judge answers.json --rating mmhal --judge openai model=gpt-4.1 --estimate
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.cli.estimates import show_estimates, sum_of, table_width
from contralto.cli.outputs import check_output_file, check_output_folder
from contralto.common.errors import require
from contralto.common.files import replace_text

if TYPE_CHECKING:
    from contralto.data_gen.store import Store
    from contralto.eval.judging.ratings import RatedAnswer, Rating, RatingJudge, RatingScale

__all__ = ["SUFFIXES", "run"]

SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}
"""Suffixes of tables by their format."""


class RatingJob:
    """The answers of a command, its judges, and the folder of their replies.

    Args:
        args: the parsed flags of `contralto judge`.
        options: the options of each judge.
    """

    def __init__(self, args: argparse.Namespace, options: Sequence[Mapping[str, Any]]) -> None:
        from contralto.data_gen.functions import search_folder
        from contralto.eval.judging.judges import check_judges, recipe_of
        from contralto.eval.judging.ratings import RATINGS, make_rating_judge, rate_answer, rating_rows, read_rated

        search_folder(Path.cwd())  # where functions of judges may lie
        self.scale: RatingScale = RATINGS.get(args.rating)
        engines: dict[str, Any] = {}
        self.judges: list[RatingJudge] = check_judges(
            [
                make_rating_judge(each, scale=self.scale, number=number, engines=engines)
                for number, each in enumerate(options, 1)
            ]
        )
        names = args.names or [path.stem for path in args.answers]
        if len(set(names)) != len(args.answers):
            raise ValueError(
                f"systems need different names, one for each of {len(args.answers)} files, not {', '.join(names)}"
            )
        self.systems: dict[str, list[RatedAnswer]] = {
            name: read_rated(path, args.questions, limit=args.limit)
            for name, path in zip(names, args.answers, strict=True)
        }
        self.rows = rating_rows(self.systems)
        self.recipe = recipe_of(self.judges, rate_answer, output=args.output, seed=args.seed)
        self.store_path = args.output / "answers.sqlite"


def run(args: argparse.Namespace, options: Sequence[Mapping[str, Any]]) -> None:
    """Let judges rate the answers, and write the results.

    Args:
        args: the parsed flags of `contralto judge`.
        options: the options of each judge.

    Raises:
        ValueError: a flag has an invalid value, a file is not valid, or no rating can be read.
        ModuleNotFoundError: a package is missing.
    """
    _check(args)
    require("rich", "scipy", "datasets", "tqdm")
    job = RatingJob(args, options)
    if args.estimate:
        _estimate(job)
        return
    check_output_folder(args.output, "--output")
    for name in ("ratings.json", "ratings.jsonl", *([f"ratings{SUFFIXES[args.format]}"] if args.format else [])):
        check_output_file(args.output / name, "--output")
    _write(job, args, _ratings(job))


def _check(args: argparse.Namespace) -> None:
    """Check combinations of flags that the parser cannot check."""
    if not args.answers:
        raise ValueError("--rating needs the answers of at least one system: a file before --rating")
    foreign = {
        "--pairs": args.pairs,
        "--common": args.common,
        "--reward-model": args.reward_model,
        "--scorer": args.scorer,
        "--columns": args.columns,
        "--html": args.html,
    }
    if given := [flag for flag, value in foreign.items() if value]:
        raise ValueError(f"--rating rates answers one by one, and has no {' and no '.join(given)}: leave it out")
    if not args.judge:
        raise ValueError("--rating needs --judge ENGINE NAME=VALUE ...")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")


def _estimate(job: RatingJob) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store

    pipeline.check(job.recipe, job.rows)
    store = Store(job.store_path, read_only=True) if job.store_path.exists() else None
    advice = "Judges may reply with fewer tokens: rate a few with --limit first, whose replies are then used"
    estimates, basis = pipeline.estimate(job.recipe, job.rows, store, advice=advice)
    if store:
        store.close()
    show_estimates(estimates, basis, f"{len(job.rows):,} answers")


def _ratings(job: RatingJob) -> dict[str, dict[str, list["Rating"]]]:
    """Return the ratings by judge and system, after all requests are answered."""
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store

    with pipeline.locked(job.recipe.output), Store(job.store_path) as store:
        return _replies(job, store)


def _replies(job: RatingJob, store: "Store") -> dict[str, dict[str, list["Rating"]]]:
    from contralto.data_gen import pipeline
    from contralto.eval.judging.ratings import rating_of

    store.forget_failures()  # a run asks for them again
    if any(role.price.input or role.price.output for role in job.recipe.roles.values()):
        pipeline.check(job.recipe, job.rows)
        to_pay = sum_of(pipeline.estimate(job.recipe, job.rows, store)[0], "to_pay")
        print(f"still to pay: at most about {to_pay}", file=sys.stderr)
    pipeline.run(job.recipe, job.rows, store)
    judges = {judge.name: judge for judge in job.judges}
    ratings: dict[str, dict[str, list[Rating]]] = {name: {system: [] for system in job.systems} for name in judges}
    for result in pipeline.replay(job.recipe, job.rows, store):
        ratings[result.strategy][result.row["system"]].append(rating_of(result, judges[result.strategy]))
    return ratings


def _write(job: RatingJob, args: argparse.Namespace, ratings: Mapping[str, Mapping[str, Sequence["Rating"]]]) -> None:
    """Write the ratings first, so that replies without a rating can be looked at, then the figures."""
    from rich.console import Console
    from rich.markup import escape

    from contralto.eval.comparison.report.formats import render_tables
    from contralto.eval.comparison.report.terminal import rich_table
    from contralto.eval.judging.rating_figures import rating_sentence, rating_tables, summarise_ratings, value_rows

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in value_rows(ratings))
    replace_text(args.output / "ratings.jsonl", "".join(lines))
    figures = summarise_ratings(ratings, job.judges, job.scale)
    replace_text(args.output / "ratings.json", json.dumps(figures, indent=1))
    sentence, tables = rating_sentence(figures), rating_tables(figures)
    if args.format:
        text = render_tables(sentence, [("", table) for table in tables], args.format)
        replace_text(args.output / f"ratings{SUFFIXES[args.format]}", text)
        print(text, end="")
    else:
        console = Console(width=table_width())
        for table in tables:
            console.print(rich_table(table))
        console.print(f"\n[bold]{escape(sentence)}[/bold]", highlight=False)
    note = f"{args.output / 'ratings.jsonl'} has every rating and reply."
    print(f"\n{note}", file=sys.stderr if args.format else sys.stdout)
    _warn(ratings)


def _warn(ratings: Mapping[str, Mapping[str, Sequence["Rating"]]]) -> None:
    """Print how many replies had no rating, were cut off, or are missing."""
    for judge, systems in ratings.items():
        column = [each for ratings_of in systems.values() for each in ratings_of]
        if unread := sum(each.value is None and not each.failed for each in column):
            print(
                f"{judge}: {unread} replies without exactly one line Rating: 0 to 6, which count as 0", file=sys.stderr
            )
        if cut := sum(each.is_cut for each in column):
            print(f"{judge}: {cut} replies were cut off at max_new_tokens: raise it", file=sys.stderr)
        if failed := sum(bool(each.failed) for each in column):
            print(f"{judge}: {failed} answers have no reply; the same command asks for them again", file=sys.stderr)
