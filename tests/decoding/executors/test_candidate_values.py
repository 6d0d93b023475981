"""The values of candidates: with a cache, as a tree or as replicas, against plain forward passes of each sequence."""

import pytest
import torch
import zoo
from transformers import AutoModelForTokenClassification, BertConfig

from contralto.decoding import CriticGuidedLogitsProcessor
from contralto.decoding.branches.values import values_of
from contralto.decoding.executors.candidate_values import CandidateValues

CACHED = [
    "llama",
    "gpt2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "gpt_neox", "bloom")),
]


def critic_of(family, seed=3):
    torch.manual_seed(seed)
    config = zoo.FAMILIES[family](32)
    config.num_labels = 1
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and family == "bloom":
                weight.normal_(std=0.3)
            if name.startswith(("score", "classifier")) and weight.ndim == 2:
                weight.normal_(std=1.0)
    return model


def plain(critic, rows, mask, candidates):
    """The value of each candidate by a forward pass of its row alone, unpadded, in float64."""
    double = {name: value.double() for name, value in critic.state_dict().items()}
    other = type(critic)(critic.config).eval().double()
    other.load_state_dict(double)
    values = torch.empty(candidates.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        text = row[len(row) - int(mask[i].sum()) :]
        for j, token in enumerate(candidates[i]):
            with torch.no_grad():
                values[i, j] = other(input_ids=torch.cat([text, token[None]])[None]).logits[0, -1, 0]
    return values


@pytest.mark.parametrize("family", CACHED)
def test_values_with_a_cache_are_those_of_whole_rows(family):
    """Rows that continue with a candidate, with another token, in another order, and others, left-padded."""
    critic = critic_of(family)
    draws = torch.Generator().manual_seed(0)
    values, inputs = CandidateValues(critic), zoo.pad(zoo.prompts(3))
    rows, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(9):
        candidates = torch.stack([torch.randperm(zoo.VOCAB - 3, generator=draws)[:4] + 3 for _ in rows])
        found = values(rows, mask, candidates)
        assert values._caches, "the first values differed, and the cache was given up"
        assert torch.allclose(found.double(), plain(critic, rows, mask, candidates), atol=2e-4, rtol=1e-3), step
        tokens = candidates[:, step % 4] if step % 3 else torch.tensor([5, 6, 7])
        order = torch.tensor([2, 0, 0]) if step == 4 else torch.arange(len(rows))
        rows, mask = rows[order], mask[order]
        rows = torch.cat([rows, tokens[order, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(tokens[:, None])], dim=1)
        if step == 6:
            rows, mask = rows[:, :-2], mask[:, :-2]


def test_a_step_feeds_its_candidates_alone(monkeypatch):
    critic, fed = critic_of("llama"), []
    model = zoo.build("llama", seed=1)
    inputs = zoo.pad(zoo.prompts(2))
    guided = CriticGuidedLogitsProcessor(critic, k=4, attention_mask=inputs["attention_mask"])
    model.generate(**inputs, logits_processor=[guided], max_new_tokens=1, do_sample=False)  # compares once
    guided.reset()
    critic.register_forward_pre_hook(
        lambda _m, _a, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    output = model.generate(**inputs, logits_processor=[guided], min_new_tokens=5, max_new_tokens=5, do_sample=False)
    width = inputs["input_ids"].shape[1]
    assert fed[0] == (2, width)
    assert set(fed[1:]) == {(2, 4)}
    assert fed.count((2, 4)) >= 5
    loop = CriticGuidedLogitsProcessor(critic, k=4, attention_mask=inputs["attention_mask"]).loop()
    assert torch.equal(output, model.generate(**inputs, custom_generate=loop, min_new_tokens=5, max_new_tokens=5))


def test_a_critic_that_sees_later_tokens_is_read_without_a_cache():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    critic = AutoModelForTokenClassification.from_config(BertConfig(**shape, **zoo.WIDE, num_labels=1)).eval()
    rows, candidates = zoo.prompts(1)[0][None], torch.tensor([[4, 5]])
    found = CandidateValues(critic)(rows, torch.ones_like(rows), candidates)
    whole = torch.cat([rows.expand(2, -1), candidates.T], dim=1)
    assert torch.allclose(found[0], values_of(critic, whole, torch.ones_like(whole))[:, 0], atol=1e-5)


def test_first_values_that_differ_give_the_cache_up(monkeypatch):
    """A model whose cached states are wrong is found by the comparison at its first step."""
    critic = critic_of("llama")
    reads = CandidateValues(critic)
    start = reads._start

    def broken(ids, mask, candidates):
        start(ids.flip(-1), mask, candidates)

    monkeypatch.setattr(reads, "_start", broken)
    rows, candidates = zoo.prompts(1)[0][None], torch.tensor([[4, 5, 6]])
    mask = torch.ones_like(rows)
    found = reads(rows, mask, candidates)
    assert torch.allclose(found.double(), plain(critic, rows, mask, candidates), atol=2e-4, rtol=1e-3)


def test_tokens_unknown_to_the_critic():
    critic = critic_of("llama")
    rows = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=f"contains token {zoo.VOCAB + 1}, but the vocabulary of"):
        CandidateValues(critic)(rows, torch.ones_like(rows), torch.tensor([[4, zoo.VOCAB + 1]]))


def test_critic_guidance_has_no_likelihoods():
    guided = CriticGuidedLogitsProcessor(lambda ids, mask: ids[:, -1].float())
    with pytest.raises(ValueError, match="has no likelihoods"):
        guided.combine(torch.zeros(1, 4), [], 0)
