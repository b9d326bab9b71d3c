"""Other tools' rules, written anew from their formulas and applied to the same runs.

Each rule set judges the readings of a run (:mod:`benchmarks.clinic.probe`) with its published default thresholds, and
says what it would have flagged, in our families. A tool counts as having named a family rightly when *any* of its flags
does, which is kinder than what gradguard's one verdict gets.

Sources: AUTOTRAINER (Zhang et al., ICSE 2021; TDSC 2024), ``monitor.py`` and ``utils.py``; SageMaker Debugger, list of
built-in rules; DeepDiagnosis (Wardat et al., ICSE 2022), ``callbacks.py``: peers.md, sections 1.1, 1.2 and 1.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.clinic.outcome import LabelledRun
from benchmarks.clinic.results import Row

__all__ = [
    "RIVALS",
    "Flag",
    "autotrainer",
    "autotrainer_of",
    "autotrainer_ungated",
    "deep_diagnosis",
    "sagemaker",
    "sagemaker_core",
]

Reading: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """Something a rule set objects to.

    Attributes:
        rule: Its own name of the problem.
        families: Ours that mean the same.
        step: Step of the first reading that shows it.
        layer: Layer it names, empty for none.
    """

    rule: str
    families: tuple[str, ...]
    step: int
    layer: str = ""


_VANISHING = ("vanishing", "temporal_vanishing", "precision")
_EXPLODING = ("exploding", "temporal_exploding", "divergence", "spike")
_RATE = ("learning_rate", "clipping", "divergence")
_STILL = ("no_update", "no_gradient", "precision")


def _first(readings: Sequence[Reading], condition: Callable[[Reading], bool]) -> Reading | None:
    return next((reading for reading in readings if condition(reading)), None)


def _is_bad(reading: Reading) -> bool:
    return bool(reading.get("g_bad") or reading.get("w_bad"))


def _epochs(row: Row) -> list[Reading]:
    return [reading for reading in row.readings if reading.get("epoch")]


def autotrainer(run: LabelledRun) -> list[Flag]:
    """Return what AUTOTRAINER's five detectors report, behind its accuracy gate (threshold 0.7, gain 0.01)."""
    return autotrainer_of(run.row)


def autotrainer_of(row: Row) -> list[Flag]:
    """Return the same of a row whose outcome nobody has checked."""
    return _autotrainer(row, gated=True)


def autotrainer_ungated(run: LabelledRun) -> list[Flag]:
    """Return what the same detectors report without the gate, as on a task that has no accuracy."""
    return _autotrainer(run.row, gated=False)


def _autotrainer(row: Row, *, gated: bool) -> list[Flag]:
    """Judge every third epoch, as its monitor does; accuracy features count from 30 % of the run on."""
    epochs = _epochs(row)
    flags: list[Flag] = []
    for index in range(2, len(epochs), 3):
        reading, seen = epochs[index], epochs[: index + 1]
        loss = reading.get("loss", 0.0)
        if (not math.isfinite(loss) or loss >= 1e3) and _is_bad(reading):
            flags.append(Flag(rule="explode", families=(*_EXPLODING, "non_finite"), step=reading["step"]))
        if not gated or _fails_gate(seen):
            flags.extend(_autotrainer_gradients(reading))
        if index >= 0.3 * len(epochs) - 3:
            flags.extend(_autotrainer_accuracy(seen, len(epochs)))
    return flags


def _fails_gate(seen: Sequence[Reading]) -> bool:
    """Whether accuracy is low or stands still; without an accuracy the tool has no say."""
    train, validation = _accuracies(seen)
    if not train:
        return False
    return (max(train) < 0.7 and max(validation) < 0.7) or max(_gains(train) + _gains(validation), default=0.0) < 0.01


def _accuracies(seen: Sequence[Reading]) -> tuple[list[float], list[float]]:
    known = [reading for reading in seen if "acc_train" in reading]
    return [reading["acc_train"] for reading in known], [reading["acc_val"] for reading in known]


def _gains(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def _autotrainer_gradients(reading: Reading) -> Iterator[Flag]:
    first, last = reading.get("g_first", math.nan), reading.get("g_last", math.nan)
    ratio = first / last if last else math.nan
    if ratio < 1e-3 and first < 1e-4:
        yield Flag(rule="vanish", families=_VANISHING, step=reading["step"])
    if ratio > 70:
        yield Flag(rule="explode", families=_EXPLODING, step=reading["step"])
    if reading.get("g_zero", 0.0) >= 0.7:
        yield Flag(rule="dying", families=("dead", "no_gradient"), step=reading["step"])


def _autotrainer_accuracy(seen: Sequence[Reading], total: int) -> Iterator[Flag]:
    train, validation = _accuracies(seen)
    if len(train) < 2:
        return
    step = seen[-1]["step"]
    swings = sum(
        train[top] - train[bottom] >= 0.03
        for top in range(1, len(train) - 1)
        if train[top - 1] < train[top] >= train[top + 1] and (bottom := _next_low(train, top)) is not None
    )
    if swings >= 0.2 * total:
        yield Flag(rule="unstable", families=_RATE, step=step)
    if max(_gains(train) + _gains(validation)) < 0.01 and max(train + validation) < 0.7:
        yield Flag(rule="not converging", families=_RATE, step=step)


def _next_low(values: Sequence[float], start: int) -> int | None:
    """Return the next local minimum behind an index."""
    inner = range(start + 1, len(values) - 1)
    return next((i for i in inner if values[i - 1] >= values[i] < values[i + 1]), None)


def sagemaker_core(run: LabelledRun) -> list[Flag]:
    """Return what SageMaker's rules on gradients, weights and activations report."""
    return list(_sagemaker(run.row))


def sagemaker(run: LabelledRun) -> list[Flag]:
    """Return what all of its tensor rules report, LossNotDecreasing (every ten steps) among them."""
    flags = list(_sagemaker(run.row))
    losses = [(reading["step"], reading.get("loss", math.nan)) for reading in run.row.readings]
    for (_, before), (step, after) in itertools.pairwise(losses):
        if step >= 10 and not after < before:
            flags.append(Flag(rule="LossNotDecreasing", families=_RATE, step=step))
            break
    return flags


def _sagemaker(row: Row) -> Iterator[Flag]:
    readings = row.readings
    rules: tuple[tuple[str, tuple[str, ...], str, Callable[[Reading], bool]], ...] = (
        ("VanishingGradient", _VANISHING, "g_mean_at", lambda r: r.get("g_mean", 1.0) < 1e-7),
        ("ExplodingTensor", (*_EXPLODING, "non_finite"), "g_bad", _is_bad),
        ("WeightUpdateRatio", _RATE, "ratio_max_at", lambda r: r.get("ratio_max", 0.0) > 10),
        ("WeightUpdateRatio", (*_RATE, *_STILL), "ratio_min_at", lambda r: r.get("ratio_min", 1.0) < 1e-8),
        ("DeadRelu", ("dead",), "dead_units_at", lambda r: r.get("dead_units", 0.0) > 0.5),
        ("SaturatedActivation", ("saturated",), "saturated_far_at", lambda r: r.get("saturated_far", 0.0) > 0.5),
        ("UnchangedTensor", _STILL, "unchanged_at", lambda r: r.get("unchanged", 0) >= 2),
        ("AllZero", _STILL, "g_all_zero", lambda r: bool(r.get("g_all_zero"))),
        ("PoorWeightInitialization", ("initialization", *_VANISHING, *_EXPLODING), "", _poor_start),
    )
    for name, families, where, condition in rules:
        found = _first(readings, condition)
        if found is not None:
            yield Flag(rule=name, families=families, step=found["step"], layer=str(found.get(where, "")))


def _poor_start(reading: Reading) -> bool:
    """Whether weights' variances differ by more than 10, or gradients by less than 1e-3, in the first ten steps."""
    if reading["step"] >= 10 or "w_var_min" not in reading:
        return False
    smallest = reading["w_var_min"]
    unequal = reading["w_var_max"] / smallest > 10 if smallest > 0 else True
    return bool(unequal or reading.get("g_spread", 1.0) < 1e-3)


def deep_diagnosis(run: LabelledRun) -> list[Flag]:
    """Return what DeepDiagnosis reports: once per epoch, saturation every five, dead nodes at the last."""
    epochs = _epochs(run.row)
    if not epochs:
        return []
    rules: tuple[tuple[str, tuple[str, ...], str, Callable[[Reading], bool], Sequence[Reading]], ...] = (
        ("numerical error", ("non_finite", *_STILL), "forward_odd", lambda r: bool(r.get("forward_odd")), epochs),
        ("numerical error", ("non_finite", *_STILL), "w_bad", _is_bad, epochs),
        ("numerical error", _STILL, "change_zero", lambda r: bool(r.get("change_zero")), epochs),
        ("vanishing gradient", _VANISHING, "g_mean_at", lambda r: r.get("g_mean", 1.0) < 1e-7, epochs),
        ("dead node", ("dead",), "non_positive_at", lambda r: r.get("non_positive", 0.0) >= 0.7, epochs[-1:]),
        ("saturated", ("saturated",), "saturated_5_at", lambda r: r.get("saturated_5", 0.0) > 0.5, epochs[4::5]),
        ("unchanged weight", _STILL, "unchanged_at", lambda r: r.get("unchanged", 0) >= 4, epochs),
        ("poor weight", ("initialization", *_EXPLODING), "", _poor_weight, epochs),
        ("learning rate", _RATE, "ratio_max_at", _odd_rate, epochs),
    )
    flags = [
        Flag(rule=name, families=families, step=found["step"], layer=str(found.get(where, "")))
        for name, families, where, condition, seen in rules
        if (found := _first(seen, condition)) is not None
    ]
    return [*flags, *_constant(epochs, "loss", 5), *_constant(epochs, "acc_train", 20)]


def _poor_weight(reading: Reading) -> bool:
    return bool(reading.get("w_var_min", 1.0) < 1e-5 or reading.get("w_var_max", 1.0) > 10)


def _odd_rate(reading: Reading) -> bool:
    """Whether the update ratio leaves 1e-5 to 1e-1.

    The tool multiplies the gradient with the rate, which is SGD's update; what is compared here is the update itself,
    whatever the optimizer, as that flags fewer healthy runs.
    """
    return bool(reading.get("ratio_min", 1.0) < 1e-5 or reading.get("ratio_max", 0.0) > 1e-1)


def _constant(epochs: Sequence[Reading], name: str, window: int) -> Iterator[Flag]:
    values = [reading[name] for reading in epochs if name in reading]
    for end in range(window, len(values) + 1):
        if len(set(values[end - window : end])) == 1:
            yield Flag(rule=f"unchanged {name}", families=(*_RATE, *_STILL), step=epochs[end - 1]["step"])
            return


RIVALS: Mapping[str, Callable[[LabelledRun], list[Flag]]] = {
    "AUTOTRAINER": autotrainer,
    "AUTOTRAINER, no accuracy gate": autotrainer_ungated,
    "SageMaker, tensors": sagemaker_core,
    "SageMaker, tensors and loss": sagemaker,
    "DeepDiagnosis": deep_diagnosis,
}
"""Rule sets by name."""
