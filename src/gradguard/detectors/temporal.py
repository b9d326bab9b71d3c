"""GG111 temporal-vanishing and GG112 temporal-exploding: the gradient changes exponentially on its way back in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, Trend, loss_progress
from gradguard.detectors._numbers import names_text
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.profiles import TimeProfile
from gradguard.records import TEMPORAL_STATISTICS, FloatArray

__all__ = ["find_temporal", "time_profiles"]

_LATE_READING = 0.25
"""Share of the steps, counted from the end, within which a loss reads outputs if it depends on long memory. Ours: a
sequence-to-one loss reads one step, recall tasks the last few; a loss at each step, a mean or attention reads them all,
and gets its gradient to every step without going through time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """One recurrent module over the observations of a run; arrays of shape ``[observations]``."""

    history: History
    config: GuardConfig
    row: int
    loss: LossProgress
    columns: dict[str, FloatArray]

    @property
    def name(self) -> str:
        return self.history.layers.names[self.row]

    @property
    def spans(self) -> FloatArray:
        return self.columns["temporal_span"]

    @property
    def kind(self) -> str:
        """Class of torch's that the module is, as far as its numbers and its kind's name tell."""
        return self.history.layers.types[self.row]

    def at(self, statistic: str, index: int) -> float:
        return float(self.columns[statistic][index])

    def reads_late(self, index: int) -> bool:
        """Whether the loss reads only the end of the sequence, so that it needs what the state carries."""
        return self.at("temporal_reach", index) <= _LATE_READING

    def has_lasted(self, episode: Episode) -> bool:
        return episode.count >= 2 and bool(self.history.steps[episode.last] >= self.config.span_patience_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What one module has: since when, and how badly."""

    module: _Module
    episode: Episode
    severity: Severity

    @property
    def shown(self) -> int:
        """The observation whose numbers are told."""
        return self.episode.last if self.episode.standing else self.episode.first

    @property
    def order(self) -> tuple[bool, int, float]:
        return self.episode.standing, int(self.severity), abs(self.module.at("temporal_span", self.shown))


def find_temporal(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find recurrent modules through which the gradient vanishes or explodes in time.

    What is judged is the gradient of the last reading on its way back, so that a loss at every step hides nothing.

    Vanishing is an illness only where the loss needs what is lost. Where it reads the end of the sequence alone, a span
    below ``-temporal_warning`` decades is a warning once the loss is known not to fall, has been looked at twice, and
    ``span_patience_steps`` steps have passed; an error below ``-temporal_error``. Where no loss is recorded, only the
    latter counts, as a warning. A check knows no loss over time and only mentions it: torch's default start forgets
    within a dozen steps, and most tasks that read the end of 40 steps or more train all the same. Where the loss reads
    outputs throughout, a net may forget what it need not keep: it is mentioned, and only while the loss does not fall.

    Exploding hurts whatever the loss reads. Above ``temporal_explosion`` it is a warning, an error where it has lasted
    and the loss does not fall. Growth that a run has arrived at while its loss fell is mentioned.

    Args:
        history: Records of one optimizer, oldest first; needs ``temporal_span``.
        config: Thresholds.

    Returns:
        At most one GG111 and one GG112, each for the worst module. One that has cleared is INFO and has a
        ``resolved_step``.

    Source:
        Levels: ours, algorithms.md, sections 0 and E: of seven nets on a 64-step recall, the two with spans within 3.5
        decades learnt it. Of 18 default nets (RNN, LSTM, GRU) on tasks that need no long memory, over 40 and 100 steps,
        all began with spans of -7 to -24 and 17 learnt: before training the span alone says nothing.
        Law: Pascanu, Mikolov, Bengio (2013), ICML, arXiv 1211.5063.
    """
    if not any("temporal_span" in record.layer_values for record in history.records):
        return []
    loss = loss_progress(history)
    columns = {name: history.layer(name) for name in TEMPORAL_STATISTICS}
    modules = [
        _Module(
            history=history,
            config=config,
            row=int(row),
            loss=loss,
            columns={name: values[:, row] for name, values in columns.items()},
        )
        for row in np.flatnonzero(np.isfinite(columns["temporal_span"]).any(axis=0))
    ]
    findings = []
    for code, judge in (("GG111", _vanishing), ("GG112", _exploding)):
        verdicts = [verdict for module in modules if (verdict := judge(module)) is not None]
        if verdicts:
            findings.append(_finding(code, sorted(verdicts, key=lambda v: v.order, reverse=True)))
    return findings


def time_profiles(history: History, findings: Sequence[Finding]) -> tuple[TimeProfile, ...]:
    """Return the gradient through time of each recurrent module, in execution order.

    Args:
        history: What was observed, of all optimizers. A module that several optimizers saw is shown once, as the first
            of them saw it whose findings name it, else as the first.
        findings: What was found; a module that a standing GG111 or GG112 names is marked with the code.
    """
    owners: dict[str, tuple[str, str]] = {}
    for finding in findings:
        if finding.code in {"GG111", "GG112"} and finding.standing:
            for name in finding.layers or (finding.layer or "",):
                owners.setdefault(name, (finding.code, finding.optimizer))
    labels = [optimizer.label for optimizer in history.info.optimizers]
    found: dict[str, TimeProfile] = {}
    for part in history.split():
        label = labels[part.optimizer] if part.optimizer < len(labels) else ""
        for name in (name for name in part.layers.names if name in part.profiles):
            code, owner = owners.get(name, ("", ""))
            if name not in found or (owner and owner == label):
                found[name] = _time_profile(part, name, code)
    return tuple(found.values())


def _time_profile(part: History, name: str, mark: str) -> TimeProfile:
    row, profile = part.layers.names.index(name), part.profiles[name]
    columns = {statistic: part.layer(statistic)[:, row] for statistic in TEMPORAL_STATISTICS}
    known = np.flatnonzero(np.isfinite(columns["temporal_span"]))
    newest = {statistic: float(values[known[-1]]) if known.size else math.nan for statistic, values in columns.items()}
    steps = newest["temporal_steps"]
    return TimeProfile(
        name=name,
        kind=part.layers.kinds[row],
        distance=tuple(profile.distance.tolist()),
        memory=tuple(profile.memory.tolist()),
        loss_gradient=tuple(profile.hidden.tolist()),
        span=newest["temporal_span"],
        factor=newest["temporal_factor"],
        horizon=newest["temporal_horizon"],
        steps=int(steps) if math.isfinite(steps) else len(profile.distance),
        reach=newest["temporal_reach"],
        gate=newest["gate_mean"],
        gate_name=_gate_name(part.layers.types[row]) if math.isfinite(newest["gate_mean"]) else "",
        mark=mark,
    )


def _gate_name(kind: str) -> str:
    """Return what the gate that keeps the state is called; empty for an unknown kind."""
    return "forget gate" if "LSTM" in kind else "update gate" if "GRU" in kind else ""


def _episode(module: _Module, begins: BoolArray, holds: BoolArray) -> Episode | None:
    return last_episode(begins, holds=holds, known=np.isfinite(module.spans))


def _vanishing(module: _Module) -> _Verdict | None:
    config, loss = module.config, module.loss
    spans = np.nan_to_num(module.spans)
    episode = _episode(module, spans < -config.temporal_warning, spans < -config.span_info)
    if episode is None:
        return None
    needed = module.reads_late(episode.last)
    if not episode.standing:
        return _Verdict(module=module, episode=episode, severity=Severity.INFO) if needed else None
    span, lasted = float(spans[episode.last]), module.has_lasted(episode)
    severity = Severity.INFO
    stuck = loss.stuck and not loss.learnt
    if not needed:
        return _Verdict(module=module, episode=episode, severity=severity) if stuck and lasted else None
    extreme, beyond = span < -config.temporal_error, span < -config.temporal_warning
    if lasted and stuck and beyond:
        severity = Severity.ERROR if extreme else Severity.WARNING
    elif lasted and extreme and loss.trend is Trend.UNKNOWN:
        severity = Severity.WARNING
    return _Verdict(module=module, episode=episode, severity=severity)


def _exploding(module: _Module) -> _Verdict | None:
    config, loss = module.config, module.loss
    spans = np.nan_to_num(module.spans)
    limit = config.temporal_explosion
    episode = _episode(module, spans > limit, spans > 0.5 * limit)
    if episode is None:
        return None
    known = np.flatnonzero(np.isfinite(module.spans))
    from_start = episode.first == known[0]
    severity = Severity.INFO
    if episode.standing and spans[episode.last] > limit and not loss.learnt:
        far = bool(spans[episode.last] > config.temporal_warning)
        if module.history.info.preflight:
            severity = Severity.WARNING
        elif loss.stuck:
            severity = Severity.ERROR if module.has_lasted(episode) else Severity.WARNING
        elif loss.trend is Trend.UNKNOWN:
            severity = Severity.WARNING if far or from_start else Severity.INFO
        else:
            severity = Severity.WARNING if far and from_start else Severity.INFO
    return _Verdict(module=module, episode=episode, severity=severity)


def _finding(code: str, verdicts: list[_Verdict]) -> Finding:
    """Make a finding of the worst module; the others that are as it is stand in ``layers``."""
    worst = verdicts[0]
    module, episode, shown = worst.module, worst.episode, worst.shown
    steps = module.history.steps.astype(np.int64)
    cause, reason = _cause(code, module, shown)
    alike = [v.module.name for v in verdicts if v.episode.standing is episode.standing and v.severity is worst.severity]
    return make_finding(
        code,
        worst.severity,
        _message(code, worst),
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layer=module.name,
        layers=tuple(alike),
        cause=cause,
        confidence=_confidence(worst),
        evidence=_evidence(code, module, shown),
        ruled_out=_ruled_out(module, episode, cause, reason),
    )


def _message(code: str, verdict: _Verdict) -> str:
    module, episode, shown = verdict.module, verdict.episode, verdict.shown
    name, steps = names_text((module.name,)), module.history.steps.astype(np.int64)
    size = f"{abs(module.at('temporal_span', shown)):.1f} decades over {module.at('temporal_steps', shown):.0f} steps"
    if not episode.standing:
        past = "vanished" if code == "GG111" else "exploded"
        return (
            f"The gradient {past} through time in {name} ({size} at step {steps[episode.first]}); "
            f"it has recovered since step {steps[episode.resolved or 0]}."
        )
    firm = verdict.severity >= Severity.WARNING
    verb = ("vanishes" if firm else "shrinks") if code == "GG111" else ("explodes" if firm else "grows")
    text = f"The gradient {verb} on its way back through time in {name}: {size}"
    text += f", a factor of {module.at('temporal_factor', shown):.2g} per step."
    horizon = module.at("temporal_horizon", shown)
    if code == "GG111" and math.isfinite(horizon):
        text += f" A tenth of it is left after {horizon:.1f} steps"
        late = module.reads_late(shown)
        text += ", and the loss reads the end of the sequence only." if late else "."
    return text


def _cause(code: str, module: _Module, index: int) -> tuple[Cause, str]:
    """Return the cause, and the number that speaks against the other ones.

    A gate that keeps a share f multiplies the state by f at each step; a plain RNN by its derivative and its weights.

    Source: algorithms.md, section E: per step about rho(W) times the mean derivative; the mean forget gate in an LSTM.
    """
    factor, gate = module.at("temporal_factor", index), module.at("gate_mean", index)
    slope = module.at("temporal_derivative", index)
    if math.isfinite(gate):
        closed = code == "GG111" and 0.0 < gate < 1.0 and math.log(gate) <= 0.5 * math.log(max(factor, 1e-9))
        return (Cause.GATES if closed else Cause.WEIGHT_SCALE), f"they keep {gate:.2g} of the state per step"
    if code == "GG111" and 0.0 < slope < 1.0 and math.log(slope) < 0.5 * math.log(max(factor, 1e-9)):
        return (
            Cause.ACTIVATION_DERIVATIVE,
            f"the recurrent weights give a factor of {factor / slope:.2g} per step",
        )
    return Cause.WEIGHT_SCALE, f"it is {slope:.2g} in the root mean square"


def _evidence(code: str, module: _Module, index: int) -> dict[str, Evidence]:
    config = module.config
    limit = -config.temporal_warning if code == "GG111" else config.temporal_explosion
    factor, horizon = module.at("temporal_factor", index), module.at("temporal_horizon", index)
    gate, slope = module.at("gate_mean", index), module.at("temporal_derivative", index)
    evidence = {
        "time_span": Evidence(
            value=module.at("temporal_span", index), unit="decades", note=f"a warning beyond {limit:+g}"
        ),
        "factor_per_step": Evidence(value=factor, unit="ratio", note="1 would keep its size"),
        "output_reach": Evidence(
            value=module.at("temporal_reach", index),
            unit="fraction",
            note="of the steps, back from the last, at which the loss reads outputs; 0: the last only",
        ),
    }
    steps = module.at("temporal_steps", index)
    if math.isfinite(steps):
        evidence["time_steps"] = Evidence(value=int(steps), unit="steps", note="of the sequence")
    if math.isfinite(horizon):
        evidence["memory_horizon"] = Evidence(value=horizon, unit="steps", note="back to a tenth of the gradient")
    if math.isfinite(gate):
        name = _gate_name(module.kind) or "gate"
        evidence["mean_gate"] = Evidence(value=gate, unit="fraction", note=f"{name}: the share kept per step")
    if math.isfinite(slope) and slope > 0.0:
        evidence["derivative"] = Evidence(value=slope, unit="ratio", note="of the activation, root mean square")
        evidence["recurrent_factor"] = Evidence(
            value=factor / slope, unit="ratio", note="of the recurrent weights per step, near their spectral radius"
        )
    return evidence


def _confidence(verdict: _Verdict) -> float:
    """Grow with the distance from the limit, and where the loss confirms it. Source: ours; the clinic calibrates it."""
    module = verdict.module
    beyond = min(3.0, max(0.0, abs(module.at("temporal_span", verdict.shown)) - module.config.temporal_explosion)) / 3.0
    value = 0.5 + 0.2 * beyond
    if module.loss.stuck and module.has_lasted(verdict.episode):
        value += 0.2
    return value if verdict.severity >= Severity.WARNING else min(value, 0.5)


def _ruled_out(module: _Module, episode: Episode, cause: Cause, reason: str) -> tuple[RuledOut, ...]:
    """State the other causes that the numbers exclude."""
    excluded: dict[Cause, str] = {}
    if module.history.steps[episode.first] == 0:
        excluded[Cause.LEARNING_RATE] = "there at step 0, before any update"
    gated = math.isfinite(module.at("gate_mean", episode.first))
    if gated and cause is not Cause.GATES:
        excluded[Cause.GATES] = reason
    elif not gated:
        other = Cause.WEIGHT_SCALE if cause is Cause.ACTIVATION_DERIVATIVE else Cause.ACTIVATION_DERIVATIVE
        excluded[other] = reason
    given = module.history.layer("input_max_abs")[episode.first, module.row]
    if np.isfinite(given) and 0.0 < given <= 100.0:
        excluded[Cause.DATA] = f"finite, largest entry {given:.2g}"
    return tuple(RuledOut(cause=other, reason=why) for other, why in excluded.items())
