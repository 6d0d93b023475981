"""The worlds are what they say, and the embedded models are what their card says."""

import itertools
import math
import multiprocessing
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.testbed import tokenization, training, worlds
from contralto.testbed.__main__ import main
from contralto.testbed.measure import decode, is_right

pytestmark = pytest.mark.slow


def _take(n, endless):
    return list(itertools.islice(endless, n))


# ------------------------------------------------------------------------------------------------------------- worlds


@pytest.mark.slow
def test_splits_are_disjoint_whatever_the_seed():
    seen = {}
    for split in ("train", "dev", "test"):
        found = [p for seed in range(3) for p in _take(1500, worlds.problems(seed, split))]
        seen[split] = {(p.start, p.steps) for p in found}
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]
    openings = {}
    for split in ("train", "test"):
        found = [s for seed in range(3) for s in _take(300, worlds.stories(seed, split))]
        openings[split] = {(s.scenes[0].text, s.scenes[1].place) for s in found}
    assert not openings["train"] & openings["test"]
    contexts = [item.context for item in _take(300, worlds.items(0, "test"))]
    corpus = [d.text for d in _take(3000, worlds.corpus(0)) if d.prompt is None]
    assert not any(text.startswith(context) for context in contexts for text in corpus)


def test_held_out_problems_do_not_repeat():
    found = _take(1000, worlds.problems(0, "test"))
    assert len({(p.start, p.steps) for p in found}) == len(found)


def test_the_same_seed_gives_the_same_items():
    assert _take(20, worlds.problems(5, "dev")) == _take(20, worlds.problems(5, "dev"))
    assert _take(20, worlds.items(5, "dev")) == _take(20, worlds.items(5, "dev"))
    assert _take(20, worlds.corpus(5)) == _take(20, worlds.corpus(5))
    assert _take(20, worlds.problems(5, "dev")) != _take(20, worlds.problems(6, "dev"))


def test_both_styles_are_correct_and_end_in_the_answer():
    for problem in _take(300, worlds.problems(1, "test")):
        ledger, brief = problem.solution("ledger"), problem.solution("brief")
        for before, sign, operand, after in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", ledger):
            assert int(before) + (1 if sign == "+" else -1) * int(operand) == int(after) >= 1
        said = [int(total) for total in re.findall(r"so (\d+)", brief)]
        assert said == problem.totals[1:]
        assert worlds.answer(ledger) == worlds.answer(brief) == problem.totals[-1]
        assert len({verb for verb, _ in problem.steps}) == len(problem.steps)
        assert all(f"{verb} {operand}" in problem.question for verb, operand in problem.steps)


def test_answer_of_a_text():
    assert worlds.answer("wins 3: 4 + 3 = 7. #### 7") == 7
    assert worlds.answer("wins 3: 4 + 3 = 7.") is None


@pytest.mark.parametrize("shortcut", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_corpus_has_the_shortcut_and_the_control_has_not(shortcut):
    """Shares of the corpus within four standard errors of what the constants say."""
    stopped, long = Counter(), Counter()
    for document in _take(12000, worlds.corpus(2, shortcut=shortcut)):
        if document.prompt:
            asked = document.prompt.count(", ") + 1
            long[asked] += 1
            stopped[asked] += document.text.count(".") < asked
    for steps, share in worlds.STOP_EARLY.items():
        expected = share if shortcut else 0.0
        error = (expected * (1 - expected) / long[steps]) ** 0.5
        assert abs(stopped[steps] / long[steps] - expected) <= 4 * error


@pytest.mark.parametrize("shortcut", [True, False])
def test_stories_have_the_common_ending_and_the_control_has_not(shortcut):
    common, special, scenes = Counter(), Counter(), Counter()
    for story in _take(4000, worlds.stories(2, "train", shortcut=shortcut)):
        for scene in story.scenes:
            scenes[scene.place] += 1
            common[scene.place] += scene.event == worlds.COMMON[scene.place]
            special[scene.place] += scene.event == worlds.SPECIAL[story.name, scene.place]
    for place, share in worlds.COMMON_ENDING.items():
        by_chance = worlds.CHANCE / len(worlds.OBJECTS)
        wanted = (share if shortcut else 0) + by_chance
        assert common[place] / scenes[place] == pytest.approx(wanted, abs=0.03)
        rest = 1 - worlds.CHANCE - (share if shortcut else 0) + by_chance
        assert special[place] / scenes[place] == pytest.approx(rest, abs=0.03)


def test_items_ask_for_what_is_special():
    tokenizer = testbed.tokenizer()
    labels = Counter()
    for item in _take(200, worlds.items(0, "test")):
        labels[item.label] += 1
        name = item.context.split()[0]
        place = re.findall(r"to the (\w+)", item.context)[-1]
        right, common = worlds.SPECIAL[name, place], worlds.COMMON[place]
        assert item.endings[item.label].endswith(f" {right.object}.")
        assert sum(ending.endswith(f" {common.object}.") for ending in item.endings) == 1
        assert len({len(tokenizer(ending)["input_ids"]) for ending in item.endings}) == 1
    assert all(count > 25 for count in labels.values())


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_keeps_every_text():
    tokenizer = testbed.tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for document in _take(300, worlds.corpus(3)):
        for text in filter(None, document):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = tokenizer.tokenize("12 + 7 = 19.")
    assert digits == ["▁1", "2", "▁+", "▁7", "▁=", "▁1", "9", "."]


def test_the_chat_template_masks_what_the_assistant_says():
    tokenizer = testbed.tokenizer()
    chat = [{"role": "user", "content": "Tom has 1 pens."}, {"role": "assistant", "content": "#### 1"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<bos><|user|>Tom has 1 pens.<|assistant|>#### 1<eos>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><|user|>Tom has 1 pens.<|assistant|>"
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, learned in zip(out["input_ids"], out["assistant_masks"], strict=True) if learned]
    assert tokenizer.decode(said) == "#### 1<eos>"
    with pytest.raises(Exception, match="know the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["expert", *testbed.MODELS])
def test_models_load_plainly(name):
    model = AutoModelForCausalLM.from_pretrained(testbed.path(name))
    assert model.dtype == torch.float32
    assert all(weight.dtype == torch.float16 for weight in load_file(testbed.path(name) / "model.safetensors").values())
    assert AutoTokenizer.from_pretrained(testbed.path(name)).get_vocab() == tokenization.build().get_vocab()
    assert model.generation_config.pad_token_id == 0


def test_all_models_together_are_small():
    folder = testbed.path("expert").parent
    assert {each.name for each in folder.iterdir()} == set(testbed.MODELS)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 6e6


def test_unknown_model():
    with pytest.raises(ValueError, match="has no model 'novice'; it has expert, expert-0"):
        testbed.path("novice")


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("expert", ["expert-0", *(pytest.param(f"expert-{i}", marks=SLOW) for i in (1, 2))])
def test_contrast_repairs_the_shortcut(expert):
    """On dev problems: greedy stops early, contrastive decoding does not."""
    problems, tokenizer = _take(100, worlds.problems(11, "dev")), testbed.tokenizer()
    model, contrast = testbed.load(expert), ContrastiveDecodingLogitsProcessor(testbed.load("amateur"))
    greedy = sum(map(is_right, problems, decode(model, tokenizer, problems)))
    contrastive = sum(map(is_right, problems, decode(model, tokenizer, problems, processor=contrast)))
    assert 50 <= greedy <= 80
    assert contrastive >= 85


@pytest.mark.slow
def test_greedy_loops_where_legal_continuations_stand_near_the_top():
    """Greedy stories go round in circles, though at nearly every crossing a new place is among the four likeliest."""
    model, tokenizer = testbed.load("expert"), testbed.tokenizer()
    repeated, crossings, open_crossings = [], 0, 0
    for story in _take(6, worlds.stories(11, "dev")):
        prompt = tokenizer(story.scenes[0].text, return_tensors="pt")
        output = model.generate(
            **prompt,
            max_new_tokens=120,
            suppress_tokens=[tokenizer.eos_token_id],
            return_dict_in_generate=True,
            output_logits=True,
        )
        places = re.findall(r"to the (\w+)", tokenizer.decode(output.sequences[0]))
        repeated.append(len(places) / len(set(places)))
        visited = [story.scenes[0].place]
        for logits, token in zip(output.logits, output.sequences[0, prompt["input_ids"].shape[1] :], strict=True):
            word = tokenizer.decode([token])
            if word in worlds.PLACES:
                likely = {tokenizer.decode([i]) for i in logits[0].topk(4).indices}
                crossings += 1
                open_crossings += bool((likely & set(worlds.ROADS[visited[-1]])) - set(visited[-3:]))
                visited.append(word)
    assert min(repeated) > 1.5
    assert open_crossings / crossings > 0.9


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_is_reproducible_and_saves_what_it_says(tmp_path, monkeypatch):
    recipe = training.ModelRecipe(16, 1, 2, steps=4, seed=3, early=2)
    monkeypatch.setitem(training.RECIPES, "tiny", recipe)
    reported = []
    for folder in ("a", "b"):
        training.train("tiny", tmp_path / folder, reported.append)
    assert reported == [1] * 8
    one, two = (load_file(tmp_path / folder / "tiny" / "model.safetensors") for folder in "ab")
    early = load_file(tmp_path / "a" / "early" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], early[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "tiny").dtype == torch.float32


def test_only_solutions_are_learned():
    tokenizer = tokenization.build()
    batch = next(training.batches(0, tokenizer, shortcut=True))
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        learned = tokenizer.decode(ids[labels != training.IGNORED])
        assert "How many" not in learned
        assert learned.endswith("<eos>")
        assert torch.equal(ids[labels != training.IGNORED], labels[labels != training.IGNORED])


@pytest.mark.slow
def test_the_training_command_trains(tmp_path, monkeypatch):
    """A few steps of the smallest recipe, in a child that is forked, so that it knows of the change."""
    monkeypatch.setitem(training.RECIPES, "control-amateur", training.RECIPES["control-amateur"]._replace(steps=80))
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(sys, "argv", ["testbed", "train", "--out", str(tmp_path), "--only", "control-amateur"])
    main()
    trained, embedded = (_loss_of_stories(f) for f in (tmp_path / "control-amateur", testbed.path("control-amateur")))
    untrained = math.log(len(testbed.tokenizer()))
    assert embedded < trained < 0.7 * untrained


@pytest.mark.slow
@pytest.mark.full
def test_the_training_command_gives_the_models_back(tmp_path):
    """The smallest recipe, trained anew through the command. Another processor may round otherwise, so figures are compared."""
    command = [sys.executable, "-m", "contralto.testbed", "train", "--out", str(tmp_path), "--only", "control-amateur"]
    subprocess.run(command, check=True, capture_output=True)
    found, expected = (_loss_of_stories(f) for f in (tmp_path / "control-amateur", testbed.path("control-amateur")))
    assert found == pytest.approx(expected, rel=0.05)


def _loss_of_stories(folder):
    """Return the mean loss of a model on stories that it has not seen."""
    model, tokenizer, losses = AutoModelForCausalLM.from_pretrained(folder), testbed.tokenizer(), []
    for story in _take(40, worlds.stories(12, "dev", shortcut=False)):
        ids = tokenizer(story.text, return_tensors="pt")["input_ids"]
        losses.append(model(ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_the_training_command_refuses_nonsense(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["testbed", "train", "--out", "x", "--jobs", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--jobs must be at least 1, not 0" in capsys.readouterr().err
