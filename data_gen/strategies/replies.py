"""List the requests of strategies to roles, and the form of the replies that they read, for functions in place of models.

The table of `docs/guides/data_recipes.md` is made of `REPLIES`, and a test runs every strategy with its examples.
"""

from typing import NamedTuple

__all__ = ["BETTER", "REPLIES", "VERDICT", "Reply"]

VERDICT = 'a last line "Verdict: A", "Verdict: B" or "Verdict: tie"'
"""The verdict of a judge, for errors."""
BETTER = '"better": 1 or "better": 2'
"""The verdict in a judgement of Con-J, for errors."""


class Reply(NamedTuple):
    """A kind of request to a role, and the reply that strategies can read."""

    roles: tuple[str, ...]
    """The roles that answer such requests, by their default names."""
    request: str
    """The text of the last message of the request."""
    reply: str
    """The form of the reply."""
    example: str
    """A reply that is read."""
    tags: tuple[str, ...]
    """The values of `Ask.tag` of such requests, with the templates of contralto."""


REPLIES: tuple[Reply, ...] = (
    Reply(
        roles=(
            *("target", "first", "second", "stronger", "teacher", "student"),
            *("larger", "smaller", "higher", "lower"),
        ),
        request="the prompt of the row; for `prefix` and `demonstration` within a template; for `refine` the request to improve the "
        "answer before it",
        reply="the answer, as it is",
        example="The sky is blue, since air scatters blue light more.",
        tags=(
            *("answer", "refined", "prefix_good", "prefix_bad"),
            *("demonstration_good", "demonstration_bad"),
        ),
    ),
    Reply(
        roles=("target",),
        request="of `elicitive`: the prompt of the row within a template",
        reply="the answer under the heading `{answer}:`, after thoughts under `{thought}:`, which may be missing",
        example="{thought}:\nName the cause.\n{answer}:\nAir scatters blue light more.",
        tags=("elicitive_good", "elicitive_bad"),
    ),
    Reply(
        roles=("reviser",),
        request="of `clair`: the prompt of the row after `{task}:`, the answer between `{student_solution}:` and a line of dashes",
        reply="the revision under the heading `{corrected_student_solution}:` (with `worsen: true`, `{worsened_student_solution}:`), after "
        "a rationale under `{teacher_reasoning}:`, which may be missing",
        example="{teacher_reasoning}:\nA word is missing.\n{corrected_student_solution}:\nAir scatters blue light more.",
        tags=("revision",),
    ),
    Reply(
        roles=("judge",),
        request="the prompt of the row after `[Task]`, the answers between `[Answer of A]` and `[End of the answer of A]`, `[Answer of B]` "
        "and `[End of the answer of B]`; each pair comes twice, the second time with the answers exchanged",
        reply="a text whose last line is `Verdict: A`, `Verdict: B` or `Verdict: tie`; `[[A]]` and a last line `A` are read, too",
        example="A names the cause.\nVerdict: A",
        tags=("verdict",),
    ),
    Reply(
        roles=("scorer",),
        request="of `best_of_n` and `mono_system` without a function: the messages of the row, and as the last one the answer",
        reply="a number as a text, nothing else; higher is better",
        example="0.5",
        tags=("score",),
    ),
    Reply(
        roles=("target",),
        request="of `con_j`: `Question:`, `Answer 1:` and `Answer 2:`, each with its text; the last requests have a hint",
        reply='a text that holds `"better": 1` or `"better": 2`',
        example='{"reason": "It names the cause.", "better": 1}',
        tags=("judgement", "hinted"),
    ),
    Reply(
        roles=("rewriter",),
        request="of `mvc`: both captions, after `Image 1:` and `Image 2:`; the second request has the question and the answer, too",
        reply="first `{question}:` and `{answer}:`, each with its text, then `{answer}:` alone",
        example="{question}:\nWhat is on the left?\n{answer}:\nA ball is on the left.",
        tags=("mvc_describe", "mvc_contrast"),
    ),
    Reply(
        roles=("teacher",),
        request="of `c_rag`: the prompt of the row after `{question}:`, the passages after `{passages}:`, each after its number, such as `[1]`",
        reply="a line for each passage under `{contrast}:`, such as `[1] relevant: ...`, an argument under `{explanation}:`, and the answer under "
        "`{answer}:`",
        example="{contrast}:\n[1] relevant: it names the cause.\n{explanation}:\nBlue light is scattered more [1].\n{answer}:\nscattering",
        tags=("demonstration",),
    ),
    Reply(
        roles=("teacher", "student"),
        request="of `qcrd`: the prompt of the row, for the teacher after `{task}:`",
        reply="an explanation under `{rationale}:` and the answer under `{answer}:`; of the student the explanation alone, as it is",
        example="{rationale}:\nAir scatters short waves more.\n{answer}:\nscattering",
        tags=("rationale",),
    ),
)
"""All kinds of requests."""
