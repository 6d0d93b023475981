"""The parts of vLLM that contralto depends on: a change in vLLM fails here first, with its name.

docs/decisions/006-vllm.md says what to do then.
"""

import dataclasses
import inspect
from importlib import import_module

import pytest
import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from contralto.decoding.vllm import AsyncPairScheduler, PairedContrast, PairScheduler

SIGNATURES = {
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "(self, request)",
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": "(self, request_ids, finished_status)",
    "vllm.v1.core.sched.scheduler:Scheduler.get_num_unfinished_requests": "(self)",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "(self, scheduler_output, model_runner_output)",
    "vllm.v1.sample.logits_processor:LogitsProcessor.__init__": "(self, vllm_config, device, is_pin_memory)",
    "vllm.v1.sample.logits_processor:LogitsProcessor.apply": "(self, logits)",
    "vllm.v1.sample.logits_processor:LogitsProcessor.update_state": "(self, batch_update)",
    "vllm.v1.sample.logits_processor:LogitsProcessor.is_argmax_invariant": "(self)",
    "vllm.v1.sample.logits_processor:LogitsProcessor.validate_params": "(cls, sampling_params)",
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor.__init__": "(self, vllm_config, req_states)",
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor.add_request": "(self, req_idx, sampling_params)",
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor.apply": "(self, logits, ctx)",
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor.validate_params": "(cls, sampling_params)",
}
FIELDS = {
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsContext": {"idx_mapping_np", "seq_lens_upper_bound_np"},
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcRequestState": {
        "device",
        "max_num_reqs",
        "prompt_len",
        "prefill_len",
    }
    | {"all_token_ids"},
    "vllm.v1.sample.logits_processor:BatchUpdate": {"removed", "added", "moved"},
    "vllm.config:SchedulerConfig": {"long_prefill_token_threshold", "policy", "async_scheduling", "max_num_seqs"},
    "vllm.config:ParallelConfig": {"data_parallel_size"},
    "vllm.config:VllmConfig": {"speculative_config", "kv_transfer_config", "additional_config"},
    "vllm.v1.engine:EngineCoreOutput": {"request_id", "new_token_ids", "finish_reason", "stop_reason"},
    "vllm.v1.engine:EngineCoreOutputs": {"outputs"},
}
OF_V2 = {name for name in [*SIGNATURES, *FIELDS] if "worker.gpu" in name}


def found(name):
    """An object by `module:name`; 0.30 has no interface of Model Runner V2."""
    if name in OF_V2 and tuple(map(int, vllm.__version__.split(".")[:2])) < (0, 31):
        pytest.skip("vLLM 0.30 has one interface")
    module, _, path = name.partition(":")
    thing = import_module(module)
    for part in path.split("."):
        thing = inspect.getattr_static(thing, part)
    return thing.__func__ if isinstance(thing, classmethod) else thing


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert f"({', '.join(inspect.signature(found(name)).parameters)})" == SIGNATURES[name], f"{name} has moved"


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    fields = set(inspect.signature(found(name)).parameters)
    assert not FIELDS[name] - fields, f"{name} has no {FIELDS[name] - fields} any more"


def test_what_the_scheduler_has(engines):
    """Attributes of a running scheduler and of its requests."""
    from engines import scheduler_of

    scheduler = scheduler_of(engines())
    names = [
        "running",
        "requests",
        "vllm_config",
        "scheduler_config",
        "kv_cache_config",
        "lora_config",
        "max_model_len",
    ]
    names += ["max_num_running_reqs", "max_num_scheduled_tokens", "_pause_state"]
    names += ["max_num_encoder_input_tokens", "encoder_cache_manager"]
    assert {"cache_size", "num_freeable_slots"} <= set(vars(scheduler.encoder_cache_manager))
    inputs = import_module("vllm.multimodal.inputs")
    assert "identifier" in {field.name for field in dataclasses.fields(inputs.MultiModalFeatureSpec)}
    assert callable(inputs.PlaceholderRange.get_num_embeds)
    assert [name for name in names if not hasattr(scheduler, name)] == []
    assert all(hasattr(group.kv_cache_spec, "block_size") for group in scheduler.kv_cache_config.kv_cache_groups)
    request = set(dir(import_module("vllm.v1.request").Request))
    source = inspect.getsource(import_module("vllm.v1.request").Request)
    for name in ("num_prompt_tokens", "num_tokens", "num_computed_tokens", "num_output_placeholders", "max_tokens"):
        assert name in request or f"self.{name}" in source, f"Request has no {name} any more"
    for name in ("mm_features", "lora_request", "structured_output_request", "client_index", "sampling_params"):
        assert name in request or f"self.{name}" in source, f"Request has no {name} any more"


def test_our_classes_are_theirs():
    assert issubclass(PairScheduler, Scheduler)
    assert issubclass(AsyncPairScheduler, AsyncScheduler)
    assert inspect.isclass(PairedContrast)
    assert not inspect.isabstract(PairedContrast)


def test_the_server_can_be_started_as_a_module():
    from contralto.cli.serve import SERVER

    assert import_module("importlib.util").find_spec(SERVER) is not None
