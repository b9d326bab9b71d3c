"""What a remedy did to a model, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Applied", "Snapshot", "tensor_names", "transaction"]

_NOTHING: Mapping[str, str] = {}


class Snapshot:
    """What a remedy is about to change, kept so that it can be put back bit for bit.

    Tensors are restored in place and child modules as objects, so that references that others hold stay valid. Values
    of parameters and buffers are copied; optimizer state is kept as it is, since it is taken out, never written to.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._states: list[tuple[Optimizer, nn.Parameter, dict[str, Any] | None]] = []
        self._groups: list[tuple[Optimizer, list[nn.Parameter], nn.Parameter]] = []

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of tensors; what is kept already is not kept again."""
        for tensor in tensors:
            if id(tensor) not in self._values:
                self._values[id(tensor)] = (tensor, tensor.detach().clone())

    def changed(self) -> set[int]:
        """Return the ids of the kept tensors whose values are no longer the same; NaN counts as equal to NaN."""
        return {key for key, (tensor, value) in self._values.items() if not _same(tensor, value)}

    def replace_child(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Put a module in the place of another and remember the other."""
        self._children.append((parent, name, parent._modules[name]))  # type: ignore[arg-type]  # an absent child is none
        parent._modules[name] = child

    def reset_state(self, optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
        """Take the optimizers' state of changed parameters out, so that it starts afresh; LBFGS has one for all."""
        ids = {id(parameter) for parameter in parameters}
        for optimizer in optimizers:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            affected = [parameter for parameter in held if id(parameter) in ids]
            if affected and isinstance(optimizer, torch.optim.LBFGS):
                affected = held
            for parameter in affected:
                self._states.append((optimizer, parameter, optimizer.state.pop(parameter, None)))

    def add_parameter(self, optimizers: Sequence[Optimizer], parameter: nn.Parameter, beside: nn.Parameter) -> None:
        """Let the optimizer that holds ``beside`` hold ``parameter`` in the same group.

        A group of its own would disturb learning-rate schedulers, which count groups.
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(held is beside for held in group["params"]):
                    group["params"].append(parameter)
                    self._groups.append((optimizer, group["params"], parameter))

    def restore(self) -> None:
        """Put everything back; once done there is nothing left to put back."""
        while self._children:
            parent, name, child = self._children.pop()
            parent._modules[name] = child
        with torch.no_grad():
            for tensor, value in self._values.values():
                tensor.copy_(value)
        self._values.clear()
        while self._groups:
            optimizer, parameters, added = self._groups.pop()
            parameters[:] = [parameter for parameter in parameters if parameter is not added]
            optimizer.state.pop(added, None)
        while self._states:
            optimizer, parameter, state = self._states.pop()
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = state


def _same(tensor: Tensor, value: Tensor) -> bool:
    if torch.equal(tensor, value):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, value, rtol=0.0, atol=0.0, equal_nan=True)


@contextlib.contextmanager
def transaction() -> Iterator[Snapshot]:
    """Give a snapshot to fill before each change, and put everything back if the operation inside raises."""
    snapshot = Snapshot()
    try:
        yield snapshot
    except BaseException as error:
        snapshot.restore()
        error.add_note("the model and the optimizer are as they were before this remedy")
        raise


def tensor_names(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by dotted name; tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What a remedy did.

    Attributes:
        model: The model as it is now; the one given, unless the remedy had to replace it.
        remedy: Name of the remedy, for instance ``"he-initialization"``.
        changes: What was done in words, one line per change.
        changed: Names of the parameters and buffers that were changed or added.
        skipped: Why something was left alone, by name of module or parameter.
        names: From the names of parameters and buffers before to the names now; none if a tensor is gone.
    """

    model: nn.Module
    remedy: str
    changes: tuple[str, ...]
    changed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=lambda: dict(_NOTHING))
    names: Mapping[str, str] = field(default_factory=lambda: dict(_NOTHING))
    _snapshot: Snapshot = field(default_factory=Snapshot, repr=False, compare=False)

    def undo(self) -> nn.Module:
        """Put back, bit for bit, what the remedy changed: values, modules, and the optimizer's state for them.

        What training has changed elsewhere since then stays. Where several remedies were applied, undo the last one
        first. A second call does nothing.

        Returns:
            The model as it was given.
        """
        self._snapshot.restore()
        return self.model

    def __str__(self) -> str:
        left = [f"{name}: left alone, {why}" for name, why in self.skipped.items()]
        return "\n".join([self.remedy, *(f"  {line}" for line in (*self.changes, *left))])
