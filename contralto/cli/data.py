"""`contralto data`: make preference pairs from a recipe; interrupted runs resume without repeated requests."""

import argparse
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.cli.estimates import show_estimates, table_width
from contralto.cli.pairs_view import show
from contralto.common.column_names import column_names
from contralto.common.suggestions import did_you_mean
from contralto.common.texts import printable

if TYPE_CHECKING:
    from contralto.data_gen.recipe import Recipe
    from contralto.data_gen.store import Store

ACTIONS = {
    "preview": "make pairs of the first few rows and show them side by side",
    "estimate": "estimate tokens and money for all rows",
    "run": "request all answers that are not recorded yet, then export; resumes what was interrupted",
    "status": "print progress, cost, and failures with their reasons",
    "retry-failed": "request the answers of failed rows again, then export",
    "export": "write the data set from the recorded answers, without requests",
    "merge": "copy the answers of shards or other stores, then export",
    "batch": "write the unanswered requests of a role as an OpenAI batch file, or read the file with its answers",
}

RUNNERS = ("threads", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags.

    Args:
        parser: the parser of the command.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _list_names()
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    parsers = {
        name: actions.add_parser(name, help=text, description=f"{name}: {text}.") for name, text in ACTIONS.items()
    }
    for action in parsers.values():
        action.add_argument("recipe", type=Path, help="the recipe, a YAML file")
        action.add_argument(
            "--output", type=Path, help="the folder of the data set and its answers, instead of the recipe's"
        )
        action.add_argument(
            "--columns",
            nargs="+",
            default=[],
            metavar="NAME=COLUMN",
            help="columns of the rows under other names, such as prompt=question, besides the recipe's",
        )
        action.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with models")
        action.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    for name in ("preview", "run", "estimate", "status", "retry-failed"):
        parsers[name].add_argument(
            "--shard", type=_shard, metavar="I/N", help="only the I-th of N parts of the rows, 1 to N"
        )
    parsers["run"].add_argument(
        "--runner",
        choices=RUNNERS,
        default="threads",
        help="who runs the engines: threads of this process (default), or workers on a Ray cluster, a local one without RAY_ADDRESS",
    )
    parsers["preview"].add_argument("-n", type=int, default=5, help="how many rows (default 5)")
    parsers["merge"].add_argument(
        "stores", nargs="*", type=Path, help="stores or their folders; without any, the shards in the output folder"
    )
    parsers["export"].add_argument("--push-to-hub", metavar="OWNER/NAME", help="put the data set on the hub, too")
    parsers["export"].add_argument("--private", action="store_true", help="where nobody else sees it")
    parsers["batch"].add_argument("--role", required=True, help="whose requests")
    parsers["batch"].add_argument("--write", type=Path, metavar="FILE", help="write the open requests here")
    parsers["batch"].add_argument("--read", type=Path, metavar="FILE", help="record the answers in this file")


def _list_names() -> str:
    """Return the names that recipes can use, those of other packages among them."""
    from contralto.data_gen.checks.registry import CHECKS
    from contralto.data_gen.engines.registry import ENGINES
    from contralto.data_gen.strategies.registry import STRATEGIES

    registries = {"strategies": STRATEGIES, "engines": ENGINES, "checks": CHECKS}
    lines = (f"  {kind + ':':<12}{', '.join(registry.names())}" for kind, registry in registries.items())
    return "names in recipes:\n" + "\n".join(textwrap.fill(line, 118, subsequent_indent=" " * 14) for line in lines)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"a shard is written I/N with I from 1 to N, such as 2/8, not {text!r}")
    return int(match[1]), int(match[2])


class DataJob:
    """A recipe with its rows and the folder of its store."""

    def __init__(self, args: argparse.Namespace) -> None:
        from contralto.data_gen import checks, pipeline
        from contralto.data_gen import recipe as recipes
        from contralto.data_gen.rows import read_rows

        self.recipe: Recipe = recipes.load_recipe(args.recipe, output=args.output)
        if columns := column_names(args.columns, None, "--columns"):
            self.recipe = _with_columns(self.recipe, {**self.recipe.rows.columns, **columns})
        if self.recipe.checks or self.recipe.filters:
            checks.check_settings(self.recipe.checks, self.recipe.filters)
        self.rows: Sequence[Any] = read_rows(self.recipe.rows, folder=args.recipe.parent)
        self.folder = self.recipe.output
        if shard := getattr(args, "shard", None):
            number, count = shard
            self.rows = [row for row in self.rows if pipeline.shard_of(row, count) == number]
            self.folder = self.recipe.output / "shards" / f"{number}-of-{count}"
            if not self.rows:
                raise ValueError(f"shard {number}/{count} has no rows: there are too few for so many shards")

    def store(self, *, read_only: bool = False) -> "Store":
        """Open the store.

        Args:
            read_only: do not create or change it.
        """
        from contralto.data_gen.store import Store

        return Store(self.folder / "answers.sqlite", read_only=read_only)

    @contextmanager
    def working(self) -> Iterator["Store"]:
        """Open the store for writing, locked, with what interrupted runs on Ray have left in their shards."""
        from contralto.data_gen import pipeline

        with pipeline.locked(self.folder), self.store() as store:
            pipeline.collect(self.folder, store)
            yield store


def _with_columns(recipe: "Recipe", columns: Mapping[str, str]) -> "Recipe":
    """Return a recipe with columns of its rows under other names, also in the text that the data set's card shows."""
    given = recipe.mapping["rows"]
    rows = {**({"source": given} if isinstance(given, str) else given), "columns": dict(columns)}
    mapping = {**recipe.mapping, "rows": rows}
    return replace(recipe, rows=replace(recipe.rows, columns=columns), mapping=mapping)


def run(args: argparse.Namespace) -> None:
    """Run an action.

    Args:
        args: the parsed arguments.
    """
    job = DataJob(args)
    {
        "preview": _preview,
        "estimate": _estimate,
        "run": _run,
        "status": _status,
        "retry-failed": _retry_failed,
        "export": _export,
        "merge": _merge,
        "batch": _batch,
    }[args.action](job, args)


def _run(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline

    if args.runner == "ray":
        _check_ray(args)
    with job.working() as store:
        runner = pipeline.run_on_ray if args.runner == "ray" else pipeline.run
        runner(job.recipe, job.rows, store)
        _finish(job, args, store)


def _check_ray(args: argparse.Namespace) -> None:
    """Reject what a run on Ray cannot do, before anything is made."""
    if args.shard:
        raise ValueError("--runner ray cuts the rows into shards by itself: leave out --shard")
    if args.trust_remote_code:
        raise ValueError("--trust-remote-code is not passed on to workers: leave out --runner ray, or the model's code")
    if find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")


def _retry_failed(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline

    with job.working() as store:
        failed = {recorded.row for recorded in store.failures()}
        rows = [row for row in job.rows if row["id"] in failed]
        if not rows:
            print("no row has failed")
            return
        store.forget_failures()
        pipeline.run(job.recipe, rows, store)
        _finish(job, args, store)


def _finish(job: DataJob, args: argparse.Namespace, store: "Store") -> None:
    """Write the data set; a shard waits for the others."""
    if args.shard:
        print(f"{store.path}: take it to {job.recipe.output} with: contralto data merge {args.recipe}")
        return
    _write(job, store)


def _write(job: DataJob, store: "Store") -> None:
    from contralto.data_gen.export import export, folder_of
    from contralto.data_gen.publication import read_publication
    from contralto.data_gen.strategies.replies import VERDICT

    exported = export(job.recipe, job.rows, store)
    print(
        f"{folder_of(job.recipe)}: {_count(exported.pairs, exported.unit)}, {exported.rejected} rejected, {exported.failed} failed",
        end="",
    )
    print(f", {exported.dropped} dropped by filters" * bool(exported.dropped), end="")
    print(f", {exported.pending} not asked for yet (run goes on)" * bool(exported.pending))
    if exported.cut:
        print(
            f"{_count(exported.cut, 'pair')} with an answer that was cut off at max_new_tokens: raise it, or drop them with "
            "checks: {finish: {}} and filters: {finished: true}"
        )
    if exported.unread:
        print(f"{_count(exported.unread, 'reply')} of a judge without a verdict: it must have {VERDICT}")
    if exported.votes:
        print(exported.votes)
    if exported.failed:
        print(
            f"the failed rows, with reasons: {folder_of(job.recipe) / 'failed.jsonl'}; retry-failed asks for them again"
        )
    if request := read_publication(job.recipe.mapping).request:
        print(request)


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("ply") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _export(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen.export import folder_of, push_to_hub

    with job.store(read_only=True) as store:
        _write(job, store)
    if args.push_to_hub:
        print(push_to_hub(folder_of(job.recipe), args.push_to_hub, private=args.private))


def _merge(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store

    stores = args.stores or sorted((job.recipe.output / "shards").glob("*"))
    if not stores:
        raise ValueError(f"{job.recipe.output} has no shards: name the stores to merge")
    paths = [each / "answers.sqlite" if each.is_dir() else each for each in stores]
    for path in paths:  # all of them, before the first is merged
        with Store(path, read_only=True):
            pass
    with pipeline.locked(job.folder), job.store() as store:
        for path in paths:
            print(f"{path}: {_count(store.merge(path), 'new answer')}")
        _write(job, store)


def _batch(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.engines.batch_files import batch_line
    from contralto.data_gen.engines.openai import OpenAIEngine

    role = job.recipe.roles.get(args.role)
    if role is None:
        raise ValueError(
            f"the recipe has no role {args.role!r}{did_you_mean(args.role, job.recipe.roles)}; it has {', '.join(job.recipe.roles)}"
        )
    engine = role.engine if isinstance(role.engine, OpenAIEngine) else None
    if engine is None:
        raise ValueError(f"batch files are for roles of the engine openai, and {args.role!r} has another")
    if bool(args.write) == bool(args.read):
        raise ValueError("give either --write FILE for the open requests, or --read FILE for their answers")
    with job.working() as store:
        tracked = [each for each in pipeline.pending(job.recipe, job.rows, store) if each.role == args.role]
        if args.write:
            args.write.write_text("".join(batch_line(engine, each.request) for each in tracked), encoding="utf-8")
            print(f"{args.write}: {_count(len(tracked), 'request')}")
        else:
            _read_batch(args.read, tracked, store, engine)


def _read_batch(path: Path, tracked: Sequence[Any], store: "Store", engine: Any) -> None:
    """Record the answers in a batch's output. An invalid line fails its own request only."""
    from contralto.data_gen.engines.batch_files import read_batch_output
    from contralto.data_gen.types import Failure

    output = read_batch_output(path.read_bytes(), tracked, engine)
    unreadable = [f"{path}:{number}: {reason}" for number, reason in output.unreadable]
    if unreadable and not output.outcomes and not output.unknown:
        raise ValueError(unreadable[0])
    store.record(output.outcomes)
    failed = sum(isinstance(outcome, Failure) for _, outcome in output.outcomes)
    answers = _count(len(output.outcomes) - failed, "answer")
    print(f"{path}: {answers}, {failed} failed, {output.unknown} not asked for or known already")
    if unreadable:
        first = printable(unreadable[0])
        print(f"{_count(len(unreadable), 'line')} could not be read, the first of them {first}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------- what is


def _status(job: DataJob, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text
    from tqdm import tqdm

    from contralto.data_gen import pipeline
    from contralto.data_gen.export import DELAY

    console = Console(width=table_width())
    with job.store(read_only=True) as store:
        rows = tqdm(job.rows, desc="reading answers", unit="row", delay=DELAY, leave=False)
        results = list(pipeline.replay(job.recipe, rows, store, is_scoring=False))
        table = Table("strategy", "rows", "finished", "pairs", "rejected", "failed", "to do")
        for use in job.recipe.strategies:
            own = [result for result in results if result.strategy == use.name]
            table.add_row(Text(printable(use.name)), str(len(job.rows)), *map(str, _counts(own)))
        console.print(table)
        table = Table(
            Column("role", overflow="fold"),
            Column("model", overflow="fold"),
            "answers",
            "tokens in",
            "tokens out",
            "money",
        )
        for usage in store.usage():
            price = job.recipe.roles[usage.role].price if usage.role in job.recipe.roles else None
            money = f"{price.of(usage.prompt_tokens, usage.completion_tokens):.4f} {price.currency}" if price else "?"
            names = (Text(printable(name)) for name in (usage.role, usage.model))
            table.add_row(*names, *(f"{each:,}" for each in usage[2:]), money)
        console.print(table)
    if unscored := sum(result.is_unscored for result in results):
        print(f"{_count(unscored, 'row')} to do with all answers recorded, but not their scores: run computes them")
    reasons = Counter(_without_numbers(result.failed) for result in results if result.failed is not None)
    for reason, count in reasons.most_common(10):
        console.print(f"failed {count} times: {printable(reason)}", markup=False, highlight=False)


def _counts(results: Sequence[Any]) -> tuple[int, int, int, int, int]:
    """Return the numbers of rows that are finished, of pairs or completions, of rejected ones, of failed rows, and of rows to do."""
    from contralto.data_gen.types import Rejected

    outcomes = [each for result in results for each in result.outcomes or []]
    pairs = sum(not isinstance(each, Rejected) for each in outcomes)
    failed = sum(result.failed is not None for result in results)
    to_do = sum(result.is_pending for result in results)
    return len(results) - failed - to_do, pairs, len(outcomes) - pairs, failed, to_do


def _without_numbers(text: str) -> str:
    """Replace the numbers of a reason, so that reasons are counted together; the status of a reply stays."""
    return re.sub(r"(?<!\bstatus )(?<!\d)\d{3,}", "…", text)


def _estimate(job: DataJob, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline

    pipeline.check(job.recipe, job.rows)
    has_store = (job.folder / "answers.sqlite").exists()
    store = job.store(read_only=True) if has_store else None
    estimates, basis = pipeline.estimate(job.recipe, job.rows, store)
    if store:
        store.close()
    show_estimates(estimates, basis, _count(len(job.rows), "row"))


def _preview(job: DataJob, args: argparse.Namespace) -> None:
    from rich.console import Console

    from contralto.data_gen import pipeline

    if args.n < 1:
        raise ValueError(f"-n must be at least 1, not {args.n}")
    rows = job.rows[: args.n]
    with job.working() as store:
        pipeline.run(job.recipe, rows, store, is_shown=sys.stderr.isatty())
        show(Console(width=table_width()), pipeline.replay(job.recipe, rows, store))
