"""Does the gradient keep its direction? A few entries of each tensor, compared with those of an earlier observation.

Everything is reduced on the device and queued; nothing is transferred here.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gradguard.monitors._reduce import Handle, Readback
from gradguard.records import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradguard.monitors._samples import Samples

__all__ = ["GradientDirection"]

_ENTRIES = 64
"""Entries kept of each tensor. Ours: a cosine of 0.97 between whole gradients reads 0.96."""

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
"""The fractional parts of its multiples spread evenly, however many there are; equal strides would stay in one column
of a matrix. Source: Knuth (1998), "The Art of Computer Programming", volume 3, section 6.4."""


_APART = 10
"""Steps after which a gradient takes the place of the one that others are compared with. Ours: neighbours point the
same way in any run, so observations closer than that would say nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sketch:
    """Entries of the gradients of one device, shape ``[parameters, 64]``; where a tensor has fewer, zeros follow."""

    rows: list[int]
    sampled: list[int]
    owners: list[weakref.ref[nn.Parameter]]
    layouts: list[tuple[tuple[int, ...], tuple[int, ...]]]
    places: Tensor
    present: Tensor
    values: Tensor

    @property
    def weights(self) -> FloatArray:
        """How many entries of its tensor each entry of a row stands for."""
        sizes = np.array([math.prod(shape) for shape, _ in self.layouts], dtype=np.float64)
        return sizes / np.clip(np.array(self.sampled, dtype=np.float64), 1.0, _ENTRIES)


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """Where the sums of one device wait: of products, squares now and squares then, one per row."""

    sketch: _Sketch
    matched: NDArray[np.bool_]
    sums: Handle


class GradientDirection:
    """Cosine between the gradient of an observation and that of an earlier one of the same optimizer.

    The earlier one is the previous observation; of several within ten steps, it is the first of them. 64 entries of
    each gradient are kept. Nothing is said of what cannot be compared: the first observation, and parameters that are
    new, of another size, or had no gradient. The scale of the loss makes no difference.
    """

    def __init__(self) -> None:
        """Know of no gradient yet."""
        self._kept: dict[int, tuple[int, list[_Sketch]]] = {}
        self._waiting: list[_Comparison] = []
        self._now = (0, 0)

    def read(self, readback: Readback, samples: Sequence[Samples], *, index: int, step: int) -> None:
        """Queue the comparison with the earlier observation.

        Args:
            readback: Where the numbers wait.
            samples: Gradients of this step, at most one sample of each device.
            index: The optimizer whose step is observed.
            step: Its step.
        """
        _, kept = self._kept.get(index, (step, []))
        before = {sketch.values.device: sketch for sketch in kept}
        self._now = index, step
        filled = [sample for sample in samples if sample.gradients.numel()]
        self._waiting = [_compare(readback, sample, before.get(sample.gradients.device)) for sample in filled]

    def scalars(self, readback: Readback, mine: FloatArray) -> dict[str, float]:
        """Return the cosine over all parameters that could be compared, and the steps in between; empty for none.

        Call once, after the transfer. A gradient that is not finite is not compared with any other.

        Args:
            readback: The fetched numbers.
            mine: 1 where the optimizer of this step holds the parameter, shape ``[parameters]``.
        """
        waiting, self._waiting = self._waiting, []
        totals, finite = np.zeros(3), True
        for comparison in waiting:
            count = len(comparison.sketch.rows)
            sums = np.array(readback.values(comparison.sums, 3 * count), dtype=np.float64).reshape(3, count)
            held = mine[comparison.sketch.rows] > 0.0
            finite = finite and bool(np.isfinite(sums[1, held]).all())
            totals += (sums * comparison.sketch.weights)[:, held & comparison.matched].sum(axis=1)
        (index, step), product, now, then = self._now, *(float(total) for total in totals)
        apart = step - self._kept[index][0] if index in self._kept else 0
        compared = finite and now > 0.0 and then > 0.0
        if waiting and finite and (not compared or apart >= _APART):
            self._kept[index] = step, [comparison.sketch for comparison in waiting]
        if not compared:
            return {}
        cosine = product / math.sqrt(now) / math.sqrt(then)
        return {"gradient_cosine": max(-1.0, min(1.0, cosine)), "gradient_cosine_steps": float(apart)}

    def close(self) -> None:
        """Let go of every gradient."""
        self._kept, self._waiting = {}, []


def _compare(readback: Readback, samples: Samples, before: _Sketch | None) -> _Comparison:
    """Take the entries of one device, and queue their products with those of the same parameters before."""
    sketch = _take(samples, before)
    found = _earlier_rows(sketch, before)
    if before is None:
        earlier = torch.zeros_like(sketch.values)
    elif len(found) == len(before.rows) and (found == np.arange(len(found))).all():
        earlier = before.values
    else:
        earlier = before.values[torch.from_numpy(found.clip(min=0)).to(before.values.device)]
    now = sketch.values
    sums = torch.stack((now * earlier, now * now, earlier * earlier)).sum(dim=2)
    return _Comparison(sketch, found >= 0, readback.put_vector(sums.reshape(-1)))


def _take(samples: Samples, before: _Sketch | None) -> _Sketch:
    if before is not None and before.sampled == samples.sizes:
        places, present = before.places, before.present
    else:
        places, present = _chosen(samples.sizes, samples.gradients.device)
    return _Sketch(
        rows=samples.rows,
        sampled=samples.sizes,
        owners=[weakref.ref(parameter) for parameter in samples.parameters],
        layouts=[(tuple(parameter.shape), parameter.stride()) for parameter in samples.parameters],
        places=places,
        present=present,
        values=samples.gradients[places] * present,  # float64 but for MPS: squares of tiny gradients are no zeros
    )


def _chosen(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which of all sampled entries to keep, and 1 where there is one, both of shape ``[parameters, 64]``."""
    count, column = np.array(sizes)[:, None], np.arange(_ENTRIES)[None, :]
    spread = (np.modf((column + 0.5) * _GOLDEN)[0] * count).astype(np.int64)
    present = (column < count) | (count > _ENTRIES)
    within = np.where(present, np.where(count > _ENTRIES, spread, column), 0)
    last = max(0, int(count.sum()) - 1)
    places = (np.cumsum(count)[:, None] - count + within).clip(max=last)
    wide = np.float32 if device.type == "mps" else np.float64
    return torch.from_numpy(places).to(device), torch.from_numpy(present.astype(wide)).to(device)


def _earlier_rows(sketch: _Sketch, before: _Sketch | None) -> NDArray[np.int64]:
    """Return where each row stood in the sketch before, -1 where it did not or its tensor has another layout."""
    if before is None:
        return np.full(len(sketch.rows), -1, dtype=np.int64)
    if sketch.layouts == before.layouts and all(map(operator.is_, sketch.owners, before.owners)):
        return np.arange(len(sketch.rows))
    pairs = zip(before.owners, before.layouts, strict=True)
    known = {id(owner()): (place, layout) for place, (owner, layout) in enumerate(pairs)}
    found = []
    for owner, layout in zip(sketch.owners, sketch.layouts, strict=True):
        place, earlier = known.get(id(owner()), (-1, layout))
        found.append(place if earlier == layout else -1)
    return np.array(found, dtype=np.int64)
