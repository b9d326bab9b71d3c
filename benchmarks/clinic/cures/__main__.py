"""Run the cure score.

Run from the root of the repository::

    python -m benchmarks.clinic.cures [--half practice|exam|workshop|fresh] [--seeds N] [--cases PATTERN]

Each sick run is diagnosed by a guard, its prescriptions are tried on copies of the original weights, and the one that
the trial recommends is applied to a fresh run, which is trained to its end. The same runs are repaired in three other
ways. Single cases are listed for what cures are chosen on: not for the exam half, nor for the sealed pairs of the fresh
set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.clinic.catalogue import cases, half_of
from benchmarks.clinic.cures.rows import CureRow, append, read, run_case
from benchmarks.clinic.cures.tables import case_lines, figures, show
from benchmarks.clinic.fresh import fresh_cases, is_sealed
from benchmarks.clinic.results import source_hash
from benchmarks.clinic.workshop import workshop_cases
from gradguard.findings import to_plain

_SETS = {"workshop": workshop_cases, "fresh": fresh_cases}
"""Cases that belong to neither half."""

_CLOSED = frozenset({"exam", "sealed"})
"""Parts that only score: nothing of single cases is shown."""


def run_all(jobs: Sequence[tuple[str, int]], workers: int) -> Iterator[CureRow]:
    """Run cases in a pool of processes, each on one thread, and give their rows as they come."""
    if workers <= 1:
        torch.set_num_threads(1)
        yield from (run_case(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(run_case, *job) for job in jobs]):
            yield future.result()


def _part(name: str) -> str:
    """Return which half a case is in, or that it is in the workshop, fresh, or sealed."""
    if name.startswith("fresh/"):
        return "sealed" if is_sealed(name) else "fresh"
    return "workshop" if name.startswith("workshop/") else half_of(name)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("practice", "exam", *_SETS), help="one half only, or another set")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per case")
    parser.add_argument("--cases", default="*", help="names to run, as a shell pattern; of the practice half")
    parser.add_argument("--healthy", action="store_true", help="run healthy cases as well: nothing may be recommended")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("out/clinic/cures.jsonl"))
    parser.add_argument("--json", type=Path, default=Path("out/clinic/cures.json"), help="where the score goes")
    parser.add_argument("--any-source", action="store_true", help="take rows of other sources as well")
    arguments = parser.parse_args(given)
    console = Console(width=None if sys.stdout.isatty() else 140)
    known = _SETS[arguments.half]() if arguments.half in _SETS else cases(arguments.half)
    names = [case.name for case in known if case.is_sick or arguments.healthy]
    if arguments.cases != "*":
        names = [name for name in names if fnmatch(name, arguments.cases) and _part(name) not in _CLOSED]
    source = None if arguments.any_source else source_hash()
    done = {row.key for row in read(arguments.results, source=source)}
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in names if (name, seed) not in done]
    started = time.monotonic()
    rows = run_all(jobs, arguments.workers)
    for row in track(rows, total=len(jobs), description="cures", console=console, disable=not console.is_terminal):
        append(arguments.results, row)
    console.print(f"{len(jobs)} cases in {time.monotonic() - started:.0f} s, {len(done)} in the file before")
    kept = [row for row in read(arguments.results, source=source) if row.case in names and row.seed < arguments.seeds]
    scores = {}
    for half in ("workshop", "fresh", "sealed", "practice", "exam"):
        part = [row for row in kept if _part(row.case) == half]
        if part:
            show(part, console, title=half)
            scores[half] = figures(part)
        if half not in _CLOSED:
            for line in case_lines(part):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(to_plain(scores), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 1 if any(row.error for row in kept) else 0


if __name__ == "__main__":
    sys.exit(main())
