"""`contralto explain`: show the effect of a contrast on one completion, as a page without scripts or network access."""

import argparse
from pathlib import Path
from typing import Any

from contralto.cli.arguments import add_prompt_arguments, check_placement, check_positive
from contralto.cli.flags import errors_with_flags
from contralto.cli.methods import add_method_arguments, bits_from, config_from, models_from
from contralto.cli.outputs import check_output_file
from contralto.cli.token_bar import TokenBar
from contralto.common.files import replace_text
from contralto.decoding import inputs
from contralto.decoding.inputs import Prompt
from contralto.decoding.methods import METHODS, DecodingConfig, logits_processor


def offered() -> list[str]:
    """Return the methods that the page can show: those with two branches and a processor."""
    return [name for name, method in METHODS.items() if len(method.branches) == 2 and method.processor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt")
    parser.add_argument("--html", type=Path, default=Path("explain.html"), help="the page (default explain.html)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="largest number of new tokens (default 128)")
    parser.add_argument("--top", type=int, default=5, help="candidates shown for each branch (default 5)")
    add_prompt_arguments(parser, offered(), seeds="the noise and transformations of images; tokens are chosen greedily")
    add_method_arguments(parser, offered())


def run(args: argparse.Namespace) -> None:
    """Decode greedily with and without the contrast, compare the branches at every token, write the page.

    Args:
        args: the parsed flags.
    """
    with errors_with_flags():
        config = _config(args)
        contrast = args.contrast_prompt
        prompt = Prompt(args.prompt, tuple(args.image or ()), contrast, {} if contrast else None)
        inputs.check_prompts([prompt], config)
        _explain(prompt, config, args)


def _config(args: argparse.Namespace) -> DecodingConfig:
    """Return the decoding configuration, after checks of what the parser cannot check by itself."""
    config = config_from(args, executor=None)
    if not config.contrasts:
        raise ValueError(f"there is no contrast to explain: set --amateur, or --method {', '.join(offered())}")
    check_positive(args, "max_new_tokens", "top")
    check_placement(args)
    bits_from(args, config.models)
    check_output_file(args.html, "--html")
    return config


def _explain(prompt: Prompt, config: DecodingConfig, args: argparse.Namespace) -> None:
    from contralto.cli import explain_page
    from contralto.decoding.trace import trace

    models = models_from(args, config, with_images=bool(prompt.images))
    batch = inputs.batch_of([prompt], models, config, seeds=[args.seed], raw=args.raw)
    inputs.check_lengths(batch, config, args.max_new_tokens)
    method = logits_processor(config, batch)
    search: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    with TokenBar(args.max_new_tokens, calls=2) as bar:
        ways: list[dict[str, Any]] = [{"custom_generate": method.loop(streamer=bar)}, {"streamer": bar}]
        outputs = [models.main.generate(**batch.inputs, **search, **way) for way in ways]
    # an encoder-decoder's rows begin with a start token
    contrastive, greedy = (row[0, inputs.prompt_length(batch) or 1 :] for row in outputs)
    steps = trace(method, models.main, batch.inputs, contrastive, top=args.top)
    before = batch.inputs["input_ids"][0, -explain_page.CONTEXT :].tolist()
    page = explain_page.render(
        config,
        explain_page.spell(steps, before, models.tokenizer),
        model=args.model,
        prompt=args.prompt,
        greedy=models.tokenizer.decode(greedy, skip_special_tokens=True),
        pictures=explain_page.pictures(prompt, batch, config, seed=args.seed),
    )
    replace_text(args.html, page)
    changed = sum(step.changed for step in steps)
    print(models.tokenizer.decode(contrastive, skip_special_tokens=True))
    print(f"\n{args.html} shows why; tokens that greedy search would not have chosen: {changed} of {len(steps)}")
