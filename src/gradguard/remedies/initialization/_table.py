"""The initialization remedies by name, all called alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import nn

from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization._attention import initialize_query_key
from gradguard.remedies.initialization._lsuv import lsuv
from gradguard.remedies.initialization._query_key import scale_query_key
from gradguard.remedies.initialization._recurrent import chrono_initialize, forget_gate_bias, orthogonal_recurrent
from gradguard.remedies.initialization._residual import fixup, rezero, skip_init
from gradguard.remedies.initialization._schemes import initialize

__all__ = ["REMEDIES", "Remedy"]


Remedy: TypeAlias = Callable[..., Applied]
"""Called as ``remedy(model, batch=None, compute_loss=None, **arguments)``; ``optimizer`` is one of the arguments."""


def _without_batch(
    function: Callable[..., Applied],
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    **arguments: Any,
) -> Applied:
    return function(model, **arguments)


def _with_batch(
    function: Callable[..., Applied],
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    **arguments: Any,
) -> Applied:
    if batch is None:
        raise ValueError(f"{getattr(function, '__name__', 'this remedy')} runs the model once: pass batch=")
    return function(model, batch, compute_loss=compute_loss, **arguments)


REMEDIES: Mapping[str, Remedy] = MappingProxyType(
    {
        "he-initialization": partial(initialize, scheme="he"),
        "xavier-initialization": partial(initialize, scheme="xavier"),
        "lecun-initialization": partial(initialize, scheme="lecun"),
        "orthogonal-initialization": partial(initialize, scheme="orthogonal"),
        "delta-orthogonal-initialization": partial(initialize, scheme="delta-orthogonal"),
        "lsuv": partial(_with_batch, lsuv),
        "fixup": partial(_with_batch, fixup),
        "skip-init": skip_init,
        "rezero": rezero,
        "forget-gate-bias": partial(_without_batch, forget_gate_bias),
        "chrono-initialization": partial(_without_batch, chrono_initialize),
        "scale-query-key": partial(_with_batch, scale_query_key),
        "orthogonal-recurrent": partial(_without_batch, orthogonal_recurrent),
        "query-key-initialization": partial(_without_batch, initialize_query_key),
    }
)
"""Function by the name that a prescription carries in ``remedy``."""
