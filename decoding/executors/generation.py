"""The decoding loop that every `custom_generate` callable of this package runs.

`generate()` prepares the prompts, the logits processors, the stopping criteria and its configuration, and hands them to the
callable. `CustomGenerate` checks the options that no callable here supports and runs the loop; `Generation` holds the rows and
performs the part of a step that is the same everywhere: processors, the contrast, warpers, padding of finished rows, streaming,
stopping criteria, and the outputs that the caller asked for. An executor adds its forward passes and its choice of tokens.

Read from transformers 5.23.0: `_sample`, which this loop follows, and `_pad_token_tensor` and `_eos_token_tensor` of a
prepared generation configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from contralto.decoding.executors.order import check_arguments, check_draws, check_mode, split_processors

__all__ = ["CustomGenerate", "Generation"]


class Generation:
    """The rows of one call of `generate()`, which grow token by token.

    Args:
        model: the model that generates.
        input_ids: `(B, T)` int64, the prompts.
        processors: the prepared `LogitsProcessorList`, split by `order.split_processors`.
        stopping_criteria: the prepared `StoppingCriteriaList`.
        config: the prepared generation configuration.
        streamer: receives the prompts and then the tokens of each step; None for no streaming.

    Attributes:
        ids: `(B, T + generated)` int64, the prompts and the tokens generated so far.
        unfinished: `(B,)` bool, the rows that no stopping criterion has ended.
        generated: number of tokens generated per row.
        config: the prepared generation configuration.
        warpers: the processors that act on the scores of the contrast.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, processors: Any, stopping_criteria: Any, config: Any, streamer: Any = None
    ) -> None:
        self.ids, self.config, self.generated = input_ids, config, 0
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self._processors, self.warpers = split_processors(model, processors, config, input_ids)
        self._stopping_criteria, self._streamer = stopping_criteria, streamer
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._pad_token = _pad_token(config, stopping_criteria, input_ids.device)
        self._outputs: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        self._stream(input_ids)

    @property
    def remaining(self) -> int:
        """Return the number of tokens that may still be generated per row."""
        return int(self.config.max_length - self.ids.shape[1])

    @property
    def unpadded(self) -> Tensor:
        """Return the rows `(B,)` that take the chosen token: the unfinished ones if finished rows are padded."""
        return self.unfinished if self._pad_token is not None else torch.ones_like(self.unfinished)

    def would_finish(self, tokens: Tensor) -> bool:
        """Return whether `tokens` `(B,)` would end every unfinished row by an end-of-sequence token."""
        ends = self.config._eos_token_tensor
        return ends is not None and bool(torch.isin(tokens[self.unfinished], ends.to(tokens.device)).all())

    def run(self, advance: Callable[[], Any]) -> None:
        """Call `advance`, which appends at least one token per row, until every row has ended."""
        while self.unfinished.any():
            advance()

    def step(
        self, logits: Tensor, contrast: Callable[[Tensor], Tensor], choose: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Append one token to each row.

        Args:
            logits: `(B, V)` of the main model, on any device and in any precision.
            contrast: returns the scores `(B, V)` of the method from the processed float32 logits.
            choose: returns tokens `(B,)` from the warped scores; by default the argmax, or a draw if `do_sample` is set.

        Returns:
            `(B,)` int64, the chosen tokens, before padding takes their place in finished rows.
        """
        # A copy: processors may write into their input, and the caller may have asked for the logits themselves.
        logits = logits.to(device=self.ids.device, dtype=torch.float32, copy=True)
        if self.config.output_logits:
            self._outputs["logits"].append(logits.clone())
        scores: Tensor = self.warpers(self.ids, contrast(self._processors(self.ids, logits)))
        if self.config.output_scores:
            self._outputs["scores"].append(scores)
        tokens = (choose or self._choose)(scores)
        self._append(tokens)
        return tokens

    def _choose(self, scores: Tensor) -> Tensor:
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)

    def _append(self, tokens: Tensor) -> None:
        if self._pad_token is not None:
            tokens = tokens.where(self.unfinished, self._pad_token)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.generated += 1
        self._stream(tokens)
        self.unfinished = self.unfinished & ~self._stopping_criteria(self.ids, tuple(self._outputs["scores"]) or None)

    def _stream(self, tokens: Tensor) -> None:
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())

    def finish(self, **extra: Any) -> Any:
        """End the stream and return what `generate()` returns.

        Args:
            extra: further fields of the output, such as `past_key_values`.

        Returns:
            `(B, T + generated)` int64, or with `return_dict_in_generate` a transformers output with the requested fields.
        """
        if self._streamer is not None:
            self._streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        output: Any = GenerateEncoderDecoderOutput if self._is_encoder_decoder else GenerateDecoderOnlyOutput
        steps = {name: tuple(values) or None for name, values in self._outputs.items()}
        return output(sequences=self.ids, **steps, **extra)


def _pad_token(config: Any, stopping_criteria: Any, device: torch.device) -> Tensor | None:
    """Return the token that finished rows are padded with; None if no end-of-sequence token ends a row."""
    ends = [criterion.eos_token_id for criterion in stopping_criteria if hasattr(criterion, "eos_token_id")]
    if not ends:
        return None
    token = ends[0] if config._pad_token_tensor is None else config._pad_token_tensor
    return torch.as_tensor(token, device=device).flatten()[0]


class CustomGenerate(ABC):
    """A decoding loop for `generate(custom_generate=...)`.

    A subclass names itself in `name`, says in `alternative` what to use for beam search, and implements `_generate`.

    Args:
        streamer: receives the tokens as they are generated; `generate()` does not hand its own to a callable.
    """

    name: ClassVar[str]
    """The subject of error messages."""
    alternative: ClassVar[str]
    """What to do in place of beam search, the end of an error message."""
    compiles: ClassVar[bool] = False
    """Whether forward passes are compiled where `generate()` would compile them."""

    def __init__(self, *, streamer: Any = None) -> None:
        self.streamer = streamer

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate tokens; `generate()` calls this.

        Args:
            model: the model that generates.
            input_ids: `(B, T)` int64, the prompts.
            logits_processor: the prepared `LogitsProcessorList`.
            stopping_criteria: the prepared `StoppingCriteriaList`.
            generation_config: the prepared generation configuration.
            model_kwargs: the prepared inputs of the first forward pass.

        Returns:
            What `generate()` returns, see `Generation.finish`.

        Raises:
            ValueError: an option that the loop does not support.
        """
        check_arguments(self.name, self)
        self._check(model, generation_config, model_kwargs, logits_processor)
        generation = Generation(model, input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
        return generation.finish(**self._generate(model, generation, model_kwargs))

    @abstractmethod
    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """Run `generation` to its end, and return further fields of the output."""

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        """Raise ValueError for options that the loop does not support, before the first forward pass."""
        if (config.num_beams or 1) > 1:
            raise ValueError(
                f"{self.name} does not support beam search (num_beams={config.num_beams}): {self.alternative}"
            )
        if config.compile_config is not None and not self.compiles:
            raise ValueError(
                f"{self.name} does not compile its forward passes, whose shapes change from step to step: leave compile_config out"
            )
        check_mode(config)
        check_draws(config, processors)
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise ValueError(
                f"{self.name} returns scores and logits, not attentions or hidden states: leave output_attentions and "
                "output_hidden_states out"
            )
