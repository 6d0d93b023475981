"""Align a model on instructions whose fulfilment a program decides, with pairs of three origins and six losses."""

import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.hub import with_adapter
from contralto.decoding import AdaptersOff, ContrastiveDecodingLogitsProcessor
from contralto.eval.stats import holm, mcnemar_exact
from contralto.testbed.instructions import KINDS, prompts
from contralto.testbed.worlds import Split
from real.line import Context, Line, Section
from real.tables import against, share_cell, share_figure, table
from real.training import NEW_TOKENS, encode_reply, fulfilled, greedy, pairs, reply_logps, trained


class Setting(NamedTuple):
    """The pairs, the recipe of `contralto align`, the rates that are tried, and further options."""

    pairs: str
    recipe: str
    rates: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


RATES = ("1e-4", "4e-4", "1.6e-3")
"""Above most recipes' rates for adapters, which are for hundreds of steps: there are few steps."""
SETTINGS = {
    "CLAIR, SFT": Setting("clair", "dpo", RATES, (("loss_type", "sft"),)),
    "CLAIR, DPO": Setting("clair", "dpo", RATES),
    "CLAIR, APO zero": Setting("clair", "apo_zero", RATES),
    "CLAIR, CPO": Setting("clair", "cpo", RATES),
    "CLAIR, SimPO": Setting("clair", "simpo", RATES),
    "CLAIR, SparsePO": Setting("clair", "sparsepo", RATES),
    "judged, DPO": Setting("on_policy_judge", "dpo", RATES),
    "best of 4, DPO": Setting("best_of_n", "dpo", RATES),
}
CONTROL = "CLAIR, SFT"
ADAPTER = {
    "use_peft": "true",
    "lora_r": "8",
    "lora_alpha": "16",
    "lora_target_modules": "all-linear",
    "num_train_epochs": "1",
    "monitor_pairs": "0",
    "audit": "off",
    "head_metrics": "none",
    "prefix_sharing": "true",
}
SEEDS = (0, 1, 2)
CONTRASTED = ("CLAIR, SFT", "CLAIR, DPO", "CLAIR, APO zero")
"""The settings whose first seed is also decoded against itself without adapters."""


def recipe(context: Context, split: str, count: int) -> dict[str, Any]:
    """Return the recipe of the pairs, whose instructions are of the measured kinds.

    Args:
        context: The context of the line.
        split: The split of the topics.
        count: The number of prompts.
    """
    functions = "contralto.testbed.instructions"
    target = {"engine": "transformers", "model": context.path("model"), "batch_size": 32}
    target |= {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": NEW_TOKENS}
    strategies: list[Any] = ["clair"]
    if split == "train":
        strategies += ["on_policy_judge", {"use": "best_of_n", "n": 4, "scorer": f"{functions}:score"}]
    return {
        "rows": {
            "source": f"{functions}:prompts",
            "arguments": {"count": count, "split": split, "kinds": measured_kinds(context)},
        },
        "strategies": strategies,
        "roles": {
            "target": target,
            "reviser": {"engine": "function", "use": f"{functions}:revise"},
            "judge": {"engine": "function", "use": f"{functions}:judge"},
        },
        "checks": {"contrast": {}},
        "filters": {"no_op": False},
    }


def training_pairs(context: Context, strategy: str) -> list[dict[str, Any]]:
    """Return the same number of pairs of each strategy, with the columns that are trained on.

    Args:
        context: The context of the line.
        strategy: The strategy.

    Raises:
        RuntimeError: A strategy has no pairs, so that there is nothing to compare.
    """
    made = pairs(context, "train", recipe(context, "train", context.sizes["prompts"]))
    by_strategy = {s.pairs: [p for p in made if p["strategy"] == s.pairs] for s in SETTINGS.values()}
    if missing := [name for name, found in by_strategy.items() if not found]:
        if not context.is_small:
            raise RuntimeError(f"{missing[0]} made no pairs: raise the number of prompts")
        by_strategy |= dict.fromkeys(missing, by_strategy["clair"])  # a trial runs every step with what there is
    chosen = by_strategy[strategy][: min(context.sizes["pairs"], *map(len, by_strategy.values()))]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in chosen]


def asked(context: Context, split: Split, kinds: Sequence[str]) -> list[str]:
    """Return the prompts of dev or test.

    Args:
        context: The context of the line.
        split: `dev` or `test`.
        kinds: The kinds of instructions.
    """
    return [row["prompt"] for row in prompts(count=context.sizes[split], split=split, kinds=kinds)]


def screened(context: Context) -> list[dict[str, Any]]:
    """Return dev prompts of all kinds, by which those that are measured are chosen.

    Args:
        context: The context of the line.
    """
    return list(prompts(count=context.sizes["screened"], seed=1, split="dev"))


def measured_kinds(context: Context) -> list[str]:
    """Return the kinds that the model fulfils sometimes, and not always, on dev prompts.

    Args:
        context: The context of the line.
    """
    texts = context.units()[_start_key(context)]
    rows = screened(context)
    hits = fulfilled([row["prompt"] for row in rows], texts)
    shares = {kind: [hit for row, hit in zip(rows, hits, strict=True) if row["kind"] == kind] for kind in KINDS}
    found = [kind for kind, share in shares.items() if 0 < sum(share) < len(share)]
    return found if len(found) > 1 else list(KINDS)


def run(context: Context) -> None:
    """Measure the start, make the pairs, choose rates on dev, and measure three seeds on test.

    Args:
        context: The context of the line.
    """
    units, tokenizer = context.units(), context.tokenizer()
    units.fill(
        [_start_key(context)],
        lambda _: [greedy(context.model(), tokenizer, [row["prompt"] for row in screened(context)])],
        title="start, dev",
    )
    kinds = measured_kinds(context)
    units.fill([_test_start_key(context)], lambda _: [_start(context, kinds)], title="start, test")
    jobs = [(name, rate) for name, setting in SETTINGS.items() for rate in _rates(context, setting)]
    units.fill(
        [_dev_key(context, *job) for job in jobs],
        lambda batch: [_dev(context, *jobs[batch[0]], kinds)],
        title="rates",
    )
    runs = [(name, best_rate(context, name), seed) for seed in _seeds(context) for name in SETTINGS]
    units.fill(
        [_run_key(context, *job) for job in runs],
        lambda batch: [_test(context, *runs[batch[0]], kinds)],
        title="seeds",
    )


def _seeds(context: Context) -> tuple[int, ...]:
    return SEEDS[: context.sizes["seeds"]]


def _rates(context: Context, setting: Setting) -> tuple[str, ...]:
    return setting.rates[: context.sizes["rates"]]


def _sizes(context: Context) -> dict[str, Any]:
    return {name: context.sizes[name] for name in context.sizes if name not in ("seeds", "rates")}


def _start_key(context: Context) -> dict[str, Any]:
    return context.key("model", start="dev", count=context.sizes["screened"])


def _test_start_key(context: Context) -> dict[str, Any]:
    return context.key("model", start="test", **_sizes(context))


def _dev_key(context: Context, name: str, rate: str) -> dict[str, Any]:
    return context.key("model", setting=name, rate=rate, split="dev", **_sizes(context))


def _run_key(context: Context, name: str, rate: str, seed: int) -> dict[str, Any]:
    return context.key("model", setting=name, rate=rate, seed=seed, split="test", **_sizes(context))


def best_rate(context: Context, name: str) -> str:
    """Return the rate with the most dev prompts fulfilled, the lower of equals.

    Args:
        context: The context of the line.
        name: A key of `SETTINGS`.
    """
    return max(
        _rates(context, SETTINGS[name]), key=lambda rate: (context.units()[_dev_key(context, name, rate)], -float(rate))
    )


def _adapter(context: Context, name: str, rate: str, seed: int) -> Path:
    setting = SETTINGS[name]
    options = {**ADAPTER, **dict(setting.options), "learning_rate": rate, "seed": seed}
    return trained(context, setting.recipe, context.path("model"), training_pairs(context, setting.pairs), options)


def _tuned(context: Context, name: str, rate: str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    from contralto.common.hub import from_pretrained

    base = from_pretrained(AutoModelForCausalLM, context.path("model"), dtype="float32")
    return with_adapter(base, str(_adapter(context, name, rate, seed))).eval()


def _dev(context: Context, name: str, rate: str, kinds: Sequence[str]) -> int:
    questions = asked(context, "dev", kinds)
    return sum(fulfilled(questions, greedy(_tuned(context, name, rate, 0), context.tokenizer(), questions)))


def _start(context: Context, kinds: Sequence[str]) -> dict[str, Any]:
    questions = asked(context, "test", kinds)
    texts = greedy(context.model(), context.tokenizer(), questions)
    return {"texts": texts, "kinds": list(kinds), "watched": _watched(context, context.model())}


def _test(context: Context, name: str, rate: str, seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Return a tuned model's replies with and without contrast, its KL to the start, and log p of held-out pairs."""
    model, tokenizer, questions = _tuned(context, name, rate, seed), context.tokenizer(), asked(context, "test", kinds)
    texts = greedy(model, tokenizer, questions)
    contrast = ContrastiveDecodingLogitsProcessor(AdaptersOff(model), beta=0.5, alpha=0.1)
    both = []
    if seed == SEEDS[0] and name in CONTRASTED:
        both = greedy(model, tokenizer, questions, processor=contrast)
    measured = list(zip(questions, texts, strict=True))[: context.sizes["divergences"]]
    divergence = [_divergence(context, model, question, text) for question, text in measured]
    return {"texts": texts, "both": both, "watched": _watched(context, model), "divergence": divergence}


def _watched(context: Context, model: Any) -> list[list[float]]:
    """Return log p of the chosen and of the rejected reply of held-out CLAIR pairs."""
    found = []
    for row in pairs(context, "dev", recipe(context, "dev", context.sizes["held_out"])):
        sides = []
        for side in ("chosen", "rejected"):
            ids, start = encode_reply(context.tokenizer(), row["prompt"][-1]["content"], row[side][-1]["content"])
            sides.append(float(reply_logps(model, ids, start).gather(-1, ids[start:, None]).sum()))
        found.append(sides)
    return found


def _divergence(context: Context, model: Any, question: str, text: str) -> float:
    """Return KL(tuned || start) of a reply of the tuned model: the sum over its tokens."""
    ids, start = encode_reply(context.tokenizer(), question, text)
    with model.disable_adapter():
        old = reply_logps(model, ids, start)
    new = reply_logps(model, ids, start)
    return float((new.exp() * (new - old)).sum())


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    units = context.units()
    start = units.get(_test_start_key(context))
    jobs = [_dev_key(context, name, rate) for name, setting in SETTINGS.items() for rate in _rates(context, setting)]
    if start is None or units.of(jobs) is None:
        return None
    questions = asked(context, "test", start["kinds"])
    base = fulfilled(questions, start["texts"])
    runs = {
        name: [units.get(_run_key(context, name, best_rate(context, name), seed)) for seed in _seeds(context)]
        for name in SETTINGS
    }
    if any(found is None for each in runs.values() for found in each):
        return None
    count = cache(lambda text: len(context.tokenizer()(text)["input_ids"]))
    length = statistics.mean(map(count, start["texts"]))
    rows = [["start", "", "", share_cell(base), "", "", "", "", f"{length:.0f}", ""]]
    figures, p_values = {"start": share_figure(base)}, []
    for name, found in runs.items():
        for seed, one in zip(_seeds(context), found, strict=True):
            hits = fulfilled(questions, one["texts"])
            sft = fulfilled(questions, runs[CONTROL][seed]["texts"])
            figures[f"{name}, seed {seed}"] = share_figure(hits)
            p_values.append(mcnemar_exact(base, hits).p)
            moved = [
                [new - old for new, old in zip(*sides, strict=True)]
                for sides in zip(one["watched"], start["watched"], strict=True)
            ]
            chosen, rejected = (statistics.mean(pair[at] for pair in moved) for at in (0, 1))
            down = statistics.mean(pair[0] < 0 for pair in moved)
            both = fulfilled(questions, one["both"]) if one["both"] else None
            rows.append(
                [
                    name,
                    best_rate(context, name),
                    str(seed),
                    share_cell(hits),
                    against(base, hits),
                    "" if name == CONTROL else against(sft, hits),
                    f"{chosen:+.1f} / {rejected:+.1f}, {down:.0%}",
                    f"{statistics.mean(one['divergence']):.2f}",
                    f"{statistics.mean(map(count, one['texts'])):.0f}",
                    "" if both is None else f"{statistics.mean(both):.3f}: {against(hits, both)}",
                ]
            )
    head = ["aligned by", "rate", "seed", "fulfilled", "against the start", "against SFT"]
    head += ["log p of chosen / rejected, chosen fell", "KL", "tokens", "contrast with itself untuned"]
    worst = sum(p < 0.05 for p in holm(p_values).tolist())
    return Section(
        [*_intro(context, start["kinds"], len(questions), worst, len(p_values)), "", *table(head, rows)], figures
    )


def _intro(context: Context, kinds: Sequence[str], items: int, significant: int, tests: int) -> list[str]:
    rows = len(training_pairs(context, "clair"))
    left = [kind for kind in KINDS if kind not in kinds]
    return [
        f"n = {items} test prompts of our own (`contralto.testbed.instructions`), one instruction each, decided by a program; topics of",
        f"train, dev and test are disjoint. Kinds that the model fulfils sometimes on {context.sizes['screened']} dev prompts:",
        f"{', '.join(kinds)}; left out, never or always fulfilled: {', '.join(left) or 'none'}.",
        f"Scaled to what one core trains in two hours: replies have at most {NEW_TOKENS} tokens, and there are few pairs, which",
        f"`contralto data run` makes from the model's own samples (T .7) on {context.sizes['prompts']} prompts, {rows} of each origin: CLAIR",
        "(a program changes the sample as little as its check needs), judged (two samples, the program judges), best of 4. One",
        "epoch of `contralto align`, batch 4, LoRA of rank 8, AdamW, constant rate, the best of three by seed 0 on",
        f"{context.sizes['dev']} dev prompts, otherwise the recipes.",
        "Changes of log p are sums over the tokens of held-out CLAIR pairs; KL is",
        f"KL(tuned || start) of a greedy reply, the mean of {context.sizes['divergences']}. The last column decodes the tuned model against itself without",
        "adapters (beta .5, alpha .1), tested against the tuned model; the mask alone changes no greedy token.",
        f"After Holm's correction {significant} of {tests} tests against the start are significant at .05.",
    ]


LINE = Line(
    name="alignment",
    title="Alignment with a checkable reward",
    question="Which pairs and which losses make a model follow instructions, and does SFT on the chosen replies do as well?",
    order=50,
    needs=("model",),
    full={
        "screened": 160,
        "prompts": 200,
        "pairs": 64,
        "held_out": 32,
        "dev": 48,
        "test": 160,
        "divergences": 16,
        "seeds": 3,
        "rates": 3,
    },
    small={
        "screened": 20,
        "prompts": 20,
        "pairs": 8,
        "held_out": 20,
        "dev": 8,
        "test": 8,
        "divergences": 2,
        "seeds": 1,
        "rates": 1,
    },
    revision=1,
    run=run,
    render=render,
)
