"""The API reference: a page for each module, written from its docstrings by mkdocstrings."""

import ast
from typing import Any

from project import structure

LEFT_OUT = (
    "contralto.cli",
    "contralto.__main__",
    "contralto.align.__main__",
    "contralto.testbed.__main__",
    "contralto.eval.tasks",
)
"""Commands, which `--help` documents, and the files of lm-eval's tasks."""


def shown() -> dict[str, structure.Module]:
    """Return the public modules of the library, by their names."""
    return {
        name: module
        for name, module in structure.modules().items()
        if not name.startswith(LEFT_OUT) and not any(word.startswith("_") for word in name.split("."))
    }


def page_of(name: str) -> str:
    """Return the page of a module in the sources of the site."""
    folder = "reference/" + "/".join(name.split(".")[1:] or ["index"])
    return f"{folder.removesuffix('/index')}/index.md" if is_package(name) else f"{folder}.md"


def is_package(name: str) -> bool:
    """Return whether a module is a folder."""
    return bool(structure.modules()[name].path.name == "__init__.py")


def pages() -> dict[str, str]:
    """Return the pages of all modules."""
    return {page_of(name): document(name) for name in shown()}


def document(name: str) -> str:
    """Return the page of a module: what it exports from its modules, and what it defines."""
    exported = exports(name)
    lines = [f"# {name}", "", f"::: {name}", ""]
    if exported:
        lines = [f"# {name}", "", f"::: {name}", "    options:", "      members: false", ""]
        lines += ["## Public names", "", "| name | |", "|---|---|"]
        lines += [f"| [`{alias}`]{_target(name, path)} | {summary(path)} |" for alias, path in sorted(exported.items())]
        lines += ["", *_own(name)]
    inner = [other for other in shown() if other.rpartition(".")[0] == name]
    if inner:
        lines += ["", "## Modules", "", "| module | |", "|---|---|"]
        here = page_of(name).rpartition("/")[0]
        lines += [
            f"| [`{other}`]({page_of(other).removeprefix(here + '/')}) | {first_line(structure.modules()[other].tree)} |"
            for other in inner
        ]
    return "\n".join(lines)


def _own(name: str) -> list[str]:
    """Return the directive for what a package defines itself, if anything."""
    defined = [
        node.name
        for node in structure.modules()[name].tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    return [
        line for own in defined for line in (f"::: {name}.{own}", "    options:", "      show_root_heading: true", "")
    ]


def exports(name: str) -> dict[str, str]:
    """Return the public names that a package takes from its modules, with where each is defined."""
    if not is_package(name):
        return {}
    module = structure.modules()[name]
    public = _all(module.tree)
    found = {}
    for node in structure.nodes(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module in structure.modules():
            for alias in node.names:
                lazily = alias.asname == alias.name
                if lazily or alias.name in public:
                    found[alias.asname or alias.name] = origin(node.module, alias.name)
    return {alias: path for alias, path in found.items() if path not in structure.modules()}


def _all(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}  # type: ignore[misc]
    return set()


def origin(module: str, name: str) -> str:
    """Return the full name under which an object is defined, through the packages that export it."""
    if f"{module}.{name}" in structure.modules():
        return f"{module}.{name}"
    for node in structure.nodes(structure.modules()[module].tree):
        if isinstance(node, ast.ImportFrom) and node.module in set(structure.modules()) - {module, None}:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return origin(str(node.module), alias.name)
    return f"{module}.{name}"


def summary(path: str) -> str:
    """Return the first line of the docstring of a class or function, empty for other objects."""
    module, _, name = path.rpartition(".")
    for node in structure.modules()[module].tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return first_line(node)
    return ""


def _target(package: str, path: str) -> str:
    """Return the end of a link from the page of a package to an object: to its entry, or else to the page of its module."""
    if _documented(path):
        return f"[{path}]"
    here = page_of(package).rpartition("/")[0]
    return f"({page_of(path.rpartition('.')[0]).removeprefix(here + '/')})"


def _documented(path: str) -> bool:
    """Return whether the page of a module has an entry for an object: all but values without a docstring have."""
    module, _, name = path.rpartition(".")
    body = structure.modules()[module].tree.body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if getattr(node, "name", None) == name:
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def first_line(node: Any) -> str:
    """Return the first line of a docstring, for a cell of a table."""
    return (ast.get_docstring(node) or "").split("\n")[0].replace("|", "\\|")


def navigation() -> list[Any]:
    """Return the tree of modules for the navigation."""

    def branch(name: str) -> list[Any]:
        inner = sorted(other for other in shown() if other.rpartition(".")[0] == name)
        items: list[Any] = [page_of(name)]
        for other in inner:
            label = other.rpartition(".")[2]
            items.append({label: branch(other)} if is_package(other) else {label: page_of(other)})
        return items

    return branch("contralto")
