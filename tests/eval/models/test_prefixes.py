"""Beginnings that the prompts of a run share are read once, and answers and likelihoods stay the same."""

import copy
from functools import cache
from itertools import islice

import pytest
from lm_eval.api.instance import Instance

from contralto.decoding.branches import PrefixCaches, reused_prefixes
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.prefixes import read_prompts
from contralto.testbed import worlds

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
METHODS = {
    "greedy": {},
    "cd": {"method": "cd", "amateur": "testbed:amateur"},
    "cad": {"method": "cad", "contrast_prompt": "{question}"},
    "dola": {"method": "dola"},
    "icd, sampled": {"method": "icd", "contrast_prompt": "Say it. {prompt}", "temperature": 1.0, "seed": 3},
}


@cache
def loaded():
    return ContraltoLM("testbed:expert", device="cpu", batch_size=2)


def made(prefix_cache, **options):
    lm = copy.copy(loaded()).decoding_by(**options)
    lm.prefix_cache = prefix_cache
    return lm


def documents(count=5):
    """Problems after two solved ones, of unequal length."""
    problems = list(islice(worlds.problems(9, "test"), count + 2))
    examples = "\n".join(f"{each.question} {each.solution}" for each in problems[:2])
    return [(each.question, f"{examples}\n{each.question}") for each in problems[2:]]


def asks(**options):
    kwargs = {"until": ["\n"], "max_gen_toks": 12, **options}
    return [Instance("generate_until", {"question": q}, (prompt, kwargs), 0) for q, prompt in documents()]


@pytest.fixture
def counted(monkeypatch):
    """The caches of all runs."""
    made, init = [], PrefixCaches.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PrefixCaches, "__init__", noted)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_answers_stay_the_same(method, counted):
    expected = made(False, **METHODS[method]).generate_until(asks(), disable_tqdm=True)
    assert not counted
    assert made(True, **METHODS[method]).generate_until(asks(), disable_tqdm=True) == expected
    [caches] = counted
    assert caches.reused > (0.5 * caches.tokens if method != "dola" else -1)


def test_likelihoods_stay_the_same(counted):
    texts = (" finds 4: 9 + 4 = 13.", " loses 2")
    requests = [Instance("loglikelihood", {"question": q}, (p, text), 0) for q, p in documents() for text in texts]
    (expected, found) = (
        made(reuse, **METHODS["cd"]).loglikelihood(requests, disable_tqdm=True) for reuse in (False, True)
    )
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert counted[0].reused > 0.5 * counted[0].tokens


def test_prompts_are_read_ahead_only_where_it_can_help():
    lm = loaded()
    inputs = lm._encode(list(lm.eval_requests(asks())), 500)
    assert read_prompts(lm.model, inputs, {}) == {}
    with reused_prefixes():
        assert (
            read_prompts(lm.model, inputs, {})["past_key_values"].get_seq_length() == inputs["input_ids"].shape[1] - 1
        )
        for other in ({"custom_generate": print}, {"num_beams": 2}):
            assert read_prompts(lm.model, inputs, other) == {}
        assert read_prompts(lm.model, {**inputs, "pixel_values": inputs["input_ids"]}, {}) == {}
        assert read_prompts(lm.model, {name: value[:, -1:] for name, value in inputs.items()}, {}) == {}


def test_beams_stay_the_same():
    expected, found = (made(reuse).generate_until(asks(num_beams=2), disable_tqdm=True) for reuse in (False, True))
    assert found == expected


def test_a_wrong_value_is_rejected():
    with pytest.raises(TypeError, match="prefix_cache must be true or false, not 1"):
        ContraltoLM("testbed:expert", prefix_cache=1)
