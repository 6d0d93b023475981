"""The parts of contralto that leave files behind, each as a run that can be resumed and a reading of what it left.

Modules are imported in functions: a component is run once before its trials, whose children inherit all that it has imported.
"""

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.stored_answers import answer, asked


class Component(NamedTuple):
    """A part of contralto that leaves files behind."""

    name: str
    run: Callable[[Path, bool], Any]
    """Do the work in a folder; with True after a run that failed."""
    read: Callable[[Path, Any], Any]
    """Return what a reader finds in the folder, and in what `run` returned; equal in every undisturbed run."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Make the inputs."""


def command(*words: object) -> None:
    """Run a command of contralto.

    Raises:
        OSError: it ended with the sentence.
    """
    from contralto import cli

    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        status = cli.main([str(word) for word in words])
    if status:
        raise OSError(errors.getvalue().strip().split("\n")[-1].split("\r")[-1])


def contents(folder: Path, *left_out: str) -> dict[str, str]:
    """Return a hash of every file below a folder, but for names with certain endings, and what is not finished."""
    left_out = (*left_out, ".part")  # a killed process leaves those files and folders, which nothing reads
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(own): sha256(path.read_bytes()).hexdigest()[:12]
        for own, path in paths.items()
        if not any(part.endswith(left_out) for part in own.parts)
    }


# ----------------------------------------------------------------------------------------------------------------- store

LISTS = [range(start, start + 3) for start in range(0, 9, 3)]


def _outcomes(numbers: range) -> list[Any]:
    from contralto.data_gen.types import Failure

    return [(asked(n), Failure("cut") if n == 4 else answer(n, f"{n} " * 2000)) for n in numbers]


def _fill_shard(folder: Path) -> None:
    from contralto.data_gen.store import Store

    with Store(folder / "shard.sqlite") as shard:
        shard.record([(asked(n), answer(n)) for n in range(20, 24)])


def _record(folder: Path, is_resumed: bool) -> list[int]:
    """Record lists of answers, keep scores, and merge the store of another machine; return what had been lost."""
    from contralto.data_gen.store import Store

    notes = folder.parent / "recorded"
    with Store(folder / "answers.sqlite") as store:
        recorded = [int(line) for line in notes.read_text().split()] if notes.exists() else []
        lost = [n for n in recorded if not store.get([asked(n).request.key])]
        store.note_source("m", "1")
        for numbers in LISTS:
            missing = [each for each in _outcomes(numbers) if not store.get([each[0].request.key])]
            assert len(missing) in (0, len(numbers)), "a list was recorded in part"
            store.record(missing)
            with notes.open("a") as file:
                file.writelines(f"{n}\n" for n in numbers)
            if store.known_scores(str(numbers)) is None:
                store.keep_scores(str(numbers), [0.5])
        store.merge(folder / "shard.sqlite")
    return lost


def _recorded(folder: Path, lost: list[int]) -> dict[str, Any]:
    from contralto.data_gen.store import Store

    with Store(folder / "answers.sqlite", read_only=True) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        answers = store._db.execute("SELECT key, text, completion_tokens, logprobs FROM answers").fetchall()
        scores = {str(store.known_scores(str(numbers))) for numbers in LISTS}
        failures = list(store.failures())
    # Scores are computed again where a full disk has not kept them.
    return {"lost": lost, "answers": answers, "failures": failures, "wrong": scores - {"[0.5]", "None"}}


# ---------------------------------------------------------------------------------------------------------------- caches


def _rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, n], "rejected_ids": [3]} for n in range(6)])


def _reference(folder: Path, is_resumed: bool) -> Any:
    import torch

    from contralto.align.caches.reference import ReferenceCache

    def logps_of(rows: Any) -> Any:
        return [torch.tensor([float(row["chosen_ids"][1])]) for row in rows], [torch.zeros(1) for _ in rows]

    ReferenceCache.rows_per_block = 2
    return ReferenceCache(folder, "key", logps_of).add(_rows(), "train")


def _columns(folder: Path, dataset: Any) -> dict[str, Any]:
    return {name: dataset[name][:] for name in dataset.column_names}


def _teacher(folder: Path, is_resumed: bool) -> Any:
    import torch

    from contralto.align.caches.teacher import TeacherStates, save_head
    from contralto.align.losses.chunked import Head

    def states_of(rows: Any) -> Any:
        return [(torch.full((3, 4), float(row["chosen_ids"][1])), [2, 1]) for row in rows]

    TeacherStates.rows_per_block = 2
    states = TeacherStates(folder, "key", states_of, lambda: 16).add(_rows(), "train")
    save_head(Head(torch.ones(5, 4), None, 1.0, None), folder / "head.safetensors")
    return states


def _states(folder: Path, dataset: Any) -> dict[str, Any]:
    from contralto.align.caches.teacher import load_head, read_states
    from contralto.align.trainers.batches import STATES

    states = [[each.tolist() for each in read_states(place)] for place in dataset[STATES]]
    return {"states": states, "head": load_head(folder / "head.safetensors", "cpu").weight.tolist()}


# ----------------------------------------------------------------------------------------------------------------- texts

PROMPTS = ["Ben went out", "Mia was", "Tom saw", "Zoe ran"]


def _write_prompts(folder: Path) -> None:
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (folder.parent / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def _generate(folder: Path, is_resumed: bool) -> None:
    options = ("--model", "testbed:expert", "--raw", "--sample", "--max-new-tokens", 4, "--batch-size", 1)
    files = ("--file", folder.parent / "prompts.jsonl", "--output", folder / "out.jsonl")
    command("generate", *options, *files, *(["--resume"] if is_resumed else []))


def _files(folder: Path, result: None) -> dict[str, str]:
    return contents(folder)


# ------------------------------------------------------------------------------------------------------------------ data

RECIPE = {
    "rows": {"source": "contralto.testbed.questions:problems", "arguments": {"count": 4, "seed": 1, "split": "dev"}},
    "strategies": [{"use": "best_of_n", "n": 2, "scorer": "contralto.testbed.questions:score"}, "clair"],
    "roles": {
        "target": {"engine": "transformers", "model": "testbed:expert", "temperature": 1.0, "max_new_tokens": 24},
        "reviser": {"engine": "function", "use": "contralto.testbed.questions:revise"},
    },
    "checks": {"contrast": {}},
}


def _write_recipe(folder: Path) -> None:
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")


def _make_pairs(folder: Path, is_resumed: bool) -> None:
    from contralto.data_gen import export, pipeline
    from contralto.data_gen import recipe as recipes
    from contralto.data_gen.rows import read_rows
    from contralto.data_gen.store import Store

    recipe = recipes.load_recipe(folder.parent / "recipe.yaml", output=folder / "pairs")
    rows = read_rows(recipe.rows, folder=folder.parent)
    with pipeline.locked(recipe.output), Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store, is_shown=False, patience=0)
        export.export(recipe, rows, store)


def _data_set(folder: Path, result: None) -> dict[str, str]:
    """Return the files of the data set; pictures carry dates."""
    return contents(folder / "pairs" / "dataset", ".png")


def _export_only(folder: Path) -> None:
    """Answer all requests, so that the trials fail the calls of the export."""
    _write_recipe(folder)
    _make_pairs(folder, False)


# -------------------------------------------------------------------------------------------------------------- training


def _write_pairs(folder: Path) -> None:
    import itertools

    from contralto.testbed import worlds

    problems = [p for p in itertools.islice(worlds.problems(0, "train"), 30) if len(p.steps) > 1][:8]
    rows = [{"prompt": p.question, "chosen": p.solution(), "rejected": p.solution(stop_after=1)} for p in problems]
    (folder.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train(folder: Path, is_resumed: bool) -> None:
    options = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--learning_rate", "0.01"]
    options += ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "1"]
    options += ["--logging_steps", "1", "--monitor_pairs", "2", "--report", "false", "--precompute_ref_log_probs"]
    files = ["--dataset_name", folder.parent / "pairs.jsonl", "--output_dir", folder / "out"]
    files += ["--reference_cache", folder / "cache", "--resume_from_checkpoint", "last"]
    command("align", "apo_zero", "--model_name_or_path", "testbed:student", *files, *options)


def _trained(folder: Path, result: None) -> dict[str, Any]:
    """Return the weights, the losses and the measurements; not times, and files that name them."""
    from safetensors.torch import load_file

    out = folder / "out"
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    record = json.loads((out / "monitor.json").read_text(encoding="utf-8"))
    assert (out / "README.md").is_file()
    weights = load_file(out / "adapter_model.safetensors") | load_file(
        out / "checkpoint-2" / "adapter_model.safetensors"
    )
    return {
        "weights": {name: each.tolist() for name, each in weights.items()},
        "losses": [line["loss"] for line in state["log_history"] if "loss" in line],
        **{name: record[name] for name in ("points", "ches", "start_chosen", "start_rejected")},
    }


def _write_record(folder: Path) -> None:
    _write_pairs(folder)
    _train(folder, False)
    shutil.copytree(folder / "out", folder / "other")


def _report(folder: Path, is_resumed: bool) -> None:
    command("align", "report", folder / "out")
    command("align", "report", folder / "out", folder / "other", "--output", folder / "both.html")


def _pages(folder: Path, result: None) -> dict[str, Any]:
    page = (folder / "out" / "training_report.html").read_text(encoding="utf-8")
    return {"page": page, "both": (folder / "both.html").read_text(encoding="utf-8")}


JUDGED = """
rows: {source: "contralto.testbed.questions:problems", arguments: {count: 4, seed: 3}}
strategies: [on_policy_judge]
roles:
  target: {engine: transformers, model: this-round}
  judge: {engine: function, use: "contralto.testbed.questions:judge"}
"""


def _write_judged(folder: Path) -> None:
    (folder.parent / "judged.yaml").write_text(JUDGED, encoding="utf-8")


def _run_rounds(folder: Path, is_resumed: bool) -> None:
    """Run two rounds in which a file stands for the pairs and one for the model, since `data run` and `training` have trials."""
    from contralto.align import rounds
    from contralto.common.files import replace_text

    def stage(words: Any, lock: int, title: str) -> None:
        if words[0] == "contralto":
            place = Path(words[2]).parent
            pairs = (place / "pairs" / "train.jsonl").read_text(encoding="utf-8")
            replace_text(place / "model" / "weights", Path(words[2]).read_text(encoding="utf-8") + pairs)
        else:
            round_ = (Path(words[1]) / "round.json").read_text(encoding="utf-8")
            replace_text(Path(words[1]) / "pairs" / "train.jsonl", round_)

    rounds._run_module = stage
    options = ["--data_recipe", folder.parent / "judged.yaml", "--rounds", 2, "--report_to", "none"]
    command("align", "on_policy", "--model_name_or_path", "testbed:student", "--output_dir", folder / "out", *options)


def _made_rounds(folder: Path, result: None) -> dict[str, str]:
    """Return the files; the lock names a process."""
    return contents(folder, ".lock")


# ------------------------------------------------------------------------------------------------------------ evaluation


def _start_quickly(folder: Path) -> None:
    """Let this process, and so all trials, read the index of lm-eval's tasks once."""
    from helpers.task_index import quick_start

    quick_start().__enter__()


def _evaluate(folder: Path, is_resumed: bool) -> None:
    options = ("--tasks", "testbed_arithmetic", "--model_args", "pretrained=testbed:expert", "--limit", 3)
    command("eval", *options, "--log_samples", "--output_path", folder / "out", "--use_cache", folder / "cache")


def _evaluated(folder: Path, result: None) -> dict[str, Any]:
    """Return the newest results and samples; their names are times."""
    (results,) = sorted((folder / "out").rglob("results_*.json"))[-1:]
    (samples,) = sorted((folder / "out").rglob("samples_*.jsonl"))[-1:]
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    return {
        "results": json.loads(results.read_text(encoding="utf-8"))["results"],
        "answers": [(line["doc_id"], line["resps"], line["filtered_resps"]) for line in lines],
    }


def _compare(folder: Path, is_resumed: bool) -> None:
    options = ("--tasks", "testbed_arithmetic", "--model", "testbed:expert", "--methods", "dola", "--limit", 2)
    command("compare", *options, "--output", folder / "out", "--format", "csv")


def _compared(folder: Path, result: None) -> dict[str, Any]:
    """Return the comparison and the answers of its runs, without what depends on the clock and on what was there before."""
    out = folder / "out"
    assert (out / "compare.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert (out / "compare.csv").read_text(encoding="utf-8").endswith("\n")
    answers = {}
    for path in sorted((out / "runs").rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        answers[str(path.relative_to(out))] = [
            (line["doc_id"], line["resps"], line["filtered_resps"]) for line in lines
        ]
    return {"answers": answers} | _timeless(json.loads((out / "compare.json").read_text(encoding="utf-8")))


TIMES = {"ms", "seconds", "reused", "versions"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------------------- folders


def _write_gguf(folder: Path) -> None:
    from helpers import gguf_files

    gguf_files.write(folder.parent / "tiny.gguf", gguf_files.tiny())


def _convert(folder: Path, is_resumed: bool) -> None:
    """Convert a file; a folder that is complete stays as it is, since the command makes new ones only."""
    if not (folder / "converted").exists():
        command("convert", folder.parent / "tiny.gguf", "--output", folder / "converted")


def _write_repositories(folder: Path, is_resumed: bool) -> None:
    command("hub", "write", folder, "cad", "dola")


COMPONENTS = {
    each.name: each
    for each in (
        Component("store", _record, _recorded, _fill_shard),
        Component("reference cache", _reference, _columns),
        Component("teacher cache", _teacher, _states),
        Component("generate --output", _generate, _files, _write_prompts),
        Component("data run", _make_pairs, _data_set, _write_recipe),
        Component("export", _make_pairs, _data_set, _export_only),
        Component("training", _train, _trained, _write_pairs),
        Component("training report", _report, _pages, _write_record),
        Component("rounds", _run_rounds, _made_rounds, _write_judged),
        Component("eval", _evaluate, _evaluated, _start_quickly),
        Component("compare", _compare, _compared, _start_quickly),
        Component("convert", _convert, _files, _write_gguf),
        Component("hub write", _write_repositories, _files),
    )
}


def chosen(names: list[str]) -> Iterator[Component]:
    """Yield components by name, all if there are no names.

    Raises:
        KeyError: there is no such component.
    """
    yield from (COMPONENTS[name] for name in names or COMPONENTS)
