"""Count the forward passes and floating-point operations of answers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["ModelCost", "metered"]


@dataclass
class ModelCost:
    """The cost of some answers, of all models together, prompts included."""

    forwards: int = 0
    """Rows of forward passes: a batch of 8 counts 8, also for completions that have ended and are still in their batch."""
    flops: int = 0
    """Multiplications and additions of matrix products, convolutions and attention."""


@contextmanager
def metered(models: Mapping[str, nn.Module]) -> Iterator[ModelCost]:
    """Count the forward passes and operations of models with `torch.utils.flop_counter`.

    Counting slows the models down, so time is measured in another run.

    Args:
        models: The models, by any name.

    Yields:
        The cost; complete when the context ends.

    Examples:
        >>> from contralto import testbed
        >>> expert, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> with metered({"main": expert}) as cost:
        ...     _ = expert(**tokenizer(["Ben went out to the"] * 2, return_tensors="pt"))
        >>> cost.forwards, cost.flops > 2 * 2 * 6 * 100_000  # 2 per weight and token, of 12 tokens
        (2, True)
    """
    cost, counter = ModelCost(), FlopCounterMode(display=False)

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        cost.forwards += len(next(each for each in inputs if each is not None))

    with ExitStack() as stack:
        for model in {id(model): model for model in models.values()}.values():
            stack.enter_context(_hooked(model, count))
        stack.enter_context(counter)
        yield cost
    cost.flops = counter.get_total_flops()


@contextmanager
def _hooked(model: nn.Module, count: Any) -> Iterator[None]:
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
