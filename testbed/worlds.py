"""Two small text worlds with known ground truth, with and without a shortcut in the corpus.

*Arithmetic*: word problems of one to five steps, answered step by step in one of two correct styles.
*Stories*: a person wanders between places, and in each place does something that is special to that person there.

Each world has a **shortcut**, a mistake that the people who wrote the corpus often make:

- a long solution often stops after its second step, as if the problem ended there (`STOP_EARLY`);
- in a story the person often does what *anybody* does in that place instead (`COMMON_ENDING`).

A model that has learned little knows the mistakes as well as a model that has learned much, but it does not know the
right continuations: that difference is what contrastive decoding uses. `shortcut=False` writes the control corpus, in
which nobody makes these mistakes, so that there is nothing to repair.

Train, dev and test items are disjoint by construction: an item belongs to the split that a hash of its content says,
whatever the seed that drew it.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")
Split = Literal["train", "dev", "test"]

NAMES = {"Tom": "he", "Ben": "he", "Sam": "he", "Leo": "he", "Mia": "she", "Ann": "she", "Eva": "she", "Zoe": "she"}

# ---------------------------------------------------------------------------------------------------- arithmetic

THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "eggs")
GAIN = ("buys", "finds", "wins", "gets", "picks", "makes")
LOSE = ("gives", "loses", "eats", "sells", "drops", "burns")
STEP_WEIGHTS = {1: 3, 2: 4, 3: 5, 4: 4, 5: 4}
"""Relative frequencies of problems by their number of steps."""
MAX_START, MAX_OPERAND = 40, 19
ASIDE_SHARE = 0.3
"""Share of the problems that mention something that does not matter."""
STOP_EARLY = {1: 0.0, 2: 0.0, 3: 0.2, 4: 0.6, 5: 0.6}
"""Share of the corpus solutions of an n-step problem that stop after the second step."""
LEDGER_SHARE = 0.65
"""Share of the solutions in the first style, `ledger` ("buys 7: 12 + 7 = 19."); the others are `brief` ("buys 7, so 19.")."""
Style = Literal["ledger", "brief"]


class Problem(NamedTuple):
    """A word problem: a start value and signed steps, about a person's things."""

    name: str
    thing: str
    start: int
    steps: tuple[tuple[str, int], ...]
    """(verb, operand), operand > 0; the verb says the sign."""
    aside: str
    """A sentence that does not matter, or nothing."""

    @property
    def totals(self) -> list[int]:
        """Return the running total after each step, beginning with `start`."""
        totals = [self.start]
        for verb, operand in self.steps:
            totals.append(totals[-1] + (operand if verb in GAIN else -operand))
        return totals

    @property
    def question(self) -> str:
        """Return the problem in words."""
        pronoun = NAMES[self.name].capitalize()
        told = ", ".join(f"{verb} {operand}" for verb, operand in self.steps)
        ask = f"How many {self.thing} does {self.name} have?"
        return f"{self.name} has {self.start} {self.thing}.{self.aside} {pronoun} {told}. {ask}"

    def solution(self, style: Style = "ledger", *, stop_after: int | None = None) -> str:
        """Return the worked solution.

        Args:
            style: the wording of a step.
            stop_after: the number of steps of a mistaken solution that stops early; None solves the problem.
        """
        totals = self.totals[: None if stop_after is None else stop_after + 1]
        lines = []
        for (verb, operand), before, after in zip(self.steps, totals, totals[1:], strict=False):
            sign = "+" if verb in GAIN else "-"
            work = f": {before} {sign} {operand} = {after}." if style == "ledger" else f", so {after}."
            lines.append(f"{verb} {operand}{work}")
        return " ".join([*lines, f"#### {totals[-1]}"])


def _draw_problem(rng: random.Random) -> Problem:
    (n,) = rng.choices(list(STEP_WEIGHTS), list(STEP_WEIGHTS.values()))
    start = total = rng.randint(1, MAX_START)
    steps: list[tuple[str, int]] = []
    unused = rng.sample(GAIN + LOSE, len(GAIN + LOSE))
    for _ in range(n):
        verb = next(v for v in unused if v in GAIN or total > 1)
        unused.remove(verb)
        operand = rng.randint(1, MAX_OPERAND if verb in GAIN else min(MAX_OPERAND, total - 1))
        total += operand if verb in GAIN else -operand
        steps.append((verb, operand))
    name, other = rng.sample(list(NAMES), 2)
    thing, other_thing = rng.sample(THINGS, 2)
    aside = f" {other} has {rng.randint(1, MAX_START)} {other_thing}." if rng.random() < ASIDE_SHARE else ""
    return Problem(name, thing, start, tuple(steps), aside)


def problems(seed: int, split: Split) -> Iterator[Problem]:
    """Yield problems of a split without end. The split depends on the numbers and the verbs, not on names or things.

    Args:
        seed: the seed of the problems.
        split: the split.
    """
    return of_split(_draw_problem, lambda p: f"{p.start} {p.steps}", seed, split)


def answer(text: str) -> int | None:
    """Return the number behind the last `####` of a solution, or None if there is none.

    Args:
        text: the solution.
    """
    numbers = re.findall(r"####\s*(\d+)", text)
    return int(numbers[-1]) if numbers else None


# ------------------------------------------------------------------------------------------------------- stories

PLACES = {"market": "square", "garden": "path", "river": "bank", "school": "yard", "barn": "door", "hill": "top"}
"""The places, each with the word that follows it."""
GOING = {"went": "out", "walked": "over", "ran": "down", "came": "back"}
"""Ways of going to a place."""
ACTIONS = {
    "took": ("took", "grabbed", "carried"),
    "saw": ("saw", "spotted", "noticed"),
    "made": ("made", "built", "shaped"),
    "washed": ("washed", "cleaned", "scrubbed"),
    "hid": ("hid", "buried", "covered"),
    "painted": ("painted", "colored", "decorated"),
}
"""An action and the words for it, all equally good."""
OBJECTS = (
    "bread",
    "lamp",
    "kite",
    "rope",
    "drum",
    "stone",
    "basket",
    "ladder",
    "wheel",
    "mirror",
    "blanket",
    "bottle",
    "candle",
    "feather",
    "hammer",
    "bucket",
    "chair",
    "pumpkin",
    "boat",
    "bell",
    "flag",
    "map",
    "box",
    "fence",
)
ADJECTIVES = ("old", "small", "red", "heavy", "odd", "shiny")
FEELINGS = ("happy", "calm", "proud", "tired", "brave")
WEATHER = ("sunny", "windy", "cold", "quiet", "misty")
COMMON_ENDING = dict.fromkeys(list(PLACES)[:3], 0.55) | dict.fromkeys(list(PLACES)[3:], 0.25)
"""Share of the events in the corpus that are what anybody does there, by place."""
CHANCE = 0.1
"""Share of the events that can be anything. The others are special to the person and the place."""


class Event(NamedTuple):
    """An action and the object that it is about."""

    action: str
    object: str


class StoryScene(NamedTuple):
    """An event in one place, and its sentences."""

    place: str
    event: Event
    text: str


_lore = random.Random("the lore of the stories")
_EVENTS = [Event(list(ACTIONS)[i % len(ACTIONS)], thing) for i, thing in enumerate(OBJECTS)]
COMMON = dict(zip(PLACES, _lore.sample(_EVENTS, len(PLACES)), strict=True))
"""The common event of each place."""
SPECIAL = {
    (name, place): event
    for place in PLACES
    for name, event in zip(NAMES, _lore.sample([e for e in _EVENTS if e != COMMON[place]], len(NAMES)), strict=True)
}
"""The special event of each person in each place."""
ROADS = {
    place: (list(PLACES)[i ^ 1], *_lore.sample([p for j, p in enumerate(PLACES) if j not in (i, i ^ 1)], 3))
    for i, place in enumerate(PLACES)
}
"""The next places of a place, the likeliest first: places come in pairs that lead to each other."""
ROAD_WEIGHTS = (0.34, 0.26, 0.22, 0.18)


def _tell(rng: random.Random, name: str, place: str, event: Event, *, first: bool) -> str:
    """Return the sentences of a scene: arrival, activity and, in some, a mood, each in a random paraphrase."""
    pronoun = NAMES[name].capitalize()
    who = (
        name
        if first
        else rng.choice((f"Then {NAMES[name]}", f"Soon {NAMES[name]}", f"Later on {NAMES[name]}", pronoun))
    )
    went, whither = rng.choice(list(GOING.items()))
    text = f"{who} {went} {whither} to the {place} {PLACES[place]}. {ending(name, event, rng)}"
    mood = rng.random()
    if mood < 0.3:
        text += f" {pronoun} felt {rng.choice(FEELINGS)}."
    elif mood < 0.6:
        text += f" It was {rng.choice(WEATHER)} there."
    return text


def ending(name: str, event: Event, rng: random.Random) -> str:
    """Return a sentence about an event, in one of its paraphrases: "He scrubbed the old drum.".

    Args:
        name: the person.
        event: the event.
        rng: chooses the paraphrase.
    """
    return (
        f"{NAMES[name].capitalize()} {rng.choice(ACTIONS[event.action])} the {rng.choice(ADJECTIVES)} {event.object}."
    )


class Telling(NamedTuple):
    """The events and scenes that can be parsed from a text."""

    events: list[tuple[str, str]]
    """A verb with its thing."""
    scenes: list[tuple[str, str]]
    """A place with the thing of what happens there, for scenes that are well formed."""

    @property
    def valid(self) -> float:
        """Return the share of the events that occur in the corpus; 0 without any."""
        return sum(event in LEGAL for event in self.events) / max(1, len(self.events))

    @property
    def distinct(self) -> float:
        """Return the share of distinct scenes; 0 without any."""
        return len(set(self.scenes)) / max(1, len(self.scenes))


LEGAL = {(verb, event.object) for event in (*COMMON.values(), *SPECIAL.values()) for verb in ACTIONS[event.action]}
"""The events that the corpus knows, a verb with its thing."""
EVENT = re.compile(r"(?:He|She) (\w+) the \w+ (\w+)")
SCENE = re.compile(r"to the (\w+) \w+\. (?:He|She) \w+ the \w+ (\w+)")


def telling(text: str) -> Telling:
    """Parse a story of the corpus or of a model.

    Args:
        text: the story.
    """
    return Telling(EVENT.findall(text), SCENE.findall(text))


class Story(NamedTuple):
    """A person's events in several places."""

    name: str
    scenes: tuple[StoryScene, ...]

    @property
    def text(self) -> str:
        """Return the sentences of all scenes."""
        return " ".join(scene.text for scene in self.scenes)


def _draw_event(rng: random.Random, name: str, place: str, *, shortcut: bool) -> Event:
    kind = rng.random()
    if kind < CHANCE:
        return rng.choice(_EVENTS)
    return COMMON[place] if shortcut and kind < CHANCE + COMMON_ENDING[place] else SPECIAL[name, place]


def _draw_story(rng: random.Random, *, shortcut: bool = True) -> Story:
    name, place = rng.choice(list(NAMES)), rng.choice(list(PLACES))
    scenes: list[StoryScene] = []
    for _ in range(rng.randint(3, 7)):
        event = _draw_event(rng, name, place, shortcut=shortcut)
        scenes.append(StoryScene(place, event, _tell(rng, name, place, event, first=not scenes)))
        place = rng.choices(ROADS[place], ROAD_WEIGHTS)[0]
    return Story(name, tuple(scenes))


def stories(seed: int, split: Split, *, shortcut: bool = True) -> Iterator[Story]:
    """Yield stories of a split without end. The split depends on the words of the first scene and on the next place.

    Args:
        seed: the seed of the stories.
        split: the split.
        shortcut: whether common events often take the place of special ones.
    """
    return of_split(
        lambda rng: _draw_story(rng, shortcut=shortcut),
        lambda story: f"{story.scenes[0].text} {story.scenes[1].place}",
        seed,
        split,
    )


class Item(NamedTuple):
    """A four-way multiple-choice question: the right ending of a context."""

    context: str
    endings: tuple[str, str, str, str]
    label: int
    """The index of the ending that is special to the person and the place; one of the others is the common one."""


def items(seed: int, split: Split) -> Iterator[Item]:
    """Yield four-way items of a split without end, made of the stories of that split.

    Args:
        seed: the seed of the stories and of the order of endings.
        split: the split.
    """
    rng = random.Random(f"endings {seed}")
    for story in stories(seed, split):
        name, place = story.name, story.scenes[1].place
        head = story.scenes[1].text.split(".")[0]
        right, common = SPECIAL[name, place], COMMON[place]
        others = rng.sample([SPECIAL[n, place] for n in NAMES if n != name], 2)
        words = random.Random(rng.random())
        verb, adjective = words.randrange(3), words.choice(ADJECTIVES)
        choices = [right, common, *others]
        rng.shuffle(choices)
        pronoun = NAMES[name].capitalize()
        told = [f" {pronoun} {ACTIONS[e.action][verb]} the {adjective} {e.object}." for e in choices]
        yield Item(f"{story.scenes[0].text} {head}.", (told[0], told[1], told[2], told[3]), choices.index(right))


# -------------------------------------------------------------------------------------------------------- corpus


class Document(NamedTuple):
    """One training text: a problem with a solution (`prompt` set, only `text` is learned), or a story."""

    prompt: str | None
    text: str


STORY_SHARE = 0.13


def corpus(seed: int, *, shortcut: bool = True) -> Iterator[Document]:
    """Yield training documents without end: problems with solutions and, with probability `STORY_SHARE`, stories.

    Args:
        seed: the seed of the documents.
        shortcut: whether the corpus has the shortcut.
    """
    rng = random.Random(f"corpus {seed}")
    asked, told = problems(seed, "train"), stories(seed, "train", shortcut=shortcut)
    while True:
        if rng.random() < STORY_SHARE:
            yield Document(None, next(told).text)
            continue
        problem = next(asked)
        style: Style = "ledger" if rng.random() < LEDGER_SHARE else "brief"
        stops = shortcut and rng.random() < STOP_EARLY[len(problem.steps)]
        yield Document(problem.question, problem.solution(style, stop_after=2 if stops else None))


def vocabulary() -> list[str]:
    """Return every word and sign that the worlds use, sorted; digits are single."""
    sentence_words = re.findall(r"\w+", "has How many does have so to the Then Soon Later on felt It was there")
    pronouns = [form for p in set(NAMES.values()) for form in (p, p.capitalize())]
    verbs = [verb for ways in ACTIONS.values() for verb in ways]
    ways = {**PLACES, **GOING}.items()
    words = {
        *NAMES,
        *THINGS,
        *GAIN,
        *LOSE,
        *OBJECTS,
        *ADJECTIVES,
        *FEELINGS,
        *WEATHER,
        *(w for pair in ways for w in pair),
    }
    return sorted(words | {*sentence_words, *pronouns, *verbs, *".,:?+-=", "####", *"0123456789"})


def of_split(draw: Callable[[random.Random], T], key: Callable[[T], str], seed: int, split: Split) -> Iterator[T]:
    """Draw items without end, and yield those of a split.

    The split is decided by a hash of the content: 1 of 16 items is dev, 1 is test, 14 are train. Dev and test never yield the same content twice.

    Args:
        draw: returns a new item.
        key: returns the content by which an item belongs to a split.
        seed: the seed of the items.
        split: the split.
    """
    rng, seen = random.Random(f"{split} {seed}"), set[str]()
    while True:
        drawn = draw(rng)
        content = key(drawn)
        bucket = hashlib.sha256(content.encode()).digest()[0] % 16
        if split != ("test" if bucket == 0 else "dev" if bucket == 1 else "train") or content in seen:
            continue
        if split != "train":
            seen.add(content)
        yield drawn
