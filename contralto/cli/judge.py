"""`contralto judge`: compare the answers of two systems by judges, or judges and reward models on pairs whose better answer is known.

contralto judge tuned.jsonl base.jsonl --judge openai model=gpt-4.1 --preset alpaca_eval --estimate
contralto judge --pairs reward_bench.parquet --reward-model my-model
contralto judge answers.json --rating mmhal --judge openai model=gpt-4.1
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.cli import ratings
from contralto.cli.estimates import show_estimates, sum_of
from contralto.cli.outputs import check_output_file, check_output_folder
from contralto.cli.ratings import SUFFIXES
from contralto.common.column_names import column_names
from contralto.common.errors import require
from contralto.common.files import replace_text
from contralto.common.yaml_file import parse_yaml

if TYPE_CHECKING:
    from contralto.data_gen.store import Store
    from contralto.eval.judging.accuracy import PairScorer
    from contralto.eval.judging.games import Game
    from contralto.eval.judging.judges import Judge, Judgement
    from contralto.eval.judging.presets import Preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument(
        "answers",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="the answers of two systems; the first is the one evaluated (with --rating, of any number of systems)",
    )
    _add_data(parser.add_argument_group("answers and pairs"))
    _add_judges(parser.add_argument_group("judges"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("judge"),
        metavar="DIR",
        help="folder of all replies, which later runs reuse (default judge)",
    )
    output.add_argument("--estimate", action="store_true", help="estimate requests, tokens and money, and send nothing")
    output.add_argument(
        "--format",
        choices=list(SUFFIXES),
        help="print the tables in this format, and write them to DIR/judge with its suffix",
    )
    output.add_argument("--html", type=Path, help="path of the HTML page (default DIR/judge.html)")


def _add_data(group: Any) -> None:
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="the question set, if prompts, categories or references are in a file of their own",
    )
    group.add_argument(
        "--pairs", metavar="FILE", help="pairs whose better answer is known, in place of two systems' answers"
    )
    group.add_argument("--split", default="train", help="the split of --pairs (default train; RewardBench: filtered)")
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="columns under other names, such as prompt=question answer=reply",
    )
    group.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names of the systems (default: those in the files, or of the files)",
    )
    group.add_argument("--common", action="store_true", help="judge only the prompts that both systems have answered")
    group.add_argument("--limit", type=int, help="maximum number of questions or pairs")


def _add_judges(group: Any) -> None:
    group.add_argument(
        "--judge",
        nargs="+",
        action="append",
        default=[],
        metavar=("ENGINE", "NAME=VALUE"),
        help="an engine of contralto data with its options, those of sampling, price, template, verdict, name, seed; repeatable",
    )
    group.add_argument(
        "--preset",
        default="pairs",
        help="prompts and settings of a benchmark: pairs (default), alpaca_eval, arena_hard, mt_bench, evol",
    )
    group.add_argument(
        "--rating",
        metavar="NAME",
        help="rate the answers of one or several files one by one, in place of comparing two: mmhal",
    )
    group.add_argument(
        "--reward-model", action="append", default=[], metavar="MODEL", help="with --pairs: a reward model; repeatable"
    )
    group.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="with --pairs: a function of a row and its answers; repeatable",
    )
    group.add_argument("--seed", type=int, default=0, help="added to the seed of every request (default 0)")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with models")


class JudgeJob:
    """The games of a command, its judges, and the folder of their replies."""

    def __init__(self, args: argparse.Namespace) -> None:
        from contralto.data_gen.functions import search_folder
        from contralto.eval.judging.accuracy import PairScorer
        from contralto.eval.judging.judges import check_judges, game_rows, judge_game, make_judge, recipe_of
        from contralto.eval.judging.presets import PRESETS

        search_folder(Path.cwd())  # where functions of judges and scorers may lie
        self.preset: Preset = PRESETS.get(args.preset)
        engines: dict[str, Any] = {}
        self.judges: list[Judge] = [
            make_judge(_options(words), preset=self.preset, number=number, engines=engines)
            for number, words in enumerate(args.judge, 1)
        ]
        if self.judges:
            self.judges = check_judges(self.judges)
        self.scorers = [PairScorer(name=name, scorer={"reward_model": name}) for name in args.reward_model]
        self.scorers += [PairScorer(name=name, scorer=name) for name in args.scorer]
        self.games, self.pairs, self.systems = _games(args)
        self.rows = game_rows(self.games)
        self.recipe = recipe_of(self.judges, judge_game, output=args.output, seed=args.seed)
        self.store_path = args.output / "answers.sqlite"

    @property
    def is_accuracy(self) -> bool:
        """Return True if the better answers are known."""
        return bool(self.pairs)


def run(args: argparse.Namespace) -> None:
    """Let judges compare the answers, and write the results.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: a flag has an invalid value, a file is not valid, or no verdict can be read.
        ModuleNotFoundError: a package is missing.
    """
    if args.rating:
        ratings.run(args, [_options(words) for words in args.judge])
        return
    _check(args)
    require("rich", "scipy", "datasets", "tqdm")
    job = JudgeJob(args)
    if args.estimate:
        _estimate(job)
        return
    _check_files(args)
    _write(job, args, _judgements(job))


def _check(args: argparse.Namespace) -> None:
    """Check combinations of flags that the parser cannot check."""
    if args.pairs is None and len(args.answers) != 2:
        raise ValueError(
            f"contralto judge needs the answers of two systems, FIRST.jsonl SECOND.jsonl, or --pairs FILE, not {len(args.answers)} files "
            "(files stand before --judge)"
        )
    if args.pairs is not None and (args.answers or args.questions or args.common or args.names):
        raise ValueError("--pairs has both answers itself: leave out the files, --questions, --common and --names")
    if args.names and len(args.names) != 2:
        raise ValueError(f"--names must name both systems, not {len(args.names)}")
    if args.pairs is None and (args.reward_model or args.scorer):
        raise ValueError("--reward-model and --scorer need --pairs, whose better answer is known")
    if not (args.judge or args.reward_model or args.scorer):
        raise ValueError(
            "contralto judge needs --judge ENGINE NAME=VALUE ..., or with --pairs --reward-model MODEL or --scorer MODULE:FUNCTION"
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")


def _check_files(args: argparse.Namespace) -> None:
    """Check that the outputs can be written, before a request is sent."""
    check_output_folder(args.output, "--output")
    for name in ("judge.json", "verdicts.jsonl", *([f"judge{SUFFIXES[args.format]}"] if args.format else [])):
        check_output_file(args.output / name, "--output")
    check_output_file(_page(args), "--html")


def _page(args: argparse.Namespace) -> Path:
    page: Path = args.html or args.output / "judge.html"
    return page


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a judge: the engine, and values in YAML.

    Examples:
        >>> _options(["openai", "model=m", "temperature=0", "price={input: 2, output: 8}"])
        {'engine': 'openai', 'model': 'm', 'temperature': 0, 'price': {'input': 2, 'output': 8}}
    """
    engine, *others = words
    if "=" in engine:
        raise ValueError(f"--judge: begin with an engine, such as openai or transformers, not {engine!r}")
    options: dict[str, Any] = {"engine": engine}
    for word in others:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--judge: options are NAME=VALUE, not {word!r}; files stand before --judge")
        options[name] = parse_yaml(value, f"--judge: {name}")
    return options


def _games(args: argparse.Namespace) -> tuple[list["Game"], list[dict[str, Any]], tuple[str, str]]:
    """Return the games, the rows of pairs ([] for systems), and the names of both sides."""
    from contralto.data_gen.published_forms import COLUMN_NAMES
    from contralto.eval.judging import answers
    from contralto.eval.judging.accuracy import read_pairs
    from contralto.eval.judging.games import pair_answers

    if args.pairs is not None:
        columns = column_names(args.columns, (*COLUMN_NAMES, "subset"), "--columns")
        games, rows = read_pairs(args.pairs, split=args.split, columns=columns, limit=args.limit)
        return games, rows, ("chosen", "rejected")
    columns = column_names(args.columns, answers.NAMES, "--columns")
    of_questions = {name: column for name, column in columns.items() if name in ("category", "reference")}
    of_answers = {name: column for name, column in columns.items() if name not in of_questions}
    first, second = (answers.read_answers(path, columns=of_answers) for path in args.answers)
    names = args.names or _names(args.answers, (first, second))
    questions = answers.read_questions(args.questions, columns=of_questions) if args.questions else []
    if of_questions and not args.questions:
        raise ValueError(f"--columns {' '.join(of_questions)} belong to --questions, which is not given")
    paths = (str(args.answers[0]), str(args.answers[1]))
    games = pair_answers(first, second, names=paths, questions=questions, is_common=args.common, limit=args.limit)
    return games, [], (names[0], names[1])


def _names(paths: Sequence[Path], sides: Sequence[Sequence[Any]]) -> list[str]:
    """Return the names of systems that their files contain, or else those of the files, which differ."""
    inside = [{each.system for each in side} for side in sides]
    names = [each.pop() if len(each) == 1 else "" for each in inside]
    if all(names) and names[0] != names[1]:
        return names
    stems = [path.stem for path in paths]
    return stems if stems[0] != stems[1] else [str(path.with_suffix("")) for path in paths]


def _estimate(job: JudgeJob) -> None:
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store

    if not job.judges:
        print(f"{len(job.games):,} pairs are scored here; no request is sent")
        return
    pipeline.check(job.recipe, job.rows)
    store = Store(job.store_path, read_only=True) if job.store_path.exists() else None
    advice = "Judges may reply with fewer tokens: judge a few with --limit first, whose replies are then used"
    estimates, basis = pipeline.estimate(job.recipe, job.rows, store, advice=advice)
    if store:
        store.close()
    show_estimates(estimates, basis, f"{len(job.rows):,} games in both orders")


def _judgements(job: JudgeJob) -> dict[str, list["Judgement"]]:
    """Return the judgements by judge or scorer, after all requests are answered."""
    from contralto.data_gen import pipeline
    from contralto.data_gen.store import Store
    from contralto.eval.judging.accuracy import score_pairs

    with pipeline.locked(job.recipe.output), Store(job.store_path) as store:
        judgements = _replies(job, store) if job.judges else {}
        for scorer in job.scorers:
            judgements[scorer.name] = score_pairs(scorer, job.games, job.pairs, store)
    return judgements


def _replies(job: JudgeJob, store: "Store") -> dict[str, list["Judgement"]]:
    from contralto.data_gen import pipeline
    from contralto.eval.judging.judges import judgement_of

    store.forget_failures()  # a run asks for them again
    if any(role.price.input or role.price.output for role in job.recipe.roles.values()):
        pipeline.check(job.recipe, job.rows)
        print(
            f"still to pay: at most about {sum_of(pipeline.estimate(job.recipe, job.rows, store)[0], 'to_pay')}",
            file=sys.stderr,
        )
    pipeline.run(job.recipe, job.rows, store)
    judges = {judge.name: judge for judge in job.judges}
    judgements: dict[str, list[Judgement]] = {name: [] for name in judges}
    for result in pipeline.replay(job.recipe, job.rows, store):
        judgements[result.strategy].append(judgement_of(result, judges[result.strategy]))
    return judgements


def _write(job: JudgeJob, args: argparse.Namespace, judgements: Mapping[str, Sequence["Judgement"]]) -> None:
    """Write the verdicts first, so that replies without a readable verdict can be looked at, then figures and page."""
    from contralto.eval.comparison.report.formats import render_tables
    from contralto.eval.judging import report
    from contralto.eval.judging.figures import summarise_judgements

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in report.verdict_rows(judgements))
    replace_text(args.output / "verdicts.jsonl", "".join(lines))
    raters: list[Judge | PairScorer] = [*job.judges, *job.scorers]
    figures = summarise_judgements(
        judgements, raters, systems=job.systems, preset=job.preset, is_accuracy=job.is_accuracy
    )
    replace_text(args.output / "judge.json", json.dumps(figures, indent=1))
    replace_text(_page(args), report.judgement_page(figures, judgements, made_by="contralto judge"))
    sentence, tables = report.sentence_of(figures), report.judgement_tables(figures)
    if args.format:
        text = render_tables(sentence, [("", table) for table in tables], args.format)
        replace_text(args.output / f"judge{SUFFIXES[args.format]}", text)
        print(text, end="")
    else:
        _show(sentence, tables)
    note = f"{_page(args)} shows the same with games; {args.output / 'verdicts.jsonl'} has every verdict and reply."
    print(f"\n{note}", file=sys.stderr if args.format else sys.stdout)
    _warn(job, judgements)


def _warn(job: JudgeJob, judgements: Mapping[str, Sequence["Judgement"]]) -> None:
    """Print how many replies had no verdict, were cut off, or are missing."""
    for judge in job.judges:
        column = judgements[judge.name]
        if unread := sum(each.is_unread for each in column):
            shape = judge.prompts.verdict.shape
            print(
                f"{judge.name}: {unread} games without a readable verdict in both orders: it must reply with {shape}",
                file=sys.stderr,
            )
        if cut := sum(each.cut for each in column):
            print(f"{judge.name}: {cut} replies were cut off at max_new_tokens: raise it", file=sys.stderr)
    if failed := sum(bool(each.failed) for column in judgements.values() for each in column):
        print(f"{failed} games have no reply; the same command asks for them again", file=sys.stderr)


def _show(sentence: str, tables: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from contralto.cli.estimates import table_width
    from contralto.eval.comparison.report.terminal import rich_table

    console = Console(width=table_width())
    for table in tables:
        console.print(rich_table(table))
    console.print(f"\n[bold]{escape(sentence)}[/bold]", highlight=False)
