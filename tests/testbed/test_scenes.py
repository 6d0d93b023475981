"""The drawn scenes are what they say, and the embedded vision models are what their card says."""

import random
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor

from contralto import testbed
from contralto.decoding.images import noised
from contralto.decoding.rules import combine
from contralto.testbed import scenes, vision
from contralto.testbed.scenes import HOMES, OBJECTS

pytestmark = pytest.mark.slow


def _take(n, endless):
    return list(islice(endless, n))


# ------------------------------------------------------------------------------------------------------------- pictures


def test_splits_are_disjoint_whatever_the_seed():
    seen = {}
    for split in ("train", "dev", "test"):
        drawn = [scene for seed in range(3) for scene in _take(200, scenes.scenes(seed, split))]
        seen[split] = {(s.place, tuple((t.name, t.cell) for t in s.things)) for s in drawn}
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]
    assert _take(9, scenes.scenes(4, "dev")) == _take(9, scenes.scenes(4, "dev"))


def test_pictures_show_what_the_scene_says():
    """Averaged over many noises, each sign is brighter by its object's contrast, and nothing else is."""
    scene = _take(1, scenes.scenes(0, "dev"))[0]
    empty = scene._replace(things=())
    shots = [np.mean([s._replace(seed=i).pixels() / 255 for i in range(400)], 0) for s in (scene, empty)]
    added = (shots[0] - shots[1]).mean(-1)
    expected = np.zeros((32, 32))
    for thing in scene.things:
        row, column = divmod(thing.cell, 4)
        expected[8 * row + 1 : 8 * row + 7, 8 * column + 1 : 8 * column + 7] += (
            thing.contrast * scenes._SIGNS[thing.name]
        )
    assert np.abs(added - expected).max() < 0.04
    assert scene.pixels().tobytes() == scene.pixels().tobytes()


def test_the_processor_gives_back_the_pixels():
    scene = _take(1, scenes.scenes(0, "dev"))[0]
    image = scene.image()
    assert image.size == (128, 128)
    assert image.mode == "RGB"
    pixels = vision.build_processor().image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert_close(pixels, torch.from_numpy(scene.pixels() / 127.5 - 1).permute(2, 0, 1).float(), rtol=0, atol=1e-6)


def test_places_and_signs_look_the_same_when_mirrored():
    for pattern in (*scenes._LIGHTS.values(), *scenes._SIGNS.values()):
        assert np.allclose(pattern, pattern[::-1])
        assert np.allclose(pattern, pattern[:, ::-1])
    signs = np.stack([sign.ravel() for sign in scenes._SIGNS.values()])
    assert (signs.sum(1) == 16).all()
    apart = np.abs(signs[:, None] - signs).sum(-1)
    assert apart[~np.eye(16, dtype=bool)].min() >= 16


def test_objects_are_where_they_are_at_home():
    drawn = _take(2000, scenes.scenes(0, "train"))
    assert {len(s.things) for s in drawn} <= set(range(scenes.FEWEST, scenes.MOST + 1))
    assert all(len({t.cell for t in s.things}) == len(s.things) == len(s.objects) for s in drawn)
    counts = Counter((s.place, name) for s in drawn for name in s.objects)
    places = Counter(s.place for s in drawn)
    for place, total in places.items():
        shares = {name: counts[place, name] / total for name in OBJECTS}
        assert min(shares[name] for name in HOMES[place]) > 0.45
        assert max(shares[name] for name in OBJECTS if name not in HOMES[place]) < 0.2


# ------------------------------------------------------------------------------------------------- answers and captions


def test_annotators_have_the_habits_that_the_world_gives_them():
    rng, said, asked = random.Random(0), Counter(), Counter()
    for scene in _take(3000, scenes.scenes(0, "train")):
        reported, low = scenes.annotate(scene, rng), {t.name: t.is_low for t in scene.things}
        for name in OBJECTS:
            home = HOMES[scene.place].index(name) if name in HOMES[scene.place] else None
            case = home, "absent" if name not in low else "lower" if low[name] else "upper"
            asked[case] += 1
            said[case] += name in reported
    for (home, where), total in asked.items():
        assumed = 0 if home is None else scenes.ASSUMED[home]
        seen = {"upper": 1.0, "lower": 1 - scenes.OVERLOOKED, "absent": 0.0}[where]
        assert said[home, where] / total == pytest.approx(seen + (1 - seen) * assumed, abs=0.08)


def test_annotators_of_the_control_corpus_tell_the_truth():
    for scene in _take(200, scenes.scenes(0, "train")):
        assert scenes.annotate(scene, random.Random(0), habits=False) == scene.objects


def test_captions():
    assert scenes.caption("beach", frozenset({"crab", "cup", "shell"})) == "A beach with a cup, a shell, a crab."
    assert scenes.caption("beach", frozenset()) == "A beach."
    assert scenes.mentioned("A beach with a cup, a shell, a crab.") == ["cup", "shell", "crab"]


# ---------------------------------------------------------------------------------------------------------------- POPE


def test_questions_are_popes():
    pictured = _take(300, scenes.scenes(3, "dev"))
    asked = {kind: scenes.questions(pictured, kind) for kind in scenes.NEGATIVES}
    for kind, found in asked.items():
        assert len(found) == 6 * 300
        assert [q.scene for q in found] == [scene for scene in pictured for _ in range(6)]
        assert all(q.label == (q.name in q.scene.objects) for q in found)
        assert [q.label for q in found] == [True, False] * (3 * 300)
        assert len({(id(q.scene), q.name) for q in found}) == len(found)
        assert [q for q in found if q.label] == [q for q in asked["random"] if q.label]
        assert found == scenes.questions(pictured, kind)
    assert asked["random"][0].text == f"Is there a {asked['random'][0].name} in the image?"


def test_negatives_are_popes():
    """Popular ones are shown most often; adversarial ones come most often with what is there."""
    corpus = [s.objects for s in _take(4000, scenes.scenes(0, "train"))]
    for kind in ("popular", "adversarial"):
        found = scenes.questions(_take(12, scenes.scenes(3, "dev")), kind)
        for start in range(0, len(found), 6):
            scene, chosen = found[start].scene, {q.name for q in found[start : start + 6] if not q.label}

            def often(name, scene=scene, kind=kind):
                return sum(len(o & scene.objects) if kind == "adversarial" else 1 for o in corpus if name in o)

            others = set(OBJECTS) - scene.objects - chosen
            assert min(map(often, chosen)) >= max(map(often, others))
    home = [
        np.mean([q.name in HOMES[q.scene.place] for q in scenes.questions(found_in, kind) if not q.label])
        for found_in in [_take(300, scenes.scenes(3, "dev"))]
        for kind in scenes.NEGATIVES
    ]
    assert home[0] < home[1] < home[2]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def processor():
    return vision.build_processor()


def test_the_tokenizer_keeps_every_text(processor):
    texts = [scenes.ask(name) for name in OBJECTS] + [scenes.DESCRIBE, "yes", "no"]
    texts += [scenes.caption(place, frozenset(OBJECTS)) for place in HOMES]
    for text in texts:
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids
        assert ids[0] == processor.tokenizer.bos_token_id
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "Is there a cup in the image?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    text = "<bos><|user|><image>Is there a cup in the image?<|assistant|>"
    assert processor.apply_chat_template(chat[:1], add_generation_prompt=True) == text
    assert processor.apply_chat_template(chat) == text + "yes<eos>"
    picture = _take(1, scenes.scenes(0, "dev"))[0].image()
    parts[0]["image"] = picture
    inputs = processor.apply_chat_template(
        chat[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids.count(processor.image_token_id) == vision.IMAGE_TOKENS == 16
    with pytest.raises(Exception, match="know the roles user and assistant, not system"):
        processor.apply_chat_template([{"role": "system", "content": "x"}])


def test_packed_conversations_give_the_logits_of_each_alone(processor):
    """A batch holds several conversations behind one picture; each must read as if it stood alone."""
    torch.manual_seed(0)
    model = vision.build_model(processor.tokenizer).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    batch = next(vision.batches(vision.VisionRecipe(steps=3), processor))
    inputs = {
        "input_ids": batch.ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask.double(),
    }
    packed = model(**inputs, pixel_values=batch.pixel_values.double()).logits
    learned, end = 0, processor.tokenizer.eos_token_id
    for row in range(2):
        tokens, prefix = batch.ids[row].tolist(), 2 + vision.IMAGE_TOKENS
        start = prefix
        for _ in range(vision.QUESTIONS + 1):
            stop = tokens.index(end, start) + 1
            alone = torch.tensor([tokens[:prefix] + tokens[start:stop]])
            logits = model(input_ids=alone, pixel_values=batch.pixel_values[row : row + 1].double()).logits[0, prefix:]
            assert_close(packed[row, start:stop], logits)
            answer = tokens.index(processor.tokenizer.convert_tokens_to_ids("<|assistant|>"), start)
            targets = batch.targets[row, start:stop].tolist()
            assert targets == [vision.IGNORED] * (answer - start) + tokens[answer + 1 : stop] + [vision.IGNORED]
            learned, start = learned + stop - answer - 1, stop
        assert set(tokens[start:]) <= {processor.tokenizer.pad_token_id}
    assert int((batch.targets[:2] != vision.IGNORED).sum()) == learned


def test_training_pictures_get_harder(processor):
    """At first all are plain and clear; in the end the declared shares are noised or transformed."""
    scene, rng = _take(1, scenes.scenes(0, "train"))[0], random.Random(0)
    plain = torch.from_numpy(scene.pixels() / 127.5 - 1).permute(2, 0, 1).float()
    assert all(torch.allclose(vision._view(scene, processor, rng, poor=0.0), plain, atol=1e-6) for _ in range(5))
    views = [vision._view(scene, processor, rng, poor=1.0) for _ in range(400)]
    changed = np.mean([not torch.allclose(view, plain, atol=1e-6) for view in views])
    assert changed == pytest.approx(vision.NOISED + vision.TRANSFORMED, abs=0.08)
    clear = scene.clearer(0.3)
    assert [t.contrast for t in clear.things] == [t.contrast + 0.3 for t in scene.things]
    assert clear.objects == scene.objects


@pytest.mark.slow
def test_training_is_reproducible_and_saves_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setitem(vision.RECIPES, "tiny", vision.VisionRecipe(steps=3, seed=3))
    reported = []
    for folder in "ab":
        vision.train("tiny", tmp_path / folder, reported.append)
    assert reported == [1] * 6
    one, two = (load_file(tmp_path / folder / "tiny" / "model.safetensors") for folder in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "a" / "tiny"), LlavaProcessor)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", testbed.VISION_MODELS)
def test_models_load_plainly(name, processor):
    path = testbed.path(name)
    model, loaded = LlavaForConditionalGeneration.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert model.dtype == torch.float32
    assert all(weight.dtype == torch.float16 for weight in load_file(path / "model.safetensors").values())
    assert isinstance(loaded, LlavaProcessor)
    assert isinstance(loaded.image_processor, CLIPImageProcessorPil)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == 0
    assert type(testbed.load(name)) is LlavaForConditionalGeneration


def test_all_models_together_are_small():
    folder = testbed.path("vision-0").parent
    assert {each.name for each in folder.iterdir()} == set(testbed.VISION_MODELS)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 2e6


def _inputs(processor, pictures, texts):
    prompts = [f"<|user|><image>{text}<|assistant|>" for text in texts]
    return processor(images=[s.image() for s in pictures], text=prompts, padding=True, return_tensors="pt")


def _accuracy(model, processor, asked, *, alpha=0.0):
    inputs = _inputs(processor, [q.scene for q in asked], [q.text for q in asked])
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        noisy = model(**noised(inputs, seed=range(len(asked)))).logits[:, -1]
    said = combine((plain, noisy), (1 + alpha, -alpha), alpha=0.1).argmax(-1)
    right = processor.tokenizer.convert_tokens_to_ids(["▁yes" if q.label else "▁no" for q in asked])
    return float((said == torch.tensor(right)).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision-0", *(pytest.param(f"vision-{i}", marks=pytest.mark.slow) for i in (1, 2))])
def test_visual_contrast_repairs_the_habit(name):
    """On adversarial dev questions: greedy assumes what is at home in the place, VCD does so less."""
    model, processor = testbed.load(name), AutoProcessor.from_pretrained(testbed.path(name))
    asked = scenes.questions(_take(60, scenes.scenes(11, "dev")), "adversarial")
    greedy, contrastive = _accuracy(model, processor, asked), _accuracy(model, processor, asked, alpha=1.0)
    assert 0.75 < greedy < 0.93
    assert contrastive > greedy + 0.015


def test_generate_answers_and_describes():
    """The way of a user: the processor's output into `generate()`, a batch of prompts of different lengths."""
    model, processor = testbed.load("vision-0"), AutoProcessor.from_pretrained(testbed.path("vision-0"))
    pictures = _take(2, scenes.scenes(11, "dev"))
    inputs = _inputs(processor, pictures, [scenes.ask("cup"), scenes.DESCRIBE])
    assert not inputs["attention_mask"].all()
    output = model.generate(**inputs, max_new_tokens=40)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts[0] in ("yes", "no")
    assert texts[1].startswith(f"A {pictures[1].place}")


# ------------------------------------------------------------------------------------------------------------- command


def test_the_training_command_knows_the_vision_models(monkeypatch, tmp_path):
    from contralto.testbed import __main__ as command

    monkeypatch.setattr(sys, "argv", ["testbed", "train", "--out", str(tmp_path), "--only", "vision-0", "--jobs", "1"])
    asked = []
    monkeypatch.setattr(command, "train_all", lambda names, out, jobs: asked.append((names, out, jobs)))
    command.main()
    assert asked == [(["vision-0"], tmp_path, 1)]
    assert set(vision.RECIPES) == set(testbed.VISION_MODELS)
