"""Made-up answers for tests of comparisons; no model runs."""

import math
import random

from contralto.eval.comparison.columns import Column
from contralto.eval.comparison.controls import generation_rows
from contralto.eval.comparison.decoders import parse_decoder
from contralto.eval.comparison.runs import Run
from contralto.eval.comparison.samples import Identity, Sample
from contralto.eval.comparison.significance import adjust
from contralto.eval.comparison.summary import summarise
from contralto.eval.comparison.tasks import Conditions, Task
from contralto.eval.comparison.verdict import conclude

METHODS = ["cd beta=0.5", "dola"]
SOURCES = {"amateur": "testbed:amateur"}


def task(name="invented", *, yes_no=False, ranking=False, bucket="steps", cluster=None, metric="acc", higher=True):
    """A task that lm-eval has not made."""
    made = Task.__new__(Task)
    made.name, made.task, made.conditions = name, None, Conditions()
    made.cluster, made.bucket, made.metric, made.filter = cluster, bucket, metric, None
    made.yes_no, made.hint, made.part = ["yes", "no"] if yes_no else None, None, name
    made.higher_is_better, made.has_images, made.is_ranking = higher, False, ranking
    return made


def documents(n, *, seed=0):
    """Labels, clusters and buckets."""
    rng = random.Random(seed)
    return [
        {"id": i, "image": f"image {i // 4}", "steps": rng.choice(["2", "10"]), "label": rng.random() < 0.5}
        for i in range(n)
    ]


def run(docs, answers, *, metrics=None, **counts):
    """A run whose answers are yes, no or neither; `metrics` in place of those of yes and no."""
    samples = []
    for i, (doc, said) in enumerate(zip(docs, answers, strict=True)):
        pair = [doc["label"], said]
        own = metrics[i] if metrics else {
            "acc": float(said is doc["label"]), "f1": pair, "precision": pair, "recall": pair,
            "yes_ratio": float(said is True), "unparsed": float(said is None),
        }  # fmt: skip
        identity = Identity(f"doc {i}", f"prompt {i}", f"target {i}")
        shown = {True: "yes", False: "no", None: "<b>perhaps</b>"}[said]
        samples.append(
            Sample(identity, i, doc, f"<|user|>question {i} & more", str(doc["label"]), shown, {}, False, own)
        )
    return Run(samples, **counts)


def answers(docs, skill, *, seed, bias=0.0, lost=0.0):
    """Right with probability `skill`, else wrong; sometimes yes whatever is asked, sometimes neither."""
    rng = random.Random(seed)
    said = []
    for doc in docs:
        is_right = rng.random() < skill
        yes = True if rng.random() < bias else doc["label"] == is_right
        said.append(None if rng.random() < lost else yes)
    return said


def column(model, rows, docs, *, seeds=1, skill=None, leans=True):
    """A column with every row that is run."""
    made = Column(model)
    for at, row in enumerate(rows):
        if not row.is_run:
            continue
        good = (skill or {}).get(row.name, 0.7)
        count = seeds if row.is_sampled else 1
        made.runs[row.name] = [
            run(
                docs,
                answers(docs, good, seed=f"{model} {at} {s}", bias=0.05, lost=0.03),
                tokens=300,
                seconds=0.6,
                length=3.0,
            )
            for s in range(count)
        ]
        made.costs[row.name] = {"forwards": 1.0 + (row.role == "method"), "flops": 1e6 * (1 + at)}
        if leans and not row.is_sampled:
            rng = random.Random(f"lean {model} {at}")
            made.margins[row.name] = [rng.gauss(2 * doc["label"] - 1, 1.5) for doc in docs]
            halves = [
                (lean - math.log1p(math.exp(lean)), -math.log1p(math.exp(lean))) for lean in made.margins[row.name]
            ]
            made.likelihoods[row.name] = [(yes + math.log(0.9), no + math.log(0.9)) for yes, no in halves]
    return made


def rows(*, yes_no=False, sampled=True):
    """Two methods with all their controls."""
    choices = [parse_decoder(text, SOURCES) for text in METHODS]
    return generation_rows(choices, sampled=sampled, yes_no=yes_no)


def comparison(**how):
    """Two tasks and two models, as `compare` returns them."""
    docs, skill = documents(80), {"cd beta=0.5": 0.95, "cd beta=0.5, sampling": 0.9}
    summaries = []
    for name, yes_no in (("questions", True), ("problems", False)):
        own = rows(yes_no=yes_no)
        made = task(name, yes_no=yes_no, cluster="image" if yes_no else None)
        columns = [column(model, own, docs, seeds=2, skill=skill, leans=yes_no) for model in ("one", "two")]
        summaries.append(summarise(made, own, columns, resamples=200, **how))
    adjust(summaries)
    made = {
        "contralto": "0",
        "models": {name: {"name": f"testbed:{name}", "parameters": 1000} for name in ("one", "two")},
        "decoders": METHODS,
        "conditions": {"limit": None, "seeds": [0, 1]},
        "batch_size": "4",
        "reused": 0,
        "tasks": summaries,
    }
    conclude(made)
    return made
