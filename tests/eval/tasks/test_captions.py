"""AMBER's captions, MMHal-Bench and CHAIR at equal length: files of the published forms, counts by hand, and runs inside lm-eval."""

import importlib.util
import json

import pytest
from PIL import Image

from contralto.eval import data
from contralto.eval.data.captions import read_amber_words
from contralto.eval.metrics import amber, chair
from contralto.eval.metrics.vocabulary import ObjectVocabulary

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager

WORDS = {
    "sky": [],
    "person": ["man", "woman"],
    "ship": ["boat"],
    "dog": ["puppy"],
    "cloud": [],
    "bench": [],
    "tree": ["bush"],
}
MMHAL = [
    {
        "question_type": kind,
        "question_topic": "animal",
        "image_id": "0001",
        "image_src": "https://farm.example/1/0001.jpg",
        "image_content": ["Cat", "Bed"],
        "question": f"How many cats are there ({kind})?",
        "gt_answer": "There is one cat.",
        "model_answer": "",
    }
    for kind in ("counting", "attribute")
]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "amber" / "data"
    (root / "query").mkdir(parents=True)
    for number in (1, 2):
        picture(tmp_path / "amber" / "image" / f"AMBER_{number}.jpg")
    (root / "relation.json").write_text(json.dumps(WORDS))
    (root / "safe_words.txt").write_text("light\nline\n")
    truths = [["sky", "ship", "ship", "person"], ["tree"]]
    rows = [
        {"id": number, "type": "generative", "truth": truth, "hallu": ["dog", "cloud"]}
        for number, truth in enumerate(truths, 1)
    ]
    (root / "annotations.json").write_text(json.dumps(rows))
    asked = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in (1, 2)]
    (root / "query" / "query_generative.json").write_text(json.dumps(asked))
    picture(tmp_path / "mmhal" / "images" / "0001.jpg")
    (tmp_path / "mmhal" / "response_template.json").write_text(json.dumps(MMHAL))
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- AMBER


def counted(nouns, truth=("sky", "ship", "ship", "person"), similar=lambda one, other: False):
    return amber.count(nouns, truth, ("dog", "cloud"), amber.AmberWords(WORDS, frozenset({"light"})), similar)


def test_captions_are_counted_as_by_the_released_code():
    """A word that stands for an object covers it, of an object listed twice the first; a safe word and one of no list are never wrong."""
    assert counted(["man", "boat", "ship", "light", "hope", "sky"]) == amber.AmberCounts(4, 0, 3, 4, 0, 2)
    assert counted(["puppy", "dog", "bench"]) == amber.AmberCounts(3, 3, 0, 4, 1, 2)
    assert counted([]) == amber.AmberCounts(0, 0, 0, 4, 0, 2)


def test_similar_words_count_as_in_the_released_code():
    """What is similar to an object of the image is right and covers it, and may stand for an imagined one, too."""
    near = {("bush", "sky"), ("bush", "dog"), ("bench", "cloud")}
    found = counted(["bush", "bench"], similar=lambda one, other: (one, other) in near)
    assert found == amber.AmberCounts(named=2, wrong=1, covered=1, present=4, imagined=2, expected=2)


def test_rates_are_quotients_of_sums():
    values = [amber.document_metrics(each) for each in (counted(["puppy", "sky"]), counted(["man"], ("person",)))]
    assert amber.chair([each["chair"] for each in values]) == 1 / 3
    assert amber.cover([each["cover"] for each in values]) == 2 / 5
    assert amber.cog([each["cog"] for each in values]) == 1 / 4
    assert [each["hal"] for each in values] == [1.0, 0.0]


def test_plain_nouns_are_words_of_the_lists(folder):
    words = read_amber_words(folder / "amber" / "data")
    reader = amber.reader_of("plain")
    assert reader.nouns("Two Puppies, and a man.", words.vocabulary) == ["two", "puppy", "and", "a", "man"]
    assert reader.similar("dog", "dog")
    assert not reader.similar("dog", "puppy")


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_the_official_reader_names_what_it_needs():
    with pytest.raises((ModuleNotFoundError, ValueError), match=r"nltk\.downloader punkt_tab|spacy"):
        amber.reader_of("official")
    with pytest.raises(ValueError, match=r"there is no amber_words 'plan' \(did you mean 'plain'\?\)"):
        amber.reader_of("plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "safe_words.txt").unlink(), r"there is no file .*safe_words\.txt"),
        (lambda root: (root / "relation.json").write_text("{"), r"relation\.json is not JSON"),
        (lambda root: (root / "relation.json").write_text('{"sky": []}'), "has no words for 'ship' of image 1"),
        (lambda root: (root / "annotations.json").write_text('[{"id": 1}]'), "has no generative row of id 1"),
        (lambda root: (root.parent / "image" / "AMBER_2.jpg").unlink(), r"there is no image .*AMBER_2\.jpg"),
    ],
)
def test_what_is_missing_of_amber_is_named(folder, change, message):
    change(folder / "amber" / "data")
    with pytest.raises(ValueError, match=message):
        data.amber_documents(data_dir=str(folder), amber_words="plain")


def test_amber_options_are_checked(folder):
    assert len(data.amber_documents(data_dir=str(folder), amber_words="plain", n=1)[0]) == 1
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        data.amber_documents(data_dir=str(folder), amber_words="plain", n=0)
    with pytest.raises(ValueError, match="AMBER reads local files: name the folder as data_dir"):
        data.amber_documents()


def loaded(folder, tmp_path, task, **options):
    local = data.local_tasks([task], folder, tmp_path, options)
    manager = TaskManager(
        include_path=[str(data.TASKS)], include_defaults=False, metadata={**options, **local.metadata}
    )
    return manager.load(task)["tasks"][task]


def test_amber_is_loaded_by_lm_eval(folder, tmp_path):
    task = loaded(folder, tmp_path, "amber_generative", amber_words="plain")
    docs = list(task.eval_docs)
    assert task.doc_to_text(docs[0]) == "<image>Describe this image."
    assert len(task.doc_to_image(docs[0])) == 1
    values = task.process_results(docs[0], ["A man on two boats, a puppy and a bench."])
    assert values["chair"] == (4, 2, 2, 4, 1, 2)
    assert (values["hal"], values["length"]) == (1.0, 10.0)


# -------------------------------------------------------------------------------------------------------------- MMHal


def test_mmhal_is_loaded_by_lm_eval(folder, tmp_path):
    task = loaded(folder, tmp_path, "mmhal")
    docs = list(task.eval_docs)
    assert task.doc_to_text(docs[1]) == "<image>How many cats are there (attribute)?"
    assert len(task.doc_to_image(docs[1])) == 1
    assert task.process_results(docs[0], ["One cat."]) == {"length": 2.0}
    (folder / "mmhal" / "images" / "0001.jpg").unlink()
    with pytest.raises(ValueError, match=r"there is no image .*0001\.jpg"):
        data.mmhal_documents(data_dir=str(folder))


@pytest.mark.slow
def test_both_run(folder, tmp_path, monkeypatch):
    from contralto import cli

    monkeypatch.chdir(tmp_path)
    argv = ["eval", "--model", "contralto-vlm", "--tasks", "amber_generative,mmhal", "--data_dir", str(folder)]
    argv += ["--apply_chat_template", "--device", "cpu", "--output_path", "out", "--log_samples"]
    argv += ["--metadata", '{"amber_words": "plain"}', "--gen_kwargs", "max_gen_toks=8"]
    assert cli.main([*argv, "--model_args", "pretrained=testbed:vision-0"]) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert {"chair,none", "cover,none", "hal,none", "cog,none"} <= set(results["amber_generative"])
    (samples,) = (tmp_path / "out").rglob("samples_mmhal_*.jsonl")
    from contralto.eval.judging import read_rated

    answers = read_rated(samples)
    assert [each.id for each in answers] == ["0", "1"]
    assert answers[0].contents == "Cat, Bed"


# -------------------------------------------------------------------------------------------------------------- CHAIR

VOCABULARY = ObjectVocabulary.of([["cat"], ["dog"], ["bed"], ["cup"]])


def test_chair_of_the_first_words():
    caption, objects = "A cat lies on a bed, and a dog drinks from a cup below it.", ["cat", "bed"]
    values = chair.cut_metrics(caption, objects, VOCABULARY, words=6)
    assert values == {"chair_i_cut": (2, 0, 2, 2), "chair_s_cut": 0.0, "recall_cut": (2, 0, 2, 2), "reached": 1.0}
    assert chair.cut_metrics(caption, objects, VOCABULARY, words=40)["chair_i_cut"] == (4, 2, 2, 2)
    assert chair.cut_metrics(caption, objects, VOCABULARY, words=40)["reached"] == 0.0
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="chair_words must be a whole number of at least 1"):
            chair.cut(caption, wrong)


def test_chair_at_equal_length_gives_a_longer_caption_no_more_words():
    """A system that goes on after the same words has the same CHAIR."""
    long = ["A cat lies on a bed, and a dog below it.", "A cup. A dog beside it."]
    captions = {"short": ["A cat lies on a bed.", "A cup. A dog beside it, a cat behind."], "long": long}
    found = chair.equal_length(captions, [["cat", "bed"], ["cup"]], VOCABULARY)
    assert found["short"] == found["long"]
    assert chair.rates(found["long"]) == chair.ChairRates(0.25, 0.5, 1.0)
    with pytest.raises(ValueError, match="one caption for each of the 2 images, and have short 2, long 1"):
        chair.equal_length({"short": captions["short"], "long": long[:1]}, [["cat"], ["cup"]], VOCABULARY)
