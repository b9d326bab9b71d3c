"""The only door for code that tunes: it sees the practice half, and refuses the exam half.

Tuning on the half that scores would make the score worthless. Whatever chooses a threshold, a statistic or a rule reads
cases and results from here and from nowhere else; ``tests/test_clinic.py`` checks the imports.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.clinic import catalogue
from benchmarks.clinic.case import Case
from benchmarks.clinic.outcome import LabelledRun, check_labels
from benchmarks.clinic.results import read_rows

__all__ = ["ExamHalfError", "practice_case", "practice_cases", "practice_runs"]


class ExamHalfError(PermissionError):
    """Tuning code asked for a configuration of the exam half."""


def practice_cases() -> tuple[Case, ...]:
    """Return the cases that thresholds may be tuned on."""
    return catalogue.cases("practice")


def practice_case(name: str) -> Case:
    """Return a case of the practice half.

    Raises:
        ExamHalfError: If the case belongs to the exam half.
        KeyError: If there is no such case.
    """
    case = catalogue.find(name)
    if catalogue.half_of(name) != "practice":
        raise ExamHalfError(
            f"{name!r} belongs to the exam half, which only scores: tune on a case of the practice half instead, "
            "see practice_cases()"
        )
    return case


def practice_runs(path: Path) -> list[LabelledRun]:
    """Return the runs of the practice half whose labels hold; those of the exam half are passed over unread.

    Args:
        path: Results file.
    """
    kept, _ = check_labels(row for row in read_rows(path) if catalogue.half_of(row.case) == "practice")
    return kept
