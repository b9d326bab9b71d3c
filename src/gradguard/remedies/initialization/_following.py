"""Which activation stands behind each layer: by one forward pass, or by the order in which modules were defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gradguard import theory
from gradguard.monitors._describe import describe
from gradguard.remedies.initialization._targets import Layer
from gradguard.remedies.initialization._trace import Op, Trace

__all__ = ["Following", "following_by_order", "following_by_trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """What stands behind a layer.

    Attributes:
        activation: The first activation behind it, ``None`` where another layer or the output comes first.
        normalized: Whether a normalization takes its output, so that its scale does not matter.
        uses: How often the layer ran in the pass; 1 where there was none.
        branch_end: Whether its output is added to a path that goes around it.
        output: Whether no further layer runs behind it.
    """

    activation: theory.Activation | None = None
    normalized: bool = False
    uses: int = 1
    branch_end: bool = False
    output: bool = False


def following_by_trace(trace: Trace, layers: Sequence[Layer]) -> dict[str, Following]:
    """Return what stands behind each layer that ran, by name.

    Dropout, pooling, reshaping, normalization and sums are looked through.
    """
    found = {}
    for name, module in layers:
        uses = trace.uses(module)
        if uses:
            last = not any(trace.ops[index].kind == "layer" for index in trace.descendants(uses[-1].index))
            found[name] = replace(_behind(trace, uses[0], len(uses)), output=last)
    return found


def _behind(trace: Trace, op: Op, uses: int) -> Following:
    activation, normalized, branch_end = None, False, False
    queue = [(child, True) for child in trace.children[op.index]]
    seen: set[int] = set()
    while queue:
        queue.sort()
        index, straight = queue.pop(0)
        if index in seen:
            continue
        seen.add(index)
        here = trace.ops[index]
        if here.kind == "activation":
            activation = _gated(trace, here)
            break
        normalized |= here.kind == "norm" and straight
        if here.kind == "sum" and straight and len(here.operands) == 2:
            branch_end |= _goes_around(trace, here, op)
        if here.kind in {"norm", "shape", "sum"}:
            queue += [(child, straight and here.kind == "shape") for child in trace.children[index]]
    return Following(activation=activation, normalized=normalized, uses=uses, branch_end=branch_end)


def _gated(trace: Trace, op: Op) -> theory.Activation | None:
    """Return the activation, SiLU where it is a sigmoid times its own input, none where it gates something else.

    A gate is to be half open at first: a gain that suits a stack of sigmoids would slam it.
    """
    for product in trace.gated_by(op.index):
        if len(product.operands) == 2:
            own = set(product.operands) <= {op.index, *op.parents}
            is_sigmoid = op.activation is not None and op.activation.name == "sigmoid"
            return theory.activation("silu") if own and is_sigmoid else None
    return op.activation


def _goes_around(trace: Trace, total: Op, op: Op) -> bool:
    """Whether one operand of a sum depends on the layer and the other shares an origin, but does not."""
    first, second = (trace.ancestors(index) for index in total.operands)
    return (op.index in first) != (op.index in second) and bool(first & second)


def following_by_order(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Following]:
    """Return what stands behind each layer if modules run in the order in which they were defined.

    Functions such as ``torch.relu`` are invisible here.
    """
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    leaves += [module for _, module in layers if module not in leaves]  # a parametrized layer has children
    order = [m for m in model.modules() if any(m is leaf for leaf in leaves)]
    found = {}
    for name, module in layers:
        place = next(i for i, other in enumerate(order) if other is module)
        rest = order[place + 1 :]
        last = not any(isinstance(other, (nn.Linear, _ConvNd)) for other in rest)
        found[name] = replace(_behind_in(rest), output=last)
    return found


def _behind_in(rest: Sequence[nn.Module]) -> Following:
    normalized = False
    for module in rest:
        role = describe(module).role
        if role == "norm":
            normalized = True
        elif role == "activation":
            try:
                return Following(activation=theory.activation(module), normalized=normalized)
            except (TypeError, ValueError):  # GLU mixes two halves and has no gain of its own
                return Following(normalized=normalized)
        elif role != "other":
            break
    return Following(normalized=normalized)
