"""Cures tried on copies of a model before they are recommended: raced, ranked and measured, the model untouched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard._contest import Contest
from gradguard._entrant import Entrant
from gradguard._plan import make_plan
from gradguard._race import Batches, Race
from gradguard._untouched import FAILURES
from gradguard.detectors.saturated_units import FAR_INPUT
from gradguard.findings import Diagnosis, Finding, Prescription, Severity
from gradguard.monitors._trees import floating_tensors
from gradguard.outcomes import TrialResult, TrialRun
from gradguard.preflight import check
from gradguard.prescriptions import plain_prescription, reserves_for
from gradguard.remedies import catalogue

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["trial"]

_MOST_BATCHES = 80
"""Batches kept at most: as many as the longest trial has steps."""

_OF_LAYERS = frozenset({"GG101", "GG102", "GG301", "GG302", "GG403"})
"""Illnesses of layers that raw features make as well: they drive the first activations to their ends. Ours."""

_LIKE_LAYERS = frozenset({"GG501", "GG502", "GG504"})
"""Illnesses of updates that layers which pass no gradient look like. Ours."""

_OF_TRAINING = frozenset({"GG202", "GG203", "GG204", "GG301", "GG302", "GG501", "GG505"})
"""Illnesses seen in training that weights may have had in them from the start: a net whose first weights are three
times too large diverges at its first step, and what a guard sees is a rate that is too high. Ours."""


_MOST_CANDIDATES = 6
"""Candidates after which no more join for what lies in the first weights. Ours: with more of them each is trained for
two steps of a short run before half are dropped; with four to six as many of 77 sick runs are cured as with all."""


def trial(  # noqa: PLR0913  # all but four are keywords with defaults
    model: nn.Module,
    batches: Any,
    compute_loss: Callable[[Any, Any], Any],
    make_optimizer: Callable[[Any], Optimizer],
    *,
    diagnosis: Diagnosis | None = None,
    candidates: Sequence[str | Prescription] | None = None,
    run_steps: int | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TrialResult:
    """Try cures on copies of a model and rank them by what they do to the loss.

    Every candidate is applied to a copy of the model as it is given, so give it as it was *before* it was damaged,
    where that is at hand. All copies see the same batches and the same random numbers, an untreated copy among them.
    After a fifth and a half of the steps those behind are dropped; at most three run to the end, under two seeds where
    the budget allows; a short race for a regression that a cure with a new module leads goes on to 40 steps. Among
    those within 5 % of the best gain the one that changes least is recommended. BatchNorm that a cure adds is judged in
    evaluation mode as well; where batches hold fewer than 16 examples, losses are those of 128.

    Learning rates are searched by decades; where the run's rate had climbed, copies begin at the rate that it had
    climbed to. Where the steps of a winner that has not halved the loss overshoot, it is tried at lower rates too, over
    40 steps; where they are far too short, at a higher one; and it may be recommended together with one (``lr_factor``
    in its arguments). Where what a guard saw may be the doing of the first weights or of raw data, cures for those are
    tried as well, up to six in all. For an illness of layers other cures of layers stand in where fewer than two of the
    prescribed ones can be applied, or none helps after 40 steps; what diverged is then tried at a tenth of the rate. A
    run of hundreds of steps is raced for up to 160 of them while nobody helps; beyond 40, where the untreated copy
    learns as well, with those alone that a check finds well. The model, its gradients, its modes and all random states
    stay as they are.

    Args:
        model: Any module that can be copied.
        batches: Iterable of training batches; the first 80 at most are kept, so in a usual run no batch comes twice.
            What began in mid-run (a spike, an outlier in the data) shows only with the batches it came with: give those
            from shortly before the finding's ``step`` on.
        compute_loss: Called as ``compute_loss(model, batch)``; returns a scalar loss, or a mapping with ``"loss"``. Any
            loss will do, no accuracy is asked for.
        make_optimizer: Called with a copy, returns the optimizer to train it with.
        diagnosis: What is wrong; from a guard or a check. By default the model is checked first.
        candidates: Names of remedies, or prescriptions, to try instead of those of the diagnosis.
        run_steps: Steps of the run that is to be saved. The trial then takes at most a quarter of them, unless the run
            has only hundreds.
        steps: Steps of a whole run of a copy; chosen by default: 40, or 10 to 80 where ``run_steps`` is given.
        seconds: Time after which to stop with what is known by then.
        seed: From which the random numbers of the copies are derived.
        progress: Called with a line of text when something was measured.

    Returns:
        The ranking. Nothing is recommended where nothing is wrong, or where nothing helps by more than chance. Where
        the loss tells no difference, the first cure is recommended after which a check no longer finds what it finds in
        the untreated copy, and ``note`` says so. What began late in a run and does not show in these steps is treated
        by clipping or another learning rate alone: by what helps, or else by the first that does no harm. The latter is
        named as well, and the note says that it is unproven, where a whole run was ill and these steps tell nothing.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are no batches, a number is out of range, or a candidate is unknown.
        UnsupportedModelError: If the model cannot be copied, is compiled or scripted, or there is no memory for copies.

    Source: ours, algorithms.md, section K.

    Example:
        >>> import torch, gradguard
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(64, 16)
        >>> loss = lambda model, x: (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=1e-7)
        >>> gradguard.trial(model, [x], loss, sgd, candidates=["higher-learning-rate"]).best.remedy
        'higher-learning-rate'
    """
    started = time.perf_counter()
    _check_numbers(run_steps=run_steps, steps=steps, seconds=seconds)
    _check_callable(compute_loss=compute_loss, make_optimizer=make_optimizer)
    kept = Batches(batches, min(_MOST_BATCHES, steps) if steps is not None else _MOST_BATCHES)
    if diagnosis is None:
        diagnosis = check(model, kept.at(0, 0), compute_loss)
    given = [plain_prescription(item) if isinstance(item, str) else item for item in candidates or ()]
    if candidates is None:
        given = _prescribed(diagnosis, kept.at(0, 0), lambda: _remarks(model, kept.at(0, 0), compute_loss))
    entrants, impossible = _entrants(given)
    if not entrants:
        note = (
            "Nothing is wrong, so nothing was tried."
            if not impossible
            else "What would help here is for you to change: see the prescriptions."
        )
        control = TrialRun(remedy="", loss=math.nan, steps=0, seeds=0, outcome="untreated")
        return TrialResult(best=None, ranking=(), control=control, runs=impossible, diagnosis=diagnosis, note=note)
    illness = next(iter(_illnesses(diagnosis)), None)
    reserves = () if candidates is not None or illness is None else _reserves(illness, diagnosis, entrants)
    contest = Contest(
        model,
        Race(kept, compute_loss, base_seed=seed),
        _at_the_rate_of(illness, make_optimizer),
        plan=make_plan(
            len(entrants),
            searched=sum(entrant.remedy.searched for entrant in entrants),
            run_steps=run_steps,
            steps=steps,
        ),
        illness=illness,
        deadline=math.inf if seconds is None else started + seconds,
        progress=progress,
    )
    contest.run(entrants, reserves)
    judgement = contest.judgement
    ranking, best = judgement.ranking(), judgement.best()
    return TrialResult(
        best=best,
        ranking=ranking,
        control=judgement.control_run(),
        runs=(*judgement.runs(), *impossible),
        diagnosis=_with_effects(diagnosis, ranking),
        cost_s=time.perf_counter() - started,
        cost_steps=contest.steps_taken,
        run_steps=run_steps or 0,
        interrupted=contest.interrupted,
        note=_note(contest, best),
    )


def _note(contest: Contest, best: Prescription | None) -> str:
    if best is None:
        return "Nothing that was tried helps."
    if not contest.goes_by_health:
        return ""
    if contest.unproven:
        why = (
            "No loss falls within so few steps, and no check tells the cures apart"
            if contest.shown
            else "What is wrong began later than these steps, and does not show in them"
        )
        return f"{why}. {best.remedy} is the first cure that does no harm here; whether it helps shows in a run."
    return (
        f"No cure lowers the loss within so few steps. {best.remedy} is the first one after which a check no longer "
        "finds what is wrong: give it a longer trial, or a run."
    )


def _at_the_rate_of(illness: Finding | None, make_optimizer: Callable[[Any], Optimizer]) -> Callable[[Any], Optimizer]:
    """Return a maker of optimizers whose rate is the one that the run had climbed to, where it had."""
    climbed = None if illness is None else illness.evidence.get("climbed_lr")
    if climbed is None:
        return make_optimizer

    def make(model: Any) -> Optimizer:
        optimizer = make_optimizer(model)
        groups = getattr(optimizer, "param_groups", ())  # what is no optimizer is refused later, by name
        groups = [group for group in groups if group.get("lr") is not None]
        highest = max((float(group["lr"]) for group in groups), default=0.0)
        if 0.0 < highest < float(climbed.value):
            for group in groups:  # a new number: where the rate is a tensor it may be the caller's
                group["lr"] = group["lr"] * (float(climbed.value) / highest)
        return optimizer

    return make


def _illnesses(diagnosis: Diagnosis) -> list[Finding]:
    return [
        finding
        for finding in diagnosis.findings
        if finding.standing and finding.severity >= Severity.WARNING and finding.consequence_of is None
    ]


def _remarks(model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any]) -> tuple[Finding, ...]:
    """Return what a check says of the model as it was before the run; nothing where it cannot be checked."""
    try:
        return check(model, batch, compute_loss).findings
    except FAILURES:
        return ()


def _prescribed(diagnosis: Diagnosis, batch: Any, look: Callable[[], tuple[Finding, ...]]) -> list[Prescription]:
    """Return the cures for what is wrong, and then those for what may lie behind it in data or first weights.

    Args:
        diagnosis: Of the run.
        batch: What the model is given.
        look: Checks the model as it was before the run.
    """
    illnesses = _illnesses(diagnosis)
    cures = [cure for finding in illnesses for cure in finding.prescriptions]
    of_training = [f for f in illnesses if f.code in _OF_TRAINING and "climbed_lr" not in f.evidence]
    if (of_training or any(finding.code in _OF_LAYERS for finding in illnesses)) and any(
        float(data.abs().max()) > FAR_INPUT for data in floating_tensors(batch) if data.numel()
    ):
        cures.append(plain_prescription("standardize-input"))
    if of_training:
        remarks = [*diagnosis.findings, *look()]
        known = {cure.remedy for cure in cures}
        free = _MOST_CANDIDATES - sum(catalogue.find(name) is not None for name in known)
        for cure in (cure for finding in remarks if finding.standing for cure in finding.prescriptions):
            if free > 0 and cure.remedy not in known and catalogue.find(cure.remedy) is not None:
                cures.append(cure)
                known.add(cure.remedy)
                free -= 1
    return cures


def _reserves(illness: Finding, diagnosis: Diagnosis, entrants: Sequence[Entrant]) -> Sequence[Entrant]:
    """Return cures of layers in general that are not among the prescribed ones, for what may lie in the layers."""
    if illness.code not in _OF_LAYERS | _LIKE_LAYERS:
        return ()
    known = {entrant.prescription.remedy for entrant in entrants}
    return _entrants([cure for cure in reserves_for(illness, diagnosis.layers) if cure.remedy not in known])[0]


def _entrants(given: Sequence[Prescription]) -> tuple[list[Entrant], tuple[TrialRun, ...]]:
    """Return what can be tried, each remedy once, and what is advice only."""
    entrants, impossible, seen = [], [], set()
    for cure in given:
        if cure.remedy in seen:
            continue
        seen.add(cure.remedy)
        remedy = catalogue.find(cure.remedy)
        if remedy is None:
            why = "advice: the change is yours to make"
            run = TrialRun(remedy=cure.remedy, loss=math.nan, steps=0, seeds=0, outcome="not possible", why=why)
            impossible.append(run)
        else:
            entrants.append(Entrant(prescription=cure, remedy=remedy))
    return entrants, tuple(impossible)


def _with_effects(diagnosis: Diagnosis, ranking: Sequence[Prescription]) -> Diagnosis:
    """Return the diagnosis with what was measured in its prescriptions, best first."""
    measured = {cure.remedy: (place, cure) for place, cure in enumerate(ranking)}

    def order(cure: Prescription) -> int:
        return measured[cure.remedy][0] if cure.remedy in measured else len(measured)

    findings = [
        replace(
            finding,
            prescriptions=tuple(
                measured[cure.remedy][1] if cure.remedy in measured else cure
                for cure in sorted(finding.prescriptions, key=order)
            ),
        )
        for finding in diagnosis.findings
    ]
    return replace(diagnosis, findings=tuple(findings))


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")


def _check_callable(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
