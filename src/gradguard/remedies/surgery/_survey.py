"""What runs in a model, in what order, and what stands around it: from a forward pass, or from nn.Sequential."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from gradguard import theory
from gradguard._untouched import untouched
from gradguard.monitors._describe import clean_name
from gradguard.monitors._trees import floating_tensors
from gradguard.remedies.initialization._custom import custom_activations
from gradguard.remedies.initialization._following import following_by_order, following_by_trace
from gradguard.remedies.initialization._trace import _ACTIVATIONS, Trace, _Recorder, call
from gradguard.remedies.surgery.modules import Normalized

__all__ = ["Call", "Site", "Survey", "affine", "chosen", "pass_over", "survey"]

_TRANSFORMER = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)

_BETWEEN = frozenset({__name__, _Recorder.__module__, "torch.nn.functional", "torch.overrides", "torch._jit_internal"})
"""Modules whose code lies between the call of an activation function and what sees it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The place in code that calls a function.

    Attributes:
        code: The code.
        end: Line and column at which the call ends; those of Python are zero-based bytes.
        receiver: The first argument of that code where it is a module: ``self`` of a method.
        module: Name of the Python module that the code is of.
    """

    code: CodeType
    end: tuple[int, int] | None
    receiver: nn.Module | None
    module: str


@dataclass(slots=True)
class Call:
    """One call of a module in the pass.

    Attributes:
        module: The module.
        given: The operation behind its one input, ``None`` where it takes something other than one tensor.
        made: The operation behind its one output, ``None`` likewise.
        given_shape: Shape of the input.
        made_shape: Shape of the output.
        in_place: Whether the input was changed by the call.
        first: Index of the first operation that it runs.
    """

    module: nn.Module
    given: int | None = None
    made: int | None = None
    given_shape: tuple[int, ...] = ()
    made_shape: tuple[int, ...] = ()
    in_place: bool = False
    first: int = 0


@dataclass(slots=True)
class Survey:
    """What one forward pass showed; without a pass, what the order in nn.Sequential says.

    Attributes:
        model: The model.
        trace: The operations, ``None`` where there was no pass.
        calls: Calls of modules, in the order in which they end.
        owners: For each operation the module whose code ran it, and the name of the function.
        own: Activations that the model's author wrote, with what they compute.
        sites: For each activation the place in code that called it as a function.
        outputs: The operations whose results the model returns.
    """

    model: nn.Module
    trace: Trace | None = None
    calls: list[Call] = field(default_factory=list)
    owners: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)
    own: Mapping[nn.Module, theory.Activation] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Return the calls of one module."""
        return [found for found in self.calls if found.module is module]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield Linear and convolution layers by name, each once."""
        for name, module in self.model.named_modules():
            if affine(module):
                yield name, module

    def following(self) -> dict[str, tuple[str | None, bool, bool]]:
        """Return for each layer that runs: the activation behind it, whether it is normalized, whether it is the last.

        Activations that gate something count as none.
        """
        layers = list(self.layers())
        found = following_by_order(self.model, layers) if self.trace is None else following_by_trace(self.trace, layers)
        return {
            name: (None if it.activation is None else it.activation.name, it.normalized, it.output)
            for name, it in found.items()
        }

    def past_the_module(self, layer: nn.Module) -> nn.Module | None:
        """Return the module whose code uses a layer's weight without calling the layer, if there is one."""
        if self.trace is None:
            return None
        for op in self.trace.uses(layer):
            owner = self.owners[op.index][0]
            if owner is not layer and not any(child is owner for child in layer.modules()):
                return owner
        return None


class _Observer(_Recorder):
    """Records operations as well as whose code runs them, and what each module takes and gives."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(model, batch, None)
        self.survey = Survey(model, self.trace, own=custom_activations(model))
        self._stack: list[nn.Module] = [nn.Identity()]  # stands for code outside the model, such as the loss
        self._open: list[tuple[Call, int, Tensor | None]] = []

    def _record(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
        module: nn.Module | None,
    ) -> None:
        top = self._stack[-1]
        if affine(top) and module is not None and top.weight is module.weight:
            module = top  # of modules that share a weight the one that runs
        plain = name if name.startswith("__") else name.strip("_")
        self.survey.owners[len(self.trace.ops)] = (top, plain)
        if plain in _ACTIVATIONS:
            self.survey.sites[len(self.trace.ops)] = _site()
        super()._record(name, args, kwargs, given, made, module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is called."""
        given = floating_tensors((args, kwargs))
        only = given[0] if len(given) == 1 and len(args) == 1 and args[0] is given[0] else None
        entry = Call(module, first=len(self.trace.ops))
        if only is not None:
            entry.given, entry.given_shape = self._made.get(only), tuple(only.shape)
        self._stack.append(module)
        self._open.append((entry, 0 if only is None else only._version, only))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what it gave."""
        self._stack.pop()
        entry, version, given = self._open.pop()
        if module in self.survey.own:
            self.enclose(entry.first, output, self.survey.own[module])
        if isinstance(output, Tensor):
            entry.made, entry.made_shape = self._made.get(output), tuple(output.shape)
        if module is self.survey.model:
            self.survey.outputs |= {self._made[made] for made in floating_tensors(output) if made in self._made}
        entry.in_place = given is not None and given._version != version
        self.survey.calls.append(entry)


def _site() -> Site:
    """Return the place in code that called the function which is being recorded."""
    frame = sys._getframe(1)  # noqa: SLF001  # the public way builds the whole stack and reads source files
    while frame.f_back is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    code = frame.f_code
    _, line, _, column = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return Site(
        code=code,
        end=None if line is None or column is None else (line, column),
        receiver=first if isinstance(first, nn.Module) else None,
        module=str(frame.f_globals.get("__name__")),
    )


def survey(model: nn.Module, batch: Any = None, compute_loss: Callable[[Any, Any], Any] | None = None) -> Survey:
    """Look at what runs in a model; it is left as it was: buffers, modes, random states, hooks.

    Args:
        model: The model, in the mode that it is in.
        batch: A batch to run once; ``None`` to go by the order of nn.Sequential.
        compute_loss: Called as ``compute_loss(model, batch)`` in place of the model.

    Raises:
        ValueError: If there is no batch and the model is not a plain nn.Sequential.
        Exception: What the model raises.
    """
    if batch is None:
        if not _plain(model):
            raise ValueError(
                f"{type(model).__name__} is no plain nn.Sequential, and only a forward pass shows in what order its "
                "code calls its layers. Pass batch="
            )
        return Survey(model, own=custom_activations(model))
    with untouched(model), torch.no_grad(), parametrize.cached():
        torch.manual_seed(0)
        observer = _Observer(model, batch)
        handles = []
        try:
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(observer.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(observer.leave))
            with observer:
                call(model, batch, compute_loss)
        finally:
            for handle in handles:
                handle.remove()
    return observer.survey


def _plain(model: nn.Module) -> bool:
    """Whether a model is nn.Sequential all the way down to torch's own layers."""
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        return all(_plain(child) for child in model)
    if isinstance(model, Normalized):
        return _plain(model.layer)
    return type(model).__module__.startswith("torch.nn.modules") or affine(model)


def affine(module: nn.Module) -> bool:
    """Whether a module is Linear or a convolution."""
    return isinstance(module, (nn.Linear, _ConvNd))


def pass_over(model: nn.Module) -> dict[int, str]:
    """Return by id the modules inside torch's own transformer layers, which read weights past any wrapper."""
    return {
        id(child): f"torch's {type(outer).__name__} reads its weight directly in evaluation mode, past any wrapper"
        for outer in model.modules()
        if isinstance(outer, _TRANSFORMER)
        for child in outer.modules()
        if child is not outer and not isinstance(child, _TRANSFORMER)
    }


def chosen(model: nn.Module, modules: Iterable[str] | None) -> dict[str, nn.Module] | None:
    """Return the modules named, by name; ``None`` for all.

    Raises:
        ValueError: If a name is unknown.
    """
    if modules is None:
        return None
    known = {clean_name(name): module for name, module in model.named_modules() if name}
    names = [modules] if isinstance(modules, str) else list(modules)
    for name in names:
        if name not in known:
            raise ValueError(f"modules names {name!r}, and the {type(model).__name__} has no such module inside it")
    return {name: known[name] for name in names}
