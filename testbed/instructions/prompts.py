"""Prompts with an instruction each: a request about a topic, and a sentence that a program can check."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from contralto.common.suggestions import did_you_mean
from contralto.testbed.instructions.kinds import KINDS
from contralto.testbed.worlds import Split

__all__ = ["REQUESTS", "TOPICS", "prompts", "topics"]

REQUESTS = (
    "Tell me something about {topic}.",
    "Why do people like {topic}?",
    "What should a child know about {topic}?",
    "Describe {topic}.",
    "What are {topic} good for?",
    "How have {topic} changed over time?",
    "What is surprising about {topic}?",
    "Give some advice to a person who cares about {topic}.",
)
TOPICS = tuple(
    """
    bees bridges volcanoes libraries bicycles gardens castles trains lighthouses markets puppets kites glaciers museums
    orchestras beaches maps novels pencils mirrors clocks balloons oceans deserts forests islands mountains caves lakes
    tunnels elephants penguins dolphins owls horses spiders turtles whales wolves foxes rabbits butterflies frogs eagles
    sharks cats dogs parrots ants snails apples bananas carrots tomatoes potatoes onions lemons mushrooms olives grapes
    cherries pumpkins noodles pancakes sandwiches soups cookies cakes pickles spices guitars violins drums pianos flutes
    choirs operas ballets paintings statues films poems diaries letters newspapers stamps coins quilts carpets candles
    lamps chairs tables beds doors windows roofs stairs elevators chimneys fences boats ships submarines airplanes
    helicopters rockets satellites telescopes microscopes computers robots batteries magnets engines wheels
    hospitals schools bakeries farms factories airports harbors stadiums theaters zoos parks hotels villages cities
    festivals weddings holidays parades puzzles riddles marathons skates tents backpacks umbrellas hats shoes gloves
    sweaters buttons zippers spoons kettles bottles baskets ladders hammers ropes
    """.split()  # noqa: SIM905 (a list of strings would take 150 lines)
)
"""Nouns in the plural, which every request fits."""


def topics(split: Split) -> tuple[str, ...]:
    """Return the topics of a split: half of all in `train`, a quarter in each of the others, none in two of them.

    Args:
        split: `train`, `dev` or `test`.

    Examples:
        >>> set(topics("train")) & set(topics("test"))
        set()
    """
    places = {"train": (0, 2), "dev": (1,), "test": (3,)}[split]
    return tuple(topic for at, topic in enumerate(TOPICS) if at % 4 in places)


def prompts(
    *, count: int = 100, seed: int = 0, split: Split = "train", kinds: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows with `id`, `prompt` and `kind`; the kinds take turns, and no two rows of a kind share topic and request.

    Args:
        count: the number of rows.
        seed: of the draws.
        split: `train`, `dev` or `test`, which share no topic.
        kinds: names of `KINDS`; None is all.

    Raises:
        ValueError: `count` is below 1 or too large, or there is no such split or kind.

    Examples:
        >>> row = next(prompts(seed=1, kinds=["no_commas"]))
        >>> row["id"], row["kind"]
        ('train-1-0', 'no_commas')
    """
    names = list(KINDS) if kinds is None else list(kinds)
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    if unknown := [name for name in names if name not in KINDS] or ([] if names else ["none"]):
        raise ValueError(
            f"there is no kind {unknown[0]!r} of instructions{did_you_mean(unknown[0], KINDS)}; there are {', '.join(KINDS)}"
        )
    pairs = [(topic, request) for topic in topics(split) for request in REQUESTS]
    most = len(pairs) * len(names)
    if not 1 <= count <= most:
        raise ValueError(f"count must lie between 1 and {most}, the number of different prompts, not {count}")
    rng = random.Random(f"{seed} {split}")
    orders = {name: rng.sample(pairs, len(pairs)) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        topic, request = orders[name][number // len(names)]
        sentence = KINDS[name].draw(rng, topic).sentence
        yield {"id": f"{split}-{seed}-{number}", "prompt": f"{request.format(topic=topic)} {sentence}", "kind": name}
