"""Copies of a model as a trial trains them: untreated ones, and ones with a cure applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard._race import DRAW, Lane, Race, checked_optimizer, copy_of
from gradguard._untouched import cuda_devices
from gradguard.findings import Prescription
from gradguard.remedies.catalogue import Remedy, Target
from gradguard.remedies.optimizing import scale_learning_rate

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Copies"]


class Copies:
    """Makes the copies that a race trains."""

    def __init__(self, model: nn.Module, race: Race, make_optimizer: Callable[[Any], Optimizer]) -> None:
        """Prepare; nothing is copied yet."""
        self._model = model
        self._devices = cuda_devices(model)
        self._race = race
        self._make_optimizer = make_optimizer

    def untreated(self, seed: int) -> Lane:
        """Return a copy of the model as it was given."""
        twin = copy_of(self._model)
        return Lane("", seed, twin, checked_optimizer(self._make_optimizer(twin), twin))

    def treated(self, cure: Prescription, remedy: Remedy, seed: int) -> Lane:
        """Return a copy with a cure applied, under random numbers of its seed."""
        twin, race = copy_of(self._model), self._race
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(DRAW + seed)
            if remedy.acts_on == "model":
                twin = remedy.run(Target(twin, None, race.batch, race.compute_loss, cure.arguments)).model
                optimizer = checked_optimizer(self._make_optimizer(twin), twin)
            else:
                optimizer = checked_optimizer(self._make_optimizer(twin), twin)
                remedy.run(Target(twin, optimizer, race.batch, race.compute_loss, cure.arguments))
        if "lr_factor" in cure.arguments:
            scale_learning_rate(twin, optimizer, factor=float(cure.arguments["lr_factor"]))
        return Lane(cure.remedy, seed, twin, optimizer)
