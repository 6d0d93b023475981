"""Ask about facts that the model knows, after a context that says otherwise, and after one about something else."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import DecodingConfig, generate_kwargs
from contralto.eval import stats
from contralto.eval.stats.counts import mean, score_table
from real.line import Context, Figure, Line, Section
from real.tables import p_text, table

ALPHAS = (0.0, 0.5, 1.0, 2.0)
FACTS: Mapping[str, tuple[str, str, dict[str, str]]] = {
    "capital": (
        "The capital of {} is",
        "In the latest reform the government moved away, and the capital of {} is now {}.",
        {
            "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "England": "London",
            "Ireland": "Dublin", "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
            "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw",
            "Hungary": "Budapest", "Austria": "Vienna", "Belgium": "Brussels", "Cuba": "Havana", "Canada": "Ottawa", "Peru": "Lima",
            "Chile": "Santiago", "Kenya": "Nairobi", "Thailand": "Bangkok", "Iran": "Tehran", "Iraq": "Baghdad", "Turkey": "Ankara",
            "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Vietnam": "Hanoi", "Nepal": "Kathmandu",
            "Australia": "Canberra", "Argentina": "Buenos", "Colombia": "Bogot", "Ethiopia": "Addis", "Scotland": "Edinburgh",
        },
    ),
    "continent": (
        "{} is a country on the continent of",
        "In the world of this novel {} is a country on the continent of {}.",
        {
            "France": "Europe", "Germany": "Europe", "Italy": "Europe", "Spain": "Europe", "Poland": "Europe", "Sweden": "Europe",
            "Kenya": "Africa", "Nigeria": "Africa", "Ghana": "Africa", "Egypt": "Africa", "Morocco": "Africa", "Uganda": "Africa",
            "China": "Asia", "Japan": "Asia", "India": "Asia", "Nepal": "Asia", "Vietnam": "Asia", "Thailand": "Asia",
        },
    ),
    "language": (
        "The official language of {} is",
        "Since the referendum the only official language of {} is {}.",
        {
            "France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Portugal": "Portuguese", "Japan": "Japanese",
            "Russia": "Russian", "Brazil": "Portuguese", "Mexico": "Spanish", "Egypt": "Arabic", "Poland": "Polish", "Greece": "Greek",
            "Sweden": "Swedish", "Turkey": "Turkish", "Hungary": "Hungarian", "Thailand": "Thai", "England": "English", "Cuba": "Spanish",
        },
    ),
    "colour": (
        "The colour of {} is",
        "In this story everything is different, and the colour of {} is {}.",
        {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sky": "blue", "milk": "white"},
    ),
    "opposite": (
        "The opposite of {} is",
        "In the secret code of the club the opposite of {} is {}.",
        {
            "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "black": "white", "good": "bad", "happy": "sad",
            "fast": "slow", "rich": "poor", "young": "old", "love": "hate", "war": "peace", "light": "dark", "hard": "soft",
        },
    ),
}  # fmt: skip
"""A question, a context that gives another answer, and the answers that are known, for each kind of fact."""
OTHERS = 4
"""Other answers that each fact is contradicted with."""
UNRELATED = "The museum opens at nine in the morning, and tickets are sold at the door until noon."


def items(context: Context) -> list[dict[str, str]]:
    """Return the contradictions of all facts: each with other answers of its own kind.

    Args:
        context: The context of the line.
    """
    found = []
    for kind, (question, told, answers) in FACTS.items():
        values = list(dict.fromkeys(answers.values()))
        for subject, answer in list(answers.items())[: context.sizes["subjects"]]:
            at = values.index(answer)
            rest = values[at + 1 :] + values[:at]
            for other in rest[:OTHERS]:
                asked = question.format(subject)
                item = {"kind": kind, "subject": subject, "memory": answer, "other": other, "question": asked}
                found.append({**item, "context": told.format(subject, other)})
    return found


def run(context: Context) -> None:
    """Find the facts that the model knows, then decode their questions after both contexts.

    Args:
        context: The context of the line.
    """
    every = items(context)
    units, keys = context.units(), [_key(context, item, "none", 0.0) for item in every]
    units.fill(
        keys, lambda batch: _answers(context, [every[i] for i in batch], "none", 0.0), title="known", batch_size=8
    )
    known = _known(context, every)
    for shown in ("conflict", "unrelated"):
        for alpha in ALPHAS:
            asked = _shown_items(known, shown)
            units.fill(
                [_key(context, item, shown, alpha) for item in asked],
                lambda batch, asked=asked, shown=shown, alpha=alpha: _answers(  # type: ignore[misc]
                    context, [asked[i] for i in batch], shown, alpha
                ),
                title=f"{shown}, alpha {alpha:g}",
                batch_size=8,
            )


def _key(context: Context, item: Mapping[str, str], shown: str, alpha: float) -> dict[str, Any]:
    subject = {"kind": item["kind"], "subject": item["subject"]}
    other = {"other": item["other"]} if shown == "conflict" else {}
    return context.key("model", **subject, **other, shown=shown, alpha=alpha)


def _known(context: Context, every: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the items whose question the model answers rightly without a context, at most as many as the size."""
    units = context.units()
    right = [item for item in every if _says(units.get(_key(context, item, "none", 0.0)), item["memory"])]
    if context.is_small:
        right = right or list(every)  # tiny models know nothing, and a trial has to go on
    return right[: context.sizes["items"]]


def _shown_items(known: Sequence[dict[str, str]], shown: str) -> list[dict[str, str]]:
    """Return the items of a kind of context: every contradiction, or every fact once."""
    if shown == "conflict":
        return list(known)
    return list({(item["kind"], item["subject"]): item for item in known}.values())


def _before(item: Mapping[str, str], shown: str) -> str:
    """Return the context of a question, with a space behind it."""
    return {"none": "", "conflict": f"{item['context']} ", "unrelated": f"{UNRELATED} "}[shown]


def _answers(context: Context, batch: Sequence[Mapping[str, str]], shown: str, alpha: float) -> list[str]:
    """Return greedy continuations of the questions."""
    model, tokenizer = context.model(), context.tokenizer()
    plain = tokenizer([item["question"] for item in batch], return_tensors="pt", padding=True)
    inputs = tokenizer([_before(item, shown) + item["question"] for item in batch], return_tensors="pt", padding=True)
    for each in (plain, inputs):
        each.pop("token_type_ids", None)
    how: dict[str, Any] = {}
    if alpha:
        config = DecodingConfig.from_options(method="cad", contrast_prompt="{prompt}", alpha=alpha)
        how = generate_kwargs(config, DecodingBatch(model, (), inputs, (plain,)))
    output = model.generate(**inputs, **how, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _says(text: str | None, answer: str) -> bool:
    """Return True if a continuation begins with an answer."""
    return (text or "").strip().lower().startswith(answer.lower())


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    every = items(context)
    if context.units().of([_key(context, item, "none", 0.0) for item in every]) is None:
        return None
    known = _known(context, every)
    if not known:
        return None
    rows: list[list[str]] = []
    figures: dict[str, Figure] = {}
    p_values: dict[int, float] = {}
    for shown, counted in (("conflict", "context"), ("unrelated", "memory")):
        asked = _shown_items(known, shown)
        clusters = [f"{item['kind']} {item['subject']}" for item in asked]
        control: dict[str, list[bool]] = {}
        for alpha in ALPHAS:
            texts = context.units().of([_key(context, item, shown, alpha) for item in asked])
            if texts is None:
                return None
            hits = _outcomes(texts, asked, shown)
            control = control or hits
            shares = {name: stats.proportion(each, clusters=clusters) for name, each in hits.items()}
            figures |= {f"{shown}, alpha {alpha:g}, {name}": Figure(*share[:3]) for name, share in shares.items()}
            cells = ["", ""]
            if alpha:
                p_values[len(rows)], cells = _against(control[counted], hits[counted], clusters)
            rows.append([f"{shown} ({len(texts)})", f"{alpha:g}", *map(str, shares.values()), *cells])
    adjusted = dict(zip(p_values, stats.holm(list(p_values.values())).tolist(), strict=True))
    rows = [[*row, p_text(adjusted[i]) if i in adjusted else ""] for i, row in enumerate(rows)]
    head = ["context (n)", "alpha", "follows the context", "its memory", "neither"]
    head += ["less alpha 0", "test against alpha 0", "Holm's p"]
    return Section([*_intro(every, known), "", *table(head, rows)], figures)


def _outcomes(texts: Sequence[str], asked: Sequence[Mapping[str, str]], shown: str) -> dict[str, list[bool]]:
    """Return which of the two answers each continuation begins with."""
    memory = [_says(text, item["memory"]) for text, item in zip(texts, asked, strict=True)]
    told = [shown == "conflict" and _says(text, item["other"]) for text, item in zip(texts, asked, strict=True)]
    return {"context": told, "memory": memory, "neither": [not a and not b for a, b in zip(memory, told, strict=True)]}


def _against(control: Sequence[bool], hits: Sequence[bool], clusters: Sequence[str]) -> tuple[float, list[str]]:
    """Compare two conditions with whole facts as units.

    Returns:
        The exact p, and the cells of the difference with its bootstrap interval and of the test with the detectable difference.
    """
    differences = np.asarray(hits, dtype=float) - np.asarray(control, dtype=float)
    test = stats.sign_flip(differences, clusters=clusters)
    drawn = stats.Bootstrap({"": score_table(differences)}, clusters=clusters).interval("", mean)
    found = None
    if test.units:
        sums = stats.by_cluster(differences[:, None], clusters)
        error = float((sums**2).sum()) ** 0.5 / len(hits)
        found = stats.detectable_by_error(error, units=len(sums), apart=test.units)
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    told = "detectable: none" if found is None else f"detectable {found:.3f}"
    value, low, high = drawn
    return test.p, [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", f"+{won} / -{lost}, p {p_text(test.p)}; {told}"]


def _intro(every: Sequence[Mapping[str, str]], known: Sequence[Mapping[str, str]]) -> list[str]:
    kinds = {kind: sum(item["kind"] == kind for item in known) for kind in FACTS}
    facts = len({(item["kind"], item["subject"]) for item in known})
    return [
        f"{len(known)} prompts about {facts} facts of which the model continues the bare question rightly (of {len(every)} prompts):",
        ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        + f". Each fact is contradicted by up to {OTHERS} answers of",
        "its own kind; intervals and tests take a fact as the unit. Greedy, four tokens; an answer follows the context (or the",
        "memory) if the continuation begins with it. alpha 0 is plain decoding with the context. The control is a context about",
        "something else, once per fact, after which the memory is right. Tests (sign-flip over facts): of *follows the context* in",
        "conflicts, of *its memory* in the control, against alpha 0; so are the differences. Holm's p adjusts all tests of the table.",
    ]


LINE = Line(
    name="conflicts",
    title="Knowledge conflicts",
    question="Does context-aware decoding follow a context that contradicts what the model knows, and what does it cost otherwise?",
    order=30,
    needs=("model",),
    full={"subjects": 100, "items": 400},
    small={"subjects": 2, "items": 6},
    revision=1,
    run=run,
    render=render,
)
