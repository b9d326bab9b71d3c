"""Which summary within an eighth of the layers separates sick from healthy: decided on the practice half.

Candidates: mean, median and upper quartile of log10 delta over the rows of the first and of the last eighth, and the
median over taps at the inputs of the outermost blocks alone (the trunk, without its branches).

Run: ``python -m benchmarks.clinic.summaries RESULTS``
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.clinic.outcome import LabelledRun
from benchmarks.clinic.practice import practice_runs

__all__ = ["CANDIDATES", "Separation", "auc", "compare", "show", "span"]

_DEPTH = ("GG101", "GG102")
_LIMIT = 3.0
"""Decades beyond which a span is a warning: GuardConfig.span_warning."""

CANDIDATES: Mapping[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "mean": ("delta", lambda values: float(np.mean(values))),
    "median": ("delta", lambda values: float(np.median(values))),
    "upper quartile": ("delta", lambda values: float(np.quantile(values, 0.75))),
    "trunk taps": ("taps", lambda values: float(np.median(values))),
}
"""Series of a profile, and summary within an eighth, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How well a candidate separates, at one moment of the runs.

    Attributes:
        name: Of the candidate.
        moment: ``"first"``, ``"any"`` (largest span over the run) or ``"last"`` observation.
        auc: Probability that a sick run has the larger absolute span than a healthy one.
        caught: Sick runs beyond the limit, and all of them.
        false_alarms: Healthy runs beyond the limit, and all of them.
        worst: Healthy configuration with the largest absolute span, and that span.
        least: Sick configuration with the smallest absolute span, and that span.
    """

    name: str
    moment: str
    auc: float
    caught: tuple[int, int]
    false_alarms: tuple[int, int]
    worst: tuple[str, float]
    least: tuple[str, float]


def span(norms: Sequence[float], summary: Callable[[Sequence[float]], float], *, minimum: int = 6) -> float:
    """Return the span in decades between the first and the last eighth, NaN below two positive norms.

    Example:
        >>> round(span([1e-4, 1e-3, 1e-2, 1e-1], lambda values: sum(values) / len(values)), 3)
        -3.0
    """
    logs = [math.log10(norm) for norm in norms if 0.0 < norm < math.inf]
    if len(logs) < 2:
        return math.nan
    size = 1 if len(logs) < minimum else max(1, len(logs) // 8)
    return summary(logs[:size]) - summary(logs[-size:])


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive is larger than a negative; ties count half, NaN for none of a kind.

    Example:
        >>> auc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    if not positive or not negative:
        return math.nan
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def compare(runs: Sequence[LabelledRun]) -> list[Separation]:
    """Return how each candidate separates depth illnesses from healthy runs.

    Args:
        runs: Of the practice half; sick runs with other illnesses are left out.
    """
    sick = [run for run in runs if run.case.code in _DEPTH]
    healthy = [run for run in runs if not run.case.is_sick]
    result = []
    for moment in ("first", "any", "last"):
        for name in CANDIDATES:
            ill, well = _statistics(sick, name, moment), _statistics(healthy, name, moment)
            result.append(
                Separation(
                    name=name,
                    moment=moment,
                    auc=auc([value for _, value in ill], [value for _, value in well]),
                    caught=(sum(value > _LIMIT for _, value in ill), len(ill)),
                    false_alarms=(sum(value > _LIMIT for _, value in well), len(well)),
                    worst=max(well, key=lambda pair: pair[1], default=("", math.nan)),
                    least=min(ill, key=lambda pair: pair[1], default=("", math.nan)),
                )
            )
    return result


def _statistics(runs: Sequence[LabelledRun], name: str, moment: str) -> list[tuple[str, float]]:
    """Return configuration and absolute span of each run that has one."""
    pairs = [(run.case.name, _statistic(run, name, moment)) for run in runs]
    return [pair for pair in pairs if not math.isnan(pair[1])]


def _statistic(run: LabelledRun, name: str, moment: str) -> float:
    series, summary = CANDIDATES[name]
    spans = [abs(span(profile.get(series, ()), summary)) for profile in _profiles(run)]
    known = [value for value in spans if not math.isnan(value)]
    if not known:
        return math.nan
    return {"first": known[0], "any": max(known), "last": known[-1]}[moment]


def _profiles(run: LabelledRun) -> Sequence[Mapping[str, Any]]:
    return [profile for profile in run.row.profiles if profile.get("optimizer", 0) == 0]


def show(separations: Sequence[Separation], console: Console) -> None:
    """Print the candidates side by side."""
    table = Table(title="Summary within an eighth (practice half, |span| against 3 decades)")
    for title in ("observation", "summary", "AUC", "caught", "false alarms", "largest healthy", "smallest sick"):
        table.add_column(title)
    for index, row in enumerate(separations):
        first = index % len(CANDIDATES) == 0
        table.add_row(
            row.moment if first else "",
            row.name,
            f"{row.auc:.3f}",
            f"{row.caught[0]}/{row.caught[1]}",
            f"{row.false_alarms[0]}/{row.false_alarms[1]}",
            f"{row.worst[1]:.1f} in {row.worst[0]}",
            f"{row.least[1]:.1f} in {row.least[0]}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the candidates on a results file of the clinic.")
    parser.add_argument("results", type=Path)
    show(compare(practice_runs(parser.parse_args().results)), Console(width=160))


if __name__ == "__main__":
    main()
