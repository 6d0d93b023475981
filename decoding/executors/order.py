"""Order the processors of a decoding step, in the same way for every executor.

    1. the processors of `generate()` act on the main model's logits: guidance, biases, penalties, lengths, forced,
       suppressed and allowed tokens, and then the caller's `logits_processor` list;
    2. the rule contrasts what they leave with the other branches;
    3. the warpers act on the rule's scores: temperature, top-k, top-p, min-p, ..., then watermark and renormalisation.

So the plausibility constraint applies to the distribution that the caller configured, a token that a processor excludes
stays excluded, and no row is left without a token. A method that is a logits processor has this place by itself, because
`generate()` puts the caller's list before the warpers. A `custom_generate` callable receives one list, which is split here.

Read from transformers 5.23.0: `_get_logits_processor`, which makes that list, and the local variables of `generate()`.
"""

import inspect
import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

__all__ = ["check_arguments", "check_draws", "check_mode", "split_processors"]

AFTER = "follows_contrast"
"""Attribute of a processor in the caller's list that acts on the rule's scores, like all processors after it."""

DRAWS = "draws_tokens"
"""Attribute of a processor that makes greedy search sample, such as `SeededSampling`."""

NOT_HANDED_ON = {
    "assistant_model": "does not draft with another model: leave assistant_model out, or pass the method as logits_processor=[method]",
    "synced_gpus": "does not keep processes in step, so that those with short completions would leave the others waiting: generate with "
    "synced_gpus=False, each process with a whole model of its own",
    "streamer": "does not receive the streamer of generate(): pass it where custom_generate is made, such as method.loop(streamer=...)",
}
"""Arguments that `generate()` binds by name and does not hand to a callable, each with why it is rejected."""


class _Mark(LogitsProcessor):
    """A marker that takes the place of the caller's list of processors."""


def split_processors(model: Any, processors: Any, config: Any, input_ids: Tensor) -> tuple[Any, Any]:
    """Split the list that `generate()` hands to a callable into the processors before the rule and those after it.

    How many warpers there are is measured: `generate()` makes its list once more, for a marker in place of the caller's.

    Args:
        model: the model that generates.
        processors: `LogitsProcessorList` that `generate()` prepared.
        config: the prepared generation configuration.
        input_ids: `(B, T)` the prompts.

    Returns:
        Two lists: the processors that act on the main model's logits, and those that act on the rule's scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the processors that the first list was made with already
        marked = model._get_logits_processor(
            config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            logits_processor=LogitsProcessorList([_Mark()]),
            device=input_ids.device,
        )
    place = next(i for i, processor in enumerate(marked) if isinstance(processor, _Mark))
    first = len(processors) - (len(marked) - place - 1)
    first = next((i for i in range(first) if getattr(processors[i], AFTER, False)), first)
    return LogitsProcessorList(processors[:first]), LogitsProcessorList(processors[first:])


def check_mode(config: Any) -> None:
    """Reject options of `generate()` that ask for another decoding loop than the callable given as `custom_generate`.

    transformers hands such options on to the callable, where nothing would read them.

    Args:
        config: the prepared generation configuration.

    Raises:
        ValueError: prompt lookup, early exit of an assistant, `penalty_alpha`, `dola_layers`, constraints, ...

    Examples:
        >>> from transformers import GenerationConfig
        >>> check_mode(GenerationConfig(prompt_lookup_num_tokens=3))
        Traceback (most recent call last):
            ...
        ValueError: the options select assisted generation, which custom_generate replaces: leave them out, also from the model's generation_config
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"the options select {mode.value.replace('_', ' ')}, which custom_generate replaces: leave them out, "
            "also from the model's generation_config"
        )


def check_draws(config: Any, processors: Any) -> None:
    """Reject `do_sample=True` beside a processor that samples by itself: a second draw would be one from its noise.

    Args:
        config: the prepared generation configuration.
        processors: `LogitsProcessorList` that `generate()` prepared.

    Raises:
        ValueError: both are given.
    """
    drawing = [type(each).__name__ for each in processors if getattr(each, DRAWS, False)]
    if config.do_sample and drawing:
        raise ValueError(
            f"{drawing[0]} draws the tokens by itself, and do_sample=True would draw again: pass do_sample=False, and "
            f"temperature, top_k, top_p and min_p to {drawing[0]}"
        )


def check_arguments(name: str, loop: Any) -> None:
    """Reject arguments of `generate()` that it does not hand to a decoding loop, where they would be ignored.

    They are read from the frame of the `generate()` that called the loop.

    Args:
        name: the subject of the error.
        loop: the callable given as `custom_generate`.

    Raises:
        ValueError: `assistant_model`, `synced_gpus` or `streamer`.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("custom_generate") is loop):
        frame = frame.f_back
    given = {} if frame is None else frame.f_locals
    for argument, reason in NOT_HANDED_ON.items():
        if given.get(argument):
            raise ValueError(f"{name} {reason}")
