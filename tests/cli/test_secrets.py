"""Secrets of the environment, of options and of addresses are in nothing that a command writes, also where it fails."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aiohttp import web
from helpers import gguf_files
from helpers.serving import Server

from contralto.align import BrioConfig, ContConfig, DistillationConfig, PreferenceConfig

ROOT = Path(__file__).parents[2]
VARIABLES = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "MY_OWN_KEY", "CLIENT_SECRET", "DB_PASSWORD")
SECRETS = {name: f"{name.lower()}-planted-0{i}4f9c2e7a" for i, name in enumerate(VARIABLES)}
PROXY, HUB, ADDRESS, FLAG = (f"{name}-planted-14f9c2e7a" for name in ("proxy", "hub", "address", "flag"))
PROXIES = {name: f"http://me:{PROXY}@127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY")} | {"NO_PROXY": "127.0.0.1"}
QUESTION = "Mia has 9 coins. She finds 4."
SHOWS = """
import os

def shown():
    return "the server said " + " ".join(value for value in os.environ.values() if "planted" in value)

def reward(prompts, completions, **columns):
    raise ValueError(shown())

def scorer(texts, prompts=None):
    raise ValueError(shown())
"""
LENGTHS = """
def score(prompt, answers):
    return [len(answer) for answer in answers]

def reward(prompt, answers):
    return [len(answer) % 2 for answer in answers]
"""
MODEL = "--model testbed:expert --amateur testbed:amateur --max-new-tokens 4"
STEPS = (
    "--model_name_or_path testbed:student --dataset_name pairs.jsonl --max_steps 1 --report_to none --per_device_train_batch_size 2 "
    f"--gradient_accumulation_steps 1 --hub_token {HUB}"
)
SAMPLED = "--num_generations 2 --max_completion_length 4 --reward_funcs shows:reward"
EVAL = "eval --model_args pretrained=testbed:expert --tasks testbed_arithmetic --limit 2 --log_samples"
COMPARE = "compare --model testbed:expert --tasks testbed_arithmetic --limit 2 --methods dola"
CRITIC = (
    "critic testbed:amateur --prompts asks.jsonl --samples 2 --max-new-tokens 4 --epochs 1 --lora-r 0 --output made"
)
SERVE = f"serve testbed:expert --marker 0 --api-key {FLAG}"
JUDGE = "judge a.jsonl b.jsonl --output judged --judge openai"
COMMANDS = {
    "generate": (f"generate {MODEL} --file prompts.txt --output texts.jsonl", 0, "texts.jsonl"),
    "generate from the hub": ("generate --model some/model x", 2, "cannot load some/model"),
    "explain": (f"explain {MODEL} --html explain.html Ben", 0, "explain.html"),
    "align": (f"align dpo {STEPS} --audit warn --output_dir tuned", 0, "training_args.bin"),
    "align with a reward": (f"align grpo {STEPS} {SAMPLED} --output_dir rewarded", 2, "the server said ***"),
    "eval": (f"{EVAL} --output_path results", 0, "samples_testbed_arithmetic"),
    "compare": (f"{COMPARE} --output compared", 0, "compare.html"),
    "critic": (f"{CRITIC} --scorer lengths:reward", 0, "answers.sqlite"),
    "critic with a scorer": (f"{CRITIC} --scorer shows:scorer", 2, "the server said ***"),
    "amateur": (
        "amateur testbed:expert --layers 1 --texts 8 --max-new-tokens 8 --epochs 1 --output small",
        0,
        "README.md",
    ),
    "convert": ("convert tiny.gguf --output converted", 0, "tokenizer.json"),
    "convert an address": (f"convert http://me:{ADDRESS}@127.0.0.1:9/x.gguf --output converted", 2, "me:***@127.0.0.1"),
    "hub write": ("hub write repositories cad", 0, "README.md"),
    "hub push": ("hub push cad me/cad", 2, "no such key: Bearer ***"),
    "hub push, dry": ("hub push cad me/cad --dry-run", 0, "--- me/cad/README.md"),
    "serve": (f"{SERVE} --data-parallel-size 2", 2, "data_parallel_size must be 1"),
    "serve by a file": ("serve testbed:expert --marker 0 --config serve.yaml", 2, "serve.yaml is not YAML"),
    "judge": (f"{JUDGE} model=m base_url=URL", 0, "answers.sqlite"),
    "judge by address": (
        f"{JUDGE} model=m base_url=http://me:{ADDRESS}@127.0.0.1:9/v1",
        2,
        "contains a user, a password",
    ),
    "judge that is refused": (f"{JUDGE} model=none base_url=URL", 2, "no such key: Bearer ***"),
    "data run": ("data run recipe.yaml", 0, "train.parquet"),
    "data run with a scorer": ("data run scored.yaml", 2, "the server said ***"),
}
"""Arguments, the status at the end, and what is shown or is the name of a file then."""


async def _repeats(request, body):
    """An endpoint that says the key in its answers and its errors."""
    key = request.headers.get("Authorization", "")
    if body["model"] == "none":
        return web.json_response({"error": {"message": f"no such key: {key}"}}, status=401)
    text = f"It is {'o' * (body['seed'] % 97)}. {key}\nVerdict: A"
    return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


async def _rejects(request):
    """The Hub of a model, which says the key in its errors."""
    return web.json_response({"error": f"no such key: {request.headers.get('Authorization', '')}"}, status=403)


def _write_inputs(folder, url):
    pair = {"chosen": "Ben went out to the sea", "rejected": "Ben went home"}
    lines = {
        "pairs.jsonl": [{"prompt": f"Question {i}", **pair} for i in range(4)],
        "a.jsonl": [{"prompt": QUESTION, "text": "It is 13."}],
        "b.jsonl": [{"prompt": QUESTION, "text": "It is 12."}],
        "asks.jsonl": [{"prompt": f"{QUESTION} And {i} more."} for i in range(12)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text(f"{QUESTION}\n")
    (folder / "shows.py").write_text(SHOWS)
    (folder / "lengths.py").write_text(LENGTHS)
    (folder / "serve.yaml").write_text(f"api-key: {FLAG}: 1\n")
    target = {"engine": "openai", "base_url": url, "model": "m", "key_env": "MY_OWN_KEY", "temperature": 1.0}
    for name, scorer in (("recipe", "lengths:score"), ("scored", "shows:scorer")):
        strategy = {"use": "best_of_n", "n": 2, "scorer": scorer}
        recipe = {
            "output": name,
            "rows": {"source": "prompts.txt"},
            "strategies": [strategy],
            "roles": {"target": target},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))


def _found(secrets, text):
    """Return the secrets that a text holds, or the first twelve characters of."""
    return [secret for secret in secrets if secret[:12] in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_secrets_are_in_nothing_that_a_command_writes(name, tmp_path):
    command, status, sign = COMMANDS[name]
    with Server(raw=_repeats, other=_rejects) as server:
        _write_inputs(tmp_path, server.url)
        if command.startswith("convert tiny"):
            pytest.importorskip("gguf")
            gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tiny())
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"} if command.startswith("hub") else {}
        code = "import sys; from contralto.cli import main; sys.exit(main(sys.argv[1:]))"
        ran = subprocess.run(
            [sys.executable, "-c", code, *command.replace("URL", server.url).split()],
            capture_output=True, text=True, cwd=tmp_path, check=False,
            env=os.environ | SECRETS | PROXIES | hub | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])},
        )  # fmt: skip
        asked = [seen.headers.get("Authorization") for seen in server.seen]
    files = {str(path): path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()}
    assert ran.returncode == status, ran.stderr
    assert sign in ran.stdout + ran.stderr + " ".join(files)
    if "URL" in command or command.startswith("data") or name == "hub push":
        keys = ["HF_TOKEN"] if hub else ["OPENAI_API_KEY", "MY_OWN_KEY"]
        assert set(asked) - {None} <= {f"Bearer {SECRETS[each]}" for each in keys}
        assert set(asked) != {None}  # the key was sent, and the endpoint said it
    files.pop(str(tmp_path / "serve.yaml"))
    planted = [*SECRETS.values(), PROXY, HUB, ADDRESS, FLAG]
    for place, text in {"stdout": ran.stdout, "stderr": ran.stderr, **files}.items():
        assert _found(planted, text) == [], place


@pytest.mark.parametrize("kind", [PreferenceConfig, DistillationConfig, BrioConfig, ContConfig])
def test_the_hub_s_token_is_used_but_not_written(kind, tmp_path):
    args = kind(output_dir=str(tmp_path), report_to="none", hub_token=HUB)
    for one in (args, copy.copy(args), copy.deepcopy(args)):
        assert one.hub_token == HUB
        assert f"Bearer {one.hub_token}" == f"Bearer {HUB}"
    torch.save(args, tmp_path / "training_args.bin")
    assert HUB.encode() not in (tmp_path / "training_args.bin").read_bytes()
    assert pickle.loads(pickle.dumps(args)).hub_token == "<HUB_TOKEN>"
    args.hub_token = f"{HUB}-2"
    assert HUB.encode() not in pickle.dumps(args)
    args.hub_token = None
    assert pickle.loads(pickle.dumps(args)).hub_token is None
