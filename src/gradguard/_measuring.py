"""What a copy has come to where the losses of its last steps do not tell: few examples, or BatchNorm of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradguard._race import LAST, Lane, Race
from gradguard._untouched import FAILURES
from gradguard.monitors._trees import tensors

__all__ = ["ENOUGH", "evaluate", "examples", "is_coarse", "look"]

ENOUGH = 128
"""Examples that a result is taken over, as far as there are batches. Ours: batches of one give eight in eight steps; of
59 sick runs on batches of one to eight examples 48 are cured so, 47 with 64; of 21 of them 16 with 64, and 15 where the
last eight losses are all there is."""


def is_coarse(race: Race) -> bool:
    """Whether batches hold so few examples that the last losses of a copy say little."""
    return 0 < LAST * examples(race.batch) < ENOUGH


def look(race: Race, lane: Lane, *, enough: int = ENOUGH) -> None:
    """Measure a copy on the batches to come, without a step, where batches are small.

    Args:
        race: With the batches.
        lane: The copy; ``looked`` is set.
        enough: Examples to look at.
    """
    if lane.fault or not is_coarse(race):
        return
    count = min(race.kept, math.ceil(enough / examples(race.batch)))
    twin = _copy(lane)
    losses = race.losses_ahead(twin, lane, count) if twin is not None and count >= LAST else []
    if losses and len(losses) == count and np.isfinite(losses).all():
        lane.looked = losses


def evaluate(race: Race, lane: Lane) -> None:
    """Measure a copy in evaluation mode, where BatchNorm no longer sees the batch: what only it makes of it counts.

    Its statistics are those of the steps so far, less what is left of their beginning (0 and 1); where weights move
    fast or layers are many they lag behind, as they would in a run. Looked at are the batches to come.

    Args:
        race: With the batches.
        lane: The copy; ``beyond`` is set.
    """
    if lane.fault or not lane.losses:
        return
    lane.beyond = 0.0
    twin = _copy(lane)
    if twin is None:
        return
    for module in twin.eval().modules():
        if isinstance(module, _BatchNorm):
            _forget_the_beginning(module)
    count = len(lane.looked) or LAST
    losses = race.losses_ahead(twin, lane, count)
    if len(losses) == count:
        evaluated = float(np.mean(losses) if lane.looked else np.median(losses))
        lane.beyond = max(0.0, evaluated - lane.result) if math.isfinite(evaluated) else math.inf


def _copy(lane: Lane) -> nn.Module | None:
    """Return a copy whose buffers a pass may change; ``None`` where a model that has run cannot be copied."""
    try:
        return copy.deepcopy(lane.model)
    except FAILURES:
        return None


def _forget_the_beginning(norm: _BatchNorm) -> None:
    """Take out of running statistics what a few steps have left of their first values.

    Source: Kingma and Ba (2015), arXiv 1412.6980, section 3, for the same correction of moving averages.
    """
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None or not norm.momentum:
        return
    left = (1.0 - norm.momentum) ** int(norm.num_batches_tracked)
    if left < 1.0:
        norm.running_mean.div_(1.0 - left)
        norm.running_var.sub_(left).div_(1.0 - left).clamp_(min=0.0)


def examples(batch: Any) -> int:
    """Return the length of the first axis of a batch's first tensor, 0 where it holds none with an axis."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim), 0)
