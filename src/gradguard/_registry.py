"""The one registry of watched models. Weak on both sides: it keeps nothing alive."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from gradguard.guard import Guard

__all__ = ["enrol", "guard_of", "strike"]

_GUARDS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Guard]] = weakref.WeakKeyDictionary()


def enrol(model: nn.Module, guard: Guard) -> None:
    """Remember which guard watches a model."""
    _GUARDS[model] = weakref.ref(guard)


def strike(model: nn.Module) -> None:
    """Forget which guard watches a model."""
    _GUARDS.pop(model, None)


def guard_of(model: nn.Module) -> Guard | None:
    """Return the guard that is attached to a model, if there is one."""
    known = _GUARDS.get(model)
    guard = known() if known is not None else None
    return guard if guard is not None and guard.attached else None
