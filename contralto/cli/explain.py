"""`contralto explain`: what a contrast did to one text, as a page that needs neither a network nor scripts."""

import argparse
import base64
import io
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from contralto import __version__
from contralto.cli import generate
from contralto.cli.options import check_device, check_dtype
from contralto.cli.prompts_file import Prompt
from contralto.common.outputs import check_output_file
from contralto.decoding import methods
from contralto.decoding.images import ritual_transform
from contralto.decoding.trace import Candidate, Step, trace

METHODS = [name for name, method in methods.METHODS.items() if len(method.branches) == 2 and name != "scd"]
"""Those of two branches."""
STRONGEST = 3.0
"""The log-ratio, in nats, of the fullest colour."""
CONTEXT = 8
"""How many tokens before another one tell how it is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt")
    parser.add_argument("--html", type=Path, default=Path("explain.html"), help="the page (default explain.html)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most so many tokens (default 128)")
    parser.add_argument("--top", type=int, default=5, help="candidates shown for each branch (default 5)")
    generate.add_model_arguments(parser)
    methods.add_arguments(parser, METHODS)


class Token(NamedTuple):
    """A step as the page shows it."""

    step: Step
    before: str
    """The end of the text before it."""
    text: str
    """What the token adds to the text."""
    candidates: tuple["Shown", ...]
    """Of the main branch, the other one, the method, and those that are ruled out."""

    @property
    def word(self) -> str:
        """Its text without the white space before it; of nothing but white space, a sign for it."""
        return self.text.lstrip() or visible(self.text) + "\n" * self.text.count("\n")

    @property
    def space(self) -> str:
        """The white space before its text."""
        return self.text.removesuffix(self.text.lstrip()) if self.text.strip() else ""

    @property
    def strength(self) -> float:
        """The log-ratio as a colour, from -1 to 1."""
        return max(-1.0, min(1.0, self.step.ratio / STRONGEST))

    @property
    def probabilities(self) -> list[float]:
        """Of the token: for the main branch, for the other one, and after the contrast."""
        return [math.exp(each) for each in self.step.log_p]

    @property
    def greedy(self) -> str:
        """What the main branch alone would have written here."""
        return self.candidates[0][0].text


class Bar(NamedTuple):
    """A candidate as the page shows it."""

    text: str
    probability: float
    is_chosen: bool


Shown = list[Bar]


def run(args: argparse.Namespace) -> None:
    """Decode greedily with and without the contrast, look back at every token, write the page."""
    _check(args)
    contrast = args.contrast_prompt
    prompt = Prompt(args.prompt, tuple(args.image or ()), contrast, {} if contrast else None)
    generate.check_prompts([prompt], args)
    models = generate.load_models(args, sees=bool(prompt.images))
    batch = generate.setting([prompt], models, args, [args.seed])
    generate.check_rooms(batch, args)
    method = methods.processor(args, batch)
    how = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    texts = [models.main.generate(**batch.inputs, **how, **by) for by in ({"custom_generate": method.loop()}, {})]
    # an encoder-decoder's rows begin with a start token
    contrastive, greedy = (text[0, generate.prompt_length(batch) or 1 :] for text in texts)
    steps = trace(method, models.main, batch.inputs, contrastive, top=args.top)
    before = batch.inputs["input_ids"][0, -CONTEXT:].tolist()
    tokens = spell(steps, before, models.tokenizer)
    page = render(
        args, tokens, models.tokenizer.decode(greedy, skip_special_tokens=True), _pictures(prompt, batch, args)
    )
    args.html.write_text(page, encoding="utf-8")
    changed = sum(step.changed for step in steps)
    print(models.tokenizer.decode(contrastive, skip_special_tokens=True))
    print(f"\n{args.html} shows why; tokens that greedy search would not have chosen: {changed} of {len(steps)}")


def _check(args: argparse.Namespace) -> None:
    """What the parser cannot check by itself, before anything is loaded."""
    methods.check(args)
    args.executor = "loop"
    if args.method == "none":
        raise ValueError(f"there is no contrast to explain: give --amateur MODEL, or --method {', '.join(METHODS)}")
    for name in ("max_new_tokens", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"{methods.flag(name)} must be at least 1, not {getattr(args, name)}")
    check_dtype(args.dtype)
    check_device(args.device)
    check_output_file(args.html, "--html")


# ------------------------------------------------------------------------------------------------------------- the page


def spell(steps: Sequence[Step], before: Sequence[int], tokenizer: Any) -> list[Token]:
    """The steps as the page shows them, after the prompt's last tokens."""
    context, tokens = list(before), []
    for step in steps:
        written = [_bars(step, each, context, tokenizer) for each in (step.main, step.contrast, step.combined)]
        removed = _bars(step, step.ruled_out.likeliest, context, tokenizer)
        recent = tokenizer.decode(context[-CONTEXT:], skip_special_tokens=True)
        tokens.append(Token(step, recent, _spell(step.token, context, tokenizer), (*written, removed)))
        context.append(step.token)
    return tokens


def _bars(step: Step, candidates: Sequence[Candidate], context: Sequence[int], tokenizer: Any) -> Shown:
    return [Bar(_spell(c.token, context, tokenizer), c.probability, c.token == step.token) for c in candidates]


def _spell(token: int, context: Sequence[int], tokenizer: Any) -> str:
    """What a token adds to the text before it, which may be more or less than the token by itself."""
    recent = list(context[-CONTEXT:])
    head, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (recent, [*recent, token]))
    head = head.rstrip("\ufffd")  # a letter begun, which the token may end
    added: str = whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode([token])
    return added


def visible(text: str) -> str:
    """A token with its white space made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def render(args: argparse.Namespace, tokens: Sequence[Token], greedy: str, pictures: Sequence[tuple[str, str]]) -> str:
    """The page as text."""
    method = methods.METHODS[args.method]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("contralto.cli").joinpath("explain.html.j2").read_text(encoding="utf-8")
    )
    given = {"form": args.form} | methods.parameters(args)
    return template.render(
        version=__version__,
        args=args,
        does=method.does,
        main=method.branches[0],
        other=method.branches[1],
        parameters={name: value for name, value in given.items() if value is not None},
        tokens=tokens,
        opened=next((i for i, token in enumerate(tokens) if token.step.changed), 0),
        greedy=greedy,
        pictures=pictures,
        strongest=STRONGEST,
        visible=visible,
        share=lambda p: f"{p:.2f}" if p >= 0.005 or p == 0 else "<.01",
    )


def _pictures(prompt: Prompt, batch: methods.Setting, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The images, and as far as they are pictures what the other branch sees of them: titles and data addresses."""
    if not prompt.images:
        return []
    images = generate.open_images(prompt).images
    shown = [("image", image) for image in images]
    if args.method == "ritual":
        views = [ritual_transform(image, seed=args.seed) for image in images]
        shown += [(f"transformed: {view.transform}", view.image) for view in views]
    if args.method == "vcd" and batch.views[0]["pixel_values"].ndim == 4:
        shown += [("noised, as the model sees it", _picture(pixels)) for pixels in batch.views[0]["pixel_values"]]
    return [(title, _address(image)) for title, image in shown]


def _picture(pixels: Any) -> Any:
    """Preprocessed pixels `(3, H, W)` as an image, from the darkest to the brightest."""
    from PIL import Image

    pixels = pixels.float().cpu()
    low, high = pixels.min(), pixels.max()
    return Image.fromarray((255 * (pixels - low) / (high - low)).byte().permute(1, 2, 0).contiguous().numpy())


def _address(image: Any) -> str:
    """A copy of an image as a data address: large ones smaller, tiny ones with visible pixels."""
    from PIL.Image import Resampling

    small, file = image.copy(), io.BytesIO()
    small.thumbnail((384, 384))
    zoom = max(1, 192 // max(small.size))
    small.resize((zoom * small.width, zoom * small.height), Resampling.NEAREST).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
