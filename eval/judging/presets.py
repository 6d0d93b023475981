"""Settings of AlpacaEval 2.0 (arXiv 2404.04475), Arena-Hard (arXiv 2406.11939) and MT-Bench (arXiv 2306.05685), whose answers a judge compares.

The packaged prompts say the same as the published ones in other words; with a copy of a benchmark's own prompt file,
`template=FILE` of a judge uses its text to the letter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from contralto.common.registry import Registry

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a benchmark."""

    name: str
    template: str
    """The packaged template of its judges."""
    sampling: Mapping[str, Any]
    """The sampling of its judges, unless the user sets another."""
    clear_weight: int = 1
    """How often a verdict counts that calls the difference significant."""
    is_length_controlled: bool = False
    """True if the length-controlled win rate is the benchmark's own figure."""
    source: str = ""
    """The publication of the prompt, and its licence."""
    questions: str = ""
    """The file of questions, and the columns by which it is recognized."""
    differences: tuple[str, ...] = field(default_factory=tuple)
    """The differences from the published benchmark."""


PRESETS: Registry[Preset] = Registry("preset", group="contralto.judge_presets")
"""The presets by name. Packages add theirs by entry points of the group `contralto.judge_presets`."""
_ORDERS = "every pair is judged in both orders; the release draws one order per question"

for _preset in (
    Preset(name="pairs", template="judge", sampling={"temperature": 0.0, "max_new_tokens": 1024}),
    Preset(
        name="alpaca_eval",
        template="judge_alpaca_eval",
        sampling={"temperature": 0.0, "max_new_tokens": 8},
        is_length_controlled=True,
        source="tatsu-lab/alpaca_eval, evaluators_configs/alpaca_eval_clf_gpt4_turbo (Apache-2.0), reworded",
        questions="alpaca_eval.json: instruction, output, generator, dataset",
        differences=(
            _ORDERS,
            "a verdict counts 1 or 0; the release weighs it by the probabilities of m and M",
            (
                "the length-controlled win rate has no term for the difficulty of an instruction and no gamed baselines, which the "
                "release takes from the fits of its leaderboard"
            ),
        ),
    ),
    Preset(
        name="arena_hard",
        template="judge_arena_hard",
        sampling={"temperature": 0.0, "max_new_tokens": 4096},
        clear_weight=3,
        source="lmarena/arena-hard-auto, config/judge_config.yaml (Apache-2.0), reworded",
        questions="question.jsonl: question_id, cluster, turns (v0.1), or uid, category, prompt (v2)",
        differences=(
            "intervals are paired bootstraps over questions, 95%; the release draws games one by one, 90%",
            "a reply without a verdict is not asked to go on",
            "no control of markdown",
        ),
    ),
    Preset(
        name="mt_bench",
        template="judge_mt_bench",
        sampling={"temperature": 0.0, "max_new_tokens": 2048},
        source="lm-sys/FastChat, fastchat/llm_judge/data/judge_prompts.jsonl, pair-v2 and pair-math-v1 (Apache-2.0), reworded",
        questions="question.jsonl: question_id, category, turns, reference",
        differences=("answers are compared in pairs; the score of 1 to 10 of a single answer is not computed",),
    ),
    Preset(
        name="evol",
        template="judge_mt_bench",
        sampling={"temperature": 0.0, "max_new_tokens": 2048},
        source="the prompt is that of mt_bench: the test set of Evol-Instruct (nlpxucan/WizardLM) was published without one",
        questions="WizardLM_testset.jsonl: idx, Skill, Difficulty, Instruction",
        differences=(
            "the paper reports scores of single answers relative to ChatGPT; here answers are compared in pairs",
        ),
    ),
):
    PRESETS.register(_preset)
