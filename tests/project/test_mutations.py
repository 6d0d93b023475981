"""The matrix of test_families.py would notice a broken adapter: each of these four breaks gives other tokens, or fails.

The breaks are the ones that adapters of two models really have. They are applied here on purpose, for good, so that a
later change of the models or of the matrix cannot blunt it unseen.
"""

import pytest
from helpers import families
from transformers.generation.utils import ALL_CACHE_NAMES

from contralto.decoding.branches import ModelBranch, layer


class CacheDropped(ModelBranch):
    def _continue(self, ids, new):
        for name in ALL_CACHE_NAMES:
            self._reader.kwargs.pop(name, None)
        return super()._continue(ids, new)


class PositionsDropped(ModelBranch):
    def _prepare(self, ids, mask, hidden):
        prompts = super()._prepare(ids, mask, hidden)
        prompts.kwargs.pop("position_ids", None)
        return prompts


class MaskDropped(ModelBranch):
    def _prepare(self, ids, mask, hidden):
        prompts = super()._prepare(ids, mask, hidden)
        prompts.kwargs["attention_mask"] = None
        return prompts


class PromptFedAgain(ModelBranch):
    def _continue(self, ids, new):
        return super()._continue(ids, ids.shape[1])


BREAKS = [
    *[(CacheDropped, family) for family in ("llama", "gpt2", "mistral", "mamba", "bloom")],
    (PositionsDropped, "gpt2"),  # the others turn positions into distances, or make them of the mask
    *[(MaskDropped, family) for family in ("llama", "gpt2", "gemma3", "opt")],
    *[(PromptFedAgain, family) for family in ("llama", "gpt2", "qwen3", "gpt_neox")],
]


QUICK = {(CacheDropped, "llama"), (PositionsDropped, "gpt2"), (MaskDropped, "opt"), (PromptFedAgain, "llama")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "family"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in BREAKS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_matrix_sees_it(broken, family, monkeypatch):
    pair = families.build_pair(family)
    monkeypatch.setattr(layer, "ModelBranch", broken)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        _matrix(pair)


def _matrix(pair):
    for run in (families.greedy, families.sampled, families.beams):
        found, expected = run(pair, 4)
        assert found == expected
