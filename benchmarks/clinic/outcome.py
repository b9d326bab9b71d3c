"""Labels are checked by outcome: a sick run must end clearly below its healthy twin, a healthy one must learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.clinic.case import Case
from benchmarks.clinic.catalogue import find
from benchmarks.clinic.results import Row

__all__ = ["LabelledRun", "LeftOut", "check_labels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRun:
    """A run whose outcome agrees with its label."""

    case: Case
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A run that is not scored, and why: listed, never silent."""

    case: str
    seed: int
    why: str


def check_labels(rows: Iterable[Row]) -> tuple[list[LabelledRun], list[LeftOut]]:
    """Split runs into those that count and those whose outcome contradicts their label.

    A run that raised does not count either; neither does a sick one whose twin is missing or did not learn, as nothing
    then says what the fault cost.

    Args:
        rows: Runs of any cases; twins are looked up among them, by seed.
    """
    known = {row.key: row for row in rows}
    kept: list[LabelledRun] = []
    out: list[LeftOut] = []
    for row in sorted(known.values(), key=lambda row: row.key):
        case = find(row.case)
        why = _contradiction(case, row, known)
        if why:
            out.append(LeftOut(case=row.case, seed=row.seed, why=why))
        else:
            kept.append(LabelledRun(case=case, row=row))
    return kept, out


def _contradiction(case: Case, row: Row, known: Mapping[tuple[str, int], Row]) -> str:
    if row.error:
        return f"the run raised {row.error.strip().splitlines()[-1]}"
    if not case.is_sick:
        learnt = row.quality >= case.learns
        return "" if learnt else f"healthy, and ends at {row.quality:.2f}, below the {case.learns:g} it must reach"
    twin = known.get((case.twin, row.seed))
    if twin is None or twin.error:
        return f"its twin {case.twin} was not run"
    if twin.quality < find(case.twin).learns:
        return f"its twin {case.twin} did not learn ({twin.quality:.2f})"
    if row.quality > twin.quality - case.margin:
        return f"sick, and ends at {row.quality:.2f} where its twin reaches {twin.quality:.2f}"
    return ""
