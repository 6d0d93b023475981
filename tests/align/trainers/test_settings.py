"""Options of every trainer's configuration: kernels from the hub, which a package of their own fetches."""

import pytest
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from transformers import PreTrainedModel

from contralto.align.trainers import settings
from contralto.align.trainers.brio import BrioConfig
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.cont import ContConfig
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.align.trainers.grpo_trainer import RewardsConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.reward import MarginRewardConfig, MarginRewardTrainer
from contralto.align.trainers.sft import CALConfig, SimCTGConfig
from contralto.align.trainers.unpaired_config import UnpairedConfig

pytestmark = RENAMED_OPTIONS

CONFIGS = [
    *(BrioConfig, CALConfig, ContConfig, DistillationConfig, MarginRewardConfig, PreferenceConfig, RewardsConfig),
    *(SimCTGConfig, UnpairedConfig),
]
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
TEACHER = {"teacher_model_name_or_path": "testbed:expert"}
MISSING = "sets use_kernels, and the package that fetches kernels is missing"


def _subclasses(kind):
    return {kind, *(each for child in kind.__subclasses__() for each in _subclasses(child))}


def test_every_configuration_is_tried():
    known = _subclasses(settings.RecipeOptions)
    assert {each for each in known if not each.__subclasses__() and each.__module__.startswith("contralto")} == set(
        CONFIGS
    )


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", [{"use_kernels": True}, '{"use_kernels": true}'])
def test_kernels_without_their_package_are_rejected(kind, value):
    needed = TEACHER if kind is DistillationConfig else {}
    with pytest.raises(ValueError, match=f"^model_init_kwargs {MISSING}"):
        kind("out", **QUIET, **needed, model_init_kwargs=value)
    kind("out", **QUIET, **needed, model_init_kwargs={"use_kernels": False})


def test_a_teachers_kernels_are_rejected_too():
    with pytest.raises(ValueError, match=f"^teacher_model_init_kwargs {MISSING}"):
        DistillationConfig("out", **QUIET, **TEACHER, teacher_model_init_kwargs={"use_kernels": True})


@pytest.mark.parametrize(
    ("trainer", "kind"), [(PreferenceTrainer, PreferenceConfig), (MarginRewardTrainer, MarginRewardConfig)]
)
def test_kernels_reach_the_model(trainer, kind, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(settings, "is_kernels_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda self, value, *others: given.append(value))
    rows = Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 1.0}] * 2)
    for value in (True, False):
        args = kind(str(tmp_path), **QUIET, model_init_kwargs={"use_kernels": value})
        given.clear()
        trainer("testbed:expert", args=args, train_dataset=rows)
        assert set(given) == {value}
