"""Classes whose methods call other functions in some places. They are public because pickles of the model name them."""

from __future__ import annotations

import ast
import copyreg
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, new_class
from typing import Any

from torch import nn
from torch.nn import functional as F

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.surgery._source import Source, UnreadableError, read, with_calls

__all__ = ["CallSite", "Rewriting", "author_class", "restored", "rewritten"]

_KEY = "_gradguard_rewriting"
_FUNCTIONAL = "gradguard_functional"
"""What ``torch.nn.functional`` is called in rewritten code."""

_CONSTANTS: Mapping[str, tuple[float, ...]] = MappingProxyType({"leaky_relu": (0.01,)})
"""Arguments behind the input, as the modules have them that surgery puts in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """A call of an activation in the code of a method.

    Attributes:
        index: Of the call in the method; see :class:`gradguard.remedies.surgery._source.Source`.
        method: Whether it is one of the tensor, ``x.tanh()``, and not a function, ``torch.tanh(x)``.
        in_place: Whether it changes its input.
    """

    index: int
    method: bool
    in_place: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """What is other in a method.

    Attributes:
        name: Of the method.
        digest: Of the code that it had.
        function: Of ``torch.nn.functional``, which it now calls.
        calls: Where.
    """

    name: str
    digest: str
    function: str
    calls: tuple[CallSite, ...]


def rewritten(kind: type[nn.Module], rewriting: Rewriting) -> type[nn.Module]:
    """Return a class that is like another except for one method; the same class for the same arguments.

    As torch's own parametrizations do, a module gets such a class as its ``__class__``: its methods are those of the
    module that they are called on, so that copies run what is in the copy. Copies and pickles keep it.

    Args:
        kind: The class, which may be such a class itself.
        rewriting: What is other.

    Raises:
        UnsupportedModelError: If the code of the method cannot be read, or is another than it was.
    """
    for derived in kind.__subclasses__():
        if vars(derived).get(_KEY) == rewriting:
            return derived
    function = inspect.getattr_static(kind, rewriting.name, None)
    place = f"{kind.__qualname__}.{rewriting.name}"
    if not isinstance(function, FunctionType):
        raise UnsupportedModelError(f"{place} is no method, and had other activations when the model was saved")
    try:
        source = read(function)
    except UnreadableError as error:
        raise UnsupportedModelError(f"the activations that {place} calls cannot be replaced: {error}") from error
    if source.digest != rewriting.digest:
        raise UnsupportedModelError(
            f"{place} has other code now than when its activations were replaced by {rewriting.function}. Take the "
            "code of then, or a new model and its state_dict()"
        )
    entries = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce,
        _KEY: rewriting,
        rewriting.name: _method(function, source, rewriting),
    }
    return new_class(kind.__name__, (kind,), {}, lambda namespace: namespace.update(entries))


def _method(function: FunctionType, source: Source, rewriting: Rewriting) -> FunctionType:
    sites = {site.index: site for site in rewriting.calls}

    def change(index: int, call: ast.Call) -> ast.expr:
        return _call(call, sites[index], rewriting.function)

    return with_calls(function, source, sites, change, {_FUNCTIONAL: F})


def _call(call: ast.Call, site: CallSite, function: str) -> ast.expr:
    """Return a call of the new function with the same input."""
    if site.method:
        assert isinstance(call.func, ast.Attribute)  # noqa: S101  # a method is called on something
        given = call.func.value
    else:
        given = call.args[0] if call.args else next(word.value for word in call.keywords if word.arg == "input")
    more: list[ast.expr] = [ast.Constant(value) for value in _CONSTANTS.get(function, ())]
    return ast.Call(
        func=ast.Attribute(ast.Name(_FUNCTIONAL, ast.Load()), function, ast.Load()),
        args=[given, *more],
        keywords=[ast.keyword("inplace", ast.Constant(True))] if site.in_place else [],
    )


def author_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module's author wrote."""
    return _origin(type(module))[0]


def _origin(kind: type[nn.Module]) -> tuple[type[nn.Module], tuple[Rewriting, ...]]:
    rewritings: list[Rewriting] = []
    while (found := vars(kind).get(_KEY)) is not None:
        rewritings.insert(0, found)
        kind = kind.__bases__[0]
    return kind, tuple(rewritings)


def restored(kind: type[nn.Module], *rewritings: Rewriting) -> nn.Module:
    """Return an empty module of a rewritten class, for copies and pickles to fill.

    Args:
        kind: The class that its author wrote.
        *rewritings: What is other, in the order in which it was changed.

    Raises:
        UnsupportedModelError: If the code of the class is another than it was.
    """
    for rewriting in rewritings:
        kind = rewritten(kind, rewriting)
    return kind.__new__(kind)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Reduce to the author's class, which pickles know by name, and what is other in it."""
    reduced = object.__reduce_ex__(self, max(int(protocol), 2))
    kind, rewritings = _origin(type(self))
    if not rewritings or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]  # what pickle calls
        return reduced
    return (restored, (kind, *rewritings), *reduced[2:])
