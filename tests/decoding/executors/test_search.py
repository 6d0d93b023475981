"""Contrastive search gives the reference's tokens: every family, both ways to read candidates, both executors.

The code under test works on left-padded batches, in float32, with a cache. The reference is the paper's equation for
one unpadded row at a time, in float64, without a cache, every candidate by a forward of the whole row. The breaks in this
file are applied in every run.
"""

import copy
import functools
import math
import runpy
from pathlib import Path

import pytest
import torch
import zoo
from helpers.scripts import run_script
from transformers import (
    CompileConfig,
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    QuantizedCache,
    StaticCache,
    StoppingCriteriaList,
)
from zoo import vision as zoo_vision

from contralto import testbed
from contralto.decoding import ContrastiveSearch, ContrastiveSearchLogitsProcessor
from contralto.decoding.executors import search, search_state, tree
from contralto.decoding.rules import contrastive_search, degeneration_penalty

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
STEPS = 12
RULE = {"alpha": 0.5, "k": 4}
NO_TREE = ("bloom", "mamba", "t5", "bart")
"""Families that cannot read candidates as a tree."""
FAST = ("llama", "gemma3", "mamba")
"""Families whose eager attention and whose breaks are tested in every run, not only in the slow ones."""
SEEDS = {"bart": 3, "gpt_neox": 2}
"""Seeds of models that say something; 1 for the others."""
LOGITS = torch.randn(4, zoo.VOCAB, generator=torch.Generator().manual_seed(0))
MARGIN = 1e-5
"""The reference's choices must be clearer than float32 could blur."""


# ---------------------------------------------------------------------------------------------------- the reference


class Reference:
    """Contrastive search with a float64 model, by whole forwards."""

    def __init__(self, model, *, alpha, k, encoder_ids=None, images=None, ban=()):
        self.model, self.alpha, self.k, self.ban = model.double(), alpha, k, ban
        self.encoder_ids, self.images = encoder_ids, images or {}
        self.margin = math.inf

    @torch.no_grad()
    def forward(self, rows):
        """Next-token logits and the last layer's hidden states of rows of ids, all of one length."""
        ids = torch.tensor(rows)
        if self.encoder_ids is not None:
            inputs = {"input_ids": self.encoder_ids.expand(len(ids), -1), "decoder_input_ids": ids}
        else:
            inputs = {"input_ids": ids} | {name: self._fit(name, value, ids) for name, value in self.images.items()}
        output = self.model(**inputs, use_cache=False, output_hidden_states=True)
        states = output.get("decoder_hidden_states") or output.hidden_states
        return output.logits[:, -1], states[-1]

    @staticmethod
    def _fit(name, value, ids):
        """For each row token types as long as itself, what was generated being text, and images in float64."""
        if name in zoo_vision.TOKEN_TYPES.values():
            return torch.nn.functional.pad(value, (0, ids.shape[1] - value.shape[1])).expand(len(ids), -1)
        value = value.double() if value.is_floating_point() else value
        return torch.cat([value] * len(ids))

    def next_token(self, ids, logits):
        """The token, and the logits after it."""
        logits = [-math.inf if v in self.ban else z for v, z in enumerate(logits.tolist())]
        total = sum(math.exp(z) for z in logits)
        p = [math.exp(z) / total for z in logits]
        ranked = sorted(range(len(p)), key=lambda v: -p[v])
        after, hidden = self.forward([[*ids, v] for v in ranked[: self.k]])
        scores = []
        for v, states in zip(ranked, hidden, strict=False):
            largest = max(float(torch.cosine_similarity(states[-1], h, dim=0)) for h in states[:-1])
            scores.append((1 - self.alpha) * p[v] - self.alpha * largest)
        best, *others = sorted(range(len(scores)), key=lambda i: -scores[i])
        gaps = [p[ranked[self.k - 1]] - p[ranked[self.k]]] + [scores[best] - scores[i] for i in others[:1]]
        self.margin = min(self.margin, *gaps)
        return ranked[best], after[best]

    def write(self, prompt, steps=STEPS):
        ids = prompt.tolist()
        logits = self.forward([ids])[0][0]
        for _ in range(steps):
            token, logits = self.next_token(ids, logits)
            ids.append(token)
            if token == zoo.EOS:
                break
        return ids[len(prompt) :]


def cosine(one, other):
    dot = sum(x * y for x, y in zip(one, other, strict=True))
    return dot / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))


def build(family):
    return zoo.build(family, seed=SEEDS.get(family, 1))


@functools.cache
def expected(family):
    """The reference's tokens for four prompts of a family."""
    found = []
    for row in zoo.prompts(4, seed=4):
        if family in zoo.ENCODER_DECODERS:
            reference = Reference(build(family), encoder_ids=row, **RULE)
            prompt = torch.tensor([reference.model.config.decoder_start_token_id])
        else:
            reference, prompt = Reference(build(family), **RULE), row
        found.append(reference.write(prompt))
        assert reference.margin > MARGIN, f"the reference's choice is too narrow to test with: {reference.margin:.1e}"
    assert len({token for tokens in found for token in tokens}) > 5, f"{family} hardly says anything: {found}"
    return found


def inputs_of(family, rows):
    return zoo.pad(rows, side="right" if family in zoo.ENCODER_DECODERS else "left")


def disguised(family, rows):
    """The same with words where the padding is, which only the mask tells from text."""
    inputs = inputs_of(family, rows)
    words = torch.randint(3, zoo.VOCAB, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(9))
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, words)
    return inputs


def trim(tokens):
    """Without what follows the end token."""
    return tokens[: tokens.index(zoo.EOS) + 1] if zoo.EOS in tokens else tokens


def generate(model, inputs, *, steps=STEPS, **how):
    output = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **how)
    skip = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [trim(row[skip:].tolist()) for row in output]


def processor_of(model, inputs, **rule):
    given = {"encoder_inputs": inputs} if model.config.is_encoder_decoder else {}
    if model.config.model_type in zoo.WITHOUT_PAD:
        given["attention_mask"] = inputs["attention_mask"]
    return ContrastiveSearchLogitsProcessor(model, **given, **(rule or RULE))


# ----------------------------------------------------------------------------------------------------------- the rule


def test_the_rule_is_the_papers_equation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    hidden, context = (torch.randn(3, n, 5, generator=generator, dtype=torch.float64) for n in (4, 7))
    candidates = logits.topk(4).indices
    for alpha in (0.0, 0.3, 1.0):
        scores = contrastive_search(logits, candidates, degeneration_penalty(hidden, context), alpha=alpha)
        for row in range(3):
            total = sum(math.exp(z) for z in logits[row].tolist())
            for i, v in enumerate(candidates[row].tolist()):
                largest = max(cosine(hidden[row, i].tolist(), h) for h in context[row].tolist())
                wanted = (1 - alpha) * math.exp(logits[row, v]) / total - alpha * largest
                assert scores[row, v].item() == pytest.approx(wanted, abs=1e-12)
            assert (scores[row] > -math.inf).sum() == 4


def test_padding_is_no_part_of_the_text():
    hidden, context = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    penalty = degeneration_penalty(hidden, context, mask)
    torch.testing.assert_close(penalty[0], degeneration_penalty(hidden[0], context[0, 2:]))
    torch.testing.assert_close(penalty[1], degeneration_penalty(hidden[1], context[1]))


def test_an_impossible_candidate_stays_impossible():
    """Its penalty is the lowest, which would make it win."""
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    scores = contrastive_search(logits, torch.tensor([[0, 1]]), torch.tensor([[1.0, -1.0]]), alpha=0.9)
    assert scores.argmax() == 0
    assert scores[0, 1:].eq(-math.inf).all()


def test_half_precision_compares_in_float32():
    hidden, context = torch.randn(1, 4, 64), torch.randn(1, 50, 64)
    half = degeneration_penalty(hidden.bfloat16(), context.bfloat16())
    assert half.dtype == torch.float32
    wanted = degeneration_penalty(hidden.bfloat16().double(), context.bfloat16().double())
    torch.testing.assert_close(half.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("how", "message"), [({"alpha": 1.1}, "alpha must lie in"), ({"k": 0}, "k must be at least")])
def test_parameters_are_checked_at_construction(how, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        ContrastiveSearch(**how)
    with pytest.raises(ValueError, match=message):
        ContrastiveSearchLogitsProcessor(model, **how)
    with pytest.raises(ValueError, match="path must be"):
        ContrastiveSearch(path="fast")


# --------------------------------------------------------------------------------------------------------- the matrix


def settings():
    """Family, path, attention and batch of every line of the matrix."""
    for family in zoo.FAMILIES:
        paths = ("replicate",) if family in NO_TREE else ("tree", "replicate")
        for path in paths:
            fast = family in FAST or path == paths[0]
            for attention, batch in (("sdpa", 1), ("sdpa", 4), ("eager", 4)):
                if family == "mamba" and attention == "sdpa":
                    continue
                often = fast and attention == "sdpa" and (family in FAST or (batch == 4 and family in zoo.QUICK))
                yield pytest.param(family, path, attention, batch, marks=[] if often else pytest.mark.slow)


@pytest.mark.covering
@pytest.mark.parametrize(("family", "path", "attention", "batch"), list(settings()))
def test_tokens_are_the_references(family, path, attention, batch):
    matrix(family, path, attention, batch)


def matrix(family, path, attention, batch):
    """Four rows together, or the first and the last alone."""
    model, rows, search = build(family), zoo.prompts(4, seed=4), ContrastiveSearch(path=path, **RULE)
    if family != "mamba":
        model.set_attn_implementation(attention)
    if batch == 4:
        assert generate(model, disguised(family, rows), custom_generate=search) == expected(family)
        return
    for i in (0, 3):
        assert generate(model, inputs_of(family, [rows[i]]), custom_generate=search) == [expected(family)[i]]


@pytest.mark.parametrize("family", zoo.families())
def test_the_processor_writes_the_same(family):
    model, rows = build(family), zoo.prompts(4, seed=4)
    inputs = inputs_of(family, rows)
    assert generate(model, inputs, logits_processor=[processor_of(model, inputs)]) == expected(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.families())
def test_without_a_penalty_it_is_greedy_search(family):
    without_a_choice(family, alpha=0.0, k=5)


@pytest.mark.parametrize("family", FAST)
def test_of_one_candidate_it_is_greedy_search(family):
    without_a_choice(family, alpha=0.6, k=1)


def without_a_choice(family, **rule):
    model, inputs = build(family), inputs_of(family, zoo.prompts(3, seed=2))
    greedy = generate(model, inputs)
    assert generate(model, inputs, custom_generate=ContrastiveSearch(**rule)) == greedy
    assert generate(model, inputs, logits_processor=[processor_of(model, inputs, **rule)]) == greedy


def test_some_rows_end_before_others():
    """The matrix has end tokens too, but here it is certain: the first row ends at its first token, pads follow."""
    model, inputs = build("llama"), inputs_of("llama", zoo.prompts(4, seed=4))
    ends = [zoo.EOS, expected("llama")[0][0]]
    how = {"eos_token_id": ends, "max_new_tokens": STEPS, "do_sample": False}
    output = model.generate(**inputs, custom_generate=ContrastiveSearch(**RULE), **how)
    for row, tokens in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), expected("llama"), strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert row[:end] == tokens[:end]
        assert set(row[end:]) <= {zoo.PAD}
    processor = model.generate(**inputs, logits_processor=[processor_of(model, inputs)], **how)
    assert torch.equal(output, processor)


# ------------------------------------------------------------------------------------------- what generate() offers


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tree", pytest.param("replicate", marks=pytest.mark.slow)])
def test_processors_act_before_the_candidates_are_chosen(path):
    model, rows = build("qwen2"), zoo.prompts(3, seed=4)
    ban = sorted({token for tokens in expected("qwen2") for token in tokens})[:4]
    reference = Reference(build("qwen2"), ban=ban, **RULE)
    wanted = [reference.write(row) for row in rows]
    assert reference.margin > MARGIN
    search = ContrastiveSearch(path=path, **RULE)
    inputs = inputs_of("qwen2", rows)
    assert generate(model, inputs, custom_generate=search, suppress_tokens=ban) == wanted
    for how in ({"suppress_tokens": ban}, {"repetition_penalty": 1.7}, {"min_new_tokens": 9}, {"bad_words_ids": [[5]]}):
        looped = generate(model, inputs, custom_generate=search, **how)
        assert looped == generate(model, inputs, logits_processor=[processor_of(model, inputs)], **how)


def test_fewer_possible_tokens_than_candidates():
    model, inputs = build("llama"), inputs_of("llama", zoo.prompts(2))
    (one, two) = (9, 17)
    how = {"prefix_allowed_tokens_fn": lambda batch, ids: [one, two]}
    tokens = generate(model, inputs, custom_generate=ContrastiveSearch(alpha=0.9, k=6), **how)
    assert {token for row in tokens for token in row} <= {one, two}


def test_scores_and_logits_are_returned():
    model, inputs = build("llama"), inputs_of("llama", zoo.prompts(3))
    how = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "output_logits": True}
    how["return_dict_in_generate"] = True
    looped = model.generate(**inputs, custom_generate=ContrastiveSearch(**RULE), **how)
    processed = model.generate(**inputs, logits_processor=[processor_of(model, inputs)], **how)
    assert torch.equal(looped.sequences, processed.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(looped[name], processed[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ["auto", "replicate"])
@pytest.mark.parametrize("family", zoo.families(quick=("llama", "mistral"), without={*zoo.ENCODER_DECODERS, "mamba"}))
def test_a_text_goes_on_from_the_returned_cache(family, path):
    """As from one that `generate()` returns (which cannot go on with Mamba's): all tokens but the last are in it, for rows that ended early their padding."""
    model, inputs = build(family), inputs_of(family, zoo.prompts(3, seed=4))
    search = ContrastiveSearch(path=path, **RULE)
    first = model.generate(**inputs, custom_generate=search, max_new_tokens=6, eos_token_id=None)
    ends = first[0, -4].item()  # the first row ends here, the others do not
    how = {"do_sample": False, "eos_token_id": ends, "pad_token_id": zoo.PAD, "return_dict_in_generate": True}
    output = model.generate(**inputs, custom_generate=search, max_new_tokens=7, **how)
    said = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert said.shape[1] > 3
    assert (said[0, 3:] == zoo.PAD).all()
    for more in (torch.empty(3, 0, dtype=torch.long), torch.tensor([[8, 21], [9, 5], [30, 7]])):
        longer = torch.cat([output.sequences, more], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, said.shape[1] + more.shape[1]), value=1)
        again = {"input_ids": longer, "attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
        again["eos_token_id"] = None
        cache = copy.deepcopy(output.past_key_values)
        assert torch.equal(model.generate(**again, past_key_values=cache), model.generate(**again))


def test_a_returned_cache_is_the_one_of_greedy_search():
    model, inputs = build("gpt2"), inputs_of("gpt2", zoo.prompts(3))
    how = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
    caches = [
        model.generate(**inputs, **how, **by).past_key_values
        for by in ({}, {"custom_generate": ContrastiveSearch(alpha=0, k=3)})
    ]
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_encoder_decoders_return_their_own_output():
    model, inputs = build("t5"), inputs_of("t5", zoo.prompts(2))
    how = {"max_new_tokens": 3, "return_dict_in_generate": True}
    output = model.generate(**inputs, custom_generate=ContrastiveSearch(**RULE), **how)
    assert type(output).__name__ == "GenerateEncoderDecoderOutput"
    assert output.scores is None


def test_streamer_and_stopping_criteria():
    class Streamer:
        put_, ended = (), False

        def put(self, value):
            self.put_ = (*self.put_, value.tolist())

        def end(self):
            self.ended = True

    model, row = build("llama"), zoo.prompts(4, seed=4)[2]
    streamer, wanted = Streamer(), expected("llama")[2]
    search = ContrastiveSearch(streamer=streamer, **RULE)

    def three(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] == len(row) + 3)

    how = {"custom_generate": search, "stopping_criteria": StoppingCriteriaList([three])}
    assert generate(model, zoo.pad([row]), **how) == [wanted[:3]]
    assert streamer.put_ == ([row.tolist()], *([token] for token in wanted[:3]))
    assert streamer.ended


def test_token_types_are_carried_on():
    """GPT-2 adds the embedding of the type, which for new tokens is the last one's."""
    model, rows = build("gpt2"), zoo.prompts(3, seed=5)

    def typed(batch):
        inputs = zoo.pad(batch)
        return inputs | {"token_type_ids": torch.full_like(inputs["input_ids"], 7)}

    for path in ("tree", "replicate"):
        search, greedy = ContrastiveSearch(path=path, **RULE), ContrastiveSearch(alpha=0, k=3, path=path)
        alone = [generate(model, typed([row]), custom_generate=search)[0] for row in rows]
        assert generate(model, typed(rows), custom_generate=search) == alone
        assert generate(model, typed(rows), custom_generate=greedy) == generate(model, typed(rows))


def test_embeddings_as_prompt():
    model, row = build("llama"), zoo.prompts(4, seed=4)[3]
    embeddings = model.get_input_embeddings()(row[None]).detach()
    output = model.generate(
        inputs_embeds=embeddings, max_new_tokens=STEPS, do_sample=False, custom_generate=ContrastiveSearch(**RULE)
    )
    assert trim(output[0].tolist()) == expected("llama")[3]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("path", ["tree", "replicate"])
def test_static_cache(family, path):
    model, inputs = build(family), inputs_of(family, zoo.prompts(4, seed=4))
    room = inputs["input_ids"].shape[1] + STEPS - 1 + RULE["k"]
    search = ContrastiveSearch(path=path, **RULE)
    how = {"cache_implementation": "static", "max_cache_len": room}
    assert generate(model, inputs, custom_generate=search, **how) == expected(family)
    assert generate(build("t5"), inputs_of("t5", zoo.prompts(4, seed=4)), custom_generate=ContrastiveSearch(**RULE),
                    cache_implementation="static", max_cache_len=STEPS + RULE["k"]) == expected("t5")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trees_are_compiled_where_generate_would(family):
    """`eager` compiles to the same operations, so that tokens are equal; candidates and single tokens have a graph each at most."""
    model, inputs = zoo.build(family, seed=1), zoo.pad(zoo.prompts(2))
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    how = {"cache_implementation": "static", "max_cache_len": inputs["input_ids"].shape[1] + STEPS + RULE["k"]}
    torch._dynamo.utils.counters.clear()
    found = generate(model, inputs, custom_generate=ContrastiveSearch(**RULE), **how, compile_config=config)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert found == generate(model, inputs, custom_generate=ContrastiveSearch(**RULE))
    replicated = ContrastiveSearch(**RULE, path="replicate")
    with pytest.raises(ValueError, match="compiles nothing but trees over a static cache"):
        generate(model, inputs, custom_generate=replicated, **how, compile_config=config)


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo_vision.FAMILIES)
def test_images_belong_to_the_prompt(family):
    """Every candidate by a whole forward of prompt, images and text."""
    model, rule = zoo_vision.build(family, seed=1), {"alpha": 0.4, "k": 3}
    prompts = [case.original for case in zoo_vision.cases(family, 2)]
    wanted = []
    for prompt in prompts:
        reference = Reference(zoo_vision.build(family, seed=1), images=without(prompt, "input_ids"), **rule)
        wanted.append(reference.write(prompt["input_ids"][0], steps=6))
        assert reference.margin > MARGIN
    inputs = zoo_vision.batch(prompts)
    for path in ("tree", "replicate"):
        assert generate(model, inputs, steps=6, custom_generate=ContrastiveSearch(path=path, **rule)) == wanted
    others = without(inputs, "input_ids", "attention_mask")
    processor = ContrastiveSearchLogitsProcessor(model, vision_inputs=others, **rule)
    assert generate(model, inputs, steps=6, logits_processor=[processor]) == wanted


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


# --------------------------------------------------------------------------------------------- the processor's own life


@pytest.mark.slow
def test_one_processor_serves_many_calls():
    model = build("llama")
    processor = processor_of(model, None)
    for seed, batch in ((4, 4), (2, 1), (3, 3), (4, 4)):
        inputs = inputs_of("llama", zoo.prompts(batch, seed=seed))
        search = ContrastiveSearch(**RULE)
        assert generate(model, inputs, logits_processor=[processor]) == generate(model, inputs, custom_generate=search)
    processor.reset()
    assert generate(model, inputs, logits_processor=[processor]) == expected("llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "mamba", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "gemma3", "bloom"))]
)
def test_any_token_may_come_next(family):
    """Two texts in turn, tokens that were no candidates, the same rows twice: the scores are a fresh object's."""
    model = build(family)
    processor, generator = processor_of(model, None), torch.Generator().manual_seed(1)
    texts = [zoo.pad(zoo.prompts(2, seed=s))["input_ids"] for s in (1, 2)]
    for step in range(10):
        turn = step % 2 if step > 7 else step // 4
        logits = torch.randn(2, zoo.VOCAB, generator=generator)
        scores = processor(texts[turn], logits)
        for other in (processor, processor_of(model, None)):
            torch.testing.assert_close(other(texts[turn], logits), scores, atol=2e-5, rtol=0)
        best = scores.argmax(-1) if step % 3 else torch.randint(3, zoo.VOCAB, (2,), generator=generator)
        texts[turn] = torch.cat([texts[turn], best[:, None]], dim=1)


def test_a_mask_belongs_to_its_prompts():
    """Padding that cannot be told from text, found by the mask, with several sequences per prompt."""
    model = build("llama")
    inputs = zoo.pad(zoo.prompts(2))
    inputs["input_ids"][inputs["attention_mask"] == 0] = 20
    processor = ContrastiveSearchLogitsProcessor(model, attention_mask=inputs["attention_mask"], **RULE)
    wanted = generate(model, inputs, custom_generate=ContrastiveSearch(**RULE))
    assert generate(model, inputs, logits_processor=[processor]) == wanted
    encoder_decoder, encoded = build("t5"), inputs_of("t5", zoo.prompts(2))
    once = processor_of(encoder_decoder, encoded)(torch.tensor([[zoo.PAD, 5], [zoo.PAD, 6]]), LOGITS[:2])
    rows = torch.tensor([[zoo.PAD, 5], [zoo.PAD, 5], [zoo.PAD, 6], [zoo.PAD, 6]])
    again = processor_of(encoder_decoder, encoded)(rows, LOGITS[:2].repeat_interleave(2, 0))
    torch.testing.assert_close(again, once.repeat_interleave(2, 0))
    twice = inputs["input_ids"].repeat_interleave(2, 0)
    torch.testing.assert_close(processor(twice, LOGITS)[::2], processor(inputs["input_ids"], LOGITS[::2]))
    with pytest.raises(ValueError, match="a mask belongs to one batch of prompts"):
        processor(inputs["input_ids"] + 1, LOGITS[:2])


def test_the_processor_refuses():
    model, inputs = build("llama"), zoo.pad(zoo.prompts(2))
    with pytest.raises(ValueError, match="pass num_beams=1"):
        generate(model, inputs, logits_processor=[processor_of(model, None)], num_beams=3)
    with pytest.raises(TypeError, match="that can generate, not Linear"):
        ContrastiveSearchLogitsProcessor(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it has no encoder"):
        ContrastiveSearchLogitsProcessor(model, encoder_inputs=inputs)
    with pytest.raises(ValueError, match="pass encoder_inputs="):
        ContrastiveSearchLogitsProcessor(build("t5"))
    vision = zoo_vision.build("llava")
    with pytest.raises(ValueError, match="pass vision_inputs="):
        ContrastiveSearchLogitsProcessor(vision)(torch.tensor([[5, zoo_vision.IMAGE, 7]]), torch.randn(1, 64))


# ------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"do_sample": True}, "pass do_sample=False"),
        ({"num_beams": 2}, "pass num_beams=1"),
        ({"use_cache": False}, "pass use_cache=True"),
        ({"prefill_chunk_size": 2}, "leave prefill_chunk_size out"),
        ({"output_hidden_states": True}, "leave output_attentions and output_hidden_states out"),
        ({"cache_implementation": "static"}, "pass max_cache_len=18"),
        (
            {"compile_config": CompileConfig()},
            "compiles nothing but trees over a static cache.*leave compile_config out",
        ),
    ],
)
def test_generate_refuses(how, message):
    model, inputs = build("llama"), zoo.pad(zoo.prompts(2))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, custom_generate=ContrastiveSearch(), max_new_tokens=8, **({"do_sample": False} | how))


def test_caches_are_refused():
    model, inputs = build("llama"), zoo.pad(zoo.prompts(1))
    cache = model(**inputs).past_key_values
    longer = {name: torch.cat([value, value[:, -1:]], 1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="already contains 4 tokens"):
        generate(model, longer, custom_generate=ContrastiveSearch(), past_key_values=cache)
    mistral = build("mistral")
    static = StaticCache(config=mistral.config, max_cache_len=64)
    with pytest.raises(ValueError, match="a static cache with a sliding window"):
        generate(mistral, inputs, custom_generate=ContrastiveSearch(), past_key_values=static)
    quantized = QuantizedCache(backend="fp8", config=model.config)
    with pytest.raises(ValueError, match="from a quantized cache"):
        generate(model, inputs, custom_generate=ContrastiveSearch(), past_key_values=quantized)
    empty = DynamicCache(config=model.config)
    row = zoo.prompts(4, seed=4)[0]
    assert generate(model, zoo.pad([row]), custom_generate=ContrastiveSearch(**RULE), past_key_values=empty) == [
        expected("llama")[0]
    ]


@pytest.mark.parametrize("family", NO_TREE)
def test_a_forced_tree_says_why_not(family):
    with pytest.raises(
        ValueError, match=r"cannot process candidates as a tree: .*; use path='auto' or path='replicate'"
    ):
        generate(build(family), inputs_of(family, zoo.prompts(1)), custom_generate=ContrastiveSearch(path="tree"))


# ------------------------------------------------------------------------------------------------- time and memory


class Watch:
    """How many tokens each forward reads, and how many the cache holds after it."""

    def __init__(self, model):
        self.read, self.held = [], []
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs, output):
        self.read.append(kwargs["input_ids"].numel())
        self.held.append(
            output.past_key_values.layers[0].keys.shape[:1] + output.past_key_values.layers[0].keys.shape[2:3]
        )


def test_one_forward_per_token_and_k_more_tokens_of_cache():
    model, row = build("llama"), zoo.prompts(1)[0]
    search = ContrastiveSearch(**RULE)
    generate(model, zoo.pad([row]), custom_generate=search, steps=1)  # the test of the model is done
    watch = Watch(model)
    generate(model, zoo.pad([row]), custom_generate=search, steps=5, eos_token_id=None)
    assert watch.read == [len(row), *[RULE["k"]] * 5]
    assert [rows for rows, _ in watch.held] == [1] * 6
    assert [length for _, length in watch.held[1:]] == [len(row) + step + RULE["k"] for step in range(5)]


def test_sliding_layers_hold_their_window_and_k_tokens():
    model, row = build("mistral"), zoo.prompts(4)[3]
    generate(model, zoo.pad([row]), custom_generate=ContrastiveSearch(**RULE), steps=1)
    watch = Watch(model)
    generate(model, zoo.pad([row]), custom_generate=ContrastiveSearch(**RULE), steps=5, eos_token_id=None)
    assert {length for _, length in watch.held[1:]} == {model.config.sliding_window - 1 + RULE["k"]}


# ------------------------------------------------------------------------------------------------ the test of a model


class Leaky(tree.CandidateTree):
    """Candidates see each other, as where a model does not heed the mask."""

    def _mask(self, layer, visible):
        mask = super()._mask(layer, visible)
        mask[..., -self._count :] = 0
        return mask


class Boolean(tree.CandidateTree):
    """A mask that eager attention adds to its logits as 0 and 1."""

    def _mask(self, layer, visible):
        return super()._mask(layer, visible) == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [Leaky, Boolean])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_model_that_fails_its_test_is_read_by_replicas(family, broken, monkeypatch):
    for module in (tree, search_state):
        monkeypatch.setattr(module, "CandidateTree", broken)
    model, inputs = build(family), inputs_of(family, zoo.prompts(4, seed=4))
    model.set_attn_implementation("eager")
    assert generate(model, inputs, custom_generate=ContrastiveSearch(**RULE)) == expected(family)
    with pytest.raises(ValueError, match="differ from those of a plain forward pass by"):
        generate(model, inputs, custom_generate=ContrastiveSearch(path="tree", **RULE))


def test_the_verdict_is_kept_for_each_model_and_use():
    model, inputs = build("llama"), zoo.pad(zoo.prompts(2))
    watch = Watch(model)
    counts = []
    for batch in (inputs, inputs, zoo.pad(zoo.prompts(1))):
        generate(model, batch, custom_generate=ContrastiveSearch(**RULE), steps=3, eos_token_id=None)
        counts.append(len(watch.read))
    assert counts == [8, 12, 20]  # prompt, two tests of a plain forward and a tree, 3 steps; no test; another use
    held = len(tree._VERDICTS)
    del model, watch
    assert len(tree._VERDICTS) < held


def test_windows_that_the_cache_does_not_know():
    """Mistral with a cache made without its configuration: nothing but its masks knows of the window."""
    model, rows = build("mistral"), zoo.prompts(4, seed=4)
    how = {"past_key_values": DynamicCache()}
    assert generate(model, disguised("mistral", rows), custom_generate=ContrastiveSearch(**RULE), **how) == expected(
        "mistral"
    )
    with pytest.raises(ValueError, match="does not tell which layers have a sliding window"):
        generate(model, zoo.pad(rows), custom_generate=ContrastiveSearch(path="tree"), past_key_values=DynamicCache())
    torch.manual_seed(0)
    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **zoo.WIDE
    )
    with pytest.raises(ValueError, match="a window of its own, window_size"):
        generate(GPTNeoForCausalLM(config), zoo.pad(rows), custom_generate=ContrastiveSearch(path="tree"))


def test_a_model_that_fails_at_the_mask_is_read_by_replicas(monkeypatch):
    def fail(*args):
        raise IndexError("too many indices")

    monkeypatch.setattr(tree.CandidateTree, "_mask", fail)
    model, inputs = build("llama"), inputs_of("llama", zoo.prompts(4, seed=4))
    assert generate(model, inputs, custom_generate=ContrastiveSearch(**RULE)) == expected("llama")
    with pytest.raises(ValueError, match="fails with IndexError: too many indices"):
        generate(model, inputs, custom_generate=ContrastiveSearch(path="tree"))


# ----------------------------------------------------------------------------------- breaks that the matrix must notice


class WrongKept(tree.CandidateTree):
    """The keys and values of the first candidate stay, whichever was chosen."""

    def keep(self, choice):
        super().keep(torch.zeros_like(choice))


class AllKept(tree.CandidateTree):
    """No candidate leaves the cache."""

    def _drop_last(self, count):
        pass


class WrongHidden(search_state.SearchState):
    """The hidden state of the first candidate stays."""

    def take(self, tokens):
        self._units = self._units[:, :1].expand_as(self._units)
        return super().take(tokens)


class WrongReplica(search_state.ReplicatedCandidates):
    def keep(self, choice):
        super().keep(torch.zeros_like(choice))


def padding_counts(candidates, context, mask):
    return (candidates @ context.mT).amax(-1)


BREAKS = [
    *[(search_state, "CandidateTree", Leaky, family, "tree") for family in ("llama", "gpt2", "mistral", "gemma3")],
    *[(search_state, "CandidateTree", WrongKept, family, "tree") for family in ("llama", "gpt2", "mistral", "gemma3")],
    *[(search_state, "CandidateTree", AllKept, family, "tree") for family in ("llama", "opt")],
    *[(search, "SearchState", WrongHidden, family, "tree") for family in ("llama", "qwen3", "gpt_neox")],
    *[
        (search_state, "ReplicatedCandidates", WrongReplica, family, "replicate")
        for family in ("llama", "bloom", "t5", "mamba")
    ],
    *[
        (search_state, "largest_cosine", padding_counts, f, "tree")
        for f in ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma3")
    ],
]


def breaks():
    for module, name, broken, family, path in BREAKS:
        marks = [] if family in FAST else pytest.mark.slow
        yield pytest.param(module, name, broken, family, path, id=f"{broken.__name__}-{family}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "broken", "family", "path"), list(breaks()))
def test_the_matrix_sees_it(module, name, broken, family, path, monkeypatch):
    monkeypatch.setattr(tree, "_self_test", lambda reader, candidates: None)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        matrix(family, path, "eager" if family == "mamba" else "sdpa", 4)


# ------------------------------------------------------------------------------------------------ stories, benchmarks


@pytest.mark.slow
def test_stories_repeat_themselves_less_and_still_make_sense():
    card = runpy.run_path(str(BENCHMARKS / "stories_card.py"))
    inputs, found = card["prompts"]("dev", 10, testbed.tokenizer()), {}
    for name, how in (("greedy", {}), ("search", {"custom_generate": ContrastiveSearch(alpha=0.4)})):
        figures = card["write"]("expert-0", inputs, 100, do_sample=False, **how)
        found[name] = {field: card["mean"](figures, field) for field in figures[0]._fields}
    greedy, search = found["greedy"], found["search"]
    assert search["valid"] > 0.98
    assert search["scenes"] > 0.95 * greedy["scenes"]
    assert search["distinct"] > greedy["distinct"] + 0.2
    assert search["repeated"] < greedy["repeated"] - 0.2
    assert search["surprise"] < greedy["surprise"] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("stories_card.py", "--stories 3 --tokens 30 --alphas 0.3", "| nucleus 0.95 |"),
        (
            "contrastive_search.py",
            "--heads 9/3 --contexts 32 --ks 4 --rounds 1 --seconds 0 --tokens 4 --threads 1 --no-write",
            "tokens per setting: yes.",
        ),
    ],
)
def test_benchmarks_run(name, arguments, shown):
    result = run_script(BENCHMARKS / name, *arguments.split())
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout
