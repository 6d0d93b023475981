"""Provide the branch of an amateur with another tokenizer, which reads the same text in its own tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from contralto.common.placement import input_device
from contralto.decoding.branches.base import Branch, model_state
from contralto.decoding.branches.input import GeneratedTokens
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.branches.padding import check_mask, find_padding, fit_mask
from contralto.decoding.byte_tokens import ByteTokens
from contralto.decoding.rereading import reread
from contralto.decoding.token_map import TokenMap, scatter_logsumexp
from contralto.decoding.vocabulary import vocabulary_size

__all__ = ["AlignedBranch", "byte_tokens", "describe_map", "token_map_of"]

REWOUND = 4
"""Largest number of the amateur's tokens of which a longer token may begin."""
_TOKENS: WeakKeyDictionary[Any, tuple[int, ByteTokens]] = WeakKeyDictionary()
_MAPS: WeakKeyDictionary[ByteTokens, dict[Any, TokenMap]] = WeakKeyDictionary()


class _Prompts(NamedTuple):
    """Prompts of the expert, and the columns of each that are text."""

    ids: Tensor
    mask: Tensor

    def begin(self, ids: Tensor) -> bool:
        """Return whether rows begin with these prompts."""
        return len(ids) == len(self.ids) and torch.equal(ids[:, : self.ids.shape[1]], self.ids.to(ids.device))


class _Row:
    """The amateur's log-probabilities after a row, and after its beginnings."""

    def __init__(self, amateur: Any) -> None:
        self._branch = ModelBranch(amateur)
        self._ids: list[int] = []
        self._known: dict[int, Tensor] = {}

    def read(self, ids: list[int], lengths: Sequence[int]) -> list[Tensor]:
        """Return log-probabilities `(W,)` of the token after beginnings of a row; those of the last call are not computed again.

        Args:
            ids: tokens of the amateur.
            lengths: number of tokens of each beginning.
        """
        same = next((i for i, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b), len(self._ids))
        self._known = {length: each for length, each in self._known.items() if min(lengths) <= length <= same}
        for length in sorted({*lengths} - {*self._known}):
            begun = torch.tensor([ids[:length]], device=input_device(self._branch.model))
            self._branch.begin(begun, torch.ones_like(begun))
            self._known[length] = self._branch(begun)[0].float().log_softmax(-1)
        self._ids = list(ids)
        return [self._known[length] for length in lengths]


class AlignedBranch(Branch):
    """The next-token distribution of an amateur in the vocabulary of an expert with another tokenizer.

    Every row is decoded to bytes, and encoded again by the amateur's tokenizer; the amateur's cache is rewound to the tokens that
    both encodings share. Its distribution of the next token is mapped by `TokenMap`, together with the longer tokens that the
    end of the text may be inside of, see `TokenExtensions`: with `c_j` the tokens before the last `j`, whose bytes are `r_j`,

        q  ~  map(p(a | c))  +  sum_j sum_{a begins with r_j}  p(a | c_j) / p(last j tokens | c_j)  [rest of a begins with t]

    Exact are the sums over the amateur's next token. Approximations: expert tokens that begin with the same amateur token are not
    told apart, and the amateur's encoding of the text so far is the only one considered. Rows are read one by one, since their
    numbers of amateur tokens differ.

    Special tokens: padding and the tokens that the expert's tokenizer begins texts with are left out, those of the amateur's
    are put first, those that both vocabularies have are kept, and all others are read as the characters of their names.

    Args:
        amateur: a decoder-only transformers model.
        tokenizer: the tokenizer of the expert.
        amateur_tokenizer: the tokenizer of the amateur.
        attention_mask: `(prompts, T)`, 0 for padding; without it, leading pad tokens are padding.
        amateur_inputs: the prompts as the amateur is to read them, such as the same messages in its own chat template, as its
            tokenizer returns them. They belong to one batch of prompts.

    Raises:
        ValueError: the amateur has an encoder, or a tokenizer cannot be read as bytes.
    """

    def __init__(
        self,
        amateur: Any,
        *,
        tokenizer: Any,
        amateur_tokenizer: Any,
        attention_mask: Tensor | None = None,
        amateur_inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._amateur = amateur
        self._model = ModelBranch(amateur).model
        self._tokenizer, self._amateur_tokenizer = tokenizer, amateur_tokenizer
        self._own, self._other = byte_tokens(tokenizer, "the expert"), byte_tokens(amateur_tokenizer, "the amateur")
        self._mask = attention_mask
        if attention_mask is not None:
            check_mask(attention_mask)
        self._begun: _Prompts | None = None
        self._inputs = None if amateur_inputs is None else _rows_of(amateur_inputs)
        self._generated = GeneratedTokens()
        self._fills = _ends_of(tokenizer)
        self._size = len(tokenizer)
        self._state: list[Any] = []
        self.reset()

    @property
    def model(self) -> Any:
        """Return the amateur."""
        return self._model

    @property
    def shares_tokenizer(self) -> bool:
        """Return False: the map makes the logits comparable."""
        return False

    @property
    def token_map(self) -> TokenMap:
        """Return the map between the vocabularies, which is made once for a pair of tokenizers."""
        return token_map_of(self._tokenizer, self._amateur_tokenizer, self._model, self._size)

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:
        """Set the padding of the prompts of the next generation, until `end`.

        Args:
            ids: `(B, T)` the prompts of the expert.
            mask: `(B, T)`, 0 for padding.
            fills: token ids that pad the rows that have ended, which are not read.
        """
        check_mask(mask)
        self._begun = _Prompts(ids.clone(), mask)
        self._fills = {*fills, *_ends_of(self._tokenizer)}

    def end(self) -> None:
        """Discard the padding that `begin` set."""
        self._begun = None

    def limit_tokens(self, size: int) -> None:
        """Set the number of rows of the expert's head.

        Args:
            size: the vocabulary size of the main model.
        """
        self._size = size

    def reset(self) -> None:
        """Discard the caches of all rows."""
        self._rows: list[_Row] = []
        self._prompts: _Prompts | None = None
        self._length = 0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return `(B, W + V)`, see `resolve`.

        Args:
            input_ids: `(B, T)` int64, the rows of the expert.
        """
        if input_ids.shape[1] != self._length + 1:
            self._reset_if_changed()
        self._length = input_ids.shape[1]
        count = 0 if self._inputs is None else self._generated.count(input_ids)
        return self._read(input_ids, self._text_mask(input_ids), count)

    @torch.no_grad()
    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return `(B, count, W + V)`: each beginning of a continuation is read in the amateur's own encoding of it.

        Args:
            input_ids: `(B, T)` int64.
            count: number of tokens to predict, below `T`.
            attention_mask: `(B, T)`, 0 for the padding before the prompts; what pads continuations has no effect.
        """
        self._reset_if_changed()
        length = input_ids.shape[1] - count
        mask = self._text_mask(input_ids[:, :length]) if attention_mask is None else attention_mask[:, :length]
        rows = [self._read(input_ids[:, : length + i], mask, i) for i in range(count)]
        self.reset()
        return torch.stack(rows, dim=1)  # count times (B, W + V)

    def resolve(self, main: Tensor, logits: Tensor) -> Tensor:
        """Return the amateur's log-probabilities `(..., V)` in the expert's vocabulary, see `TokenMap.resolve`.

        Args:
            main: `(..., V)` scores of the expert.
            logits: `(..., W + V)` of this branch: the amateur's tokens, and further probabilities of expert tokens.
        """
        size = main.shape[-1]
        return self.token_map.resolve(main, logits[..., :-size], logits[..., -size:])

    def encode(self, row: Sequence[int], *, begins: bool = True) -> list[int]:
        """Return the amateur's tokens of tokens of the expert.

        Args:
            row: token ids without padding.
            begins: whether they begin a text; otherwise they continue one.

        Raises:
            ValueError: see `reread`.
        """
        return reread(self._own, self._other, row, begins=begins)

    def _text_mask(self, ids: Tensor) -> Tensor:
        """Return the mask of the prompts that rows begin with, `(B, T')`, 0 for padding."""
        if self._begun is not None and self._begun.begin(ids):
            return self._begun.mask
        if self._mask is not None:
            return self._mask.repeat_interleave(len(ids) // len(self._mask), 0)
        if self._prompts is None or not self._prompts.begin(ids):
            pads = [self._tokenizer.pad_token_id, self._tokenizer.eos_token_id]
            pad = next(([pad] for pad in pads if pad is not None), [])
            self._prompts = _Prompts(ids.clone(), find_padding(ids, pad, self._tokenizer.bos_token_id))
        return self._prompts.mask

    def _reset_if_changed(self) -> None:
        """Discard the caches if the amateur's weights or adapters have changed."""
        if (state := model_state(self._model)) != self._state:
            self.reset()
            self._state = state

    def _read(self, input_ids: Tensor, mask: Tensor, generated: int) -> Tensor:
        """Return `(B, W + V)` for rows, whose last tokens are generated."""
        while len(self._rows) < len(input_ids):
            self._rows.append(_Row(self._amateur))
        texts = fit_mask(mask, input_ids.shape[1]).bool().to(input_ids.device)
        found = []
        for i, (row, kept) in enumerate(zip(input_ids, texts, strict=True)):
            tokens = row[kept].tolist()
            if len(tokens) > 2 and {*tokens[-2:]} <= self._fills:  # the row has ended
                found.append(torch.zeros(vocabulary_size(self._model) + self._size))
                continue
            if self._inputs is None:
                ids, own = self.encode(tokens), tokens
            else:
                own = row[len(row) - generated :].tolist()
                ids = [*self._inputs[i * len(self._inputs) // len(input_ids)], *self.encode(own, begins=False)]
            found.append(self._predict(self._rows[i], ids, own))
        return torch.stack(found).to(input_ids.device)

    def _predict(self, row: _Row, ids: list[int], own: list[int]) -> Tensor:
        """Return the log-probabilities `(W + V,)` after the amateur's tokens of a text, which ends in tokens of the expert."""
        made, text, found = self.token_map, b"", []
        for count in range(1, min(REWOUND, len(ids) - 1) + 1):
            if not own or (part := self._other.texts.get(ids[-count])) is None:
                break
            text = part + text
            if (extended := made.extensions.find(text, own[-1])) is not None:
                found.append((count, extended))
        furthest = max((count for count, _ in found), default=0)
        logs = row.read(ids, range(len(ids) - furthest, len(ids) + 1))
        direct = torch.full((self._size,), -torch.inf)
        path = torch.zeros(())
        for count in range(1, furthest + 1):
            path = path + logs[-count - 1][ids[-count]].cpu()
            for extended in (each for at, each in found if at == count):
                weights = logs[-count - 1].cpu()[extended.tokens] - path
                direct = torch.logaddexp(direct, scatter_logsumexp(weights, extended.next, self._size))
        whole = torch.logaddexp(torch.zeros(()), direct.logsumexp(-1))
        return torch.cat([logs[-1].cpu(), direct]) - whole


def _ends_of(tokenizer: Any) -> set[int]:
    """Return the tokens that end or pad a row."""
    return {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


def _rows_of(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the tokens of prompts without padding."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    check_mask(mask)
    return [row[kept.bool()].tolist() for row, kept in zip(inputs["input_ids"], mask, strict=True)]


def byte_tokens(tokenizer: Any, name: str) -> ByteTokens:
    """Return the tokens of a tokenizer as bytes, read once.

    Args:
        tokenizer: a fast transformers tokenizer.
        name: of its model, for errors.

    Raises:
        ValueError: see `ByteTokens`.
    """
    size, tokens = _TOKENS.get(tokenizer, (0, None))
    if tokens is None or size != len(tokenizer):  # tokens were added
        tokens = ByteTokens(tokenizer, name)
        _TOKENS[tokenizer] = len(tokenizer), tokens
    return tokens


def describe_map(token_map: TokenMap, tokens: int) -> str:
    """Return one line about what a map leaves out.

    Args:
        token_map: the map.
        tokens: number of tokens of the expert's tokenizer.
    """
    expert, amateur = token_map.unmapped
    padding = len(token_map.mapped) - tokens
    return (
        f"vocabulary aligned: {tokens - max(0, expert - padding):,} of {tokens:,} tokens of the expert are mapped, the others "
        f"are not contrasted; {amateur:,} tokens of the amateur stand for none of them"
    )


def token_map_of(tokenizer: Any, amateur_tokenizer: Any, amateur: Any, size: int) -> TokenMap:
    """Return the map from an amateur's vocabulary to an expert's, made once for a pair of tokenizers.

    Args:
        tokenizer: the tokenizer of the expert.
        amateur_tokenizer: the tokenizer of the amateur.
        amateur: the amateur, for the size of its head and the tokens that end its texts.
        size: number of rows of the expert's head.

    Raises:
        ValueError: see `ByteTokens`.
    """
    own, other = byte_tokens(tokenizer, "the expert"), byte_tokens(amateur_tokenizer, "the amateur")
    configured = amateur.generation_config.eos_token_id
    configured = [configured] if isinstance(configured, int) else list(configured or [])
    amateur_ends = tuple(sorted({*configured, amateur_tokenizer.eos_token_id} - {None}))
    ends = tuple({tokenizer.eos_token_id} - {None}), amateur_ends
    key = (other, size, vocabulary_size(amateur), ends)
    maps = _MAPS.setdefault(own, {})
    if key not in maps:
        maps[key] = TokenMap(own, other, (size, vocabulary_size(amateur)), ends)
    return maps[key]
