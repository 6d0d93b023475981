"""Speculative contrastive decoding: the amateur, which contrast needs anyway, also drafts the text.

    expert.generate(**inputs, custom_generate=SpeculativeContrastiveDecoding(amateur))

Yuan et al. 2023, *Speculative Contrastive Decoding* (arXiv 2311.08981). A round: the amateur writes a few tokens; the
expert reads them all in one forward; from left to right they are kept as the contrastive distribution `P_n` would have
written them, up to the first that it would not, which is replaced. Nothing but time changes: greedy tokens are those of
`ContrastiveDecodingLogitsProcessor`, sampled ones have its distribution.

What is particular to contrast: the amateur must read every token of the text, drafted or not. So the first draft token of
a round is free, and a forward of the amateur is lost only where the draft before it is rejected.

Verification is the loop of plain sampling, fed from a table of logits, that ends where a row leaves the draft. So every
logits processor and stopping criterion sees each beginning of the text once, in order, and never a token that is
rejected later: those that keep a state (grammars, caches) work as in plain sampling.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from contralto.decoding.branches import AdaptersOff, ModelBranch
from contralto.decoding.branches.context import check_tokens, context_length
from contralto.decoding.branches.padding import KnownTokens, fit_mask
from contralto.decoding.branches.prompts import TOKEN_TYPES, Prompts, check_images, prepare_images
from contralto.decoding.executors.generation import CustomGenerate, Generation
from contralto.decoding.placement import input_device
from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.processors.models import bind_rule
from contralto.decoding.rules import plausible
from contralto.decoding.validity import check_logits
from contralto.decoding.vocabulary import fit_vocabulary, vocabulary_size

__all__ = ["SpeculativeContrastiveDecoding", "Statistics", "accept_or_redraw"]

WARPERS = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)
"""The warpers that shape a distribution without regard to the text: drafts are drawn through them too.

A warper that is missing here makes drafts less likely to hold; the text stays the same.
"""

LONGEST_DRAFT = 16
READING_COST = 0.05
"""What one more token in a forward of the expert is taken to cost, in forwards of one token."""
TOKEN_VALUE = 0.35
"""What a look at one more place is taken to save if the draft before it holds, in forwards of the expert."""


@dataclass
class Statistics:
    """What a call did. A position is a column of the batch: with several rows, a draft holds if it holds in all of them."""

    rounds: int = 0
    drafted: int = 0
    """Positions that the amateur drafted."""
    accepted: int = 0
    """Positions of them that became text."""
    expert_forwards: int = 0
    amateur_forwards: int = 0
    tokens: int = 0
    """Tokens written, over all rows."""
    agreement: float = 0.0
    """Sum over these tokens of the probability that a draft in their place is accepted."""

    @property
    def acceptance(self) -> float:
        """The paper's lambda: the mean probability that a draft token is accepted, whether one was drafted or not."""
        return self.agreement / max(self.tokens, 1)


def accept_or_redraw(target: Tensor, proposal: Tensor, draft: Tensor) -> Tensor:
    """Turn draws from one distribution into draws from another, keeping as many as can be kept.

        keep x with probability min(1, P(x) / Q(x)), else draw from norm(max(0, P - Q))

    If `x ~ Q`, the result is distributed as `P`, and is `x` with probability `sum_v min(P(v), Q(v))`. Leviathan et al. 2023
    (arXiv 2211.17192, algorithm 1), with the contrastive distribution for `P` in Yuan et al. 2023 (arXiv 2311.08981).

    Args:
        target: `P`, `(B, V)` probabilities.
        proposal: `Q`, `(B, V)` probabilities.
        draft: `x`, `(B,)` one draw from every row of `Q`.

    Returns:
        `(B,)` tokens.

    Examples:
        What P rules out is never kept, and what Q gives its due is not drawn again.

        >>> P, Q = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 0.0]])
        >>> accept_or_redraw(P, Q, torch.tensor([0])), accept_or_redraw(P, Q, torch.tensor([1]))
        (tensor([2]), tensor([1]))
    """
    p, q = (each.gather(-1, draft[:, None]).squeeze(-1) for each in (target, proposal))
    kept = torch.rand_like(p) * q < p
    if kept.all():
        return draft
    residual = (target - proposal).clamp(min=0)
    # Kept rows may have no residual; a rejected row has one, unless rounding has eaten it.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
    return torch.where(kept, draft, torch.multinomial(residual, 1).squeeze(-1))


class SpeculativeContrastiveDecoding(CustomGenerate):
    """Contrastive decoding as `custom_generate`, with the amateur as drafter: the same text in fewer forwards.

    Every token is greedily chosen or drawn from `P_n = softmax(scores)`, where the scores are those of
    `ContrastiveDecodingLogitsProcessor` in its place in `generate()`'s list, after its processors and the caller's, before
    the warpers, see `order`. A draft token `x` of distribution `Q` is kept with
    probability `min(1, P_n(x) / Q(x))`, else replaced by a draw from `norm(max(0, P_n - Q))` (Yuan et al. 2023,
    arXiv 2311.08981), which leaves `P_n` exactly; in greedy search it is kept if it is the argmax of the scores. In half
    precision a forward of several tokens rounds otherwise than forwards of one: near ties may fall the other way.

    `Q` is the amateur's distribution after temperature, top-k, top-p, ..., on the tokens that the amateur itself finds
    plausible at the same `alpha`: what is implausible to the amateur seldom survives the expert's mask.

    How far the amateur drafts is decided token by token. Let `c` be the cost of its forward in forwards of the expert,
    `r` the estimated chance that all it has drafted in this round is kept. It reads on while `r >= (c + 0.05) / (c + 0.35)`,
    where the loss of that forward if the draft fails equals the gain if it does not, and drafts a token there unless that
    has no chance of 0.1 to count. The chance of a token is that of the tokens before it in this call of about the same
    amateur probability (five classes). No clock is read: a seed gives the same text again.

    Greedy search and sampling, left-padded batches, several returned sequences, stopping criteria, streaming,
    `return_dict_in_generate` with scores and logits, encoder-decoders. In a batch all rows keep as much as the row that
    keeps least (which is exact too); so gains shrink with the batch.

    Args:
        amateur: the weaker model, of the same tokenizer: a transformers model, or `AdaptersOff(peft_model)`. It may have
            another dtype, device, architecture or padded vocabulary size than the expert.
        beta: contrast strength of `form="obrien"`, at least 0. Default 0.5.
        alpha: plausibility threshold, in [0, 1].
        form: `"obrien"` or `"li"`, see `ContrastiveDecodingLogitsProcessor`.
        amateur_temperature: temperature of the amateur in `form="li"`, above 0. Default 1.0.
        amateur_window: how many of the prompt's last tokens the amateur sees; None for all, 1 as in Li et al.
        min_tokens_to_keep: at least so many tokens stay plausible.
        draft_length: so many tokens in every round; None (default) decides as said above, at most 16.
        cost_ratio: `c`, at least 0. None (default) takes the share of the amateur in the expert's parameters or in its
            layers, whichever is larger.
        encoder_inputs: for an encoder-decoder amateur, what its encoder reads, usually the `inputs` of `generate()`.
        vision_inputs: for an image-text amateur, what it reads with the prompts: `pixel_values` and what goes with them.
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`.
        streamer: `generate()` does not hand its own on to a callable, so it is given here.

    Raises:
        TypeError: the amateur cannot generate.
        ValueError: a parameter outside its range or of the other form; an amateur whose cache cannot take tokens back
            (Mamba and other recurrent models). At the call: such an expert; another tokenizer; beams; a static or
            quantized cache; a cache from an earlier call; attentions or hidden states asked for.

    Examples:
        >>> from contralto import testbed
        >>> expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
        >>> question = "Mia has 9 coins. She finds 4, loses 2, wins 5. How many coins does Mia have?"
        >>> chat = [{"role": "user", "content": question}]
        >>> inputs = tokenizer.apply_chat_template(
        ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ... )
        >>> fast = SpeculativeContrastiveDecoding(amateur, beta=0.5, alpha=0.1)
        >>> output = expert.generate(**inputs, custom_generate=fast, max_new_tokens=60)
        >>> tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        'finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. wins 5: 11 + 5 = 16. #### 16'
        >>> fast.statistics.expert_forwards < fast.statistics.tokens
        True
    """

    statistics: Statistics
    """Of the last call."""

    name = "speculative contrastive decoding"
    alternative = "use ContrastiveDecodingLogitsProcessor"

    def __init__(
        self,
        amateur: Any,
        *,
        beta: float | None = None,
        alpha: float = 0.1,
        form: Literal["obrien", "li"] = "obrien",
        amateur_temperature: float | None = None,
        amateur_window: int | None = None,
        min_tokens_to_keep: int = 1,
        draft_length: int | None = None,
        cost_ratio: float | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
    ) -> None:
        super().__init__(streamer=streamer)
        own = {"beta": beta, "amateur_temperature": amateur_temperature}
        rule = bind_rule(form, own, {"alpha": alpha, "min_tokens_to_keep": min_tokens_to_keep})
        self._alpha = alpha
        if draft_length is not None and draft_length < 1:
            raise ValueError(f"draft_length must be at least 1, or None to let it adapt, not {draft_length}")
        if cost_ratio is not None and not 0 <= cost_ratio < math.inf:
            raise ValueError(
                f"cost_ratio must be at least 0 (time of an amateur's forward / an expert's), not {cost_ratio}"
            )
        self._draft_length, self._cost_ratio = draft_length, cost_ratio
        self._amateur = amateur
        self._vision_inputs = vision_inputs
        self._branch = partial(
            ModelBranch, amateur, window=amateur_window, encoder_inputs=encoder_inputs, vision_inputs=vision_inputs
        )
        branch = self._branch()
        self._method, self._model = ContrastiveLogitsProcessor(rule, [branch], tokenizer=tokenizer), branch.model
        _new_cache(self._model)
        self.statistics = Statistics()

    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.statistics = Statistics()
        config, prompts = generation.config, generation.ids
        call = _Call(
            generation,
            expert=_Reader(model, Prompts(prompts, model_kwargs)),
            amateur=self._reader(model, prompts, config, model_kwargs),
            vocabulary=vocabulary_size(model),
            drafter=_Drafter(generation.warpers, self._alpha, sample=config.do_sample),
            pace=_Pace(self._draft_length, self._cost(model)),
            combine=self._method.combine,
            statistics=self.statistics,
        )
        generation.run(call.round)
        call.count_forwards()
        return {}

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        self._method.check_model(model)
        super()._check(model, config, model_kwargs, processors)
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(f"{self.name} needs input_ids, which the amateur reads, not inputs_embeds")
        _check_cache(model, model_kwargs.get("past_key_values"))
        if model_kwargs["past_key_values"].get_seq_length() > 0:
            raise ValueError(
                f"{self.name} cannot continue from the expert's cache, since the amateur has none of that text: leave "
                "past_key_values out"
            )

    def _reader(self, expert: Any, ids: Tensor, config: Any, expert_kwargs: Mapping[str, Any]) -> "_Reader":
        """The amateur before its first forward: it reads the prompts that the expert reads."""
        mask = expert_kwargs.get("decoder_attention_mask" if expert.config.is_encoder_decoder else "attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        tokens = KnownTokens.of(self._model)
        ids = tokens.replace(ids.to(input_device(self._model)), mask.to(input_device(self._model)))
        check_images(self._model, ids, self._vision_inputs or {})
        if self._vision_inputs:
            each, device = config.num_return_sequences or 1, input_device(self._model)
            inputs = {**self._vision_inputs, "attention_mask": mask[::each].to(device)}
            with self._context():
                prompts = prepare_images(self._model, ids[::each].to(device), inputs, len(ids))
        else:
            prompts = self._branch(attention_mask=mask).prompts(ids)
        kwargs = {"use_cache": True, "past_key_values": _new_cache(self._model), **prompts.kwargs}
        if not self._model.config.is_encoder_decoder and kwargs["attention_mask"].all():
            kwargs["attention_mask"] = None  # as `generate()` does: faster
        hidden, limit = ids.shape[1] - prompts.ids.shape[1], context_length(self._model)

        def known(rows: Tensor, over: Tensor) -> Tensor:
            """The rows with a token that the amateur knows in place of padding."""
            return tokens.replace(rows, fit_mask(mask.to(rows), rows.shape[1]), over=over)

        def check(rows: Tensor, over: Tensor) -> None:
            """Raise an error if a row that goes on is longer than the amateur's context."""
            if limit is not None and rows.shape[1] - hidden > limit:
                lengths = fit_mask(mask.to(rows), rows.shape[1])[:, hidden:].sum(-1)
                check_tokens(type(self._model).__name__, limit, lengths.masked_fill(over.to(lengths.device), 0))

        return _Reader(
            self._model, Prompts(prompts.ids, kwargs), hidden=hidden, context=self._context, known=known, check=check
        )

    def _context(self) -> AbstractContextManager[Any]:
        """Where the amateur runs."""
        if isinstance(self._amateur, AdaptersOff):
            context: AbstractContextManager[Any] = self._amateur.peft_model.disable_adapter()
            return context
        return nullcontext()

    def _cost(self, expert: Any) -> float:
        """`c`: what decides on a fast device is the layers, on a slow one the parameters."""
        if self._cost_ratio is not None:
            return self._cost_ratio
        layers = [m.config.get_text_config(decoder=True).num_hidden_layers for m in (self._model, expert)]
        return float(max(layers[0] / layers[1], self._model.num_parameters() / expert.num_parameters()))


class _Reader:
    """A model with its cache, which reads a text as it grows and can forget the end of it."""

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        *,
        hidden: int = 0,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        known: Callable[[Tensor, Tensor], Tensor] | None = None,
        check: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self._known, self._check = known, check
        self._model = model
        self.name = type(model).__name__
        self._prompts = prompts
        self._hidden = hidden  # how many of the text's first tokens it does not see
        self.context = context
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache = prompts.kwargs["past_key_values"]
        self.length = 0  # how much of the text it has read
        self.forwards = 0

    def read(self, ids: Tensor, over: Tensor) -> Tensor:
        """Read what is new in `ids` `(B, T)`, of which some rows are `over`. Logits `(B, new, V)`, float32; at first the last."""
        device = ids.device
        if self._check is not None:
            self._check(ids, over)
        ids = ids if self._known is None else self._known(ids, over)
        first, new = not self.length, ids.shape[1] - self.length
        kept = 1 if first else new
        inputs = self._model.prepare_inputs_for_generation(
            ids[:, self._hidden :],
            next_sequence_length=None if first else new,
            is_first_iteration=first,
            **self._kwargs(ids.shape[1] - self._hidden - self._prompts.ids.shape[1], kept),
        )
        outputs = self._model(**inputs, return_dict=True)
        if first:
            self._cache.activate_past_recording()  # not before, or sliding windows would keep the whole prompt
        self.length = ids.shape[1]
        self.forwards += 1
        logits: Tensor = outputs.logits[:, -kept:].to(device=device, dtype=torch.float32)
        return logits

    def forget(self, length: int) -> None:
        """Keep so much of the text at most."""
        self._cache.crop(-max(self.length - length, 0))  # 0 too: sliding windows let go of what they recorded
        self.length = min(self.length, length)

    def _kwargs(self, written: int, kept: int) -> dict[str, Any]:
        """What goes with the prompts, for so many more tokens, as `generate()` would lengthen it."""
        kwargs = dict(self._prompts.kwargs)
        mask = "decoder_attention_mask" if self._model.config.is_encoder_decoder else "attention_mask"
        for name in (mask, *TOKEN_TYPES):
            if kwargs.get(name) is not None:
                kwargs[name] = pad(kwargs[name], (0, written), value=int(name == mask))
        if (positions := kwargs.get("position_ids")) is not None:
            more = torch.arange(1, written + 1, device=positions.device, dtype=positions.dtype)
            kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + more], dim=-1)
        return kwargs | ({"logits_to_keep": kept} if self._keeps else {})


class _Drafter:
    """The distribution `Q` that drafts are drawn from, and the draws."""

    def __init__(self, after: Any, alpha: float, *, sample: bool) -> None:
        self._warpers: Any = LogitsProcessorList([p for p in after if isinstance(p, WARPERS)])
        self._alpha = alpha
        self.sample = sample

    def proposal(self, ids: Tensor, logits: Tensor) -> Tensor:
        """`Q` `(B, V)` from the amateur's logits."""
        logits = logits.masked_fill(~plausible(logits, alpha=self._alpha), -math.inf)
        probabilities: Tensor = self._warpers(ids, logits).softmax(-1)
        return probabilities

    def draw(self, probabilities: Tensor) -> Tensor:
        """A token per row."""
        return torch.multinomial(probabilities, 1).squeeze(1) if self.sample else probabilities.argmax(-1)

    def choose(self, scores: Tensor, proposal: Tensor, draft: Tensor | None) -> tuple[Tensor, Tensor]:
        """The token of each row, and the probability that a draft from `proposal` is accepted in its place."""
        if not self.sample:
            tokens = scores.argmax(-1)
            return tokens, (tokens == self.draw(proposal)).float()
        target = scores.softmax(-1)
        tokens = self.draw(target) if draft is None else accept_or_redraw(target, proposal, draft)
        return tokens, torch.minimum(target, proposal).sum(-1)


class _Pace:
    """Decides how far the amateur drafts. The rule is in the docstring of `SpeculativeContrastiveDecoding`."""

    CLASSES = 5

    def __init__(self, fixed: int | None, cost_ratio: float) -> None:
        self._fixed = fixed
        self._least = (cost_ratio + READING_COST) / (cost_ratio + TOKEN_VALUE)
        # To begin with, one observation per class: surer drafts are accepted more often.
        self._accepted = [math.sqrt((k + 0.5) / self.CLASSES) for k in range(self.CLASSES)]
        self._seen = [1.0] * self.CLASSES
        self.start()

    def start(self) -> None:
        """A new round."""
        self._drafted, self._reach = 0, 1.0

    def reads_on(self) -> bool:
        """Whether the amateur is to look at the place after what it has drafted."""
        if self._fixed is not None:
            return self._drafted < self._fixed
        return self._drafted < LONGEST_DRAFT and self._reach >= self._least

    def drafts_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft a token there, where the amateur is so sure of each row's."""
        for confidence in confidences:
            k = self._class(confidence)
            self._reach *= self._accepted[k] / self._seen[k]
        self._drafted += 1
        return self._fixed is not None or self._reach >= 2 * READING_COST

    def learn(self, confidences: Sequence[float], agreements: Sequence[float]) -> None:
        """How probable the acceptance of drafts was of which the amateur was so sure."""
        for confidence, agreement in zip(confidences, agreements, strict=True):
            self._accepted[self._class(confidence)] += agreement
            self._seen[self._class(confidence)] += 1

    def _class(self, confidence: float) -> int:
        return min(int(confidence * self.CLASSES), self.CLASSES - 1)


class _Place(NamedTuple):
    """What the amateur says about the token after some beginning of the text."""

    logits: Tensor
    proposal: Tensor
    confidences: Tensor


class _Call:
    """One call of `generate()`: rounds of drafting and verifying.

    Args:
        generation: the rows.
        expert: reader of the model that generates.
        amateur: reader of the amateur.
        vocabulary: size of the expert's vocabulary.
        drafter: draws the drafts.
        pace: decides how far the amateur drafts.
        combine: `ContrastiveLogitsProcessor.combine` of the method.
        statistics: updated in place.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        expert: _Reader,
        amateur: _Reader,
        vocabulary: int,
        drafter: _Drafter,
        pace: _Pace,
        combine: Callable[..., Tensor],
        statistics: Statistics,
    ) -> None:
        self._generation, self._expert, self._amateur = generation, expert, amateur
        self._drafter, self._pace, self._combine = drafter, pace, combine
        self._vocabulary, self._statistics = vocabulary, statistics

    def round(self) -> None:
        """Draft tokens, and append those that the expert accepts and one more."""
        drafts, places = self._draft()
        self._verify(drafts, places)
        self._statistics.rounds += 1
        for reader in (self._expert, self._amateur):
            reader.forget(self._generation.ids.shape[1] - 1)

    def count_forwards(self) -> None:
        """Write the number of forward passes into the statistics."""
        self._statistics.expert_forwards = self._expert.forwards
        self._statistics.amateur_forwards = self._amateur.forwards

    def _draft(self) -> tuple[list[Tensor], list[_Place]]:
        """Return the drafted tokens `(B,)`, and the amateur's places: of each draft, and of the next if it was read."""
        generation = self._generation
        ids, drafts = generation.ids, list[Tensor]()
        room = generation.remaining - 1 if self._expert.length else 0  # none while the prompts are read
        rows = generation.unpadded
        self._pace.start()
        with self._amateur.context():
            places = [self._look(ids)]
            while len(drafts) < room and self._pace.drafts_on(places[-1].confidences[rows].tolist()):
                drafts.append(self._drafter.draw(places[-1].proposal))
                ids = torch.cat([ids, drafts[-1][:, None]], dim=1)
                if len(drafts) == room or generation.would_finish(drafts[-1]) or not self._pace.reads_on():
                    break
                places.append(self._look(ids))
        return drafts, places

    def _look(self, ids: Tensor) -> _Place:
        """Return the amateur's distribution for the token after `ids` `(B, T)`."""
        generation = self._generation
        logits = fit_vocabulary(self._amateur.read(ids, ~generation.unfinished)[:, -1], self._vocabulary)
        step = generation.generated + ids.shape[1] - generation.ids.shape[1] + 1
        check_logits(
            [logits],
            lambda: [f"logits of the amateur ({self._amateur.name})"],
            lambda row: f"in row {row}, at step {step}",
        )
        proposal = self._drafter.proposal(ids, logits)
        return _Place(logits, proposal, proposal.amax(-1))

    def _verify(self, drafts: list[Tensor], places: list[_Place]) -> None:
        """Append the accepted part of the draft, and one more token.

        Rows end their round together. That is exact: where a row's round ends does not depend on the token that it would
        have generated next.
        """
        generation = self._generation
        ids = torch.cat([generation.ids, *(draft[:, None] for draft in drafts)], dim=1)
        table = self._expert.read(ids, ~generation.unfinished)  # (B, drafts + 1, V)
        self._statistics.drafted += len(drafts)
        for i, draft in enumerate([*drafts, None]):
            if i == len(places):
                with self._amateur.context():
                    places.append(self._look(generation.ids))
            tokens = self._step(table[:, i], places[i], draft)
            if draft is None or (tokens != draft)[generation.unpadded].any():
                return
            self._statistics.accepted += 1
            if not generation.unfinished.any():
                return

    def _step(self, logits: Tensor, place: _Place, draft: Tensor | None) -> Tensor:
        """Append one token per row, drafted or not, and return the chosen tokens `(B,)`."""
        generation, rows = self._generation, self._generation.unfinished

        def choose(scores: Tensor) -> Tensor:
            tokens, agreement = self._drafter.choose(scores, place.proposal, draft)
            self._note(place.confidences[rows].tolist(), agreement[rows].tolist())
            return tokens

        return generation.step(
            logits, lambda scores: self._combine(scores, [place.logits], generation.generated), choose
        )

    def _note(self, confidences: list[float], agreement: list[float]) -> None:
        self._pace.learn(confidences, agreement)
        self._statistics.tokens += len(agreement)
        self._statistics.agreement += sum(agreement)


def _new_cache(model: Any) -> Any:
    """An empty cache for a model."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    _check_cache(model, cache if "past_key_values" in inspect.signature(model.forward).parameters else None)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def _check_cache(model: Any, cache: Any) -> None:
    """Raise ValueError if the end of a text cannot be taken back from a cache."""
    inner = getattr(cache, "self_attention_cache", cache)
    if type(inner) is not DynamicCache or not inner.is_croppable:
        raise ValueError(
            f"{type(model).__name__} with {'no cache' if cache is None else type(inner).__name__} cannot take back the "
            "tokens of a rejected draft, for which speculative contrastive decoding needs attention layers and a dynamic "
            "cache: use ContrastiveDecodingLogitsProcessor"
        )
