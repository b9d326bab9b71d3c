"""What the search for the origin of non-finite numbers adds to the ladder: the operation, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradguard.detectors._origin import BACKWARD, FORWARD, INPUT, PARAMETER, Origin
from gradguard.findings import Cause, Evidence
from gradguard.history import History
from gradguard.records import NonFiniteOrigin, StepRecord, TensorRange

__all__ = ["in_words", "later_origin", "operation_evidence", "origin_at", "refine"]

_CODES = {"input": INPUT, "parameter": PARAMETER, "forward": FORWARD, "backward": BACKWARD}

_PRODUCTS = ("linear", "mm", "matmul", "conv", "bilinear", "lstm", "gru", "rnn", "einsum", "attention")
"""Parts of the names of operations that sum products: they overflow where factors are large."""

_SHOWN = 3
"""Operands shown in a message. Ours: input, weight and bias."""


def origin_at(origins: Sequence[NonFiniteOrigin], step: int) -> NonFiniteOrigin | None:
    """Return what the search says about a step; one that names an operation goes before one that does not."""
    at = [origin for origin in origins if origin.step == step]
    return next((origin for origin in at if origin.op or origin.node), at[0] if at else None)


def later_origin(origins: Sequence[NonFiniteOrigin], step: int) -> NonFiniteOrigin | None:
    """Return the first origin after a step that is more than weights which were lost by then."""
    return next((origin for origin in origins if origin.step > step and origin.kind != "parameter"), None)


def refine(history: History, record: StepRecord | None, located: Origin | None, found: NonFiniteOrigin) -> Origin:
    """Return the origin as the search saw it at the very step.

    Args:
        history: Records of one optimizer.
        record: First observation that shows it, ``None`` for none.
        located: What that observation alone says, ``None`` without one.
        found: What the search says.
    """
    same_step = record is not None and record.step == found.step
    if located is not None and same_step and not (found.op or found.node) and located.code == PARAMETER:
        return located  # weights were lost before this batch came
    if located is not None and same_step and located.code == INPUT:
        return located  # the layer that takes it is known
    code = _CODES[found.kind]
    layer: str | None = found.name if code == PARAMETER else found.module if found.inside else None
    if code == INPUT and not found.op:
        layer = next(iter(history.layers.names), None)
    where, confidence = _where(found, layer), 0.95
    if code == INPUT:
        where = f"the input of {layer}" if layer else "the input of the model"
        confidence = 0.9
    layers = located.layers if located is not None and located.code == code else (layer,) if layer else ()
    return Origin(
        code=code, layer=layer or None, layers=layers, cause=_cause(found), where=where, confidence=confidence
    )


def in_words(found: NonFiniteOrigin) -> str:
    """Return what an operation took, as a sentence; empty where nothing is known of it."""
    if not found.op or found.kind in {"input", "parameter"}:
        return ""
    taken = [_range(operand) for operand in found.operands[:_SHOWN]]
    if not taken:
        return ""
    mask = f"; the infinity was put in by {found.also}" if found.also else ""
    return f" It took {', '.join(taken)}{mask}."


def operation_evidence(found: NonFiniteOrigin) -> Mapping[str, Evidence]:
    """Return the operation and the range of its first operand as evidence."""
    evidence = {}
    if found.op or found.node:
        note = ", ".join(part for part in (found.node if found.op else "", found.place) if part)
        evidence["operation"] = Evidence(value=found.op or found.node, note=note)
    if found.kind in {"forward", "backward"}:
        for operand in found.operands[:1]:
            evidence["operand_min"] = Evidence(value=operand.low, note=operand.dtype)
            evidence["operand_max"] = Evidence(value=operand.high, note=operand.dtype)
    return evidence


def _where(found: NonFiniteOrigin, layer: str | None) -> str:
    if found.kind == "parameter":
        return found.name
    name = found.op or found.node
    if found.kind == "backward":
        name = f"the backward pass of {name}" + (f" ({found.node})" if found.op else "")
    place = f" at {found.place}" if found.place else ""
    if layer:
        return f"{name} in {layer}{place}"
    return (
        f"{name} in the model's forward pass{place}"
        if found.inside
        else f"{name} outside of the model's forward pass{place}"
    )


def _cause(found: NonFiniteOrigin) -> Cause:
    if found.kind == "input":
        return Cause.DATA
    if found.kind == "parameter":
        return Cause.CORRUPT_WEIGHTS
    if found.value == "infinity" and any(operand.dtype == "float16" for operand in found.operands):
        return Cause.PRECISION
    if not found.inside:
        return Cause.LOSS
    if found.kind == "forward" and found.value == "infinity" and any(part in found.op.lower() for part in _PRODUCTS):
        return Cause.WEIGHT_SCALE
    return Cause.OPERATION


def _range(operand: TensorRange) -> str:
    name = f"{operand.name} " if operand.name else ""
    if operand.low == operand.high or math.isnan(operand.low):
        return f"{name}{operand.low:.3g}"
    return f"{name}from {operand.low:.3g} to {operand.high:.3g}"
