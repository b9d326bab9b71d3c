"""How a method writes its calls of activations: as functions, as methods of tensors, in place."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from dataclasses import dataclass, field
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradguard.remedies.initialization._trace import Op
from gradguard.remedies.surgery._source import Source
from gradguard.remedies.surgery.rewritten import CallSite

__all__ = ["Method", "did_not_run", "find_call"]

_IN_PLACE = frozenset({"elu", "leaky_relu", "relu", "selu", "silu"})
"""Functions that have ``inplace=``."""

_UNKNOWN: Any = object()


@dataclass(slots=True, kw_only=True)
class Method:
    """A method whose code calls activations.

    Attributes:
        module: The module that it is called on.
        place: Dotted name of the method.
        name: Its name in the class.
        function: Its function, ``None`` where that cannot be another.
        why: Why it cannot; empty where it can.
        calls: For the line and column at which each call ends, what it ran.
    """

    module: nn.Module
    place: str
    name: str
    function: FunctionType | None
    why: str = ""
    calls: dict[tuple[int, int] | None, list[Op]] = field(default_factory=dict)


def find_call(source: Source, method: Method, end: tuple[int, int] | None, ops: list[Op], to: str) -> CallSite | str:
    """Return the call in the source that ran operations, or why it cannot be another.

    Args:
        source: Of the method.
        method: The method.
        end: Where the call ends.
        ops: What it ran.
        to: The function of ``torch.nn.functional`` to call.
    """
    index = None if end is None else source.call_at(end)
    if index is None or method.function is None:
        return "Python does not say where in the code the call is"
    if len({op.name for op in ops}) > 1:
        return "one call calls now this function, now that"
    call, name = source.calls()[index], ops[0].name
    called = _value(call.func, source, method)
    if called is _UNKNOWN and isinstance(call.func, ast.Attribute) and not call.args:
        if call.func.attr.rstrip("_") != name or call.keywords:
            return "it is called through a variable"
        return _in_place(CallSite(index=index, method=True, in_place=call.func.attr.endswith("_")), to)
    if called is _UNKNOWN or getattr(called, "__name__", "").strip("_") != name:
        return "it is called through a variable"
    given = call.args + [word.value for word in call.keywords if word.arg == "input"]
    rest = [*given[1:], *(word.value for word in call.keywords if word.arg != "input")]
    if any(word.arg == "out" for word in call.keywords):
        return "it writes to another tensor"
    if not given or isinstance(given[0], ast.Starred) or not all(_is_constant(value) for value in rest):
        return "its arguments are not known before it runs"
    true = any(isinstance(value, ast.Constant) and value.value is True for value in rest)
    return _in_place(CallSite(index=index, method=False, in_place=true or called.__name__.endswith("_")), to)


def _in_place(site: CallSite, to: str) -> CallSite | str:
    if site.in_place and to not in _IN_PLACE:
        return f"it works in place, which {to} does not"
    return site


def _is_constant(value: ast.expr) -> bool:
    return isinstance(value.operand if isinstance(value, ast.UnaryOp) else value, ast.Constant)


def _value(expression: ast.expr, source: Source, method: Method) -> Any:
    """Return what a name, or an attribute of a Python module or of ``self``, stands for; nothing is run for it."""
    assert method.function is not None  # noqa: S101  # its source was read
    if isinstance(expression, ast.Name):
        code = method.function.__code__
        if code.co_argcount and expression.id == code.co_varnames[0]:
            return method.module
        if expression.id in source.variables():
            return _UNKNOWN
        if expression.id in code.co_freevars:
            return _content((method.function.__closure__ or ())[code.co_freevars.index(expression.id)])
        return method.function.__globals__.get(expression.id, _UNKNOWN)
    if not isinstance(expression, ast.Attribute):
        return _UNKNOWN
    inside = _value(expression.value, source, method)
    if inside is method.module:
        value = vars(inside).get(expression.attr, inspect.getattr_static(type(inside), expression.attr, _UNKNOWN))
        return value.__func__ if isinstance(value, staticmethod) else value
    return getattr(inside, expression.attr, _UNKNOWN) if isinstance(inside, (ModuleType, type)) else _UNKNOWN


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return _UNKNOWN


def did_not_run(source: Source, method: Method, wanted: frozenset[str]) -> list[tuple[str, int, str]]:
    """Return calls of the kind that the batch did not come to."""
    ran = {source.call_at(end) for end in method.calls if end is not None}
    idle: Counter[str] = Counter()
    for index, call in enumerate(source.calls()):
        name = getattr(call.func, "attr", getattr(call.func, "id", "")).rstrip("_")
        if index in ran or name not in wanted:
            continue
        called = _value(call.func, source, method)
        known = any(called is getattr(place, name, None) for place in (torch, F, torch.Tensor))
        if known or (called is _UNKNOWN and not call.args and isinstance(call.func, ast.Attribute)):
            idle[name] += 1
    return [(name, count, "the batch did not come there") for name, count in idle.items()]
