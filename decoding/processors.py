"""Contrastive decoding as logits processors, for an unmodified `generate()`: a rule and its branches, no mathematics."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import LogitsProcessor

from contralto.decoding import rules
from contralto.decoding.branches import ModelBranch, fit_vocabulary

__all__ = ["ContrastiveDecodingLogitsProcessor"]


class ContrastiveDecodingLogitsProcessor(LogitsProcessor):
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
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. Needed only where padding cannot be seen
            from leading pad tokens of the amateur's configuration. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder amateur, what its encoder reads, usually the `inputs` of `generate()`.

    Raises:
        TypeError: the amateur cannot generate.
        ValueError: a parameter outside its range or of the other form; prompts that are padded on the right, hold tokens
            that the amateur does not know, or whose padding cannot be told from text.

    Example:
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

    supports_continuous_batching = False

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
    ) -> None:
        own = {"beta": beta, "amateur_temperature": amateur_temperature}
        self._rule = bind_rule(form, own, {"alpha": alpha, "min_tokens_to_keep": min_tokens_to_keep})
        self._amateur = ModelBranch(
            amateur, attention_mask=attention_mask, window=amateur_window, encoder_inputs=encoder_inputs
        )

    def reset(self) -> None:
        """Forget the last call, and free the amateur's cache."""
        self._amateur.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` from the expert's `scores` `(B, V)` and the amateur's, for the rows `(B, T)`."""
        amateur = self._amateur(input_ids).to(device=scores.device, dtype=scores.dtype)
        return self._rule(scores, fit_vocabulary(amateur, scores.shape[-1]))


def bind_rule(
    form: str, own: Mapping[str, float | None], common: Mapping[str, float]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule of a form with its parameters, which are checked here, once, by trying it.

    Raises:
        ValueError: an unknown form, a parameter of the other form, or one outside its range.
    """
    forms: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "obrien": ("beta", rules.contrastive_decoding),
        "li": ("amateur_temperature", rules.contrastive_decoding_li),
    }
    if form not in forms:
        raise ValueError(f"form must be 'obrien' or 'li', not {form!r}")
    parameter, rule = forms[form]
    given = {name: value for name, value in own.items() if value is not None}
    if foreign := set(given) - {parameter}:
        raise ValueError(f"form={form!r} has no {foreign.pop()}; its own parameter is {parameter}")
    bound = partial(rule, **given, **common)
    bound(torch.zeros(1), torch.zeros(1))
    return bound
