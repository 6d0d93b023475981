"""Load models by the names that users give: a folder, a hub id, or `testbed:NAME` for an embedded model.

A folder with a LoRA adapter, or the hub id of one, is a model as well: its base is loaded, and the adapter is put onto it.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from contralto.common.errors import during, sentence
from contralto.common.options import Option, OptionError
from contralto.common.registry import Registry
from contralto.common.suggestions import did_you_mean

__all__ = [
    "SOURCES",
    "adapter_base",
    "check_fit",
    "check_weights",
    "from_pretrained",
    "has_own",
    "locate",
    "remote_code",
    "trusts_remote_code",
    "with_adapter",
]

SOURCES = Registry[Callable[[str], str | os.PathLike[str]]]("source of models", group="contralto.models")
"""Functions that return the folder of a model, by the prefix of the model's name: `testbed:expert` is `expert` in the source `testbed`.
Packages add sources by entry points; the testbed does, so that no part of the library imports it."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin")
"""Files of weights that transformers reads."""
PATIENCE = 10.0
"""Seconds to wait for the hub where a name may be a hub id or a folder."""
OWN_FILES = {
    "AutoConfig": ("config.json",),
    "AutoTokenizer": ("tokenizer_config.json",),
    "AutoProcessor": ("processor_config.json", "preprocessor_config.json"),
    "AutoImageProcessor": ("preprocessor_config.json",),
    "GenerationConfig": ("generation_config.json",),
}
"""The files by which the folder of an adapter replaces a part of its base."""

_trusts = False
"""Whether models may run code that comes with them, in all threads; see `remote_code`."""


def locate(name: str) -> str:
    """Return the folder or the hub id of a model.

    Args:
        name: a folder, a hub id, or `SOURCE:NAME`, where `SOURCE` is an entry of `SOURCES`.

    Raises:
        ValueError: the source has no model of that name, or the model is a GGUF file.

    Examples:
        >>> locate("testbed:expert").endswith("expert-0"), locate("org/model")
        (True, 'org/model')
    """
    source, colon, rest = name.partition(":")
    found = str(SOURCES.get(source)(rest)) if colon and source in SOURCES else name
    _reject_gguf(Path(found), name)
    return found


def _reject_gguf(path: Path, name: str) -> None:
    """Raise ValueError for a GGUF file, and for a folder whose only weights are GGUF files."""
    is_file = path.suffix.lower() == ".gguf" and path.is_file()
    if not is_file and not (path.is_dir() and any(path.glob("*.gguf")) and not any(map(any, map(path.glob, WEIGHTS)))):
        return
    what = "is a GGUF file" if is_file else "has its weights in a GGUF file"
    raise ValueError(
        f"{name} {what}, which is converted once: run contralto convert {name} --output DIR, and use DIR as the model"
    )


@contextmanager
def remote_code(*, trusted: bool) -> Iterator[None]:
    """Allow or forbid `from_pretrained` to run the code that comes with models, within the block.

    Args:
        trusted: whether the user allows it.
    """
    global _trusts
    before, _trusts = _trusts, trusted
    try:
        yield
    finally:
        _trusts = before


def check_weights(name: str) -> None:
    """Raise if a local folder has damaged files of weights, such as an incomplete copy or a pointer of Git LFS.

    Args:
        name: the name of a model; a hub id is not checked.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    from safetensors import safe_open

    for file in sorted(Path(locate(name)).glob("*.safetensors")):
        with during(f"cannot load {name}: {file.name} is damaged"), safe_open(file, framework="pt"):
            pass


def trusts_remote_code() -> bool:
    """Return True if models may run code that comes with them."""
    return _trusts


def from_pretrained(auto: Any, name: str, *, trust_remote_code: bool | None = None, **options: Any) -> Any:
    """Load a model, a configuration, a tokenizer or a processor. All parts of contralto load them with this function.

    transformers asks on the terminal whether to run a model's own code, unless `trust_remote_code` is given.

    Args:
        auto: a class with `from_pretrained`.
        name: a folder, a hub id, or `testbed:NAME`.
        trust_remote_code: run the code that comes with the model; None follows `remote_code`, by default no.
        options: keyword arguments of `auto.from_pretrained`.

    Raises:
        OSError: there is no such model.
        OptionError: the model needs code of its own, and it may not run.
        ValueError: the model cannot be loaded.
    """
    base = adapter_base(name)
    if base is not None and (hasattr(auto, "_model_mapping") or hasattr(auto, "forward")):
        model = from_pretrained(auto, base, trust_remote_code=trust_remote_code, **options)
        return with_adapter(model, name).eval()
    if base is not None and not has_own(auto, name):
        return from_pretrained(auto, base, trust_remote_code=trust_remote_code, **options)
    trusted, folder = _trusts if trust_remote_code is None else trust_remote_code, locate(name)
    with during(f"cannot load {name}"):  # errors do not always say which model
        try:
            return auto.from_pretrained(folder, trust_remote_code=trusted, **options)
        except ValueError as error:
            if trusted or "trust_remote_code" not in str(error):
                raise
            raise OptionError(
                "it needs code that comes with it, which is not run by default: read that code, then give {option}",
                option=Option("trust_remote_code", True),
            ) from error


# ---------------------------------------------------------------------------------------------------------- adapters


def adapter_base(name: str) -> str | None:
    """Return the name of the model that an adapter was trained on.

    Args:
        name: a folder, a hub id, or `testbed:NAME`.

    Returns:
        The name of its base; None if `name` is a whole model.

    Raises:
        OptionError: the adapter does not name its base, or names a folder that does not exist.
        FileNotFoundError: `name` is a folder that does not exist.

    Examples:
        >>> adapter_base("testbed:expert") is None
        True
    """
    file = _adapter_config(locate(name))
    if file is None:
        return None
    with during(f"cannot read {file}"):
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or (_is_path(base) and not Path(base).exists()):
        problem = f"whose base {base} does not exist" if base else "that does not name its base"
        raise OptionError(
            f"{name} is an adapter {problem}: give the base as {{model}}, and {name} as {{adapter}}",
            model=Option("model"),
            adapter=Option("adapter"),
        )
    return str(base)


def has_own(auto: Any, adapter: str) -> bool:
    """Return True if an adapter comes with a part of its own, such as a tokenizer, in place of that of its base.

    Args:
        auto: the class that loads the part, such as `AutoTokenizer`.
        adapter: a folder or a hub id.
    """
    files, folder = OWN_FILES.get(auto.__name__), locate(adapter)
    if files is None or Path(folder).is_dir():
        return files is None or any(Path(folder, file).is_file() for file in files)
    from transformers.utils.hub import has_file

    return any(has_file(folder, file) for file in files)


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _check_exists(name: str) -> None:
    """Raise FileNotFoundError for a folder that is not there, before the hub is asked for it again and again.

    A name such as `models/one`, whose first part is a folder here, may also be a hub id: it is one if the hub has been asked for it
    before, or can be asked.

    Args:
        name: not an existing folder.
    """
    reason = "" if _is_path(name) else _unreachable(name) if "/" in name and Path(name).parent.is_dir() else None
    if reason is not None:
        found = (
            [path.name for path in Path(name).parent.glob("*") if path.is_dir()] if Path(name).parent.is_dir() else []
        )
        raise FileNotFoundError(f"there is no folder {name}{did_you_mean(Path(name).name, found)}{reason}")


def _unreachable(name: str) -> str | None:
    """Return why a hub id cannot be looked up; None if it can, or has been."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER_CONFIG)):
        return None
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except (HfHubHTTPError, ValueError):  # the hub has answered, or loading says what is wrong with the name
        return None
    except Exception as error:  # noqa: BLE001  the library for HTTP has errors of its own
        return f", and the hub cannot be asked for it ({sentence(error)})"
    return None


def _adapter_config(folder: str) -> str | None:
    """Return the path of the configuration of an adapter, or None for a whole model."""
    if Path(folder).is_dir():
        file = Path(folder, ADAPTER_CONFIG)
        return str(file) if file.is_file() else None
    if not Path(folder).exists():
        _check_exists(folder)
    return _remote_adapter_config(folder)


@cache
def _remote_adapter_config(name: str) -> str | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name)
    except (OSError, ValueError):  # no repository of that name: loading it says so
        return None


def with_adapter(model: Any, adapter: str, **options: Any) -> Any:
    """Put a PEFT adapter onto a model.

    Args:
        model: the model.
        adapter: a folder or a hub id.
        options: keyword arguments of `PeftModel.from_pretrained`.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapter is of another model, or cannot be loaded.
    """
    from peft import PeftModel

    folder = locate(adapter)
    if Path(folder).is_dir() and not Path(folder, ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} is no adapter: there is no {ADAPTER_CONFIG} in it")
    _grow_vocabulary(model, folder)
    check_fit(model, adapter)
    with during(f"cannot load the adapter {adapter}"), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, folder, **options)
        except UserWarning as error:
            raise ValueError("it has no weights for some layers of the model, so it is of another model") from error


def check_fit(model: Any, adapter: str) -> None:
    """Raise ValueError if the weights of an adapter do not fit a model.

    The low-rank matrices `(r, in)` and `(out, r)` of every layer are compared with the layer `(in, out)` of the model. Weights on the
    hub are left to peft.

    Args:
        model: the model without the adapter.
        adapter: a folder with an adapter.

    Raises:
        ValueError: the model has no such layer, or one of another size.
    """
    from safetensors import safe_open

    file = Path(locate(adapter), ADAPTER_WEIGHTS)
    if not file.is_file():
        return
    check_weights(adapter)
    modules = dict(model.named_modules())
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (not a mapping)
            path, mark, rest = key.removeprefix("base_model.model.").partition(".lora_")
            side = {"A.weight": ("in_features", 1), "B.weight": ("out_features", 0)}.get(rest)
            if not mark or side is None:
                continue
            module, (features, dimension) = modules.get(path), side
            if module is None and _renames(model):
                continue
            has = getattr(module, features, None)
            size = weights.get_slice(key).get_shape()[dimension]
            if module is None or (has is not None and has != size):
                what = f"layer {path}" + ("" if module is None else f" of {size} {features.replace('_', ' ')}")
                raise ValueError(
                    f"{adapter} is an adapter of another model: there is no {what} in {_described(model)}{_made_for(adapter)}"
                )


def _renames(model: Any) -> bool:
    """Return True if transformers renames stored weights of a model, as those of adapters made with an earlier version."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = getattr(model.config, "model_type", "")
    if getattr(model, "_checkpoint_conversion_mapping", None):
        return True
    return bool(get_checkpoint_conversion_mapping(kind))  # type: ignore[no-untyped-call]


def _described(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _made_for(adapter: str) -> str:
    file = _adapter_config(locate(adapter))
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path") if file else None
    return f"; it was trained on {base}" if base else ""


def _grow_vocabulary(model: Any, folder: str) -> None:
    """Add the embeddings of tokens that were added in the training of an adapter, as peft's own classes do."""
    if not Path(folder, "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    embeddings = model.get_input_embeddings()
    tokens = len(from_pretrained(AutoTokenizer, folder))
    if tokens > len(embeddings.weight):
        model.resize_token_embeddings(tokens)
