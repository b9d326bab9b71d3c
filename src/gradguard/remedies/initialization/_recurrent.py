"""Initialization of recurrent networks: gate biases that set how long they remember, orthogonal recurrent matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied, Snapshot, tensor_names, transaction
from gradguard.remedies.initialization._draw import orthogonal
from gradguard.remedies.initialization._schemes import refuse_chosen
from gradguard.remedies.initialization._targets import Generator, check_arguments, expand, finish, generator_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["check_time", "chrono_initialize", "forget_gate_bias", "orthogonal_recurrent"]

_KINDS = (nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell, nn.RNN, nn.RNNCell)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One layer and direction of a recurrent module."""

    name: str
    module: nn.Module
    suffix: str

    @property
    def gates(self) -> int:
        """Blocks of the recurrent matrix: torch's order is i, f, g, o for LSTM and r, z, n for GRU."""
        return 4 if self.is_lstm else 3 if isinstance(self.module, (nn.GRU, nn.GRUCell)) else 1

    @property
    def is_lstm(self) -> bool:
        return isinstance(self.module, (nn.LSTM, nn.LSTMCell))

    @property
    def hidden(self) -> int:
        return int(self.module.hidden_size)  # type: ignore[arg-type]  # an int on every recurrent module

    def get(self, kind: str) -> nn.Parameter | None:
        """Return a parameter, for instance ``"bias_hh"`` of this layer and direction."""
        return self.module._parameters.get(f"{kind}{self.suffix}")

    def full_name(self, kind: str) -> str:
        return f"{self.name}.{kind}{self.suffix}".lstrip(".")


def forget_gate_bias(
    model: nn.Module,
    value: float = 1.0,
    *,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Set the bias of each LSTM forget gate, and of each GRU update gate, so that the state is kept at first.

    torch adds two biases per gate: the one on the hidden state becomes ``value``, the one on the input 0, for these
    gates only. In torch's GRU it is the update gate z that keeps the state, ``h' = (1 - z) n + z h``.

    Args:
        model: The model; plain RNNs in it are left alone.
        value: The bias; 1 lets a gate keep sigmoid(1) = 0.73 of the state per step, where torch's default keeps half.
        modules: Names of the recurrent modules, or of modules around them; all by default.
        optimizer: Its state for the changed parameters is dropped.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If ``value`` is not finite, or a module named is one to leave alone.
        UnsupportedModelError: If there is no gate with trainable biases.

    Source:
        Gers, Schmidhuber, Cummins (2000), "Learning to Forget", Neural Computation 12; Jozefowicz, Zaremba, Sutskever
        (2015), "An Empirical Exploration of Recurrent Network Architectures", ICML. For GRU the analogy is ours.

    Example:
        >>> lstm = nn.LSTM(3, 2)
        >>> print(forget_gate_bias(lstm))
        forget-gate-bias
          bias_hh_l0: forget gate 1; bias_ih_l0: forget gate 0
    """
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value!r}")

    def change(cell: _Cell) -> str:
        gate = slice(cell.hidden, 2 * cell.hidden)
        _biases(cell)[0][gate] = 0.0
        _biases(cell)[1][gate] = value
        which = "forget" if cell.is_lstm else "update"
        return f"{cell.full_name('bias_hh')}: {which} gate {value:g}; {cell.full_name('bias_ih')}: {which} gate 0"

    return _apply(model, "forget-gate-bias", change, ("bias_ih", "bias_hh"), modules, optimizer)


def chrono_initialize(
    model: nn.Module,
    max_time: int,
    *,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    generator: Generator = None,
) -> Applied:
    """Spread the memory of LSTM and GRU units over the time scales of a task, by the biases of their gates.

    For LSTM ``b_f = ln U[1, max_time - 1]`` and ``b_i = -b_f``; for GRU, whose update gate keeps the state,
    ``b_z = ln U[1, max_time - 1]``: one draw in each of as many equal parts of the range as there are units, so that
    few units cover it as evenly as many do. All other biases become 0; the values stand in the bias on the hidden
    state.

    Args:
        model: The model; plain RNNs in it are left alone.
        max_time: Steps over which the task's dependencies reach, >= 3; the length of the sequences if unknown.
        modules: Names of the recurrent modules, or of modules around them; all by default.
        optimizer: Its state for the changed parameters is dropped.
        generator: A CPU generator or a seed; torch's global generator is then left alone.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If ``max_time`` is below 3, or a module named is one to leave alone.
        UnsupportedModelError: If there is no gate with trainable biases.

    Source:
        Tallec and Ollivier (2018), "Can recurrent neural networks warp time?", ICLR, arXiv 1804.11188, section 2. The
        even spread is ours.
    """
    check_time(max_time)
    draw = generator_of(generator)

    def change(cell: _Cell) -> str:
        size = cell.hidden
        on_input, on_hidden = _biases(cell)
        places = torch.randperm(size, generator=draw) + torch.rand(size, generator=draw)
        drawn = (1.0 + (max_time - 2.0) * places / size).log().to(on_hidden)
        on_input.zero_()
        on_hidden.zero_()
        on_hidden[size : 2 * size] = drawn
        if cell.is_lstm:
            on_hidden[:size] = -drawn
        kept = "forget gate ln U[1, {0}], input gate minus that" if cell.is_lstm else "update gate ln U[1, {0}]"
        rest = f"other biases and {cell.full_name('bias_ih')} 0"
        return f"{cell.full_name('bias_hh')}: {kept.format(max_time - 1)}; {rest}"

    return _apply(model, "chrono-initialization", change, ("bias_ih", "bias_hh"), modules, optimizer)


def check_time(max_time: int) -> None:
    """Refuse a length for which ``ln U[1, max_time - 1]`` is no range.

    Raises:
        ValueError: If it is below 3 or not finite.
    """
    if isinstance(max_time, bool) or not 3 <= max_time < math.inf:
        raise ValueError(f"max_time must be at least 3 steps, got {max_time!r}")


def orthogonal_recurrent(
    model: nn.Module,
    gain: float = 1.0,
    *,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    generator: Generator = None,
) -> Applied:
    """Draw the recurrent matrices of RNN, LSTM and GRU as orthogonal ones, each gate's block by itself.

    Input matrices and biases are left alone. With a projection (``proj_size``) the blocks have orthonormal columns.

    Args:
        model: The model.
        gain: Factor on the orthogonal matrices, > 0.
        modules: Names of the recurrent modules, or of modules around them; all by default.
        optimizer: Its state for the changed parameters is dropped.
        generator: A CPU generator or a seed; torch's global generator is then left alone.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If ``gain`` is not positive, or a module named is one to leave alone.
        UnsupportedModelError: If there is no trainable recurrent matrix.

    Source:
        Saxe, McClelland, Ganguli (2014), ICLR, arXiv 1312.6120; for recurrent nets Henaff, Szlam, LeCun (2016),
        "Recurrent Orthogonal Networks and Long-Memory Tasks", ICML, arXiv 1602.06662.
    """
    if not 0.0 < gain < math.inf:
        raise ValueError(f"gain must be positive and finite, got {gain!r}")
    draw = generator_of(generator)

    def change(cell: _Cell) -> str:
        weight = cell.get("weight_hh")
        assert weight is not None  # noqa: S101  # _apply lets no cell without it pass
        size = torch.Size((cell.hidden, weight.shape[1]))
        blocks = [gain * orthogonal(size, weight.dtype, draw) for _ in range(cell.gates)]
        weight.copy_(torch.cat(blocks))
        each = "" if cell.gates == 1 else f", {cell.gates} gates each"
        return f"{cell.full_name('weight_hh')}: orthogonal times {gain:g}{each}"

    return _apply(model, "orthogonal-recurrent", change, ("weight_hh",), modules, optimizer, gated=False)


def _apply(
    model: nn.Module,
    remedy: str,
    change: Callable[[_Cell], str],
    kinds: tuple[str, ...],
    modules: Iterable[str] | None,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    gated: bool = True,
) -> Applied:
    optimizers = check_arguments(model, optimizer)
    cells, skipped = _cells(model, kinds, modules, gated=gated)
    before = tensor_names(model)
    with transaction() as snapshot, torch.no_grad():
        changes = [_change(cell, change, kinds, snapshot) for cell in cells]
        refuse_chosen(modules, skipped)
        return finish(model, remedy, snapshot, optimizers, changes, skipped, before)


def _change(cell: _Cell, change: Callable[[_Cell], str], kinds: tuple[str, ...], snapshot: Snapshot) -> str:
    snapshot.keep(parameter for kind in kinds if (parameter := cell.get(kind)) is not None)
    return change(cell)


def _biases(cell: _Cell) -> tuple[nn.Parameter, nn.Parameter]:
    on_input, on_hidden = cell.get("bias_ih"), cell.get("bias_hh")
    assert on_input is not None  # noqa: S101  # _cells lets no cell without biases pass
    assert on_hidden is not None  # noqa: S101  # as above
    return on_input, on_hidden


def _cells(
    model: nn.Module, kinds: tuple[str, ...], modules: Iterable[str] | None, *, gated: bool
) -> tuple[list[_Cell], dict[str, str]]:
    """Return the layers and directions to change, and why others are left alone."""
    chosen = None if modules is None else set(expand(model, modules))
    cells: list[_Cell] = []
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for raw, module in model.named_modules():
        if not isinstance(module, _KINDS) or (chosen is not None and id(module) not in chosen):
            continue
        name = clean_name(raw)
        if gated and isinstance(module, (nn.RNN, nn.RNNCell)):
            skipped[name] = "a plain RNN has no gates"
            continue
        if parametrize.is_parametrized(module):
            skipped[name] = "it is parametrized; set the parametrization's own parameters"
            continue
        for cell in _layers(name, module):
            found = [cell.get(kind) for kind in kinds]
            label = cell.full_name(kinds[-1])
            if any(parameter is None for parameter in found):
                skipped[label] = f"there is no {kinds[-1].split('_')[0]} of this name in {type(module).__name__}"
            elif not all(parameter.requires_grad for parameter in found if parameter is not None):
                skipped[label] = "it, or the bias beside it, is frozen (requires_grad is False)"
            elif any(id(parameter) in seen for parameter in found):
                skipped[label] = "it is shared with a module before it, which is set once"
            else:
                seen.update(id(parameter) for parameter in found)
                cells.append(cell)
    return cells, skipped


def _layers(name: str, module: nn.Module) -> list[_Cell]:
    if isinstance(module, nn.RNNCellBase):
        return [_Cell(name, module, "")]
    assert isinstance(module, nn.RNNBase)  # noqa: S101  # the other kinds are its children
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [_Cell(name, module, f"_l{layer}{end}") for layer in range(module.num_layers) for end in directions]
