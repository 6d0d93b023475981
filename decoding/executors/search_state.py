"""The state of contrastive search between two tokens: the rows, the hidden states of their context, and the candidates."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.decoding.branches.prompts import Prompts
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.static import compiled_call
from contralto.decoding.executors.tree import CandidateOutputs, CandidateTree, tree_obstacle
from contralto.decoding.rules.candidates import (
    check_penalty_weight,
    contrastive_search,
    largest_cosine,
    unit_vectors,
)
from contralto.decoding.validity import check_logits

__all__ = ["CandidateReader", "ReplicatedCandidates", "SearchPath", "SearchState", "check_parameters", "choose_reader"]

SearchPath = Literal["auto", "tree", "replicate"]


def check_parameters(alpha: float, k: int) -> None:
    """Raise ValueError unless the weight of the penalty lies in [0, 1] and there is a candidate."""
    check_penalty_weight(alpha)
    if k < 1 or k != int(k):
        raise ValueError(f"k must be at least 1 (the number of candidate tokens), not {k}")


class CandidateReader(Protocol):
    """A way to compute the outputs of a model for the candidates of each row."""

    def read(self, candidates: Tensor) -> CandidateOutputs:
        """Return the outputs for candidates `(B, k)`, each as the next token of its row."""

    def keep(self, choice: Tensor) -> None:
        """Continue the rows with candidate `choice` `(B,)`."""

    def drop(self) -> None:
        """Discard the candidates."""


class ReplicatedCandidates:
    """Every candidate as its own row, with a copy of the cache. Slower than a tree, but works with every cache.

    Args:
        reader: the rows.
    """

    def __init__(self, reader: CachedReader) -> None:
        self._reader = reader

    def read(self, candidates: Tensor) -> CandidateOutputs:
        """Return the outputs for candidates `(B, k)`."""
        self._count = candidates.shape[1]
        self._copies = self._reader.replicate(self._count)
        return CandidateOutputs.of(self._copies.peek(candidates.reshape(-1, 1)), candidates)

    def keep(self, choice: Tensor) -> None:
        """Continue with the cache of candidate `choice` `(B,)` of each row."""
        rows = torch.arange(len(choice), device=choice.device)
        self._reader.take(self._copies, rows * self._count + choice)
        self.drop()

    def drop(self) -> None:
        """Discard the copies."""
        del self._copies


class SearchState:
    """Contrastive search over rows: it scores their candidates, and continues with one candidate of each row.

    Args:
        model: the model that generates.
        input_ids: `(B, T)` int64, the prompts.
        model_kwargs: the prepared inputs of the first forward pass.
        alpha: weight of the degeneration penalty.
        k: number of candidates.
        path: how candidates are read, see `ContrastiveSearch`.
        config: the prepared generation configuration, which says whether the tree is compiled; None compiles nothing.

    Attributes:
        reader: the rows and their cache.
        logits: `(B, V)` of the next token.

    Raises:
        ValueError: the model returns no cache.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        *,
        alpha: float,
        k: int,
        path: SearchPath,
        config: Any = None,
    ) -> None:
        self._alpha, self._k, self._path, self._config = alpha, k, path, config
        self.reader = CachedReader(model)
        logits = self.reader.prefill(Prompts(input_ids, model_kwargs | {"output_hidden_states": True}))
        self.logits = logits[:, -1].clone()  # a view would keep the logits of the whole prompt
        if not hasattr(self.reader.cache, "reorder_cache"):
            raise ValueError(f"{type(model).__name__} returns no cache from which contrastive search could continue")
        assert self.reader.hidden is not None
        self._context = _HiddenContext(self.reader.hidden)
        self._candidate_reader: CandidateReader | None = None
        self._candidates: Tensor | None = None

    def score(self, logits: Tensor) -> Tensor:
        """Read the candidates and return their contrastive scores.

        Args:
            logits: `(B, V)` processed logits of the next token.

        Returns:
            `(B, V)`, `-inf` except for the candidates.

        Raises:
            ValueError: NaN or `+inf` in the logits or in the cosines, or a row without a possible token; at the first call, a
                `compile_config` for passes that are not compiled.
        """
        if self._candidates is not None:
            self._drop()
        self._check(logits, "logits of the main branch")
        candidates = logits.topk(min(self._k, logits.shape[-1])).indices
        if self._candidate_reader is None:
            self._candidate_reader = choose_reader(self.reader, candidates, self._path)
            if self._config is not None:
                self._compile(self._config)
        self._candidates = candidates
        self._outputs = self._candidate_reader.read(candidates)
        self._units = unit_vectors(self._outputs.hidden)
        penalty = largest_cosine(self._units, self._context.units, self.reader.mask).to(logits.device)
        self._check(penalty, "cosines of the candidates' hidden states")
        return contrastive_search(logits, candidates, penalty, alpha=self._alpha)

    def _compile(self, config: Any) -> None:
        """Compile forward passes where `generate()` would: with a static cache every tree has the same shapes."""
        compiled = compiled_call(self.reader, config) if isinstance(self._candidate_reader, CandidateTree) else None
        if config.compile_config is not None and compiled is None:
            raise ValueError(
                "contrastive search compiles nothing but trees over a static cache, on the devices of generate(): pass "
                "cache_implementation='static', max_cache_len and a model that can be read as a tree, or leave compile_config out"
            )
        self.reader.compiled = compiled

    def _check(self, values: Tensor, name: str) -> None:
        """Raise ValueError if values `(B, ...)` are NaN or `+inf`, or all `-inf` in a row."""
        check_logits([values], lambda: [name], lambda row: f"in row {row}, after {self.reader.length} tokens")

    def advance(self, tokens: Tensor, *, ends: bool = False) -> None:
        """Continue the rows.

        Args:
            tokens: `(B,)` int64, the next token of each row.
            ends: whether the generation ends with these tokens; then the candidates are discarded instead.
        """
        if ends:
            self._drop()
        elif not self.take(tokens):
            self.read(tokens[:, None])

    def take(self, tokens: Tensor) -> bool:
        """Continue with candidates.

        Args:
            tokens: `(B,)` int64.

        Returns:
            False if a token is not among the candidates of its row; then all candidates are discarded.
        """
        assert self._candidates is not None
        assert self._candidate_reader is not None
        hits = self._candidates == tokens[:, None]  # (B, k)
        if not hits.any(-1).all():
            self._drop()
            return False
        choice = hits.int().argmax(-1)
        self._candidate_reader.keep(choice)
        self._append(_pick(self._outputs.logits, choice), _pick(self._units, choice))
        return True

    def read(self, tokens: Tensor) -> None:
        """Continue with any tokens `(B, 1)`, by a forward pass of their own."""
        logits = self.reader.read(tokens)
        assert self.reader.hidden is not None
        self._append(logits[:, -1], unit_vectors(self.reader.hidden[:, -1]))

    def _append(self, logits: Tensor, units: Tensor) -> None:
        self.logits, self._candidates = logits, None
        self._context.append(units)

    def _drop(self) -> None:
        assert self._candidate_reader is not None
        self._candidate_reader.drop()
        self._candidates = None


def choose_reader(reader: CachedReader, candidates: Tensor, path: SearchPath) -> CandidateReader:
    """Return a tree if it is requested or possible, else replicas.

    Args:
        reader: rows that have read their prompts.
        candidates: `(B, k)` int64, the first candidates.
        path: how candidates are read, see `ContrastiveSearch`.

    Raises:
        ValueError: a tree is requested, and the model cannot read it.
    """
    obstacle = None if path == "replicate" else tree_obstacle(reader, candidates)
    if path == "tree" and obstacle is not None:
        raise ValueError(
            f"{reader.name} cannot process candidates as a tree: {obstacle}; use path='auto' or path='replicate'"
        )
    return ReplicatedCandidates(reader) if path == "replicate" or obstacle is not None else CandidateTree(reader)


def _pick(values: Tensor, choice: Tensor) -> Tensor:
    """Select `(B, ...)` from `(B, k, ...)`."""
    return values[torch.arange(len(choice), device=values.device), choice.to(values.device)]


class _HiddenContext:
    """Unit vectors of the hidden states of a context, in a buffer that grows by a quarter when it is full."""

    def __init__(self, hidden: Tensor) -> None:
        self._buffer = unit_vectors(hidden)
        self._length = hidden.shape[1]

    @property
    def units(self) -> Tensor:
        """`(B, T, d)`."""
        return self._buffer[:, : self._length]

    def append(self, units: Tensor) -> None:
        """Add `(B, d)`."""
        if self._length == self._buffer.shape[1]:
            self._buffer = pad(self._buffer, (0, 0, 0, 64 + self._length // 4))
        self._buffer[:, self._length] = units
        self._length += 1
