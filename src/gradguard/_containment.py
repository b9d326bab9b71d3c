"""No failure of ours reaches the user's loop: it warns once, and what failed goes off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from gradguard._alerts import warn_of_failure

__all__ = ["Containment"]


class _Owner(Protocol):
    """Who is watching: it can note what failed, and go off."""

    @property
    def step_counts(self) -> tuple[int, ...]: ...

    def note(self, what: str, why: str) -> bool: ...

    def detach(self) -> None: ...


class Containment:
    """Runs what is ours so that its failures stay ours."""

    def __init__(self, owner: _Owner, on_error: str) -> None:
        """Contain the failures of an owner.

        Args:
            owner: Told of each failure; goes off where it was its own.
            on_error: ``"raise"`` lets failures through, as in tests; anything else warns.
        """
        self._owner = owner
        self._raises = on_error == "raise"

    def run(self, what: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run something of ours; a failure is told once, switches the owner off and gives ``None``."""
        try:
            with torch.no_grad():
                return action(*args, **kwargs)
        except Exception as error:
            if self._raises:
                error.add_note(f"while gradguard was {what}, at step {self._owner.step_counts[0]}")
                raise
            why = f"{what} failed with {type(error).__name__}: {error}"
            if self._owner.note("gradguard itself", f"{why}; it has switched itself off, training goes on"):
                warn_of_failure(why, "The guard has switched itself off")
            self._owner.detach()
            return None

    def monitor_failed(self, place: str, error: BaseException) -> None:
        """Take note of a monitor that has failed and switched itself off; the others go on."""
        if self._raises:
            raise error
        why = f"{place} failed with {type(error).__name__}: {error}"
        what = next((lost for phrase, lost in _MONITORS if phrase in place), "layer signals")
        if self._owner.note(what, f"{why}; the monitor has switched itself off"):
            warn_of_failure(why, f"{what.capitalize()} are no longer observed")

    def remedy_failed(self, place: str, error: BaseException) -> None:
        """Tell of what acted on the run, has failed and switched itself off; the owner goes on."""
        if self._raises:
            raise error
        warn_of_failure(
            f"{place} failed with {type(error).__name__}: {error}",
            "Clipping, skipping and learning rates are left alone",
        )


_MONITORS = (("reading the attention", "attention logits"), ("gradient through time", "gradients through time"))
"""What is lost, by a phrase of what a monitor was doing when it failed."""
