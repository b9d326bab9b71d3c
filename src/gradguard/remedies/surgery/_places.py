"""Where things stand in a model: who holds a module, under which name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from gradguard.remedies._applied import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = ["enlist", "holders", "put"]


def holders(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every module that holds one as a child, with the child's name; several for a shared module."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def put(model: nn.Module, snapshot: Snapshot, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, everywhere that one stands."""
    for parent, name in holders(model, old):
        if parent is not new:
            snapshot.replace_child(parent, name, new)


def enlist(snapshot: Snapshot, optimizers: Sequence[Optimizer], new: Iterator[nn.Parameter], beside: nn.Module) -> None:
    """Let new parameters join the optimizer groups of the module that they stand beside."""
    reference = next(beside.parameters(), None)
    for parameter in new:
        if reference is not None:
            snapshot.add_parameter(optimizers, parameter, reference)
