"""Strategies that compare answers of the target model with each other, or with those of a stronger model."""

from contralto.data_gen.strategies.shared import ask_prompt, make_pair, sample_answers
from contralto.data_gen.strategies.verdicts import judged_pair, load_judge_template
from contralto.data_gen.types import Row, Sampling, Strategy

__all__ = ["on_policy_judge", "stronger_preferred", "teacher_student"]


def on_policy_judge(row: Row, *, target: str = "target", judge: str = "judge", template: str = "judge") -> Strategy:
    """Let a judge decide between two answers of the target: y_w, y_l ~ M(x) (arXiv 2408.06266, the baseline "on-policy judge").

    The judge reads the answers in both orders. There is no pair if its verdicts differ, or one is a tie or cannot be read.

    Args:
        row: the row.
        target: the role that answers twice.
        judge: the role that judges.
        template: of the judge.
    """
    load_judge_template(template)
    answers = yield sample_answers(row, target, 2)
    pair = yield from judged_pair(row, answers, "on_policy_judge", judge=judge, template=template)
    return pair


def stronger_preferred(row: Row, *, target: str = "target", stronger: str = "stronger") -> Strategy:
    """Prefer a stronger model's answer to the target's: y_l = M(x), y_w = Stronger(x) (arXiv 2408.06266, "stronger preferred").

    That the stronger model's answer is better is not checked; `verify_direction` does that.

    Args:
        row: the row.
        target: the role of the rejected answer.
        stronger: the role of the chosen answer.

    Examples:
        >>> from contralto.data_gen.types import Answer
        >>> requests = stronger_preferred({"id": "1", "prompt": [{"role": "user", "content": "2 + 2?"}]})
        >>> [ask.role for ask in next(requests)]
        ['target', 'stronger']
        >>> try:
        ...     requests.send([Answer(text="5"), Answer(text="4")])
        ... except StopIteration as end:
        ...     print(end.value.chosen, end.value.rejected)
        4 5
    """
    weak, strong = yield [ask_prompt(row, target), ask_prompt(row, stronger)]
    return make_pair(row, strong, weak, "stronger_preferred")


def teacher_student(
    row: Row,
    *,
    teacher: str = "teacher",
    student: str = "student",
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
) -> Strategy:
    """Prefer the teacher's answer to the student's, the data of DistiLLM-2 (Ko et al. 2025, arXiv 2503.07067, algorithm 1).

    The sampling is that of the released code. The released script joins both answers by the text of the prompt and loses
    those that do not match; here both belong to one row.

    Args:
        row: the row.
        teacher: the role of the chosen answer.
        student: the role of the rejected answer.
        temperature: of both.
        top_p: of both.
        max_new_tokens: of both.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    taught, learned = yield [ask_prompt(row, role, sampling=sampling) for role in (teacher, student)]
    return make_pair(row, taught, learned, "teacher_student")
