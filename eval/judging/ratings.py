"""Ratings of single answers by judges, as in MMHal-Bench (Sun et al. 2023, arXiv 2309.14525), whose judge reads the contents of the image.

A judge is a role of `contralto.data_gen`, as those that compare two answers: its replies are recorded, and a run goes on where it was.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's file is a ValueError like any other mistake in it)

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import read_json_lines, read_text
from contralto.common.hashing import content_digest
from contralto.common.registry import Registry
from contralto.data_gen import templates
from contralto.data_gen.pipeline.rows import Result
from contralto.data_gen.recipe import Role, read_role
from contralto.data_gen.strategies.verdicts import is_readable
from contralto.data_gen.types import Ask, Rejected, Row, Strategy
from contralto.eval.data.captions import check_mmhal

__all__ = [
    "RATINGS",
    "RatedAnswer",
    "Rating",
    "RatingJudge",
    "RatingScale",
    "make_rating_judge",
    "parse_rating",
    "rate_answer",
    "rating_of",
    "rating_rows",
    "read_rated",
]

FIELDS = ("contents", "question", "reference", "answer")
"""The fields of a prompt, in the order in which published prompts with `{}` have them."""
TEMPLATES = Path(__file__).parent / "templates"
OWN_OPTIONS = ("name", "template", "seed")


class RatedAnswer(NamedTuple):
    """An answer to a question about an image, with what is in the image."""

    id: str
    question: str
    answer: str
    reference: str
    contents: str
    """The objects in the image, separated by commas."""
    category: str = ""


class Rating(NamedTuple):
    """A judge's rating of an answer."""

    answer: RatedAnswer
    value: int | None
    """None for a reply without a rating, or without a reply."""
    reply: str = ""
    failed: str = ""
    """The reason why there is no reply; empty otherwise."""
    is_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class RatingScale:
    """The prompt of a benchmark whose judge rates answers one by one."""

    name: str
    template: str
    """The packaged template."""
    read: Callable[[str], int | None]
    """Returns the rating of a reply, None without one."""
    highest: int
    hallucinated_below: int
    """Ratings below it are those of answers with a hallucination."""
    sampling: Mapping[str, Any]
    source: str = ""
    differences: tuple[str, ...] = ()


def parse_rating(text: str) -> int | None:
    """Return the rating of a reply as MMHal-Bench's code reads it: the only one of `Rating: 0` to `Rating: 6` that it contains.

    Args:
        text: The reply.

    Examples:
        >>> parse_rating("It counts the cats right. Rating: 5, very informative"), parse_rating("Rating: 2, not Rating: 3")
        (5, None)
    """
    found = [number for number in range(7) if f"rating: {number}" in text.lower()]
    return found[0] if len(found) == 1 else None


RATINGS: Registry[RatingScale] = Registry("rating", group="contralto.ratings")
"""The benchmarks by name. Packages add theirs by entry points of the group `contralto.ratings`."""
RATINGS.register(
    RatingScale(
        name="mmhal",
        template="rating_mmhal",
        read=parse_rating,
        highest=6,
        hallucinated_below=3,
        sampling={"temperature": 0.0, "max_new_tokens": 1024},
        source="Shengcao1006/MMHal-Bench, eval_gpt4.py (Apache-2.0), reworded and without its five examples",
        differences=(
            "the release asks gpt-4-0314, which is no longer served; ratings of other judges are not comparable with published ones",
            "with the published prompt as template=FILE, its text is used to the letter",
        ),
    )
)


class RatingPrompt(NamedTuple):
    """A prompt with places for the contents of the image, the question, the reference and the answer."""

    label: str
    text: str
    is_published: bool
    """True if the places are written `{}`, as in the release; False for Jinja."""

    def messages(self, answer: RatedAnswer) -> list[dict[str, Any]]:
        """Return the messages of a request.

        Args:
            answer: The answer.
        """
        values = {name: getattr(answer, name) for name in FIELDS}
        if not self.is_published:
            return templates.user_messages(templates.Template(self.label.partition("@")[0], self.text).render(**values))
        pieces = self.text.split("{}")
        filled = [piece + value for piece, value in zip(pieces, [*values.values(), ""], strict=True)]
        return templates.user_messages("".join(filled))


@dataclass(frozen=True, kw_only=True)
class RatingJudge:
    """A judge of single answers: an engine with a sampling, and a prompt."""

    name: str
    role: Role
    prompt: RatingPrompt
    scale: RatingScale
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that determines its replies, as JSON values."""
        sampling = {name: value for name, value in vars(self.role.sampling).items() if value not in ((), 0, False)}
        return {
            "engine": dict(self.role.engine.identity),
            "sampling": sampling,
            "prompts": [self.prompt.label],
            "rating": self.scale.name,
            "seed": self.seed,
        }


def make_rating_judge(
    options: Mapping[str, Any], *, scale: RatingScale, number: int = 1, engines: dict[str, Any] | None = None
) -> RatingJudge:
    """Make a judge of options.

    Args:
        options: `engine` with its options, those of `Sampling`, `price`; `template`, a file with the prompt: Jinja, or the published one
            with four `{}`; `name`; `seed`.
        scale: gives template and sampling where the options do not.
        number: of the judge, for errors.
        engines: the engines of other judges, which equal options share; the judge's own is added.

    Raises:
        OSError: there is no such file.
        ValueError: an option is unknown or has a wrong value, or a prompt has other places.

    Examples:
        >>> judge = make_rating_judge({"engine": "function", "use": "reprlib:repr"}, scale=RATINGS["mmhal"])
        >>> judge.name, judge.role.sampling.temperature
        ('reprlib:repr', 0.0)
    """
    where = f"judge {number}"
    seed = options.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"{where}: seed must be a whole number of at least 0, not {seed!r}")
    prompt = _prompt(str(options.get("template", TEMPLATES / f"{scale.template}.txt")))
    of_role = {**scale.sampling, **{name: value for name, value in options.items() if name not in OWN_OPTIONS}}
    role = read_role(where, of_role, where=where, folder=Path.cwd(), engines={} if engines is None else engines)
    name = str(options.get("name") or role.engine.identity.get("model") or of_role["engine"])
    return RatingJudge(name=name, role=role, prompt=prompt, scale=scale, seed=seed)


def _prompt(name: str) -> RatingPrompt:
    path = Path(name)
    if path.is_file() and read_text(path).count("{}") == len(FIELDS):
        text = read_text(path)
        return RatingPrompt(f"{path.stem}@{content_digest(text, 12)}", text, True)
    template = templates.load(name, *FIELDS)
    return RatingPrompt(template.label, template.text, False)


# -------------------------------------------------------------------------------------------------------------- answers


def read_rated(path: Path, questions: Path | None = None, *, limit: int | None = None) -> list[RatedAnswer]:
    """Read answers to the questions of MMHal-Bench.

    Args:
        path: the release's file of answers, a list of rows with `model_answer`; or the samples of the task `mmhal` that lm-eval has logged.
        questions: `response_template.json`, where the answers have nothing but an id, its number from 0, and `answer`.
        limit: the largest number of answers; None is all.

    Raises:
        OSError: a file cannot be read.
        ValueError: a row is not valid; the message names file and row.
    """
    known = None if questions is None else [_valid(row, f"{questions}, row {i}") for i, row in _records(questions)]
    answers = []
    for number, record in list(_records(path))[:limit]:
        where = f"{path}, row {number}"
        key, row, text = _forms(record, known, number - 1, where)
        if not isinstance(text, str):
            raise ValueError(f"{where}: the answer must be a text, not {text!r:.60}")
        contents = ", ".join(row["image_content"])
        answers.append(RatedAnswer(key, row["question"], text, row["gt_answer"], contents, row["question_type"]))
    if not answers:
        raise ValueError(f"{path} has no rows")
    return answers


def _forms(record: Any, known: Sequence[Mapping[str, Any]] | None, number: int, where: str) -> tuple[str, Any, Any]:
    """Return the id of an answer, its question with all that belongs to it, and its text."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(record).__name__}")
    if "doc" in record and "filtered_resps" in record:  # samples of lm-eval
        doc = {**record["doc"], "image_src": record["doc"].get("image")}
        return str(record["doc"].get("id", number)), _valid(doc, where), record["filtered_resps"][0]
    if "model_answer" in record:
        return str(number), _valid(record, where), record["model_answer"]
    if known is None or "answer" not in record or "id" not in record:
        raise ValueError(
            f"{where}: an answer to MMHal-Bench has model_answer and the fields of its question, or is a sample of lm-eval's task mmhal, "
            "or has id and answer, with --questions response_template.json"
        )
    if str(record["id"]) not in map(str, range(len(known))):
        raise ValueError(
            f"{where}: id must be the number of a question, from 0 to {len(known) - 1}, not {record['id']!r}"
        )
    return str(record["id"]), known[int(record["id"])], record["answer"]


def _valid(row: Any, where: str) -> Mapping[str, Any]:
    error = check_mmhal(row) if isinstance(row, dict) else f"a row must be a JSON object, not {row!r:.60}"
    if error:
        raise ValueError(f"{where}: {error}")
    return row  # type: ignore[no-any-return]


def _records(path: Path) -> Iterable[tuple[int, Any]]:
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file must hold a list of rows, not one {type(rows).__name__}")
    return enumerate(rows, 1)


# ------------------------------------------------------------------------------------------------------------- requests


def rating_rows(systems: Mapping[str, Sequence[RatedAnswer]]) -> list[dict[str, Any]]:
    """Return the rows of answers for `contralto.data_gen.pipeline`.

    Args:
        systems: the answers of each system.
    """
    return [
        {"id": f"{name}/{each.id}", "prompt": [], "images": (), "system": name, "answer": each}
        for name, answers in systems.items()
        for each in answers
    ]


def rate_answer(row: Row, *, judge: RatingJudge) -> Strategy:
    """Request a judge's rating of an answer.

    Args:
        row: with `answer`.
        judge: the judge.
    """
    messages = judge.prompt.messages(row["answer"])
    yield [Ask(role=judge.name, messages=messages, seed=judge.seed, tag="rating", template=judge.prompt.label)]
    return Rejected("rated")


def rating_of(result: Result, judge: RatingJudge) -> Rating:
    """Return a judge's rating of an answer from the recorded reply.

    Args:
        result: as `replay` yields it.
        judge: the judge.
    """
    answer: RatedAnswer = result.row["answer"]
    if not result.answered:
        return Rating(answer, None, failed=(result.failed or "not rated yet").removeprefix(f"{judge.name}: "))
    (_, reply), *_ = result.answered
    value = judge.scale.read(reply.text) if is_readable(reply) else None
    return Rating(answer, value, reply.text, is_cut=reply.is_cut)
