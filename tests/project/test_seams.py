"""The private parts of the libraries below: each is listed, exists in the installed version, and that version was tested.

A part is private if its name begins with an underscore, or if it is imported from a module that the library's documentation does not
name. A release of one of these libraries may change them without notice, so that pyproject.toml has an upper bound for each.
"""

import ast
import importlib
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PARTS = ("align", "contralto", "data_gen", "decoding", "eval", "recipes", "testbed")
TESTED = {"transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2", "lm_eval": "0.4.13"}
"""The newest releases that the tests have passed with; the bounds lie above them."""
SEAMS = {
    "transformers": {
        "_attn_implementation": "configuration_utils",
        "_can_compile_fullgraph": "modeling_utils",
        "_eos_token_tensor": "generation.utils",
        "_expand_inputs_for_generation": "generation.utils",
        "_get_logits_processor": "generation.utils",
        "_is_stateful": "modeling_utils",
        "_load_best_model": "trainer",
        "_load_from_checkpoint": "trainer",
        "_maybe_prepare_encoder_kwargs_for_generation": "generation.utils",
        "_pad_token_tensor": "generation.utils",
        "_prepare_inputs": "trainer",
        "_prepare_position_ids_for_generation": "generation.utils",
        "_save": "trainer",
        "_set_signature_columns_if_needed": "trainer",
        "_signature_columns": "trainer",
        "_supports_sdpa": "modeling_utils",
        "_update_model_kwargs_for_generation": "generation.utils",
        "_valid_auto_compile_criteria": "generation.utils",
        "_validate_model_kwargs": "generation.utils",
    },
    "trl": {
        "_compute_kl_logps": "trainer.kto_trainer",
        "_compute_loss": "trainer.dpo_trainer",
        "_metrics": "trainer.dpo_trainer",
        "_precompute_ref_logps": "trainer.dpo_trainer",
        "_total_train_tokens": "trainer.dpo_trainer",
        "_tp_size": "trainer.dpo_trainer",
    },
    "lm_eval": {
        "_create_model": "models.huggingface",
        "_encode_pair": "api.model",
        "_loglikelihood_tokens": "models.huggingface",
    },
}
"""Private names by library, with the module in which each is found."""
OTHERS = {
    "_ArgumentGroup": "argparse",
    "_SubParsersAction": "argparse",
    "_actions": "argparse",
    "_add_action": "argparse",
    "_asdict": "a named tuple",
    "_db": "one of contralto's own classes, from outside",
    "_fields": "a named tuple",
    "_is_amx_tile_supported": "torch.cpu",
    "_non_persistent_buffers_set": "torch.nn.Module",
    "_replace": "a named tuple",
    "_subparsers": "argparse",
    "_version": "torch.Tensor",
}
"""Names with an underscore that belong to none of these libraries."""


def _trees():
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            if part != "contralto" or path.relative_to(ROOT).parts[1] not in PARTS:
                yield ast.parse(path.read_text())


def _names():
    """Return the private attributes that are read, and those that contralto defines itself."""
    read, defined = set(), set()
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Attribute):
                defined.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    return {name for name in read if re.match("_[^_]", name)}, defined


@pytest.mark.slow
def test_every_private_part_is_listed():
    read, defined = _names()
    listed = {name for names in SEAMS.values() for name in names}
    assert read - defined - set(OTHERS) <= listed
    assert listed <= read | defined
    assert set(OTHERS) <= read


@pytest.mark.slow
@pytest.mark.parametrize("library", list(SEAMS))
def test_listed_parts_exist(library):
    for name, module in SEAMS[library].items():
        source = inspect.getsource(importlib.import_module(f"{library}.{module}"))
        assert re.search(rf"\b{name}\b", source), name


@pytest.mark.slow
@pytest.mark.parametrize("library", [*SEAMS, "peft", "accelerate"])
def test_names_of_inner_modules_exist(library):
    found = 0
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{library}."):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                    found += 1
    assert found or library == "peft"


@pytest.mark.parametrize("library", list(TESTED))
def test_the_installed_version_lies_within_tested_bounds(library):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    (bounds,) = {r.specifier for r in map(Requirement, lines) if r.name == library}
    assert version(library) in bounds
    (above,) = [Version(each.version) for each in bounds if each.operator == "<"]
    tested = Version(TESTED[library])
    assert tested in bounds
    steps = [(tested.major, tested.minor + 1), (tested.major, tested.minor, tested.micro + 1)]
    assert above.release in steps  # the first release that was not tested
