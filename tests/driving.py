"""Driving the monitors by hand, without a guard, for tests of what they measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradguard.monitors import GradientMonitor, SignalMonitor
from gradguard.monitors._reduce import Readback
from gradguard.records import FloatArray, LayerTable


def reraise(place: str, error: BaseException) -> None:
    """Let a failure of a monitor fail the test."""
    raise error


@dataclass
class Observation:
    """What the monitors saw of one step."""

    layers: LayerTable
    signals: dict[str, FloatArray]
    names: tuple[str, ...]
    parameters: dict[str, FloatArray]

    def layer(self, name: str) -> dict[str, float]:
        """Return the statistics of one layer by name."""
        row = self.layers.names.index(name)
        return {statistic: float(column[row]) for statistic, column in self.signals.items()}

    def parameter(self, name: str) -> dict[str, float]:
        """Return the statistics of one parameter by name."""
        row = self.names.index(name)
        return {statistic: float(column[row]) for statistic, column in self.parameters.items()}


def observe(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    sample_size: int = 4096,
    update: Callable[[], Any] | None = None,
) -> Observation:
    """Observe ``run()`` (forward and backward), then ``update()``; remove every hook."""
    signals, gradients = SignalMonitor(model, on_failure=reraise), GradientMonitor(model, sample_size=sample_size)
    readback = Readback()
    signals.reset(readback)
    signals.arm()
    try:
        run()
        groups = None if optimizer is None else {id(p): g for g in optimizer.param_groups for p in g["params"]}
        gradients.read(readback, gradient_of=lambda p: p.grad, groups=groups)
        if update is not None:
            update()
            gradients.read_update(readback)
        signals.close_step(0, 0)
        readback.fetch()
        layers, columns = signals.columns()
        held = gradients.held_by(None)
        return Observation(
            layers, columns, gradients.table.names, gradients.columns(readback, scale=1.0, mine=held, others=held * 0)
        )
    finally:
        signals.disarm()


def count_hooks(model: nn.Module) -> int:
    """Count the hooks of every kind on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
