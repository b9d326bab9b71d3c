"""Runs cases: each is checked before its first step, then trained under a guard with default settings."""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradguard
from benchmarks.clinic.case import Case, Job, take_step
from benchmarks.clinic.catalogue import find
from benchmarks.clinic.probe import Probe
from benchmarks.clinic.results import Row, Said, source_hash
from benchmarks.clinic.taps import TrunkTaps
from gradguard.detectors.depth import trunk
from gradguard.guard import Guard

__all__ = ["drive", "run_all", "run_case"]

_KEPT_LOSSES = 60


def run_all(jobs: Iterable[tuple[str, int]], *, workers: int = 2, ignore: tuple[str, ...] = ()) -> Iterator[Row]:
    """Run cases in a pool of processes and give their rows as they come.

    Args:
        jobs: Name and seed of each run.
        workers: Processes, each on one thread; 1 runs here.
        ignore: Rules that the guard is told to leave out, by code or family.
    """
    wanted = list(jobs)
    if workers <= 1:
        torch.set_num_threads(1)
        yield from (run_case(name, seed, ignore) for name, seed in wanted)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(run_case, name, seed, ignore) for name, seed in wanted]
        for future in as_completed(futures):
            yield future.result()


def run_case(name: str, seed: int, ignore: tuple[str, ...] = ()) -> Row:
    """Run one case and return its row; what it raises stands in the row."""
    case = find(name)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fields = _run(case, seed, ignore)
        except Exception:  # noqa: BLE001  # one run that fails must not end the clinic; the row says so
            fields = {"error": traceback.format_exc(limit=-6)}
    return Row(case=name, seed=seed, source=source_hash(), seconds=round(time.perf_counter() - started, 3), **fields)


def _run(case: Case, seed: int, ignore: tuple[str, ...]) -> dict[str, Any]:
    torch.manual_seed(seed)
    job = case.build(seed)
    fields = _check(job)
    run = _Run(job)
    with gradguard.watch(
        job.model,
        job.optimizers if len(job.optimizers) > 1 else job.optimizers[0],
        scaler=job.scaler,
        on_finding=run.hear,
        on_error="raise",
        ignore=ignore,
    ) as guard:
        run.guard = guard
        drive(job, run.record, begin=run.begin, end=run.end)
        diagnosis = guard.diagnose()
        overhead = guard.overhead
    return fields | {
        "quality": job.quality(job.model),
        "steps": job.steps,
        "optimizer": type(job.optimizers[0]).__name__,
        "overhead": overhead if math.isfinite(overhead) else -1.0,
        "healthy": diagnosis.healthy,
        "announced": tuple(run.heard),
        "findings": tuple(Said.of(finding) for finding in diagnosis.findings),
        "losses": tuple(_thin(run.losses)),
        "profiles": tuple(_profiles(guard, run.taps)),
        "readings": tuple(run.probe.readings),
    }


def drive(
    job: Job,
    record: Callable[[int, Tensor, str], None],
    *,
    begin: Callable[[int], None] | None = None,
    end: Callable[[int], None] | None = None,
) -> None:
    """Train a job to its end.

    Args:
        job: Changed: its model is trained.
        record: Called with step, loss and optimizer's name between backward and clipping.
        begin: Called before each step.
        end: Called after each step.
    """
    advance = job.advance if job.advance is not None else take_step
    for step in range(job.steps):
        if job.before_step is not None:
            job.before_step(step)
        if begin is not None:
            begin(step)
        advance(job, step, lambda loss, name="", step=step: record(step, loss, name))
        if end is not None:
            end(step)


class _Run:
    """What listens to one run: the guard, the probe of rivals, the taps at the trunk."""

    def __init__(self, job: Job) -> None:
        self.guard: Guard | None = None
        self.step = 0
        self.heard: list[Said] = []
        self.losses: list[float] = []
        self.taps: dict[int, list[float]] = {}
        self.probe = Probe(job)
        self._trunk = TrunkTaps(job.model)
        config = gradguard.GuardConfig()
        self._due = {*config.dense_steps, *range(0, job.steps, config.every)}

    def hear(self, finding: gradguard.Finding) -> None:
        """Note an announcement."""
        self.heard.append(Said.of(finding, at=self.step))

    def record(self, step: int, loss: Tensor, name: str) -> None:
        """Pass the reading point on to the guard and the probe."""
        self.losses.append(float(loss.detach()))
        if self.guard is not None:
            self.guard.record(loss=loss, name=name)
        self.probe.read(step)

    def begin(self, step: int) -> None:
        """Set what watches a step."""
        self.step = step
        self.probe.begin(step)
        if step in self._due:
            self._trunk.begin()

    def end(self, step: int) -> None:
        """Take in what was watched."""
        if step in self._due:
            self._trunk.end()
            self.taps[step] = self._trunk.norms
        self.probe.end(step, self.losses[-1] if self.losses else math.nan)


def _check(job: Job) -> dict[str, Any]:
    """Return what a check before the first step says; a check that raises is noted, not hidden."""
    try:
        diagnosis = gradguard.check(
            job.model,
            job.batch(0),
            lambda model, batch: _loss_for_check(job, model, batch),
            optimizer=job.optimizers if len(job.optimizers) > 1 else job.optimizers[0],
            scaler=job.scaler,
        )
    except Exception as error:  # noqa: BLE001  # the score says which checks failed, and how
        return {"check_error": f"{type(error).__name__}: {error}"}
    return {"checked": tuple(Said.of(finding) for finding in diagnosis.findings)}


def _loss_for_check(job: Job, model: Any, batch: Any) -> Tensor:
    if job.autocast is None:
        return job.loss(model, batch)
    with torch.autocast("cpu", dtype=job.autocast):
        return job.loss(model, batch)


def _profiles(guard: Guard, taps: dict[int, list[float]]) -> Iterator[dict[str, Any]]:
    """Give delta at the trunk rows of each observation, in execution order, and at the inputs of blocks."""
    for record in guard.history.records:
        delta = record.layer_values.get("delta_norm", np.array([]))
        rows = trunk(record.layers, delta) if len(delta) else np.array([], dtype=np.intp)
        yield {
            "step": record.step,
            "optimizer": record.optimizer,
            "delta": [float(f"{delta[row]:.4g}") for row in rows],
            "taps": [float(f"{norm:.4g}") for norm in taps.get(record.step, [])],
        }


def _thin(losses: list[float]) -> list[float]:
    if len(losses) <= _KEPT_LOSSES:
        return losses
    chosen = np.linspace(0, len(losses) - 1, _KEPT_LOSSES).round().astype(int)
    return [float(f"{losses[index]:.5g}") for index in chosen]


def _one_thread() -> None:
    torch.set_num_threads(1)
