"""Export the public names of a package without importing the modules that define them."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["exports"]


def exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports its public names on first access (PEP 562).

    Type checkers and editors do not run this function. They need the same names once more, imported under
    `if TYPE_CHECKING:` as `from module import Name as Name`; `tests/project/test_layout.py` compares the two lists.

    Args:
        package: `__name__` of the package.
        modules: public names by the module that defines them, relative to the package, such as `{"executors.search": ["ContrastiveSearch"]}`.

    Returns:
        The module functions `__getattr__` and `__dir__`, and the sorted list of public names.

    Examples:
        >>> __getattr__, __dir__, __all__ = exports("contralto.decoding", {"sampling": ["SeededSampling"]})
        >>> __all__
        ['SeededSampling']
        >>> __getattr__("SeededSampling").__module__
        'contralto.decoding.sampling'
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    def list_names() -> list[str]:
        return sorted({*vars(import_module(package)), *module_of})

    return get_attribute, list_names, sorted(module_of)
