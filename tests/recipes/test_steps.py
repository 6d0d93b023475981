"""The commands of recipes, read: models, data, what is made, and what the user brings."""

import pytest

from contralto.recipes.papers import PaperRecipe
from contralto.recipes.steps import brought, is_hub, steps_of, substituted

RECIPE = """output: west
rows: {source: prompts.jsonl}
strategies: [{use: best_of_n, scorer: {reward_model: org/Reward-8B}}]
roles: {target: {engine: vllm, model: org/Chat-7B}, judge: {engine: function, use: "a:b"}}
checks: {ches: {model: org/Chat-7B}, contrast: {}}
"""
COMMANDS = """contralto data run west.yaml
contralto align dpo --model_name_or_path=org/Chat-7B --dataset_name west/dataset --output_dir tuned
contralto eval --model contralto-vlm --tasks a,b --data_dir DIR --model_args pretrained=tuned,amateur=org/small dtype=float16 --output_path r
contralto amateur org/Chat-7B --layers 8 --output amateur
python measure.py
"""


def test_models_and_data_are_found_in_every_kind_of_command():
    data, align, evaluation, amateur, script = steps_of(COMMANDS, {"west.yaml": RECIPE})
    assert (data.name, align.name, evaluation.name, script.name) == ("data", "align", "eval", "python")
    assert (data.models, data.data, data.made) == (("org/Chat-7B", "org/Reward-8B"), ("prompts.jsonl",), ("west",))
    assert (align.models, align.data, align.made) == (("org/Chat-7B",), ("west/dataset",), ("tuned",))
    assert evaluation.models == ("tuned", "org/small")
    assert evaluation.data == ("DIR", "a", "b")
    assert amateur.models == ("org/Chat-7B",)
    assert (script.models, script.data) == ((), ())


def test_what_no_command_makes_has_to_be_brought():
    recipe = PaperRecipe("0", "N", "C.", "M.", hub=COMMANDS, hub_files={"west.yaml": RECIPE, "measure.py": ""})
    assert brought(recipe, steps_of(recipe.hub, recipe.hub_files)) == ["prompts.jsonl", "DIR"]


@pytest.mark.parametrize(
    ("name", "expected"), [("org/m", True), ("m", False), ("./a/b", False), ("a/b/c", False), ("testbed:x", False)]
)
def test_names_of_the_hub(name, expected):
    assert is_hub(name) is expected


def test_only_whole_names_are_replaced():
    text = "--data DIR --x DIRECTORY --y a.jsonl --z aa.jsonl --model_args pretrained=EXPERT,b=c"
    values = {"DIR": r"C:\new", "a.jsonl": "b.jsonl", "EXPERT": "org/m"}
    assert substituted(text, values) == (
        r"--data C:\new --x DIRECTORY --y b.jsonl --z aa.jsonl --model_args pretrained=org/m,b=c"
    )
