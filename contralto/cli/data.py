"""`contralto data`: preference pairs from a recipe; no answer is asked for twice, and none is lost."""

import argparse
import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.common.files import lines_of
from contralto.common.texts import printable

if TYPE_CHECKING:
    from contralto.data_gen.recipe import Recipe
    from contralto.data_gen.store import Store

ACTIONS = {
    "preview": "make pairs of the first few rows and show them side by side",
    "estimate": "tokens and money for all rows, before they are spent",
    "run": "ask for everything that is not recorded yet, then export; resumes what was interrupted",
    "status": "what is done, what it cost, what failed and why",
    "retry-failed": "ask again for the failed rows alone, then export",
    "export": "write the data set from the recorded answers, asking nobody",
    "merge": "take over the answers of shards, or of other stores, then export",
    "batch": "write the open requests of a role as an OpenAI batch file, or read the file with its answers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {name: actions.add_parser(name, help=text, description=f"{name}: {text}.") for name, text in ACTIONS.items()}
    for action in made.values():
        action.add_argument("recipe", type=Path, help="the recipe, a YAML file")
        action.add_argument(
            "--output", type=Path, help="the folder of the data set and its answers, instead of the recipe's"
        )
        action.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with models")
        action.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    for name in ("preview", "run", "estimate", "status", "retry-failed"):
        made[name].add_argument(
            "--shard", type=_shard, metavar="I/N", help="only the I-th of N parts of the rows, 1 to N"
        )
    made["preview"].add_argument("-n", type=int, default=5, help="how many rows (default 5)")
    made["merge"].add_argument(
        "stores", nargs="*", type=Path, help="stores or their folders; without any, the shards in the output folder"
    )
    made["export"].add_argument("--push-to-hub", metavar="OWNER/NAME", help="put the data set on the hub, too")
    made["export"].add_argument("--private", action="store_true", help="where nobody else sees it")
    made["batch"].add_argument("--role", required=True, help="whose requests")
    made["batch"].add_argument("--write", type=Path, metavar="FILE", help="write the open requests here")
    made["batch"].add_argument("--read", type=Path, metavar="FILE", help="record the answers in this file")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"a shard is written I/N with I from 1 to N, such as 2/8, not {text!r}")
    return int(found[1]), int(found[2])


class Job:
    """A recipe with its rows and the place of its store."""

    def __init__(self, args: argparse.Namespace) -> None:
        from contralto.data_gen import checks, pipeline
        from contralto.data_gen import recipe as recipes
        from contralto.data_gen.rows import read_rows

        self.recipe: Recipe = recipes.load_recipe(args.recipe, output=args.output)
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
        from contralto.data_gen.store import Store

        return Store(self.folder / "answers.sqlite", read_only=read_only)


def run(args: argparse.Namespace) -> None:
    """One action."""
    job = Job(args)
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


def _run(job: Job, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline

    with pipeline.locked(job.folder), job.store() as store:
        pipeline.run(job.recipe, job.rows, store)
        _finish(job, args, store)


def _retry_failed(job: Job, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline

    with pipeline.locked(job.folder), job.store() as store:
        failed = {recorded.row for recorded in store.failures()}
        rows = [row for row in job.rows if row["id"] in failed]
        if not rows:
            print("no row has failed")
            return
        store.forget_failures()
        pipeline.run(job.recipe, rows, store)
        _finish(job, args, store)


def _finish(job: Job, args: argparse.Namespace, store: "Store") -> None:
    """The data set; a shard waits for the others."""
    if args.shard:
        print(f"{store.path}: take it to {job.recipe.output} with: contralto data merge {args.recipe}")
        return
    _write(job, store)


def _write(job: Job, store: "Store") -> None:
    from contralto.data_gen.export import export, folder_of

    found = export(job.recipe, job.rows, store)
    print(
        f"{folder_of(job.recipe)}: {_count(found.pairs, 'pair')}, {found.rejected} rejected, {found.failed} failed",
        end="",
    )
    print(f", {found.dropped} dropped by filters" * bool(found.dropped), end="")
    print(f", {found.pending} not asked for yet (run goes on)" * bool(found.pending))
    if found.cut:
        print(
            f"{_count(found.cut, 'pair')} with an answer that was cut off at max_new_tokens: raise it, or drop them with "
            "checks: {finish: {}} and filters: {finished: true}"
        )
    if found.failed:
        print(
            f"the failed rows, with reasons: {folder_of(job.recipe) / 'failed.jsonl'}; retry-failed asks for them again"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _export(job: Job, args: argparse.Namespace) -> None:
    from contralto.data_gen.export import folder_of, push_to_hub

    with job.store(read_only=True) as store:
        _write(job, store)
    if args.push_to_hub:
        print(push_to_hub(folder_of(job.recipe), args.push_to_hub, private=args.private))


def _merge(job: Job, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store

    given = args.stores or sorted((job.recipe.output / "shards").glob("*"))
    if not given:
        raise ValueError(f"{job.recipe.output} has no shards: name the stores to merge")
    paths = [each / "answers.sqlite" if each.is_dir() else each for each in given]
    for path in paths:  # all of them, before the first is merged
        with Store(path, read_only=True):
            pass
    with pipeline.locked(job.folder), job.store() as store:
        for path in paths:
            print(f"{path}: {_count(store.merge(path), 'new answer')}")
        _write(job, store)


def _batch(job: Job, args: argparse.Namespace) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.engines.batch_files import batch_line
    from contralto.data_gen.engines.openai import OpenAIEngine

    role = job.recipe.roles.get(args.role)
    if role is None:
        raise ValueError(f"the recipe has no role {args.role!r}; it has {', '.join(job.recipe.roles)}")
    engine = role.engine if isinstance(role.engine, OpenAIEngine) else None
    if engine is None:
        raise ValueError(f"batch files are for roles of the engine openai, and {args.role!r} has another")
    if bool(args.write) == bool(args.read):
        raise ValueError("give either --write FILE for the open requests, or --read FILE for their answers")
    with pipeline.locked(job.folder), job.store() as store:
        asked = [a for a in pipeline.pending(job.recipe, job.rows, store) if a.role == args.role]
        if args.write:
            args.write.write_text("".join(batch_line(engine, each.request) for each in asked), encoding="utf-8")
            print(f"{args.write}: {_count(len(asked), 'request')}")
        else:
            _read_batch(args.read, {each.request.key: each for each in asked}, store, engine)


def _read_batch(path: Path, asked: dict[str, Any], store: "Store", engine: Any) -> None:
    """Record the answers in a batch's output. A line that cannot be read costs its request, not the others."""
    from contralto.data_gen.types import Failure

    said, strange, unreadable = [], 0, []
    lines = lines_of(path.read_bytes().decode("utf-8", "replace"))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            outcome = _batch_outcome(line, asked)
        except ValueError as error:
            unreadable.append(f"{path}:{number}: {error}")
            continue
        if outcome is None:
            strange += 1
        else:
            said.append((outcome[0], engine.without_key(outcome[1])))
    if unreadable and not said and not strange:
        raise ValueError(unreadable[0])
    store.record(said)
    failed = sum(isinstance(each, Failure) for _, each in said)
    print(f"{path}: {_count(len(said) - failed, 'answer')}, {failed} failed, {strange} not asked for or known already")
    if unreadable:
        first = printable(unreadable[0])
        print(f"{_count(len(unreadable), 'line')} could not be read, the first of them {first}", file=sys.stderr)


def _batch_outcome(line: str, asked: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return a request and what a line of a batch's output says of it; None for a request that is not open.

    Raises:
        ValueError: it is no such line.
    """
    from contralto.common.texts import short
    from contralto.data_gen.engines.batch_files import read_batch_line
    from contralto.data_gen.engines.replies import read_answer
    from contralto.data_gen.types import Failure

    key, body = read_batch_line(line)
    if key not in asked:
        return None
    where = asked[key]
    try:
        return where, body if isinstance(body, Failure) else read_answer(body, where.request)
    except Exception as error:  # noqa: BLE001 - a stranger made this reply
        return where, Failure(short(f"{type(error).__name__}: {error}"))


# --------------------------------------------------------------------------------------------------------------- what is


def _status(job: Job, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from contralto.data_gen import pipeline

    console = Console()
    with job.store(read_only=True) as store:
        results = list(pipeline.replay(job.recipe, job.rows, store))
        table = Table("strategy", "rows", "finished", "pairs", "rejected", "failed", "to do")
        for use in job.recipe.strategies:
            own = [result for result in results if result.strategy == use.name]
            table.add_row(Text(printable(use.name)), str(len(job.rows)), *map(str, _counts(own)))
        console.print(table)
        table = Table("role", "model", "answers", "tokens in", "tokens out", "money")
        for usage in store.usage():
            price = job.recipe.roles[usage.role].price if usage.role in job.recipe.roles else None
            money = f"{price.of(usage.prompt_tokens, usage.completion_tokens):.4f} {price.currency}" if price else "?"
            names = (Text(printable(name)) for name in (usage.role, usage.model))
            table.add_row(*names, *(f"{each:,}" for each in usage[2:]), money)
        console.print(table)
    reasons = Counter(_without_numbers(result.failed) for result in results if result.failed is not None)
    for reason, count in reasons.most_common(10):
        console.print(f"failed {count} times: {printable(reason)}", markup=False, highlight=False)


def _counts(results: Sequence[Any]) -> tuple[int, int, int, int, int]:
    from contralto.data_gen.types import Pair

    made = [each for result in results for each in result.made or []]
    pairs = sum(isinstance(each, Pair) for each in made)
    failed = sum(result.failed is not None for result in results)
    to_do = sum(result.is_pending for result in results)
    return len(results) - failed - to_do, pairs, len(made) - pairs, failed, to_do


def _without_numbers(text: str) -> str:
    """Reasons that differ in numbers alone are one; the status of a reply is a reason by itself."""
    return re.sub(r"(?<!\bstatus )(?<!\d)\d{3,}", "…", text)


def _estimate(job: Job, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from contralto.data_gen import pipeline

    pipeline.check(job.recipe, job.rows)
    has_store = (job.folder / "answers.sqlite").exists()
    store = job.store(read_only=True) if has_store else None
    found, basis = pipeline.estimate(job.recipe, job.rows, store)
    spent = {usage.role: usage for usage in store.usage()} if store else {}
    if store:
        store.close()
    table = Table("role", "model", "requests", "tokens in", "tokens out", "money", "of it recorded")
    for each in found:
        known = spent[each.role].requests if each.role in spent else 0
        figures = (f"{value:,.0f}" for value in each[2:5])
        table.add_row(
            *(Text(printable(name)) for name in each[:2]),
            *figures,
            f"{each.money:.2f} {each.currency}",
            f"{known:,} requests",
        )
    totals: Counter[str] = Counter()
    for each in found:
        totals[each.currency] += each.money  # type: ignore[assignment]
    console = Console()
    console.print(table)
    said = ", ".join(f"{money:.2f} {currency}" for currency, money in totals.items())
    print(f"in all {said} for {_count(len(job.rows), 'row')}, from {basis}")


def _preview(job: Job, args: argparse.Namespace) -> None:
    from rich.console import Console

    from contralto.data_gen import pipeline

    if args.n < 1:
        raise ValueError(f"-n must be at least 1, not {args.n}")
    rows = job.rows[: args.n]
    with pipeline.locked(job.folder), job.store() as store:
        pipeline.run(job.recipe, rows, store, is_shown=sys.stderr.isatty())
        width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
        show(Console(width=width), pipeline.replay(job.recipe, rows, store))


def show(console: Any, results: Iterable[Any]) -> None:
    """Pairs side by side, with what differs highlighted; and why there are none.

    Args:
        console: of rich.
        results: as `pipeline.replay` gives them.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from contralto.data_gen.types import Pair

    for result in results:
        title = printable(f"{result.row['id']} · {result.strategy}")
        said = printable("\n".join(f"{m['role']}: {_said(m['content'])}" for m in result.row["prompt"]))
        console.print(Panel(Text(said), title=Text(title), title_align="left"))
        if result.failed is not None:
            console.print(Text(printable(f"failed: {result.failed}"), style="bold red"))
        for made in result.made or []:
            if not isinstance(made, Pair):
                console.print(Text(printable(f"rejected: {made.reason}"), style="yellow"))
                continue
            table = Table("[green]chosen", "[red]rejected", expand=True)
            table.add_row(*highlighted(*map(printable, (made.chosen, made.rejected))))
            console.print(table)
            for name, value in made.columns.items():
                console.print(Text(printable(f"{name}: {value}"), style="dim"))


def _said(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"[{part['type']}]") for part in content)


def highlighted(chosen: str, rejected: str) -> tuple[Any, Any]:
    """Two texts, with the words that only one of them has in colour; for those without colours, between brackets of their
    own: {+words+} and [-words-].

    Args:
        chosen, rejected: the texts.

    Examples:
        >>> [text.plain for text in highlighted("It is 13 now.", "It is 11 now.")]
        ['It is {+13+} now.', 'It is [-11-] now.']
    """
    from rich.text import Text

    one, other = re.findall(r"\s+|\w+|[^\w\s]", chosen), re.findall(r"\s+|\w+|[^\w\s]", rejected)
    left, right = Text(), Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind == "equal":
            left.append("".join(one[a:b]))
            right.append("".join(other[c:d]))
            continue
        if a < b:
            left.append("{+" + "".join(one[a:b]) + "+}", style="bold green")
        if c < d:
            right.append("[-" + "".join(other[c:d]) + "-]", style="bold red")
    return left, right
