"""Runs: one decoder on one task, its answers as lm-eval logs them, kept and found again.

The answers of a run are kept in `<output>/runs/<key>/<task>.jsonl` when it is done; until then every batch is kept in
`<output>/cache/<key>*.db`. The key is a hash of all that determines the answers, so that nothing is answered twice.

Read from lm_eval 0.4.13: what `simple_evaluate` does to a task before `evaluate`, and the form of logged samples.
"""

import copy
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.utils import handle_non_serializable, hash_dict_images, hash_string

from contralto.common.files import read_json_lines, replace_text
from contralto.common.hashing import content_digest
from contralto.eval.comparison.controls import Row
from contralto.eval.comparison.cost import Cost, metered

__all__ = [
    "Column",
    "Conditions",
    "Identity",
    "Run",
    "Runner",
    "Sample",
    "Task",
    "check_same_documents",
    "gather",
    "logged_samples",
    "read_samples",
]

FEWSHOT_SEED = 1234
"""lm-eval's own."""
METERED = 2
"""Documents on which forward passes and operations are counted."""
INVALID = "[invalid]"
"""What lm-eval's filters leave of an answer in which they find nothing."""


# ----------------------------------------------------------------------------------------------------- what lm-eval logs


class Identity(NamedTuple):
    """Hashes of what was asked: two answers are paired if all three agree."""

    document: str
    prompt: str
    target: str


class Sample(NamedTuple):
    """One document with its answer."""

    identity: Identity
    number: int
    doc: dict[str, Any]
    prompt: str
    target: str
    said: str
    """The answer, or of options the one that was chosen."""
    is_invalid: bool
    """Whether the task's filter found no answer in it."""
    metrics: dict[str, Any]


def read_samples(lines: Iterable[Mapping[str, Any]], *, filter_name: str | None = None) -> list[Sample]:
    """The documents of a run as lm-eval logged them, in their order.

    Args:
        lines: the rows of a `samples_*.jsonl`.
        filter_name: of the filter that made the answers; None for the first one.

    Raises:
        ValueError: no rows, or no such filter.
    """
    rows = list(lines)
    names = list(dict.fromkeys(row["filter"] for row in rows))
    if not names:
        raise ValueError("there are no samples: run lm-eval with --log_samples")
    if filter_name and filter_name not in names:
        raise ValueError(f"the task has no filter {filter_name!r}: it has {', '.join(names)}")
    chosen = [_sample(row) for row in rows if row["filter"] == (filter_name or names[0])]
    return sorted(chosen, key=lambda sample: sample.number)


def _sample(row: Mapping[str, Any]) -> Sample:
    requests = _requests(row["arguments"])
    filtered = row["filtered_resps"]
    if len(requests) > 1 or isinstance(requests[0][1] if len(requests[0]) > 1 else {}, str):
        said = _chosen(requests, row["resps"])
    else:
        said = _first_text(row["resps"])
    return Sample(
        Identity(_doc_hash(row["doc"]), _hash(requests), row["target_hash"]),
        int(row["doc_id"]),
        row["doc"],
        str(requests[0][0]),
        str(row["target"]),
        said,
        INVALID in (filtered if isinstance(filtered, list) else [filtered]),
        {name: row[name] for name in row["metrics"]},
    )


def _requests(arguments: Any) -> list[list[Any]]:
    """What was asked of the model, without images: texts, continuations, generation settings."""
    if isinstance(arguments, Mapping):  # as lm-eval writes them into files
        arguments = [list(each.values()) for each in arguments.values()]
    media = {"visual", "audio"}
    return [[part for part in each if not (isinstance(part, Mapping) and media & set(part))] for each in arguments]


def _chosen(requests: Sequence[Sequence[Any]], responses: Any) -> str:
    """The likeliest of the options."""
    found = [_likelihood(each) for each in responses]
    best = int(np.argmax(found))
    return str(requests[best][1] if len(requests[best]) > 1 else requests[best][0]).strip()


def _likelihood(response: Any) -> float:
    """The log-likelihood in `[[ll, is_greedy]]`, whose members may be texts."""
    while isinstance(response, list | tuple):
        response = response[0]
    return float(response)


def _first_text(responses: Any) -> str:
    while isinstance(responses, list | tuple):
        responses = responses[0]
    return str(responses)


def _hash(value: Any) -> str:
    said = json.dumps(value, sort_keys=True, ensure_ascii=False, default=handle_non_serializable)
    return content_digest(re.sub(r" at 0x[0-9a-fA-F]+", "", said), 16)


def _doc_hash(doc: Any) -> str:
    """As lm-eval's, but images count by their pixels, and not by where they lay in memory."""
    return _hash(hash_dict_images({"doc": doc}))


def check_same_documents(one: Sequence[Identity], other: Sequence[Identity], *, what: str, whose: str) -> None:
    """Refuse to pair answers to different questions.

    Args:
        one, other: the documents of two runs.
        what: the task, for the message.
        whose: where the other run comes from, for the message.

    Raises:
        ValueError: other documents, prompts or targets, or in another order.
    """
    if len(one) != len(other):
        raise ValueError(f"{whose} answers {len(other)} documents of {what}, and the comparison has {len(one)}")
    if differing := [i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]:
        a, b = one[differing[0]], other[differing[0]]
        parts = [name for name, x, y in zip(Identity._fields, a, b, strict=True) if x != y]
        raise ValueError(
            f"{whose} answers other questions of {what}: {len(differing)} of {len(one)} differ, the first (number "
            f"{differing[0]}) in its {' and '.join(parts)}; only answers to the same questions can be paired"
        )


# ------------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """The answers of one decoder to one task."""

    samples: list[Sample]
    tokens: int = 0
    """Tokens that were written, as far as it is known."""
    seconds: float = 0.0
    """Time spent writing them."""
    length: float | None = None
    """Mean tokens of an answer."""
    scored: int = 0
    ruled_out: int = 0
    """Tokens whose likelihood was asked for, and those of them that the mask ruled out."""

    @property
    def identities(self) -> list[Identity]:
        return [sample.identity for sample in self.samples]


@dataclass(frozen=True)
class Conditions:
    """Under which a task is run, for all decoders alike."""

    limit: float | None = None
    num_fewshot: int | None = None
    chat: bool = False
    """Whether prompts get the model's chat template."""
    system: str | None = None
    seeds: tuple[int, ...] = (0,)
    metric: str | None = None
    """In place of the task's own: a metric of its samples, or as lm-eval writes it, "metric,filter"."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Those that determine an answer."""
        return {
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "chat": self.chat,
            "system": self.system,
            "metadata": dict(self.metadata),
        }


class Task:
    """A task of lm-eval with what a comparison has to know of it."""

    def __init__(self, name: str, task: Any, conditions: Conditions) -> None:
        self.name, self.task, self.conditions = name, task, conditions
        config = task.config.metadata or {}
        self.cluster: str | None = config.get("cluster")
        self.bucket: str | None = config.get("bucket")
        self.yes_no: list[str] | None = config.get("yes_no")
        self.hint: str | None = config.get("yes_hint")
        self.metric: str | None = config.get("main_metric")
        self.higher_is_better = bool(config.get("higher_is_better", True))
        self.filter: str | None = None
        if conditions.metric:
            self.metric, _, filter_name = conditions.metric.partition(",")
            self.filter = filter_name or None
        self.part = name
        """The name of the files in which answers are kept."""
        self.sees = bool(getattr(task, "MULTIMODAL", False))
        self.is_ranking = task.OUTPUT_TYPE != "generate_until"
        self._prepare()

    def _prepare(self) -> None:
        """As `simple_evaluate` does."""
        asked, default = self.conditions.num_fewshot, self.task.get_config("num_fewshot")
        if asked is not None and default != 0:
            self.task.set_config(key="num_fewshot", value=asked)
        elif asked is None and default is None:
            self.task.set_config(key="num_fewshot", value=0)
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def hinted(self, hint: str) -> "Task":
        """Return the same task with a sentence after every question.

        Args:
            hint: what follows the question, with the space before it.
        """
        other, task, original = copy.copy(self), copy.copy(self.task), self.task.doc_to_text
        task.doc_to_text = lambda *args, **kwargs: original(*args, **kwargs) + hint
        other.task, other.part = task, f"{self.name}-{_hash(hint)[:8]}"
        return other

    def ask(self, lm: Any) -> list[Any]:
        """The requests, as this model is asked."""
        chat = self.conditions.chat
        self.task.build_all_requests(
            limit=get_sample_size(self.task, self.conditions.limit),
            rank=0,
            world_size=1,
            system_instruction=self.conditions.system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=lm.apply_chat_template if chat else None,
            tokenizer_name=lm.tokenizer_name if chat else "",
        )
        return list(self.task.instances)

    def identities(self, requests: Sequence[Any]) -> list[Identity]:
        """Of the documents, before anything is answered."""
        by_doc: dict[int, list[Any]] = {}
        for request in requests:
            by_doc.setdefault(request.doc_id, []).append(request)
        found = []
        for asked in by_doc.values():
            prompts = _requests([request.args for request in asked])
            target = hash_string(str(self.task.doc_to_target(asked[0].doc)))
            found.append(Identity(_doc_hash(asked[0].doc), _hash(prompts), target))
        return found

    def read(self, lines: Iterable[Mapping[str, Any]]) -> list[Sample]:
        """Logged samples of this task."""
        return read_samples(lines, filter_name=self.filter)

    def metric_of(self, samples: Sequence[Sample]) -> str:
        """The metric that is compared: the one asked for, the task's main one, or the first that most tasks have.

        Raises:
            ValueError: the samples have no such metric.
        """
        known = samples[0].metrics
        usual = ("exact_match", "acc_norm", "acc")
        name = self.metric or next((name for name in (*usual, *known) if name in known), None)
        if name not in known:
            raise ValueError(f"{self.name} has no metric {name!r}: its samples have {', '.join(known)}")
        return name


class Runner:
    """Runs decoders on tasks, keeps their answers, and finds those that were kept before."""

    def __init__(
        self, output: Path, conditions: Conditions, *, reuse: Sequence[Path] = (), quiet: bool = False
    ) -> None:
        self.output, self.conditions, self.quiet = output, conditions, quiet
        self.logged = [_logged(path) for folder in reuse for path in sorted(folder.rglob("results_*.json"))]
        self.reused = 0
        """Runs that were found, in the output or in other folders."""

    def run(self, lm: Any, task: Task, documents: Sequence[Identity], *, title: str) -> Run:
        """The answers of a model as it decodes now."""
        base = self.output / "runs" / self._key(lm) / task.part
        if base.with_suffix(".json").is_file():
            run = _read_run(base, task)
            check_same_documents(documents, run.identities, what=task.name, whose=f"{base}.jsonl")
        elif found := self._logged_before(lm, task, documents):
            run = found
        else:
            return self._run(lm, task, base, title)
        self.reused += 1
        return run

    def _run(self, lm: Any, task: Task, base: Path, title: str) -> Run:
        with redirect_stderr(_Line(sys.stderr, title, quiet=self.quiet)):
            results = evaluate(
                lm=CachingLM(lm, str(self._cache(lm))),
                task_dict={"tasks": {task.name: task.task}, "groups": {}, "group_map": {}},  # type: ignore[typeddict-item,typeddict-unknown-key,unused-ignore]
                limit=self.conditions.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=self.conditions.system,
                apply_chat_template=self.conditions.chat,
                fewshot_as_multiturn=self.conditions.chat,
            )
        assert results is not None
        lines = results["samples"][task.name]
        counts = {"tokens": lm.generated, "seconds": lm.seconds, "length": _length(lm, task, lines)}
        counts |= {"scored": lm.ruled_out["tokens"], "ruled_out": lm.ruled_out["ruled_out"]}
        about = {
            "task": task.name,
            "configuration": lm.configuration,
            "conditions": self.conditions.describe(),
            **counts,
        }
        base.parent.mkdir(parents=True, exist_ok=True)
        replace_text(base.with_suffix(".jsonl"), "".join(_dump(line) + "\n" for line in lines))
        replace_text(base.with_suffix(".json"), json.dumps(about, indent=1, default=str))  # last: now the run is done
        return _read_run(base, task)

    def words(self, lm: Any, task: Task, requests: Sequence[Any], *, title: str) -> list[tuple[float, float]]:
        """Return log p(yes) and log p(no) for every question."""
        assert task.yes_no is not None
        path = self.output / "runs" / self._key(lm) / f"{task.part}.words.json"
        asked = _hash([_requests([request.args]) for request in requests] + list(task.yes_no))
        if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
            return [(float(yes), float(no)) for yes, no in kept["words"]]
        options = [_likelihood_request(request, word) for request in requests for word in task.yes_no]
        with redirect_stderr(_Line(sys.stderr, title, quiet=self.quiet)):
            found = [answer[0] for answer in CachingLM(lm, str(self._cache(lm))).loglikelihood(options)]
        words = list(zip(found[::2], found[1::2], strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"asked": asked, "words": words}))
        return words

    def cost(self, lm: Any, task: Task, requests: Sequence[Any]) -> dict[str, float]:
        """Forward passes and operations, counted on the first documents: per generated token, or per document ranked.

        What reading the prompts and writing the first token costs is left out of the cost per token, so that a method that
        writes more does not look cheaper; unless no answer has more than one token.
        """
        path = self.output / "runs" / self._key(lm) / f"{task.name}.cost.json"
        if path.is_file():
            found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return found
        few = [request for request in requests if request.doc_id < METERED]
        documents = len({request.doc_id for request in few})
        whole, tokens = _metered(lm, few)
        if task.is_ranking:
            first, units = Cost(), documents
        elif tokens > documents:
            first, units = _metered(lm, [_cut_short(request) for request in few])[0], tokens - documents
        else:
            first, units = Cost(), max(1, tokens)
        found = {name: (getattr(whole, name) - getattr(first, name)) / units for name in ("forwards", "flops")}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found))
        return found

    def _key(self, lm: Any) -> str:
        return f"{lm.key}-{_hash(self.conditions.describe())[:6]}"

    def _cache(self, lm: Any) -> Path:
        return self.output / "cache" / str(lm.key)

    def _logged_before(self, lm: Any, task: Task, documents: Sequence[Identity]) -> Run | None:
        """Answers of the same configuration that lm-eval logged, if they hold all documents."""
        for configuration, folder, suffix in self.logged:
            path = folder / f"samples_{task.name}_{suffix}.jsonl"
            if configuration != json.loads(json.dumps(lm.configuration)) or not path.is_file():
                continue
            by_identity = {sample.identity: sample for sample in task.read(_lines(path))}
            if all(document in by_identity for document in documents):
                return Run([by_identity[document] for document in documents])
        return None


def _length(lm: Any, task: Task, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean tokens of the answers, whether they were written now or are from the cache."""
    if task.is_ranking:
        return None
    lengths = [len(lm.tok_encode(_first_text(line["resps"]), add_special_tokens=False)) for line in lines]
    return sum(lengths) / len(lengths)


def _metered(lm: Any, requests: Sequence[Any]) -> tuple[Cost, int]:
    """What answers cost, and how many tokens they have; one by one, for no text waits for the longest of a batch."""
    lm.batch_size_per_gpu, before = 1, lm.generated
    with metered(lm.models) as cost, redirect_stderr(io.StringIO()):
        getattr(lm, requests[0].request_type)(requests)
    return cost, lm.generated - before


def _cut_short(request: Any) -> Instance:
    """The same request for one token."""
    context, how, *media = request.args
    asked = {key: value for key, value in how.items() if not key.startswith("max_")} | {"max_gen_toks": 1}
    return Instance("generate_until", request.doc, (context, asked, *media), 0, (request.task_name, request.doc_id, 1))


def _likelihood_request(request: Any, continuation: str) -> Instance:
    context, _, *media = request.args
    return Instance(
        "loglikelihood", request.doc, (context, continuation, *media), 0, (request.task_name, request.doc_id, 1)
    )


def _logged(results: Path) -> tuple[Any, Path, str]:
    """The configuration of an lm-eval run, and where its samples are."""
    return (
        json.loads(results.read_text(encoding="utf-8"))["config"].get("configuration"),
        results.parent,
        results.stem.removeprefix("results_"),
    )


def logged_samples(folder: Path, task: Task, documents: Sequence[Identity]) -> Run:
    """The newest samples of a task that any run of lm-eval logged into a folder.

    Raises:
        ValueError: there are none, or they answer other questions.
    """
    paths = sorted(folder.rglob(f"samples_{task.name}_*.jsonl"), key=lambda path: path.name)
    if not paths:
        raise ValueError(f"{folder} has no samples_{task.name}_*.jsonl: run lm-eval with --log_samples")
    by_identity = {sample.identity: sample for sample in task.read(_lines(paths[-1]))}
    if all(document in by_identity for document in documents):
        return Run([by_identity[document] for document in documents])
    check_same_documents(documents, list(by_identity), what=task.name, whose=str(paths[-1]))
    raise AssertionError("some document is missing, so that the check has raised")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(path)]


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, default=handle_non_serializable)


def _read_run(base: Path, task: Task) -> Run:
    about = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
    counts = {name: about[name] for name in ("tokens", "seconds", "length", "scored", "ruled_out")}
    return Run(task.read(_lines(base.with_suffix(".jsonl"))), **counts)


class _Line(io.TextIOBase):
    """lm-eval's progress bars on one line, after what they are about."""

    def __init__(self, target: TextIO, title: str, *, quiet: bool) -> None:
        self.target, self.title, self.quiet, self.width = target, title, quiet, 0

    def write(self, text: str) -> int:
        if not self.quiet and text.strip("\r\n\x1b[A "):
            shown = f"{self.title}  {text.strip()}"
            self.target.write(f"\r{shown:<{self.width}}")
            self.width = len(shown)
            self.target.flush()
        return len(text)


# ------------------------------------------------------------------------------------------------------------ all answers


@dataclass
class Column:
    """The answers of one model to one task."""

    model: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By row, a run per seed."""
    leans: dict[str, list[float]] = field(default_factory=dict)
    """By row, how far each question leans to yes: log p(yes) - log p(no)."""
    words: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By row, log p(yes) and log p(no) of each question."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: list[Any] = field(default_factory=list)
    """A function per document that opens its images; none if there are no images."""


def _other(lm: Any, rows: Sequence[Row], branch: str) -> Any:
    """The model of another branch, to answer by itself."""
    options = next(row.options for row in rows if branch in row.options)
    model = lm.decoding_by(**options).models[branch]
    return type(lm)(
        model, tokenizer=lm.tokenizer, device=str(lm.device), batch_size=lm.batch_size, max_length=lm.max_length
    )


def gather(
    lm: Any,
    name: str,
    task: Task,
    rows: Sequence[Row],
    runner: Runner,
    *,
    logged: Mapping[str, Path] | None = None,
    progress: Callable[[str], str] = str,
) -> Column:
    """The answers of one model to one task, by every row.

    Args:
        lm: a `ContraltoLM`, whose options do not matter.
        name: of the model.
        task: the task.
        rows: what is compared.
        runner: what runs, and remembers.
        logged: other rows, by name, from folders in which any run of lm-eval logged its samples.
        progress: told the title of each run, returns the line under which its progress is shown.

    Raises:
        ValueError: answers that were kept or logged are answers to other questions.
    """
    asked, plain, column = task, task.ask(lm), Column(name)
    if task.sees:
        column.pictures = [request.args[2]["visual"] for request in plain]
    for row in rows:
        if not row.is_run:
            continue
        task, requests = (asked, plain) if row.hint is None else _hinted(asked, row.hint, lm)
        documents = task.identities(requests)
        own = lm if row.alone is None else _other(lm, rows, row.alone)
        seeds = runner.conditions.seeds if row.is_sampled else (*runner.conditions.seeds, 0)[:1]
        for seed in seeds:
            title = progress(f"{task.name}, {name}, {row.name}" + (f", seed {seed}" if row.is_sampled else ""))
            decoding = own.decoding_by(**row.options, seed=seed)
            column.runs.setdefault(row.name, []).append(runner.run(decoding, task, documents, title=title))
        bare = {key: value for key, value in row.options.items() if key not in ("temperature", "min_p")}
        column.costs[row.name] = runner.cost(own.decoding_by(**bare, seed=seeds[0]), task, requests)
        if task.yes_no and not row.is_sampled:
            leaning = own.decoding_by(**row.options, seed=seeds[0])
            words = runner.words(leaning, task, requests, title=f"{title}, lean")
            column.words[row.name], column.leans[row.name] = words, [yes - no for yes, no in words]
    for label, folder in (logged or {}).items():
        column.runs[label] = [logged_samples(folder, asked, asked.identities(plain))]
    return column


def _hinted(task: Task, hint: str, lm: Any) -> tuple[Task, list[Any]]:
    """Return the task with a sentence after every question, and its requests."""
    other = task.hinted(hint)
    return other, other.ask(lm)
