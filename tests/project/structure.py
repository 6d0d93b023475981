"""The rules that the source tree keeps: sizes, imports, names, language.

python tests/project/structure.py [FOLDER]     print what breaks them
python tests/project/structure.py --graph      print the imports between the parts
"""

import argparse
import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("align", "data_gen", "decoding", "eval", "recipes", "testbed")
OWN = ("cli", "common")
LONGEST_MODULE = 500
LONGEST_FUNCTION = 50
DECLARATIONS = "contralto.decoding.methods"
"""Where the names of decoding methods may stand."""
PARSERS = ("contralto.cli", "contralto.align.parsing", "contralto.testbed.__main__")
"""Modules that may use argparse."""
MAY_NOT_IMPORT = {
    "common": ("align", "cli", "data_gen", "decoding", "eval", "recipes", "testbed"),
    "decoding": ("align", "cli", "data_gen", "eval", "recipes", "testbed"),
    "align": ("cli", "eval", "recipes", "testbed"),
    "data_gen": ("align", "cli", "eval", "recipes", "testbed"),
    "eval": ("align", "cli", "data_gen", "recipes", "testbed"),
    "recipes": ("cli", "data_gen", "decoding", "eval", "testbed"),
    "testbed": ("align", "cli", "eval", "recipes"),
}
"""The parts that a part does not know."""
EVALUATED_WORLDS = "contralto.eval.tasks.testbed"
"""Tasks about the embedded worlds, which only the worlds can check."""
JUDGING = "contralto.eval.judging"
"""Judges that evaluate, whose requests `data_gen` sends and records."""
OTHER_NAMES = {"contralto.eval.metrics.pope"}
"""Modules in which a method's name names something else: the published code whose parser of answers it is."""
NO_SENTENCE = re.compile(r"(What|How|Whether|Of|Where|Why|When|Who|But|That|So|If)\b")
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.arg)
NO_VERB = re.compile(r"(The|A|An|All|Every|Each|One|No|Nothing|Everything)\b")

RETIRED = {
    "asked": "requests",
    "found": "result",
    "how": "options",
    "said": "text, message",
    "settle": "resolve, check",
    "there": "present",
    "told": "arguments",
    "what": "prefix, title",
}
"""Names that no function, class, parameter or field has any more, with what to write in their place."""


class Module(NamedTuple):
    """A module of the package."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def part(self) -> str:
        """Return the part of the package that it belongs to."""
        return part_of(self.name)


def part_of(name: str) -> str:
    """Return the part that a module's name names; empty for the import root."""
    return name.split(".")[1] if "." in name else ""


@cache
def modules() -> dict[str, Module]:
    """Return every module of the package by its name."""
    paths = {f"contralto.{path.relative_to(ROOT)}": path for part in PARTS for path in (ROOT / part).rglob("*.py")}
    root = ROOT / "contralto"
    own = [*root.glob("*.py"), *(path for room in OWN for path in (root / room).rglob("*.py"))]
    paths |= {str(path.relative_to(ROOT)): path for path in own}
    found = {}
    for label, path in sorted(paths.items()):
        name = label.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text), text.count("\n"))
    return found


def imports(module: Module) -> dict[str, int]:
    """Return the modules of the package that a module imports, in functions too, with a line each.

    Imports for types alone do not count, but those of an `__init__.py` are what it exports lazily.
    """
    skipped = set() if module.path.name == "__init__.py" else _for_types(module.tree)
    found: dict[str, int] = {}
    for node in nodes(module.tree):
        for name in () if node in skipped else _imported(node):
            if name in modules() and name != module.name:
                found.setdefault(name, getattr(node, "lineno", 0))
    return found


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """Return the nodes of a syntax tree; every check goes through them."""
    return tuple(ast.walk(tree))


def _for_types(tree: ast.Module) -> set[ast.AST]:
    guarded = [n for n in nodes(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for node in guarded for child in node.body for inner in ast.walk(child)}


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules() else node.module
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def circles() -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by others (Tarjan's components)."""
    graph = {name: list(imports(module)) for name, module in modules().items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = [stack.pop()]
            while component[-1] != name:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return found


LIBRARY_NAMES = {"_ddp_params_and_buffers_to_ignore"}
"""Private names that other libraries ask their users to set."""


def sizes(module: Module) -> Iterator[str]:
    """Yield what is too long: the module, and functions without their docstrings."""
    if module.lines > LONGEST_MODULE:
        yield f"{module.lines} lines, more than {LONGEST_MODULE}"
    for node in nodes(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (
                (node.end_lineno or 0)
                - node.lineno
                + 1
                - (ast.get_docstring(node, clean=False) or "\n").count("\n")
                - 1
            )
            if length > LONGEST_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines, more than {LONGEST_FUNCTION}"


def arrows(module: Module) -> Iterator[str]:
    """Yield imports of parts that a part does not know, and argparse outside of the commands."""
    for other, line in imports(module).items():
        worlds = module.name.startswith(EVALUATED_WORLDS) and part_of(other) == "testbed"
        judges = module.name.startswith(JUDGING) and part_of(other) == "data_gen"
        if part_of(other) in MAY_NOT_IMPORT.get(module.part, ()) and not (worlds or judges):
            yield f"{line}: {module.part} may not import {other}"
    if not module.name.startswith(PARSERS):
        for node in nodes(module.tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            if "argparse" in names:
                yield f"{getattr(node, 'lineno', 0)}: argparse belongs to the commands"


@cache
def method_names() -> frozenset[str]:
    """Return the names of all decoding methods."""
    from contralto.decoding.methods import METHODS

    return frozenset(METHODS)


def names_compared(module: Module) -> Iterator[str]:
    """Yield comparisons with the name of a method, and tables by such names, outside of the declarations."""
    if module.name.startswith(DECLARATIONS) or module.name in OTHER_NAMES:
        return
    for node in nodes(module.tree):
        compared: list[str] = []
        if isinstance(node, ast.Compare):
            compared = [text for side in (node.left, *node.comparators) for text in _texts(side)]
        elif isinstance(node, ast.MatchValue):
            compared = _texts(node.value)
        elif isinstance(node, ast.Dict) and len(set(_texts(node)) & method_names()) > 1:
            compared = _texts(node)
        if hit := sorted(set(compared) & method_names()):
            yield f"{getattr(node, 'lineno', 0)}: knows a method by its name: {', '.join(hit)}"


def _texts(node: ast.expr) -> list[str]:
    """Return the literal strings of an expression that is one, or a collection of them."""
    inner = [node]
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        inner = node.elts
    elif isinstance(node, ast.Dict):
        inner = [key for key in node.keys if key]
    return [item.value for item in inner if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def foreign_privates(module: Module) -> Iterator[str]:
    """Yield private attributes of other objects of the package that are set from outside."""
    for node in nodes(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and re.match(r"_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and node.attr not in LIBRARY_NAMES:
                yield f"{node.lineno}: sets {owner}.{node.attr}"


def docstrings(module: Module) -> Iterator[str]:
    """Yield first lines that are no sentences, and sections that the Google style does not know."""
    for node in nodes(module.tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        doc = ast.get_docstring(node) or ""
        first = doc.split("\n")[0]
        where = f"{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'the module')}: {first!r}"
        if NO_SENTENCE.match(first):
            yield f"{where} is no sentence"
        elif (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and NO_VERB.match(first)
            and not _is_property(node)
        ):
            yield f"{where} does not say what the function does"
        if re.search(r"^(Example|Argument|Return|Raise|Yield|Parameters)s?:$", doc, flags=re.MULTILINE):
            for section in re.findall(r"^(\w+):$", doc, flags=re.MULTILINE):
                if section in ("Example", "Argument", "Arguments", "Return", "Raise", "Yield", "Parameters"):
                    yield f"{where}: {section}: is no section"


def undocumented(module: Module) -> Iterator[str]:
    """Yield public modules, classes and functions, and methods with a public name of any class, without a docstring."""
    if any(word.startswith("_") for word in module.name.split(".")):
        return
    inner: list[ast.Module | ast.ClassDef] = [module.tree]
    if not ast.get_docstring(module.tree):
        yield "1: the module has no docstring"
    while inner:
        for node in inner.pop().body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name[0] != "_" and not ast.get_docstring(node):
                yield f"{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                inner.append(node)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def retired_names(module: Module) -> Iterator[str]:
    """Yield functions, classes, parameters and fields whose name is retired."""
    for node in nodes(module.tree):
        name = getattr(node, "arg", getattr(node, "name", None)) if isinstance(node, _NAMED) else None
        if isinstance(node, ast.ClassDef):
            fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
            for field in fields:
                if isinstance(field, ast.Name) and field.id in RETIRED:
                    yield f"{field.lineno}: {field.id} is retired: {RETIRED[field.id]}"
        if name in RETIRED:
            yield f"{getattr(node, 'lineno', 1)}: {name} is retired: {RETIRED[name]}"


def classes_twice() -> dict[str, list[str]]:
    """Return the names of classes that several modules define, with the modules."""
    where = defaultdict(list)
    for module in modules().values():
        for node in nodes(module.tree):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(f"{module.name}:{node.lineno}")
    return {name: places for name, places in where.items() if len(places) > 1}


CHECKS: dict[str, Callable[[Module], Iterator[str]]] = {
    "sizes": sizes,
    "arrows": arrows,
    "names": names_compared,
    "privates": foreign_privates,
    "docstrings": docstrings,
    "undocumented": undocumented,
    "retired": retired_names,
}


def findings(check: str, folder: str = "") -> list[str]:
    """Return what breaks one of `CHECKS` in the modules of a folder."""
    found = []
    for module in modules().values():
        path = str(module.path.relative_to(ROOT))
        if path.startswith(folder):
            found += [f"{path}:{text}" for text in CHECKS[check](module)]
    return found


def graph() -> dict[tuple[str, str], int]:
    """Count the imports between parts."""
    return Counter(
        (module.part or "contralto", part_of(other) or "contralto")
        for module in modules().values()
        for other in imports(module)
        if part_of(other) != module.part
    )


def main() -> None:
    """Print what breaks the rules, or the graph of imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--graph", action="store_true")
    args = parser.parse_args()
    if args.graph:
        print("\n".join(f"{one} -> {other}: {count}" for (one, other), count in sorted(graph().items())))
        return
    found = [text for check in CHECKS for text in findings(check, args.folder)]
    found += [f"modules import each other: {' '.join(circle)}" for circle in circles()]
    found += [f"{name} is a class of {' and of '.join(places)}" for name, places in sorted(classes_twice().items())]
    print("\n".join([*found, f"{len(found)} findings"]))


if __name__ == "__main__":
    main()
