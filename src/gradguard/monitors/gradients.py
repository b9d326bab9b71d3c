"""Gradients, weights and updates of the parameters, read around an optimizer step.

Parameters are found anew at every observation, by identity: they may have been frozen, unfrozen, replaced or tied
since. Reading changes nothing; gradients keep every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradguard.monitors._describe import clean_name
from gradguard.monitors._direction import GradientDirection
from gradguard.monitors._moments import (
    Counts,
    Moment,
    queue_float16,
    queue_moments,
    second_moment,
    stretch_sums,
    underflow_fraction,
)
from gradguard.monitors._reduce import Handle, Norm, Readback, dense, queue_norms, subsample
from gradguard.monitors._samples import Samples
from gradguard.records import PARAMETER_STATISTICS, FloatArray, ParameterTable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GradientMonitor", "NamedParameter", "find_parameters", "total_norm"]


_OWN = (
    "grad_norm",
    "grad_max_abs",
    "update_ratio",
    "moved_fraction",
    "underflow_fraction",
    "second_moment_rms",
    "epsilon_fraction",
    "update_rms",
)
"""What is said of a parameter only by steps of its own optimizer."""


@dataclass(frozen=True, slots=True, eq=False)
class NamedParameter:
    """A parameter with its names and the module that owns it."""

    name: str
    parameter: nn.Parameter
    aliases: tuple[str, ...]
    layer: str


def find_parameters(model: nn.Module) -> list[NamedParameter]:
    """Return every parameter of a model once, under its first name; tied names are aliases.

    Args:
        model: Any module. Names are cleaned of the prefixes of compile, Fabric, FSDP and DataParallel-like wrappers.
    """
    unwrap = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    names: dict[int, list[str]] = {}
    found: dict[int, nn.Parameter] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.UninitializedParameter):
            continue
        names.setdefault(id(parameter), []).append(clean_name(raw, unwrap=unwrap))
        found[id(parameter)] = parameter
    return [
        NamedParameter(first, found[key], tuple(rest), first.rpartition(".")[0])
        for key, (first, *rest) in names.items()
    ]


class GradientMonitor:
    """Norms of gradients and weights, and the ratio of update to weight, for every parameter."""

    name = "gradients"

    def __init__(self, model: nn.Module, *, sample_size: int = 4096) -> None:
        """Prepare for a model; nothing is read before :meth:`read`.

        Args:
            model: The model to observe.
            sample_size: Entries per parameter from which the update is measured.
        """
        self._model = model
        self._sample_size = sample_size
        self._parameters: list[NamedParameter] = []
        self._gradients: dict[int, Norm] = {}
        self._weights: dict[int, Norm] = {}
        self._samples: list[Samples] = []
        self._updates: list[tuple[list[int], Handle, Handle]] = []
        self._moments: list[Counts] = []
        self._float16: list[Counts] = []
        self._facts: list[tuple[float, float, float, float, float]] = []
        self._lr_handles: dict[int, Handle] = {}
        self._lost: dict[int, Handle] = {}
        self._direction = GradientDirection()
        self.arrived = 0
        self.unreadable: tuple[str, ...] = ()
        self.table = ParameterTable()

    def read(
        self,
        readback: Readback,
        *,
        gradient_of: Callable[[nn.Parameter], Tensor | None],
        groups: Mapping[int, Mapping[str, Any]] | None,
        sample: bool = True,
        state_of: Callable[[nn.Parameter], Mapping[str, Any]] | None = None,
        divided_by: Tensor | None = None,
        lost: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Queue everything that must be read before the optimizer changes the parameters.

        Args:
            readback: Where the numbers wait.
            gradient_of: Returns the accumulated gradient of a parameter, or ``None``.
            groups: Parameter group by ``id(parameter)`` over all watched optimizers; ``None`` where none is watched.
            sample: Whether to keep samples for :meth:`read_update`.
            state_of: Returns the optimizer's state of a parameter, empty for none.
            divided_by: Scale of the loss by which the gradients have already been divided, ``None`` for none.
            lost: Share of entries that float16 rounded to zero, 0-d, by ``id(parameter)``, where the caller knows it.
        """
        self._parameters = find_parameters(self._model)
        self._build_table()
        gradients = [gradient_of(p.parameter) for p in self._parameters]
        self.arrived = sum(g is not None for g in gradients)
        self._gradients = _queue_rows(readback, gradients)
        self._weights = _queue_rows(readback, [p.parameter.detach() for p in self._parameters])
        self.unreadable = tuple(
            p.name
            for row, p in enumerate(self._parameters)
            if gradients[row] is not None and row not in self._gradients
        )
        self._note_facts(readback, gradients, groups)
        self._samples = list(self._take_samples(gradients)) if sample else []
        self._updates = []
        self._float16 = [
            queue_float16(readback, samples.rows, samples.sizes, samples.gradients, divided_by)
            for samples in self._samples
        ]
        self._lost = {
            row: readback.put(lost[id(p.parameter)])
            for row, p in enumerate(self._parameters)
            if lost is not None and id(p.parameter) in lost
        }
        self._moments = queue_moments(readback, list(self._take_moments(groups, state_of))) if state_of else []

    def _note_facts(
        self, readback: Readback, gradients: list[Tensor | None], groups: Mapping[int, Mapping[str, Any]] | None
    ) -> None:
        """Note what is known of each parameter without its values; rates that are tensors are queued."""
        self._facts, self._lr_handles = [], {}
        for row, (named, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            key = id(named.parameter)
            trainable = named.parameter.requires_grad
            in_optimizer = groups is None or key in groups
            lr = math.nan if groups is None or key not in groups else groups[key].get("lr", math.nan)
            if isinstance(lr, torch.Tensor):
                self._lr_handles[row] = readback.put(lr.detach().reshape(()))
                lr = math.nan
            self._facts.append(
                (
                    float(trainable),
                    float(in_optimizer),
                    float(lr),
                    float(trainable and gradient is None),
                    _rounding_unit(named.parameter),
                )
            )

    def read_update(self, readback: Readback, *, index: int = 0, step: int = 0) -> None:
        """Queue how far the sampled entries moved, and where their gradients pointed; call after the optimizer step.

        Args:
            readback: Where the numbers wait.
            index: The optimizer that stepped.
            step: Its step, from 0.
        """
        self._direction.read(readback, self._samples, index=index, step=step)
        for samples in self._samples:
            pieces = [_sample_of(p, self._sample_size) for p in samples.parameters]
            if any(piece is None or piece.numel() != size for piece, size in zip(pieces, samples.sizes, strict=True)):
                continue
            after = torch.cat([piece.float() for piece in pieces if piece is not None])
            change = after - samples.before
            live = samples.gradients != 0
            moved = (change != 0) & live
            columns = [*change.split(samples.sizes), *samples.before.split(samples.sizes)]
            norms = readback.put_vector(torch.stack(torch._foreach_norm(columns)))
            counts = readback.put_vector(stretch_sums(torch.stack((moved, live)), samples.sizes))
            self._updates.append((samples.rows, norms, counts))

    def forgo_update(self) -> None:
        """Leave the update of this step out, as where none was made on purpose."""
        self._samples = []

    def columns(
        self, readback: Readback, *, scale: float, mine: FloatArray, others: FloatArray
    ) -> dict[str, FloatArray]:
        """Return one array of shape ``[parameters]`` per parameter statistic; call after the transfer.

        Args:
            readback: The fetched numbers.
            scale: Factor by which a loss scaler has multiplied the gradients, 1 where they are unscaled.
            mine: 1 where the optimizer of this step holds the parameter, shape ``[parameters]``; see :meth:`held_by`.
            others: 1 where only another watched optimizer holds it: its gradient is not this step's and is left out.
        """
        count = len(self.table)
        columns = {name: np.full(count, math.nan) for name in PARAMETER_STATISTICS}
        for norms, names, factor in (
            (self._gradients, ("grad_norm", "grad_max_abs"), 1.0 / scale),
            (self._weights, ("weight_norm", "weight_max_abs"), 1.0),
        ):
            for row, norm in norms.items():
                l2, largest = norm.resolve(readback)
                columns[names[0]][row], columns[names[1]][row] = l2 * factor, largest * factor
        for rows, sizes, counts in self._updates:
            for offset, row in enumerate(rows):
                update, weight = (readback.value(sizes, offset + k * len(rows)) for k in range(2))
                stirred, live = (readback.value(counts, offset + k * len(rows)) for k in range(2))
                columns["update_ratio"][row] = update / weight if weight > 0.0 else math.nan
                columns["moved_fraction"][row] = stirred / live if live > 0.0 else math.nan
        self._add_precision(readback, columns, scale)
        facts = ("trainable", "in_optimizer", "lr", "absent", "rounding_unit")
        for name, column in zip(facts, zip(*self._facts, strict=True), strict=True):
            columns[name][:] = column
        columns["absent"] *= mine
        for name in _OWN:
            columns[name][others > 0] = math.nan
        for row, handle in self._lr_handles.items():
            columns["lr"][row] = readback.value(handle)
        return columns

    def scalars(self, readback: Readback, *, mine: FloatArray) -> dict[str, float]:
        """Return how far the gradient has kept its direction, unknown numbers left out; call once, after the transfer.

        Args:
            readback: The fetched numbers.
            mine: 1 where the optimizer of this step holds the parameter, shape ``[parameters]``.
        """
        return self._direction.scalars(readback, mine)

    def held_by(self, ids: Collection[int] | None) -> FloatArray:
        """Return 1 for each parameter among ``ids``, else 0, shape ``[parameters]``; ``None`` means all."""
        held = [float(ids is None or id(named.parameter) in ids) for named in self._parameters]
        return np.array(held, dtype=np.float64)

    def _add_precision(self, readback: Readback, columns: dict[str, FloatArray], scale: float) -> None:
        """Fill in what the samples say of float16 and of the optimizer's second moment."""
        for counts in self._float16:
            for position, row in enumerate(counts.rows):
                if self._parameters[row].parameter.dtype != torch.bfloat16:
                    columns["underflow_fraction"][row] = underflow_fraction(readback, counts, position)
        for row, handle in self._lost.items():
            columns["underflow_fraction"][row] = readback.value(handle)
        for counts in self._moments:
            for position, (row, size) in enumerate(zip(counts.rows, counts.sizes, strict=True)):
                square, limited, live, ratio = (counts.value(readback, position, kind) for kind in range(4))
                columns["second_moment_rms"][row] = math.sqrt(square / size) if size else math.nan
                columns["epsilon_fraction"][row] = limited / live if live > 0.0 else math.nan
                columns["update_rms"][row] = math.sqrt(ratio / live) / scale if live > 0.0 else math.nan

    def close(self) -> None:
        """Let go of samples and parameters."""
        self._samples = []
        self._direction.close()
        self._parameters = []

    def _build_table(self) -> None:
        names = tuple(p.name for p in self._parameters)
        sizes = tuple(p.parameter.numel() for p in self._parameters)
        if names == self.table.names and sizes == self.table.sizes:
            return
        self.table = ParameterTable(
            names=names,
            aliases=tuple(p.aliases for p in self._parameters),
            layers=tuple(p.layer for p in self._parameters),
            sizes=sizes,
            dims=tuple(p.parameter.ndim for p in self._parameters),
            outputs=tuple(p.parameter.shape[0] if p.parameter.ndim else 0 for p in self._parameters),
        )

    def _take_samples(self, gradients: list[Tensor | None]) -> Iterator[Samples]:
        groups: dict[torch.device, list[tuple[int, nn.Parameter, Tensor, Tensor]]] = {}
        for row, (named, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if gradient is None or not named.parameter.requires_grad:
                continue
            weight = _sample_of(named.parameter, self._sample_size)
            slope = _sample_of(gradient, self._sample_size)
            if weight is None:
                continue
            if slope is None or slope.numel() != weight.numel() or gradient.stride() != named.parameter.stride():
                slope = torch.zeros_like(weight)
            groups.setdefault(weight.device, []).append((row, named.parameter, weight, slope))
        for items in groups.values():
            yield Samples(
                rows=[row for row, *_ in items],
                sizes=[weight.numel() for _, _, weight, _ in items],
                parameters=[parameter for _, parameter, _, _ in items],
                before=torch.cat([weight.float() for _, _, weight, _ in items]),
                gradients=torch.cat([slope.float() for _, _, _, slope in items]),
            )

    def _take_moments(
        self, groups: Mapping[int, Mapping[str, Any]] | None, state_of: Callable[[nn.Parameter], Mapping[str, Any]]
    ) -> Iterator[Moment]:
        """Yield the second moments of the sampled entries, where the optimizer has taken a step and keeps them."""
        for samples in self._samples:
            slopes = samples.gradients.split(samples.sizes)
            for row, parameter, slope in zip(samples.rows, samples.parameters, slopes, strict=True):
                if parameter.ndim < 2:  # no rule asks about vectors, and they are half of the tensors
                    continue
                found = second_moment(state_of(parameter), (groups or {}).get(id(parameter), {}))
                if found is None or found[0].stride() != parameter.stride():
                    continue
                square = _sample_of(found[0], self._sample_size)
                if square is not None and square.numel() == slope.numel():
                    yield Moment(row, slope, square, found[1], found[2])


def total_norm(readback: Readback, gradients: list[Tensor]) -> list[Norm]:
    """Queue the norms of a list of gradients, for a total over them; unreadable ones are left out."""
    return queue_norms(readback, [values for g in gradients if (values := dense(g)) is not None])


def _queue_rows(readback: Readback, tensors: list[Tensor | None]) -> dict[int, Norm]:
    readable = [(row, values) for row, t in enumerate(tensors) if t is not None and (values := dense(t)) is not None]
    norms = queue_norms(readback, [values for _, values in readable])
    return {row: norm for (row, _), norm in zip(readable, norms, strict=True)}


def _sample_of(tensor: Tensor, entries: int) -> Tensor | None:
    if tensor.layout is not torch.strided:
        return None
    values = dense(tensor.detach())
    return None if values is None else subsample(values, entries)


def _rounding_unit(parameter: nn.Parameter) -> float:
    return torch.finfo(parameter.dtype).eps if parameter.is_floating_point() else math.nan
