"""A record of one backward pass: the range of every gradient that a graph node gave, waiting on the device."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradguard.monitors._hooks import HookSet
from gradguard.monitors._ranges import Measured, Ranges

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.graph import Node

__all__ = ["BackwardTrace", "NodeRecord"]

_MOVERS = frozenset(
    f"{name}Backward{version}"
    for name in ("T", "View", "UnsafeView", "Transpose", "Permute", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias")
    for version in (0, 1)
)
"""Nodes whose backward changes no number."""


@dataclass(slots=True, eq=False)
class NodeRecord:
    """One graph node.

    Attributes:
        name: For instance ``"SqrtBackward0"``.
        sequence: Its sequence number, by which the operation that made it is known.
        leads_to: For each gradient that it gives, the index of the node that takes it; ``None`` where none does.
        leaf: Whether it hands its gradient to a leaf, as a parameter.
        mover: Whether it gives the one gradient that it got, in another shape.
        gave: Position and range of each gradient that it gave.
    """

    name: str
    sequence: int
    leads_to: list[int | None]
    leaf: bool
    mover: bool
    gave: list[tuple[int, Measured]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class BackwardTrace:
    """The nodes of one backward pass, in the order in which they ran.

    Attributes:
        nodes: Every node that can be reached from the loss.
        order: Indices of those that ran.
    """

    nodes: list[NodeRecord] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def watch(self, losses: Iterable[Tensor], ranges: Ranges, hooks: HookSet) -> None:
        """Set a hook on every node that a backward pass from these losses runs through.

        Args:
            losses: What the backward pass starts from.
            ranges: Measures.
            hooks: Takes the handles; close it after the pass.
        """
        found: dict[Node, int] = {}
        waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
        for node in waiting:
            found.setdefault(node, len(found))
        graph: list[Node] = list(found)
        for node in graph:  # grows while it is walked
            targets: list[int | None] = []
            for following, _ in node.next_functions:
                if following is not None and following not in found:
                    found[following] = len(found)
                    graph.append(following)
                targets.append(None if following is None else found[following])
            sequence, name = getattr(node, "_sequence_nr", None), node.name()
            mover = len(targets) == 1 and name in _MOVERS
            number = -1 if sequence is None else sequence()
            self.nodes.append(NodeRecord(name, number, targets, leaf=not targets, mover=mover))
        self._skip_movers()
        lock = threading.Lock()
        for index, node in enumerate(graph):
            if not self.nodes[index].leaf and not self.nodes[index].mover:
                hooks.add(node.register_hook(_NodeHook(self, index, ranges, lock)))

    def _skip_movers(self) -> None:
        """Let gradients lead past nodes that only move them, which need no hook."""
        for record in self.nodes:
            for position, target in enumerate(record.leads_to):
                aim = target
                while aim is not None and self.nodes[aim].mover:
                    aim = self.nodes[aim].leads_to[0]
                record.leads_to[position] = aim


class _NodeHook:
    """Measures what a node gives; a failure of ours must not reach the user's backward pass."""

    __slots__ = ("_index", "_lock", "_ranges", "_trace")

    def __init__(self, trace: BackwardTrace, index: int, ranges: Ranges, lock: threading.Lock) -> None:
        self._trace = trace
        self._index = index
        self._ranges = ranges
        self._lock = lock

    def __call__(self, given: tuple[Any, ...], _taken: tuple[Any, ...]) -> None:
        gave = []
        with self._lock:
            self._trace.order.append(self._index)
            for position, gradient in enumerate(given):
                try:
                    measured = self._ranges.take(gradient) if gradient is not None else None
                except (RuntimeError, NotImplementedError, TypeError):  # of a kind that has no range
                    continue
                if measured is not None:
                    gave.append((position, measured))
            self._trace.nodes[self._index].gave = gave
