"""Choose among whole candidates by likelihood and by their similarity to the source: the inference of CoNT.

A decoding method of `contralto.decoding.methods` scores tokens. This one scores sequences once they are written, so that it is no method of
`generate --method`: beam search writes the candidates, one more forward pass reads them.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contralto.decoding.executors.diverse import ENDED, end_tokens, until_end
from contralto.decoding.rules.sequences import candidate_scores, check_similarity_weight, mean_state, similarities
from contralto.decoding.sequences import Readings, read_sequences, without_last

__all__ = ["PROJECTION_FILE", "Reranked", "SequenceProjection", "SimilarityReranker"]

PROJECTION_FILE = "cont_projection.safetensors"
"""The file beside a model that CoNT has trained."""


class SequenceProjection(nn.Module):
    """The projection whose mean over tokens represents a sequence in CoNT (An et al. 2022, arXiv 2205.14690), for sources and candidates.

        z = mean over tokens t of relu(W h_t + b)

    The last token of a source is left out, an end token in encoder-decoders; a candidate is read where its tokens are predicted, from its
    first token to its end token.

    Args:
        size: H, the size of hidden states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Represent sequences.

        Args:
            states: `(..., T, H)` hidden states.
            mask: `(..., T)`, true for tokens that count.

        Returns:
            `(..., H)`.
        """
        return mean_state(torch.relu(self.linear(states.to(self.linear.weight.dtype))), mask)

    def source(self, readings: Readings) -> Tensor:
        """Return z of the sources, `(N, H)`.

        Args:
            readings: as `read_sequences` returns them.
        """
        return self(readings.source, without_last(readings.source_mask))  # type: ignore[no-any-return]

    def candidate(self, readings: Readings) -> Tensor:
        """Return z of the candidates, `(N, H)`.

        Args:
            readings: as `read_sequences` returns them.
        """
        return self(readings.states, readings.targets != ENDED)  # type: ignore[no-any-return]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `PROJECTION_FILE`.

        Args:
            folder: the folder of the model.
        """
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / PROJECTION_FILE)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Self:
        """Read `PROJECTION_FILE`.

        Args:
            folder: the folder of a model that was trained by `contralto align cont`.

        Raises:
            ValueError: the folder has no such file.
        """
        path = Path(folder) / PROJECTION_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {PROJECTION_FILE}: give the folder of a model trained by contralto align cont"
            )
        weights = load_file(path)
        own = cls(len(weights["linear.bias"]))
        own.load_state_dict(weights)
        return own


class Reranked(NamedTuple):
    """The result of `SimilarityReranker`."""

    sequences: Tensor
    """`(B, T)` int64, the best candidate of each prompt without the prompt, padded with `ENDED`."""
    candidates: Tensor
    """`(B, n, T)`, all candidates."""
    log_probs: Tensor
    """`(B, n)`, length-normalised."""
    similarity: Tensor
    """`(B, n)`."""
    scores: Tensor
    """`(B, n)`, see `candidate_scores`."""


class SimilarityReranker:
    """Write candidates by beam search, and return the best by likelihood and similarity (CoNT: An et al. 2022, arXiv 2205.14690).

        score_i = alpha * cos(z_x, z_i) + (1 - alpha) * l_i / sum_j |l_j|,    l_i = sum_t log p(y_t) / |y_i|^length_penalty

    Args:
        model: a decoder or an encoder-decoder that `contralto align cont` has trained.
        projection: its projection, or the folder that holds it.
        alpha: the weight of the similarity, in [0, 1]; 0 is beam search. The released runs take 0.5.
        length_penalty: the exponent of the length, also that of beam search.

    Raises:
        ValueError: `alpha` outside [0, 1], or no projection in the folder.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> reranker = SimilarityReranker(model, SequenceProjection(model.config.hidden_size), alpha=0.5)
        >>> result = reranker(tokenizer("Ben went out to the", return_tensors="pt"), num_beams=4, max_new_tokens=6)
        >>> result.scores.shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        model: Any,
        projection: SequenceProjection | str | PathLike[str],
        *,
        alpha: float = 0.5,
        length_penalty: float = 1.0,
    ) -> None:
        check_similarity_weight(alpha)
        if not isinstance(projection, SequenceProjection):
            projection = SequenceProjection.load(projection)
        self.projection = projection.to(model.device).eval()
        self.model, self.alpha, self.length_penalty = model, alpha, length_penalty

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], *, num_beams: int = 8, **options: Any) -> Reranked:
        """Write candidates and rank them.

        Args:
            inputs: `input_ids` and `attention_mask`, `(B, S)`; prompts of a decoder are padded on the left.
            num_beams: number of beams, and of candidates.
            options: further options of `generate()`, such as `max_new_tokens`.

        Raises:
            ValueError: fewer than two beams.
        """
        if num_beams < 2:
            raise ValueError(f"num_beams must be at least 2, to have candidates to choose from, not {num_beams}")
        own = {"do_sample": False, "num_beams": num_beams, "num_return_sequences": num_beams}
        options = {"early_stopping": True} | options | own | {"length_penalty": self.length_penalty}
        written = self.model.generate(**inputs, **options)
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        tokens = until_end(written[:, start:], end_tokens(self.model))
        return self.rank(inputs, tokens.view(-1, num_beams, tokens.shape[-1]))

    @torch.no_grad()
    def rank(self, inputs: Mapping[str, Tensor], candidates: Tensor) -> Reranked:
        """Rank candidates that exist.

        Args:
            inputs: as for a call.
            candidates: `(B, n, T)` int64, padded with `ENDED`.
        """
        count = candidates.shape[1]
        rows = {name: inputs[name].repeat_interleave(count, 0) for name in ("input_ids", "attention_mask")}
        readings = read_sequences(self.model, rows, candidates.flatten(0, 1))
        shape = (-1, count)
        log_probs = (readings.log_probs / readings.lengths**self.length_penalty).view(shape)
        source = self.projection.source(readings).view(*shape, self.projection.linear.out_features)[:, 0]
        similarity = similarities(source, self.projection.candidate(readings).view(*shape, source.shape[-1]))
        scores = candidate_scores(log_probs, similarity, alpha=self.alpha)
        best = scores.argmax(-1)[:, None, None].expand(-1, 1, candidates.shape[-1])
        return Reranked(candidates.gather(1, best)[:, 0], candidates, log_probs, similarity, scores)
