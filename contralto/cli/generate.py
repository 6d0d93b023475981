"""`contralto generate`: text from any Hugging Face model, decoded by contrast, from prompts to the terminal or to JSONL."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import psutil
import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    TextStreamer,
    set_seed,
)

from contralto.cli import output_file
from contralto.cli.options import SAMPLED, check_device, check_dtype, check_sampling
from contralto.cli.prompts_file import Prompt, read_prompts
from contralto.common.errors import during, require
from contralto.common.files import decode, lines_of
from contralto.common.hashing import content_digest, file_digest, weights_digest
from contralto.common.hub import check_weights, from_pretrained, locate, with_adapter
from contralto.common.messages import begins_answer, contrasted, fill, flattened, text_of, with_images
from contralto.common.texts import has_lone_surrogate, without_bos
from contralto.decoding import AdaptersOff, SeededSampling, methods
from contralto.decoding.branches.context import rooms
from contralto.decoding.images import noised, ritual_transform
from contralto.decoding.pictures import open_image
from contralto.decoding.placement import input_device
from contralto.decoding.sampling import row_seed
from contralto.decoding.vocabulary import check_same_tokenizer

SEARCH = ("max_new_tokens", "sample", *SAMPLED, "beams", "seed", "raw")
"""Options that act on the texts, besides those of the methods."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without any, lines of standard input")
    parser.add_argument(
        "--file",
        type=Path,
        help="prompts from a file: .txt with a prompt per line, or .jsonl or .json with rows of prompt or messages, and with "
        "either images (paths seen from the file's folder), contrast_prompt, system, tools; other columns are repeated in the "
        "output",
    )
    add_model_arguments(parser)
    methods.add_arguments(parser, list(methods.METHODS))
    parser.add_argument(
        "--executor", choices=["loop", "processor"], help="how a method runs (default: loop, the faster)"
    )
    parser.add_argument(
        "--compare", choices=["greedy", "plain"], help="also decode without contrast: greedily, or as asked otherwise"
    )
    search = parser.add_argument_group("search")
    search.add_argument("--max-new-tokens", type=int, default=256, help="at most so many tokens per text (default 256)")
    search.add_argument("--sample", action="store_true", help="sample instead of taking the best token")
    search.add_argument("--temperature", type=float, help="of --sample, after the contrast (default 1.0)")
    search.add_argument("--top-p", type=float, help="of --sample, after the contrast (default 1.0)")
    search.add_argument("--beams", type=int, default=1, help="beam search with so many beams (default 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default 8)")
    output.add_argument("--output", type=Path, help="write JSONL here, a row per prompt, as soon as its batch is done")
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on with an --output that an earlier run began; every row in it must be of the same prompt, images, options and "
        "local weights (a hub id stands for itself)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name models and say how prompts reach them."""
    parser.add_argument("--image", action="append", metavar="PATH", help="an image for every prompt; may be repeated")
    parser.add_argument("--raw", action="store_true", help="feed prompts as they are, even if there is a chat template")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, noise and transformations (default 0)")
    models = parser.add_argument_group("models (a folder, a hub id, or testbed:NAME for an embedded model)")
    models.add_argument("--model", required=True, help="the model that generates")
    models.add_argument("--amateur", help="of cd and scd: a weaker model of the same tokenizer")
    models.add_argument("--expert", help="of proxy: a small tuned model")
    models.add_argument("--antiexpert", help="of proxy: the small model before tuning")
    models.add_argument(
        "--adapters-off", action="store_true", help="the amateur is MODEL without its PEFT adapters (proxy: EXPERT)"
    )
    models.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the models")
    models.add_argument("--dtype", default="auto", help="auto (default: as stored), float32, bfloat16 or float16")
    models.add_argument("--device", help="where the models go: cpu, cuda, cuda:1, auto (spread); default: a GPU if any")


class Models(NamedTuple):
    main: Any
    others: tuple[Any, ...]
    """Of the other branches: models, or `AdaptersOff`."""
    tokenizer: Any
    processor: Any = None
    """What reads images, if there are any."""


def run(args: argparse.Namespace) -> None:
    """Read the prompts, load the models, decode batch by batch, and write every batch at once."""
    _check(args)
    prompts = _read_prompts(args)
    check_prompts(prompts, args)
    if args.output is None:
        _run(prompts, args, None)
        return
    rows = [{"index": i, **_shown(prompt)} for i, prompt in enumerate(prompts)]
    models = _weights(args)

    def digests(index: int) -> dict[str, str]:
        return models | {path: file_digest(path) for path in prompts[index].images if isinstance(path, str)}

    with output_file.opened(args.output, rows, _settings(args), resume=args.resume, digests=digests) as output:
        if output.done == len(prompts):
            print(f"{args.output} is complete: it holds all {output.done} rows", file=sys.stderr)
        else:
            _run(prompts, args, output)


def _run(prompts: Sequence[Prompt], args: argparse.Namespace, output: output_file.OutputFile | None) -> None:
    """Decode what is not in the output yet."""
    models = load_models(args, sees=bool(prompts[0].images))
    for i, prompt in enumerate(prompts):
        _check_rendered(i, prompt, models, raw=args.raw)
        if not prompt.images:  # images are read with their batch
            check_rooms(setting([prompt], models, args, [args.seed]), args, first=i)
    print(methods.cost(args, models.main, models.others, executor=args.executor), file=sys.stderr)
    streaming = len(prompts) == 1 and not output and args.beams == 1
    size = 1 if args.method == "scd" and args.sample else args.batch_size  # its draws are of the whole batch
    starts = range(output.done if output else 0, len(prompts), size)
    for start in tqdm(starts, desc="batches", unit="batch", disable=not output):
        batch = prompts[start : start + size]
        for i, result in enumerate(_decode(batch, models, args, first=start, streaming=streaming), start):
            if output:
                output.write(result)
            elif not streaming:
                _show(i, prompts[i], result)


# --------------------------------------------------------------------------------------------------------------- checks


def _check(args: argparse.Namespace) -> None:
    """What the parser cannot check by itself, before anything is loaded."""
    methods.check(args)
    _check_executor(args)
    if args.method == "none" and args.compare:
        raise ValueError("--compare shows what the contrast changes, and --method none has no contrast")
    if args.prompts and args.file:
        raise ValueError("give prompts either as arguments or with --file, not both")
    if args.resume and not args.output:
        raise ValueError("--resume goes on with an --output file: name it")
    for name in ("max_new_tokens", "beams", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{methods.flag(name)} must be at least 1, not {getattr(args, name)}")
    check_sampling(args)
    check_dtype(args.dtype)
    check_device(args.device)


def _check_executor(args: argparse.Namespace) -> None:
    """Settle how the method runs."""
    if args.method == "none" and args.executor:
        raise ValueError("--executor says how a method runs, and --method none has none: leave it out")
    if args.beams > 1 and args.method in ("search", "scd"):
        raise ValueError(f"--method {args.method} has no beams: leave --beams out")
    if args.sample and args.method == "search":
        raise ValueError("--method search is deterministic: leave --sample out")
    if args.beams > 1 and args.executor == "loop":
        raise ValueError("--executor loop knows no beams: use --executor processor")
    if args.method == "scd" and args.executor == "processor":
        raise ValueError("--method scd is a loop of its own: use --method cd for the same texts by a processor")
    args.executor = args.executor or ("processor" if args.beams > 1 or args.method == "none" else "loop")


def check_prompts(prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
    """Refuse prompts that lack what the method reads, before anything is loaded."""
    views = methods.METHODS[args.method].views
    if prompts[0].images:
        require("PIL")
    wants_images = set(views) & {"noised", "transformed", "blind"}
    for i, prompt in enumerate(prompts):
        if bool(prompt.images) != bool(prompts[0].images):
            raise ValueError(f"prompt {0 if prompt.images else i} has no image and others have: decode them apart")
        if wants_images and not prompt.images:
            raise ValueError(
                f"--method {args.method} contrasts images, and prompt {i} has none: give --image PATH, or image in its row"
            )
        if "prompt" in views and args.method != "cfg" and prompt.contrast is None:
            raise ValueError(
                f"--method {args.method} contrasts prompts, and prompt {i} has no other: give --contrast-prompt TEXT, "
                "or contrast_prompt in its row"
            )
        if (prompt.contrast is None) != (prompts[0].contrast is None):
            raise ValueError("some prompts have a contrast_prompt and others have none: decode them apart")
        if missing := [path for path in prompt.images if isinstance(path, str) and not Path(path).is_file()]:
            raise ValueError(f"prompt {i}: there is no image {missing[0]}")
        if prompt.contrast is not None:
            fill(prompt.contrast, "", prompt.fields)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what determines the texts, but not where they go or how many are made at a time."""
    apart = {
        "prompts",
        "file",
        "output",
        "resume",
        "batch_size",
        "device",
        "run",
        "command",
        "debug",
        "trust_remote_code",
    }
    found = {name: value for name, value in vars(args).items() if name not in apart} | methods.parameters(args)
    return {name: value for name, value in found.items() if value is not None}


def _weights(args: argparse.Namespace) -> dict[str, str]:
    """Return a hash of every local model, by the flag that names it; a hub id stands for itself."""
    names = {flag: getattr(args, flag) for flag in ("model", *methods.METHODS[args.method].models)}
    found = {flag: weights_digest(name) for flag, name in names.items() if name}
    return {flag: value[:16] for flag, value in found.items() if value != names[flag]}


# -------------------------------------------------------------------------------------------------------------- prompts


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    given = Prompt("", tuple(args.image or ()), args.contrast_prompt, {} if args.contrast_prompt else None)
    if args.prompts:
        if has_lone_surrogate(args.prompts):
            raise ValueError("a prompt is not in UTF-8: set the terminal to UTF-8, or use --file")
        return [given._replace(content=text) for text in args.prompts]
    if args.file:
        prompts = read_prompts(args.file, given, [*methods.PARAMETERS, *SEARCH])
    elif sys.stdin.isatty():
        raise ValueError("no prompts: give them as arguments, with --file, or on standard input")
    else:
        lines = lines_of(decode(sys.stdin.buffer.read(), "standard input"))
        prompts = [given._replace(content=line) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {args.file or 'standard input'}: it holds nothing but blank lines")
    return prompts


def _render(prompt: Prompt, models: Models, *, raw: bool) -> str:
    """The text that the model reads: the conversation in the model's own form, if it has one."""
    reader, content = models.processor or models.tokenizer, prompt.content
    if raw or reader.chat_template is None:
        if not isinstance(content, str) or prompt.template:
            raise ValueError("messages need a chat template, and this tokenizer has none, or --raw turned it off")
        marked = not prompt.images or reader.image_token in content
        return content if marked else reader.image_token * len(prompt.images) + content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    messages = with_images(messages, len(prompt.images))
    messages = flattened(messages) if models.processor is None else _in_parts(messages)
    goes_on = begins_answer(messages)
    how = {"tokenize": False, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    text: str = reader.apply_chat_template(messages, **prompt.template, **how)
    return text


def _check_rendered(index: int, prompt: Prompt, models: Models, *, raw: bool) -> None:
    """Reject a prompt that the chat template does not take, before any prompt is decoded."""
    with during(f"prompt {index}, {text_of(prompt.content)[:60]!r}, does not fit the chat template"):
        text = _render(prompt, models, raw=raw)
    for name in {"tools", "documents"} & set(prompt.template):
        if not _shows(name, prompt, text, models):
            raise ValueError(
                f"prompt {index}: the chat template of the model does not show its {name}: drop the column"
            )
    if not prompt.images and not models.tokenizer(text)["input_ids"]:
        raise ValueError(
            f"prompt {index} is empty, and the tokenizer of the model begins texts with nothing: give a prompt"
        )


def check_rooms(batch: methods.Setting, args: argparse.Namespace, *, first: int = 0) -> None:
    """Reject prompts that leave too little of a model's context to the new tokens, before they are decoded."""
    for i, branches in enumerate(rooms(batch, window=args.amateur_window), first):
        with during(f"prompt {i}"):
            for room in branches:
                room.check(args.max_new_tokens, option="--max-new-tokens")


def _shows(name: str, prompt: Prompt, text: str, models: Models) -> bool:
    """Whether the text of a prompt is another one than without an argument of the chat template."""
    rest = {key: value for key, value in prompt.template.items() if key != name}
    try:
        return _render(prompt._replace(template=rest), models, raw=False) != text
    except jinja2.TemplateError:  # the template needs it
        return True


def _in_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write every content as parts, as processors want them."""
    said = [
        m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"] or ""}]
        for m in messages
    ]
    return [{**message, "content": parts} for message, parts in zip(messages, said, strict=True)]


def encode(prompts: Sequence[Prompt], models: Models, *, raw: bool) -> Any:
    """What the main model reads of a batch of prompts."""
    texts = [_render(prompt, models, raw=raw) for prompt in prompts]
    reader = models.processor or models.tokenizer
    is_bare = raw or reader.chat_template is None
    if is_bare:
        texts = [without_bos(text, models.tokenizer) for text in texts]
    how = {"return_tensors": "pt", "padding": True}
    if models.processor is None:
        how |= {"add_special_tokens": is_bare, "return_token_type_ids": False}
        return reader(texts, **how).to(input_device(models.main))
    # as in a processor's own apply_chat_template: not every template begins as a text should
    how["add_special_tokens"] = is_bare or not texts[0].startswith(models.tokenizer.bos_token or texts[0])
    images = [list(prompt.images) for prompt in prompts] if prompts[0].images else None
    return reader(text=texts, images=images, **how).to(input_device(models.main), dtype=models.main.dtype)


def open_images(prompt: Prompt) -> Prompt:
    """The prompt with its images, in RGB, in place of their paths."""
    return prompt._replace(images=tuple(map(open_image, prompt.images)))


def setting(
    prompts: Sequence[Prompt], models: Models, args: argparse.Namespace, seeds: Sequence[int]
) -> methods.Setting:
    """A batch as the method's branches read it; every prompt has a seed for its noise and transformations."""
    prompts = [open_images(prompt) for prompt in prompts] if prompts[0].images else prompts
    inputs = encode(prompts, models, raw=args.raw)

    def see(view: str) -> Any:
        if view == "noised":
            return noised(inputs, step=methods.parameters(args)["noise_step"], seed=_noise_seeds(inputs, seeds))
        if view == "transformed":
            pairs = zip(prompts, seeds, strict=True)
            others = [p._replace(images=tuple(ritual_transform(i, seed=s).image for i in p.images)) for p, s in pairs]
        elif view == "blind":
            others = [prompt._replace(images=()) for prompt in prompts]
        else:
            others = [
                p._replace(content=contrasted(p.content, p.contrast, p.fields))
                for p in prompts
                if p.contrast is not None
            ]
        return encode(others, models, raw=args.raw)

    views = methods.METHODS[args.method].views
    if "prompt" in views and prompts[0].contrast is None:  # cfg has a default
        views = ()
    return methods.Setting(models.main, models.others, inputs, tuple(map(see, views)))


def _noise_seeds(inputs: Mapping[str, Any], seeds: Sequence[int]) -> list[int] | int:
    """Seeds for every image or tile, from those of the prompts; the first alone where prompts have unequally many."""
    count = len(inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["pixel_values"])
    each, rest = divmod(count, len(seeds))
    return seeds[0] if rest else [1000 * seed + i for seed in seeds for i in range(each)]


# --------------------------------------------------------------------------------------------------------------- models


def load_models(args: argparse.Namespace, *, sees: bool) -> Models:
    """The main model, those of the other branches, and the tokenizer, or for prompts with images the processor."""
    processor = from_pretrained(AutoProcessor, args.model) if sees else None
    if processor is not None and getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{args.model} reads no images: leave them out, or name an image-text model")
    tokenizer = processor.tokenizer if processor else from_pretrained(AutoTokenizer, args.model)
    names = [getattr(args, flag) for flag in methods.METHODS[args.method].models if getattr(args, flag)]
    for name in names:
        check_same_tokenizer(args.model, tokenizer, name, from_pretrained(AutoTokenizer, name))
    tuned = None if not args.adapters_off else args.expert if args.method == "proxy" else args.model
    main, *others = (_load(name, args, sees=sees, adapters=name == tuned) for name in (args.model, *names))
    if args.adapters_off:
        others.append(AdaptersOff(others[-1] if others else main))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right" if main.config.is_encoder_decoder else "left"
    return Models(main, tuple(others), tokenizer, processor)


def _load(name: str, args: argparse.Namespace, *, sees: bool, adapters: bool) -> Any:
    check_weights(name)
    placement = {"dtype": args.dtype, "device_map": args.device or _default_device()}
    if adapters:
        from peft import AutoPeftModelForCausalLM, PeftConfig

        if not sees:
            return from_pretrained(AutoPeftModelForCausalLM, name, **placement).eval()
        base = from_pretrained(PeftConfig, name).base_model_name_or_path
        return with_adapter(_load(base, args, sees=True, adapters=False), name).eval()
    config = from_pretrained(AutoConfig, name)
    if placement["device_map"] == "cpu":
        _check_memory(name)
    if config.is_encoder_decoder:
        return from_pretrained(AutoModelForSeq2SeqLM, name, **placement)
    text_alone = not sees and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return from_pretrained(AutoModelForCausalLM if text_alone else AutoModelForImageTextToText, name, **placement)


def _default_device() -> str:
    return "auto" if torch.accelerator.is_available() else "cpu"


def _check_memory(name: str) -> None:
    """Refuse local weights that cannot fit before the machine starts to swap."""
    needed = sum(file.stat().st_size for file in Path(locate(name)).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{name} holds {needed / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of memory are free: "
            "use a smaller model, --adapters-off, or --device auto to spread it"
        )


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(
    prompts: Sequence[Prompt], models: Models, args: argparse.Namespace, *, first: int, streaming: bool
) -> Iterator[dict[str, Any]]:
    """The results of one batch: the text, and the text without contrast if asked for."""
    batch = setting(prompts, models, args, [args.seed + first + i for i in range(len(prompts))])
    check_rooms(batch, args, first=first)
    search = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "do_sample": False}
    print_to = TextStreamer(models.tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None
    how = methods.arguments(args, batch, executor=args.executor, beams=args.beams, streamer=print_to)
    runs = {"text": search | (_sampled(args, first, len(prompts), how) if args.sample else how)}
    if args.compare == "plain":
        runs["plain"] = search | _sampled(args, first, len(prompts), {}) | {"streamer": print_to}
    elif args.compare:
        runs["greedy"] = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": print_to}
    columns: dict[str, list[str]] = {}
    for name, how in runs.items():
        if streaming and args.compare:
            print(f"--- {args.method if name == 'text' else name}")
        set_seed(row_seed(args.seed, first) % 2**31)
        output = models.main.generate(**batch.inputs, **how)
        columns[name] = models.tokenizer.batch_decode(output[:, prompt_length(batch) :], skip_special_tokens=True)
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _sampled(args: argparse.Namespace, first: int, rows: int, how: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate()` that sample, every row from a stream of its own, so that batches do not matter."""
    if not args.sample:
        return dict(how)
    drawn = {name: getattr(args, name) for name in SAMPLED}
    if args.method == "scd" and "custom_generate" in how:  # it accepts and rejects drafts by draws of its own
        return {**how, "do_sample": True, "top_k": 0, **drawn}
    seeds = [row_seed(args.seed, first + i) for i in range(rows)]
    return {**how, "logits_processor": [*how.get("logits_processor", ()), SeededSampling(seeds, **drawn)]}


def prompt_length(batch: methods.Setting) -> int:
    """How many tokens of what `generate()` returns are the prompt's."""
    return 0 if batch.model.config.is_encoder_decoder else int(batch.inputs["input_ids"].shape[1])


def _shown(prompt: Prompt) -> dict[str, Any]:
    """A prompt in the output."""
    images = [each if isinstance(each, str) else f"sha256:{content_digest(each, 16)}" for each in prompt.images]
    shown = {
        "image": images,
        "contrast_prompt": prompt.contrast,
        "chat_template_kwargs": prompt.template,
        "row": prompt.row,
    }
    return {"prompt": prompt.content} | {name: value for name, value in shown.items() if value}


def _show(index: int, prompt: Prompt, result: Mapping[str, str]) -> None:
    print(f"=== {index}: {text_of(prompt.content)}")
    for name, text in result.items():
        print(text if len(result) == 1 else f"--- {name}\n{text}")
