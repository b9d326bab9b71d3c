"""The adjoint of a recurrent net: the gradient of the loss at every state of ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``.

A fused kernel gives the gradient at its output and at its input, never at the states in between. Here a small slice of
the sequence is run again with the same weights, and the chain rule is written out, without autograd: all local
derivatives of a layer at once, then one matrix product per time step backwards. The last layer's states are known from
its output; those of the layers below are computed step by step. No random number is drawn; dropout between layers is
left out.

Two gradients travel together. The first is that of the loss itself. The second starts at the last step alone at which a
sequence receives gradient, with length 1 per sequence: what the net *remembers*, undisturbed by what a loss at every
step adds on the way.

Source: the equations of ``torch.nn.RNN``, ``LSTM`` and ``GRU`` (PyTorch documentation); adjoint: Pascanu, Mikolov,
Bengio (2013), ICML, arXiv 1211.5063, equations 3 to 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradguard.monitors._states import Passage, Trace, Weights, run_layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Direction", "Replayed", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What one direction gave, in its own time: step 0 is the first it reads.

    The leading axis of the gradients is 0 for the loss itself, and 1 for its last reading alone, of length 1.

    Attributes:
        hidden: Gradient at the hidden states per layer, first layer first, each ``[2, time, batch, width]``.
        cell: Gradient at the cell states per layer, likewise; empty without cells.
        inputs: Gradient that this direction's first layer passes to the module's input, ``[2, time, batch, features]``.
        injected: What the loss itself puts in at each step, ``[time, batch, width]``.
        ends: Last step at which a sequence receives gradient, ``[batch]``; -1 where none does.
    """

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]
    inputs: Tensor
    injected: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A replayed slice.

    Attributes:
        output: Output of the last layer, each step from the module's own state before it; the module's output unless
            there is dropout, or its forward is not torch's.
        directions: Forward, and backward where there is one.
        gate: Mean forget gate (LSTM) or update gate (GRU: the share kept), 0 to 1; ``None`` for a plain RNN.
        slope: Root mean square of the activation's derivative (plain RNN), else ``None``.
    """

    output: Tensor
    directions: tuple[Direction, ...]
    gate: Tensor | None
    slope: Tensor | None


@dataclass(slots=True)
class _Adjoint:
    """Gradients of one layer, each ``[2, time, batch, ...]``.

    ``through`` is the part of the first that came from the next step, ``[time, batch, width]``, where totals are given.
    """

    hidden: Tensor
    gates: Tensor
    cell: Tensor | None = None
    through: Tensor | None = None


def replay(passage: Passage) -> Replayed:
    """Run a slice forward and its gradient backward; see :class:`Passage` and :class:`Replayed`."""
    directions = len(passage.weights[0])
    turn = _turning(passage) if directions == 2 else None
    traces: list[list[Trace]] = []
    x = passage.inputs
    for layer, row in enumerate(passage.weights):
        known = passage.output.chunk(directions, -1) if layer == len(passage.weights) - 1 else None
        traces.append([])
        for side, weights in enumerate(row):
            parts = (x, None if known is None else known[side])
            own, states = parts if side == 0 or turn is None else (turn(x), None if known is None else turn(known[1]))
            traces[-1].append(run_layer(passage, weights, own, states, layer * directions + side))
        outputs = [trace.hidden for trace in traces[-1]]
        x = outputs[0] if turn is None else torch.cat([outputs[0], turn(outputs[1])], -1)
    flat = [trace for row in traces for trace in row]
    keeps = [_mean(passage, trace.keep) for trace in flat if trace.keep is not None]
    slopes = [_mean(passage, trace.slope.square()) for trace in flat if trace.slope is not None]
    return Replayed(
        output=x,
        directions=_backward(passage, traces, turn),
        gate=torch.stack(keeps).mean() if keeps else None,
        slope=torch.stack(slopes).mean().sqrt() if slopes else None,
    )


def _mean(passage: Passage, values: Tensor) -> Tensor:
    """Return the mean of ``[time, batch, width]`` within the sequences' lengths."""
    if passage.lengths is None:
        return values.mean()
    return (values.mean(-1) * (_steps(values) < passage.lengths)).sum() / passage.lengths.sum()


class _Turn:
    """Reverses each sequence within its length, along the time axis; what lies beyond stays where it is."""

    def __init__(self, index: Tensor) -> None:
        self._index = index
        self._batch = torch.arange(index.shape[1], device=index.device)

    def __call__(self, values: Tensor) -> Tensor:
        return values[..., self._index, self._batch, :]


def _turning(passage: Passage) -> _Turn:
    steps = _steps(passage.inputs)
    turned = _last(passage) - steps
    return _Turn(torch.where(turned >= 0, turned, steps.expand_as(turned)))


def _steps(inputs: Tensor) -> Tensor:
    return torch.arange(inputs.shape[0], device=inputs.device)[:, None]


def _last(passage: Passage) -> Tensor:
    """Return the last step of each sequence, ``[batch]``."""
    time, batch = passage.inputs.shape[:2]
    if passage.lengths is None:
        return torch.full((batch,), time - 1, device=passage.inputs.device)
    return passage.lengths - 1


def _backward(passage: Passage, traces: list[list[Trace]], turn: _Turn | None) -> tuple[Direction, ...]:
    sides = len(traces[0])
    injected, at_cell, ends = _readings(passage, traces[-1], turn)
    scale = _end_length(injected, ends)
    both = _both(injected, ends, scale)
    hidden: list[list[Tensor]] = [[] for _ in range(sides)]
    cells: list[list[Tensor]] = [[] for _ in range(sides)]
    passed: list[Tensor] = []
    for layer in range(len(traces) - 1, -1, -1):
        if layer < len(traces) - 1:
            both = _handed_down(passage, passed, layer, scale, turn)
        passed = []
        for side in range(sides):
            weights, trace = passage.weights[layer][side], traces[layer][side]
            given = at_cell[layer][side]
            pair = None if given is None else torch.stack([given, given / scale])
            found = _adjoint(weights, trace, both[side], pair, totals=passage.totals)
            hidden[side].insert(0, found.hidden)
            if found.cell is not None:
                cells[side].insert(0, found.cell)
            passed.append(found.gates @ weights.ih)
            if found.through is not None:
                injected[side] = found.hidden[0] - found.through
    return tuple(
        Direction(
            hidden=tuple(hidden[side]),
            cell=tuple(cells[side]),
            inputs=passed[side],
            injected=injected[side],
            ends=ends[side],
        )
        for side in range(sides)
    )


def _readings(
    passage: Passage, top: list[Trace], turn: _Turn | None
) -> tuple[list[Tensor], list[list[Tensor | None]], list[Tensor]]:
    """Return, in each direction's own time, the gradient put into the top layer, into all cells, and the last steps."""
    sides, layers = len(top), len(passage.weights)
    steps, last = _steps(passage.inputs), _last(passage)
    at_last = (steps == last)[..., None].to(passage.inputs.dtype)
    injected, ends = [], []
    at_cell: list[list[Tensor | None]] = [[None] * sides for _ in range(layers)]
    if passage.cell_gradient is not None:
        for index, gradient in enumerate(passage.cell_gradient):
            at_cell[index // sides][index % sides] = gradient * at_last
    for side, trace in enumerate(top):
        own = torch.zeros_like(trace.hidden)
        if passage.output_gradient is not None:
            given = passage.output_gradient.chunk(sides, -1)[side]
            own = own + (given if side == 0 or turn is None else turn(given))
        if passage.hidden_gradient is not None:
            own = own + passage.hidden_gradient[(layers - 1) * sides + side] * at_last
        arrives = (own != 0).any(-1)
        in_cell = at_cell[-1][side]
        if in_cell is not None:
            arrives = arrives | (in_cell != 0).any(-1)
        injected.append(own)
        ends.append(torch.where(arrives, steps.expand_as(arrives), -1).amax(0))
    return injected, at_cell, ends


def _end_length(injected: list[Tensor], ends: list[Tensor]) -> Tensor:
    """Return the length of what the last reading of a sequence puts in, over both directions, ``[batch, 1]``."""
    batch = torch.arange(injected[0].shape[1], device=injected[0].device)
    squares = [
        torch.where((end >= 0)[:, None], own[end.clamp(min=0), batch], 0).square().sum(-1)
        for own, end in zip(injected, ends, strict=True)
    ]
    length = torch.stack(squares).sum(0).sqrt()
    return torch.where(length > 0, length, 1.0)[:, None]


def _both(injected: list[Tensor], ends: list[Tensor], scale: Tensor) -> list[Tensor]:
    steps = torch.arange(injected[0].shape[0], device=injected[0].device)[:, None]
    return [
        torch.stack([own, own * (steps == end)[..., None] / scale]) for own, end in zip(injected, ends, strict=True)
    ]


def _handed_down(passage: Passage, passed: list[Tensor], layer: int, scale: Tensor, turn: _Turn | None) -> list[Tensor]:
    """Return what the layer above, and the last states of this one, put into a lower layer."""
    total = passed[0] if turn is None else passed[0] + turn(passed[1])
    sides = len(passed)
    parts = total.chunk(sides, -1)
    given = [parts[0]] if turn is None else [parts[0], turn(parts[1])]
    if passage.hidden_gradient is not None:
        at_last = (_steps(passage.inputs) == _last(passage))[..., None]
        for side in range(sides):
            own = passage.hidden_gradient[layer * sides + side] * at_last
            given[side] = given[side] + torch.stack([own, own / scale])
    return given


def _adjoint(weights: Weights, trace: Trace, given: Tensor, at_cell: Tensor | None, *, totals: bool) -> _Adjoint:
    arrives, local = given.unbind(1), trace.local.unbind()
    keep, to_cell, to_product = (
        part.unbind() if part is not None else () for part in (trace.keep, trace.to_cell, trace.gates)
    )
    through = torch.zeros_like(arrives[0])
    cell = through.new_zeros(*through.shape[:2], to_cell[0].shape[-1]) if to_cell else through
    hidden, cells, gates, arrived = [], [], [], []
    for t in range(given.shape[1] - 1, -1, -1):
        if totals:
            arrived.append(through[0])
            state = torch.stack([arrives[t][0], through[1] + arrives[t][1]])
        else:
            state = through + arrives[t]
        hidden.append(state)
        inner = state if weights.hr is None else state @ weights.hr
        if to_cell:
            cell = torch.addcmul(cell, inner, to_cell[t])
            cell = cell if at_cell is None else cell + at_cell[:, t]
            cells.append(cell)
            gate = torch.cat([cell, cell, cell, inner], -1) * local[t]
            through = gate @ weights.hh
            cell = cell * keep[t]
        elif to_product:
            gate = torch.cat([inner, inner, inner], -1) * local[t]
            through = torch.addcmul((gate * to_product[t]) @ weights.hh, inner, keep[t])
        else:
            gate = inner * local[t]
            through = gate @ weights.hh
        gates.append(gate)
    return _Adjoint(
        hidden=_in_order(hidden),
        gates=_in_order(gates),
        cell=_in_order(cells) if cells else None,
        through=torch.stack(arrived[::-1]) if totals else None,
    )


def _in_order(backwards: list[Tensor]) -> Tensor:
    return torch.stack(backwards[::-1], 1)
