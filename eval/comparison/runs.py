"""Runs: the answers of one decoder to one task, stored on disk and reused.

The answers of a finished run are kept in `<output>/runs/<key>/<task>.jsonl`; until then every batch is kept in
`<output>/cache/<key>*.db`. The key is a hash of all that determines the answers, so that nothing is answered twice. Answers whose task
has other filters, metrics or functions than before are scored again, from the cache.

Read from lm_eval 0.4.13: `evaluate`, `CachingLM`, and the results that lm-eval writes.
"""

import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable

from contralto.common.files import read_json_lines, replace_text
from contralto.eval.comparison.cost import ModelCost, metered
from contralto.eval.comparison.samples import (
    Identity,
    Sample,
    check_same_documents,
    first_response,
    request_arguments,
    value_digest,
)
from contralto.eval.comparison.scoring import is_scored_alike, scoring_digest
from contralto.eval.comparison.tasks import Conditions, Task
from contralto.eval.metrics import dominance
from contralto.eval.models.attention import measured_attention

__all__ = ["Run", "Runner", "logged_samples"]

logger = logging.getLogger(__name__)

METERED = 2
"""The number of documents on which forward passes and operations are counted."""
SEEN = 8
"""The number of documents on which attention is measured."""


@dataclass
class Run:
    """The answers of one decoder to one task."""

    samples: list[Sample]
    tokens: int = 0
    """Tokens that were generated, as far as it is known."""
    seconds: float = 0.0
    """Time spent generating them."""
    length: float | None = None
    """Mean tokens of an answer."""
    scored: int = 0
    """Tokens whose likelihood was requested."""
    ruled_out: int = 0
    """Those of `scored` that the plausibility mask rules out."""

    @property
    def identities(self) -> list[Identity]:
        """Return the identities of the documents, in order."""
        return [sample.identity for sample in self.samples]


class Runner:
    """Run decoders on tasks, store their answers, and reuse stored ones.

    Args:
        output: The folder of the comparison.
        conditions: The settings of the tasks.
        reuse: Folders of lm-eval's own results, from which runs of the same configuration are taken.
        quiet: Show no progress of single runs.
    """

    def __init__(
        self, output: Path, conditions: Conditions, *, reuse: Sequence[Path] = (), quiet: bool = False
    ) -> None:
        self.output, self.conditions, self.quiet = output, conditions, quiet
        self.logged = [_logged(path) for folder in reuse for path in sorted(folder.rglob("results_*.json"))]
        self.reused = 0
        """The number of runs that were found, in the output or in other folders."""

    def run(self, lm: Any, task: Task, documents: Sequence[Identity], *, title: str) -> Run:
        """Return the answers of a model with its current decoder, from disk if they are there.

        Args:
            lm: A `ContraltoLM`.
            task: The task.
            documents: The documents that the answers must be to.
            title: The beginning of the progress line.

        Raises:
            ValueError: Kept answers are answers to other questions.
        """
        base = self.output / "runs" / self._key(lm) / task.part
        if (about := _about(base)) and about.get("scoring") not in (None, scoring_digest(task.task)):
            logger.warning(
                "%s: its filters, metrics or functions have changed since the answers in %s were kept, which are scored again",
                task.name,
                base.with_suffix(".jsonl"),
            )
            return self._run(lm, task, base, title, about)
        if about:
            run = _read_run(base, task)
            check_same_documents(documents, run.identities, task=task.name, source=f"{base}.jsonl")
        elif logged := self._logged_before(lm, task, documents):
            run = logged
        else:
            return self._run(lm, task, base, title)
        self.reused += 1
        return run

    def _run(self, lm: Any, task: Task, base: Path, title: str, earlier: Mapping[str, Any] | None = None) -> Run:
        """Answer the documents of a task, keep the answers, and return them; counts of cached answers are those of the earlier run."""
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
        counts = {"tokens": lm.generated, "seconds": lm.seconds, "length": _mean_length(lm, task, lines)}
        counts |= {"scored": lm.ruled_out["tokens"], "ruled_out": lm.ruled_out["ruled_out"]}
        counts = {name: value or (earlier or {}).get(name, value) for name, value in counts.items()}
        about = {
            "task": task.name,
            "configuration": lm.configuration,
            "conditions": self.conditions.describe(),
            "scoring": scoring_digest(task.task),
            **counts,
        }
        base.parent.mkdir(parents=True, exist_ok=True)
        replace_text(base.with_suffix(".jsonl"), "".join(_dump(line) + "\n" for line in lines))
        # Written last: a run counts as finished if this file exists.
        replace_text(base.with_suffix(".json"), json.dumps(about, indent=1, default=str))
        return _read_run(base, task)

    def yes_no_likelihoods(
        self, lm: Any, task: Task, requests: Sequence[Any], *, title: str
    ) -> list[tuple[float, float]]:
        """Return log p(yes) and log p(no) for every question.

        Args:
            lm: A `ContraltoLM`.
            task: A task with `yes_no`.
            requests: Its requests.
            title: The beginning of the progress line.
        """
        assert task.yes_no is not None
        path = self.output / "runs" / self._key(lm) / f"{task.part}.words.json"
        digest = value_digest([request_arguments([request.args]) for request in requests] + list(task.yes_no))
        if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["asked"] == digest:
            return [(float(yes), float(no)) for yes, no in kept["words"]]
        options = [_likelihood_request(request, word) for request in requests for word in task.yes_no]
        with redirect_stderr(_Line(sys.stderr, title, quiet=self.quiet)):
            values = [answer[0] for answer in CachingLM(lm, str(self._cache(lm))).loglikelihood(options)]
        words = list(zip(values[::2], values[1::2], strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"asked": digest, "words": words}))
        return words

    def cost(self, lm: Any, task: Task, requests: Sequence[Any]) -> dict[str, float]:
        """Count forward passes and operations on the first documents, per generated token or per ranked document.

        The cost of the prompts and of the first token is left out of the cost per token, so that a method that writes more does
        not look cheaper; unless no answer has more than one token.

        Args:
            lm: A `ContraltoLM`.
            task: The task.
            requests: Its requests.

        Returns:
            `forwards` and `flops`.
        """
        path = self.output / "runs" / self._key(lm) / f"{task.name}.cost.json"
        if path.is_file():
            kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        few = [request for request in requests if request.doc_id < METERED]
        documents = len({request.doc_id for request in few})
        whole, tokens = _metered(lm, few)
        if task.is_ranking:
            first, units = ModelCost(), documents
        elif tokens > documents:
            first, units = _metered(lm, [_one_token_request(request) for request in few])[0], tokens - documents
        else:
            first, units = ModelCost(), max(1, tokens)
        cost = {name: (getattr(whole, name) - getattr(first, name)) / units for name in ("forwards", "flops")}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(cost))
        return cost

    def attention(self, lm: Any, task: Task, requests: Sequence[Any]) -> dict[str, Any]:
        """Measure the attention to the text and to the image on the first documents.

        Args:
            lm: A `ContraltoVLM` that decodes greedily.
            task: A task with images.
            requests: Its requests.

        Returns:
            The stages of `contralto.eval.metrics.dominance.summary`, and `documents`; `reason` alone where attention cannot be measured.
        """
        path = self.output / "runs" / self._key(lm) / f"{task.name}.attention.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        try:
            found = _attention(lm, [request for request in requests if request.doc_id < SEEN])
        except ValueError as error:
            return {"reason": str(error)}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found))
        return found

    def _key(self, lm: Any) -> str:
        return f"{lm.key}-{value_digest(self.conditions.describe())[:6]}"

    def _cache(self, lm: Any) -> Path:
        return self.output / "cache" / str(lm.key)

    def _logged_before(self, lm: Any, task: Task, documents: Sequence[Identity]) -> Run | None:
        """Return the answers that lm-eval logged for the same configuration, if all documents are there."""
        for config, folder, suffix in self.logged:
            path = folder / f"samples_{task.name}_{suffix}.jsonl"
            if config["configuration"] == json.loads(json.dumps(lm.configuration)) and path.is_file():
                if not is_scored_alike(task.task, config["tasks"].get(task.name)):
                    logger.warning(
                        "%s: its filters, metrics or functions have changed since %s was logged, whose answers are left out",
                        task.name,
                        path,
                    )
                    continue
                by_identity = {sample.identity: sample for sample in task.read(_lines(path))}
                if all(document in by_identity for document in documents):
                    return Run([by_identity[document] for document in documents])
        return None


def _mean_length(lm: Any, task: Task, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean number of tokens of answers, generated or cached."""
    if task.is_ranking:
        return None
    lengths = [len(lm.tok_encode(first_response(line["resps"]), add_special_tokens=False)) for line in lines]
    return sum(lengths) / len(lengths)


def _metered(lm: Any, requests: Sequence[Any]) -> tuple[ModelCost, int]:
    """Return cost and tokens of answers, one request at a time and each as if alone, since a batch pads to its longest row."""
    lm.batch_size_per_gpu, lm.prefix_cache, before = 1, False, lm.generated
    with metered(lm.models) as cost, redirect_stderr(io.StringIO()):
        getattr(lm, requests[0].request_type)(requests)
    return cost, lm.generated - before


def _attention(lm: Any, requests: Sequence[Any]) -> dict[str, Any]:
    """Return the indices of attention on a few documents, answered one at a time."""
    lm.batch_size_per_gpu, lm.prefix_cache = 1, False
    with measured_attention(lm.model) as masses, redirect_stderr(io.StringIO()):
        lm.generate_until(requests)
    return {**dominance.summary(masses), "documents": len(masses)}


def _one_token_request(request: Any) -> Instance:
    """Return the same request for one new token."""
    context, options, *media = request.args
    options = {key: value for key, value in options.items() if not key.startswith("max_")} | {"max_gen_toks": 1}
    return Instance(
        "generate_until", request.doc, (context, options, *media), 0, (request.task_name, request.doc_id, 1)
    )


def _likelihood_request(request: Any, continuation: str) -> Instance:
    context, _, *media = request.args
    return Instance(
        "loglikelihood", request.doc, (context, continuation, *media), 0, (request.task_name, request.doc_id, 1)
    )


def _logged(results: Path) -> tuple[dict[str, Any], Path, str]:
    """Return the configurations of an lm-eval run and its tasks, its folder, and the suffix of its sample files."""
    content = json.loads(results.read_text(encoding="utf-8"))
    config = {"configuration": content["config"].get("configuration"), "tasks": content.get("configs", {})}
    return config, results.parent, results.stem.removeprefix("results_")


def logged_samples(folder: Path, task: Task, documents: Sequence[Identity]) -> Run:
    """Read the newest samples of a task that any run of lm-eval logged into a folder.

    Args:
        folder: The folder.
        task: The task.
        documents: The documents that the answers must be to.

    Raises:
        ValueError: There are no samples, or they answer other questions.
    """
    paths = sorted(folder.rglob(f"samples_{task.name}_*.jsonl"), key=lambda path: path.name)
    if not paths:
        raise ValueError(f"{folder} has no samples_{task.name}_*.jsonl: run lm-eval with --log_samples")
    by_identity = {sample.identity: sample for sample in task.read(_lines(paths[-1]))}
    if all(document in by_identity for document in documents):
        return Run([by_identity[document] for document in documents])
    check_same_documents(documents, list(by_identity), task=task.name, source=str(paths[-1]))
    raise AssertionError("some document is missing, so that the check has raised")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(path)]


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, default=handle_non_serializable)


def _about(base: Path) -> dict[str, Any] | None:
    """Return the description of a kept run; None if there is none."""
    path = base.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_run(base: Path, task: Task) -> Run:
    about = _about(base) or {}
    counts = {name: about[name] for name in ("tokens", "seconds", "length", "scored", "ruled_out")}
    return Run(task.read(_lines(base.with_suffix(".jsonl"))), **counts)


class _Line(io.TextIOBase):
    """A stream that shows lm-eval's progress bars on one line, after a title."""

    def __init__(self, target: TextIO, title: str, *, quiet: bool) -> None:
        self.target, self.title, self.quiet, self.width = target, title, quiet, 0

    def write(self, text: str) -> int:
        """Show a part of a progress bar, and return its number of characters."""
        if not self.quiet and text.strip("\r\n\x1b[A "):
            shown = f"{self.title}  {text.strip()}"
            self.target.write(f"\r{shown:<{self.width}}")
            self.width = len(shown)
            self.target.flush()
        return len(text)
