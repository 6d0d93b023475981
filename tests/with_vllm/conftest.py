"""Tests with a real vLLM. The ordinary suite does not collect them, since its environment has no vLLM.

    CONTRALTO_VLLM=v1 pytest -c tests/with_vllm/pytest.ini tests/with_vllm      the V1 model runner
    CONTRALTO_VLLM=v2 pytest -c tests/with_vllm/pytest.ini tests/with_vllm      Model Runner V2, in Triton's interpreter

vLLM reads its environment when it is imported: so a process for each runner.
"""

import os
import sys
from pathlib import Path

import pytest
from runner import RUNNER

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it starts in seconds
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
if RUNNER is None:
    collect_ignore_glob = ["*"]
else:
    os.environ.update(ENVIRONMENT)
if RUNNER == "v2":
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")  # triton, too, reads it when it is imported
    import triton.backends

    class _Driver:
        is_active = staticmethod(lambda: False)

    class _Backend:  # PyPI's triton has none for CPUs, and vLLM would not use it then
        driver, compiler = _Driver, None

    triton.backends.backends["cpu"] = _Backend()
IMAGES = Path(sys.prefix) / "images"
"""The Makefile puts torchvision here, apart: PyPI's is built for CUDA, and where its operators do not load, its import ends with an error."""
if RUNNER is not None and IMAGES.is_dir():
    import torch

    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # those that torchvision takes for granted; resizing and the like are plain PyTorch
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(IMAGES))


def pytest_collection_modifyitems(items):
    for item in items:
        wanted = item.get_closest_marker("runner")
        if wanted and wanted.args[0] != RUNNER:
            item.add_marker(pytest.mark.skip(reason=f"of the {wanted.args[0]} runner"))


@pytest.fixture(scope="session")
def expert(tmp_path_factory):
    """The embedded expert, for vLLM's kernels."""
    from models import widen

    return str(widen("expert", tmp_path_factory.mktemp("expert")))


@pytest.fixture(scope="session")
def engines(expert):
    """`engines(max_num_seqs=5, ...)`: an engine with these options, one alive at a time."""
    from engines import Engines

    made = Engines(expert)
    yield made
    made.close()
