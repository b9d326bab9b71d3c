"""What clippers are given, looked at before anything is touched."""

from __future__ import annotations

import math
import numbers
from enum import Enum
from typing import Any

__all__ = ["NonFinite", "check_count", "check_fraction", "check_non_finite", "check_norm_type", "check_threshold"]


class NonFinite(Enum):
    """What to do where a gradient is NaN or infinite."""

    SKIP = "skip"
    RAISE = "raise"
    ZERO = "zero"


def check_threshold(name: str, value: Any, *, infinite: bool = False) -> float:
    """Return a threshold as a float: above 0, and finite unless ``infinite``.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN, 0, negative or, where that is not allowed, infinite.
    """
    number = _number(name, value, "a number above 0")
    if math.isnan(number) or number <= 0.0 or (math.isinf(number) and not infinite):
        extra = ", or math.inf to measure without clipping" if infinite else " and finite"
        raise ValueError(f"{name} must be above 0{extra}, got {value!r}")
    return number


def check_fraction(name: str, value: Any, *, low: float, high: float) -> float:
    """Return a number between two limits, both allowed.

    Raises:
        TypeError: If it is no number.
        ValueError: If it lies outside, or is NaN.
    """
    number = _number(name, value, f"a number from {low:g} to {high:g}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    return number


def check_count(name: str, value: Any, *, low: int) -> int:
    """Return a whole number of at least ``low``.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return int(value)


def check_non_finite(value: Any) -> NonFinite:
    """Return the policy for NaN and infinity.

    Raises:
        ValueError: If there is none of this name.
    """
    try:
        return NonFinite(value)
    except ValueError:
        choices = ", ".join(repr(choice.value) for choice in NonFinite)
        raise ValueError(f"non_finite must be one of {choices}, got {value!r}") from None


def check_norm_type(value: Any) -> float:
    """Return the order of a norm: 2 or infinity.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is another one.
    """
    number = _number("norm_type", value, "2 or math.inf")
    if number not in (2.0, math.inf):
        raise ValueError(f"norm_type must be 2 or math.inf, got {value!r}")
    return number


def _number(name: str, value: Any, accepted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {accepted}, got {value!r} of type {type(value).__name__}")
    return float(value)
