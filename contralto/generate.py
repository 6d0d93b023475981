"""`contralto generate`: text from any Hugging Face model, decoded by contrast, from prompts to the terminal or to JSONL."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

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

from contralto.decoding import AdaptersOff, methods
from contralto.decoding.images import noised, ritual_transform
from contralto.decoding.placement import input_device
from contralto.names import check_same_tokenizer, from_pretrained, locate

Content = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


class Prompt(NamedTuple):
    """What a text begins with."""

    content: Content
    images: tuple[Any, ...] = ()
    """Their paths, or the images themselves."""
    contrast: str | None = None
    """What the other branch reads in place of the text, or of the last message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without any, lines of standard input")
    parser.add_argument(
        "--file",
        type=Path,
        help="prompts from a file: a prompt per line, or JSONL of prompt or messages, and with either an image (a path or "
        "several, seen from the file's folder) and a contrast_prompt",
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
    search.add_argument("--temperature", type=float, default=1.0, help="of sampling, after the contrast (default 1.0)")
    search.add_argument("--top-p", type=float, default=1.0, help="of sampling, after the contrast (default 1.0)")
    search.add_argument("--beams", type=int, default=1, help="beam search with so many beams (default 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default 8)")
    output.add_argument("--output", type=Path, help="write JSONL here, a row per prompt, as soon as its batch is done")
    output.add_argument("--resume", action="store_true", help="go on with an --output that an earlier run began")


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
    settings = _settings(args)
    done = _rows_done(args.output, settings, resume=args.resume) if args.output else 0
    models = load_models(args, sees=bool(prompts[0].images))
    print(methods.cost(args, models.main, models.others, executor=args.executor), file=sys.stderr)
    streaming = len(prompts) == 1 and not args.output and args.beams == 1
    with args.output.open("a") if args.output else nullcontext() as file:
        starts = range(done, len(prompts), args.batch_size)
        for start in tqdm(starts, desc="batches", unit="batch", disable=not args.output):
            batch = prompts[start : start + args.batch_size]
            results = _decode(batch, models, args, first=start, streaming=streaming)
            for i, result in enumerate(results, start):
                if file:
                    _write(file, {"index": i, **_shown(prompts[i]), **result, "settings": settings})
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
    if args.temperature <= 0:
        raise ValueError(
            f"--temperature must be above 0, not {args.temperature}: leave --sample out for the best token"
        )
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must lie in (0, 1], not {args.top_p}")
    check_dtype(args.dtype)


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


def check_dtype(name: str) -> None:
    """Raise ValueError unless `name` is auto or a dtype."""
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"--dtype must be auto or a torch dtype such as bfloat16, not {name!r}")


def check_prompts(prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
    """Refuse prompts that lack what the method reads, before anything is loaded."""
    views = methods.METHODS[args.method].views
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
        if missing := [path for path in prompt.images if not Path(path).is_file()]:
            raise ValueError(f"prompt {i}: there is no image {missing[0]}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that determines the texts, but not where they go or how many are made at a time."""
    apart = {"prompts", "file", "output", "resume", "device", "run", "command", "debug"}
    found = {name: value for name, value in vars(args).items() if name not in apart} | methods.parameters(args)
    return {name: value for name, value in found.items() if value is not None}


def _rows_done(output: Path, settings: dict[str, Any], *, resume: bool) -> int:
    """How many rows an earlier run wrote; a row that a kill cut short is taken off."""
    if not output.exists():
        return 0
    if not resume:
        raise ValueError(f"{output} exists: add --resume to go on with it, or name another file")
    lines = output.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        output.write_text("".join(lines[:-1]))
        lines.pop()
    if lines and (earlier := json.loads(lines[-1])["settings"]) != settings:
        changed = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
        raise ValueError(f"{output} was made with another {', '.join(changed)}: use the same, or name another file")
    return len(lines)


# -------------------------------------------------------------------------------------------------------------- prompts


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    given = Prompt("", tuple(args.image or ()), args.contrast_prompt)
    if args.prompts:
        return [given._replace(content=text) for text in args.prompts]
    if args.file is None and sys.stdin.isatty():
        raise ValueError("no prompts: give them as arguments, with --file, or on standard input")
    lines = (args.file.read_text() if args.file else sys.stdin.read()).splitlines()
    if args.file and args.file.suffix == ".jsonl":
        rows = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
        prompts = [_prompt_of(row, given, args.file, n) for n, row in rows]
    else:
        prompts = [given._replace(content=line) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {args.file or 'standard input'}: it holds nothing but blank lines")
    return prompts


def _prompt_of(row: Mapping[str, Any], given: Prompt, file: Path, line: int) -> Prompt:
    """A row of JSONL; what it does not say is taken from the flags."""
    content = row.get("messages", row.get("prompt"))
    if content is None:
        raise ValueError(f"{file}:{line}: a row needs a prompt or messages, and has only {', '.join(row) or 'nothing'}")
    images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or []
    paths = tuple(str(file.parent / image) for image in images)
    return Prompt(content, paths or given.images, row.get("contrast_prompt", given.contrast))


def _with_contrast(prompt: Prompt) -> Prompt:
    """The prompt as another branch reads it: another text, in place of the last message if there are several."""
    assert prompt.contrast is not None
    text = prompt.contrast.replace("{prompt}", _text(prompt.content))
    if isinstance(prompt.content, str):
        return prompt._replace(content=text)
    *before, last = prompt.content
    kept = [] if isinstance(last["content"], str) else [part for part in last["content"] if part["type"] != "text"]
    said: Content = [*kept, {"type": "text", "text": text}] if kept else text
    return prompt._replace(content=[*before, {**last, "content": said}])


def _text(content: Content) -> str:
    """What a prompt says, of a conversation the last message."""
    said = content if isinstance(content, str) else content[-1]["content"]
    return said if isinstance(said, str) else " ".join(part["text"] for part in said if part["type"] == "text")


def _render(prompt: Prompt, models: Models, *, raw: bool) -> str:
    """The text that the model reads: the conversation in the model's own form, if it has one."""
    reader, content = models.processor or models.tokenizer, prompt.content
    if raw or reader.chat_template is None:
        if not isinstance(content, str):
            raise ValueError("messages need a chat template, and this tokenizer has none, or --raw turned it off")
        marked = not prompt.images or reader.image_token in content
        return content if marked else reader.image_token * len(prompt.images) + content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if models.processor is not None:
        messages = _with_images(messages, len(prompt.images))
    text: str = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _with_images(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages in parts, as processors want them; images that they do not place stand at their beginning."""
    said = [
        m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}] for m in messages
    ]
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    if not any(part["type"] == "image" for parts in said for part in parts):
        said[first] = [{"type": "image"}] * count + said[first]
    return [{**message, "content": parts} for message, parts in zip(messages, said, strict=True)]


def encode(prompts: Sequence[Prompt], models: Models, *, raw: bool) -> Any:
    """What the main model reads of a batch of prompts."""
    texts = [_render(prompt, models, raw=raw) for prompt in prompts]
    reader = models.processor or models.tokenizer
    is_bare = raw or reader.chat_template is None
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
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'contralto[vision]'") from error
    images = (Image.open(image) if isinstance(image, str | Path) else image for image in prompt.images)
    return prompt._replace(images=tuple(image.convert("RGB") for image in images))


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
            others = [_with_contrast(prompt) for prompt in prompts]
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
    placement = {"dtype": args.dtype, "device_map": args.device or _default_device()}
    if adapters:
        from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

        if not sees:
            return from_pretrained(AutoPeftModelForCausalLM, name, **placement).eval()
        base = from_pretrained(PeftConfig, name).base_model_name_or_path
        return PeftModel.from_pretrained(_load(base, args, sees=True, adapters=False), locate(name)).eval()
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
    search = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "do_sample": args.sample}
    if args.sample:
        search |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    print_to = TextStreamer(models.tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None
    runs = {
        "text": search | methods.arguments(args, batch, executor=args.executor, beams=args.beams, streamer=print_to)
    }
    if args.compare:
        plain = search if args.compare == "plain" else {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        runs[args.compare] = plain | {"streamer": print_to}
    columns: dict[str, list[str]] = {}
    for name, how in runs.items():
        if streaming and args.compare:
            print(f"--- {args.method if name == 'text' else name}")
        set_seed(args.seed + first)
        output = models.main.generate(**batch.inputs, **how)
        columns[name] = models.tokenizer.batch_decode(output[:, prompt_length(batch) :], skip_special_tokens=True)
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def prompt_length(batch: methods.Setting) -> int:
    """How many tokens of what `generate()` returns are the prompt's."""
    return 0 if batch.model.config.is_encoder_decoder else int(batch.inputs["input_ids"].shape[1])


def _write(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _shown(prompt: Prompt) -> dict[str, Any]:
    """A prompt in the output."""
    images = {"image": list(prompt.images)} if prompt.images else {}
    return {"prompt": prompt.content} | images | ({"contrast_prompt": prompt.contrast} if prompt.contrast else {})


def _show(index: int, prompt: Prompt, result: Mapping[str, str]) -> None:
    print(f"=== {index}: {_text(prompt.content)}")
    for name, text in result.items():
        print(text if len(result) == 1 else f"--- {name}\n{text}")
