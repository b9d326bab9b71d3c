"""Where the numbers of a step ceased to be finite: the operation, its module and what it took. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NonFiniteOrigin", "TensorRange"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """What one tensor held.

    Attributes:
        low: Smallest entry; NaN where an entry is NaN.
        high: Largest entry; NaN where an entry is NaN.
        dtype: Its type, for instance ``"float16"``; empty for a number that is no tensor.
        name: Name of the parameter or buffer that it is, else empty.
    """

    low: float
    high: float
    dtype: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteOrigin:
    """The first operation of a step whose operands were finite and whose result was not, or what came from outside.

    Attributes:
        step: Optimizer step, from 0.
        kind: ``"input"`` (in the data), ``"parameter"`` (in a parameter or buffer), ``"forward"`` or ``"backward"``.
        value: ``"NaN"`` or ``"infinity"``, whichever the first result held (NaN where it held both).
        op: The operation, for instance ``"torch.log"``, or what consumed the data or parameter; empty where unknown.
        node: The graph node whose backward made it, for instance ``"SqrtBackward0"``; empty for the forward pass.
        module: Dotted name of the innermost module that ran it, empty for the model itself or outside of it.
        inside: Whether it ran inside the model's forward pass (else: the loss function, or other code of the loop).
        name: The parameter or buffer concerned.
        place: File and line of the code, for instance ``"net.py:31"``; empty where a module of torch called it.
        operands: What it took in the forward pass, in order.
        also: Where an infinity that it took was put in on purpose, as by a mask; else empty.
        optimizer: Index of the optimizer whose step it was.
    """

    step: int
    kind: str
    value: str
    op: str = ""
    node: str = ""
    module: str = ""
    inside: bool = True
    name: str = ""
    place: str = ""
    operands: tuple[TensorRange, ...] = ()
    also: str = ""
    optimizer: int = 0
