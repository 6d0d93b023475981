"""Problems of the arithmetic world as rows for recipes, with a reviser, a judge and a scorer that know the answers.

A recipe names these functions: `rows: {source: "contralto.testbed.questions:problems"}` (or `:scene_pairs`, for `mvc`), a role with `engine: function` and
`use: contralto.testbed.questions:revise`, a `scorer: contralto.testbed.questions:score`. `examples/clair_testbed.yaml` does.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from contralto.data_gen import templates
from contralto.data_gen.types import Request, Row
from contralto.testbed import worlds
from contralto.testbed.worlds import Problem, Split

__all__ = ["judge", "problem_of", "problems", "revise", "scene_pairs", "score"]


def problems(
    *, count: int = 100, seed: int = 0, split: Split = "train", steps: Sequence[int] | None = None
) -> Iterator[Row]:
    """Yield word problems as rows with `id`, `prompt`, `answer` (the number) and `steps` (their number).

    Args:
        count: the number of rows.
        seed: of the world.
        split: `train`, `dev` or `test`; a problem belongs to one split, whatever the seed.
        steps: the numbers of steps of the problems; None is all.

    Raises:
        ValueError: `count` is below 1, there is no such split, or no problem has these numbers of steps.
    """
    _check_split(count, split)
    if steps is not None and not set(steps) & set(worlds.STEP_WEIGHTS):
        raise ValueError(f"steps must name some of {', '.join(map(str, worlds.STEP_WEIGHTS))}, not {list(steps)}")
    wanted = (p for p in worlds.problems(seed, split) if steps is None or len(p.steps) in steps)
    for number, problem in enumerate(islice(wanted, count)):
        yield {
            "id": f"{split}-{seed}-{number}",
            "prompt": problem.question,
            "answer": problem.totals[-1],
            "steps": len(problem.steps),
        }


def scene_pairs(*, count: int = 100, seed: int = 0, split: Split = "train") -> Iterator[Row]:
    """Yield rows for `mvc`: a drawn scene, the same scene with one object replaced, and a caption of each.

    Args:
        count: the number of rows.
        seed: of the world.
        split: `train`, `dev` or `test`.

    Raises:
        ValueError: `count` is below 1, or there is no such split.
    """
    from contralto.testbed import scenes

    _check_split(count, split)
    for number, scene in enumerate(islice(scenes.scenes(seed, split), count)):
        rng = random.Random(f"{seed} {number}")
        at, new = rng.randrange(len(scene.things)), rng.choice([o for o in scenes.OBJECTS if o not in scene.objects])
        things = [thing._replace(name=new) if i == at else thing for i, thing in enumerate(scene.things)]
        other = scene._replace(things=tuple(things))
        captions = [scenes.caption(each.place, each.objects) for each in (scene, other)]
        yield {
            "id": f"scene-{split}-{seed}-{number}",
            "prompt": scenes.DESCRIBE,
            "images": [scene.image(), other.image()],
            "caption": captions[0],
            "contrast_caption": captions[1],
        }


def _check_split(count: int, split: str) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be train, dev or test, not {split!r}")


_QUESTION = re.compile(
    r"(?P<name>\w+) has (?P<start>\d+) (?P<thing>\w+)\.(?P<aside> \w+ has \d+ \w+\.)? (?:He|She) (?P<steps>[^.?]+)\. How many"
)


def problem_of(text: str) -> Problem:
    """Parse the problem in a text.

    Args:
        text: a text with a problem of the testbed.

    Raises:
        ValueError: there is none.

    Examples:
        >>> problem_of("Mia has 9 coins. She finds 4, loses 2. How many coins does Mia have?").totals
        [9, 13, 11]
    """
    match = _QUESTION.search(text)
    if match is None:
        raise ValueError(f"no word problem of the testbed is in {text[:80]!r}")
    steps = tuple((verb, int(operand)) for verb, operand in re.findall(r"(\w+) (\d+)", match["steps"]))
    return Problem(match["name"], match["thing"], int(match["start"]), steps, match["aside"] or "")


# ------------------------------------------------------------------------------------------------------------------ roles


def revise(request: Request) -> str:
    """Correct the solution in a prompt of the template `clair`, as a reviser.

    Correct steps stay word for word; the others, and missing ones, are written in the style of the solution.

    Args:
        request: the request of the role.

    Raises:
        ValueError: the prompt holds no task or no solution.
    """
    parts = templates.sections(_prompt(request), "task", "student_solution")
    if not {"task", "student_solution"} <= parts.keys():
        raise ValueError(
            "the testbed's reviser reads prompts of the template clair, with {task}: and {student_solution}:"
        )
    solution = parts["student_solution"].partition("-----")[0].strip()
    problem = problem_of(parts["task"])
    corrected = _corrected(problem, solution)
    right, steps = _right_steps(problem, solution), len(problem.steps)
    reasoning = f"{right} of {steps} steps are right, and the answer is {problem.totals[-1]}."
    return f"{{teacher_reasoning}}: {reasoning}\n\n{{corrected_student_solution}}: {corrected}"


def _corrected(problem: Problem, solution: str) -> str:
    style: worlds.Style = "brief" if ", so " in solution and " = " not in solution else "ledger"
    lines = []
    for at, written in enumerate(_lines(problem, style)):
        others = [_lines(problem, other)[at] for other in ("ledger", "brief")]
        lines.append(next((line for line in others if line in solution), written))
    return " ".join([*lines, f"#### {problem.totals[-1]}"])


def _lines(problem: Problem, style: worlds.Style) -> list[str]:
    """Return the steps of the correct solution, each a sentence."""
    return re.findall(r"\S[^.]*\.", problem.solution(style).partition("####")[0])


def _right_steps(problem: Problem, solution: str) -> int:
    """Return the number of correct steps at the beginning of a solution."""
    right = 0
    for ledger, brief in zip(_lines(problem, "ledger"), _lines(problem, "brief"), strict=True):
        if ledger not in solution and brief not in solution:
            break
        right += 1
    return right


def judge(request: Request) -> str:
    """Prefer the answer with the higher `score` in a prompt of the template `judge`, in either position.

    Args:
        request: the request of the role.

    Raises:
        ValueError: the prompt holds no task or not two answers.
    """
    prompt = _prompt(request)
    answers = [re.search(rf"\[Answer of {x}\]\n(.*?)\n\[End of the answer of {x}\]", prompt, re.DOTALL) for x in "AB"]
    task = re.search(r"\[Task\]\n(.*?)\n\n\[Answer of A\]", prompt, re.DOTALL)
    if task is None or None in answers:
        raise ValueError(
            "the testbed's judge reads prompts of the template judge, with a task and the answers of A and B"
        )
    problem = problem_of(task[1])
    first, second = (_quality(problem, answer[1]) for answer in answers if answer)
    verdict = "tie" if first == second else "A" if first > second else "B"
    return f"Of A {first:.2f} is right, of B {second:.2f}.\nVerdict: {verdict}"


def score(row: Row, answers: Sequence[str]) -> list[float]:
    """Score answers: 1 for the correct number at the end, plus the share of correct steps at the beginning.

    Args:
        row: with `prompt`.
        answers: the answers.

    Examples:
        >>> row = {"prompt": [{"role": "user", "content": "Mia has 9 coins. She finds 4, loses 2. How many coins does Mia have?"}]}
        >>> score(row, ["finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. #### 11", "finds 4: 9 + 4 = 13. #### 13"])
        [2.0, 0.5]
    """
    problem = problem_of(templates.as_text(row["prompt"]))
    return [_quality(problem, answer) for answer in answers]


def _quality(problem: Problem, solution: str) -> float:
    is_right = worlds.answer(solution) == problem.totals[-1]
    return is_right + _right_steps(problem, solution) / len(problem.steps)


def _prompt(request: Request) -> str:
    return request.prompt if request.messages is None else templates.as_text(request.messages)  # type: ignore[return-value]
