"""The cure score in numbers and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.clinic.catalogue import find
from benchmarks.clinic.cures.rows import WAYS, CureRow
from gradguard.rules import RULES

__all__ = ["WayScore", "case_lines", "counts", "figures", "is_cured", "score_way", "show"]

_GAIN = 0.01
"""Quality that a cure must add: a point of accuracy, or a hundredth of the variance or information to be explained."""

_OF_TWIN = 0.9
"""Share of the healthy twin's quality that it must reach."""

_NEAR = 0.05
"""Share of the best candidate's quality within which the first advice counts as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayScore:
    """What one way of repairing made of the curable sick runs; shares are 0 to 1.

    Attributes:
        cured: Runs that gain and reach their twin.
        gained: Runs that gain.
        worse: Runs that lose as much.
        runs: Cost beside the repaired run, in whole runs: lower quartile, median, upper quartile and largest.
    """

    cured: float
    gained: float
    worse: float
    runs: tuple[float, float, float, float]


def counts(row: CureRow) -> bool:
    """Whether a sick run counts: its outcome agrees with its label, as in the score of diagnoses."""
    case = find(row.case)
    return not row.error and row.twin >= find(case.twin).learns and row.sick <= row.twin - case.margin


def is_cured(row: CureRow, way: str) -> bool:
    """Whether a repaired run gains at least a point and reaches 90 % of its twin."""
    return row.quality[way] >= row.sick + _GAIN and row.quality[way] >= _OF_TWIN * row.twin


def score_way(rows: Sequence[CureRow], way: str) -> WayScore:
    """Score one way of repairing on curable runs that count."""
    return WayScore(
        cured=_share([is_cured(row, way) for row in rows]),
        gained=_share([row.quality[way] >= row.sick + _GAIN for row in rows]),
        worse=_share([row.quality[way] <= row.sick - _GAIN for row in rows]),
        runs=_quartiles([row.runs[way] for row in rows]),
    )


def figures(rows: Sequence[CureRow]) -> dict[str, Any]:
    """Return everything that is scored, of one half, as plain data; shares are pairs of a number and of how many."""
    sick = [row for row in rows if find(row.case).is_sick]
    fair = [row for row in sick if counts(row)]
    curable = [row for row in fair if not row.advice]
    advised = [row for row in fair if row.advice]
    trained = [row for row in curable if row.candidates]
    healthy = [row for row in rows if not find(row.case).is_sick and not row.error]
    timed = [row for row in curable if row.run_seconds > 0.0 and row.trial_seconds > 0.0]
    return {
        "ways": {way: asdict(score_way(curable, way)) for way in WAYS} if curable else {},
        "sick": len(sick),
        "curable": len(curable),
        "contradict": len(sick) - len(fair),
        "near_best": (sum(_is_near_best(row) for row in trained), len(trained)),
        "advised": (sum(bool(row.advised) for row in advised), len(advised)),
        "advised_rightly": (sum(_names_the_fault(row) for row in advised), len(advised)),
        "healthy_treated": (sum(bool(row.recommended) for row in healthy), len(healthy)),
        "trial_seconds": _quartiles([row.trial_seconds / row.run_seconds for row in timed]) if timed else None,
        "errors": sum(bool(row.error) for row in rows),
    }


def show(rows: Sequence[CureRow], console: Console, *, title: str) -> None:
    """Print the score of one half."""
    found = figures(rows)
    if found["ways"]:
        table = Table(title=f"{title}: {found['curable']} curable sick runs")
        for head in ("repaired by", "cured", "gains a point", "loses a point", "cost in runs: quartiles", "most"):
            table.add_column(head, justify="left" if head == "repaired by" else "right")
        for way, score in found["ways"].items():
            *quartiles, most = score["runs"]
            table.add_row(
                way,
                *(f"{100 * score[name]:.1f} %" for name in ("cured", "gained", "worse")),
                ", ".join(f"{value:.2f}" for value in quartiles),
                f"{most:.2f}",
            )
        console.print(table)
    if found["trial_seconds"] is not None:
        low, middle, high, most = found["trial_seconds"]
        console.print(
            f"seconds of the trial over those of a run: quartiles {low:.2f}, {middle:.2f}, {high:.2f}, most {most:.2f}"
        )
    console.print("first advice within 5 % of the best candidate's outcome: {} of {}".format(*found["near_best"]))
    console.print(
        f"{found['sick']} sick runs: {found['contradict']} whose outcome contradicts their label, {found['curable']} "
        f"curable, {found['advised'][1]} where the library can only advise ({found['advised'][0]} of them got advice, "
        f"{found['advised_rightly'][0]} for the right fault)"
    )
    console.print("healthy runs: a remedy is recommended in {} of {}".format(*found["healthy_treated"]))
    if found["errors"]:
        console.print(f"{found['errors']} runs raised an error")


def case_lines(rows: Sequence[CureRow]) -> Iterator[str]:
    """Yield a line per case, and for one that was not cured what the trial said."""
    for row in sorted(rows, key=lambda row: row.key):
        if row.error:
            yield f"{row.case} {row.seed}: ERROR {row.error.strip().splitlines()[-1]}"
        elif not find(row.case).is_sick:
            if row.recommended:
                yield f"{row.case} {row.seed}: healthy, {row.recommended} recommended"
        elif row.advice:
            yield f"{row.case} {row.seed}: advice ({row.advice}): {', '.join(row.advised) or 'NONE'}"
        else:
            verdict = "" if counts(row) else "(does not count) "
            verdict += "cured" if is_cured(row, "gradguard") else "NOT CURED"
            ends = ", ".join(f"{way} {row.quality[way]:.2f} by {row.done[way]}" for way in WAYS)
            yield f"{row.case} {row.seed}: {verdict}; sick {row.sick:.2f}, twin {row.twin:.2f}, {row.found}; {ends}"
            if not is_cured(row, "gradguard") or (row.candidates and not _is_near_best(row)):
                yield from (f"      {line}" for line in row.trial)
            if row.candidates:
                ended = ", ".join(f"{name} {value:.2f}" for name, value in row.candidates.items())
                yield f"      {'' if _is_near_best(row) else 'NOT NEAR BEST '}trained: {ended}"


def _is_near_best(row: CureRow) -> bool:
    best = max(row.candidates.values())
    return row.quality["gradguard"] >= best - _NEAR * abs(best)


def _names_the_fault(row: CureRow) -> bool:
    """Whether the advice is for a fault that the label accepts."""
    return bool(row.advised) and RULES[row.found].family in find(row.case).accepted


def _quartiles(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Return lower quartile, median, upper quartile and largest value."""
    if len(values) < 2:
        return (values[0],) * 4
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high, max(values)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
