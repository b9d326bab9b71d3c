"""The cure score in numbers and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.clinic.catalogue import find
from benchmarks.clinic.cures.rows import WAYS, CureRow

__all__ = ["WayScore", "case_lines", "counts", "is_cured", "score_way", "show"]

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
        runs: Median cost beside the repaired run, in whole runs.
        most: Largest such cost.
    """

    cured: float
    gained: float
    worse: float
    runs: float
    most: float


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
        runs=statistics.median([row.runs[way] for row in rows]),
        most=max(row.runs[way] for row in rows),
    )


def show(rows: Sequence[CureRow], console: Console, *, title: str) -> None:
    """Print the score of one half."""
    sick = [row for row in rows if find(row.case).is_sick]
    fair = [row for row in sick if counts(row)]
    curable = [row for row in fair if not row.advice]
    if curable:
        table = Table(title=f"{title}: {len(curable)} curable sick runs")
        for head in ("repaired by", "cured", "gains a point", "loses a point", "cost, median", "cost, most"):
            table.add_column(head, justify="left" if head == "repaired by" else "right")
        for way in WAYS:
            score = score_way(curable, way)
            table.add_row(
                way,
                *(f"{100 * share:.1f} %" for share in (score.cured, score.gained, score.worse)),
                f"{score.runs:.2f} runs",
                f"{score.most:.2f} runs",
            )
        console.print(table)
    trained = [row for row in curable if row.candidates]
    if trained:
        near = [row for row in trained if _is_near_best(row)]
        console.print(f"first advice within 5 % of the best candidate's outcome: {len(near)} of {len(trained)}")
    advised = [row for row in fair if row.advice]
    spoken = [row for row in advised if row.advised]
    console.print(
        f"{len(sick)} sick runs: {len(sick) - len(fair)} whose outcome contradicts their label, {len(advised)} where "
        f"the library can only advise ({len(spoken)} of them got advice), {len(curable)} curable"
    )
    healthy = [row for row in rows if not find(row.case).is_sick and not row.error]
    if healthy:
        wrong = [row for row in healthy if row.recommended]
        console.print(f"healthy runs: a remedy is recommended in {len(wrong)} of {len(healthy)}")
    errors = [row for row in rows if row.error]
    if errors:
        console.print(f"{len(errors)} runs raised an error")


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


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
