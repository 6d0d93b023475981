"""Rank the endings of HellaSwag by contrast with a trained and with an untrained amateur."""

import gzip
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contralto.decoding.executors.score import FLOOR
from contralto.decoding.rules import contrastive_decoding
from contralto.eval.stats import holm, mcnemar_exact
from real.endings import Choice, encode, hidden_states, logits_of
from real.line import Context, Line, Section
from real.tables import against, share_cell, share_figure, table

BETAS = (0.25, 0.5, 1.0)
ALPHA = 0.1
SEED = 0
NO_CONTEXT = "no context"
OPPONENTS = {
    "amateur": "trained amateur",
    "pruned": "untrained, pruned amateur",
    NO_CONTEXT: "the model without the context",
}
"""What is subtracted: other models by role, and the control that needs none, the pointwise mutual information of `acc_mutual_info`."""
POSITIONS = 8
"""Positions whose conditions are computed at a time."""
Conditions = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""The scores of the chosen tokens by condition, from the logits of the model, those of the amateur, and the tokens."""
Totals = dict[str, list[float]]
"""The total score of each ending, by condition."""


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the published file, gzipped, which is read once.

    Args:
        path: validation.jsonl.gz.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts(document: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the context and the endings of a row, cleaned as lm-eval does.

    Args:
        document: The row.
    """
    from lm_eval.tasks.hellaswag.utils import preprocess

    query = preprocess(f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}")
    return query, [preprocess(ending) for ending in document["endings"]]


def choices(context: Context, count: int) -> list[Choice]:
    """Return the first rows of a seeded shuffle, cleaned and encoded as lm-eval does.

    Args:
        context: The context of the line.
        count: The number of rows.
    """
    rows = documents(context.file("hellaswag", "validation.jsonl.gz"))
    order = list(range(len(rows)))
    random.Random(SEED).shuffle(order)
    tokenizer, found = context.tokenizer(), []
    for number in order[:count]:
        found.append(encode(tokenizer, number, *texts(rows[number]), int(rows[number]["label"])))
    return found


def run(context: Context) -> None:
    """Compute hidden states of each model once, then every condition from them.

    Args:
        context: The context of the line.
    """
    rows = choices(context, context.sizes["rows"])
    roles = ["model", *_opponents(context)]
    for role in roles:
        hidden_states(
            context.model(_model(role)),
            _without_context(context, rows) if role == NO_CONTEXT else rows,
            _states(context, role),
            batch_size=context.sizes["batch"],
            title=f"{role}, states",
        )
    _fill(context, rows, "model", _alone)
    for role in roles[1:]:
        _fill(context, rows, role, _contrasted)
    _check(context, rows[: context.sizes["checked"]])


def _opponents(context: Context) -> list[str]:
    return [role for role in OPPONENTS if role == NO_CONTEXT or context.has(role)]


def _model(role: str) -> str:
    return "model" if role == NO_CONTEXT else role


def _without_context(context: Context, rows: Sequence[Choice]) -> list[Choice]:
    """Return the rows with lm-eval's empty context, the token that begins a text."""
    tokenizer = context.tokenizer()
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [row._replace(context=[first]) for row in rows]


def _states(context: Context, role: str) -> Path:
    return context.scratch / (f"states-{context.digest(_model(role))}" + ("-alone" if role == NO_CONTEXT else ""))


def _keys(context: Context, numbers: Sequence[int], role: str) -> list[dict[str, Any]]:
    roles = ("model",) if _model(role) == "model" else ("model", role)
    what = {"subtracted": role} if role == NO_CONTEXT else {}
    return [context.key(*roles, row=number, **what) for number in numbers]


def _fill(context: Context, rows: Sequence[Choice], role: str, conditions: Conditions) -> None:
    def totals(batch: list[int]) -> list[Totals]:
        choice = rows[batch[0]]
        main = logits_of(context.model(), _states(context, "model"), choice)
        other = logits_of(context.model(_model(role)), _states(context, role), choice) if role != "model" else main
        chosen = choice.chosen[:, None]
        # A few positions at a time, whose logits stay in a CPU's cache: two thirds of the time.
        parts = [
            conditions(*each) for each in zip(*(torch.split(x, POSITIONS) for x in (main, other, chosen)), strict=True)
        ]
        tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        made = {name: _totals(values, choice) for name, values in tokens.items()}
        return [{"label": [choice.label], "length": [*map(float, choice.lengths)], **made}]

    context.units().fill(_keys(context, [row.number for row in rows], role), totals, title=f"{role}, conditions")


def _alone(main: Tensor, _: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return the tokens' scores of the model alone: plain, the mask alone, and sharpened as by an amateur that knows nothing."""
    found = {"plain": _picked(main.log_softmax(-1), chosen)}
    masked = contrastive_decoding(main, main, beta=0, alpha=ALPHA)
    found["mask alone, renormalised"] = _picked(masked.log_softmax(-1), chosen)
    found["mask alone, raw"] = _picked(masked, chosen)
    found["excluded"] = (masked.gather(-1, chosen).squeeze(-1) == -torch.inf).float()
    uniform = torch.zeros_like(main)
    for beta in BETAS:
        scores = contrastive_decoding(main, uniform, beta=beta, alpha=0)
        found[f"uniform amateur, beta {beta:g}, renormalised"] = _picked(scores.log_softmax(-1), chosen)
    return found


def _contrasted(main: Tensor, other: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return the tokens' scores of the amateur alone, and of every contrast with it."""
    found = {"amateur alone": _picked(other.log_softmax(-1), chosen)}
    for beta in BETAS:
        for mask, alpha in (("", 0.0), (", mask", ALPHA)):
            scores = contrastive_decoding(main, other, beta=beta, alpha=alpha)
            found[f"beta {beta:g}, renormalised{mask}"] = _picked(scores.log_softmax(-1), chosen)
            found[f"beta {beta:g}, raw{mask}"] = _picked(scores, chosen)
    return found


def _picked(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return the scores of the chosen tokens; an excluded token has the floor of `score`."""
    tokens = scores.gather(-1, chosen).squeeze(-1)
    return tokens.masked_fill(tokens == -torch.inf, FLOOR)


def _totals(tokens: Tensor, choice: Choice) -> list[float]:
    """Return the sum over each ending's tokens."""
    return [round(float(part.sum()), 6) for part in torch.split(tokens, choice.spans)]


# ---------------------------------------------------------------------------------------------- equality with contralto eval


def _check(context: Context, rows: Sequence[Choice]) -> None:
    """Compare totals with those of `contralto eval`'s model, which encodes and reads the rows by itself."""
    role = next((role for role in ("amateur", "pruned") if context.has(role)), None)
    key = _check_key(context, [row.number for row in rows], role)
    if key in context.units("checks"):
        return
    settings: dict[str, tuple[str, str, dict[str, Any]]] = {"plain": ("model", "plain", {})}
    if role:
        cd = {"method": "cd", "amateur": context.path(role), "beta": 0.5}
        settings["renormalised"] = (role, "beta 0.5, renormalised", cd)
        settings["raw"] = (role, "beta 0.5, raw", {**cd, "score": "raw"})
        settings["mask"] = (role, "beta 0.5, renormalised, mask", {**cd, "masked": True})
    apart = {name: _largest_difference(context, rows, *each) for name, each in settings.items()}
    context.units("checks").add(key, apart)


def _check_key(context: Context, numbers: Sequence[int], role: str | None) -> dict[str, Any]:
    """Return the key of a comparison with a certain amateur, or with none."""
    return context.key("model", *([role] if role else []), check=list(numbers))


def _check_line(context: Context, numbers: Sequence[int]) -> list[str]:
    """Return what the first comparison that was made found."""
    for role in [*(role for role in ("amateur", "pruned") if context.has(role)), None]:
        apart = context.units("checks").get(_check_key(context, numbers, role))
        if apart is not None:
            told = ", ".join(f"{name} {value:.1g}" for name, value in apart.items())
            amateur = f", with the {OPPONENTS[role]}" if role else ""
            return [
                f"Largest difference of a total from `contralto eval`'s over {len(numbers)} rows{amateur}: {told} nats."
            ]
    return []


def _largest_difference(
    context: Context, rows: Sequence[Choice], role: str, condition: str, options: Mapping[str, Any]
) -> float:
    from contralto.eval.models.lm import ContraltoLM

    evaluated = ContraltoLM(context.path("model"), dtype="float32", batch_size=4, device="cpu", **options)
    requests = [request for row in rows for request in _requests(context, row)]
    answers = [total for total, _ in evaluated.loglikelihood(requests, disable_tqdm=True)]
    units = context.units()
    kept = [total for key in _keys(context, [row.number for row in rows], role) for total in units[key][condition]]
    return float(max(abs(a - b) for a, b in zip(answers, kept, strict=True)))


def _requests(context: Context, row: Choice) -> list[Any]:
    """Return lm-eval's requests of a row, from its text."""
    from lm_eval.api.instance import Instance

    document = documents(context.file("hellaswag", "validation.jsonl.gz"))[row.number]
    query, endings = texts(document)
    return [Instance("loglikelihood", document, (query, f" {ending}"), i) for i, ending in enumerate(endings)]


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    rows_of = choices(context, context.sizes["rows"])
    numbers = [choice.number for choice in rows_of]
    alone = context.units().of(_keys(context, numbers, "model"))
    if alone is None:
        return None
    alone = _with_uniform_raw(context, rows_of, alone)
    plain = {normed: _hits(alone, "plain", normed=normed) for normed in (False, True)}
    systems = {f"the model, {name}" if name != "plain" else "plain": (alone, name) for name in _conditions(alone)}
    absent = []
    for role, title in OPPONENTS.items():
        found = context.units().of(_keys(context, numbers, role)) if role in _opponents(context) else None
        if found is None:
            absent.append(title)
            continue
        systems |= {
            f"{title}: {name.replace('amateur alone', 'it alone')}": (found, name) for name in _conditions(found)
        }
    rows, figures, p_values = [], {}, {}
    for title, (units, name) in systems.items():
        hits = {normed: _hits(units, name, normed=normed) for normed in (False, True)}
        figures[f"{title}, acc_norm"] = share_figure(hits[True])
        tests = [against(plain[normed], hits[normed]) for normed in (False, True)] if title != "plain" else ["", ""]
        if title != "plain":
            p_values[title] = mcnemar_exact(plain[True], hits[True]).p
        rows.append([title, share_cell(hits[False]), tests[0], share_cell(hits[True]), tests[1]])
    adjusted = dict(zip(p_values, holm(list(p_values.values())).tolist(), strict=True))
    rows = [[*row, f"{adjusted[row[0]]:.2g}" if row[0] in adjusted else ""] for row in rows]
    head = ["condition", "acc", "against plain", "acc_norm", "against plain", "Holm's p"]
    lines = [*_intro(context, numbers, alone, absent), "", *table(head, rows), *_against_no_context(systems)]
    return Section(lines, figures)


def _against_no_context(systems: Mapping[str, tuple[Sequence[Totals], str]]) -> list[str]:
    """Return tests of the trained amateur against the control that needs no amateur, both raw, by acc_norm."""
    pairs = {}
    for beta in BETAS:
        titles = [f"{OPPONENTS[role]}: beta {beta:g}, raw" for role in (NO_CONTEXT, "amateur")]
        if all(title in systems for title in titles):
            pairs[beta] = [_hits(*systems[title], normed=True) for title in titles]
    if not pairs:
        return []
    adjusted = holm([mcnemar_exact(*hits).p for hits in pairs.values()])
    tests = [
        f"beta {beta:g}: {against(*hits)}, Holm's p {p:.2g}"
        for (beta, hits), p in zip(pairs.items(), adjusted, strict=True)
    ]
    return ["", f"The trained amateur against the model without the context, raw, acc_norm: {'; '.join(tests)}."]


def _with_uniform_raw(context: Context, rows: Sequence[Choice], alone: Sequence[Totals]) -> list[Totals]:
    """Add the raw scores with a uniform amateur, which follow from the plain totals and the numbers of tokens.

    A uniform amateur of V tokens adds `beta log V` for each token, so that raw scores prefer endings of many tokens.
    """
    size = math.log(context.model().get_output_embeddings().weight.shape[0])
    found = []
    for choice, row in zip(rows, alone, strict=True):
        raw = {
            f"uniform amateur, beta {beta:g}, raw": [
                (1 + beta) * total + beta * size * span for total, span in zip(row["plain"], choice.spans, strict=True)
            ]
            for beta in BETAS
        }
        found.append({**row, **raw})
    return found


def _intro(context: Context, numbers: Sequence[int], alone: Sequence[Totals], absent: Sequence[str]) -> list[str]:
    rows, excluded = len(alone), sum(any(row["excluded"]) for row in alone)
    right = sum(row["excluded"][int(row["label"][0])] > 0 for row in alone)
    lines = [
        f"n = {rows} of the 10,042 validation rows: the first of a shuffle with seed {SEED}. Zero-shot, lm-eval's prompts, scores and",
        "metrics; acc_norm divides a total by the characters of the ending. *Renormalised* sums `log softmax` of the contrastive",
        "scores, *raw* the scores themselves, see `contralto.decoding.score`; the papers do not say which they use. *mask* applies the",
        f"plausibility constraint (alpha {ALPHA:g}), in which an excluded token scores {FLOOR:g}; it excludes a token in some ending of",
        f"{excluded / rows:.0%} of the rows, in the right ending of {right / rows:.0%}. *Uniform amateur* is the control of sharpening:",
        "the same formula without any amateur; raw, it prefers endings of many tokens. *The model without the context* in place",
        "of an amateur is the pointwise mutual information of an ending and its context (lm-eval's acc_mutual_info at beta 1, raw, but for",
        "the weight of the model); it needs no amateur. Holm's p adjusts the tests of acc_norm over the table.",
    ]
    lines += _check_line(context, numbers[: context.sizes["checked"]])
    if absent:
        lines.append(f"Not run yet: {', '.join(absent)}.")
    return lines


def _conditions(units: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in units[0] if name not in ("label", "length", "excluded")]


def _hits(units: Sequence[Totals], condition: str, *, normed: bool) -> list[bool]:
    """Return whether the ending of the largest total, divided by its characters if `normed`, is the right one."""
    hits = []
    for row in units:
        totals = [t / n if normed else t for t, n in zip(row[condition], row["length"], strict=True)]
        hits.append(totals.index(max(totals)) == int(row["label"][0]))
    return hits


LINE = Line(
    name="hellaswag",
    title="HellaSwag",
    question="Does contrastive decoding choose better endings, and does the amateur have to be trained for it?",
    order=10,
    needs=("model",),
    full={"rows": 2000, "batch": 4, "checked": 30},
    small={"rows": 6, "batch": 2, "checked": 3},
    revision=1,
    run=run,
    render=render,
    flags=("amateur", "pruned", "data"),
)
