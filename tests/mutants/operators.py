"""Small changes of a module's source, one at a time, each of which some test should notice."""

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "exp": "log",
    "log": "exp",
    "log_softmax": "softmax",
    "softmax": "log_softmax",
    "logsigmoid": "sigmoid",
    "logsumexp": "sum",
    "cumsum": "cumprod",
    "ceil": "floor",
    "floor": "ceil",
}
"""Functions and methods that are easily taken for each other."""
SYMMETRIC = (
    "min",
    "max",
    "np.minimum",
    "np.maximum",
    "torch.minimum",
    "torch.maximum",
    "torch.equal",
    "torch.promote_types",
)
"""Functions of two arguments whose order makes no difference."""
AXES = ("dim", "axis")
CHECKED = ("strict",)
"""Keyword arguments that only check something, as `raise` and `assert` do: they stay as they are."""
KEPT = ("annotation", "returns", "body", "orelse", "finalbody", "handlers", "decorator_list")
"""Fields of a statement that are not its own expressions."""


class Mutant(NamedTuple):
    """One change of a module."""

    where: str
    """Qualified name of the function, or `<module>`."""
    line: int
    before: str
    after: str
    """The changed expression or statement, before and after, on one line each."""
    source: str
    """The module's text with the change."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the change while the module grows around it."""
        return self.where, self.before, self.after


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module.

    Args:
        source: the module's text. Docstrings, annotations, messages of errors, imports and lists of names stay as they are.
    """
    starts = [0]  # of lines, in bytes as ast counts columns
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    text = source.encode()
    for statement, where in _statements(ast.parse(source), ""):
        for node in _nodes(statement):
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            for new in _changed(node):
                after = new if isinstance(node, ast.stmt) else f"({new})"
                changed = (text[:first] + after.encode() + text[last:]).decode()
                yield Mutant(where, node.lineno, ast.unparse(node), new, changed)


def _statements(node: ast.AST, where: str) -> Iterator[tuple[ast.stmt, str]]:
    """Yield the statements that compute something, each with the name of its function."""
    for child in [*getattr(node, "body", []), *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _statements(child, f"{where}.{child.name}".removeprefix("."))
        elif not _is_left_out(child):
            yield child, where or "<module>"
            yield from _statements(child, where)
            for handler in getattr(child, "handlers", []):
                yield from _statements(handler, where)


def _is_left_out(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__")
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return text or names or for_types or isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.Assert))


def _nodes(statement: ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """Yield a statement and its own expressions, but not the statements inside it, annotations, and parts of texts."""
    stack: list[ast.AST] = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.expr, ast.stmt)):
            yield node
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            if not (name in KEPT and isinstance(node, ast.stmt)):
                stack += [c for c in children if isinstance(c, ast.AST) and not _is_kept(c)]


def _is_kept(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in CHECKED)


def _changed(node: ast.expr | ast.stmt) -> Iterator[str]:
    """Yield the texts that can stand in place of a node."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield _with(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield _with(node, attr=NAMES[node.attr])
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield _with(node, id=NAMES[node.id])
    elif isinstance(node, ast.IfExp):
        yield from (ast.unparse(node.body), ast.unparse(node.orelse))
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield repr(not value)
    elif isinstance(value, int):
        yield repr(value + 1)
    elif isinstance(value, float):
        yield repr(value * 2 if value else 1.0)


def _calls(node: ast.Call) -> Iterator[str]:
    """Exchange two positional arguments, leave out keyword arguments, turn an axis into the first one."""
    is_symmetric = ast.unparse(node.func) in SYMMETRIC
    if len(node.args) > 1 and not is_symmetric and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in AXES and ast.unparse(keyword.value) != "0":
            axis = ast.keyword(arg=keyword.arg, value=ast.Constant(value=0))
            yield _with(node, keywords=[*node.keywords[:i], axis, *node.keywords[i + 1 :]])
        elif keyword.arg and keyword.arg not in CHECKED:
            yield _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])


def _with(node: Any, **fields: Any) -> str:
    """Return the text of a node with other fields."""
    return ast.unparse(type(node)(**{**{name: getattr(node, name) for name in node._fields}, **fields}))
