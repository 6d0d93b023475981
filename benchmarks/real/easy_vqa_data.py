"""Read the public set easy-VQA (package `easy-vqa`, MIT), and write its presence questions in POPE's format.

Every picture of the set shows one shape of three in one colour of eight. Its questions about presence ask for a shape or a colour,
half of them with a negation: "is there a red shape?", "is there not a circle in the image?".
"""

import json
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contralto.common.files import read_text, replace_text

__all__ = ["PACKAGE", "SHAPES", "Asked", "balanced", "data_folder", "questions", "shape_sizes", "write_pope"]

PACKAGE = "easy_vqa"
SHAPES = ("circle", "rectangle", "triangle")


class Asked(NamedTuple):
    """A question about a picture."""

    text: str
    answer: str
    image: int
    """The number of the picture, the name of its file."""

    @property
    def is_presence(self) -> bool:
        """Return True if the answer is yes or no."""
        return self.answer in ("yes", "no")

    @property
    def is_negated(self) -> bool:
        """Return True for "is there not a ...", "is no ... present"."""
        return bool({"not", "no"} & set(self.text.split()))

    @property
    def is_about_shape(self) -> bool:
        """Return True if a presence question names a shape, not a colour."""
        return any(shape in self.text for shape in SHAPES)


def data_folder(data: Path | None) -> Path | None:
    """Return the folder of the set with `train` and `test` below it; None if it is nowhere.

    Args:
        data: The data folder of the command, in which `easy_vqa/` is preferred to the installed package.
    """
    if data is not None and (data / PACKAGE / "test").is_dir():
        return data / PACKAGE
    try:
        installed = Path(str(files(PACKAGE))) / "data"
    except ModuleNotFoundError:
        return None
    return installed if installed.is_dir() else None


def questions(folder: Path, half: str) -> list[Asked]:
    """Return the questions of a half, in the order of the file.

    Args:
        folder: The folder of the set.
        half: train or test.
    """
    return [Asked(*row) for row in json.loads(read_text(folder / half / "questions.json"))]


def balanced(asked: Sequence[Asked], per_cell: int, *, seed: int) -> list[Asked]:
    """Draw as many questions with the answer yes as with no, of the affirmative and of the negated ones alike.

    Args:
        asked: Questions of a half; only those about presence are drawn, none twice.
        per_cell: The number of questions for each of the four pairs of wording and answer; fewer if one pair has fewer.
        seed: The seed of the draw.

    Returns:
        The questions, sorted by picture.
    """
    cells: dict[tuple[bool, str], list[Asked]] = {}
    for question in dict.fromkeys(asked):
        if question.is_presence:
            cells.setdefault((question.is_negated, question.answer), []).append(question)
    rng, count = random.Random(seed), min(per_cell, *map(len, cells.values()))
    drawn = [question for cell in sorted(cells) for question in rng.sample(cells[cell], count)]
    return sorted(drawn, key=lambda question: (question.image, question.text))


def write_pope(path: Path, asked: Sequence[Asked]) -> None:
    """Write questions as a file of POPE.

    Args:
        path: The file, whose name POPE's task looks for.
        asked: The questions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": number, "image": f"{question.image}.png", "text": question.text, "label": question.answer}
        for number, question in enumerate(asked, 1)
    ]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def shape_sizes(folder: Path, asked: Sequence[Asked]) -> dict[int, int]:
    """Return the pixels of the shape of each picture: those whose colour is far from that of the corners.

    Args:
        folder: The pictures.
        asked: The questions about them.
    """
    from PIL import Image

    sizes = {}
    for number in dict.fromkeys(question.image for question in asked):
        with Image.open(folder / f"{number}.png") as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=np.int64)
        corners = np.stack([pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]])
        background = np.median(corners, axis=0)  # a shape covers one corner at most
        sizes[number] = int((np.abs(pixels - background).sum(-1) > 60).sum())
    return sizes
