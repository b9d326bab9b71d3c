"""One row per sick run: how it ended untreated, as its healthy twin, and after each way of repairing."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.clinic.case import Case
from benchmarks.clinic.catalogue import find
from benchmarks.clinic.cures.repairs import Repair, always, at_random, candidates, fixed_order, ours
from benchmarks.clinic.cures.runs import advice_only, build, train
from benchmarks.clinic.results import source_hash

__all__ = ["WAYS", "CureRow", "append", "read", "run_case", "trains_every_candidate"]

WAYS = ("gradguard", "random", "autotrainer", "always")

_SHARE_TRAINED = 3
"""Of how many curable cases one has every candidate trained to its end, which costs several runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CureRow:
    """What became of one case under one seed.

    Attributes:
        case: Name of the case.
        seed: Of weights and data.
        source: Hash of the library and the clinic that made the row.
        sick: Quality of the untreated run.
        twin: Quality of its healthy twin; NaN for a healthy case.
        advice: Why the library cannot act; empty where it can.
        found: Code of the primary finding of the sick run, empty for none.
        advised: Remedies that the diagnosis names for it, best first.
        recommended: What a trial recommended on a healthy case; empty is right.
        quality: Quality by way of repairing.
        done: What was done, by way of repairing.
        runs: Cost beside the repaired run, in whole runs, by way of repairing.
        candidates: Quality after each candidate's whole run, where they were trained.
        trial: The candidates and what became of them in the trial, in words.
        trial_seconds: Wall time of our trial.
        run_seconds: Wall time of training the healthy twin, unwatched, which has as many steps.
        seconds: Wall time of the row.
        error: What was raised, empty for nothing.
    """

    case: str
    seed: int
    source: str
    sick: float = 0.0
    twin: float = 0.0
    advice: str = ""
    found: str = ""
    advised: tuple[str, ...] = ()
    recommended: str = ""
    quality: dict[str, float] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    runs: dict[str, float] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)
    trial: tuple[str, ...] = ()
    trial_seconds: float = 0.0
    run_seconds: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Case and seed."""
        return self.case, self.seed


def trains_every_candidate(name: str) -> bool:
    """Whether a case is one of those whose candidates are all trained to their end; fixed by its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _SHARE_TRAINED == 0


def run_case(name: str, seed: int) -> CureRow:
    """Run one case under every way of repairing; what it raises stands in the row."""
    case = find(name)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fields = _sick(case, seed) if case.is_sick else _healthy(case, seed)
        except Exception:  # noqa: BLE001  # one case that fails must not end the clinic; the row says so
            fields = {"error": traceback.format_exc(limit=-6)}
    return CureRow(
        case=name, seed=seed, source=source_hash(), seconds=round(time.perf_counter() - started, 1), **fields
    )


def append(path: Path, row: CureRow) -> None:
    """Add a row to a results file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path, *, source: str | None) -> Iterator[CureRow]:
    """Yield the rows of a results file, the newest of each run; those of other sources are left out."""
    if not path.exists():
        return
    newest: dict[tuple[str, int], CureRow] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        row = CureRow(**{**data, "advised": tuple(data["advised"]), "trial": tuple(data["trial"])})
        if source is None or row.source == source:
            newest[row.key] = row
    yield from newest.values()


def _sick(case: Case, seed: int) -> dict[str, Any]:
    sick = train(case, seed, watch=True, probe=True)
    primary = sick.diagnosis.primary if sick.diagnosis is not None else None
    started = time.perf_counter()
    twin = train(find(case.twin), seed)
    fields: dict[str, Any] = {
        "sick": sick.quality,
        "twin": twin.quality,
        "run_seconds": round(time.perf_counter() - started, 3),
        "advice": advice_only(case, build(case, seed)),
        "found": "" if primary is None else primary.code,
        "advised": () if primary is None else tuple(cure.remedy for cure in primary.prescriptions),
    }
    if fields["advice"]:
        return fields
    repairs: dict[str, Repair] = dict(
        zip(WAYS, (way(case, seed, sick) for way in (ours, at_random, fixed_order, always)), strict=True)
    )
    result = repairs["gradguard"].result
    if result is not None:
        fields["trial_seconds"] = round(result.cost_s, 3)
        fields["trial"] = tuple(f"{r.remedy}: {r.outcome}, loss {r.loss:.3g} {r.why}" for r in result.runs)
        fields["trial"] += (f"untreated: loss {result.control.loss:.3g}",)
        if trains_every_candidate(case.name):
            fields["candidates"] = candidates(case, seed, result)
    return fields | {
        "quality": {way: repair.quality for way, repair in repairs.items()},
        "done": {way: " + ".join(repair.done) or repair.why or "nothing" for way, repair in repairs.items()},
        "runs": {way: repair.runs for way, repair in repairs.items()},
    }


def _healthy(case: Case, seed: int) -> dict[str, Any]:
    run = train(case, seed, watch=True)
    job = build(case, seed)
    fields: dict[str, Any] = {
        "sick": run.quality,
        "twin": float("nan"),
        "advice": advice_only(case, job) and "not tried",
    }
    primary = run.diagnosis.primary if run.diagnosis is not None else None
    fields["found"] = "" if primary is None else primary.code
    if primary is not None:
        fields["recommended"] = " + ".join(ours(case, seed, run).done)
    return fields
