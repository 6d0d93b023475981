"""Train the embedded vision-language models with losses that read images, and print what each changes in captions.

    python benchmarks/image_loss_card.py --folder out --results benchmarks/results/image_losses.md

The models caption from habit: they name objects that usually are in a place, and overlook some that are there. Rows are pictures with their
true caption (chosen) and the caption of an annotator with the habits, where it is wrong (rejected). mDPO also gets a crop of a fifth of the
picture; S-VCO in place of the wrong caption another picture of the place with its true caption. Controls: SFT on the chosen captions alone,
and CAL, which weighs their tokens by the image. The rate of each loss is the best of two on development pictures, by captions of one model.
Stopped, the command goes on where it was.
"""

import argparse
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL.Image import Image as Picture
from real.units import Units
from timing import named_versions, publish
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import CALConfig, CALTrainer, PreferenceConfig, PreferenceTrainer
from contralto.common.columns import as_dataset
from contralto.common.hub import from_pretrained
from contralto.data_gen.columns import stored
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import scenes

MODELS, SEED = ("vision-0", "vision-1", "vision-2"), 2041
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "max_length": None,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
}
PAIRS_ALONE: dict[str, Any] = {"monitor_pairs": 0, "audit": "off", "head_metrics": "none", "report": False}
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "cal": {},
    "sigmoid": {"beta": 0.1},
    "mdpo": {"beta": 0.1, "mdpo_delta": 0.0},
    "svco": {"beta": 0.1},
}
CONTROL = "sft"


def turns(caption: str, role: str = "assistant") -> list[dict[str, str]]:
    """Return a message."""
    return [{"role": role, "content": caption}]


def true_caption(scene: scenes.Scene) -> str:
    """Return the caption that names what is there."""
    return scenes.caption(scene.place, scene.objects)


def crop(picture: Picture, draws: random.Random) -> Picture:
    """Return a fifth of a picture, enlarged to its size."""
    width, height = (round(side * 0.2**0.5) for side in picture.size)
    left, top = draws.randrange(picture.width - width + 1), draws.randrange(picture.height - height + 1)
    return picture.crop((left, top, left + width, top + height)).resize(picture.size)


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield pictures with a right and a wrong caption, a crop, and another picture of the place with its caption."""
    draws, made = random.Random(SEED), 0
    others: dict[str, scenes.Scene] = {}
    for scene in scenes.scenes(SEED, "train"):
        wrong = scenes.caption(scene.place, scenes.annotate(scene, draws))
        other, others[scene.place] = others.get(scene.place), scene
        if wrong == true_caption(scene) or other is None or other.objects == scene.objects:
            continue
        picture = scene.image()
        yield {"picture": picture, "true": true_caption(scene), "wrong": wrong, "crop": crop(picture, draws)} | {
            "other": other.image(),
            "of_other": true_caption(other),
        }
        made += 1
        if made == count:
            return


def dataset(made: Sequence[dict[str, Any]], loss: str) -> Dataset:
    """Return the rows as a loss reads them."""
    chosen = [{"prompt": turns(scenes.DESCRIBE, "user"), "chosen": turns(row["true"])} for row in made]
    if loss == "cal":
        chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in chosen]
    else:
        rejected = ["of_other" if loss == "svco" else "wrong"] * len(made)
        chosen = [row | {"rejected": turns(one[key])} for row, one, key in zip(chosen, made, rejected, strict=True)]
    pictures = {"images": ["picture"]} | {
        "svco": {"rejected_images": ["other"]},
        "mdpo": {"rejected_images": ["crop"]},
    }.get(loss, {})
    known = {
        name: ([[stored(row[key]) for key in keys] for row in made], List(Image())) for name, keys in pictures.items()
    }
    return as_dataset(chosen, known=known)


@torch.inference_mode()
def captions(model: Any, processor: Any, pictures: Sequence[scenes.Scene], size: int = 50) -> list[str]:
    """Return greedy captions."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scenes.DESCRIBE}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    texts: list[str] = []
    for start in range(0, len(pictures), size):
        shown = [scene.image() for scene in pictures[start : start + size]]
        inputs = processor(images=shown, text=[prompt] * len(shown), padding=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def measure(model: Any, processor: Any, pictures: Sequence[scenes.Scene]) -> dict[str, Any]:
    """Return of each caption whether it is right, the objects that it invents, and those that it overlooks."""
    found = [set(scenes.mentioned(text)) for text in captions(model, processor, pictures)]
    pairs = list(zip(found, pictures, strict=True))
    return {
        "right": [named == scene.objects for named, scene in pairs],
        "invented": [len(named - scene.objects) for named, scene in pairs],
        "overlooked": [len(scene.objects - named) for named, scene in pairs],
        "named": [len(named) for named, _ in pairs],
        "present": [len(scene.objects) for _, scene in pairs],
    }


class Bench:
    """The pictures, and the outcomes of trainings in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.made = list(rows(args.rows))
        self.dev = list(islice(scenes.scenes(SEED, "dev"), args.pictures // 2))
        self.test = list(islice(scenes.scenes(SEED, "test"), args.pictures))
        self.units = Units(args.folder / "units.jsonl", {})

    def key(self, loss: str, model: str, rate: float | None, split: str) -> dict[str, Any]:
        """Return what determines an outcome."""
        sizes = {name: getattr(self.args, name) for name in ("rows", "steps", "batch", "pictures")}
        return {"loss": loss, "model": model, "rate": rate, "split": split, **sizes}

    def outcome(self, loss: str, model: str, rate: float | None, split: str) -> dict[str, Any]:
        """Return an outcome, from the folder if it is there."""
        key = self.key(loss, model, rate, split)
        if key not in self.units:
            processor = from_pretrained(AutoProcessor, str(testbed.path(model)))
            start = from_pretrained(AutoModelForImageTextToText, str(testbed.path(model))).eval()
            trained = start if rate is None else self.trained(loss, model, rate, processor)
            self.units.add(key, measure(trained, processor, self.dev if split == "dev" else self.test))
        found: dict[str, Any] = self.units[key]
        return found

    def trained(self, loss: str, model: str, rate: float, processor: Any) -> Any:
        """Return a model with the adapter that a training leaves."""
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        sizes = {"max_steps": self.args.steps, "per_device_train_batch_size": self.args.batch, "learning_rate": rate}
        make: Callable[..., Any] = CALTrainer if loss == "cal" else PreferenceTrainer
        with tempfile.TemporaryDirectory(dir=self.args.folder) as out:
            options = {**SHARED, **sizes, **LOSSES[loss]}
            args = (
                CALConfig(out, **options)
                if loss == "cal"
                else PreferenceConfig(out, loss_type=[loss], **PAIRS_ALONE, **options)
            )
            data = dataset(self.made, loss)
            one = make(
                str(testbed.path(model)), args=args, train_dataset=data, peft_config=lora, processing_class=processor
            )
            one.remove_callback(PrinterCallback)
            one.train()
            return one.accelerator.unwrap_model(one.model).merge_and_unload().eval()

    def rate(self, loss: str) -> float:
        """Return the rate with most right captions of development pictures, the lower of equals."""
        rates: list[float] = self.args.rates
        return max(rates, key=lambda rate: (sum(self.outcome(loss, MODELS[0], rate, "dev")["right"]), -rate))


def table(bench: Bench) -> list[str]:
    """Return the table, after the trainings that have no outcome yet."""
    chosen: dict[str, float | None] = {"before": None}
    for loss in tqdm(LOSSES, desc="rates"):
        chosen[loss] = bench.rate(loss)
    jobs = [(loss, rate, model) for loss, rate in chosen.items() for model in MODELS]
    outcomes = {
        (loss, model): bench.outcome(loss, model, rate, "test") for loss, rate, model in tqdm(jobs, desc="test")
    }
    head: tuple[str, ...] = ("loss", "rate", "model", f"right captions of {len(bench.test)}", "CHAIR_i", "overlooked")
    head += ("over before", f"over {CONTROL}")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for loss, rate, model in jobs:
        found = outcomes[loss, model]
        tests = [mcnemar_exact(outcomes[other, model]["right"], found["right"]) for other in ("before", CONTROL)]
        over = [f"+{test.won} / -{test.lost}, {test.p:.1g}" for test in tests]
        shares = (
            statistics.fmean(found["invented"]) / max(statistics.fmean(found["named"]), 1e-9),
            statistics.fmean(found["overlooked"]) / statistics.fmean(found["present"]),
        )
        cells = (loss, f"{rate:g}" if rate else "", model, str(proportion(found["right"])))
        lines.append(f"| {' | '.join((*cells, *(f'{share:.3f}' for share in shares), *over))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the outcomes of trainings")
    parser.add_argument("--rows", type=int, default=256, help="training pictures (default 256)")
    parser.add_argument("--steps", type=int, default=64, help="steps of each training (default 64)")
    parser.add_argument("--batch", type=int, default=8, help="rows per step (default 8)")
    parser.add_argument("--pictures", type=int, default=400, help="test pictures (default 400)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 2e-3], help="learning rates")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    lines = table(Bench(args))
    text = "\n".join((__doc__ or "").split("\n\n")[2].strip().split("\n")[:-1])
    about = (
        f"{args.rows} rows, {args.steps} steps of {args.batch}, LoRA of rank 8. CHAIR_i: share of the named objects that are not there; "
        "overlooked: share of those that are there. Tests are exact McNemar's."
    )
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    publish(["# Losses that read images", "", text, "", *lines, "", f"{about} {versions}"], args.results)


if __name__ == "__main__":
    main()
