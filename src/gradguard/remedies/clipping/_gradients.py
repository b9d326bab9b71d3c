"""The gradients of one step as real, strided, local tensors that can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gradguard.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Gradient", "Parameters", "Shards", "Targets", "gather", "local"]

Parameters: TypeAlias = "nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]"
"""What a clipper may be given."""


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """How a tensor is spread over ranks."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of it."""
        return all(placement.is_replicate() for placement in self.placements)


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """The gradient of one parameter: what of it lies on this rank.

    Attributes:
        name: Name of the parameter, or its position where it came without a name.
        parameter: The parameter.
        values: Alias of the gradient: changing it changes ``parameter.grad``. Real, strided, local; of a sparse
            gradient the values, coalesced; of a complex one pairs of reals in a last dimension.
        rows: Rows of the parameter that ``values`` stands for, where the gradient is sparse.
        shards: How it is spread over ranks, ``None`` for an ordinary tensor.
    """

    name: str
    parameter: Tensor
    values: Tensor
    rows: Tensor | None
    shards: Shards | None


class Targets:
    """The parameters of a clipper, each once, under its first name.

    A module is asked for its parameters at every step, so that layers may be frozen, unfrozen and replaced.
    """

    def __init__(self, parameters: Parameters) -> None:
        """Take a module, tensors, or pairs of name and tensor.

        Raises:
            TypeError: If it is none of these.
            ValueError: If there is no parameter at all.
        """
        self._module = parameters if isinstance(parameters, nn.Module) else None
        self._pairs = [] if self._module is not None else _unique(_pairs(parameters))
        self.named = self._module is not None or any(name is not None for name, _ in self._pairs)
        if not self.pairs():
            where = f"{type(parameters).__name__} has none" if self._module is not None else "the iterable is empty"
            raise ValueError(
                f"parameters must hold at least one parameter, and {where}. Pass model.parameters(), "
                "model.named_parameters() or the model; an iterator can be used only once"
            )

    def pairs(self) -> list[tuple[str, Tensor]]:
        """Return every parameter with its name, or its position where it has none."""
        if self._module is not None:
            return list(self._module.named_parameters())
        return [(str(at) if name is None else name, parameter) for at, (name, parameter) in enumerate(self._pairs)]


def gather(pairs: Sequence[tuple[str, Tensor]]) -> list[Gradient]:
    """Return the gradients that are there, in order; sparse ones are coalesced in their place.

    Raises:
        UnsupportedModelError: If a gradient is of a layout that cannot be clipped.
    """
    return [_gradient(name, parameter, parameter.grad) for name, parameter in pairs if parameter.grad is not None]


def local(tensor: Any) -> Tensor:
    """Return what of a tensor lies on this rank: an alias, without a history."""
    values: Tensor = tensor.detach()
    if hasattr(values, "to_local"):
        values = values.to_local()
    return values


def _gradient(name: str, parameter: Tensor, grad: Tensor) -> Gradient:
    shards, rows = None, None
    if hasattr(grad, "_local_tensor"):
        grad, shards = _resolve(parameter, grad)
    values = grad.detach()
    if shards is not None:
        values = local(values)
    if values.layout is torch.sparse_coo:
        if not values.is_coalesced():
            parameter.grad = values.coalesce()  # the same gradient; a row may stand twice in it before
            values = parameter.grad.detach()
        if values.sparse_dim() == 1:
            rows = values._indices()[0]  # noqa: SLF001  # indices() refuses a detached alias
        values = values._values()  # noqa: SLF001  # values() as well
    if values.layout is not torch.strided:
        raise UnsupportedModelError(
            f"the gradient of {name!r} has layout {values.layout}, which cannot be clipped. Dense and sparse_coo "
            "gradients can; leave this parameter out of the clipper"
        )
    if values.is_complex():
        values = torch.view_as_real(values)
    return Gradient(name, parameter, values, rows, shards)


def _resolve(parameter: Tensor, grad: Any) -> tuple[Any, Shards]:
    """Return a DTensor gradient without pending sums, and its layout."""
    if any(placement.is_partial() for placement in grad.placements):
        from torch.distributed.tensor import Replicate

        summed = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        parameter.grad = grad = grad.redistribute(placements=summed)
    return grad, Shards(grad.device_mesh, tuple(grad.placements))


def _pairs(parameters: Any) -> Iterator[tuple[str | None, Tensor]]:
    if isinstance(parameters, Tensor):
        yield None, parameters
        return
    if isinstance(parameters, (str, bytes, dict)) or not isinstance(parameters, Iterable):
        raise TypeError(_not_parameters(type(parameters).__name__))
    for item in parameters:
        if isinstance(item, Tensor):
            yield None, item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor):
            yield item
        else:
            raise TypeError(_not_parameters(f"an iterable with a {type(item).__name__} in it"))


def _not_parameters(got: str) -> str:
    return (
        f"parameters must be a torch.nn.Module, an iterable of tensors or of (name, tensor) pairs, got {got}. Pass "
        "model.parameters(), model.named_parameters() or the model"
    )


def _unique(pairs: Iterable[tuple[str | None, Tensor]]) -> list[tuple[str | None, Tensor]]:
    seen: dict[int, tuple[str | None, Tensor]] = {}
    for name, parameter in pairs:
        seen.setdefault(id(parameter), (name, parameter))
    return list(seen.values())
