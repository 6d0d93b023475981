"""`contralto compare`: tasks of lm-eval under several decoders on the same documents, with the controls that belong to them."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.cli.flags import errors_with_flags, flag
from contralto.cli.methods import add_quantization_arguments
from contralto.cli.outputs import check_output_file, check_output_folder
from contralto.common.errors import require
from contralto.common.files import replace_text
from contralto.decoding.methods import model_options
from contralto.decoding.quantization import quantization_options

if TYPE_CHECKING:
    from contralto.eval.comparison import Conditions, Subject

SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}
"""The formats of `contralto.eval.comparison.report.formats`, with the suffixes of their files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="tasks or groups of lm-eval, or YAML files"
    )
    _add_models(parser.add_argument_group("models (a folder, a hub id, or testbed:NAME for an embedded model)"))
    _add_decoders(
        parser.add_argument_group("decoders (greedy decoding, sampling and the methods' controls are always included)")
    )
    _add_documents(parser.add_argument_group("documents"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("compare"),
        metavar="DIR",
        help="folder of the answers, which later runs reuse",
    )
    output.add_argument(
        "--format",
        choices=list(SUFFIXES),
        help="print the tables in this format, and write them to DIR/compare with its suffix",
    )
    output.add_argument("--html", type=Path, help="path of the HTML page (default DIR/compare.html)")


def _add_models(group: Any) -> None:
    group.add_argument(
        "--model", nargs="+", required=True, help="the models to evaluate, one column each; also LoRA adapters"
    )
    group.add_argument("--adapter", nargs="+", help="LoRA adapters of the models; one for all models, or one for each")
    for name, methods in model_options().items():
        purpose = f"for {' and '.join(method.name for method in methods)}: {methods[0].models[name]}"
        group.add_argument(flag(name), nargs="+", help=f"{purpose}; one for all models, or one for each")
    group.add_argument("--adapters-off", action="store_true", help="the amateur is the model without its PEFT adapters")
    add_quantization_arguments(group)
    group.add_argument(
        "--contrast-prompt",
        metavar="TEMPLATE",
        help="template of the contrast prompt; {prompt} is the prompt, {field} a field of the document",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the models")
    group.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    group.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if any")
    group.add_argument("--batch-size", default="16", help="batch size, or auto (default 16)")


def _add_decoders(group: Any) -> None:
    group.add_argument("--methods", help="methods with their defaults, such as cd,dola")
    group.add_argument(
        "--decoder",
        action="append",
        default=[],
        metavar="'METHOD NAME=VALUE ...'",
        help="a method with options; repeatable",
    )
    group.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="number of seeds of rows with sampling (default 3); 0 leaves these rows out",
    )
    group.add_argument("--metric", help="a metric, or METRIC,FILTER as in lm-eval (default: that of each task)")
    group.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="add a row from samples logged by lm-eval; repeatable",
    )
    group.add_argument(
        "--reuse",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="results of contralto eval --log_samples to reuse; repeatable",
    )


def _add_documents(group: Any) -> None:
    group.add_argument("--limit", type=float, help="maximum number of documents per task; below 1: a fraction of them")
    group.add_argument("--num-fewshot", type=int, help="number of few-shot examples (default: that of each task)")
    group.add_argument(
        "--apply-chat-template", action="store_true", help="format prompts with the model's chat template"
    )
    group.add_argument("--system-instruction", help="the system message")
    group.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="folder with further tasks; repeatable"
    )
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of local data to use instead of the hub")
    group.add_argument(
        "--metadata", type=_json, default={}, metavar="JSON", help="options of tasks, such as '{\"n\": 100}'"
    )


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f'must be JSON, such as {{"n": 100}}: {error}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be an object, such as {{"n": 100}}, not {text}')
    return value


def run(args: argparse.Namespace) -> None:
    """Run the decoders, compare their answers, and write the results.

    Args:
        args: The parsed flags.

    Raises:
        ValueError: A flag has an invalid value, or the comparison is invalid, see `contralto.eval.compare`.
        ModuleNotFoundError: A package of the extra `eval` is missing.
    """
    _check(args)
    require("lm_eval", "rich", "matplotlib", "scipy")  # the last ones are needed at the end of the work
    from transformers.utils.logging import disable_progress_bar

    from contralto.eval.comparison import report
    from contralto.eval.comparison.compare import compare

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading; runs have their own
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model_args = {"batch_size": args.batch_size, "device": args.device, "dtype": args.dtype}
    model_args |= {name: getattr(args, name) for name in quantization_options()}
    with errors_with_flags():
        comparison = compare(
            _subjects(args),
            _task_names(args.tasks),
            [*filter(None, (args.methods or "").split(",")), *args.decoder],
            output=args.output,
            conditions=_conditions(args),
            model_args={name: value for name, value in model_args.items() if value},
            include_path=args.include_path,
            data_dir=args.data_dir,
            reuse=args.reuse,
            logged=dict(_named_folder(text) for text in args.samples),
        )
    page = _page(args)
    replace_text(args.output / "compare.json", json.dumps(comparison, indent=1))
    replace_text(page, report.page(comparison))
    if args.format:
        text = report.render(comparison, args.format)
        replace_text(args.output / f"compare{SUFFIXES[args.format]}", text)
        print(text, end="")
    else:
        report.show(comparison)
    kept = f"{comparison['reused']} runs were there before. " if comparison["reused"] else ""
    made = f"{kept}{page} shows the same with plots and documents; {args.output / 'compare.json'} holds the figures."
    print(f"\n{made}", file=sys.stderr if args.format else sys.stdout)


def _task_names(words: Sequence[str]) -> list[str]:
    """Return the names of tasks, which may also be separated by commas, as in lm-eval."""
    return [name for word in words for name in ([word] if Path(word).is_file() else word.split(",")) if name]


def _conditions(args: argparse.Namespace) -> "Conditions":
    from contralto.eval.comparison import Conditions

    return Conditions(
        limit=int(args.limit) if args.limit and args.limit >= 1 else args.limit,
        num_fewshot=args.num_fewshot,
        chat=args.apply_chat_template,
        system=args.system_instruction,
        seeds=tuple(range(args.seeds)),
        metric=args.metric,
        metadata=args.metadata,
    )


def _check(args: argparse.Namespace) -> None:
    """Check arguments that the parser cannot check, before anything is loaded."""
    if args.seeds < 0:
        raise ValueError(f"--seeds must be at least 0, not {args.seeds}")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise ValueError(f"--limit must be above 0, not {args.limit:g}")
    check_output_folder(args.output, "--output")
    check_output_file(args.output / "compare.json", "--output")
    check_output_file(_page(args), "--html")
    if args.format:
        check_output_file(args.output / f"compare{SUFFIXES[args.format]}", "--output")
    for folder in (*args.reuse, *(folder for _, folder in map(_named_folder, args.samples))):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    for name in (*model_options(), "adapter"):
        models = getattr(args, name) or []
        if len(models) not in (0, 1, len(args.model)):
            raise ValueError(
                f"{flag(name)} takes one model for all or one for each of {len(args.model)}, not {len(models)}"
            )


def _page(args: argparse.Namespace) -> Path:
    page: Path = args.html or args.output / "compare.html"
    return page


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError(f"--samples must be of the form NAME=DIR, not {text!r}")
    return name, Path(folder)


def _subjects(args: argparse.Namespace) -> "list[Subject]":
    """Return the models, each with its other models and the contrast prompt."""
    from contralto.eval.comparison import Subject

    subjects = []
    for i, name in enumerate(args.model):
        models = {option: getattr(args, option) for option in model_options() if getattr(args, option)}
        sources: dict[str, Any] = {option: names[i if len(names) > 1 else 0] for option, names in models.items()}
        sources |= {"adapters_off": True} if args.adapters_off else {}
        sources |= {"contrast_prompt": args.contrast_prompt} if args.contrast_prompt else {}
        adapters = args.adapter or [None]
        subjects.append(Subject(name, sources, adapters[i if len(adapters) > 1 else 0]))
    return subjects
