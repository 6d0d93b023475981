"""contralto's tasks and local data inside lm-eval, offline, on the embedded models and on files of the true formats."""

import gzip
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lm_eval")
from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from contralto import testbed
from contralto.eval import data
from contralto.eval.data.hub import hub_tasks
from contralto.eval.metrics import chair, openended, pope
from contralto.eval.metrics.vocabulary import read_synonyms
from contralto.testbed import scenes, worlds
from contralto.testbed.measure import decode, is_right

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"
TESTBED = ["testbed_arithmetic", "testbed_stories", "testbed_story_writing", "testbed_captions"]
CALLS = []
SCENES = [f"testbed_scenes_{kind}" for kind in scenes.NEGATIVES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder of the true formats, the images drawn."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(FIXTURES, root, dirs_exist_ok=True)
    pictures = [scene.image() for scene in islice(scenes.scenes(5, "test"), 3)]
    for path, picture in zip(
        ("coco/val2014/COCO_val2014_000000000001.jpg", "coco/val2014/COCO_val2014_000000000002.jpg"),
        (pictures[0], pictures[1].convert("L")),
        strict=False,
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / path)
    (root / "gqa" / "images").mkdir(parents=True)
    pictures[2].save(root / "gqa" / "images" / "2354786.jpg")
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """lm-eval asks the system for its compilers and packages, which takes seconds."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


def _manager(**metadata):
    return TaskManager(include_path=[str(data.TASKS)], include_defaults=False, metadata=metadata)


def _run(tasks, model, *, vision=False, manager=None, **how):
    return simple_evaluate(
        model="hf-multimodal" if vision else "hf",
        model_args={"pretrained": str(testbed.path(model)), "dtype": "float32"},
        tasks=tasks,
        task_manager=manager or _manager(),
        device="cpu",
        **{"batch_size": 16, **how},
    )


def _score(results, task, metric, filter_name="none"):
    return results["results"][task][f"{metric},{filter_name}"]


# --------------------------------------------------------------------------------------------------------------- testbed


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_arithmetic_is_what_the_demo_decodes(chat):
    n = 8
    results = _run(["testbed_arithmetic"], "expert", manager=_manager(n=n), apply_chat_template=chat)
    problems = list(islice(worlds.problems(2027, "test"), n))
    texts = decode(testbed.load("expert"), testbed.tokenizer(), problems)
    rows = results["samples"]["testbed_arithmetic"]
    assert [row["resps"][0][0] for row in rows] == texts
    hits = [is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]
    assert [row["exact_match"] for row in rows] == hits
    assert _score(results, "testbed_arithmetic", "exact_match") == sum(hits) / n
    assert [row["doc"]["steps"] for row in rows] == [len(problem.steps) for problem in problems]
    assert 0 < sum(row["stopped_early"] for row in rows) <= n - sum(hits)


@pytest.mark.parametrize("name", [*TESTBED, SCENES[0]])
def test_prompts_have_the_form_that_the_models_learned(name):
    task = _manager(n=1).load(name)["tasks"][name]
    doc, how = task.eval_docs[0], {"chat_template": lambda messages, **_: f"marked {messages}"}
    plain = task.fewshot_context(doc, 0)
    assert task.fewshot_context(doc, 0, apply_chat_template=True, **how) == plain
    assert plain.startswith("<|user|>") == plain.endswith("<|assistant|>") == ("stor" not in name)
    request = task.construct_requests(doc, plain, metadata=(name, 0, 1), apply_chat_template=True, **how)
    for each in request if isinstance(request, list) else [request]:
        assert each.args[0] == plain


def _solve(**doc):
    task = _manager(n=1).load("testbed_arithmetic")["tasks"]["testbed_arithmetic"]
    return lambda text: {name for name, value in task.process_results(doc, [text]).items() if value}


def test_how_a_solution_is_wrong():
    verdict = _solve(answer="13", told="finds 4, loses 2, wins 2", steps=3)
    assert verdict("finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. wins 2: 11 + 2 = 13. #### 13") == {"exact_match"}
    assert verdict("finds 4, so 13. #### 13") == {"exact_match"}
    assert verdict("finds 4, so 13. loses 2, so 11. #### 11") == {"stopped_early"}
    assert verdict("finds 4, so 13. loses 2, so 11. wins 2, so 12. #### 12") == set()
    assert verdict("loses 2, so 7. #### 7") == set()
    assert verdict("finds 4, so 13. loses") == {"unparsed"}


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stories_are_chosen_by_the_sum_of_log_probabilities(chat):
    import torch

    n = 16
    results = _run(["testbed_stories"], "expert", manager=_manager(n=n), apply_chat_template=chat)
    model, tokenizer, right, norm = testbed.load("expert"), testbed.tokenizer(), [], []
    for item in islice(worlds.items(2027, "test"), n):
        sums = []
        for ending in item.endings:
            start, ids = len(tokenizer(item.context)["input_ids"]), tokenizer(item.context + ending)["input_ids"]
            with torch.no_grad():
                told = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(told[i - 1, ids[i]]) for i in range(start, len(ids))))
        right.append(max(range(4), key=sums.__getitem__) == item.label)
        norm.append(max(range(4), key=lambda i: sums[i] / len(item.endings[i])) == item.label)
    rows = results["samples"]["testbed_stories"]
    assert [row["acc"] for row in rows] == right
    assert [row["acc_norm"] for row in rows] == norm
    assert {row["doc"]["place"] for row in rows} <= set(worlds.PLACES)
    assert all(f" to the {row['doc']['place']} " in row["doc"]["context"].split(". ")[-1] for row in rows)


@pytest.mark.slow
def test_story_writing():
    n = 4
    results = _run(["testbed_story_writing"], "expert", manager=_manager(n=n))
    rows = results["samples"]["testbed_story_writing"]
    told = [row["resps"][0][0] for row in rows]
    assert [len(testbed.tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in told] == [120] * n
    counts = [[openended.ngram_counts(text, n=size) for size in (2, 3, 4)] for text in told]
    assert _score(results, "testbed_story_writing", "diversity") == openended.diversity(counts)
    for i, size in enumerate((2, 3, 4)):
        expected = openended.repetition([each[i] for each in counts])
        assert _score(results, "testbed_story_writing", f"rep_{size}") == expected
    for story, row in zip(worlds.stories(2027, "test"), rows, strict=False):
        assert row["doc"]["prompt"] == story.scenes[0].text
        assert row["doc"]["prompt"] + row["doc"]["reference"] == story.text


def test_how_a_story_is_judged():
    task = _manager(n=1).load("testbed_story_writing")["tasks"]["testbed_story_writing"]
    known = worlds.SPECIAL["Ben", "barn"]
    verb, other = worlds.ACTIONS[known.action][0], next(a for a in worlds.ACTIONS if a != known.action)
    prompt = f"Ben went out to the barn door. He {verb} the old {known.object}."
    told = f"He came back to the hill top. He {other} the odd {known.object}. Then he went out to the barn door. " + (
        f"He {verb} the red {known.object}. It was"
    )
    found = task.process_results({"prompt": prompt}, [told])
    assert found["scenes"] == 3
    assert found["distinct_scenes"] == pytest.approx(2 / 3)
    assert found["valid_events"] == pytest.approx(2 / 3)
    nothing = task.process_results({"prompt": ""}, ["and then"])
    assert nothing["valid_events"] == nothing["distinct_scenes"] == nothing["scenes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scenes_are_asked_about_and_described(chat):
    n = 2
    tasks = ["testbed_scenes_random", "testbed_captions"]
    results = _run(tasks, "vision-0", vision=True, manager=_manager(n=n), apply_chat_template=chat)
    shown = list(islice(scenes.scenes(2027, "test"), n))
    rows = results["samples"]["testbed_scenes_random"]
    asked = scenes.questions(shown, "random")
    assert [(row["doc"]["text"], row["doc"]["label"]) for row in rows] == [
        (q.text, "yes" if q.label else "no") for q in asked
    ]
    assert [row["doc"]["image"] for row in rows] == [number for number in range(n) for _ in range(6)]
    pairs = [(row["doc"]["label"] == "yes", {"yes": True, "no": False}[row["resps"][0][0]]) for row in rows]
    assert [tuple(row["f1"]) for row in rows] == pairs
    assert {row["resps"][0][0] for row in rows} == set(results["configs"][tasks[0]]["metadata"]["yes_no"])
    rates = pope.rates(pairs)
    for metric in ("precision", "recall", "f1", "yes_ratio", "unparsed"):
        assert _score(results, "testbed_scenes_random", metric) == pytest.approx(getattr(rates, metric))
    assert _score(results, "testbed_scenes_random", "acc") == pytest.approx(rates.accuracy)
    assert results["results"]["testbed_scenes_random"]["f1_stderr,none"] == "N/A"
    counts = []
    for scene, row in zip(shown, results["samples"]["testbed_captions"], strict=True):
        said = scenes.mentioned(row["resps"][0][0])
        assert said
        wrong = sum(name not in scene.objects for name in said)
        counts.append(chair.CaptionCounts(len(said), wrong, len(scene.objects & set(said)), len(scene.objects)))
    rates = chair.rates(counts)
    for metric in chair.ChairRates._fields:
        assert _score(results, "testbed_captions", metric) == pytest.approx(getattr(rates, metric))


@pytest.mark.parametrize("name", ["vision-0", pytest.param("vision-2", marks=pytest.mark.full)])
@pytest.mark.slow
def test_scenes_are_answered_as_on_the_card(name):
    """The card reads logits after a prompt of its own making; its figures are those of greedy decoding."""
    card = (Path(testbed.__file__).parent / "VISION.md").read_text()
    results = _run(["testbed_scenes_adversarial"], name, vision=True, manager=_manager(n=400), batch_size=400)
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} | adversarial | greedy |"))
    cells = [cell.split()[0] for cell in line.split("|")[4:9]]
    found = [
        _score(results, "testbed_scenes_adversarial", metric)
        for metric in ("acc", "precision", "recall", "f1", "yes_ratio")
    ]
    assert [f"{value:.3f}" for value in found] == cells


def test_cases_say_where_an_object_is():
    task = _manager(n=60).load("testbed_scenes_adversarial")["tasks"]["testbed_scenes_adversarial"]
    shown = list(islice(scenes.scenes(2027, "test"), 60))
    seen = Counter()
    for doc in task.eval_docs:
        scene, name = shown[doc["image"]], doc["text"].split()[3]
        low = {thing.name: "lower half" if thing.cell >= 8 else "upper half" for thing in scene.things}
        home = "at home" if name in scenes.HOMES[scene.place] else "stray"
        assert doc["case"] == f"{home}, {low.get(name, 'absent')}"
        seen[doc["case"]] += 1
    assert len(seen) == 6


def test_the_picture_is_the_scenes():
    task = _manager(n=4).load("testbed_captions")["tasks"]["testbed_captions"]
    for doc, scene in zip(task.eval_docs, islice(scenes.scenes(2027, "test"), 4), strict=True):
        (image,) = task.doc_to_image(doc)
        assert image == scene.image()
        assert task.doc_to_image(doc)[0] is image
        assert doc["objects"] == sorted(scene.objects)


def test_split_and_seed_are_options():
    asked = {}
    for split, seed in (("test", 2027), ("dev", 2027), ("test", 1)):
        task = _manager(n=5, split=split, world_seed=seed).load("testbed_arithmetic")["tasks"]["testbed_arithmetic"]
        asked[split, seed] = [doc["question"] for doc in task.eval_docs]
        assert asked[split, seed] == [p.question for p in islice(worlds.problems(seed, split), 5)]
    assert len({tuple(each) for each in asked.values()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a number of documents, at least 1, not 0"),
        ({"n": "many"}, "not 'many'"),
        ({"split": "validation"}, "split must be train, dev, test, not 'validation'"),
    ],
)
@pytest.mark.parametrize("task", [*TESTBED, SCENES[0]])
def test_testbed_refusals(task, options, message):
    with pytest.raises(ValueError, match=message):
        _manager(**options).load(task)


# ------------------------------------------------------------------------------------------------------- what others read


@pytest.mark.parametrize(
    "name", sorted({*TESTBED, *SCENES, "chair", *(t for t in data.pope_tasks() if t.count("_") == 2)})
)
def test_metadata_is_about_the_task(name, folder):
    manager = _manager(data_dir=str(folder), n=2)
    if name.startswith("pope_") and name not in ("pope_coco_random", "pope_aokvqa_random", "pope_gqa_adversarial"):
        config = load_yaml(data.TASKS / "pope" / f"{name}.yaml", resolve_func=False)
        assert config["dataset_kwargs"] == dict(zip(("source", "negatives"), name.split("_")[1:], strict=True))
        fields = {"image"}
    else:
        task = manager.load(name)["tasks"][name]
        config, fields = task.config.to_dict(), set(task.features)
        json.dumps([dict(doc) for doc in task.eval_docs])
    facts = config["metadata"]
    better = {each["metric"]: each["higher_is_better"] for each in config["metric_list"]}
    assert better[facts["main_metric"]] is facts["higher_is_better"]
    assert {facts[key] for key in ("cluster", "bucket") if key in facts} <= fields
    assert ("yes_no" in facts) == ("yes_ratio" in better)


# ------------------------------------------------------------------------------------------------------------ local files


def _local(tasks, folder, tmp_path, **options):
    local = data.local_tasks(tasks, folder, tmp_path, options)
    return local, _manager(**local.metadata, **options)


def test_gsm8k_runs_from_local_files(folder, tmp_path):
    local, manager = _local(["gsm8k_cot", "gsm8k"], folder, tmp_path)
    results = _run(local.tasks, "expert", manager=manager, gen_kwargs={"max_gen_toks": 8})
    assert set(results["results"]) == {"gsm8k_cot", "gsm8k"}
    assert results["n-samples"]["gsm8k_cot"] == {"original": 3, "effective": 3}
    assert results["n-shot"] == {"gsm8k": 5, "gsm8k_cot": 8}
    rows = [row for row in results["samples"]["gsm8k_cot"] if row["filter"] == "strict-match"]
    assert [row["target"] for row in rows] == ["30", "2,500", "11"]
    prompt = rows[0]["arguments"][0][0]
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.count("\n\nQ: ") == 8
    assert prompt.endswith("How many apples does Mia have left?\nA:")
    shots = results["samples"]["gsm8k"][0]["arguments"][0][0]
    train = [json.loads(line)["question"] for line in (folder / "gsm8k" / "train.jsonl").read_text().splitlines()]
    assert sum(question in shots for question in train) == 5


def test_gsm8k_answers_are_judged_as_lm_eval_judges(folder, tmp_path):
    local, manager = _local(["gsm8k_cot"], folder, tmp_path)
    task = manager.load(local.tasks)["tasks"]["gsm8k_cot"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    for instance, said in zip(
        task.instances, ("so 30. The answer is 30.", "The answer is 2,500.", "It is 12"), strict=True
    ):
        instance.resps.append(said)
    task.apply_filters()
    strict = [
        task.process_results(doc, [instance.filtered_resps["strict-match"]])["exact_match"]
        for doc, instance in zip(task.eval_docs, task.instances, strict=True)
    ]
    assert strict == [1, 1, 0]


def test_hellaswag_runs_from_local_files(folder, tmp_path):
    local, manager = _local(["hellaswag"], folder, tmp_path)
    results = _run(local.tasks, "expert", manager=manager)
    rows = results["samples"]["hellaswag"]
    assert [row["target"] for row in rows] == [3, 0, 1]
    assert rows[0]["arguments"][0][0] == "Roof shingle removal: A man is sitting on a roof. He"
    assert rows[0]["arguments"][0][1] == " plays a drum in a small boat."
    assert rows[1]["arguments"][0][0].startswith("Home and Garden: How to plant a rose. Dig a hole.")
    assert {"acc,none", "acc_norm,none"} <= set(results["results"]["hellaswag"])
    assert results["configs"]["hellaswag"]["metadata"]["main_metric"] == "acc_norm"


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot", "gsm8k_cot_self_consistency", "hellaswag"])
def test_local_tasks_are_lm_evals_own_but_for_the_data(task, folder, tmp_path):
    ours = load_yaml(data.local_tasks([task], folder, tmp_path).tasks[0], resolve_func=False)
    theirs = load_yaml(hub_tasks()[task], resolve_func=False)
    changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert changed <= {"tag", "custom_dataset", "dataset_kwargs", "metadata", "training_split"}
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]
    assert ours["task"] == task


@pytest.mark.slow
def test_pope_runs_from_the_official_files(folder, tmp_path):
    local, manager = _local(["pope_coco", "pope_aokvqa_random", "pope_gqa_adversarial"], folder, tmp_path)
    assert local.tasks == ["pope_coco", "pope_aokvqa_random", "pope_gqa_adversarial"]
    results = _run(local.tasks, "vision-0", vision=True, manager=manager, apply_chat_template=True)
    rows = results["samples"]["pope_coco_random"]
    assert len(rows) == 6
    assert (
        rows[0]["doc"]["prompt"] == "Is there a cup in the image?\nAnswer the question using a single word or phrase."
    )
    assert rows[0]["arguments"][0][0].startswith("<bos><|user|><image>Is there a cup in the image?\nAnswer")
    assert str(folder) not in json.dumps(rows[0]["doc"])
    splits = [name for name in results["samples"] if name.startswith("pope_coco_")]
    pairs = {name: [tuple(row["f1"]) for row in results["samples"][name]] for name in splits}
    for name in splits:
        assert _score(results, name, "f1") == pope.rates(pairs[name]).f1
    pooled = pope.rates([pair for name in splits for pair in pairs[name]])
    assert _score(results, "pope_coco", "acc") == pytest.approx(pooled.accuracy)


def test_a_group_pools_what_can_be_pooled(folder):
    group = _manager(data_dir=str(folder)).load("pope_coco")["groups"]["pope_coco"]
    sizes, values = (6, 4, 2), (0.5, 0.25, 1.0)
    splits = {
        f"pope_coco_{kind}": {
            "sample_len": size,
            **{f"{metric},none": value for metric in pope.document_metrics(True, True)},
        }
        for kind, size, value in zip(("random", "popular", "adversarial"), sizes, values, strict=True)
    }
    found = group.aggregate(splits)
    for metric in ("acc", "yes_ratio", "unparsed"):
        assert found[f"{metric},none"] == pytest.approx(6 / 12)
    for metric in ("precision", "recall", "f1"):
        assert found[f"{metric},none"] == pytest.approx(7 / 12)


@pytest.mark.parametrize("prompt", pope.SUFFIXES)
def test_pope_prompts_and_parsers(prompt, folder):
    manager = _manager(data_dir=str(folder), pope_prompt=prompt, pope_parser="official")
    task = manager.load("pope_coco_random")["tasks"]["pope_coco_random"]
    doc = task.eval_docs[1]
    assert task.doc_to_text(doc) == "<image>Is there a car in the image?" + pope.SUFFIXES[prompt]
    assert task.process_results(doc, ["Perhaps"])["f1"] == (False, True)
    (image,) = task.doc_to_image(task.eval_docs[4])
    assert image.mode == "RGB"
    with Image.open(folder / "coco" / "val2014" / doc["image"].replace("1.jpg", "2.jpg")) as found:
        assert found.mode == "L"


def test_pope_images_elsewhere(folder, tmp_path):
    shutil.copytree(folder / "pope", tmp_path / "pope")
    task = "pope_gqa_adversarial"
    manager = _manager(data_dir=str(tmp_path), gqa_images=str(folder / "gqa" / "images"))
    loaded = manager.load(task)["tasks"][task]
    assert len(loaded.doc_to_image(loaded.eval_docs[0])) == 1


@pytest.mark.slow
def test_chair_runs_from_coco_annotations(folder, tmp_path):
    local, manager = _local(["chair"], folder, tmp_path, n=2)
    results = _run(local.tasks, "vision-0", vision=True, manager=manager, apply_chat_template=True)
    rows = results["samples"]["chair"]
    assert [row["doc"]["objects"] for row in rows] == [["cup", "spoon", "wine glass"], ["bench", "car"]]
    vocabulary = read_synonyms(folder / "chair" / "synonyms.txt")
    counts = [chair.count(row["resps"][0][0], row["doc"]["objects"], vocabulary) for row in rows]
    assert _score(results, "chair", "recall") == chair.rates(counts).recall
    assert _score(results, "chair", "chair_i") == chair.rates(counts).chair_i


BROKEN = {
    "no folder": ("", None, "gsm8k", "data_dir must be a folder"),
    "no file": ("gsm8k/test.jsonl", None, "gsm8k_cot", r"there is no file .*gsm8k/test\.jsonl"),
    "shots without a file": ("gsm8k/train.jsonl", None, "gsm8k", r"there is no file .*gsm8k/train\.jsonl"),
    "no rows": ("gsm8k/test.jsonl", "\n\n", "gsm8k_cot", "test.jsonl has no rows"),
    "not JSON": (
        "gsm8k/test.jsonl",
        '{"question": "a", "answer": "#### 1"}\n{oops}\n',
        "gsm8k_cot",
        "line 2: not JSON",
    ),
    "a field is missing": (
        "gsm8k/test.jsonl",
        '\n{"answer": "#### 1"}',
        "gsm8k_cot",
        "line 2: the field question must",
    ),
    "no number": (
        "gsm8k/test.jsonl",
        '{"question": "a", "answer": "1"}',
        "gsm8k_cot",
        "line 1: the field answer must end",
    ),
    "a list": ("gsm8k/test.jsonl", "7", "gsm8k_cot", "line 1: a row must be a JSON object, not 7"),
    "three endings": (
        "hellaswag/validation.jsonl",
        '{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d", "e"], "label": 0}',
        "hellaswag",
        r"line 1: the field endings must be a list of four texts, not \['c'",
    ),
    "label 4": (
        "hellaswag/validation.jsonl",
        '{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d", "e", "f"], "label": 4}',
        "hellaswag",
        "line 1: the field label must be 0, 1, 2 or 3, not 4",
    ),
    "no context": (
        "hellaswag/validation.jsonl",
        '{"activity_label": "a", "ctx_a": "b", "endings": ["c", "d", "e", "f"], "label": 2}',
        "hellaswag",
        "line 1: the field ctx_b must be a string, not None",
    ),
    "no questions": ("pope/coco/coco_pope_random.json", None, "pope_coco_random", "needs one question file coco_pope"),
    "two files": ("pope/coco_pope_random.jsonl", "{}", "pope_coco_random", "there are several: "),
    "maybe": (
        "pope/coco/coco_pope_random.json",
        '{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "maybe"}',
        "pope_coco_random",
        "line 1: the field label must be yes or no, not 'maybe'",
    ),
    "a number for a text": (
        "pope/seem/gqa/gqa_pope_seem_adversarial.json",
        '[{"question_id": 1, "image": 5, "text": "Is it?", "label": "no"}]',
        "pope_gqa_adversarial",
        "row 1: the field image must be a string, not 5",
    ),
    "no question id": (
        "pope/seem/gqa/gqa_pope_seem_adversarial.json",
        '[{"image": "5.jpg", "text": "Is it?", "label": "no"}]',
        "pope_gqa_adversarial",
        "row 1: the field question_id must be a number, not None",
    ),
    "half an array": (
        "pope/seem/gqa/gqa_pope_seem_adversarial.json",
        '[{"question_id": 1}, ',
        "pope_gqa_adversarial",
        "begins like a JSON array but is none",
    ),
    "an image is missing": (
        "coco/val2014/COCO_val2014_000000000002.jpg",
        None,
        "pope_coco",
        "1 of 2 images are not in",
    ),
    "a split of the group": ("pope/coco/coco_pope_popular.json", None, "pope_coco", "file coco_pope.*_popular"),
    "no synonyms": ("chair/synonyms.txt", None, "chair", "there is no synonym list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_local_refusals(case, folder, tmp_path):
    file, text, task, message = BROKEN[case]
    root = tmp_path / "data"
    if file:
        shutil.copytree(folder, root)
        (root / file).unlink() if text is None else (root / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        data.local_tasks([task], root, tmp_path)


def test_rows_are_mapped_once_by_a_function():
    """Only a function that reads nothing but its rows; others are called again."""
    calls, rows = [], data.dataset({"test": [{"x": 1}, {"x": 2}], "train": [{"x": 3}]})

    def process(split):
        def double(row):
            CALLS.append(row)
            return {"x": 2 * row["x"]}

        def counted(row):
            calls.append(row)
            return {"x": 3 * row["x"]}

        return [split.map(double)["x"][:], split.map(counted)["x"][:]]

    CALLS.clear()
    assert [process(rows["test"]) for _ in range(3)] == [[[2, 4], [3, 6]]] * 3
    assert (len(CALLS), len(calls)) == (2, 6)
    assert process(rows["train"]) == [[6], [9]]
    assert rows["test"]["x"][:] == [1, 2]
    assert rows["test"].map(lambda batch: {"x": [5, 5]}, batched=True)["x"][:] == [5, 5]
    assert rows["test"].select([1])["x"][:] == [2]


def test_rows_of_a_compressed_file(folder, tmp_path):
    """A file as it is published, compressed by gzip, gives the rows of the plain one; half a file and two files are rejected."""
    shutil.copytree(folder / "hellaswag", tmp_path / "hellaswag")
    plain, packed = (tmp_path / "hellaswag" / f"validation.jsonl{end}" for end in ("", ".gz"))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ValueError, match=r"there are both .*validation\.jsonl and validation\.jsonl\.gz"):
        data.local_tasks(["hellaswag"], tmp_path, tmp_path)
    files = {"validation": str(plain)}
    whole = data.jsonl_dataset(benchmark="Rowan/hellaswag", files=files)["validation"].to_list()
    plain.unlink()
    made = Path(data.local_tasks(["hellaswag"], tmp_path, tmp_path).tasks[0]).read_text()
    assert str(packed) in made
    files = {"validation": str(packed)}
    assert data.jsonl_dataset(benchmark="Rowan/hellaswag", files=files)["validation"].to_list() == whole
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole file compressed by gzip"):
        data.local_tasks(["hellaswag"], tmp_path, tmp_path)


def test_no_images_folder(folder, tmp_path):
    shutil.copytree(folder / "pope", tmp_path / "pope")
    with pytest.raises(ValueError, match=r"there is no folder .*val2014, where the images should be"):
        data.local_tasks(["pope_coco_random"], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "POPE and CHAIR read local files: name the folder"),
        ({"pope_prompt": "loud"}, "no POPE prompt 'loud'; there are official, vcd, ritual, llava"),
        ({"pope_parser": "strict"}, "no POPE parser 'strict'; there are words, official"),
    ],
)
def test_pope_refusals(options, message, folder):
    where = {"data_dir": str(folder)} if options else {}
    with pytest.raises(ValueError, match=message):
        _manager(**where, **options).load("pope_coco_random")


def test_an_image_that_is_none(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.jpg is not an image that Pillow can read"):
        data.image(tmp_path / "a.jpg")


def test_other_tasks_are_left_alone(folder, tmp_path):
    tasks = ["testbed_arithmetic", "arc_easy", "pope_gqa_adversarial"]
    assert data.local_tasks(tasks, folder, tmp_path) == (tasks, {"data_dir": str(folder)})
    assert not list(tmp_path.iterdir())


def test_patterns(folder, tmp_path):
    found = data.local_tasks(["hella*", "pope_gqa_adv*", "testbed_*"], folder, tmp_path).tasks
    assert found == [str(tmp_path / "hellaswag.yaml"), "pope_gqa_adversarial", "testbed_*"]
