"""From the ranges of one step's operations to the first that made NaN or infinity out of finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.overrides import resolve_name

from gradguard.monitors._backward_trace import BackwardTrace, NodeRecord
from gradguard.monitors._op_trace import OpRecord
from gradguard.monitors._ranges import Measured
from gradguard.records import NonFiniteOrigin, TensorRange

__all__ = ["blame_backward", "blame_forward"]

_FIRST = {"parameter": 0, "buffer": 1, "input": 2, "data": 3}
"""Which of several sources is named: what was not finite before the step began, then the earliest operation."""


_FROM_NUMBERS = frozenset({"torch.tensor", "torch.as_tensor", "torch.asarray"})
"""Operations whose results are data of the user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Culprit:
    """Where numbers that are not finite come from.

    Attributes:
        index: The operation: the one that made them, or the first that took them from outside.
        outside: The tensor from outside, ``None`` where the operation made them.
        deliberate: Whether they are infinities put in on purpose, as by a mask.
        also: The operation that put in infinities on purpose, which this one could not take.
    """

    index: int
    outside: Measured | None = None
    deliberate: bool = False
    also: int | None = None


def blame_forward(records: Sequence[OpRecord], ends: Sequence[Measured], *, step: int) -> NonFiniteOrigin | None:
    """Follow numbers that are not finite back to the operation whose operands all were.

    An infinity that was put in on purpose (``masked_fill`` with ``-inf``, a mask in the data) is no origin where
    another operation makes a NaN out of it: that one is named, and the mask beside it.

    Args:
        records: Operations in order of execution.
        ends: What should be finite: the losses.
        step: Optimizer step.

    Returns:
        The origin; ``None`` where the losses are finite.

    Source: ours; pitfalls.md, section 4, steps 4 and 5.
    """
    ill = [end for end in ends if not end.finite]
    if not ill:
        return None
    culprits = _culprits(records)
    end = ill[0]
    culprit = culprits[end.source] if end.source >= 0 else _Culprit(index=-1, outside=end)
    return None if culprit is None else _forward_origin(culprit, records, step=step)


def _culprits(records: Sequence[OpRecord]) -> list[_Culprit | None]:
    """Return for each operation where its non-finite results come from, ``None`` where they are finite."""
    culprits: list[_Culprit | None] = []
    for index, record in enumerate(records):
        culprits.append(_culprit(index, record, culprits))
    return culprits


def _culprit(index: int, record: OpRecord, known: Sequence[_Culprit | None]) -> _Culprit | None:
    """Return where the numbers come from that are not finite in what an operation gave."""
    if all(m.finite for m in record.results):
        return None
    nan = any(m.nan for m in record.results)
    bad = [m for m in record.operands if not m.finite]
    if not bad and record.before is not None and not record.before.finite:
        bad = [record.before]
    if not bad:
        on_purpose = not record.operands or any(not math.isfinite(scalar) for scalar in record.scalars)
        return _Culprit(index=index, deliberate=on_purpose and all(m.masked for m in record.results if not m.finite))
    from_nan = [m for m in bad if m.nan]
    traced = [_trace(index, m, known) for m in (from_nan if nan and from_nan else bad)]
    if nan and not from_nan:
        made = [c for c in traced if not c.deliberate]
        return _choose(made) if made else _Culprit(index=index, also=_choose(traced).index)
    return _choose(traced)


def _trace(index: int, operand: Measured, known: Sequence[_Culprit | None]) -> _Culprit:
    earlier = known[operand.source] if operand.source >= 0 else None
    if earlier is not None:
        return earlier
    return _Culprit(index=index, outside=operand, deliberate=operand.masked)


def _choose(culprits: Sequence[_Culprit]) -> _Culprit:
    return min(culprits, key=lambda c: (4 if c.outside is None else _FIRST.get(c.outside.kind, 4), c.index))


def _forward_origin(culprit: _Culprit, records: Sequence[OpRecord], *, step: int) -> NonFiniteOrigin:
    outside = culprit.outside
    record = records[culprit.index] if culprit.index >= 0 else None
    kind, op, name, node = "forward", _name(record.func) if record is not None else "", "", ""
    shown = record.results if record is not None else []
    if outside is not None:
        shown = [outside]
        if outside.kind in {"parameter", "buffer"}:
            kind, name = "parameter", outside.name
        elif outside.kind in {"input", "data"}:
            kind = "input"
        else:
            op, node = "", outside.name
    elif op in _FROM_NUMBERS:
        kind = "input"
    also = records[culprit.also] if culprit.also is not None and culprit.also != culprit.index else None
    return NonFiniteOrigin(
        step=step,
        kind=kind,
        value=_value(shown),
        op=op,
        node=node,
        module=record.module if record is not None else "",
        inside=record.inside if record is not None else False,
        name=name,
        place=record.place if record is not None else "",
        operands=_operands(record),
        also="" if also is None else _name(also.func) + (f" at {also.place}" if also.place else ""),
    )


def blame_backward(
    records: Sequence[OpRecord], passes: Sequence[BackwardTrace], *, step: int, trust_sums: bool = True
) -> NonFiniteOrigin | None:
    """Return the first graph node that got finite gradients and gave one that is not, on its way to a parameter.

    Gradients that are not finite and end before they reach a leaf, as behind the zeros of a ReLU, harm nothing. Where
    an operand of the node was not finite already, which the loss does not show (``where``, a bounded activation), its
    origin is named.

    Args:
        records: Operations of the forward pass.
        passes: The backward passes of the step, in order.
        trust_sums: Whether an infinite sum of many entries means an infinite entry.
        step: Optimizer step.

    Source: ours; pitfalls.md, section 4, step 5.
    """
    for trace in passes:
        found = _first_bad_node(trace, trust_sums=trust_sums)
        if found is not None:
            node, gave = found
            index = next((i for i, r in enumerate(records) if r.first_node <= node.sequence < r.end_node), None)
            record = None if index is None else records[index]
            bad = [] if record is None else [m for m in record.operands if not m.finite]
            if (
                index is not None and bad
            ):  # finite gradients met what the forward pass had lost before, unseen by the loss
                known = _culprits(records)
                source = _choose([_trace(index, m, known) for m in bad])
                earlier = _forward_origin(source, records, step=step)
                return earlier if earlier.kind != "forward" else replace(earlier, kind="backward", node=node.name)
            return NonFiniteOrigin(
                step=step,
                kind="backward",
                value=_value(gave),
                op=_name(record.func) if record is not None else "",
                node=node.name,
                module=record.module if record is not None else "",
                inside=record.inside if record is not None else False,
                place=record.place if record is not None else "",
                operands=_operands(record),
            )
    return None


def _first_bad_node(trace: BackwardTrace, *, trust_sums: bool) -> tuple[NodeRecord, list[Measured]] | None:
    bad: dict[int, list[tuple[int, Measured]]] = {}
    for index in trace.order:
        ill = [(p, m) for p, m in trace.nodes[index].gave if not m.finite and (trust_sums or not m.unsure)]
        if ill:
            bad[index] = ill
    harmful: set[int] = set()
    for index in reversed(trace.order):  # what takes a gradient runs after what gives it
        targets = [trace.nodes[index].leads_to[position] for position, _ in bad.get(index, ())]
        if any(t is not None and (trace.nodes[t].leaf or t in harmful) for t in targets):
            harmful.add(index)
    taking = {trace.nodes[i].leads_to[position] for i in bad for position, _ in bad[i]}
    first = next((i for i in trace.order if i in harmful and i not in taking), None)
    return None if first is None else (trace.nodes[first], [m for _, m in bad[first]])


def _value(shown: Sequence[Measured]) -> str:
    return "NaN" if any(m.nan for m in shown if not m.finite) else "infinity"


def _operands(record: OpRecord | None) -> tuple[TensorRange, ...]:
    if record is None:
        return ()
    tensors = [
        TensorRange(
            low=m.low,
            high=m.high,
            dtype=str(m.dtype).removeprefix("torch."),
            name=m.name if m.kind in {"parameter", "buffer"} else "",
        )
        for m in record.operands
        if m.exact
    ]
    return (*tensors, *(TensorRange(low=float(s), high=float(s)) for s in record.scalars if not isinstance(s, bool)))


def _name(func: Callable[..., object]) -> str:
    """Return the name of a torch function as people write it: ``"Tensor.log"``, ``"torch.log"``, ``"F.linear"``."""
    name = str(resolve_name(func) or getattr(func, "__name__", type(func).__name__))
    return name.replace("torch.nn.functional.", "F.").replace("torch.Tensor.", "Tensor.")
