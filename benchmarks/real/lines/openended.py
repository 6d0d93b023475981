"""Continue paragraphs of WikiText by methods of decoding: repetition, coherence, closeness to human texts, time."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from contralto.common.files import replace_file
from contralto.decoding import DecodingConfig, SeededSampling
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import generate_kwargs
from contralto.decoding.sampling import row_seed
from contralto.eval import stats
from contralto.eval.metrics import coherence
from contralto.eval.metrics.openended import diversity, ngram_counts, repetition
from contralto.eval.stats.counts import mean, score_table
from real.closeness import RESAMPLES, SEEDS, can_compare, closeness, embed, last_states
from real.excerpts import Excerpt, excerpts
from real.line import Context, Figure, Line, Section
from real.tables import p_text, table

LENGTHS = (2, 3, 4)
FEATURES = {"embedder": "MAUVE (sentence embedder)", "model": "MAUVE (the model)"}
"""The features of MAUVE by the role of the model that makes them."""


@dataclass(frozen=True)
class System:
    """A method with its settings."""

    options: Mapping[str, Any] = field(default_factory=lambda: {"method": "none"})
    """Options of `DecodingConfig`, without the amateur."""
    sampling: Mapping[str, Any] | None = None
    has_amateur: bool = False


LI = {"method": "cd", "form": "li", "alpha": 0.1}
SYSTEMS = {
    "greedy": System(),
    "nucleus 0.95": System(sampling={"top_p": 0.95}),
    "contrastive search, alpha 0.6, k 4": System({"method": "search", "alpha": 0.6, "k": 4}),
    "CD of O'Brien, beta 0.5": System({"method": "cd", "beta": 0.5, "alpha": 0.1}, has_amateur=True),
    "CD of Li, window 1, greedy": System({**LI, "amateur_window": 1}, has_amateur=True),
    "top-k 50": System(sampling={"top_k": 50}),
    "DoLa, low layers": System({"method": "dola", "layers": "low"}),
    "CD of Li, window 1, 5 beams": System({**LI, "amateur_window": 1, "beams": 5}, has_amateur=True),
    "CD of Li, whole prompt, greedy": System(LI, has_amateur=True),
}
CONTROL = "nucleus 0.95"
"""The system with which the others are compared."""
HUMAN, OTHERS = "the true continuations", "human texts of other articles"


def run(context: Context) -> None:
    """Generate, embed and judge the continuations of one system after the other.

    Args:
        context: The context of the line.
    """
    found = _excerpts(context, "test")
    _judge(context, HUMAN, found, [excerpt.rest for excerpt in found])
    if can_compare():
        _compare(context, OTHERS, found, [excerpt.rest for excerpt in _excerpts(context, "valid")])
    for name in _available(context):
        keys = _keys(context, name, found)
        context.units().fill(
            keys,
            lambda batch, name=name: _continue(context, name, [found[i] for i in batch], batch),  # type: ignore[misc]
            title=name,
            batch_size=context.sizes["batch"],
        )
        texts = [unit["ids"] for unit in context.units().of(keys) or []]
        _judge(context, name, found, texts)
        if can_compare():
            _compare(context, name, found, texts)


def _excerpts(context: Context, part: str) -> list[Excerpt]:
    sizes = context.sizes
    path = context.file("wikitext", f"wikitext2_{part}.txt")
    return excerpts(path, context.tokenizer(), prefix=sizes["prefix"], rest=sizes["tokens"], count=sizes["texts"])


def _available(context: Context) -> list[str]:
    """Return the systems whose models are given."""
    return [name for name, system in SYSTEMS.items() if not system.has_amateur or context.has("amateur")]


def _keys(context: Context, name: str, found: Sequence[Excerpt]) -> list[dict[str, Any]]:
    system = SYSTEMS[name]
    roles = ("model", "amateur") if system.has_amateur else ("model",)
    how = {"options": dict(system.options), "sampling": dict(system.sampling or {}), "tokens": context.sizes["tokens"]}
    return [context.key(*roles, **how, number=i, prefix=excerpt.prefix) for i, excerpt in enumerate(found)]


def _continue(context: Context, name: str, batch: Sequence[Excerpt], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the tokens of continuations of full length, and milliseconds of processor time per token."""
    system, model, tokens = SYSTEMS[name], context.model(), context.sizes["tokens"]
    ids = torch.tensor([excerpt.prefix for excerpt in batch])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    amateur = {"amateur": context.path("amateur")} if system.has_amateur else {}
    config = DecodingConfig.from_options(**system.options, **amateur)
    others = (context.model("amateur"),) if system.has_amateur else ()
    how = generate_kwargs(config, DecodingBatch(model, others, inputs, ()))
    if system.sampling is not None:
        how["logits_processor"] = [SeededSampling([row_seed(0, number) for number in numbers], **system.sampling)]
    start = time.process_time()
    output = model.generate(
        **inputs,
        **how,
        num_beams=config.beams,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=context.tokenizer().pad_token_id,
    )
    spent = 1000 * (time.process_time() - start) / (tokens * len(batch))
    return [{"ids": row, "cpu_ms": round(spent, 3)} for row in output[:, ids.shape[1] :].tolist()]


def _texts(context: Context, ids: Sequence[Sequence[int]]) -> list[str]:
    found: list[str] = context.tokenizer().batch_decode([list(row) for row in ids], skip_special_tokens=True)
    return found


# ------------------------------------------------------------------------------------------------------- coherence and MAUVE


def _judge(context: Context, name: str, found: Sequence[Excerpt], ids: Sequence[list[int]]) -> None:
    """Compute the mean log-likelihood of each continuation by the judge."""
    role = _judging_role(context)
    prompts, texts = _texts(context, [excerpt.prefix for excerpt in found]), _texts(context, ids)

    def judged(batch: list[int]) -> list[float]:
        given = ([prompts[i] for i in batch], [texts[i] for i in batch])
        return coherence(context.model(role), context.tokenizer(role), *given, batch_size=2)

    keys = [_judge_key(context, excerpt, row) for excerpt, row in zip(found, ids, strict=True)]
    context.units("coherence").fill(keys, judged, title=f"coherence, {name}", batch_size=4)


def _judging_role(context: Context) -> str:
    return "judge" if context.has("judge") else "model"


def _judge_key(context: Context, excerpt: Excerpt, ids: Sequence[int]) -> dict[str, Any]:
    return context.key(_judging_role(context), prefix=excerpt.prefix, ids=list(ids))


def _compare(context: Context, name: str, found: Sequence[Excerpt], ids: Sequence[list[int]]) -> None:
    """Compute MAUVE against the true continuations, by the features of each model that is given."""
    references = [excerpt.rest for excerpt in found]
    for role in FEATURES:
        key = _mauve_key(context, role, found, ids) if context.has(role) else None
        if key is None or key in context.units("mauve"):
            continue
        texts = _features(context, role, ids, f"{name}, features of {role}")
        human = _features(context, role, references, HUMAN)
        context.units("mauve").add(key, closeness(texts, human, [excerpt.article for excerpt in found]))


def _mauve_key(context: Context, role: str, found: Sequence[Excerpt], ids: Sequence[list[int]]) -> dict[str, Any]:
    return context.key(role, role=role, texts=_digest(ids), references=_digest(found), seeds=SEEDS, resamples=RESAMPLES)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _features(context: Context, role: str, ids: Sequence[list[int]], title: str) -> np.ndarray[Any, Any]:
    """Return the features of continuations without their prompts, kept in a file."""
    path = context.scratch / f"features-{context.digest(role)}-{_digest(ids)}.npy"
    if not path.exists():
        print(title, flush=True)
        if role == "model":
            made = last_states(context.model(), torch.tensor([*ids]), batch_size=10)
        else:
            made = embed(context.path(role), _texts(context, ids), batch_size=10)
        with replace_file(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, made)
    return np.asarray(np.load(path))


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section, with the systems that are complete.

    Args:
        context: The context of the line.
    """
    found = _excerpts(context, "test")
    made = {name: context.units().of(_keys(context, name, found)) for name in _available(context)}
    ids: dict[str, list[list[int]]] = {HUMAN: [excerpt.rest for excerpt in found]}
    ids |= {name: [unit["ids"] for unit in units] for name, units in made.items() if units is not None}
    judged = {name: _judged(context, found, rows) for name, rows in ids.items()}
    ids = {name: rows for name, rows in ids.items() if judged[name] is not None}
    if CONTROL not in ids:
        return None
    times = {name: [unit["cpu_ms"] for unit in made[name] or []] for name in ids if name in made}
    others = [excerpt.rest for excerpt in _excerpts(context, "valid")]
    distances = {name: _distances(context, found, rows) for name, rows in {**ids, OTHERS: others}.items()}
    rows, figures = _figures_table(context, found, ids, judged, distances, times)
    absent = [name for name in SYSTEMS if name not in ids]
    tests = _tests_table(context, found, ids, judged, distances)
    return Section([*_intro(context, found, absent), "", *rows, "", *tests], figures)


def _judged(context: Context, found: Sequence[Excerpt], ids: Sequence[list[int]]) -> list[float] | None:
    return context.units("coherence").of(
        [_judge_key(context, excerpt, row) for excerpt, row in zip(found, ids, strict=True)]
    )


def _distances(context: Context, found: Sequence[Excerpt], ids: Sequence[list[int]]) -> dict[str, Any]:
    """Return MAUVE's values by the role of the features; a role without values is left out."""
    keys = {role: _mauve_key(context, role, found, ids) for role in FEATURES if context.has(role)}
    return {role: context.units("mauve")[key] for role, key in keys.items() if key in context.units("mauve")}


def _counts(texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    return [[ngram_counts(text, n=n) for n in LENGTHS] for text in texts]


def _figures_table(
    context: Context,
    found: Sequence[Excerpt],
    ids: Mapping[str, list[list[int]]],
    judged: Mapping[str, Any],
    distances: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, list[float]],
) -> tuple[list[str], dict[str, Figure]]:
    clusters = [excerpt.article for excerpt in found]
    rows: list[list[str]] = []
    figures: dict[str, Figure] = {}
    for name, each in ids.items():
        counts = _counts(_texts(context, each))
        table_of = np.asarray(counts, dtype=float).reshape(len(counts), -1)
        varied = Figure(*stats.Bootstrap({"": table_of}, clusters=clusters, resamples=2000).interval("", _micro))
        likely = stats.Bootstrap({"": score_table(judged[name])}, clusters=clusters, resamples=2000)
        figures[f"{name}, diversity"], figures[f"{name}, coherence"] = varied, Figure(*likely.interval("", mean))
        repeated = [f"{100 * repetition([row[i] for row in counts]):.1f}" for i in range(len(LENGTHS))]
        close = {role: _mauve_figure(value) for role, value in distances[name].items() if name != HUMAN}
        figures |= {f"{name}, MAUVE by {role}": value for role, value in close.items()}
        spent = f"{np.median(times[name]):.1f}" if name in times else ""
        cells = [_cell(figures[f"{name}, diversity"], 3), _cell(figures[f"{name}, coherence"], 2)]
        rows.append([name, *repeated, *cells, *_mauve_cells(close), spent])
    last = {role: _mauve_figure(value) for role, value in distances[OTHERS].items()}
    rows.append([OTHERS, *[""] * 5, *_mauve_cells(last), ""])
    head = ["", *(f"rep-{n}" for n in LENGTHS), "diversity", "coherence", *FEATURES.values(), "CPU ms per token"]
    return table(head, rows), figures


def _micro(counts: Any) -> Any:
    """Return the diversity of summed counts `(..., 2 * lengths)`."""
    return np.prod([counts[..., i] / np.maximum(counts[..., i + 1], 1) for i in range(0, counts.shape[-1], 2)], axis=0)


def _mauve_figure(values: Mapping[str, list[float]]) -> Figure:
    """Return the mean over seeds, more and less 1.96 standard errors of the resamples, in [0, 1]."""
    value, error = float(np.mean(values["seeds"])), 1.96 * float(np.std(values["resampled"], ddof=1))
    return Figure(value, max(0.0, value - error), min(1.0, value + error))


def _mauve_cells(close: Mapping[str, Figure]) -> list[str]:
    return [_cell(close[role], 2) if role in close else "" for role in FEATURES]


def _cell(figure: Figure, digits: int) -> str:
    value, low, high = figure
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _tests_table(
    context: Context,
    found: Sequence[Excerpt],
    ids: Mapping[str, list[list[int]]],
    judged: Mapping[str, Any],
    distances: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Return the paired differences of all systems from the control, with Holm's p over each column."""
    clusters = [excerpt.article for excerpt in found]
    varied = {name: [diversity([row]) for row in _counts(_texts(context, each))] for name, each in ids.items()}
    names = [name for name in ids if name not in (CONTROL, HUMAN)]
    columns = [
        _differences(varied[CONTROL], {name: varied[name] for name in names}, clusters, 3),
        _differences(judged[CONTROL], {name: judged[name] for name in names}, clusters, 2),
        *(_mauve_differences({name: distances[name] for name in (CONTROL, *names)}, role) for role in FEATURES),
    ]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return table([f"less {CONTROL}", "diversity per text", "coherence", *FEATURES.values()], rows)


def _differences(
    control: Sequence[float], systems: Mapping[str, Sequence[float]], clusters: Sequence[int], digits: int
) -> dict[str, str]:
    """Return mean differences with Holm's p of sign-flip tests over articles, and the detectable difference."""
    apart = {name: np.asarray(values) - np.asarray(control) for name, values in systems.items()}
    tests = {name: stats.sign_flip(values, clusters=clusters) for name, values in apart.items()}
    adjusted = dict(zip(tests, stats.holm([test.p for test in tests.values()]).tolist(), strict=True))
    cells = {}
    for name, values in apart.items():
        sums = stats.by_cluster(values[:, None], clusters)[:, 0]
        error = float((sums**2).sum()) ** 0.5 / len(values)
        found = stats.detectable_by_error(error, units=len(sums), apart=tests[name].units) if error else None
        told = "detectable: none" if found is None else f"detectable {found:.{digits}f}"
        cells[name] = f"{values.mean():+.{digits}f}, Holm's p {p_text(adjusted[name])}; {told}"
    return cells


def _mauve_differences(distances: Mapping[str, Mapping[str, Any]], role: str) -> dict[str, str]:
    """Return differences of MAUVE with intervals from the same resamples."""
    cells = {}
    for name, each in distances.items():
        if name == CONTROL or role not in each or role not in distances[CONTROL]:
            continue
        control = distances[CONTROL][role]
        value = float(np.mean(each[role]["seeds"]) - np.mean(control["seeds"]))
        error = 1.96 * float(np.std(np.subtract(each[role]["resampled"], control["resampled"]), ddof=1))
        cells[name] = f"{value:+.2f} [{value - error:+.2f}, {value + error:+.2f}]"
    return cells


def _intro(context: Context, found: Sequence[Excerpt], absent: Sequence[str]) -> list[str]:
    sizes, articles = context.sizes, len({excerpt.article for excerpt in found})
    judge = "the judge" if context.has("judge") else "the model itself"
    lines = [
        f"n = {len(found)} paragraphs from {articles} articles of the test set of WikiText-2: prefixes of {sizes['prefix']} tokens, continued by",
        f"exactly {sizes['tokens']} (the end of text is ruled out, for all alike); the mark of rare words is left out of the true continuations.",
        "Settings are those of the papers: alpha 0.1 for the masks of CD, amateur temperature 1, DoLa with the final norm. Sampling has one",
        "seed per text. rep-n in percent and diversity over all texts; *coherence* is the mean log-likelihood of a continuation after its",
        f"prefix in nats per token, by {judge}; repetition raises it. MAUVE (mauve-text, its defaults) compares continuations without",
        f"prefixes with the true ones: mean of {SEEDS} seeds of the clustering, 1.96 standard errors over {RESAMPLES} resamples; with n = {len(found)} it is coarse,",
        "and biased: greedy texts show whether it sees repetition, human texts of other articles what another subject does. Intervals and tests (sign-flip)",
        "take an article as the unit. CPU time is that of one process on a machine with other load, so it ranks no closer than that.",
    ]
    if not can_compare():
        lines.append("MAUVE is missing where the package mauve-text is not installed.")
    if absent:
        lines.append(f"Not run yet: {', '.join(absent)}.")
    return lines


LINE = Line(
    name="openended",
    title="Open-ended continuation",
    question="Which methods avoid repetition, stay coherent, and come close to what people write?",
    order=20,
    needs=("model",),
    full={"texts": 100, "prefix": 32, "tokens": 128, "batch": 25},
    small={"texts": 4, "prefix": 8, "tokens": 10, "batch": 2},
    revision=1,
    run=run,
    render=render,
    flags=("amateur", "judge", "embedder", "data"),
)
