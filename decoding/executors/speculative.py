"""Speculative contrastive decoding: the amateur of the contrast also drafts tokens.

    expert.generate(**inputs, custom_generate=SpeculativeContrastiveDecoding(amateur))

Yuan et al. 2023, *Speculative Contrastive Decoding* (arXiv 2311.08981). A round: the amateur drafts a few tokens; the
expert processes them all in one forward pass; from left to right they are accepted as the contrastive distribution `P_n` would
have generated them, up to the first that it would not, which is replaced. Only the time changes: greedy tokens are those of
`ContrastiveDecodingLogitsProcessor`, sampled ones have its distribution.

Text that repeats earlier text can be drafted without a model: with `prompt_lookup_num_tokens` a round copies what followed the last tokens
before, and the amateur reads all of it in one forward pass.

Contrast needs the amateur's logits for every token, drafted or not. So the first draft token of a round is free, and a forward
pass of the amateur is lost only where the draft before it is rejected.

Verification is the loop of plain sampling on a table of logits, which ends where a row leaves the draft. So every logits
processor and stopping criterion is called once for each prefix, in order, and never with a token that is rejected later:
those that keep a state (grammars, caches) work as in plain sampling.
"""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from contralto.common.placement import input_device
from contralto.decoding.branches.base import unwrap
from contralto.decoding.branches.context import check_tokens, context_length
from contralto.decoding.branches.layer import model_branch
from contralto.decoding.branches.padding import KnownTokens, PromptMask, fit_mask
from contralto.decoding.branches.prompts import Prompts
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.variants import ModelVariant
from contralto.decoding.executors.drafting import (
    TOKEN_COST,
    TOKEN_COST_ON_CPU,
    CopyLength,
    Drafter,
    DraftLength,
    accept_or_redraw,
)
from contralto.decoding.executors.generation import CustomGenerate, Generation
from contralto.decoding.executors.rounds import RowReader, SpeculativeRounds, Statistics
from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.processors.gated import GatedLogitsProcessor
from contralto.decoding.processors.models import bind_rule
from contralto.decoding.vocabulary import vocabulary_size

__all__ = ["SpeculativeContrastiveDecoding", "Statistics", "accept_or_redraw"]


class SpeculativeContrastiveDecoding(CustomGenerate):
    """Contrastive decoding as `custom_generate` with the amateur as drafter: the same tokens in fewer forward passes.

    Every token is greedily chosen or drawn from `P_n = softmax(scores)`, where the scores are those of
    `ContrastiveDecodingLogitsProcessor` in its place in `generate()`'s list, after its processors and the caller's, before
    the warpers, see `order`. A draft token `x` of distribution `Q` is kept with
    probability `min(1, P_n(x) / Q(x))`, else replaced by a draw from `norm(max(0, P_n - Q))` (Yuan et al. 2023,
    arXiv 2311.08981), which leaves `P_n` exactly; in greedy search it is kept if it is the argmax of the scores. In half
    precision a forward pass of several tokens rounds differently from passes of one: near ties may be decided differently.

    `Q` is the amateur's distribution after temperature, top-k, top-p, ..., on the tokens that the amateur itself finds
    plausible at the same `alpha`: what is implausible to the amateur seldom survives the expert's mask.

    The number of drafted tokens is decided token by token. Let `c` be the cost of a forward pass of the amateur, `t` that of one more token in
    a pass, in passes of the expert, and `r` the estimated probability that all tokens drafted in this round are accepted. The amateur runs once more while
    `r >= (c + t) / (c + 0.35)`, where the loss of that pass if the draft fails equals the gain if it does not, and drafts
    another token if `r` is at least `2 t` after it; a round drafts at most `2 + 2 n` tokens, where n tokens of this call would have been
    accepted so far. The probability of a token is estimated from the earlier tokens of this call with about the same amateur
    probability (five classes). While fewer than `2 t` of the last tokens, a moving average over about eight, would
    have been accepted, nothing is drafted: a step is then one of plain contrastive decoding, whose amateur goes on telling what it
    would have drafted. The expert's own first layers as amateur begin with such a rest, since its passes yield their logits, too. As many tokens are copied as are accepted with a probability of `2 t` or more, which is estimated from the
    earlier copies whose passage matched the text over about as many tokens. No clock is read: a seed gives the same tokens again, on
    the same kind of device.

    Greedy search and sampling, left-padded batches, several returned sequences, stopping criteria, streaming,
    `return_dict_in_generate` with scores and logits, encoder-decoders. In a batch all rows accept as many tokens
    as the row that accepts least (which is exact too), so that gains shrink with the batch size.

    Args:
        amateur: the weaker model, of the same tokenizer: a transformers model, or a weaker variant of the expert, `AdaptersOff(peft_model)`,
            `EarlyExit(expert, layers=8)` or `Dropout(expert, rate=0.3)`. It may have another dtype, device, architecture or padded vocabulary size than the expert.
        beta: contrast strength of `form="obrien"`, at least 0. Default 0.5.
        alpha: plausibility threshold, in [0, 1].
        form: `"obrien"` or `"li"`, see `ContrastiveDecodingLogitsProcessor`.
        amateur_temperature: temperature of the amateur in `form="li"`, above 0. Default 1.0.
        amateur_window: number of last tokens of the prompt that the amateur sees; None for all, 1 as in Li et al.
        min_tokens_to_keep: smallest number of tokens that stay plausible.
        draft_length: number of tokens in every round; None (default) decides as described above, at most 16.
        prompt_lookup_num_tokens: largest number of tokens that a round copies from the text itself, after an earlier occurrence of its last
            tokens, as in `generate()`; the amateur drafts where there is none. None (default) copies nothing.
        max_matching_ngram_size: with it, the length of the longest sequence of tokens that is looked up. Default 2.
        cost_ratio: `c`, at least 0. None (default) takes the share of the amateur in the expert's parameters or in its
            layers, whichever is larger.
        token_cost: `t`, in [0, 1]. None (default) takes 0.15 on a CPU, 0.05 on an accelerator.
        gate: probability of the expert's likeliest token from which there is no contrast, in (0, 1], see `GatedLogitsProcessor`. The
            amateur drafts all the same, and while drafts rest it runs only where the gate is open. None (default) contrasts every token.
        attention_mask: `(prompts, T)`, 0 for padding, as for `ContrastiveDecodingLogitsProcessor`. The mask of `generate()` is used
            anyway, so that this one is only compared with it. None (default) compares nothing.
        encoder_inputs: for an encoder-decoder amateur, the inputs of its encoder, usually the `inputs` of `generate()`.
        vision_inputs: for an image-text amateur, the inputs besides the tokens: `pixel_values`, ...
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`.
        streamer: `generate()` does not hand its own on to a callable, so it is given here.

    Raises:
        TypeError: the amateur cannot generate.
        ValueError: a parameter outside its range or of the other form; an amateur whose cache cannot take tokens back
            (Mamba and other recurrent models). When called: such an expert; another tokenizer; beams; a static or
            quantized cache; a cache from an earlier call; attentions or hidden states as outputs; an `attention_mask` that is
            not the mask of `generate()`.

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
    """Statistics of the last call."""

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
        prompt_lookup_num_tokens: int | None = None,
        max_matching_ngram_size: int | None = None,
        cost_ratio: float | None = None,
        token_cost: float | None = None,
        gate: float | None = None,
        attention_mask: Tensor | None = None,
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
            raise ValueError(f"draft_length must be at least 1, or None to adapt it, not {draft_length}")
        if cost_ratio is not None and not 0 <= cost_ratio < math.inf:
            raise ValueError(
                "cost_ratio must be at least 0 (time of a forward pass of the amateur / of the expert), not "
                f"{cost_ratio}"
            )
        if token_cost is not None and not 0 <= token_cost <= 1:
            raise ValueError(
                f"token_cost must lie in [0, 1] (time of one more token in a forward pass / of a pass), not {token_cost}"
            )
        self._draft_length, self._cost_ratio, self._token_cost = draft_length, cost_ratio, token_cost
        self._lookup = _lookup(prompt_lookup_num_tokens, max_matching_ngram_size)
        self._mask = None if attention_mask is None else PromptMask(attention_mask)
        self._context = unwrap(amateur).context
        self._share = amateur.share if isinstance(amateur, ModelVariant) else 1.0
        self._make_branch = partial(
            model_branch, amateur, window=amateur_window, encoder_inputs=encoder_inputs, vision_inputs=vision_inputs
        )
        self._branch = branch = self._make_branch()
        method, self._model = ContrastiveLogitsProcessor(rule, [branch], tokenizer=tokenizer), branch.model
        self._method = method if gate is None else GatedLogitsProcessor(method, gate=gate)
        _new_cache(self._model)
        self.statistics = Statistics()

    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.statistics = Statistics()
        early, cost = self._branch.joint_reader(model), self._cost_per_token(model)
        rounds = SpeculativeRounds(
            generation,
            expert=RowReader(early or CachedReader(model), Prompts(generation.ids, model_kwargs)),
            amateur=self._amateur_reader(generation, model, model_kwargs),
            vocabulary=vocabulary_size(model),
            drafter=Drafter(generation.warpers, self._alpha, sample=generation.config.do_sample),
            draft_length=DraftLength(self._draft_length, self._cost(model), cost, waits=early is not None),
            copy_length=CopyLength(cost),
            method=self._method,
            statistics=self.statistics,
            lookup=self._lookup,
            early=early and self._branch,
        )
        generation.run(rounds.run)
        rounds.count_forwards()
        return {}

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        self._method.check_model(model)
        super()._check(model, config, model_kwargs, processors)
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(f"{self.name} needs input_ids, which the amateur reads, not inputs_embeds")
        _check_cache(model, model_kwargs.get("past_key_values"))
        if model_kwargs["past_key_values"].get_seq_length() > 0:
            raise ValueError(
                f"{self.name} cannot continue from a cache of the expert, because the amateur has no cache of these "
                "tokens: leave past_key_values out"
            )

    def _amateur_reader(self, generation: Generation, expert: Any, expert_kwargs: Mapping[str, Any]) -> RowReader:
        """Return a reader of the amateur before its first forward pass, for the prompts that the expert reads."""
        ids, copies = generation.ids, generation.config.num_return_sequences or 1
        mask = expert_kwargs.get("decoder_attention_mask" if expert.config.is_encoder_decoder else "attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if self._mask is not None and not self._mask.agrees(mask):
            raise ValueError(
                "attention_mask= is not the mask that generate() is given: leave it out, since the amateur reads the mask of "
                "generate()"
            )
        prompts = self._make_branch(attention_mask=mask[::copies]).prompts(ids)
        hidden = ids.shape[1] - prompts.ids.shape[1]
        tokens, limit = KnownTokens.of(self._model), context_length(self._model)

        def prepare(rows: Tensor, finished: Tensor) -> Tensor:
            """Check the length of unfinished rows, and replace padding by a token in the amateur's vocabulary."""
            visible = fit_mask(mask.to(rows), rows.shape[1])
            if limit is not None and rows.shape[1] - hidden > limit:
                lengths = visible[:, hidden:].sum(-1).masked_fill(finished, 0)
                check_tokens(type(self._model).__name__, limit, lengths)
            return tokens.replace(rows, visible, over=finished)

        kwargs = {"past_key_values": _new_cache(self._model), **prompts.kwargs}
        reader = CachedReader(self._model, context=self._context)
        return RowReader(reader, Prompts(prompts.ids, kwargs), hidden=hidden, prepare=prepare)

    def _cost_per_token(self, expert: Any) -> float:
        """Return `t`, by the kind of device."""
        if self._token_cost is not None:
            return self._token_cost
        return TOKEN_COST_ON_CPU if input_device(expert).type == "cpu" else TOKEN_COST

    def _cost(self, expert: Any) -> float:
        """Return `c`: the ratio of layers or of parameters, whichever is larger, for fast and slow devices."""
        if self._cost_ratio is not None:
            return self._cost_ratio
        layers = [m.config.get_text_config(decoder=True).num_hidden_layers for m in (self._model, expert)]
        return self._share * float(max(layers[0] / layers[1], self._model.num_parameters() / expert.num_parameters()))


def _lookup(count: int | None, ngram_size: int | None) -> tuple[int, int] | None:
    """Return the longest draft by look-up and the longest n-gram, None without look-up."""
    if count is None:
        if ngram_size is not None:
            raise ValueError("max_matching_ngram_size is of prompt_lookup_num_tokens: give both, or none")
        return None
    for name, value in (("prompt_lookup_num_tokens", count), ("max_matching_ngram_size", ngram_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return count, 2 if ngram_size is None else ngram_size


def _new_cache(model: Any) -> Any:
    """Return an empty cache for a model."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    _check_cache(model, cache if "past_key_values" in inspect.signature(model.forward).parameters else None)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def _check_cache(model: Any, cache: Any) -> None:
    """Raise ValueError if the last tokens cannot be removed from a cache."""
    inner = getattr(cache, "self_attention_cache", cache)
    if type(inner) is not DynamicCache or not inner.is_croppable:
        raise ValueError(
            f"{type(model).__name__} with {('no cache' if cache is None else type(inner).__name__)} cannot remove "
            "the tokens of a rejected draft: speculative contrastive decoding needs attention layers and a "
            "dynamic cache; use ContrastiveDecodingLogitsProcessor"
        )
