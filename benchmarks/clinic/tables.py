"""The score on a console, and as plain data for a JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.clinic.compare import ToolRow
from benchmarks.clinic.outcome import LabelledRun, LeftOut
from benchmarks.clinic.score import Bin, Rate, Score, lead_steps, names_culprit, names_family, verdict
from gradguard.findings import to_plain

__all__ = ["as_plain", "case_lines", "show"]

_GOALS = (
    ("false alarms, standing at the end", "false_standing", "at most 1 %, upper bound 3 %"),
    ("false alarms, announced at any time", "false_ever", "at most 1 %, upper bound 3 %"),
    ("healthy configurations with one", "false_cases", ""),
    ("false alarms of the check", "false_checks", ""),
    ("healthy runs without a verdict", "no_verdict", ""),
    ("recall, announced or standing", "recall", "at least 98 %"),
    ("recall, standing at the end", "recall_standing", ""),
    ("sick configurations caught every time", "recall_cases", ""),
    ("right family, of all sick runs", "family", "at least 95 %"),
    ("right family, of those caught", "family_of_caught", ""),
    ("right culprit layer, where one is", "culprit", "at least 90 %"),
    ("right culprit layer, family being right", "culprit_of_caught", ""),
    ("warned of within 50 steps", "in_time", "at least 90 %"),
    ("found by check, initialization and wiring", "check", "at least 60 %"),
)


def show(score: Score, tools: Sequence[ToolRow], out: Sequence[LeftOut], console: Console, *, title: str) -> None:
    """Print everything but single cases.

    Args:
        score: Ours.
        tools: Every tool's row.
        out: Runs left out.
        console: To print to.
        title: What was scored.
    """
    table = Table(title=f"{title}: {score.healthy} healthy and {score.sick} sick runs")
    table.add_column("what")
    table.add_column("share (runs; 95 % Wilson interval)")
    table.add_column("goal")
    for text, name, goal in _GOALS:
        table.add_row(text, str(getattr(score, name)), goal)
    table.add_row("median steps to the first warning", f"{score.median_lead:g}", "")
    table.add_row("median overhead in these short runs", f"{100 * score.overhead:.1f} %", "")
    console.print(table)
    console.print(_tools_table(tools))
    console.print(_confusion_table(score))
    console.print(_bins_table(score))
    for run in out:
        console.print(f"left out: {run.case}, seed {run.seed}: {run.why}", highlight=False, soft_wrap=True)


def _tools_table(tools: Sequence[ToolRow]) -> Table:
    table = Table(title="The same runs, tool by tool")
    for title in ("tool", "false alarms", "recall", "right family", "within 50 steps", "flags most healthy runs"):
        table.add_column(title)
    for row in tools:
        rates = (row.false_alarms, row.recall, row.family, row.in_time)
        table.add_row(row.name, *(_short(value) for value in rates), row.commonest)
    return table


def _short(value: Rate) -> str:
    return f"{100 * value.value:.1f} % of {value.total}" if value.total else "-"


def _confusion_table(score: Score) -> Table:
    table = Table(title="Label and verdict", caption="family of the primary finding, else of the first announced")
    for title in ("label", "verdicts"):
        table.add_column(title)
    labels = dict.fromkeys(label for label, _, _ in score.confusion)
    for label in labels:
        named = sorted(((count, name) for known, name, count in score.confusion if known == label), reverse=True)
        table.add_row(label, ", ".join(f"{name} {count}" for count, name in named))
    return table


def _bins_table(score: Score) -> Table:
    table = Table(title="Reliability: of findings said with a confidence, how many are of a right family")
    for title in ("confidence", "announced", "mean", "right", "standing at the end", "mean", "right"):
        table.add_column(title)
    for announced, final in zip(score.announced_bins, score.final_bins, strict=True):
        table.add_row(f"{announced.low:.2f} to {announced.high:.2f}", *_bin_cells(announced), *_bin_cells(final))
    return table


def _bin_cells(part: Bin) -> tuple[str, str, str]:
    if not part.right.total:
        return "0", "", ""
    return str(part.right.total), f"{part.mean:.2f}", f"{100 * part.right.value:.0f} %"


def case_lines(runs: Sequence[LabelledRun]) -> Iterable[str]:
    """Give one line per run that is not as it should be: false alarm, miss, wrong family, wrong culprit, late."""
    for run in runs:
        said, case = verdict(run), run.case
        who = f"{case.name}, seed {run.row.seed}"
        alarms = ", ".join(f"{a.code} at {a.at}" for a in run.row.announced)
        end = f"standing {run.row.primary.code}" if run.row.primary is not None else "nothing stands"
        checked = next((one for one in run.row.checked if one.is_alarm), None)
        if not case.is_sick:
            if said is not None:
                yield f"false alarm: {who}: {alarms or 'not announced'}; {end}; {said.message}"
            if checked is not None:
                yield f"false alarm of check: {who}: {checked.code} {checked.message}"
            continue
        if said is None:
            seen = ", ".join(f"{f.code} {f.severity}" for f in run.row.findings) or "no finding"
            yield f"missed: {who} ({case.code}: {case.about}); {seen}"
        elif not names_family(case, said):
            yield f"wrong family: {who} ({case.code}): {alarms or end}; {said.family}: {said.message}"
        elif case.culprit and not names_culprit(case, said):
            yield f"wrong culprit: {who} ({case.code} in {case.culprit[0]}): said {said.layer}"
        lead = lead_steps(run)
        if said is not None and (lead is None or lead > 50):
            yield f"late: {who} ({case.code} from step {case.onset}): {alarms or 'never announced'}"
        if case.phase != "training" and checked is None:
            yield f"not found by check: {who} ({case.code}) {run.row.check_error}"


def as_plain(
    score: Score, tools: Sequence[ToolRow], out: Sequence[LeftOut], runs: Sequence[LabelledRun], *, details: bool
) -> dict[str, Any]:
    """Return everything as JSON-ready data; ``details`` adds the single cases."""
    data = {"score": asdict(score), "tools": [asdict(row) for row in tools], "left_out": [asdict(run) for run in out]}
    if details:
        data["cases"] = list(case_lines(runs))
    plain: dict[str, Any] = to_plain(data)
    return plain
