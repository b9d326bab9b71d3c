"""GG101 vanishing-gradient and GG102 exploding-gradient: the gradient changes exponentially through depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._culprit import Explanation, explain_depth
from gradguard.detectors._depth import (
    TRUNK_ROLES,
    span_decades,
    supported_span,
    supported_spans,
    theil_sen_gain,
    trunk,
    weight_layers,
)
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, Trend, loss_progress, still_at_chance
from gradguard.detectors._numbers import in_range, names_text, signal
from gradguard.detectors._reasons import active_units, usual_input, usual_rate
from gradguard.detectors._stream import stream_of, stream_spans
from gradguard.detectors._zeros import ZeroOwner, zero_pattern
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import FloatArray, StepRecord

__all__ = ["find_depth", "observed_spans", "span_decades", "supported_span", "theil_sen_gain", "trunk"]

_LATE_LOOKS = 2
"""Consecutive observations in which a late explosion must show. Ours: the span of a healthy run moves by up to 1.4
decades."""

_EXCUSED = 1.5
"""Times ``span_warning`` up to which a loss that has fallen excuses a vanishing gradient. Ours: an average over 32 x 32
positions spreads the gradient by 1.5 decades and harms nobody; no net of ours that learns in all its layers loses
more."""

_SURE = 0.98
"""Highest confidence of a depth finding. Ours: 32 healthy SGD runs and 57 healthy Adam runs without a late false
alarm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the two rules share: spans, and the optimizer that sets the severity."""

    history: History
    config: GuardConfig
    spans: FloatArray

    @property
    def adaptive(self) -> bool | None:
        """Whether the optimizer is adaptive; ``None`` where it is unknown."""
        known = self.history.info.optimizers
        return known[self.history.optimizer].adaptive if self.history.optimizer < len(known) else None

    @property
    def steps(self) -> FloatArray:
        return self.history.steps


def find_depth(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find a gradient that vanishes or explodes on its way from the loss to the input.

    One observation is enough. Beyond ``span_warning`` decades it is a warning; an error once it has stood for two
    observations and ``span_patience_steps`` steps, or at once with an optimizer that is known not to be adaptive (Adam
    rescues many nets, SGD none). A finding goes on until the span is within ``span_info`` decades again. Late in a run
    a gradient that grows by more than ``span_late_explosion`` decades is an error where the loss is known not to fall.

    A loss of at least ``span_info`` decades is a warning, too, where a classifier is still at chance after 100 steps.

    A loss that has clearly fallen tempers the verdict: a late explosion within ``span_warning`` is then INFO, and so is
    a vanishing gradient within 1.5 times ``span_warning`` of a classifier under an adaptive optimizer; anything else
    beyond the limits is a warning, as a loss may fall far by its last layers, or its last bias, alone. A span that has
    come back within ``span_warning`` is a warning only where the loss is known not to fall.

    Args:
        history: Records of one optimizer, oldest first; needs ``delta_norm``.
        config: Thresholds.

    Returns:
        At most one GG101 and one GG102. A finding that has cleared is INFO and has a ``resolved_step``.

    Source:
        Levels: ours, algorithms.md, sections G2 to G4. Law: Schoenholz et al. (2017), arXiv 1611.01232.
    """
    if not len(history):
        return []
    run = _Run(history=history, config=config, spans=observed_spans(history, config))
    found = [_judge(run, "GG101", *_vanishing(run)), _judge(run, "GG102", *_exploding(run))]
    return [finding for finding in found if finding is not None]


def observed_spans(history: History, config: GuardConfig) -> FloatArray:
    """Return the depth span of each observation in decades, ``[observations]``, read-only; NaN below two live rows.

    It is :func:`supported_span` over the layers, extended by the decay of the live rows for each row that underflowed
    to zero. Of a model that is stacked from enough blocks it is taken over the inputs of the blocks instead.

    Args:
        history: Records of one optimizer.
        config: Thresholds.
    """
    minimum = config.minimum_depth_layers
    return history.derived(("observed_spans", minimum), lambda: _observed_spans(history, minimum))


def _observed_spans(history: History, minimum: int) -> FloatArray:
    delta, given, taps = (
        in_range(history.layer(f"{place}_norm"), history.layer(f"{place}_max_abs"))
        for place in ("delta", "input_delta", "block_delta")
    )
    columns = [row for row, role in enumerate(history.layers.roles) if role in TRUNK_ROLES]
    spans = _extended(history, supported_spans(delta[:, columns], minimum_layers=minimum), delta[:, columns])
    stream = stream_of(history.layers, taps, delta, given, minimum=minimum)
    if stream is None:
        return spans
    through = _extended(history, stream_spans(stream, minimum=minimum), stream.values)
    return np.where(np.isnan(through), spans, through)


def _extended(history: History, spans: FloatArray, values: FloatArray) -> FloatArray:
    """Add to spans what the signal must have lost at the points where it underflowed to zero."""
    records = history.records
    for index in (int(i) for i in np.flatnonzero((values == 0.0).any(axis=1) & ~np.isnan(spans))):
        if zero_pattern(records[index]).owner is ZeroOwner.UNDERFLOW:
            before = values[index][: int(np.argmax(values[index] > 0.0))]
            spans[index] += int((before == 0.0).sum()) * min(0.0, math.log10(theil_sen_gain(values[index])))
    return spans


def _vanishing(run: _Run) -> tuple[BoolArray, BoolArray]:
    """Return where a vanishing gradient begins and where it goes on."""
    return run.spans < -run.config.span_warning, run.spans < -run.config.span_info


def _exploding(run: _Run) -> tuple[BoolArray, BoolArray]:
    """Return where an exploding gradient begins and where it goes on."""
    return (run.spans > run.config.span_warning) | _late(run), run.spans > run.config.span_info


def _late(run: _Run) -> BoolArray:
    """Return where a gradient that grows late in the run has done so for two known observations in a row."""
    config = run.config
    mask = (run.steps > config.span_patience_steps) & (run.spans > config.span_late_explosion)
    result = np.zeros_like(mask)
    streak = 0
    for index in np.flatnonzero(~np.isnan(run.spans)):
        streak = streak + 1 if mask[index] else 0
        result[index] = streak >= _LATE_LOOKS
    return result


def _judge(run: _Run, code: str, begins: BoolArray, holds: BoolArray) -> Finding | None:
    known = ~np.isnan(run.spans)
    episode = last_episode(begins, holds=holds, known=known)
    if episode is None or not episode.standing:
        mention = _mention(holds & known, known)
        episode = episode if mention is None else mention
    if episode is None:
        return None
    loss = loss_progress(run.history)
    severity = (_vanishing_severity if code == "GG101" else _exploding_severity)(run, episode, loss)
    return _finding(run, code, episode, severity, loss)


def _vanishing_severity(run: _Run, episode: Episode, loss: LossProgress) -> Severity:
    if not episode.standing:
        return Severity.INFO
    if -float(np.nanmin(run.spans[episode.first : episode.last + 1])) <= run.config.span_warning:
        return Severity.WARNING if still_at_chance(run.history) else Severity.INFO
    if run.spans[episode.last] >= -run.config.span_warning:
        return Severity.WARNING if loss.stuck else Severity.INFO
    fallen = loss.trend is Trend.FALLEN
    if run.adaptive is False:
        return Severity.WARNING if fallen else Severity.ERROR
    if fallen:
        excused = run.adaptive and run.history.info.classes >= 2
        far = run.spans[episode.last] < -_EXCUSED * run.config.span_warning
        return Severity.INFO if excused and not far else Severity.WARNING
    return Severity.ERROR if _has_lasted(run, episode) else Severity.WARNING


def _exploding_severity(run: _Run, episode: Episode, loss: LossProgress) -> Severity:
    config = run.config
    beyond = bool(run.spans[episode.last] > config.span_warning)
    late = bool(_late(run)[episode.last])
    began_beyond = bool(np.nanmax(run.spans[episode.first : episode.last + 1]) > config.span_warning)
    if not episode.standing or not (late or began_beyond):
        return Severity.INFO
    if loss.trend is Trend.FALLEN or (not beyond and (loss.learnt or not loss.stuck)):
        return Severity.WARNING if beyond else Severity.INFO
    if run.adaptive is False:
        return Severity.ERROR
    return Severity.ERROR if late and loss.stuck else Severity.WARNING


def _has_lasted(run: _Run, episode: Episode) -> bool:
    return episode.count >= 2 and bool(run.steps[episode.last] >= run.config.span_patience_steps)


def _mention(mask: BoolArray, known: BoolArray) -> Episode | None:
    """Return the stretch that stands at the last observation, if any: what has cleared is not mentioned."""
    episode = last_episode(mask, known=known)
    return episode if episode is not None and episode.standing else None


def _finding(run: _Run, code: str, episode: Episode, severity: Severity, loss: LossProgress) -> Finding | None:
    shown = episode.last if episode.standing else episode.first
    record = run.history.records[shown]
    delta = signal(record)
    rows = trunk(record.layers, delta)
    if rows.size < 2:  # the layers changed their kind under their names since: what the run's table says is not theirs
        return None
    span = float(run.spans[shown])
    explained = explain_depth(record, rows, span)
    layers = weight_layers(record.layers, rows)
    gain = theil_sen_gain(delta[layers])
    pace = _Pace(count=len(layers), unit="layer", gain=gain)
    through_blocks = _pace_of_blocks(record, run.config)
    evidence = {
        "span": Evidence(value=span, unit="decades", note=f"a warning beyond {run.config.span_warning:g}"),
        "gain_per_layer": Evidence(value=gain, unit="ratio", note="1 would keep its size"),
        "layers": Evidence(value=len(layers), unit="layers"),
        **({} if through_blocks is None else through_blocks.evidence),
        "first_delta": Evidence(value=float(delta[rows[0]]), unit="L2 norm", note=record.layers.names[rows[0]]),
        "last_delta": Evidence(value=float(delta[rows[-1]]), unit="L2 norm", note=record.layers.names[rows[-1]]),
        **explained.evidence,
        **_underflow_evidence(record),
    }
    steps = run.steps.astype(np.int64)
    return make_finding(
        code,
        severity,
        _message(run, code, episode, span, through_blocks or pace, explained, severity),
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layer=explained.layer,
        layers=tuple(record.layers.names[i] for i in rows),
        cause=explained.cause,
        confidence=_confidence(run, episode, span, loss),
        evidence=evidence,
        ruled_out=_ruled_out(run, episode, record, explained.cause),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """By which factor the gradient changes, per what."""

    count: int
    unit: str
    gain: float

    @property
    def evidence(self) -> dict[str, Evidence]:
        return {
            f"{self.unit}s": Evidence(value=self.count, unit=f"{self.unit}s", note="the span is between their inputs"),
            f"gain_per_{self.unit}": Evidence(value=self.gain, unit="ratio", note="1 would keep its size"),
        }


def _pace_of_blocks(record: StepRecord, config: GuardConfig) -> _Pace | None:
    """Return the pace through the blocks of a stacked model, ``None`` where the span is one of layers."""
    minimum = config.minimum_depth_layers
    taps, delta, given = (signal(record, at=place)[None, :] for place in ("block_delta", "delta", "input_delta"))
    stream = stream_of(record.layers, taps, delta, given, minimum=minimum)
    if stream is None or stream.live()[0] < minimum:
        return None
    inputs = stream.values[0][[bool(block) for block in stream.blocks]]
    return _Pace(count=len(inputs), unit="block", gain=theil_sen_gain(inputs))


def _message(
    run: _Run,
    code: str,
    episode: Episode,
    span: float,
    pace: _Pace,
    explained: Explanation,
    severity: Severity,
) -> str:
    steps = run.steps.astype(np.int64)
    verb = "vanishes" if code == "GG101" else "explodes"
    size = f"{abs(span):.1f} decades over {pace.count} {pace.unit}s"
    if not episode.standing:
        past = "vanished" if code == "GG101" else "exploded"
        return (
            f"The gradient {past} on its way to the input ({size} at step {steps[episode.first]}); "
            f"it has recovered since step {steps[episode.resolved or 0]}."
        )
    if severity is Severity.INFO:
        verb = "shrinks" if code == "GG101" else "grows"
    text = f"The gradient {verb} on its way to the input: {size}"
    if explained.single:
        return f"{text}, most of it in {names_text((explained.layer or '',))}."
    text += f", a factor of {pace.gain:.2g} per {pace.unit}."
    zeros = zero_pattern(run.history.records[episode.last])
    if zeros.owner is ZeroOwner.UNDERFLOW:
        text += f" At the first {len(zeros.rows)} layers it is exactly zero."
    early = severity is Severity.WARNING and run.adaptive and steps[episode.last] < run.config.span_patience_steps
    if early and not run.history.info.preflight:
        text += f" An adaptive optimizer may still recover by step {run.config.span_patience_steps}."
    return text


def _underflow_evidence(record: StepRecord) -> dict[str, Evidence]:
    zeros = zero_pattern(record)
    if zeros.owner is not ZeroOwner.UNDERFLOW or zeros.border is None:
        return {}
    return {
        "zero_layers": Evidence(
            value=len(zeros.rows), unit="layers", note="underflow: the gradient is exactly zero there"
        ),
        "last_finite_delta": Evidence(
            value=float(signal(record)[zeros.border]), unit="L2 norm", note=record.layers.names[zeros.border]
        ),
    }


def _confidence(run: _Run, episode: Episode, span: float, loss: LossProgress) -> float:
    """Grow with the distance from the limit and with repetition; stay low where an optimizer may still put it right.

    Source: ours; the clinic calibrates it.
    """
    beyond = min(2.0, max(0.0, abs(span) - run.config.span_info)) / 2.0
    value = min(_SURE, 0.5 + 0.3 * beyond + 0.06 * min(episode.count, 3))
    if run.adaptive is not False and not _has_lasted(run, episode):
        value = min(value, 0.6 if run.adaptive else 0.7)
    return value if loss.trend is not Trend.FALLEN else min(value, 0.5)


def _ruled_out(run: _Run, episode: Episode, record: StepRecord, cause: Cause) -> tuple[RuledOut, ...]:
    """State the other causes that the numbers exclude."""
    reasons = {
        Cause.LEARNING_RATE: "there at step 0, before any update"
        if run.steps[episode.first] == 0
        else usual_rate(run.history, run.config, episode.first),
        Cause.DATA: usual_input(record),
        Cause.PRECISION: "no underflow: no layer's gradient is zero"
        if zero_pattern(record).owner is ZeroOwner.NOBODY
        else "",
        Cause.DEAD_UNITS: active_units(record, run.config, unknown="no ReLU-like units"),
    }
    return tuple(
        RuledOut(cause=other, reason=reason) for other, reason in reasons.items() if reason and other is not cause
    )
