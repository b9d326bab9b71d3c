"""Which half a case belongs to.

The split is by configuration and fixed in ``split.json``. A sick case and its healthy twin stay together: they differ
by the one fault, so a threshold tuned on either has seen the network of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from benchmarks.clinic.case import Case, Half
from benchmarks.clinic.cases import CASES
from benchmarks.clinic.fresh import fresh_cases
from benchmarks.clinic.workshop import workshop_cases

__all__ = ["SPLIT_FILE", "cases", "find", "half_of", "split"]

SPLIT_FILE = Path(__file__).with_name("split.json")


@cache
def split() -> Mapping[str, Half]:
    """Return the half of every case, by name.

    Raises:
        ValueError: If the file and the cases do not name the same configurations, or a twin is in the other half.
    """
    written = json.loads(SPLIT_FILE.read_text(encoding="utf-8"))
    halves: dict[str, Half] = dict.fromkeys(written["practice"], "practice")
    halves |= dict.fromkeys(written["exam"], "exam")
    known = {case.name for case in CASES}
    odd = sorted(known ^ halves.keys())
    if odd or len(halves) != len(written["practice"]) + len(written["exam"]):
        raise ValueError(
            f"{SPLIT_FILE.name} and benchmarks/clinic/cases must name the same configurations, each once; "
            f"they differ in {odd or 'doubles'}. A new case goes into the half of its twin; no case changes its half"
        )
    apart = [case.name for case in CASES if halves[case.group] != halves[case.name]]
    if apart:
        raise ValueError(f"a case and its healthy twin must be in one half, and these are not: {apart}")
    return MappingProxyType(halves)


def cases(half: Half | None = None) -> tuple[Case, ...]:
    """Return the cases of one half, or all: for running and scoring. Tuning reads :mod:`benchmarks.clinic.practice`."""
    return tuple(case for case in CASES if half is None or split()[case.name] == half)


def half_of(name: str) -> Half:
    """Return the half of a case."""
    return split()[name]


def find(name: str) -> Case:
    """Return a case of the clinic, of its workshop or of the fresh set by name.

    Raises:
        KeyError: If there is none.
    """
    for case in (*CASES, *workshop_cases(), *fresh_cases()):
        if case.name == name:
            return case
    raise KeyError(f"the clinic has no case {name!r}; python -m benchmarks.clinic --list names them all")
