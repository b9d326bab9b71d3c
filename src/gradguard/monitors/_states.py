"""The forward half of a replay: states and local derivatives of one layer of a recurrent net in one direction.

Source: the equations of ``torch.nn.RNN``, ``LSTM`` and ``GRU``, PyTorch documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kind", "Passage", "Trace", "Weights", "run_layer"]

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
        output: What the last layer gave, shape ``[time, batch, directions * width]``.
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
    output: Tensor
    lengths: Tensor | None = None
    hidden: Tensor | None = None
    cell: Tensor | None = None
    output_gradient: Tensor | None = None
    hidden_gradient: Tensor | None = None
    cell_gradient: Tensor | None = None
    totals: bool = False


@dataclass(slots=True)
class Trace:
    """States and local derivatives of one layer in one direction, each ``[time, batch, ...]``.

    ``local`` leads from the states to the gates, ``gates`` from there to the recurrent product where it differs (GRU).
    """

    hidden: Tensor
    local: Tensor
    gates: Tensor | None = None
    to_cell: Tensor | None = None
    keep: Tensor | None = None
    slope: Tensor | None = None


def run_layer(passage: Passage, weights: Weights, x: Tensor, known: Tensor | None, index: int) -> Trace:
    """Return states and derivatives of one layer in one direction; its states may be known."""
    first = passage.hidden[index] if passage.hidden is not None else x.new_zeros(x.shape[1], weights.hh.shape[1])
    given = _product(x, weights.ih, weights.bias_ih)
    size = weights.hh.shape[0] // {"LSTM": 4, "GRU": 3}.get(passage.kind, 1)
    cell = passage.cell[index] if passage.cell is not None else x.new_zeros(x.shape[1], size)
    if known is None:
        known = _states(passage.kind, weights, given, first, cell)
    before = torch.cat([first[None], known[:-1]])
    product = _product(before, weights.hh, weights.bias_hh)
    if passage.kind == "LSTM":
        return _lstm(weights, given + product, cell)
    if passage.kind == "GRU":
        return _gru(given, product, before)
    total = given + product
    hidden = total.tanh() if passage.kind == "RNN_TANH" else total.relu()
    slope = 1 - hidden.square() if passage.kind == "RNN_TANH" else (hidden > 0).to(hidden.dtype)
    return Trace(hidden=hidden, local=slope, slope=slope)


def _product(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return values @ weight.t() if bias is None else values @ weight.t() + bias


def _states(kind: Kind, weights: Weights, given: Tensor, state: Tensor, cell: Tensor) -> Tensor:
    """Return the hidden states of a layer, computed step by step, ``[time, batch, width]``."""
    states = []
    for step in given.unbind():
        product = _product(state, weights.hh, weights.bias_hh)
        if kind == "LSTM":
            i, f, new, o = (step + product).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * new.tanh()
            state = o.sigmoid() * cell.tanh()
            state = state if weights.hr is None else state @ weights.hr.t()
        elif kind == "GRU":
            (r, z, new), (to_r, to_z, to_new) = step.chunk(3, -1), product.chunk(3, -1)
            new = (new + (r + to_r).sigmoid() * to_new).tanh()
            state = new + (z + to_z).sigmoid() * (state - new)
        else:
            state = (step + product).tanh() if kind == "RNN_TANH" else (step + product).relu()
        states.append(state)
    return torch.stack(states)


def _lstm(weights: Weights, total: Tensor, cell: Tensor) -> Trace:
    i, f, new, o = total.chunk(4, -1)
    i, f, new, o = i.sigmoid(), f.sigmoid(), new.tanh(), o.sigmoid()
    cells = [cell]
    for keep, add in zip(f.unbind(), (i * new).unbind(), strict=True):
        cells.append(torch.addcmul(add, keep, cells[-1]))
    every = torch.stack(cells)
    tanh = every[1:].tanh()
    local = [new * i * (1 - i), every[:-1] * f * (1 - f), i * (1 - new.square()), tanh * o * (1 - o)]
    hidden = o * tanh
    return Trace(
        hidden=hidden if weights.hr is None else hidden @ weights.hr.t(),
        local=torch.cat(local, -1),
        to_cell=o * (1 - tanh.square()),
        keep=f,
    )


def _gru(given: Tensor, product: Tensor, before: Tensor) -> Trace:
    (r, z, new), (to_r, to_z, to_new) = given.chunk(3, -1), product.chunk(3, -1)
    r, z = (r + to_r).sigmoid(), (z + to_z).sigmoid()
    new = (new + r * to_new).tanh()
    at_new = (1 - z) * (1 - new.square())
    local = torch.cat([at_new * to_new * r * (1 - r), (before - new) * z * (1 - z), at_new], -1)
    ones = torch.ones_like(r)
    return Trace(hidden=new + z * (before - new), local=local, gates=torch.cat([ones, ones, r], -1), keep=z)
