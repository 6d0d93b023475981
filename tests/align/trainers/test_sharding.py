"""Sharded training by options and by the variables of `accelerate launch`: what reads whole weights, and what rejects it."""

import pytest

from contralto.align import BrioConfig, CALConfig, ContConfig, DistillationConfig, PreferenceConfig
from contralto.align.trainers.sharding import fsdp_version

QUIET = {"report_to": "none", "use_cpu": True}
BY_LAUNCH = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}


@pytest.mark.parametrize(
    ("variables", "options", "version"),
    [
        ({}, {}, None),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, {}, None),
        (BY_LAUNCH, {}, 1),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, 1),
        (BY_LAUNCH | {"FSDP_VERSION": "2"}, {}, 2),
        ({}, {"fsdp": True}, 2),
        ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, 1),
        (BY_LAUNCH, {"fsdp": True, "fsdp_config": {"version": 2}}, 2),
    ],
)
def test_the_version_of_fsdp(monkeypatch, tmp_path, variables, options, version):
    """As accelerate reads it; version 1 keeps the head in shards."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    args = PreferenceConfig(str(tmp_path), **QUIET, **options)
    assert fsdp_version(args) == version
    assert args.head_in_shards == (version == 1)


@pytest.mark.parametrize("kind", [BrioConfig, ContConfig])
@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_candidates_are_not_read_from_shards(monkeypatch, tmp_path, kind, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="which fsdp and deepspeed shard: leave them out"):
        kind(str(tmp_path), **QUIET)


def test_the_head_of_cal_is_not_read_from_shards(monkeypatch, tmp_path):
    for name, value in BY_LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="CAL reads the whole head, which ZeRO 3 and FSDP 1 keep in shards"):
        CALConfig(str(tmp_path), **QUIET)


def test_a_launch_with_fsdp_1_keeps_the_head_in_shards_for_distillation(monkeypatch, tmp_path):
    for name, value in BY_LAUNCH.items():
        monkeypatch.setenv(name, value)
    assert DistillationConfig(str(tmp_path), **QUIET).head_in_shards
