"""`contralto generate`: text from any Hugging Face model, decoded by contrast, from prompts to the terminal or to JSONL."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from contralto.cli import output_file
from contralto.cli.arguments import add_prompt_arguments, check_placement, check_positive
from contralto.cli.flags import errors_with_flags, flag
from contralto.cli.methods import add_method_arguments, bits_from, config_from, models_from
from contralto.cli.prompts_file import read_prompts
from contralto.cli.token_bar import DELAY, TokenBar
from contralto.common import processes
from contralto.common.files import decode, lines_of
from contralto.common.hashing import content_digest, file_digest
from contralto.common.messages import text_of
from contralto.common.texts import has_lone_surrogate
from contralto.decoding import inputs
from contralto.decoding.inputs import DecodingBatch, Prompt
from contralto.decoding.methods import METHODS, DecodingConfig, SamplingConfig, cost, generate_kwargs, parameter_names

SAMPLED = ("temperature", "top_k", "top_p")
"""Options of sampling."""
SEARCH = ("max_new_tokens", "sample", *SAMPLED, "beams", "seed", "raw")
"""Options that act on the texts, besides those of the methods."""
APART = ("prompts", "file", "output", "resume", "batch_size", "device", "run", "command", "debug", "trust_remote_code")
"""Arguments that do not determine the texts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without any, lines of standard input")
    parser.add_argument(
        "--file",
        type=Path,
        help="prompts from a file: .txt with a prompt per line, or .jsonl or .json with rows of prompt or messages, and with "
        "either images (paths seen from the file's folder), contrast_prompt, system, tools; other columns, such as id, are "
        "copied to the output",
    )
    add_prompt_arguments(parser, seeds="sampling, and of the noise and transformations of images")
    add_method_arguments(parser, METHODS.names())
    parser.add_argument(
        "--executor", choices=["loop", "processor"], help="how to run a method (default: loop, the faster one)"
    )
    parser.add_argument(
        "--compare", choices=["greedy", "plain"], help="also decode without contrast: greedily, or by the same options"
    )
    _add_search_arguments(parser)
    _add_output_arguments(parser)


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument("--max-new-tokens", type=int, default=256, help="largest number of new tokens (default 256)")
    search.add_argument("--sample", action="store_true", help="sample instead of taking the best token")
    search.add_argument("--temperature", type=float, help="of --sample, after the contrast (default 1.0)")
    search.add_argument(
        "--top-k", type=int, help="of --sample, after the contrast: likeliest tokens to keep (default all)"
    )
    search.add_argument("--top-p", type=float, help="of --sample, after the contrast (default 1.0)")
    search.add_argument("--beams", type=int, default=1, help="number of beams of beam search (default 1)")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default 8)")
    output.add_argument("--output", type=Path, help="write JSONL here, a row per prompt, as soon as its batch is done")
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted --output; every row in it must have the same prompt, images, options and "
        "local weights (a hub id stands for itself)",
    )


def run(args: argparse.Namespace) -> None:
    """Read the prompts, load the models, decode batch by batch, and write every batch at once.

    Args:
        args: the parsed flags.
    """
    with errors_with_flags():
        config = _config(args)
        prompts = _read_prompts(args)
        inputs.check_prompts(prompts, config)
        writes = args.output and processes.rank() == 0
        with _opened(prompts, config, args) if writes else nullcontext() as output:
            done = processes.broadcast(output.done if output else 0)
            if done < len(prompts):
                _run(prompts, config, args, output, done)
            elif output:
                print(f"{args.output} is complete: it holds all {done} rows", file=sys.stderr)


def _opened(prompts: Sequence[Prompt], config: DecodingConfig, args: argparse.Namespace) -> Any:
    """Open the output file for rows of these prompts and settings."""
    from contralto.decoding.loading import weights_digests

    rows = [_shown(i, prompt) for i, prompt in enumerate(prompts)]
    weights = weights_digests(args.model, config, args.adapter)

    def digests(index: int) -> dict[str, str]:
        return weights | {path: file_digest(path) for path in prompts[index].images if isinstance(path, str)}

    return output_file.opened(args.output, rows, _settings(args, config), resume=args.resume, digests=digests)


def _run(prompts: Sequence[Prompt], config: DecodingConfig, args: argparse.Namespace, output: Any, done: int) -> None:
    """Decode the prompts that are not in the output yet; of several processes each decodes batches of its own."""
    from tqdm import tqdm

    from contralto.decoding.aligned import vocabulary_note

    models = models_from(args, config, with_images=bool(prompts[0].images))
    is_first = processes.rank() == 0
    checked = tqdm(prompts, desc="checking prompts", unit="prompt", delay=DELAY, leave=False, disable=not is_first)
    for i, prompt in enumerate(checked):
        inputs.check_rendered(i, prompt, models, raw=args.raw)
        if not prompt.images:  # images are read with their batch
            batch = inputs.batch_of([prompt], models, config, seeds=[args.seed], raw=args.raw)
            inputs.check_lengths(batch, config, args.max_new_tokens, first=i)
    if is_first:
        print(cost(config, models.main, models.branch_models), file=sys.stderr)
        if note := vocabulary_note(models):
            print(note, file=sys.stderr)
    several = processes.world_size()
    streams = not args.output and several == 1 and args.beams == 1 and bool(config.declaration.streaming)
    streaming = streams and (len(prompts) == 1 or not args.compare)  # texts of one prompt are shown side by side
    size = args.batch_size if config.declaration.row_seeds or not config.sampling else 1
    starts = range(done, len(prompts), size)
    shows_bar = is_first and (bool(output) or (not sys.stdout.isatty() and sys.stderr.isatty()))
    with tqdm(total=len(starts), desc="batches", unit="batch", disable=not shows_bar) as bar:
        for number in range(0, len(starts), several):
            own, results = number + processes.rank(), []  # the last round has no batch for some processes
            if own < len(starts):
                start = starts[own]
                with _streamer(prompts, models, config, args, start, streaming=streaming) as streamer:
                    some = prompts[start : start + size]
                    results = list(_decode(some, models, config, args, first=start, streamer=streamer))
            for i, result in enumerate(processes.gathered(results), starts[number]):
                if output:
                    output.write(result)
                elif is_first and not streaming:
                    _show(i, prompts[i], result)
            bar.update(min(several, len(starts) - number))


# --------------------------------------------------------------------------------------------------------------- checks


def _config(args: argparse.Namespace) -> DecodingConfig:
    """Return the decoding configuration, after checks of what the parser cannot check by itself."""
    config = config_from(args, beams=max(args.beams, 1), executor=args.executor, sampling=_sampling(args))
    if not config.contrasts and args.executor:
        raise ValueError(f"--executor says how a method runs, and --method {config.method} has none: leave it out")
    if not config.contrasts and args.compare:
        raise ValueError(f"--compare shows what the contrast changes, and --method {config.method} has no contrast")
    if args.prompts and args.file:
        raise ValueError("give prompts either as arguments or with --file, not both")
    if args.resume and not args.output:
        raise ValueError("--resume goes on with an --output file: name it")
    check_positive(args, "max_new_tokens", "beams", "batch_size")
    _take_device(args)
    check_placement(args)
    bits_from(args, config.models)
    return config


def _take_device(args: argparse.Namespace) -> None:
    """Give each of several processes its device."""
    if processes.world_size() > 1:
        if args.device is not None:
            raise ValueError(
                f"--device {args.device} is for one process, and each of several has its own: leave it out"
            )
        args.device = processes.device_of_process()


def _sampling(args: argparse.Namespace) -> SamplingConfig | None:
    """Return the sampling parameters; None without --sample."""
    given = {name: getattr(args, name) for name in SAMPLED if getattr(args, name) is not None}
    if given and not args.sample:
        raise ValueError(f"{flag(next(iter(given)))} is of sampling: add --sample, or leave it out")
    if args.sample and args.beams > 1:
        raise ValueError("--sample draws one text per prompt, and --beams searches: leave one of them out")
    return SamplingConfig(**given) if args.sample else None


def _settings(args: argparse.Namespace, config: DecodingConfig) -> dict[str, Any]:
    """Return the settings that determine the completions; output path and batch size do not."""
    settled = {"method": config.method, "form": config.form, "executor": config.executor, **config.parameters}
    if config.sampling:
        settled |= {name: getattr(config.sampling, name) for name in SAMPLED}
        settled["top_k"] = settled["top_k"] or None  # files of earlier versions do not name it
    settings = {name: value for name, value in vars(args).items() if name not in APART} | settled
    return {name: value for name, value in settings.items() if value is not None}


# -------------------------------------------------------------------------------------------------------------- prompts


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    default = Prompt("", tuple(args.image or ()), args.contrast_prompt, {} if args.contrast_prompt else None)
    if args.prompts:
        if has_lone_surrogate(args.prompts):
            raise ValueError("a prompt is not in UTF-8: set the terminal to UTF-8, or use --file")
        return [default._replace(content=text) for text in args.prompts]
    if args.file:
        prompts = read_prompts(args.file, default, [*parameter_names(), *SEARCH])
    elif processes.world_size() > 1:
        raise ValueError("standard input is that of one process: give the prompts of several with --file")
    elif sys.stdin.isatty():
        raise ValueError("no prompts: give them as arguments, with --file, or on standard input")
    else:
        lines = lines_of(decode(sys.stdin.buffer.read(), "standard input"))
        prompts = [default._replace(content=line) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {args.file or 'standard input'}: it holds nothing but blank lines")
    return prompts


def _shown(index: int, prompt: Prompt) -> dict[str, Any]:
    """Return the beginning of a prompt's row in the output: its number, the other columns of its file, the prompt.

    Columns keep their names; those that have the name of a column of the output are in `row`.
    """
    images = [path if isinstance(path, str) else f"sha256:{content_digest(path, 16)}" for path in prompt.images]
    shown = {
        "image": images,
        "contrast_prompt": prompt.contrast,
        "chat_template_kwargs": prompt.template,
        "row": {name: value for name, value in prompt.row.items() if name in output_file.COLUMNS},
    }
    kept = {name: value for name, value in prompt.row.items() if name not in output_file.COLUMNS}
    return {"index": index, **kept, "prompt": prompt.content} | {name: value for name, value in shown.items() if value}


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(
    prompts: Sequence[Prompt],
    models: Any,
    config: DecodingConfig,
    args: argparse.Namespace,
    *,
    first: int,
    streamer: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the results of one batch: the completion, and the completion without contrast if requested."""
    from transformers import set_seed

    from contralto.decoding.sampling import row_seed

    seeds = [args.seed + first + i for i in range(len(prompts))]
    batch = inputs.batch_of(prompts, models, config, seeds=seeds, raw=args.raw)
    inputs.check_lengths(batch, config, args.max_new_tokens, first=first)
    columns: dict[str, list[str]] = {}
    for name, kwargs in _runs(batch, config, args, first=first, streamer=streamer).items():
        if streamer and not isinstance(streamer, TokenBar) and args.compare:
            print(f"--- {config.method if name == 'text' else name}")
        set_seed(row_seed(args.seed, first) % 2**31)
        output = models.main.generate(**batch.inputs, **kwargs)
        start = inputs.prompt_length(batch)
        columns[name] = models.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _runs(
    batch: DecodingBatch, config: DecodingConfig, args: argparse.Namespace, *, first: int, streamer: Any
) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments of `generate()` for each column of the output."""
    search = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "do_sample": False}
    kwargs = generate_kwargs(config, batch, streamer=streamer)
    rows = len(batch.inputs["input_ids"])
    runs = {"text": search | _sampled(config, args.seed, range(first, first + rows), kwargs)}
    if args.compare == "plain":
        plain = _sampled(config, args.seed, range(first, first + rows), {})
        runs["plain"] = search | plain | {"streamer": streamer}
    elif args.compare:
        runs["greedy"] = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": streamer}
    return runs


def _sampled(config: DecodingConfig, seed: int, rows: range, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `generate()` that sample each row from its own random stream, independently of the batch."""
    from contralto.decoding.sampling import SeededSampling, row_seed

    if config.sampling is None:
        return dict(kwargs)
    drawn = {name: getattr(config.sampling, name) for name in SAMPLED}
    if not config.declaration.row_seeds and "custom_generate" in kwargs:
        return {**kwargs, "do_sample": True, **drawn}
    sampling = SeededSampling([row_seed(seed, row) for row in rows], **drawn)
    return {**kwargs, "logits_processor": [*kwargs.get("logits_processor", ()), sampling]}


def _streamer(
    prompts: Sequence[Prompt],
    models: Any,
    config: DecodingConfig,
    args: argparse.Namespace,
    first: int,
    *,
    streaming: bool,
) -> Any:
    """Return a context with the streamer of a batch: the texts themselves, or a progress bar; None where nothing can be streamed."""
    if streaming:
        return nullcontext(_text_streamer(prompts, models, first))
    if args.beams > 1 or not config.declaration.streaming or processes.rank() > 0:
        return nullcontext()
    return TokenBar(args.max_new_tokens, calls=2 if args.compare else 1)


def _text_streamer(prompts: Sequence[Prompt], models: Any, first: int) -> Any:
    """Return a streamer that prints the texts of a batch, whose first prompt has the number `first`, as `_show` does."""
    from contralto.decoding.streaming import BatchTextStreamer

    ends = models.main.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    titled = set[int]()

    def show(row: int, text: str, is_last: bool) -> None:
        if len(prompts) > 1 and row not in titled:
            print(_title(first + row, prompts[first + row]))
            titled.add(row)
        print(text, end="\n" if is_last else "", flush=True)

    return BatchTextStreamer(models.tokenizer, ends=ends, show=show, skip_special_tokens=True)


def _title(index: int, prompt: Prompt) -> str:
    return f"=== {index}: {text_of(prompt.content)}"


def _show(index: int, prompt: Prompt, result: Mapping[str, str]) -> None:
    print(_title(index, prompt))
    for name, text in result.items():
        print(text if len(result) == 1 else f"--- {name}\n{text}")
