"""Finding the tensors in whatever a module takes or returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

__all__ = ["floating_tensors", "tensors"]

_DEPTH = 8
"""Nesting looked into; deeper structures are no outputs of a layer."""


def tensors(value: Any, *, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested structure of tuples, lists, mappings and dataclasses, in order.

    A tensor is yielded whole, never iterated over. Objects that are none of these are passed over.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item, depth=depth - 1)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item, depth=depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors(getattr(value, item.name, None), depth=depth - 1)


def floating_tensors(value: Any) -> list[torch.Tensor]:
    """Return the dense floating-point or complex tensors in a nested structure."""
    if type(value) is torch.Tensor:
        return [value] if value.is_floating_point() and not value.is_meta else []
    return [t for t in tensors(value) if (t.is_floating_point() or t.is_complex()) and not t.is_meta]
