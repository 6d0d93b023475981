"""ZeRO 3 with two processes on a CPU equals one process; `make test-deepspeed` runs it where DeepSpeed is installed."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from contralto import testbed
from contralto.testbed import worlds

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.full]

SAME = (
    "--model_name_or_path MODEL --dataset_name pairs.jsonl --report_to none --disable_tqdm true --save_strategy no --max_steps 2 "
    "--learning_rate 0.01 --gradient_checkpointing false --per_device_train_batch_size 2"
)
LORA = "--use_peft --lora_r 2 --lora_target_modules q_proj v_proj"
CACHED = "--precompute_ref_log_probs --reference_cache OUT/cache"
TAUGHT = "--teacher_model_name_or_path testbed:expert --precompute_teacher true --teacher_cache OUT/cache"
LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json",
    "DS_ACCELERATOR": "cpu",
}
"""As `accelerate launch` sets them. accelerate 1.15 has no backend for this device, so that `--ddp_backend gloo` names it."""
SHARDED = {
    "stage": 3,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""No weight is small enough to stay whole, as all of an embedded model would."""
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
ZERO3 = {"zero_optimization": SHARDED, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}


def _run(folder, out, command, variables, *words):
    words = " ".join(words).replace("OUT", str(folder / out)).split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables
    command = [sys.executable, "-m", *command, "contralto.align", *words, "--output_dir", out]
    ran = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
    assert ran.returncode == 0, ran.stderr


def _untied(folder):
    """Save a student whose head is a weight of its own, which is in shards wherever its layer does not run."""
    model = testbed.load("student")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder / "untied")
    testbed.tokenizer().save_pretrained(folder / "untied")
    return "untied"


@pytest.mark.parametrize(
    ("loss", "untied", "options"),
    [
        ("apo_zero", False, LORA),
        ("apo_zero", False, f"{LORA} {CACHED}"),
        ("apo_zero", False, f"--use_peft false {CACHED}"),
        ("dpo", True, "--use_peft false"),
        ("npo", False, LORA),
        ("gradient_difference", False, LORA),
        ("distill", False, f"{LORA} {TAUGHT}"),
    ],
    ids=["adapter", "adapter-cached", "full-cached", "full-untied", "npo", "gradient_difference", "taught"],
)
def test_zero_3_equals_one_process(tmp_path, loss, untied, options):
    """Of policy and reference in shards: losses, weights, and the key of the reference's cache."""
    problems = [p for p in itertools.islice(worlds.problems(0, "train"), 60) if len(p.steps) > 1][:16]
    rows = [{"prompt": p.question, "chosen": p.solution(), "rejected": p.solution(stop_after=1)} for p in problems]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3 | dict.fromkeys(SIZES, "auto")))
    model = _untied(tmp_path) if untied else "testbed:student"
    words = [loss, SAME.replace("MODEL", model), options, "--gradient_accumulation_steps"]
    _run(tmp_path, "one", [], {"ACCELERATE_USE_CPU": "true"}, *words, "2")
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    _run(tmp_path, "two", launch, LAUNCHED, *words, "1", "--ddp_backend gloo")
    file = "adapter_model.safetensors" if LORA in options else "model.safetensors"
    one, two = (load_file(tmp_path / out / file) for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=1e-3, atol=1e-3)
    kept = [{path.relative_to(tmp_path / out) for path in (tmp_path / out).glob("cache/*/*")} for out in ("one", "two")]
    assert kept[0] == kept[1]
    assert bool(kept[0]) == ("cache" in options)
