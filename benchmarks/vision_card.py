"""Measure the figures of the vision models' card.

    python benchmarks/vision_card.py                measure the embedded models, write the tables into testbed/VISION.md
    python benchmarks/vision_card.py --models DIR   measure newly trained models instead, and compare with the card

One setting per method was declared from the development table, before the test questions were looked at. An answer is
one token, so that decoding needs only the logits that follow the question, for the picture and for its other view.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from testbed_card import Figure, prediction_interval, write_or_compare
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from contralto import testbed
from contralto.common.hub import from_pretrained
from contralto.decoding.images import RITUAL_TRANSFORMS, noised, ritual_transform
from contralto.decoding.rules import combine
from contralto.eval import stats
from contralto.eval.metrics import chair
from contralto.eval.stats import auroc, bias_matched, mcnemar_exact, proportion
from contralto.testbed import scenes
from contralto.testbed.scenes import NEGATIVES, OBJECTS, Question

CARD = Path(testbed.__file__).parent.resolve() / "VISION.md"
SEEDS, CONTROL = ("vision-0", "vision-1", "vision-2"), "vision-control"
MASK = 0.1
"""The plausibility threshold of both papers (VCD's cd_beta, RITUAL's ritual_beta)."""
SETS = {"six": RITUAL_TRANSFORMS, "flips": ("hflip", "vflip")}
VCD, VCD_PUBLISHED = (500, 2.0), (500, 1.0)
"""Step and alpha: declared, being the best of the development table, and the paper's."""
RITUAL, RITUAL_PUBLISHED = ("flips", 1.0), ("six", 3.0)
"""Transformations and kappa, likewise."""
VCD_GRID = [(step, alpha) for step in (300, 500, 700, 900) for alpha in (0.5, 1.0, 2.0)]
RITUAL_GRID = [(name, kappa) for name in SETS for kappa in (1.0, 3.0)]
BATCH = 100

YES_NO_METRICS = (stats.accuracy, stats.precision, stats.recall, stats.f1, stats.yes_ratio)

View = tuple[str, Any]
"""("plain", None), ("noise", step), or ("ritual", the name of a set)."""
PLAIN: View = ("plain", None)


class Answers(NamedTuple):
    """The answers of a decoder: probabilities, or decisions as probabilities of 0 and 1."""

    yes: Tensor
    no: Tensor

    def hits(self, labels: Tensor) -> list[bool]:
        """Return whether the right answer has more than half of the probability."""
        return (torch.where(labels, self.yes, self.no) > 0.5).tolist()


class Reader:
    """A model of a folder that answers questions about pictures."""

    def __init__(self, folder: Path) -> None:
        self.model = from_pretrained(LlavaForConditionalGeneration, str(folder), dtype="float32")
        self.processor: Any = from_pretrained(AutoProcessor, str(folder))
        to_id = self.processor.tokenizer.convert_tokens_to_ids
        self.yes, self.no = to_id("▁yes"), to_id("▁no")
        self.cache: dict[tuple[View, Question], Tensor] = {}

    def prompt(self, text: str) -> str:
        """Return a question about an image in the chat template."""
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        chat = [{"role": "user", "content": parts}]
        prompt: str = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return prompt

    def inputs(self, pictures: Sequence[scenes.Scene], texts: Sequence[str], view: View) -> Any:
        """Return the inputs of the model: one seed per query, so that neither batch nor order changes a thing."""
        kind, how = view
        seeds = [Random(f"{scene.seed} {text}").getrandbits(32) for scene, text in zip(pictures, texts, strict=True)]
        images = [scene.image() for scene in pictures]
        if kind == "ritual":
            images = [
                ritual_transform(i, seed=s, transforms=SETS[how]).image for i, s in zip(images, seeds, strict=True)
            ]
        prompts = [self.prompt(text) for text in texts]
        inputs = self.processor(images=images, text=prompts, add_special_tokens=False, return_tensors="pt")
        return noised(inputs, step=how, seed=seeds) if kind == "noise" else inputs

    @torch.no_grad()
    def read(self, asked: Sequence[Question], view: View = PLAIN) -> Tensor:
        """Return the logits after each question, `(n, V)`."""
        new = [question for question in dict.fromkeys(asked) if (view, question) not in self.cache]
        for batch in (new[start : start + BATCH] for start in range(0, len(new), BATCH)):
            inputs = self.inputs([q.scene for q in batch], [q.text for q in batch], view)
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            self.cache |= {(view, question): row for question, row in zip(batch, logits, strict=True)}
        return torch.stack([self.cache[view, question] for question in asked])

    def decide(self, scores: Tensor) -> Answers:
        """Return greedy answers over the whole vocabulary."""
        return Answers(*((scores.argmax(-1) == token).float() for token in (self.yes, self.no)))

    def sample(self, scores: Tensor, temperature: float = 1.0) -> Answers:
        """Return the exact probabilities of sampled answers, without a draw."""
        p = (scores / temperature).softmax(-1)
        return Answers(p[:, self.yes], p[:, self.no])

    def lean(self, scores: Tensor) -> Tensor:
        """Return the margins of yes over no."""
        return scores[:, self.yes] - scores[:, self.no]

    def vcd(self, asked: Sequence[Question], *, setting: tuple[int, float] = VCD, mask: float = MASK) -> Tensor:
        """Return the scores of VCD after each question."""
        step, alpha = setting
        return combine((self.read(asked), self.read(asked, ("noise", step))), (1 + alpha, -alpha), alpha=mask)

    def ritual(self, asked: Sequence[Question], *, setting: tuple[str, float] = RITUAL, mask: float = MASK) -> Tensor:
        """Return the scores of RITUAL after each question."""
        name, kappa = setting
        return combine((self.read(asked), self.read(asked, ("ritual", name))), (1, kappa), alpha=mask)

    @torch.no_grad()
    def describe(self, pictures: Sequence[scenes.Scene], setting: tuple[int, float] | None = None) -> list[str]:
        """Return greedy captions, with VCD if there is a setting."""
        texts = [scenes.DESCRIBE] * len(pictures)
        views, weights = [plain := self.inputs(pictures, texts, PLAIN)], [1.0]
        if setting:
            step, alpha = setting
            views, weights = [plain, self.inputs(pictures, texts, ("noise", step))], [1 + alpha, -alpha]
        ids, end = plain["input_ids"], self.processor.tokenizer.eos_token_id
        start, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool)
        while not ended.all() and ids.shape[1] < start + 50:
            branches = [
                self.model(input_ids=ids, pixel_values=view["pixel_values"], logits_to_keep=1).logits[:, -1]
                for view in views
            ]
            tokens = combine(branches, weights, alpha=MASK).argmax(-1).masked_fill(ended, end)
            ids, ended = torch.cat([ids, tokens[:, None]], -1), ended | (tokens == end)
        captions: list[str] = self.processor.batch_decode(ids[:, start:], skip_special_tokens=True)
        return captions


METHODS: dict[str, Callable[..., Tensor]] = {
    "VCD": partial(Reader.vcd, setting=VCD),
    "VCD as published": partial(Reader.vcd, setting=VCD_PUBLISHED),
    "RITUAL": partial(Reader.ritual, setting=RITUAL),
    "RITUAL as published": partial(Reader.ritual, setting=RITUAL_PUBLISHED),
}


class Bench:
    """The models, the questions, and every figure measured so far."""

    def __init__(self, folder: Path, pictures: int, dev: int) -> None:
        self.readers = {name: Reader(folder / name) for name in (*SEEDS, CONTROL)}
        self.pictures = list(islice(scenes.scenes(2027, "test"), pictures))
        self.asked = {kind: scenes.questions(self.pictures, kind) for kind in NEGATIVES}
        shown = list(islice(scenes.scenes(2027, "dev"), dev))
        self.dev = {kind: scenes.questions(shown, kind) for kind in NEGATIVES}
        self.figures: dict[str, Figure] = {}

    def note(self, name: str, hits: Sequence[bool]) -> str:
        """Record a share with its interval under a name, and return it as text."""
        share = proportion(hits)
        self.figures[name] = Figure(share.value, share.low, share.high)
        return str(share)


def truth(asked: Sequence[Question]) -> Tensor:
    """Return the right answers."""
    return torch.tensor([question.label for question in asked])


def rates(answers: Answers, labels: Tensor) -> tuple[float, float, float, float, float]:
    """Return accuracy, precision, recall, F1 and yes-ratio; of expected counts if the answers are probabilities."""
    yes, no = answers.yes.double(), answers.no.double()
    counts = torch.stack(
        [yes[labels].sum(), yes[~labels].sum(), no[~labels].sum(), labels.sum(), torch.tensor(len(labels))]
    )
    accuracy, precision, recall, f1, yes_ratio = (float(metric(counts.numpy())) for metric in YES_NO_METRICS)
    return accuracy, precision, recall, f1, yes_ratio


# --------------------------------------------------------------------------------------------------------------- tables


def dev_table(bench: Bench) -> list[str]:
    """Return the mean accuracy over seeds and kinds of negatives on dev pictures, for every setting considered."""
    lines = ["| method | setting | " + " | ".join(NEGATIVES) + " | mean | |", "|---|---|---|---|---|---|---|"]

    def add(method: str, setting: str, ask: Callable[[Reader, list[Question]], Tensor], note: str = "") -> None:
        means = []
        for asked in bench.dev.values():
            readers = [bench.readers[name] for name in SEEDS]
            means.append(statistics.mean(rates(r.decide(ask(r, asked)), truth(asked))[0] for r in readers))
        cells = [f"{each:.3f}" for each in (*means, statistics.mean(means))]
        lines.append(f"| {method} | {setting} | {' | '.join(cells)} | {note} |")

    add("greedy", "", lambda reader, asked: reader.read(asked))
    for vcd in tqdm(VCD_GRID, desc="VCD on dev"):
        title = f"step {vcd[0]}, alpha {vcd[1]:g}"
        add("VCD", title, partial(Reader.vcd, setting=vcd), _mark(vcd, VCD, VCD_PUBLISHED))
    for ritual in tqdm(RITUAL_GRID, desc="RITUAL on dev"):
        title = f"{ritual[0]}, kappa {ritual[1]:g}"
        add("RITUAL", title, partial(Reader.ritual, setting=ritual), _mark(ritual, RITUAL, RITUAL_PUBLISHED))
    return lines


def _mark(setting: Any, declared: Any, published: Any) -> str:
    return "declared" if setting == declared else "as published" if setting == published else ""


CASES: dict[str, Callable[[scenes.Scene, str], bool]] = {
    "at home, upper half": lambda scene, name: _lies(scene, name) == (True, "upper"),
    "at home, lower half": lambda scene, name: _lies(scene, name) == (True, "lower"),
    "stray, upper half": lambda scene, name: _lies(scene, name) == (False, "upper"),
    "stray, lower half": lambda scene, name: _lies(scene, name) == (False, "lower"),
    "at home, absent (habit 60%)": lambda scene, name: _lies(scene, name) == (True, "absent") and _often(scene, name),
    "at home, absent (habit 40%)": lambda scene, name: (
        _lies(scene, name) == (True, "absent") and not _often(scene, name)
    ),
    "stray, absent": lambda scene, name: _lies(scene, name) == (False, "absent"),
}


def _lies(scene: scenes.Scene, name: str) -> tuple[bool, str]:
    """Return whether an object is at home, and where it is."""
    lows = [thing.is_low for thing in scene.things if thing.name == name]
    return name in scenes.HOMES[scene.place], "absent" if not lows else "lower" if lows[0] else "upper"


def _often(scene: scenes.Scene, name: str) -> bool:
    return name in scenes.HOMES[scene.place][:2]


def belief_table(bench: Bench, count: int = 60) -> list[str]:
    """Return the mean probability of yes, with all objects of some pictures asked about: what the models learned of the world."""
    views = {"plain": PLAIN, f"noise, step {VCD[0]}": ("noise", VCD[0])}
    views |= {"mirrored": ("ritual", "flips"), "RITUAL's six": ("ritual", "six")}
    lines = ["| model | view | " + " | ".join(CASES) + " |", "|---|---|" + "---|" * len(CASES)]
    asked = [Question(s, name, name in s.objects) for s in bench.pictures[:count] for name in OBJECTS]
    for model in (SEEDS[0], CONTROL):
        reader = bench.readers[model]
        for title, view in views.items():
            yes = reader.sample(reader.read(asked, view)).yes
            groups = [torch.tensor([case(q.scene, q.name) for q in asked]) for case in CASES.values()]
            cells = " | ".join(f"{float(yes[group].mean()):.2f}" for group in groups)
            lines.append(f"| {model} | {title} | {cells} |")
    return lines


def questions_table(bench: Bench) -> list[str]:
    """Return greedy decisions on the test questions, against the plain model with its own and with the method's yes-ratio."""
    heads = "model | negatives | decoding | accuracy | precision | recall | F1 | yes | AUROC | vs greedy | matched"
    lines = [f"| {heads} | vs matched |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for (name, reader), kind in tqdm(list(product(bench.readers.items(), NEGATIVES)), desc="test questions"):
        asked = bench.asked[kind]
        labels, plain = truth(asked), reader.read(asked)
        greedy, lean = reader.decide(plain), reader.lean(plain)
        for title, decode in {"greedy": None, **METHODS}.items():
            answers = reader.decide(decode(reader, asked)) if decode else greedy
            leaning = reader.lean(decode(reader, asked, mask=0)) if decode else lean
            cells = [bench.note(f"{name}, {kind}, {title}", answers.hits(labels))]
            cells += [f"{rate:.3f}" for rate in (*rates(answers, labels)[1:], auroc(leaning.numpy(), labels.numpy()))]
            yes = torch.as_tensor(bias_matched(lean.numpy(), int(answers.yes.sum()))).to(lean)
            same = Answers(yes, 1 - yes)
            compared = [_test(labels, greedy, answers), f"{rates(same, labels)[0]:.3f}", _test(labels, same, answers)]
            lines.append(f"| {name} | {kind} | {title} | {' | '.join(cells + (compared if decode else [''] * 3))} |")
    return lines


def _test(labels: Tensor, first: Answers, second: Answers) -> str:
    test = mcnemar_exact(first.hits(labels), second.hits(labels))
    return f"+{test.won} / -{test.lost}, {test.p:.1g}"


def sampling_table(bench: Bench) -> list[str]:
    """Return exact expected figures under sampling, against what sharpening and truncation do by themselves."""
    ways: dict[str, Callable[[Reader, list[Question]], Answers]] = {
        "greedy": lambda reader, asked: reader.decide(reader.read(asked)),
        "T = 1": _sampled(Reader.read),
        "T = 1, mask only": _sampled(lambda reader, asked: combine((reader.read(asked),), (1,), alpha=MASK)),
        "T = 1/2": _sampled(Reader.read, 1 / 2),
        "T = 1/4": _sampled(Reader.read, 1 / 4),
        **{f"{title}, T = 1": _sampled(decode) for title, decode in METHODS.items()},
        "RITUAL / (1 + kappa), T = 1": _sampled(Reader.ritual, 1 + RITUAL[1]),
    }
    heads = [f"{kind}: accuracy | F1 | yes" for kind in NEGATIVES]
    lines = ["| models | decoding | " + " | ".join(heads) + " |", "|---|---|" + "---|" * (3 * len(NEGATIVES))]
    for title, names in (("mean of three seeds", SEEDS), (CONTROL, (CONTROL,))):
        for way, answer in ways.items():
            cells = []
            for asked in bench.asked.values():
                found = [rates(answer(bench.readers[name], asked), truth(asked)) for name in names]
                accuracy, _, _, f1, yes = (statistics.mean(column) for column in zip(*found, strict=True))
                cells += [f"{accuracy:.3f}", f"{f1:.3f}", f"{yes:.3f}"]
            lines.append(f"| {title} | {way} | {' | '.join(cells)} |")
    return lines


def _sampled(
    decode: Callable[[Reader, list[Question]], Tensor], temperature: float = 1.0
) -> Callable[[Reader, list[Question]], Answers]:
    return lambda reader, asked: reader.sample(decode(reader, asked), temperature)


def captions_table(bench: Bench, count: int = 200) -> list[str]:
    """Return CHAIR of greedy captions: hallucinated among the objects named, captions with any, recall, objects named."""
    lines = ["| model | decoding | CHAIR_i | CHAIR_s | recall | objects named | captions freed / spoilt, p |"]
    lines += ["|---|---|---|---|---|---|---|"]
    pictures = bench.pictures[:count]
    for name, reader in tqdm(bench.readers.items(), desc="captions"):
        freed: list[list[bool]] = []
        for title, setting in (("greedy", None), ("VCD", VCD), ("VCD as published", VCD_PUBLISHED)):
            named = [scenes.mentioned(text) for text in reader.describe(pictures, setting)]
            counts = [
                chair.CaptionCounts(
                    len(words),
                    sum(word not in scene.objects for word in words),
                    len(scene.objects & set(words)),
                    len(scene.objects),
                )
                for scene, words in zip(pictures, named, strict=True)
            ]
            freed.append([not count.wrong for count in counts])
            test = mcnemar_exact(freed[0], freed[-1])
            cells = [*chair.rates(counts), sum(map(len, named)) / len(pictures)]
            note = f"+{test.won} / -{test.lost}, {test.p:.1g}" if setting else ""
            lines.append(f"| {name} | {title} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {note} |")
    return lines


def expectation_table(bench: Bench) -> list[str]:
    """Return what a new training should give: 95% prediction intervals over the three seeds."""
    lines = ["| accuracy | mean of three seeds | a new training should give |", "|---|---|---|"]
    for kind in NEGATIVES:
        for title in dict.fromkeys(name.split(", ")[2] for name in bench.figures):
            names = [f"{seed}, {kind}, {title}" for seed in SEEDS]
            values = [bench.figures[name].value for name in names]
            mean, low, high = prediction_interval(values)
            bench.figures |= {name: Figure(value, low, high) for name, value in zip(names, values, strict=True)}
            lines.append(f"| {kind}, {title} | {mean:.3f} | {low:.3f} to {high:.3f} |")
    return lines


def measure(bench: Bench) -> str:
    """Return all tables as Markdown."""
    dev, asked = (len(questions["random"]) for questions in (bench.dev, bench.asked))
    sections = {
        f"Settings, on {dev} development questions per kind (mean accuracy of the three seeds)": dev_table,
        "What the models believe: mean probability of yes, by where the object is": belief_table,
        f"Test questions, greedy ({asked} per kind; Wilson intervals, exact McNemar tests)": questions_table,
        "Test questions, sampling (exact expectations)": sampling_table,
        "Captions of 200 test pictures, greedy (exact McNemar tests on captions without hallucination)": captions_table,
        "What a new training should give (95% prediction interval over the seeds)": expectation_table,
    }
    return "\n".join("\n".join([f"### {title}", "", *table(bench), ""]) for title, table in sections.items())


def main() -> None:
    """Measure, and write the card or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="a folder that `python -m contralto.testbed train` filled")
    parser.add_argument("--pictures", type=int, default=400, help="test pictures, six questions of each kind on each")
    parser.add_argument("--dev", type=int, default=150, help="development pictures")
    args = parser.parse_args()
    bench = Bench(args.models or CARD.parent / "vision_models", args.pictures, args.dev)
    write_or_compare(measure(bench), bench.figures, CARD, "vision_card", compares=bool(args.models))


if __name__ == "__main__":
    main()
