"""The processor beyond one call on one batch: reuse, extension, windows, other dtypes, invalid arguments.

Reference: see test_families.py.
"""

import copy
import inspect
import re

import pytest
import torch
import zoo
from oracles import decoding as reference
from transformers import LogitsProcessorList

from contralto.decoding import AdaptersOff, ContrastiveDecodingLogitsProcessor
from contralto.decoding.branches import ModelBranch
from contralto.decoding.processors import ContrastiveLogitsProcessor
from contralto.decoding.vocabulary import fit_vocabulary

STEPS = 8
RULE = {"beta": 0.7, "alpha": 0.05}


@pytest.fixture(scope="module")
def llama():
    return zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=2)


def _greedy(expert, inputs, processor, **how):
    output = expert.generate(**inputs, logits_processor=[processor], max_new_tokens=STEPS, do_sample=False, **how)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _expected(expert, amateur, rows, **rule):
    """The reference's greedy tokens, with pads after the end token as in `generate()`."""
    expert, amateur = copy.deepcopy(expert).double(), copy.deepcopy(amateur).double()
    found = [reference.greedy(reference.scorer(expert, amateur, **rule), row, STEPS, zoo.EOS) for row in rows]
    width = max(map(len, found))
    return [tokens + [zoo.PAD] * (width - len(tokens)) for tokens in found]


class Spy:
    """Counts how many tokens per row a model is fed at every forward."""

    def __init__(self, model):
        self.fed = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.fed.append(kwargs["input_ids"].shape[1])


# ---------------------------------------------------------------------------------------------- forms and windows


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "mistral", "mamba"))]
)
def test_li_form_with_amateur_window(family, window, temperature):
    """Li et al.: the amateur sees the prompt's last tokens and all that was generated, its positions start there."""
    expert, amateur = zoo.build(family, seed=3), zoo.build(family, hidden=16, seed=4)
    rows = zoo.prompts(3)
    rule = {"form": "li", "alpha": 0.2, "amateur_temperature": temperature}
    processor = ContrastiveDecodingLogitsProcessor(amateur, amateur_window=window, **rule)
    expected = _expected(expert, amateur, rows, window=window, **rule)
    assert _greedy(expert, zoo.pad(rows), processor) == expected


def test_window_with_beams_and_reset(llama):
    expert, amateur = llama
    row = zoo.prompts(3)[2]
    doubles = copy.deepcopy(expert).double(), copy.deepcopy(amateur).double()
    rule = {"alpha": 0.1, "min_tokens_to_keep": 2}
    score = reference.scorer(*doubles, form="li", window=2, **rule)
    expected = reference.beam(score, row, STEPS, zoo.EOS, num_beams=4)
    processor = ContrastiveDecodingLogitsProcessor(amateur, form="li", amateur_window=2, **rule)
    for _ in range(2):
        tokens = _greedy(expert, zoo.pad([row]), processor, num_beams=4)[0]
        assert tokens[: len(expected)] == expected
        processor.reset()


def test_window_refuses_a_text_that_is_taken_back(llama):
    branch = ModelBranch(llama[1], window=2)
    ids = torch.randint(3, zoo.VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    for length in (5, 6, 7, 8):
        branch(ids[:, :length])
    with pytest.raises(ValueError, match="cannot tell a sequence whose last tokens were removed"):
        branch(ids[:, :7])
    branch.reset()
    branch(ids[:, :7])


# --------------------------------------------------------------------------------------------------- many sequences


def test_num_return_sequences(llama):
    expert, amateur = llama
    rows = zoo.prompts(2)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    torch.manual_seed(3)
    inputs = zoo.pad(rows)
    how = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": STEPS}
    output = expert.generate(**inputs, logits_processor=[processor], **how)
    doubles = copy.deepcopy(expert).double(), copy.deepcopy(amateur).double()
    prompts = [row for row in rows for _ in range(3)]
    scorers = [reference.scorer(*doubles, **RULE) for _ in prompts]
    expected = reference.sample(scorers, prompts, STEPS, zoo.EOS, seed=3)
    for tokens, wanted in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), expected, strict=True):
        assert tokens[: len(wanted)] == wanted


def test_beams_of_prompts_with_equal_tokens_and_other_masks(llama):
    """Two prompts of equal tokens, one of which is masked: their beams must not share cache rows."""
    expert, amateur = llama
    row = torch.tensor([7, 7, 7, 9, 11, 13])
    inputs = {"input_ids": torch.stack([row, row]), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, :3] = 0
    processor = ContrastiveDecodingLogitsProcessor(amateur, attention_mask=inputs["attention_mask"], **RULE)
    together = _greedy(expert, inputs, processor, num_beams=3)
    for i, visible in enumerate((row, row[3:])):
        alone = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
        expected = _greedy(expert, zoo.pad([visible]), alone, num_beams=3)[0]
        assert together[i][: len(expected)] == expected


# ------------------------------------------------------------------------------------------------- one object, reused


@pytest.mark.slow
def test_one_object_serves_many_calls(llama):
    expert, amateur = llama
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    batches = [zoo.prompts(3, seed=1), zoo.prompts(1, seed=2), zoo.prompts(3, seed=3), zoo.prompts(3, seed=1)]
    for rows in batches:
        assert _greedy(expert, zoo.pad(rows), processor) == _expected(expert, amateur, rows, **RULE)
        fresh = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
        how = {"num_beams": 3}
        assert _greedy(expert, zoo.pad(rows), processor, **how) == _greedy(expert, zoo.pad(rows), fresh, **how)


def test_two_calls_in_turn_with_one_object(llama):
    """Steps of two texts, one of each in turn: slow, but right."""
    branch = ModelBranch(llama[1])
    texts = [zoo.pad(zoo.prompts(2, seed=s))["input_ids"] for s in (1, 2)]
    for _ in range(3):
        for i, ids in enumerate(texts):
            torch.testing.assert_close(branch(ids), ModelBranch(llama[1])(ids))
            texts[i] = torch.cat([ids, torch.full((2, 1), 5 + i)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.families(without=zoo.ENCODER_DECODERS))
def test_prompts_that_extend_the_last_text(family):
    """The next turn of a conversation reuses the amateur's cache: only new tokens are fed, and the tokens are the same."""
    expert, amateur = zoo.build(family, seed=1), zoo.build(family, hidden=16, seed=2)
    rows = zoo.prompts(2)
    inputs = zoo.pad(rows)
    given = {"attention_mask": inputs["attention_mask"]} if family in zoo.WITHOUT_PAD else {}
    processor, spy = ContrastiveDecodingLogitsProcessor(amateur, **RULE, **given), Spy(amateur)
    how = {"logits_processor": [processor], "max_new_tokens": STEPS, "do_sample": False}
    first = expert.generate(**inputs, eos_token_id=None, **how)
    more = torch.randint(3, zoo.VOCAB, (2, 5), generator=torch.Generator().manual_seed(9))
    ids = torch.cat([first, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, STEPS + 5, dtype=torch.long)], dim=1)
    spy.fed.clear()
    tokens = _greedy(expert, {"input_ids": ids, "attention_mask": mask}, processor)
    texts = [row[pads:] for row, pads in zip(ids, (mask == 0).sum(1), strict=True)]
    assert tokens == _expected(expert, amateur, texts, **RULE)
    assert spy.fed[0] == (ids.shape[1] if family == "mamba" else 6)  # the last generated token, and the five new ones
    assert set(spy.fed[1:]) == {1}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "bloom", "mamba"])
def test_texts_that_go_back_or_share_a_beginning(family):
    """Any sequence of calls gives what a fresh branch gives: shorter, longer, other endings, the same again."""
    amateur = zoo.build(family, hidden=16, seed=2)
    branch = ModelBranch(amateur)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, zoo.VOCAB, (2, 12), generator=generator)
    other = text.clone()
    other[:, 7:] = torch.randint(3, zoo.VOCAB, (2, 5), generator=generator)
    for ids in (text[:, :9], text[:, :6], text, other, other[:, :8], other, text, text, text[:1], text.flip(0)):
        torch.testing.assert_close(branch(ids), ModelBranch(amateur)(ids), rtol=1e-4, atol=1e-4)


def test_rows_may_change_places(llama):
    """Rows of unequal padding in another order than before, each with a token more."""
    rows = zoo.pad(zoo.prompts(3))["input_ids"]
    branch = ModelBranch(llama[1])
    branch(rows)
    ids = torch.cat([rows[[2, 0, 1]], torch.tensor([[4], [5], [6]])], dim=1)
    for _ in range(2):
        torch.testing.assert_close(branch(ids), ModelBranch(llama[1])(ids))
        ids = torch.cat([ids, torch.tensor([[7], [8], [9]])], dim=1)


@pytest.mark.parametrize("kind", [ContrastiveDecodingLogitsProcessor, ContrastiveLogitsProcessor])
def test_the_signature_that_transformers_reads_is_that_of_the_call(kind):
    """It is kept for every class, and a subclass has its own."""

    class More(kind):
        def __call__(self, input_ids, scores, extra):
            return scores

    assert [*inspect.signature(kind.__call__).parameters] == ["self", "input_ids", "scores"]
    assert [*inspect.signature(More.__call__).parameters] == ["self", "input_ids", "scores", "extra"]
    assert "__signature__" in vars(kind.__call__)


def test_the_caller_may_change_its_tokens_in_place(llama):
    branch = ModelBranch(llama[1])
    ids = torch.tensor([[5, 6, 7, 8]])
    branch(ids)
    ids[0, 1] = 9
    torch.testing.assert_close(branch(ids), ModelBranch(llama[1])(ids))


# ----------------------------------------------------------------------------------- other caches, dtypes, vocabularies


def test_static_cache_of_the_expert(llama):
    expert, amateur = llama
    rows = zoo.prompts(3)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    tokens = _greedy(expert, zoo.pad(rows), processor, cache_implementation="static")
    assert tokens == _expected(expert, amateur, rows, **RULE)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba", "gemma3", "bloom"])
def test_amateur_of_another_architecture(llama, architecture):
    expert, amateur = llama[0], zoo.build(architecture, hidden=16, seed=5)
    rows = zoo.prompts(3)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    assert _greedy(expert, zoo.pad(rows), processor) == _expected(expert, amateur, rows, **RULE)


def test_amateur_in_another_dtype(llama):
    expert, amateur = llama
    rows = zoo.prompts(3)
    processor = ContrastiveDecodingLogitsProcessor(copy.deepcopy(amateur).double(), **RULE)
    assert _greedy(expert, zoo.pad(rows), processor) == _expected(expert, amateur, rows, **RULE)
    half = copy.deepcopy(amateur).bfloat16()
    processor = ContrastiveDecodingLogitsProcessor(half, **RULE)
    scores = processor(rows[0][None], torch.zeros(1, zoo.VOCAB))
    assert scores.dtype == torch.float32
    wanted = -RULE["beta"] * half(rows[0][None]).logits[:, -1].float().log_softmax(-1)
    torch.testing.assert_close(scores - scores.max(), wanted - wanted.max())


@pytest.mark.gpu
def test_amateur_on_another_device(llama):
    expert, amateur = llama
    rows = zoo.prompts(3)
    processor = ContrastiveDecodingLogitsProcessor(copy.deepcopy(amateur).to("cuda"), **RULE)
    assert _greedy(expert, zoo.pad(rows), processor) == _expected(expert, amateur, rows, **RULE)


@pytest.mark.parametrize("size", [zoo.VOCAB - 1, zoo.VOCAB + 16])
def test_vocabulary_padded_to_another_size(llama, size):
    """As in Qwen2.5: rows of the embedding matrix that belong to no token. Reference: the shared tokens only."""
    expert, shared = llama[0], min(size, zoo.VOCAB)
    amateur = zoo.build("llama", hidden=16, seed=2, vocab_size=size)
    rows = [row.clamp(max=shared - 1) for row in zoo.prompts(3)]
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    doubles = copy.deepcopy(expert).double(), copy.deepcopy(amateur).double()

    def score(ids):
        e, a = (reference.next_logits(model, ids)[: zoo.VOCAB] for model in doubles)
        a += [-torch.inf] * (zoo.VOCAB - len(a))
        scores = reference.contrastive_decoding(e, a, **RULE)
        return torch.tensor(scores).masked_fill(torch.arange(zoo.VOCAB) >= shared, -torch.inf)

    expected = [reference.greedy(score, row, STEPS, -1) for row in rows]
    assert _greedy(expert, zoo.pad(rows), processor, eos_token_id=None) == expected


def test_runs_before_temperature_and_after_repetition_penalty(llama):
    """The place in generate()'s list that both papers want."""
    processor = ContrastiveDecodingLogitsProcessor(llama[1], **RULE)
    config = copy.deepcopy(llama[0].generation_config)
    config.update(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    llama[0]._prepare_special_tokens(config)
    given = LogitsProcessorList([processor])
    prepared = llama[0]._get_logits_processor(config, input_ids_seq_length=5, logits_processor=given)
    names = [type(p).__name__ for p in prepared]
    place = names.index("ContrastiveDecodingLogitsProcessor")
    assert names.index("RepetitionPenaltyLogitsProcessor") < place < names.index("TemperatureLogitsWarper")


# -------------------------------------------------------------------------------------------------- assisted decoding


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_assisted_decoding_gives_the_same_tokens(family):
    """Drafts call the same processor, then their ends are taken back: the branch crops its cache or starts afresh."""
    expert, assistant = zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=6)
    amateur, row = zoo.build(family, hidden=16, seed=2), zoo.prompts(1)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    tokens = _greedy(expert, zoo.pad(row), processor, assistant_model=assistant)
    assert tokens == _expected(expert, amateur, row, **RULE)


# ------------------------------------------------------------------------------------------------------ adapters off


@pytest.fixture
def tuned():
    """A LoRA model whose adapters matter, and its base model alone."""
    peft = pytest.importorskip("peft")
    base = zoo.build("llama", seed=1)
    alone = copy.deepcopy(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).eval(), alone


def test_adapters_off(tuned):
    model, base = tuned
    rows = zoo.prompts(3)
    expected = _expected(model, base, rows, **RULE)
    assert expected != _expected(base, base, rows, **RULE)
    processor = ContrastiveDecodingLogitsProcessor(AdaptersOff(model), **RULE)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert _greedy(model, zoo.pad(rows), processor) == expected
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with_adapters = model(rows[0][None]).logits
    with model.disable_adapter():
        assert not torch.allclose(with_adapters, model(rows[0][None]).logits)


def test_a_peft_model_as_amateur(tuned):
    model, base = tuned
    rows = zoo.prompts(3)
    processor = ContrastiveDecodingLogitsProcessor(model, **RULE)
    assert _greedy(base, zoo.pad(rows), processor) == _expected(base, model, rows, **RULE)


def test_adapters_off_needs_adapters(llama):
    with pytest.raises(TypeError, match=r"needs a peft.PeftModel.*not LlamaForCausalLM"):
        AdaptersOff(llama[0])


# ------------------------------------------------------------------------------------------------- padding and mistakes


def test_given_mask_where_padding_looks_like_text(llama):
    """Prompts padded with an ordinary token: only the given mask can tell."""
    expert, amateur = llama
    rows = zoo.prompts(3)
    inputs = zoo.pad(rows)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 17)
    processor = ContrastiveDecodingLogitsProcessor(amateur, attention_mask=inputs["attention_mask"], **RULE)
    expected = _expected(expert, amateur, rows, **RULE)
    assert _greedy(expert, inputs, processor) == expected
    assert _greedy(expert, inputs, processor) == expected
    with pytest.raises(ValueError, match="does not belong to these prompts"):
        _greedy(expert, zoo.pad(zoo.prompts(3, seed=8)), processor)


def test_padding_with_the_end_token(llama):
    """A model without a pad token, as GPT-2 and Llama come: people pad with the end token."""
    expert = copy.deepcopy(llama[0])
    amateur = zoo.build("gpt2", hidden=16, seed=2, pad_token_id=None)
    amateur.generation_config.pad_token_id = None
    rows = zoo.prompts(3)
    inputs = zoo.pad(rows)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, zoo.EOS)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE)
    assert _greedy(expert, inputs, processor) == _expected(expert, amateur, rows, **RULE)


def test_a_prompt_that_is_nothing_but_the_beginning_token(llama):
    amateur = zoo.build("gpt2", hidden=16, seed=2, pad_token_id=None, bos_token_id=zoo.EOS)
    amateur.generation_config.pad_token_id = None
    ids = torch.tensor([[zoo.EOS]])
    torch.testing.assert_close(ModelBranch(amateur)(ids), amateur(ids).logits[:, -1])


def test_padding_that_cannot_be_told_from_text():
    amateur = zoo.build("gpt2", hidden=16, pad_token_id=None, bos_token_id=zoo.EOS)
    amateur.generation_config.pad_token_id = None
    ids = torch.tensor([[zoo.EOS, zoo.EOS, 5], [zoo.EOS, 6, 7]])
    with pytest.raises(ValueError, match=r"both the pad token and the BOS token.*pass attention_mask="):
        ModelBranch(amateur)(ids)
    branch = ModelBranch(amateur, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    torch.testing.assert_close(branch(ids)[0], amateur(ids[:1, 1:]).logits[0, -1])


def test_right_padding_is_refused(llama):
    inputs = zoo.pad(zoo.prompts(3), side="right")
    with pytest.raises(ValueError, match=r"padded on the right: set tokenizer.padding_side = 'left'"):
        ModelBranch(llama[1])(inputs["input_ids"])
    with pytest.raises(ValueError, match="padded on the right"):
        ContrastiveDecodingLogitsProcessor(llama[1], attention_mask=inputs["attention_mask"])


def test_unknown_padding_warns(llama):
    ids = torch.tensor([[9, 9, 9, 5], [8, 7, 6, 5]])
    with pytest.warns(UserWarning, match="start with token 9 twice, which is not the amateur's pad token"):
        ModelBranch(llama[1])(ids)


def test_another_tokenizer_is_refused(llama):
    processor = ContrastiveDecodingLogitsProcessor(zoo.build("llama", hidden=16, vocab_size=16))
    with pytest.raises(
        ValueError, match="contains token 40, but the vocabulary of LlamaForCausalLM has only 16 tokens"
    ):
        processor(torch.tensor([[40, 3]]), torch.zeros(1, zoo.VOCAB))
    with pytest.raises(ValueError, match="have 5000 and 48 tokens, a larger difference than padding explains"):
        ContrastiveDecodingLogitsProcessor(llama[1])(torch.tensor([[4, 3]]), torch.zeros(1, 5000))
    assert fit_vocabulary(torch.zeros(2, 7), 5).shape == (2, 5)


def test_encoder_inputs_are_asked_for_and_checked(llama):
    bart = zoo.build("bart", hidden=16)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder: pass encoder_inputs="):
        ContrastiveDecodingLogitsProcessor(bart)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no encoder"):
        ContrastiveDecodingLogitsProcessor(llama[1], encoder_inputs=zoo.pad(zoo.prompts(1)))
    processor = ContrastiveDecodingLogitsProcessor(bart, encoder_inputs=zoo.pad(zoo.prompts(2), side="right"))
    with pytest.raises(ValueError, match="contain 2 prompts, which do not fit 3 rows"):
        processor(torch.full((3, 1), zoo.EOS), torch.zeros(3, zoo.VOCAB))


def test_no_memory_for_the_amateur(llama, monkeypatch):
    amateur = copy.deepcopy(llama[1])

    def forward(**inputs):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(amateur, "forward", forward)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"there is not enough memory for LlamaForCausalLM .* use AdaptersOff"
    ):
        ModelBranch(amateur)(torch.tensor([[4, 3]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\] .*, not 1.5"),
        ({"beta": -0.1}, "beta must be a finite number of at least 0 .*, not -0.1"),
        ({"form": "lee"}, "form must be 'obrien' or 'li' or 'released', not 'lee'"),
        ({"form": "li", "beta": 0.5}, "form='li' has no beta; its parameter is amateur_temperature"),
        ({"amateur_temperature": 0.5}, "form='obrien' has no amateur_temperature; its parameter is beta"),
        ({"form": "li", "amateur_temperature": 0.0}, "amateur_temperature must be a finite number above 0, not 0.0"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep must be at least 1, not 0"),
        ({"amateur_window": 0}, "window must be at least 1 .*, not 0"),
        ({"attention_mask": torch.ones(4)}, r"attention_mask must be of shape \(prompts, length\), not \(4,\)"),
    ],
)
def test_bad_arguments_are_refused_at_construction(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDecodingLogitsProcessor(llama[1], **arguments)


def test_an_amateur_that_cannot_generate_is_refused(llama):
    with pytest.raises(TypeError, match=re.escape("can generate, not LlamaModel")):
        ContrastiveDecodingLogitsProcessor(llama[1].model)
    with pytest.raises(TypeError, match="not its name 'gpt2'"):
        ContrastiveDecodingLogitsProcessor("gpt2")
