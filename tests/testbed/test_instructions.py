"""Instructions are decided by their checks, and a revision passes the check that its answer failed."""

import pytest

from contralto.data_gen import templates
from contralto.data_gen.types import Ask, Failure, Sampling, make_request
from contralto.testbed.instructions import KINDS, judge, parse_instruction, prompts, revise, score, topics
from contralto.testbed.instructions.prompts import TOPICS

CUT = "Bees are small, busy insects. They make honey, and they live in hives. Bees also"
LIST = "1. Honey\n2. Wax, and more\n3. They"
ANSWERS = (
    CUT,
    LIST,
    "",
    "Bees",
    'I like "bees" a lot... Bees! bees and bees, bees-like',
    "* **Bees**: fly\n* They",
    CUT.upper(),
)
CASES = {
    "Use at most 8 words.": ("Bees are small and they make much honey.", "Bees are small and they do make much honey."),
    "Use at least 25 words.": ("bee " * 25, "bee " * 24),
    "Write exactly 2 sentence(s).": ("Bees fly. They make honey!", "Bees fly. They make honey! Not"),
    "Do not use any capital letter.": ("bees make honey.", "Bees make honey."),
    "USE ONLY CAPITAL LETTERS.": ("BEES MAKE HONEY.", "BEES MAKE HONEy."),
    "Give exactly 2 bullets (- ...).": ("- They fly\n- They sting", "- They fly\n- They sting\n- They rest"),
    "Write a list with the numbers 1. to 2. only.": ("1. They fly\n2. They sting", "1. They fly\n3. They sting"),
    'Answer with a JSON object whose only key is "reply".': (
        '{"reply": "They make honey."}',
        '{"answer": "They make honey."}',
    ),
    "Put the whole answer in double quotation marks.": ('"They make honey."', '"They" make honey.'),
    "Separate two paragraphs by the line ***.": ("They fly.\n***\nThey sting.", "They fly *** and sting."),
    "Put a title in << and >> first.": ("<<Bees>>\nThey make honey.", "They make <<honey>> here."),
    'The last words must be "Now you know."': ("They make honey. Now you know.", "Now you know. They make honey."),
    'The first word must be "Well".': ("Well, they make honey.", "They make honey well."),
    "End the answer with a question.": ("They make honey. Why not?", "Why not? They make honey."),
    "After the answer, write a P.S.": ("They make honey.\nP.S. They sting.", "P.S. They make honey."),
    'Use the word "river" in the answer.': ("They like a River bank.", "They like two rivers here."),
    'Use the word "bees" exactly 2 times.': ("Bees are bees, always.", "Bees are bees or bees."),
    'Do not use the word "bees".': ("A bee makes honey.", "The Bees make honey."),
    "Write without commas.": ("They fly and sting.", "They fly, and sting."),
    "Answer in Spanish, not in English.": (
        "Las abejas son muy buenas y viven en la casa.",
        "The bees are good and la miel.",
    ),
}


def test_every_kind_has_a_case():
    assert {parse_instruction(sentence).kind.name for sentence in CASES} == set(KINDS)


@pytest.mark.parametrize(("sentence", "answers"), CASES.items())
def test_checks(sentence, answers):
    instruction = parse_instruction(f"Describe bees. {sentence}")
    assert instruction.sentence == sentence
    assert [instruction.is_fulfilled(answer) for answer in answers] == [True, False]
    assert instruction.revised(answers[0]) == answers[0]
    assert not instruction.is_fulfilled("")


def test_prompts_are_parsed_and_revisions_pass():
    seen = set()
    for split in ("train", "dev", "test"):
        for row in prompts(count=120, seed=3, split=split):
            instruction = parse_instruction(row["prompt"])
            assert instruction.kind.name == row["kind"]
            seen.add(instruction.sentence)
            for answer in ANSWERS if instruction.kind.revise else ():
                revision = instruction.revised(answer)
                assert revision is not None, (row, answer)
                assert instruction.is_fulfilled(revision)
    assert len(seen) > 60


def test_splits_share_no_topic_and_prompts_differ():
    found = [set(topics(split)) for split in ("train", "dev", "test")]
    assert not found[0] & found[1]
    assert not found[2] & (found[0] | found[1])
    assert set.union(*found) == set(TOPICS)
    assert len(TOPICS) == len(set(TOPICS))
    rows = list(prompts(count=400, split="test"))
    assert len({(row["kind"], row["prompt"].partition(".")[0]) for row in rows}) > 350
    assert len({row["id"] for row in rows}) == 400
    assert rows == list(prompts(count=400, split="test"))


def _request(template, **fields):
    prompt = templates.load(template, *fields).render(**fields)
    ask = Ask(role="reviser", messages=templates.user_messages(prompt))
    return make_request(ask, engine={}, sampling=Sampling(), seed=0, row="1")


def test_the_roles_of_a_recipe():
    task = "Describe bees. Write without commas."
    reply = revise(_request("clair", task=task, student_solution="They fly, and sting."))
    assert reply.endswith("{corrected_student_solution}: They fly and sting.")
    german = revise(
        _request("clair", task="Describe bees. Answer in German, not in English.", student_solution="They fly.")
    )
    assert isinstance(german, Failure)
    good, bad = "They fly and sting.", "They fly, and sting."
    for first, second, verdict in ((good, bad, "A"), (bad, good, "B"), (bad, bad, "tie"), (good, good, "tie")):
        assert judge(_request("judge", task=task, first=first, second=second)) == f"Verdict: {verdict}"
    assert score({"id": "1", "prompt": templates.user_messages(task)}, [bad, good]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must lie between 1 and"),
        ({"split": "all"}, "split must be one of train, dev, test"),
        ({"kinds": ["rhyme"]}, "there is no kind 'rhyme'"),
        ({"kinds": []}, "there is no kind 'none'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        next(prompts(**arguments))


def test_a_prompt_without_an_instruction_is_rejected():
    with pytest.raises(ValueError, match=r"no instruction of the testbed is in 'Describe bees\.'"):
        parse_instruction("Describe bees.")
