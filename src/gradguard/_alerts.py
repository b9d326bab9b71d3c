"""Telling the user about findings while the run goes on: one line when something begins, silence otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from gradguard.errors import GradGuardWarning, UnhealthyGradientsError
from gradguard.findings import Finding, Severity

if TYPE_CHECKING:
    from gradguard.config import GuardConfig

__all__ = ["Alerts", "is_main_process", "missing_reason", "warn_of_failure"]


def is_main_process() -> bool:
    """Whether this is the only process, or the first of a distributed run: the one that speaks."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def missing_reason(*, backward_seen: bool, evaluating: bool) -> str:
    """Return why there were no gradients to read.

    Args:
        backward_seen: Whether a gradient passed a layer since the last step.
        evaluating: Whether a layer ran in evaluation mode since the last step.
    """
    if backward_seen:
        return (
            "a backward pass did run, so they were cleared before they could be read: "
            "call record() after backward() and before zero_grad()"
        )
    if evaluating:
        return "the forward pass ran in evaluation mode: call model.train() before training"
    return "no backward pass was seen since the last step: call record() after backward() and before zero_grad()"


def warn_of_failure(why: str, consequence: str) -> None:
    """Warn that something of ours has failed, and that the training goes on.

    Args:
        why: What failed, and how.
        consequence: What is no longer done, in one sentence without a full stop.
    """
    warnings.warn(
        f"gradguard: {why}. {consequence}; training goes on. Please report this.", GradGuardWarning, stacklevel=4
    )


class Alerts:
    """Remembers what was announced, and announces what is new."""

    def __init__(self, config: GuardConfig) -> None:
        """Start with nothing announced.

        Args:
            config: Its ``on_finding`` says what announcing means.
        """
        self._action = config.on_finding
        self._quiet_steps = config.every
        self._standing: set[tuple[str, str]] = set()
        self._told: dict[tuple[str, str], int] = {}

    def news(self, findings: Iterable[Finding], step: int) -> list[Finding]:
        """Return the illnesses at ``WARNING`` or above that were not announced since they last began.

        What follows from an illness is not announced beside it, and one that comes and goes not twice within ``every``
        steps.

        Args:
            findings: Findings whose consequences are linked to their causes.
            step: Step that was observed last.
        """
        new = []
        for finding in findings:
            key = (finding.code, finding.optimizer)
            if not finding.standing:
                self._standing.discard(key)
            elif finding.consequence_of is None and finding.severity >= Severity.WARNING and key not in self._standing:
                self._standing.add(key)
                told = self._told.get(key)
                if told is None or step - told >= self._quiet_steps:
                    self._told[key] = step
                    new.append(finding)
        return new

    def tell(self, finding: Finding) -> None:
        """Announce a finding as the configuration asks.

        Raises:
            UnhealthyGradientsError: If ``on_finding`` is ``"raise"``.
        """
        if callable(self._action):
            self._action(finding)
            return
        if self._action == "warn" and not is_main_process():
            return
        line = f"gradguard: step {finding.step}: {finding.code} {finding.name}: {finding.message}"
        if self._action == "raise":
            raise UnhealthyGradientsError(line)
        if self._action == "warn":
            warnings.warn(line, GradGuardWarning, stacklevel=2)
