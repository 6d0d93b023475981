"""Estimates of memory and time follow from sizes, by hand."""

import math

import pytest

from contralto.recipes import estimates
from contralto.recipes.papers import PaperRecipe, paper_recipes
from contralto.recipes.steps import steps_of

SIZES = {"d.jsonl": {"rows": 1000.0, "tokens": 500.0}}


def needs(commands, files=None):
    recipe = PaperRecipe("0", "N", "C.", "M.", hub=commands, hub_files=files or {}, sizes=SIZES)
    return estimates.estimate(recipe, steps_of(commands, recipe.hub_files))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a/Llama-3-8B-Instruct", 8e9),
        ("a/opt-1.3b", 1.3e9),
        ("a/Qwen2.5-0.5B", 0.5e9),
        ("a/b7bx", None),
        ("7B/model", None),
    ],
)
def test_names_say_sizes(name, size):
    assert estimates.parameters(name) == size


def test_a_training_reads_and_learns():
    full, adapter = (
        needs(f"contralto align dpo --model_name_or_path a/m-7b --dataset_name d.jsonl --num_train_epochs 2 {more}")[0]
        for more in ("", "--use_peft")
    )
    tokens = 1000 * 500 * 2
    assert full.hours * 3600 == pytest.approx((6 + 2) * 7e9 * tokens / estimates.OPERATIONS)
    assert adapter.hours * 3600 == pytest.approx((4 + 2) * 7e9 * tokens / estimates.OPERATIONS)
    assert (full.gpus, adapter.gpus) == (2, 1)


def test_writing_reads_all_weights_once_for_a_batch():
    (need,) = needs("contralto generate --model a/m-7b --file d.jsonl --max-new-tokens 20 --batch-size 10")
    reading = 2 * 7e9 * 1000 * 500 / estimates.OPERATIONS
    assert need.hours * 3600 == pytest.approx(reading + 2 * 7e9 / estimates.BANDWIDTH * 20 * 100)


def test_a_comparison_has_many_decoders_and_several_gpus_count_all():
    one, many = needs(
        "contralto eval --tasks hellaswag --model_args pretrained=a/m-65b\ncontralto compare --tasks hellaswag --model a/m-65b"
    )
    assert one.gpus == 2
    assert many.hours == pytest.approx(estimates.COMPARED * one.hours)


def test_what_a_command_made_has_the_size_of_its_source():
    recipe = (
        "output: made\nrows: {source: d.jsonl}\nstrategies: [prefix]\nroles: {target: {engine: vllm, model: a/m-7b}}\n"
    )
    commands = """contralto data run r.yaml
contralto align dpo --model_name_or_path a/m-7b --dataset_name made/dataset --output_dir tuned
contralto eval --tasks hellaswag --model_args pretrained=tuned"""
    data, training, evaluation = needs(commands, {"r.yaml": recipe})
    assert data.hours > 0
    assert training.hours > 0
    assert evaluation == needs("contralto eval --tasks hellaswag --model_args pretrained=a/m-7b")[0]


def test_unknown_sizes_are_named():
    known, unknown = needs(
        "contralto align dpo --model_name_or_path a/m-7b --dataset_name d.jsonl\n"
        "contralto align dpo --model_name_or_path a/m-7b --dataset_name e.jsonl"
    )
    assert math.isnan(unknown.hours)
    assert unknown.unknown == ("e.jsonl",)
    assert estimates.total([known, unknown]) == known._replace(unknown=("e.jsonl",))


def test_every_recipe_can_be_estimated():
    for recipe in paper_recipes().values():
        for need in estimates.estimate(recipe, steps_of(recipe.hub, recipe.hub_files)):
            assert need.gpus < 16, recipe.name
            assert math.isnan(need.hours) or need.hours < 1000, recipe.name
