"""Copies of a model as a trial trains them: untreated ones, and ones with a cure applied, at one rate or another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from gradguard._entrant import Entrant
from gradguard._measuring import evaluate, examples, look
from gradguard._plan import LOOK
from gradguard._race import DRAW, Lane, Race
from gradguard._rates import HALF_A_DECADE, search_rate
from gradguard._twins import checked_optimizer, copy_of
from gradguard._untouched import cuda_devices
from gradguard.findings import Prescription
from gradguard.prescriptions import with_factor, with_rate
from gradguard.remedies.catalogue import Remedy, Target
from gradguard.remedies.optimizing import scale_learning_rate

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Copies", "OutOfTime"]


_TO_TELL = 64
"""Examples by which rates are told apart where batches are small. Ours: with 64 of them 49 of 49 sick runs on one to
four examples are cured, for 0.44 of a run in the mean, with 16 of them 48 for 0.48."""

_RARE = HALF_A_DECADE
"""Factor by which a rate is lowered besides where batches hold next to nothing and steps are as long as their
gradients: an example whose gradient is many times the usual comes seldom. Ours: of 14 sick runs of SGD on one or two
examples 14 are cured so and 11 without; of 21 under optimizers that scale their steps 17 and 21."""

_FEW = 2
"""Examples per batch up to which it is. Ours: what it was measured on."""

_LONG = 80
"""Steps of a race that is long. Ours."""

_AGAIN = (16, 8)
"""Steps before its end at which it is evaluated as well. Ours: of sigmoid nets in the plane with BatchNorm the loss in
evaluation mode is 0.8 after 120 steps, 0.49 after 160 and 0.65 after 200."""


class OutOfTime(Exception):  # noqa: N818  # not an error
    """The deadline has passed."""


class Copies:
    """Makes the copies that a race trains, and trains them until the deadline."""

    def __init__(
        self,
        model: nn.Module,
        race: Race,
        make_optimizer: Callable[[Any], Optimizer],
        *,
        deadline: float = math.inf,
    ) -> None:
        """Prepare; nothing is copied yet."""
        self._model = model
        self._normalized = any(isinstance(module, _BatchNorm) for module in model.modules())
        self._devices = cuda_devices(model)
        self._race = race
        race.deadline = deadline
        self._make_optimizer = make_optimizer

    def untreated(self, seed: int) -> Lane:
        """Return a copy of the model as it was given."""
        twin = copy_of(self._model)
        return Lane("", seed, twin, checked_optimizer(self._make_optimizer(twin), twin))

    def treated(self, entrant: Entrant, seed: int = 0) -> Lane:
        """Return a copy with a cure applied, under random numbers of its seed."""
        twin, race = copy_of(self._model), self._race
        cure, remedy = entrant.prescription, entrant.remedy
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

    def advance(self, lane: Lane, until: int) -> None:
        """Train a copy up to a step.

        Raises:
            OutOfTime: If the deadline passes.
        """
        while len(lane.losses) < until and not lane.fault:
            if time.perf_counter() > self._race.deadline:
                raise OutOfTime
            self._race.advance(lane, min(until, len(lane.losses) + 4))

    def advance_measured(self, lane: Lane, until: int) -> None:
        """Train a copy up to a step; over the last few it is measured what they gain of what they promise."""
        if len(lane.losses) >= until:
            return
        self.advance(lane, until - LOOK)
        lane.gains = []
        self.advance(lane, until)
        lane.end_measuring()

    def advance_to_end(self, lane: Lane, until: int, *, gains: bool = False) -> None:
        """Train a copy up to a step, and measure what it has come to.

        In evaluation mode what a cure's BatchNorm makes of a long race goes up and down over its steps: there the
        mean of three times counts, of those before the last where it is finite.

        Args:
            lane: The copy.
            until: Steps to have taken in all.
            gains: Whether to measure over the last steps what they gain of what they promise.

        Raises:
            OutOfTime: If the deadline passes.
        """
        beyond: list[float] = []
        for before in _AGAIN if until >= _LONG and self.adds_batch_norm(lane) else ():
            if len(lane.losses) < until - before:
                self.advance(lane, until - before)
                self.evaluate(lane)
                beyond.append(lane.beyond)
        (self.advance_measured if gains else self.advance)(lane, until)
        if lane.measured < len(lane.losses):
            self.evaluate(lane)
            lane.beyond = statistics.fmean([*filter(math.isfinite, beyond), lane.beyond])

    def evaluate(self, lane: Lane) -> None:
        """Measure a copy once more where its last steps say little of it.

        On more batches where they are small; in evaluation mode where a cure has put BatchNorm into a model that had
        none.

        Raises:
            OutOfTime: If the deadline has passed.
        """
        if time.perf_counter() > self._race.deadline:
            raise OutOfTime
        look(self._race, lane)
        if self.adds_batch_norm(lane):
            evaluate(self._race, lane)
        lane.measured = len(lane.losses)

    def adds_batch_norm(self, lane: Lane) -> bool:
        """Whether a cure has put BatchNorm into a model that had none."""
        return not self._normalized and any(isinstance(module, _BatchNorm) for module in lane.model.modules())

    def at_rate(self, cure: Prescription, remedy: Remedy, factor: float, until: int) -> Entrant:
        """Return a cure at another rate, trained up to a step."""
        entrant = Entrant(prescription=with_rate(cure, factor), remedy=remedy)
        entrant.lanes = [self.treated(entrant)]
        self.advance_to_end(entrant.lanes[0], until, gains=True)
        return entrant

    def search_rate(self, entrant: Entrant) -> None:
        """Find the factor of a cure that is a learning rate, each one tried for a few steps on a copy.

        The copy that has done best so far is kept: where its rate is tried for longer it goes on from where it is.
        """
        best: tuple[float, float, Lane] | None = None

        def attempt(factor: float, steps: int) -> tuple[float, float]:
            nonlocal best
            entrant.prescription = with_factor(entrant.prescription, factor)
            lane = best[2] if best is not None and best[0] == factor else self.treated(entrant)
            lane.ratios = lane.ratios or []
            self.advance(lane, steps)
            look(self._race, lane, enough=_TO_TELL)
            loss = math.inf if lane.fault else lane.result if lane.looked else sum(lane.losses[-2:]) / 2
            if best is None or loss < best[1]:
                best = factor, loss, lane
            return loss, statistics.median(lane.ratios) if lane.ratios else math.nan

        up = float(entrant.prescription.arguments.get("factor", 0.1)) > 1.0
        factor = search_rate(attempt, up=up)
        if best is not None and isinstance(best[2].optimizer, SGD) and 0 < examples(self._race.batch) <= _FEW:
            factor = max(1.0 if up else 0.0, factor / _RARE)
        entrant.prescription = with_factor(entrant.prescription, factor)

    def lower_rate(self, entrant: Entrant) -> None:
        """Begin again at a lower rate: what was fine for the few steps of the search is too high for more."""
        factor = float(entrant.prescription.arguments["factor"])
        entrant.prescription = with_factor(entrant.prescription, factor / HALF_A_DECADE)
        entrant.lanes = [self.treated(entrant)]
