"""On-policy rounds: a model writes, pairs are made of its texts, it is trained on them, and writes again.

    contralto align on_policy --data_recipe judged.yaml --rounds 3 --model_name_or_path MODEL --use_peft --output_dir out
    contralto align distill_on_policy --data_recipe texts.yaml --teacher_model_name_or_path T --model_name_or_path S --output_dir out

The data recipe is one of `contralto data`. The model takes the place of the one in its role `policy_role` (`student` if there is such a
role, or else `target`), so the first recipe above may be

    rows: prompts.jsonl
    strategies: [on_policy_judge]
    roles:
      target: {engine: transformers, model: this-round, temperature: 1.0, max_new_tokens: 512}
      judge: {engine: openai, base_url: "https://...", model: ...}

and the second one, for the epochs of DistiLLM-2 (Ko et al. 2025, arXiv 2503.07067, algorithm 1),

    rows: prompts.jsonl
    strategies: [teacher_student]
    roles:
      teacher: {engine: vllm, model: T}
      student: {engine: vllm, model: this-round}

Every round has a folder in `output_dir`, and all of it is kept:

    round-1/round.json      what the round was begun with
    round-1/pairs/          the answers and the data set, as `contralto data run` makes them; the seed is the recipe's and the round's number
    round-1/train.yaml      the recipe of the training, to be repeated with `contralto align`
    round-1/model/          the model, or its adapter, and the checkpoints
    round-1/done.json       written last

Each round's training begins with a fresh optimizer and learning-rate schedule, as in the released code of DistiLLM-2.

Writing and training are processes of their own, so each has the machine to itself. After a kill the same command goes on where it was:
answers that were recorded are not asked again, and training resumes from its last checkpoint.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from contralto.align import parsing
from contralto.common.errors import guarded
from contralto.common.files import locked_folder, replace_text
from contralto.common.hub import remote_code

__all__ = ["Round", "make_pairs", "run"]

OURS = (
    *("data_recipe", "rounds", "policy_role", "fresh_prompts", "config", "dataset_name", "output_dir"),
    *("model_name_or_path", "adapter", "resume_from_checkpoint", "first_epoch", "all_epochs"),
)
"""Flags that the rounds set themselves, or that are about the rounds."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round, as `round.json` has it.

    Args:
        number: from 1.
        rounds: how many there are to be.
        data_recipe: a recipe of `contralto data`.
        role: whose text the model writes.
        model: a folder, a hub id, or `testbed:NAME`.
        adapter: a LoRA adapter on top of it.
        fresh_prompts: take the prompts whose ids' hashes fall on this round, instead of all.
        trust_remote_code: run the code that comes with the model.
    """

    number: int
    rounds: int
    data_recipe: str
    role: str
    model: str
    adapter: str | None = None
    fresh_prompts: bool = False
    trust_remote_code: bool = False


def make_pairs(one: Round, folder: Path) -> int:
    """Let the model write, and make the pairs of a round; `contralto data run` with another model and another seed.

    Args:
        one: the round.
        folder: of the pairs; what is there already is not asked again.

    Returns:
        How many pairs there are.

    Raises:
        ValueError: there are no prompts for this round, or no pair was made.
        OSError: another process works on the folder; an endpoint refuses to work.
    """
    from contralto.data_gen import pipeline
    from contralto.data_gen.export import export
    from contralto.data_gen.store import Store

    recipe, rows = _recipe(one, folder)
    trusting = remote_code(trusted=one.trust_remote_code)
    with trusting, pipeline.locked(folder), Store(folder / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store)
        found = export(recipe, rows, store)
    print(f"round {one.number}: {found.pairs} pairs, {found.rejected} rejected, {found.failed} failed")
    return found.pairs


def _recipe(one: Round, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The data recipe with the round's model and seed, and its rows."""
    from contralto.data_gen import checks, pipeline
    from contralto.data_gen import recipe as recipes
    from contralto.data_gen.rows import read_rows

    options = {"model": one.model} | ({} if one.adapter is None else {"adapter": one.adapter})
    path = Path(one.data_recipe)
    recipe = recipes.load_recipe(path, output=folder, seed=one.number, roles={one.role: options})
    if recipe.checks or recipe.filters:
        checks.check_settings(recipe.checks, recipe.filters)
    rows = read_rows(recipe.rows, folder=path.parent)
    if one.fresh_prompts:
        rows = [row for row in rows if pipeline.shard_of(row, one.rounds) == one.number]
    if not rows:
        raise ValueError(
            f"{path} has too few rows for {one.rounds} rounds of fresh prompts: none is left for round {one.number}"
        )
    return recipe, rows


# -------------------------------------------------------------------------------------------------------------- all rounds


def run(argv: Sequence[str]) -> None:
    """All rounds, or those that are not done yet.

    Args:
        argv: of `contralto align`, with the recipe as `--config`.

    Raises:
        ValueError: whatever is wrong, in one sentence, before anything is written.
        OSError: a process of a round ended with an error, which it has told; another process works on the folder.
    """
    plan = _Plan(list(argv))
    plan.check()
    busy = f"another process is working on {plan.output}: wait for it, or end it"
    with locked_folder(plan.output, busy) as file:
        lock = file.fileno()
        plan.settle()
        for number in range(1, plan.rounds + 1):
            folder = plan.folder(number)
            if (folder / "done.json").is_file():
                print(f"round {number} of {plan.rounds} is done")
                continue
            plan.begin(plan.round(number))
            _child(["contralto.align.rounds", str(folder)], lock, f"round {number}: the pairs")
            _child(
                ["contralto", "align", str(folder / "train.yaml"), *plan.flags], lock, f"round {number}: the training"
            )
            replace_text(folder / "done.json", json.dumps({"model": str(folder / "model")}))
    print(f"{plan.rounds} rounds are done: the last model is {plan.folder(plan.rounds) / 'model'}")


class _Plan:
    """What the flags of `contralto align` say of rounds."""

    def __init__(self, argv: list[str]) -> None:
        told = {
            flag: parsing.option_value(argv, flag)
            for flag in (*OURS, "use_peft", "trainer", "loss_type", "num_train_epochs", "trust_remote_code")
        }
        for flag, question in (("model_name_or_path", "which model"), ("output_dir", "where to")):
            if told[flag] is None:
                raise ValueError(f"{question}? give --{flag}")
        if told["dataset_name"] is not None:
            raise ValueError("dataset_name is given, and data_recipe, which makes the data: give one of them")
        recipe = {} if told["config"] is None else parsing.read_recipe(told["config"])
        self.keys = {name: value for name, value in recipe.items() if name not in OURS}
        self.flags = _without(argv, OURS)
        self.output, self.rounds = Path(told["output_dir"]), _rounds(told["rounds"])
        self.data_recipe, self.role = told["data_recipe"], told["policy_role"] or _role_of(Path(told["data_recipe"]))
        self.model, self.adapter, self.fresh = (
            told["model_name_or_path"],
            told["adapter"],
            parsing.is_true(told["fresh_prompts"]),
        )
        self.has_adapter = self.adapter is not None or parsing.is_true(told["use_peft"])
        self.trusts = parsing.is_true(told["trust_remote_code"])
        curriculum = told["trainer"] == "distill" and told["loss_type"] in (None, "distillm2", ["distillm2"])
        self.epochs = int(float(told["num_train_epochs"] or 3)) if curriculum else None
        """Of a round, where rounds are the epochs of a curriculum."""

    def folder(self, number: int) -> Path:
        return self.output / f"round-{number}"

    def round(self, number: int) -> Round:
        """A round, which begins with what the one before has trained."""
        before = None if number == 1 else str(self.folder(number - 1) / "model")
        trained = {"adapter": before} if self.has_adapter else {"model": before}
        start = {"model": self.model, "adapter": self.adapter} | ({} if before is None else trained)
        of_data = {"data_recipe": self.data_recipe, "role": self.role, "fresh_prompts": self.fresh}
        of_data |= {"trust_remote_code": self.trusts}
        return Round(number=number, rounds=self.rounds, **of_data, **start)

    def training(self, one: Round) -> str:
        """The recipe of a round's training."""
        folder = self.folder(one.number)
        keys = self.keys | {"model_name_or_path": one.model, "dataset_name": str(folder / "pairs" / "dataset")}
        keys |= {"output_dir": str(folder / "model"), "resume_from_checkpoint": "last"}
        keys |= {} if one.adapter is None else {"adapter": one.adapter}
        if self.epochs is not None:
            keys |= {"first_epoch": (one.number - 1) * self.epochs + 1, "all_epochs": self.rounds * self.epochs}
        return yaml.safe_dump(keys, sort_keys=False)

    def begin(self, one: Round) -> None:
        """Write down what the round is."""
        folder = self.folder(one.number)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "round.json", json.dumps(asdict(one), indent=1))
        replace_text(folder / "train.yaml", self.training(one))

    def check(self) -> None:
        """Raise for whatever is wrong with the recipes or the flags."""
        from contralto.data_gen import pipeline

        first, second = self.round(1), self.round(2)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "train.yaml"
            recipe.write_text(self.training(first), encoding="utf-8")
            _, *others = parsing.parse(
                ["--config", str(recipe), *self.flags, "--use_cpu", "true"]
            )  # leaves the GPU alone
            parsing.launch_options(*others)
            pipeline.check(*_recipe(first, Path(folder)))
            if self.rounds > 1:
                _recipe(second, Path(folder))  # whether the engine can have what is trained

    def settle(self) -> None:
        """Hold on to the settings of all rounds.

        Raises:
            ValueError: the folder's rounds were begun with others.
        """
        settings = {"recipe": self.keys, "flags": self.flags, "data_recipe": self.data_recipe, "policy_role": self.role}
        settings |= {"model_name_or_path": self.model, "adapter": self.adapter, "fresh_prompts": self.fresh}
        if self.fresh or self.epochs is not None:  # else rounds can be added later
            settings["rounds"] = self.rounds
        path = self.output / "settings.json"
        if not path.is_file():
            replace_text(path, json.dumps(settings, indent=1))
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        if changed := [name for name in now if now[name] != before.get(name)]:
            raise ValueError(
                f"the rounds in {self.output} were begun with another {changed[0]} ({before.get(changed[0])!r}): give the same "
                "settings to go on, or another output_dir"
            )


def _rounds(said: Any) -> int:
    if said is None:
        return 1
    if not str(said).isdecimal() or int(said) < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, not {said}")
    return int(said)


def _role_of(data_recipe: Path) -> str:
    roles = parsing.read_recipe(str(data_recipe)).get("roles") or {}
    found = next((name for name in ("student", "target") if name in roles), None)
    if found is None:
        raise ValueError(
            f"{data_recipe} has neither a role student nor a role target: say whose text the model writes (policy_role)"
        )
    return found


def _without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words that do not belong to these flags.

    Examples:
        >>> _without(["--beta", "0.1", "--rounds", "2", "--output_dir=x", "--use_peft"], ["rounds", "output_dir"])
        ['--beta', '0.1', '--use_peft']
    """
    kept: list[str] = []
    belongs = False
    for word in argv:
        if word.startswith("--"):
            belongs = word[2:].split("=")[0] in names
        if not belongs:
            kept.append(word)
    return kept


def _child(words: Sequence[str], lock: int, what: str) -> None:
    """Run a module in a process of its own, which shares the lock: it is held as long as either lives."""
    child = subprocess.Popen([sys.executable, "-m", *words], pass_fds=[lock])
    try:
        status = child.wait()
    except KeyboardInterrupt:  # the child has heard it too, and ends in its own time
        child.wait()
        raise
    if status:
        raise OSError(f"{what} ended with status {status}, for the reason above; the same command goes on from there")


def main() -> int:
    """`python -m contralto.align.rounds FOLDER`: the pairs of a round."""
    folder = Path(sys.argv[1])

    def run() -> None:
        make_pairs(Round(**json.loads((folder / "round.json").read_text(encoding="utf-8"))), folder / "pairs")

    return guarded("align", run)


if __name__ == "__main__":
    sys.exit(main())
