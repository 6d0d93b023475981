"""lm-eval's models `contralto` and `contralto-vlm`: completions, likelihoods, and rejected arguments."""

import copy
import json
import math
import re
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import zoo
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from sqlitedict import SqliteDict

from contralto import testbed
from contralto.common.hashing import fingerprint
from contralto.common.hub import locate
from contralto.decoding import ContrastiveDecodingLogitsProcessor, VisualContrastiveDecodingLogitsProcessor
from contralto.decoding.executors.score import score
from contralto.decoding.images import noised, ritual_transform
from contralto.decoding.inputs import Prompt, encode
from contralto.decoding.loading import Models
from contralto.eval.models.base import IDENTITY
from contralto.eval.models.decoder import Decoder, seed_of
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.requests import EvalRequest
from contralto.eval.models.vlm import ContraltoVLM
from contralto.testbed import scenes, worlds

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CD = {"method": "cd", "amateur": "testbed:amateur"}
UNTIL = {"until": ["\n"], "max_gen_toks": 60}


@cache
def text_lm():
    return ContraltoLM("testbed:expert", batch_size=3)


@cache
def vision_lm():
    return ContraltoVLM("testbed:vision-0", batch_size=3)


@cache
def stock(kind, name, batch_size=2):
    return kind(locate(name), device="cpu", batch_size=batch_size)


def problems(count=6, seed=5):
    return list(islice(worlds.problems(seed, "test"), count))


def asks(lm, count=6, **kwargs):
    """Problems as `generate_until` requests."""
    return [
        Instance(
            "generate_until",
            {"question": p.question},
            (lm.apply_chat_template([{"role": "user", "content": p.question}]), {**UNTIL, **kwargs}),
            0,
        )
        for p in problems(count)
    ]


def pictured(count=12):
    return scenes.questions(list(islice(scenes.scenes(5, "test"), -(-count // 6))), "adversarial")[:count]


def looks(lm, count=12):
    """Questions about pictures as `generate_until` requests."""
    return [
        Instance(
            "generate_until",
            {"question": q.text},
            (
                lm.apply_chat_template([{"role": "user", "content": "<image>" + q.text}]),
                {"until": ["\n"], "max_gen_toks": 8},
                {"visual": [q.scene.image()]},
            ),
            0,
        )
        for q in pictured(count)
    ]


def beginning_once(request):
    """A request for lm-eval's own model, whose processor adds the BOS that the template holds already."""
    context, *rest = request.args
    assert context.startswith("<bos>")
    return Instance(request.request_type, request.doc, (context.removeprefix("<bos>"), *rest), 0)


def options(lm, count=4):
    """Two continuations per problem as `loglikelihood` requests."""
    said = (" finds 4: 9 + 4 = 13.", " loses 2")
    return [Instance("loglikelihood", ask.doc, (ask.args[0], o), 0) for ask in asks(lm, count) for o in said]


def answers(lm, requests, batch_size=None):
    if batch_size:
        lm = copy.copy(lm)
        lm.batch_size_per_gpu = batch_size
    return lm.generate_until(requests, disable_tqdm=True)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.slow
def test_without_contrast_the_answers_are_lm_evals():
    lm, plain = text_lm(), stock(HFLM, "testbed:expert")
    assert answers(lm, asks(lm)) == answers(plain, asks(plain))
    without = lm.decoding_by(**CD, beta=0)
    assert answers(without, asks(lm)) == answers(plain, asks(plain))


@pytest.mark.slow
def test_without_contrast_the_answers_to_images_are_lm_evals():
    lm, plain = vision_lm(), stock(HFMultimodalLM, "testbed:vision-0")
    said = answers(lm, looks(lm))
    assert said == answers(plain, [beginning_once(each) for each in looks(plain)])
    assert set(said) == {"yes", "no"}
    assert answers(lm.decoding_by(method="vcd", alpha=0), looks(lm)) == said


def test_prompts_with_images_begin_once():
    """As in `contralto generate`, where tokenizer and template both bring a BOS; lm-eval's own model reads two."""
    lm, [ask] = vision_lm(), looks(vision_lm(), 1)
    context, _, more = ask.args
    [image], prompt = more["visual"], Prompt(pictured(1)[0].text, ("a.png",))
    ids = lm._encode([EvalRequest(context, (), {}, 0, images=(image,))], 512)["input_ids"]
    models = Models(lm.model, (), lm.tokenizer, lm.processor)
    assert ids.tolist() == encode([prompt._replace(images=(image,))], models, raw=False)["input_ids"].tolist()
    assert (ids == lm.tokenizer.bos_token_id).sum() == 1
    plain = stock(HFMultimodalLM, "testbed:vision-0")
    theirs = plain.tok_batch_multimodal_encode([context], [[image]])["input_ids"]
    assert theirs[0, 1:].tolist() == ids[0].tolist()
    other = lm.tok_batch_multimodal_encode(["<image>Ben went"], [[image]])["input_ids"]  # nothing to take off
    assert (other == lm.tokenizer.bos_token_id).sum() == 1


@pytest.mark.slow
def test_contrastive_answers_are_the_processors():
    lm = text_lm().decoding_by(**CD, beta=0.7)
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    expected = []
    for ask in asks(lm):
        inputs = tokenizer(ask.args[0], return_tensors="pt", add_special_tokens=False)
        contrast = ContrastiveDecodingLogitsProcessor(amateur, beta=0.7)
        output = expert.generate(**inputs, logits_processor=[contrast], max_new_tokens=60)
        expected.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers(lm, asks(lm)) == expected
    assert expected != answers(text_lm(), asks(lm))
    assert lm.generated == sum(
        min(60, len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1) for text in expected
    )
    assert lm.seconds > 0


def test_a_penalty_means_the_same_in_cd_and_scd():
    how = {"max_gen_toks": 24, "repetition_penalty": 2.0, "min_new_tokens": 24}
    texts = [
        answers(lm, asks(lm, 3, **how))
        for method in ("cd", "scd")
        for lm in [text_lm().decoding_by(**CD | {"method": method})]
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(CD, marks=pytest.mark.slow),
        pytest.param({"method": "scd", "amateur": "testbed:amateur"}, marks=pytest.mark.slow),
        pytest.param({**CD, "temperature": 0.9, "seed": 3}, marks=pytest.mark.slow),
    ],
    ids=["plain", "cd", "scd", "sampled"],
)
def test_answers_do_not_depend_on_the_batch(options):
    lm = text_lm().decoding_by(**options)
    together = answers(lm, asks(lm), 6)
    assert answers(lm, asks(lm)[::-1], 1)[::-1] == together
    assert answers(lm, asks(lm), 4) == together


@pytest.mark.parametrize(
    "options",
    [
        {"method": "vcd", "alpha": 2.0, "noise_step": 700},
        pytest.param({"method": "ritual"}, marks=pytest.mark.slow),
        pytest.param({"method": "ritual-vcd", "temperature": 1.0}, marks=pytest.mark.slow),
        {"method": "m3id", "lam": 1.0},
        pytest.param({"method": "vdd", "alpha": 2.0}, marks=pytest.mark.slow),
        {"method": "sid", "start_layer": 1, "keep": 4},
        pytest.param({"method": "avisc", "alpha": 2.5}, marks=pytest.mark.slow),
        pytest.param({"method": "pai", "start_layer": 1, "alpha": 0.5}, marks=pytest.mark.slow),
        pytest.param({"method": "only"}, marks=pytest.mark.slow),
    ],
    ids=["vcd", "ritual", "ritual-vcd", "m3id", "vdd", "sid", "avisc", "pai", "only"],
)
def test_answers_to_images_do_not_depend_on_the_batch(options):
    lm = vision_lm().decoding_by(**options)
    together = answers(lm, looks(lm), 12)
    assert answers(lm, looks(lm)[::-1], 1)[::-1] == together
    assert answers(lm, looks(lm), 4) == together


@pytest.mark.slow
def test_vcd_answers_are_the_processors():
    lm = vision_lm().decoding_by(method="vcd", alpha=2.0, noise_step=700, seed=4)
    model, reader = testbed.load("vision-0"), lm.processor
    expected = []
    for look in looks(lm, 48):
        context, _, more = look.args
        inputs = reader(text=context.removeprefix("<bos>"), images=more["visual"], return_tensors="pt")
        seed = seed_of(lm.seed_of(context, more["visual"], 0), 0) % 2**31
        contrast = VisualContrastiveDecodingLogitsProcessor(model, noised(inputs, step=700, seed=[seed]), alpha=2.0)
        output = model.generate(**inputs, logits_processor=[contrast], max_new_tokens=8)
        expected.append(reader.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers(lm, looks(lm, 48)) == expected
    assert expected != answers(vision_lm(), looks(lm, 48))


def test_a_transformed_image_is_that_of_its_question():
    lm = vision_lm().decoding_by(method="ritual", seed=4)
    job = next(iter(lm.eval_requests(looks(lm, 1))))
    (view,) = lm._batch([job], 500).views
    transformed = ritual_transform(job.images[0], seed=job.seed).image
    alone = lm.processor(text=job.context, images=transformed, return_tensors="pt")
    assert torch.equal(view["pixel_values"], alone["pixel_values"])
    other = next(iter(lm.decoding_by(method="ritual", seed=5).eval_requests(looks(lm, 1))))
    assert job.seed != other.seed
    mirrored = [Instance("generate_until", {}, (*looks(lm, 1)[0].args[:2], {"visual": [transformed]}), 0)]
    assert next(iter(lm.eval_requests(mirrored))).seed != job.seed


def test_m3id_reads_the_prompt_without_its_image():
    lm = vision_lm().decoding_by(method="m3id")
    jobs = list(lm.eval_requests(looks(lm, 2)))
    (view,) = lm._batch(jobs, 500).views
    assert "pixel_values" not in view
    texts = lm.tokenizer.batch_decode(view["input_ids"], skip_special_tokens=True)
    assert [re.sub(r"\W", "", text).lower() for text in texts] == [
        re.sub(r"\W", "", job.doc["question"]).lower() for job in jobs
    ]
    assert lm.image_token_id not in view["input_ids"]


@pytest.mark.slow
def test_a_repeated_request_is_sampled_anew():
    lm = text_lm()
    (ask,) = asks(lm, 1, do_sample=True, temperature=1.5)
    assert len(set(answers(lm, [ask] * 6))) == 1  # lm-eval fills up a rank with its last request
    ask.repeats = 6
    said = answers(lm, [ask] * 6)
    assert len(set(said)) > 1
    assert answers(lm, [ask] * 6, 1) == said
    (greedy,) = asks(lm, 1)
    assert len(set(answers(lm, [greedy] * 3))) == 1


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    lm = ContraltoLM("testbed:expert", batch_size="auto", max_batch_size=16)
    expected, write, sizes = answers(text_lm(), asks(lm)), ContraltoLM._generate_batch, []

    def short(self, jobs):
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return write(self, jobs)

    monkeypatch.setattr(ContraltoLM, "_generate_batch", short)
    assert answers(lm, asks(lm)) == expected
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_beams_and_other_search_of_the_task():
    lm = text_lm().decoding_by(**CD)
    assert answers(lm, asks(lm, 2, num_beams=3)) == answers(lm, asks(lm, 2, num_beams=3), 1)
    short = answers(
        lm, [Instance("generate_until", {}, (a.args[0], {"until": ["."], "max_gen_toks": 60}), 0) for a in asks(lm)]
    )
    assert all("." not in text for text in short)
    assert all(whole.startswith(text) for whole, text in zip(answers(lm, asks(lm)), short, strict=True))


def test_contrast_prompts_are_filled_from_the_document():
    lm = text_lm().decoding_by(method="cad", contrast_prompt="{question}")
    (ask,) = asks(lm, 1)
    (job,) = lm.eval_requests([ask])
    assert lm.contrasted(job).context == ask.args[0]  # with the chat template
    around = text_lm().decoding_by(method="icd", contrast_prompt="Say it. {prompt}")
    (ask,) = asks(around, 1)
    question = ask.doc["question"]
    assert around.contrasted(job).context == ask.args[0].replace(question, f"Say it. {question}")  # inside the turn
    bare = text_lm().decoding_by(method="cid", contrast_prompt="{answer}")
    with pytest.raises(
        ValueError,
        match=r"contrast_prompt has \{answer\}, and the documents have no such field: they have prompt, question",
    ):
        answers(bare, [ask])


# -------------------------------------------------------------------------------------------------------- likelihoods


def test_without_contrast_likelihoods_are_lm_evals():
    lm = text_lm().decoding_by(**CD, beta=0)
    plain = stock(HFLM, "testbed:expert")
    expected = plain.loglikelihood(options(plain), disable_tqdm=True)
    same_batches = stock(HFLM, "testbed:expert", 3)
    assert text_lm().loglikelihood(options(lm), disable_tqdm=True) == same_batches.loglikelihood(
        options(lm), disable_tqdm=True
    )
    found = lm.loglikelihood(options(lm), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    lm.batch_size_per_gpu, lm.prefix_cache = 1, False
    alone = stock(HFLM, "testbed:expert", 1).loglikelihood(options(lm), disable_tqdm=True)
    assert lm.loglikelihood(options(lm), disable_tqdm=True) == alone  # without padding bit for bit


@torch.no_grad()
@pytest.mark.parametrize("kind", ["renormalised", "raw"])
@pytest.mark.parametrize("masked", [False, True])
def test_likelihoods_are_those_of_the_formula(kind, masked):
    """Against float64 forwards of one text at a time: no mask, or tokens below alpha times the likeliest at -1000."""
    lm = text_lm().decoding_by(**CD, beta=0.5, score=kind, masked=masked)
    requests = options(lm)
    expert, amateur = (testbed.load(name).double() for name in ("expert", "amateur"))
    expected, tokens, out = [], 0, 0
    for request in requests:
        context, rest = lm._encode_pair(*request.args)
        ids = torch.tensor([context + rest])
        e, a = (m(ids).logits[0, len(context) - 1 : -1].log_softmax(-1) for m in (expert, amateur))
        scores = 1.5 * e - 0.5 * a
        scores = scores.masked_fill(e < math.log(0.1) + e.amax(-1, keepdim=True), -torch.inf) if masked else scores
        scores = scores.log_softmax(-1) if kind == "renormalised" else scores
        chosen = scores.gather(-1, torch.tensor(rest)[:, None]).squeeze(-1)
        tokens, out = tokens + len(rest), out + int((chosen == -torch.inf).sum())
        expected.append(float(chosen.clamp(min=-1000).sum()))
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx(expected, abs=1e-3)
    assert lm.ruled_out == {"tokens": tokens, "ruled_out": out}
    assert bool(out) == masked


def test_the_likelihood_of_a_whole_text():
    text = " ".join(story.text for story in islice(worlds.stories(3, "test"), 12))
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    plain = stock(HFLM, "testbed:expert")
    (expected,) = plain.loglikelihood_rolling(request, disable_tqdm=True)
    (found,) = text_lm().decoding_by(**CD, beta=0).loglikelihood_rolling(request, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    (other,) = text_lm().decoding_by(**CD).loglikelihood_rolling(request, disable_tqdm=True)
    assert other != pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_likelihoods_of_answers_to_images():
    lm = vision_lm().decoding_by(method="vcd", alpha=1.0)
    requests = [
        Instance("loglikelihood", {}, (look.args[0], o, look.args[2]), 0) for look in looks(lm) for o in ("yes", "no")
    ]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    lean = [found[i][0] > found[i + 1][0] for i in range(0, len(found), 2)]
    assert ["yes" if more else "no" for more in lean] == answers(lm, looks(lm))
    assert [found[i][1] for i in range(0, len(found), 2)] == lean  # greedy search would say so
    context, continuation, more = requests[0].args
    once = context.removeprefix("<bos>")  # the processor adds it
    inputs = lm.processor(text=once, images=more["visual"], return_tensors="pt")
    seed = seed_of(lm.seed_of(context, more["visual"], 0), 0) % 2**31
    contrast = VisualContrastiveDecodingLogitsProcessor(lm.model, noised(inputs, step=500, seed=[seed]))
    rest = torch.tensor([lm.tokenizer.encode(continuation, add_special_tokens=False)])
    assert found[0][0] == pytest.approx(score(contrast, lm.model, inputs, rest).total.item(), abs=1e-4)
    plain = vision_lm().loglikelihood(requests, disable_tqdm=True)
    assert plain[0][0] != pytest.approx(found[0][0], abs=1e-3)


def test_contrast_prompts_in_likelihoods():
    lm = text_lm().decoding_by(method="cad", contrast_prompt="{question}", alpha=0.0)
    requests = options(lm)
    expected = text_lm().loglikelihood(requests, disable_tqdm=True)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    same = text_lm().decoding_by(method="cad", contrast_prompt="{prompt}", alpha=2.0)  # nothing is contrasted
    assert [x for x, _ in same.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(
        [x for x, _ in expected], abs=1e-3
    )


@pytest.mark.slow
def test_an_encoder_decoder(tmp_path):
    """T5: answers and likelihoods, in batches of sources of unequal length and alone."""
    names = []
    for seed in range(2):
        model = zoo.build("t5", seed=seed, vocab_size=len(testbed.tokenizer()))
        model.save_pretrained(tmp_path / str(seed))
        testbed.tokenizer().save_pretrained(tmp_path / str(seed))
        names.append(str(tmp_path / str(seed)))
    lm = ContraltoLM(names[0], method="cd", amateur=names[1], batch_size=4)
    requests = [Instance("generate_until", {}, (p.question, {"until": [], "max_gen_toks": 8}), 0) for p in problems(4)]
    assert answers(lm, requests) == answers(lm, requests, 1)
    pairs = [Instance("loglikelihood", {}, (p.question, " finds 4"), 0) for p in problems(4)]
    alone = lm.loglikelihood(pairs, disable_tqdm=True)
    lm.batch_size_per_gpu = 4
    assert [x for x, _ in lm.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx([x for x, _ in alone], abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.slow
def test_a_cache_belongs_to_one_configuration(tmp_path):
    lm = text_lm().decoding_by(**CD)
    path = str(tmp_path / "answers.db")
    first = CachingLM(lm, path).generate_until(asks(lm))
    again = text_lm().decoding_by(**CD)
    assert CachingLM(again, path).generate_until(asks(lm)) == first
    assert again.generated == 0
    other = text_lm().decoding_by(**CD, beta=5)
    with pytest.raises(ValueError, match="use_cache names a cache made with another beta: name another file"):
        CachingLM(other, path)
    stranger = str(tmp_path / "stranger.db")
    CachingLM(stock(HFLM, "testbed:expert"), stranger).generate_until(asks(lm, 1))
    with pytest.raises(ValueError, match="another model's answers"):
        CachingLM(lm, stranger)
    stock(HFLM, "testbed:expert").set_cache_hook(type(lm.cache_hook)(None))


class Calls:
    """A value whose pickle creates a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["its identity", "an answer"])
def test_a_cache_of_somebody_else_runs_nothing(tmp_path, place):
    lm, path = text_lm().decoding_by(**CD), str(tmp_path / "answers.db")
    CachingLM(lm, path).generate_until(asks(lm, 1))
    with SqliteDict(path, autocommit=True) as kept:
        assert len(kept) == 2
        for key in list(kept):
            kept[key] = Calls(tmp_path / "ran") if (key == IDENTITY) is (place == "its identity") else kept[key]
    with pytest.raises(ValueError, match=r"more than answers: reading it would call pathlib.*; name another file"):
        CachingLM(text_lm().decoding_by(**CD), path).generate_until(asks(lm, 1))
    assert not (tmp_path / "ran").exists()
    with SqliteDict(path) as kept:  # as lm-eval reads it
        list(kept.values())
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_every_batch_is_in_the_cache_at_once(tmp_path, monkeypatch):
    """An error in the third batch: the answers of the first two are there, for texts, images and likelihoods."""
    for lm, requests, kind, work in (
        (text_lm().decoding_by(**CD), asks(text_lm()), "generate_until", "_generate_batch"),
        (vision_lm().decoding_by(method="vcd"), looks(vision_lm(), 6), "generate_until", "_generate_batch"),
        (text_lm().decoding_by(**CD), options(text_lm(), 3), "loglikelihood", "_score_batch"),
    ):
        lm.batch_size_per_gpu, done = 2, []
        original = getattr(ContraltoLM, work)

        def failing(self, jobs, original=original, done=done):
            done.append(len(jobs))
            if len(done) == 3:
                raise RuntimeError("power cut")
            return original(self, jobs)

        path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.db")
        with monkeypatch.context() as patch:
            patch.setattr(ContraltoLM, work, failing)
            with pytest.raises(RuntimeError, match="power cut"):
                getattr(CachingLM(lm, path), kind)(requests)
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                ContraltoLM, work, lambda self, jobs, o=original, d=done: (d.append(len(jobs)), o(self, jobs))[1]
            )
            found = getattr(CachingLM(lm, path), kind)(requests)
        assert sum(done) == 2
        lm.set_cache_hook(type(lm.cache_hook)(None))
        whole = getattr(lm, kind)(requests, disable_tqdm=True)
        values = [[x if isinstance(x, str) else x[0] for x in said] for said in (found, whole)]
        assert values[0] == (values[1] if kind == "generate_until" else pytest.approx(values[1], abs=1e-4))


def test_sampled_repeats_are_not_cached(tmp_path):
    lm = text_lm().decoding_by(temperature=1.0)
    (ask,) = asks(lm, 1)
    ask.repeats = 2
    with pytest.raises(ValueError, match="a task that repeats its requests cannot be sampled through a cache"):
        CachingLM(lm, str(tmp_path / "answers.db")).generate_until([ask] * 2)


# ------------------------------------------------------------------------------------------------------- configuration


def test_the_key_of_a_run_depends_on_the_tokenizer_and_not_on_its_folder(tmp_path):
    other = testbed.tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    keys = []
    for name, tokenizer in (("a", testbed.tokenizer()), ("b", testbed.tokenizer()), ("c", other)):
        tokenizer.save_pretrained(tmp_path / name)
        lm = ContraltoLM("testbed:expert", device="cpu", tokenizer=str(tmp_path / name))
        keys.append(lm.key)
        lm.tok_batch_encode(["Ben", "Ben went"], truncation=True)  # sets padding and truncation of the tokenizer
        assert lm.key == keys[-1]
        assert str(tmp_path) not in str(lm.configuration)
    assert keys[0] == keys[1] != keys[2]


def test_the_configuration_says_everything():
    lm = text_lm().decoding_by(**CD, beta=1)
    shown = lm.configuration
    assert shown["weights"] == {
        "main": fingerprint(testbed.load("expert")),
        "amateur": fingerprint(testbed.load("amateur")),
    }
    assert {"method": "cd", "amateur": "testbed:amateur", "beta": 1.0, "alpha": 0.1}.items() <= shown.items()
    json.dumps(shown)
    assert lm.get_model_info()["key"] == lm.key == text_lm().decoding_by(**CD, beta=1).key
    different = [
        {},
        CD,
        {**CD, "beta": 1, "alpha": 0.2},
        {**CD, "beta": 1, "score": "raw"},
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 1},
    ]
    assert len({text_lm().decoding_by(**options).key for options in different} | {lm.key}) == 7
    assert vision_lm().decoding_by(method="vcd", seed=1).key != vision_lm().decoding_by(method="vcd", seed=2).key
    changed = testbed.load("expert")
    with torch.no_grad():
        next(changed.parameters()).mul_(1.001)
    assert fingerprint(changed) != fingerprint(testbed.load("expert"))


WRONG = {
    "unknown method": ({"method": "contrast"}, "there is no method 'contrast'; there are none, cd"),
    "beta as text": ({**CD, "beta": "half"}, "beta must be a number, not 'half'"),
    "alpha as truth": ({**CD, "alpha": True}, "alpha must be a number, not True"),
    "negative beta": ({**CD, "beta": -1}, "beta must be a finite number of at least 0"),
    "alpha above 1": ({**CD, "alpha": 2}, "alpha must lie in"),
    "no amateur": ({"method": "cd"}, "method='cd' needs other models: set amateur"),
    "foreign option": ({"method": "vcd", "kappa": 1}, "method='vcd' has no kappa; its own are"),
    "option of no method": ({"method": "none", "beta": 1}, "method='none' has no beta"),
    "misspelt option": ({**CD, "betta": 1}, "there is no model argument 'betta' .did you mean 'beta'.."),
    "whole number": ({"method": "search", "k": 2.5}, "k must be a whole number, not 2.5"),
    "k below 1": ({"method": "search", "k": 0}, "k must be at least 1"),
    "layers": ({"method": "dola", "layers": "upper"}, "layers must be low, high or numbers"),
    "form": ({**CD, "form": "lee"}, "has no form lee|no form='lee'"),
    "noise step": ({"method": "vcd", "noise_step": 1000}, "step must"),
    "temperature": ({"temperature": -1}, "temperature must be a finite number of at least 0"),
    "temperature as text": ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    "top_p": ({"temperature": 1, "top_p": 0}, r"top_p must lie in \(0, 1\]"),
    "top_p of nothing": ({"top_p": 0.9}, "top_k, top_p and min_p apply only to sampling"),
    "seed": ({"seed": "today"}, "seed must be a whole number, not 'today'"),
    "score": ({**CD, "score": "best"}, "score must be renormalised or raw, not 'best'"),
    "masked": ({**CD, "masked": "yes"}, "masked must be true or false, not 'yes'"),
    "search sampled": ({"method": "search", "temperature": 1}, "method='search' does not sample here"),
    "two amateurs": ({**CD, "adapters_off": True}, "set either amateur or adapters_off, not both"),
    "batch size": ({"batch_size": "many"}, "batch_size must be a whole number of at least 1, or auto, not 'many'"),
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number of at least 1, or auto, not 0"),
    "dtype": ({"dtype": "float12"}, "dtype must be auto or a torch dtype such as bfloat16, not 'float12'"),
    "no such model": ({"amateur": "testbed:novice", "method": "cd"}, "the testbed has no model 'novice'"),
    "unknown argument": ({"zoom": 3}, "neither contralto nor the model knows an argument"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_sentence(case):
    given, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        ContraltoLM("testbed:expert", **given)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="testbed:vision-0 have different tokenizers"):
        ContraltoLM("testbed:expert", method="cd", amateur="testbed:vision-0")


def test_requests_that_a_method_cannot_answer():
    lm = text_lm()
    for options_, call, message in (
        ({"method": "search"}, lambda m: m.loglikelihood(options(m)), "method='search' has no likelihoods"),
        ({"method": "vcd"}, lambda m: answers(m, asks(m, 1)), "contrasts images: use model contralto-vlm"),
        ({"method": "cid"}, lambda m: answers(m, asks(m, 1)), "contrasts prompts: set contrast_prompt"),
        (
            {"method": "cid", "contrast_prompt": "x"},
            lambda m: m.loglikelihood_rolling([Instance("", {}, ("a",), 0)]),
            "whole text has none",
        ),
        (
            {"method": "search"},
            lambda m: answers(m, asks(m, 1, do_sample=True, temperature=1.0)),
            "does not sample here",
        ),
        (
            {},
            lambda m: answers(m, asks(m, 1, max_gen_toks=512)),
            "the task asks for 512 tokens, and the model reads 512",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(lm.decoding_by(**options_))
    blind = Instance("generate_until", {}, ("Is there a cup?", UNTIL), 0)
    with pytest.raises(ValueError, match="contrasts images, and a prompt has none: 'Is there a cup"):
        answers(vision_lm().decoding_by(method="vcd"), [blind])


def test_an_image_text_model_answers_texts():
    lm, plain = vision_lm(), stock(HFMultimodalLM, "testbed:vision-0")
    requests = [Instance("generate_until", {}, ("Is there a cup in the image?", {"until": [], "max_gen_toks": 4}), 0)]
    assert answers(lm, requests) == answers(plain, requests)


def test_a_decoder_describes_itself():
    assert Decoder.of().describe() == {"method": "none"}
    assert Decoder.of(method="ritual", seed=2).describe() == {
        "method": "ritual",
        "kappa": 3.0,
        "beta": 0.1,
        "normalize": False,
        "seed": 2,
    }
