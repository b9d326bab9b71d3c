"""Pairs of a sick run and its twin that differ by one fault, written without sight of the cures or of other cases.

They measure how well cures do on networks that nobody chose them on.
"""

from __future__ import annotations

import hashlib
from functools import cache, partial

from benchmarks.clinic.case import Case, healthy, sick
from benchmarks.clinic.fresh_depth import GROWING, TIME, VANISHING
from benchmarks.clinic.fresh_training import RATES, STUCK

__all__ = ["fresh_cases", "is_sealed"]

_PREFIX = "fresh/"


@cache
def fresh_cases() -> tuple[Case, ...]:
    """Return the sick cases, each followed by its healthy twin."""
    made: list[Case] = []
    for name, code, learns, about, make, sound, fault in (*VANISHING, *GROWING, *TIME, *STUCK, *RATES):
        twin = healthy(f"{_PREFIX}{name}-twin", partial(make, **sound), "the same without the fault", learns=learns)
        spoilt = partial(make, **{**sound, **fault})
        made += [sick(_PREFIX + name, spoilt, about, code=code, twin=twin.name), twin]
    return tuple(made)


def is_sealed(name: str) -> bool:
    """Whether a pair only scores, fixed by its name: of the others single outcomes are looked at."""
    pair = name.removesuffix("-twin")
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % 2 == 1
