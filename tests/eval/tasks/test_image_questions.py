"""MME, MMVP, AMBER and HallusionBench: files of the published forms, scores by hand, and a run inside lm-eval."""

import json

import pytest
from PIL import Image

from contralto.eval import data
from contralto.eval.data.image_questions import question_tasks
from contralto.eval.metrics import image_questions, pope

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


HALLUSION = [
    ("VS", "0", "0", "Is A above B?", "0", "0"),
    ("VS", "1", "0", "Is A above B, by the figure?", "1", "1"),
    ("VS", "1", "1", "Is B above A, by the figure?", "0", "1"),
    ("VD", "0", "0", "Are the lines equal?", "1", "1"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a few questions of each benchmark, in the layout of its release."""
    for category, layout in (("existence", ""), ("OCR", "both")):
        texts = tmp_path / "mme" / category / ("questions_answers_YN" if layout else "")
        texts.mkdir(parents=True)
        for name in ("0001", "0002"):
            picture(tmp_path / "mme" / category / ("images" if layout else "") / f"{name}.png")
            ask = "Is there a dog? Please answer yes or no."
            (texts / f"{name}.txt").write_text(f"{ask}\tYes\n{ask.replace('dog', 'cat')}\tNo\n")
    for index in (1, 2):
        picture(tmp_path / "mmvp" / "MMVP Images" / f"{index}.jpg")
    (tmp_path / "mmvp" / "Questions.csv").write_text(
        "Index,Question,Options,Correct Answer\n1,Is the door open?,(a) Open (b) Closed,(a)\n2,Is the door open?,(a) Open (b) Closed,(b)\n"
    )
    amber = tmp_path / "amber" / "data"
    (amber / "query").mkdir(parents=True)
    picture(tmp_path / "amber" / "image" / "AMBER_1.jpg")
    kinds = ["discriminative-attribute-state", "discriminative-hallucination", "discriminative-relation"]
    truths = [{"id": at, "type": kind, "truth": "no"} for at, kind in enumerate(kinds, 1005)]
    (amber / "annotations.json").write_text(
        json.dumps([{"id": 1, "type": "generative", "truth": ["sky"], "hallu": []}, *truths])
    )
    asked = [{"id": each["id"], "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"} for each in truths]
    (amber / "query" / "query_discriminative.json").write_text(json.dumps(asked))
    names = ("category", "figure_id", "question_id", "question", "gt_answer", "visual_input")
    rows = [{**dict(zip(names, each, strict=True)), "subcategory": "chart", "set_id": "0"} for each in HALLUSION]
    (tmp_path / "hallusionbench").mkdir()
    (tmp_path / "hallusionbench" / "HallusionBench.json").write_text(json.dumps(rows))
    for name in ("VS/chart/0_1.png", "VD/chart/0_0.png"):
        picture(tmp_path / "hallusionbench" / name)
    return tmp_path


def questions(folder, benchmark, **options):
    return data.question_documents(benchmark=benchmark, data_dir=str(folder), **options)[0]


def test_both_layouts_of_mme(folder):
    rows = questions(folder, "mme")
    assert [row["id"] for row in rows[:3]] == ["OCR/0001-1", "OCR/0001-2", "OCR/0002-1"]
    assert rows[0]["image"] == "OCR/images/0001.png"
    assert rows[0]["prompt"] == "<image>Is there a dog? Please answer yes or no."
    assert [row["label"] for row in rows[:2]] == ["yes", "no"]
    (other, *_) = questions(folder, "mme", question_prompt="llava")
    assert other["prompt"] == "<image>Is there a dog?" + pope.SUFFIXES["llava"]


def test_pairs_of_mmvp(folder):
    rows = questions(folder, "mmvp")
    assert [(row["label"], row["groups"]["pair"], row["image"]) for row in rows] == [
        ("a", "1", "MMVP Images/1.jpg"),
        ("b", "1", "MMVP Images/2.jpg"),
    ]
    assert rows[0]["prompt"] == "<image>Is the door open? (a) Open (b) Closed"


def test_dimensions_of_amber(folder):
    found = {
        part: [row["id"] for row in questions(folder, "amber", part=part)]
        for part in ("existence", "attribute", "relation")
    }
    assert found == {"existence": [1006], "attribute": [1005], "relation": [1007]}


def test_questions_of_hallusionbench_without_an_image(folder):
    rows = questions(folder, "hallusionbench", question_prompt="official")
    assert [(row["image"], row["prompt"][:7], row["groups"]["figure"]) for row in rows] == [
        ("", "Is A ab", ""),
        ("VS/chart/0_1.png", "<image>", "VS_chart_0_1"),
        ("VS/chart/0_1.png", "<image>", "VS_chart_0_1"),
        ("VD/chart/0_0.png", "<image>", "VD_chart_0_0"),
    ]
    assert [row["groups"]["question"] for row in rows] == [
        "VS_chart_0_0",
        "VS_chart_0_0",
        "VS_chart_0_1",
        "VD_chart_0_0",
    ]


@pytest.mark.parametrize(
    ("change", "benchmark", "message"),
    [
        (
            lambda root: (root / "mme/OCR/images/0001.png").unlink(),
            "mme",
            r"0001\.txt has questions, and there is no image 0001",
        ),
        (
            lambda root: (root / "mme/existence/0001.txt").write_text("Is it?\n"),
            "mme",
            r"0001\.txt, line 1: a line is a question, a tab",
        ),
        (lambda root: (root / "mmvp/MMVP Images/2.jpg").unlink(), "mmvp", r"question 2: there is no image .*2\.jpg"),
        (
            lambda root: (root / "mmvp/Questions.csv").write_text("Index,Question\n1,a\n"),
            "mmvp",
            r"Questions\.csv: the field Options",
        ),
        (lambda root: (root / "amber/data/annotations.json").write_text('[{"id": 1}]'), "amber", "has no id 1005"),
        (lambda root: (root / "hallusionbench/HallusionBench.json").unlink(), "hallusionbench", "there is no file"),
    ],
)
def test_what_is_missing_is_named(folder, change, benchmark, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        questions(folder, benchmark, part="existence")


def test_an_unknown_prompt_or_no_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"there is no question_prompt 'lava' \(did you mean 'llava'\?\)"):
        questions(folder, "mme", question_prompt="lava")
    with pytest.raises(ValueError, match="mme reads local files: name the folder as data_dir"):
        data.question_documents(benchmark="mme")


def test_answers_are_scored_as_by_the_benchmarks():
    """By hand: two images, one of them with both answers right; no is positive in AMBER's rates."""
    docs = [
        {"label": label, "category": "count", "groups": {"image": image}} for image in "xy" for label in ("yes", "no")
    ]
    values = [
        image_questions.results(doc, answer, parser="start")
        for doc, answer in zip(docs, ("Yes.", "no", "yes", "It is not."), strict=True)
    ]
    assert [value["acc"] for value in values] == [1, 1, 1, 0]
    assert [value["unparsed"] for value in values] == [0, 0, 0, 1]
    assert image_questions.all_right([value["image_acc"] for value in values]) == 0.5
    assert image_questions.mme_perception([value["mme"] for value in values]) == 100 * (0.75 + 0.5)
    assert image_questions.mme_cognition([value["mme"] for value in values]) == 0
    pairs = [value["f1"] for value in values]
    assert pairs == [(False, False), (True, True), (False, False), (True, None)]
    assert (pope.precision(pairs), pope.recall(pairs)) == (1.0, 0.5)
    assert image_questions.results({"label": "b", "category": "", "groups": {"pair": "1"}}, "(b)", parser="choice") == {
        "acc": 1.0,
        "unparsed": 0.0,
        "pair_acc": ("1", 1.0),
        "mme": ("", "", 1.0),
    }


def test_tasks_are_checked_and_loaded_by_lm_eval(folder, tmp_path):
    local = data.local_tasks(["mme", "mmvp", "amber", "amber_[aer]*", "hallusionbench"], folder, tmp_path)
    assert local.tasks == [
        "mme",
        "mmvp",
        "amber",
        "amber_attribute",
        "amber_existence",
        "amber_relation",
        "hallusionbench",
    ]
    manager = TaskManager(include_path=[str(data.TASKS)], include_defaults=False, metadata=local.metadata)
    assert set(question_tasks()) <= set(manager.all_tasks)
    loaded = manager.load("hallusionbench")["tasks"]["hallusionbench"]
    docs = list(loaded.eval_docs)
    assert loaded.doc_to_image(docs[0]) == []
    assert len(loaded.doc_to_image(docs[1])) == 1
    assert loaded.process_results(docs[0], ["No."])["acc"] == 1.0
    assert loaded.doc_to_text(docs[1]).startswith("<image>Is A above B, by the figure?")


@pytest.mark.slow
def test_every_benchmark_runs(folder, tmp_path, monkeypatch, capsys):
    from contralto import cli

    monkeypatch.chdir(tmp_path)
    tasks = "mme,mmvp,amber,hallusionbench"
    argv = [
        "eval",
        "--model",
        "contralto-vlm",
        "--tasks",
        tasks,
        "--data_dir",
        str(folder),
        "--apply_chat_template",
        "--device",
        "cpu",
    ]
    assert cli.main([*argv, "--output_path", "out", "--model_args", "pretrained=testbed:vision-0"]) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert {"acc,none", "image_acc,none", "perception,none", "cognition,none"} <= set(results["mme"])
    assert {"pair_acc,none"} <= set(results["mmvp"])
    assert {"figure_acc,none", "question_acc,none"} <= set(results["hallusionbench"])
    assert {"acc,none", "f1,none"} <= set(results["amber"])
