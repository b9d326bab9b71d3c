"""A few entries of every parameter and its gradient, taken before an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Samples"]


@dataclass(slots=True, eq=False)
class Samples:
    """A few entries of every readable parameter of one device before a step, to compare with those after it.

    Attributes:
        rows: Rows of the parameters in the table.
        sizes: Entries taken of each.
        parameters: The parameters themselves.
        before: Entries of the weights, float32, shape ``[sum of sizes]``.
        gradients: The same entries of the gradients; zeros where a gradient is laid out in another way.
    """

    rows: list[int]
    sizes: list[int]
    parameters: list[nn.Parameter]
    before: Tensor
    gradients: Tensor
