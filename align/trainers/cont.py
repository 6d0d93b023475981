"""CoNT: candidates that the model writes itself at every step, ranked by their similarity to the source."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.align.cards.methods import CardMethod, describe_function
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.ranking import check_ranking, ranking_loss
from contralto.align.trainers.brio import pair_accuracy
from contralto.align.trainers.config import option, require_config
from contralto.align.trainers.own_candidates import quality_of, reference_tokens, write_beams
from contralto.align.trainers.sequence_scores import SequenceScores, SequenceTask
from contralto.align.trainers.sequences import RankedBatch, RankedLoss, SequenceConfig, SequenceTrainer
from contralto.align.trainers.settings import records_settings
from contralto.data_gen.functions import search_folder
from contralto.data_gen.scorers import resolve_scorer
from contralto.decoding.executors.diverse import ENDED
from contralto.decoding.executors.reranking import SequenceProjection
from contralto.decoding.rules.sequences import check_diversity_penalty

__all__ = ["ContConfig", "ContTrainer", "choose_samples"]


@dataclass
class ContConfig(SequenceConfig):
    """The options of `ContTrainer`.

    Args:
        num_candidates: candidates per prompt and step, by diverse beams; the released code has 12.
        diversity_penalty: of diverse beams; 2.0 for XSum in the released code.
        no_repeat_ngram_size: n-grams of this size occur once in a candidate; 0 is no limit.
        max_samples: the reference, and the best of candidates and references of other rows, together as many.
        margin: per rank.
        tolerance: pairs count whose qualities differ by more. With a scorer of another scale than [0, 1] it needs another value.
        scorer: the quality of candidates, `module:function` of a row and its answers; None is the overlap of bigrams with the reference.
        reward_model: a reward model in place of `scorer`.

    Raises:
        ValueError: an option is out of range, or two exclude each other.
    """

    needs_candidates: ClassVar[bool] = False

    num_candidates: int = option(12, "Candidates per prompt and step, by diverse beams.")
    diversity_penalty: float = option(1.0, "Penalty of diverse beams.")
    no_repeat_ngram_size: int = option(4, "N-grams of this size occur once in a candidate; 0 is no limit.")
    max_samples: int = option(16, "The reference and the best of candidates and other rows' references, together.")
    margin: float = option(0.01, "Margin per rank.")
    tolerance: float = option(0.01, "Pairs of candidates count whose qualities differ by more.")
    scorer: str | None = option(
        None, "The quality of candidates, module:function (default: overlap of bigrams with the reference)."
    )
    reward_model: str | None = option(None, "A reward model in place of scorer.")

    @records_settings
    def __post_init__(self) -> None:
        check_ranking(margin=self.margin, tolerance=self.tolerance)
        check_diversity_penalty(self.diversity_penalty)
        for name, least in (("num_candidates", 1), ("max_samples", 2), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.scorer and self.reward_model:
            raise ValueError("scorer and reward_model are both given: give one")
        super().__post_init__()

    @property
    def score_source(self) -> Any:
        """Return the scorer as `contralto.data_gen.scorers.resolve_scorer` takes it; None for the overlap of bigrams."""
        return self.scorer or (None if self.reward_model is None else {"reward_model": self.reward_model})


def choose_samples(
    samples: Tensor, quality: Tensor, references: Tensor, *, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best samples of each row, other than its reference.

    Args:
        samples: `(B, m, T)`, padded with `ENDED`: candidates, and references of other rows.
        quality: `(B, m)`.
        references: `(B, T)`, padded to the same length. A sample that equals its reference is left out.
        count: the number of samples.

    Returns:
        The samples `(B, n, T)`, n at most `count`; their quality `(B, n)`; and a mask `(B, n)`, false where there is none. Absent samples
        have no tokens.

    Examples:
        >>> samples = torch.tensor([[[5], [6], [7]]])
        >>> chosen, quality, mask = choose_samples(samples, torch.tensor([[0.9, 0.2, 0.5]]), torch.tensor([[5]]), count=2)
        >>> chosen.tolist(), mask.tolist()
        ([[[7], [6]]], [[True, True]])
    """
    other = (samples != references[:, None]).any(-1)
    order = quality.masked_fill(~other, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :count]
    mask = other.gather(1, order)
    chosen = samples.gather(1, order[..., None].expand(-1, -1, samples.shape[-1]))
    return chosen.masked_fill(~mask[..., None], ENDED), quality.gather(1, order).masked_fill(~mask, 0), mask


class ContTrainer(SequenceTrainer):
    """Contrastive training of a generator on its own candidates, CoNT (An et al. 2022, arXiv 2205.14690).

        L = NLL(y*) + sum_{i < j} max(0, cos(z_x, z_j) - cos(z_x, z_i) + (j - i) margin)

    The samples of a prompt are the reference y*, candidates that the model writes at this step by diverse beams, and the references of
    other rows of the batch, sorted by their quality, the reference first. z is the mean of projected hidden states, see
    `SequenceProjection`: of the encoder for the source of an encoder-decoder; of a decoder at its prompt, which no candidate changes. The
    projection is trained and saved beside the model, for `contralto.decoding.SimilarityReranker`.

    The paper first trains by likelihood alone: begin with a model that is fine-tuned on the references.

    Args:
        model: see `SequenceTrainer`.
        args: a `ContConfig`.
        kwargs: the other arguments of `SequenceTrainer`. Rows have `prompt` and `reference`, and the columns that the scorer reads.

    Raises:
        ValueError: `args` has another type, a column is missing, there is no such scorer, or the states of encoder and decoder differ in size.
    """

    def __init__(self, model: Any, args: ContConfig | None = None, **kwargs: Any) -> None:
        args = require_config(args, ContConfig)
        search_folder(Path())
        self.scorer = None if args.score_source is None else resolve_scorer(args.score_source)
        super().__init__(model, args, **kwargs)

    def prepare_policy(self, policy: Any) -> None:
        """Add the projection to the model, so that it is trained with it.

        Args:
            policy: the model as transformers loaded it.
        """
        projection = SequenceProjection(policy.config.get_text_config(decoder=True).hidden_size)
        policy.cont_projection = projection.to(policy.device)

    @property
    def projection(self) -> SequenceProjection:
        """Return the projection of hidden states."""
        own: SequenceProjection = self.policy.cont_projection
        return own

    def columns(self) -> Sequence[str]:
        """Return the columns that every row must have."""
        return ("prompt", "reference")

    def make_batch(self, rows: Sequence[Mapping[str, Any]]) -> RankedBatch:
        """Have the model write candidates of rows, and make a batch of the best of them.

        Args:
            rows: with tokens.
        """
        args, device = self.args, self.accelerator.device
        options = {"no_repeat_ngram_size": args.no_repeat_ngram_size}
        beams = write_beams(self, rows, args.num_candidates, args.diversity_penalty, **options)
        references = self.references(rows)
        assert references is not None  # `columns` are checked
        others = reference_tokens(rows).to(device)
        width = max(each.shape[-1] for each in (beams, references, others))
        parts = [_widened(each, width) for each in (beams, others) if each.shape[1]]
        samples = torch.cat(parts, 1)
        quality = quality_of(rows, samples, self.tokenise.tokenizer, self.scorer).to(device)
        chosen, quality, mask = choose_samples(
            samples, quality, _widened(references, width), count=args.max_samples - 1
        )
        best = quality.new_full((len(rows), 1), torch.inf)  # the reference
        task = SequenceTask(self.sources(rows), references, chosen, chunk_size=args.chunk_size)
        return RankedBatch(task, torch.cat([best, quality], 1), torch.cat([mask.new_ones(len(rows), 1), mask], 1))

    def loss(self, batch: RankedBatch, scores: SequenceScores) -> RankedLoss:
        """Compute the loss of a batch.

        Args:
            batch: the samples and their quality.
            scores: the result of the model.
        """
        assert scores.similarity is not None
        assert scores.nll is not None
        settings = {"margin": self.args.margin, "tolerance": self.args.tolerance}
        ranked = ranking_loss(scores.similarity, batch.quality, mask=batch.mask, **settings)
        own = batch.quality[:, 1:][batch.mask[:, 1:]]
        figures = {
            "loss/nll": scores.nll,
            "loss/ranking": ranked,
            "accuracy": pair_accuracy(scores.similarity, batch.quality, batch.mask),
            "quality": own.mean(),
        }
        return RankedLoss(scores.nll + ranked, figures)

    def describe_training(self) -> TrainedCard:
        """Return the two parts of the loss, with paper and formula, for the model card."""
        methods = [CardMethod("nll", "likelihood of the references", "", []), describe_function("ranking", ContTrainer)]
        return TrainedCard(methods=methods, weights=[1.0, 1.0], verb="trained on its own candidates", tags=["cont"])

    # --------------------------------------------------------------------------------- the projection beside the model

    @contextmanager
    def without_extra(self) -> Iterator[None]:
        """Return a context in which the model has no projection, for loading and saving."""
        policy = self.policy
        projection = policy.cont_projection
        del policy.cont_projection
        try:
            yield
        finally:
            policy.cont_projection = projection

    def load_extra(self, folder: Path) -> None:
        """Load the projection.

        Args:
            folder: a checkpoint.
        """
        self.projection.load_state_dict(SequenceProjection.load(folder).state_dict())

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]  # of the mixin
        """Save the model, and the projection beside it.

        Args:
            output_dir: see `transformers.Trainer.save_model`.
            kwargs: its other arguments.
        """
        with self.without_extra():
            super().save_model(output_dir, **kwargs)
        if self.args.should_save:
            self.projection.save(output_dir or self.args.output_dir)


def _widened(sequences: Tensor, width: int) -> Tensor:
    """Pad sequences to a common length."""
    return pad(sequences, (0, width - sequences.shape[-1]), value=ENDED)
