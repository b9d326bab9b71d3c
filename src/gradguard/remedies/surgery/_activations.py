"""Other activations in the place of those that saturate or die, and weights that suit them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied, Restorable, tensor_names, transaction
from gradguard.remedies.initialization._schemes import initialize
from gradguard.remedies.initialization._targets import check_arguments, finish
from gradguard.remedies.initialization._trace import trace
from gradguard.remedies.surgery._places import put

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["replace_activations"]

_REPLACED = (
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.ReLU, nn.ReLU6),
    *(nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish),
)
"""Elementwise activations without parameters."""

_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.01),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True, slots=True)
class _Both:
    """Two changes, the later undone first."""

    first: Restorable
    second: Applied

    def restore(self) -> None:
        self.second.undo()
        self.first.restore()


def replace_activations(
    model: nn.Module,
    to: str = "relu",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    fresh_weights: bool = True,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Replace the hidden activation modules of a model, and draw its weights anew for the new ones.

    An activation behind the last layer makes the output what it is and stays. Where an activation gates something (its
    output is multiplied with a signal), all of its kind stay. Functions such as ``torch.sigmoid`` in the model's own
    code cannot be replaced; the record says so.

    Args:
        model: The model, changed in place.
        to: ``"relu"``, ``"leaky-relu"``, ``"elu"``, ``"gelu"``, ``"silu"``, ``"selu"`` or ``"tanh"``.
        batch: A batch to run, so that order, gates and functions are seen. Without one module order counts.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        fresh_weights: Whether to initialise the weights for the new activation: those of the old suit it seldom.
        optimizer: The optimizer whose state of changed weights begins anew.

    Returns:
        What was done; ``.undo()`` puts it back.

    Raises:
        ValueError: If the activation is unknown.
        UnsupportedModelError: If there is no activation module to replace, or the model cannot be changed in place.

    Source:
        Glorot, Bordes, Bengio (2011), "Deep Sparse Rectifier Neural Networks", AISTATS; Maas et al. (2013) for leaky
        ReLU; weights: He et al. (2015), ICCV, arXiv 1502.01852.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Sigmoid())
        >>> print(replace_activations(model, "relu").changes[0])
        1: Sigmoid > ReLU
    """
    if to not in _MAKERS:
        raise ValueError(f"to must be one of {', '.join(_MAKERS)}, got {to!r}")
    optimizers = check_arguments(model, optimizer)
    gates, functions = _seen(model, batch, compute_loss)
    skipped = {f"function {name}": "a function in the model's own code cannot be replaced" for name in functions}
    before = tensor_names(model)
    changes = []
    with transaction() as snapshot:
        for name, module in list(_hidden(model)):
            new = _MAKERS[to]()
            if type(module) is type(new):
                continue
            if type(module).__name__.lower() in gates:
                skipped[name] = "activations of its kind gate something"
                continue
            put(model, snapshot, module, new.train(module.training))
            changes.append(f"{name}: {type(module).__name__} > {type(new).__name__}")
        record = finish(model, to, snapshot, optimizers, changes, skipped, before)
        if not fresh_weights:
            return record
        drawn = initialize(model, "he", batch=batch, compute_loss=compute_loss, optimizer=optimizer)
    return replace(
        record,
        changes=(*record.changes, *drawn.changes),
        changed=(*record.changed, *drawn.changed),
        skipped={**record.skipped, **drawn.skipped},
        _snapshot=_Both(snapshot, drawn),
    )


def _hidden(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the activation modules with a layer behind them, in the order in which they were defined."""
    order = [(clean_name(name), module) for name, module in model.named_modules()]
    weighted = [i for i, (_, m) in enumerate(order) if not isinstance(m, _REPLACED) and _has_matrix(m)]
    last = max(weighted, default=-1)
    yield from ((name, m) for i, (name, m) in enumerate(order) if isinstance(m, _REPLACED) and i < last)


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _seen(
    model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None
) -> tuple[set[str], tuple[str, ...]]:
    """Return which kinds of activation gate something, and which run as plain functions beside the modules."""
    if batch is None:
        return set(), ()
    ops = trace(model, batch, compute_loss)
    gates: set[str] = set()
    ran: dict[str, int] = {}
    for op in ops.ops:
        if op.kind != "activation" or op.activation is None:
            continue
        name = op.activation.name.replace("_", "")
        ran[name] = ran.get(name, 0) + 1
        if any(
            ops.ops[child].kind == "product" and len(ops.ops[child].operands) == 2 for child in ops.children[op.index]
        ):
            gates.add(name)
    held: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, _REPLACED):
            held[type(module).__name__.lower()] = held.get(type(module).__name__.lower(), 0) + 1
    return gates, tuple(name for name, count in ran.items() if name not in held)
