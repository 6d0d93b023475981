"""Find the base of an adapter, and reject an adapter beside a model that it was not trained on."""

from pathlib import Path

from contralto.common.hashing import weights_digest
from contralto.common.hub import adapter_base, locate
from contralto.common.options import Option, OptionError

__all__ = ["check_base", "split_adapter"]


def split_adapter(model: str, adapter: str | None) -> tuple[str, str | None]:
    """Return the base and the adapter of a model that is named by both, or by the adapter alone.

    Args:
        model: a folder, a hub id, or `testbed:NAME`; it may be an adapter.
        adapter: an adapter of the model, or None.

    Returns:
        The name of the base, and that of the adapter or None.

    Raises:
        OptionError: the model is an adapter itself, and another one is given.
        ValueError: the adapter was trained on another local model.

    Examples:
        >>> split_adapter("testbed:expert", None)
        ('testbed:expert', None)
    """
    base = adapter_base(model)
    if base is not None and adapter is not None:
        raise OptionError(
            f"{model} is an adapter of {base}, and {{adapter}} names another one: give {base} as {{model}} with one of them",
            model=Option("model"),
            adapter=Option("adapter"),
        )
    if adapter is not None:
        check_base(model, adapter)
    return (model, adapter) if base is None else (base, model)


def check_base(model: str, adapter: str) -> None:
    """Raise ValueError if an adapter was trained on another model, where the files of both models can be compared.

    A base on the hub, and one that is not on this machine, may be the same model under another name: `contralto.common.hub.check_fit`
    compares the sizes of the layers once the model is loaded.

    Args:
        model: the model that the adapter is put onto.
        adapter: a folder or a hub id.

    Raises:
        ValueError: `adapter` is no adapter, or its base is a local folder with other weights.
    """
    folder = Path(locate(adapter))
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no adapter: there is no adapter_config.json in it")
    try:
        base = adapter_base(adapter)
    except OptionError:  # the base is not named, or not on this machine
        return
    if base is None:
        raise ValueError(f"{adapter} is no adapter: neither a folder nor a repository with adapter_config.json")
    is_local = Path(locate(base)).is_dir() and Path(locate(model)).is_dir()
    if is_local and weights_digest(base) != weights_digest(model):
        raise ValueError(
            f"the adapter {adapter} was trained on {base}, and the model is {model}, whose weights are others: use {adapter} as the "
            f"model, or {base}"
        )
