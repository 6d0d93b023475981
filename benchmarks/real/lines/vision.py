"""Contrast images where a model learned from a public set that nobody here made: easy-VQA."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from contralto.common.hub import from_pretrained
from contralto.decoding.rules import visual_contrastive_decoding
from contralto.eval import stats
from real.easy_vqa_data import Asked, balanced, data_folder, questions, shape_sizes, write_pope
from real.easy_vqa_training import Recipe, Trainee, without_image
from real.line import Context, Figure, Line, Section
from real.tables import Change, against_clustered, p_text, table

METHODS = ("vcd", "ritual", "m3id")
NO_IMAGE = "no image subtracted, alpha 1"
"""VCD's formula with the question alone in place of the noised picture. M3ID's contrast is zero at the first token."""
TASK = "pope_coco_random"
SEED = 0
OPTIONS = {"pope_prompt": "official", "yes_hint": None}
"""POPE's own prompt, which is the question alone; no prompt-based adjustment, since the model knows no instructions."""
UNKNOWN = "?"


class Row(NamedTuple):
    """A decoder, and those that it is tested against."""

    name: str
    role: str
    against: tuple[str, ...]
    is_sampled: bool


def decoders() -> list[Row]:
    """Return the rows that `contralto compare` makes of the methods, and those of the contrast without an image."""
    from contralto.eval.comparison.controls import generation_rows
    from contralto.eval.comparison.decoders import parse_decoder

    made = generation_rows([parse_decoder(method) for method in METHODS], sampled=True, yes_no=True)
    rows = [Row(row.name, row.role, row.against, row.is_sampled) for row in made if row.same_as is None]
    matched = f"greedy, yes as {NO_IMAGE}"
    own = [
        Row(matched, "control", ("greedy",), False),
        Row(NO_IMAGE, "method", ("greedy", "greedy, OLM", matched), False),
    ]
    first_sampled = [row.is_sampled for row in rows].index(True)
    return [*rows[:first_sampled], *own, *rows[first_sampled:]]


# ----------------------------------------------------------------------------------------------------------------------- run


def run(context: Context) -> None:
    """Train a model per seed, let each answer by every decoder, and keep the answers.

    Args:
        context: The context of the line.

    Raises:
        ValueError: The set is not installed, or the kept answers are to other questions.
    """
    folder = data_folder(context.data)
    if folder is None:
        raise ValueError(
            "line 'vision' reads the public set easy-VQA: install contralto[easy-vqa], or give it in --data DIR/easy_vqa"
        )
    asked = balanced(questions(folder, "test"), context.sizes["per_cell"], seed=SEED)
    _keep_questions(context, asked, folder)
    for seed in context.sizes["seeds"]:
        if context.units().of([_key(context, seed, row.name) for row in decoders()]) is None:
            model = _trained(context, folder, seed)
            for name, answers in _answers(context, folder, asked, model).items():
                context.units().add(_key(context, seed, name), answers)


def _key(context: Context, seed: int, row: str) -> dict[str, Any]:
    return context.key(seed=seed, row=row, **_settings(context))


def _settings(context: Context) -> dict[str, Any]:
    return {name: context.sizes[name] for name in ("steps", "batch", "per_cell")}


def _keep_questions(context: Context, asked: Sequence[Asked], folder: Path) -> None:
    """Write what the section says about the questions, and the questions as a file of POPE."""
    sizes = shape_sizes(folder / "test" / "images", asked)
    kept = [[*q, q.is_negated, q.is_about_shape, sizes[q.image]] for q in asked]
    key = _questions_key(context)
    if context.units("questions").get(key) not in (None, kept):
        raise ValueError(f"{context.scratch} holds answers to other questions of easy-VQA: give another --folder")
    if key not in context.units("questions"):
        context.units("questions").add(key, kept)
    write_pope(context.scratch / "data" / "pope" / "coco_pope_random.json", asked)


def _questions_key(context: Context) -> dict[str, Any]:
    return context.key(**_settings(context))


def _trained(context: Context, folder: Path, seed: int) -> Path:
    """Train the model of a seed unless it is there, measure it on held-out pictures, and return its folder."""
    out = context.scratch / f"models-{context.line.revision}-{context.sizes['steps']}" / f"seed-{seed}"
    key = _key(context, seed, "held out")
    if out.is_dir() and key in context.units("models"):
        return out
    recipe = Recipe(context.sizes["steps"], context.sizes["batch"], adamw_lr=0.005, blind_every=16)
    trainee = Trainee(folder, seed, recipe)
    if not out.is_dir():
        unfinished = out.parent / "unfinished" / out.name
        trainee.train(unfinished)
        unfinished.rename(out)
    trainee.model.load_state_dict(_load(out).state_dict())
    context.units("models").add(key, trainee.held_out_accuracy())
    return out


def _load(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return from_pretrained(LlavaForConditionalGeneration, str(folder), dtype=torch.float32).eval()


def _answers(context: Context, folder: Path, asked: Sequence[Asked], model: Path) -> dict[str, dict[str, Any]]:
    """Return the answers of a model by every decoder, with the margins of yes over no where the decoder has them."""
    from contralto.eval.comparison.answers import collect, frame_of
    from contralto.eval.comparison.columns import gather
    from contralto.eval.comparison.planning import Subject, make_plans
    from contralto.eval.comparison.runs import Runner
    from contralto.eval.comparison.tasks import Conditions, load_tasks
    from contralto.eval.models.vlm import ContraltoVLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {**OPTIONS, "coco_images": str(folder / "test" / "images")}
    output, conditions = context.scratch / "compare", Conditions(chat=True, seeds=(0,), metadata=metadata)
    tasks = load_tasks([TASK], conditions, (), context.scratch / "data", output)
    (plan,) = make_plans(tasks, [Subject(str(model))], METHODS, sampled=True)
    lm = ContraltoVLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=64)
    column = gather(lm, model.name, plan.task, plan.rows, Runner(output, conditions))
    found = {
        name: {"answers": _letters([answer for _, answer in each.pairs[0]]), "margins": column.margins.get(name, [])}
        for name, each in collect(frame_of(plan.task, column, 1), plan.rows, column).items()
    }
    blind = without_image(lm.model, lm.processor, [question.text for question in asked])
    margins, answers = _without_image(column.likelihoods["greedy"], [blind[question.text] for question in asked])
    matched = stats.bias_matched(column.margins["greedy"], sum(answers))
    found[NO_IMAGE] = {"answers": _letters(answers), "margins": margins}
    found[f"greedy, yes as {NO_IMAGE}"] = {"answers": _letters(matched.tolist()), "margins": []}
    return {row.name: found[row.name] for row in decoders()}


def _without_image(
    seen: Sequence[tuple[float, float]], blind: Sequence[tuple[float, float]]
) -> tuple[list[float], list[bool]]:
    """Subtract what the model says without an image.

    Args:
        seen: log p(yes) and log p(no) of each question with its image.
        blind: The same without the image.

    Returns:
        The margins of yes over no without the plausibility constraint, as `contralto compare` takes them, and whether the answer with
        the constraint is yes.
    """
    pair = torch.tensor(seen, dtype=torch.float64), torch.tensor(blind, dtype=torch.float64)
    free, masked = (visual_contrastive_decoding(*pair, alpha=1.0, beta=beta) for beta in (0.0, 0.1))
    return (free[:, 0] - free[:, 1]).tolist(), (masked[:, 0] > masked[:, 1]).tolist()


def _letters(answers: Sequence[bool | None]) -> str:
    return "".join(UNKNOWN if answer is None else "yn"[not answer] for answer in answers)


# ------------------------------------------------------------------------------------------------------------------- section


class Results(NamedTuple):
    """All answers of the line."""

    asked: list[Asked]
    sizes: NDArray[np.int64]
    """The pixels of each question's shape."""
    labels: NDArray[np.bool_]
    """Whether yes is right."""
    yes: dict[str, NDArray[np.bool_]]
    """`(seeds, questions)` by decoder."""
    hits: dict[str, NDArray[np.bool_]]
    margins: dict[str, NDArray[np.float64]]

    @property
    def images(self) -> list[int]:
        """Return the picture of each question."""
        return [question.image for question in self.asked]


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    results = _results(context)
    if results is None:
        return None
    figures: dict[str, Figure] = {}
    rows = decoders()
    accuracy = [_accuracy_row(results, row, figures) for row in rows]
    head = ["decoder", "accuracy", "by seed", "yes", "affirmative", "negated", "AUROC", "against greedy"]
    tests = {
        (row.name, control): against_clustered(results.hits[control], results.hits[row.name], results.images)
        for row in rows
        for control in row.against
    }
    lines = [
        *_intro(context, results),
        "",
        *table(head, accuracy),
        "",
        "*affirmative* and *negated*: accuracy / share of yes by the wording of the question. *AUROC*: of the margin of yes over no, mean of",
        "the seeds; *against greedy*: DeLong's p of each seed. Tests, paired:",
        "",
        *_test_table(tests),
        "",
        *_error_table(results),
    ]
    return Section(lines, figures)


def _results(context: Context) -> Results | None:
    kept, seeds = context.units("questions").get(_questions_key(context)), _complete_seeds(context)
    if kept is None or not seeds:
        return None
    units = {row.name: [context.units()[_key(context, seed, row.name)] for seed in seeds] for row in decoders()}
    labels = np.array([answer == "yes" for _, answer, *_ in kept])
    letters = {name: np.array([list(each["answers"]) for each in found]) for name, found in units.items()}
    return Results(
        [Asked(*row[:3]) for row in kept],
        np.array([row[-1] for row in kept]),
        labels,
        {name: each == "y" for name, each in letters.items()},
        {name: each == np.where(labels, "y", "n") for name, each in letters.items()},
        {name: np.array([each["margins"] for each in found]) for name, found in units.items() if found[0]["margins"]},
    )


def _complete_seeds(context: Context) -> list[int]:
    """Return the seeds whose models have answered by every decoder."""
    rows = decoders()
    return [
        seed
        for seed in context.sizes["seeds"]
        if context.units().of([_key(context, seed, row.name) for row in rows]) is not None
    ]


def _intro(context: Context, results: Results) -> list[str]:
    done = _complete_seeds(context)
    held = context.units("models").of([_key(context, seed, "held out") for seed in done]) or []
    told = "; ".join(f"{name} {', '.join(f'{each[name]:.3f}' for each in held)}" for name in (held[0] if held else {}))
    count, pictures = len(results.asked), len(set(results.images))
    absent = [str(seed) for seed in context.sizes["seeds"] if seed not in done]
    missing = f" Not run yet: seeds {', '.join(absent)}." if absent else ""
    return [
        "Data: `easy-vqa` 1.0 (MIT), made by its author's program: 64 x 64 pixels, one shape of three in one of eight colours, questions in",
        "eight wordings. Nobody planted a shortcut, but the set has one: a question without a negation has the answer no in 82%, one with",
        "a negation the answer yes in 82%, so that the wording alone answers 82% of the presence questions. The test questions are",
        f"therefore balanced as POPE's are, within both wordings: n = {count} on {pictures} pictures of the test half, drawn with seed {SEED}; wording",
        "alone gives .500. They are written as a file of POPE and answered through its task as `contralto compare` does it.",
        "",
        f"Models: the testbed's LLaVA (170 thousand parameters, 32 x 32 pixels), seeds {', '.join(map(str, done))}, {context.sizes['steps']} steps of {context.sizes['batch']} pictures with five",
        "questions, on nine tenths of the training half, every question type; one step in 16 without pictures, as LLaVA-1.5's mixture has",
        "6% of conversations without. No noised or transformed pictures. Right first words on the held-out tenth (with the set's own",
        f"shares of answers): {told}.{missing}",
        "",
        "Settings are the papers' (VCD alpha 1, beta 0.1, step 500; RITUAL kappa 3, beta 0.1; M3ID lambda 0.02, beta 0.1), stated before",
        "the first answer. M3ID's contrast is zero at the first token, so on one-word answers it is greedy decoding by definition;",
        f"*{NO_IMAGE}* is the contrast that it would have had. *OLM* and *yes as* are the controls of `contralto compare`. Sampled",
        "rows have one seed of sampling. Intervals and tests take a picture with all its questions and all models as one unit;",
        "Holm's p adjusts all tests of the table.",
    ]


def _accuracy_row(results: Results, row: Row, figures: dict[str, Figure]) -> list[str]:
    hits, yes, seeds = results.hits[row.name], results.yes[row.name], len(results.hits[row.name])
    share = stats.proportion(hits.ravel(), clusters=results.images * seeds)
    figures[f"{row.name}, accuracy"] = Figure(share.value, share.low, share.high)
    negated = np.array([question.is_negated for question in results.asked])
    by_wording = [f"{hits[:, each].mean():.3f} / {yes[:, each].mean():.3f}" for each in (~negated, negated)]
    cells = [row.name, str(share), " ".join(f"{each:.3f}" for each in hits.mean(1)), f"{yes.mean():.3f}", *by_wording]
    if row.name not in results.margins:
        return [*cells, "", ""]
    own = results.margins[row.name]
    areas = [stats.auroc(each, results.labels) for each in own]
    if row.name == "greedy":
        return [*cells, f"{np.mean(areas):.3f}", ""]
    pairs = zip(results.margins["greedy"], own, strict=True)
    found = [stats.auroc_difference(a, b, results.labels, clusters=results.images) for a, b in pairs]
    return [*cells, f"{np.mean(areas):.3f}", "p " + ", ".join(p_text(each.p) for each in found)]


def _test_table(tests: Mapping[tuple[str, str], Change]) -> list[str]:
    adjusted = stats.holm([change.p for change in tests.values()])
    head = ["decoder", "against", "difference", "won / lost", "p", "detectable", "Holm's p"]
    rows = [
        [name, control, *change.cells, p_text(float(p))]
        for ((name, control), change), p in zip(tests.items(), adjusted, strict=True)
    ]
    return table(head, rows)


def _error_table(results: Results) -> list[str]:
    """Return accuracies of greedy decoding by what is asked, by the right answer, and by the size of the shape."""
    hits = results.hits["greedy"]
    shape = np.array([question.is_about_shape for question in results.asked])
    present = np.array([(q.answer == "yes") != q.is_negated for q in results.asked])
    cuts = np.quantile(results.sizes, (1 / 3, 2 / 3))
    thirds = np.searchsorted(cuts, results.sizes)
    groups = {"all": np.ones_like(present)}
    groups |= {"what is asked for is there": present, "is not there": ~present}
    groups |= {f"{name} third of the shapes": thirds == i for i, name in enumerate(("smallest", "middle", "largest"))}
    rows = [
        [name, *(f"{hits[:, group & each].mean():.3f}" if (group & each).any() else "" for each in (~shape, shape))]
        for name, group in groups.items()
    ]
    return [
        "Accuracy of greedy decoding by what the question asks for (mean of the seeds; the thirds are by pixels of the shape):",
        "",
        *table(["questions", "a colour", "a shape"], rows),
        "",
        "AUROC among questions of one wording and kind, where the wording says nothing (mean of the seeds; .5 is chance):",
        "",
        *_area_table(results, shape),
        *LOOKED_AT,
    ]


def _area_table(results: Results, shape: NDArray[np.bool_]) -> list[str]:
    negated = np.array([question.is_negated for question in results.asked])
    groups = {
        f"{'a shape' if about else 'a colour'}, {'negated' if denied else 'affirmative'}": (shape == about)
        & (negated == denied)
        for about in (False, True)
        for denied in (False, True)
    }
    rows = []
    for name, margins in results.margins.items():
        cells = []
        for group in groups.values():
            labels = results.labels[group]
            both = len(set(labels.tolist())) == 2
            cells.append(f"{np.mean([stats.auroc(each[group], labels) for each in margins]):.3f}" if both else "")
        rows.append([name, *cells])
    return table(["decoder", *groups], rows)


LOOKED_AT = (
    "",
    "Looked at by hand (seed 9): the model has learned colours and nothing about shapes. Asked for a shape, it says yes with a probability",
    "of .34 whatever the picture shows, the share that such questions have in the corpus, so greedy decoding denies every shape and",
    "affirms every negation: the shortcut that nobody planted. No contrast repairs it, since there is nothing in the picture's branch to",
    "amplify. Balancing both kinds of questions together leaves the asked shape present in most questions about shapes, so that whatever",
    "moves doubtful answers, OLM and plain sampling, gains accuracy without reading a picture. Its few wrong answers about colours are",
    "about small shapes, mostly black ones. Longer training, and balance within each kind, are the next measurement.",
)
"""What was seen in the pictures and answers of the full run."""

LINE = Line(
    name="vision",
    title="Image contrasts on easy-VQA",
    question=(
        "Do VCD, RITUAL and a contrast without the image help a model that learned from a corpus in which nobody planted a "
        "shortcut?"
    ),
    order=60,
    needs=(),
    full={"seeds": (9, 10, 11), "steps": 1800, "batch": 16, "per_cell": 300},
    small={"seeds": (9,), "steps": 3, "batch": 2, "per_cell": 2},
    revision=1,
    run=run,
    render=render,
)
