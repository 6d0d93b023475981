"""Map next-token distributions of an amateur to the vocabulary of an expert, by the bytes of their tokens.

An amateur token `a` and an expert token `t` are paired if the first is where the other's tokenizer would begin:

    a ~ t    if  t = first(expert's encoding of a's bytes)  or  a = first(amateur's encoding of t's bytes)

If the amateur takes `a` next, the expert's next token is one of those paired with `a`. The probability of `a` is divided among them
in the proportion of the expert's own probabilities, so that among them nothing is contrasted:

    q(t) = sum_{a ~ t}  p_amateur(a)  p_expert(t) / sum_{u ~ a} p_expert(u)

Of all distributions over expert tokens that agree with what the amateur tells, this one is closest to the expert's (Jeffrey's
rule, the projection of smallest KL) where the pairs of different `a` are disjoint. Where the vocabularies agree, every token is paired
with itself alone, and `q` is the amateur's distribution. A marginal over all amateur tokens that begin with the bytes of `t` would
not be: it counts "the" for the token "t", which the expert's tokenizer never chooses there.

Expert tokens without a pair (special tokens that only the expert has) keep the expert's own probability, and the others share the rest:
their contrast is zero.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from contralto.decoding.byte_tokens import ByteTokens
from contralto.decoding.token_extensions import TokenExtensions

__all__ = ["TokenMap", "equal_tokens", "scatter_logsumexp"]

LOWEST = -1e30


class TokenMap:
    """The map of an amateur's distributions to an expert's vocabulary.

    Args:
        expert: the tokens of the expert.
        amateur: the tokens of the amateur.
        sizes: number of rows of the expert's head and of the amateur's.
        ends: ids of the expert and of the amateur that end a text, which are paired.

    Attributes:
        pairs: `(2, n)` int64, the ids of amateur and expert of every pair.
        mapped: `(V,)` bool, expert tokens that are in a pair.
        unmapped: number of tokens of the expert and of the amateur that are in none.
        extensions: see `TokenExtensions`.
    """

    def __init__(
        self,
        expert: ByteTokens,
        amateur: ByteTokens,
        sizes: tuple[int, int],
        ends: tuple[Collection[int], Collection[int]] = ((), ()),
    ) -> None:
        self._size, self._amateur_size = sizes
        own, other = list(expert.texts.items()), list(amateur.texts.items())
        pieces = expert.split([text for _, text in other])
        pairs = {(a, parts[0]) for (a, _), parts in zip(other, pieces, strict=True) if parts}
        split = amateur.split([text for _, text in own])
        pairs |= {(parts[0], t) for (t, _), parts in zip(own, split, strict=True) if parts}
        pairs |= {(amateur.special[name], t) for name, t in expert.special.items() if name in amateur.special}
        pairs |= {(a, t) for a in ends[1] for t in ends[0]}
        self._set_pairs(pairs)
        known = [(a, text, parts) for (a, text), parts in zip(other, pieces, strict=True) if a < self._amateur_size]
        self.extensions = TokenExtensions(known, expert)

    def _set_pairs(self, pairs: Iterable[tuple[int, int]]) -> None:
        kept = sorted((a, t) for a, t in pairs if a < self._amateur_size and t < self._size)
        found = torch.tensor(kept, dtype=torch.long).reshape(-1, 2).T
        is_shared = found[0].bincount(minlength=self._amateur_size)[found[0]] > 1
        self.pairs = torch.cat([found[:, is_shared], found[:, ~is_shared]], dim=1)
        self._shared = int(is_shared.sum())
        self.mapped = torch.zeros(self._size, dtype=torch.bool).index_fill(0, found[1], True)
        self.unmapped = int((~self.mapped).sum()), self._amateur_size - int(found[0].bincount().count_nonzero())
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def resolve(self, main: Tensor, logits: Tensor, direct: Tensor | None = None) -> Tensor:
        """Return the amateur's log-probabilities in the expert's vocabulary.

        Args:
            main: `(..., V)` logits of the expert.
            logits: `(..., W)` log-probabilities of the amateur.
            direct: `(..., V)` further log-probabilities of expert tokens, of text that goes on within a token of the amateur.

        Returns:
            `(..., V)` log-probabilities, which sum to 1.
        """
        if main.device not in self._moved:
            self._moved[main.device] = self.pairs.to(main.device), self.mapped.to(main.device)
        (amateur, expert), mapped = self._moved[main.device]
        precise = (
            torch.float32 if main.device.type == "mps" else torch.float64
        )  # with sums of exponentials without a shift
        p_e = main.softmax(-1, dtype=precise)
        values = logits[..., amateur].to(precise).exp()
        values[..., : self._shared] *= self._shares(p_e, amateur[: self._shared], expert[: self._shared])
        total = torch.zeros_like(p_e).index_add(-1, expert, values)
        if direct is not None:
            total, mapped = total + direct.to(precise).exp(), mapped | (direct > -torch.inf)
        rest = p_e.masked_fill(mapped, 0.0).sum(-1, keepdim=True).clamp(max=1 - 1e-6)
        scale = (1 - rest) / total.sum(-1, keepdim=True)
        return torch.where(mapped, total * scale, p_e).log().to(main.dtype)

    def _shares(self, p_e: Tensor, amateur: Tensor, expert: Tensor) -> Tensor:
        """Return for every pair the expert token's share of its amateur token; equal shares where all are ruled out."""
        own = p_e[..., expert].clamp(min=torch.finfo(p_e.dtype).tiny)
        whole = own.new_zeros((*own.shape[:-1], self._amateur_size)).index_add(-1, amateur, own)
        return own / whole[..., amateur]


def equal_tokens(own: ByteTokens, other: ByteTokens) -> list[tuple[int, int]]:
    """Return the tokens of two vocabularies that stand for the same bytes, and the special tokens of the same name.

    Of several tokens for the same bytes, such as "A" and the fallback "<0x41>", the one counts that the tokenizer takes for a text.

    Args:
        own: the tokens of one vocabulary.
        other: the tokens of the other one.

    Returns:
        Pairs of ids, sorted; each id is in one pair at most.

    Examples:
        >>> from contralto import testbed
        >>> tokens = ByteTokens(testbed.tokenizer(), "it")
        >>> pairs = equal_tokens(tokens, tokens)
        >>> len(pairs) == len(testbed.tokenizer()), all(a == b for a, b in pairs)
        (True, True)
    """
    there, back = (_whole(own, other), _whole(other, own))
    pairs = [(a, b) for a, b in there.items() if back.get(b) == a]
    return sorted([*pairs, *((at, other.special[name]) for name, at in own.special.items() if name in other.special)])


def _whole(own: ByteTokens, other: ByteTokens) -> dict[int, int]:
    """Return for every token its bytes' token in another vocabulary, without those that are several tokens there."""
    pieces = other.split(list(own.texts.values()))
    return {token: parts[0] for token, parts in zip(own.texts, pieces, strict=True) if len(parts) == 1}


def scatter_logsumexp(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the log of the sum of exponentials of the values with the same index.

    Args:
        values: `(..., n)`.
        index: `(n,)` int64, below `size`.
        size: number of results.

    Returns:
        `(..., size)`, `-inf` without values.

    Examples:
        >>> scatter_logsumexp(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 2]), 3)
        tensor([0.6931,   -inf, 1.0000])
    """
    index, shape = index.expand_as(values), (*values.shape[:-1], size)
    top = values.new_full(shape, -torch.inf).scatter_reduce(-1, index, values, "amax").clamp(min=LOWEST)
    return top + values.new_zeros(shape).scatter_add(-1, index, (values - top.gather(-1, index)).exp()).log()
