"""On-policy rounds: a model generates, pairs are made of its completions, it is trained on them, and generates again.

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

Every round has a folder in `output_dir`, all of which is kept:

    round-1/round.json      the configuration of the round, a `Round`
    round-1/pairs/          the answers and the data set, as `contralto data run` makes them; the seed is the recipe's plus the round's number
    round-1/train.yaml      the recipe of the training, to be repeated with `contralto align`
    round-1/model/          the model, or its adapter, and the checkpoints
    round-1/done.json       written last

Each round's training begins with a fresh optimizer and learning-rate schedule, as in the released code of DistiLLM-2.

Generation and training are processes of their own, so that each has the machine to itself. After a kill the same command continues:
recorded answers are not generated again, and training resumes from its last checkpoint.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contralto.align.parsing import launch_options, parse
from contralto.align.rounds_config import Round, RoundsConfig
from contralto.common.errors import guarded
from contralto.common.files import locked_folder, replace_text
from contralto.common.hashing import content_digest
from contralto.common.hub import remote_code

__all__ = ["make_pairs", "run"]

DATA_DIGEST = "data_recipe_digest"
"""The key in `settings.json` of a hash of the data recipe, which may change, as an endpoint's address does."""


def run(config: RoundsConfig) -> None:
    """Run all rounds that are not done yet.

    Args:
        config: the rounds.

    Raises:
        ValueError: a recipe or an option is wrong; before anything is written.
        OSError: the process of a round ended with an error, which it has printed; another process works on the folder.
    """
    _check(config)
    busy = f"another process is working on {config.output}: wait for it, or end it"
    with locked_folder(config.output, busy) as lock:
        _check_settings(config)
        for number in range(1, config.rounds + 1):
            folder = config.folder(number)
            if (folder / "done.json").is_file():
                print(f"round {number} of {config.rounds} is done")
                continue
            _write(config, number)
            _run_module(["contralto.align.rounds", str(folder)], lock.fileno(), f"round {number}: the pairs")
            training = ["contralto", "align", str(folder / "train.yaml"), *config.flags]
            _run_module(training, lock.fileno(), f"round {number}: the training")
            replace_text(folder / "done.json", json.dumps({"model": str(folder / "model")}))
    print(f"{config.rounds} rounds are done: the last model is {config.folder(config.rounds) / 'model'}")


def make_pairs(one: Round, folder: Path) -> int:
    """Generate with the model of a round and make its pairs, like `contralto data run` with another model and seed.

    Args:
        one: the round.
        folder: the folder of the pairs; answers that it holds are not generated again.

    Returns:
        The number of pairs.

    Raises:
        ValueError: there are no prompts for this round, or no pair was made.
        OSError: another process works on the folder; an endpoint refuses to work.
    """
    from contralto.data_gen import pipeline
    from contralto.data_gen.export import export
    from contralto.data_gen.store import Store

    recipe, rows = data_of(one, folder)
    trusted = remote_code(trusted=one.trust_remote_code)
    with trusted, pipeline.locked(folder), Store(folder / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store)
        result = export(recipe, rows, store)
    print(f"round {one.number}: {result.pairs} pairs, {result.rejected} rejected, {result.failed} failed")
    return result.pairs


def data_of(one: Round, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Return the data recipe of a round, with its model and seed, and its rows.

    Args:
        one: the round.
        folder: the folder of the pairs.

    Raises:
        ValueError: the recipe is wrong, or there are no prompts for this round.
    """
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


def _check(config: RoundsConfig) -> None:
    """Reject wrong recipes and options before anything is written."""
    from contralto.data_gen import pipeline

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "train.yaml"
        recipe.write_text(config.training_recipe(1), encoding="utf-8")
        # --use_cpu, so that this process does not take memory of a GPU from those of the rounds
        _, *others = parse(["--config", str(recipe), *config.flags, "--use_cpu", "true"])
        launch_options(*others)
        pipeline.check(*data_of(config.round(1), Path(folder)))
        if config.rounds > 1:
            data_of(config.round(2), Path(folder))  # raises if the engine cannot load what a round trains


def _check_settings(config: RoundsConfig) -> None:
    """Record the settings of all rounds; raise ValueError if earlier rounds had others, and warn of another data recipe."""
    path, digest = config.output / "settings.json", content_digest(Path(config.data_recipe).read_bytes(), 16)
    if not path.is_file():
        replace_text(path, json.dumps(config.settings() | {DATA_DIGEST: digest}, indent=1))
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get(DATA_DIGEST, digest) != digest:
        print(
            f"{config.data_recipe} has changed since the first round: rounds that are done keep their pairs",
            file=sys.stderr,
        )
    now = json.loads(json.dumps(config.settings()))
    if changed := [name for name in now if now[name] != before.get(name)]:
        raise ValueError(
            f"the rounds in {config.output} were begun with another {changed[0]} ({before.get(changed[0])!r}): give the same "
            "settings to go on, or another output_dir"
        )


def _write(config: RoundsConfig, number: int) -> None:
    """Write the files that a round begins with."""
    folder = config.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "round.json", json.dumps(asdict(config.round(number)), indent=1))
    replace_text(folder / "train.yaml", config.training_recipe(number))


def _run_module(words: Sequence[str], lock: int, title: str) -> None:
    """Run a module in a process of its own, which inherits the lock: it is held as long as either process lives."""
    child = subprocess.Popen([sys.executable, "-m", *words], pass_fds=[lock])
    try:
        status = child.wait()
    except KeyboardInterrupt:  # the child has received it too, and ends in its own time
        child.wait()
        raise
    if status:
        raise OSError(f"{title} ended with status {status}, for the reason above; the same command goes on from there")


def main() -> int:
    """Make the pairs of a round: `python -m contralto.align.rounds FOLDER`."""
    folder = Path(sys.argv[1])

    def run() -> None:
        make_pairs(Round(**json.loads((folder / "round.json").read_text(encoding="utf-8"))), folder / "pairs")

    return guarded("align", run)


if __name__ == "__main__":
    sys.exit(main())
