"""Per tensor, from samples: an optimizer's second moment beside the gradient, and gradients at the edge of float16.

Everything is reduced on the device and queued; nothing is transferred here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradguard.monitors._reduce import Handle, Readback

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Counts", "Moment", "queue_float16", "queue_moments", "second_moment", "stretch_sums", "underflow_fraction"]

_EDGE = 2.0**24
"""Smallest float16 numbers in 1: each is a whole multiple of 2^-24. Source: IEEE 754-2019, binary16."""

_NORMAL = 1024.0
"""Smallest normal float16 number, 2^-14, in multiples of 2^-24. Source: IEEE 754-2019, binary16."""

_LOST = 8.0
"""Multiples of 2^-24 below which an entry has at most three bits left. Ours."""

_FEWEST = 16
"""Entries other than zero from which a tensor tells float16 from chance. Ours: a float32 number of this size is a whole
multiple of 2^-24 by chance in less than one case in a hundred."""

_LIMITED = 10.0
"""Times eps below which the root of the second moment is dominated by it. Source: Wortsman et al. (2024), "Small-scale
proxies for large-scale Transformer training instabilities", ICLR, arXiv 2309.14322, section 3.4; the factor is ours:
eps then takes a tenth of the denominator or more."""


@dataclass(slots=True, eq=False)
class Counts:
    """Counts by tensor that wait on a device: ``kinds`` blocks, each of one number per row."""

    rows: list[int]
    sizes: list[int]
    handle: Handle

    def value(self, readback: Readback, position: int, kind: int) -> float:
        """Return number ``kind`` of the tensor at ``position`` among the rows."""
        return readback.value(self.handle, position + kind * len(self.rows))


@dataclass(slots=True, eq=False)
class Moment:
    """A parameter's second moment before a step: where it stands in the table, and how to correct its bias."""

    row: int
    gradient: Tensor
    square: Tensor
    correction: float | Tensor
    epsilon: float


def second_moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, float | Tensor, float] | None:
    """Return an optimizer's running mean of squares, the factor that corrects its bias, and eps; ``None`` without one.

    Args:
        state: The optimizer's state of one parameter.
        group: Its parameter group.

    Source: Kingma, Ba (2015), "Adam", ICLR, arXiv 1412.6980, algorithm 1; ``square_avg`` is RMSprop's, uncorrected.
    """
    epsilon = group.get("eps")
    if not isinstance(epsilon, (int, float)) or epsilon <= 0.0:
        return None
    square = state.get("exp_avg_sq")
    if not isinstance(square, torch.Tensor):
        square = state.get("square_avg")
        return (square, 1.0, float(epsilon)) if isinstance(square, torch.Tensor) else None
    beta, step = group.get("betas", (0.0, 1.0))[1], state.get("step")
    if isinstance(step, torch.Tensor) and step.device.type != "cpu":
        return square, 1.0 / (1.0 - beta**step), float(epsilon)
    taken = float(step) if step is not None else math.inf
    if not isinstance(beta, float) or taken < 1.0:
        return None
    return square, 1.0 / max(1.0 - beta**taken, 1e-12), float(epsilon)


def queue_moments(readback: Readback, moments: Sequence[Moment]) -> list[Counts]:
    """Queue, by tensor: sum of v, entries that eps limits, live entries, sum of (g / max(root of v, eps))^2.

    Live entries have a second moment above 0: rows of an embedding that no batch has used, dead units and branches that
    start at zero say nothing about eps.

    Args:
        readback: Where the numbers wait.
        moments: Samples of the same entries of gradient and second moment, of any device.
    """
    alike: dict[tuple[torch.device, float, float | int], list[Moment]] = {}
    for moment in moments:
        factor = moment.correction if isinstance(moment.correction, float) else moment.row
        alike.setdefault((moment.square.device, moment.epsilon, factor), []).append(moment)
    queued = []
    for (_, epsilon, _), members in alike.items():
        sizes = [m.square.numel() for m in members]
        square = torch.cat([m.square.float() for m in members]) * members[0].correction
        root = square.sqrt()
        live = (root > 0.0).float()
        scaled = torch.cat([m.gradient for m in members]) * live / root.clamp_min(epsilon)
        limited = live * (root < _LIMITED * epsilon)
        sums = stretch_sums(torch.stack((square, limited, live, scaled.square())), sizes)
        queued.append(Counts(rows=[m.row for m in members], sizes=sizes, handle=readback.put_vector(sums)))
    return queued


def queue_float16(
    readback: Readback, rows: list[int], sizes: list[int], gradients: Tensor, factor: Tensor | None
) -> Counts:
    """Queue, by tensor: entries that float16 does not have, normal ones, nearly lost ones, and ones other than zero.

    Args:
        readback: Where the numbers wait.
        rows: Rows of the tensors.
        sizes: Sampled entries of each.
        gradients: All samples in one, float32, shape ``[sum of sizes]``.
        factor: By what a loss scaler has already divided them, ``None`` for nothing.
    """
    steps = gradients * _EDGE if factor is None else gradients * (factor.float() * _EDGE)
    size = steps.abs()
    masks = (steps != steps.round(), size > _NORMAL, size < _LOST, steps != 0.0)
    return Counts(rows=rows, sizes=sizes, handle=readback.put_vector(stretch_sums(torch.stack(masks), sizes)))


def underflow_fraction(readback: Readback, counts: Counts, position: int) -> float:
    """Return the share of nearly lost entries of one tensor, NaN where float16 did not make it or it is all zero.

    Args:
        readback: The fetched numbers.
        counts: What :func:`queue_float16` queued.
        position: Which of its rows.
    """
    foreign, normal, lost, live = (counts.value(readback, position, kind) for kind in range(4))
    if foreign > 0.0 or live < _FEWEST or not math.isfinite(normal):
        return math.nan
    return 0.0 if normal > 0.0 else lost / counts.sizes[position]


def stretch_sums(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the sums of each row of ``values`` over consecutive stretches, flat, row by row.

    Args:
        values: Numbers or flags, shape ``[rows, sum of sizes]``; flags are counted in int64.
        sizes: Length of each stretch.
    """
    columns = values.split(sizes, dim=1)
    return torch.stack([column.sum(dim=1) for column in columns], dim=1).reshape(-1)
