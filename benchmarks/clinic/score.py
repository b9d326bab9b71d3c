"""The score: false alarms and recall with Wilson intervals, family, culprit, lead time, calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.clinic.case import Case
from benchmarks.clinic.outcome import LabelledRun
from benchmarks.clinic.results import Said

__all__ = ["Bin", "Rate", "Score", "lead_steps", "names_culprit", "names_family", "rate", "score", "verdict"]

_LEAD = 50
"""Steps within which a sick run is to be warned of. Source: the goal of the project."""

_BINS = (0.0, 0.55, 0.65, 0.75, 0.85, 0.95)
"""Lower edges of the confidence bins: around .5, .6, .7, .8, .9 and above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share with its 95 % interval.

    Attributes:
        hits: Runs for which it was so.
        total: Runs asked.
        low: Lower bound, 0 to 1.
        high: Upper bound, 0 to 1.
    """

    hits: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share, NaN for no runs."""
        return self.hits / self.total if self.total else math.nan

    def __str__(self) -> str:
        if not self.total:
            return "-"
        return f"{100 * self.value:.1f} % ({self.hits}/{self.total}; {100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Findings said with about the same confidence.

    Attributes:
        low: Lower edge of the confidence.
        high: Upper edge.
        mean: Mean confidence of the findings, NaN for none.
        right: How many were right.
    """

    low: float
    high: float
    mean: float
    right: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the clinic says of the library on a set of runs; every rate is over runs unless it says otherwise.

    Attributes:
        healthy: Healthy runs counted.
        sick: Sick runs counted.
        false_standing: Healthy runs with a finding at WARNING or above standing at their end.
        false_ever: Healthy runs in which one was announced at any time.
        false_cases: Healthy configurations with a false alarm of either kind in any seed.
        false_checks: Healthy runs that the check before the first step objects to.
        no_verdict: Healthy runs not called healthy, for want of observations.
        recall: Sick runs with a finding at WARNING or above, announced or standing.
        recall_standing: Sick runs with one standing at their end.
        recall_cases: Sick configurations caught in every counted seed.
        family: Sick runs whose verdict names the right family.
        family_of_caught: The same, of those caught.
        culprit: Sick runs with one culprit layer whose verdict names it.
        culprit_of_caught: The same, of those whose family is right.
        in_time: Sick runs warned of within 50 steps of the fault's beginning.
        check: Initialization and wiring faults that the check before the first step objects to.
        median_lead: Steps to the first warning, median over caught runs.
        confusion: Label's family, verdict's family, runs.
        announced_bins: Reliability of announced findings.
        final_bins: Reliability of what stands at the end and follows from nothing else.
        overhead: Median share of training time that the guard took in these very short runs.
    """

    healthy: int
    sick: int
    false_standing: Rate
    false_ever: Rate
    false_cases: Rate
    false_checks: Rate
    no_verdict: Rate
    recall: Rate
    recall_standing: Rate
    recall_cases: Rate
    family: Rate
    family_of_caught: Rate
    culprit: Rate
    culprit_of_caught: Rate
    in_time: Rate
    check: Rate
    median_lead: float
    confusion: tuple[tuple[str, str, int], ...]
    announced_bins: tuple[Bin, ...]
    final_bins: tuple[Bin, ...]
    overhead: float


def rate(hits: int, total: int) -> Rate:
    """Return a share with its Wilson 95 % interval.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.

    Example:
        >>> str(rate(0, 100))
        '0.0 % (0/100; 0.0 to 3.7)'
    """
    if not total:
        return Rate(hits=0, total=0, low=math.nan, high=math.nan)
    z = 1.959964
    share = hits / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Rate(hits=hits, total=total, low=max(0.0, (centre - half) / scale), high=min(1.0, (centre + half) / scale))


def verdict(run: LabelledRun) -> Said | None:
    """Return what the run is said to suffer from: the primary finding at its end, else what was announced first."""
    announced = [said for said in run.row.announced if said.is_alarm]
    return run.row.primary or (announced[0] if announced else None)


def names_family(case: Case, said: Said | None) -> bool:
    """Whether a verdict names a family that is right for a case."""
    return said is not None and said.family in case.accepted


def names_culprit(case: Case, said: Said | None) -> bool:
    """Whether a verdict names the culprit, a module inside it, or a parameter of it."""
    if said is None or said.layer is None:
        return False
    return any(said.layer == name or said.layer.startswith(f"{name}.") for name in case.culprit)


def lead_steps(run: LabelledRun) -> int | None:
    """Return the steps from the fault's beginning to the first announcement after it, ``None`` for none."""
    return next((said.at - run.case.onset for said in run.row.announced if said.at >= run.case.onset), None)


def score(runs: Sequence[LabelledRun]) -> Score:
    """Score runs whose labels hold."""
    healthy = [run for run in runs if not run.case.is_sick]
    sick = [run for run in runs if run.case.is_sick]
    caught = [run for run in sick if verdict(run) is not None]
    right = [run for run in caught if names_family(run.case, verdict(run))]
    located = [run for run in sick if run.case.culprit]
    early = [run for run in sick if run.case.phase != "training"]
    leads = [lead for run in sick if (lead := lead_steps(run)) is not None]
    shares = sorted(run.row.overhead for run in runs if run.row.overhead >= 0.0)
    return Score(
        healthy=len(healthy),
        sick=len(sick),
        false_standing=_rate(healthy, lambda run: run.row.primary is not None),
        false_ever=_rate(healthy, lambda run: verdict(run) is not None),
        false_cases=_by_case(healthy, lambda run: verdict(run) is not None, any),
        false_checks=_rate(healthy, _checked),
        no_verdict=_rate(healthy, lambda run: run.row.healthy is None),
        recall=rate(len(caught), len(sick)),
        recall_standing=_rate(sick, lambda run: run.row.primary is not None),
        recall_cases=_by_case(sick, lambda run: verdict(run) is not None, all),
        family=rate(len(right), len(sick)),
        family_of_caught=rate(len(right), len(caught)),
        culprit=_rate(located, lambda run: names_culprit(run.case, verdict(run))),
        culprit_of_caught=_rate(
            [run for run in right if run.case.culprit], lambda run: names_culprit(run.case, verdict(run))
        ),
        in_time=_rate(sick, lambda run: (lead := lead_steps(run)) is not None and lead <= _LEAD),
        check=_rate(early, _checked),
        median_lead=float(sorted(leads)[len(leads) // 2]) if leads else math.nan,
        confusion=_confusion(runs),
        announced_bins=_bins((run.case, said) for run in runs for said in run.row.announced),
        final_bins=_bins(
            (run.case, said)
            for run in runs
            for said in run.row.findings
            if said.standing and said.is_alarm and said.consequence is None
        ),
        overhead=shares[len(shares) // 2] if shares else math.nan,
    )


def _rate(runs: Sequence[LabelledRun], condition: Callable[[LabelledRun], bool]) -> Rate:
    return rate(sum(condition(run) for run in runs), len(runs))


def _checked(run: LabelledRun) -> bool:
    return any(said.is_alarm for said in run.row.checked)


def _by_case(
    runs: Sequence[LabelledRun],
    condition: Callable[[LabelledRun], bool],
    combine: Callable[[Iterable[bool]], bool],
) -> Rate:
    names = dict.fromkeys(run.case.name for run in runs)
    held = [combine(condition(run) for run in runs if run.case.name == name) for name in names]
    return rate(sum(held), len(held))


def _confusion(runs: Sequence[LabelledRun]) -> tuple[tuple[str, str, int], ...]:
    counts: Counter[tuple[str, str]] = Counter()
    for run in runs:
        said = verdict(run)
        label = run.case.accepted[0] if run.case.is_sick else "healthy"
        counts[label, said.family if said is not None else "nothing"] += 1
    return tuple((label, named, count) for (label, named), count in sorted(counts.items()))


def _bins(said: Iterable[tuple[Case, Said]]) -> tuple[Bin, ...]:
    pairs = list(said)
    bins = []
    for low, high in zip(_BINS, (*_BINS[1:], 1.01), strict=True):
        inside = [(case, one) for case, one in pairs if low <= one.confidence < high]
        mean = sum(one.confidence for _, one in inside) / len(inside) if inside else math.nan
        right = rate(sum(names_family(case, one) for case, one in inside), len(inside))
        bins.append(Bin(low=low, high=min(high, 1.0), mean=mean, right=right))
    return tuple(bins)
