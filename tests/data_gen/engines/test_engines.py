"""The engines: requests, answers, and failures.

The endpoint is a real HTTP server on the loopback address (`serving`) that can be told to fail.
"""

import base64
import io
import itertools
import json
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from helpers.serving import Faults, Server, model_reply, words
from PIL import Image

from contralto import testbed
from contralto.common.hashing import weights_digest
from contralto.data_gen.engines import FunctionEngine, TransformersEngine
from contralto.data_gen.engines.batch_files import batch_line, read_batch_line
from contralto.data_gen.engines.batching import batches
from contralto.data_gen.engines.limiter import Limiter
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.functions import find_function
from contralto.data_gen.recipe import load_recipe
from contralto.data_gen.types import Answer, Ask, Failure, Sampling, digest, drive, make_request
from contralto.testbed import worlds

pytestmark = pytest.mark.slow

QUESTIONS = [problem.question for problem, _ in zip(worlds.problems(3, "dev"), range(24), strict=False)]
GREEDY, SAMPLED = Sampling(temperature=0, max_new_tokens=48), Sampling(temperature=1.3, top_p=0.95, max_new_tokens=48)


def requests_for(engine, questions=QUESTIONS, sampling=GREEDY, **ask):
    asks = [
        Ask(
            role="r",
            **({"messages": [{"role": "user", "content": q}]} | ask | ({"messages": None} if "prompt" in ask else {})),
        )
        for q in questions
    ]
    return [make_request(a, engine=engine.identity, sampling=sampling, seed=0, row=str(i)) for i, a in enumerate(asks)]


def answers(engine, requests):
    found = {request.key: said for some in engine.answer(requests) for request, said in some}
    return [found[request.key] for request in requests]


@pytest.fixture(scope="module")
def expert():
    return TransformersEngine(model="testbed:expert", batch_size=8)


# ---------------------------------------------------------------------------------------------------------- transformers


def test_greedy_answers_are_those_of_generate(expert):
    found = answers(expert, requests_for(expert, QUESTIONS[:6]))
    model, tokenizer = testbed.load("expert"), testbed.tokenizer()
    for question, answer in zip(QUESTIONS, found, strict=False):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.completion_tokens == len(tokens)
        assert answer.finish_reason == ("stop" if tokens[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.slow
def test_a_row_s_draw_depends_on_its_seed_alone(expert):
    requests = requests_for(expert, QUESTIONS[:9], SAMPLED)
    together = answers(expert, requests)
    alone = answers(TransformersEngine(model="testbed:expert", batch_size=1), list(reversed(requests)))
    assert together == list(reversed(alone))
    other = [
        make_request(Ask(role="r", messages=r.messages, seed=1), engine={}, sampling=SAMPLED, seed=0, row="x")
        for r in requests
    ]
    assert sum(a.text != b.text for a, b in zip(together, answers(expert, other), strict=True)) > 2


def test_batches_are_alike_and_sorted_by_length():
    engine = FunctionEngine(use="reprlib:repr")
    mixed = [*requests_for(engine), *requests_for(engine, sampling=SAMPLED), *requests_for(engine, prompt="2 + 2 =")]
    made = list(batches(reversed(mixed), 7))
    assert sorted(r.key for batch in made for r in batch) == sorted(r.key for r in mixed)
    assert made == list(batches(mixed, 7)), "the order in which requests come does not matter"
    assert [len(batch) for batch in made].count(7) == 9
    for batch in made:
        assert len({(r.sampling, r.prompt is None) for r in batch}) == 1
        lengths = [len(r.prompt or r.messages[0]["content"]) for r in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_what_is_known_keeps_its_place_and_is_not_answered_again(expert):
    from dataclasses import replace

    requests = sorted(requests_for(expert), key=lambda r: -len(r.messages[0]["content"]))
    whole_batch_known = [replace(r, known=i < 8 or i == 10) for i, r in enumerate(requests)]
    lists = list(expert.answer(whole_batch_known))
    answered = [r.key for some in lists for r, _ in some]
    assert len(lists) == 2
    assert sorted(answered) == sorted(r.key for i, r in enumerate(requests) if i >= 8 and i != 10)


def test_stop_texts_end_an_answer_and_are_not_part_of_it(expert):
    plain = answers(expert, requests_for(expert, QUESTIONS[:6]))
    cut = answers(
        expert, requests_for(expert, QUESTIONS[:6], Sampling(temperature=0, max_new_tokens=48, stop=(". ", "####")))
    )
    for whole, short in zip(plain, cut, strict=True):
        ends = [at for stop in (". ", "####") if (at := whole.text.find(stop)) >= 0]
        assert short.text == whole.text[: min(ends)]
        assert short.finish_reason == "stop"
        assert short.completion_tokens < whole.completion_tokens


def test_a_cut_answer_says_so(expert):
    [answer] = answers(expert, requests_for(expert, QUESTIONS[:1], Sampling(temperature=0, max_new_tokens=3)))
    assert (answer.finish_reason, answer.completion_tokens, answer.is_whole) == ("length", 3, False)


def test_logprobs_are_the_model_s_own(expert):
    """Before the temperature, as endpoints tell them."""
    from dataclasses import replace

    found = answers(expert, requests_for(expert, QUESTIONS[:5], replace(SAMPLED, logprobs=True)))
    model, tokenizer = testbed.load("expert").double(), testbed.tokenizer()
    for question, answer in zip(QUESTIONS, found, strict=False):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        end += [tokenizer.eos_token_id] if answer.finish_reason == "stop" else []
        with torch.no_grad():
            steps = model(torch.tensor([start + end])).logits[0].log_softmax(-1)[len(start) - 1 : -1]
        expected = [float(step[token]) for step, token in zip(steps, end, strict=True)]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
        assert len(answer.logprobs) == answer.completion_tokens


def test_raw_prompts_have_no_template(expert):
    [answer] = answers(expert, requests_for(expert, [""], prompt="Ben went out to the"))
    model, tokenizer = testbed.load("expert"), testbed.tokenizer()
    inputs = tokenizer("Ben went out to the", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "cd", "amateur": "testbed:amateur", "beta": 1.0},
        {"method": "dola", "layers": [1]},
        pytest.param({"method": "cid", "contrast_prompt": "{prompt} Be brief."}, marks=pytest.mark.slow),
        {"method": "search", "k": 3},
        pytest.param({"method": "scd", "amateur": "testbed:amateur"}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "proxy", "expert": "testbed:student", "antiexpert": "testbed:amateur"}, marks=pytest.mark.slow
        ),
        pytest.param({"method": "cad", "contrast_prompt": "How many?"}, marks=pytest.mark.slow),
        pytest.param({"method": "cfg"}, marks=pytest.mark.slow),
        pytest.param({"method": "icd", "contrast_prompt": "{prompt} You are confused."}, marks=pytest.mark.slow),
    ],
    ids=lambda options: options["method"],
)
def test_any_method_decodes(options, capsys):
    """The texts are those of `contralto generate`."""
    from contralto import cli

    engine = TransformersEngine(model="testbed:expert", batch_size=4, **options)
    found = answers(engine, requests_for(engine, QUESTIONS[:3]))
    flags = [f"--{name.replace('_', '-')}={str(value).strip('[]')}" for name, value in options.items()]
    command = ["generate", "--model", "testbed:expert", "--max-new-tokens", "48", *flags, "--batch-size", "1"]
    assert cli.main([*command, *QUESTIONS[:3]]) == 0
    shown = "".join(f"=== {i}: {q}\n{a.text}\n" for i, (q, a) in enumerate(zip(QUESTIONS, found, strict=False)))
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_a_method_samples_with_a_stream_per_row():
    how = {"model": "testbed:expert", "method": "cd", "amateur": "testbed:amateur"}
    engine = TransformersEngine(batch_size=8, **how)
    requests = requests_for(engine, QUESTIONS[:6], SAMPLED)
    alone = TransformersEngine(batch_size=1, **how)
    assert answers(engine, requests) == answers(alone, requests)


def test_methods_that_know_no_draws_are_refused():
    searching = TransformersEngine(model="testbed:expert", method="search")
    with pytest.raises(ValueError, match="'search' is deterministic: set temperature to 0"):
        searching.check(SAMPLED)
    drafting = TransformersEngine(model="testbed:expert", method="scd", amateur="testbed:amateur")
    with pytest.raises(ValueError, match="'scd' draws random numbers of its own"):
        drafting.check(SAMPLED)
    with pytest.raises(ValueError, match="has no kappa"):
        TransformersEngine(model="testbed:expert", method="vcd", kappa=1)
    for batch_size, message in ((0, "at least 1, not 0"), (10**9, "at most 65,536"), ("8", "a whole number, not '8'")):
        with pytest.raises(ValueError, match=f"batch_size must be {message}"):
            TransformersEngine(model="testbed:expert", batch_size=batch_size)


@pytest.mark.slow
def test_adapters_by_name_share_the_model(tmp_path):
    """A base model and two adapters, in turn: each answers as if it were alone."""
    from peft import LoraConfig, get_peft_model

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tuned = get_peft_model(testbed.load("expert"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        tuned.save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    engines = [TransformersEngine(model="testbed:expert", adapter=adapter) for adapter in (None, *folders)]
    assert len({digest(engine.identity) for engine in engines}) == 3
    first = [answers(engine, requests_for(engine, QUESTIONS[:4])) for engine in engines]
    again = [answers(engine, requests_for(engine, QUESTIONS[:4])) for engine in reversed(engines)]
    assert first == list(reversed(again))
    assert first[0] != first[1] != first[2]
    tokenizer = testbed.tokenizer()
    from peft import PeftModel

    merged = PeftModel.from_pretrained(testbed.load("expert"), folders[0]).merge_and_unload()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    tokens = merged.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert first[1][0].text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_images_reach_the_model_and_noise_has_the_row_s_seed(tmp_path):
    images = [Image.effect_noise((32, 32), 60 + i).convert("RGB") for i in range(3)]
    images[2].save(tmp_path / "two.png")
    shown = [images[0], images[1], tmp_path / "two.png"]
    for how in ({}, {"method": "vcd"}, {"method": "ritual"}):
        batched = TransformersEngine(model="testbed:vision-0", batch_size=3, **how)
        single = TransformersEngine(model="testbed:vision-0", batch_size=1, **how)
        asks = [
            Ask(role="r", messages=[{"role": "user", "content": "is there a red circle?"}], images=[i]) for i in shown
        ]
        requests = [
            make_request(a, engine=batched.identity, sampling=Sampling(max_new_tokens=4), seed=0, row=str(i))
            for i, a in enumerate(asks)
        ]
        assert answers(batched, requests) == answers(single, requests)


def test_a_model_is_known_by_its_weights(tmp_path):
    """The same in another folder; another one when a weight has changed."""
    import shutil

    from safetensors.torch import load_file, save_file

    for name in ("one", "two"):
        shutil.copytree(testbed.path("amateur"), tmp_path / name)
    weights = load_file(tmp_path / "two" / "model.safetensors")
    assert weights_digest(str(tmp_path / "one")) == weights_digest("testbed:amateur")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "two" / "model.safetensors")
    assert weights_digest(str(tmp_path / "two")) != weights_digest("testbed:amateur")
    assert weights_digest("org/model") == "org/model"


def test_functions_are_found_by_name(tmp_path):
    (tmp_path / "beside_recipe.py").write_text("def shout(request):\n    return request.prompt.upper()\n")
    assert find_function("beside_recipe:shout", folder=tmp_path) is not None
    engine = FunctionEngine(use="beside_recipe:shout")
    assert answers(engine, requests_for(engine, ["x"], prompt="hey")) == [Answer(text="HEY")]
    for name, message in {
        "beside_recipe": "a function must be named as module:function",
        "beside_recipe:whisper": "has no function whisper",
        "no_such_module:f": "there is no module no_such_module",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_function(name, folder=tmp_path)


def test_modules_beside_a_recipe_are_found(tmp_path, monkeypatch):
    """Also for scorers, which no engine loads."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "scorer_beside.py").write_text(
        "def shortest(row, answers):\n    return [-len(each) for each in answers]\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rows: {source: rows.jsonl}\nstrategies: [{use: best_of_n, scorer: 'scorer_beside:shortest'}]\n"
        "roles: {target: {engine: function, use: 'math:sqrt'}}\n"
    )
    load_recipe(path)
    assert find_function("scorer_beside:shortest")(None, ["ab"]) == [-2]


# -------------------------------------------------------------------------------------------------------------- endpoints


def endpoint(server, **how):
    how = {"model": "m", "base_url": server.url, "served_by": "here", "timeout": 5, "key_env": None} | how
    return OpenAIEngine(**how)


def test_an_answer_of_an_endpoint(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with Server() as server:
        engine = endpoint(server, key_env="MY_KEY", extra_body={"min_p": 0.1})
        sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, stop=("END",), max_new_tokens=33)
        requests = requests_for(engine, QUESTIONS[:2], sampling)
        found = answers(engine, requests)
        [one, two] = sorted(server.seen, key=lambda seen: seen.body["messages"][0]["content"] != QUESTIONS[0])
    assert [answer.text for answer in found] == [words(one.body), words(two.body)]
    assert found[0].finish_reason == "stop"
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (len(json.dumps(one.body["messages"]).split()), 7)
    assert one.headers["Authorization"] == "Bearer sk-secret"
    assert one.body == {
        "model": "m",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 33,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": requests[0].seed % 2**31,
        "stop": ["END"],
        "min_p": 0.1,
    }
    assert one.body["seed"] != two.body["seed"]


def test_an_embedded_model_behind_an_endpoint_says_the_same(expert):
    here = answers(expert, requests_for(expert, QUESTIONS[:3]))
    with Server(reply=model_reply("expert")) as server:
        engine = endpoint(server, timeout=60)
        there = answers(engine, requests_for(engine, QUESTIONS[:3]))
    assert [answer.text for answer in there] == [answer.text for answer in here]


def test_raw_prompts_and_logprobs_have_their_own_forms():
    with Server() as server:
        engine = endpoint(server)
        found = answers(engine, requests_for(engine, [""], Sampling(logprobs=True), prompt="2 + 2 ="))
        assert found[0].text == words(server.seen[0].body)
        assert server.seen[0].body["prompt"] == "2 + 2 ="
        assert server.seen[0].body["logprobs"] == 1


def test_images_are_sent_as_data(tmp_path):
    picture = Image.new("RGB", (4, 4), "red")
    picture.save(tmp_path / "red.jpg")
    with Server() as server:
        engine = endpoint(server)
        answers(engine, requests_for(engine, ["what is this?"], images=[picture, tmp_path / "red.jpg"]))
        parts = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "?"}]
        answers(engine, requests_for(engine, [""], messages=[{"role": "user", "content": parts}], images=[picture]))
    first, placed = (seen.body["messages"][0]["content"] for seen in server.seen)
    assert [part["type"] for part in first] == ["image_url", "image_url", "text"]
    assert first[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert first[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert [part["type"] for part in placed] == ["text", "image_url", "text"]


def sent(content, **how):
    """The messages that an endpoint is sent."""
    engine = OpenAIEngine(model="m", base_url="http://localhost/v1", key_env=None)
    [asked] = requests_for(engine, [""], **{"messages": [{"role": "user", "content": content}], **how})
    return engine.body(asked)["messages"]


MARK, WORD = {"type": "image"}, {"type": "text", "text": "?"}


@pytest.mark.parametrize(("parts", "count"), [([MARK, WORD], 2), ([MARK, MARK, WORD, MARK], 2), ([MARK, WORD], 0)])
def test_every_image_has_its_place_or_none_has(expert, parts, count):
    images = [Image.new("RGB", (4, 4), "red")] * count
    with pytest.raises(ValueError, match=rf"{count} images for {parts.count(MARK)} places in the messages"):
        sent(parts, images=images)
    messages = [{"role": "user", "content": parts}]
    if not images:
        with pytest.raises(ValueError, match="0 images for 1 places in the messages"):
            answers(expert, requests_for(expert, [""], messages=messages))


def test_an_image_that_the_local_models_would_not_see(expert):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert sent([WORD, part])[0]["content"] == [WORD, part]
    with pytest.raises(ValueError, match="of type image_url is not read here"):
        answers(expert, requests_for(expert, [""], messages=[{"role": "user", "content": [WORD, part]}]))


def test_raw_prompts_have_no_place_for_images():
    engine = OpenAIEngine(model="m", base_url="http://localhost/v1", key_env=None)
    [asked] = requests_for(engine, [""], prompt="2 +", messages=None, images=[Image.new("RGB", (4, 4))])
    with pytest.raises(ValueError, match="cannot be sent with images: use messages"):
        engine.body(asked)


@pytest.mark.parametrize(
    ("kind", "name"), [("PNG", "a.jpg"), ("JPEG", "a.png"), ("WEBP", "a"), ("GIF", "a.tar.gz"), ("BMP", "a.JPG")]
)
def test_the_type_of_an_image_is_that_of_its_content(tmp_path, kind, name):
    Image.new("RGB", (4, 4), "red").save(tmp_path / name, kind)
    [part, _] = sent("what?", images=[tmp_path / name])[0]["content"]
    assert part["image_url"]["url"].startswith(f"data:image/{kind.lower()};base64,")


def test_the_photograph_of_a_camera_that_adds_a_preview_is_a_jpeg(tmp_path):
    picture = Image.effect_noise((8, 8), 50)
    picture.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[picture.resize((4, 4))])
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert photo.format == "MPO"
    [part, _] = sent("what?", images=[str(tmp_path / "photo.jpg")])[0]["content"]
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_images_of_rows_are_sent_as_local_models_see_them():
    """Upright, and in RGB: a camera's orientation and the colours of print are lost in PNG."""
    turned, file = Image.new("RGB", (4, 2), "red"), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned
    turned.save(file, "JPEG", exif=exif)
    for image, size in [
        (Image.open(file), (2, 4)),
        (Image.new("CMYK", (4, 2)), (4, 2)),
        (Image.new("LA", (1, 1)), (1, 1)),
    ]:
        [part, _] = sent("what?", images=[image])[0]["content"]
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        seen = Image.open(io.BytesIO(data))
        assert (seen.size, seen.mode) == (size, "RGB")


def test_an_engine_takes_requests_as_they_come():
    """The second one is asked for only after the first is answered: nothing waits for a batch."""
    with Server() as server:
        engine = endpoint(server)
        requests = requests_for(engine, QUESTIONS[:3])
        gate = threading.Event()

        def slowly():
            yield requests[0]
            assert gate.wait(10)
            yield from requests[1:]

        coming = engine.answer(slowly())
        [(first, _)] = next(coming)
        gate.set()
        assert first.key == requests[0].key
        assert len(list(itertools.chain(*coming))) == 2


@pytest.mark.parametrize("fault", ["too_many", "broken", "cut", "truncated", "slow"])
def test_what_can_be_tried_again_is(fault):
    """Half of the requests fail once or several times; all are answered in the end, each once."""
    with Server(faults=Faults(**{fault: 0.5}, delay=3)) as server:
        engine = endpoint(server, timeout=0.3 if fault == "slow" else 5, attempts=20)
        engine._pause = lambda attempt: 0.0
        requests = requests_for(engine, QUESTIONS[:12])
        found = answers(engine, requests)
        assert Counter(type(each) for each in found) == {Answer: 12}
        assert len({seen.body["seed"] for seen in server.seen if not seen.fault}) == 12
        assert any(seen.fault == fault for seen in server.seen)


def test_what_fails_for_good_says_why():
    answer = {"error": {"message": "context of 9 tokens exceeded"}}
    with Server(status=lambda body: (400, answer) if "Eva" in str(body["messages"]) else None) as server:
        engine = endpoint(server)
        found = answers(engine, requests_for(engine, ["Eva?", "Tom?"]))
        assert found[0] == Failure("status 400: context of 9 tokens exceeded")
        assert isinstance(found[1], Answer)
        assert len(server.seen) == 2
    with Server(faults=Faults(broken=1.0)) as server:
        engine = endpoint(server, attempts=3)
        engine._pause = lambda attempt: 0.0
        assert answers(engine, requests_for(engine, ["?"])) == [
            Failure("status 500: <html>oops</html> (after 3 attempts)")
        ]
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": "wrong key sk-secret"}}),
        (404, {"error": "no model m"}),
        (429, {"error": {"message": "you spent it all", "code": "insufficient_quota"}}),
        (307, {}),
    ],
)
def test_what_makes_asking_pointless_stops_at_once(status, body, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with Server(status=lambda _: (status, body)) as server:
        engine = endpoint(server, key_env="MY_KEY", concurrency=2)
        found = answers(engine, requests_for(engine))
        assert all(failure.stops for failure in found)
        assert "sk-secret" not in str(found)
        assert len(server.seen) <= 3


def test_a_server_that_is_not_there():
    engine = OpenAIEngine(base_url="http://127.0.0.1:9/v1", model="m", attempts=2)
    engine._pause = lambda attempt: 0.0
    [failure] = answers(engine, requests_for(engine, ["?"]))
    assert "127.0.0.1:9" in failure.reason
    assert failure.reason.endswith("(after 2 attempts)")


@pytest.mark.parametrize(
    "said",
    [
        "not json",
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": {}}]}',
        '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}',
    ],
)
def test_unreadable_answers_are_tried_again_and_then_fail(said):
    with Server() as server:
        server._said = lambda path, body: json.loads(said) if said != "not json" else "\ud800"
        engine = endpoint(server, attempts=2)
        engine._pause = lambda attempt: 0.0
        [failure] = answers(engine, requests_for(engine, ["?"]))
        assert isinstance(failure, Failure)
        assert "(after 2 attempts)" in failure.reason


def test_retry_after_holds_everything():
    """After a 429 that says so, nothing is sent for as long as it says."""
    with Server(faults=Faults(too_many=0.3, retry_after="0.3")) as server:
        engine = endpoint(server, concurrency=2, attempts=20)
        engine._pause = lambda attempt: 0.0
        answers(engine, requests_for(engine, QUESTIONS[:8]))
    refused = [seen.at for seen in server.seen if seen.fault == "too_many"]
    assert refused
    for at in refused:
        soon = [seen for seen in server.seen if at < seen.at < at + 0.28]
        assert len(soon) <= 1, "the other of the two may have left already"


@pytest.mark.slow
@pytest.mark.parametrize(("rpm", "most"), [(1200, 20), (90, 1)])
def test_requests_per_minute(monkeypatch, rpm, most):
    """In no window more than its share leaves, and none without the limiter; when they arrive is the network's."""
    left = []

    class Noted(Limiter):
        async def wait(self, tokens):
            booking = await super().wait(tokens)
            left.append(booking[0])
            return booking

    monkeypatch.setattr("contralto.data_gen.engines.openai.Limiter", Noted)
    count = 50 if rpm == 1200 else 4
    with Server() as server:
        engine = endpoint(server, rpm=rpm, concurrency=16)
        start = time.monotonic()
        answers(engine, requests_for(engine, [f"{i}?" for i in range(count)]))
        took = time.monotonic() - start
    assert len(left) == len(server.seen) == count
    window = 60 * most / rpm
    assert max(sum(at <= t < at + window - 1e-6 for t in left) for at in left) <= most
    assert took < window * count / most + 2, "the limit is used"


def test_tokens_per_minute():
    """Guesses book the future, answers correct them: with a minute of a second, in no second more than allowed."""
    clock = {"now": 0.0}

    async def use():
        limiter = Limiter(tpm=1000)
        spent = []
        for _ in range(40):
            while (pause := limiter._pause(clock["now"], 200)) > 0:
                clock["now"] += pause
            limiter._booked.append([clock["now"], 200.0])
            limiter.correct(limiter._booked[-1], 100)
            spent.append((clock["now"], 100))
        return spent

    import asyncio

    spent = asyncio.run(use())
    for at, _ in spent:
        assert sum(tokens for t, tokens in spent if at <= t < at + 60) <= 1000
    assert spent[-1][0] == pytest.approx(60 * (len(spent) // 9), abs=61), "corrected guesses make room"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an address such as"),
        ({"base_url": "https://me:word@host/v1"}, "would be written to the store"),
        ({"base_url": "https://host/v1?key=x"}, "would be written to the store"),
        ({"concurrency": 0}, "concurrency must be above 0, not 0"),
        ({"timeout": -1}, "timeout must be above 0, not -1"),
        ({"rpm": 0}, "rpm must be at least 1"),
        ({"tpm": -5}, "tpm must be at least 1"),
    ],
)
def test_bad_settings_of_an_endpoint(how, message):
    with pytest.raises(ValueError, match=message):
        OpenAIEngine(**{"base_url": "http://host/v1", "model": "m"} | how)


def test_batch_files():
    with Server() as server:
        engine = endpoint(server)
        requests = [*requests_for(engine, QUESTIONS[:1]), *requests_for(engine, [""], prompt="2 + 2 =")]
        lines = [json.loads(batch_line(engine, request)) for request in requests]
    assert [line["url"] for line in lines] == ["/v1/chat/completions", "/v1/completions"]
    assert lines[0]["body"] == engine.body(requests[0])
    assert [line["custom_id"] for line in lines] == [request.key for request in requests]
    body = {"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}
    assert read_batch_line(json.dumps({"custom_id": "k", "response": {"status_code": 200, "body": body}})) == (
        "k",
        body,
    )
    assert read_batch_line('{"custom_id": "k", "response": null, "error": {"message": "expired"}}')[1].reason
    with pytest.raises(ValueError, match="not a line of a batch's output"):
        read_batch_line('{"id": 3}')


# ------------------------------------------------------------------------------------------------------------------- vLLM


def test_vllm_is_asked_in_its_own_words(monkeypatch):
    """A stand-in for the library: which calls are made, and how outputs are read."""
    import sys
    import types
    from types import SimpleNamespace as Some

    from contralto.data_gen.engines.vllm import VLLMEngine

    calls = []

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def chat(self, conversations, sampling_params, use_tqdm, lora_request=None):
            calls.append([p.how["seed"] for p in sampling_params])
            return [self.output(conversation[-1]["content"]) for conversation in conversations]

        def generate(self, prompts, sampling_params, use_tqdm, lora_request=None):
            return [self.output(prompt) for prompt in prompts]

        @staticmethod
        def output(said):
            logprobs = [{5: Some(logprob=-0.25)}]
            done = Some(text=said.upper(), finish_reason="stop", token_ids=[5], logprobs=logprobs)
            return Some(outputs=[done], prompt_token_ids=[1, 2])

    class SamplingParams:
        def __init__(self, **how):
            self.how = how

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = VLLMEngine(model="testbed:expert", options={"dtype": "float32"})
    requests = [*requests_for(engine, ["hi", "ho"]), *requests_for(engine, [""], prompt="raw")]
    expected = {"prompt_tokens": 2, "completion_tokens": 1, "logprobs": (-0.25,)}
    assert answers(engine, requests) == [Answer(text=text, **expected) for text in ("HI", "HO", "RAW")]
    assert calls == [
        {"model": str(testbed.path("expert")), "trust_remote_code": False, "dtype": "float32"},
        [request.seed % 2**31 for request in requests[:2]],
    ]
    with pytest.raises(ValueError, match="rows_together must be at least 1"):
        VLLMEngine(model="m", rows_together=0)


# --------------------------------------------------------------------------------------------------------------- requests


def test_a_key_is_all_that_determines_an_answer(tmp_path):
    """Change anything: another key. Change nothing: the same."""
    picture = Image.new("RGB", (2, 2), "red")
    picture.save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes((tmp_path / "one.png").read_bytes())
    base = {"messages": [{"role": "user", "content": "hi"}], "images": [tmp_path / "one.png"], "template": "t@1"}

    def key(engine=None, sampling=None, seed=0, row="a", **changed):
        ask = Ask(**{"role": "r", **base, **changed})
        return make_request(
            ask, engine=engine or {"model": "m"}, sampling=sampling or Sampling(), seed=seed, row=row
        ).key

    assert key() == key(images=[tmp_path / "two.png"]) == key(tag="else") == key(role="other")
    others = [
        key(engine={"model": "n"}),
        key(sampling=Sampling(temperature=0.5)),
        key(sampling=Sampling(stop=("x",))),
        Ask(role="r", **base) and key(seed=1),
        key(row="b"),
        key(messages=[{"role": "system", "content": "hi"}]),
        key(messages=None, prompt="hi"),
        key(images=[picture]),
        key(images=[]),
        key(template="t@2"),
        make_request(Ask(role="r", seed=1, **base), engine={"model": "m"}, sampling=Sampling(), seed=0, row="a").key,
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert (
        key(sampling=Sampling(temperature=0.5))
        == make_request(
            Ask(role="r", sampling=Sampling(temperature=0.5), **base),
            engine={"model": "m"},
            sampling=Sampling(),
            seed=0,
            row="a",
        ).key
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1}, "temperature must be at least 0, not -1"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1.5"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"stop": "END"}, "stop must be a list of"),
        ({"stop": ("",)}, "stop must be a list of"),
    ],
)
def test_bad_samplings(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**how)


def test_what_is_no_strategy_says_so():
    def yields(what):
        return (yield what)

    def returns(what):
        yield Ask(role="r", prompt="?")
        return what

    with pytest.raises(TypeError, match="a strategy must yield an Ask or a list of them, not 'hello'"):
        next(drive(yields("hello")))
    driven = drive(returns(3))
    next(driven)
    with pytest.raises(
        TypeError, match="a strategy must return a Pair, a Labelled, a Rejected or a list of them, not 3"
    ):
        driven.send([Answer(text="x")])
    with pytest.raises(ValueError, match="exactly one of messages and prompt"):
        Ask(role="r")
    with pytest.raises(ValueError, match="an Ask needs at least one message"):
        Ask(role="r", messages=[])


def test_a_method_that_contrasts_images_rejects_requests_without():
    engine = TransformersEngine(model="testbed:expert", method="vcd")
    with pytest.raises(ValueError, match="method 'vcd' contrasts images, but a request has none"):
        list(engine.answer(requests_for(engine, QUESTIONS[:1])))
