"""Variance-scaling and orthogonal initialization, with gains from theory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gradguard import theory
from gradguard.remedies._applied import Applied, Snapshot, transaction
from gradguard.remedies.initialization._draw import delta_orthogonal, fans, normal, orthogonal_layer
from gradguard.remedies.initialization._following import Following, following_by_order, following_by_trace
from gradguard.remedies.initialization._gain import stack_gain
from gradguard.remedies.initialization._targets import (
    Generator,
    Layer,
    check_arguments,
    finish,
    generator_of,
    layers_of,
    made_weight,
    module_tensors,
    set_weight,
    zero_bias,
    zeroed,
)
from gradguard.remedies.initialization._trace import trace

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Scheme", "drop_zero_branches", "initialize", "look_behind", "refuse_chosen"]

Scheme = Literal["he", "xavier", "lecun", "orthogonal", "delta-orthogonal"]


def initialize(  # noqa: PLR0913  # all are keywords with defaults
    model: nn.Module,
    scheme: Scheme = "he",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    activation: theory.ActivationLike | None = None,
    gain: float | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    generator: Generator = None,
) -> Applied:
    """Draw the weights of Linear and convolution layers anew, in place, and set their biases to zero.

    ====================  =========================================================================================
    ``"he"``              Gaussian of variance ``gain^2 / fan_in``.
    ``"xavier"``          Gaussian of variance ``2 gain^2 / (fan_in + fan_out)``.
    ``"lecun"``           Gaussian of variance ``1 / fan_in``, whatever the activation; what SELU was made for.
    ``"orthogonal"``      Orthonormal rows or columns times the gain, each group by itself.
    ``"delta-orthogonal"``  Convolutions orthogonal in the centre tap, zero elsewhere; Linear as ``"orthogonal"``.
    ====================  =========================================================================================

    The gain follows from the activation behind each layer, :func:`stack_gain`; a layer with none behind it, such as the
    output layer, has gain 1. Left alone, and named in ``skipped``: frozen, tied-to-an-embedding and attention weights,
    layers whose weight is zero at the end of a residual branch, embeddings, normalization and recurrent layers. A
    weight that several layers share is drawn once.

    Args:
        model: The model; it keeps its modules and parameters.
        scheme: See above.
        batch: A batch to run once, by which the activation behind each layer is found however it is written: a mapping
            is passed as keywords, a tuple or list as arguments. Without it modules count as run in the order in which
            they were defined, and functions such as ``torch.relu`` are invisible.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        activation: The activation behind every layer but the last, where it is not to be looked for.
        gain: The gain of every layer, in place of the one from theory; for ``"lecun"`` none.
        modules: Names of the layers, or of modules around them, to initialise; all by default.
        optimizer: Its state for the changed parameters is dropped; the old one belongs to weights that are gone.
        generator: A CPU generator or a seed; torch's global generator is then left alone. Weights are drawn on the CPU,
            so that a seed gives the same ones on every device.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If an argument is out of range, no activation can be seen, or a layer named is one to leave alone.
        UnsupportedModelError: If the weights cannot be set in place, or there is nothing to set.

    Source:
        He et al. (2015), "Delving Deep into Rectifiers", ICCV, arXiv 1502.01852, section 2.2; Glorot and Bengio (2010),
        "Understanding the difficulty of training deep feedforward neural networks", AISTATS; LeCun et al. (1998),
        "Efficient BackProp", section 4.6; Saxe et al. (2014), ICLR, arXiv 1312.6120; Xiao et al. (2018), ICML, arXiv
        1806.05393.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> applied = initialize(model, "he", generator=0)
        >>> print(applied)
        he-initialization
          0: weight of std 0.141 (gain 1.41 for relu), bias 0
          2: weight of std 0.141 (gain 1), bias 0
        >>> _ = applied.undo()
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}, got {scheme!r}")
    if gain is not None and (scheme == "lecun" or not 0.0 < gain < math.inf):
        raise ValueError(f"gain must be a positive number, and none with scheme 'lecun', got {gain!r} with {scheme!r}")
    optimizers = check_arguments(model, optimizer)
    draw = generator_of(generator)
    layers, skipped = layers_of(model, modules)
    fixed = scheme == "lecun" or gain is not None
    following = look_behind(model, layers, skipped, batch, compute_loss, activation, needed=not fixed)
    layers = drop_zero_branches(layers, following, skipped, traced=batch is not None)
    gains = _gains(layers, following, 1.0 if scheme == "lecun" else gain)
    changes = []
    with transaction() as snapshot:
        for name, module in layers:
            reason = _draw_layer(module, scheme, gains[name], draw, snapshot)
            if reason is None:
                changes.append(_words(name, module, scheme, gains[name], following[name]))
            else:
                skipped[name] = reason
        refuse_chosen(modules, skipped)
        return finish(model, f"{scheme}-initialization", snapshot, optimizers, changes, skipped)


def look_behind(
    model: nn.Module,
    layers: Sequence[Layer],
    skipped: dict[str, str],
    batch: Any,
    compute_loss: Callable[[Any, Any], Any] | None,
    activation: theory.ActivationLike | None = None,
    *,
    needed: bool = True,
) -> Mapping[str, Following]:
    """Return what stands behind each layer, and note the layers that did not run.

    Raises:
        ValueError: If an activation is needed and none can be seen.
    """
    if batch is not None:
        following = following_by_trace(trace(model, batch, compute_loss), layers)
        skipped.update({name: "it did not run on the batch" for name, _ in layers if name not in following})
    else:
        following = following_by_order(model, layers)
        if needed and activation is None and len(layers) > 1 and not any(f.activation for f in following.values()):
            raise ValueError(
                f"no activation module stands behind any of the {len(layers)} layers of this {type(model).__name__}; "
                "functions such as torch.relu are seen on a batch only. Pass batch=, or activation='relu'"
            )
    if activation is None:
        return following
    known = theory.activation(activation)
    names = list(following)
    return {
        name: Following(
            activation=known if name != names[-1] else None,
            normalized=what.normalized,
            uses=what.uses,
            branch_end=what.branch_end,
        )
        for name, what in following.items()
    }


def drop_zero_branches(
    layers: Sequence[Layer], following: Mapping[str, Following], skipped: dict[str, str], *, traced: bool
) -> list[Layer]:
    """Return the layers that ran and do not end a residual branch with a weight of zero.

    Where no batch was run, a zero weight counts as such an end unless every weight is zero.
    """
    ran = [(name, module) for name, module in layers if name in following]
    zero = {name for name, module in ran if not bool(torch.count_nonzero(made_weight(module)))}
    if traced:
        zero = {name for name in zero if following[name].branch_end}
    elif len(zero) == len(ran):
        zero = set()
    skipped.update(dict.fromkeys(zero, "its weight is zero, so that its residual branch starts as the identity"))
    return [(name, module) for name, module in ran if name not in zero]


def refuse_chosen(modules: Iterable[str] | None, skipped: Mapping[str, str]) -> None:
    """Refuse a layer that was named and would be left alone.

    Raises:
        ValueError: If there is one.
    """
    chosen = () if modules is None else [modules] if isinstance(modules, str) else modules
    for name in chosen:
        if name in skipped:
            raise ValueError(f"modules names {name!r}, which is to be left alone: {skipped[name]}")


def _gains(layers: Sequence[Layer], following: Mapping[str, Following], fixed: float | None) -> dict[str, float]:
    """Return the gain of each layer; layers with the same activation behind them count as one stack."""
    stacks: dict[str, list[str]] = {}
    gains = {}
    known = {}
    for name, _ in layers:
        activation = following[name].activation
        if fixed is not None or activation is None:
            gains[name] = 1.0 if fixed is None else fixed
        else:
            key = repr(activation)
            known[key] = activation
            stacks.setdefault(key, []).append(name)
    for key, names in stacks.items():
        gains.update(dict.fromkeys(names, stack_gain(known[key], len(names))))
    return gains


def _draw_layer(
    module: nn.Module, scheme: Scheme, gain: float, draw: torch.Generator | None, snapshot: Snapshot
) -> str | None:
    old = made_weight(module)
    if scheme in {"orthogonal", "delta-orthogonal"}:
        make = delta_orthogonal if scheme == "delta-orthogonal" and isinstance(module, _ConvNd) else orthogonal_layer
        value = gain * make(module, old.shape, old.dtype, draw)
    else:
        value = normal(old.shape, old.dtype, _std(module, scheme, gain), draw)
    snapshot.keep(module_tensors(module))
    reason = set_weight(module, value)
    if reason is None:
        zero_bias(module)
    return reason


def _std(module: nn.Module, scheme: Scheme, gain: float) -> float:
    fan_in, fan_out = fans(module, made_weight(module).shape)
    return gain * math.sqrt(2.0 / (fan_in + fan_out) if scheme == "xavier" else 1.0 / fan_in)


def _words(name: str, module: nn.Module, scheme: Scheme, gain: float, behind: Following) -> str:
    cause = f" for {behind.activation.name}" if behind.activation is not None and scheme != "lecun" else ""
    if scheme in {"orthogonal", "delta-orthogonal"}:
        kind = "delta-orthogonal" if scheme == "delta-orthogonal" and isinstance(module, _ConvNd) else "orthogonal"
        what = f"{kind} weight (gain {gain:.3g}{cause})"
    else:
        what = f"weight of std {_std(module, scheme, gain):.3g} (gain {gain:.3g}{cause})"
    return f"{name or type(module).__name__}: {what}{zeroed(module)}"
