"""Numbers in the form in which people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradguard.findings import Evidence

__all__ = ["evidence_text", "evidence_texts", "measured", "number", "power", "seconds", "share"]

_PLAIN_UNITS = frozenset({"", "ratio", "fraction", "decades"})
"""Units that go without saying (a ratio), or that the number brings along (per cent, decades)."""


def number(value: float | str, unit: str = "") -> str:
    """Return a number with at most three significant digits; a fraction in per cent; words as they are.

    Example:
        >>> number(0.213), number(1.23e-14), number(0.213, "fraction"), number(12), number(float("nan"))
        ('0.213', '1.2e-14', '21 %', '12', 'NaN')
    """
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if unit == "fraction":
        return share(value)
    if unit == "decades":
        return f"{value:.1f} decades"
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else _scientific(value)


def measured(value: float, digits: int = 3) -> str:
    """Return a measurement with that many significant digits, zeros included.

    Example:
        >>> measured(2.3), measured(0.0199), measured(1234.5), measured(1.9, 2), measured(2e-7)
        ('2.30', '0.0199', '1234', '1.9', '2.0e-7')
    """
    if not math.isfinite(value) or value == 0.0:
        return number(value)
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, places)}f}"


def share(value: float) -> str:
    """Return a share in per cent; nearly all and nearly none are neither rounded to all nor to none.

    Example:
        >>> share(0.213), share(0.9999), share(1.0), share(0.004), share(1e-7)
        ('21 %', '99.9 %', '100 %', '0.4 %', '1e-5 %')
    """
    if not math.isfinite(value):
        return number(value)
    percent = 100.0 * value
    if 99.0 < percent < 100.0:
        return f"{min(99.9, percent):.1f} %"
    if percent == 0.0 or percent >= 1.0:
        return f"{percent:.0f} %"
    return f"{percent:.1g} %" if abs(percent) >= 1e-3 else f"{_scientific(percent)} %"


def power(exponent: float) -> str:
    """Return a power of ten by its exponent.

    Example:
        >>> power(-3.14)
        '10^-3.1'
    """
    return f"10^{exponent:.1f}" if math.isfinite(exponent) else "unknown"


def seconds(value: float) -> str:
    """Return a duration.

    Example:
        >>> seconds(0.2134), seconds(12.34), seconds(90.0), seconds(4000.0)
        ('0.21 s', '12 s', '90 s', '67 min')
    """
    if not math.isfinite(value):
        return number(value)
    return f"{measured(value, 2)} s" if value < 600.0 else f"{value / 60.0:.0f} min"


def evidence_text(name: str, evidence: Evidence) -> str:
    """Return one piece of evidence as words: name, number, unit and what to compare it with.

    Example:
        >>> evidence_text("weight_gain", Evidence(value=1.02, unit="ratio", note="the weights alone"))
        'weight gain 1.02 (the weights alone)'
        >>> evidence_text("last_finite_delta", Evidence(value=1.2e-30, unit="L2 norm"))
        'last finite delta 1.2e-30 (L2 norm)'
    """
    words, unit = name.replace("_", " "), evidence.unit
    text = f"{words} {number(evidence.value, unit)}"
    in_brackets = []
    if unit == "L2 norm":
        in_brackets.append(unit)
    elif unit not in _PLAIN_UNITS and not words.endswith((unit, unit.removesuffix("s"))):
        text += f" {unit}"
    if evidence.note:
        in_brackets.append(evidence.note)
    return f"{text} ({', '.join(in_brackets)})" if in_brackets else text


def evidence_texts(evidence: Mapping[str, Evidence]) -> list[str]:
    """Return pieces of evidence as words; a note that several share stands behind the last of them only."""
    items = list(evidence.items())
    texts = []
    for index, (name, item) in enumerate(items):
        repeated = item.note and index + 1 < len(items) and items[index + 1][1].note == item.note
        texts.append(evidence_text(name, Evidence(value=item.value, unit=item.unit) if repeated else item))
    return texts


def _scientific(value: float) -> str:
    """Return a power-of-ten form without padding: ``1e-5``, ``1.2e-14``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
