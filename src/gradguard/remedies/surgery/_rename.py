"""Old checkpoints for a changed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["rename"]

_T = TypeVar("_T")


def rename(state: Mapping[str, _T], names: Mapping[str, str]) -> dict[str, _T]:
    """Return a ``state_dict`` from before an operation under the names from after it.

    Args:
        state: What ``model.state_dict()`` gave before.
        names: :attr:`gradguard.remedies.Applied.names` of the operation.

    Returns:
        The entries that still exist. Load them with ``strict=False``: what the operation added is not among them.

    Example:
        >>> rename({"0.weight": 1, "gone": 2}, {"0.weight": "0.layer.weight"})
        {'0.layer.weight': 1}
    """
    return {names[name]: value for name, value in state.items() if name in names}
