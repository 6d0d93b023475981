"""A reviser, a judge and a scorer that know whether an answer fulfils its instruction, for recipes of `contralto data`."""

import re
from collections.abc import Sequence

from contralto.data_gen import templates
from contralto.data_gen.types import Failure, Request, Row
from contralto.testbed.instructions.kinds import parse_instruction

__all__ = ["judge", "revise", "score"]


def revise(request: Request) -> str | Failure:
    """Return the smallest revision that fulfils the instruction, as a reviser replies to the template `clair`.

    An answer that fulfils it comes back as it is, which the filter `no_op` drops.

    Args:
        request: the request of the role; a failure if a program cannot revise answers of this kind.

    Raises:
        ValueError: the prompt holds no task, no solution or no instruction.
    """
    parts = templates.sections(_prompt(request), "task", "student_solution")
    if not {"task", "student_solution"} <= parts.keys():
        raise ValueError("the reviser reads prompts of the template clair, with {task}: and {student_solution}:")
    instruction = parse_instruction(parts["task"])
    solution = re.split(r"(?m)^-{9,}$", parts["student_solution"])[0].strip()
    revision = instruction.revised(solution)
    if revision is None:
        return Failure(f"a program cannot revise answers to instructions of the kind {instruction.kind.name}")
    return f"{{teacher_reasoning}}: {instruction.sentence}\n\n{{corrected_student_solution}}: {revision}"


def judge(request: Request) -> str:
    """Prefer the answer that fulfils the instruction, as a judge replies to the template `judge`; a tie if both or none do.

    Args:
        request: the request of the role.

    Raises:
        ValueError: the prompt holds no task, no instruction or not two answers.
    """
    prompt = _prompt(request)
    answers = [re.search(rf"\[Answer of {x}\]\n(.*?)\n\[End of the answer of {x}\]", prompt, re.DOTALL) for x in "AB"]
    task = re.search(r"\[Task\]\n(.*?)\n\n\[Answer of A\]", prompt, re.DOTALL)
    if task is None or None in answers:
        raise ValueError("the judge reads prompts of the template judge, with a task and the answers of A and B")
    instruction = parse_instruction(task[1])
    first, second = (instruction.is_fulfilled(answer[1]) for answer in answers if answer)
    return f"Verdict: {'tie' if first == second else 'A' if first else 'B'}"


def score(row: Row, answers: Sequence[str]) -> list[float]:
    """Score answers: 1 for one that fulfils the instruction of the prompt, 0 for others.

    Args:
        row: with `prompt`.
        answers: the answers.

    Examples:
        >>> row = {"prompt": [{"role": "user", "content": "Describe bees. Write without commas."}]}
        >>> score(row, ["Bees are small and busy.", "Bees are small, and busy."])
        [1.0, 0.0]
    """
    instruction = parse_instruction(templates.as_text(row["prompt"]))
    return [float(instruction.is_fulfilled(answer)) for answer in answers]


def _prompt(request: Request) -> str:
    return request.prompt if request.messages is None else templates.as_text(request.messages)  # type: ignore[return-value]
