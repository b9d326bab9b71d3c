"""The gradient at the inputs of blocks: the stream of a residual net, without its branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradguard.monitors._hooks import in_backward
from gradguard.monitors._rows import KnownTensors, Row, Slot
from gradguard.monitors._trees import floating_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BlockTaps"]


@dataclass(slots=True, eq=False)
class _Block:
    """A block during one observation: the gradients at the inputs of its calls, pooled."""

    name: str
    placeholders: int = 0
    slots: list[Slot] = field(default_factory=list)


class BlockTaps:
    """Where gradients at the inputs of blocks are kept during one observation, and to which rows they belong."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()
        self.reset()

    def expect(self, names: Iterable[str]) -> None:
        """Say how the blocks of the model are called."""
        self._names = frozenset(names)

    def reset(self) -> None:
        """Forget the present observation."""
        self._blocks: dict[str, _Block] = {}
        self._inputs: KnownTensors[Slot] = KnownTensors()
        self._entering: _Block | None = None

    def enter(self, name: str, inputs: Any, listen: Callable[[Tensor], Slot]) -> None:
        """Take a call of a block in, in the forward pass or where a checkpointed block is computed again.

        A tensor that two blocks are given lies before a fork, and the later of them is not tapped.

        Args:
            name: Of the block.
            inputs: What it is called with.
            listen: Called with its first floating-point tensor; returns the place at which its gradients arrive.
        """
        block = self._blocks.get(name)
        if block is None:
            if in_backward():
                return
            block = self._blocks[name] = _Block(name)
        self._entering = block
        if not torch.is_grad_enabled():
            block.placeholders += not in_backward()
            return
        if in_backward():
            if block.placeholders == 0:
                return
            block.placeholders -= 1
        given = next(iter(floating_tensors(inputs)), None)
        if given is not None and given.requires_grad and self.find(given) is None:
            slot = listen(given)
            self._inputs.add(given, slot)
            block.slots.append(slot)

    def find(self, tensor: Tensor) -> Slot | None:
        """Return the place at which the gradients of a block's input arrive, ``None`` for other tensors."""
        return self._inputs.find(tensor)

    def place(self, row: Row) -> None:
        """Note in a new row which block it belongs to, and whether it is the first one there."""
        if not self._names:
            return
        parts = row.name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        row.block = next((prefix for prefix in prefixes if prefix in self._names), "")
        if self._entering is not None and self._entering.name == row.block:
            row.entering = self._entering.slots
            self._entering = None
