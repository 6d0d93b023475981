"""Speculative contrastive decoding equals contrastive decoding: the same greedy tokens, the same distribution.

Greedy reference: tests/oracles/decoding.py, float64, one unpadded row at a time, no cache, no draft. Amateurs are the expert with
noise on its weights, so that drafts are now kept and now rejected. Sampling: chi-square tests against exact probabilities,
on models whose next token depends on the last two alone, so that a long text is many draws. The last section applies
breaks that these tests notice.
"""

import copy
import itertools
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import zoo
from oracles import decoding as reference
from scipy.stats import chisquare
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo import vision as zoo_vision

from contralto import testbed
from contralto.common.head import find_layers
from contralto.decoding import AdaptersOff, ContrastiveDecodingLogitsProcessor, EarlyExit, GatedLogitsProcessor
from contralto.decoding.branches import reader
from contralto.decoding.branches.cache import crop_layers
from contralto.decoding.executors import drafting, generation, rounds
from contralto.decoding.executors.speculative import SpeculativeContrastiveDecoding, accept_or_redraw
from contralto.testbed import worlds

STEPS = 14
RULE = {"beta": 0.7, "alpha": 0.05}
FAMILIES = [family for family in zoo.FAMILIES if family != "mamba"]
BATCHED = ("gpt2", "mistral", "t5")
OTHERS = [family for family in FAMILIES if family not in BATCHED]
VISION_FAMILIES = [family for family in zoo_vision.FAMILIES if family not in ("llava", "qwen2_5_vl")]
NOISE = {"t5": 0.02, "gemma3": 0.15, "bloom": 0.3}


def noisy(model, size, seed=7):
    """A copy of a model whose matrices are a little off."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight) * size * weight.std())
    return other


def build(family):
    """An expert, and an amateur near enough that drafts are often kept."""
    expert = zoo.build(family, seed=1)
    return expert, noisy(expert, NOISE.get(family, 0.05))


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def qwen3():
    """Of all families the one whose drafts are kept about half of the time."""
    return build("qwen3")


def generate(expert, amateur, rows, settings=None, **how):
    """New tokens per row, and the statistics."""
    method = SpeculativeContrastiveDecoding(amateur, **(RULE if settings is None else settings))
    how = {"max_new_tokens": STEPS, "do_sample": False} | how
    output = expert.generate(**zoo.pad(rows), custom_generate=method, **how)
    return output[:, max(map(len, rows)) :].tolist(), method.statistics


def plain(expert, amateur, rows, settings=None, **how):
    """The same through the logits processor."""
    processor = ContrastiveDecodingLogitsProcessor(amateur, **(RULE if settings is None else settings))
    how = {"max_new_tokens": STEPS, "do_sample": False} | how
    output = expert.generate(**zoo.pad(rows), logits_processor=[*how.pop("logits_processor", []), processor], **how)
    return output[:, max(map(len, rows)) :].tolist()


def trim(tokens, end=zoo.EOS):
    """Without what follows the end token."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


# ------------------------------------------------------------------------------------------------------ greedy tokens


def slow(values):
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    ("family", "batch"),
    [*((family, 3) for family in BATCHED), *slow((f, 1) for f in FAMILIES), *slow((f, 3) for f in OTHERS)],
)
def test_greedy_tokens_are_the_reference_s(family, batch):
    pair = build(family)
    doubles = [copy.deepcopy(model).double() for model in pair]
    rows = zoo.prompts(batch, seed=batch)
    extra = {}
    if family in zoo.ENCODER_DECODERS:
        inputs = zoo.pad(rows, side="right")
        extra, starts = {"encoder_inputs": inputs}, [torch.tensor([pair[0].config.decoder_start_token_id])] * batch
        scorers = [reference.scorer(*doubles, encoder_ids=row, **RULE) for row in rows]
    else:
        inputs, starts = zoo.pad(rows), rows
        scorers = [reference.scorer(*doubles, **RULE) for _ in rows]
    expected = [reference.greedy(s, start, STEPS, zoo.EOS) for s, start in zip(scorers, starts, strict=True)]
    for length in (None, 4):
        method = SpeculativeContrastiveDecoding(pair[1], **RULE, **extra, draft_length=length)
        output = pair[0].generate(**inputs, custom_generate=method, max_new_tokens=STEPS, do_sample=False)
        skip = 1 if extra else inputs["input_ids"].shape[1]
        assert [trim(row[skip:].tolist()) for row in output] == expected
    if batch == 1:
        assert 0 < method.statistics.accepted < method.statistics.drafted


def test_a_left_padded_row_alone(qwen3):
    row = zoo.prompts(1)[0]
    padded = torch.cat([torch.full((3,), zoo.PAD), row])
    inputs = {"input_ids": padded[None], "attention_mask": (padded != zoo.PAD).long()[None]}
    method = SpeculativeContrastiveDecoding(qwen3[1], **RULE)
    output = qwen3[0].generate(**inputs, custom_generate=method, max_new_tokens=STEPS, do_sample=False)
    assert output[:, 3 + len(row) :].tolist() == plain(*qwen3, [row])


def test_the_mask_of_the_processor_is_accepted_and_compared(qwen3):
    rows = zoo.prompts(2, seed=5)
    inputs = zoo.pad(rows)
    mask = inputs["attention_mask"]
    method = SpeculativeContrastiveDecoding(qwen3[1], **RULE, attention_mask=mask)
    how = {"max_new_tokens": STEPS, "do_sample": True, "num_return_sequences": 2}  # each prompt's mask for two rows
    torch.manual_seed(0)
    found = qwen3[0].generate(**inputs, custom_generate=method, **how)
    torch.manual_seed(0)
    without = SpeculativeContrastiveDecoding(qwen3[1], **RULE)
    assert torch.equal(found, qwen3[0].generate(**inputs, custom_generate=without, **how))
    method = SpeculativeContrastiveDecoding(qwen3[1], **RULE, attention_mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match=r"is not the mask that generate\(\) is given: leave it out"):
        qwen3[0].generate(**inputs, custom_generate=method, max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "window"), [("gpt2", 1), ("mistral", 3), ("bloom", None), *slow([("gpt2", 3), ("mistral", 1)])]
)
def test_li_form_with_amateur_window(family, window):
    expert, amateur = build(family)
    settings = {"form": "li", "alpha": 0.2, "amateur_temperature": 0.5, "amateur_window": window}
    rows = zoo.prompts(2)
    assert generate(expert, amateur, rows, settings)[0] == plain(expert, amateur, rows, settings)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "bloom"])
def test_amateur_of_another_architecture(llama, architecture):
    amateur, rows = zoo.build(architecture, hidden=16, seed=5), zoo.prompts(2)
    assert generate(llama[0], amateur, rows)[0] == plain(llama[0], amateur, rows)


@pytest.mark.parametrize("size", [zoo.VOCAB - 1, zoo.VOCAB + 16])
def test_vocabulary_padded_to_another_size(llama, size):
    """Drafts never hold a token that the expert has no row for."""
    amateur = zoo.build("llama", hidden=16, seed=2, vocab_size=size)
    rows = [row.clamp(max=min(size, zoo.VOCAB) - 1) for row in zoo.prompts(3)]
    settings, how = RULE | {"draft_length": 3}, {"eos_token_id": None, "max_new_tokens": 8}
    assert generate(llama[0], amateur, rows, settings, **how)[0] == plain(llama[0], amateur, rows, **how)
    if size > zoo.VOCAB:
        tokens, _ = generate(llama[0], amateur, rows, settings, do_sample=True, **how)
        assert max(itertools.chain(*tokens)) < zoo.VOCAB


def test_the_same_model_as_amateur(llama):
    """Every draft is kept where contrast changes nothing; then a round costs one forward of the expert."""
    tokens, statistics = generate(llama[0], llama[0], zoo.prompts(1), {"beta": 0.0, "alpha": 0.0, "draft_length": 3})
    assert tokens == plain(llama[0], llama[0], zoo.prompts(1), {"beta": 0.0, "alpha": 0.0})
    assert statistics.acceptance == 1
    assert statistics.expert_forwards == statistics.rounds == 1 + -(-(STEPS - 1) // 4)
    assert statistics.amateur_forwards <= STEPS
    assert (statistics.tokens, statistics.accepted) == (STEPS, STEPS - statistics.rounds)


def test_adapters_off(qwen3):
    """One set of weights, twice: the drafts are written without the adapters, the text with them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(qwen3[0]), config).eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.1)
    rows = zoo.prompts(2)
    tokens, statistics = generate(tuned, AdaptersOff(tuned), rows)
    assert tokens == plain(tuned, AdaptersOff(tuned), rows) != plain(tuned, qwen3[1], rows)
    assert statistics.accepted > 0
    with_adapters = tuned(rows[0][None]).logits
    with tuned.disable_adapter():
        assert not torch.allclose(with_adapters, tuned(rows[0][None]).logits)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", *slow((f,) for f in VISION_FAMILIES)])
def test_image_text_models(family, batch):
    """Both models see the images; the reference sees each conversation alone."""
    expert = zoo_vision.build(family, seed=1)
    amateur = noisy(expert, 0.05)
    prompts = [case.original for case in zoo_vision.cases(family, batch)]
    inputs = zoo_vision.batch(prompts)
    seen = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    method = SpeculativeContrastiveDecoding(amateur, **RULE, vision_inputs=seen, draft_length=3)
    output = expert.generate(**inputs, custom_generate=method, max_new_tokens=10, do_sample=False)
    doubles = [copy.deepcopy(model).double() for model in (expert, amateur)]
    for prompt, row in zip(prompts, output[:, inputs["input_ids"].shape[1] :], strict=True):

        def score(new, prompt=prompt):
            e, a = (zoo_vision.next_logits(model, prompt, new) for model in doubles)
            return torch.tensor(reference.contrastive_decoding(e, a, **RULE))

        expected = reference.greedy(score, torch.tensor([], dtype=torch.long), 10, zoo_vision.EOS)
        assert trim(row.tolist()) == expected


def test_an_amateur_without_the_images_is_refused():
    expert = zoo_vision.build("llava", seed=1)
    inputs = zoo_vision.batch([case.original for case in zoo_vision.cases("llava", 1)])
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration contain no images: pass pixel_values"):
        expert.generate(**inputs, custom_generate=SpeculativeContrastiveDecoding(expert), max_new_tokens=2)


@pytest.mark.gpu
def test_amateur_on_another_device(llama):
    amateur = copy.deepcopy(llama[1]).to("cuda")
    assert generate(llama[0], amateur, zoo.prompts(2))[0] == plain(*llama, zoo.prompts(2))


# -------------------------------------------------------------------------------- processors, criteria, ends, streaming


def penalised(expert, amateur, prompt, penalty, least, eos):
    """Position by position in float64: repetition penalty and minimum length on the expert's logits, then the contrast."""
    doubles = [copy.deepcopy(model).double() for model in (expert, amateur)]

    def score(ids):
        e, a = (reference.next_logits(model, ids) for model in doubles)
        for token in set(ids.tolist()):
            e[token] = e[token] / penalty if e[token] > 0 else e[token] * penalty
        if len(ids) < len(prompt) + least:
            e[eos] = -torch.inf
        return torch.tensor(reference.contrastive_decoding(e, a, **RULE))

    return reference.greedy(score, prompt, STEPS, eos)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_processors_see_the_right_beginning(family):
    expert, amateur = build(family)
    prompt = zoo.prompts(1)[0]
    eos = generate(expert, amateur, [prompt], eos_token_id=None)[0][0][2]
    how = {"repetition_penalty": 1.3, "min_new_tokens": 6, "eos_token_id": eos, "pad_token_id": zoo.PAD}
    expected = penalised(expert, amateur, prompt, 1.3, 6, eos)
    for length in (None, 4):
        tokens, _ = generate(expert, amateur, [prompt], RULE | {"draft_length": length}, **how)
        assert tokens == [expected] == plain(expert, amateur, [prompt], **how)


class Witness(LogitsProcessor):
    """Notes the texts it is asked about."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        return scores


class Stop(StoppingCriteria):
    """Notes the texts it is asked about, and stops at a length of its own."""

    def __init__(self, length=10**9):
        self.seen, self.length = [], length

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("sample", [False, True])
def test_processors_and_criteria_see_each_beginning_once(qwen3, sample):
    processor, criterion = Witness(), Stop()
    prompt = zoo.prompts(1)[0]
    how = {"logits_processor": [processor], "stopping_criteria": [criterion], "do_sample": sample, "eos_token_id": None}
    tokens, statistics = generate(*qwen3, [prompt], RULE | {"draft_length": 4}, **how)
    text = [*prompt.tolist(), *tokens[0]]
    assert statistics.accepted > 0
    assert processor.seen == [text[:n] for n in range(len(prompt), len(text))]
    assert criterion.seen == [text[:n] for n in range(len(prompt) + 1, len(text) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_end_where_plain_ones_end(qwen3, batch):
    """At every length: by max_new_tokens, by a criterion, by an end token, each inside a draft or between two."""
    rows = zoo.prompts(batch)
    width = max(map(len, rows))
    whole = plain(*qwen3, rows, eos_token_id=None)
    settings = RULE | {"draft_length": 3}
    for steps in range(1, STEPS, 2):
        first = [row[:steps] for row in whole]
        assert generate(*qwen3, rows, settings, max_new_tokens=steps, eos_token_id=None)[0] == first
        stop = {"stopping_criteria": [Stop(width + steps)], "eos_token_id": None}
        assert generate(*qwen3, rows, settings, **stop)[0] == first
        end = {"eos_token_id": whole[0][steps], "pad_token_id": zoo.PAD}
        assert generate(*qwen3, rows, settings, **end)[0] == plain(*qwen3, rows, **end)


def test_no_draft_beyond_the_end(qwen3):
    """Neither past max_new_tokens nor past an end token that the amateur itself drafts."""
    rows = zoo.prompts(1)
    statistics = generate(*qwen3, rows, RULE | {"draft_length": 9}, max_new_tokens=3, eos_token_id=None)[1]
    assert statistics.drafted <= 1
    whole = generate(qwen3[0], qwen3[0], rows, {"beta": 0.0}, eos_token_id=None)[0][0]
    end = {"eos_token_id": whole[2], "pad_token_id": zoo.PAD}
    statistics = generate(qwen3[0], qwen3[0], rows, {"beta": 0.0, "draft_length": 9}, **end)[1]
    assert (statistics.tokens, statistics.drafted, statistics.expert_forwards) == (whole.index(whole[2]) + 1, 2, 2)


def test_ended_rows_do_not_hold_up_the_others(qwen3):
    """A row that ends at once, and one that goes on: as many rounds as the second takes alone."""
    rows, settings = zoo.prompts(3)[1:], RULE | {"draft_length": 3}
    whole = plain(*qwen3, rows, eos_token_id=None)
    end = whole[0][0]
    assert end not in whole[1]
    how = {"eos_token_id": end, "pad_token_id": zoo.PAD}
    tokens, together = generate(*qwen3, rows, settings, **how)
    assert tokens[1] == whole[1]
    assert set(tokens[0]) == {end, zoo.PAD}
    alone = generate(*qwen3, rows[1:], settings, **how)[1]
    assert (together.rounds, together.accepted) == (alone.rounds, alone.accepted)
    assert alone.accepted > 0


def test_streaming(qwen3):
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"w{i} " for i in ids))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    tokens, _ = generate(*qwen3, zoo.prompts(1), RULE | {"streamer": streamer})
    assert "".join(streamer) == tokenizer.decode(tokens[0])


@pytest.mark.parametrize("family", ["qwen3", "bart"])
def test_scores_and_logits_are_returned(family):
    expert, amateur = build(family)
    inputs = zoo.pad(zoo.prompts(2), side="right" if family == "bart" else "left")
    extra = {"encoder_inputs": inputs} if family == "bart" else {}
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | dict.fromkeys(
        ("output_scores", "output_logits"), True
    )
    method = SpeculativeContrastiveDecoding(amateur, **RULE, **extra)
    found = expert.generate(**inputs, custom_generate=method, **how)
    processor = ContrastiveDecodingLogitsProcessor(amateur, **RULE, **extra)
    wanted = expert.generate(**inputs, logits_processor=[processor], **how)
    assert type(found) is type(wanted)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(found.scores) == len(found.logits) == len(wanted.scores)
    running = torch.ones(2, dtype=torch.bool)  # what is computed after the end of a row is of no matter
    for step in range(len(wanted.scores)):
        for name in ("scores", "logits"):
            torch.testing.assert_close(found[name][step][running], wanted[name][step][running], rtol=1e-3, atol=1e-3)
        running &= wanted.sequences[:, step - len(wanted.scores)] != zoo.EOS


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("p", [[0.1, 0.2, 0.3, 0.4, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
@pytest.mark.parametrize("q", [[0.4, 0.3, 0.2, 0.05, 0.05], [0.1, 0.2, 0.3, 0.4, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0]])
def test_accept_or_redraw(p, q):
    """Draws from q become draws from p, and stay the same as often as they can."""
    torch.manual_seed(0)
    count = 20_000
    target, proposal = torch.tensor(p).expand(count, -1), torch.tensor(q).expand(count, -1)
    draft = torch.multinomial(proposal, 1).squeeze(1)
    found = accept_or_redraw(target, proposal, draft)
    _agrees(found.bincount(minlength=5), torch.tensor(p))
    kept = torch.minimum(torch.tensor(p), torch.tensor(q)).sum()
    assert (found == draft).float().mean() == pytest.approx(float(kept), abs=0.02)


def _agrees(counts, p):
    """Counts may be draws from p; what p rules out is not there."""
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        few = counts[p > 0].double(), p[p > 0].double()
        assert chisquare(few[0], few[1] / few[1].sum() * few[0].sum()).pvalue > 1e-4


class Table(LlamaForCausalLM):
    """A model that looks the next token up by the last two, which it finds in its cache; quick, and few tokens."""

    table: torch.Tensor

    def forward(self, input_ids, past_key_values=None, logits_to_keep=0, **kwargs):
        cache = DynamicCache() if past_key_values is None else past_key_values
        keys = input_ids[:, None, :, None].float()
        seen = cache.update(keys, keys, 0)[0][:, 0, :, 0].long()
        logits = self.table[seen[:, :-1], seen[:, 1:]][:, -input_ids.shape[1] :]
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=cache)


def tables():
    """An expert and an amateur by table."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(vocab_size=6, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    models = Table(config).eval(), Table(config).eval()
    models[0].table = torch.randn(6, 6, 6, generator=generator) * 1.5
    models[1].table = models[0].table * 0.6 + torch.randn(6, 6, 6, generator=generator) * 0.6
    return models


def mistrals():
    """A real model of the kind: one layer, a sliding window of two."""
    small = {"vocab_size": 6, "num_hidden_layers": 1, "sliding_window": 2, "max_position_embeddings": 512}
    expert = zoo.build("mistral", hidden=16, seed=3, **small)
    return expert, noisy(expert, 0.15)


@torch.no_grad()
def law(expert, amateur, rule, temperature, top_k):
    """`(V, V, V)` the probability of a token after two others, in float64."""
    size = expert.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    logits = [copy.deepcopy(model).double()(pairs).logits[:, -1].tolist() for model in (expert, amateur)]
    form = dict(rule)
    formula = reference.contrastive_decoding_li if form.pop("form", "") == "li" else reference.contrastive_decoding
    scores = torch.tensor([formula(e, a, **form) for e, a in zip(*logits, strict=True)], dtype=torch.float64)
    scores = scores / temperature
    least = scores.topk(top_k, dim=-1).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1).view(size, size, size)


SETTINGS = {
    "plain": ({"beta": 0.5, "alpha": 0.05}, 1.0, 6, None),
    "temperature, top-k, fixed length": ({"beta": 1.0, "alpha": 0.02}, 1.5, 3, 3),
    "li": ({"form": "li", "alpha": 0.1, "amateur_temperature": 1.3}, 1.0, 6, 2),
}


def draws(expert, amateur, setting, tokens, token_cost=0.05):
    """A long sampled text, in pieces that each go on after the same prompt, and the share of drafts kept. Cheap tokens are drafted often."""
    rule, temperature, top_k, length = setting
    method = SpeculativeContrastiveDecoding(amateur, **rule, draft_length=length, token_cost=token_cost)
    torch.manual_seed(0)
    prompt = torch.tensor([[3, 4]])
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": 500}
    how |= {"attention_mask": torch.ones_like(prompt), "eos_token_id": None}
    texts, kept = [], []
    for _ in range(tokens // 500):
        texts.append(expert.generate(prompt, custom_generate=method, **how)[0])
        kept.append(method.statistics.accepted / method.statistics.drafted)
    return texts, sum(kept) / len(kept)


def follows(texts, p):
    """Chi-square over all pairs of tokens given the two before them; the pairs do not overlap."""
    size = p.shape[0]
    counts = torch.zeros(size, size, size * size, dtype=torch.long)
    for text in texts:
        for a, b, c, d in zip(text[0::2], text[1::2], text[2::2], text[3::2], strict=False):
            counts[a, b, c * size + d] += 1
    statistic, freedom = 0.0, 0
    for a, b in torch.cartesian_prod(torch.arange(size), torch.arange(size)).tolist():
        seen = counts[a, b]
        joint = (p[a, b][:, None] * p[b]).flatten()
        assert seen[joint == 0].sum() == 0
        expected = joint * seen.sum()
        large = expected >= 5
        if large.sum() < 1 or large.all():
            continue
        cells = torch.cat([seen[large].double(), seen[~large].sum()[None].double()])
        wanted = torch.cat([expected[large], expected[~large].sum()[None]])
        if wanted[-1] < 5:
            cells, wanted = _merge(cells), _merge(wanted)
        if len(cells) > 1:
            statistic += float(((cells - wanted) ** 2 / wanted).sum())
            freedom += len(cells) - 1
    assert freedom > 20
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def _merge(cells):
    """The last cell joined to the one before."""
    return torch.cat([cells[:-2], cells[-2:].sum()[None]])


def has_the_exact_distribution(pair, setting, tokens, *, least=0.3, **costs):
    texts, kept = draws(*pair, setting, tokens, **costs)
    assert least < kept < 0.95  # both ways of a draft are often taken
    assert follows(texts, law(*pair, *setting[:3])) > 1e-3


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_texts_have_the_exact_distribution(name):
    """20 000 tokens each, and 20 000 pairs that do not overlap where the most is going on."""
    has_the_exact_distribution(tables(), SETTINGS[name], 40_000 if "top-k" in name else 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1_500, pytest.param(10_000, marks=pytest.mark.full)])
def test_sampled_texts_of_a_real_model_have_the_exact_distribution(tokens):
    has_the_exact_distribution(mistrals(), SETTINGS["temperature, top-k, fixed length"], tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_short_sampled_texts_have_the_exact_distribution(name):
    """The same with fewer tokens; the li form leaves few candidates, so that more tokens are needed."""
    has_the_exact_distribution(tables(), SETTINGS[name], 4_000 if name == "li" else 1_500)


@pytest.mark.slow
def test_sampled_texts_that_rest_now_and_then_have_the_exact_distribution(monkeypatch):
    """Rests begin and end after what was drawn, so that they could favour some texts."""
    resting, run = [], rounds.SpeculativeRounds.run

    def note(self):
        resting.append(self._draft_length.rests)
        run(self)

    monkeypatch.setattr(rounds.SpeculativeRounds, "run", note)
    has_the_exact_distribution(tables(), SETTINGS["plain"], 6_000, least=0.2, token_cost=0.35)
    changes = sum(a != b for a, b in itertools.pairwise(resting))
    assert 0.1 < sum(resting) / len(resting) < 0.9
    assert changes > 200


@pytest.mark.slow
def test_sampled_batches_have_the_exact_distribution():
    """The first three tokens of 20 000 rows, drafted together: what a row keeps depends on the others, its law does not."""
    pair, (rule, temperature, top_k, _) = tables(), SETTINGS["temperature, top-k, fixed length"]
    p = law(*pair, rule, temperature, top_k)
    method = SpeculativeContrastiveDecoding(pair[1], **rule, draft_length=2)
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": 3, "eos_token_id": None}
    prompt = torch.tensor([[3, 4]])
    torch.manual_seed(0)
    rows = [
        pair[0].generate(prompt, custom_generate=method, num_return_sequences=n, attention_mask=prompt > 0, **how)
        for n in [5_000] * 4 + [2] * 50
    ]
    new = torch.cat(rows)[:, 2:]
    size = p.shape[0]
    joint = p[3, 4][:, None, None] * p[4][:, :, None] * p  # p(a | 3, 4) p(b | 4, a) p(c | a, b)
    counts = ((new[:, 0] * size + new[:, 1]) * size + new[:, 2]).bincount(minlength=size**3)
    large = joint.flatten() * len(new) >= 5
    cells = torch.cat([counts[large], counts[~large].sum()[None]])
    _agrees(cells, torch.cat([joint.flatten()[large], joint.flatten()[~large].sum()[None]]))


def test_a_seed_gives_the_same_text_again(llama):
    """Whatever was generated in between: what is learnt about a hopeless amateur does not outlive the call."""
    method = SpeculativeContrastiveDecoding(zoo.build("llama", hidden=16, seed=2), **RULE)
    inputs = zoo.pad(zoo.prompts(1))
    texts = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        texts.append(llama[0].generate(**inputs, custom_generate=method, max_new_tokens=30, do_sample=True).tolist())
    assert texts[0] == texts[2] != texts[1]


# ------------------------------------------------------------------------------------------------------- draft length


@pytest.mark.slow
def test_drafts_grow_and_shrink_with_what_is_kept(llama):
    """A perfect amateur drafts long, a hopeless one soon nothing at all, and never more than `draft_length`."""
    how = {"max_new_tokens": 50, "eos_token_id": None}
    perfect = generate(llama[0], llama[0], zoo.prompts(1), {"beta": 0.0, "cost_ratio": 0.1}, **how)[1]
    assert perfect.drafted / perfect.rounds > 4
    hopeless = generate(llama[0], zoo.build("llama", hidden=16, seed=2), zoo.prompts(1), **how)[1]
    assert hopeless.acceptance < 0.1
    assert hopeless.drafted < 0.4 * hopeless.rounds
    fixed = generate(*llama, zoo.prompts(1), RULE | {"draft_length": 2}, **how)[1]
    assert fixed.drafted <= 2 * fixed.rounds


def test_the_first_drafts_of_a_call_are_short():
    """An amateur that is sure of itself from the first token on may be wrong every time."""
    length = drafting.DraftLength(None, 0.2, 0.05)

    def longest():
        length.start()
        while length.allows_draft([0.99]) and length.allows_pass():
            pass
        return length._drafted

    assert longest() == 2
    for _ in range(3):
        length.learn([0.99], [1.0])
    assert longest() == 8
    for _ in range(20):
        length.learn([0.99], [1.0])
    assert longest() == drafting.LONGEST_DRAFT


def test_drafts_rest_while_none_would_be_accepted():
    """A class that was good for long counts no more once the last tokens were rejected; a few agreements end the rest."""
    length = drafting.DraftLength(None, 0.2, 0.05)
    for _ in range(200):
        length.learn([0.9], [1.0])

    def drafts():
        length.start()
        return length.allows_draft([0.9])

    misses = 0
    while drafts():
        length.learn([0.9], [0.0])
        misses += 1
    assert misses == 18  # the first n with (7 / 8)^n below 0.1
    length.learn([0.9], [1.0])
    assert drafts()
    for _ in range(misses):
        length.learn([0.9, 0.9], [1.0, 0.0])  # a batch accepts what all of its rows accept
    assert not drafts()
    length.learn([], [])
    assert not drafts()
    fixed = drafting.DraftLength(3, 0.2, 0.05)
    for _ in range(50):
        fixed.learn([0.9], [0.0])
    assert fixed.allows_draft([0.9])


@pytest.mark.parametrize("batch", [1, 3])
def test_texts_that_rest_and_draft_again_are_the_same(llama, batch):
    """The amateur is right in every other stretch of twenty tokens, so that rests begin and end within a call."""
    expert, amateur = llama[0], zoo.build("llama", hidden=16, seed=2)
    rows, stretches = zoo.prompts(batch), []
    whole = rounds.SpeculativeRounds._place
    expected = plain(expert, amateur, rows, max_new_tokens=80, eos_token_id=None)
    texts = [[*row.tolist(), *new] for row, new in zip(rows, expected, strict=True)]

    def place(self, logits, drafted):
        found, step = whole(self, logits, drafted), self._generation.generated + drafted
        right = torch.tensor([text[len(row) + step] if step < 80 else 0 for text, row in zip(texts, rows, strict=True)])
        proposal = torch.zeros_like(found.proposal).scatter_(
            -1, right[:, None] if step // 20 % 2 else (right[:, None] + 1) % zoo.VOCAB, 1
        )
        return found._replace(proposal=proposal, confidences=proposal.amax(-1))

    run = rounds.SpeculativeRounds.run

    def noted(self):
        stretches.append(not self._draft_length.rests)
        run(self)

    with mock.patch.multiple(rounds.SpeculativeRounds, _place=place, run=noted):
        settings = RULE | {"token_cost": 0.05}
        tokens, statistics = generate(expert, amateur, rows, settings, max_new_tokens=80, eos_token_id=None)
    assert tokens == expected
    assert statistics.accepted
    changes = [is_drafted for is_drafted, _ in itertools.groupby(stretches[1:-1])]
    assert changes.count(True) > 1
    assert changes.count(False) > 1


@pytest.mark.parametrize("copied", [1, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_copied_drafts_give_the_same_tokens(qwen3, batch, copied):
    """Prompts that repeat themselves: some drafts are copied, and kept; rows of a batch copy as many tokens as all of them can."""
    expert, amateur = qwen3
    rows = [torch.arange(5 + i, 11 + i).repeat(3)[: 14 + i] for i in range(batch)]
    looked = RULE | {"prompt_lookup_num_tokens": copied, "token_cost": 0.05}
    plain, before = generate(expert, amateur, rows, max_new_tokens=30)
    with mock.patch.object(rounds, "look_up", wraps=rounds.look_up) as looks:
        tokens, statistics = generate(expert, amateur, rows, looked, max_new_tokens=30)
    assert tokens == plain
    assert looks.call_count
    assert statistics.accepted
    assert statistics.tokens == before.tokens


def test_a_text_of_copies_takes_few_forward_passes(llama):
    """An expert that repeats a period of tokens, which its amateur does not know."""
    expert, amateur = llama
    period = {7: 8, 8: 9, 9: 7}

    class Repeats(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[0, period[int(input_ids[0, -1])]] += 1000
            return scores

    how = {"logits_processor": [Repeats()], "max_new_tokens": 24}
    plain, before = generate(expert, amateur, [torch.tensor([7, 8, 9, 7, 8])], RULE, **how)
    looked = RULE | {"prompt_lookup_num_tokens": 8, "token_cost": 0.05}
    tokens, after = generate(expert, amateur, [torch.tensor([7, 8, 9, 7, 8])], looked, **how)
    assert tokens == plain == [[9, 7, 8] * 8]
    assert after.expert_forwards <= 5
    assert after.amateur_forwards < before.amateur_forwards


@pytest.mark.slow
def test_sampled_texts_with_copied_drafts_have_the_exact_distribution(monkeypatch):
    """Copies stand for draws from a distribution of one token: the residual is that of the target without it."""
    made = SpeculativeContrastiveDecoding.__init__
    looked = {"prompt_lookup_num_tokens": 3}
    monkeypatch.setattr(SpeculativeContrastiveDecoding, "__init__", lambda self, *a, **k: made(self, *a, **k | looked))
    has_the_exact_distribution(tables(), SETTINGS["plain"], 6_000, least=0.1)


def test_copies_rest_while_none_would_be_accepted(llama):
    """A text that repeats nothing after a prompt of one token: passages are found everywhere, and hardly any of them is copied."""
    expert, amateur = llama
    order = torch.randperm(zoo.VOCAB - 10, generator=torch.Generator().manual_seed(0)) + 10

    class Shuffled(LogitsProcessor):
        """After a token that stood before comes another one than before."""

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            step = input_ids.shape[1] - 40
            scores[:, 7 if step % 2 else order[step % len(order)]] += 1000
            return scores

    how = {"logits_processor": [Shuffled()], "max_new_tokens": 30, "eos_token_id": None}
    prompt = [torch.tensor([7, 8] * 20)]
    expected, before = generate(expert, amateur, prompt, RULE, **how)
    with mock.patch.object(drafting.CopyLength, "learn", autospec=True, side_effect=drafting.CopyLength.learn) as learn:
        tokens, after = generate(expert, amateur, prompt, RULE | {"prompt_lookup_num_tokens": 8}, **how)
    assert tokens == expected
    assert after.drafted - before.drafted < 10
    assert learn.call_count > 10  # also about copies that were declined
    eager = generate(expert, amateur, prompt, RULE | {"prompt_lookup_num_tokens": 8, "token_cost": 0.0}, **how)[1]
    assert eager.drafted > 60


def test_copies_are_drafted_again_when_they_would_be_accepted():
    """What was declined is learnt about: a rest ends when the text begins to repeat itself."""
    length = drafting.CopyLength(0.2)
    assert length.allowed([2], 8) == 1
    assert length.allowed([2, 2], 8) == 0  # both rows have to be right
    for _ in range(8):
        length.learn([2], [0.0])
    assert length.allowed([2], 8) == 0
    assert length.allowed([16], 8) == 8  # of another class
    for _ in range(16):
        length.learn([2], [1.0])
    assert length.allowed([2], 8) > 1
    assert length.allowed([2], 1) == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", *slow([("gpt2",), ("qwen3",)])])
def test_its_own_first_layers_are_read_along_while_drafts_rest(family, batch):
    """The expert's forward pass yields them then; the amateur's cache catches up when it drafts again."""
    expert, rows = zoo.build(family, seed=1), zoo.prompts(batch)
    with torch.no_grad():
        for weight in expert.get_submodule(find_layers(expert).name)[1:].parameters():
            weight.mul_(0.5 if weight.ndim > 1 else 1)  # so that the first layer is right now and then
    early, how = EarlyExit(expert, layers=1), {"max_new_tokens": 40, "eos_token_id": None}
    expected, drafting_always = generate(expert, early, rows, RULE | {"token_cost": 0.0}, **how)
    assert expected == plain(expert, early, rows, **how)
    passes = []
    for cost in (0.005, 0.24, 1.0):  # rests at first, now and then, and always
        tokens, statistics = generate(expert, early, rows, RULE | {"token_cost": cost}, **how)
        assert tokens == expected
        assert statistics.tokens == drafting_always.tokens
        passes.append(statistics.amateur_forwards)
    assert passes[0] > passes[2] == 0
    assert statistics.expert_forwards == 40


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("early", [False, True])
def test_a_gate_leaves_the_amateur_out_while_drafts_rest(llama, batch, early):
    """The loop with the same gate runs it as often; without rests it runs at every token."""
    expert, rows = llama[0], zoo.prompts(batch)
    amateur = EarlyExit(expert, layers=1) if early else zoo.build("llama", hidden=16, seed=2)
    how = {"max_new_tokens": 40, "eos_token_id": None, "do_sample": False}
    gate = {"gate": 0.06}  # random models are sure of little
    expected, drafting_always = generate(expert, amateur, rows, RULE | gate | {"token_cost": 0.0}, **how)
    gated = GatedLogitsProcessor(ContrastiveDecodingLogitsProcessor(amateur, **RULE), **gate)
    output = expert.generate(**zoo.pad(rows), custom_generate=gated.loop(), **how)
    assert output[:, max(map(len, rows)) :].tolist() == expected
    tokens, statistics = generate(expert, amateur, rows, RULE | gate | {"token_cost": 1.0}, **how)
    assert tokens == expected
    assert statistics.tokens == drafting_always.tokens
    assert 0 < gated.statistics.skipped < gated.statistics.steps == 40
    if not early:
        assert statistics.amateur_forwards == 40 - gated.statistics.skipped


def test_dear_amateurs_draft_less(qwen3):
    """Fewer of a dear amateur's forwards are risked on a draft."""
    how = {"max_new_tokens": 40, "eos_token_id": None}
    found = [generate(*qwen3, zoo.prompts(1), RULE | {"cost_ratio": cost}, **how)[1] for cost in (0.01, 2.0)]
    waste = [each.amateur_forwards - each.tokens for each in found]
    assert waste[0] > waste[1]
    assert found[0].drafted > found[1].drafted


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be at least 1"),
        ({"max_matching_ngram_size": 2}, "give both, or none"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"form": "li", "beta": 0.5}, "form='li' has no beta"),
        ({"draft_length": 0}, "draft_length must be at least 1, or None to adapt it, not 0"),
        ({"cost_ratio": -1.0}, "cost_ratio must be at least 0 .*, not -1.0"),
        ({"token_cost": 1.5}, r"token_cost must lie in \[0, 1\] .*, not 1.5"),
        ({"amateur_window": 0}, "window must be at least 1 .*, not 0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeContrastiveDecoding(llama[1], **arguments)


def test_recurrent_models_are_refused(llama):
    mamba = zoo.build("mamba", hidden=16)
    message = "MambaForCausalLM with no cache cannot remove the tokens of a rejected draft.*; use Contrastive"
    with pytest.raises(ValueError, match=message):
        SpeculativeContrastiveDecoding(mamba)
    with pytest.raises(ValueError, match=message):
        generate(mamba, llama[1], zoo.prompts(1))


def test_an_amateur_that_cannot_generate_is_refused(llama):
    with pytest.raises(TypeError, match=re.escape("can generate, not LlamaModel")):
        SpeculativeContrastiveDecoding(llama[1].model)


def test_another_tokenizer_is_refused(llama):
    with pytest.raises(ValueError, match="have 48 and 5000 tokens, a larger difference than padding explains"):
        generate(llama[0], zoo.build("llama", hidden=16, vocab_size=5000), zoo.prompts(1))
    with pytest.raises(
        ValueError, match="but the vocabulary of LlamaForCausalLM has only 47 tokens: all branches must share one token"
    ):
        generate(llama[0], zoo.build("llama", hidden=16, vocab_size=zoo.VOCAB - 1), [torch.tensor([47, 3])])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 3}, "num_beams=3\\): use ContrastiveDecodingLogitsProcessor"),
        ({"cache_implementation": "static"}, "LlamaForCausalLM with StaticCache cannot remove"),
        ({"use_cache": False}, "LlamaForCausalLM with no cache cannot remove"),
        ({"compile_config": CompileConfig()}, "speculative contrastive decoding does not compile"),
        (
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "scores and logits, not attentions or hidden",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(llama, how, message):
    with pytest.raises(ValueError, match=message):
        generate(*llama, zoo.prompts(1), **how)


def test_a_cache_of_earlier_text_is_refused(llama):
    row = zoo.prompts(1)[0]
    cache = DynamicCache(config=llama[0].config)
    llama[0](row[None, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cannot continue from a cache of the expert.*leave past_key_values out"):
        generate(*llama, [row], past_key_values=cache)


# ------------------------------------------------------------------------------------------------------------ testbed


@pytest.mark.slow
def test_token_identical_on_the_testbed():
    """40 problems, one by one and four at a time: the texts of plain contrastive decoding, in fewer forwards."""
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    questions = [problem.question for problem in itertools.islice(worlds.problems(2027, "test"), 40)]
    method, processor = SpeculativeContrastiveDecoding(amateur), ContrastiveDecodingLogitsProcessor(amateur)

    def solve(batch, **how):
        texts, forwards = [], 0
        for start in range(0, len(questions), batch):
            chats = [[{"role": "user", "content": question}] for question in questions[start : start + batch]]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            )
            output = expert.generate(**inputs, **how, max_new_tokens=80, do_sample=False)
            texts += [trim(row, tokenizer.eos_token_id) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
            forwards += method.statistics.expert_forwards
        return texts, forwards

    expected = solve(40, logits_processor=[processor])[0]
    for batch, most in ((1, 0.6), (4, 0.9)):
        texts, forwards = solve(batch, custom_generate=method)
        assert texts == expected
        assert forwards < most * sum(max(map(len, texts[i : i + batch])) for i in range(0, 40, batch))


# ---------------------------------------------------------------------------------------------------------- mutations


def _redraws_from_the_target(target, proposal, draft):
    """A rejected draft is replaced from P, not from what P has beyond Q."""
    p, q = (each.gather(-1, draft[:, None]).squeeze(-1) for each in (target, proposal))
    kept = torch.rand_like(p) * q < p
    return torch.where(kept, draft, torch.multinomial(target, 1).squeeze(-1))


def _keeps_by_the_inverse(target, proposal, draft):
    """Q / P in place of P / Q."""
    return accept_or_redraw(proposal, target, draft)


def the_chi_square_test_goes_red():
    """For the reason that it is there for: the drafts are still now kept and now not."""
    pair, setting = tables(), SETTINGS["plain"]
    texts, kept = draws(*pair, setting, 3_000)
    assert 0.1 < kept < 0.99
    with pytest.raises(AssertionError):
        assert follows(texts, law(*pair, *setting[:3])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("broken", [_redraws_from_the_target, _keeps_by_the_inverse])
def test_the_chi_square_test_sees_another_residual(broken, monkeypatch):
    monkeypatch.setattr(drafting, "accept_or_redraw", broken)
    the_chi_square_test_goes_red()


@pytest.mark.slow
def test_the_chi_square_test_sees_a_bonus_of_the_amateur(monkeypatch):
    """The token after a draft that was kept whole, drawn from the amateur."""

    def choose(self, scores, proposal, draft, whole=drafting.Drafter.choose):
        return whole(self, scores if draft is not None else proposal.log(), proposal, draft)

    monkeypatch.setattr(drafting.Drafter, "choose", choose)
    the_chi_square_test_goes_red()


@pytest.mark.slow
def test_the_chi_square_test_sees_a_bonus_of_another_place(monkeypatch):
    """The token after a draft that was kept whole, contrasted with what the amateur said of the place before."""

    def look(self, ids, whole=rounds.SpeculativeRounds._look):
        place = whole(self, ids)
        if ids is self._generation.ids and self._generation.ids.shape[1] > 2 and hasattr(self, "last"):
            return self.last
        self.last = place
        return place

    monkeypatch.setattr(rounds.SpeculativeRounds, "_look", look)
    the_chi_square_test_goes_red()


FORGET = rounds.RowReader.forget


def _forgets_nothing(self, length):
    """The mask and the positions are cropped, the cache is not."""
    with mock.patch.object(reader, "crop_layers", return_value=None):
        FORGET(self, length)


def _forgets_too_little(self, length):
    with mock.patch.object(reader, "crop_layers", lambda cache, dropped: crop_layers(cache, max(dropped - 1, 0))):
        FORGET(self, length)


def _alone_and_in_a_batch(family):
    for batch in (1, 3):
        test_greedy_tokens_are_the_reference_s(family, batch)


@pytest.mark.parametrize("broken", [_forgets_nothing, _forgets_too_little])
@pytest.mark.parametrize("family", ["gpt2", "mistral", *slow([("qwen3",), ("bloom",)])])
def test_the_greedy_tests_see_a_cache_that_is_not_cropped(broken, family, monkeypatch):
    monkeypatch.setattr(rounds.RowReader, "forget", broken)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        _alone_and_in_a_batch(family)


def test_the_greedy_tests_see_processors_with_another_beginning(monkeypatch):
    split = generation.split_processors

    def off_by_one(*prepared):
        before, after = split(*prepared)
        return (lambda ids, scores: before(ids[:, :-1], scores)), after

    monkeypatch.setattr(generation, "split_processors", off_by_one)
    with pytest.raises(AssertionError):
        test_processors_see_the_right_beginning("qwen3")
