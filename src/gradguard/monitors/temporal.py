"""Gradients through time: what is left of the gradient at every step of a recurrent net.

On observed steps a forward hook on ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells copies a small slice of what
goes in, and tensor hooks copy the gradient that arrives at what comes out. At the reading point, before the update, the
slice is replayed with the weights that the step used (see :mod:`gradguard.monitors._recurrence`): the user's graph,
gradients and random numbers are untouched, and no number is waited for.

Bounded: at most 4 sequences of 256 steps per module, of the first call of a step. Of a longer sequence the last 256
steps are replayed, from a state of zeros. Dropout between layers is left out.
"""

from __future__ import annotations

import math
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from gradguard.findings import Unobserved
from gradguard.monitors._captures import Call, CellCall, Cells, capture_call, capture_cell, is_single_step, step_rows
from gradguard.monitors._describe import clean_name
from gradguard.monitors._hooks import Hook, HookSet, Taps, in_backward, in_functorch
from gradguard.monitors._profiles import CURVES, MINIMUM_STEPS, Curves, TemporalNumbers, summarise
from gradguard.monitors._recurrence import Direction, Replayed, replay
from gradguard.monitors._reduce import Readback
from gradguard.monitors._targets import is_closed
from gradguard.records import TEMPORAL_STATISTICS, FloatArray, TemporalProfile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TemporalMonitor"]

_SCANS = re.compile(r"mamba|selective_?scan|rwkv|ret(?:net|ention)|linear_?attention|deltanet|hyena|[ms]lstm|s4d?$|s5$")
"""Class names, in lower case, of layers that carry a state through a scan of their own. Only for saying so."""

_MISMATCH = 0.05
"""Deviation of the replayed output, as a share of its largest entry, from which a replay is not believed. Ours: float32
kernels agree within 1e-6, bfloat16 within 0.02; a forward of someone's own does not."""

_ROUNDING = 1e-3
"""Share of the gradient at a state, in a cell's loop, below which the loss puts nothing in: float32 rounds at 1e-7.
Ours."""

_COARSE_ROUNDING = 0.05
"""The same in half precision."""

_KNOWN = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)

_Recurrent = nn.RNNBase | nn.RNNCellBase


class _Result:
    """Where the numbers of one module wait."""

    __slots__ = ("gate", "mismatch", "queued", "slope", "tolerance")

    def __init__(self, found: Replayed, readback: Readback, *, tolerance: float, mismatch: Tensor | None) -> None:
        curves = [_curves(direction) for direction in found.directions]
        self.queued = [(readback.put_vector(values.reshape(-1)), values.shape[1]) for values in curves]
        self.gate = None if found.gate is None else readback.put(found.gate)
        self.slope = None if found.slope is None else readback.put(found.slope)
        self.mismatch = None if mismatch is None else readback.put(mismatch)
        self.tolerance = tolerance

    def numbers(self, readback: Readback, scale: float) -> TemporalNumbers | None:
        if self.mismatch is not None and not readback.value(self.mismatch) <= _MISMATCH:
            return None
        directions = []
        for handle, steps in self.queued:
            flat = [readback.value(handle, offset) for offset in range(len(CURVES) * steps)]
            table = np.array(flat, dtype=np.float64).reshape(len(CURVES), steps)
            directions.append(Curves(tolerance=self.tolerance, **dict(zip(CURVES, table, strict=True))))
        return summarise(directions, scale=scale)

    def statistics(self, numbers: TemporalNumbers, readback: Readback) -> dict[str, float]:
        return {
            "temporal_span": numbers.span,
            "temporal_factor": numbers.factor,
            "temporal_horizon": numbers.horizon,
            "temporal_steps": float(numbers.steps),
            "temporal_reach": numbers.reach,
            "gate_mean": math.nan if self.gate is None else readback.value(self.gate),
            "temporal_derivative": math.nan if self.slope is None else readback.value(self.slope),
        }


class TemporalMonitor:
    """Measures the gradient through time in torch's recurrent modules.

    Attributes:
        spent_s: Seconds spent in hooks since the monitor was made.
        generation: Counts observations; hooks of earlier ones are inert.
        failed: Whether a hook or a replay failed, which switches the monitor off.
    """

    name = "temporal"

    def __init__(
        self, model: nn.Module, *, on_failure: Callable[[str, BaseException], None], any_mode: bool = False
    ) -> None:
        """Prepare for a model; no hook is set before :meth:`arm`.

        Args:
            model: The model to observe.
            on_failure: Called with a place and an exception when something of ours fails.
            any_mode: Observe in evaluation mode as well; a check before the first step wants that.
        """
        self._model = model
        self._on_failure = on_failure
        self._any_mode = any_mode
        self._taps: Taps[int] = Taps()
        self._leaves = HookSet()
        self._active = self.failed = False
        self.generation = 0
        self.spent_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget the present observation; hooks stay where they are."""
        self.generation += 1
        self._calls: dict[str, Call] = {}
        self._cells: dict[str, Cells] = {}
        self._results: dict[str, _Result] = {}
        self._paused = False
        self._leaves.close()

    def arm(self) -> None:
        """Set the forward hooks; calling twice is harmless."""
        if self.failed or self._active:
            return
        self._active = True
        self._taps.begin()
        for module, name in _targets(self._model):
            if id(module) not in self._taps:
                hook = Hook(self, TemporalMonitor._on_forward, name)
                self._taps.add(id(module), module.register_forward_hook(hook, with_kwargs=True))

    def disarm(self) -> None:
        """Remove the hooks; gradient hooks of graphs that are still alive become inert. Harmless when called twice.

        See :class:`~gradguard.monitors._hooks.Taps` for those that stay until :meth:`close`.
        """
        self._active = False
        self._leaves.close()
        self._taps.remove()
        self.generation += 1

    def close(self) -> None:
        """Remove every hook, for good, and let go of tensors."""
        self._taps.ran = False
        self.disarm()
        self.reset()

    def pause(self) -> None:
        """Let what follows in this step pass unobserved, as in further evaluations of a closure."""
        self._paused = True
        self.generation += 1

    def read(self, readback: Readback) -> None:
        """Replay what was captured with the weights as they are, and queue the numbers; before the update."""
        self._taps.ran = True
        for name in [*self._calls, *self._cells]:
            try:
                self._replay(name, readback)
            except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's loop
                self._fail(f"the replay of {name or 'the model'} for the gradient through time", error)
                break

    def columns(
        self, names: tuple[str, ...], readback: Readback, *, scale: float = 1.0
    ) -> tuple[dict[str, FloatArray], dict[str, TemporalProfile]]:
        """Return a column per statistic for the layers named, and the profiles; call after the transfer.

        Empty where nothing was measured. See :data:`gradguard.columns.TEMPORAL_STATISTICS`.

        Args:
            names: The layers of the record.
            readback: What the numbers were queued on.
            scale: Factor of a loss scaler that is still in the gradients.
        """
        columns: dict[str, FloatArray] = {}
        profiles: dict[str, TemporalProfile] = {}
        for name, result in self._results.items():
            numbers = result.numbers(readback, scale)
            if numbers is None or name not in names:
                continue
            if not columns:
                columns = {statistic: np.full(len(names), np.nan) for statistic in TEMPORAL_STATISTICS}
            for statistic, value in result.statistics(numbers, readback).items():
                columns[statistic][names.index(name)] = value
            profiles[name] = numbers.profile
        return columns, profiles

    def unobserved(self) -> list[Unobserved]:
        """Return what cannot be measured in this model."""
        notes = []
        for raw, module in self._model.named_modules():
            name = clean_name(raw) or "the model"
            if isinstance(module, _Recurrent) and parametrize.is_parametrized(module):
                notes.append(_note(name, "its weights are parametrized, and computing them again could change them"))
            elif not isinstance(module, _Recurrent) and _SCANS.search(type(module).__name__.lower()):
                notes.append(_note(name, f"{type(module).__name__} carries its state through a scan of its own"))
        return notes

    def blind(self) -> list[Unobserved]:
        """Return which modules ran in this observation and could not be followed, and why."""
        return [
            _note(name or "the model", "its state is changed between the calls, so that no two of them are linked")
            for name, cells in self._cells.items()
            if cells.calls >= MINIMUM_STEPS and len(cells.chain) < MINIMUM_STEPS and cells.calls > 2 * len(cells.chain)
        ]

    def _on_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._active or self._paused:
            return
        self._taps.fired.add(id(module))
        started = time.perf_counter()
        try:
            wanted = self._any_mode or module.training or self._model.training
            if wanted and torch.is_grad_enabled() and isinstance(module, _Recurrent) and not in_functorch():
                self._capture(name, module, args, kwargs, output)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's forward pass
            self._fail(f"the forward hook of {name or 'the model'} for the gradient through time", error)
        self.spent_s += time.perf_counter() - started

    def _capture(self, name: str, module: _Recurrent, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("input")
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        if not isinstance(given, (torch.Tensor, PackedSequence)) or not given.data.is_floating_point():
            return
        if isinstance(module, nn.RNNCellBase) or is_single_step(module, given):
            if not in_backward() and isinstance(given, torch.Tensor):
                self._capture_step(name, module, given, state, output)
            return
        if name in self._calls:
            return
        found = capture_call(module, given, state, output)
        if found is not None and found[0].inputs.shape[0] >= MINIMUM_STEPS:
            call, places = found
            self._calls[name] = call
            for place, tensor, cut in places:
                self._listen(tensor, _Arrival(self, call, place, cut))

    def _capture_step(self, name: str, module: _Recurrent, given: Tensor, state: Any, output: Any) -> None:
        found = capture_cell(module, given, state, output)
        if found is None:
            return
        call, first, hidden, listened = found
        self._cells.setdefault(name, Cells(module)).add(call, first, hidden)
        for tensor in listened:
            self._listen(tensor, _Arrival(self, call, "total", step_rows))

    def _listen(self, tensor: Tensor, hook: _Arrival) -> None:
        if tensor.requires_grad:
            handle = tensor.register_hook(hook)
            if tensor.is_leaf:
                self._leaves.add(handle)

    def take_gradient(self, hook: _Arrival, gradient: Tensor) -> None:
        """Copy the slice of a gradient that arrived."""
        started = time.perf_counter()
        try:
            hook.store(gradient)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's backward pass
            self._fail("a gradient hook for the gradient through time", error)
        self.spent_s += time.perf_counter() - started

    def _replay(self, name: str, readback: Readback) -> None:
        captured = self._calls.get(name) or self._cells[name]
        if isinstance(captured, Cells) and len(captured.chain) < MINIMUM_STEPS:
            return
        passage = captured.passage()
        if passage is None:
            return
        with torch.no_grad(), torch.autocast(passage.inputs.device.type, enabled=False):
            found = replay(passage)
            if isinstance(captured, Call):
                given, tolerance = captured.output if captured.is_exact else None, 0.0
            else:
                given = torch.stack([call.output for call in captured.chain])
                tolerance = _ROUNDING if given.dtype.itemsize >= 4 else _COARSE_ROUNDING
            mismatch = None if given is None else _deviation(found.output, given, passage.lengths)
            self._results[name] = _Result(found, readback, tolerance=tolerance, mismatch=mismatch)

    def _fail(self, place: str, error: BaseException) -> None:
        self.failed = True
        self.close()
        self._on_failure(place, error)


class _Arrival:
    """Tensor hook of one observation; inert once the observation is over."""

    __slots__ = ("_call", "_cut", "_generation", "_monitor", "_place")

    def __init__(
        self, monitor: TemporalMonitor, call: Call | CellCall, place: str, cut: Callable[[Tensor], Tensor]
    ) -> None:
        self._monitor = weakref.ref(monitor)
        self._generation = monitor.generation
        self._call, self._place, self._cut = call, place, cut

    def __call__(self, gradient: Tensor) -> None:
        monitor = self._monitor()
        if monitor is not None and monitor.generation == self._generation:
            monitor.take_gradient(self, gradient)

    def store(self, gradient: Tensor) -> None:
        """Add the slice of a gradient to what came before at this place."""
        part = self._cut(gradient)
        if isinstance(self._call, CellCall):
            self._call.total = part if self._call.total is None else self._call.total + part
        else:
            known = self._call.gradients.get(self._place)
            self._call.gradients[self._place] = part if known is None else known + part


def _note(name: str, why: str) -> Unobserved:
    return Unobserved(what=f"the gradient through time in {name}", why=f"{why}; not observed")


def _targets(model: nn.Module) -> Iterator[tuple[_Recurrent, str]]:
    """Yield the recurrent modules that can be hooked and replayed, and their names."""
    unwrap = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    skipped: set[int] = set()
    for raw, module in model.named_modules():
        if id(module) in skipped or is_closed(module):
            skipped.update(id(child) for child in module.modules())
        elif isinstance(module, _KNOWN) and not parametrize.is_parametrized(module):
            yield module, clean_name(raw, unwrap=unwrap)


def _curves(direction: Direction) -> Tensor:
    """Return a direction's curves, ``[6, steps]``, at 0, 1, 2, ... steps back from each sequence's last reading."""
    time = direction.inputs.shape[1]
    device = direction.inputs.device
    index = direction.ends - torch.arange(time, device=device)[:, None]
    valid, at = index >= 0, index.clamp(min=0)
    wide = torch.float32 if device.type == "mps" else torch.float64  # squares leave the range of float32

    def pooled(parts: tuple[Tensor, ...]) -> Tensor:
        """Return the squared norm over several tensors, per step back and sequence."""
        norms = [torch.linalg.vector_norm(part, dim=-1, dtype=wide) for part in parts]
        squares = torch.stack(norms).square().sum(0)
        return torch.where(valid, torch.take_along_dim(squares, at, 0), 0.0)

    count = valid.sum(1)
    hidden = pooled(tuple(part[0] for part in direction.hidden)).sum(1).sqrt()
    unknown = torch.full_like(hidden, math.nan)
    rows = [
        pooled((direction.injected,)).sum(1).sqrt(),
        hidden,
        pooled(tuple(part[0] for part in direction.cell)).sum(1).sqrt() if direction.cell else unknown,
        pooled((direction.inputs[0],)).sum(1).sqrt(),
        (pooled((direction.inputs[1],)).sum(1) / count.clamp(min=1)).sqrt(),
    ]
    return torch.stack([*rows, count.to(hidden.dtype)])


def _deviation(output: Tensor, given: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the largest difference as a share of the largest entry, within the sequences' lengths."""
    difference = (output - given).abs()
    if lengths is not None:
        steps = torch.arange(output.shape[0], device=output.device)[:, None, None]
        difference = difference * (steps < lengths[:, None])
    return difference.amax() / given.abs().amax().clamp(min=1e-12)
