"""Hashes of values, images, files and models.

Keys of caches and stores on disk are made of them: a changed byte of input makes recorded answers, references and runs unfindable, so
the results are written down in `tests/common/test_hashing.py`. torch is imported only to hash a model.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.common.hub import locate
from contralto.common.used_code import source_path, used_code

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "content_digest",
    "file_digest",
    "fingerprint",
    "json_digest",
    "model_digest",
    "pixels_digest",
    "seed_from",
    "source_digest",
    "tokenizer_digest",
    "weights_digest",
]

BLOCKS, BLOCK_SIZE = 64, 65536
CONFIGS = ("adapter_config.json", "chat_template.jinja", "config.json", "generation_config.json")
SAMPLED = 64
"""Elements of each tensor that `fingerprint` reads."""


def content_digest(content: str | bytes, length: int = 64) -> str:
    """Return the SHA-256 of a string, in UTF-8, or of bytes.

    Args:
        content: the string or the bytes.
        length: the number of hexadecimal digits to return, from the left.

    Examples:
        >>> content_digest("abc", 8)
        'ba7816bf'
    """
    return sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:length]


def json_digest(value: Any, length: int = 64, **options: Any) -> str:
    """Return the SHA-256 of a JSON value, which does not depend on the order of the keys of mappings.

    Args:
        value: the value.
        length: the number of hexadecimal digits to return, from the left.
        options: keyword arguments of `json.JSONEncoder`; keys are sorted in any case.

    Raises:
        TypeError: the value cannot be written as JSON.

    Examples:
        >>> json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
        True
    """
    return content_digest(_encoder(**options)(value), length)


@cache
def _encoder(**options: Any) -> Callable[[Any], str]:
    """Return a function that writes JSON, which `json.dumps` would make again for every value."""
    return json.JSONEncoder(sort_keys=True, **options).encode


def seed_from(text: str) -> int:
    """Return a seed in [0, 2**63) from the hash of a string.

    Args:
        text: all that makes the seed differ from other seeds.

    Examples:
        >>> seed_from("0 1") != seed_from("1 0"), 0 <= seed_from("0 1") < 2**63
        (True, True)
    """
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def pixels_digest(image: Any, *, separator: str = "") -> str:
    """Return the SHA-256 of the mode, the size and the pixels of an image.

    Args:
        image: a PIL image.
        separator: a string between the size and the pixels. Keys of recorded answers have a space there, seeds of evaluations nothing.
    """
    return content_digest(f"{image.mode} {image.size}{separator}".encode() + image.tobytes())


def tokenizer_digest(tokenizer: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a tokenizer: its tokens, its steps, its special tokens and its chat template.

    The same tokenizer in another folder gets the same digest.

    Args:
        tokenizer: a transformers tokenizer.

    Examples:
        >>> from contralto import testbed
        >>> tokenizer_digest(testbed.tokenizer()) == tokenizer_digest(testbed.tokenizer())
        True
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = {} if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # those of the last call
        steps.pop(name, None)
    own = [steps, tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return json_digest(own, 16, default=str)


def source_digest(function: Callable[..., Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the code that a function of a user runs.

    It covers the function, and the functions, classes and variables that it names, directly or not, in its module and in modules of
    the same folder or below; see `used_code`. Where these cannot be told, as for objects, partial functions and code that calls
    `globals()`, it covers the whole module, with the modules of the folder that it imports. Comments and layout do not count.
    Installed packages that the code imports are not covered, nor files that it reads.

    Args:
        function: a function, a class, or an object with a class of its own.

    Returns:
        The digest; that of the function's name if there is no source, as for functions in C.

    Examples:
        >>> source_digest(source_digest) == source_digest(json_digest), source_digest(len) == source_digest(abs)
        (False, False)
    """
    given = function
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    kind = function if hasattr(function, "__qualname__") else type(function)
    module = sys.modules.get(kind.__module__)
    if source_path(kind.__module__) is None:
        return content_digest(f"{kind.__module__}:{kind.__qualname__}", 16)
    is_named = getattr(module, kind.__qualname__, None) is given
    return json_digest(used_code(kind.__module__, kind.__qualname__ if is_named else None), 16)


@cache
def file_digest(path: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file, which is read once in a process.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@cache
def weights_digest(name: str) -> str:
    """Return the SHA-256 of a local model: its configuration and template, and 64 blocks of 64 KiB of each file of weights.

    Training changes weights all over, so a model that was trained on in its folder gets another digest, and the same model in
    another folder of another machine gets the same. The files are read once in a process.

    Args:
        name: a folder, a hub id, or `testbed:NAME`.

    Returns:
        64 hexadecimal digits; the name itself if it is not a folder.

    Raises:
        OSError: a file cannot be read.
    """
    folder = Path(locate(name))
    if not folder.is_dir():
        return name
    digest = sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in CONFIGS:
            size = os.stat(file).st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as opened:
                for i in range(BLOCKS):
                    opened.seek(size * i // BLOCKS)
                    digest.update(opened.read(BLOCK_SIZE))
    return digest.hexdigest()


def model_digest(model: "nn.Module", *, frozen_only: bool, extra: Sequence[object] = ()) -> str:
    """Return the SHA-256 of all weights of a model.

    Weights that ZeRO 3 or FSDP 2 keep in shards are made whole for it, one at a time, so that all processes have to call it; the digest
    is that of the same model in one process.

    Args:
        model: the model.
        frozen_only: leave out the parameters that require a gradient, such as those of a new adapter: the digest is then that of
            the model below them, however they were initialised.
        extra: other values that the digest depends on; their `repr` counts.

    Examples:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> model_digest(layer, frozen_only=False) == model_digest(layer, frozen_only=False)
        True
    """
    import torch

    digest = sha256(repr(list(extra)).encode())
    trained = {name for name, weight in model.named_parameters() if frozen_only and weight.requires_grad}
    for name, kept in sorted(model.state_dict(keep_vars=True).items()):
        if name not in trained and isinstance(kept, torch.Tensor):
            with _whole(kept) as value:
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _whole(weight: Any) -> "Iterator[Tensor]":
    """Yield a weight that may be kept in shards."""
    from torch.distributed.tensor import DTensor

    if hasattr(weight, "ds_id"):  # of ZeRO 3, whose shards look like empty weights
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.detach()
    elif isinstance(weight, DTensor):
        yield weight.full_tensor().detach()
    else:
        yield weight.detach()


def fingerprint(model: "nn.Module") -> str:
    """Return a short hash of a loaded model, quick enough for models of any size.

    At most 64 elements of each tensor are read, evenly spaced, with its name and shape. Offloaded weights are brought back for it,
    one module at a time.

    Args:
        model: the model.

    Returns:
        12 hexadecimal digits.
    """
    from accelerate.utils import align_module_device

    digest = sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        with align_module_device(module):
            for name, tensor in _own_tensors(path, module):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                if tensor.is_meta or not tensor.numel():
                    continue
                sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED]
                digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _own_tensors(path: str, module: "nn.Module") -> Iterator[tuple[str, "Tensor"]]:
    """Yield the parameters and the saved buffers of a module itself, not of its children, by their full names."""
    collections = (module.named_parameters, module.named_buffers)
    for name, tensor in (pair for named in collections for pair in named(recurse=False, remove_duplicate=False)):
        if name not in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name, tensor
