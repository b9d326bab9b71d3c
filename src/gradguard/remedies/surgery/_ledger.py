"""One operation on a model and its optimizers: what it replaces, what it adds, and the way back bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies._applied import Applied, tensor_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Ledger", "ledger"]


@dataclass(slots=True)
class _Group:
    """A parameter group as it was: the list objects are the optimizer's own, the second ones are copies."""

    parameters: list[Tensor]
    kept: list[Tensor]
    names: list[str] | None
    kept_names: list[str]


class Ledger:
    """Changes a model and its optimizers, and knows how to put every bit back.

    Values of parameters, buffers and optimizer state are copied to the CPU when the ledger is opened, so that
    :meth:`restore` gives back the model as it was given, also after training. Modules and tensors stay the same
    objects, so that references that others hold stay valid.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Copy what may change; the model is not touched."""
        self._model = model
        self._optimizers = tuple(optimizers)
        self._before = tensor_names(model)
        self._places = _places(model)
        self._modules = list(model.modules())  # so that no id is given to another module while this lives
        self._values: list[tuple[Tensor, Tensor]] = [
            (tensor, _copy(tensor)) for tensor in {id(t): t for t in tensor_names(model).values()}.values()
        ]
        self._groups = [_group(group) for optimizer in optimizers for group in optimizer.param_groups]
        self._states = [_OptimizerState(optimizer, model) for optimizer in optimizers]
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._successors: dict[int, nn.Module] = {}
        self._beside: list[tuple[nn.Parameter, Tensor]] = []

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another wherever the model holds that; the old one is kept.

        Args:
            old: A module of the model; may be a part of ``new``.
            new: Takes its places, and its training mode.
        """
        for parent, key in self._held(old):
            self._children.append((parent, key, old))
            parent._modules[key] = new
        self._successors[id(old)] = new

    def place(self, parent: nn.Module, key: str, new: nn.Module) -> None:
        """Put a module in one place."""
        self._children.append((parent, key, parent._modules[key]))  # type: ignore[arg-type]  # an absent child is none
        parent._modules[key] = new

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute, for instance a flag by which torch chooses a kernel."""
        self._attributes.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def train_beside(self, new: nn.Module, beside: nn.Module) -> None:
        """Let the optimizers train what is new in the group of the bias, or weight, of the module it stands with."""
        own = dict(beside.named_parameters())
        held = [p for name, p in own.items() if p.requires_grad and name.endswith("bias")]
        held += [p for p in own.values() if p.requires_grad]
        known = {id(p) for p in own.values()}
        for parameter in new.parameters():
            if held and id(parameter) not in known:
                self._beside.append((parameter, held[0]))

    def inherit(self, old: nn.Module, new: nn.Module) -> None:
        """Let each new parameter take the place of the old one of its name in the optimizers."""
        anchors = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            if name in anchors:
                self._beside.append((parameter, anchors[name]))

    def _held(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [
            (parent, key)
            for parent in self._model.modules()
            for key, child in parent._modules.items()
            if child is module
        ]

    def finish(self, remedy: str, changes: Sequence[str], skipped: Mapping[str, str]) -> Applied:
        """Carry the optimizers over and write the record.

        Raises:
            UnsupportedModelError: If the optimizers given do not hold the layers that were changed.
        """
        names = self._names()
        before = {id(tensor) for tensor in self._before.values()}
        now = tensor_names(self._model)
        self._carry_over(names, now)
        return Applied(
            model=self._model,
            remedy=remedy,
            changes=tuple(changes),
            changed=tuple(name for name, tensor in now.items() if id(tensor) not in before),
            skipped=dict(skipped),
            names=names,
            _snapshot=self,
        )

    def _names(self) -> dict[str, str]:
        """Map each name to the one under which the same tensor is now, module by module: tied ones stay apart."""
        after, now, names = _places(self._model), tensor_names(self._model), {}
        at = {path: module for module in self._modules for path in self._places[id(module)]}
        for name, tensor in self._before.items():
            path, _, leaf = name.rpartition(".")
            module = at[path]
            earlier = self._places[id(module)]
            while id(module) not in after and id(module) in self._successors:
                module = self._successors[id(module)]
            later = after.get(id(module), [])
            if not later:
                continue
            place = later[earlier.index(path)] if len(later) == len(earlier) else later[0]
            found = f"{place}.{leaf}".lstrip(".")
            if now.get(found) is tensor:
                names[name] = found
        return names

    def _carry_over(self, names: Mapping[str, str], now: Mapping[str, Tensor]) -> None:
        called = {id(tensor): name for name, tensor in reversed(list(now.items()))}
        beside = {id(parameter): (parameter, anchor) for parameter, anchor in self._beside}
        joined: set[int] = set()
        gone = {id(t) for name, t in self._before.items() if name not in names} - set(called)
        for optimizer in self._optimizers:
            touched = False
            for group in optimizer.param_groups:
                touched |= self._carry_group(group, beside, gone, called, joined)
            for parameter in [p for p in optimizer.state if id(p) in gone]:
                del optimizer.state[parameter]
            if touched and isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()  # its history is one vector over all parameters, of another length now
                optimizer._numel_cache = None  # noqa: SLF001  # torch computes it once
        missing = [called.get(id(p), "a parameter") for p, _ in beside.values() if id(p) not in joined]
        if self._optimizers and missing:
            raise UnsupportedModelError(
                f"no optimizer given holds the layer beside {missing[0]}, so that nothing would train it. Pass the "
                "optimizer that does, or all of them as a list"
            )

    def _carry_group(
        self,
        group: dict[str, Any],
        beside: Mapping[int, tuple[nn.Parameter, Tensor]],
        gone: set[int],
        called: Mapping[int, str],
        joined: set[int],
    ) -> bool:
        """Let new parameters join behind the one they stand beside, and what is gone leave; keep the list itself."""
        parameters: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) not in gone:
                parameters.append(parameter)
            new = [added for added, anchor in beside.values() if anchor is parameter and id(added) not in joined]
            parameters += new
            joined.update(id(added) for added in new)
        touched = [id(p) for p in parameters] != [id(p) for p in group["params"]]
        if group.get("param_names") is not None:
            old = {id(p): name for p, name in zip(group["params"], group["param_names"], strict=True)}
            group["param_names"][:] = [called.get(id(p), old.get(id(p), "")) for p in parameters]
        group["params"][:] = parameters
        return touched

    def restore(self) -> None:
        """Put everything back; once done there is nothing left to put back."""
        while self._children:
            parent, key, child = self._children.pop()
            parent._modules[key] = child
        while self._attributes:
            module, name, value = self._attributes.pop()
            setattr(module, name, value)
        for tensor, value in self._values:
            _put_back(tensor, value)
        self._values.clear()
        for group in self._groups:
            group.parameters[:] = group.kept
            if group.names is not None:
                group.names[:] = group.kept_names
        self._groups.clear()
        while self._states:
            self._states.pop().restore()


class _OptimizerState:
    """What an optimizer remembers of a model's parameters."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        ids = {id(p) for p in model.parameters()}
        self._optimizer = optimizer
        self._ids = ids
        self._numel = getattr(optimizer, "_numel_cache", None)
        self._entries = [
            (parameter, entry, {key: (value, _kept(value)) for key, value in entry.items()})
            for parameter, entry in optimizer.state.items()
            if id(parameter) in ids
        ]

    def restore(self) -> None:
        """Put the state back in the same tensors, and take out what has come since."""
        state = self._optimizer.state
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for parameter in [p for p in state if id(p) in self._ids or id(p) not in held]:
            del state[parameter]
        for parameter, entry, values in self._entries:
            entry.clear()
            for key, (value, kept) in values.items():
                if isinstance(value, torch.Tensor):
                    _put_back(value, kept)
                entry[key] = value if isinstance(value, torch.Tensor) else kept
            state[parameter] = entry
        if isinstance(self._optimizer, torch.optim.LBFGS):
            self._optimizer._numel_cache = self._numel  # noqa: SLF001  # as it was


def _kept(value: Any) -> Any:
    return _copy(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        own = value.to(tensor.device)
        signs = tensor.is_floating_point() and not torch.equal(torch.signbit(tensor), torch.signbit(own))  # of zeros
        if signs or not torch.equal(tensor.detach(), own):
            tensor.copy_(own)


def _group(group: dict[str, Any]) -> _Group:
    names = group.get("param_names")
    return _Group(group["params"], list(group["params"]), names, list(names or ()))


def _places(model: nn.Module) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


@contextlib.contextmanager
def ledger(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Ledger]:
    """Give a ledger for one operation, and put everything back if the operation inside raises."""
    kept = Ledger(model, optimizers)
    try:
        yield kept
    except BaseException as error:
        kept.restore()
        error.add_note("the model and the optimizer are as they were before this operation")
        raise
