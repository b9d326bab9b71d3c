"""The ladder: from one observation with non-finite numbers to the module, or the code, that made them first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradguard.detectors._episodes import BoolArray
from gradguard.detectors._numbers import column, is_bad, parameter_column
from gradguard.findings import Cause
from gradguard.history import History
from gradguard.records import StepRecord

__all__ = ["BACKWARD", "FORWARD", "INPUT", "PARAMETER", "Origin", "bad_gradients", "bad_parameters", "locate"]

INPUT, FORWARD, BACKWARD, PARAMETER = "GG201", "GG202", "GG203", "GG204"

_HALF_MAX = 65504.0
"""Largest finite number of half precision. Source: IEEE 754-2019, binary16."""

_NEAR_HALF_MAX = 0.1
"""Share of that number which a layer's output must have reached before for an infinity to be a half-precision overflow.
Ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where non-finite numbers come from.

    Attributes:
        code: GG201 to GG204.
        layer: Module, or parameter for GG204; ``None`` where no single one is known.
        layers: Modules or parameters that show them, in execution order.
        cause: As far as the numbers tell.
        where: The place in words, for a message.
        after: Name of the last healthy row before the place, for code between two modules; else empty.
        confidence: 0 to 1.
    """

    code: str
    layer: str | None
    layers: tuple[str, ...]
    cause: Cause
    where: str
    after: str = ""
    confidence: float = 0.9


def bad_parameters(record: StepRecord) -> BoolArray:
    """Return which parameters hold a NaN or an infinity, shape ``[parameters]``."""
    return is_bad(parameter_column(record, "weight_norm"), parameter_column(record, "weight_max_abs"))


def bad_gradients(record: StepRecord) -> BoolArray:
    """Return which parameters have a non-finite gradient, shape ``[parameters]``."""
    return is_bad(parameter_column(record, "grad_norm"), parameter_column(record, "grad_max_abs"))


def locate(history: History, index: int, *, loss_bad: bool | None) -> Origin:
    """Return the first place at which an observation's numbers are not finite.

    Args:
        history: Records of one optimizer; observations before ``index`` are healthy.
        index: The observation to explain.
        loss_bad: Whether its loss is not finite; ``None`` where it is not known. With a finite loss what is not finite
            in the forward pass was masked there, and the backward pass is where it did harm.

    Source: pitfalls.md, section 4: parameters, then input, then forward pass, then loss, then backward pass.
    """
    record = history.records[index]
    parameters = bad_parameters(record)
    if parameters.any():
        return _in_parameters(record, parameters)
    forward = _forward_bad(history, index)
    if forward.any() and loss_bad is not False:
        return _in_forward(history, index, forward)
    if loss_bad and not len(record.layers):
        return Origin(
            code=FORWARD,
            layer=None,
            layers=(),
            cause=Cause.UNKNOWN,
            where="the forward pass, whose layers were not observed",
            confidence=0.6,
        )
    if loss_bad:
        return Origin(
            code=FORWARD,
            layer=None,
            layers=(),
            cause=Cause.LOSS,
            where="the loss function, or code after the last layer",
        )
    return _in_backward(record)


def _in_parameters(record: StepRecord, bad: BoolArray) -> Origin:
    names = tuple(record.parameters.names[row] for row in np.flatnonzero(bad))
    return Origin(
        code=PARAMETER,
        layer=names[0],
        layers=names,
        cause=Cause.CORRUPT_WEIGHTS,
        where=f"{len(names)} of {len(bad)} parameters",
    )


def _forward_bad(history: History, index: int) -> BoolArray:
    """Return which rows have a non-finite output, without those that had one while all was well (masks)."""
    record = history.records[index]
    bad = is_bad(column(record, "forward_rms"), column(record, "forward_max_abs"))
    usual: set[str] = set()
    for earlier in history.records[:index]:
        shown = is_bad(column(earlier, "forward_rms"), column(earlier, "forward_max_abs"))
        usual.update(earlier.layers.names[row] for row in np.flatnonzero(shown))
    keep = np.array([name not in usual for name in record.layers.names], dtype=np.bool_)
    return bad & keep


def _input_bad(record: StepRecord, forward: BoolArray) -> BoolArray:
    """Return which rows have a non-finite input. NaN alone may mean "not measured", as for indices of an embedding."""
    largest = column(record, "input_max_abs")
    measured = np.array(
        [role in {"affine", "norm", "recurrent", "attention"} for role in record.layers.roles], dtype=np.bool_
    )
    bad: BoolArray = np.isinf(largest) | (np.isnan(largest) & forward & measured)
    return bad


def _in_forward(history: History, index: int, forward: BoolArray) -> Origin:
    record = history.records[index]
    names = record.layers.names
    given = _input_bad(record, forward)
    first_out = int(np.argmax(forward))
    shown = tuple(names[row] for row in np.flatnonzero(forward))
    if not given[first_out]:
        cause = _forward_cause(history, index, first_out)
        return Origin(
            code=FORWARD, layer=names[first_out], layers=shown, cause=cause, where=f"the output of {names[first_out]}"
        )
    if first_out == 0 or _is_raw(history, names[first_out]):
        return Origin(
            code=INPUT, layer=names[first_out], layers=shown, cause=Cause.DATA, where=f"the input of {names[first_out]}"
        )
    return Origin(
        code=FORWARD,
        layer=names[first_out],
        layers=shown,
        cause=Cause.OPERATION,
        where=f"code between {names[first_out - 1]} and {names[first_out]}",
        after=names[first_out - 1],
        confidence=0.8,
    )


def _is_raw(history: History, name: str) -> bool:
    """Whether a layer's input never got a gradient, which is so for data and for nothing computed from parameters."""
    position = history.layers.names.index(name)
    return bool(np.isnan(history.layer("input_delta_norm")[:, position]).all())


def _forward_cause(history: History, index: int, row: int) -> Cause:
    """Return why a module with finite input and weights has a non-finite output."""
    record = history.records[index]
    name, role = record.layers.names[row], record.layers.roles[row]
    position = history.layers.names.index(name)
    before = history.layer("forward_max_abs")[:index, position]
    before = before[np.isfinite(before)]
    overflow = math.isinf(column(record, "forward_max_abs")[row])
    if overflow and before.size and _NEAR_HALF_MAX * _HALF_MAX <= before[-1] <= _HALF_MAX:
        return Cause.PRECISION
    if overflow and role in {"affine", "recurrent", "attention", "embedding"}:
        return Cause.WEIGHT_SCALE
    return Cause.OPERATION


def _in_backward(record: StepRecord) -> Origin:
    """Follow the gradient from the loss to the input; the first row at which it is not finite names the place."""
    names = record.layers.names
    deltas = is_bad(column(record, "delta_norm"), column(record, "delta_max_abs"))
    if not deltas.any():
        return _in_gradients_alone(record)
    given = is_bad(column(record, "input_delta_norm"), column(record, "input_delta_max_abs"))
    arrived = [row for row in range(len(names)) if not np.isnan(column(record, "delta_norm")[row]) or deltas[row]]
    shown = tuple(names[row] for row in np.flatnonzero(deltas))
    first = int(np.flatnonzero(deltas)[-1])
    after = [row for row in arrived if row > first]
    if not after:
        return Origin(
            code=BACKWARD,
            layer=None,
            layers=shown,
            cause=Cause.LOSS,
            where="the derivative of the loss function",
            confidence=0.85,
        )
    producer = next((row for row in after if given[row] and not deltas[row]), None)
    if producer is not None:
        return Origin(
            code=BACKWARD,
            layer=names[producer],
            layers=shown,
            cause=Cause.OPERATION,
            where=f"the backward pass of {names[producer]}",
        )
    return Origin(
        code=BACKWARD,
        layer=names[first],
        layers=shown,
        cause=Cause.OPERATION,
        where=f"code between {names[first]} and {names[after[0]]}",
        after=names[after[0]],
        confidence=0.8,
    )


def _in_gradients_alone(record: StepRecord) -> Origin:
    bad = np.flatnonzero(bad_gradients(record))
    layers = tuple(dict.fromkeys(record.parameters.layers[row] for row in bad))
    single = layers[0] if len(layers) == 1 else None
    where = f"the gradient of {len(bad)} of {len(record.parameters)} parameters"
    return Origin(code=BACKWARD, layer=single, layers=layers, cause=Cause.OPERATION, where=where, confidence=0.6)
