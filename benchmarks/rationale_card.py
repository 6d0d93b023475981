"""Train small models on demonstrations of C-RAG and on rationales of QCRD, and print what each part of them is worth: two small experiments.

    python benchmarks/rationale_card.py c_rag --folder out --results benchmarks/results/c_rag.md
    python benchmarks/rationale_card.py qcrd --folder out --results benchmarks/results/qcrd.md

Stopped, a command goes on where it was: the folder keeps the outcome of every training.

*c_rag*: how many of a thing a person has, and four passages: one tells it, the others are of another person, of other things, or of both. A
program is the teacher; in one of five demonstrations it takes a wrong passage. Models of the testbed's shape learn from scratch, each from as
many tokens. Controls: the answer alone, the explanation and the answer without the contrast, contrasts of other rows, and demonstrations that
nobody checked.

*qcrd*: the teacher is the expert of the world without the shortcut, sampled five times at temperature 0.7; the student an expert that learned the
shortcut, which also writes the negative rationales at temperature 1.5. Controls: the student before, the positive rationales alone, and negative
rationales of other problems. The discriminator is a reward model, trained from the student on pairs of the same strategy.
"""

import argparse
import hashlib
import itertools
import json
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions, publish
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import UnpairedConfig, UnpairedTrainer
from contralto.align.trainers.reward import MarginRewardConfig, MarginRewardTrainer
from contralto.data_gen import export, pipeline
from contralto.data_gen.recipe import load_recipe
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store
from contralto.data_gen.strategies.c_rag import c_rag, c_rag_messages
from contralto.data_gen.types import Answer, drive
from contralto.eval.judging.rag import rag_figures
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import tokenization, worlds
from contralto.testbed.measure import decode, is_right
from contralto.testbed.optimization import fit

IGNORED = -100
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
}


class Kept:
    """Outcomes in a folder, by their titles and sizes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.folder.mkdir(parents=True, exist_ok=True)

    def run(self, title: str, measure: Callable[[], Any]) -> Any:
        """Return an outcome, from the folder if it is there."""
        sizes = (self.args.part, self.args.rows, self.args.steps, self.args.problems)
        kept = self.args.folder / f"{hashlib.sha256(repr((title, sizes)).encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(measure()))
            unfinished.replace(kept)
        return json.loads(kept.read_text())


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def test_of(control: Sequence[bool], hits: Sequence[bool]) -> str:
    """Return McNemar's exact test of two models on the same items."""
    test = mcnemar_exact(control, hits)
    return f"+{test.won} / -{test.lost}, {test.p:.1g}"


# -------------------------------------------------------------------------------------------------------------- c_rag

MISTAKES = 0.2
"""Share of demonstrations in which the teacher takes a wrong passage."""
TEMPLATE = "{question}: {{ task }}\n{passages}:\n{{ passages }}"
ARMS = ("answer", "explanation", "c_rag", "contrasts of others", "unchecked")


class Question(NamedTuple):
    """A question with its passages, which are problems."""

    problems: tuple[worlds.Problem, ...]
    gold: int

    @property
    def row(self) -> dict[str, Any]:
        """Return the row for the strategy."""
        asked = self.problems[self.gold]
        told = [f"{problem.name} has {problem.start} {problem.thing}." for problem in self.problems]
        question = f"How many {asked.thing} does {asked.name} have?"
        return {
            "id": f"{question} {' '.join(told)}",
            "prompt": [{"role": "user", "content": question}],
            "passages": told,
            "answers": asked.start,
            "gold": [self.gold],
        }

    def reply(self, taken: int) -> str:
        """Return the demonstration of a teacher that takes one of the passages."""
        asked, used = self.problems[self.gold], self.problems[taken]
        lines = []
        for at, problem in enumerate(self.problems):
            word = "relevant" if at == taken else "irrelevant"
            why = "who and what" if at == taken else "other who" if problem.name != asked.name else "other what"
            lines.append(f"[{at + 1}] {word}: {problem.name}, {problem.thing}, {why}.")
        contrast, argument = "\n".join(lines), f"[{taken + 1}]: {used.name} has {used.start} {used.thing}."
        return f"{{contrast}}:\n{contrast}\n{{explanation}}:\n{argument}\n{{answer}}:\n{used.start}"


def questions(seed: int, split: worlds.Split) -> Iterator[Question]:
    """Yield questions without end: the beginning of a problem among those of three others."""
    rng = random.Random(f"{seed} {split}")
    drawn = worlds.problems(seed, split)
    for asked in drawn:
        name, other = rng.sample([n for n in worlds.NAMES if n != asked.name], 2)
        thing, another = rng.sample([t for t in worlds.THINGS if t != asked.thing], 2)
        whose = [(asked.name, thing), (name, asked.thing), (other, another)]
        others = [next(drawn)._replace(name=who, thing=what) for who, what in whose]
        problems = [asked, *others]
        rng.shuffle(problems)
        yield Question(tuple(problems), problems.index(asked))


def demonstrations(seed: int, count: int, template: Path, *, keep: str) -> Iterator[tuple[str, str]]:
    """Yield prompts and completions that the strategy makes of the teacher's replies."""
    rng = random.Random(seed)
    for question in itertools.islice(questions(seed, "train"), count):
        wrong = [at for at in range(len(question.problems)) if at != question.gold]
        taken = rng.choice(wrong) if rng.random() < MISTAKES else question.gold
        driven = drive(c_rag(question.row, gold="gold", keep=keep, template=str(template)))
        next(driven)
        try:
            driven.send([Answer(text=question.reply(taken))])
        except StopIteration as end:
            for made in end.value:
                if hasattr(made, "completion"):
                    yield made.prompt[0]["content"], made.completion


def parts(completion: str) -> tuple[str, str, str]:
    """Return the contrast, the explanation and the answer of a demonstration, each with its heading."""
    contrast, _, rest = completion.partition("{explanation}:")
    explanation, _, answer = rest.partition("{answer}:")
    return contrast, f"{{explanation}}:{explanation}", f"{{answer}}:{answer}"


def rows_of(arm: str, seed: int, count: int, template: Path) -> list[tuple[str, str]]:
    """Return the prompts and completions from which one of `ARMS` learns."""
    rows = list(demonstrations(seed, count, template, keep="all" if arm == "unchecked" else "right"))
    if arm in ("c_rag", "unchecked"):
        return rows
    split = [parts(completion) for _, completion in rows]
    shown = {
        "answer": [answer for _, _, answer in split],
        "explanation": [explanation + answer for _, explanation, answer in split],
        "contrasts of others": [
            split[at - 1][0] + explanation + answer for at, (_, explanation, answer) in enumerate(split)
        ],
    }[arm]
    return [(prompt, completion) for (prompt, _), completion in zip(rows, shown, strict=True)]


def vocabulary(texts: Sequence[str]) -> Any:
    """Return a tokenizer of the testbed's kind for some texts."""
    pattern = r"▁?(\d|\p{L}+|#+|[^▁\d\p{L}#])"
    special = tokenization.SPECIAL_TOKENS
    template = {"chat_template": tokenization.CHAT_TEMPLATE}
    first = tokenization.word_level([*special, "x"], pattern, special[4:], **template)
    split = first.backend_tokenizer.pre_tokenizer
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    return tokenization.word_level([*special, *words], pattern, special[4:], **template)


def learn(rows: Sequence[tuple[str, str]], tokenizer: Any, seed: int, *, steps: int, batch: int) -> Any:
    """Return a model of the testbed's shape that has learned completions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    encoded, rng = [_encoded(prompt, completion, tokenizer) for prompt, completion in rows], random.Random(seed)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(steps):
            chosen = rng.sample(encoded, batch)
            width = max(len(ids) for ids, _ in chosen)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in chosen]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in chosen]),
            )

    fit(
        model,
        batches(),
        lambda both: model(input_ids=both[0], labels=both[1]).loss,
        steps=steps,
        adamw_lr=0.01,
        after_step=lambda step: None,
    )
    return model.eval()


def _encoded(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    end = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return start + end, [IGNORED] * len(start) + end


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Return a model's greedy replies."""
    texts: list[str] = []
    for start in range(0, len(prompts), 100):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 100]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def c_rag_card(args: argparse.Namespace) -> list[str]:
    """Return the table of the demonstrations."""
    kept, template = Kept(args), args.folder / "template.txt"
    template.write_text(TEMPLATE)
    tests = [question.row for question in itertools.islice(questions(1, "test"), args.problems)]
    prompts = [c_rag_messages(row, template=str(template))[0]["content"] for row in tests]
    lines, whole = [], {}

    def measured(arm: str, seed: int) -> dict[str, Any]:
        rows = rows_of(arm, seed, args.rows, template)
        full = rows_of("unchecked", seed, args.rows, template)
        tokenizer = vocabulary([*prompts, *(text for row in full for text in row)])
        length = {
            name: statistics.mean(len(_encoded(*row, tokenizer)[0]) for row in some[:200])
            for name, some in (("own", rows), ("full", full))
        }
        steps = round(args.steps * length["full"] / length["own"])
        model = learn(rows, tokenizer, seed, steps=steps, batch=32)
        heads = {"answer": "{contrast}: none\n{explanation}: none\n", "explanation": "{contrast}: none\n"}.get(arm, "")
        shown = [
            {**row, "text": heads + text} for row, text in zip(tests, replies(model, tokenizer, prompts), strict=True)
        ]
        hits = [rag_figures([row]).accuracy.value == 1 for row in shown]
        figures = rag_figures(shown)
        return {"hits": hits, "support": figures.support, "readable": figures.readable, "steps": steps}

    for seed in range(args.seeds):
        for arm in ARMS:
            whole[arm, seed] = kept.run(f"{arm}, seed {seed}", partial(measured, arm, seed))
            print(arm, seed, statistics.mean(whole[arm, seed]["hits"]), whole[arm, seed]["support"], flush=True)
    for arm, seed in itertools.product(ARMS, range(args.seeds)):
        outcome = whole[arm, seed]
        support = "" if outcome["support"] is None else f"{outcome['support']:.3f}"
        over = test_of(whole["explanation", seed]["hits"], outcome["hits"])
        cells = (arm, str(seed), str(outcome["steps"]), str(proportion(outcome["hits"])), support)
        lines.append((*cells, f"{outcome['readable']:.3f}", over))
    head = ("learned from", "seed", "steps", f"right of {len(tests)}", "support", "readable", "over explanation")
    return table(head, lines)


# --------------------------------------------------------------------------------------------------------------- qcrd

ROWS_SEED = 2043
RECIPE = """\
output: {output}
rows: {{source: "contralto.testbed.questions:problems", arguments: {{count: {rows}, seed: {seed}, split: train}}}}
strategies: [{{use: qcrd, keep: {keep}, pattern: '####\\s*(\\d+)', template: plain.txt, explain: plain.txt, predict: plain.txt{scorer}}}]
roles:
  teacher: {{engine: transformers, model: "testbed:control-expert", temperature: 0.7, max_new_tokens: 80, batch_size: 64}}
  student: {{engine: transformers, model: "testbed:expert-{student}", temperature: 1.5, max_new_tokens: 80, batch_size: 64}}
"""
LOSSES = ("positive alone", "qcrd", "qcrd, discriminator", "qcrd, negatives of others")


def made_rows(args: argparse.Namespace, student: int, *, keep: str, scorer: str = "") -> list[dict[str, Any]]:
    """Return the rows that a recipe makes; answers are asked for once."""
    folder = args.folder / f"student-{student}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.txt").write_text("{{ task }}")
    settings = {"rows": args.rows, "seed": ROWS_SEED, "student": student, "keep": keep}
    path = folder / f"{keep}.yaml"
    path.write_text(RECIPE.format(output=f"data-{args.rows}", scorer=scorer, **settings))
    recipe = load_recipe(path)
    rows = read_rows(recipe.rows, folder=folder)
    recipe.output.mkdir(parents=True, exist_ok=True)
    with Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store)
        return [row for result in pipeline.replay(recipe, rows, store) for row in export.pair_rows(result)]


def discriminator(args: argparse.Namespace, student: int) -> Path:
    """Return the folder of a reward model that tells positive from negative rationales."""
    folder: Path = args.folder / f"discriminator-{student}-{args.rows}"
    if not (folder / "model.safetensors").exists():
        pairs = Dataset.from_list(
            [
                {name: row[name] for name in ("prompt", "chosen", "rejected", "margin")}
                for row in made_rows(args, student, keep="pairs")
            ]
        )
        config = MarginRewardConfig(
            str(folder), max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-3, seed=0, **SHARED
        )
        trainer = MarginRewardTrainer(str(testbed.path(f"expert-{student}")), config, train_dataset=pairs)
        trainer.train()
        trainer.save_model(str(folder))
    return folder


def rows_for(loss: str, args: argparse.Namespace, student: int) -> list[dict[str, Any]]:
    """Return the rationales from which one of `LOSSES` learns."""
    scorer = ""
    if loss == "qcrd, discriminator":
        scorer = f", scorer: {{reward_model: {json.dumps(str(discriminator(args, student).resolve()))}}}"
    rows = [row for row in made_rows(args, student, keep="labelled", scorer=scorer) if row["task"] == "explain"]
    if loss == "positive alone":
        return [row for row in rows if row["label"]]
    if loss == "qcrd, negatives of others":
        negative = [row for row in rows if not row["label"]]
        texts = [row["completion"] for row in negative]
        moved = [{**row, "completion": texts[at - 1]} for at, row in enumerate(negative)]
        return [row for row in rows if row["label"]] + moved
    return rows


def qcrd_card(args: argparse.Namespace) -> list[str]:
    """Return the table of the rationales."""
    kept, tokenizer = Kept(args), testbed.tokenizer()
    problems = list(itertools.islice(worlds.problems(ROWS_SEED, "test"), args.problems))

    def solved(model: Any) -> list[bool]:
        return [is_right(p, text) for p, text in zip(problems, decode(model, tokenizer, problems), strict=True)]

    def trained(loss: str, student: int) -> dict[str, Any]:
        rows = rows_for(loss, args, student)
        qualities = [
            statistics.mean([row["quality"] for row in rows if row["label"] is side] or [0]) for side in (True, False)
        ]
        data = Dataset.from_list([{n: row[n] for n in ("prompt", "completion", "label", "quality")} for row in rows])
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory(dir=args.folder) as out:
            config = UnpairedConfig(
                out,
                loss_type=["retain" if loss == "positive alone" else "qcrd"],
                max_steps=args.steps,
                per_device_train_batch_size=16,
                learning_rate=args.rate,
                seed=0,
                **SHARED,
            )
            model = str(testbed.path(f"expert-{student}"))
            trainer = UnpairedTrainer(model, args=config, train_dataset=data, peft_config=lora)
            trainer.train()
            made = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().eval()
        return {"hits": solved(made), "rows": len(rows), "qualities": qualities}

    def untrained(student: int) -> dict[str, Any]:
        return {"hits": solved(testbed.load(f"expert-{student}"))}

    lines = []
    for student in range(args.seeds):
        before = kept.run(f"before, {student}", partial(untrained, student))
        outcomes = {
            loss: kept.run(f"{loss}, {student}, {args.rate}", partial(trained, loss, student)) for loss in LOSSES
        }
        control = outcomes["positive alone"]["hits"]
        lines.append(
            ("before", str(student), "", "", str(proportion(before["hits"])), "", test_of(control, before["hits"]))
        )
        for loss, outcome in outcomes.items():
            print(loss, student, statistics.mean(outcome["hits"]), flush=True)
            shown = "" if loss == "positive alone" else " / ".join(f"{each:.2f}" for each in outcome["qualities"])
            tests = (test_of(before["hits"], outcome["hits"]), test_of(control, outcome["hits"]))
            lines.append((loss, str(student), str(outcome["rows"]), shown, str(proportion(outcome["hits"])), *tests))
    head = ("loss", "expert", "rows", "quality +/-", f"right of {len(problems)}", "over before", "over positive alone")
    return table(head, lines)


PARTS = {"c_rag": c_rag_card, "qcrd": qcrd_card}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the outcomes of trainings")
    parser.add_argument("--rows", type=int, help="questions to learn from (default 8000 of c_rag, 300 of qcrd)")
    parser.add_argument("--steps", type=int, help="steps of each training (default 1500 of c_rag, 60 of qcrd)")
    parser.add_argument("--problems", type=int, default=300, help="questions of the test (default 300)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of qcrd (default 1e-4)")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    args.rows = args.rows or (8000 if args.part == "c_rag" else 300)
    args.steps = args.steps or (1500 if args.part == "c_rag" else 60)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    lines = PARTS[args.part](args)
    text = (__doc__ or "").split(f"*{args.part}*: ")[1].split("\n\n")[0].strip()
    about = f"{args.rows} questions, {args.steps} steps of {32 if args.part == 'c_rag' else 16}."
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    title = {"c_rag": "Contrastive explanations", "qcrd": "Rationales by their quality"}[args.part]
    page = [f"# {title}", "", text[0].upper() + text[1:], "", "## Figures", "", *lines, "", f"{about} {versions}"]
    publish(page, args.results)


if __name__ == "__main__":
    main()
