"""Types that strategies and engines exchange: requests, answers, pairs.

A strategy is a generator function of a row. It yields an `Ask`, or a list of them that may be answered at the same time,
receives the `Answer`, or the list of them in the same order, and returns a pair, a single completion, a rejection, or a list of them:

    def stronger(row: Row) -> Strategy:
        weak, strong = yield [Ask(role="target", messages=row["prompt"]), Ask(role="stronger", messages=row["prompt"])]
        if not strong.is_whole:
            return Rejected(f"the stronger model's answer has finish_reason {strong.finish_reason}")
        return Pair(prompt=row["prompt"], chosen=strong.text, rejected=weak.text)

It is a pure function of the row, its settings and the answers: it opens no connection, reads no clock and draws no random
numbers. So it can be replayed from recorded answers at any time, with the same result.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    "Labelled",
    "Message",
    "Outcome",
    "Pair",
    "Rejected",
    "Request",
    "Row",
    "Sampling",
    "Strategy",
    "StrategyResult",
    "digest",
    "drive",
    "image_digest",
    "make_request",
]

Message = Mapping[str, Any]
"""A message of a conversation: `role`, and `content`, a text or a list of parts `{"type": "text", "text": ...}` and
`{"type": "image"}`, one image part for every image of the request; without image parts the images come before the first user text."""

Row = Mapping[str, Any]
"""A row of the source: `id` (str, unique), `prompt` (a list of messages; a plain text has become one user message), `images` (a
tuple, empty if there are none), and every other column as it was read."""


MOST_NEW_TOKENS = 2**20
"""More tokens than any model generates; memory that grows with this number needs a bound."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of an answer.

    Args:
        max_new_tokens: the largest number of generated tokens.
        temperature: 0 takes the most likely token at every step.
        top_p: sample from the smallest set of tokens with this probability; 1 is all.
        top_k: sample from this number of most likely tokens; 0 is all.
        stop: texts that end an answer; they are not a part of it.
        logprobs: return the log-probability of every token of the answer.

    Raises:
        ValueError: a value is outside its range.

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
            raise ValueError(f"stop must be a list of non-empty strings, not {self.stop!r}")
        if has_lone_surrogate(stops):
            raise ValueError(f"stop must be a list of strings, but {self.stop!a} contains a lone surrogate")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A strategy's request for an answer of a role.

    Args:
        role: a role of the recipe: `target`, `reviser`, `judge`, ...
        messages: the conversation to be answered. Exactly one of `messages` and `prompt` is given.
        prompt: a raw text to be continued, without chat template.
        images: paths, or Pillow images.
        sampling: None is the role's sampling in the recipe.
        seed: distinguishes equal requests of one row: the n samples of best-of-n have the seeds 0 to n - 1. The pipeline mixes
            the recipe's seed and the row's id into it.
        tag: the purpose of the request, for readers of the store: `answer`, `revision`, `verdict`, ...
        template: name and version of the prompt template, if there is one.

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
            raise ValueError("an Ask needs exactly one of messages and prompt")
        if self.messages is not None and not self.messages:
            raise ValueError("an Ask needs at least one message")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of an engine. One without text is recorded as a `Failure`."""

    text: str
    finish_reason: str = "stop"
    """`stop` (the model ended, or generated a stop text), `length` (the limit of tokens), or a reason that an endpoint reports."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[float, ...] | None = None
    """Of each token of the answer, under the model before temperature and truncation, if requested."""

    @property
    def is_whole(self) -> bool:
        """Return True if the model ended the answer itself."""
        return self.finish_reason == "stop"

    @property
    def is_cut(self) -> bool:
        """Return True if the answer was truncated at its limit of tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair: a better and a worse answer to one prompt."""

    prompt: Sequence[Message]
    chosen: str
    rejected: str
    images: Sequence[Any] = ()
    rejected_images: Sequence[Any] = ()
    """The images of the rejected answer, if the pair contrasts images; else empty."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, JSON values: the reviser's reasoning, the judge's scores, ..."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A single completion of a prompt, to be learnt by fine-tuning, or with others by the losses of completions with labels."""

    prompt: Sequence[Message]
    completion: str
    label: bool = True
    """True for a completion to learn, False for one to avoid."""
    images: Sequence[Any] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, JSON values."""


@dataclass(frozen=True)
class Rejected:
    """The result of a row whose answers make no pair: they cannot be parsed, tie, ... It is final."""

    reason: str


@dataclass(frozen=True)
class Failure:
    """The outcome of a request without an answer, in spite of all attempts. It can be requested again."""

    reason: str
    stops: bool = False
    """Whether every further request is pointless: the key is rejected, the budget is spent, ... The run ends then."""


Outcome = Pair | Labelled | Rejected
"""A part of the result of a strategy on a row."""
StrategyResult = Outcome | Sequence[Outcome]
"""The result of a strategy on a row: one pair or completion, none, or several."""
Strategy = Generator[Ask | list[Ask], Any, StrategyResult]
"""The generator that a strategy function returns. It receives an `Answer` for an `Ask`, and a `list[Answer]` for a list."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request with everything that determines its answer, as engines receive it and the store records it."""

    key: str
    """A hash of everything that determines the answer."""
    messages: Sequence[Message] | None
    prompt: str | None
    images: Sequence[Any]
    sampling: Sampling
    seed: int
    known: bool = False
    """True if it is answered already: it keeps its place in the batch, so that the others are computed as in an uninterrupted run."""


def make_request(ask: Ask, *, engine: Mapping[str, Any], sampling: Sampling, seed: int, row: str) -> Request:
    """Convert an ask to a request with its sampling, its seed and the key of its answer.

        seed = 63 bits of SHA-256(recipe's seed, row's id, ask's seed)
        key  = SHA-256(engine, messages, prompt, content of the images, sampling, seed, template)

    Args:
        ask: the ask of a strategy.
        engine: the identity of the engine, as JSON values.
        sampling: the role's, used if the ask has none.
        seed: the seed of the recipe.
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
    used = ask.sampling or sampling
    parts = {
        "engine": engine,
        "messages": ask.messages,
        "prompt": ask.prompt,
        "images": [image_digest(image) for image in ask.images],
        "sampling": vars(used),
        "seed": mixed,
        "template": ask.template,
    }
    return Request(
        key=digest(parts), messages=ask.messages, prompt=ask.prompt, images=ask.images, sampling=used, seed=mixed
    )


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same in every process and for every order of a mapping's keys.

    Args:
        value: a JSON value.

    Examples:
        >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
        True
    """
    return json_digest(value, separators=(",", ":"))


def image_digest(image: Any) -> str:
    """Return a hash of an image's file, or of its pixels.

    Args:
        image: a path, or a PIL image.

    Raises:
        OSError: there is no such file, or it holds no image.
    """
    if isinstance(image, str | PathLike):
        check_image(Path(image))  # before an engine reads it, since strategies may name files, too
        return content_digest(Path(image).read_bytes())
    return pixels_digest(image, separator=" ")


def drive(strategy: Strategy) -> Generator[list[Ask], list[Answer], list[Outcome]]:
    """Wrap a strategy in a uniform generator: it yields lists of asks, receives lists of answers, and returns a list.

    Args:
        strategy: the generator of a strategy function.

    Raises:
        TypeError: the strategy yields or returns other objects than asks or pairs.

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
                raise TypeError(f"a strategy must yield an Ask or a list of them, not {stranger!r}")
            received = yield asks
            answers = received if isinstance(yielded, list) else received[0]
    except StopIteration as end:
        return list(_checked_outcomes(end.value))


def _checked_outcomes(value: Any) -> Iterator[Outcome]:
    """Yield the pairs and completions that a strategy returned; one with an empty answer is rejected."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, Outcome):
            raise TypeError(f"a strategy must return a Pair, a Labelled, a Rejected or a list of them, not {item!r}")
        if isinstance(item, Labelled):
            yield item if item.completion.strip() else Rejected("the completion is empty")
            continue
        empty = [name for name in ("chosen", "rejected") if isinstance(item, Pair) and not getattr(item, name).strip()]
        yield Rejected(f"the {' and the '.join(empty)} answer of the pair is empty") if empty else item
