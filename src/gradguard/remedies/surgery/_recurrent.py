"""Gated cells in place of plain recurrent ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name, describe
from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization._recurrent import check_time, chrono_initialize
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import chosen
from gradguard.remedies.surgery.modules import BareLSTM

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["CellKind", "swap_recurrent"]

CellKind = Literal["lstm", "gru"]
"""LSTM or GRU."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def swap_recurrent(  # noqa: PLR0913  # all are keywords with defaults
    model: nn.Module,
    to: CellKind = "gru",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    generator: int = 0,
    max_time: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Replace each ``nn.RNN`` by an LSTM or a GRU of the same size that takes and returns the same, in place.

    Sizes, layers, direction, dropout, bias and ``batch_first`` are kept. Weights are new: input and recurrent matrices
    are drawn uniformly within ``1 / sqrt(hidden_size)`` as torch does, all biases are 0, and the bias of what keeps the
    state (the forget gate of an LSTM, the update gate of a GRU) is 1, which forgets within ten steps, or with
    ``max_time`` what :func:`~gradguard.remedies.initialization.chrono_initialize` makes it. The old weights are gone
    from the model, and from ``names``. A GRU has an RNN's interface; of an LSTM the cell state is hidden, starts at 0
    in each call and is not carried from one call to the next, which matters for truncated backpropagation through time
    only. ``nn.RNNCell`` is replaced by ``nn.GRUCell``; for an LSTM it is left alone, since the user's loop would have
    to carry the cell state.

    Args:
        model: The model, changed in place.
        to: ``"gru"`` or ``"lstm"``.
        batch: A batch to run once afterwards, so that code which cannot bear the change fails at once.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the modules to replace; ``None`` for all.
        generator: Seed for the new weights; torch's own generator is not used.
        max_time: Steps over which the task's dependencies reach, >= 3; ``None`` for a bias of 1 in every unit.
        optimizer: The optimizer or optimizers; the new weights take the places of the old ones.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done; ``.undo()`` puts everything back.

    Raises:
        ValueError: If an argument is unknown.
        UnsupportedModelError: If there is nothing to replace; the message says what stands in the way.

    Source:
        Hochreiter and Schmidhuber (1997), Neural Computation 9(8); Cho et al. (2014), arXiv 1406.1078; Gers,
        Schmidhuber, Cummins (2000) and Jozefowicz, Zaremba, Sutskever (2015), ICML, for the bias of 1.
    """
    if to not in get_args(CellKind):
        raise ValueError(f"to must be one of {', '.join(get_args(CellKind))}, got {to!r}")
    if max_time is not None:
        check_time(max_time)
    optimizers = checked(model, optimizer)
    named = chosen(model, modules)
    edits: list[Edit] = []
    skipped: dict[str, str] = {}
    for raw, module in model.named_modules():
        name = clean_name(raw)
        if named is not None and all(module is not other for other in named.values()):
            continue
        if not isinstance(module, (nn.RNN, nn.RNNCell)):
            if named is not None:
                raise ValueError(
                    f"modules names {name!r}, which is {type(module).__name__} and no nn.RNN or nn.RNNCell"
                )
            continue
        reason = _why_not(model, module, to)
        if reason is not None:
            skipped[name] = reason
            continue
        cell = "Cell" if isinstance(module, nn.RNNCell) else ""
        new = f"{to.upper()}{cell}"
        bias = "bias 1" if max_time is None else f"biases ln U[1, {max_time - 1}]"
        bias = f"{bias} on the gate that keeps the state" if module.bias else "no biases"
        words = f"{name}: {describe(module).kind} > {new}, new weights, {bias}"
        seed = generator + len(edits)
        edits.append(Edit(words=words, make=partial(_put, module, to, seed, max_time)))
    return operate(
        "gated-cell" if to == "gru" else "lstm",
        model,
        optimizers,
        edits,
        skipped,
        dry_run=dry_run,
        batch=batch,
        compute_loss=compute_loss,
    )


def _why_not(model: nn.Module, module: nn.Module, to: CellKind) -> str | None:
    if module is model:
        raise UnsupportedModelError(
            f"the model is itself the {type(module).__name__} and cannot be replaced in place. Put it into a module"
        )
    if isinstance(module, nn.RNNCell) and to == "lstm":
        return "the loop around it would have to carry a cell state; use to='gru'"
    if type(module) not in {nn.RNN, nn.RNNCell}:
        return (
            "its weights are parametrized, and would be lost"
            if parametrize.is_parametrized(module)
            else f"it is a {type(module).__name__} with code of its own"
        )
    if any(getattr(module, kind) for kind in _HOOKS):
        return "it has hooks, which would be lost with it"
    own = {id(p) for p in module.parameters()}
    if any(id(p) in own for other in model.modules() if other is not module for p in other._parameters.values()):
        return "its weights are tied to those of another module"
    if not all(p.requires_grad for p in module.parameters()):
        return "it is frozen (requires_grad is False)"
    return None


def _put(module: nn.RNN | nn.RNNCell, to: CellKind, seed: int, max_time: int | None, kept: Ledger) -> nn.Module:
    own = next(module.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(module, nn.RNNCell):
            new: nn.Module = nn.GRUCell(module.input_size, module.hidden_size, module.bias)
        else:
            new = (BareLSTM if to == "lstm" else nn.GRU)(
                module.input_size,
                module.hidden_size,
                module.num_layers,
                bias=module.bias,
                batch_first=module.batch_first,
                dropout=module.dropout,
                bidirectional=module.bidirectional,
            )
    _open_gates(new)
    if max_time is not None and module.bias:
        chrono_initialize(new, max_time, generator=seed)
    new = new.to(device=own.device, dtype=own.dtype).train(module.training)
    kept.replace(module, new)
    kept.inherit(module, new)
    return new


def _open_gates(new: nn.Module) -> None:
    """Set every bias to 0, and one of the two of the keeping gate to 1: slice 1 of i, f, g, o and of r, z, n."""
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
                if name.startswith("bias_ih"):
                    parameter.chunk(4 if isinstance(new, nn.LSTM) else 3)[1].fill_(1.0)
