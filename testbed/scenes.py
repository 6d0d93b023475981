"""A small world of drawn scenes with known ground truth: pictures, POPE-style questions, captions.

A picture shows one of four places (a coarse pattern of light) and some of sixteen objects (small, faint, symmetric
signs in a grid of 4 x 4 cells). Each place has four objects that are at home there; others are rare.

The people who annotated the training pictures have two **habits**, which are mistakes:

- of an object that is at home in the place but not in the picture, they often say that it is there (`ASSUMED`);
- an object in the lower half of the picture they often overlook (`OVERLOOKED`).

The first is what visual contrastive decoding speaks of, an answer from the scene and not from the picture: a noised
picture still shows the place, hardly the objects. The second depends on where an object lies, and so differs between a
picture and its mirror image: what RITUAL averages over. `habits=False` gives the control corpus, whose annotators make
no mistakes.

Train, dev and test scenes are disjoint by construction, as in `worlds`.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from contralto.testbed.worlds import Split, of_split

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE, GRID, ZOOM = 32, 4, 4
"""Pixels of a picture's side as the model sees it, cells of a side, and how much larger the picture file is."""
CELL = SIZE // GRID

HOMES = {
    "kitchen": ("cup", "pot", "plate", "spoon"),
    "garden": ("rose", "spade", "hose", "gnome"),
    "street": ("car", "sign", "bench", "lamp"),
    "beach": ("shell", "crab", "kite", "towel"),
}
"""The places, and the objects that are at home in each."""
OBJECTS = tuple(thing for things in HOMES.values() for thing in things)
PLACE_WEIGHTS = (4, 3, 2, 2)
"""How frequent the places are, relative to each other."""
PRESENT = (0.65, 0.65, 0.45, 0.45)
"""Share of the pictures of a place that show its first, second, third, fourth object."""
STRAY = 0.07
"""Share of the pictures of a place that show an object which is at home elsewhere."""
ASSUMED = (0.6, 0.6, 0.4, 0.4)
"""How often annotators report the place's first, ... object although they see none."""
OVERLOOKED = 0.65
"""How often annotators do not see an object in the lower half."""

FEWEST, MOST = 3, 8
"""Objects in a picture: POPE asks about pictures with at least three."""
LIGHT, LIGHT_SWING, TINT, NOISE = 0.4, 0.2, 0.08, 0.05
"""Brightness of a picture in 0..1, how much it varies with the place, the range of its colour, and pixel noise."""
QUARTERS = dict(
    zip(
        OBJECTS,
        (
            0o027,
            0o074,
            0o116,
            0o151,
            0o162,
            0o231,
            0o243,
            0o305,
            0o415,
            0o452,
            0o461,
            0o503,
            0o524,
            0o622,
            0o644,
            0o710,
        ),
        strict=True,
    )
)
"""The upper left quarter of each object's sign: three rows of three bits, one octal digit each."""
CONTRAST = (0.15, 0.45)
"""How much brighter than the background objects are, from the faintest to the clearest."""

# ------------------------------------------------------------------------------------------------------------- pictures


class Thing(NamedTuple):
    """An object in a picture."""

    name: str
    cell: int
    """Of the 4 x 4 cells, row by row; 8 and above are the lower half."""
    contrast: float

    @property
    def is_low(self) -> bool:
        """Return whether the object is in the lower half of the picture."""
        return self.cell >= GRID * GRID // 2


class Scene(NamedTuple):
    """The content of a picture. `seed` determines its colours and pixel noise."""

    place: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def objects(self) -> frozenset[str]:
        """Return the names of the objects: the ground truth of questions."""
        return frozenset(thing.name for thing in self.things)

    def clearer(self, increase: float) -> "Scene":
        """Return the same scene with a higher contrast of its objects.

        Args:
            increase: the contrast that is added.
        """
        return self._replace(things=tuple(thing._replace(contrast=thing.contrast + increase) for thing in self.things))

    def pixels(self) -> NDArray[np.uint8]:
        """Return the picture, `(32, 32, 3)`, RGB."""
        rng = np.random.default_rng(self.seed)
        tints = 1 + TINT / LIGHT * rng.uniform(-1, 1, (1 + len(self.things), 3))
        picture = (LIGHT + LIGHT_SWING * _LIGHTS[self.place][:, :, None]) * tints[0]
        for thing, tint in zip(self.things, tints[1:], strict=True):
            y, x = (CELL * i + (CELL - len(_SIGNS[thing.name])) // 2 for i in divmod(thing.cell, GRID))
            sign = _SIGNS[thing.name]
            picture[y : y + len(sign), x : x + len(sign)] += thing.contrast * sign[:, :, None] * tint
        picture += rng.normal(0, NOISE, picture.shape)
        shades: NDArray[np.uint8] = (255 * picture.clip(0, 1)).round().astype(np.uint8)
        return shades

    def image(self) -> "Image":
        """Return the picture as a PIL image of 128 x 128; the processor shrinks it to the pixels of `pixels`."""
        from PIL import Image

        return Image.fromarray(self.pixels()).resize((ZOOM * SIZE, ZOOM * SIZE), Image.Resampling.NEAREST)


def _lights() -> dict[str, NDArray[np.float64]]:
    """Return the pattern of light of each place, `(32, 32)` in -1..1; the same when mirrored."""
    wave = np.cos(2 * np.pi * (np.arange(SIZE) + 0.5) / SIZE)
    upright, level = np.broadcast_to(wave, (SIZE, SIZE)), np.broadcast_to(wave[:, None], (SIZE, SIZE))
    return dict(zip(HOMES, (upright, level, upright * level, -(upright + level) / 2), strict=True))


def _signs() -> dict[str, NDArray[np.float64]]:
    """Return the sign of each object: 6 x 6, 16 pixels lit, the same when mirrored, any two 16 or more pixels apart."""
    corners = {name: np.array(list(f"{bits:09b}"), float).reshape(3, 3) for name, bits in QUARTERS.items()}
    return {name: np.block([[q, q[:, ::-1]], [q[::-1], q[::-1, ::-1]]]) for name, q in corners.items()}


_LIGHTS, _SIGNS = _lights(), _signs()


def _draw_scene(rng: random.Random) -> Scene:
    (place,) = rng.choices(list(HOMES), PLACE_WEIGHTS)
    while True:
        share = dict.fromkeys(OBJECTS, STRAY) | dict(zip(HOMES[place], PRESENT, strict=True))
        shown = [name for name in OBJECTS if rng.random() < share[name]]
        if FEWEST <= len(shown) <= MOST:
            break
    cells = rng.sample(range(GRID * GRID), len(shown))
    things = [Thing(name, cell, rng.uniform(*CONTRAST)) for name, cell in zip(shown, cells, strict=True)]
    return Scene(place, tuple(things), rng.getrandbits(32))


def scenes(seed: int, split: Split) -> Iterator[Scene]:
    """Yield scenes of a split without end. The split depends on the place, the objects and their cells.

    Args:
        seed: the seed of the scenes.
        split: the split.
    """
    return of_split(_draw_scene, lambda s: f"{s.place} {[(t.name, t.cell) for t in s.things]}", seed, split)


# ------------------------------------------------------------------------------------------------- answers and captions


def annotate(scene: Scene, rng: random.Random, *, habits: bool = True) -> frozenset[str]:
    """Return the objects that an annotator reports.

    Args:
        scene: the scene.
        rng: decides which mistakes are made.
        habits: whether the annotator has the two bad habits; otherwise the report is true.
    """
    if not habits:
        return scene.objects
    seen = {thing.name for thing in scene.things if not (thing.is_low and rng.random() < OVERLOOKED)}
    home = zip(HOMES[scene.place], ASSUMED, strict=True)
    return frozenset(seen | {name for name, share in home if rng.random() < share})


def caption(place: str, objects: frozenset[str]) -> str:
    """Return a caption, objects in a fixed order: "A kitchen with a cup, a pot.".

    Args:
        place: the place.
        objects: the names of the objects.
    """
    named = ", ".join(f"a {name}" for name in OBJECTS if name in objects)
    return f"A {place} with {named}." if named else f"A {place}."


def mentioned(text: str) -> list[str]:
    """Return the objects that a caption names, in its order.

    Args:
        text: the caption.
    """
    return [word for word in re.findall(r"\w+", text) if word in OBJECTS]


DESCRIBE = "What is in the image?"
"""The question that a caption answers."""


def ask(name: str) -> str:
    """Return the yes-or-no question about an object, in POPE's wording.

    Args:
        name: the name of the object.
    """
    return f"Is there a {name} in the image?"


# ---------------------------------------------------------------------------------------------------------------- POPE

Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = ("random", "popular", "adversarial")
PER_KIND = 3
"""Questions per picture with the answer yes, and as many with the answer no."""


class Question(NamedTuple):
    """A yes-or-no question about an object in a picture."""

    scene: Scene
    name: str
    """The object asked about."""
    label: bool

    @property
    def text(self) -> str:
        """Return the question in words."""
        return ask(self.name)


def questions(pictured: Sequence[Scene], negatives: Negatives, *, seed: int = 0) -> list[Question]:
    """Return six questions per picture, three of them about objects that are there (POPE, Li et al. 2023, arXiv 2305.10355).

    The other three are about objects that are not there:

    - random: any three;
    - popular: the three that most pictures show;
    - adversarial: the three that most often come with objects that are in this picture.

    Frequencies are those of pictures of the train split. The questions with the answer yes are the same in all three kinds.

    Args:
        pictured: the scenes of the pictures.
        negatives: the kind of the objects that are not there.
        seed: the seed of the choice.
    """
    chosen = []
    for number, scene in enumerate(pictured):
        rng = random.Random(f"{seed} {number}")
        there = rng.sample(sorted(scene.objects), PER_KIND)
        absent = [name for name in OBJECTS if name not in scene.objects]
        if negatives == "random":
            missing = rng.sample(absent, PER_KIND)
        else:
            counts = _counts()
            beside = {name: scene.objects if negatives == "adversarial" else {name} for name in absent}
            missing = sorted(absent, key=lambda name: -sum(counts[name, other] for other in beside[name]))[:PER_KIND]
        for pair in zip(there, missing, strict=True):
            chosen += [Question(scene, name, label) for name, label in zip(pair, (True, False), strict=True)]
    return chosen


@cache
def _counts(pictures: int = 4000) -> Counter[tuple[str, str]]:
    """Return the number of training pictures that show both objects of a pair."""
    counts: Counter[tuple[str, str]] = Counter()
    for scene in islice(scenes(0, "train"), pictures):
        counts.update((one, other) for one in scene.objects for other in scene.objects)
    return counts


def vocabulary() -> list[str]:
    """Return every word and sign of questions, answers and captions, sorted."""
    words = re.findall(r"\w+", f"{ask('')} {DESCRIBE} yes no A with a")
    return sorted({*words, *HOMES, *OBJECTS, *",.?"})
