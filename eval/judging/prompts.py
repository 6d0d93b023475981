"""Prompts of judges: packaged templates, templates of the user, and published files as they are.

| file | form |
|---|---|
| a packaged name, or `.txt` with Jinja | fields `task`, `first`, `second`, and `reference` |
| `.jsonl` | FastChat's `judge_prompts.jsonl`: the pairwise prompts for one turn and two, with and without a reference |
| `.yaml` | Arena-Hard's configuration: `system_prompt`, `prompt_template` |
| `.txt` with `<|im_start|>` | AlpacaEval's prompts in ChatML |

Published files keep their text to the letter; only their fields are filled in, whatever braces the answers contain.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's file is a ValueError like any other mistake in it)

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import read_json_lines, read_text
from contralto.common.hashing import content_digest
from contralto.common.suggestions import did_you_mean
from contralto.common.yaml_file import parse_yaml
from contralto.data_gen import templates
from contralto.eval.judging.games import Game
from contralto.eval.judging.verdicts import VERDICTS, VerdictForm

__all__ = ["PACKAGED", "JudgePrompt", "PromptSet", "load_prompts"]

PACKAGED = {
    "judge": "letters",
    "con_j": "better",
    "con_j_paper": "better",
    "judge_alpaca_eval": "identifier",
    "judge_arena_hard": "five",
    "judge_mt_bench": "letters",
}
"""The packaged templates with the forms of their verdicts."""
TEMPLATES = Path(__file__).parent / "templates"
REFERENCE = "_reference"
"""The end of the name of a packaged template for questions with a reference answer."""
FIELDS = {
    **dict.fromkeys(("question", "QUESTION", "instruction", "question_1"), ("question", 0)),
    "question_2": ("question", 1),
    **dict.fromkeys(("answer_a", "ANSWER_A", "answer_1", "output_1", "answer_a_1"), ("first", 0)),
    "answer_a_2": ("first", 1),
    **dict.fromkeys(("answer_b", "ANSWER_B", "answer_2", "output_2", "answer_b_1"), ("second", 0)),
    "answer_b_2": ("second", 1),
    **dict.fromkeys(("ref_answer_1", "REFERENCE"), ("reference", 0)),
    "ref_answer_2": ("reference", 1),
}
"""Fields of published pairwise prompts, with the text and the turn that fill them in."""
_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")


class JudgePrompt(NamedTuple):
    """A prompt of a judge."""

    label: str
    """Name and version, a part of the key of every request."""
    system: str
    user: str
    is_published: bool
    """True if the fields are written `{field}`, as in published files; False for Jinja."""
    has_turns: bool = False
    """True if the prompt has places for two turns."""
    has_reference: bool = False

    def messages(self, game: Game, *, is_swapped: bool) -> list[dict[str, Any]]:
        """Return the messages of a request.

        Args:
            game: the game.
            is_swapped: show the second system's answer first.
        """
        first, second = (game.second, game.first) if is_swapped else (game.first, game.second)
        texts = {"question": game.turns, "first": first, "second": second, "reference": game.references}
        if self.is_published:
            user = _FIELD.sub(lambda field: _turn(texts, *FIELDS[field[1]], has_turns=self.has_turns), self.user)
        else:
            values = {"task": texts["question"], "first": first, "second": second}
            values |= {"reference": game.references} if self.has_reference else {}
            template = templates.Template(self.label.partition("@")[0], self.user)
            user = template.render(**{name: _joined(turns) for name, turns in values.items()})
        return [{"role": "system", "content": self.system}] * bool(self.system) + templates.user_messages(user)


def _turn(texts: Mapping[str, Sequence[str]], name: str, at: int, *, has_turns: bool) -> str:
    """Return a turn of a text; a prompt without places for turns shows all of them in the first place."""
    turns = texts[name]
    return turns[at] if has_turns and at < len(turns) else _joined(turns) if not at else ""


def _joined(turns: Sequence[str]) -> str:
    """Return the texts of several turns as one.

    Examples:
        >>> _joined(["Why?"]), _joined(["Why?", "Sure?"])
        ('Why?', '[Turn 1]\\nWhy?\\n\\n[Turn 2]\\nSure?')
    """
    if len(turns) == 1:
        return turns[0]
    return "\n\n".join(f"[Turn {number}]\n{text}" for number, text in enumerate(turns, 1))


class PromptSet(NamedTuple):
    """The prompts of a judge, and the form of its verdicts."""

    name: str
    prompts: tuple[JudgePrompt, ...]
    verdict: VerdictForm

    def of(self, game: Game) -> JudgePrompt:
        """Return the prompt for a game: the one with places for what the game has, as far as there is one.

        Args:
            game: the game.
        """
        wanted = (len(game.turns) == len(game.first) > 1, bool(game.references))
        return max(self.prompts, key=lambda p: (p.has_reference == wanted[1]) + 2 * (p.has_turns == wanted[0]))


def load_prompts(name: str, *, verdict: str | None = None) -> PromptSet:
    """Load the prompts of a judge.

    Args:
        name: a packaged template, or the path of a file; the module lists their forms.
        verdict: the form of the verdicts, a name of `VERDICTS`; None is that of the template, and `letters` for a Jinja file.

    Raises:
        OSError: there is no such file.
        ValueError: there is no such template, `.txt` file or form, or a file has no pairwise prompt.

    Examples:
        >>> load_prompts("judge_arena_hard").verdict.name
        'five'
    """
    suffix = Path(name).suffix
    if suffix == ".jsonl":
        prompts, form = _fastchat(Path(name)), "letters"
    elif suffix in (".yaml", ".yml"):
        prompts, form = _arena_hard(Path(name))
    elif suffix == ".txt" and Path(name).is_file() and "<|im_start|>" in (text := read_text(name)):
        prompts, form = [_published(Path(name).stem, *_chat_ml(text, name), name)], "identifier"
    else:
        prompts, form = _jinja(name), PACKAGED.get(name, "letters")
    return PromptSet(Path(name).stem, tuple(prompts), VERDICTS.get(verdict or form))


def _jinja(name: str) -> list[JudgePrompt]:
    """Return the prompts of a packaged template or a file of the user."""
    if name.endswith(".txt"):
        return [_of_file(name)]
    own = sorted(file.stem for file in TEMPLATES.glob("*.txt"))
    if name in own:
        return [_of_file(str(TEMPLATES / f"{each}.txt")) for each in (name, f"{name}{REFERENCE}") if each in own]
    if name not in PACKAGED:
        raise ValueError(
            f"there is no template {name!r}{did_you_mean(name, PACKAGED)}: give a file of prompts, or one of {', '.join(PACKAGED)}"
        )
    return [_of_template(templates.load(name, "task", "first", "second"), has_reference=False)]


def _of_file(name: str) -> JudgePrompt:
    """Return the prompt of a Jinja file, with a field for a reference answer or without."""
    has_reference = Path(name).is_file() and re.search(r"\{\{[^}]*\breference\b", read_text(name)) is not None
    fields = ("task", "first", "second", *(("reference",) if has_reference else ()))
    return _of_template(templates.load(name, *fields), has_reference=has_reference)


def _of_template(template: templates.Template, *, has_reference: bool) -> JudgePrompt:
    return JudgePrompt(template.label, "", template.text, is_published=False, has_reference=has_reference)


def _published(name: str, system: str, user: str, where: str) -> JudgePrompt:
    """Return a published prompt, whose fields must be known ones."""
    fields = [FIELDS[field] for field in _FIELD.findall(user)]
    if missing := [part for part in ("question", "first", "second") if part not in [each for each, _ in fields]]:
        raise ValueError(
            f"{where}: the prompt {name!r} has no field for the {' and the '.join(missing)} answer or question"
        )
    return JudgePrompt(
        f"{name}@{content_digest(system + chr(0) + user, 12)}",
        system,
        user,
        is_published=True,
        has_turns=("first", 1) in fields,
        has_reference=("reference", 0) in fields,
    )


def _fastchat(path: Path) -> list[JudgePrompt]:
    """Return the pairwise prompts of FastChat's file, the newest version of each kind."""
    prompts: dict[tuple[bool, bool], JudgePrompt] = {}
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        if not isinstance(row, Mapping) or not {"name", "type", "system_prompt", "prompt_template"} <= {*row}:
            raise ValueError(f"{where}: a prompt of FastChat has name, type, system_prompt and prompt_template")
        if row["type"] == "pairwise" and row.get("output_format", "[[A]]") == "[[A]]":
            prompt = _published(row["name"], row["system_prompt"], row["prompt_template"], where)
            prompts[prompt.has_turns, prompt.has_reference] = prompt
    if not prompts:
        raise ValueError(f"{path} has no prompt of type pairwise with verdicts [[A]], [[B]], [[C]]")
    return list(prompts.values())


def _arena_hard(path: Path) -> tuple[list[JudgePrompt], str]:
    """Return the prompt of Arena-Hard's configuration, and the form of its verdicts."""
    config = parse_yaml(read_text(path), str(path))
    user = config.get("prompt_template") if isinstance(config, Mapping) else None
    user = user[0] if isinstance(user, list) and len(user) == 1 else user
    if not isinstance(user, str):
        raise ValueError(f"{path}: a configuration of Arena-Hard has prompt_template, a text")
    system = config.get("system_prompt")
    if not isinstance(system, str):
        raise ValueError(
            f"{path}: it has no system_prompt (v2 keeps it in utils/judge_utils.py): copy that text into the file as system_prompt"
        )
    form = "letters" if config.get("regex_pattern") and "<" not in str(config["regex_pattern"]) else "five"
    return [_published(path.stem, system, user, str(path))], form


def _chat_ml(text: str, where: str) -> tuple[str, str]:
    """Return the system and the user message of a prompt in ChatML."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", text, flags=re.DOTALL)
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{where}: a prompt in ChatML must have a user message, and before it at most a system message"
        )
    return (turns[0][1] if len(turns) == 2 else ""), turns[-1][1]
