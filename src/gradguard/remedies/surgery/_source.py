"""The source of a method that runs, and the method again with other functions at some of its calls."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import hashlib
import linecache
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import CellType, CodeType, FunctionType
from typing import Any

__all__ = ["Source", "UnreadableError", "holds", "read", "with_calls"]

_NESTED = 0x10
"""``inspect.CO_NESTED``: here every function is nested, in the one that hands it its cells."""

_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)

_SAME = (
    "co_argcount", "co_cellvars", "co_code", "co_exceptiontable", "co_freevars", "co_kwonlyargcount", "co_names",
    "co_posonlyargcount", "co_varnames",
)  # fmt: skip


class UnreadableError(Exception):
    """The source of a function is not there, or is not what runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The source of a method.

    Attributes:
        node: Its definition, without decorators.
        owner: Name of the class that it stands in, after which ``__names`` are mangled; ``None`` outside of classes.
        imports: The imports of its file, by which compilers tell modules from other objects.
        digest: Of the code, whatever its formatting and comments.
    """

    node: ast.FunctionDef
    owner: str | None
    imports: tuple[ast.stmt, ...]
    digest: str = ""

    def calls(self) -> list[ast.Call]:
        """Return the calls in it, in an order that its formatting does not change."""
        return _calls(self.node)

    def variables(self) -> set[str]:
        """Return the names that are given a value anywhere in it: arguments, variables, imports, functions."""
        nodes = list(ast.walk(self.node))
        named = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        named |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        named |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
        return named | {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    def call_at(self, end: tuple[int, int]) -> int | None:
        """Return the index of the call that ends at a line and column of the file, ``None`` where there is none.

        Calls that begin at one place are many, ``f(x).g()``; no two end at one.
        """
        ends = [(call.end_lineno, call.end_col_offset) for call in self.calls()]
        return ends.index(end) if end in ends else None


def holds(function: FunctionType, code: CodeType) -> bool:
    """Whether code is that of a function, or of a lambda, comprehension or function inside it."""
    return _within(function.__code__, code)


def _within(outer: CodeType, code: CodeType) -> bool:
    return outer is code or any(isinstance(const, CodeType) and _within(const, code) for const in outer.co_consts)


@functools.lru_cache(maxsize=256)  # blocks of one class are many; source that was compared once stays that function's
def read(function: FunctionType) -> Source:
    """Find the source of a function, and make sure that it is what runs.

    Raises:
        UnreadableError: If it is not there, or compiles to something else: a file that has changed since, assertions
            that pytest has rewritten.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise UnreadableError("its source cannot be found")
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        tree = ast.Module(body=[], type_ignores=[])
    found = _find(tree, None, code)
    if found is not None:
        node, owner = found
        node.decorator_list = []
        source = Source(node=node, owner=owner, imports=_imports(tree, code))
        try:
            compiled = _compile(_surroundings(source, node, function, ()), source, function, code.co_filename)
        except SyntaxError as error:
            raise UnreadableError("its code is of a kind that cannot be taken out of its surroundings") from error
        if _same(compiled, code):
            return replace(source, digest=hashlib.sha256(ast.unparse(node).encode()).hexdigest())
    raise UnreadableError("its source is not what runs: the file has changed, or something has rewritten the code")


def _find(tree: ast.AST, owner: str | None, code: CodeType) -> tuple[ast.FunctionDef, str | None] | None:
    """Return the definition that begins in the line in which a function does, and the class around it."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef) and child.name == code.co_name:
            first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
            if first == code.co_firstlineno:
                return child, owner
        inside = child.name if isinstance(child, ast.ClassDef) else None if _is_function(child) else owner
        found = _find(child, inside, code)
        if found is not None:
            return found
    return None


def _imports(tree: ast.AST, code: CodeType) -> tuple[ast.stmt, ...]:
    """Return the imports of a file, other than inside functions and classes, of names that code uses."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Import, ast.ImportFrom)) and getattr(child, "module", "") != "__future__":
            names = {(alias.asname or alias.name).partition(".")[0] for alias in child.names}
            if not names.isdisjoint(_names(code)):
                found.append(child)
        elif not _is_function(child) and not isinstance(child, ast.ClassDef):
            found += _imports(child, code)
    return tuple(found)


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def _calls(node: ast.AST) -> list[ast.Call]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Call)]


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two pieces of code do the same, wherever they stand."""
    if any(getattr(one, name) != getattr(other, name) for name in _SAME):
        return False
    if (one.co_flags ^ other.co_flags) & ~_NESTED or len(one.co_consts) != len(other.co_consts):
        return False
    return all(
        _same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else (type(a), repr(a)) == (type(b), repr(b))
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _surroundings(source: Source, node: ast.FunctionDef, function: FunctionType, given: Iterable[str]) -> ast.Module:
    """Return a definition in surroundings like its own: imports, a function that hands in cells, a class.

    Args:
        source: What it comes from.
        node: The definition.
        function: What it defines; says what names come from outside.
        given: Names that are handed in besides.
    """
    names = dict.fromkeys((*given, *(name for name in function.__code__.co_freevars if name != "__class__")))
    body: ast.stmt = node
    if source.owner is not None:
        body = ast.parse(f"class {source.owner}: pass").body[0]
        assert isinstance(body, ast.ClassDef)  # noqa: S101  # what was just written
        body.body = [node]
    around = ast.parse(f"def gradguard_surroundings({', '.join(names)}): pass").body[0]
    assert isinstance(around, ast.FunctionDef)  # noqa: S101  # what was just written
    around.body = [body]
    return ast.fix_missing_locations(ast.Module(body=[*source.imports, around], type_ignores=[]))


def _compile(tree: ast.Module | str, source: Source, function: FunctionType, filename: str) -> CodeType:
    """Compile a definition in its surroundings and return its own code."""
    code: CodeType = compile(tree, filename, "exec", flags=function.__code__.co_flags & _FUTURES, dont_inherit=True)
    for name in ("gradguard_surroundings", *(() if source.owner is None else (source.owner,)), source.node.name):
        inside = [const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name]
        if not inside:
            raise SyntaxError(f"{name} is not where it should be")  # inside the type parameters of a generic
        code = inside[-1]
    return code


def with_calls(
    function: FunctionType,
    source: Source,
    indices: Collection[int],
    change: Callable[[int, ast.Call], ast.expr],
    given: Mapping[str, Any],
) -> FunctionType:
    """Return a method with something else at some of its calls; all else in it is as it was.

    Debuggers and tracebacks show the code that runs.

    Args:
        function: The method.
        source: What :func:`read` found.
        indices: Of the calls.
        change: Takes an index and a copy of the call and returns the expression for its place.
        given: What names in these expressions stand for.
    """
    node = copy.deepcopy(source.node)
    places = {id(call): index for index, call in enumerate(_calls(node)) if index in indices}
    node = _Changed(places, change).visit(node)
    text = ast.unparse(_surroundings(source, node, function, given)) + "\n"
    filename = f"<gradguard {function.__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    code = _compile(text, source, function, filename)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    cells = {name: CellType(value) for name, value in given.items()}
    cells |= dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    new = FunctionType(
        code.replace(co_qualname=function.__code__.co_qualname),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__  # type: ignore[attr-defined]  # else inspect would show the code that no longer runs
    return new


class _Changed(ast.NodeTransformer):
    """Puts other expressions in the places of calls, from the inside out."""

    def __init__(self, places: Mapping[int, int], change: Callable[[int, ast.Call], ast.expr]) -> None:
        self._places, self._change = places, change

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Change what is inside a call, and then the call."""
        index = self._places.get(id(node))
        self.generic_visit(node)
        return node if index is None else ast.copy_location(self._change(index, node), node)
