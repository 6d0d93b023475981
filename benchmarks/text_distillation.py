"""Distil the embedded expert from a teacher with another vocabulary, and print what each loss changes.

    python benchmarks/text_distillation.py --folder out --results benchmarks/results/text_distillation.md
    python benchmarks/text_distillation.py --folder out --teacher bpe

Stopped, it goes on where it was: the folder keeps the teacher and the outcome of every training.

The student is an embedded expert, whose corpus has the shortcut. The teacher is the expert of the corpus without the shortcut. Its tokens are
the student's under other ids (`shuffled`), so that losses of one vocabulary cannot be used; or it is a model of the same size with byte-level
BPE, trained first (`bpe`). It writes one solution of each training problem, which every loss learns from. Control: `sft` on these texts.
Where there are several `--rates`, the learning rate of each loss is the best on dev problems, with the first seed; seeds draw problems,
texts and order.
"""

import argparse
import hashlib
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from timing import named_versions, publish
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import DistillationConfig, DistillationPairTrainer
from contralto.common.hub import from_pretrained
from contralto.eval.stats import holm, mcnemar_exact, proportion
from contralto.testbed import tokenization, training, worlds
from contralto.testbed.measure import decode, is_right

STUDENT, TEACHER, SEED = "expert-0", "control-expert", 2051
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"loss_type": "sft"},
    "uld": {"loss_type": "uld"},
    "uld, by text": {"loss_type": "uld", "pairing": "text"},
    "gold": {"loss_type": "gold", "lmbda": 0.0},
    "gold, bayesian": {"loss_type": "gold", "lmbda": 0.0, "merge": "bayesian"},
    "gold, on policy": {"loss_type": "gold", "on_policy": 1.0, "max_new_tokens": 80},
}
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 5,
    "use_cpu": True,
    "audit": "off",
}


class Outcome(NamedTuple):
    """The measurements of a student."""

    right: list[bool]
    """Which test problems are solved."""
    perplexity: float
    """Per token of the student, of right solutions of other test problems."""
    aligned: float
    """The share of the student's tokens in the teacher's texts that were compared; 0 without a comparison."""


def byte_level(size: int = 400) -> Any:
    """Return a byte-level BPE tokenizer that has learned the problems and solutions of the training split."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{document.prompt or ''} {document.text}" for document in islice(worlds.corpus(SEED), 2000))
    backend.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<|end|>"}
    options = {"additional_special_tokens": special[3:], "padding_side": "left", "model_max_length": 512}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)  # type: ignore[no-untyped-call]
    made.chat_template = tokenization.CHAT_TEMPLATE
    return made


def make_bpe(folder: Path, steps: int) -> None:
    """Train the teacher with byte-level BPE, and save it below a folder."""
    recipe, unfinished = training.RECIPES[TEACHER]._replace(steps=steps), folder.with_suffix(".part")
    with tqdm(total=steps, desc="teacher") as bar:

        def report(count: int) -> None:
            bar.update(count)

        training.train(TEACHER, unfinished, report, recipe=recipe, tokenizer=byte_level())
    unfinished.rename(folder)


def make_shuffled(folder: Path, steps: int) -> None:
    """Save the embedded teacher below a folder, with its tokens under other ids."""
    model, tokenizer = testbed.load(TEACHER), testbed.tokenizer()
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(SEED))
    place = order.argsort().tolist()  # of every token
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: place[at] for token, at in tokenizer.get_vocab().items()}
    for token in state["added_tokens"]:
        token["id"] = place[token["id"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    for token in state["post_processor"]["special_tokens"].values():
        token["ids"] = [place[at] for at in token["ids"]]
    weights = model.get_input_embeddings().weight
    weights.data = weights.data[order]  # the output layer is tied to it
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        moved = place[getattr(tokenizer, name)]
        setattr(model.config, name, moved)
        setattr(model.generation_config, name, moved)
    model.save_pretrained(folder / TEACHER)
    tokenizer.save_pretrained(folder / TEACHER)
    (folder / TEACHER / "tokenizer.json").write_text(json.dumps(state))


TEACHERS = {"shuffled": make_shuffled, "bpe": make_bpe}


class Bench:
    """The teacher, its texts, and the outcomes in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, testbed.tokenizer()
        args.folder.mkdir(parents=True, exist_ok=True)
        self.problems = {
            split: list(islice(worlds.problems(SEED, split), count))  # type: ignore[arg-type]
            for split, count in (("dev", args.problems // 2), ("test", 2 * args.problems))
        }
        folder = args.folder / f"{TEACHER}-{args.teacher}-{args.teacher_steps}"
        if not folder.is_dir():
            TEACHERS[args.teacher](folder, args.teacher_steps)
        self.teacher_folder = str(folder / TEACHER)
        self.teacher: Any = from_pretrained(AutoModelForCausalLM, self.teacher_folder).eval()
        self.teacher_tokenizer = from_pretrained(PreTrainedTokenizerFast, self.teacher_folder)

    def texts(self, seed: int) -> Dataset:
        """Return the teacher's solutions of training problems."""
        problems = list(islice(worlds.problems(SEED + 1 + seed, "train"), self.args.rows))
        written = decode(self.teacher, self.teacher_tokenizer, problems, temperature=0.8)
        rows = [
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": text}],
            }
            for problem, text in zip(problems, written, strict=True)
            if text.strip()
        ]
        return Dataset.from_list(rows)

    def train(self, name: str, rate: float, seed: int) -> tuple[Any, float]:
        """Return a trained student, and the share of its tokens that were compared."""
        options = LOSSES[name]
        teacher: dict[str, Any] = (
            {} if options["loss_type"] == "sft" else {"teacher_model_name_or_path": self.teacher_folder}
        )
        with tempfile.TemporaryDirectory(dir=self.args.folder) as out:
            sizes = {"num_train_epochs": self.args.epochs, "per_device_train_batch_size": self.args.batch}
            args = DistillationConfig(out, seed=seed, learning_rate=rate, **SHARED, **sizes, **options, **teacher)
            one = DistillationPairTrainer(str(testbed.path(STUDENT)), args=args, train_dataset=self.texts(seed))
            one.remove_callback(PrinterCallback)
            one.train()
        shares = [line["aligned/chosen"] for line in one.state.log_history if "aligned/chosen" in line]
        return one.model.eval(), statistics.mean(shares or [0.0])

    def measure(self, model: Any, split: str, aligned: float = 0.0) -> Outcome:
        """Return the measurements of a student on problems of a split."""
        problems = self.problems[split]
        held_out = problems[self.args.problems :] or problems
        problems = problems[: self.args.problems]
        texts = decode(model, self.tokenizer, problems)
        right = [is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]
        return Outcome(right, self.perplexity(model, held_out[:100]), aligned)

    @torch.inference_mode()
    def perplexity(self, model: Any, problems: Sequence[worlds.Problem]) -> float:
        """Return the perplexity of right solutions per token of the student."""
        total, count = 0.0, 0
        for problem in problems:
            chat = [{"role": "user", "content": problem.question}]
            prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            solution = self.tokenizer(problem.solution(), add_special_tokens=False)["input_ids"]
            ids = torch.tensor([*prompt, *solution, self.tokenizer.eos_token_id])
            logps = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(logps.gather(-1, ids[len(prompt) :, None]).sum())
            count += len(solution) + 1
        return math.exp(total / count)

    def run(self, name: str, rate: float, seed: int, split: str) -> Outcome:
        """Return the outcome of a training, from the folder if it is there."""
        args = self.args
        sizes = (args.rows, args.epochs, args.batch, args.problems, args.teacher, args.teacher_steps)
        key = hashlib.sha256(repr((name, rate, seed, split, sizes)).encode()).hexdigest()[:16]
        kept = args.folder / f"{key}.json"
        if not kept.exists():
            model, aligned = self.train(name, rate, seed)
            outcome = self.measure(model, split, aligned)
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(outcome))
            unfinished.replace(kept)
        return Outcome(*json.loads(kept.read_text()))


def table(bench: Bench) -> list[str]:
    """Return the table of the losses, and what remains of it after Holm's correction."""
    args, before = bench.args, bench.measure(testbed.load(STUDENT), "test")
    teacher = decode(bench.teacher, bench.teacher_tokenizer, bench.problems["test"][: args.problems])
    hits = [is_right(p, t) for p, t in zip(bench.problems["test"], teacher, strict=False)]
    head = (
        "learned by",
        "rate",
        "seed",
        f"right of {args.problems}",
        "over before",
        "over sft",
        "perplexity",
        "aligned",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines.append(f"| the teacher |  |  | {proportion(hits)} |  |  |  |  |")
    lines.append(f"| before |  |  | {proportion(before.right)} |  |  | {before.perplexity:.3f} |  |")
    controls: list[Outcome] = []
    tests = []
    for name in tqdm(args.losses, desc="losses"):
        rate = args.rates[0]
        if len(args.rates) > 1:
            solved = [sum(bench.run(name, each, 0, "dev").right) for each in args.rates]
            rate = args.rates[solved.index(max(solved))]
        for seed in range(args.seeds):
            outcome = bench.run(name, rate, seed, "test")
            first = mcnemar_exact(before.right, outcome.right)
            cells = [f"+{first.won} / -{first.lost}, {first.p:.1g}", ""]
            if len(controls) < args.seeds:
                controls.append(outcome)
            else:
                test = mcnemar_exact(controls[seed].right, outcome.right)
                tests.append((name, test))
                cells[1] = f"+{test.won} / -{test.lost}, {test.p:.1g}"
            share = f"{outcome.aligned:.3f}" if outcome.aligned else ""
            row = (
                name,
                f"{rate:g}",
                str(seed),
                str(proportion(outcome.right)),
                *cells,
                f"{outcome.perplexity:.3f}",
                share,
            )
            lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *_conclusion(tests)]


def _conclusion(tests: Sequence[tuple[str, Any]]) -> list[str]:
    adjusted = holm([test.p for _, test in tests])
    lines = [f"Of the {len(tests)} tests over `sft`, after Holm's correction for all of them:"]
    for word, sign in (("better", 1), ("worse", -1)):
        names = [
            name
            for (name, test), p in zip(tests, adjusted, strict=True)
            if p < 0.05 and sign * (test.won - test.lost) > 0
        ]
        told = ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names)) or "none"
        lines.append(f"- {word} at the level of 0.05 (number of seeds): {told}")
    return lines


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the teacher and the outcomes of trainings")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), help="sft first")
    parser.add_argument("--teacher", default="shuffled", choices=list(TEACHERS), help="see above (default shuffled)")
    parser.add_argument("--teacher_steps", type=int, default=1600, help="steps of a teacher of BPE (default 1600)")
    parser.add_argument("--rows", type=int, default=320, help="training problems (default 320)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each training (default 1)")
    parser.add_argument("--batch", type=int, default=8, help="texts per step (default 8)")
    parser.add_argument("--problems", type=int, default=200, help="test problems (default 200)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each loss (default 3)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4], help="learning rates (default 2e-4)")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    lines = table(Bench(args))
    about = (
        f"{args.rows} problems, {args.epochs} epoch{'s' * (args.epochs != 1)} of steps of {args.batch}, all weights of {STUDENT}; {args.teacher} teacher. "
        "Problems are solved greedily; tests are exact McNemar tests on the same problems; perplexity "
        "is of 100 other right solutions, per token of the student; aligned is the share of the student's tokens in the teacher's texts that "
        "are compared."
    )
    text = (__doc__ or "").split("\n\n")[3].strip()
    versions = named_versions("contralto", "torch", "transformers", "trl")
    title = "# A teacher with another tokenizer"
    publish([title, "", text, "", "## Figures", "", *lines, "", about, versions], args.results)


if __name__ == "__main__":
    main()
