"""What the callback reads off a Lightning Trainer, and the report that it prints for it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gradguard._arguments import check_optimizers
from gradguard._registry import guard_of
from gradguard.errors import GradGuardError, GradGuardWarning

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradguard.findings import Diagnosis

__all__ = [
    "check_clipping",
    "check_strategy",
    "is_logging_step",
    "loss_scaler",
    "print_final_report",
    "trains_without_logging",
    "watched_optimizers",
]

_SHARING_INTERVAL = 50
"""Batches between two agreements of a distributed run to stop, where the Trainer logs nothing. Ours: its default."""


def loss_scaler(trainer: Any) -> Any:
    """Return the gradient scaler of the precision plugin, ``None`` where there is none or it is off."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def check_clipping(trainer: Any, pl_module: Any) -> None:
    """See that the callback and the Trainer do not both clip.

    Raises:
        GradGuardError: If the Trainer was told to clip.
    """
    value = getattr(trainer, "gradient_clip_val", None)
    if value:
        raise GradGuardError(
            f"the Trainer clips (gradient_clip_val={value!r}), and GradGuardCallback was given clip= as well: the "
            "gradients would be clipped twice. Leave one of the two out"
        )
    home = next(base for base in type(pl_module).__mro__ if "configure_gradient_clipping" in vars(base)).__module__
    if not home.startswith(("lightning.", "pytorch_lightning.")):
        warnings.warn(
            f"gradguard: {type(pl_module).__name__} has a configure_gradient_clipping() of its own, and "
            "GradGuardCallback was given clip=. If it clips, the gradients are clipped twice: leave one of the two out",
            GradGuardWarning,
            stacklevel=4,
        )


def check_strategy(trainer: Any) -> None:
    """See that remedies can act alike on every process.

    Raises:
        GradGuardError: If the strategy keeps gradients where they cannot be judged as a whole.
    """
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in ("DeepSpeedStrategy", "FSDPStrategy"):
            raise GradGuardError(
                f"clip=, on_spike= and lr_backoff= do not work with {base.__name__}, whose processes hold parts of the "
                "gradients and would decide each for itself. Use gradient_clip_val of the Trainer there"
            )


def watched_optimizers(trainer: Any, pl_module: nn.Module) -> list[Optimizer]:
    """Return the Trainer's optimizers, out of their wrappers, that hold parameters of the module.

    Raises:
        GradGuardError: If there is none, or the module is watched already.
    """
    if guard_of(pl_module) is not None:
        raise GradGuardError(
            f"this {type(pl_module).__name__} is already watched, by gradguard.watch() or by another callback. "
            "The callback needs no watch() beside it: leave one of the two out"
        )
    ids = {id(parameter) for parameter in pl_module.parameters()}
    optimizers = [
        optimizer
        for optimizer in check_optimizers(trainer.optimizers)
        if any(id(p) in ids for group in optimizer.param_groups for p in group["params"])
    ]
    if not optimizers:
        raise GradGuardError(
            f"no optimizer holds parameters of this {type(pl_module).__name__}, so there are no steps to observe. "
            "Return one from configure_optimizers()"
        )
    return optimizers


def trains_without_logging(trainer: Any) -> bool:
    """Whether nothing that is logged is written anywhere."""
    return not trainer.loggers or not trainer.log_every_n_steps


def is_logging_step(trainer: Any) -> bool:
    """Whether the Trainer logs at the end of this batch, as far as can be known at its start."""
    interval = trainer.log_every_n_steps or _SHARING_INTERVAL
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return bool((stepped + 1) % interval == 0)


def print_final_report(trainer: Any, diagnosis: Diagnosis) -> None:
    """Print a report to standard output, below the progress bars of the run."""
    from rich.console import Console

    from gradguard.report.console import print_report

    _close_bars(trainer.progress_bar_callback)
    print_report(diagnosis, Console())


def _close_bars(callback: Any) -> None:
    """Close Lightning's progress bars, which it does later, or after an exception not at all."""
    for name, close in (("progress", "stop"), ("train_progress_bar", "close"), ("val_progress_bar", "close")):
        with suppress(Exception):  # bars that were never opened, or are the user's own
            getattr(getattr(callback, name), close)()
