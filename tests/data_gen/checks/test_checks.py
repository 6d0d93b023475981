"""Checks against references in plain Python and float64, and filters that drop exactly the pairs outside their ranges."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch

from contralto import testbed
from contralto.data_gen import checks
from contralto.data_gen.checks import annotate, check_settings, ches, contamination, select
from contralto.testbed import questions as world
from contralto.testbed import worlds


def row(chosen="It is 4.", rejected="It is 5.", prompt="What is 2 + 2?", **columns):
    return {
        "id": columns.pop("id", "a"),
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **columns,
    }


# -------------------------------------------------------------------------------------------------------------- contrast


def _levenshtein(a, b):
    """The textbook's table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, changed)
    return table[-1][-1]


def test_contrast_equals_its_definitions():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abé \n", k=rng.randrange(1, 30))) for _ in range(60)]
    rows = [row(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    for found, one in zip(annotate(rows, {"contrast": {}}), rows, strict=True):
        a, b = one["chosen"][0]["content"], one["rejected"][0]["content"]
        assert found["levenshtein"] == _levenshtein(a, b)
        assert found["length_ratio"] == len(a) / len(b)
        words = [a.split(), b.split()]
        union = [w for w in dict.fromkeys(words[0] + words[1])]
        both = [w for w in union if w in words[0] and w in words[1]]
        assert found["jaccard"] == (len(both) / len(union) if union else 1)


def test_contrast_by_a_tokenizer_and_at_its_limits():
    [found] = annotate(
        [row("finds 4: 9 + 4 = 13.", "finds 4: 9 + 4 = 15.")], {"contrast": {"tokenizer": "testbed:expert"}}
    )
    tokens = [set(testbed.tokenizer().tokenize(text)) for text in ("finds 4: 9 + 4 = 13.", "finds 4: 9 + 4 = 15.")]
    assert found["jaccard"] == len(tokens[0] & tokens[1]) / len(tokens[0] | tokens[1])
    [empty] = annotate([row("", "")], {"contrast": None})
    assert (empty["jaccard"], empty["levenshtein"], empty["length_ratio"], empty["no_op"]) == (1, 0, None, True)
    assert annotate([row("a b ", " a b")], {"contrast": {}})[0]["no_op"] is True
    assert annotate([row("a b", "a c")], {"contrast": {}})[0]["no_op"] is False
    turns = row()
    turns["chosen"] = [*turns["chosen"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert annotate([turns], {"contrast": {}})[0]["length_ratio"] == len("It is 4.\n\n?\n\n!") / len("It is 5.")


def test_annotate_leaves_the_rows_as_they_are():
    rows = [row(id="a", x=1), row("same", "same", id="b")]
    before = json.dumps(rows)
    found = annotate(rows, {"contrast": {}, "finish": {}})
    assert json.dumps(rows) == before
    assert [r["id"] for r in found] == ["a", "b"]
    assert found[0]["x"] == 1


def test_finish():
    rows = [
        row(chosen_finish_reason="stop", rejected_finish_reason="stop"),
        row(chosen_finish_reason="stop", rejected_finish_reason="length"),
        row(chosen_finish_reason="stop"),
        row(" ", "x"),
    ]
    found = annotate(rows, {"finish": {}})
    assert [r["finished"] for r in found] == [True, False, None, None]
    assert [r["empty"] for r in found] == [False, False, False, True]


# ------------------------------------------------------------------------------------------------------------ duplicates


def _words(seed, count=60):
    return " ".join(random.Random(seed).choices(worlds.vocabulary(), k=count))


def test_duplicates_are_found_and_nothing_else():
    base = _words(0)
    rows = [
        row(base, "x", id="first"),
        row(base.upper() + "  ", "x", id="case and space"),
        row(base + " more", "x", id="near"),
        row(base + " more words", "x", id="near too"),
        row(_words(1), "x", id="other"),
        row(base, _words(2), id="other answer"),
        row("short", "x", id="short"),
        row("short", "x", id="short again"),
    ]
    found = annotate(rows, {"duplicates": {"threshold": 0.8}})
    assert [r["duplicate_of"] for r in found] == [None, "first", None, None, None, None, None, "short"]
    assert [r["near_duplicate_of"] for r in found] == [None, None, "first", "first", None, None, None, None]
    by_prompt = annotate(rows, {"duplicates": {"of": "prompt"}})
    assert [r["duplicate_of"] for r in by_prompt] == [None, *["first"] * 7]


def test_near_duplicates_equal_an_exhaustive_search():
    """Nothing is reported that is not similar, and of what is, MinHash misses little."""
    rng = random.Random(3)
    rows = []
    for number in range(120):
        words = _words(number % 40, 30).split()
        for _ in range(rng.randrange(4)):
            words[rng.randrange(30)] = "changed"
        rows.append(row(" ".join(words), "x", id=str(number)))
    found = annotate(rows, {"duplicates": {"threshold": 0.6, "shingle": 2}})
    sets = []
    for one in rows:
        words = f"{one['prompt'][0]['content']} {one['chosen'][0]['content']} x".casefold().split()
        sets.append(set(itertools.pairwise(words)))
    similar = missed = 0
    for at, one in enumerate(found):
        alike = [i for i in range(at) if len(sets[i] & sets[at]) / len(sets[i] | sets[at]) >= 0.6]
        if one["near_duplicate_of"] is not None:
            assert int(one["near_duplicate_of"]) in alike
            assert found[int(one["near_duplicate_of"])]["near_duplicate_of"] is None
        elif one["duplicate_of"] is None:
            missed += any(found[i]["near_duplicate_of"] is found[i]["duplicate_of"] is None for i in alike)
        similar += bool(alike)
    assert similar > 50
    assert missed <= similar * 0.05


# --------------------------------------------------------------------------------------------------------- contamination


def test_contamination_counts_runs_of_words(tmp_path):
    words = [f"w{i}" for i in range(40)]
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": " ".join(words[:20]), "choices": [" ".join(words[20:])]}) + "\n")
    rows = [
        row(" ".join(words[2:16]), "no"),
        row("no", "W2, w3 W4! " + " ".join(words[5:15]).upper()),
        row(" ".join(words[15:27]), "x " + " ".join(words[3:15])),
        row("no", "no", prompt=" ".join(words[20:34])),
        row(" ".join(words[:12]), " ".join(words[12:20])),
    ]
    found = annotate(rows, {"contamination": {"against": [str(test)]}})
    assert [r["contamination"] for r in found] == [2, 1, 0, 2, 0]
    assert [r["contaminated_by"] for r in found] == [str(test), str(test), None, str(test), None]
    short = annotate(rows, {"contamination": {"against": [str(test)], "n": 3}})
    assert short[2]["contamination"] == 3 + 5 + 10


def test_contamination_by_other_files(tmp_path):
    from datasets import Dataset

    text = " ".join(f"w{i}" for i in range(13))
    (tmp_path / "a.txt").write_text(f"one\n{text}\n")
    (tmp_path / "b.json").write_text(json.dumps([{"x": {"y": ["", text]}}]))
    Dataset.from_list([{"x": text}]).to_parquet(tmp_path / "c.parquet")
    for name in ("a.txt", "b.json", "c.parquet"):
        assert annotate([row(text)], {"contamination": {"against": [str(tmp_path / name)]}})[0]["contamination"] == 1
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n{\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2: not JSON"):
        annotate([row(text)], {"contamination": {"against": [str(tmp_path / "d.jsonl")]}})


def test_contamination_by_test_sets_of_the_hub(monkeypatch):
    text = " ".join(f"w{i}" for i in range(13))
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": text, "answer": "#### 1"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    [found] = annotate([row(text)], {"contamination": {"against": ["gsm8k", "hellaswag"]}})
    assert (found["contamination"], found["contaminated_by"]) == (1, "gsm8k")
    assert asked == [("openai/gsm8k", "main", "test"), ("Rowan/hellaswag", None, "validation")]


def test_contamination_agrees_with_the_janitor_where_the_janitor_is_right(tmp_path, capsys):
    """lm-eval's Janitor cuts texts into runs before it deletes punctuation, and so misses a copy with a dash in it."""
    from lm_eval.decontamination.janitor import Janitor

    janitor = Janitor()
    rng = random.Random(5)
    copied = [_words(seed, 16).replace("#", "") for seed in range(6)]
    (tmp_path / "t.txt").write_text("\n".join(copied))
    for text in copied:
        janitor.register_contaminant_python(text)
    texts = [_words(100 + i, 20) + (" " + rng.choice(copied) if i % 2 else "") for i in range(12)]
    texts = [" ".join(word for word in text.split() if word.isalnum()) for text in texts]
    found = annotate([row(text) for text in texts], {"contamination": {"against": [str(tmp_path / "t.txt")]}})
    dirty = [
        any(janitor.normalize_string(run) in janitor.dirt_ngrams for run in contamination._ngrams(t, 13)) for t in texts
    ]
    assert [r["contamination"] > 0 for r in found] == dirty
    capsys.readouterr()


def test_the_janitor_misses_a_dash(tmp_path):
    from lm_eval.decontamination.janitor import Janitor

    words = [f"w{i}" for i in range(13)]
    (tmp_path / "t.txt").write_text(" ".join(words))
    copied = " ".join([*words[:5], "-", *words[5:]])
    janitor = Janitor(too_dirty_cutoff=0)
    janitor.register_contaminant_python(" ".join(words))
    assert janitor.clean_python(" ".join(words)) == []
    assert annotate([row(copied)], {"contamination": {"against": [str(tmp_path / "t.txt")]}})[0]["contamination"] == 1


# ------------------------------------------------------------------------------------------------------------------ CHES


def _reference(states, kept):
    """Sum of the kept states, plain Python."""
    return [sum(float(h[d]) for h, keep in zip(states, kept, strict=True) if keep) for d in range(len(states[0]))], sum(
        kept
    )


def _reference_ches(chosen, chosen_kept, rejected, rejected_kept):
    (good, n), (bad, m) = _reference(chosen, chosen_kept), _reference(rejected, rejected_kept)
    dot = sum(a * b for a, b in zip(good, bad, strict=True))
    norm = sum(a * a for a in good)
    return dot - norm, dot / (n * m) - norm / (n * n)


def test_ches_equals_its_definition_with_padding_masked():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(5, 7, 4, generator=generator), torch.randn(5, 9, 4, generator=generator)
    good = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2])[:, None]
    bad = (torch.arange(9) >= 2) & (torch.arange(9) < torch.tensor([9, 4, 3, 9, 8])[:, None])
    found = ches.ches(chosen, rejected, good, bad)
    rows = zip(chosen.tolist(), good.tolist(), rejected.tolist(), bad.tolist(), strict=True)
    for at, one in enumerate(rows):
        both = _reference_ches(*one)
        assert (found.ches[at].item(), found.ln_ches[at].item()) == pytest.approx(both, rel=1e-12, abs=1e-12)
    spoilt = torch.where(good[..., None], chosen, torch.nan)
    assert torch.equal(ches.ches(spoilt, rejected, good, bad).ches, found.ches)


def test_ches_refuses():
    states, mask = torch.ones(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="a rejected answer has no token"):
        ches.ches(states, states, mask, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"the chosen mask has shape \(2, 2\)"):
        ches.ches(states, states, mask[:, :2], mask)


@pytest.fixture(scope="module")
def pairs_of_the_world():
    rows = []
    for number, problem in zip(range(6), worlds.problems(11, "test"), strict=False):
        stop = min(number, len(problem.steps) - 1)
        rows.append(
            row(problem.solution(), problem.solution("brief", stop_after=stop), problem.question, id=str(number))
        )
    return rows


@pytest.mark.parametrize("batch_size", [1, 5])
def test_ches_of_rows_equals_single_float64_forwards(pairs_of_the_world, batch_size):
    model, tokenizer = testbed.load("student").eval(), testbed.tokenizer()
    found = ches.score_rows(model, tokenizer, pairs_of_the_world, batch_size=batch_size)
    exact = testbed.load("student").double().eval()
    for at, one in enumerate(pairs_of_the_world):
        parts = []
        for name in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(one["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            answer = tokenizer(one[name][0]["content"] + "<eos>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                ids = torch.tensor([prompt + answer])
                states = exact(ids, output_hidden_states=True).hidden_states[-1][0].tolist()
            parts += [states, [len(prompt) - 1 <= k < len(states) - 1 for k in range(len(states))]]
            assert sum(parts[-1]) == len(answer)
        both = _reference_ches(*parts)
        assert (found.ches[at].item(), found.ln_ches[at].item()) == pytest.approx(both, rel=1e-4)


def test_ches_as_a_check(pairs_of_the_world):
    found = annotate(pairs_of_the_world, {"ches": {"model": "testbed:student", "batch_size": 3, "device": "cpu"}})
    expected = ches.score_rows(testbed.load("student"), testbed.tokenizer(), pairs_of_the_world)
    assert [r["ln_ches"] for r in found] == pytest.approx(expected.ln_ches.tolist(), rel=1e-4)
    assert [r["ches"] for r in found] == pytest.approx(expected.ches.tolist(), rel=1e-4)
    cut = SimpleNamespace(model=testbed.load("student"), tokenizer=testbed.tokenizer(), rows=pairs_of_the_world[:1])
    with pytest.raises(ValueError, match=r"answer of row 0 has no token \(within max_length\)"):
        ches.score_rows(cut.model, cut.tokenizer, cut.rows, max_length=10)
    with pytest.raises(ValueError, match="row a has images"):
        ches.score_rows(cut.model, cut.tokenizer, [row(images=["x.png"])])


# ---------------------------------------------------------------------------------------------------------------- reward


def test_reward(pairs_of_the_world):
    found = annotate(pairs_of_the_world, {"reward": {"scorer": "contralto.testbed.questions:score"}})
    for one, before in zip(found, pairs_of_the_world, strict=True):
        expected = world.score(before, [checks.answer_text(before, name) for name in ("chosen", "rejected")])
        assert [one["chosen_score"], one["rejected_score"]] == expected
        assert one["reward_margin"] == expected[0] - expected[1]
    assert max(one["reward_margin"] for one in found) > 0


# --------------------------------------------------------------------------------------------------------------- filters

MANY = [{"id": str(i), "x": i, "s": "ab"[i % 2], "d": None if i % 3 else "old", "f": i % 2 == 0} for i in range(10)]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, "0123456789"),
        ({"x": [2, 4]}, "234"),
        ({"x": [None, 2]}, "012"),
        ({"x": [7.5, None]}, "89"),
        ({"s": "a"}, "02468"),
        ({"s": ["a", "c"]}, "02468"),
        ({"s": ["a", "b"]}, "0123456789"),
        ({"f": True}, "02468"),
        ({"f": False, "x": [3, 6]}, "35"),
        ({"d": None}, "124578"),
        ({"d": ["old", None]}, "0123456789"),
        ({"x": {"lowest": 0.25}}, "012"),
        ({"x": {"highest": 0.2}}, "89"),
        ({"x": {"lowest": 0.01}}, "0"),
        ({"x": {"highest": 1}}, "0123456789"),
        ({"x": 3}, "3"),
    ],
)
def test_filters_keep(filters, kept):
    stay, gone = select(MANY, filters)
    assert "".join(r["id"] for r in stay) == kept
    assert sorted(r["id"] for r in [*stay, *(r for r, _ in gone)]) == [r["id"] for r in MANY]


def test_what_is_dropped_has_the_first_reason():
    rows = [{"id": "a", "x": None, "s": "q"}, {"id": "b", "x": 9, "s": "q"}, {"id": "c", "x": 1, "s": "q"}, {"id": "d"}]
    kept, gone = select(rows, {"x": [2, 5], "s": "p"})
    assert not kept
    assert [reason for _, reason in gone] == ["x is not known", "x above 5", "x below 2", "x is not known"]
    assert [r for _, r in select(rows, {"s": "p"})[1]] == ["s is q"] * 3 + ["s is not known"]
    assert [r for _, r in select(rows, {"x": {"lowest": 0.5}})[1]] == [
        "x is not known",
        "x not among the lowest 0.5",
        "x is not known",
    ]


WRONG = [
    ({"contrasts": {}}, {}, "there is no check 'contrasts' .did you mean 'contrast'..; there are contrast, finish"),
    (
        {"contrast": {"tokeniser": "x"}},
        {},
        "check contrast has no setting 'tokeniser' .did you mean 'tokenizer'..; it has tokenizer",
    ),
    ({"contrast": [1]}, {}, "check contrast: its settings must be a mapping"),
    ({"ches": {}}, {}, "check ches needs model"),
    ({"ches": {"model": "testbed:nobody"}}, {}, "the testbed has no model 'nobody'"),
    ({"duplicates": {"threshold": 2}}, {}, "threshold must lie between 0 and 1, not 2"),
    ({"duplicates": {"of": "answers"}}, {}, "of must be pair or prompt, not 'answers'"),
    ({"contamination": {"against": "gsm8k"}}, {}, "against must be a list"),
    ({"contamination": {"against": []}}, {}, "against must be a list"),
    (
        {"contamination": {"against": ["gsm9k"]}},
        {},
        "there is no file gsm9k .did you mean 'gsm8k'..; known by name are gsm8k, hellaswag",
    ),
    ({"contamination": {"against": ["gsm8k"], "n": 0}}, {}, "n must be at least 1, not 0"),
    ({"reward": {"scorer": "no_such_module:f"}}, {}, "no_such_module"),
    ({}, {"jaccard": [0, 1]}, "filter jaccard needs the output of the check contrast"),
    ({"contrast": {}}, {"near_duplicate_of": None}, "needs the output of the check duplicates"),
    ({"contrast": {}}, {"jaccard": [1, 0]}, r"the band \[1, 0\] is empty"),
    ({"contrast": {}}, {"jaccard": [None, None]}, "it would keep no row, or all rows"),
    ({"contrast": {}}, {"jaccard": []}, "it would keep no row, or all rows"),
    ({"contrast": {}}, {"jaccard": {"least": 0.5}}, r"filter jaccard must be a value, a list of values, a band"),
    ({"contrast": {}}, {"jaccard": {"lowest": 50}}, r"lowest must be a fraction in \(0, 1\], not 50"),
]


@pytest.mark.parametrize(("given", "filters", "message"), WRONG)
def test_mistakes_are_found_before_anything_is_spent(given, filters, message):
    with pytest.raises(ValueError, match=message) as error:
        check_settings(given, filters)
    assert "\n" not in str(error.value)


def test_settings_that_are_right_pass_in_silence(capfd):
    check_settings(
        {
            "contrast": {"tokenizer": "testbed:expert"},
            "finish": None,
            "duplicates": {},
            "contamination": {"against": ["gsm8k", __file__]},
            "ches": {"model": "testbed:expert"},
            "reward": {"scorer": "contralto.testbed.questions:score"},
            "image_similarity": {"model": "somebody/clip", "column": "clip"},
        },
        {"no_op": False, "ln_ches": {"lowest": 0.05}, "clip": [0.7, None], "direction": ["chosen", "unclear"]},
    )
    assert capfd.readouterr() == ("", "")


def test_filters_that_no_row_can_answer():
    with pytest.raises(ValueError, match="filter y: no row has this column; the columns are d, f, id, s, x"):
        select(MANY, {"y": 1})
    with pytest.raises(ValueError, match="filter s: a band needs numbers, but a row has 'a'"):
        select(MANY, {"s": [1, 2]})
    assert select([], {"y": 1}) == ([], [])
