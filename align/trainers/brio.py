"""BRIO: likelihoods of candidates in the order of their quality, with the likelihood of references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contralto.align.cards.methods import CardMethod, describe_function
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.ranking import check_ranking, length_penalised, ranking_loss
from contralto.align.trainers.config import option, require_config
from contralto.align.trainers.own_candidates import CandidateWriter
from contralto.align.trainers.sequence_rows import pad_sequences
from contralto.align.trainers.sequence_scores import SequenceScores, SequenceTask
from contralto.align.trainers.sequences import RankedBatch, RankedLoss, SequenceConfig, SequenceTrainer
from contralto.align.trainers.settings import records_settings
from contralto.decoding.rules.sequences import check_diversity_penalty

__all__ = ["BrioConfig", "BrioTrainer"]


@dataclass
class BrioConfig(SequenceConfig):
    """The options of `BrioTrainer`.

    Args:
        gamma: the weight of the ranking loss; the likelihood of references weighs 1. The paper takes 100.
        margin: lambda, the margin per rank.
        length_alpha: alpha, the exponent of the length.
        label_smoothing: of the likelihood of references.
        likelihood: train on the references as well; False is the ranking loss alone (BRIO-Ctr), and needs no references.
        max_candidates: the first candidates of each row are ranked, as many.
        num_candidates: the model as it is writes so many candidates per prompt by diverse beams before training, into the folder
            `candidates` of `output_dir`; 0 where the data have `candidates` and `scores`.
        diversity_penalty: with `num_candidates`: of diverse beams.
        scorer: with `num_candidates`: the quality of candidates, `module:function` of a row and its answers, see
            `contralto.data_gen.scorers`.
        reward_model: with `num_candidates`: a reward model in place of `scorer`.

    Raises:
        ValueError: an option is out of range, or has no meaning without another one.
    """

    gamma: float = option(100.0, "Weight of the ranking loss; the likelihood of references weighs 1.")
    margin: float = option(0.001, "Margin per rank (lambda).")
    length_alpha: float = option(2.0, "Exponent of the length by which log-probabilities are divided (alpha).")
    label_smoothing: float = option(0.1, "Label smoothing of the likelihood of references.")
    likelihood: bool = option(True, "Train on the references as well; false is the ranking loss alone.")
    max_candidates: int = option(16, "The first candidates of each row are ranked, as many.")
    num_candidates: int = option(
        0, "Candidates per prompt that the model writes before training; 0: the data have candidates and scores."
    )
    diversity_penalty: float = option(1.0, "With num_candidates: penalty of diverse beams.")
    scorer: str | None = option(None, "With num_candidates: the quality of candidates, module:function.")
    reward_model: str | None = option(None, "With num_candidates: a reward model in place of scorer.")

    @records_settings
    def __post_init__(self) -> None:
        check_ranking(margin=self.margin)
        for name in ("gamma", "length_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.max_candidates < 2 or self.num_candidates == 1 or self.num_candidates < 0:
            raise ValueError(
                f"at least 2 candidates can be ranked: max_candidates is {self.max_candidates}, num_candidates {self.num_candidates}"
            )
        check_diversity_penalty(self.diversity_penalty)
        given = [name for name in ("scorer", "reward_model") if getattr(self, name)]
        if self.num_candidates and len(given) != 1:
            raise ValueError(
                "num_candidates has the model write candidates: give one of scorer and reward_model to score them"
            )
        if given and not self.num_candidates:
            raise ValueError(
                f"{given[0]} scores candidates that the model writes: give num_candidates too, or leave it out"
            )
        super().__post_init__()

    @property
    def needs_candidates(self) -> bool:  # type: ignore[override]  # a class variable of the base
        """Return whether the data have candidates and scores."""
        return not self.num_candidates

    @property
    def score_source(self) -> Any:
        """Return the scorer as `contralto.data_gen.scorers.resolve_scorer` takes it."""
        return self.scorer or {"reward_model": self.reward_model}


class BrioTrainer(SequenceTrainer):
    """Train on ranked candidates: BRIO (Liu et al. 2022, arXiv 2203.16804); with factuality as quality Chern et al. 2023, arXiv 2307.04507.

        L = NLL(reference) + gamma sum_{i < j} max(0, f(S_j) - f(S_i) + (j - i) lambda),    f(S) = log p(S | x) / |S|^alpha

    Candidates are sorted by their scores, the best first; see `ranking_loss` for how pairs are averaged. Candidates of one score are not
    compared.

    Args:
        model: see `SequenceTrainer`.
        args: a `BrioConfig`.
        kwargs: the other arguments of `SequenceTrainer`. Rows have `prompt`, `candidates` and `scores` unless the model writes them, and
            `reference` unless `likelihood` is off.

    Raises:
        ValueError: `args` has another type, a column is missing, or all scores of all rows are equal.
    """

    def __init__(self, model: Any, args: BrioConfig | None = None, **kwargs: Any) -> None:
        args = require_config(args, BrioConfig)
        super().__init__(model, args, **kwargs)
        if args.num_candidates:
            self._write_candidates()
        scores = self.train_dataset["scores"]  # type: ignore[index]  # checked by the base
        if all(len(set(row[: args.max_candidates])) < 2 for row in scores):
            raise ValueError(
                "all candidates of every row have one score, so that there is nothing to rank: change the scorer"
            )

    def _write_candidates(self) -> None:
        """Have the model as it is write candidates for both data sets, and tokenise them."""
        args = self.args
        writer = CandidateWriter(
            self, args.score_source, Path(args.output_dir) / "candidates", args.num_candidates, args.diversity_penalty
        )
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if dataset is not None:
                setattr(self, name, self._tokenised(name, writer.with_candidates(dataset)))

    def columns(self) -> Sequence[str]:
        """Return the columns that every row must have."""
        candidates = () if self.args.num_candidates else ("candidates", "scores")
        return ("prompt", *candidates, *(("reference",) if self.args.likelihood else ()))

    def make_batch(self, rows: Sequence[Mapping[str, Any]]) -> RankedBatch:
        """Make a batch of rows.

        Args:
            rows: with tokens.
        """
        limit = self.args.max_candidates
        candidates = pad_sequences([row["candidate_ids"][:limit] for row in rows]).to(self.accelerator.device)
        scores = [torch.tensor(row["scores"][:limit]) for row in rows]
        quality = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True).to(candidates.device)
        task = SequenceTask(
            self.sources(rows),
            self.references(rows) if self.args.likelihood else None,
            candidates,
            label_smoothing=self.args.label_smoothing,
            chunk_size=self.args.chunk_size,
        )
        return RankedBatch(task, quality, (candidates >= 0).any(-1))

    def loss(self, batch: RankedBatch, scores: SequenceScores) -> RankedLoss:
        """Compute the loss of a batch.

        Args:
            batch: the candidates and their quality.
            scores: the result of the model.
        """
        args = self.args
        likelihoods = length_penalised(scores.logps, scores.lengths.clamp(min=1), alpha=args.length_alpha)
        ranked = ranking_loss(likelihoods, batch.quality, margin=args.margin, mask=batch.mask)
        figures = {"loss/ranking": ranked, "accuracy": pair_accuracy(likelihoods, batch.quality, batch.mask)}
        total = args.gamma * ranked
        if scores.nll is not None:
            figures["loss/nll"], total = scores.nll, total + scores.nll
        return RankedLoss(total, figures)

    def describe_training(self) -> TrainedCard:
        """Return the two parts of the loss, with papers and formulas, for the model card."""
        methods = [describe_function("ranking", BrioTrainer)]
        if self.args.likelihood:
            methods.insert(0, CardMethod("nll", "likelihood of the references, smoothed", "", []))
        weights = [1.0, self.args.gamma][-len(methods) :]
        return TrainedCard(methods=methods, weights=weights, verb="trained on ranked candidates", tags=["brio"])


def pair_accuracy(scores: Tensor, quality: Tensor, mask: Tensor) -> Tensor:
    """Return the share of pairs of candidates of different quality that scores order rightly; NaN without such pairs.

    Args:
        scores: `(B, n)`.
        quality: `(B, n)`.
        mask: `(B, n)`, false for absent candidates.

    Examples:
        >>> pair_accuracy(torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3).bool())
        tensor(0.6667)
    """
    better = (quality[:, :, None] > quality[:, None]) & mask[:, :, None] & mask[:, None]
    right = (scores[:, :, None] > scores[:, None]) & better
    return right.sum() / better.sum()
