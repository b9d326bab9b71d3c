"""A function's derivative at one point, as products with a Jacobian and its transpose; three ways to take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gradguard.errors import GradientsUnavailableError

__all__ = ["Differential", "Function", "differential"]

Function = Callable[[Tensor], Tensor]

_AGREEMENT = 1e-3
"""Largest relative difference between <u, Jv> and <J'u, v> at which both are believed. Ours: rounding gives 1e-15 in
float64 and 1e-6 in float32, finite differences over a smooth function 1e-10; a wrong derivative gives some tenths."""

_TRIES = 2
"""Random pairs that are compared."""


class Differential(Protocol):
    """Products with the Jacobian of a function at one point; vectors have the shapes of input and output."""

    method: str
    output: Tensor

    def forward(self, vector: Tensor) -> Tensor:
        """Multiply a vector at the input by the Jacobian."""

    def backward(self, vector: Tensor) -> Tensor:
        """Multiply a vector at the output by the transposed Jacobian."""


class _Functional:
    """Forward mode and reverse mode of ``torch.func``."""

    method = "torch.func"

    def __init__(self, function: Function, point: Tensor) -> None:
        self._function, self._point = function, point
        self.output, self._pull, *_ = torch.func.vjp(function, point)
        self.output = self.output.detach()

    def forward(self, vector: Tensor) -> Tensor:
        with torch.no_grad():
            _, pushed, *_ = torch.func.jvp(self._function, (self._point,), (vector,))
            return torch.as_tensor(pushed).detach()

    def backward(self, vector: Tensor) -> Tensor:
        with torch.no_grad():
            (pulled,) = self._pull(vector)
            return torch.as_tensor(pulled).detach()


class _Backward:
    """Reverse mode of autograd, over a graph that is recorded once."""

    method = "double backward"

    def __init__(self, function: Function, point: Tensor) -> None:
        self._point = point.detach().clone().requires_grad_()
        with torch.enable_grad():
            self._result = function(self._point)
        if not self._result.requires_grad:
            raise GradientsUnavailableError("the output depends on the input through nothing that autograd has seen")
        self.output = self._result.detach()

    def backward(self, vector: Tensor) -> Tensor:
        return self._pulled(vector, create_graph=False)

    def _pulled(self, vector: Tensor, *, create_graph: bool) -> Tensor:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            self._result, self._point, vector, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(self._point) if gradients[0] is None else gradients[0]


class _DoubleBackward(_Backward):
    """Forward products as the derivative of the backward ones, which are linear in their vector.

    Source: Townsend (2017), "A new trick for calculating Jacobian vector products".
    """

    def __init__(self, function: Function, point: Tensor) -> None:
        super().__init__(function, point)
        self._dummy = torch.zeros_like(self.output, requires_grad=True)
        with torch.enable_grad():
            self._linear = self._pulled(self._dummy, create_graph=True)

    def forward(self, vector: Tensor) -> Tensor:
        pushed: tuple[Tensor | None, ...] = torch.autograd.grad(
            self._linear, self._dummy, vector, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.output) if pushed[0] is None else pushed[0]


class _Differences(_Backward):
    """Forward products as central differences, whose error falls with the square of the step until rounding takes over.

    Source: Nocedal, Wright (2006), "Numerical Optimization", section 8.1: the cube root of the machine epsilon.
    """

    method = "finite differences"

    def __init__(self, function: Function, point: Tensor) -> None:
        super().__init__(function, point)
        self._function = function

    def forward(self, vector: Tensor) -> Tensor:
        size = float(torch.linalg.vector_norm(vector))
        if size == 0.0:
            return torch.zeros_like(self.output)
        point = self._point.detach()
        reach = float(torch.linalg.vector_norm(point)) or 1.0
        step = torch.finfo(point.dtype).eps ** (1.0 / 3.0) * reach / size
        with torch.no_grad():
            change: Tensor = self._function(point + step * vector) - self._function(point - step * vector)
        return change.div(2.0 * step)


_WAYS: tuple[Callable[[Function, Tensor], Differential], ...] = (_Functional, _DoubleBackward, _Differences)


def differential(function: Function, point: Tensor, generator: torch.Generator) -> tuple[Differential, float]:
    """Return the derivative of a function by the first way that works, and how exact its products are.

    A way works where it raises nothing and where ``<u, J v>`` and ``<J' u, v>`` agree for random ``u`` and ``v``.

    Args:
        function: Pure: the same input gives the same output, and nothing else changes.
        point: Where, any floating-point shape.
        generator: Gives ``u`` and ``v``.

    Returns:
        The derivative, and the relative disagreement of the two products.

    Raises:
        GradientsUnavailableError: If no way works; its notes say why.
    """
    reasons = []
    for way in _WAYS:
        try:
            found = way(function, point)
            disagreement = _disagreement(found, point, generator)
        except Exception as error:  # noqa: BLE001  # the function is the user's: what fails in one way may go in another
            reasons.append(f"{_name(way)}: {type(error).__name__}: {_first_line(error)}")
            continue
        if disagreement <= _AGREEMENT:
            return found, disagreement
        reasons.append(f"{_name(way)}: products with the Jacobian and its transpose disagree by {disagreement:.1e}")
    failure = GradientsUnavailableError("the derivative of the output by the input could not be taken in any way")
    for reason in reasons:
        failure.add_note(reason)
    raise failure


def _disagreement(found: Differential, point: Tensor, generator: torch.Generator) -> float:
    """Return the largest relative difference of both products over random pairs; infinity where they are not finite."""
    worst = 0.0
    for _ in range(_TRIES):
        right = random_like(point, generator)
        left = random_like(found.output, generator)
        pushed, pulled = found.forward(right), found.backward(left)
        here, there = (left * pushed).sum().double(), (pulled * right).sum().double()
        # What <u, Jv> would scatter by for a random u, so that a wrong product is seen in any dimension.
        size = float(torch.stack([torch.linalg.vector_norm(pushed), torch.linalg.vector_norm(pulled)]).max())
        difference = float((here - there).abs())
        if not (difference < float("inf") and size < float("inf")):
            raise GradientsUnavailableError("the derivative is not finite")
        worst = max(worst, difference / size if size > 0.0 else 0.0)
    return worst


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers of the shape, dtype and device of a tensor, from a generator on the CPU."""
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return drawn.to(device=tensor.device, dtype=tensor.dtype)


def _name(way: Callable[[Function, Tensor], Differential]) -> str:
    return str(getattr(way, "method", way))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
