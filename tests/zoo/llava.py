"""A random LLaVA with a real processor, saved as a folder: a model for tests of the command line with images.

The trained ones answer in a word. This one writes at length, and any pixel matters to it; as in zoo.py, wide
initialisation makes the difference.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from contralto.testbed import scenes, vision


def build() -> tuple[Any, Any]:
    """A float32 model, and its processor."""
    processor = vision.build_processor()
    torch.manual_seed(0)
    model = vision.build_model(processor.tokenizer).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    with torch.no_grad():  # tied to the head: what is far below the largest logit is never written
        model.get_input_embeddings().weight[: len(vision.SPECIAL_TOKENS)] *= 0.01
    return model, processor


def save(folder: Path, *, pictures: int = 3) -> None:
    """The model, its processor, and drawn scenes as 0.png, 1.png, ..."""
    model, processor = build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for i, scene in enumerate(islice(scenes.scenes(0, "test"), pictures)):
        scene.image().save(folder / f"{i}.png")
