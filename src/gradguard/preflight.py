"""A check before the first step: one forward and one backward pass that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard._arguments import check_model, check_optimizers, check_scaler, has_lazy_parameters
from gradguard._passes import Passes
from gradguard._untouched import untouched
from gradguard.config import GuardConfig
from gradguard.errors import GradGuardError, UnsupportedModelError
from gradguard.findings import Diagnosis, Unobserved
from gradguard.jacobian import stretch_in_loss
from gradguard.observing import Observing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["check"]

_FURTHER_LOOKS = 3
"""Further passes where a parameter got no gradient: stochastic depth skips a block now and then. Ours: at a survival
rate of 0.8, usual for it, a block is skipped in all four passes once in 625 checks."""


def check(
    model: nn.Module,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scaler: Any = None,
    config: GuardConfig | None = None,
    deep: bool = False,
    **overrides: Any,
) -> Diagnosis:
    """Check a model before its first step, by a forward and a backward pass.

    Gradients are taken with ``torch.autograd.grad``, so nothing of the user's fires or moves: parameters, buffers,
    ``.grad``,
    random states (torch, numpy, ``random``), train or eval mode and hooks are left exactly as they were. Attributes
    that the model itself changes in ``forward`` (a Python counter) are beyond reach.

    Args:
        model: Any module with trainable parameters; a LightningModule needs no Trainer.
        batch: What ``compute_loss`` takes as its second argument.
        compute_loss: Called as ``compute_loss(model, batch)``; returns the scalar loss, or a mapping with ``"loss"``.
            It is called once, and up to three times more where a parameter gets no gradient, to tell a block that was
            skipped by chance from one that is cut off. Where float16 overflows at the scaler's scale, or leaves most
            gradients exactly zero, it is called again with other scales and the same random numbers.
        optimizer: The optimizer or optimizers to be used, if known: levels differ between SGD and Adam, and parameters
            that no optimizer holds are found.
        scaler: The ``torch.amp.GradScaler`` of the loop, if there is one: the loss is multiplied by its scale, halved
            as long as gradients overflow, and gradients are reported without it. The scaler itself is only read.
        config: Thresholds; defaults otherwise.
        deep: Also measure how far the Jacobian of the whole net stretches, on a copy; see
            :func:`gradguard.jacobian.stretch`. It stands in ``diagnosis.jacobian`` and changes no verdict. Off by
            default: it takes 10 to 70 times as long as the rest (ours, on five small nets, one CPU core).
        **overrides: Fields of :class:`gradguard.GuardConfig` by name, for instance ``select="GG101"``.

    Returns:
        The diagnosis; one observation is enough for it to call a model healthy as far as it can be seen before
        training.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the loss is not a scalar.
        UnsupportedModelError: If the model has nothing to train, or the loss depends on none of its parameters.

    Example:
        >>> import torch, gradguard
        >>> _ = torch.manual_seed(0)
        >>> layers = [m for _ in range(20) for m in (torch.nn.Linear(16, 16), torch.nn.Sigmoid())]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 1))
        >>> gradguard.check(model, torch.randn(32, 16), lambda m, x: m(x).square().mean()).primary.code
        'GG101'
    """
    settings = (config if config is not None else GuardConfig()).with_overrides(**overrides)
    optimizers = check_optimizers(optimizer)
    check_model(model, optimizers)
    check_scaler(scaler)
    if has_lazy_parameters(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has lazy parameters without a shape yet, and checking it would give them one. "
            "Run one forward pass first, then check"
        )
    if not callable(compute_loss):
        raise TypeError(
            f"compute_loss must be callable as compute_loss(model, batch), got {type(compute_loss).__name__}"
        )
    if torch.is_inference_mode_enabled():
        raise GradGuardError(
            "check() needs gradients, and torch.inference_mode() rules them out; call it outside of it"
        )
    observing = Observing(model, optimizers, settings, on_failure=_raise, preflight=True)
    with untouched(model):
        try:
            _observe(observing, model, Passes(model, batch, compute_loss), scaler, settings)
        finally:
            observing.close()
    diagnosis = observing.diagnose(steps=0, batches=1, overhead=float("nan"))
    return _with_jacobian(diagnosis, model, batch, compute_loss) if deep else diagnosis


def _with_jacobian(
    diagnosis: Diagnosis, model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any]
) -> Diagnosis:
    """Add what the Jacobian of the whole net does, or why that could not be measured: the check stands either way."""
    try:
        return replace(diagnosis, jacobian=stretch_in_loss(model, batch, compute_loss))
    except Exception as error:  # noqa: BLE001  # whatever a copy of the user's model may raise
        why = " ".join([str(error), *getattr(error, "__notes__", ())]).strip()
        note = Unobserved(what="the Jacobian of the whole net", why=why or type(error).__name__)
        return replace(diagnosis, unobserved=(*diagnosis.unobserved, note))


def _observe(observing: Observing, model: nn.Module, passes: Passes, scaler: Any, config: GuardConfig) -> None:
    """Make the one observation of a check."""
    observing.arm()
    with torch.enable_grad():
        seen = passes.as_trained(scaler, forget=observing.discard)
        float16_seen = observing.signals.float16_seen
        gradients = dict(seen.gradients)
        for _ in range(_FURTHER_LOOKS):
            if not _missing(model, gradients):
                break
            gradients = {**passes.take(seen.scale).gradients, **gradients}
        lost: dict[int, Tensor] = {}
        if float16_seen and seen.is_finite and seen.zero_share() >= config.underflow_fraction:
            observing.signals.pause()
            lost = passes.lost_to_float16(seen)
    with torch.no_grad():
        observing.losses.note(seen.loss.float(), step=0, optimizer=0)
        observing.read(
            before_clipping=True,
            gradient_of=lambda p: gradients.get(id(p)),
            sample=False,
            loss_scale=None if seen.scale == 1.0 else torch.tensor(seen.scale),
            lost=lost,
        )
        observing.finish(None, 0, batch=0)


def _missing(model: nn.Module, gradients: Mapping[int, Tensor]) -> bool:
    return bool(gradients) and any(p.requires_grad and id(p) not in gradients for p in model.parameters())


def _raise(place: str, error: BaseException) -> None:
    error.add_note(f"while gradguard.check was in {place}")
    raise error
