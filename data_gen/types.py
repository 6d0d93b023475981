"""What strategies and engines say to each other: a strategy asks, an engine answers, a pair comes out.

A strategy is one generator function of a row. It yields an `Ask`, or a list of them that may be answered at once, is sent
the `Answer`, or the list of them in the same order, and returns what it made of the row:

    def stronger(row: Row) -> Strategy:
        weak, strong = yield [Ask(role="target", messages=row["prompt"]), Ask(role="stronger", messages=row["prompt"])]
        if not strong.is_whole:
            return Rejected(f"the stronger model's answer ended by {strong.finish_reason}")
        return Pair(prompt=row["prompt"], chosen=strong.text, rejected=weak.text)

It is a pure function of the row, its settings and the answers: it opens no connection, reads no clock and draws no random
numbers. So it can be driven again from recorded answers at any time, with the same result.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from contralto.common.hashing import content_digest, json_digest, pixels_digest
from contralto.common.texts import has_lone_surrogate
from contralto.data_gen.image_files import check_image
from contralto.data_gen.ranges import check_number

__all__ = [
    "Answer",
    "Ask",
    "Failure",
    "Message",
    "Pair",
    "Rejected",
    "Request",
    "Row",
    "Sampling",
    "Strategy",
    "StrategyResult",
    "digest",
    "drive",
    "make_request",
]

Message = Mapping[str, Any]
"""A turn of a conversation: `role`, and `content`, a text or a list of parts `{"type": "text", "text": ...}` and
`{"type": "image"}`, one image part for every image of the ask; without image parts they stand before the first user text."""

Row = Mapping[str, Any]
"""A row to make pairs of: `id` (str, unique), `prompt` (a list of messages; a plain text has become one user message),
`images` (a tuple, empty if there are none), and every other column of the source as it was read."""


MOST_NEW_TOKENS = 2**20
"""More than any model writes; what needs memory for each of them needs a bound."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: the smallest set of tokens that reaches this probability; 1 is all.
        top_k: the so many likeliest tokens; 0 is all.
        stop: texts that end an answer; they are not part of it.
        logprobs: whether the answer tells the log-probability of each of its tokens.

    Raises:
        ValueError: a value outside its range.

    Examples:
        >>> Sampling(top_p=0)
        Traceback (most recent call last):
            ...
        ValueError: top_p must lie in (0, 1], not 0
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        check_number("max_new_tokens", self.max_new_tokens, least=1, most=MOST_NEW_TOKENS, whole=True)
        check_number("temperature", self.temperature, most=100)
        if isinstance(self.top_p, bool | str) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p!r}")
        check_number("top_k", self.top_k, most=2**31 - 1, whole=True)
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs must be true or false, not {self.logprobs!r}")  # noqa: TRY004
        stops = self.stop if isinstance(self.stop, list | tuple) else ()
        if self.stop != stops or not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop must be a list of texts, none of them empty, not {self.stop!r}")
        if has_lone_surrogate(stops):
            raise ValueError(f"stop must be a list of texts, and {self.stop!a} holds a lone surrogate")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a strategy wants to know from the engine of a role.

    Args:
        role: names an engine of the recipe: `target`, `reviser`, `judge`, ...
        messages: the conversation so far, ending with the turn to be answered. Either this or `prompt`.
        prompt: a raw text to be continued, without chat template.
        images: paths, or Pillow images.
        sampling: None is the role's sampling in the recipe, which is what most strategies want.
        seed: tells equal asks of one row apart: the n samples of best-of-n have the seeds 0 to n - 1. The pipeline mixes
            the recipe's seed and the row's id into it.
        tag: what the ask is for, for people who read the store: `answer`, `revision`, `verdict`, ...
        template: name and version of the prompt template that the text was made with, if any.

    Raises:
        ValueError: not exactly one of `messages` and `prompt`, or no messages.
    """

    role: str
    messages: Sequence[Message] | None = None
    prompt: str | None = None
    images: Sequence[Any] = ()
    sampling: Sampling | None = None
    seed: int = 0
    tag: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("an Ask has either messages or a prompt, not both and not neither")
        if self.messages is not None and not self.messages:
            raise ValueError("the messages of an Ask are empty: it needs at least one")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine said. One without text is recorded as a `Failure`."""

    text: str
    finish_reason: str = "stop"
    """`stop` (the model ended, or a stop text came), `length` (it was cut off), or what else an endpoint tells."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[float, ...] | None = None
    """Of each token of the answer, under the model before temperature and truncation, if asked for."""

    @property
    def is_whole(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.finish_reason == "stop"

    @property
    def is_cut(self) -> bool:
        """Whether the answer was cut off at its limit of tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair: of two answers to one prompt, one is better."""

    prompt: Sequence[Message]
    chosen: str
    rejected: str
    images: Sequence[Any] = ()
    rejected_images: Sequence[Any] = ()
    """The images that the rejected answer belongs to, where the pair contrasts images; else none."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the pair, JSON values by column: the reviser's reasoning, the judge's scores, ..."""


@dataclass(frozen=True)
class Rejected:
    """No pair, because of the answers: they could not be parsed, tie, point the wrong way, ... It is final."""

    reason: str


@dataclass(frozen=True)
class Failure:
    """No answer, in spite of all attempts. It can be asked again."""

    reason: str
    stops: bool = False
    """Whether asking on is pointless, for any request: the key is refused, the money is spent, ... The run ends then."""


StrategyResult = Pair | Rejected | Sequence[Pair | Rejected]
"""What becomes of a row: a pair, none, or several."""
Strategy = Generator[Ask | list[Ask], Any, StrategyResult]
"""What a strategy function returns: the generator that the pipeline drives. It is sent an `Answer` for an `Ask` and a
`list[Answer]` for a list."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An ask with all that determines its answer: what an engine receives, and what the store records."""

    key: str
    """A hash of everything that determines the answer."""
    messages: Sequence[Message] | None
    prompt: str | None
    images: Sequence[Any]
    sampling: Sampling
    seed: int
    known: bool = False
    """Already answered: it only keeps its place in the batch, so that the others are computed as if nothing had stopped."""


def make_request(ask: Ask, *, engine: Mapping[str, Any], sampling: Sampling, seed: int, row: str) -> Request:
    """The request of an ask: sampling and seed settled, and the key of its answer.

        seed = 63 bits of SHA-256(recipe's seed, row's id, ask's seed)
        key  = SHA-256(engine, messages, prompt, content of the images, sampling, seed, template)

    Args:
        ask: what a strategy yielded.
        engine: what of the engine determines answers: its kind, the model, the decoding options; JSON values.
        sampling: the role's, used if the ask has none.
        seed: of the recipe.
        row: the row's id.

    Raises:
        ValueError: the prompt holds a lone surrogate, which can be neither sent nor recorded.

    Examples:
        >>> ask = Ask(role="target", prompt="2 + 2 =")
        >>> one, same, other = (make_request(ask, engine={"model": "m"}, sampling=Sampling(), seed=s, row="a") for s in (0, 0, 1))
        >>> one.key == same.key, one.key == other.key
        (True, False)
    """
    if has_lone_surrogate([ask.messages, ask.prompt, ask.tag, ask.template]):
        raise ValueError(
            f"the prompt for {ask.role} holds a lone surrogate: half of a character can be neither sent nor recorded"
        )
    mixed = int(digest([seed, row, ask.seed])[:16], 16) >> 1
    how = ask.sampling or sampling
    parts = {
        "engine": engine,
        "messages": ask.messages,
        "prompt": ask.prompt,
        "images": [_image_digest(image) for image in ask.images],
        "sampling": asdict(how),
        "seed": mixed,
        "template": ask.template,
    }
    return Request(
        key=digest(parts), messages=ask.messages, prompt=ask.prompt, images=ask.images, sampling=how, seed=mixed
    )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, the same in every process and for every order of a mapping's keys.

    Examples:
        >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
        True
    """
    return json_digest(value, separators=(",", ":"))


def _image_digest(image: Any) -> str:
    """Of an image's file, or of its pixels."""
    if isinstance(image, str | PathLike):
        check_image(Path(image))  # before an engine reads it: strategies may name files, too
        return content_digest(Path(image).read_bytes())
    return pixels_digest(image, separator=" ")


def drive(strategy: Strategy) -> Generator[list[Ask], list[Answer], list[Pair | Rejected]]:
    """A strategy in one form: it always yields a list of asks, is sent a list of answers, and returns a list.

    Args:
        strategy: as its function returns it.

    Raises:
        TypeError: it yields or returns something else than asks or pairs.

    Examples:
        >>> def sure(row):
        ...     answer = yield Ask(role="target", messages=row["prompt"])
        ...     return Pair(prompt=row["prompt"], chosen=answer.text, rejected="no")
        >>> driven = drive(sure({"prompt": [{"role": "user", "content": "Sure?"}]}))
        >>> [ask.role for ask in next(driven)]
        ['target']
        >>> try:
        ...     driven.send([Answer(text="yes")])
        ... except StopIteration as end:
        ...     print(end.value[0].chosen)
        yes
    """
    answers: Any = None
    try:
        while True:
            yielded = strategy.send(answers)
            asks = yielded if isinstance(yielded, list) else [yielded]
            if stranger := next((ask for ask in asks if not isinstance(ask, Ask)), None):
                raise TypeError(f"a strategy yields an Ask or a list of them, not {stranger!r}")
            given = yield asks
            answers = given if isinstance(yielded, list) else given[0]
    except StopIteration as end:
        return list(_made(end.value))


def _made(value: Any) -> Iterator[Pair | Rejected]:
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, Pair | Rejected):
            raise TypeError(f"a strategy returns a Pair, a Rejected or a list of them, not {item!r}")
        empty = [name for name in ("chosen", "rejected") if isinstance(item, Pair) and not getattr(item, name).strip()]
        yield Rejected(f"the {' and the '.join(empty)} answer of the pair is empty") if empty else item
