"""Distil a model into itself with layers left out, by six losses on the same texts."""

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from contralto.common.files import read_text
from contralto.testbed.instructions import prompts
from real.line import Context, Line, Section
from real.tables import against, against_means, mean_figure, share_cell, table
from real.training import NEW_TOKENS, encode_reply, fulfilled, greedy, pairs, reply_logps, trained


class Loss(NamedTuple):
    """A recipe of `contralto align`, its options, and whether it reads the student's texts too."""

    recipe: str
    options: tuple[tuple[str, str], ...] = ()
    reads_both: bool = True


LOSSES = {
    "SFT": Loss("distill_sft", reads_both=False),
    "forward KL": Loss("distill_forward_kl", reads_both=False),
    "JSD (GKD)": Loss("distill_gkd"),
    "skew KL": Loss("distill_skl"),
    "DistiLLM-2, released": Loss("distill_released"),
    "DistiLLM-2, curriculum, beta to .75": Loss("distill", (("beta_max", "0.75"),)),
}
CONTROL = "SFT"
RATES = ("2e-4", "6e-4")
SEEDS = (0, 1, 2)
EPOCHS = 2
"""Epochs of losses that read both texts; the others have twice as many, so that all see about the same tokens."""
WINDOW = 256
"""Tokens of a piece of human text."""


def recipe(context: Context, split: str, count: int) -> dict[str, Any]:
    """Return the recipe of the texts of teacher and student.

    Args:
        context: The context of the line.
        split: The split of the topics.
        count: The number of prompts.
    """
    return {
        "rows": {"source": "contralto.testbed.instructions:prompts", "arguments": {"count": count, "split": split}},
        "strategies": [{"use": "teacher_student", "max_new_tokens": NEW_TOKENS}],
        "roles": {
            name: {"engine": "transformers", "model": context.path(role), "batch_size": 32}
            for name, role in (("teacher", "model"), ("student", "pruned"))
        },
    }


def run(context: Context) -> None:
    """Measure the student without training, choose rates on dev texts, and measure three seeds.

    Args:
        context: The context of the line.
    """
    units = context.units()
    units.fill([_key(context, start="test")], lambda _: [_test(context, context.model("pruned"))], title="start")
    jobs = [(name, rate) for name in LOSSES for rate in _rates(context)]
    units.fill([_dev_key(context, *job) for job in jobs], lambda batch: [_dev(context, *jobs[batch[0]])], title="rates")
    runs = [(name, best_rate(context, name), seed) for seed in SEEDS[: context.sizes["seeds"]] for name in LOSSES]
    units.fill(
        [_run_key(context, *job) for job in runs],
        lambda batch: [_test(context, _student(context, *runs[batch[0]]))],
        title="seeds",
    )


def _rates(context: Context) -> tuple[str, ...]:
    return RATES[: context.sizes["rates"]]


def _key(context: Context, **settings: Any) -> dict[str, Any]:
    sizes = {name: context.sizes[name] for name in context.sizes if name not in ("seeds", "rates")}
    return context.key("model", "pruned", **settings, **sizes)


def _dev_key(context: Context, name: str, rate: str) -> dict[str, Any]:
    return _key(context, loss=name, rate=rate, split="dev")


def _run_key(context: Context, name: str, rate: str, seed: int) -> dict[str, Any]:
    return _key(context, loss=name, rate=rate, seed=seed, split="test")


def best_rate(context: Context, name: str) -> str:
    """Return the rate of the lowest loss on the teacher's dev texts, the lower of equals.

    Args:
        context: The context of the line.
        name: A key of `LOSSES`.
    """
    return min(_rates(context), key=lambda rate: (context.units()[_dev_key(context, name, rate)], float(rate)))


def _student(context: Context, name: str, rate: str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    from contralto.common.hub import from_pretrained

    loss = LOSSES[name]
    made = pairs(context, "train", recipe(context, "train", context.sizes["prompts"]))
    columns = ("prompt", "chosen", "rejected") if loss.reads_both else ("prompt", "chosen")
    rows = [{column: row[column] for column in columns} for row in made]
    epochs = EPOCHS if loss.reads_both else 2 * EPOCHS
    options = {"learning_rate": rate, "seed": seed, "num_train_epochs": epochs, "bf16": "true", **dict(loss.options)}
    if loss.recipe != LOSSES["SFT"].recipe:
        options["teacher_model_name_or_path"] = context.path("model")
    folder = trained(context, loss.recipe, context.path("pruned"), rows, options)
    return from_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32).eval()


def _texts(context: Context, split: str) -> list[tuple[str, str]]:
    """Return prompts and the teacher's texts."""
    made = pairs(context, split, recipe(context, split, context.sizes[split]))
    return [(row["prompt"][-1]["content"], row["chosen"][-1]["content"]) for row in made]


def _dev(context: Context, name: str, rate: str) -> float:
    model = _student(context, name, rate, 0)
    return statistics.mean(loss for loss, _ in (_on_text(context, model, *text) for text in _texts(context, "dev")))


@torch.inference_mode()
def _on_text(context: Context, model: Any, prompt: str, text: str) -> tuple[float, float]:
    """Return -log p per token of a text of the teacher's, and the share of its tokens at which both models agree on the first choice."""
    ids, start = encode_reply(context.tokenizer(), prompt, text)
    own, other = (reply_logps(each, ids, start) for each in (model, context.model()))
    logps = own.gather(-1, ids[start:, None])
    return -float(logps.mean()), float((own.argmax(-1) == other.argmax(-1)).double().mean())


def _test(context: Context, model: Any) -> dict[str, Any]:
    """Return losses and agreement on the teacher's texts, losses on human text, and replies."""
    on_texts = [_on_text(context, model, *text) for text in _texts(context, "test")]
    questions = [row["prompt"] for row in prompts(count=context.sizes["test"], split="test")]
    return {
        "loss": [loss for loss, _ in on_texts],
        "agreement": [share for _, share in on_texts],
        "human": _on_human_text(context, model),
        "texts": greedy(model, context.tokenizer(), questions),
    }


@torch.inference_mode()
def _on_human_text(context: Context, model: Any) -> list[float]:
    """Return -log p per token of pieces of WikiText's test half."""
    text = read_text(context.file("wikitext", "wikitext2_test.txt"))
    text = re.sub(r" @(.)@ ", r"\1", text)[: 8 * WINDOW * context.sizes["windows"]]
    ids = torch.tensor(context.tokenizer()(text, add_special_tokens=False)["input_ids"])
    found = []
    for piece in torch.split(ids, WINDOW)[: context.sizes["windows"]]:
        logps = model(piece[None]).logits[0, :-1].log_softmax(-1)
        found.append(-float(logps.gather(-1, piece[1:, None]).mean()))
    return found


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    units = context.units()
    start = units.get(_key(context, start="test"))
    if start is None or units.of([_dev_key(context, n, r) for n in LOSSES for r in _rates(context)]) is None:
        return None
    seeds = SEEDS[: context.sizes["seeds"]]
    runs = {(n, s): units.get(_run_key(context, n, best_rate(context, n), s)) for n in LOSSES for s in seeds}
    if any(found is None for found in runs.values()):
        return None
    questions = [row["prompt"] for row in prompts(count=context.sizes["test"], split="test")]
    hits = cache(lambda key: fulfilled(questions, runs[key]["texts"]))
    rows = [["untrained", "", "", *_cells(start), share_cell(fulfilled(questions, start["texts"])), "", ""]]
    figures = {}
    for (name, seed), found in runs.items():
        control = runs[CONTROL, seed]
        figures[f"{name}, seed {seed}, nats"] = mean_figure(found["loss"])
        tests = ["", ""]
        if name != CONTROL:
            tests = [against_means(control["loss"], found["loss"]), against(hits((CONTROL, seed)), hits((name, seed)))]
        rows.append([name, best_rate(context, name), str(seed), *_cells(found), share_cell(hits((name, seed))), *tests])
    head = ["learned by", "rate", "seed", "perplexity of the teacher's texts", "of human text", "agreement"]
    head += ["instructions fulfilled", "nats per token against SFT", "fulfilled against SFT"]
    return Section([*_intro(context), "", *table(head, rows)], figures)


def _cells(found: Mapping[str, Sequence[float]]) -> list[str]:
    texts, human, agreement = (mean_figure(found[name]) for name in ("loss", "human", "agreement"))
    perplexities = [torch.tensor(figure).exp().tolist() for figure in (texts, human)]
    cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in perplexities]
    return [*cells, f"{agreement.value:.3f} [{agreement.low:.3f}, {agreement.high:.3f}]"]


def _intro(context: Context) -> list[str]:
    sizes = context.sizes
    return [
        f"The teacher is the model, the student the same with layers left out, untrained. Both write on {sizes['prompts']} prompts of",
        f"`contralto.testbed.instructions` (T .8, {NEW_TOKENS} tokens) before training. {EPOCHS} epochs of both texts, or {2 * EPOCHS} of the teacher's alone",
        "for losses that read no other, so that all see about as many tokens; batch 4, AdamW, constant rate, all weights, products in",
        f"bfloat16, the best of {len(_rates(context))} rates by the loss on {sizes['dev']} dev texts of the teacher with seed 0. n = {sizes['test']} test texts and prompts of",
        f"other topics, and {sizes['windows']} pieces of {WINDOW} tokens of WikiText-2's test half. Perplexity is exp of the mean over texts of -log p",
        "per token, agreement the share of tokens at which the student's first choice is the teacher's.",
        "Scaled to what one core trains in an hour or two: a student needs more texts than these to write well. Losses that also read the",
        "student's texts see the teacher's half as often, and an untrained student writes noise; whether that is why they fall behind here",
        "is not tested, nor rates beyond the highest, which is the best one of forward KL.",
    ]


LINE = Line(
    name="distillation",
    title="Distillation into a pruned student",
    question="Does a divergence to the teacher's distribution, or DistiLLM-2, teach a pruned student more than SFT on its texts?",
    order=55,
    needs=("model", "pruned"),
    full={"prompts": 64, "dev": 32, "test": 96, "windows": 16, "seeds": 3, "rates": 2},
    small={"prompts": 16, "dev": 8, "test": 8, "windows": 2, "seeds": 1, "rates": 1},
    revision=1,
    run=run,
    render=render,
    flags=("data",),
)
