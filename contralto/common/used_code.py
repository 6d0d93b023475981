"""Find the code that a Python function uses, by reading source files; nothing is imported or run.

Used is what a function names: functions, classes and variables of its module and of the modules that lie in the same folder or below,
and what these name in turn. A statement of a module that acts when it is imported, such as a call or a decorator, counts if it can
reach a variable that is used. Where names cannot be followed (`globals()`, `getattr` with a computed name, `import *`), the whole
module counts, with all modules that it imports from the folder.
"""

import ast
import importlib.util
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

__all__ = ["source_path", "used_code"]

HIDDEN = frozenset(
    ("globals", "locals", "vars", "eval", "exec", "compile", "import_module", "modules", "reload", "attrgetter")
) | {"__import__", "__dict__", "__globals__", "__getattr__"}
"""Names by which code can reach names that it does not spell out."""
BY_NAME = ("getattr", "setattr", "delattr")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)

Chain = tuple[str, ...]
"""A name with the attributes that follow it: `("tables", "SIZES", "get")`."""


class _Target(NamedTuple):
    """Name the module, or the name in a module, that an imported name stands for."""

    module: str
    name: str | None


def source_path(module: str) -> Path | None:
    """Return the source file of a module, None if it is not written in Python or not found.

    Args:
        module: the absolute name; the module need not be imported.
    """
    loaded = sys.modules.get(module)
    try:
        path = _unloaded_path(module) if loaded is None else inspect.getsourcefile(loaded)
    except TypeError:  # built into the interpreter
        return None
    return Path(path).resolve() if path and Path(path).suffix == ".py" and Path(path).is_file() else None


def _unloaded_path(module: str) -> str | None:
    """Return the file of a module by its place below the package of its first name, which is found without being imported."""
    first, *rest = module.split(".")
    spec = getattr(sys.modules.get(first), "__spec__", None) or PathFinder.find_spec(first)
    if spec is None:
        return None
    if not rest:
        return spec.origin
    below = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
    files = (file for each in below for file in (each.with_name(f"{each.name}.py"), each / "__init__.py"))
    return next((str(file) for file in files if file.is_file()), None)


def used_code(module: str, name: str | None) -> list[str]:
    """Return the code that a name of a module uses, as normalised source: comments and layout do not count.

    Args:
        module: the absolute name of a module with a source file.
        name: a function, class or variable at the top level; None is the whole module, with the modules that it imports from its
            folder.

    Returns:
        The statements, sorted; the text of a whole module where names cannot be followed.

    Examples:
        >>> codes = used_code("contralto.common.suggestions", "closest")
        >>> any("def closest" in code for code in codes), any("def did_you_mean" in code for code in codes)
        (True, False)
    """
    path = source_path(module)
    if path is None:
        return []
    search = _Search(path.parent)
    source = search.source(module)
    if name is None or source is None or name not in source.names:
        search.take_module(module)
    else:
        search.take(module, (name,))
        search.take_effects()
    return sorted(search.codes)


class _Mentions(ast.NodeVisitor):
    """The names that code mentions, each with the attributes behind it."""

    def __init__(self, nodes: Iterable[ast.AST]) -> None:
        self.chains: set[Chain] = set()
        self.is_hidden = False
        """True if the code can reach names that it does not spell out."""
        for node in nodes:
            self.visit(node)
        self.is_hidden |= any(part in HIDDEN for chain in self.chains for part in chain)

    def visit_Name(self, node: ast.Name) -> None:
        """Add a name."""
        self.chains.add((node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Add a name with the attributes behind it."""
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            self.chains.add((inner.id, *reversed(parts)))
        else:
            self.is_hidden |= any(part in HIDDEN for part in parts)
            self.visit(inner)

    def visit_Call(self, node: ast.Call) -> None:
        """Note calls that reach a name by a string, such as `getattr` with a variable."""
        if isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            self.is_hidden |= len(node.args) < 2 or not isinstance(node.args[1], ast.Constant)
        self.generic_visit(node)


class _Source:
    """The statements of a module, by the names that they bind."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        body = ast.parse(path.read_text(encoding="utf-8")).body
        self.body = [statement for statement in body if not _is_main(statement)]
        self.bound: dict[str, list[ast.stmt]] = defaultdict(list)
        self.imports: dict[str, _Target] = {}
        self.package = package
        for statement in self.body:
            for bound in _bound_names(statement):
                self.bound[bound].append(statement)
            if not isinstance(statement, DEFINITIONS):
                self.imports |= dict(_imported(statement, package))
        self.names = {*self.bound, *self.imports}
        self.has_stars = any(alias.name == "*" for node in self.nodes(IMPORTS) for alias in node.names)

    def nodes(self, kinds: tuple[type[ast.Import], type[ast.ImportFrom]]) -> Iterator[ast.Import | ast.ImportFrom]:
        """Yield the imports anywhere in the module."""
        yield from (node for statement in self.body for node in ast.walk(statement) if isinstance(node, kinds))

    @cached_property
    def uses(self) -> dict[str, set[str]]:
        """Return for each name of the module the names of the module that its statements mention."""
        return {
            name: {chain[0] for chain in _Mentions(statements).chains} & self.names
            for name, statements in self.bound.items()
        }

    def reach(self, names: Iterable[str]) -> set[str]:
        """Return names with all names of the module that they lead to."""
        found, waiting = set[str](), list(names)
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += self.uses.get(name, ())
        return found

    def is_variable(self, name: str) -> bool:
        """Return True if a name is bound to something that another statement may change."""
        return any(not isinstance(each, DEFINITIONS) and not _is_constant(each) for each in self.bound[name])


class _Search:
    """A search for used code in the modules of a folder."""

    def __init__(self, folder: Path) -> None:
        self.codes: set[str] = set()
        self._folder = folder
        self._sources: dict[str, _Source | None] = {}
        self._taken: set[tuple[str, Chain]] = set()
        self._statements: set[int] = set()
        self._whole: set[str] = set()

    def source(self, module: str) -> _Source | None:
        """Return the source of a module; None if it does not lie in the folder."""
        if module not in self._sources:
            path = source_path(module)
            is_inside = path is not None and self._folder in path.parents
            self._sources[module] = _Source(module, path) if path is not None and is_inside else None
        return self._sources[module]

    def take(self, module: str, chain: Chain) -> None:
        """Take the code of a name, and all that it uses."""
        source = self.source(module)
        if source is None or (module, chain) in self._taken:
            return
        self._taken.add((module, chain))
        if source.has_stars:
            self.take_module(module)
            return
        if target := source.imports.get(chain[0]):
            self.codes.add(f"# {module}\nfrom {target.module} import {target.name} as {chain[0]}")
            self._follow(target, chain[1:])
        for statement in source.bound.get(chain[0], ()):
            if not isinstance(statement, IMPORTS):
                self._take_statement(source, statement)

    def _take_statement(self, source: _Source, statement: ast.stmt) -> None:
        if id(statement) in self._statements:
            return
        self._statements.add(id(statement))
        self.codes.add(f"# {source.name}\n{ast.unparse(statement)}")
        mentions = _Mentions([statement])
        if mentions.is_hidden:
            self.take_module(source.name)
            return
        own = dict(_imported(statement, source.package))
        for chain in mentions.chains:
            if chain[0] in own:
                self._follow(own[chain[0]], chain[1:])
            if chain[0] in source.names:
                self.take(source.name, chain)

    def _follow(self, target: _Target, rest: Chain) -> None:
        """Take what an imported name stands for, with the attributes behind it."""
        chain = rest if target.name is None else (target.name, *rest)
        source = self.source(target.module)
        if chain and (source is None or chain[0] not in source.names):
            inner = f"{target.module}.{chain[0]}"
            if self.source(inner) is not None:
                self._follow(_Target(inner, None), chain[1:])
                return
        if source is not None and chain and chain[0] in source.names:
            self.take(target.module, chain)
        elif source is not None:
            self.take_module(target.module)

    def take_module(self, module: str) -> None:
        """Take a whole module, and the modules of the folder that it imports."""
        source = self.source(module)
        if source is None or module in self._whole:
            return
        self._whole.add(module)
        self.codes.add(f"# {module}\n" + "\n".join(map(ast.unparse, source.body)))
        for node in source.nodes(IMPORTS):
            for target in _targets(node, source.package):
                self.take_module(target.module)
                if target.name is not None:
                    self.take_module(f"{target.module}.{target.name}")

    def take_effects(self) -> None:
        """Take the statements that act when a module is imported, and can reach a variable or a module that is used."""
        before = -1
        while before != len(self.codes):
            before = len(self.codes)
            for source in [each for each in self._sources.values() if each is not None]:
                used = {chain[0] for module, chain in self._taken if module == source.name}
                variables = {name for name in used if name in source.bound and source.is_variable(name)}
                for statement in source.body:
                    if id(statement) not in self._statements and _acts_on(statement, source, used, variables):
                        self._take_statement(source, statement)


def _acts_on(statement: ast.stmt, source: _Source, used: set[str], variables: set[str]) -> bool:
    """Return True if a statement, when it is run, can change one of some variables; `used` has imported names, too."""
    if isinstance(statement, IMPORTS):
        return False
    if isinstance(statement, DEFINITIONS):
        run: list[ast.AST] = [*statement.decorator_list]
        if isinstance(statement, ast.ClassDef):
            run += [*statement.bases, *statement.keywords]
    elif isinstance(statement, ast.Assign | ast.AnnAssign) and _binds_names_alone(statement):
        run = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    else:
        run, variables = [statement], variables | (used & set(source.imports))
    names = {chain[0] for chain in _Mentions(run).chains} & source.names
    return not variables.isdisjoint(source.reach(names) - (set(source.imports) - variables))


def _binds_names_alone(statement: ast.Assign | ast.AnnAssign) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return all(isinstance(target, ast.Name | ast.Tuple) for target in targets)


def _is_constant(statement: ast.stmt) -> bool:
    """Return True for an import and for the assignment of a number, a string or another constant."""
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    return isinstance(statement, IMPORTS) or isinstance(value, ast.Constant)


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    """Yield the names of the module that a statement binds, those that a function declares global among them."""
    if isinstance(statement, DEFINITIONS):
        yield statement.name
    for node in _own_nodes(statement):
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, IMPORTS):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    yield from (name for node in ast.walk(statement) if isinstance(node, ast.Global) for name in node.names)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a statement, without the bodies of functions and classes."""
    yield node
    if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from _own_nodes(child)


def _imported(statement: ast.stmt, package: str) -> Iterator[tuple[str, _Target]]:
    """Yield the names that imports in a statement bind, with what they stand for."""
    for node in ast.walk(statement):
        if isinstance(node, IMPORTS):
            for alias, target in zip(node.names, _targets(node, package), strict=True):
                if isinstance(node, ast.Import) and alias.asname is None:  # `import a.b` binds a
                    first = alias.name.partition(".")[0]
                    yield first, _Target(first, None)
                else:
                    yield alias.asname or alias.name, target


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[_Target]:
    if isinstance(node, ast.Import):
        return [_Target(alias.name, None) for alias in node.names]
    module = "." * node.level + (node.module or "")
    try:
        module = importlib.util.resolve_name(module, package or None) if node.level else module
    except ImportError:  # relative, in a module without a package
        module = node.module or ""
    return [_Target(module, alias.name) for alias in node.names]
