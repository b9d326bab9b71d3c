"""A linter and first-aid kit for gradient flow in PyTorch.

It attaches to any ``nn.Module``, measures what the gradients really do, and says in plain words what is wrong, where,
since when, why, and what was ruled out. The names below are loaded when they are first used: importing ``gradguard``
imports neither torch nor Lightning.

==========================  =======================================================================================
:func:`watch`               Watch a training loop; returns a :class:`Guard`.
:func:`check`               Check a model before its first step; returns a :class:`Diagnosis`.
:class:`GradGuardCallback`  Watch a Lightning run, for ``lightning.pytorch`` and ``pytorch_lightning``.
:mod:`gradguard.clip`       Gradient clipping.
:mod:`gradguard.spectra`    Singular values and spectral radii of weights.
:mod:`gradguard.testing`    Assertions for test suites.
==========================  =======================================================================================
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradguard import clip, errors, findings, jacobian, rules, spectra, testing, theory
    from gradguard.config import GuardConfig
    from gradguard.errors import (
        GradGuardError,
        GradGuardWarning,
        GradientsUnavailableError,
        MissingExtraError,
        NonFiniteGradientsError,
        NothingObservedError,
        UnhealthyGradientsError,
        UnsupportedModelError,
    )
    from gradguard.findings import Cause, Diagnosis, Evidence, Finding, Prescription, Severity
    from gradguard.guard import Guard
    from gradguard.integrations.lightning import GradGuardCallback
    from gradguard.outcomes import TrialResult
    from gradguard.preflight import check
    from gradguard.remedies.applying import apply
    from gradguard.trials import trial
    from gradguard.watching import watch

    __version__: str

__all__ = [
    "Cause",
    "Diagnosis",
    "Evidence",
    "Finding",
    "GradGuardCallback",
    "GradGuardError",
    "GradGuardWarning",
    "GradientsUnavailableError",
    "Guard",
    "GuardConfig",
    "MissingExtraError",
    "NonFiniteGradientsError",
    "NothingObservedError",
    "Prescription",
    "Severity",
    "TrialResult",
    "UnhealthyGradientsError",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "check",
    "clip",
    "errors",
    "findings",
    "jacobian",
    "rules",
    "spectra",
    "testing",
    "theory",
    "trial",
    "watch",
]

_SUBMODULES = ("clip", "errors", "findings", "jacobian", "rules", "spectra", "testing", "theory")
_NAMES = {
    "gradguard.config": ("GuardConfig",),
    "gradguard.errors": (
        "GradGuardError",
        "GradGuardWarning",
        "GradientsUnavailableError",
        "MissingExtraError",
        "NonFiniteGradientsError",
        "NothingObservedError",
        "UnhealthyGradientsError",
        "UnsupportedModelError",
    ),
    "gradguard.findings": ("Cause", "Diagnosis", "Evidence", "Finding", "Prescription", "Severity"),
    "gradguard.guard": ("Guard",),
    "gradguard.watching": ("watch",),
    "gradguard.integrations.lightning": ("GradGuardCallback",),
    "gradguard.outcomes": ("TrialResult",),
    "gradguard.preflight": ("check",),
    "gradguard.remedies.applying": ("apply",),
    "gradguard.trials": ("trial",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker that saw this function would accept every misspelt name

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used, and keep it."""
        if name in _HOME:
            value = getattr(importlib.import_module(_HOME[name]), name)
        elif name in _SUBMODULES:
            value = importlib.import_module(f"{__name__}.{name}")
        elif name == "__version__":
            from importlib.metadata import version

            value = version(__name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
