"""The exceptions and the warning that gradguard raises on its own account."""

__all__ = [
    "GradGuardError",
    "GradGuardWarning",
    "GradientsUnavailableError",
    "MissingExtraError",
    "NonFiniteGradientsError",
    "NothingObservedError",
    "UnhealthyGradientsError",
    "UnsupportedModelError",
]


class GradGuardError(Exception):
    """Base of every gradguard error, so that one ``except`` can catch them all."""


class UnsupportedModelError(GradGuardError):
    """The model or the optimizer cannot be watched as given; the message says what to pass instead."""


class GradientsUnavailableError(GradGuardError):
    """Gradients were asked for at a moment at which there are none, for instance after ``zero_grad``."""


class NothingObservedError(GradGuardError):
    """A verdict was required, but too little was observed to give one."""


class UnhealthyGradientsError(GradGuardError):
    """A finding at or above the requested severity stands and the caller asked for an exception."""


class NonFiniteGradientsError(UnhealthyGradientsError):
    """A clipper with ``non_finite="raise"`` met gradients that are NaN or infinite."""


class MissingExtraError(GradGuardError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class GradGuardWarning(UserWarning):
    """Category of every warning that gradguard emits."""
