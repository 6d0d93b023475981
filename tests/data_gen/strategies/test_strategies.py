"""Strategies driven step by step: their requests, their pairs, and rejected settings."""

import inspect
import re

import pytest

from contralto.data_gen import templates
from contralto.data_gen.checks.models import image_similarity
from contralto.data_gen.scorers import chrf, resolve_scorer
from contralto.data_gen.strategies import STRATEGIES, popalign
from contralto.data_gen.strategies.best_of_n import best_of_n
from contralto.data_gen.strategies.c_rag import c_rag
from contralto.data_gen.strategies.clair import clair, parse_revision
from contralto.data_gen.strategies.con_j import con_j, parse_better
from contralto.data_gen.strategies.images import mvc
from contralto.data_gen.strategies.judge import off_policy_judge, verify_direction
from contralto.data_gen.strategies.on_policy import on_policy_judge, stronger_preferred, teacher_student
from contralto.data_gen.strategies.qcrd import qcrd
from contralto.data_gen.strategies.replies import REPLIES, VERDICT
from contralto.data_gen.strategies.translation import mono_system
from contralto.data_gen.strategies.verdicts import compare_answers, parse_verdict
from contralto.data_gen.types import Answer, Ask, Labelled, Pair, Rejected, Request, Sampling, drive
from contralto.testbed import questions as world

ROW = {"id": "r1", "prompt": [{"role": "user", "content": "Why is the sky blue?"}], "images": ()}


def run(strategy, answer):
    """Drive a strategy with `answer(ask)`, a text or an `Answer`; what it made, and all it asked."""
    driven, asked, given = drive(strategy), [], None
    try:
        while True:
            asks = driven.send(given)
            asked += asks
            said = [answer(ask) for ask in asks]
            given = [text if isinstance(text, Answer) else Answer(text=text) for text in said]
    except StopIteration as end:
        return end.value, asked


def by_role(**texts):
    return lambda ask: texts[ask.role]


def judging(better):
    """A judge that prefers the answer holding this text, wherever it stands."""

    def answer(ask):
        text = ask.messages[-1]["content"]
        if ask.role != "judge":
            raise AssertionError(ask)
        first = text[text.index("[Answer of A]") : text.index("[End of the answer of A]")]
        return f"Because. Verdict: {'A' if better in first else 'B'}"

    return answer


def test_replies_to_roles_are_listed_with_their_form():
    """Every strategy runs to its end with the examples of the documentation, and asks no role that is not listed."""
    by_tag = {tag: reply for reply in REPLIES for tag in reply.tags}
    row = {**ROW, "chosen": "one", "rejected": "two", "caption": "a", "contrast_caption": "b"}
    row |= {"passages": ["Air scatters light."], "answers": "scattering"}
    asked = []
    for name in STRATEGIES.names():
        if not (strategy := STRATEGIES.get(name)).__module__.startswith("contralto."):
            continue
        own = {**row, "images": ("1.png", "2.png")} if name == "mvc" else row
        judged = {"judge": "judge"} if "judge" in inspect.signature(strategy).parameters else {}
        made, asks = run(strategy(own, **judged), lambda ask: by_tag[ask.tag].example)
        asked += asks
        reasons = [each.reason for each in made if isinstance(each, Rejected)]
        assert not [reason for reason in reasons if re.search("has no|nothing under|must", reason)], name
    for reply in REPLIES:
        texts = [ask.messages[-1]["content"] for ask in asked if ask.tag in reply.tags]
        for marker in re.findall(r"`([\[{A-Z][^`]*)`", reply.request):
            assert any(marker in text for text in texts), marker
    assert {reply.roles: {ask.role for ask in asked if ask.tag in reply.tags} for reply in REPLIES} == {
        reply.roles: set(reply.roles) for reply in REPLIES
    }


def test_a_scoring_role_must_reply_with_numbers():
    answers = lambda ask: "good" if ask.role == "scorer" else str(ask.seed)
    with pytest.raises(
        ValueError, match="the role 'scorer' must reply with a finite number and nothing else, not 'good', 'good'"
    ):
        run(best_of_n(ROW, n=2), answers)


# -------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Verdict: A", "A"),
        ("verdict: B.", "B"),
        ("**Verdict:** B", "B"),
        ("**Verdict: A**", "A"),
        ('"Verdict: A"', "A"),
        ("Verdict: [[B]]", "B"),
        ("Verdict: Answer A", "A"),
        ("Verdict: Assistant B is better", "B"),
        ("Verdict: A is clearly better than B.", "A"),
        ("The verdict is: B\n", "B"),
        ("Final Verdict - tie", "tie"),
        ("Verdict: a tie", "tie"),
        ("Verdict: Draw", "tie"),
        ("A first glance says Verdict: A\nOn reflection:\nVerdict: B", "B"),
        ("Both are fine, but ... [[A]]", "A"),
        ("B is too long.\n\nA", "A"),
        ("I compared them.\n**B**", "B"),
        ('{"verdict": "A"}', "A"),
        ("Verdict: A, because it is correct", "A"),
        ("Verdict: **B** (more complete)", "B"),
        ("Verdict: A - clearer.", "A"),
        ("Verdict: A. B is worse.", "A"),
        ("Verdict: B wins over A", "B"),
        ("Verdict: A, but B is as good", None),
        ("Verdict: A (not worse than the other)", None),
        ("Verdict: A good answer came from both", None),
        ("Verdict: A and B are equally good", None),
        ("Verdict: A is worse than B", None),
        ("Verdict: Both are good", None),
        ("Verdict: A or B", None),
        ("A good answer needs more.", None),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_verdicts_are_read_and_never_guessed(text, said):
    assert parse_verdict(text) == said


@pytest.mark.parametrize(
    ("ahead", "behind", "winner", "said"),
    [
        ("A", "B", "first", ("first", "first")),
        ("B", "A", "second", ("second", "second")),
        ("A", "A", None, ("first", "second")),
        ("tie", "tie", None, ("tie", "tie")),
        ("A", "tie", None, ("first", "tie")),
        ("?", "B", None, (None, "first")),
    ],
)
def test_a_judge_has_to_agree_with_itself_in_both_orders(ahead, behind, winner, said):
    generator = compare_answers(ROW, "one", "two")
    first, second = next(generator)
    assert re.search(r"of A\]\none\n.*of B\]\ntwo\n", first.messages[0]["content"], re.DOTALL)
    assert re.search(r"of A\]\ntwo\n.*of B\]\none\n", second.messages[0]["content"], re.DOTALL)
    assert "Why is the sky blue?" in first.messages[0]["content"]
    assert first.template == second.template == templates.load("judge", "task", "first", "second").label
    with pytest.raises(StopIteration) as end:
        generator.send([Answer(text=f"Verdict: {ahead}"), Answer(text=f"Verdict: {behind}")])
    assert end.value.value[:2] == (winner, said)


# ----------------------------------------------------------------------------------------------------------------- CLAIR


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("{teacher_reasoning}: short.\n\n{corrected_student_solution}: Blue.", "Blue."),
        ("Reasons.\n\n{corrected_student_solution}\n\nBlue.", "Blue."),
        ("Reasons.\n**Corrected Student Solution:**\nBlue.", "Blue."),
        ("Reasons.\n### Corrected student solution\nBlue.", "Blue."),
        ("Reasons.\n**{corrected_student_solution}:**\n\nBlue.\n\nSky.", "Blue.\n\nSky."),
        ("Reasons.\n{corrected\\_student\\_solution}:\nBlue.", "Blue."),
        ("Reasons. {corrected_student_solution}: Blue.", "Blue."),
        ("I will write {corrected_student_solution} next.\n{corrected_student_solution}:\nBlue.", "Blue."),
        ("{corrected_student_solution} will be clearer.\n\n{corrected_student_solution}:\nBlue.", "Blue."),
        ("{corrected_student_solution}:\nBlue.\n{corrected_student_solution}", "Blue."),
        ("Reasons.\n-----\n{corrected_student_solution}:\n-----\nBlue.\n-----\n", "Blue."),
        ("{corrected_student_solution}:\nBlue: {teacher_reasoning} matters.\n", "Blue: {teacher_reasoning} matters."),
        ("{corrected_student_solution}:\n| a | b |\n|---|---|\n| 1 | 2 |", "| a | b |\n|---|---|\n| 1 | 2 |"),
    ],
)
def test_revisions_are_found_as_reviewers_write_them(reply, text):
    assert parse_revision(reply).text == text


@pytest.mark.parametrize(
    "reply", ["Blue.", "", "{corrected_student_solution}:", "{student_solution}: Blue.", "Corrected: Blue."]
)
def test_a_reply_without_revision_gives_no_pair(reply):
    assert parse_revision(reply) is None
    made, _ = run(clair(ROW), by_role(target="Green.", reviser=Answer(text=reply, finish_reason="length")))
    assert made == [
        Rejected("the reviser's reply has nothing under {corrected_student_solution} (finish_reason length)")
    ]


def test_the_rationale_is_kept():
    assert parse_revision("{teacher_reasoning}: Wrong.\n{corrected_student_solution}: Blue.").rationale == "Wrong."
    assert parse_revision("It is wrong.\n\n{corrected_student_solution}: Blue.").rationale == "It is wrong."


def test_clair():
    reply = "{teacher_reasoning}: no.\n{corrected_student_solution}: It scatters."
    made, asked = run(clair(ROW), by_role(target=Answer(text="It mirrors.", finish_reason="length"), reviser=reply))
    assert [(pair.chosen, pair.rejected) for pair in made] == [("It scatters.", "It mirrors.")]
    assert made[0].prompt == ROW["prompt"]
    version = templates.load("clair", "task", "student_solution").version
    assert made[0].columns == {
        "strategy": "clair",
        "template": f"clair@{version}",
        "rationale": "no.",
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length",
    }
    answer, revision = asked
    assert (answer.role, answer.messages) == ("target", ROW["prompt"])
    assert revision.template == f"clair@{version}"
    (message,) = revision.messages
    assert message["role"] == "user"
    task, solution = message["content"].index("Why is the sky blue?"), message["content"].index("It mirrors.")
    assert message["content"].index("{task}:") < task < message["content"].index("{student_solution}:") < solution
    assert solution < message["content"].index("-----")


def test_clair_worsens_if_asked():
    made, asked = run(clair(ROW, worsen=True), by_role(target="Right.", reviser="{worsened_student_solution}: Wrong."))
    assert [(pair.chosen, pair.rejected) for pair in made] == [("Right.", "Wrong.")]
    assert asked[1].template.startswith("clair_worsen@")
    assert made[0].columns["strategy"] == "clair_worsen"


def test_clair_revises_an_answer_that_exists():
    row = {**ROW, "worst": "It mirrors."}
    made, asked = run(clair(row, answer_column="worst"), by_role(reviser="{corrected_student_solution}: Yes."))
    assert [ask.role for ask in asked] == ["reviser"]
    assert made[0].rejected == "It mirrors."
    with pytest.raises(ValueError, match="row r1 has no answer in its column absent"):
        run(clair(ROW, answer_column="absent"), by_role())


@pytest.mark.parametrize(("better", "direction"), [("Yes.", "chosen"), ("It mirrors.", "rejected")])
def test_the_direction_of_a_revision_is_judged_and_nothing_dropped(better, direction):
    judge = judging(better)
    texts = {"target": "It mirrors.", "reviser": "{corrected_student_solution}: Yes."}
    made, asked = run(clair(ROW, judge="judge"), lambda ask: texts.get(ask.role) or judge(ask))
    assert [ask.role for ask in asked] == ["target", "reviser", "judge", "judge"]
    assert made[0].columns["direction"] == direction
    assert made[0].columns["direction_rationale"].startswith("Because")


def test_a_judge_who_only_likes_the_first_place_is_unclear():
    texts = {"target": "a", "reviser": "{corrected_student_solution}: b", "judge": "Verdict: A"}
    made, _ = run(clair(ROW, judge="judge"), by_role(**texts))
    assert made[0].columns["direction"] == "unclear"


def test_verify_direction_of_pairs_that_exist():
    row = {
        **ROW,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": "bad",
        "source": "x",
    }
    made, _ = run(verify_direction(row), judging("good"))
    assert (made[0].chosen, made[0].rejected) == ("good", "bad")
    assert made[0].columns == {
        "source": "x",
        "direction": "chosen",
        "direction_rationale": "Because. Verdict: A",
    }


# ---------------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize("better", ["answer 0", "answer 1"])
def test_on_policy_judge(better):
    judge = judging(better)
    made, asked = run(on_policy_judge(ROW), lambda ask: f"answer {ask.seed}" if ask.role == "target" else judge(ask))
    assert [ask.seed for ask in asked[:2]] == [0, 1]
    assert made[0].chosen == better
    assert {made[0].chosen, made[0].rejected} == {"answer 0", "answer 1"}
    assert made[0].columns["direction"] == "chosen"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Verdict: A", "the judge's verdict changes with the order of the answers"),
        ("Verdict: tie", "the judge sees a tie"),
        ("I like both.", f"the judge's reply has no verdict, or was cut off: it must have {VERDICT}"),
    ],
)
def test_without_a_clear_verdict_there_is_no_pair(said, reason):
    made, _ = run(on_policy_judge(ROW), lambda ask: f"answer {ask.seed}" if ask.role == "target" else said)
    assert made == [Rejected(reason)]


def test_equal_answers_are_not_judged():
    made, asked = run(on_policy_judge(ROW), by_role(target="same "))
    assert made == [Rejected("both answers are the same")]
    assert [ask.role for ask in asked] == ["target", "target"]


def test_off_policy_judge():
    judge = judging("two")
    made, asked = run(off_policy_judge(ROW), lambda ask: {"first": "one", "second": "two"}.get(ask.role) or judge(ask))
    assert [ask.role for ask in asked] == ["first", "second", "judge", "judge"]
    assert (made[0].chosen, made[0].rejected) == ("two", "one")


def test_off_policy_answers_and_scores_of_the_row():
    row = {**ROW, "texts": ["one", "two", "three"], "ratings": [3, 1.5, 4]}
    made, asked = run(off_policy_judge(row, responses="texts", scores="ratings"), by_role())
    assert not asked
    assert (made[0].chosen, made[0].rejected) == ("three", "two")
    assert made[0].columns["reward_margin"] == 2.5
    made, asked = run(off_policy_judge(row, responses="texts"), judging("one"))
    assert (made[0].chosen, made[0].rejected) == ("one", "two")


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({}, {"responses": "texts"}, "column texts of row r1 is not a list of at least two"),
        ({"texts": ["one"]}, {"responses": "texts"}, "not a list of at least two"),
        ({"texts": ["one", None]}, {"responses": "texts"}, "not a list of at least two"),
        ({"texts": ["a", "b"], "s": [1]}, {"responses": "texts", "scores": "s"}, "column s of row r1"),
        ({"texts": ["a", "b"], "s": [1, 2, 3]}, {"responses": "texts", "scores": "s"}, "2 answers have 3 scores"),
        ({}, {"scores": "s"}, "set the column of the responses too"),
    ],
)
def test_off_policy_columns_are_checked(given, settings, message):
    with pytest.raises(ValueError, match=message):
        run(off_policy_judge({**ROW, **given}, **settings), by_role())


def test_stronger_preferred_and_teacher_student():
    made, asked = run(stronger_preferred(ROW), by_role(target="weak", stronger="strong"))
    assert (made[0].chosen, made[0].rejected) == ("strong", "weak")
    assert {ask.sampling for ask in asked} == {None}
    made, asked = run(teacher_student(ROW), by_role(teacher="taught", student="learned"))
    assert (made[0].chosen, made[0].rejected) == ("taught", "learned")
    assert {ask.sampling for ask in asked} == {Sampling(temperature=0.8, top_p=0.95, max_new_tokens=1024)}


# -------------------------------------------------------------------------------------------------------------- best of n


def _length(row, answers):
    return [len(answer) for answer in answers]


def test_best_of_n():
    texts = ["bb", "dddd", "a", "cccc"]
    made, asked = run(best_of_n(ROW, scorer=_length, n=4), lambda ask: texts[ask.seed])
    assert [ask.seed for ask in asked] == [0, 1, 2, 3]
    assert (made[0].chosen, made[0].rejected) == ("dddd", "a")
    assert {k: made[0].columns[k] for k in ("chosen_score", "rejected_score", "reward_margin")} == {
        "chosen_score": 4.0,
        "rejected_score": 1.0,
        "reward_margin": 3.0,
    }


def test_a_role_can_score():
    def answer(ask):
        if ask.role == "target":
            return f"answer {ask.seed}"
        assert ask.messages[:-1] == ROW["prompt"]
        assert ask.messages[-1]["role"] == "assistant"
        return f" {-float(ask.messages[-1]['content'].split()[1])}\n"

    made, asked = run(best_of_n(ROW, n=3), answer)
    assert [ask.role for ask in asked] == ["target"] * 3 + ["scorer"] * 3
    assert (made[0].chosen, made[0].rejected) == ("answer 0", "answer 2")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda row, answers: [1.0], "one finite number for each of the 2 answers"),
        (lambda row, answers: [1.0, float("nan")], "one finite number"),
        (lambda row, answers: ["good", "bad"], "a list with one number for each of the 2 answers, not"),
        ("no_such_module:score", "no_such_module"),
        ("math:no_such_function", "no_such_function"),
        (3, "a scorer must be a function"),
    ],
)
def test_scorers_are_checked(scorer, message):
    with pytest.raises(ValueError, match=message):
        run(best_of_n(ROW, scorer=scorer, n=2), by_role(target="x"))


def test_equal_scores_give_no_pair_and_one_answer_is_too_few():
    assert run(best_of_n(ROW, scorer=_length, n=3), by_role(target="x"))[0] == [
        Rejected("all 3 answers score the same")
    ]
    for strategy in (best_of_n(ROW, n=1), mono_system(ROW, n=1), con_j(ROW, n=1)):
        with pytest.raises(ValueError, match="n must be at least 2"):
            run(strategy, by_role())


def test_mono_system_translations():
    row = {**ROW, "reference": "the cat sat on the mat"}
    texts = ["the cat sat on a mat", "the cat sat on the mat", "a dog"]
    strategy = mono_system(row, metric="contralto.data_gen:chrf", n=3, also={"length": _length})
    made, asked = run(strategy, lambda ask: texts[ask.seed])
    assert (made[0].chosen, made[0].rejected) == (texts[1], texts[2])
    assert (made[0].columns["chosen_length"], made[0].columns["rejected_length"]) == (22.0, 5.0)
    assert made[0].columns["chosen_score"] == 100
    _, asked = run(mono_system(row, metric=_length), lambda ask: "x" * ask.seed)
    assert len(asked) == 50
    with pytest.raises(ValueError, match="column reference, which row r1 does not have"):
        run(mono_system(ROW, metric=chrf, n=2), by_role(target="x"))


def test_a_reward_model_scores_answers_alike_alone_and_together(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from contralto import testbed

    tokenizer = testbed.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = resolve_scorer({"reward_model": str(tmp_path), "device": "cpu"})
    assert resolve_scorer({"reward_model": str(tmp_path), "device": "cpu"}) is scorer
    row = {**ROW, "prompt": [{"role": "user", "content": "Tom has 3 apples."}]}
    answers = ["#### 3", "finds 4: 3 + 4 = 7. #### 7"]
    together = scorer(row, answers)
    assert together == pytest.approx([scorer(row, [answer])[0] for answer in answers], abs=1e-5)
    ids = tokenizer.apply_chat_template(
        [*row["prompt"], {"role": "assistant", "content": answers[0]}], return_tensors="pt"
    )
    state = scorer.model.model(**ids).last_hidden_state[0, -1]
    assert together[0] == pytest.approx((scorer.model.score.weight @ state).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- judgements


def _labelled(number):
    return {
        **ROW,
        "id": f"row {number}",
        "chosen": "good one",
        "rejected": [{"role": "assistant", "content": "bad one"}],
    }


def _right(prompt):
    return 1 if prompt.index("good one") < prompt.index("bad one") else 2


def test_con_j_pairs_right_and_wrong_judgements():
    places = set()
    for number in range(12):

        def answer(ask):
            right = _right(ask.messages[0]["content"])
            better = right if ask.seed % 2 else 3 - right
            return f'```json\n{{"reason": "r{ask.seed}", "better": {better}}}\n```'

        made, asked = run(con_j(_labelled(number)), answer)
        assert len(asked) == 8
        assert [re.search(r"r\d", pair.chosen)[0] for pair in made] == ["r1", "r3", "r5"]
        assert [re.search(r"r\d", pair.rejected)[0] for pair in made] == ["r0", "r2", "r4"]
        assert made[0].prompt == asked[0].messages
        places.add(_right(asked[0].messages[0]["content"]))
        assert made[0].columns["better"] == _right(asked[0].messages[0]["content"])
        assert made[0].columns["judgement_source"] == "sampled"
    assert places == {1, 2}


def test_con_j_hints_where_all_judgements_agree():
    def answer(ask):
        prompt = ask.messages[0]["content"]
        hint = re.search(r"Hint: answer (\d)", prompt)
        return f'{{"reason": "{ask.tag}", "better": {hint[1] if hint else _right(prompt)}}}'

    made, asked = run(con_j(_labelled(0), n=4), answer)
    assert [ask.tag for ask in asked] == ["judgement"] * 4 + ["hinted"] * 2
    right = _right(asked[0].messages[0]["content"])
    assert [(pair.chosen, pair.rejected) for pair in made] == [
        (f'{{"reason": "hinted", "better": {right}}}', f'{{"reason": "hinted", "better": {3 - right}}}')
    ]
    assert "Hint" not in made[0].prompt[0]["content"]
    assert made[0].columns["judgement_source"] == "hinted"
    made, _ = run(con_j(_labelled(0), n=4), lambda ask: "no idea")
    assert made == [Rejected('no judgement holds "better": 1 or "better": 2')]
    made, _ = run(con_j(_labelled(0), n=4), lambda ask: '{"better": 1}')
    assert made == [Rejected("no right and wrong judgement, not even with a hint")]


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ('{"reason": "x", "better": 2}', 2),
        ("{'better': '1'}", 1),
        ("better: answer 2", 2),
        ('{"better": 1} ... no: {"better": 2}', 2),
        ("“better”: 1", 1),
        ("2 is better", None),
        ('{"better": 12}', None),
    ],
)
def test_judgements_are_read(text, better):
    assert parse_better(text) == better


# --------------------------------------------------------------------------------------------------------------- PopAlign


@pytest.mark.parametrize("name", ["prefix", "demonstration"])
def test_contrasts_by_prompt(name):
    row = {**ROW, "prompt": [{"role": "system", "content": "Rhyme."}, *ROW["prompt"]]}
    strategy = popalign.SIX[name]
    made, asked = run(strategy(row), lambda ask: ask.tag)
    assert (made[0].chosen, made[0].rejected) == (f"{name}_good", f"{name}_bad")
    assert made[0].prompt == row["prompt"]
    for ask in asked:
        assert ask.messages[0] == row["prompt"][0]
        assert "Why is the sky blue?" in ask.messages[-1]["content"]
        assert ask.messages[-1]["content"] != "Why is the sky blue?"
    assert asked[0].messages != asked[1].messages
    assert made[0].columns["template"] == f"{asked[0].template} {asked[1].template}"


def test_elicitive_answers_are_under_their_heading():
    made, _ = run(
        popalign.elicitive(ROW), lambda ask: f"{{thought}}: hm {ask.tag}\n\n{{answer}}: {ask.tag}\n\nAnswer: really"
    )
    assert (made[0].chosen, made[0].rejected) == (
        "elicitive_good\n\nAnswer: really",
        "elicitive_bad\n\nAnswer: really",
    )
    assert made[0].columns["rationale"] == "hm elicitive_good"
    made, _ = run(popalign.elicitive(ROW), lambda ask: "{answer}: x" if "good" in ask.tag else "no heading")
    assert made == [Rejected("the bad reply has nothing under {answer} (finish_reason stop)")]


def test_contrasts_by_model_and_by_pipeline():
    made, _ = run(popalign.nparam(ROW), by_role(larger="L", smaller="S"))
    assert (made[0].chosen, made[0].rejected) == ("L", "S")
    made, _ = run(popalign.leaderboard(ROW), by_role(higher="H", lower="W"))
    assert (made[0].chosen, made[0].rejected) == ("H", "W")
    made, asked = run(popalign.refine(ROW), lambda ask: f"turn {len(ask.messages)}")
    assert (made[0].chosen, made[0].rejected) == ("turn 3", "turn 1")
    assert asked[1].messages[:2] == [*ROW["prompt"], {"role": "assistant", "content": "turn 1"}]


def test_popalign_asks_side_by_side_and_pools_in_order():
    def answer(ask):
        if ask.role == "judge":
            return "Verdict: tie"
        return f"{{thought}}: t\n{{answer}}: {ask.tag} {ask.role}"

    driven = drive(popalign.popalign(ROW, judge="judge"))
    rounds, given = [], None
    try:
        while True:
            asks = driven.send(given)
            rounds.append([ask.role for ask in asks])
            given = [Answer(text=answer(ask)) for ask in asks]
    except StopIteration as end:
        made = end.value
    assert len(rounds) == 3
    assert rounds[0] == [*["target"] * 6, "larger", "smaller", "higher", "lower", "target"]
    assert [pair.columns["strategy"] for pair in made] == list(popalign.SIX)
    assert {pair.columns["direction"] for pair in made} == {"unclear"}
    made, _ = run(popalign.popalign(ROW, contrasts=["refine", "nparam"]), answer)
    assert [pair.columns["strategy"] for pair in made] == ["refine", "nparam"]
    with pytest.raises(ValueError, match="not nice"):
        run(popalign.popalign(ROW, contrasts=["nice"]), answer)


def test_templates_keep_the_images_of_a_message():
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    row = {"id": "i", "prompt": [{"role": "user", "content": parts}], "images": ("a.png",)}
    _, asked = run(popalign.prefix(row), lambda ask: ask.tag)
    content = asked[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    assert content[1]["text"].endswith("What is it?")
    assert asked[0].images == ("a.png",)


# ----------------------------------------------------------------------------------------------------------------- images

IMAGES_ROW = {
    "id": "v",
    "prompt": [{"role": "user", "content": "What is in the image?"}],
    "images": ("one.png", "two.png"),
    "caption": "A garden with a rose.",
    "contrast_caption": "A garden with a spade.",
}


def _rewriter(ask):
    assert ask.images == ("one.png", "two.png")
    text = ask.messages[0]["content"]
    assert text.index("A garden with a rose.") < text.index("A garden with a spade.")
    if ask.tag == "mvc_describe":
        return "{question}: What is there?\n{answer}: There is a rose."
    assert "What is there?" in text
    assert "There is a rose." in text
    return "**Answer:** There is a spade."


def test_mvc_pairs_two_images_with_two_texts():
    made, asked = run(mvc(IMAGES_ROW), _rewriter)
    assert [ask.tag for ask in asked] == ["mvc_describe", "mvc_contrast"]
    (pair,) = made
    assert (pair.chosen, pair.images) == ("There is a rose.", ("one.png",))
    assert (pair.rejected, pair.rejected_images) == ("There is a spade.", ("two.png",))
    assert pair.prompt == [{"role": "user", "content": "What is there?"}]


def test_mvc_mirrored_and_without_rewriter():
    made, asked = run(mvc(IMAGES_ROW, rewriter=None, symmetric=True), by_role())
    assert not asked
    assert [(p.chosen, p.images, p.rejected_images) for p in made] == [
        ("A garden with a rose.", ("one.png",), ("two.png",)),
        ("A garden with a spade.", ("two.png",), ("one.png",)),
    ]
    assert made[0].rejected == made[1].chosen


def test_mvc_on_drawn_scenes():
    import numpy as np

    from contralto.data_gen.dataset import load_pairs, to_dataset

    rows = list(world.scene_pairs(count=4, split="test"))
    made = []
    for one in rows:
        before, after = (np.asarray(image, int) for image in one["images"])
        moved = np.argwhere((before != after).any(-1)) // 32  # a cell is 32 pixels wide
        assert len({tuple(cell) for cell in moved}) == 1
        named = [set(one[name].rstrip(".").split("with ")[1].split(", ")) for name in ("caption", "contrast_caption")]
        assert [len(named[0] - named[1]), len(named[1] - named[0])] == [1, 1]
        row = {**one, "prompt": [{"role": "user", "content": one["prompt"]}], "images": tuple(one["images"])}
        made += run(mvc(row, rewriter=None, symmetric=True), by_role())[0]
    records = []
    for p in made:
        answers = {name: [{"role": "assistant", "content": getattr(p, name)}] for name in ("chosen", "rejected")}
        records.append({"prompt": p.prompt, **answers, "images": p.images, "rejected_images": p.rejected_images})
    found = load_pairs(to_dataset(records))
    assert found.num_rows == 8
    for at, name in enumerate(("images", "rejected_images")):
        assert np.array_equal(found[0][name][0], rows[0]["images"][at])
        assert np.array_equal(found[1][name][0], rows[0]["images"][1 - at])
    assert found[1]["chosen"] == found[0]["rejected"]


def test_mvc_refuses():
    with pytest.raises(ValueError, match="two images, but row v has 1"):
        run(mvc({**IMAGES_ROW, "images": ("one.png",)}), by_role())
    with pytest.raises(ValueError, match="needs a caption in each of its columns caption and contrast_caption"):
        run(mvc({**IMAGES_ROW, "contrast_caption": ""}), by_role())
    made, _ = run(mvc(IMAGES_ROW), by_role(rewriter="nothing"))
    assert made == [Rejected("the first stage has no {question} or no {answer} (finish_reason stop)")]
    made, _ = run(mvc(IMAGES_ROW), lambda ask: _rewriter(ask) if ask.tag == "mvc_describe" else "nothing")
    assert made == [Rejected("the second stage has no {answer} (finish_reason stop)")]


def test_image_similarity_is_the_cosine_of_pooled_embeddings(tmp_path):
    import torch
    from PIL import Image
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, initializer_range=0.4
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    red, blue = (Image.new("RGB", (28, 28), colour) for colour in ("red", "blue"))
    blue.putpixel((3, 4), (255, 255, 255))
    rows = [
        {"images": [red], "rejected_images": [red]},
        {"images": [red]},
        {"images": [red], "rejected_images": [blue]},
    ]
    found = image_similarity(rows, model=str(tmp_path), column="dino")["dino"]
    assert found[:2] == [pytest.approx(1, abs=1e-5), None]
    with torch.no_grad():
        one, two = (model(**processor(images=i, return_tensors="pt")).pooler_output[0] for i in (red, blue))
    assert found[2] == pytest.approx((one @ two / one.norm() / two.norm()).item(), abs=1e-5)
    assert found[2] < 0.999


# -------------------------------------------------------------------------------------------------------------- templates


def test_every_packaged_template_is_used_and_versioned():
    from importlib import resources

    files = {f.name for f in (resources.files("contralto.data_gen") / "prompts").iterdir()}
    judged = by_role(
        target="a",
        reviser="b",
        judge="c",
        larger="d",
        smaller="e",
        higher="f",
        lower="g",
        rewriter="h",
        teacher="{rationale}: a\n{answer}: b",
        student="i",
    )
    used = set()
    for strategy in (
        clair(ROW, judge="judge"),
        clair(ROW, worsen=True),
        popalign.popalign(ROW),
        con_j(_labelled(0), n=2),
        clair(ROW, template="clair_paper"),
        con_j(_labelled(0), n=2, template="con_j_paper"),
        c_rag(ROW | {"passages": ["a"], "answers": "a"}),
    ):
        used |= {ask.template for ask in run(strategy, judged)[1] if ask.template}
    used |= {ask.template for ask in run(mvc(IMAGES_ROW), _rewriter)[1]}
    used |= {label for made in run(qcrd(ROW), judged)[0] for label in made.columns["template"].split()}
    used |= {ask.template for ask in run(verify_direction(_labelled(0)), judged)[1]}
    assert {label.partition("@")[0] + ".txt" for label in used} == files
    assert all(re.fullmatch(r"\w+@[0-9a-f]{12}", label) for label in used)


def test_a_user_replaces_a_template(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("Better, please: {{ task }} / {{ student_solution }}\n{corrected_student_solution}:")
    reply = by_role(target="{{ evil }} {% x %}", reviser="{corrected_student_solution}: b")
    made, asked = run(clair(ROW, template=str(mine)), reply)
    text = asked[1].messages[0]["content"]
    assert text.startswith("Better, please: Why is the sky blue? / {{ evil }} {% x %}\n")
    assert made[0].columns["template"].startswith("mine@")
    other = tmp_path / "other" / "mine.txt"
    other.parent.mkdir()
    other.write_text(mine.read_text() + " ")
    one, two = (templates.load(str(path), "task", "student_solution") for path in (mine, other))
    assert one.name == two.name
    assert one.version != two.version


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf{{ task }}\xff")
    with pytest.raises(ValueError, match=r"t.txt:1: not UTF-8 text"):
        templates.load(str(path), "task")
    path.write_bytes(b"\xef\xbb\xbf{{ task }}\r\nNow.\r\n")
    assert templates.load(str(path), "task").render(task="Go.") == "Go.\nNow."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ task }}", "leaves out student_solution"),
        ("{{ task }} {{ student_solution }} {{ teacher }}", "also asks for teacher"),
        ("{{ task }\n", "line 1: not valid Jinja"),
        (None, "there is no template file"),
    ],
)
def test_templates_are_checked(tmp_path, text, message):
    path = tmp_path / "t.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        templates.load(str(path), "task", "student_solution")
    with pytest.raises(ValueError, match=r"there is no template 'clare'.*clair"):
        templates.load("clare")


# ----------------------------------------------------------------------------------------------------------- the testbed


def _request(ask: Ask):
    return Request(key="", messages=ask.messages, prompt=ask.prompt, images=(), sampling=Sampling(), seed=0)


@pytest.fixture(scope="module")
def problems():
    from itertools import islice

    from contralto.testbed import worlds

    return list(islice(worlds.problems(7, "test"), 60))


def _asked(problem):
    return {"id": "p", "prompt": [{"role": "user", "content": problem.question}], "images": ()}


def test_problems_are_read_back(problems):
    assert [world.problem_of(problem.question) for problem in problems] == problems
    with pytest.raises(ValueError, match="no word problem"):
        world.problem_of("Tom has apples.")


def test_the_testbeds_reviser_is_right_and_minimal(problems):
    for problem in problems:
        for style in ("ledger", "brief"):
            for stop in range(len(problem.steps) + 1):
                said = problem.solution(style, stop_after=stop)
                texts = {"target": lambda ask, said=said: said, "reviser": lambda ask: world.revise(_request(ask))}
                made, _ = run(clair(_asked(problem)), lambda ask, texts=texts: texts[ask.role](ask))
                (pair,) = made
                assert world.score(_asked(problem), [pair.chosen]) == [2.0]
                if stop:
                    assert pair.chosen == problem.solution(style)
    ledger, brief = problem.solution("ledger"), problem.solution("brief")
    mixed = ledger.partition(".")[0] + ". " + brief.partition(". ")[2]
    assert world._corrected(problem, mixed).startswith(ledger.partition(".")[0])


def test_the_testbeds_judge_and_scorer(problems):
    problem = next(p for p in problems if len(p.steps) == 4)
    whole, half, none = problem.solution(), problem.solution(stop_after=2), "#### 0"
    assert world.score(_asked(problem), [whole, half, none]) == [2.0, 0.5, 0.0]
    first, rest = whole.split(". ", 1)
    assert world.score(_asked(problem), [rest, f"{first}. {rest[3:]}"]) == [1.0, 1.25]  # only right up to the first gap
    answers = [half, whole]
    made, _ = run(
        on_policy_judge(_asked(problem)),
        lambda ask: answers[ask.seed] if ask.role == "target" else world.judge(_request(ask)),
    )
    assert (made[0].chosen, made[0].rejected) == (whole, half)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (clair, {"judge": "judge", "judge_template": "none.txt"}),
        (clair, {"template": "none.txt"}),
        (popalign.prefix, {"judge": "judge", "judge_template": "none.txt"}),
        (popalign.elicitive, {"bad": "none.txt"}),
        (popalign.nparam, {"judge": "judge", "judge_template": "none.txt"}),
        (popalign.refine, {"template": "none.txt"}),
        (on_policy_judge, {"template": "none.txt"}),
        (off_policy_judge, {"template": "none.txt"}),
        (con_j, {"hint_template": "none.txt"}),
        (best_of_n, {"scorer": "none:none"}),
        (mono_system, {"metric": "none:none"}),
        (mono_system, {"also": {"bleu": "none:none"}}),
        (mvc, {"contrast": "none.txt"}),
    ],
)
def test_mistakes_in_settings_are_found_before_anybody_is_asked(strategy, settings):
    row = {**_labelled(1), **{k: IMAGES_ROW[k] for k in ("images", "caption", "contrast_caption")}}
    with pytest.raises(ValueError, match="none"):
        next(strategy(row, **settings))


def test_the_testbeds_rows():
    rows = list(world.problems(count=5, seed=3, split="dev", steps=[4, 5]))
    assert [row["id"] for row in rows] == [f"dev-3-{i}" for i in range(5)]
    assert {row["steps"] for row in rows} <= {4, 5}
    assert all(world.problem_of(row["prompt"]).totals[-1] == row["answer"] for row in rows)
    for wrong in ({"count": 0}, {"split": "all"}, {"steps": [9]}):
        with pytest.raises(ValueError, match=r"must (be|name)"):
            list(world.problems(**wrong))


def test_strategies_are_pure():
    """Driven twice they ask and make the same, and answers of another kind are left as they are."""
    row = {**_labelled(1), "reference": "x", **{k: IMAGES_ROW[k] for k in ("images", "caption", "contrast_caption")}}
    row |= {"passages": ["a", "b"], "answers": "target"}
    scored = {"best_of_n", "mono_system"}  # their scorer reads numbers
    for strategy in (strategy for name, strategy in STRATEGIES.items() if name not in scored):
        one, two = (run(strategy(row), lambda ask: f"{{answer}}: {ask.role} {ask.tag} {ask.seed}") for _ in range(2))
        assert one == two
        assert all(isinstance(item, Pair | Labelled | Rejected) for item in one[0])
