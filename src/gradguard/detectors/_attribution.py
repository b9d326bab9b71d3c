"""What mean-field theory says of each layer's gain: how much the weights do to it, and how much the activation."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradguard.detectors._numbers import column, finite_median, parameter_column, signal
from gradguard.findings import Evidence
from gradguard.records import FloatArray, ParameterTable, StepRecord
from gradguard.theory import backward_gain, critical_gain

__all__ = ["LayerGain", "layer_gains", "single_sigmas", "theory_evidence", "weight_deviations", "wished_deviation"]

_SAME = 1e-3
"""Relative difference up to which two norms are of one tensor: a layer's output and the next one's input. Ours."""

_KNOWN = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d"})
"""Layers whose weight has the output units first. Transposed convolutions do not, nor do other people's classes."""

_CHAIN = 4
"""Pairs of layers over which a bound is worth a word. Ours."""

_USUAL = 4.0
"""Largest deviation that is advised; beyond it units sit at their ends. Ours: sigmoid's critical one is 10.15, where
most of them are saturated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGain:
    """What one layer, with the activation before it, does to the gradient on its way to the input.

    Attributes:
        row: Row of the layer with weights.
        activation: Class name of the activation before it, empty for none.
        measured: L2 norm of the gradient at the output of the layer before, over that at its own output, > 0.
        weights: Deviation of its weights times the root of fan-in, sigma_w: what they alone should do.
        derivative: Root mean square of the activation's derivative over this observation's pre-activations.
        largest: Most by which the pair can stretch any gradient: the weight's largest singular value times the
            activation's largest derivative; NaN where either is unknown.
    """

    row: int
    activation: str
    measured: float
    weights: float
    derivative: float
    largest: float = math.nan

    @property
    def predicted(self) -> float:
        """The gain of a wide random layer: sigma_w times the root mean square of the derivative."""
        return self.weights * self.derivative


def weight_deviations(record: StepRecord) -> dict[str, float]:
    """Return sigma_w by layer: the root mean square of its weights times the root of fan-in.

    That is the Frobenius norm over the root of the number of output units, whatever the kernel and the groups. Layers
    with several matrices are left out.

    Args:
        record: An observation with ``weight_norm``.

    Source: Poole et al. (2016), arXiv 1606.05340: weights of variance sigma_w^2 / fan_in.
    """
    table, norms = record.parameters, parameter_column(record, "weight_norm")
    found: dict[str, float] = {}
    several: set[str] = set()
    for row, layer, outputs in _matrices(table):
        if layer in found:
            several.add(layer)
        if outputs > 0 and norms[row] > 0.0:
            found[layer] = float(norms[row]) / math.sqrt(outputs)
    return {layer: value for layer, value in found.items() if layer not in several and math.isfinite(value)}


def single_sigmas(record: StepRecord) -> dict[str, float]:
    """Return the largest singular value by layer, where the layer has one matrix.

    Args:
        record: An observation; empty for one without ``sigma_max``.
    """
    sigma = record.matrix_values.get("sigma_max")
    if sigma is None:
        return {}
    layers = record.matrices.layers
    found = dict(zip(layers, map(float, sigma), strict=True))
    return {layer: value for layer, value in found.items() if layers.count(layer) == 1}


def layer_gains(record: StepRecord, rows: NDArray[np.intp]) -> tuple[LayerGain, ...]:
    """Return the gain of every layer whose input is the activation of the layer before it, measured and predicted.

    Where something else lies between (a normalization, a skip connection's sum, functional code), theory says nothing
    of the pair, and the layer is left out.

    Args:
        record: The observation.
        rows: Indices of the trunk rows, in execution order.

    Source:
        Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232: chi = sigma_w^2 E[phi'^2],
        here with the mean over the measured pre-activations.
    """
    table, delta, given = record.layers, signal(record), signal(record, at="input_delta")
    slopes, weights = column(record, "derivative_mean"), weight_deviations(record)
    sigmas = single_sigmas(record)
    found = []
    for before, row in itertools.pairwise(int(index) for index in rows):
        if table.roles[before] != "affine" or table.types[row] not in _KNOWN or table.names[row] not in weights:
            continue
        between = [i for i in range(before + 1, row) if table.roles[i] == "activation"]
        if len(between) > 1:
            continue
        passes = between[0] if between else row
        if not _same(given[passes], delta[before]) or (between and not _same(given[row], delta[passes])):
            continue
        slope = float(slopes[passes]) if between else 1.0
        if slope > 0.0 and 0.0 < delta[row] < math.inf:
            found.append(
                LayerGain(
                    row=row,
                    activation=table.types[passes] if between else "",
                    measured=float(delta[before] / delta[row]),
                    weights=weights[table.names[row]],
                    derivative=slope,
                    largest=sigmas.get(table.names[row], math.nan)
                    * (table.derivative_bounds[passes] if between else 1.0),
                )
            )
    return tuple(found)


def layers_before(record: StepRecord) -> dict[int, int]:
    """Return by row of an activation the row of the layer whose very output it takes; others are left out.

    Args:
        record: An observation with ``delta_norm`` and ``input_delta_norm``.
    """
    delta, given = signal(record), signal(record, at="input_delta")
    found: dict[int, int] = {}
    before: int | None = None
    for row, role in enumerate(record.layers.roles):
        if role == "affine":
            before = row
        elif role == "activation" and before is not None and _same(given[row], delta[before]):
            found[row] = before
    return found


def deviations_before(record: StepRecord) -> FloatArray:
    """Return by row of an activation the sigma_w of the layer whose very output it takes, NaN for all other rows."""
    weights, names = weight_deviations(record), record.layers.names
    found = np.full(len(names), math.nan)
    for row, before in layers_before(record).items():
        found[row] = weights.get(names[before], math.nan)
    return found


@functools.cache  # 30 ms of numerics, asked at every judgement
def wished_deviation(activation: str) -> float:
    """Return the sigma_w that keeps the gradient's size behind an activation; NaN where it is unknown or no use.

    The critical one; where there is none (GELU and its like) the one for pre-activations of variance 1.

    Args:
        activation: Class name, for instance ``"Tanh"``; empty for none, where it is 1.
    """
    if not activation:
        return 1.0
    try:
        wished = critical_gain(activation) or backward_gain(activation)
    except (TypeError, ValueError):
        return math.nan
    return wished if wished <= _USUAL else math.nan


def theory_evidence(record: StepRecord, rows: NDArray[np.intp]) -> dict[str, Evidence]:
    """Return what theory makes of a uniform change, medians over the layers that it covers; empty for fewer than two.

    Args:
        record: The observation.
        rows: Indices of the trunk rows, in execution order.
    """
    gains = layer_gains(record, rows)
    if len(gains) < 2:
        return {}
    kinds = [gain.activation for gain in gains]
    kind = max(dict.fromkeys(kinds), key=kinds.count)
    measured = finite_median(np.array([gain.measured for gain in gains]))
    weights = finite_median(np.array([gain.weights for gain in gains]))
    slope = finite_median(np.array([gain.derivative for gain in gains]))
    evidence = {
        "predicted_gain": Evidence(
            value=finite_median(np.array([gain.predicted for gain in gains])),
            unit="ratio",
            note=f"by theory, sigma_w {weights:.3g} times slope {slope:.3g}; measured {measured:.3g}",
        ),
        "sigma_w": Evidence(value=weights, note="deviation of the weights times the root of fan-in"),
    }
    wished = wished_deviation(kind)
    if wished > 0.0:
        evidence["critical_sigma_w"] = Evidence(value=wished, note=f"keeps the gradient's size with {kind or 'none'}")
    bounds = np.array([gain.largest for gain in gains])
    if len(gains) >= _CHAIN and not np.isnan(bounds).any() and (bounds > 0.0).all():
        decades = float(np.log10(bounds).sum())
        if decades < 0.0:
            evidence["certain_loss"] = Evidence(
                value=decades,
                unit="decades",
                note=f"over {len(gains)} layers, for every input: products of sigma_max and the largest derivative",
            )
    if measured > 0.0 and abs(math.log10(measured)) > _SAME:
        evidence["layers_per_decade"] = Evidence(value=1.0 / abs(math.log10(measured)), unit="layers")
    return evidence


def _matrices(table: ParameterTable) -> list[tuple[int, str, int]]:
    return [
        (row, layer, outputs)
        for row, (layer, dims, outputs) in enumerate(zip(table.layers, table.dims, table.outputs, strict=True))
        if dims >= 2
    ]


def _same(value: float, other: float) -> bool:
    return math.isclose(float(value), float(other), rel_tol=_SAME) and value > 0.0
