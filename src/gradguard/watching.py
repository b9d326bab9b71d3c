"""watch(): look at what is given, and attach a guard to it, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gradguard._arguments import check_model, check_optimizers
from gradguard._registry import guard_of
from gradguard.config import GuardConfig
from gradguard.errors import UnsupportedModelError
from gradguard.guard import Guard
from gradguard.remedies.live.options import Clip, LiveOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradguard._cadence import Cadence

__all__ = ["attach", "watch"]


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: GuardConfig | None = None,
    *,
    scaler: Any = None,
    clip: Clip = None,
    on_spike: Literal["skip"] | None = None,
    spike_budget: float = 0.05,
    lr_backoff: bool | float | None = None,
    **overrides: Any,
) -> Guard:
    """Watch a model's gradients while it trains. Attaches at once; the guard is also a context manager.

    Args:
        model: Any module with trainable parameters.
        optimizer: The optimizer or optimizers that update it, or ``None`` for a loop that calls :meth:`Guard.step`.
        config: Thresholds and cadence; defaults otherwise.
        scaler: The ``torch.amp.GradScaler`` of the loop, if there is one, so that norms are those of unscaled
            gradients.
        clip: Clip before each optimizer step: ``"adaptive"`` for :class:`gradguard.clip.Adaptive`, a clipper, or what
            makes one (called with the named parameters of an optimizer, ``scaler=`` and ``optimizer=``; a class of
            :mod:`gradguard.clip` does), or a sequence of these for several optimizers. Leave your own clipping out.
        on_spike: ``"skip"`` leaves out steps whose gradient norm is a spike by the rule of GG103, or whose gradients
            are not finite: the optimizer gets none and changes nothing.
        spike_budget: Share of the newest 100 steps that may be left out as spikes, 0.01 to 0.5.
        lr_backoff: Multiply learning rates, for the length of each step, by this factor (``True``: 0.5) when an
            exploding gradient, a rate that is too high or a divergence is found; three times at most.
        **overrides: Fields of :class:`gradguard.GuardConfig` by name, for instance ``every=1``.

    Returns:
        The guard. Watching the same model with the same optimizers again returns the same guard.

    Raises:
        TypeError: If an argument is of the wrong kind or an option is unknown.
        UnsupportedModelError: If the model has nothing to train, the optimizer holds none of its parameters, or the
            model is already watched with other optimizers.

    Example:
        >>> import torch, gradguard
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with gradguard.watch(model, optimizer) as guard:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         loss = model(torch.randn(16, 4)).square().mean()
        ...         loss.backward()
        ...         guard.record(loss=loss)
        ...         optimizer.step()
        >>> guard.diagnose().healthy
        True
    """
    settings = (config if config is not None else GuardConfig()).with_overrides(**overrides)
    remedies = LiveOptions(clip=clip, on_spike=on_spike, spike_budget=spike_budget, lr_backoff=lr_backoff)
    return attach(model, check_optimizers(optimizer), settings, scaler=scaler, remedies=remedies)


def attach(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    config: GuardConfig,
    *,
    scaler: Any = None,
    cadence: Callable[[], Cadence] | None = None,
    remedies: LiveOptions | None = None,
) -> Guard:
    """Do what :func:`watch` does, for integrations: with a cadence of their own.

    Args:
        model: See :func:`watch`.
        optimizers: Torch optimizers, out of their wrappers.
        config: Thresholds and cadence.
        scaler: See :func:`watch`.
        cadence: Makes the cadence of one optimizer; that of the configuration otherwise.
        remedies: What may be done to the run; nothing otherwise.

    Raises:
        UnsupportedModelError: See :func:`watch`.
    """
    check_model(model, optimizers)
    guard = guard_of(model)
    if guard is not None:
        if guard.holds(optimizers):
            if remedies is not None and remedies.on and remedies != guard.remedies:
                raise UnsupportedModelError(
                    f"this {type(model).__name__} is already watched, without or with other clip=, on_spike= and "
                    "lr_backoff=. Call detach() on the first guard before"
                )
            return guard
        raise UnsupportedModelError(
            f"this {type(model).__name__} is already watched with {guard.optimizer_names}, and cannot be watched with "
            "other optimizers at the same time. Call detach() on the first guard, or pass all in one call: "
            "gradguard.watch(model, [first, second])"
        )
    return Guard(model, optimizers, config, scaler=scaler, cadence=cadence, remedies=remedies)
