"""Activations that code calls as functions: which are hidden, and the calls of others in their place."""

from __future__ import annotations

import abc
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType

from torch import nn

from gradguard.monitors._describe import clean_name
from gradguard.remedies.initialization._trace import Op, Trace
from gradguard.remedies.surgery._calls import Method, did_not_run, find_call
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit
from gradguard.remedies.surgery._source import Source, UnreadableError, holds, read
from gradguard.remedies.surgery._survey import Site, Survey
from gradguard.remedies.surgery.rewritten import CallSite, Rewriting, author_class, rewritten

__all__ = ["Functions", "layers_before", "layers_behind", "replace_functions"]

_RECURRENT = frozenset(
    {"gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell"}
)
"""What runs torch's recurrent layers."""


@dataclass(slots=True, kw_only=True)
class Functions:
    """What is to be done about activations in code.

    Attributes:
        edits: One for each method of each module that is to call others.
        skipped: What stays, and why, by module and method.
        ops: The operations that will be others.
        modules: Those whose code calls activations, whatever is to be done about it.
    """

    edits: list[Edit] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


def replace_functions(
    found: Survey,
    wanted: frozenset[str],
    to: str,
    named: Mapping[str, nn.Module] | None,
    whole: Callable[[Survey, nn.Module], bool],
) -> Functions:
    """Plan to call another activation wherever code calls one as a function and its result is hidden.

    Places are those in the code, not in the order of execution: in whatever order code runs, and however often, a call
    that is replaced is replaced each time, and no other is. What a call serves for must be the same each time it ran.

    Args:
        found: What runs.
        wanted: Names of the functions to replace.
        to: The function of ``torch.nn.functional`` to call.
        named: Modules whose code it is about; ``None`` for all.
        whole: Whether a module is an activation that is replaced as such, whatever its code.
    """
    planned = Functions()
    if found.trace is None:
        return planned
    methods = [
        method
        for method in _methods(found, wanted, whole)
        if named is None or any(method.module is module for module in named.values())
    ]
    for method in methods:
        planned.modules.append(method.module)
        _plan(found, method, wanted, to, planned)
    ran = {id(call.module) for call in found.calls} | {id(method.module) for method in methods}
    for raw, module in found.model.named_modules():
        same = [method for method in methods if type(method.module) is type(module)]
        if named is None and same and id(module) not in ran:
            planned.skipped[f"{clean_name(raw)}.{same[0].name}".lstrip(".")] = "it did not run on the batch"
    replaced = frozenset(op.index for op in planned.ops)
    for edit in planned.edits[:1]:  # one look at all that runs is enough
        check = partial(_check, _sequence(found, whole, replaced, to), whole)
        planned.edits[0] = Edit(words=edit.words, make=edit.make, check=check)
    return planned


def _methods(found: Survey, wanted: frozenset[str], whole: Callable[[Survey, nn.Module], bool]) -> list[Method]:
    """Return the methods whose code calls activations, in the order in which they first do."""
    names = {id(module): clean_name(name) for name, module in found.model.named_modules()}
    methods: dict[tuple[int, str], Method] = {}
    for op in found.trace.ops if found.trace is not None else ():
        owner = found.owners.get(op.index, (None, ""))[0]
        if op.name not in wanted or op.kind != "activation" or owner is None or whole(found, owner):
            continue
        site = found.sites[op.index]
        for module in (site.receiver, owner):
            if module is None or id(module) not in names:
                continue
            known = _named(module, site)
            if known is not None:
                break
        else:
            if id(owner) not in names:  # code outside the model, such as the loss
                continue
            module, known = owner, ("forward", None, _not_a_method(owner, site))
        name, function, why = known
        place = f"{names[id(module)]}.{name}".lstrip(".")
        method = methods.setdefault(
            (id(module), name), Method(module=module, place=place, name=name, function=function, why=why)
        )
        method.calls.setdefault(site.end, []).append(op)
    return list(methods.values())


def _named(module: nn.Module, site: Site) -> tuple[str, FunctionType | None, str] | None:
    """Return name and function of the method whose code a call stands in, or why it cannot be another."""
    for kind in type(module).__mro__:
        for name, value in vars(kind).items():
            if isinstance(value, FunctionType) and holds(value, site.code):
                if site.module.startswith("torch."):
                    return name, None, "it is torch's own code"
                if name in vars(module):
                    return name, None, f"{name} has been replaced on this very module"
                if inspect.getattr_static(type(module), name) is not value:
                    return name, None, f"it is the code of {kind.__name__}, which the class calls as that of its base"
                return name, value, _unfit(author_class(module))
    return None


def _not_a_method(owner: nn.Module, site: Site) -> str:
    if site.module.startswith("torch."):
        return "it is torch's own code"
    return (
        f"the call is not in a plain method of {type(owner).__name__}, but in a function from elsewhere or behind a "
        "decorator"
    )


def _unfit(kind: type[nn.Module]) -> str:
    """Return why there can be no class that is like another except for a method; nothing where there can."""
    plain = (object, typing.Generic, typing.Protocol)
    if type(kind) not in (type, abc.ABCMeta):
        return f"{kind.__name__} has a metaclass"
    if any("__init_subclass__" in vars(base) for base in kind.__mro__ if base not in plain):
        return f"{kind.__name__} does something of its own whenever a class is derived from it"
    copying = ("__copy__", "__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__reduce__", "__reduce_ex__")
    if any(name in vars(base) for base in kind.__mro__ if base is not object for name in copying):
        return f"{kind.__name__} says itself how it is copied and pickled, and copies would not have the change"
    return ""


def _plan(found: Survey, method: Method, wanted: frozenset[str], to: str, planned: Functions) -> None:
    """Plan the calls of one method."""
    source, why = _source(method)
    sites: dict[CallSite, list[Op]] = {}
    left: list[tuple[str, int, str]] = []
    for end, ops in method.calls.items():
        site: CallSite | str = why or _stays(found, ops)
        if not site and source is not None:
            site = find_call(source, method, end, ops, to)
        if isinstance(site, CallSite):
            sites[site] = ops
        else:
            left.append((ops[0].name, len(ops), site))
    if source is not None:
        left += did_not_run(source, method, wanted)
    if source is not None and sites:
        rewriting = Rewriting(name=method.name, digest=source.digest, function=to, calls=tuple(sites))
        ran = [op for ops in sites.values() for op in ops]
        counts = Counter(op.name for op in ran)
        planned.edits.append(
            Edit(
                words=f"{method.place}: {_times(counts)} as a function > {to}",
                make=partial(_rewrite, method.module, rewriting),
            )
        )
        planned.ops += ran
    if left:
        planned.skipped[method.place] = _left(left)


def _source(method: Method) -> tuple[Source | None, str]:
    if method.function is None or method.why:
        return None, method.why
    try:
        return read(method.function), ""
    except UnreadableError as error:
        return None, str(error)


def _left(calls: Iterable[tuple[str, int, str]]) -> str:
    """Say in words which calls stay: name, number and reason of each."""
    reasons: dict[str, Counter[str]] = {}
    for name, count, reason in calls:
        reasons.setdefault(reason, Counter())[name] += count
    return "; ".join(
        f"its code calls {_times(counts)} as a function, and {reason}" for reason, counts in reasons.items()
    )


def _times(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{name} once" if count == 1 else f"{name} {count} times" for name, count in counts.items())


def _rewrite(module: nn.Module, rewriting: Rewriting, kept: Ledger) -> None:
    kept.set_attribute(module, "__class__", rewritten(type(module), rewriting))


# ---------------------------------------------------------------------------------------------- what a call serves for


def _stays(found: Survey, ops: list[Op]) -> str:
    """Return why a call is to stay, nothing where its result was hidden each time that it ran."""
    reasons = [_not_hidden(found, op) for op in ops]
    if not any(reasons):
        return ""
    reason = next(reason for reason in reasons if reason)
    return reason if all(reasons) else f"of the times that one of these calls ran, this holds for some: {reason}"


def _not_hidden(found: Survey, op: Op) -> str:
    """Return why an operation is no hidden activation, nothing where it stands between layers.

    It is stricter than with modules, which bear the name of an activation: exp and sigmoid are arithmetic as well.
    """
    trace = found.trace
    assert trace is not None  # noqa: S101  # the operation is of one
    if trace.gated_by(op.index):
        return "it is a gate: its result multiplies something else"
    if not any(trace.ops[index].kind == "layer" for index in trace.descendants(op.index)):
        return "it is at the output"
    if not layers_before(found, [op]):
        return "no Linear or convolution layer stands directly before it"
    return _elsewhere_than_layers(found, trace, op)


def _elsewhere_than_layers(found: Survey, trace: Trace, op: Op) -> str:
    """Return where a result goes other than into layers, past what may stand between two of them."""
    queue, seen = [op.index], {op.index}
    while queue:
        here = queue.pop()
        if here in found.outputs:
            return "it is at the output as well as before layers"
        if not trace.children[here]:
            return f"its result also goes where no layer is, by {trace.ops[here].name}"
        for index in trace.children[here]:
            behind = trace.ops[index]
            if behind.kind == "layer" or behind.name in _RECURRENT:
                continue
            if behind.kind not in {"activation", "norm", "shape", "sum"}:
                return f"its result goes into {behind.name}, and not only into layers"
            if index not in seen:
                seen.add(index)
                queue.append(index)
    return ""


def layers_before(found: Survey, ops: list[Op]) -> list[str]:
    """Return the layers whose output operations take, past normalization, reshaping and sums."""
    assert found.trace is not None  # noqa: S101  # the operations are of one
    known = found.trace.ops
    return _nearest_layers(found, [index for op in ops for index in op.parents], lambda index: known[index].parents)


def layers_behind(found: Survey, ops: list[Op]) -> list[str]:
    """Return the layers that take what operations give, past the same."""
    assert found.trace is not None  # noqa: S101
    children: dict[int, list[int]] = {}
    for op in found.trace.ops:
        for parent in op.parents:
            children.setdefault(parent, []).append(op.index)
    return _nearest_layers(
        found, [index for op in ops for index in children.get(op.index, ())], lambda index: children.get(index, ())
    )


def _nearest_layers(found: Survey, queue: list[int], following: Callable[[int], Iterable[int]]) -> list[str]:
    assert found.trace is not None  # noqa: S101
    names = {id(module): clean_name(name) for name, module in found.layers()}
    seen: set[int] = set()
    layers: dict[str, None] = {}
    while queue:
        index = queue.pop(0)
        op = found.trace.ops[index]
        if op.kind == "layer" and id(op.module) in names:
            layers[names[id(op.module)]] = None
        elif op.kind in {"norm", "shape", "sum"} and index not in seen:
            queue += following(index)
        seen.add(index)
    return list(layers)


# ------------------------------------------------------------------------------------------------ what runs afterwards


def _sequence(
    found: Survey, whole: Callable[[Survey, nn.Module], bool], replaced: frozenset[int] = frozenset(), to: str = ""
) -> list[str]:
    """Return the names of all operations in order, past modules that are replaced as such, which may be others too."""
    return [
        to if op.index in replaced else op.name
        for op in (found.trace.ops if found.trace is not None else ())
        if (owner := found.owners.get(op.index, (None, ""))[0]) is not None and not whole(found, owner)
    ]


def _check(expected: list[str], whole: Callable[[Survey, nn.Module], bool], found: Survey) -> str | None:
    """Return what is wrong where another sequence of operations runs than was planned."""
    made = _sequence(found, whole)
    if made == expected:
        return None
    place = next((i for i, (a, b) in enumerate(zip(made, expected, strict=False)) if a != b), None)
    names = ("more", "less") if place is None else (made[place], expected[place])
    return (
        f"the code then runs {names[0]} where {names[1]} was expected: it calls the old function past its class, or "
        "goes by the numbers that come out"
    )
