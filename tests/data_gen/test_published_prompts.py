"""Published prompts among the templates: to the letter, with their licence, and in use."""

from importlib import resources

import pytest

from contralto.common.hashing import content_digest
from contralto.data_gen import templates
from contralto.data_gen.strategies.clair import clair
from contralto.data_gen.strategies.con_j import con_j, parse_better
from contralto.data_gen.types import Answer, drive

PUBLISHED = {
    "clair_paper": (
        ("task", "student_solution"),
        "MIT License",
        "9216066f17fe3bdd2a9e2f5d41c65b2d42937d4106a9cf04a705269c35b745d7",
    ),
    "con_j_paper": (
        ("task", "first", "second"),
        "Apache License, Version 2.0",
        "24ef54e8675f87eb389150e58202c1e13237f354f02b6a41a10f251978b7b4b2",
    ),
}
"""The fields, the licence, and the SHA-256 of the published text, with `<field>` in the place of each field."""
ROW = {"id": "r1", "prompt": [{"role": "user", "content": "Why is the sky {blue}?"}]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_prompt_is_unaltered_and_names_its_licence(name):
    fields, licence, digest = PUBLISHED[name]
    text = templates.load(name, *fields).render(**{field: f"<{field}>" for field in fields})
    assert content_digest(text) == digest
    file = (resources.files("contralto.data_gen") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    notice, _, prompt = file.partition("#}")
    assert licence in notice
    assert "https://github.com/" in notice
    assert "License" not in prompt


def test_clair_asks_with_the_published_prompt():
    driven = drive(clair(ROW, template="clair_paper"))
    next(driven)
    (ask,) = driven.send([Answer(text="It mirrors the sea.")])
    text = ask.messages[0]["content"]
    assert text.startswith("You are a teacher and your task is to minimally improve a student's answer.")
    assert (
        "\n\n{task}: Why is the sky {blue}?\n\n{student_solution}: It mirrors the sea.\n\n-----------------\n\n" in text
    )
    with pytest.raises(StopIteration) as end:
        driven.send([Answer(text="{teacher_reasoning}: No.\n\n{corrected_student_solution}: Air scatters blue.")])
    assert end.value.value[0].chosen == "Air scatters blue."


def test_con_j_asks_with_the_published_prompt_and_reads_its_verdicts():
    replies = ['{"原因": "一", "更好的回答": 1}', '{"原因": "二", "更好的回答": 2}']
    driven = drive(con_j({**ROW, "chosen": "air", "rejected": "sea"}, n=2, template="con_j_paper"))
    asks = next(driven)
    assert "问题：Why is the sky {blue}?\n回答1：" in asks[0].messages[0]["content"]  # noqa: RUF001
    with pytest.raises(StopIteration) as end:
        driven.send([Answer(text=reply) for reply in replies])
    (pair,) = end.value.value
    assert {pair.chosen, pair.rejected} == set(replies)
    assert parse_better(pair.chosen) == pair.columns["better"]


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ('{"原因": "二者", "更好的回答": 2}', 2),
        ("更好的回答：回答1", 1),  # noqa: RUF001
        ("{更好的回答: 1}", 1),
        ('"更好的回答": 12', None),
        ("更好的回答在哪里", None),
    ],
)
def test_verdicts_in_chinese(text, better):
    assert parse_better(text) == better
