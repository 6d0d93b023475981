"""What answers cost: forward passes and floating-point operations, counted, not estimated."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "metered"]


@dataclass
class Cost:
    """Of some answers. The counts are of all models together, prompts included."""

    forwards: int = 0
    """Rows that went through a model: a batch of 8 is 8, a text that is over and still in its batch counts."""
    flops: int = 0
    """Multiplications and additions of matrix products, convolutions and attention."""


@contextmanager
def metered(models: Mapping[str, nn.Module]) -> Iterator[Cost]:
    """Count what models do, by `torch.utils.flop_counter`; it slows them down, so time is measured apart.

    Args:
        models: by any name.

    Examples:
        >>> from contralto import testbed
        >>> expert, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> with metered({"main": expert}) as cost:
        ...     _ = expert(**tokenizer(["Ben went out to the"] * 2, return_tensors="pt"))
        >>> cost.forwards, cost.flops > 2 * 2 * 6 * 100_000  # 2 per weight and token, of 12 tokens
        (2, True)
    """
    cost, counter = Cost(), FlopCounterMode(display=False)

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        read = next(each for each in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if each is not None)
        cost.forwards += len(read)

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
