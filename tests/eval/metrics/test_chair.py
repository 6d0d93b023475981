"""CHAIR's matching and measures, against examples worked out by hand and a slow count."""

import random
import shutil
from pathlib import Path

import pytest

from contralto.eval.metrics import chair
from contralto.eval.metrics.coco import coco_objects
from contralto.eval.metrics.vocabulary import ObjectVocabulary, mentions, read_synonyms
from contralto.testbed import scenes

DATA = Path(__file__).parents[2] / "fixtures" / "data"
COCO = ObjectVocabulary.of(
    [
        ["person", "man", "woman", "child", "policeman", "People"],
        ["dog", "puppy"],
        ["bear"],
        ["teddy bear"],
        ["chair", "seat"],
        ["toilet"],
        ["tie"],
        ["train"],
        ["airplane", "jet"],
        ["bus"],
        ["knife"],
        ["wine glass", "goblet"],
        ["oven", "stove", "stove top oven"],
        ["counter", "stove top"],
        ["sheep"],
        ["skis"],
        ["hot-dog"],
    ]
)
FOUND = {
    "A man walks two dogs.": ["person", "dog"],
    "Dogs, puppies and a PUPPY": ["dog", "dog", "dog"],
    "policemen and women with children": ["person", "person", "person"],
    "some people on skis": ["person", "skis"],
    "a baby bear with its teddy bears": ["bear", "teddy bear"],
    "an adult sheep": ["sheep"],
    "the seat of a toilet": ["toilet"],
    "a toilet seat": ["toilet"],
    "a seat": ["chair"],
    "a man in a bow tie": ["person", "tie"],
    "passenger jets over train tracks": ["airplane"],
    "a passenger train": ["train"],
    "a stove top oven and a stove": ["oven", "oven"],
    "a stove top": ["counter"],
    "wine glasses, a glass, goblets": ["wine glass", "wine glass"],
    "knives on buses": ["knife", "bus"],
    "a hot dog, hot-dogs": ["hot-dog", "hot-dog"],
    "the dog's bus pass": ["dog", "bus"],
    "us, as ever: a dress": [],
    "": [],
}


@pytest.mark.parametrize("text", FOUND)
def test_mentions(text):
    expected = [name.replace("-", " ") for name in FOUND[text]]
    assert mentions(text, COCO) == expected


def test_the_testbeds_captions_name_their_objects():
    vocabulary = ObjectVocabulary.of([[name] for name in scenes.OBJECTS])
    for place in scenes.HOMES:
        text = scenes.caption(place, frozenset(scenes.OBJECTS))
        assert mentions(text, vocabulary) == scenes.mentioned(text) == list(scenes.OBJECTS)


@pytest.mark.parametrize("seed", range(10))
def test_rates_equal_a_slow_count(seed):
    rng = random.Random(seed)
    names = ["dog", "bus", "knife", "tie"]
    images = [set(rng.sample(names, rng.randint(0, 4))) for _ in range(rng.randint(1, 12))]
    captions = [[rng.choice(names) for _ in range(rng.randint(0, 6 * (seed > 0)))] for _ in images]
    said = wrong = bad = found = there = 0
    for objects, named in zip(images, captions, strict=True):
        for name in named:
            said += 1
            wrong += name not in objects
        bad += any(name not in objects for name in named)
        for name in objects:
            there += 1
            found += name in named
    counts = [chair.count(", ".join(named), objects, COCO) for objects, named in zip(images, captions, strict=True)]
    expected = (wrong / said if said else 0, bad / len(images), found / there if there else 0)
    assert tuple(chair.rates(counts)) == pytest.approx(expected, abs=1e-12)
    kept = [chair.document_metrics(", ".join(named), each) for named, each in zip(captions, counts, strict=True)]
    assert chair.chair_i([each["chair_i"] for each in kept]) == pytest.approx(expected[0], abs=1e-12)
    assert sum(each["chair_s"] for each in kept) / len(kept) == pytest.approx(expected[1], abs=1e-12)
    assert chair.recall([each["recall"] for each in kept]) == pytest.approx(expected[2], abs=1e-12)
    assert [each["objects"] for each in kept] == [each["length"] for each in kept] == list(map(len, captions))


def _files(folder):
    return [folder / "coco" / "annotations" / f"{kind}_val2014.json" for kind in ("instances", "captions")]


def test_coco_objects_are_those_of_masks_and_of_captions():
    vocabulary = read_synonyms(DATA / "chair" / "synonyms.txt")
    first, second = "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"
    there = coco_objects(*_files(DATA), vocabulary)
    assert there == {first: ["cup", "spoon", "wine glass"], second: ["bench", "car"]}
    chosen = {tuple(coco_objects(*_files(DATA), vocabulary, n=1, seed=seed)) for seed in range(10)}
    assert chosen == {(first,), (second,)}
    assert coco_objects(*_files(DATA), vocabulary, n=1, seed=3) == coco_objects(*_files(DATA), vocabulary, n=1, seed=3)


BROKEN = {
    "no synonyms": ("chair/synonyms.txt", None, "there is no synonym list .*synonyms.txt"),
    "empty synonyms": ("chair/synonyms.txt", "\n", "names no object"),
    "an empty name": ("chair/synonyms.txt", "cup\ndog,, puppy\n", "line 2: an empty name in 'dog,, puppy'"),
    "a category without a name": ("chair/synonyms.txt", "cup\nspoon\ncar\nkite\nbench\n", "no line for 'wine glass'"),
    "no captions": ("coco/annotations/captions_val2014.json", None, "there is no .*captions_val2014.json"),
    "not JSON": ("coco/annotations/captions_val2014.json", "{", "captions_val2014.json is not JSON"),
    "other JSON": ("coco/annotations/instances_val2014.json", '{"images": []}', "needs the keys annotations and cat"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refusals(case, tmp_path):
    file, text, message = BROKEN[case]
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        coco_objects(*_files(tmp_path), read_synonyms(tmp_path / "chair" / "synonyms.txt"))


def test_the_seat_of_a_toilet_is_no_chair():
    vocabulary = ObjectVocabulary.of([["chair", "seat"], ["toilet"]])
    assert mentions("toilet seat", vocabulary) == mentions("seat toilet", vocabulary) == ["toilet"]
    assert mentions("a seat", vocabulary) == ["chair"]


def test_as_many_images_as_there_are():
    vocabulary = read_synonyms(DATA / "chair" / "synonyms.txt")
    for n in (3, 0, "all"):
        with pytest.raises(ValueError, match=f"n must be from 1 to 2, the images that .* has captions of, not {n!r}"):
            coco_objects(*_files(DATA), vocabulary, n=n)
    with pytest.raises(ValueError, match="at least one caption"):
        chair.rates([])
