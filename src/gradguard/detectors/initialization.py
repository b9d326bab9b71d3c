"""GG403 poor-initialization: the first weights have the wrong scale for the activations behind them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._attribution import deviations_before, layers_before, weight_deviations, wished_deviation
from gradguard.detectors._culprit import explain_depth
from gradguard.detectors._depth import power, theil_sen_gain, trunk, weight_layers
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._numbers import column, finite_median, signal
from gradguard.detectors.depth import observed_spans
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import StepRecord

__all__ = ["find_poor_initialization"]

_TWO_ENDS = frozenset({"Tanh", "Softsign", "Hardtanh"})
"""Activations that are steepest at 0 and flat on both sides. A sigmoid is none of them: it wants weights ten times as
large, and trains with them."""

_PASSED = 0.45
"""Share of its largest derivative that such an activation passes, below which weights drive it to its ends. Ours: 0.2
to 0.43 in six nets with weights of 4 to 8 times the usual scale, which learn half of what their twins do; 0.59 and more
in eleven healthy ones."""

_TIMES_WANTED = 3.0
"""Times the scale that keeps the signal's size. Ours: healthy nets have at most 1.4 times."""

_TIMES_ALONE = 5.0
"""The same where there is one such activation. Ours: trained for thousands of steps to fit jumps they come to 4.9."""

_FAR_ABOVE_CHANCE = 3.0
"""Times ln(classes) that a classifier's first loss must be for its first weights to be at fault beyond doubt. Source:
Karpathy, CS231n notes, "Neural networks part 3": look for the loss of chance at the start; the factor is ours: with
ten classes the true one is then given a hundredth of its share."""

_SWOLLEN = 2.0
"""Decades by which weights that are too large may make the signal grow up to the last layer, where no loss of chance is
known to measure it by. Ours: a regression net of 8 layers with weights of 2.5 times the usual scale begins at 10^2.7
and stands, after 240 steps of Adam, far above where the mean would; none of 385 healthy runs reaches it."""

_WORTH_SAYING = 1.0
"""Decades over all layers from which a gain is worth a remark. Ours: half of what is mentioned for the gradient."""


def find_poor_initialization(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find first weights whose scale makes each layer shrink or enlarge the gradient, or drives tanh to its ends.

    Looked at is the first step, over ``minimum_depth_layers`` or more layers without normalization between most of
    them: the factor per layer lies outside ``initial_gain``, adds up to a decade, and weights explain it rather than
    activations, dead or saturated units or one layer alone. It is a remark beside GG101 and GG102; a warning where the
    measured span was, and still is, beyond ``span_warning``, or where weights that are too large give a classifier a
    first loss of more than three times that of chance. Once training has halved the span nothing is said.

    Weights of more than three times the scale that tanh and its like keep the signal with, five times before a single
    one, are a warning, too, if those pass less than 0.45 of the gradient; a remark once the loss has clearly fallen.

    Args:
        history: Records of one optimizer, oldest first; needs ``delta_norm`` at step 0.
        config: Thresholds.

    Source: Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232; He et al. (2015), arXiv
        1502.01852; limits ours.
    """
    if not len(history) or history.records[0].step != 0:
        return []
    found = [*_wrong_gain(history, config), *_at_the_ends(history)]
    return sorted(found, key=lambda finding: -finding.severity)[:1]


def _wrong_gain(history: History, config: GuardConfig) -> Sequence[Finding]:
    record = history.records[0]
    delta = signal(record)
    rows = trunk(record.layers, delta)
    layers = weight_layers(record.layers, rows)
    norms = sum(record.layers.roles[int(row)] == "norm" for row in rows)
    if len(layers) < config.minimum_depth_layers or 2 * norms >= len(layers):
        return []
    spans = observed_spans(history, config)
    gain, span = theil_sen_gain(delta[layers]), float(spans[0])
    total = math.log10(gain) * (len(layers) - 1) if gain > 0.0 else 0.0
    if abs(math.log10(gain or 1.0)) <= math.log10(config.initial_gain) or abs(total) < _WORTH_SAYING:
        return []
    if math.isnan(span) or span * total <= 0.0:
        return []
    explained = explain_depth(record, rows, span)
    if explained.cause is not Cause.WEIGHT_SCALE or explained.single:
        return []
    now = float(spans[~np.isnan(spans)][-1])
    if now * span <= 0.0 or abs(now) < 0.5 * abs(span):  # training has put it right
        return []
    lasting = min(abs(span), abs(now)) > config.span_warning
    times = _times_chance(history)
    kind = explained.evidence.get("activation")
    activation = str(kind.value) if kind is not None else ""
    evidence = _evidence(record, layers, gain, activation)
    if times > _FAR_ABOVE_CHANCE:
        evidence["first_loss"] = Evidence(value=times, unit="times", note="that of chance, ln(classes)")
    passed = evidence.get("forward_gain")
    grown = math.log10(float(passed.value)) * (len(layers) - 1) if passed is not None else 0.0
    swollen = math.isnan(times) and grown > _SWOLLEN
    loud = span > 0.0 and (times > _FAR_ABOVE_CHANCE or swollen)
    return [
        make_finding(
            "GG403",
            Severity.WARNING if lasting or loud else Severity.INFO,
            _message(gain, len(layers), evidence),
            step=0,
            last_step=0,
            layer=explained.layer,
            layers=tuple(record.layers.names[row] for row in layers),
            cause=Cause.WEIGHT_SCALE,
            confidence=0.8,
            evidence=evidence,
        )
    ]


def _at_the_ends(history: History) -> Sequence[Finding]:
    """Find weights that drive activations which saturate on both sides to their flat ends."""
    record = history.records[0]
    table = record.layers
    rows = [row for row, kind in enumerate(table.types) if kind in _TWO_ENDS]
    if not rows or "norm" in table.roles:
        return []
    deviations = deviations_before(record)
    rows = [row for row in rows if deviations[row] > 0.0]
    given, delta = column(record, "input_delta_norm")[rows], column(record, "delta_norm")[rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        passed = finite_median(given / delta / np.array(table.derivative_bounds)[rows])
    if not passed < _PASSED:
        return []
    deviation = finite_median(deviations[rows])
    wanted = wished_deviation(table.types[rows[0]])
    if not deviation > (_TIMES_WANTED if len(rows) > 1 else _TIMES_ALONE) * wanted:
        return []
    before = layers_before(record)
    layers = tuple(dict.fromkeys(table.names[before[row]] for row in rows))
    return [
        make_finding(
            "GG403",
            Severity.INFO if loss_progress(history).trend is Trend.FALLEN else Severity.WARNING,
            f"The first weights are too large for {table.types[rows[0]]}: their gain is {deviation:.2g}, {wanted:.3g} "
            f"would keep the signal's size, and {_activations(len(rows))} {passed:.2g} of the gradient.",
            step=0,
            last_step=0,
            layer=layers[0],
            layers=layers,
            cause=Cause.WEIGHT_SCALE,
            confidence=0.8,
            evidence={
                "activation_gain": Evidence(value=passed, unit="ratio", note=f"median; below {_PASSED:g}"),
                "weight_deviation": Evidence(value=deviation, note="of the weights, times the root of fan-in"),
                "critical_deviation": Evidence(value=wanted, note="keeps the gradient's size"),
                "activation": Evidence(value=table.types[rows[0]]),
            },
        )
    ]


def _activations(count: int) -> str:
    return "1 activation near its flat ends passes" if count == 1 else f"{count} activations near their flat ends pass"


def _message(gain: float, layers: int, evidence: dict[str, Evidence]) -> str:
    size = "small" if gain < 1.0 else "large"
    text = (
        f"The first weights are too {size}: each of {layers} layers passes the gradient on with a factor of {gain:.2g}"
    )
    if "weight_deviation" in evidence and "critical_deviation" in evidence:
        here, wanted = evidence["weight_deviation"].value, evidence["critical_deviation"].value
        text += f" (their gain is {here:.2g}, {wanted:.3g} would keep its size)"
    if "first_loss" in evidence:
        text += f", and the first loss is {evidence['first_loss'].value:.2g} times that of chance"
    return f"{text}."


def _times_chance(history: History) -> float:
    """Return the loss of step 0 over ln(classes), NaN where it is not known or no classifier's."""
    steps, losses = history.losses
    if history.info.classes < 2 or not losses.size or steps[0] != 0:
        return math.nan
    return float(losses[0]) / math.log(history.info.classes)


def _evidence(record: StepRecord, layers: list[int], gain: float, activation: str) -> dict[str, Evidence]:
    forward = column(record, "forward_rms")
    logs = np.log10(np.where((forward > 0.0) & np.isfinite(forward), forward, np.nan))
    changes = np.array([logs[after] - logs[before] for before, after in itertools.pairwise(layers)])
    changes = changes[np.isfinite(changes)]
    evidence = {
        "gain_per_layer": Evidence(value=gain, unit="ratio", note="gradient towards the input; 1 keeps its size"),
        "layers": Evidence(value=len(layers), unit="layers"),
    }
    if changes.size:
        passed = power(float(np.median(changes)))
        evidence["forward_gain"] = Evidence(value=passed, unit="ratio", note="output over output")
    deviations = weight_deviations(record)
    deviation = finite_median(np.array([deviations.get(record.layers.names[row], math.nan) for row in layers]))
    wanted = wished_deviation(activation) if activation else math.nan
    if not math.isnan(deviation):
        evidence["weight_deviation"] = Evidence(value=deviation, note="of the weights, times the root of fan-in")
    if not math.isnan(wanted):
        evidence["critical_deviation"] = Evidence(value=wanted, note=f"keeps the gradient's size with {activation}")
    return evidence
