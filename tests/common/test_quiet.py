"""Messages of other libraries: single ones are dropped or held back, by logger and text."""

import logging

import pytest

from contralto.common import quiet
from contralto.decoding.quantization import quantization_config

MISSING = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'."


@pytest.fixture
def kernel():
    quiet.hold_missing_kernel()
    quiet._kernel.held.clear()
    yield logging.getLogger(quiet.KERNEL[0])
    quiet._kernel.held.clear()
    quiet.hold_missing_kernel()


def test_a_missing_kernel_is_named_once_a_model_has_4_bits(kernel, caplog):
    for _ in range(2):
        kernel.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'.")
    kernel.warning("another message")
    quantization_config(8)
    assert caplog.messages == ["another message"]
    quantization_config(4)
    quantization_config(4)
    assert caplog.messages == ["another message", MISSING]
    kernel.warning(MISSING)
    assert len(caplog.messages) == 3


def test_the_dtype_of_products_in_8_bits_is_not_named(caplog):
    logger = logging.getLogger(quiet.PRODUCTS[0])
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "float32")
    logger.warning("no binary")
    assert caplog.messages == ["no binary"]


def test_one_message_is_dropped_within_a_block(caplog):
    logger = logging.getLogger("other.library")
    with quiet.quiet(("other.library", "noise")):
        logger.warning("some noise")
        logger.warning("a signal")
    with quiet.quiet(None):
        logger.warning("some noise")
    assert caplog.messages == ["a signal", "some noise"]
