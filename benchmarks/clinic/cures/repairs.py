"""Ways of repairing a sick run: ours, one at random, AUTOTRAINER's fixed order, and the same three things always."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

import gradguard
from benchmarks.clinic.case import Case
from benchmarks.clinic.cures.runs import Outcome, Setting, Treat, apply_all, build, setting_of, train
from benchmarks.clinic.nets import Exponential
from benchmarks.clinic.results import Row
from benchmarks.clinic.rivals import autotrainer_of
from gradguard.errors import GradGuardError
from gradguard.outcomes import TrialResult
from gradguard.remedies import catalogue

__all__ = ["Repair", "always", "at_random", "candidates", "fixed_order", "ours"]

_ALWAYS = ("he-initialization", "batch-norm", "clip-norm")

_FACTORS = (1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)
"""Factors that a random change of the learning rate draws from."""

_BATCHES_BEFORE = 4
"""Steps before an illness was first seen whose batches a trial begins with."""

_MOST_TRIES = 10
"""Repairs that AUTOTRAINER tries at most. Source: peers.md, section 3.3."""

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, Exponential)
"""What AUTOTRAINER replaces when it replaces activations: those of all layers."""

_REFUSALS = (GradGuardError, RuntimeError, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a way of repairing made of a run.

    Attributes:
        done: Names of what was done to the run that counts; empty where nothing was.
        quality: How that run ended.
        runs: What it cost beside that run, in whole runs.
        why: Why nothing was done, where that needs saying.
        result: The trial, where there was one.
    """

    done: tuple[str, ...] = ()
    quality: float
    runs: float = 0.0
    why: str = ""
    result: TrialResult | None = field(default=None, repr=False)


def ours(case: Case, seed: int, sick: Outcome) -> Repair:
    """Try the prescriptions of the sick run's diagnosis on copies of its original weights; train with the best.

    The batches are those from shortly before the illness was first seen, as the documentation of a trial asks for.
    """
    job = build(case, seed)
    primary = sick.diagnosis.primary if sick.diagnosis is not None else None
    setting = setting_of(job, first=max(0, primary.step - _BATCHES_BEFORE) if primary is not None else 0)
    result = gradguard.trial(
        job.model, setting.batches, setting.loss, setting.make_optimizer, diagnosis=sick.diagnosis, run_steps=job.steps
    )
    cost = result.cost_steps / job.steps
    best = result.best
    if best is None:
        return Repair(quality=sick.quality, runs=cost, why=result.note, result=result)
    quality = train(case, seed, lambda setting: apply_all(setting, [best])).quality
    return Repair(done=(_named(best),), quality=quality, runs=cost, result=result)


def candidates(case: Case, seed: int, result: TrialResult) -> dict[str, float]:
    """Train every candidate of a trial that can be applied to its end; return how each ended, by name."""
    ended = {}
    findings = result.diagnosis.findings if result.diagnosis is not None else ()
    plain = {cure.remedy: cure for finding in findings for cure in finding.prescriptions}
    for run in result.runs:
        if run.outcome == "not possible":
            continue
        cure = next((cure for cure in result.ranking if cure.remedy == run.remedy), plain.get(run.remedy))
        if cure is None:
            continue
        try:
            ended[run.remedy] = train(case, seed, partial(_apply_one, cure)).quality
        except _REFUSALS:
            continue
    return ended


def _apply_one(cure: gradguard.Prescription, setting: Setting) -> nn.Module:
    return apply_all(setting, [cure])


def at_random(case: Case, seed: int, sick: Outcome) -> Repair:
    """Apply one remedy of our catalogue, drawn at random; one that cannot be applied is drawn again."""
    draw = random.Random(f"{case.name} {seed}")  # noqa: S311  # no secret
    names = sorted(catalogue.names())
    for _ in range(20):
        name = draw.choice(names)
        cure = gradguard.Prescription(remedy=name, reason="drawn", code="")
        if name.endswith("learning-rate"):
            factor = draw.choice([f for f in _FACTORS if (f > 1.0) == name.startswith("higher")])
            cure = gradguard.Prescription(remedy=name, arguments={"factor": factor}, reason="drawn", code="")
        try:
            quality = train(case, seed, partial(_apply_one, cure)).quality
        except _REFUSALS:
            continue
        return Repair(done=(_named(cure),), quality=quality)
    return Repair(quality=sick.quality, why="nothing that was drawn could be applied")


def always(case: Case, seed: int, sick: Outcome) -> Repair:
    """Apply He initialization, BatchNorm and clipping at 1; those that can be."""
    done: list[str] = []

    def treat(setting: Setting) -> nn.Module:
        model = setting.job.model
        for name in _ALWAYS:
            try:
                model = gradguard.apply(
                    name, model, optimizer=setting.optimizer, batch=setting.batches[0], compute_loss=setting.loss
                ).model
            except _REFUSALS:
                continue
            done.append(name)
        return model

    try:
        return Repair(quality=train(case, seed, treat).quality, done=tuple(done))
    except _REFUSALS as error:
        return Repair(quality=sick.quality, why=str(error).partition("\n")[0])


def fixed_order(case: Case, seed: int, sick: Outcome) -> Repair:
    """Try AUTOTRAINER's repairs in its order, each a whole run, until its own detectors are silent.

    The list is that of the problem that its detectors report on the sick run; with none reported nothing is done.
    Kinder than the original in two ways: each repair begins at the original weights, and initializations do change the
    weights (peers.md, section 3.4).

    Source: Zhang et al., "AUTOTRAINER", ICSE 2021, strategy "balance"; peers.md, sections 3.2 and 3.3.
    """
    problem = _problem(sick)
    if not problem:
        return Repair(quality=sick.quality, why="its detectors report nothing")
    best, tries = sick.quality, 0
    done: tuple[str, ...] = ()
    for name, treat in _order(problem, random.Random(f"{case.name} {seed}")):  # noqa: S311  # no secret
        if tries == _MOST_TRIES:
            break
        try:
            ended = train(case, seed, treat, probe=True)
        except _REFUSALS:
            continue
        tries += 1
        if ended.quality > best or not done:
            best, done = ended.quality, (name,)
        if not _problem(ended):
            return Repair(done=(name,), quality=ended.quality, runs=tries - 1)
    return Repair(done=done, quality=best, runs=max(0, tries - 1))


def _problem(ended: Outcome) -> str:
    """Return the problem that AUTOTRAINER would treat first."""
    row = Row(case="", seed=0, source="", readings=ended.readings)
    rules = {flag.rule for flag in autotrainer_of(row)}
    order = ("dying", "explode", "vanish", "not converging", "unstable")
    return next((rule for rule in order if rule in rules), "")


def _order(problem: str, draw: random.Random) -> Iterator[tuple[str, Treat]]:
    def remedy(*names: str) -> tuple[str, Treat]:
        return " + ".join(names), lambda setting: apply_all(setting, names)

    selu = ("selu + lecun-initialization", partial(_activation, nn.SELU, "lecun-initialization"))
    relu = ("relu + he-initialization", partial(_activation, nn.ReLU, "he-initialization"))
    norm = remedy("batch-norm")
    if problem == "vanish":
        yield from (selu, relu, norm)
    elif problem == "explode":
        yield from (selu, relu, ("clip value 10", _clip_value(10.0)), ("tanh", partial(_activation, nn.Tanh, "")), norm)
    elif problem == "dying":
        inits = ["he-initialization", "xavier-initialization", "lecun-initialization", "orthogonal-initialization"]
        yield from (selu, norm, *(remedy(name) for name in draw.sample(inits, 3)))
        for kind in (nn.LeakyReLU, nn.ELU, partial(nn.Threshold, 1.0, 0.0)):
            yield str(getattr(kind, "__name__", "Threshold")), partial(_activation, kind, "")
    else:
        yield from _rates(problem)
        yield from (remedy(name) for name in ("he-initialization", "xavier-initialization", "lecun-initialization"))


def _activation(kind: Callable[[], nn.Module], initialization: str, setting: Setting) -> nn.Module:
    """Put an activation in place of every other one, the clinic's own exp(x) among them; then draw the weights anew.

    Raises:
        ValueError: If the model has none as a module.
    """
    model = setting.job.model
    found = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _ACTIVATIONS):
                setattr(parent, name, kind())
                found = True
    if not found:
        raise ValueError("no activation modules")
    return apply_all(setting, [initialization]) if initialization else model


def _rates(problem: str) -> Iterator[tuple[str, Treat]]:
    """Yield another optimizer first, then three learning rates: smaller ones where it swings, larger ones where not."""
    yield "Adam", _swap_optimizer
    for power in (1, 2, 3):
        yield f"rate {power}", _rate((0.1 if problem == "unstable" else 10.0) ** power)


def _swap_optimizer(setting: Setting) -> nn.Module:
    parameters = [p for group in setting.optimizer.param_groups for p in group["params"]]
    setting.job.optimizers = (torch.optim.Adam(parameters),)
    return setting.job.model


def _rate(factor: float) -> Treat:
    def treat(setting: Setting) -> nn.Module:
        for group in setting.optimizer.param_groups:
            group["lr"] *= factor
        return setting.job.model

    return treat


def _clip_value(limit: float) -> Callable[[Setting], nn.Module]:
    def treat(setting: Setting) -> nn.Module:
        setting.job.clip_value = limit
        return setting.job.model

    return treat


def _named(cure: gradguard.Prescription) -> str:
    factor = cure.arguments.get("factor")
    return cure.remedy if factor is None else f"{cure.remedy} x{float(factor):.2g}"
