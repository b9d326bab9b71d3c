"""The adjoint of a recurrent net: the gradient of the loss at every state of ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``.

A fused kernel gives the gradient at its output and at its input, never at the states in between. Here a small slice of
the sequence is run again with the same weights, and the chain rule is written out, without autograd: the forward states
first, then all local derivatives of a layer at once, then one matrix product per time step backwards. No random number
is drawn; dropout between layers is left out.

Two gradients travel together. The first is that of the loss itself. The second starts at the last step alone at which a
sequence receives gradient, with length 1 per sequence: what the net *remembers*, undisturbed by what a loss at every
step adds on the way.

Source: the equations of ``torch.nn.RNN``, ``LSTM`` and ``GRU`` (PyTorch documentation); adjoint: Pascanu, Mikolov,
Bengio (2013), ICML, arXiv 1211.5063, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Direction", "Kind", "Passage", "Replayed", "Weights", "replay"]

Kind = Literal["RNN_TANH", "RNN_RELU", "LSTM", "GRU"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of one layer in one direction, in torch's layout; biases and projection may be absent."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A slice of a call, time first.

    Attributes:
        kind: What the module computes.
        weights: Per layer, per direction.
        inputs: Shape ``[time, batch, features]``.
        lengths: Steps of each sequence, shape ``[batch]``, on the inputs' device; ``None`` where all are whole.
        hidden: First hidden states, shape ``[layers * directions, batch, width]``; ``None`` for zeros.
        cell: First cell states of an LSTM, likewise.
        output_gradient: Gradient at the output, shape ``[time, batch, directions * width]``; ``None`` for zeros.
        hidden_gradient: Gradient at the last hidden states, shaped like ``hidden``; ``None`` for zeros.
        cell_gradient: Gradient at the last cell states, shaped like ``cell``; ``None`` for zeros.
        totals: Whether ``output_gradient`` holds the whole gradient at every state, as a cell called in a loop shows
            it, and not what the loss puts in at that step.
    """

    kind: Kind
    weights: Sequence[Sequence[Weights]]
    inputs: Tensor
    lengths: Tensor | None = None
    hidden: Tensor | None = None
    cell: Tensor | None = None
    output_gradient: Tensor | None = None
    hidden_gradient: Tensor | None = None
    cell_gradient: Tensor | None = None
    totals: bool = False


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
        output: Output of the last layer, ``[time, batch, directions * width]``; as of the module where it has no
            dropout.
        directions: Forward, and backward where there is one.
        gate: Mean forget gate (LSTM) or update gate (GRU: the share kept), 0 to 1; ``None`` for a plain RNN.
        slope: Root mean square of the activation's derivative (plain RNN), else ``None``.
    """

    output: Tensor
    directions: tuple[Direction, ...]
    gate: Tensor | None
    slope: Tensor | None


@dataclass(slots=True)
class _Trace:
    """States and local derivatives of one layer in one direction, each ``[time, batch, ...]``.

    ``local`` turns repeated state gradients into those at the gates; ``gates`` those at the gates into those at the
    recurrent product, where it differs (GRU).
    """

    hidden: Tensor
    local: Tensor
    gates: Tensor | None = None
    to_cell: Tensor | None = None
    keep: Tensor | None = None
    slope: Tensor | None = None


@dataclass(slots=True)
class _Adjoint:
    """Gradients at the states and gates of one layer, each ``[2, time, batch, ...]``.

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
    traces: list[list[_Trace]] = []
    x = passage.inputs
    for layer, row in enumerate(passage.weights):
        traces.append([])
        for side, weights in enumerate(row):
            own = x if side == 0 or turn is None else turn(x)
            traces[-1].append(_forward(passage, weights, own, layer * directions + side))
        outputs = [trace.hidden for trace in traces[-1]]
        x = outputs[0] if turn is None else torch.cat([outputs[0], turn(outputs[1])], -1)
    keeps = [trace.keep.mean() for row in traces for trace in row if trace.keep is not None]
    slopes = [trace.slope.square().mean() for row in traces for trace in row if trace.slope is not None]
    return Replayed(
        output=x,
        directions=_backward(passage, traces, turn),
        gate=torch.stack(keeps).mean() if keeps else None,
        slope=torch.stack(slopes).mean().sqrt() if slopes else None,
    )


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


def _forward(passage: Passage, weights: Weights, x: Tensor, index: int) -> _Trace:
    batch, width = x.shape[1], weights.hh.shape[1]
    state = passage.hidden[index] if passage.hidden is not None else x.new_zeros(batch, width)
    if passage.kind == "LSTM":
        size = weights.hh.shape[0] // 4
        cell = passage.cell[index] if passage.cell is not None else x.new_zeros(batch, size)
        return _lstm(weights, _product(weights, x), state, cell, size)
    if passage.kind == "GRU":
        return _gru(weights, x, state)
    given = _product(weights, x)
    is_tanh = passage.kind == "RNN_TANH"
    states = []
    for step in given:
        total = torch.addmm(step, state, weights.hh.t())
        state = total.tanh() if is_tanh else total.relu()
        states.append(state)
    hidden = torch.stack(states)
    slope = 1 - hidden.square() if is_tanh else (hidden > 0).to(hidden.dtype)
    return _Trace(hidden=hidden, local=slope, slope=slope)


def _product(weights: Weights, x: Tensor) -> Tensor:
    """Return what the inputs and the biases add to the gates, of all steps at once."""
    total = x @ weights.ih.t()
    for bias in (weights.bias_ih, weights.bias_hh):
        if bias is not None:
            total = total + bias
    return total


def _lstm(weights: Weights, given: Tensor, state: Tensor, cell: Tensor, size: int) -> _Trace:
    states, cells, gates, news, first = [], [], [], [], cell
    for step in given:
        total = torch.addmm(step, state, weights.hh.t())
        gate, new = total.sigmoid(), total[:, 2 * size : 3 * size].tanh()
        cell = gate[:, size : 2 * size] * cell + gate[:, :size] * new
        state = gate[:, 3 * size :] * cell.tanh()
        if weights.hr is not None:
            state = state @ weights.hr.t()
        states.append(state)
        cells.append(cell)
        gates.append(gate)
        news.append(new)
    i, f, _, o = torch.stack(gates).chunk(4, -1)
    new, c = torch.stack(news), torch.stack(cells)
    before, tanh = torch.cat([first[None], c[:-1]]), c.tanh()
    local = [new * i * (1 - i), before * f * (1 - f), i * (1 - new.square()), tanh * o * (1 - o)]
    return _Trace(
        hidden=torch.stack(states), local=torch.cat(local, -1), to_cell=o * (1 - tanh.square()), keep=f.contiguous()
    )


def _gru(weights: Weights, x: Tensor, state: Tensor) -> _Trace:
    given = x @ weights.ih.t()
    if weights.bias_ih is not None:
        given = given + weights.bias_ih
    states, products, gates, news, first = [], [], [], [], state
    size = weights.hh.shape[1]
    for step in given:
        product = state @ weights.hh.t() if weights.bias_hh is None else state @ weights.hh.t() + weights.bias_hh
        gate = (step[:, : 2 * size] + product[:, : 2 * size]).sigmoid()
        last = product[:, 2 * size :]
        new = (step[:, 2 * size :] + gate[:, :size] * last).tanh()
        state = new + gate[:, size:] * (state - new)
        states.append(state)
        products.append(last)
        gates.append(gate)
        news.append(new)
    hidden, last, new = torch.stack(states), torch.stack(products), torch.stack(news)
    r, z = torch.stack(gates).chunk(2, -1)
    before = torch.cat([first[None], hidden[:-1]])
    at_new = (1 - z) * (1 - new.square())
    local = torch.cat([at_new * last * r * (1 - r), (before - new) * z * (1 - z), at_new], -1)
    ones = torch.ones_like(r)
    return _Trace(hidden=hidden, local=local, gates=torch.cat([ones, ones, r], -1), keep=z.contiguous())


def _backward(passage: Passage, traces: list[list[_Trace]], turn: _Turn | None) -> tuple[Direction, ...]:
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
    passage: Passage, top: list[_Trace], turn: _Turn | None
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


def _adjoint(weights: Weights, trace: _Trace, given: Tensor, at_cell: Tensor | None, *, totals: bool) -> _Adjoint:
    time = given.shape[1]
    through = given.new_zeros(given.shape[0], *given.shape[2:])
    cell = None if trace.to_cell is None else through.new_zeros(*through.shape[:2], trace.to_cell.shape[-1])
    hidden, cells, gates, arrived = [], [], [], []
    for t in range(time - 1, -1, -1):
        if totals:
            arrived.append(through[0])
            state = torch.stack([given[0, t], through[1] + given[1, t]])
        else:
            state = through + given[:, t]
        hidden.append(state)
        inner = state if weights.hr is None else state @ weights.hr
        if cell is not None and trace.to_cell is not None and trace.keep is not None:
            cell = cell + inner * trace.to_cell[t]
            if at_cell is not None:
                cell = cell + at_cell[:, t]
            cells.append(cell)
            gate = torch.cat([cell, cell, cell, inner], -1) * trace.local[t]
            through = gate @ weights.hh
            cell = cell * trace.keep[t]
        elif trace.gates is not None and trace.keep is not None:
            gate = inner.repeat(1, 1, 3) * trace.local[t]
            through = torch.baddbmm(inner * trace.keep[t], gate * trace.gates[t], weights.hh.expand(2, -1, -1))
        else:
            gate = inner * trace.local[t]
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
