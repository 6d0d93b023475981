"""The comparison of `contralto demo`: contrastive decoding with its controls, and the aligned expert with itself before."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from contralto.cli.demo import alignment
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.eval.comparison import Conditions, Subject
from contralto.eval.comparison.compare import compare
from contralto.eval.comparison.verdict import conclude

__all__ = ["ALPHA", "BETA", "PAIRS", "PROBLEM_SEED", "ModelPair", "compare_models", "contrast_with"]

BETA, ALPHA = 0.5, 0.1
BATCH_SIZE = 200
PROBLEM_SEED = 2026
TASK = "testbed_arithmetic"


class ModelPair(NamedTuple):
    """An expert and its amateur, by their names in the testbed."""

    title: str
    expert: str
    amateur: str


PAIRS = (
    ModelPair("seed 0", "expert-0", "amateur"),
    ModelPair("seed 1", "expert-1", "amateur"),
    ModelPair("seed 2", "expert-2", "amateur"),
    ModelPair("control", "control-expert", "control-amateur"),
)


def contrast_with(amateur: Any) -> ContrastiveDecodingLogitsProcessor:
    """Return the logits processor of the demo.

    Args:
        amateur: the model whose logits are subtracted.
    """
    return ContrastiveDecodingLogitsProcessor(amateur, beta=BETA, alpha=ALPHA)


def compare_models(n: int, folder: Path, aligned: Path) -> dict[str, Any]:
    """Compare contrastive decoding with its controls on held-out problems, for every pair and the aligned expert.

    A second section compares the aligned expert with itself before alignment, on the same problems.

    Args:
        n: the number of problems.
        folder: the folder for the answers.
        aligned: the folder of the first pair's expert after alignment.

    Returns:
        The comparison, as `contralto.eval.comparison.compare.compare` returns it.
    """
    first, *others = [Subject(f"testbed:{pair.expert}", {"amateur": f"testbed:{pair.amateur}"}) for pair in PAIRS]
    conditions = Conditions(metadata={"n": n, "world_seed": PROBLEM_SEED})
    options: dict[str, Any] = {"output": folder, "model_args": {"batch_size": BATCH_SIZE}}
    decoders = ["cd"]  # its defaults are BETA and ALPHA
    after = Subject(str(aligned), first.sources)
    comparison = compare([first, *others, after], [TASK], decoders, conditions=conditions, **options)
    logged = alignment.logged(folder, aligned, TASK)
    greedy = compare([first], [TASK], decoders, conditions=replace(conditions, seeds=()), logged=logged, **options)
    (section,) = greedy["tasks"]
    comparison["tasks"].append({**section, "name": f"{TASK}, before and after alignment"})
    conclude(comparison)
    return comparison
