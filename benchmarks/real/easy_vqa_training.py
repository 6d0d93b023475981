"""Train the testbed's LLaVA on the training half of easy-VQA."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from contralto.testbed.optimization import fit, save_half
from contralto.testbed.vision import (
    IGNORED,
    IMAGE_TOKENS,
    VisionBatch,
    answer_loss,
    build_model,
    build_processor,
    stack_conversations,
)
from real.easy_vqa_data import Asked, questions

__all__ = ["Recipe", "Trainee", "without_image"]

PER_IMAGE = 5
"""Questions per picture of a step, drawn anew whenever the picture is shown."""
DEV_SHARE = 10
"""One in so many pictures of the training half, the last ones, is kept for measuring."""


class Recipe(NamedTuple):
    """How a model is trained."""

    steps: int
    batch: int
    adamw_lr: float
    blind_every: int
    """One step in so many shows questions without their pictures, about the share of conversations without an image (40 of 665
    thousand) in LLaVA-1.5's mixture. So the model has learned what to say without one."""


class Trainee:
    """A model in training on the training half.

    Args:
        folder: The folder of the set.
        seed: The seed of weights, order and choice of questions.
        recipe: The recipe.
    """

    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        self.recipe, self.folder, self.rng = recipe, folder, random.Random(f"easy-vqa {seed}")
        self.by_image: dict[int, list[Asked]] = {}
        for question in questions(folder, "train"):
            self.by_image.setdefault(question.image, []).append(question)
        numbers = sorted(self.by_image)
        held = max(1, len(numbers) // DEV_SHARE)
        self.shown, self.held_out = numbers[:-held], numbers[-held:]
        self.processor = build_processor(_words(each for asked in self.by_image.values() for each in asked))
        torch.manual_seed(seed)
        self.model: Any = build_model(self.processor.tokenizer)
        self.pixels = self._pixels(numbers)
        self._parts: dict[tuple[str, str], list[int]] = {}

    def train(self, out: Path) -> None:
        """Train the model, and save it with its processor.

        Args:
            out: The folder of the model.
        """
        with tqdm(total=self.recipe.steps, desc=f"training {out.name}", unit="step") as bar:

            def after_step(step: int) -> None:
                bar.update(step - bar.n)

            fit(
                self.model.train(),
                self._batches(),
                lambda batch: answer_loss(self.model, batch),
                steps=self.recipe.steps,
                adamw_lr=self.recipe.adamw_lr,
                after_step=after_step,
            )
        save_half(self.model.eval(), self.processor, out)

    @torch.no_grad()
    def held_out_accuracy(self) -> dict[str, float]:
        """Return the share of right first words on the pictures that were kept: of presence questions, and of the others."""
        hits: dict[str, list[bool]] = {"presence": [], "which shape or colour": []}
        for number in self.held_out:
            asked = self.by_image[number]
            batch = stack_conversations([self._row(asked, image=True)], self.pixels[number][None])
            learned = batch.targets[0] != IGNORED
            logits = self.model(
                pixel_values=batch.pixel_values,
                input_ids=batch.ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
            ).logits[0, learned]
            right = (logits.argmax(-1) == batch.targets[0, learned])[::2].tolist()  # an answer is a word and the end
            for question, hit in zip(asked, right, strict=True):
                hits["presence" if question.is_presence else "which shape or colour"].append(hit)
        return {name: sum(each) / len(each) for name, each in hits.items() if each}

    def _pixels(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        from PIL import Image

        found = {}
        for number in numbers:
            with Image.open(self.folder / "train" / "images" / f"{number}.png") as opened:
                image = opened.convert("RGB")
            found[number] = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return found

    def _batches(self) -> Iterator[VisionBatch]:
        queue: list[int] = []
        for step in range(self.recipe.steps):
            while len(queue) < self.recipe.batch:
                queue += self.rng.sample(self.shown, len(self.shown))
            numbers, queue = queue[: self.recipe.batch], queue[self.recipe.batch :]
            has_images = (step + 1) % self.recipe.blind_every != 0
            rows = [self._row(self._drawn(number), image=has_images) for number in numbers]
            pixels = torch.stack([self.pixels[number] for number in numbers]) if has_images else None
            yield stack_conversations(rows, pixels)

    def _drawn(self, number: int) -> list[Asked]:
        """Draw the questions of a picture; one that has too few is asked some of them twice."""
        asked = self.by_image[number]
        return self.rng.sample(asked, PER_IMAGE) if len(asked) >= PER_IMAGE else self.rng.choices(asked, k=PER_IMAGE)

    def _row(self, asked: Sequence[Asked], *, image: bool) -> list[list[int]]:
        """Return the tokens of the prefix and of a conversation for each question."""
        prefix = self.processor.tokenizer("<|user|>" + "<image>" * IMAGE_TOKENS * image)["input_ids"]
        return [prefix, *(self._conversation(question) for question in asked)]

    def _conversation(self, question: Asked) -> list[int]:
        key = (question.text, question.answer)
        if key not in self._parts:
            text = f"{question.text}<|assistant|>{question.answer.capitalize()}<eos>"
            self._parts[key] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._parts[key]


@torch.no_grad()
def without_image(model: Any, processor: Any, texts: Sequence[str]) -> Mapping[str, tuple[float, float]]:
    """Return log p(Yes) and log p(No) after each question without a picture.

    Args:
        model: The model.
        processor: Its processor.
        texts: The questions.
    """
    tokenizer = processor.tokenizer
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
    found = {}
    for text in dict.fromkeys(texts):
        ids = tokenizer(f"<|user|>{text}<|assistant|>", return_tensors="pt")["input_ids"]
        chances = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        found[text] = (float(chances[words[0]]), float(chances[words[1]]))
    return found


def _words(asked: Iterator[Asked]) -> list[str]:
    """Return every word and sign of questions and answers, sorted."""
    return sorted({word for each in asked for word in re.findall(r"\w+|[^\w\s]", _written(each))})


def _written(question: Asked) -> str:
    return f"{question.text} {question.answer.capitalize()}"
