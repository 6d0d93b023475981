"""Make an amateur of an expert: choose layers, write texts, distil, compare, describe. Every stage resumes where it stopped."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto.align.amateur.card import amateur_card
from contralto.align.amateur.choice import choose_layers
from contralto.align.amateur.influence import block_influence
from contralto.align.amateur.layers import cut_model, probe_rows
from contralto.align.amateur.report import AmateurFigures, compare_models, token_batches
from contralto.align.amateur.settings import AmateurConfig
from contralto.align.amateur.texts import Text, write_texts
from contralto.align.amateur.training import train_amateur
from contralto.align.work_folder import check_begun, record_settings
from contralto.common.files import locked_folder, read_text, replace_file, replace_text
from contralto.common.hashing import weights_digest
from contralto.common.head import find_layers
from contralto.common.hub import check_weights, from_pretrained

__all__ = ["Amateur", "make_amateur"]

CARD = "README.md"
MEASURED = 64
"""Number of texts on which the influence of layers is measured."""
MOST_HELD_OUT = 200


class Amateur(NamedTuple):
    """An amateur that was made."""

    folder: Path
    kept: list[int]
    """Numbers of the expert's layers that it has."""
    parameters: int
    share: float
    """Share of the expert's parameters."""
    figures: AmateurFigures | None
    """The comparison with the expert on held-out texts; None if no texts were written."""
    untrained: AmateurFigures | None
    """The same before training; None if it was not trained."""


def make_amateur(config: AmateurConfig) -> Amateur:
    """Make an amateur, or go on where an interrupted run stopped.

    Args:
        config: what to make.

    Returns:
        The amateur in `config.output`, a model that any `--amateur` reads, with a card.

    Raises:
        ValueError: the folder holds something else, or layers of the expert cannot be removed.
        OSError: another process makes the amateur.
    """
    folder = Path(config.output)
    settings = config.describe() | {"weights": weights_digest(config.model)}
    check_begun(folder, settings, "the amateur")
    with locked_folder(config.work, f"process {{pid}} makes the amateur {folder}: wait for it"):
        record_settings(folder, settings)
        return _Making(config).run()


class _Making:
    """The stages of one amateur."""

    def __init__(self, config: AmateurConfig) -> None:
        self.config, self.work = config, config.work
        check_weights(config.model)
        self.tokenizer = from_pretrained(AutoTokenizer, config.model)
        self.expert = from_pretrained(AutoModelForCausalLM, config.model, dtype=torch.float32).eval()
        self.depth = find_layers(self.expert).depth

    def run(self) -> Amateur:
        """Run the stages that are missing."""
        if not self.config.reads_texts:  # an amateur that cannot be made is rejected before texts are written
            kept = choose_layers(self.config.keep, self.depth, self.config.layers)
            self._cut(kept)
        texts = self._texts()
        held_out = texts[: min(MOST_HELD_OUT, max(1, round(len(texts) * self.config.held_out)))] if texts else []
        if self.config.reads_texts:
            kept = self._influential(texts[len(held_out) :])
            self._cut(kept)
        pruned = self.work / "pruned"
        untrained = self._figures("untrained", pruned, held_out)
        trained = pruned
        if self.config.trains:
            trained = self.work / "training"
            self._train(pruned, texts[len(held_out) :], trained)
        figures = self._figures("trained", trained, held_out) if self.config.trains else untrained
        return self._finish(
            trained, kept, figures, untrained if self.config.trains else None, len(texts), len(held_out)
        )

    def _cut(self, kept: list[int]) -> None:
        """Save the untrained amateur, and check that what was saved computes the same."""
        folder = self.work / "pruned"
        if (folder / "done").is_file():
            return
        smaller = cut_model(self.expert, kept)
        smaller.config.name_or_path = ""
        smaller.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        ids = probe_rows(smaller, 16)
        again = from_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            same = torch.equal(again(input_ids=ids).logits, smaller(input_ids=ids).logits)
        if not same:
            raise ValueError(
                f"{type(smaller).__name__} saved and loaded gives other logits: no amateur can be made of it"
            )
        replace_text(folder / "done", ",".join(map(str, kept)))

    def _texts(self) -> list[Text]:
        """Return the texts of the expert."""
        from contralto.data_gen.engines.transformers import TransformersEngine
        from contralto.data_gen.rows import RowSource, read_rows
        from contralto.data_gen.store import Store
        from contralto.data_gen.types import Sampling

        config = self.config
        if not config.texts:
            return []
        rows: Sequence[Any] = ()
        if config.prompts is not None:
            rows = read_rows(RowSource(source=config.prompts, prompt=config.prompt_column), folder=Path())
        engine = TransformersEngine(model=config.model, batch_size=64, dtype="bfloat16" if config.bf16 else "auto")
        with Store(self.work / "answers.sqlite") as store:
            return write_texts(
                engine,
                self.tokenizer,
                store,
                count=config.texts,
                sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
                seed=config.seed,
                rows=rows,
            )

    def _influential(self, texts: Sequence[Text]) -> list[int]:
        """Return the layers that change their input most on texts."""
        batches = token_batches(self.tokenizer, texts[:MEASURED], max_length=self.config.max_length)
        shown = tqdm(batches, desc="influence of layers", unit="batch", disable=None)
        influences = block_influence(self.expert, ((ids, mask) for ids, mask, _ in shown))
        return choose_layers(self.config.keep, self.depth, self.config.layers, influences)

    def _train(self, pruned: Path, texts: Sequence[Text], folder: Path) -> None:
        if (folder / "done").is_file():
            return
        train_amateur(self.config, pruned, texts, folder)
        replace_text(folder / "done", "")

    def _figures(self, name: str, folder: Path, texts: Sequence[Text]) -> AmateurFigures | None:
        """Return the figures of a model on held-out texts, measured once."""
        path = self.work / f"{name}.json"
        if not texts:
            return None
        if path.is_file():
            return AmateurFigures(**json.loads(read_text(path)))
        amateur = from_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32).eval()
        batches = list(token_batches(self.tokenizer, texts, max_length=self.config.max_length))
        figures = compare_models(self.expert, amateur, batches, total=len(batches))
        replace_text(path, json.dumps(figures._asdict()))
        return figures

    def _finish(
        self,
        trained: Path,
        kept: list[int],
        figures: AmateurFigures | None,
        untrained: AmateurFigures | None,
        texts: int,
        held_out: int,
    ) -> Amateur:
        """Put the model into its folder, with the card last, and remove the checkpoints."""
        folder = Path(self.config.output)
        for file in sorted((self.work / "pruned").iterdir()):
            source = trained / file.name if (trained / file.name).is_file() else file
            if file.name != "done":
                with replace_file(folder / file.name) as unfinished:
                    shutil.copyfile(source, unfinished)
        amateur = from_pretrained(AutoModelForCausalLM, str(folder))
        count, whole = amateur.num_parameters(), self.expert.num_parameters()
        made = Amateur(folder, kept, count, count / whole, figures, untrained)
        replace_text(folder / CARD, amateur_card(self.config, made, self.depth, texts, held_out))
        for checkpoint in self.work.glob("training/checkpoint-*"):
            shutil.rmtree(checkpoint)
        return made
