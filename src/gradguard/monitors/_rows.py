"""What the signal monitor gathers per module during one observation, and how it becomes numbers."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch

from gradguard.monitors._reduce import Handle, Norm, Readback, queue_norm
from gradguard.records import LAYER_STATISTICS, FloatArray, LayerTable

if TYPE_CHECKING:
    from torch import Tensor

    from gradguard.monitors._derivatives import ActivationInfo
    from gradguard.monitors._describe import ModuleInfo

__all__ = [
    "GradientHook",
    "HeadReadings",
    "KnownTensors",
    "Row",
    "Slot",
    "Streaks",
    "Units",
    "layer_columns",
    "unit_reduce",
]

_SATURATED = 0.05
"""Share of the largest derivative below which a unit is saturated. Ours: |x| > 2.2 for tanh, 4.4 for sigmoid."""

_MINIMUM_LOOKS = 3
"""Observations needed before an inactive unit may be called dead. Ours: two looks may be two unlucky batches."""


@dataclass(slots=True, eq=False)
class Slot:
    """A place at which gradients arrive: the norms of those that did."""

    norms: list[Norm] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HeadReadings:
    """Where entropy per head and largest logit of one call of attention wait."""

    entropy: Handle
    heads: int
    logit_max: Handle


@dataclass(slots=True, eq=False)
class Units:
    """Largest activity of each unit over the calls of one observation, on the device."""

    peak: Tensor | None = None

    def add(self, activity: Tensor) -> None:
        """Merge the activity of one call, shape ``[units]``; a change of width starts afresh."""
        if self.peak is None or self.peak.shape != activity.shape:
            self.peak = activity
        else:
            self.peak = torch.maximum(self.peak, activity)


class Streaks:
    """For how long each unit of each layer has been inactive, across observations, as one vector on the device."""

    def __init__(self) -> None:
        self._keys: list[tuple[str, int]] = []
        self._looks = torch.zeros(0)
        self._since = torch.zeros(0)

    def add(self, peaks: dict[str, Tensor], step: int, patience: int) -> tuple[Tensor, Tensor]:
        """Take the units' activity in one observation in.

        Args:
            peaks: Largest activity per unit and layer, each of shape ``[units]``, all on one device.
            step: Optimizer step of the observation.
            patience: Optimizer steps for which a unit must have been inactive to be dead.

        Returns:
            Numbers of inactive and of dead units per layer, each of shape ``[layers]``.
        """
        keys = [(name, peak.numel()) for name, peak in peaks.items()]
        inactive = torch.cat(list(peaks.values())) <= 0
        if keys != self._keys or self._looks.device != inactive.device:
            self._rearrange(keys, inactive.device)
        self._since = torch.where(inactive & (self._looks > 0), self._since, float(step))
        self._looks = torch.where(inactive, self._looks + 1, 0.0)
        dead = (self._looks >= _MINIMUM_LOOKS) & (step - self._since >= patience)
        ends = torch.tensor(list(itertools.accumulate(size for _, size in keys)), device=inactive.device) - 1
        return _sums_between(inactive, ends), _sums_between(dead, ends)

    def _rearrange(self, keys: list[tuple[str, int]], device: torch.device) -> None:
        """Carry over what is known of the layers that are still there, in their new order."""
        sizes = [size for _, size in self._keys]
        old = dict(zip(self._keys, zip(self._looks.split(sizes), self._since.split(sizes), strict=True), strict=True))
        parts = [old.get(key, (torch.zeros(key[1]), torch.zeros(key[1]))) for key in keys]
        self._looks = torch.cat([looks.to(device) for looks, _ in parts])
        self._since = torch.cat([since.to(device) for _, since in parts])
        self._keys = keys


def _sums_between(flags: Tensor, ends: Tensor) -> Tensor:
    """Return the number of set flags in each stretch, given the stretches' last positions."""
    totals = flags.cumsum(0)[ends]
    return torch.diff(totals, prepend=totals.new_zeros(1))


@dataclass(slots=True, eq=False)
class Row:
    """One module during one observation; its calls are pooled."""

    name: str
    type: str
    info: ModuleInfo
    bound: float = math.nan
    calls: int = 0
    placeholders: int = 0
    forward: list[Norm] = field(default_factory=list)
    inputs: list[Norm] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    input_slots: list[Slot] = field(default_factory=list)
    nonzeros: list[tuple[Handle, int]] = field(default_factory=list)
    is_step: bool = False
    units: Units = field(default_factory=Units)
    input_units: Units = field(default_factory=Units)
    derivatives: list[Norm] = field(default_factory=list)
    saturated: list[tuple[Handle, int]] = field(default_factory=list)
    input_slopes: list[Norm] = field(default_factory=list)
    input_saturated: list[tuple[Handle, int]] = field(default_factory=list)
    counts: dict[str, tuple[Handle, int]] = field(default_factory=dict)
    block: str = ""
    entering: list[Slot] = field(default_factory=list)
    heads: list[HeadReadings] = field(default_factory=list)

    def add_function(self, readback: Readback, output: Tensor, info: ActivationInfo, axis: int) -> None:
        """Take in what a bounded activation gave that code calls as a function to make this module's input."""
        slope = info.derivative(None, output, output).float() / info.bound
        self.input_slopes.append(queue_norm(readback, slope))
        counted = saturated_units(slope, axis, 1.0)
        if counted is not None:
            self.input_saturated.append((readback.put(counted[0]), counted[1]))

    def statistics(self, readback: Readback) -> dict[str, float]:
        """Return every layer statistic of the row that is known; call after the transfer."""
        delta, delta_max = _pool([n for slot in self.outputs for n in slot.norms], readback)
        input_delta, input_delta_max = _pool([n for slot in self.input_slots for n in slot.norms], readback)
        block_delta, block_delta_max = _pool([n for slot in self.entering for n in slot.norms], readback)
        forward, forward_max = _pool(self.forward, readback)
        entries = sum([n.numel for n in self.forward])
        numbers = {
            "delta_norm": delta,
            "delta_max_abs": delta_max,
            "input_delta_norm": input_delta,
            "input_delta_max_abs": input_delta_max,
            "block_delta_norm": block_delta,
            "block_delta_max_abs": block_delta_max,
            "forward_rms": forward / math.sqrt(entries) if entries else math.nan,
            "forward_max_abs": forward_max,
            "input_max_abs": _pool(self.inputs, readback)[1],
            "calls": float(self.calls),
            "gradient_calls": float(sum([bool(slot.norms) for slot in self.outputs])),
        }
        if self.nonzeros:
            nonzero = _share(self.nonzeros, readback)
            numbers["zero_fraction"] = 1.0 - nonzero
            if self.is_step:
                numbers["derivative_mean"] = math.sqrt(nonzero)
        if self.derivatives:
            numbers["derivative_mean"] = _mean_square_root(self.derivatives, readback)
        if self.saturated:
            numbers["saturated_fraction"] = _share(self.saturated, readback)
        if self.input_slopes:
            numbers["input_derivative_share"] = _mean_square_root(self.input_slopes, readback)
        if self.input_saturated:
            numbers["input_saturated_share"] = _share(self.input_saturated, readback)
        for name, count in self.counts.items():
            numbers[name] = _share([count], readback)
        return numbers | _attention(self.heads, readback)


def _mean_square_root(norms: list[Norm], readback: Readback) -> float:
    return _pool(norms, readback)[0] / math.sqrt(sum([norm.numel for norm in norms]))


_T = TypeVar("_T")


class KnownTensors(Generic[_T]):
    """What is known of tensors seen during one observation, so that a tensor passed on is measured once.

    A tensor is the same only as the same Python object at the same version: an in-place operation makes a new one.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, _T]] = {}

    def add(self, tensor: Tensor, value: _T) -> None:
        """Remember a tensor at its present version."""
        self._seen[id(tensor)] = (weakref.ref(tensor), tensor._version, value)

    def find(self, tensor: Tensor, *, any_version: bool = False) -> _T | None:
        """Return what is known of a tensor seen before, else ``None``."""
        entry = self._seen.get(id(tensor))
        if entry is None or entry[0]() is not tensor or not (any_version or entry[1] == tensor._version):
            return None
        return entry[2]


class _Listening(Protocol):
    """A monitor that takes gradients in."""

    generation: int

    def take_gradient(self, slot: Slot, gradient: Tensor) -> None: ...


class GradientHook:
    """Tensor hook of one observation; inert once the observation is over."""

    __slots__ = ("_generation", "_monitor", "_slot")

    def __init__(self, monitor: _Listening, slot: Slot, generation: int) -> None:
        """Remember where a gradient goes; the monitor is not kept alive by it."""
        self._monitor = weakref.ref(monitor)
        self._slot = slot
        self._generation = generation

    def __call__(self, gradient: Tensor) -> None:
        """Hand the gradient to the monitor."""
        monitor = self._monitor()
        if monitor is not None and monitor.generation == self._generation:
            monitor.take_gradient(self._slot, gradient)


def unit_reduce(tensor: Tensor, axis: int, *, signed: bool) -> Tensor | None:
    """Return the largest activity per unit, shape ``[units]``; ``None`` for a tensor without a batch.

    Args:
        tensor: Output or input of a layer.
        axis: Axis along which the units lie.
        signed: Whether negative entries count as activity as well.
    """
    axis = axis % tensor.ndim if tensor.ndim else 0
    others = [d for d in range(tensor.ndim) if d != axis]
    if not others or tensor.numel() == 0:
        return None
    high = tensor.amax(dim=others)
    return torch.maximum(high, -tensor.amin(dim=others)) if signed else high


def saturated_units(derivative: Tensor, axis: int, bound: float) -> tuple[Tensor, int] | None:
    """Return how many units have a small mean derivative (0-d), and how many units there are."""
    axis = axis % derivative.ndim
    others = [d for d in range(derivative.ndim) if d != axis]
    if not others:
        return None
    return (derivative.mean(dim=others) < _SATURATED * bound).sum(), derivative.shape[axis]


def layer_columns(rows: list[Row], readback: Readback) -> tuple[LayerTable, dict[str, FloatArray]]:
    """Turn rows into a table and one array of shape ``[rows]`` per layer statistic; call after the transfer."""
    table = LayerTable(
        names=tuple(row.name for row in rows),
        types=tuple(row.type for row in rows),
        kinds=tuple(row.info.kind for row in rows),
        roles=tuple(row.info.role for row in rows),
        derivative_bounds=tuple(row.bound for row in rows),
        blocks=tuple(row.block for row in rows),
    )
    values = [row.statistics(readback) for row in rows]
    columns = {
        name: np.array([numbers.get(name, math.nan) for numbers in values], dtype=np.float64)
        for name in LAYER_STATISTICS
    }
    return table, columns


def _pool(norms: list[Norm], readback: Readback) -> tuple[float, float]:
    """Return the L2 norm and the largest absolute entry over all tensors; NaN for none, see :meth:`Norm.resolve`."""
    if not norms:
        return math.nan, math.nan
    if len(norms) == 1:
        return norms[0].resolve(readback)
    pairs = [norm.resolve(readback) for norm in norms]
    largest = math.nan if any(math.isnan(m) for _, m in pairs) else max(m for _, m in pairs)
    return math.hypot(*(l2 for l2, _ in pairs)), largest


def _attention(heads: list[HeadReadings], readback: Readback) -> dict[str, float]:
    """Pool the calls: entropies by their mean per head, over calls of as many heads, logits by their largest."""
    if not heads:
        return {}
    calls = [
        np.array([readback.value(call.entropy, head) for head in range(call.heads)])
        for call in heads
        if call.heads == heads[0].heads
    ]
    entropy = np.mean(calls, axis=0)
    known = entropy[~np.isnan(entropy)]
    return {
        "attention_entropy": float(known.mean()) if known.size else math.nan,
        "attention_entropy_min": float(known.min()) if known.size else math.nan,
        "attention_logit_max": float(np.max([readback.value(call.logit_max) for call in heads])),
    }


def _share(counts: list[tuple[Handle, int]], readback: Readback) -> float:
    total = sum(size for _, size in counts)
    return sum(readback.value(handle) for handle, _ in counts) / total if total else math.nan
