"""Judges as roles of `contralto.data_gen`: its engines send their requests, its store keeps every reply.

A judge reads both answers to a prompt in both orders, in two independent requests. Figures are made of the recorded replies, so an
interrupted run goes on where it was, and a run with one more judge asks that one alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from contralto.data_gen.pipeline.rows import Result
from contralto.data_gen.recipe import Recipe, Role, Use, read_role
from contralto.data_gen.rows import RowSource
from contralto.data_gen.strategies.verdicts import is_readable
from contralto.data_gen.types import Answer, Ask, Rejected, Row, Strategy
from contralto.eval.judging.games import Game
from contralto.eval.judging.presets import Preset
from contralto.eval.judging.prompts import PromptSet, load_prompts
from contralto.eval.judging.verdicts import Vote

__all__ = ["Judge", "Judgement", "check_judges", "game_rows", "judge_game", "judgement_of", "make_judge", "recipe_of"]

OWN_OPTIONS = ("name", "template", "verdict", "seed")
"""Options of a judge that are not those of a role."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge: an engine with a sampling, and its prompts."""

    name: str
    role: Role
    prompts: PromptSet
    seed: int = 0
    """Distinguishes judges that are the same otherwise, and sample."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that determines its replies, as JSON values."""
        return {
            "engine": dict(self.role.engine.identity),
            "sampling": {
                name: value for name, value in vars(self.role.sampling).items() if value not in ((), 0, False)
            },
            "prompts": [prompt.label for prompt in self.prompts.prompts],
            "verdict": self.prompts.verdict.name,
            "seed": self.seed,
        }


class Judgement(NamedTuple):
    """A judge's two opinions of a game, as shares of the first system."""

    game: Game
    votes: tuple[Vote | None, Vote | None]
    """With the first system's answer shown first, and with the second's; None for a reply without a verdict."""
    replies: tuple[str, str] = ("", "")
    failed: str = ""
    """The reason why there is no reply; empty otherwise."""
    cut: int = 0
    """The number of replies that were cut off at the limit of tokens."""

    @property
    def is_unread(self) -> bool:
        """Return True if there are replies, and one of them has no verdict."""
        return not self.failed and None in self.votes

    @property
    def shares(self) -> tuple[float, float] | None:
        """Return the share of the first system in both orders; None if a verdict is missing."""
        first, swapped = self.votes
        return None if first is None or swapped is None else (first.share, 1 - swapped.share)


def make_judge(
    options: Mapping[str, Any],
    *,
    preset: Preset,
    number: int = 1,
    folder: Path | None = None,
    engines: dict[str, Any] | None = None,
) -> Judge:
    """Make a judge of options.

    Args:
        options: `engine` with its options, those of `Sampling`, `price`; `template`, a packaged template or a file of prompts;
            `verdict`, the form of its verdicts; `name`; `seed`.
        preset: gives template and sampling where the options do not.
        number: of the judge, for errors.
        folder: the folder in which functions may lie; None is the current one.
        engines: the engines of other judges, which equal options share; the judge's own is added.

    Raises:
        OSError: there is no such file of prompts.
        ValueError: an option is unknown or has a wrong value.

    Examples:
        >>> from contralto.eval.judging.presets import PRESETS
        >>> judge = make_judge({"engine": "function", "use": "reprlib:repr"}, preset=PRESETS["mt_bench"])
        >>> judge.name, judge.prompts.verdict.name, judge.role.sampling.temperature
        ('reprlib:repr', 'letters', 0.0)
    """
    where = f"judge {number}"
    own = {name: options[name] for name in OWN_OPTIONS if name in options}
    if type(own.get("seed", 0)) is not int or own.get("seed", 0) < 0:
        raise ValueError(f"{where}: seed must be a whole number of at least 0, not {own['seed']!r}")
    prompts = load_prompts(str(own.get("template", preset.template)), verdict=own.get("verdict"))
    of_role = {**preset.sampling, **{name: value for name, value in options.items() if name not in OWN_OPTIONS}}
    role = read_role(
        where, of_role, where=where, folder=folder or Path.cwd(), engines={} if engines is None else engines
    )
    name = str(own.get("name") or role.engine.identity.get("model") or of_role["engine"])
    return Judge(name=name, role=role, prompts=prompts, seed=own.get("seed", 0))


AnyJudge = TypeVar("AnyJudge", bound=Any)
"""A judge of pairs, or of single answers: a dataclass with `name` and `identity`."""


def check_judges(judges: Sequence[AnyJudge]) -> list[AnyJudge]:
    """Return judges with names of their own.

    Args:
        judges: the judges.

    Raises:
        ValueError: there are none, two are the same, or two have one name that was given.
    """
    if not judges:
        raise ValueError("a judgement needs at least one judge")
    for number, judge in enumerate(judges):
        if judge.identity in [each.identity for each in judges[:number]]:
            raise ValueError(
                f"two judges are the same ({judge.name}): give one another model, template or temperature, or, if they sample, another seed"
            )
    names = [judge.name for judge in judges]
    return [
        judge if names.count(judge.name) == 1 else dataclasses.replace(judge, name=f"{judge.name} {number}")
        for number, judge in enumerate(judges, 1)
    ]


def recipe_of(judges: Sequence[Any], start: Callable[..., Strategy], *, output: Path, seed: int = 0) -> Recipe:
    """Return the recipe under which `contralto.data_gen.pipeline` runs judges: a strategy and a role for each.

    Args:
        judges: each with a `name` of its own and a `role`.
        start: the strategy of a row, with the judge as the keyword `judge`: `judge_game`, or `rate_answer` of `ratings`.
        output: the folder of the store.
        seed: added to the seed of every request.
    """
    return Recipe(
        path=Path("contralto judge"),
        output=output,
        seed=seed,
        rows=RowSource(source="answers"),
        strategies=tuple(Use(name=each.name, start=partial(start, judge=each)) for each in judges),
        roles={each.name: each.role for each in judges},
        checks={},
        filters={},
        mapping={},
    )


def game_rows(games: Iterable[Game]) -> list[dict[str, Any]]:
    """Return the rows of games for `contralto.data_gen.pipeline`.

    Args:
        games: the games.
    """
    return [{"id": game.id, "prompt": [], "images": (), "game": game} for game in games]


def judge_game(row: Row, *, judge: Judge) -> Strategy:
    """Request a judge's opinion of a game in both orders; equal answers need none.

    Args:
        row: with `game`.
        judge: the judge.
    """
    game: Game = row["game"]
    if game.is_same:
        return Rejected("both answers are the same")
    prompt = judge.prompts.of(game)
    yield [
        Ask(
            role=judge.name,
            messages=prompt.messages(game, is_swapped=is_swapped),
            seed=judge.seed,
            tag="verdict",
            template=prompt.label,
        )
        for is_swapped in (False, True)
    ]
    return Rejected("judged")


def judgement_of(result: Result, judge: Judge) -> Judgement:
    """Return a judge's opinion of a game from the recorded replies.

    Args:
        result: of `judge_game`, as `replay` yields it.
        judge: the judge.
    """
    game: Game = result.row["game"]
    if game.is_same and not result.failed:
        return Judgement(game, (Vote(0.5), Vote(0.5)))
    if len(result.answered) < 2:
        reason = (result.failed or "not judged yet").removeprefix(f"{judge.name}: ")
        return Judgement(game, (None, None), failed=reason)
    first, swapped = (answer for _, answer in result.answered)
    votes = _vote(first, judge), _vote(swapped, judge)
    return Judgement(game, votes, (first.text, swapped.text), cut=first.is_cut + swapped.is_cut)


def _vote(reply: Answer, judge: Judge) -> Vote | None:
    return judge.prompts.verdict.read(reply.text) if is_readable(reply) else None
