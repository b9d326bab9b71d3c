"""Assertions for people's own test suites."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradguard.errors import NothingObservedError
from gradguard.findings import Diagnosis, Severity

if TYPE_CHECKING:
    from torch import nn

__all__ = ["assert_healthy_gradients"]


def assert_healthy_gradients(
    model: nn.Module,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any],
    *,
    scaler: Any = None,
    fail_on: str | Severity = Severity.WARNING,
    **options: Any,
) -> Diagnosis:
    """Assert that the gradients of a model are healthy before its first step.

    Args:
        model: See :func:`gradguard.check`.
        batch: See :func:`gradguard.check`.
        compute_loss: See :func:`gradguard.check`.
        scaler: See :func:`gradguard.check`.
        fail_on: Lowest severity that fails: ``"info"``, ``"warning"`` or ``"error"``.
        **options: Further keywords of :func:`gradguard.check`.

    Returns:
        The diagnosis, for further assertions.

    Raises:
        AssertionError: If a finding at or above ``fail_on`` stands; the message is the report as plain text.
        NothingObservedError: If no gradient could be observed, so that nothing can be asserted.
        ValueError: If ``fail_on`` is no severity.

    Example:
        >>> import torch
        >>> from gradguard.testing import assert_healthy_gradients
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> assert_healthy_gradients(model, torch.randn(16, 4), lambda m, x: m(x).square().mean()).healthy
        True
    """
    from gradguard.preflight import check

    level = _severity(fail_on)
    diagnosis = check(model, batch, compute_loss, scaler=scaler, **options)
    worst = diagnosis.worst()
    if worst is not None and worst >= level:
        raise AssertionError(_plain(diagnosis))
    if diagnosis.healthy is None:
        raise NothingObservedError(_plain(diagnosis))
    return diagnosis


def _severity(value: str | Severity) -> Severity:
    if isinstance(value, Severity):
        return value
    names = {level.name.lower(): level for level in Severity}
    level = names.get(str(value).lower())
    if level is None:
        raise ValueError(f"fail_on must be one of {', '.join(map(repr, names))}, got {value!r}")
    return level


def _plain(diagnosis: Diagnosis) -> str:
    from rich.console import Console

    from gradguard.report.console import print_report

    text = io.StringIO()
    print_report(diagnosis, Console(file=text, width=100, color_system=None, force_terminal=False))
    return text.getvalue()
