"""Context lengths: no branch runs beyond its model's context, and commands raise before decoding."""

import pytest
import torch
import zoo
from transformers import FalconConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen2Config, T5Config

from contralto import cli, decoding, testbed
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.types import Ask, Failure, Sampling, make_request
from contralto.decoding.branches.context import context_length
from contralto.decoding.executors.score import score

CONTEXT, NEW = 12, 8


def _limited(model, context=CONTEXT):
    """A model whose configuration declares another context; rotary embeddings themselves know none."""
    model.config.max_position_embeddings = context
    return model


@pytest.fixture
def expert():
    return zoo.build("llama", seed=1)


@pytest.fixture
def amateur():
    return _limited(zoo.build("qwen2", hidden=16, seed=2))


def _inputs(*lengths):
    return zoo.pad([torch.arange(3, 3 + length) for length in lengths])


def _write(expert, inputs, executor, amateur, **how):
    made = decoding.ContrastiveDecodingLogitsProcessor(amateur)
    by = {
        "processor": {"logits_processor": [made]},
        "loop": {"custom_generate": made.loop()},
        "speculative": {"custom_generate": decoding.SpeculativeContrastiveDecoding(amateur, draft_length=2)},
    }[executor]
    how = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None} | how
    return expert.generate(**inputs, **by, **how)


class _Config:
    """What holds a configuration."""

    def __init__(self, config):
        self.config = config


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (GPT2Config(n_positions=77), 77),
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 2.0}), 128),
        (Qwen2Config(max_position_embeddings=64, rope_parameters=YARN), 256),
        (Qwen2Config(max_position_embeddings=64, rope_parameters=YARN | {"original_max_position_embeddings": 16}), 64),
        (zoo.FAMILIES["gemma3"](16), 128),
        (FalconConfig(alibi=True), None),
        (FalconConfig(alibi=False), 2048),
        (MambaConfig(), None),
        (T5Config(), None),
        (zoo.FAMILIES["bloom"](16), None),
    ],
)
def test_the_context_of_a_configuration(config, context):
    assert context_length(_Config(config)) == context


@pytest.mark.parametrize("executor", ["processor", "loop", "speculative"])
def test_an_amateur_beyond_its_context(expert, amateur, executor):
    message = "row 0 has 13 tokens, more than the context of 12 tokens of Qwen2ForCausalLM, .*shorten the prompt"
    with pytest.raises(ValueError, match=message):
        _write(expert, _inputs(9), executor, amateur)
    _write(expert, _inputs(5), executor, amateur)
    with pytest.raises(ValueError, match="row 1 has 20"):
        _write(expert, _inputs(2, 20), executor, amateur)


@pytest.mark.parametrize("executor", ["processor", "loop", "speculative"])
def test_padding_and_ended_rows_do_not_count(expert, amateur, executor):
    """A row of 9 tokens that has ended goes on as padding, and a row of 3 is padded before its beginning."""
    inputs = _inputs(9, 3)
    first = _write(expert, inputs, "loop", _limited(zoo.build("qwen2", hidden=16, seed=2), 99))[:, 9:].tolist()
    end = next(token for token in first[0][:3] if token not in first[1])
    output = _write(expert, inputs, executor, amateur, eos_token_id=end)
    assert output.shape[1] > CONTEXT + 1
    assert output[1, 9:].tolist() == first[1]


def test_a_window_counts_what_it_shows(expert, amateur):
    made = decoding.ContrastiveDecodingLogitsProcessor(amateur, form="li", amateur_window=1)
    output = expert.generate(
        **_inputs(30), logits_processor=[made], max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert output.shape[1] == 42


@pytest.mark.parametrize("executor", ["processor", "loop"])
def test_another_prompt_of_the_same_model(expert, executor):
    """The main model may read more than its context, as in transformers; the contrast prompt may not."""
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for main, other, fits in ((5, 20, False), (20, 3, True)):
        made = decoding.ContextAwareDecodingLogitsProcessor(_limited(expert), _inputs(other))
        by = {"custom_generate": made.loop()} if executor == "loop" else {"logits_processor": [made]}
        if fits:
            assert expert.generate(**_inputs(main), **by, **how).shape[1] == main + NEW
        else:
            with pytest.raises(ValueError, match="the context of 12 tokens of LlamaForCausalLM"):
                expert.generate(**_inputs(main), **by, **how)


def test_likelihoods(expert, amateur):
    made, rest = decoding.ContrastiveDecodingLogitsProcessor(amateur), torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="row 0 has 13"):  # the last token is predicted, not read
        score(made, expert, _inputs(11), rest)
    assert score(made, expert, _inputs(10), rest).length.tolist() == [3]
    padded = torch.tensor([[1, 1, 0, 0, 0]])
    assert score(made, expert, _inputs(11), torch.ones_like(padded), continuation_mask=padded).length.tolist() == [2]
    assert score(made, _limited(expert, 4), _inputs(9), rest).length.tolist() == [3]


def test_a_source_text_beyond_the_encoder():
    expert, amateur = zoo.build("bart", seed=1), _limited(zoo.build("bart", hidden=16, seed=2), 16)
    source = _inputs(20)
    made = decoding.ContrastiveDecodingLogitsProcessor(amateur, encoder_inputs=source)
    with pytest.raises(
        ValueError,
        match="row 0 has 20 tokens, more than the context of 16 tokens of BartForConditionalGeneration's encoder",
    ):
        expert.generate(**source, logits_processor=[made], max_new_tokens=3)


# ------------------------------------------------------------------------------------------------------------- commands

LONG = "Ben went out to the barn door. " * 90


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The embedded amateur, of a context of 64 tokens and without an end of text, with its tokenizer."""
    folder, model = tmp_path_factory.mktemp("amateur"), _limited(testbed.load("amateur"), 64)
    model.generation_config.eos_token_id = model.config.pad_token_id
    model.save_pretrained(folder)
    testbed.tokenizer().save_pretrained(folder)
    return folder


def _tokens(text):
    chat = [{"role": "user", "content": text}]
    return len(testbed.tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", LONG],
            f"prompt 0: the prompt has {_tokens(LONG)} tokens and --max-new-tokens is 256, more than the context of 512",
        ),
        (
            ["generate", "Ben", "--max-new-tokens", "510"],
            "lower --max-new-tokens, or use a model with a longer context",
        ),
        (["generate", "Ben", LONG, "--method", "cfg"], "prompt 1: the prompt has"),
        (
            ["generate", "Ben", "--method", "icd", "--contrast-prompt", LONG],
            "prompt 0: the prompt of the other branch has",
        ),
        (["explain", "Ben", "--method", "cfg", "--max-new-tokens", "510"], "prompt 0: the prompt has"),
    ],
)
def test_prompts_that_do_not_fit(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("transformers.GenerationMixin.generate", None)  # nothing is decoded
    command, *rest = argv
    assert cli.main([command, *rest, "--model", "testbed:expert"]) == 2
    assert message in capsys.readouterr().err


def test_an_amateur_of_a_shorter_context(short, capsys):
    how = ["generate", "Ben went out to the barn", "--model", "testbed:expert", "--amateur", str(short)]
    assert cli.main([*how, "--max-new-tokens", "60"]) == 2
    assert (
        "and --max-new-tokens is 60, more than the context of 64 tokens of LlamaForCausalLM" in capsys.readouterr().err
    )
    assert cli.main([*how, "--max-new-tokens", "60", "--form", "li", "--amateur-window", "4"]) == 0
    assert cli.main([*how, "--max-new-tokens", "9"]) == 0


def test_data_engines(short):
    """A prompt without room fails alone; an answer ends where the context does, whatever prompts are beside it."""
    engine = TransformersEngine(model=str(short), batch_size=4)
    texts, sampling = ["Ben went", "Mia " * 30, LONG], Sampling(temperature=0, max_new_tokens=200)

    def ask(texts):
        asks = [Ask(role="r", prompt=text) for text in texts]
        requests = [make_request(a, engine=engine.identity, sampling=sampling, seed=0, row=a.prompt) for a in asks]
        found = {request.prompt: said for some in engine.answer(requests) for request, said in some}
        return [found[text] for text in texts]

    together = ask(texts)
    assert together == [answer for text in texts for answer in ask([text])]
    assert isinstance(together[2], Failure)
    assert "tokens, but prompt and answer together may have 64 with LlamaForCausalLM" in together[2].reason
    for answer in together[:2]:
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens + answer.completion_tokens == 64
