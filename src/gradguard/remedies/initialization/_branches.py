"""Residual branches, found in the operations of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradguard.remedies.initialization._trace import Op, Trace

__all__ = ["Branch", "branches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A path whose result is added to a path with fewer layers from the same origin.

    Attributes:
        layers: Linear, convolution and other layers with a weight on the branch, in order.
        depth: Layers on its longest way from origin to sum.
        last: The layer or normalization whose output is added, unless something else stands in between.
        norms: Normalizations on the branch.
        obstacle: Why the branch cannot be scaled at ``last``, ``None`` if it can.
    """

    layers: tuple[nn.Module, ...]
    depth: int
    last: nn.Module | None
    norms: int
    obstacle: str | None = None


def branches(trace: Trace) -> list[Branch]:
    """Return the residual branches of a pass, in order.

    A sum counts where its two operands share an origin and one of them has passed more layers since than the other: the
    identity shortcuts of residual nets and transformers, the projections of ResNets, adapters beside a layer.
    """
    found = []
    for total in trace.ops:
        if total.kind == "sum" and len(total.operands) == 2:
            branch = _branch(trace, *total.operands)
            if branch is not None:
                found.append(branch)
    return found


def _branch(trace: Trace, first: int, second: int) -> Branch | None:
    one, two = trace.ancestors(first), trace.ancestors(second)
    shared = one & two
    if not shared or first == second:
        return None
    origin = max(shared)
    ends = sorted(
        ((_depth(trace, origin, path, end), end, path) for end, path in ((first, one), (second, two))), key=_key
    )
    (short, _, around), (long, end, path) = ends
    if long <= short:
        return None
    ops = [trace.ops[i] for i in sorted(path - around) if i > origin and origin in trace.ancestors(i)]
    last, obstacle = _end(trace, trace.ops[end], {op.index for op in ops})
    return Branch(
        layers=tuple(op.module for op in ops if op.kind == "layer" and op.module is not None),
        depth=long,
        last=last,
        norms=sum(op.kind == "norm" for op in ops),
        obstacle=obstacle,
    )


def _key(side: tuple[int, int, set[int]]) -> int:
    return side[0]


def _depth(trace: Trace, origin: int, path: set[int], end: int) -> int:
    """Return how many layers the longest way from origin to end passes."""
    depth = {origin: 0}
    for index in sorted(path):
        if index > origin:
            before = [depth[parent] for parent in trace.ops[index].parents if parent in depth]
            if before:
                depth[index] = max(before) + (trace.ops[index].kind == "layer")
    return depth.get(end, 0)


def _end(trace: Trace, op: Op, inside: set[int]) -> tuple[nn.Module | None, str | None]:
    """Return the module whose output the branch ends with, or why there is none whose scale would be the branch's."""
    while op.kind == "shape" and len(op.parents) == 1:
        op = trace.ops[op.parents[0]]
    if op.kind in {"layer", "norm"} and op.module is not None and op.index in inside:
        uses = len(trace.uses(op.module))
        return (op.module, None) if uses == 1 else (None, f"its last layer runs {uses} times in a pass")
    if op.kind == "activation":
        return None, (
            "an activation stands behind its last layer: scaling that by zero would leave no gradient. "
            "Name the module to scale with modules="
        )
    what = {"sum": "a sum", "norm": "a normalization without weights"}.get(op.kind, "an operation that is no layer")
    return None, f"it ends in {what}. Name the module to scale with modules="
