"""Contrast two prompts that differ in one attribute, in a paraphrase, or not at all, by contrastive input decoding."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import DecodingConfig, generate_kwargs
from contralto.eval import stats
from contralto.eval.stats.counts import mean, score_table
from real.closeness import embed
from real.line import Context, Figure, Line, Section
from real.pairs import WORDS, Pair, pairs
from real.tables import mean_cell, p_text, table

LAMBDAS = (1.0, 3.0, 10.0, 50.0)
KINDS = ("attribute", "paraphrase")
Continuation = dict[str, Any]
"""The text of a continuation, its tokens, and their mean log-probability after the prompt without contrast."""


def run(context: Context) -> None:
    """Continue every prompt greedily, then by contrast with the other prompt of its pair.

    Args:
        context: The context of the line.
    """
    every = pairs(context.sizes["templates"])
    for lam in (0.0, *LAMBDAS):
        asked = list(dict.fromkeys(_asked(every, lam)))
        context.units().fill(
            [_key(context, *each, lam) for each in asked],
            lambda batch, asked=asked, lam=lam: _continue(context, [asked[i] for i in batch], lam),  # type: ignore[misc]
            title=f"lambda {lam:g}",
            batch_size=context.sizes["batch"],
        )
    if context.has("embedder"):
        texts = _all_texts(context, every)
        context.units("distances").fill(
            [_distance_key(context, a, b) for a, b in texts],
            lambda batch: _distances(context, [texts[i] for i in batch]),
            title="distances",
            batch_size=16,
        )


def _asked(every: Sequence[Pair], lam: float) -> list[tuple[str, str | None]]:
    """Return the prompts with those that they are contrasted with; identical pairs only at the largest lambda."""
    if not lam:
        return [(prompt, None) for pair in every for prompt in (pair.first, pair.second)]
    used = [pair for pair in every if pair.kind != "identical" or lam == LAMBDAS[-1]]
    return [each for pair in used for each in ((pair.first, pair.second), (pair.second, pair.first))]


def _key(context: Context, prompt: str, other: str | None, lam: float) -> dict[str, Any]:
    return context.key("model", prompt=prompt, other=other, lam=lam, tokens=context.sizes["tokens"])


def _continue(context: Context, batch: Sequence[tuple[str, str | None]], lam: float) -> list[Continuation]:
    model, tokenizer, tokens = context.model(), context.tokenizer(), context.sizes["tokens"]
    inputs = _encoded(context, [prompt for prompt, _ in batch])
    how: dict[str, Any] = {}
    if lam:
        contrast = _encoded(context, [other or "" for _, other in batch])
        config = DecodingConfig.from_options(method="cid", contrast_prompt="{prompt}", lam=lam)
        how = generate_kwargs(config, DecodingBatch(model, (), inputs, (contrast,)))
    output = model.generate(
        **inputs,
        **how,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    chosen = output.sequences[:, inputs["input_ids"].shape[1] :]
    log_p = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1).mean(-1)
    texts = tokenizer.batch_decode(chosen, skip_special_tokens=True)
    return [
        {"text": text, "ids": ids, "log_p": round(value, 5)}
        for text, ids, value in zip(texts, chosen.tolist(), log_p.tolist(), strict=True)
    ]


def _encoded(context: Context, texts: Sequence[str]) -> dict[str, Any]:
    encoded = context.tokenizer()(list(texts), return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


# --------------------------------------------------------------------------------------------------------- semantic distance


def _both(context: Context, pair: Pair, lam: float) -> tuple[Continuation, Continuation]:
    """Return the continuations of both prompts of a pair, each contrasted with the other prompt."""
    sides = ((pair.first, pair.second), (pair.second, pair.first))
    first, second = (context.units()[_key(context, prompt, other if lam else None, lam)] for prompt, other in sides)
    return first, second


def _all_texts(context: Context, every: Sequence[Pair]) -> list[tuple[str, str]]:
    """Return the two continuations of each pair at each lambda."""
    used = [pair for pair in every if pair.kind in KINDS]
    both = [_both(context, pair, lam) for lam in (0.0, *LAMBDAS) for pair in used]
    return list(dict.fromkeys((first["text"], second["text"]) for first, second in both))


def _distance_key(context: Context, first: str, second: str) -> dict[str, Any]:
    return context.key("embedder", first=first, second=second)


def _distances(context: Context, texts: Sequence[tuple[str, str]]) -> list[float]:
    """Return one less the cosine of the embeddings of two continuations."""
    first, second = (embed(context.path("embedder"), side, batch_size=16) for side in zip(*texts, strict=True))
    return [round(max(0.0, 1 - float(a @ b)), 6) for a, b in zip(first, second, strict=True)]


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    every = pairs(context.sizes["templates"])
    for lam in (0.0, *LAMBDAS):
        if context.units().of([_key(context, *each, lam) for each in _asked(every, lam)]) is None:
            return None
    rows: list[list[str]] = []
    figures: dict[str, Figure] = {}
    measured = {(kind, lam): _measure(context, every, kind, lam) for kind in KINDS for lam in (0.0, *LAMBDAS)}
    tests = _tests(measured)
    for (kind, lam), values in measured.items():
        shares = {
            name: stats.proportion(values[name], clusters=values["pairs"]) for name in ("changed", "own", "other")
        }
        figures |= {f"{kind}, lambda {lam:g}, {name}": Figure(*share[:3]) for name, share in shares.items()}
        apart = _mean_text(values["distances"]) if values["distances"] else "no embedder"
        plain = [mean_cell(values["new"], digits=2), _by_pair(values["log_p"], values["pairs"])]
        cells = [*map(str, shares.values()), tests.get((kind, lam), ""), apart, *plain]
        rows.append([kind, f"{lam:g}" if lam else "greedy", *cells])
    head = ["pairs", "lambda", "changed", "names its own", "names the other's", "own less other's, against greedy"]
    head += ["distance of the two texts", "new words", "log p"]
    found = [*_intro(context, every), "", *table(head, rows), "", *_against_paraphrases(measured)]
    return Section([*found, "", *_examples(context, every)], figures)


def _measure(context: Context, every: Sequence[Pair], kind: str, lam: float) -> dict[str, list[Any]]:
    """Return the measures of each prompt of a kind's pairs, and the distances of each pair."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("changed", "own", "other", "new", "log_p", "pairs", "distances")
    }
    for pair in (each for each in every if each.kind == kind):
        both, greedy = _both(context, pair, lam), _both(context, pair, 0.0)
        known = _words(greedy[0]["text"]) | _words(greedy[1]["text"])
        for side, (made, plain) in enumerate(zip(both, greedy, strict=True)):
            # Both prompts of a paraphrased pair are about the first person.
            mine = pair.attributes[side if kind == "attribute" else 0]
            theirs = pair.attributes[1 - side if kind == "attribute" else 1]
            said = _words(made["text"])
            found["changed"].append(made["ids"] != plain["ids"])
            found["own"].append(bool(said & WORDS[mine]))
            found["other"].append(bool(said & WORDS[theirs]))
            found["new"].append(float(len(said - known)))
            found["log_p"].append(made["log_p"])
            found["pairs"].append(pair.item)
        if context.has("embedder"):
            key = _distance_key(context, both[0]["text"], both[1]["text"])
            found["distances"] += [context.units("distances")[key]] if key in context.units("distances") else []
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _tests(measured: Mapping[tuple[str, float], Mapping[str, list[Any]]]) -> dict[tuple[str, float], str]:
    """Return the exact tests of 'names its own' less 'names the other's' against greedy, with Holm's p over the table."""
    found = {}
    for (kind, lam), values in measured.items():
        if lam:
            apart = _own_less_other(values) - _own_less_other(measured[kind, 0.0])
            test = stats.sign_flip(apart, clusters=values["pairs"])
            sums = stats.by_cluster(apart[:, None], values["pairs"])
            error = float((sums**2).sum()) ** 0.5 / len(apart)
            least = stats.detectable_by_error(error, units=len(sums), apart=test.units) if test.units else None
            found[kind, lam] = (float(apart.mean()), test.p, least)
    adjusted = stats.holm([p for _, p, _ in found.values()]).tolist()
    return {
        key: f"{value:+.3f}, Holm's p {p_text(p)}; "
        + ("detectable: none" if least is None else f"detectable {least:.3f}")
        for (key, (value, _, least)), p in zip(found.items(), adjusted, strict=True)
    }


def _own_less_other(values: Mapping[str, list[Any]]) -> Any:
    return np.asarray(values["own"], dtype=float) - np.asarray(values["other"], dtype=float)


def _by_pair(values: Sequence[float], clusters: Sequence[int]) -> str:
    value, low, high = stats.Bootstrap({"": score_table(values)}, clusters=clusters, resamples=2000).interval("", mean)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _mean_text(values: Sequence[float]) -> str:
    return mean_cell(values, digits=3)


def _against_paraphrases(measured: Mapping[tuple[str, float], Mapping[str, list[Any]]]) -> list[str]:
    """Return whether pairs that differ in an attribute come apart further than paraphrases do."""
    apart = {}
    for lam in (0.0, *LAMBDAS):
        first, second = (measured[kind, lam]["distances"] for kind in KINDS)
        if not first or len(first) != len(second):
            return ["Distances were not measured: they need an embedder."]
        apart[lam] = np.asarray(first) - np.asarray(second)
    tests = [stats.sign_flip(values).p for values in apart.values()]
    rows = []
    for (lam, values), p in zip(apart.items(), stats.holm(tests).tolist(), strict=True):
        drawn = stats.Bootstrap({"": score_table(values.tolist())}, resamples=2000).interval("", mean)
        shown = f"{drawn[0]:+.3f} [{drawn[1]:+.3f}, {drawn[2]:+.3f}]"
        rows.append([f"{lam:g}" if lam else "greedy", shown, p_text(p)])
    return table(["lambda", "distance of attribute pairs less that of paraphrases", "Holm's p"], rows)


def _examples(context: Context, every: Sequence[Pair]) -> list[str]:
    """Return the continuations of the first template, for every attribute."""
    shown = [pair for pair in every if pair.kind == "attribute"][:4]
    rows = []
    for pair in shown:
        for side, (prompt, made) in enumerate(zip((pair.first, pair.second), _both(context, pair, 10.0), strict=True)):
            greedy = _both(context, pair, 0.0)[side]
            rows.append([_shown(prompt), _shown(greedy["text"]), _shown(made["text"])])
    return ["The first template, not chosen for its texts:", "", *table(["prompt", "greedy", "lambda 10"], rows)]


def _shown(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _intro(context: Context, every: Sequence[Pair]) -> list[str]:
    count = sum(pair.kind == "attribute" for pair in every)
    same = [pair for pair in every if pair.kind == "identical"]
    equal = sum(_both(context, pair, LAMBDAS[-1])[0]["ids"] == _both(context, pair, 0.0)[0]["ids"] for pair in same)
    return [
        f"{count} pairs of prompts (templates with man/woman, young/old, rich/poor, American/Chinese), each continued in both directions by",
        f"{context.sizes['tokens']} tokens, greedily and by `log p(v | x) + lambda (p(v | x) - p(v | x'))`. *changed*: another text than greedy's; *names",
        "its own*: a word that names the attribute of its own prompt, from lists written down before the run (`benchmarks/real/pairs.py`);",
        "*new words*: words in neither greedy continuation of the pair; *log p*: mean log-probability of its tokens without contrast, nats;",
        "*distance*: one less the cosine of the two continuations' sentence embeddings. Controls: the same prompts paraphrased, whose",
        f"*other's* attribute is the one of the attribute pair; and pairs of identical prompts, of which {equal} of {len(same)} give greedy's text at",
        f"lambda {LAMBDAS[-1]:g}. Intervals and tests (sign-flip) take a pair as the unit; its own test is of *names its own* less *names the other's*.",
        "The formula was made without the paper's normalisation of lambda (`contralto.decoding.rules`): its values are not these.",
    ]


LINE = Line(
    name="inputs",
    title="Contrastive input decoding",
    question="Does contrasting two prompts that differ in one attribute surface what greedy continuations hide?",
    order=40,
    needs=("model",),
    full={"templates": 10, "tokens": 12, "batch": 16},
    small={"templates": 1, "tokens": 4, "batch": 4},
    revision=1,
    run=run,
    render=render,
    flags=("embedder",),
)
