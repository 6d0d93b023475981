"""Make a critic: write texts, score them, train, measure, describe. Every stage resumes where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from contralto.align.critic.card import critic_card
from contralto.align.critic.report import CriticFigures, measure_critic
from contralto.align.critic.settings import CriticConfig
from contralto.align.critic.texts import ScoredText, read_prompts, read_texts, split_rows, write_texts
from contralto.align.critic.training import train_critic, untrained_critic
from contralto.align.work_folder import check_begun, record_settings
from contralto.common.files import locked_folder, read_text, replace_file, replace_text
from contralto.common.hashing import source_digest, weights_digest
from contralto.common.hub import check_weights, from_pretrained
from contralto.data_gen.functions import search_folder
from contralto.data_gen.scorers import RewardModel, resolve_scorer
from contralto.data_gen.store import Store

__all__ = ["TrainedCritic", "make_critic"]

CARD = "README.md"


class TrainedCritic(NamedTuple):
    """A critic that was trained."""

    folder: Path
    texts: int
    """Number of texts that it was trained on."""
    figures: CriticFigures
    """On held-out prompts."""


def make_critic(config: CriticConfig) -> TrainedCritic:
    """Train a critic, or go on where an interrupted run stopped.

    Args:
        config: what to make.

    Returns:
        The critic in `config.output`, a token classifier that any `--critic` reads, with a card.

    Raises:
        ValueError: the folder holds something else, the scores are no rewards, or the model cannot have a head.
        OSError: another process makes the critic.
    """
    folder = Path(config.output)
    search_folder(Path())
    settings = config.describe() | {"weights": weights_digest(config.model), "scorer_source": _source(config)}
    # answers and scores are kept by what determines them, so that before the training other settings lose nothing
    check_begun(folder, settings if (config.work / "training").exists() else {}, "the critic")
    with locked_folder(config.work, f"process {{pid}} makes the critic {folder}: wait for it"):
        record_settings(folder, settings)
        return _CriticStages(config).run()


def _source(config: CriticConfig) -> Any:
    """Return what determines the scores: the code of a function, or the digest of a reward model."""
    if config.score_source is None:
        return None
    scorer = resolve_scorer(config.score_source)
    return scorer.identity if isinstance(scorer, RewardModel) else source_digest(scorer)


class _CriticStages:
    """The stages of one critic."""

    def __init__(self, config: CriticConfig) -> None:
        self.config, self.work = config, config.work
        check_weights(config.model)
        self.tokenizer = from_pretrained(AutoTokenizer, config.model)

    def run(self) -> TrainedCritic:
        """Run the stages that are missing."""
        untrained_critic(self.config, 0.5)  # a model without a head is rejected before texts are written
        held_out, texts = split_rows(self._texts(), self.config.held_out)
        training = self.work / "training"
        if not (training / "done").is_file():
            train_critic(self.config, self.tokenizer, texts, training)
            replace_text(training / "done", "")
        figures = self._figures(training / "model", held_out, sum(text.reward for text in texts) / len(texts))
        return self._finish(training / "model", TrainedCritic(Path(self.config.output), len(texts), figures))

    def _texts(self) -> list[ScoredText]:
        """Return the texts of the model or of the file, with rewards."""
        from contralto.data_gen.engines.transformers import TransformersEngine

        config = self.config
        with Store(self.work / "answers.sqlite") as store:
            if config.texts is not None:
                return read_texts(config, self.tokenizer, store)
            rows = read_prompts(config)
            dtype = "bfloat16" if config.bf16 else "auto"
            engine = TransformersEngine(model=config.model, batch_size=64, dtype=dtype, raw=config.raw)
            return write_texts(config, self.tokenizer, engine, store, rows)

    def _figures(self, model: Path, texts: list[ScoredText], mean: float) -> CriticFigures:
        """Return the figures of the critic on held-out texts, measured once."""
        path = self.work / "figures.json"
        if path.is_file():
            return CriticFigures(**json.loads(read_text(path)))
        critic = from_pretrained(AutoModelForTokenClassification, str(model), dtype=torch.float32).eval()
        figures = measure_critic(critic, texts, mean)
        replace_text(path, json.dumps(figures._asdict()))
        return figures

    def _finish(self, model: Path, made: TrainedCritic) -> TrainedCritic:
        """Put the critic into its folder, with the card last, and remove the checkpoints."""
        for file in sorted(model.iterdir()):
            with replace_file(made.folder / file.name) as unfinished:
                shutil.copyfile(file, unfinished)
        replace_text(made.folder / CARD, critic_card(self.config, made))
        for checkpoint in self.work.glob("training/checkpoint-*"):
            shutil.rmtree(checkpoint)
        return made
