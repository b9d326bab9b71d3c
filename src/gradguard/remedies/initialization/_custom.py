"""Activations that users write themselves: modules without parameters that work on each entry by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gradguard import theory
from gradguard._untouched import FAILURES, untouched
from gradguard.monitors._describe import describe
from gradguard.records import FloatArray

__all__ = ["custom_activation", "custom_activations", "is_activation"]

_FAR = 30.0
"""Largest input that is looked at, in both directions: exp(30) is 10^13, and sigmoid(-30) 10^-13. Ours."""

_POINTS = 241
"""Inputs that are looked at, four per unit. Ours."""

_GROWS = 1.01
"""Times its value two units before the ends above which a derivative has no bound. Ours: that of x^2 grows by 1.07 over
the last two units, that of a function that is a straight line there does not grow."""


def custom_activations(model: nn.Module) -> Mapping[nn.Module, theory.Activation]:
    """Return the modules of a model that are activations of its author's own, with what they compute.

    Args:
        model: The model; see :func:`custom_activation`.
    """
    found = {module: custom_activation(module) for module in model.modules()}
    return {module: known for module, known in found.items() if known is not None}


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation, one of torch's or one of its author's own."""
    return describe(module).role == "activation" or custom_activation(module) is not None


def custom_activation(module: nn.Module) -> theory.Activation | None:
    """Return what a module computes if it is an elementwise function that bends, else ``None``.

    It must be none of torch's own, have neither children, parameters nor buffers, give the same for the same input,
    give for each entry what it gives for that entry alone, and pass a gradient. The identity and a constant factor are
    no activations.

    Args:
        module: Any module; it is called on float64 numbers, past its hooks, and random states are put back.

    Source: ours. Derivatives are those of autograd, their bound the largest between -30 and 30.
    """
    own = not type(module).__module__.startswith("torch.")
    if not own or any(True for kind in (module.children, module.parameters, module.buffers) for _ in kind()):
        return None
    given = torch.linspace(-_FAR, _FAR, _POINTS, dtype=torch.float64)
    try:
        with untouched(module):
            slope = _slope(module, given) if _by_entry(module, given) else None
    except FAILURES:
        return None
    if slope is None or not torch.isfinite(slope).all() or float(slope.max() - slope.min()) == 0.0:
        return None
    return theory.Activation(
        name=type(module).__name__,
        function=_on_arrays(module.forward),
        derivative=_on_arrays(lambda x: _slope(module, x)),
        derivative_bound=_bound(slope.abs()),
    )


def _by_entry(module: nn.Module, given: Tensor) -> bool:
    """Whether a module gives the same for entries in another order, in another shape and among others."""
    made = module.forward(given)
    if not isinstance(made, Tensor) or made.shape != given.shape or made.dtype != given.dtype:
        return False
    part = given[: _POINTS // 2].reshape(4, -1)
    return torch.equal(module.forward(given.flip(0)), made.flip(0)) and torch.equal(
        module.forward(part).flatten(), made[: _POINTS // 2]
    )


def _slope(module: nn.Module, given: Tensor) -> Tensor | None:
    x = given.detach().requires_grad_()
    with torch.enable_grad():
        total = module.forward(x).sum()
    return torch.autograd.grad(total, x)[0] if total.requires_grad else None


def _bound(sizes: Tensor) -> float:
    """Return the largest of the sizes of a derivative, infinity where it still grows at an end."""
    inner = float(sizes[8:-8].max())
    return math.inf if float(sizes.max()) > _GROWS * inner else float(sizes.max())


def _on_arrays(function: Callable[[Tensor], Tensor | None]) -> Callable[[FloatArray], FloatArray]:
    def run(x: FloatArray) -> FloatArray:
        with torch.no_grad():
            made = function(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)))
        result: FloatArray = np.zeros_like(x) if made is None else made.detach().numpy()
        return result

    return run
