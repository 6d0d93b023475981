"""Decoding by contrast as logits processors, for an unmodified `generate()`: a rule and its branches, no mathematics."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from contralto.decoding import rules
from contralto.decoding.branches import Branch, InputBranch, LayerBranch, ModelBranch
from contralto.decoding.branches.padding import KnownTokens, check_mask, fit_mask, padding_of, refuse_unknown_padding
from contralto.decoding.branches.prompts import takes_positions
from contralto.decoding.placement import input_device
from contralto.decoding.validity import branch_names, check_logits
from contralto.decoding.vocabulary import Vocabulary, vocabulary_size

if TYPE_CHECKING:
    from contralto.decoding.executors.loop import ContrastiveLoop

__all__ = [
    "ClassifierFreeGuidanceLogitsProcessor",
    "ContextAwareDecodingLogitsProcessor",
    "ContrastiveDecodingLogitsProcessor",
    "ContrastiveInputDecodingLogitsProcessor",
    "ContrastiveLogitsProcessor",
    "CriticGuidedLogitsProcessor",
    "DoLaLogitsProcessor",
    "InstructionContrastiveDecodingLogitsProcessor",
    "M3IDLogitsProcessor",
    "ProxyTuningLogitsProcessor",
    "RitualLogitsProcessor",
    "RitualVCDLogitsProcessor",
    "VisualContrastiveDecodingLogitsProcessor",
]

Rule = Callable[..., Tensor]


class ContrastiveLogitsProcessor(LogitsProcessor):
    """A rule and the branches whose distributions it contrasts with that of the model that generates.

    The methods of this module are its subclasses. A method of one's own needs no more than a function and a branch:

        ContrastiveLogitsProcessor(lambda main, other: rules.combine((main, other), (2, -1)), [ModelBranch(model)])

    Works with greedy search, sampling, beam search and several returned sequences, with batches of left-padded prompts,
    with encoder-decoders, and in assisted decoding. It runs after repetition penalty, minimum length and the like, and
    before temperature, top-k and top-p, see `order`. `loop()` is the same method as a faster `custom_generate`,
    `score.score` its likelihoods.

    Args:
        rule: scores `(B, V)` from the main model's `(B, V)` and each branch's, all in one dtype on one device.
        branches: where they come from, in the rule's order.
        threshold: the rule's keyword for its plausibility threshold, if it has one; likelihoods are scored without.
        tokenizer: the tokenizer that all models share. It is compared with those that are found beside their weights, see
            `vocabulary`, and lets vocabularies differ in size by more than can be told to be padding.

    Raises:
        ValueError: two of the models have different tokenizers.
    """

    supports_continuous_batching = False

    def __init__(
        self, rule: Rule, branches: Sequence[Branch], *, threshold: str | None = None, tokenizer: Any = None
    ) -> None:
        self.rule = rule
        self.branches = list(branches)
        self.threshold = threshold
        self._vocabulary = Vocabulary([b.model for b in self.branches if b.model is not None], tokenizer)

    def check_model(self, model: Any) -> None:
        """Compare the main model's tokenizer with those of the branches' models, where they can be found.

        The loop, `score` and `trace` do this by themselves. `generate()` does not tell a logits processor its model.

        Args:
            model: the model that generates.

        Raises:
            ValueError: the tokenizers differ, or the sizes of the vocabularies by more than padding explains.
        """
        self._vocabulary.check(model)
        for branch in self.branches:
            branch.limit_tokens(vocabulary_size(model))

    def reset(self) -> None:
        """Forget the last call, and free the branches' caches."""
        for branch in self.branches:
            branch.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` from the main model's `scores` `(B, V)` and the branches', for the rows `(B, T)`."""
        for branch in self.branches:
            branch.limit_tokens(scores.shape[-1])
        contrasts = [branch(input_ids) for branch in self.branches]
        length = input_ids.shape[1]
        return self.combine(
            scores, contrasts, self.step(input_ids), place=lambda row, *_: f"in row {row}, after {length} tokens"
        )

    def step(self, input_ids: Tensor) -> int:
        """How many tokens of the rows were generated, as far as the rule wants to know."""
        return 0

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """What the rule is told besides the branches."""
        return {}

    def combine(
        self,
        scores: Tensor,
        contrasts: Sequence[Tensor],
        step: int | Tensor,
        *,
        place: Callable[..., str] | None = None,
        **changed: Any,
    ) -> Tensor:
        """Apply the rule to branches brought to the dtype, device and vocabulary of the main scores.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: `(..., V)` of every branch.
            step: how many tokens were generated before, for rules that depend on it.
            place: returns where a row of the logits is, from its indices, for an error about them; by default its row
                and step.
            changed: parameters of the rule that are to differ this once.

        Returns:
            The rule's scores `(..., V)`.

        Raises:
            ValueError: NaN, `+inf` or a row of `-inf` alone in the logits of a branch or in the rule's scores.
        """
        fitted = [self._vocabulary.fit(c.to(scores), scores.shape[-1]) for c in contrasts]
        combined = self.rule(scores, *fitted, **self.parameters(step), **changed)
        check_logits(
            [scores, *fitted, combined],
            lambda: [*branch_names(self.rule, self.branches), "scores of the rule"],
            place or (lambda row=0, *_: f"in row {row}, at step {step + 1}"),
        )
        return combined

    def loop(self, *, streamer: Any = None) -> "ContrastiveLoop":
        """The same method as a `custom_generate` callable: branches of the same model share one forward. See `loop`."""
        from contralto.decoding.executors.loop import ContrastiveLoop

        return ContrastiveLoop(self, streamer=streamer)


class ContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    r"""Contrastive decoding of an expert (the model that generates) against an amateur, in any `generate()`.

        expert.generate(**inputs, logits_processor=[ContrastiveDecodingLogitsProcessor(amateur)])

    Scores at every step, on the tokens whose expert probability is at least `alpha` times the largest, `-inf` elsewhere:

    - `form="obrien"`: `(1 + beta) * log p_expert - beta * log p_amateur` (O'Brien & Lewis 2023, arXiv 2309.09117,
      section 2.2), see `rules.contrastive_decoding`;
    - `form="li"`: `log p_expert - log p_amateur` (Li et al. 2022, arXiv 2210.15097, equation 3), see
      `rules.contrastive_decoding_li`. The paper's beam search is `num_beams=5`, with `min_tokens_to_keep=2` and
      `amateur_window=1`.

    Works with greedy search, sampling, beam search and several returned sequences, with batches of left-padded prompts,
    with encoder-decoders, and in assisted decoding. It runs before temperature, top-k and top-p, as both papers want, and
    after repetition penalty and minimum length. One object may serve many calls, also in turn; a prompt that goes on
    from the last text reuses the amateur's cache.

    Args:
        amateur: the weaker model, of the same tokenizer: a transformers model, or `AdaptersOff(peft_model)`. It may have
            another dtype, device, architecture or padded vocabulary size than the expert.
        beta: contrast strength of `form="obrien"`, at least 0. Default 0.5.
        alpha: plausibility threshold, in [0, 1].
        form: which paper's scores.
        amateur_temperature: temperature of the amateur in `form="li"`, above 0. Default 1.0.
        amateur_window: how many of the prompt's last tokens the amateur sees; None for all, 1 as in Li et al.
        min_tokens_to_keep: at least so many tokens stay plausible. Beam search wants 2, as in Li's code: with 1, beams
            that are sure of their next token have nothing to branch into.
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. `loop()` is given it by itself; a processor
            needs it where padding cannot be seen from leading pad tokens of the amateur's configuration, that is for several
            prompts of an amateur without a pad token. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder amateur, what its encoder reads, usually the `inputs` of `generate()`.
        vision_inputs: for an image-text amateur, what it reads with the prompts: `pixel_values` and what goes with them.
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`.

    Raises:
        TypeError: the amateur cannot generate.
        ValueError: another tokenizer; a parameter outside its range or of the other form; prompts that are padded on the right, hold tokens
            that the amateur does not know, or whose padding cannot be told from text.

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
    ) -> None: ...

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
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        own = {"beta": beta, "amateur_temperature": amateur_temperature}
        rule = bind_rule(form, own, {"alpha": alpha, "min_tokens_to_keep": min_tokens_to_keep})
        branch = ModelBranch(
            amateur,
            attention_mask=attention_mask,
            window=amateur_window,
            encoder_inputs=encoder_inputs,
            vision_inputs=vision_inputs,
        )
        super().__init__(rule, [branch], threshold="alpha", tokenizer=tokenizer)


class VisualContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Visual contrastive decoding: the image against a distorted one (VCD, Leng et al. 2024, arXiv 2311.16922).

        contrast = VisualContrastiveDecodingLogitsProcessor(model, images.noised(inputs, seed=0))
        model.generate(**inputs, logits_processor=[contrast])

    Scores `(1 + alpha) log p(v | image) - alpha log p(v | distorted)` on the plausible tokens, see
    `rules.visual_contrastive_decoding`. Unlike the official code it acts in greedy search too, not only in sampling.

    Args:
        model: the model that generates.
        contrast_inputs: what it reads in the other branch, as its processor returns it: `input_ids`, `attention_mask`,
            `pixel_values`, ...; see `images.noised`.
        alpha: contrast strength, at least 0 (`cd_alpha`). Default 1.
        beta: plausibility threshold, in [0, 1] (`cd_beta`). Default 0.1.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; contrast inputs without `input_ids`, or padded on the right.
    """

    def __init__(
        self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        rule = _tried(partial(rules.visual_contrastive_decoding, alpha=alpha, beta=beta), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class InstructionContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Instruction contrastive decoding: the instruction against a disturbed one (ICD, Wang et al. 2024, arXiv 2403.18715).

    Scores as `rules.instruction_contrastive_decoding`. `contrast_inputs` hold the prompt with a disturbing prefix, such as
    "You are a confused object detector", and the same image.

    Args:
        model: the model that generates.
        contrast_inputs: what it reads in the other branch, as its tokenizer or processor returns it.
        alpha: contrast strength, at least 0. Default 1.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError, ValueError: as `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        rule = _tried(partial(rules.instruction_contrastive_decoding, alpha=alpha, beta=beta), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class RitualLogitsProcessor(ContrastiveLogitsProcessor):
    """RITUAL: a randomly transformed image as a second witness, added (Woo et al. 2024, arXiv 2405.17821).

    Scores `log p(v | image) + kappa log p(v | transformed)` on the plausible tokens, see `rules.ritual`.

    Args:
        model: the model that generates.
        contrast_inputs: what it reads in the other branch: the processor's output for the transformed image, see
            `images.ritual_transform`.
        kappa: weight of the transformed view, at least 0. Default 3.
        beta: plausibility threshold, in [0, 1]. Default 0.1.
        normalize: divide by `1 + kappa`, so that the scores are no sharper than the model's own. Default no, as published.

    Raises:
        TypeError, ValueError: as `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self,
        model: Any,
        contrast_inputs: Mapping[str, Any],
        *,
        kappa: float = 3.0,
        beta: float = 0.1,
        normalize: bool = False,
    ) -> None:
        rule = _tried(partial(rules.ritual, kappa=kappa, beta=beta, normalize=normalize), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class RitualVCDLogitsProcessor(ContrastiveLogitsProcessor):
    """RITUAL and VCD together, see `rules.ritual_vcd`: a transformed view added, a distorted one subtracted.

    Args:
        model: the model that generates.
        transformed_inputs: what it reads of the transformed image.
        distorted_inputs: what it reads of the distorted image.
        kappa: weight of the transformed view, at least 0. Default 3.
        alpha: contrast strength against the distorted view, at least 0. Default 1.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError, ValueError: as `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self,
        model: Any,
        transformed_inputs: Mapping[str, Any],
        distorted_inputs: Mapping[str, Any],
        *,
        kappa: float = 3.0,
        alpha: float = 1.0,
        beta: float = 0.1,
    ) -> None:
        rule = _tried(partial(rules.ritual_vcd, kappa=kappa, alpha=alpha, beta=beta), 3)
        branches = [contrast_branch(model, transformed_inputs), contrast_branch(model, distorted_inputs)]
        super().__init__(rule, branches, threshold="beta")


class M3IDLogitsProcessor(ContrastiveLogitsProcessor):
    """M3ID: against the model without the image, ever more as the text grows (Favero et al. 2024, arXiv 2403.14003).

    Scores as `rules.m3id`; the step counts the generated tokens, from 0. So the first token has no contrast, and an answer
    of one token, such as yes or no, is the model's own.

    Args:
        model: the decoder-only model that generates.
        contrast_inputs: the prompt without the image, as the tokenizer returns it.
        lam: how fast the contrast grows, at least 0. Default 0.02.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError, ValueError: as `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(self, model: Any, contrast_inputs: Mapping[str, Any], *, lam: float = 0.02, beta: float = 0.1) -> None:
        rule = partial(rules.m3id, lam=lam, beta=beta)
        _tried(partial(rule, step=0), 2)
        self._view = InputBranch(model, contrast_inputs)
        super().__init__(rule, [self._view], threshold="beta")

    def step(self, input_ids: Tensor) -> int:
        """How many tokens follow the prompts."""
        return self._view.generated(input_ids)

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """The step, which sets the strength."""
        return {"step": step}


class ContrastiveInputDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Contrastive input decoding: what a prompt makes likely and a contrasting one does not (CID, Yona et al. 2023).

    arXiv 2305.07378. `form="probability"`: `log p(v | x) + lam (p(v | x) - p(v | x'))`, see
    `rules.contrastive_input_decoding`. `form="log_ratio"`: `(1 + lam) log p(v | x) - lam log p(v | x')` on the plausible
    tokens, see `rules.contrastive_input_decoding_log_ratio`.

    Args:
        model: the model that generates.
        contrast_inputs: the contrasting prompts, as the tokenizer returns them, or their `input_ids` `(prompts, T')`
            alone. One prompt may serve all rows.
        lam: contrast strength, at least 0. Default 10 for `form="probability"`, which is ours, not the paper's: a tenth
            of probability is worth one nat; 1 for `form="log_ratio"`.
        form: which formula.
        alpha: plausibility threshold of `form="log_ratio"`, in [0, 1]. Default 0.1.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range or of the other form; prompts padded on the right.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompt, other = (tokenizer(t, return_tensors="pt") for t in ("Ben went to the barn.", "Ben went to the river."))
        >>> contrast = ContrastiveInputDecodingLogitsProcessor(model, other, lam=30)
        >>> output = model.generate(**prompt, logits_processor=[contrast], max_new_tokens=6)
    """

    def __init__(
        self,
        model: Any,
        contrast_inputs: Mapping[str, Any] | Tensor,
        *,
        lam: float | None = None,
        form: Literal["probability", "log_ratio"] = "probability",
        alpha: float | None = None,
    ) -> None:
        if form not in ("probability", "log_ratio"):
            raise ValueError(f"form must be 'probability' or 'log_ratio', not {form!r}")
        if form == "probability" and alpha is not None:
            raise ValueError("form='probability' has no plausibility threshold alpha: its scores do not need one")
        inputs = {"input_ids": contrast_inputs} if isinstance(contrast_inputs, Tensor) else contrast_inputs
        given: dict[str, Any] = {
            name: value for name, value in {"lam": lam, "alpha": alpha}.items() if value is not None
        }
        if form == "probability":
            rule: Rule = partial(rules.contrastive_input_decoding, **given)
        else:
            rule = partial(rules.contrastive_input_decoding_log_ratio, **given)
        threshold = "alpha" if form == "log_ratio" else None
        super().__init__(_tried(rule, 2), [contrast_branch(model, inputs)], threshold=threshold)


class ContextAwareDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Context-aware decoding: the prompt with its context against the prompt without (CAD, Shi et al. 2023).

    arXiv 2305.14739. Scores `(1 + alpha) log p(v | context, question) - alpha log p(v | question)`, see
    `rules.context_aware_decoding`.

    Args:
        model: the model that generates, from prompts with context.
        contrast_inputs: the prompts without it, as the tokenizer returns them.
        alpha: contrast strength, at least 0. Default 0.5.

    Raises:
        TypeError: the model cannot generate.
        ValueError: `alpha` negative; prompts padded on the right.
    """

    def __init__(self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 0.5) -> None:
        rule = _tried(partial(rules.context_aware_decoding, alpha=alpha), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)])


class ClassifierFreeGuidanceLogitsProcessor(ContrastiveLogitsProcessor):
    """Classifier-free guidance of a language model (CFG, Sanchez et al. 2023, arXiv 2306.17806).

    Scores `log p(v | negative) + gamma (log p(v | prompt) - log p(v | negative))`, see `rules.classifier_free_guidance`.
    Unlike `generate(guidance_scale=...)` it holds for beams and returned sequences, for padded negative prompts of
    models with absolute positions, and for prompts with images.

    Args:
        model: the model that generates.
        negative_inputs: negative prompts, as the tokenizer or processor returns them; one may serve all rows. None is the
            prompt's last token, as in transformers.
        guidance_scale: `gamma`, at least 0. Default 1.5.
        attention_mask: `(prompts, T)` of the main prompts, needed only without `negative_inputs`, and only where padding
            cannot be seen from leading pad tokens.

    Raises:
        TypeError: the model cannot generate.
        ValueError: `guidance_scale` negative; prompts padded on the right; an encoder-decoder without `negative_inputs`.
    """

    def __init__(
        self,
        model: Any,
        negative_inputs: Mapping[str, Any] | None = None,
        *,
        guidance_scale: float = 1.5,
        attention_mask: Tensor | None = None,
    ) -> None:
        if negative_inputs is not None and attention_mask is not None:
            raise ValueError(
                "attention_mask belongs to prompts without negative_inputs, which hold a mask of their own"
            )
        rule = _tried(partial(rules.classifier_free_guidance, guidance_scale=guidance_scale), 2)
        branch: Branch
        if negative_inputs is None and model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: pass negative_inputs=, a source text to avoid"
            )
        if negative_inputs is None:
            branch = ModelBranch(model, window=1, attention_mask=attention_mask)
        else:
            branch = contrast_branch(model, negative_inputs)
        super().__init__(rule, [branch])


class ProxyTuningLogitsProcessor(ContrastiveLogitsProcessor):
    """Proxy tuning, also DExperts: a small tuned model minus the same untuned steers a large one (Liu et al. 2024).

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
        TypeError, ValueError: as `ContrastiveDecodingLogitsProcessor`.
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
        rule = _tried(partial(rules.proxy_tuning, alpha=alpha), 3)
        own: dict[str, Any] = {
            "attention_mask": attention_mask,
            "encoder_inputs": encoder_inputs,
            "vision_inputs": vision_inputs,
        }
        super().__init__(rule, [ModelBranch(model, **own) for model in (expert, antiexpert)], tokenizer=tokenizer)


class DoLaLogitsProcessor(ContrastiveLogitsProcessor):
    """DoLa: the last layer against the earlier layer that differs most from it (Chuang et al. 2024, arXiv 2309.03883).

    Scores `log p_final - log p_layer` on the plausible tokens, the layer chosen anew for every row and token. Early layers
    go to their logits by the way of the last one, final norm, scale and soft cap included, see `branches.LayerBranch`. The
    official code leaves the final norm out; then the logits of early layers of a trained model span hundreds to thousands,
    and rounding chooses the layer. As a logits processor it runs the model a second time; `loop()` does not.

    Args:
        model: the decoder-only model that generates.
        layers: "low" or "high", every second layer of the lower or upper half (of 20 layers in models of over 40), or
            numbers of layers, 1 for the first. The embeddings, 0, are a candidate only where they are named.
        relative_top: plausibility threshold, in [0, 1]. Default 0.1.
        form: what chooses the layer: "kl" (default), the divergence of the official code, see `rules.dola`, or "jsd", that
            of the paper, see `rules.dola_jsd`.
        final_norm: whether early layers pass the final norm. Default yes; no, as in the official code.
        attention_mask: see `ContrastiveDecodingLogitsProcessor`.
        vision_inputs: see `ContrastiveDecodingLogitsProcessor`.

    Raises:
        TypeError: the model cannot generate.
        ValueError: an encoder-decoder, layers that the model does not have, `relative_top` outside [0, 1], an unknown form,
            or a model whose layers do not lead to its logits.
    """

    def __init__(
        self,
        model: Any,
        *,
        layers: Literal["low", "high"] | Sequence[int] = "high",
        relative_top: float = 0.1,
        form: Literal["kl", "jsd"] = "kl",
        final_norm: bool = True,
        attention_mask: Tensor | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        forms: dict[str, Rule] = {"kl": rules.dola, "jsd": rules.dola_jsd}
        if form not in forms:
            raise ValueError(f"form must be 'kl' or 'jsd', not {form!r}")
        rule = partial(forms[form], relative_top=relative_top)
        rule(torch.zeros(1), torch.zeros(1, 1))
        chosen = _layers(model, layers) if isinstance(layers, str) else layers
        branch = LayerBranch(
            model, chosen, final_norm=final_norm, attention_mask=attention_mask, vision_inputs=vision_inputs
        )
        super().__init__(rule, [branch], threshold="relative_top")


class CriticGuidedLogitsProcessor(LogitsProcessor):
    """Critic-guided decoding: the likeliest tokens, weighed by what a critic thinks of each (Kim et al. 2023).

    arXiv 2212.10938. Scores `log p(v) + log sigmoid(Q(v))` for the `k` likeliest tokens, `-inf` elsewhere, see
    `rules.critic_guided`. The critic reads `k` texts per row and token.

    Args:
        critic: a model with one value per token (`AutoModelForTokenClassification` with `num_labels=1`), which is read at
            each text's last token; or any function of `input_ids` `(N, T)` and `attention_mask` `(N, T)` that returns
            logits `(N,)`, the higher the better.
        k: how many tokens are considered, at least 1. Default 10.
        attention_mask: `(prompts, T)` of the prompts. Without it, padding is found by the critic's pad token; a critic without
            one, such as a function, needs it for several prompts.
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`.

    Raises:
        TypeError: the critic is a model with another head.
        ValueError: `k` below 1, right padding, a critic of another tokenizer; when called, padding that cannot be told from
            text, values that are NaN, or `-inf` for all candidates.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> short = CriticGuidedLogitsProcessor(lambda ids, mask: 9.0 * (ids[:, -1] == tokenizer.eos_token_id), k=50)
        >>> prompt = tokenizer("Ben went to the barn.", return_tensors="pt")
        >>> output = model.generate(**prompt, logits_processor=[short], max_new_tokens=20)
    """

    supports_continuous_batching = False

    def __init__(
        self, critic: Any, *, k: int = 10, attention_mask: Tensor | None = None, tokenizer: Any = None
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1 (candidate tokens), not {k}")
        labels = getattr(getattr(critic, "config", None), "num_labels", 1)
        if labels != 1:
            raise TypeError(
                f"the critic must have one value per token, not {labels} labels: load it with "
                "AutoModelForTokenClassification and num_labels=1"
            )
        if attention_mask is not None:
            check_mask(attention_mask)
        self._critic, self._k, self._mask = critic, k, attention_mask
        self._vocabulary = Vocabulary([critic] if isinstance(critic, PreTrainedModel) else [], tokenizer)
        self._prompts: Tensor | None = None
        self._found: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(B, V)` from the main model's `scores` `(B, V)` and the critic's values of `k` texts per row."""
        self._vocabulary.check_size(scores.shape[-1])
        candidates = scores.topk(min(self._k, scores.shape[-1])).indices
        count = candidates.shape[-1]
        texts = torch.cat([input_ids.repeat_interleave(count, dim=0), candidates.reshape(-1, 1)], dim=1)
        mask = fit_mask(self._find_mask(input_ids).repeat_interleave(count, dim=0), texts.shape[1])
        values = self._values(texts, mask).view_as(candidates)
        weighed = rules.critic_guided(scores, values, candidates)
        # `-inf` is a value like any other, and means never; what is left is checked
        check_logits(
            [scores, values.to(scores).nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0), weighed],
            lambda: ["logits of the main branch", "values of the critic", "scores of the candidates"],
            lambda row, *_: f"in row {row}, after {input_ids.shape[1]} tokens",
        )
        return weighed

    def _find_mask(self, ids: Tensor) -> Tensor:
        """Return the mask of the prompts `(B, T)`, as given or as found in the rows of the first step."""
        if self._mask is not None:
            repeats, rest = divmod(len(ids), len(self._mask))
            if rest or self._mask.shape[1] > ids.shape[1]:
                raise ValueError(
                    f"attention_mask is of shape {tuple(self._mask.shape)}, and the rows of {tuple(ids.shape)}: a mask "
                    "belongs to one batch of prompts"
                )
            return self._mask.to(ids).repeat_interleave(repeats, dim=0)
        if self._prompts is not None and self._found is not None:
            starts = (ids[:, None, : self._prompts.shape[1]], self._prompts[None])
            if starts[0].shape[-1] == starts[1].shape[-1]:
                same = (starts[0] == starts[1]).all(-1)
                if same.any(-1).all():
                    return self._found[same.int().argmax(-1)]
        self._prompts, self._found = ids.clone(), self._guess_mask(ids)
        return self._found

    def _guess_mask(self, ids: Tensor) -> Tensor:
        if hasattr(self._critic, "config"):
            return padding_of(self._critic, ids)
        refuse_unknown_padding(ids, "a critic without a configuration")
        return torch.ones_like(ids)

    def _values(self, texts: Tensor, mask: Tensor) -> Tensor:
        if not isinstance(self._critic, torch.nn.Module):
            return torch.as_tensor(self._critic(texts, mask))
        back, device = texts.device, input_device(self._critic)
        texts, mask = texts.to(device), mask.to(device)
        if hasattr(self._critic, "config"):
            texts = KnownTokens.of(self._critic).replace(texts, mask)
        given = {"input_ids": texts, "attention_mask": mask}
        if takes_positions(self._critic):
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self._critic(**given).logits
        if logits.ndim != 3:
            raise TypeError(
                "the critic gives one value per text, and finds a text's end by its padding, which a candidate may look "
                "like: load it with AutoModelForTokenClassification and num_labels=1, or pass a function"
            )
        return logits[:, -1, 0].to(back)


def contrast_branch(model: Any, inputs: Mapping[str, Any]) -> Branch:
    """The model on other inputs: another prompt or image, or for an encoder-decoder another source text."""
    if getattr(model, "config", None) is not None and model.config.is_encoder_decoder:
        return ModelBranch(model, encoder_inputs=inputs)
    return InputBranch(model, inputs)


def _layers(model: Any, which: str) -> list[int]:
    """DoLa's two ranges of candidate layers; never the embeddings."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    wide, half = depth > 40, depth // 2
    ranges = {"low": range(2, 20 if wide else half, 2), "high": range(depth - 20 if wide else half, depth, 2)}
    if which not in ranges:
        raise ValueError(f"layers must be 'low', 'high' or numbers of layers, not {which!r}")
    if depth < 2:
        raise ValueError(
            f"layers={which!r} needs a layer before the last, and {type(model).__name__} has but one layer"
        )
    return list(ranges[which]) or [min(2, half)]


def _tried(rule: Rule, branches: int) -> Rule:
    """A rule whose parameters were checked, once, by trying it."""
    rule(*[torch.zeros(1)] * branches)
    return rule


def bind_rule(form: str, own: Mapping[str, float | None], common: Mapping[str, float]) -> Rule:
    """The rule of a form of contrastive decoding with its parameters, which are checked here.

    Raises:
        ValueError: an unknown form, a parameter of the other form, or one outside its range.
    """
    forms: dict[str, tuple[str, Rule]] = {
        "obrien": ("beta", rules.contrastive_decoding),
        "li": ("amateur_temperature", rules.contrastive_decoding_li),
    }
    if form not in forms:
        raise ValueError(f"form must be 'obrien' or 'li', not {form!r}")
    parameter, rule = forms[form]
    given = {name: value for name, value in own.items() if value is not None}
    if foreign := set(given) - {parameter}:
        raise ValueError(f"form={form!r} has no {foreign.pop()}; its own parameter is {parameter}")
    return _tried(partial(rule, **given, **common), 2)
