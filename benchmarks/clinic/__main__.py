"""Run the clinic and score it.

Run from the root of the repository::

    python -m benchmarks.clinic [--quick] [--half practice|exam] [--seeds N] [--cases PATTERN]

Results are appended to a JSON Lines file; runs that it holds already, made by the same sources, are not repeated.
Single cases are listed for the practice half only: whoever improves a rule works from those.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.clinic.case import Case
from benchmarks.clinic.catalogue import cases, half_of
from benchmarks.clinic.compare import compare_tools
from benchmarks.clinic.mortem import flags_from
from benchmarks.clinic.outcome import LabelledRun, check_labels
from benchmarks.clinic.results import append_row, read_rows, source_hash
from benchmarks.clinic.runner import run_all
from benchmarks.clinic.score import score
from benchmarks.clinic.tables import as_plain, case_lines, show

_QUICK_SHARE = 3
"""Of how many groups (a healthy case and the sick ones derived from it) a quick clinic takes one."""


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases asked for, with the twins that their labels need."""
    every = cases(arguments.half)
    if arguments.quick:
        groups = list(dict.fromkeys(case.group for case in every))
        kept = set(groups[::_QUICK_SHARE])
        every = tuple(case for case in every if case.group in kept)
    wanted = {case.name for case in every if fnmatch(case.name, arguments.cases)}
    wanted |= {case.twin for case in every if case.name in wanted and case.twin}
    return [case for case in cases() if case.name in wanted]


def run_missing(chosen: Sequence[Case], arguments: argparse.Namespace, console: Console) -> None:
    """Run what the results file lacks."""
    source = None if arguments.any_source else source_hash()
    done = set() if arguments.fresh else {row.key for row in read_rows(arguments.results, source=source)}
    jobs = [(case.name, seed) for seed in range(arguments.seeds) for case in chosen if (case.name, seed) not in done]
    started = time.monotonic()
    rows = run_all(jobs, workers=arguments.workers, ignore=tuple(arguments.ignore))
    for row in track(rows, total=len(jobs), description="runs", console=console, disable=not console.is_terminal):
        append_row(arguments.results, row)
    console.print(f"{len(jobs)} runs in {time.monotonic() - started:.0f} s, {len(done)} in the file before")


def report(chosen: Sequence[Case], arguments: argparse.Namespace, console: Console) -> int:
    """Score what the results file holds; return how many runs raised an error."""
    names = {case.name for case in chosen}
    source = None if arguments.any_source else source_hash()
    rows = [
        row for row in read_rows(arguments.results, source=source) if row.case in names and row.seed < arguments.seeds
    ]
    kept, out = check_labels(rows)
    more = {"torchmortem": flags_from(arguments.torchmortem)} if arguments.torchmortem else {}
    data = {}
    for title, runs in _parts(kept, arguments.half):
        own = score(runs)
        tools = compare_tools(runs, own, more=more)
        left = [run for run in out if title == "both halves" or half_of(run.case) == title]
        show(own, tools, left, console, title=title)
        details = title == "practice" or arguments.reveal
        if details:
            for line in case_lines(runs):
                console.print(line, highlight=False, soft_wrap=True)
        data[title] = as_plain(own, tools, left, runs, details=details)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return sum(bool(row.error) for row in rows)


def _parts(kept: Sequence[LabelledRun], half: str | None) -> list[tuple[str, list[LabelledRun]]]:
    halves = ("practice", "exam") if half is None else (half,)
    return [(name, [run for run in kept if half_of(run.case.name) == name]) for name in halves]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clinic", description="Run the clinic and score it.")
    parser.add_argument("--quick", action="store_true", help="one seed of every third group of cases, of both halves")
    parser.add_argument("--half", choices=("practice", "exam"), help="one half only")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of each case, 5 by default, 1 with --quick")
    parser.add_argument("--cases", default="*", help="pattern of names, for instance 'mlp/*'")
    parser.add_argument("--ignore", action="append", default=[], help="rules to leave out; give --results as well")
    parser.add_argument("--workers", type=int, default=2, help="processes, each on one thread")
    parser.add_argument("--results", type=Path, default=Path("out/clinic/results.jsonl"), help="where rows go")
    parser.add_argument("--json", type=Path, default=Path("out/clinic/score.json"), help="where the score goes")
    parser.add_argument("--torchmortem", type=Path, help="results of python -m benchmarks.clinic.mortem")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that the file holds")
    parser.add_argument("--any-source", action="store_true", help="take rows of other sources of the library as well")
    parser.add_argument("--score-only", action="store_true", help="run nothing")
    parser.add_argument("--reveal", action="store_true", help="list single cases of the exam half too: not for tuning")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    found = parser.parse_args(arguments)
    if found.seeds is None:
        found.seeds = 1 if found.quick else 5
    return found


def main() -> int:
    arguments = parse()
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = chosen_cases(arguments)
    if arguments.list:
        for case in chosen:
            console.print(
                f"{case.name:45} {case.code or 'healthy':8} {half_of(case.name):9} {case.about}", soft_wrap=True
            )
        return 0
    if not arguments.score_only:
        run_missing(chosen, arguments, console)
    return 1 if report(chosen, arguments, console) else 0


if __name__ == "__main__":
    sys.exit(main())
