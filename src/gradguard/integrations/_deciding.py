"""What the callback does about news: say it, stop the training, or raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from gradguard.errors import UnhealthyGradientsError
from gradguard.integrations._trainer import is_logging_step

if TYPE_CHECKING:
    from gradguard.findings import Finding

__all__ = ["Deciding"]


class Deciding:
    """The part of the callback that acts on what was found."""

    _on_finding: Literal["warn", "stop", "raise", "silent"] | Callable[[Finding], object]
    _news: list[Finding]
    _reason: str | None

    def _act(self, trainer: Any, pl_module: Any) -> None:
        news, self._news = self._news, []
        action = self._on_finding
        for finding in news:
            if callable(action):
                action(finding)
                continue
            line = f"gradguard: step {finding.step}: {finding.code} {finding.name}: {finding.message}"
            if action in ("warn", "stop"):
                pl_module.print(line)
            if action in ("stop", "raise") and self._reason is None:
                self._reason = line if action == "raise" else f"{finding.code} {finding.name}"
        self._decide(trainer, pl_module, now=is_logging_step(trainer))

    def _decide(self, trainer: Any, pl_module: Any, *, now: bool) -> None:
        """Stop or raise where there is a reason. In a distributed run all processes do, at a step that all agree on."""
        if self._on_finding not in ("stop", "raise"):
            return
        reason = self._reason
        if trainer.world_size > 1:
            if not now or not trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
                return
            reason = reason or "a finding on another process"
        elif reason is None:
            return
        self._reason = None
        if self._on_finding == "raise":
            raise UnhealthyGradientsError(reason)
        pl_module.print(f'gradguard: stopping the training, because of {reason} and on_finding="stop"')
        trainer.should_stop = True
