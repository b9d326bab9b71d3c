"""Small slices of what a recurrent module was given and gave, and of the gradients that came back to it."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gradguard.monitors._states import Kind, Passage, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAX_SEQUENCES",
    "MAX_STEPS",
    "Call",
    "CellCall",
    "Cells",
    "capture_call",
    "capture_cell",
    "is_single_step",
    "step_rows",
]

MAX_SEQUENCES = 4
"""Sequences of a batch that are replayed. Ours: spans of single sequences of one net differ by tenths of a decade."""

MAX_STEPS = 256
"""Time steps that are replayed, the last ones of a sequence. Source: algorithms.md, section E."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` over a sequence, as far as it is replayed; time first.

    Attributes:
        module: The module.
        inputs: Shape ``[time, sequences, features]``.
        output: What it gave, likewise.
        hidden: First hidden state, ``None`` for zeros.
        cell: First cell state, ``None`` for zeros.
        lengths: Steps of each sequence, ``None`` where all are whole.
        whole: Whether the slice begins with the sequence.
        gradients: What came back, by place: ``"output"``, ``"hidden"`` and ``"cell"``.
    """

    module: nn.RNNBase
    inputs: Tensor
    output: Tensor
    hidden: Tensor | None
    cell: Tensor | None
    lengths: Tensor | None
    whole: bool
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether a replay must give the same output: no dropout, and a known first state."""
        dropout = self.module.dropout > 0.0 and self.module.num_layers > 1 and self.module.training
        return self.whole and not dropout

    def passage(self) -> Passage | None:
        """Return what to replay, ``None`` where no gradient arrived or the weights cannot be read."""
        rows = _weights(self.module)
        if not self.gradients or rows is None:
            return None
        dtype = rows[0][0].hh.dtype
        return Passage(
            kind=_kind(self.module),
            weights=rows,
            inputs=self.inputs.to(dtype),
            output=self.output.to(dtype),
            lengths=self.lengths,
            hidden=None if self.hidden is None else self.hidden.to(dtype),
            cell=None if self.cell is None else self.cell.to(dtype),
            output_gradient=_as(self.gradients.get("output"), dtype),
            hidden_gradient=_as(self.gradients.get("hidden"), dtype),
            cell_gradient=_as(self.gradients.get("cell"), dtype),
        )


@dataclass(slots=True, eq=False)
class CellCall:
    """One step of a cell: what it was given, and the whole gradient at the hidden state it gave."""

    inputs: Tensor
    hidden: Tensor | None
    cell: Tensor | None
    output: Tensor
    total: Tensor | None = None


class Cells:
    """The calls of a cell in a loop: the newest chain of calls that hand their state on unchanged, or a longer one."""

    def __init__(self, module: nn.RNNCellBase | nn.RNNBase) -> None:
        self.module = module
        self.calls = 0
        self._best: deque[CellCall] = deque(maxlen=MAX_STEPS)
        self._chain: deque[CellCall] = deque(maxlen=MAX_STEPS)
        self._last: weakref.ref[Tensor] | None = None

    @property
    def chain(self) -> list[CellCall]:
        """The longest chain."""
        return list(self._best if len(self._best) > len(self._chain) else self._chain)

    def add(self, call: CellCall, given: Tensor | None, state: Tensor) -> None:
        """Take a call in; ``given`` is the hidden state it got, ``state`` the one it gave."""
        self.calls += 1
        if given is None or self._last is None or self._last() is not given:
            if len(self._chain) > len(self._best):
                self._best = self._chain
            self._chain = deque(maxlen=MAX_STEPS)
        self._chain.append(call)
        self._last = weakref.ref(state)

    def passage(self) -> Passage | None:
        """Return what to replay, ``None`` where no gradient arrived or the weights cannot be read."""
        chain, rows = self.chain, _weights(self.module)
        if rows is None or all(call.total is None for call in chain):
            return None
        dtype = rows[0][0].hh.dtype
        first = chain[0]
        totals = [torch.zeros_like(call.output) if call.total is None else call.total for call in chain]
        return Passage(
            kind=_kind(self.module),
            weights=rows,
            inputs=torch.stack([call.inputs for call in chain]).to(dtype),
            output=torch.stack([call.output for call in chain]).to(dtype),
            hidden=None if first.hidden is None else first.hidden[None].to(dtype),
            cell=None if first.cell is None else first.cell[None].to(dtype),
            output_gradient=torch.stack(totals).to(dtype),
            totals=True,
        )


def capture_call(
    module: nn.RNNBase, given: Any, state: Any, output: Any
) -> tuple[Call, list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]] | None:
    """Copy a slice of a call over a sequence.

    Args:
        module: The module.
        given: Its input, a tensor or a ``PackedSequence``.
        state: Its first state as given, ``None`` for zeros.
        output: What it returned.

    Returns:
        The slice, and where gradients are to be listened to: place, tensor, and how to cut a gradient there. ``None``
        where the call is not of the form that torch documents.
    """
    sequence, last = output
    hidden, cell = last if isinstance(last, tuple) else (last, None)
    first, first_cell = state if isinstance(state, tuple) else (state, None)
    if isinstance(given, PackedSequence):
        if not isinstance(sequence, PackedSequence):
            return None
        cut: _PackedCut | _Cut = _PackedCut(given)
        source, result = given.data, sequence.data
    else:
        cut = _Cut(given, batch_first=module.batch_first)
        source, result = given, sequence
    if cut.empty or result.shape[-1] != _width(module) * (1 + module.bidirectional):
        return None
    call = Call(
        module=module,
        inputs=cut.sequence(source),
        output=cut.sequence(result),
        hidden=cut.state(first) if first is not None and cut.whole else None,
        cell=cut.state(first_cell) if first_cell is not None and cut.whole else None,
        lengths=cut.lengths,
        whole=cut.whole,
    )
    places: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = [("output", result, cut.sequence)]
    places += [(name, t, cut.state) for name, t in (("hidden", hidden), ("cell", cell)) if t is not None]
    return call, places


def capture_cell(
    module: nn.RNNCellBase | nn.RNNBase, given: Tensor, state: Any, output: Any
) -> tuple[CellCall, Tensor | None, Tensor, list[Tensor]] | None:
    """Copy a slice of one step; ``None`` for one without a batch.

    Returns:
        The slice, the hidden state given, the one returned, and the tensors at which that state's gradient arrives.
    """
    first, first_cell = state if isinstance(state, tuple) else (state, None)
    if isinstance(module, nn.RNNBase):
        sequence, last = output
        hidden = last[0] if isinstance(last, tuple) else last
        listened = [sequence, hidden]
    else:
        hidden = output[0] if isinstance(output, tuple) else output
        listened = [hidden]
    if given.ndim != (3 if isinstance(module, nn.RNNBase) else 2):
        return None
    call = CellCall(
        inputs=_rows(given),
        hidden=None if first is None else _rows(first),
        cell=None if first_cell is None else _rows(first_cell),
        output=_rows(hidden),
    )
    return call, first, hidden, listened


def step_rows(gradient: Tensor) -> Tensor:
    """Return the first sequences of a gradient at one step, ``[sequences, width]``."""
    return _rows(gradient)


def is_single_step(module: nn.RNNBase, given: Any) -> bool:
    """Whether a call reads one step, with one layer and one direction: a net that is used like a cell."""
    plain = isinstance(given, torch.Tensor) and given.ndim == 3 and module.num_layers == 1 and not module.bidirectional
    return plain and given.shape[1 if module.batch_first else 0] == 1


def _rows(values: Tensor) -> Tensor:
    """Return the first sequences of one step; the axis of length 1 of a sequence or a state is dropped."""
    if values.ndim == 3:
        values = values.squeeze(0) if values.shape[0] == 1 else values.squeeze(1)
    return values[:MAX_SEQUENCES].detach().clone()


class _Cut:
    """Cuts the slice to be replayed out of padded tensors."""

    lengths: Tensor | None = None

    def __init__(self, given: Tensor, *, batch_first: bool) -> None:
        self._unbatched = given.ndim == 2
        self._batch_first = batch_first and not self._unbatched
        time = given.shape[1 if self._batch_first else 0]
        self.empty = given.numel() == 0 or time < 1
        self._start = max(0, time - MAX_STEPS)
        self.whole = self._start == 0

    def sequence(self, values: Tensor) -> Tensor:
        """Return ``[time, sequences, features]``."""
        values = values.detach()
        if self._unbatched:
            values = values[:, None]
        elif self._batch_first:
            values = values.transpose(0, 1)
        return values[self._start :, :MAX_SEQUENCES].clone()

    def state(self, values: Tensor) -> Tensor:
        """Return ``[layers * directions, sequences, width]``."""
        values = values.detach()
        return (values[:, None] if self._unbatched else values[:, :MAX_SEQUENCES]).clone()


class _PackedCut:
    """Cuts the longest sequences out of packed ones; what lies beyond a sequence's length is zero."""

    def __init__(self, packed: PackedSequence) -> None:
        sizes = packed.batch_sizes.tolist()  # on the host in any case: nothing is waited for
        start = max(0, len(sizes) - MAX_STEPS)
        rows = min(MAX_SEQUENCES, sizes[start]) if sizes else 0
        self.empty = rows == 0
        self.whole = start == 0
        device = packed.data.device
        offsets = [0, *itertools.accumulate(sizes)]
        places = [[offsets[t] + b if sizes[t] > b else -1 for b in range(rows)] for t in range(start, len(sizes))]
        index = torch.tensor(places, device=device).reshape(-1, rows)
        self._index, self._valid = index.clamp(min=0), (index >= 0)[..., None]
        self.lengths: Tensor | None = (index >= 0).sum(0)
        self._order = None if packed.sorted_indices is None else packed.sorted_indices[:rows]
        self._rows = rows

    def sequence(self, values: Tensor) -> Tensor:
        """Return ``[time, sequences, features]``."""
        return values.detach()[self._index] * self._valid

    def state(self, values: Tensor) -> Tensor:
        """Return ``[layers * directions, sequences, width]``, longest sequence first."""
        values = values.detach()
        return values[:, : self._rows].clone() if self._order is None else values.index_select(1, self._order)


def _as(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _width(module: nn.RNNBase) -> int:
    return module.proj_size or module.hidden_size


def _kind(module: nn.RNNBase | nn.RNNCellBase) -> Kind:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    return "RNN_RELU" if getattr(module, "nonlinearity", "tanh") == "relu" else "RNN_TANH"


def _weights(module: nn.RNNBase | nn.RNNCellBase) -> list[list[Weights]] | None:
    """Return the weights as they are, detached, in float32 at least; ``None`` where they are sharded or not there."""
    if isinstance(module, nn.RNNBase):
        sides = ("", "_reverse") if module.bidirectional else ("",)
        suffixes = [[f"_l{layer}{side}" for side in sides] for layer in range(module.num_layers)]
    else:
        suffixes = [[""]]
    rows: list[list[Weights]] = []
    for names in suffixes:
        rows.append([])
        for suffix in names:
            found = {
                short: getattr(module, f"{name}{suffix}", None)
                for short, name in (
                    ("ih", "weight_ih"),
                    ("hh", "weight_hh"),
                    ("bias_ih", "bias_ih"),
                    ("bias_hh", "bias_hh"),
                    ("hr", "weight_hr"),
                )
            }
            tensors = {short: t for short, t in found.items() if isinstance(t, torch.Tensor)}
            if not _readable(module, tensors):
                return None
            dtype = torch.promote_types(tensors["hh"].dtype, torch.float32)
            rows[-1].append(Weights(**{short: t.detach().to(dtype) for short, t in tensors.items()}))
    return rows


def _readable(module: nn.RNNBase | nn.RNNCellBase, tensors: dict[str, Tensor]) -> bool:
    """Whether the weights are whole: not sharded, not emptied between uses."""
    if "ih" not in tensors or "hh" not in tensors or any(hasattr(t, "_local_tensor") for t in tensors.values()):
        return False
    gates = {"LSTM": 4, "GRU": 3}.get(_kind(module), 1)
    whole = tensors["hh"].ndim == 2 and tensors["hh"].shape[0] == gates * module.hidden_size
    return whole and all(t.untyped_storage().nbytes() >= t.numel() * t.element_size() for t in tensors.values())
