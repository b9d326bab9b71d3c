"""The gradient at the inputs of a network's outermost blocks: the stream of a residual net, without its branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TrunkTaps"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class TrunkTaps:
    """Measures the gradient that arrives at the input of each outermost block, in execution order.

    Blocks are the model's children; a container's children stand in its place. What has no parameters is no block.

    Attributes:
        norms: L2 norm per block whose input has a gradient, of the last step that was watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._order: list[str] = []
        self._found: dict[str, float] = {}

    @property
    def norms(self) -> list[float]:
        """L2 norms in execution order; blocks that no gradient reached are left out."""
        return [self._found[name] for name in self._order if name in self._found]

    def begin(self) -> None:
        """Set hooks for the coming step."""
        self._order, self._found = [], {}
        for name, module in _blocks(self._model, ""):
            self._handles.append(module.register_forward_pre_hook(self._tap(name)))

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _tap(self, name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = next((part for part in inputs if isinstance(part, Tensor)), None)
            if given is None or not given.requires_grad or not torch.is_grad_enabled():
                return
            if name not in self._order:
                self._order.append(name)
            given.register_hook(lambda gradient: self._keep(name, gradient))

        return watch

    def _keep(self, name: str, gradient: Tensor) -> None:
        norm = float(gradient.detach().float().norm())
        self._found[name] = math.hypot(self._found.get(name, 0.0), norm)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, _CONTAINERS):
            yield from _blocks(child, f"{full}.")
        elif any(True for _ in child.parameters()):
            yield full, child
