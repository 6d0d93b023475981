"""Model arguments and generation options of lm-eval: every one is honoured or rejected, none is ignored."""

import ast
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.executors.score import score
from contralto.eval.models import vllm
from contralto.eval.models.arguments import LOADING, SPREADING, parameters_of
from contralto.eval.models.generation_options import RESERVED, read_options
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.vllm import ContraltoVLLM
from contralto.eval.models.vlm import ContraltoVLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CD = {"method": "cd", "amateur": "testbed:amateur"}
PROMPT = "Ben went out to the"


@cache
def lm(**arguments):
    return ContraltoLM("testbed:expert", device="cpu", **arguments)


def _ranked(model, prompt=PROMPT, continuation=" barn door."):
    return model.loglikelihood([Instance("loglikelihood", {}, (prompt, continuation), 0)], True)[0]


def _written(model, prompt=PROMPT, **asked):
    return model.generate_until([Instance("generate_until", {}, (prompt, {"until": [], **asked}), 0)], True)[0]


# ---------------------------------------------------------------------------------------- every argument of lm-eval's models


class _Loaded(Exception):
    """Raised in the place of loading a model."""


@pytest.fixture
def loading(monkeypatch):
    """The arguments that reach lm-eval's own loading, which ends there."""
    seen = {}

    def stop(self, *args, **kwargs):
        seen.update(kwargs)
        raise _Loaded

    for name in ("_get_config", "_get_backend", "_create_tokenizer"):
        monkeypatch.setattr(
            HFLM, name, lambda self, *args, **kwargs: seen.update(kwargs) or seen.update(tokenizer=args[1:])
        )
    monkeypatch.setattr(HFLM, "_create_model", stop)
    monkeypatch.setattr(HFLM, "_config", None, raising=False)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cpu"))
    return seen


LOADED = {
    "backend": "causal",
    "revision": "other",
    "subfolder": "deeper",
    "tokenizer": "testbed",
    "dtype": "float16",
    "trust_remote_code": True,
    "use_fast_tokenizer": False,
    "add_bos_token": True,
    "parallelize": True,
    "max_memory_per_gpu": "1GB",
    "max_cpu_memory": "2GB",
    "offload_folder": "elsewhere",
    "tp_plan": "auto",
    "peft": "adapter",
    "delta": "difference",
    "autogptq": "file",
    "gptqmodel": True,
    "gguf_file": "weights.gguf",
}
"""Arguments that lm-eval's loading takes, each with a value."""


@pytest.mark.parametrize("name", sorted(LOADED.keys() - {"peft"}))  # see tests/common/test_adapters.py
def test_arguments_of_loading_reach_it(name, loading):
    spread = {"parallelize": True} if name.startswith(("max_", "offload")) else {}
    with pytest.raises(_Loaded):
        ContraltoLM("testbed:expert", device="cpu", **spread, **{name: LOADED[name]})
    assert loading[name] == ((LOADED[name],) if name == "tokenizer" else LOADED[name])


def test_truncation_and_lengths():
    assert lm(max_length=20).max_length == 20
    seen = []
    model = lm(truncation=True)
    model.tokenizer = _Spy(model.tokenizer, seen)
    _written(model, max_gen_toks=1)
    assert seen[-1]["truncation"] is True


class _Spy:
    """A tokenizer whose calls are noted."""

    def __init__(self, tokenizer, seen):
        self._tokenizer, self._seen = tokenizer, seen

    def __call__(self, *args, **kwargs):
        self._seen.append(kwargs)
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __setattr__(self, name, value):
        super().__setattr__(name, value) if name.startswith("_") else setattr(self._tokenizer, name, value)


def test_first_tokens():
    """`prefix_token_id` stands before texts without context."""
    token = testbed.tokenizer().convert_tokens_to_ids("▁Mia")
    changed, usual = (_ranked(model, "", " went out.") for model in (lm(prefix_token_id=token), lm()))
    given = lm().decoding_by(**CD)._pair("", "went out.", ())
    other = lm(prefix_token_id=token).decoding_by(**CD)._pair("", "went out.", ())
    assert changed != usual
    assert (other[0], other[1]) == ([token], given[1])


def test_equal_prompts_may_share_a_forward():
    """`logits_cache` is of speed alone."""
    assert _ranked(lm(logits_cache=False)) == pytest.approx(_ranked(lm()))
    assert _ranked(lm(logits_cache=False, **CD)) == _ranked(lm(**CD))


def test_thinking_is_for_answers():
    model = lm(enable_thinking=True, think_end_token="####", **CD)
    assert model.think_end_token == "####"
    for each in (model, model.decoding_by()):
        with pytest.raises(ValueError, match="enable_thinking=True"):
            _ranked(each)
    with pytest.raises(ValueError, match="think_end_token is required"):
        ContraltoLM("testbed:expert", device="cpu", enable_thinking=True)


def test_chat_templates_get_their_arguments():
    model = ContraltoLM("testbed:expert", device="cpu", chat_template_args={"mark": "!"})
    model.tokenizer.chat_template = "{{ mark }}{{ messages[0].content }}"
    assert model.apply_chat_template([{"role": "user", "content": "x"}]) == "!x"


def _note(seen, module, inputs, output):
    """Note the precision of what the heads return."""
    if id(module) in seen:
        seen[id(module)].add(output.dtype)


@pytest.mark.parametrize("method", [{}, CD, {"method": "dola"}, {"method": "scd", "amateur": "testbed:amateur"}])
def test_mixed_precision_holds_in_every_branch(method):
    """The layers of all models run in half precision, in answers and likelihoods; the weights stay as they are."""
    model = lm(mixed_precision_dtype="bfloat16").decoding_by(**method)
    for work in (_ranked, lambda each: _written(each, max_gen_toks=3)):
        seen = {id(each.get_output_embeddings()): set() for each in model.models.values()}
        hook = torch.nn.modules.module.register_module_forward_hook(partial(_note, seen))
        work(model)
        hook.remove()
        assert list(seen.values()) == [{torch.bfloat16}] * len(seen)
    assert model.model.dtype == torch.float32


def test_mixed_precision_likelihoods_are_those_under_autocast():
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    prompt = tokenizer([PROMPT], return_tensors="pt")
    rest = tokenizer(["barn door."], return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = score(ContrastiveDecodingLogitsProcessor(amateur), expert, prompt, rest).total
    found = _ranked(lm(mixed_precision_dtype="bfloat16").decoding_by(**CD))[0]
    assert found == float(expected)
    assert found != _ranked(lm().decoding_by(**CD))[0]


def test_the_softmax_has_the_precision_that_was_asked_for():
    single, double = (_ranked(lm(softmax_dtype=each).decoding_by(**CD))[0] for each in (None, "float64"))
    assert single == pytest.approx(double, rel=1e-5)
    assert float(torch.tensor(double, dtype=torch.float32)) != double
    assert float(torch.tensor(single, dtype=torch.float32)) == single


HONOURED = {
    "pretrained": "every test",
    "truncation": test_truncation_and_lengths,
    "logits_cache": test_equal_prompts_may_share_a_forward,
    "max_length": test_truncation_and_lengths,
    "device": "test_loaded_models_are_not_loaded_again",
    "softmax_dtype": test_the_softmax_has_the_precision_that_was_asked_for,
    "mixed_precision_dtype": test_mixed_precision_holds_in_every_branch,
    "batch_size": "tests/eval/models/test_lm.py",
    "max_batch_size": "tests/eval/models/test_lm.py",
    "prefix_token_id": test_first_tokens,
    "think_end_token": "tests/eval/models/test_thinking.py",
    "enable_thinking": test_thinking_is_for_answers,
    "chat_template_args": test_chat_templates_get_their_arguments,
}
OF_IMAGES = {
    "image_token_id",
    "image_string",
    "interleave",
    "max_images",
    "convert_img_format",
    "min_pixels",
    "max_pixels",
    "image_width",
    "image_height",
    "image_max_side",
}


def test_every_argument_of_hf_is_tested_here():
    assert parameters_of([HFLM]) == {*HONOURED, *LOADED}


def test_every_argument_of_images_is_handed_on(monkeypatch):
    """lm-eval's own methods, which read them, are not replaced, or called: they encode images and render templates."""
    assert parameters_of([HFMultimodalLM]) - {"pretrained"} == OF_IMAGES
    for name in ("_create_tokenizer", "chat_template"):
        assert getattr(ContraltoVLM, name) is getattr(HFMultimodalLM, name)
    seen = {}

    def init(self, pretrained, **kwargs):
        seen.update(kwargs)
        raise _Loaded

    monkeypatch.setattr(HFMultimodalLM, "__init__", init)
    given = {name: 7 for name in OF_IMAGES}
    with pytest.raises(_Loaded):
        ContraltoVLM("testbed:vision-0", device="cpu", **given)
    assert given.items() <= seen.items()


@pytest.mark.parametrize("name", ContraltoVLM.ignored)
def test_image_models_reject_what_lm_eval_ignores(name):
    with pytest.raises(ValueError, match=f"{name} has no effect here: lm-eval's image-text models leave this"):
        ContraltoVLM("testbed:vision-0", device="cpu", **{name: "x"})


def _parameters_of_vllm():
    """The parameters of lm-eval's vLLM model, from its source: it cannot be imported without vLLM."""
    source = ast.parse(Path(find_spec("lm_eval.models.vllm_causallms").origin).read_text(encoding="utf-8"))
    (kind,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    (init,) = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {each.arg for each in (*init.args.args, *init.args.kwonlyargs)} - {"self"}


def test_every_argument_of_vllm_is_known(monkeypatch):
    """Those of `vllm.LLM` reach it; others have a meaning here or are rejected."""
    own = parameters_of([ContraltoVLLM]) | {"seed"}  # the seed of sampling
    to_engine = {
        "dtype",
        "revision",
        "trust_remote_code",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "tensor_parallel_size",
        "quantization",
        "max_model_len",
        "max_lora_rank",
        "data_parallel_size",
    }
    assert _parameters_of_vllm() <= own | to_engine | set(vllm.IGNORED)
    seen = {}

    def make(model, **options):
        seen.update(options)
        raise _Loaded

    monkeypatch.setattr("contralto.decoding.vllm.engine.make_llm", make)
    with pytest.raises(_Loaded):
        ContraltoVLLM("m", **dict.fromkeys(to_engine, 1))
    assert to_engine <= set(seen)
    with pytest.raises(_Loaded):
        ContraltoVLLM("m", max_length=77)
    assert seen["max_model_len"] == 77
    with pytest.raises(ValueError, match="two names of one argument"):
        ContraltoVLLM("m", max_length=77, max_model_len=78)
    with pytest.raises(ValueError, match="enable_thinking=True needs think_end_token"):
        ContraltoVLLM("m", enable_thinking=True)


@pytest.mark.parametrize("name", vllm.IGNORED)
def test_vllm_rejects_what_would_have_no_effect(name):
    with pytest.raises(ValueError, match=f"{name} has no effect here"):
        ContraltoVLLM("m", **{name: 1})


def test_vllm_answers_come_after_the_thought():
    """vLLM stops at strings wherever they are, so a thinking model is not given any."""
    tokenizer = testbed.tokenizer()
    model = ContraltoVLLM.__new__(ContraltoVLLM)
    model.tokenizer, model._length, model.seconds = tokenizer, 256, 0.0
    model.decoder, seen = lm().decoder, []
    tokens = tokenizer("3 + 4 = 7. #### 7. 3", add_special_tokens=False)["input_ids"]
    model._generate_plain = lambda jobs, how, stop: seen.append(stop) or [tokens]
    job = next(lm().eval_requests([Instance("generate_until", {}, (PROMPT, {"until": ["."]}), 0)]))
    answers = []
    for end in (None, "####"):
        model.think_end_token = end
        answers += model._generate_batch([job])
    assert answers == ["3 + 4 = 7", "7"]
    assert seen == [["."], []]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[
            ({name: LOADED[name]}, "pretrained is a loaded model, on which")
            for name in LOADING
            if name not in SPREADING
        ],
        *[({name: "1GB"}, f"{name} says how a model is spread, and has no effect without") for name in SPREADING],
        ({"attn_implementation": "eager"}, "pretrained is a loaded model, on which attn_implementation has no effect"),
        ({"device": "cuda"}, "device is cuda, and the model that was given is on cpu"),
    ],
)
def test_loaded_models_are_not_loaded_again(given, message):
    with pytest.raises(ValueError, match=message):
        ContraltoLM(testbed.load("expert"), tokenizer=testbed.tokenizer(), **given)


# ------------------------------------------------------------------------------------------------------- generation options


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"until": None}, "until must be a string or a list of strings, not None"),
        ({"until": [None]}, "until must be"),
        ({"until": 7}, "until must be a string or a list of strings, not 7"),
        ({"until": {"a": 1}}, "until must be"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number above 0, not 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_gen_toks": True}, "max_gen_toks must be"),
        ({"max_tokens": 7.5}, "max_tokens must be"),
        ({"temperature": None}, "temperature must be a number at least 0, not None"),
        ({"temperature": "hot", "do_sample": True}, "temperature must be"),
        ({"temperature": float("inf"), "do_sample": True}, "temperature must be"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature must be"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1, not 1.5"),
        ({"top_p": 0}, "top_p must be a number above 0, not 0"),
        ({"min_p": -1}, "min_p must be"),
        ({"top_k": 2.5}, "top_k must be a whole number at least 0, not 2.5"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"do_sample": True}, "names no temperature above 0"),
        ({"do_sample": True, "temperature": 0}, "names no temperature above 0"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1"),
        *[({name: 1}, f"the generation option {name} is set by the evaluated model itself") for name in RESERVED],
    ],
)
def test_malformed_options_end_the_run_before_it_begins(asked, message, monkeypatch):
    monkeypatch.setattr(type(lm()), "_generate_batch", lambda self, jobs: pytest.fail("something was answered"))
    good = Instance("generate_until", {}, (PROMPT, {"until": []}), 0)
    with pytest.raises(ValueError, match=message):
        lm().generate_until([good, Instance("generate_until", {}, (PROMPT, asked), 0)], True)


def test_options_without_a_mapping():
    with pytest.raises(TypeError, match="names with values, not 7"):
        read_options(7, default=1, eos="")


def test_good_options():
    asked = read_options({"until": "x", "max_tokens": 5, "num_beams": 2, "do_sample": False}, default=9, eos="<eos>")
    assert asked == (["x", "<eos>"], 5, {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"num_beams": 2})
    assert read_options({}, default=9, eos="<eos>")[:2] == (["<eos>"], 9)
    assert read_options({"temperature": 1}, default=9, eos="").sampling["temperature"] == 1
