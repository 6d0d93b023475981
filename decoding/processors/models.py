"""Provide the methods that contrast different models."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from contralto.decoding import rules
from contralto.decoding.branches.aligned import AlignedBranch
from contralto.decoding.branches.base import Branch
from contralto.decoding.branches.layer import model_branch
from contralto.decoding.processors.base import ContrastiveLogitsProcessor, Rule, try_rule
from contralto.decoding.rules.models import propose_by_expert
from contralto.decoding.vocabulary import differing_tokens

__all__ = ["ContrastiveDecodingLogitsProcessor", "ProxyTuningLogitsProcessor", "bind_rule", "is_aligned"]


class ContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    r"""Contrastive decoding of an expert (the model that generates) against an amateur, in any `generate()`.

        expert.generate(**inputs, logits_processor=[ContrastiveDecodingLogitsProcessor(amateur)])

    Scores at every step, on the tokens whose expert probability is at least `alpha` times the largest, `-inf` elsewhere:

    - `form="obrien"`: `(1 + beta) * log p_expert - beta * log p_amateur` (O'Brien & Lewis 2023, arXiv 2309.09117,
      section 2.2), see `rules.contrastive_decoding`;
    - `form="li"`: `log p_expert - log p_amateur` (Li et al. 2022, arXiv 2210.15097, equation 3), see
      `rules.contrastive_decoding_li`. The paper's beam search is `num_beams=5`, with `min_tokens_to_keep=2` and
      `amateur_window=1`;
    - `form="released"`: `log p_expert - st_coef * log p_amateur / tau` (the code of Li et al., see
      `rules.contrastive_decoding_released`). In beam search the expert proposes `2 * beams` candidates per prompt, and the difference
      ranks them: `beams=5, min_tokens_to_keep=2` with `generate(num_beams=5)`.

    Works with greedy search, sampling, beam search and several returned sequences, with batches of left-padded prompts,
    with encoder-decoders, and in assisted decoding. It runs before temperature, top-k and top-p, as in both papers, and
    after repetition penalty and minimum length. One object can be used for many calls; a prompt that continues the last
    completion reuses the amateur's cache.

    Args:
        amateur: the weaker model, of the same tokenizer: a transformers model, or a weaker variant of the expert, `AdaptersOff(peft_model)`,
            `EarlyExit(expert, layers=8)` or `Dropout(expert, rate=0.3)`. It may have another dtype, device, architecture or padded vocabulary size than the expert.
        beta: contrast strength of `form="obrien"`, at least 0. Default 0.5.
        alpha: plausibility threshold, in [0, 1].
        form: the paper whose scores are used.
        amateur_temperature: temperature of the amateur in `form="li"` and `form="released"`, above 0. Default 1.0.
        st_coef: weight of the amateur in `form="released"`, at least 0. Default 1.0.
        beams: the `num_beams` of `generate()`, which `form="released"` reads.
        amateur_window: number of last prompt tokens that the amateur sees; None for all, 1 as in Li et al.
        min_tokens_to_keep: number of likeliest tokens that are always plausible. Use 2 for beam search, as in Li's code:
            with 1, a beam whose next token is certain has no second candidate.
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. `loop()` receives it from there; a processor
            needs it where leading pad tokens do not show the padding, that is for several prompts of an amateur without a pad
            token. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder amateur, the inputs of its encoder, usually the `inputs` of `generate()`.
        vision_inputs: for an image-text amateur, its inputs besides the tokens: `pixel_values` and those that belong to them.
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`; with `vocabulary="aligned"` that of the
            expert.
        vocabulary: "aligned" for an amateur with another tokenizer, which reads the same text in its own tokens. Its distribution
            is mapped to the expert's vocabulary, see `AlignedBranch`. If the two tokenizers are the same, the contrast is the
            ordinary one. None for an amateur with the expert's tokenizer.
        amateur_tokenizer: with `vocabulary="aligned"`, the tokenizer of the amateur.
        amateur_inputs: with `vocabulary="aligned"`, the prompts as the amateur is to read them, such as the same messages in its
            own chat template; None for the text of the expert's prompts. They belong to one batch of prompts.

    Raises:
        TypeError: the amateur cannot generate.
        ValueError: another tokenizer; a parameter outside its range or of the other form; prompts that are padded on the right, hold tokens
            unknown to the amateur, or whose padding cannot be told from text.

    Examples:
        >>> from contralto import testbed
        >>> expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
        >>> question = "Mia has 9 coins. She finds 4, loses 2, wins 5. How many coins does Mia have?"
        >>> chat = [{"role": "user", "content": question}]
        >>> inputs = tokenizer.apply_chat_template(
        ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ... )
        >>> contrast = ContrastiveDecodingLogitsProcessor(amateur, beta=0.5, alpha=0.1)
        >>> output = expert.generate(**inputs, logits_processor=[contrast], max_new_tokens=60)
        >>> tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        'finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. wins 5: 11 + 5 = 16. #### 16'
    """

    @overload
    def __init__(
        self,
        amateur: Any,
        *,
        beta: float = 0.5,
        alpha: float = 0.1,
        form: Literal["obrien"] = "obrien",
        amateur_window: int | None = None,
        min_tokens_to_keep: int = 1,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        vocabulary: Literal["aligned"] | None = None,
        amateur_tokenizer: Any = None,
        amateur_inputs: Mapping[str, Tensor] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        amateur: Any,
        *,
        alpha: float = 0.1,
        form: Literal["li"],
        amateur_temperature: float = 1.0,
        amateur_window: int | None = None,
        min_tokens_to_keep: int = 1,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        vocabulary: Literal["aligned"] | None = None,
        amateur_tokenizer: Any = None,
        amateur_inputs: Mapping[str, Tensor] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        amateur: Any,
        *,
        alpha: float = 0.1,
        form: Literal["released"],
        amateur_temperature: float = 1.0,
        st_coef: float = 1.0,
        beams: int = 1,
        amateur_window: int | None = None,
        min_tokens_to_keep: int = 1,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        vocabulary: Literal["aligned"] | None = None,
        amateur_tokenizer: Any = None,
        amateur_inputs: Mapping[str, Tensor] | None = None,
    ) -> None: ...

    def __init__(
        self,
        amateur: Any,
        *,
        beta: float | None = None,
        alpha: float = 0.1,
        form: Literal["obrien", "li", "released"] = "obrien",
        amateur_temperature: float | None = None,
        st_coef: float | None = None,
        beams: int = 1,
        amateur_window: int | None = None,
        min_tokens_to_keep: int = 1,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        vocabulary: Literal["aligned"] | None = None,
        amateur_tokenizer: Any = None,
        amateur_inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = {"beta": beta, "amateur_temperature": amateur_temperature, "st_coef": st_coef}
        self._proposal = _proposal(form, beams=beams, alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)
        rule = bind_rule(form, own, {"alpha": alpha, "min_tokens_to_keep": min_tokens_to_keep})
        shared = tokenizer
        if is_aligned(vocabulary, tokenizer, amateur_tokenizer, amateur_inputs):
            refused = {
                "amateur_window": amateur_window,
                "encoder_inputs": encoder_inputs,
                "vision_inputs": vision_inputs,
            }
            if given := [name for name, value in refused.items() if value is not None]:
                raise ValueError(
                    f"vocabulary='aligned' is for decoder-only models that read text alone: leave it or {given[0]} out"
                )
            branch: Branch = AlignedBranch(
                amateur,
                tokenizer=tokenizer,
                amateur_tokenizer=amateur_tokenizer,
                attention_mask=attention_mask,
                amateur_inputs=amateur_inputs,
            )
            shared = None
        else:
            branch = model_branch(
                amateur,
                attention_mask=attention_mask,
                window=amateur_window,
                encoder_inputs=encoder_inputs,
                vision_inputs=vision_inputs,
            )
        super().__init__(rule, [branch], threshold="alpha", tokenizer=shared)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return contrastive scores; `generate()` calls this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.

        Returns:
            `(B, V)`.

        Raises:
            ValueError: see `combine`; `form="released"` with another number of beams.
        """
        return self._proposed(input_ids, scores, super().__call__(input_ids, scores))

    def contrast(self, input_ids: Tensor, scores: Tensor, contrasts: Sequence[Tensor], step: int) -> Tensor:
        """Return contrastive scores in a decoding loop.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            contrasts: `(B, V)` of the amateur.
            step: number of tokens generated before.

        Returns:
            `(B, V)`.
        """
        return self._proposed(input_ids, scores, super().contrast(input_ids, scores, contrasts, step))

    def _proposed(self, input_ids: Tensor, scores: Tensor, contrasted: Tensor) -> Tensor:
        """Return the scores of the tokens that the expert proposes; all scores in the forms of the papers."""
        if self._proposal is None:
            return contrasted
        return propose_by_expert(scores, contrasted, input_ids, **self._proposal)


def _proposal(form: str, *, beams: int, **options: Any) -> dict[str, Any] | None:
    """Return the options of `propose_by_expert`; None for the forms of the papers, in which all tokens are candidates."""
    if beams < 1 or beams != int(beams):
        raise ValueError(f"beams must be at least 1, as num_beams of generate(), not {beams}")
    return {"beams": beams, **options} if form == "released" else None


class ProxyTuningLogitsProcessor(ContrastiveLogitsProcessor):
    """Proxy tuning, also DExperts: add the difference of a small tuned and untuned model to a large one (Liu et al. 2024).

    arXiv 2401.08565. Scores `log p_base + alpha (log p_expert - log p_antiexpert)`, see `rules.proxy_tuning`. The model
    that generates is the base.

    Args:
        expert: the small tuned model, or a PEFT model.
        antiexpert: the small model before tuning, or `AdaptersOff(peft_model)`.
        alpha: strength, at least 0. Default 1.
        attention_mask: see `ContrastiveDecodingLogitsProcessor`, for both models.
        encoder_inputs: see `ContrastiveDecodingLogitsProcessor`, for both models.
        vision_inputs: see `ContrastiveDecodingLogitsProcessor`, for both models.
        tokenizer: the tokenizer that all three models share, see `ContrastiveLogitsProcessor`.

    Raises:
        TypeError: see `ContrastiveDecodingLogitsProcessor`.
        ValueError: see `ContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self,
        expert: Any,
        antiexpert: Any,
        *,
        alpha: float = 1.0,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        rule = try_rule(partial(rules.proxy_tuning, alpha=alpha), 3)
        own: dict[str, Any] = {
            "attention_mask": attention_mask,
            "encoder_inputs": encoder_inputs,
            "vision_inputs": vision_inputs,
        }
        super().__init__(rule, [model_branch(model, **own) for model in (expert, antiexpert)], tokenizer=tokenizer)


def is_aligned(vocabulary: str | None, tokenizer: Any, amateur_tokenizer: Any, amateur_inputs: Any) -> bool:
    """Return whether the amateur's distribution has to be mapped, after checks of the arguments that concern it.

    Args:
        vocabulary: None or "aligned".
        tokenizer: the tokenizer of the expert.
        amateur_tokenizer: the tokenizer of the amateur.
        amateur_inputs: the prompts of the amateur.

    Returns:
        False if the two tokenizers are the same, so that the contrast is the ordinary one.

    Raises:
        ValueError: another value, a tokenizer that is missing, or arguments of the map without it.
    """
    if vocabulary is None:
        if amateur_tokenizer is not None or amateur_inputs is not None:
            name = "amateur_inputs" if amateur_tokenizer is None else "amateur_tokenizer"
            raise ValueError(f"{name} is read with vocabulary='aligned' alone: leave it out")
        return False
    if vocabulary != "aligned":
        raise ValueError(f"vocabulary must be 'aligned' or None, not {vocabulary!r}")
    if tokenizer is None or amateur_tokenizer is None:
        raise ValueError("vocabulary='aligned' needs both tokenizers: give tokenizer and amateur_tokenizer")
    if amateur_inputs is not None:
        return True
    return bool(differing_tokens(tokenizer, amateur_tokenizer) or differing_tokens(amateur_tokenizer, tokenizer))


def bind_rule(form: str, own: Mapping[str, float | None], common: Mapping[str, float]) -> Rule:
    """Return the rule of a form of contrastive decoding with its parameters, and check them.

    Args:
        form: "obrien", "li" or "released".
        own: parameters that not every form has, None for the default. Without `st_coef` among them there is no form "released".
        common: parameters of all forms.

    Raises:
        ValueError: an unknown form, a parameter of the other form, or one outside its range.
    """
    forms: dict[str, tuple[tuple[str, ...], Rule]] = {
        "obrien": (("beta",), rules.contrastive_decoding),
        "li": (("amateur_temperature",), rules.contrastive_decoding_li),
        "released": (("amateur_temperature", "st_coef"), rules.contrastive_decoding_released),
    }
    known = [name for name, (parameters, _) in forms.items() if set(parameters) <= set(own)]
    if form not in known:
        raise ValueError(f"form must be {' or '.join(map(repr, known))}, not {form!r}")
    parameters, rule = forms[form]
    values = {name: value for name, value in own.items() if value is not None}
    if foreign := set(values) - set(parameters):
        plural = "parameters are" if len(parameters) > 1 else "parameter is"
        raise ValueError(f"form={form!r} has no {min(foreign)}; its {plural} {' and '.join(parameters)}")
    return try_rule(partial(rule, **values, **common), 2)
