"""Drop or hold back single messages of other libraries, by logger and text; all other messages of the logger stay.

bitsandbytes warns as it is imported that a kernel for products in 4 bits is missing, also where peft or TRL import it and no model is
quantised. The message is held back until a model is loaded in 4 bits. It also names the dtype of every product of LLM.int8, which is
dropped.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hold_missing_kernel", "quiet", "report_missing_kernel"]

KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
PRODUCTS = ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")


class _Dropped(logging.Filter):
    """A filter that keeps back the messages with a certain text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a message with the text, and keep it.

        Args:
            record: the message.
        """
        is_kept = self.text in record.getMessage()
        self.held += [record] if is_kept and not self.held else []
        return not is_kept


_kernel, _products = _Dropped(KERNEL[1]), _Dropped(PRODUCTS[1])


@contextmanager
def quiet(message: tuple[str, str] | None) -> Iterator[None]:
    """Drop a message within the block.

    Args:
        message: the name of its logger, and a part of its text; None drops nothing.

    Examples:
        >>> with quiet(("some.library", "is deprecated")):
        ...     logging.getLogger("some.library").warning("this is deprecated")
    """
    if message is None:
        yield
        return
    logger, dropped = logging.getLogger(message[0]), _Dropped(message[1])
    logger.addFilter(dropped)
    try:
        yield
    finally:
        logger.removeFilter(dropped)


def hold_missing_kernel() -> None:
    """Hold the message about the missing kernel back, and drop those about products in 8 bits, from now on."""
    logging.getLogger(KERNEL[0]).addFilter(_kernel)
    logging.getLogger(PRODUCTS[0]).addFilter(_products)


def report_missing_kernel() -> None:
    """Log the message about the missing kernel if it was held back, since a model is loaded in 4 bits; it is not held back again."""
    logger = logging.getLogger(KERNEL[0])
    logger.removeFilter(_kernel)
    held, _kernel.held = _kernel.held, []
    for record in held:
        logger.handle(record)
