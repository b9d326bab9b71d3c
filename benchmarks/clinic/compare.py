"""Every tool's row on the same runs: false alarms, recall, right family, in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.clinic.outcome import LabelledRun
from benchmarks.clinic.rivals import RIVALS, Flag
from benchmarks.clinic.score import Rate, Score, rate

__all__ = ["ToolRow", "compare_tools"]

_LEAD = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRow:
    """One tool on a set of runs.

    Attributes:
        name: Of the tool.
        false_alarms: Healthy runs with any flag at any time.
        recall: Sick runs with any flag.
        family: Sick runs with a flag of a right family.
        in_time: Sick runs flagged within 50 steps of the fault's beginning.
        commonest: Rule that flags most healthy runs, and how many.
    """

    name: str
    false_alarms: Rate
    recall: Rate
    family: Rate
    in_time: Rate
    commonest: str


def compare_tools(
    runs: Sequence[LabelledRun],
    own: Score,
    *,
    more: Mapping[str, Callable[[LabelledRun], list[Flag] | None]] | None = None,
) -> list[ToolRow]:
    """Return one row per tool, ours first.

    Args:
        runs: Runs whose labels hold.
        own: Our score on them.
        more: Further rule sets by name; one that returns ``None`` has not seen a run, which then does not count for it.
    """
    ours = ToolRow(
        name="gradguard",
        false_alarms=own.false_ever,
        recall=own.recall,
        family=own.family,
        in_time=own.in_time,
        commonest=_commonest(
            [sorted({said.code for said in run.row.announced}) for run in runs if not run.case.is_sick]
        ),
    )
    rules: dict[str, Callable[[LabelledRun], list[Flag] | None]] = {**RIVALS, **(more or {})}
    return [ours, *(_row(name, judge, runs) for name, judge in rules.items())]


def _row(name: str, judge: Callable[[LabelledRun], list[Flag] | None], runs: Sequence[LabelledRun]) -> ToolRow:
    judged = [(run, flags) for run in runs if (flags := judge(run)) is not None]
    healthy = [flags for run, flags in judged if not run.case.is_sick]
    sick = [(run, flags) for run, flags in judged if run.case.is_sick]
    right = sum(any(set(flag.families) & set(run.case.accepted) for flag in flags) for run, flags in sick)
    return ToolRow(
        name=name,
        false_alarms=rate(sum(bool(flags) for flags in healthy), len(healthy)),
        recall=rate(sum(bool(flags) for _, flags in sick), len(sick)),
        family=rate(right, len(sick)),
        in_time=rate(sum(_in_time(run, flags) for run, flags in sick), len(sick)),
        commonest=_commonest([sorted({flag.rule for flag in flags}) for flags in healthy]),
    )


def _in_time(run: LabelledRun, flags: Sequence[Flag]) -> bool:
    leads = [flag.step - run.case.onset for flag in flags if flag.step >= run.case.onset]
    return bool(leads) and min(leads) <= _LEAD


def _commonest(rules: Sequence[Sequence[str]]) -> str:
    flat = [rule for each in rules for rule in each]
    if not flat:
        return ""
    worst = max(dict.fromkeys(flat), key=flat.count)
    return f"{worst} ({flat.count(worst)})"
