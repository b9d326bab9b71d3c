"""Other activations in place of those that saturate or die, as modules and as functions in code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gradguard.monitors._describe import clean_name, describe
from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization import initialize
from gradguard.remedies.initialization._targets import layers_of, made_weight
from gradguard.remedies.surgery._chain import chain
from gradguard.remedies.surgery._functions import layers_before, layers_behind, replace_functions
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import Survey, affine, chosen, survey

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["DYING", "ActivationName", "not_hidden", "replace_activations"]

ActivationName = Literal["relu", "leaky-relu", "elu", "selu", "gelu", "silu"]
"""What activations can be replaced by."""

_NEW: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "leaky-relu": partial(nn.LeakyReLU, 0.01),
        "elu": nn.ELU,
        "selu": nn.SELU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
    }
)

_SATURATING = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.LogSigmoid)
DYING = (nn.ReLU, nn.ReLU6, nn.Threshold)
"""Activations that can be zero for every example, with a gradient of zero."""
_END = 10.0
"""Where an activation is at its end. Ours: the derivative of a sigmoid is 5e-5 there, that of softsign 8e-3."""

_FLAT = 0.05
"""Share of its derivative near 0 below which an activation is flat. Ours: the same figures."""

_SATURATING_FUNCTIONS = frozenset(
    {"sigmoid", "tanh", "hardsigmoid", "hardtanh", "softsign", "logsigmoid", "log_sigmoid", "exp"}
)
_DYING_FUNCTIONS = frozenset({"relu", "relu6", "threshold"})


def replace_activations(  # noqa: PLR0913  # all are keywords with defaults
    model: nn.Module,
    to: ActivationName = "relu",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    initialize_layers: bool = False,
    generator: int = 0,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Replace hidden activations that saturate (sigmoid, tanh, ...) or, unless by ReLU itself, die (ReLU), in place.

    So are modules of the author's own that work on each entry by itself and are flat at both ends or, as ``exp(x)``,
    grow without bound.

    Activations at the output and gates, whose result multiplies something else, stay what they are, unless they are
    named.

    Activations that a module's own code calls as functions (``torch.sigmoid(x)``, ``F.relu(x, inplace=True)``,
    ``x.tanh()``), ``exp`` among them, are replaced where their result goes from layers to layers and nowhere else: the
    module gets a class like its own whose methods call the new function at those places. No other call changes, in
    whatever order code runs. Copies, pickles and compiled models keep the change, ``inspect.getsource`` shows the code
    that runs, and a pickle can be read while the code of the class is what it was. ``skipped`` names by module and
    method the calls that stay, and says why: outputs, gates, calls that serve for several things or that the batch did
    not come to, functions outside the class, code that is torch's own or whose source cannot be read.

    Args:
        model: The model, changed in place.
        to: The new activation; ``"leaky-relu"`` has slope 0.01.
        batch: A batch to run once, which shows what is hidden, output and gate; may be left out for a plain
            ``nn.Sequential``.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the activation modules to replace, of whatever kind, and of modules whose own code calls
            hidden activations as functions; ``None`` for those above.
        initialize_layers: Draw the weights of the layers before and behind them anew, with the gain of the activation
            that follows: a stack with the weights of another does not keep the size of its signals, and a head that was
            given 0 to 1 by a sigmoid is given more by ReLU. What was learnt there is lost. Layers behind keep what they
            have where they are frozen, tied, parametrized or zero.
        generator: Seed for the new weights.
        optimizer: The optimizer or optimizers; the state of weights drawn anew begins anew.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done; ``.undo()`` puts everything back.

    Raises:
        ValueError: If an argument is unknown.
        UnsupportedModelError: If there is nothing to replace; the message says what stands in the way.

    Source:
        Glorot, Bordes, Bengio (2011), "Deep Sparse Rectifier Neural Networks", AISTATS; He, Zhang, Ren, Sun (2015),
        arXiv 1502.01852, for the weights that go with it.
    """
    if to not in get_args(ActivationName):
        raise ValueError(f"to must be one of {', '.join(get_args(ActivationName))}, got {to!r}")
    optimizers = checked(model, optimizer)
    named = chosen(model, modules)
    found = survey(model, batch, compute_loss)
    edits, skipped, layers = _plan(found, to, named)
    if initialize_layers and layers and dry_run:
        edits = [*edits, *(Edit(words=f"{name}: weight drawn anew for {to}", make=_nothing) for name in layers)]
    applied = operate(to, model, optimizers, edits, skipped, dry_run=dry_run, batch=batch, compute_loss=compute_loss)
    if not initialize_layers or not layers or dry_run:
        return applied
    again = partial(
        initialize,
        model,
        "he",
        batch=batch,
        compute_loss=compute_loss,
        modules=layers,
        generator=generator,
        optimizer=optimizers,
    )
    return chain(applied, again)


def _nothing(kept: Ledger) -> nn.Module:
    raise NotImplementedError  # of a dry run, which makes no edit


def _plan(
    found: Survey, to: ActivationName, named: dict[str, nn.Module] | None
) -> tuple[list[Edit], dict[str, str], list[str]]:
    kinds = _SATURATING if to == "relu" else _SATURATING + DYING
    wanted = _SATURATING_FUNCTIONS if to == "relu" else _SATURATING_FUNCTIONS | _DYING_FUNCTIONS
    in_code = replace_functions(found, wanted, to.replace("-", "_"), named, _whole)
    edits, skipped = in_code.edits, in_code.skipped
    layers = dict.fromkeys(layers_before(found, in_code.ops) if in_code.ops else ())
    behind = dict.fromkeys(layers_behind(found, in_code.ops) if in_code.ops else ())
    for raw, module in found.model.named_modules():
        name = clean_name(raw)
        if named is not None and all(module is not other for other in named.values()):
            continue
        if named is None and type(module) not in kinds and not _misbehaves(found, module):
            continue
        if named is not None and describe(module).role != "activation" and module not in found.own:
            if any(module is other for other in in_code.modules):
                continue
            raise ValueError(f"modules names {name!r}, which is {type(module).__name__} and no activation")
        reason = _why_not(found, module, by_name=named is not None)
        if reason is not None:
            skipped[name] = reason
            continue
        before, after = _layers_around(found, module)
        layers.update(dict.fromkeys(before))
        behind.update(dict.fromkeys(after))
        edits.append(
            Edit(words=f"{name}: {type(module).__name__} > {type(_NEW[to]()).__name__}", make=partial(_put, module, to))
        )
    layers.update(dict.fromkeys(_free(found.model, behind, layers)))
    return edits, skipped, [name for name in (clean_name(raw) for raw, _ in found.layers()) if name in layers]


def _free(model: nn.Module, behind: Iterable[str], before: Iterable[str]) -> list[str]:
    """Return the layers behind that may be drawn anew: none that is frozen, tied, made by something else, or zero."""
    known = dict(layers_of(model, None)[0])
    taken = {id(known[name].weight) for name in before if name in known}
    return [
        name
        for name in behind
        if name in known
        and not is_parametrized(known[name])
        and id(known[name].weight) not in taken
        and bool(torch.count_nonzero(made_weight(known[name])))
    ]


def _whole(found: Survey, module: nn.Module) -> bool:
    """Whether a module is an activation that is replaced as such; one of its author's own may call ReLU in its code."""
    return describe(module).role == "activation" or _misbehaves(found, module)


def _misbehaves(found: Survey, module: nn.Module) -> bool:
    """Whether an activation of the author's own is flat at both ends, as sigmoid is, or grows without bound, as exp."""
    known = found.own.get(module)
    if known is None:
        return False
    below, *near, above = np.abs(known.derivative(np.array([-_END, -1.0, 0.0, 1.0, _END])))
    return bool(max(below, above) < _FLAT * max(near)) or math.isinf(known.derivative_bound)


def _why_not(found: Survey, module: nn.Module, *, by_name: bool) -> str | None:
    for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(module, attribute):
            return "it has hooks, which would be lost with it"
    for outer in found.model.modules():
        flagged = getattr(outer, "activation_relu_or_gelu", 0)
        if isinstance(outer, nn.TransformerEncoderLayer) and outer.activation is module and flagged:
            return "torch's TransformerEncoderLayer computes its activation itself in evaluation mode, past any module"
    return None if by_name else not_hidden(found, module)


def not_hidden(found: Survey, module: nn.Module) -> str | None:
    """Return why an activation is not a hidden one, ``None`` where it is."""
    if found.trace is None:
        order = [m for m in found.model.modules() if next(m.children(), None) is None or affine(m)]
        rest = order[next(i for i, m in enumerate(order) if m is module) + 1 :]
        return None if any(affine(m) for m in rest) else "it is at the output"
    uses = [
        op for op in found.trace.ops if found.owners.get(op.index, (None,))[0] is module and op.kind == "activation"
    ]
    if not uses:
        return "it did not run on the batch"
    for op in uses:
        if found.trace.gated_by(op.index):
            return "it is a gate: its result multiplies something else"
        if not any(found.trace.ops[index].kind == "layer" for index in found.trace.descendants(op.index)):
            return "it is at the output"
    return None


def _layers_around(found: Survey, module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the layers whose output the activation takes, and those that take its own; past norms and the like."""
    if found.trace is None:
        order = [(name, m) for name, m in found.model.named_modules() if next(m.children(), None) is None or affine(m)]
        place = next(i for i, (_, m) in enumerate(order) if m is module)
        before, behind = ([clean_name(n) for n, m in part if affine(m)] for part in (order[:place], order[place:]))
        return before[-1:], behind[:1]
    ops = [op for op in found.trace.ops if found.owners.get(op.index, (None,))[0] is module]
    return layers_before(found, ops), layers_behind(found, ops)


def _put(module: nn.Module, to: ActivationName, kept: Ledger) -> nn.Module:
    new = _NEW[to]().train(module.training)
    kept.replace(module, new)
    return new
