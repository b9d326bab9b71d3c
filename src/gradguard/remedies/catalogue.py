"""Every remedy that can be applied, by the name that a prescription carries; the others are advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization import REMEDIES as INITIALIZATIONS
from gradguard.remedies.initialization import chrono_initialize
from gradguard.remedies.optimizing import attach_clipper, even_learning_rates, scale_learning_rate, set_option
from gradguard.remedies.surgery import REMEDIES as OPERATIONS

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LEVELS", "Remedy", "Target", "find", "names"]

LEVELS = MappingProxyType(
    {"optimizer": 0, "initialization": 1, "normalization": 2, "activation": 3, "residual": 4, "cell": 5}
)
"""How much a remedy changes, from least to most. Source: ours, algorithms.md, section K."""


_TIME_STEPS = 100
"""Steps to remember over where nobody says. Ours."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a remedy is applied to.

    Attributes:
        model: The model to change.
        optimizer: Its optimizer, ``None`` where there is none yet.
        batch: A batch, for remedies that run the model once.
        compute_loss: How to get a loss from model and batch.
        arguments: Further arguments, by name; those that a remedy does not know are left out.
    """

    model: nn.Module
    optimizer: Optimizer | None
    batch: Any
    compute_loss: Callable[[Any, Any], Any] | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A remedy that can be applied.

    Attributes:
        name: What a prescription calls it.
        level: How much it changes, from 0 to 5; see :data:`LEVELS`.
        acts_on: ``"model"`` where it changes the model, ``"optimizer"`` where it acts through the optimizer.
        run: Applies it.
        searched: Whether its factor is a learning rate's, which a trial searches by decades.
    """

    name: str
    level: int
    acts_on: Literal["model", "optimizer"]
    run: Callable[[Target], Applied]
    searched: bool = False


def find(name: str) -> Remedy | None:
    """Return a remedy by name, ``None`` where the library cannot apply it."""
    return _CATALOGUE.get(name)


def names() -> tuple[str, ...]:
    """Return the names of all remedies that can be applied."""
    return tuple(_CATALOGUE)


def _run_on_model(function: Callable[..., Applied], target: Target) -> Applied:
    return function(target.model, batch=target.batch, compute_loss=target.compute_loss, optimizer=target.optimizer)


def _chrono(target: Target) -> Applied:
    steps = int(target.arguments.get("max_time", _TIME_STEPS))
    return chrono_initialize(target.model, steps, optimizer=target.optimizer)


def _gated(operation: Callable[..., Applied], target: Target) -> Applied:
    return _run_on_model(partial(operation, max_time=target.arguments.get("max_time")), target)


def _optimizer(target: Target) -> Optimizer:
    if target.optimizer is None:
        raise ValueError("this remedy acts through the optimizer: pass optimizer=")
    return target.optimizer


def _rate(default: float, target: Target) -> Applied:
    factor = float(target.arguments.get("factor", default))
    return scale_learning_rate(target.model, _optimizer(target), factor=factor)


def _clip(default: float | None, target: Target) -> Applied:
    return attach_clipper(target.model, _optimizer(target), max_norm=target.arguments.get("max_norm", default))


def _even(target: Target) -> Applied:
    return even_learning_rates(target.model, _optimizer(target))


def _option(remedy: str, option: str, value: Any, target: Target) -> Applied:
    return set_option(target.model, _optimizer(target), remedy=remedy, option=option, value=value)


def _lower_beta2(betas: tuple[float, float]) -> tuple[float, float]:
    return (betas[0], min(betas[1], 0.95))


def _entries() -> dict[str, Remedy]:
    found = {
        "lower-learning-rate": Remedy(
            name="lower-learning-rate", level=0, acts_on="optimizer", run=partial(_rate, 0.1), searched=True
        ),
        "higher-learning-rate": Remedy(
            name="higher-learning-rate", level=0, acts_on="optimizer", run=partial(_rate, 10.0), searched=True
        ),
        "even-learning-rates": Remedy(name="even-learning-rates", level=0, acts_on="optimizer", run=_even),
        "clip-norm": Remedy(name="clip-norm", level=0, acts_on="optimizer", run=partial(_clip, 1.0)),
        "adaptive-clip": Remedy(name="adaptive-clip", level=0, acts_on="optimizer", run=partial(_clip, None)),
        "smaller-epsilon": Remedy(
            name="smaller-epsilon",
            level=0,
            acts_on="optimizer",
            run=partial(_option, "smaller-epsilon", "eps", 1e-15),
        ),
        "lower-beta2": Remedy(
            name="lower-beta2", level=0, acts_on="optimizer", run=partial(_option, "lower-beta2", "betas", _lower_beta2)
        ),
    }
    for name, function in INITIALIZATIONS.items():
        found[name] = Remedy(
            name=name, level=LEVELS["initialization"], acts_on="model", run=partial(_run_on_model, function)
        )
    found["chrono-initialization"] = replace(found["chrono-initialization"], run=_chrono)  # it needs a length
    for name, (level, operation) in OPERATIONS.items():
        found[name] = Remedy(name=name, level=LEVELS[level], acts_on="model", run=partial(_run_on_model, operation))
    for name in ("gated-cell", "lstm"):  # they want the same length
        found[name] = replace(found[name], run=partial(_gated, OPERATIONS[name][1]))
    return found


_CATALOGUE: Mapping[str, Remedy] = MappingProxyType(_entries())
