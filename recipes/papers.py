"""The papers that contralto implements, from `recipes/reproduce/*.yaml`: how each is run, and what it found.

Each of `decoding.yaml`, `alignment.yaml`, `data.yaml` and `evaluation.yaml` is a list of papers, whose fields are those of `PaperRecipe`,
and the short forms of `SHORT`. `files.yaml` has the files that several papers begin with.
"""

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from contralto.align.cards.papers import PAPERS
from contralto.common.files import read_text
from contralto.common.suggestions import did_you_mean

__all__ = ["FOLDER", "PARTS", "PaperRecipe", "expanded", "find", "paper_recipes"]

FOLDER = Path(__file__).parent / "reproduce"
PARTS = {
    "decoding": "Decoding",
    "alignment": "Alignment and distillation",
    "data": "Preference data",
    "evaluation": "Evaluation",
}
"""The files of papers, with their headings."""
ABBREVIATION = re.compile(r"\(([A-Z][A-Za-z0-9-]*)\)")
"""The short name in a heading such as "Visual contrastive decoding (VCD)"."""


@dataclasses.dataclass(frozen=True)
class PaperRecipe:
    """A paper, and how to run it."""

    arxiv: str
    name: str
    """The heading of the page: a short name of the method."""
    claim: str
    """One sentence: what the paper claims."""
    models: str
    """Sentences about `hub`: which models and data, and where they are not those of the paper."""
    hub: str = ""
    """Commands with models from the hub, the evaluation last; empty if there is none."""
    here: str = ""
    """Commands that take about a minute on a CPU, with the embedded models; empty if there is none."""
    note: str = ""
    """Sentences about `here`."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Files that `here` needs: texts by name, or a null for those of files.yaml."""
    hub_files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Files that `hub` needs."""
    not_run: str = ""
    """Why the tests of pages do not run `here`; empty if they do."""
    published: tuple[tuple[str, str], ...] = ()
    """Figures of the paper, each with the place where they stand."""
    measured: tuple[tuple[str, str], ...] = ()
    """Sentences with our own figures, each with `DOCUMENT#SECTION`. `{NAME}` is a figure by its name in the section."""
    sizes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Rows and tokens per row of files that the user brings, by name, for estimates."""
    title: str = ""
    authors: str = ""
    year: int = 0
    """These three are left out for papers of `contralto.align.cards.papers.PAPERS`, which win."""
    part: str = ""
    """The file of the entry."""

    @property
    def key(self) -> str:
        """Return the name that commands take.

        Examples:
            >>> PaperRecipe("2311.16922", "Visual contrastive decoding (VCD)", "It helps.", "LLaVA.").key
            'vcd'
        """
        short = ABBREVIATION.search(self.name)
        return re.sub(r"[^a-z0-9]+", "-", (short[1] if short else self.name).lower()).strip("-")


SMALL = "--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --output_dir tuned"
EVERY_LOSS = "tests/align trains with every loss"
SHORT: dict[str, dict[str, Any]] = {
    "align": {
        "models": "A common model and data set, not those of the paper.",
        "hub": "contralto align {} --model_name_or_path alignment-handbook/zephyr-7b-sft-full"
        " --dataset_name HuggingFaceH4/ultrafeedback_binarized --dataset_train_split train_prefs --output_dir tuned",
        "evaluate": "contralto eval --tasks truthfulqa_mc2,ifeval --apply_chat_template --batch_size 16 --output_path results"
        " --model_args pretrained={made} dtype=bfloat16",
        "here": "contralto align {} --model_name_or_path testbed:expert --dataset_name pairs.jsonl --conversations --use_peft"
        f" {SMALL}",
        "files": {"pairs.jsonl": None},
        "not_run": EVERY_LOSS,
    },
    "distill": {
        "models": "A teacher and a student of today. `texts` is a data set of their texts, which the strategy `teacher_student` has made.",
        "hub": "contralto align {} --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct"
        " --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name texts --output_dir student",
        "evaluate": "contralto eval --tasks gsm8k_cot,ifeval --apply_chat_template --fewshot_as_multiturn true --batch_size 16 --output_path results"
        " --model_args pretrained={made} dtype=bfloat16",
        "sizes": {"texts": {"rows": 50000, "tokens": 700}},
        "here": "contralto align {} --model_name_or_path testbed:student --teacher_model_name_or_path testbed:expert"
        f" --dataset_name pairs.jsonl --conversations {SMALL}",
        "files": {"pairs.jsonl": None},
        "not_run": EVERY_LOSS,
    },
    "recipe": {
        "files": {
            "recipe.yaml": """output: pairs
rows:
  source: contralto.testbed.questions:problems
  arguments: {count: 8, seed: 0, split: train}
{}"""
        },
        "here": "contralto data run recipe.yaml",
    },
}
"""Short forms of entries: `align` and `distill` hold a recipe of `contralto align` and its options, `recipe` the end of a data recipe.
Each stands for these fields, with its text in place of `{}`; a field that the entry has wins, files are added."""

ALPACA_EVAL: dict[str, Any] = {
    "models": "`questions.jsonl` has AlpacaEval's 805 instructions as `prompt`, `reference.json` the published answers of its reference model.",
    "commands": "contralto generate --model {made} --file questions.jsonl --max-new-tokens 1024 --output answers.jsonl\n"
    "contralto judge answers.jsonl reference.json --preset alpaca_eval --judge openai model=gpt-4-1106-preview"
    " 'price={input: 10, output: 30}' --output alpaca",
    "sizes": {"questions.jsonl": {"rows": 805, "tokens": 60}}
    | {name: {"rows": 805, "tokens": 1200} for name in ("answers.jsonl", "reference.json")},
}
"""What `alpaca_eval: true` adds to an entry whose paper reports win rates of AlpacaEval 2."""


@cache
def paper_recipes() -> dict[str, PaperRecipe]:
    """Return all papers by their numbers on arXiv, in the order of the files.

    Raises:
        ValueError: two entries have a number or a key, or one has a wrong field.
    """
    recipes: dict[str, PaperRecipe] = {}
    keys: dict[str, str] = {}
    shared = yaml.safe_load(read_text(FOLDER / "files.yaml"))
    for part in PARTS:
        for fields in yaml.safe_load(read_text(FOLDER / f"{part}.yaml")):
            entry = _entry(fields, part, shared)
            if recipes.setdefault(entry.arxiv, entry) is not entry:
                raise ValueError(f"{part}.yaml: there are two entries of {entry.arxiv}")
            if keys.setdefault(entry.key, entry.arxiv) != entry.arxiv:
                raise ValueError(f"{part}.yaml: {keys[entry.key]} and {entry.arxiv} are both called {entry.key}")
    return recipes


def find(name: str) -> PaperRecipe:
    """Return a paper by its key or by its number on arXiv.

    Args:
        name: the key or the number.

    Raises:
        ValueError: there is no such paper.

    Examples:
        >>> find("vcd").arxiv, find("2405.14734").name
        ('2311.16922', 'SimPO')
    """
    for entry in paper_recipes().values():
        if name.removeprefix("arxiv:") in (entry.arxiv, entry.key):
            return entry
    keys = [entry.key for entry in paper_recipes().values()]
    raise ValueError(
        f"there is no recipe {name!r}{did_you_mean(name, keys)}: give the name or the arXiv number of a paper that "
        "`contralto reproduce --list` shows"
    )


def _entry(fields: dict[str, Any], part: str, shared: dict[str, str]) -> PaperRecipe:
    known = PAPERS.get(str(fields["arxiv"]))
    fields = expanded(fields)
    about = {"title": known.title, "authors": known.authors, "year": known.year} if known else {}
    files = {
        kind: {name: text if text is not None else shared[name] for name, text in fields.get(kind, {}).items()}
        for kind in ("files", "hub_files")
    }
    tuples = {kind: tuple(map(tuple, fields.get(kind, ()))) for kind in ("published", "measured")}
    return PaperRecipe(**{**fields, **about, **files, **tuples, "part": part})


def expanded(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry without its short form.

    `run: true` drops the reason why `here` is not run; `evaluate` is a command that is added to `hub`, where `{made}` is the folder
    of the model that was trained last; `alpaca_eval: true` adds the commands of `ALPACA_EVAL`, which answer its questions and judge the
    answers.

    Args:
        fields: as in the file.
    """
    for form, others in SHORT.items():
        if form in fields:
            text = fields[form]
            filled = {
                name: value.replace("{}", text) if isinstance(value, str) else value for name, value in others.items()
            }
            files = {name: value and value.replace("{}", text) for name, value in others["files"].items()}
            fields = filled | fields | {"files": {**fields.get("files", {}), **files}}
            del fields[form]
    if evaluation := fields.pop("evaluate", ""):
        if fields.pop("alpaca_eval", False):
            evaluation = f"{evaluation}\n{ALPACA_EVAL['commands']}"
            fields["models"] = f"{fields['models'].rstrip()} {ALPACA_EVAL['models']}"
            fields["sizes"] = fields.get("sizes", {}) | ALPACA_EVAL["sizes"]
        made = re.findall(r"--output_dir (\S+)", fields["hub"])
        fields["hub"] = f"{fields['hub'].rstrip()}\n{evaluation.replace('{made}', made[-1])}\n"
    if fields.pop("run", False):
        fields["not_run"] = ""
    return fields
