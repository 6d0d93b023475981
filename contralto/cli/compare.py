"""`contralto compare`: tasks of lm-eval under several decoders on the same documents, with the controls that belong to them."""

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

from contralto.cli.flags import flag
from contralto.common.errors import require
from contralto.common.outputs import check_output_file, check_output_folder
from contralto.decoding.methods import model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="tasks or groups of lm-eval, or YAML files"
    )
    models = parser.add_argument_group("models (a folder, a hub id, or testbed:NAME for an embedded model)")
    models.add_argument("--model", nargs="+", required=True, help="the models that answer; a column each")
    for name, methods in model_options().items():
        purpose = f"of {' and '.join(method.name for method in methods)}: {methods[0].models[name]}"
        models.add_argument(flag(name), nargs="+", help=f"{purpose}; one for all models, or one for each")
    models.add_argument(
        "--adapters-off", action="store_true", help="the amateur is the model without its PEFT adapters"
    )
    models.add_argument(
        "--contrast-prompt", metavar="TEMPLATE", help="{prompt} is the prompt, {field} a field of the document"
    )
    models.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the models")
    models.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    models.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if any")
    models.add_argument("--batch-size", default="16", help="a number, or auto (default 16)")
    what = parser.add_argument_group(
        "what is compared (greedy decoding, sampling and every method's controls always are)"
    )
    what.add_argument("--methods", help="methods with their defaults, such as cd,dola")
    what.add_argument(
        "--decoder",
        action="append",
        default=[],
        metavar="'METHOD NAME=VALUE ...'",
        help="a method with options; repeatable",
    )
    what.add_argument("--seeds", type=int, default=3, help="seeds of sampled rows (default 3); 0: no sampled rows")
    what.add_argument("--metric", help="in place of the tasks' own: a metric, or METRIC,FILTER as lm-eval writes it")
    what.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a row from samples that lm-eval logged; repeatable",
    )
    what.add_argument(
        "--reuse", action="append", default=[], type=Path, metavar="DIR", help="results of contralto eval --log_samples"
    )
    data = parser.add_argument_group("documents")
    data.add_argument("--limit", type=float, help="at most so many documents per task; below 1, that share of them")
    data.add_argument("--num-fewshot", type=int, help="examples in the prompt, in place of the task's number")
    data.add_argument("--apply-chat-template", action="store_true", help="prompts in the model's chat template")
    data.add_argument("--system-instruction", help="the system message")
    data.add_argument("--include-path", action="append", default=[], metavar="DIR", help="a folder with more tasks")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="local data in place of the hub's")
    data.add_argument(
        "--metadata", type=_json, default={}, metavar="JSON", help="options of tasks, such as '{\"n\": 100}'"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("compare"),
        metavar="DIR",
        help="where answers are kept; a second run goes on there",
    )
    output.add_argument("--html", type=Path, help="the page (default DIR/compare.html)")


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f'must be JSON, such as {{"n": 100}}: {error}') from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'must be an object, such as {{"n": 100}}, not {text}')
    return found


def run(args: argparse.Namespace) -> None:
    """Run, compare, show, write."""
    _check(args)
    require("lm_eval", "rich", "matplotlib", "scipy")  # the last ones are for the end
    from transformers.utils.logging import disable_progress_bar

    from contralto.eval.comparison import Conditions, report
    from contralto.eval.comparison.compare import compare

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading; runs have their own
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    conditions = Conditions(
        limit=int(args.limit) if args.limit and args.limit >= 1 else args.limit,
        num_fewshot=args.num_fewshot,
        chat=args.apply_chat_template,
        system=args.system_instruction,
        seeds=tuple(range(args.seeds)),
        metric=args.metric,
        metadata=args.metadata,
    )
    given = {"device": args.device, "dtype": args.dtype}  # what is not said stays the default, as in contralto eval
    comparison = compare(
        _subjects(args),
        args.tasks,
        [*filter(None, (args.methods or "").split(",")), *args.decoder],
        output=args.output,
        conditions=conditions,
        model_args={"batch_size": args.batch_size} | {name: value for name, value in given.items() if value},
        include_path=args.include_path,
        data_dir=args.data_dir,
        reuse=args.reuse,
        logged=dict(_named(text) for text in args.samples),
    )
    page = _page(args)
    (args.output / "compare.json").write_text(json.dumps(comparison, indent=1), encoding="utf-8")
    page.write_text(report.page(comparison), encoding="utf-8")
    report.show(comparison)
    kept = f"{comparison['reused']} runs were there before. " if comparison["reused"] else ""
    print(f"\n{kept}{page} shows the same with plots and documents; {args.output / 'compare.json'} holds the figures.")


def _check(args: argparse.Namespace) -> None:
    """What the parser cannot check by itself, before anything is loaded."""
    if args.seeds < 0:
        raise ValueError(f"--seeds must be at least 0, not {args.seeds}")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise ValueError(f"--limit must be above 0, not {args.limit:g}")
    check_output_folder(args.output, "--output")
    check_output_file(args.output / "compare.json", "--output")
    check_output_file(_page(args), "--html")
    for folder in (*args.reuse, *(folder for _, folder in map(_named, args.samples))):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    for name in model_options():
        given = getattr(args, name) or []
        if len(given) not in (0, 1, len(args.model)):
            raise ValueError(
                f"{flag(name)} takes one model for all or one for each of {len(args.model)}, not {len(given)}"
            )


def _page(args: argparse.Namespace) -> Path:
    """Return the path of the page."""
    page: Path = args.html or args.output / "compare.html"
    return page


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError(f"--samples must be of the form NAME=DIR, not {text!r}")
    return name, Path(folder)


def _subjects(args: argparse.Namespace) -> list[Any]:
    """The models with the others that they are weighed against."""
    from contralto.eval.comparison import Subject

    subjects = []
    for i, name in enumerate(args.model):
        given = {each: getattr(args, each) for each in model_options() if getattr(args, each)}
        sources: dict[str, Any] = {each: names[i if len(names) > 1 else 0] for each, names in given.items()}
        sources |= {"adapters_off": True} if args.adapters_off else {}
        sources |= {"contrast_prompt": args.contrast_prompt} if args.contrast_prompt else {}
        subjects.append(Subject(name, sources))
    return subjects
