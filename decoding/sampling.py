"""Sample each row from a random stream of its own, so that a completion does not depend on its batch.

`generate(do_sample=True)` draws all rows from one generator: another batch size, another order or a restart gives other
completions. Here each row has a seed, and its noise is a function of the seed, the step and the token, the same on every device.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from contralto.common.hashing import seed_from
from contralto.common.ranges import check_positive

__all__ = ["SeededSampling", "gumbel_noise", "row_seed"]

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as int64
FIRST, SECOND = -4658895280553007687, -7723592293110705685
"""The multipliers of SplitMix64 (Steele et al. 2014), as int64."""
BLOCK = 2**15
"""Elements that are computed together on a CPU, whose cache holds them: fewer calls for the rows of a small vocabulary."""


def gumbel_noise(seeds: Tensor, step: int | Tensor, size: int) -> Tensor:
    """Return standard Gumbel noise for every row and token: `-log(-log u)`.

    `argmax_v (log p(v) + g_v)` is a draw from `p` (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030, section 2). `u` is
    the SplitMix64 hash (Steele et al. 2014) of seed, step and token, 53 bits: no state, and the same bits on every device.

    Args:
        seeds: `(B,)` int64, one per row.
        step: number of tokens drawn before; one number, or `(B,)` int64, one per row.
        size: `V`.

    Returns:
        `(B, V)` float64.

    Examples:
        >>> both = gumbel_noise(torch.tensor([7, 8]), step=3, size=5)
        >>> torch.equal(both[1:], gumbel_noise(torch.tensor([8]), step=3, size=5))
        True
    """
    steps = step if isinstance(step, Tensor) else torch.full_like(seeds, step)
    keys = _mix(_mix(seeds) + (steps + 1) * GOLDEN)
    tokens = torch.arange(1, size + 1, device=seeds.device) * GOLDEN
    noise = torch.empty(len(seeds), size, dtype=torch.float64, device=seeds.device)
    together = max(1, BLOCK // size if seeds.device.type == "cpu" else len(seeds))
    for rows in range(0, len(seeds), together):
        part = slice(rows, rows + together)
        bits = _mix(keys[part, None] + tokens)
        uniform = noise[part].copy_(_shifted(bits, 11)).add_(0.5).div_(2**53)
        uniform.log_().neg_().log_().neg_()
    return noise


def row_seed(seed: int, row: int) -> int:
    """Return the seed of a row, such that no other row or seed has the same stream, unlike with `seed + row`.

    Args:
        seed: of the whole run, any integer.
        row: the row's number in it.

    Examples:
        >>> row_seed(0, 1) != row_seed(1, 0), 0 <= row_seed(0, 1) < 2**63
        (True, True)
    """
    return seed_from(f"{seed} {row}")


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64; integer products wrap around."""
    x = _shifted(x, 30).bitwise_xor_(x).mul_(FIRST)
    x = _shifted(x, 27).bitwise_xor_(x).mul_(SECOND)
    return _shifted(x, 31).bitwise_xor_(x)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Shift to the right logically, without the sign."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


class SeededSampling(LogitsProcessor):
    """A logits processor that makes greedy search sample, each row from its own random stream.

        model.generate(**inputs, do_sample=False, logits_processor=[method, SeededSampling(seeds, temperature=0.7)])

    It applies temperature, then top-k, top-p and min-p in the order of transformers, then adds Gumbel noise, so that the
    argmax is a draw from the resulting distribution. It must be the last processor, also together with a `custom_generate` of
    this package, which applies it after the rule. A completion depends on its prompt and seed alone, as far as the model's
    logits do.

    It takes the place of `do_sample=True`, which would draw a second time, from the noise. Pass `do_sample=False`, and
    temperature, top_k, top_p and min_p here, not to `generate()`. A `custom_generate` of this package rejects
    `do_sample=True` at once. A plain `generate()` does not tell its processors, so there the error comes only after two
    tokens of a row that were not drawn here: a completion of one or two tokens shows none.

    Args:
        seeds: one per row.
        temperature: a finite number above 0.
        top_k: number of likeliest tokens to keep; 0 for all.
        top_p: keep the likeliest tokens that sum up to this probability, in (0, 1].
        min_p: keep tokens of at least this share of the largest probability, in [0, 1].

    Raises:
        TypeError: seeds that are not whole numbers, or a single one.
        ValueError: `temperature` not above 0 or not finite, or a value that transformers' warpers reject; when called, another
            number of rows, as with beams or `num_return_sequences`: repeat the prompts and give each a seed; or a row goes
            on with two different tokens that were not drawn, as with `do_sample=True`, an assistant or a watermark.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompts = tokenizer(["Ben went out to the"] * 2, return_tensors="pt")
        >>> together = model.generate(**prompts, logits_processor=[SeededSampling([1, 2])], max_new_tokens=6)
        >>> second = {name: value[1:] for name, value in prompts.items()}
        >>> alone = model.generate(**second, logits_processor=[SeededSampling([2])], max_new_tokens=6)
        >>> torch.equal(together[1:], alone)
        True
    """

    supports_continuous_batching = False
    follows_contrast = True
    draws_tokens = True
    """Makes the loops of this package reject `do_sample=True`."""

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        check_positive("temperature", temperature, "leave SeededSampling out for greedy search")
        if not isinstance(seeds, Iterable):
            raise TypeError(f"seeds must be a list, one per row, not {seeds!r}")
        self._seeds = torch.tensor([wrapped_seed(seed) for seed in seeds])
        warpers: Any = LogitsProcessorList()
        if temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p != 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        self._warpers = warpers
        self._seen: Tensor | None = None
        self._start = 0
        self._drawn: Tensor | None = None
        self._fills = self._seeds  # the token that pads each row, -1 while none is known

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose argmax is a draw; `generate()` calls this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)`.

        Returns:
            `(B, V)`, float32 at least.

        Raises:
            ValueError: another number of rows than seeds, or a row that goes on with tokens that were not drawn.
        """
        rows, length = input_ids.shape
        if rows != len(self._seeds):
            raise ValueError(f"SeededSampling has {len(self._seeds)} seeds for {rows} rows: pass one seed per row")
        if self._seen is None or not torch.equal(input_ids[:, :-1], self._seen):
            self._start, self._drawn = length, None  # another text begins
        self._check_drawn(input_ids[:, -1])
        self._seen = input_ids
        warped: Tensor = self._warpers(input_ids, scores)
        noise = gumbel_noise(self._seeds.to(scores.device), length - self._start, scores.shape[-1])
        noised = (warped.double().log_softmax(-1) + noise).to(torch.promote_types(scores.dtype, torch.float32))
        self._drawn = noised.argmax(-1)
        return noised

    def _check_drawn(self, tokens: Tensor) -> None:
        """Raise ValueError if a row was continued with two different tokens `(B,)` that were not drawn; a finished row has one, its padding."""
        if self._drawn is None:
            self._fills = torch.full_like(tokens, -1)
            return
        other = tokens != self._drawn
        wrong = other & (self._fills >= 0) & (self._fills != tokens)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"SeededSampling drew token {int(self._drawn[row])} for row {row}, and generate() went on with token "
                f"{int(tokens[row])}: pass do_sample=False (and temperature, top_k, top_p and min_p to SeededSampling), and "
                "leave out assistants, watermarks and processors after it"
            )
        self._fills = torch.where(other, tokens, self._fills)


def wrapped_seed(seed: int) -> int:
    """Wrap a seed of any size to int64.

    Args:
        seed: any integer.
    """
    return (operator.index(seed) + 2**63) % 2**64 - 2**63
