"""Name rules and processors without importing them, and read their signatures and docstrings.

A declaration holds a callable, or its address `"module:name"`. The signature of an address is parsed from the source file, so that
`contralto generate --help` shows every parameter and default without importing torch and transformers.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

__all__ = ["Reference", "argument_docs", "description_of", "load", "signature_of"]

Reference = str | Callable[..., Any]
"""A callable, or its address `"module:name"`."""


def load(reference: Reference) -> Callable[..., Any]:
    """Return the callable that a reference names.

    Args:
        reference: a callable, or its address.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such name.

    Examples:
        >>> load("contralto.decoding.rules:ritual").__name__
        'ritual'
    """
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


@cache
def signature_of(reference: Reference) -> Signature:
    """Return the signature of a function, or of the constructor of a class, with annotations as strings.

    Args:
        reference: a callable, or its address, whose module is not imported.

    Raises:
        ValueError: the address names no function or class of its module.

    Examples:
        >>> signature_of("contralto.decoding.rules:ritual").parameters["kappa"].default
        3.0
    """
    if not isinstance(reference, str):
        signature = inspect.signature(reference)
        parameters = [p.replace(annotation=_annotation_text(p.annotation)) for p in signature.parameters.values()]
        return Signature(parameters)
    node = _definition(reference)
    if isinstance(node, ast.FunctionDef):
        return Signature(_parameters(node.args))
    constructors = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if not constructors:
        raise ValueError(f"the class {reference!r} defines no __init__, so its parameters are unknown")
    return Signature(_parameters(constructors[-1].args)[1:])  # the last one follows its overloads


@cache
def argument_docs(reference: Reference) -> Mapping[str, str]:
    """Return the descriptions in the `Args:` section of a docstring, by parameter.

    Args:
        reference: a callable, or its address, whose module is not imported.

    Examples:
        >>> argument_docs("contralto.decoding.rules:ritual")["normalize"]
        'divide by `1 + kappa`.'
    """
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", _docstring(reference), re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


def description_of(reference: Reference) -> str:
    """Return the docstring of a callable up to its first section, with the formula.

    Args:
        reference: a callable, or its address, whose module is not imported.

    Examples:
        >>> print(description_of("contralto.decoding.rules:context_aware_decoding").splitlines()[-1])
        There is no plausibility constraint, as in the paper.
    """
    return re.split(r"^(?:Args|Returns|Raises|Examples):$", _docstring(reference), maxsplit=1, flags=re.MULTILINE)[
        0
    ].strip()


def _docstring(reference: Reference) -> str:
    doc = ast.get_docstring(_definition(reference)) if isinstance(reference, str) else inspect.getdoc(reference)
    return doc or ""


@cache
def _definition(address: str) -> ast.FunctionDef | ast.ClassDef:
    """Return the definition of an address, also where the module imports the name from another one."""
    module, _, name = address.partition(":")
    tree = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    for inner in ast.walk(tree):  # lazy exports are imported under `if TYPE_CHECKING`
        if isinstance(inner, ast.ImportFrom) and inner.module and not inner.level:
            for alias in inner.names:
                if (alias.asname or alias.name) == name:
                    return _definition(f"{inner.module}:{alias.name}")
    raise ValueError(f"the module {module} defines no function or class {name!r}")


@cache
def _parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    spec = _spec(module)
    if spec is None or not spec.origin:
        raise ValueError(f"there is no module {module!r}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _spec(module: str) -> ModuleSpec | None:
    """Return the spec of a module without importing its parents, which `importlib.util.find_spec` would do."""
    if module in sys.modules:
        return sys.modules[module].__spec__
    parent, path = _spec(module.rpartition(".")[0]) if "." in module else None, None
    if parent is not None:
        path = parent.submodule_search_locations
    specs = (finder.find_spec(module, path) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*missing, *arguments.defaults], strict=True))
    parameters = [_parameter(each, default, Parameter.POSITIONAL_OR_KEYWORD) for each, default in pairs]
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters += [_parameter(each, default, Parameter.KEYWORD_ONLY) for each, default in named]
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return parameters


def _parameter(argument: ast.arg, default: ast.expr | None, kind: Any) -> Parameter:
    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
    value = Parameter.empty if default is None else ast.literal_eval(default)
    return Parameter(argument.arg, kind, default=value, annotation=annotation)


def _annotation_text(annotation: Any) -> str:
    if annotation is Parameter.empty:
        return ""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
