"""Branches with images: noised, transformed, and none at all. The tokens are those of the float64 oracle, which sees the same pixels."""

import itertools

import pytest
import torch
from engines import FORMULAS, MARKER, has_ended, scheduler_of
from models import widen_vision
from oracles import decoding as reference
from PIL.Image import Resampling
from vllm import SamplingParams

from contralto import testbed
from contralto.decoding.images import diffusion_noise, ritual_transform
from contralto.decoding.vllm import generate_pairs, make_llm, noised_image
from contralto.decoding.vllm.session import RefusedError
from contralto.testbed import scenes

pytest.importorskip("torchvision", reason="make test-vllm installs it")
pytestmark = pytest.mark.runner("v1")  # what reads images does not run in Triton's interpreter
COUNT, LENGTH, PATCHES = 12, 16, 16
TRANSFORMS = ("hflip", "vflip", "rotation", "color_jitter")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return str(widen_vision("vision-0", tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="module")
def eyes(engines, vision):
    """Engines of the vision-language model. vLLM would look at its class in a process that cannot import torchvision."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    ModelRegistry.register_model("LlavaForConditionalGeneration", LlavaForConditionalGeneration)

    def make(_, **how):
        return make_llm(vision, **how)

    return lambda **how: engines(make=make, limit_mm_per_prompt={"image": 2}, **how)


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(testbed.path("vision-0"))


@pytest.fixture(scope="module")
def model64():
    return testbed.load("vision-0").double()


def pictures(count):
    """Pictures of scenes, as large as the model sees them: torchvision cannot shrink them as the model's processor says."""
    some = itertools.islice(scenes.scenes(5, "test"), count)
    return [scene.image().resize((scenes.SIZE, scenes.SIZE), Resampling.BOX) for scene in some]


def question(image, number):
    """A prompt of vLLM: a caption, or whether there is a thing."""
    text = scenes.DESCRIBE if number % 2 else scenes.ask(scenes.OBJECTS[number % 16])
    shown = [{"type": "image", "image": image}] if image is not None else []
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@torch.no_grad()
def logits_of(model, processor, messages, pixels, tokens):
    """The logits `(T, V)` of every token of a text in float64, given its prompt and the pixels that it shows."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = None if pixels is None else [torch.zeros(3, scenes.SIZE, scenes.SIZE)]
    ids = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)["input_ids"][0].tolist()
    row = torch.tensor([[*ids, *tokens[:-1]]])
    shown = {} if pixels is None else {"pixel_values": pixels.double()[None]}
    return model(row, use_cache=False, **shown).logits[0, len(ids) - 1 :].tolist()


def preprocessed(processor, image):
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def oracle(branches, tokens, *, method, **how):
    """The tokens by the formula, and the log-probabilities of the text's own tokens by branch."""
    logs = [[reference.log_softmax(row)[token] for row, token in zip(b, tokens, strict=True)] for b in branches]
    text = []
    for step in range(len(tokens)):
        rows = [[-torch.inf if v == MARKER else x for v, x in enumerate(branch[step])] for branch in branches]
        scores = FORMULAS[method](*rows, step=step, **how)
        text.append(max(range(len(scores)), key=scores.__getitem__))
    return text, logs


def noised(processor, image, number):
    messages = question(image, number)
    entries = noised_image(image, processor, step=700, seed=number)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pixels = diffusion_noise(preprocessed(processor, image)[None], step=700, seed=[number])[0]
    return {"prompt_token_ids": ids, **entries}, pixels


def transformed(processor, image, number):
    view = ritual_transform(image, seed=number, transforms=TRANSFORMS).image
    return question(view, number), preprocessed(processor, view)


def blind(processor, image, number):
    return question(None, number), None


CASES = {
    "vcd": ((noised,), {"method": "vcd", "alpha": 1.0, "beta": 0.05}),
    "ritual": ((transformed,), {"method": "ritual", "kappa": 3.0, "beta": 0.05}),
    "ritual-vcd": ((transformed, noised), {"method": "ritual-vcd", "kappa": 3.0, "alpha": 1.0, "beta": 0.05}),
    "m3id": ((blind,), {"method": "m3id", "lam": 0.2, "beta": 0.05}),
    "vdd": ((blind,), {"method": "vdd", "alpha": 1.0, "beta": 0.05}),
}
ENGINES = {
    "plain": {},
    "odd slots, small steps, prefix caching": {
        "max_num_seqs": 5,
        "max_num_batched_tokens": 96,
        "enable_prefix_caching": True,
    },
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_texts(eyes, processor, model64, engine, case):
    views, how = CASES[case]
    llm, found, plain = eyes(**ENGINES[engine]), [], []
    some = pictures(COUNT)
    others = [[view(processor, image, number) for view in views] for number, image in enumerate(some)]
    pairs = [(question(image, number), *(prompt for prompt, _ in others[number])) for number, image in enumerate(some)]
    for number, output in enumerate(generate_pairs(llm, pairs, max_tokens=LENGTH, use_tqdm=False, **how)):
        image, messages = some[number], question(some[number], number)
        shown = logits_of(model64, processor, messages, preprocessed(processor, image), output.tokens)
        contrasts = [
            logits_of(
                model64, processor, messages if pixels is not None else question(None, number), pixels, output.tokens
            )
            for _, pixels in others[number]
        ]
        text, logs = oracle([shown, *contrasts], output.tokens, **how)
        assert output.tokens == text
        assert has_ended(output, LENGTH)
        assert output.desyncs == 0
        for mine, theirs in zip(output.logprobs, logs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
        found.append(output.tokens)
        plain.append([max(range(len(row)), key=row.__getitem__) for row in shown])
    assert found != plain  # the contrast does something


def test_images_that_no_step_can_encode(eyes, processor):
    """They are refused, since vLLM would read the prompts piece by piece; others go on, and so does the engine."""
    llm, some = eyes(max_num_batched_tokens=64), pictures(3)
    scheduler = scheduler_of(llm)
    scheduler.max_num_encoder_input_tokens = 2 * PATCHES - 1
    pair = (question(some[0], 0), question(some[1], 0))
    message = rf"its images have {2 * PATCHES} embeddings, but a step encodes at most {2 * PATCHES - 1}: raise max_num"
    with pytest.raises(RefusedError, match=message) as error:
        generate_pairs(llm, [pair, (question(some[2], 0), question(None, 0))], use_tqdm=False, method="vcd")
    assert [output is None for output in error.value.outputs] == [True, False]


def test_completions_wait_for_the_encoder(eyes):
    """As many start in a step as it can encode; all are in step, and right as one by one."""
    llm, some = eyes(), pictures(9)
    pairs = [(question(one, 0), question(two, 0)) for one, two in itertools.pairwise(some)]
    alone = [generate_pairs(llm, [pair], use_tqdm=False, method="vcd", alpha=1.0)[0] for pair in pairs]
    scheduler_of(llm).max_num_encoder_input_tokens = 3 * PATCHES
    found = generate_pairs(llm, pairs, use_tqdm=False, method="vcd", alpha=1.0)
    assert [output.tokens for output in found] == [output.tokens for output in alone]
    assert sum(output.desyncs for output in found) == 0


def test_plain_requests_beside_them(eyes):
    llm, some = eyes(), pictures(1)
    params = SamplingParams(temperature=0, max_tokens=4)
    ids = llm.get_tokenizer().encode("<|user|><image>What is in the image?<|assistant|>")
    output = llm.generate({"prompt_token_ids": ids, "multi_modal_data": {"image": some[0]}}, params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 4
