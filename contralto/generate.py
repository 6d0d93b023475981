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
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    TextStreamer,
    set_seed,
)

from contralto import testbed
from contralto.decoding import AdaptersOff, ContrastiveDecodingLogitsProcessor
from contralto.decoding.processors import bind_rule

Prompt = str | list[dict[str, str]]
"""A text, or the messages of a conversation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without any, lines of standard input")
    parser.add_argument(
        "--file", type=Path, help="prompts from a file: a prompt per line, or JSONL of prompt or messages"
    )
    parser.add_argument("--raw", action="store_true", help="feed prompts as they are, even if there is a chat template")
    models = parser.add_argument_group("models (a folder, a hub id, or testbed:NAME for an embedded model)")
    models.add_argument("--model", required=True, help="the model that generates, the expert")
    models.add_argument("--amateur", help="the weaker model of the same tokenizer")
    models.add_argument("--adapters-off", action="store_true", help="the amateur is MODEL without its PEFT adapters")
    models.add_argument("--dtype", default="auto", help="auto (default: as stored), float32, bfloat16 or float16")
    models.add_argument("--device", help="where the models go: cpu, cuda, cuda:1, auto (spread); default: a GPU if any")
    contrast = parser.add_argument_group("method")
    contrast.add_argument("--method", choices=["cd", "none"], help="cd: contrastive decoding (default with an amateur)")
    contrast.add_argument("--form", choices=["obrien", "li"], default="obrien", help="whose contrastive decoding")
    contrast.add_argument("--beta", type=float, help="contrast strength of --form obrien (default 0.5)")
    contrast.add_argument("--alpha", type=float, default=0.1, help="plausibility threshold (default 0.1)")
    contrast.add_argument("--amateur-temperature", type=float, help="of --form li (default 1.0)")
    contrast.add_argument(
        "--amateur-window", type=int, help="prompt tokens the amateur sees (default: all; Li et al.: 1)"
    )
    contrast.add_argument(
        "--compare", choices=["greedy", "plain"], help="also decode without contrast: greedily, or as asked otherwise"
    )
    search = parser.add_argument_group("search")
    search.add_argument("--max-new-tokens", type=int, default=256, help="at most so many tokens per text (default 256)")
    search.add_argument("--sample", action="store_true", help="sample instead of taking the best token")
    search.add_argument("--temperature", type=float, default=1.0, help="of sampling, after the contrast (default 1.0)")
    search.add_argument("--top-p", type=float, default=1.0, help="of sampling, after the contrast (default 1.0)")
    search.add_argument("--beams", type=int, default=1, help="beam search with so many beams (default 1)")
    search.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default 8)")
    output.add_argument("--output", type=Path, help="write JSONL here, a row per prompt, as soon as its batch is done")
    output.add_argument("--resume", action="store_true", help="go on with an --output that an earlier run began")


class Models(NamedTuple):
    expert: Any
    amateur: Any
    """A model, `AdaptersOff`, or None without contrast."""
    tokenizer: Any


def run(args: argparse.Namespace) -> None:
    """Read the prompts, load the models, decode batch by batch, and write every batch at once."""
    _check(args)
    prompts = _read_prompts(args)
    settings = _settings(args)
    done = _rows_done(args.output, settings, resume=args.resume) if args.output else 0
    models = _load_models(args)
    texts = [_render(prompt, models.tokenizer, raw=args.raw) for prompt in prompts]
    streaming = len(prompts) == 1 and not args.output and args.beams == 1
    with args.output.open("a") if args.output else nullcontext() as file:
        starts = range(done, len(prompts), args.batch_size)
        for start in tqdm(starts, desc="batches", unit="batch", disable=not args.output):
            batch = texts[start : start + args.batch_size]
            results = _decode(batch, models, args, seed=args.seed + start, streaming=streaming)
            for i, result in enumerate(results, start):
                if file:
                    _write(file, {"index": i, "prompt": prompts[i], **result, "settings": settings})
                elif not streaming:
                    _show(i, prompts[i], result)


def _check(args: argparse.Namespace) -> None:
    """What the parser cannot check by itself, before anything is loaded."""
    if args.amateur and args.adapters_off:
        raise ValueError("give either --amateur or --adapters-off, not both")
    has_amateur = bool(args.amateur or args.adapters_off)
    args.method = args.method or ("cd" if has_amateur else "none")
    if args.method == "cd" and not has_amateur:
        raise ValueError("--method cd contrasts with a weaker model: give --amateur MODEL, or --adapters-off")
    if args.method == "none" and has_amateur:
        raise ValueError("--method none uses no amateur: leave --amateur and --adapters-off out, or use --method cd")
    if args.method == "none" and args.compare:
        raise ValueError("--compare shows what the contrast changes, and --method none has no contrast")
    if args.prompts and args.file:
        raise ValueError("give prompts either as arguments or with --file, not both")
    if args.resume and not args.output:
        raise ValueError("--resume goes on with an --output file: name it")
    for name in ("max_new_tokens", "beams", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.temperature <= 0:
        raise ValueError(
            f"--temperature must be above 0, not {args.temperature}: leave --sample out for the best token"
        )
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must lie in (0, 1], not {args.top_p}")
    if args.method == "cd":
        bind_rule(args.form, _own_parameters(args), {"alpha": args.alpha})
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"--dtype must be auto or a torch dtype such as bfloat16, not {args.dtype!r}")


def _own_parameters(args: argparse.Namespace) -> dict[str, float]:
    """The given parameters of one form or the other."""
    own = {"beta": args.beta, "amateur_temperature": args.amateur_temperature}
    return {name: value for name, value in own.items() if value is not None}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that determines the texts, but not where they go or how many are made at a time."""
    apart = {"prompts", "file", "output", "resume", "device", "run", "command", "debug"}
    return {name: value for name, value in vars(args).items() if name not in apart and value is not None}


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    if args.prompts:
        return list(args.prompts)
    if args.file is None and sys.stdin.isatty():
        raise ValueError("no prompts: give them as arguments, with --file, or on standard input")
    lines = (args.file.read_text() if args.file else sys.stdin.read()).splitlines()
    if args.file and args.file.suffix == ".jsonl":
        prompts = [_prompt_of(json.loads(line), f"{args.file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {args.file or 'standard input'}: it holds nothing but blank lines")
    return prompts


def _prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    for key in ("messages", "prompt"):
        if key in row:
            prompt: Prompt = row[key]
            return prompt
    raise ValueError(f"{where}: a row needs a prompt or messages, and has only {', '.join(row) or 'nothing'}")


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


def _load_models(args: argparse.Namespace) -> Models:
    tokenizer = _from_pretrained(AutoTokenizer, args.model, padding_side="left")
    if args.adapters_off:
        from peft import AutoPeftModelForCausalLM

        expert = _from_pretrained(AutoPeftModelForCausalLM, args.model, **_placement(args)).eval()
        return Models(expert, AdaptersOff(expert), _with_pad_token(tokenizer))
    if args.amateur:
        _check_same_tokenizer(args.model, tokenizer, args.amateur, _from_pretrained(AutoTokenizer, args.amateur))
    expert = _load(args.model, args)
    amateur = _load(args.amateur, args) if args.amateur else None
    if expert.config.is_encoder_decoder:
        tokenizer.padding_side = "right"
    return Models(expert, amateur, _with_pad_token(tokenizer))


def _load(name: str, args: argparse.Namespace) -> Any:
    config = _from_pretrained(AutoConfig, name)
    placement = _placement(args)
    if placement["device_map"] == "cpu":
        _check_memory(name)
    return _from_pretrained(
        AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM, name, **placement
    )


def _from_pretrained(auto: Any, name: str, **how: Any) -> Any:
    try:
        return auto.from_pretrained(_locate(name), **how)
    except OSError as error:  # it does not always say which model
        raise OSError(f"cannot load {name}: {error}") from error


def _locate(name: str) -> str:
    return str(testbed.path(name.removeprefix("testbed:"))) if name.startswith("testbed:") else name


def _placement(args: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": args.dtype, "device_map": args.device or ("auto" if torch.accelerator.is_available() else "cpu")}


def _check_memory(name: str) -> None:
    """Refuse local weights that cannot fit before the machine starts to swap."""
    needed = sum(file.stat().st_size for file in Path(_locate(name)).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{name} holds {needed / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of memory are free: "
            "use a smaller model, --adapters-off, or --device auto to spread it"
        )


def _check_same_tokenizer(model: str, tokenizer: Any, other_model: str, other: Any) -> None:
    one, two = tokenizer.get_vocab(), other.get_vocab()
    if one != two:
        differing = sorted({token for token, _ in one.items() ^ two.items()})
        raise ValueError(
            f"{model} and {other_model} have different tokenizers ({len(differing)} tokens differ, such as "
            f"{differing[0]!r}), and contrastive decoding compares their probabilities token by token"
        )


def _with_pad_token(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _render(prompt: Prompt, tokenizer: Any, *, raw: bool) -> str:
    """The text that the model reads: the conversation in the model's own form, if it has one."""
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError("messages need a chat template, and this tokenizer has none, or --raw turned it off")
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _decode(
    texts: Sequence[str], models: Models, args: argparse.Namespace, *, seed: int, streaming: bool
) -> Iterator[dict[str, Any]]:
    """The results of one batch: the text, and the text without contrast if asked for."""
    rendered = models.tokenizer.chat_template is not None and not args.raw
    inputs = models.tokenizer(
        list(texts), return_tensors="pt", padding=True, add_special_tokens=not rendered, return_token_type_ids=False
    ).to(models.expert.device)
    how = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "do_sample": args.sample}
    if args.sample:
        how |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    print_to = TextStreamer(models.tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None
    processors = [_processor(models, inputs, args)] if args.method == "cd" else []
    runs = {"text": (processors, how)}
    if args.compare:
        plain = how if args.compare == "plain" else {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        runs[args.compare] = ([], plain)
    columns: dict[str, list[str]] = {}
    for name, (processors, how) in runs.items():
        if streaming and args.compare:
            print(f"--- {args.method if name == 'text' else name}")
        set_seed(seed)
        output = models.expert.generate(**inputs, logits_processor=processors, streamer=print_to, **how)
        skip = 0 if models.expert.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        columns[name] = models.tokenizer.batch_decode(output[:, skip:], skip_special_tokens=True)
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _processor(
    models: Models, inputs: Mapping[str, Any], args: argparse.Namespace
) -> ContrastiveDecodingLogitsProcessor:
    encoded = models.expert.config.is_encoder_decoder
    return ContrastiveDecodingLogitsProcessor(
        models.amateur,
        alpha=args.alpha,
        form=args.form,
        amateur_window=args.amateur_window,
        min_tokens_to_keep=2 if args.beams > 1 else 1,
        attention_mask=None if encoded else inputs["attention_mask"],
        encoder_inputs=inputs if encoded else None,
        **_own_parameters(args),
    )


def _write(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _show(index: int, prompt: Prompt, result: Mapping[str, str]) -> None:
    print(f"=== {index}: {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
    for name, text in result.items():
        print(text if len(result) == 1 else f"--- {name}\n{text}")
