"""The page of `contralto explain`: tokens, candidates and images as HTML."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from contralto import __version__
from contralto.common.html import render_page
from contralto.decoding.images import ritual_transform
from contralto.decoding.inputs import DecodingBatch, Prompt, open_images
from contralto.decoding.methods import DecodingConfig
from contralto.decoding.trace import Candidate, Step

STRONGEST = 3.0
"""The log-ratio, in nats, of the fullest colour."""
CONTEXT = 8
"""Tokens of the text before a token, which decide how it is spelled."""


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
        """Return its text without leading white space; text of white space alone is made visible."""
        return self.text.lstrip() or visible(self.text) + "\n" * self.text.count("\n")

    @property
    def space(self) -> str:
        """Return the leading white space of its text."""
        return self.text.removesuffix(self.text.lstrip()) if self.text.strip() else ""

    @property
    def strength(self) -> float:
        """Return the log-ratio as a colour, from -1 to 1."""
        return max(-1.0, min(1.0, self.step.ratio / STRONGEST))

    @property
    def probabilities(self) -> list[float]:
        """Return the probabilities of the token: in the main branch, in the other one, and after the contrast."""
        return [math.exp(each) for each in self.step.log_p]

    @property
    def greedy(self) -> str:
        """Return the likeliest token of the main branch."""
        return self.candidates[0][0].text


class Bar(NamedTuple):
    """A candidate as the page shows it."""

    text: str
    probability: float
    is_chosen: bool


Shown = list[Bar]


def spell(steps: Sequence[Step], before: Sequence[int], tokenizer: Any) -> list[Token]:
    """Return the steps as the page shows them.

    Args:
        steps: of the trace.
        before: the last tokens of the prompt.
        tokenizer: of the model.
    """
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
    """Return the text that a token appends, which may differ from the token decoded alone."""
    recent = list(context[-CONTEXT:])
    head, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (recent, [*recent, token]))
    head = head.rstrip("\ufffd")  # a letter begun, which the token may end
    added: str = whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode([token])
    return added


def visible(text: str) -> str:
    """Return the text of a token with its white space made visible.

    Args:
        text: the text of a token.
    """
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def render(
    config: DecodingConfig,
    tokens: Sequence[Token],
    *,
    model: str,
    prompt: str,
    greedy: str,
    pictures: Sequence[tuple[str, str]],
) -> str:
    """Return the page as text.

    Args:
        config: the method with its parameters.
        tokens: the steps.
        model: the name of the model.
        prompt: the text of the prompt.
        greedy: the text of greedy search.
        pictures: titles and data addresses of images.
    """
    method = config.declaration
    options = {"form": config.form, **config.parameters}
    return render_page(
        "contralto.cli",
        "explain.html.j2",
        version=__version__,
        config=config,
        model=model,
        prompt=prompt,
        does=method.description,
        main=method.branches[0],
        other=method.branches[1],
        parameters={name: value for name, value in options.items() if value is not None},
        tokens=tokens,
        opened=next((i for i, token in enumerate(tokens) if token.step.changed), 0),
        greedy=greedy,
        pictures=pictures,
        strongest=STRONGEST,
        visible=visible,
        share=lambda p: f"{p:.2f}" if p >= 0.005 or p == 0 else "<.01",
    )


def pictures(prompt: Prompt, batch: DecodingBatch, config: DecodingConfig, *, seed: int) -> list[tuple[str, str]]:
    """Return titles and data addresses of the images, and of the other branch's images if it has any.

    Args:
        prompt: the prompt.
        batch: what the branches read.
        config: the method.
        seed: of transformations.
    """
    if not prompt.images:
        return []
    images = open_images(prompt).images
    shown = [("image", image) for image in images]
    if "transformed" in config.active_views:
        views = [ritual_transform(image, seed=seed) for image in images]
        shown += [(f"transformed: {view.transform}", view.image) for view in views]
    if "noised" in config.active_views and batch.views[0]["pixel_values"].ndim == 4:
        shown += [("noised, as the model sees it", _picture(pixels)) for pixels in batch.views[0]["pixel_values"]]
    return [(title, _address(image)) for title, image in shown]


def _picture(pixels: Any) -> Any:
    """Return preprocessed pixels `(3, H, W)` as an image, from the darkest to the brightest."""
    from PIL import Image

    pixels = pixels.float().cpu()
    low, high = pixels.min(), pixels.max()
    return Image.fromarray((255 * (pixels - low) / (high - low)).byte().permute(1, 2, 0).contiguous().numpy())


def _address(image: Any) -> str:
    """Return a copy of an image as a data address: large images smaller, tiny ones with visible pixels."""
    from PIL.Image import Resampling

    small, file = image.copy(), io.BytesIO()
    small.thumbnail((384, 384))
    zoom = max(1, 192 // max(small.size))
    small.resize((zoom * small.width, zoom * small.height), Resampling.NEAREST).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
