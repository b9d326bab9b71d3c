"""Made-up histories: plain numbers in the shape in which monitors deliver them, healthy unless asked otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradguard.history import History
from gradguard.records import FloatArray, LayerTable, OptimizerInfo, ParameterTable, RunInfo, StepRecord

NAN = math.nan
DENSE = (0, 1, 2, 5, 10, 20, 50, 100)
"""The first observed steps at the default cadence."""

_BOUNDS = {"Sigmoid": 0.25, "Tanh": 1.0, "ReLU": 1.0, "GELU": 1.13}
_INACTIVE = {"ReLU": 0.3}
_SATURATED = {"Sigmoid": 0.0, "Tanh": 0.0}


def sequential(layers: int, *, activation: str = "Sigmoid", norm: str = "", width: int = 64) -> LayerTable:
    """Return the rows of ``Linear (norm) activation ... Linear``, named by position as in ``nn.Sequential``.

    Args:
        layers: Linear layers.
        activation: Class name of the activation; empty for functional code, which has no row.
        norm: Class name of a normalization between the two; empty for none.
        width: Width of every layer.
    """
    block = [("Linear", "affine", f"Linear {width}>{width}", NAN)]
    if norm:
        block.append((norm, "norm", f"{norm} {width}", NAN))
    if activation:
        block.append((activation, "activation", activation, _BOUNDS[activation]))
    rows = block * (layers - 1) + block[:1]
    types, roles, kinds, bounds = zip(*rows, strict=True)
    return LayerTable(
        names=tuple(str(i) for i in range(len(rows))), types=types, kinds=kinds, roles=roles, derivative_bounds=bounds
    )


def parameters_of(table: LayerTable) -> ParameterTable:
    """Return a weight and a bias for each row with weights."""
    owners = [name for name, role in zip(table.names, table.roles, strict=True) if role in {"affine", "norm"}]
    return ParameterTable(
        names=tuple(f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")),
        aliases=((),) * (2 * len(owners)),
        layers=tuple(owner for owner in owners for _ in range(2)),
        sizes=(4096, 64) * len(owners),
        dims=(2, 1) * len(owners),
    )


def backward(
    table: LayerTable, *, weight_gain: float, activation_gain: float, norm_gain: float = 1.0, top: float = 0.1
) -> tuple[FloatArray, FloatArray]:
    """Return delta at outputs and at inputs of every row, for a chain in which every kind of row has one gain."""
    gains = {"affine": weight_gain, "activation": activation_gain, "norm": norm_gain}
    delta, given = np.full(len(table), NAN), np.full(len(table), NAN)
    here = top
    for row in range(len(table) - 1, -1, -1):
        delta[row] = here
        here *= gains[table.roles[row]]
        given[row] = here if row else NAN
    return delta, given


def layer_columns(
    table: LayerTable, delta: FloatArray, given: FloatArray, **changes: FloatArray
) -> dict[str, FloatArray]:
    """Return every layer statistic, healthy but for delta and what ``changes`` replaces."""
    count = len(table)

    def by_type(values: Mapping[str, float]) -> FloatArray:
        return np.array([values.get(kind, NAN) for kind in table.types], dtype=np.float64)

    columns = {
        "delta_norm": delta,
        "delta_max_abs": delta * 0.1,
        "input_delta_norm": given,
        "input_delta_max_abs": given * 0.1,
        "forward_rms": np.ones(count),
        "forward_max_abs": np.full(count, 3.0),
        "input_max_abs": np.full(count, 3.0),
        "zero_fraction": np.zeros(count),
        "inactive_fraction": by_type(_INACTIVE),
        "dead_fraction": by_type({"ReLU": 0.0}),
        "input_inactive_fraction": np.full(count, NAN),
        "input_dead_fraction": np.full(count, NAN),
        "saturated_fraction": by_type(_SATURATED),
        "derivative_mean": by_type({"Sigmoid": 0.23, "Tanh": 0.9, "ReLU": 0.7, "GELU": 0.7}),
        "calls": np.ones(count),
        "gradient_calls": np.ones(count),
    }
    return {**columns, **changes}


def parameter_columns(table: ParameterTable, **changes: FloatArray) -> dict[str, FloatArray]:
    """Return every parameter statistic, healthy but for what ``changes`` replaces."""
    count = len(table)
    columns = {
        "grad_norm": np.full(count, 0.1),
        "grad_max_abs": np.full(count, 0.01),
        "weight_norm": np.full(count, 8.0),
        "weight_max_abs": np.full(count, 0.3),
        "update_ratio": np.full(count, 1e-3),
        "moved_fraction": np.ones(count),
        "trainable": np.ones(count),
        "in_optimizer": np.ones(count),
        "lr": np.full(count, 1e-3),
        "absent": np.zeros(count),
    }
    return {**columns, **changes}


def observation(
    step: int,
    table: LayerTable,
    delta: FloatArray,
    given: FloatArray,
    *,
    layers: Mapping[str, FloatArray] | None = None,
    parameters: Mapping[str, FloatArray] | None = None,
    scalars: Mapping[str, float] | None = None,
    optimizer: int = 0,
) -> StepRecord:
    """Return one observation; ``layers`` and ``parameters`` replace columns of a healthy one."""
    owned = parameters_of(table)
    return StepRecord(
        step=step,
        batch=step,
        optimizer=optimizer,
        scalars={"grad_norm": 0.5, "lr": 1e-3, "read_before_clipping": 1.0, **(scalars or {})},
        layers=table,
        layer_values=layer_columns(table, delta, given, **(layers or {})),
        parameters=owned,
        parameter_values=parameter_columns(owned, **(parameters or {})),
    )


def flat(steps: int, level: float = 2.303, noise: float = 0.02) -> list[float]:
    """Return losses that do not fall."""
    return [level + noise * math.sin(7.0 * step) for step in range(steps)]


def falling(steps: int, start: float = 2.303, end: float = 0.05, noise: float = 0.01) -> list[float]:
    """Return losses that fall exponentially."""
    rate = math.log(end / start) / max(1, steps - 1)
    return [start * math.exp(rate * step) * (1.0 + noise * math.sin(7.0 * step)) for step in range(steps)]


def run_of(
    records: Iterable[StepRecord],
    losses: Sequence[float] = (),
    *,
    adaptive: bool | None = False,
    preflight: bool = False,
    classes: int = 10,
) -> History:
    """Return a history of one optimizer; ``adaptive=None`` means that the optimizer is not known."""
    known = () if adaptive is None else (OptimizerInfo(name="Adam" if adaptive else "SGD", adaptive=adaptive),)
    history = History(
        RunInfo(
            model="Sequential",
            parameter_count=1000,
            optimizers=known,
            preflight=preflight,
            expects_updates=not preflight,
            classes=classes,
        )
    )
    for step, loss in enumerate(losses):
        history.note_loss(step, loss)
    for record in records:
        history.append(record)
    return history


def chain(
    *,
    gain: float | Callable[[int], float] = 1.0,
    layers: int = 20,
    steps: Sequence[int] = DENSE,
    activation: str = "Sigmoid",
    norm: str = "",
    weight_gain: float = 1.0,
    top: float = 0.1,
    losses: Sequence[float] | None = None,
    **info: Any,
) -> History:
    """Return the history of a plain chain whose gradient changes by one factor per layer.

    Args:
        gain: Factor per layer towards the input, or a function from the step to it.
        layers: Linear layers.
        steps: Observed optimizer steps.
        activation: See :func:`sequential`.
        norm: See :func:`sequential`.
        weight_gain: Part of the factor that the weights pass; activations pass the rest.
        top: Delta at the last layer.
        losses: Losses by step; flat at ln 10 by default.
        **info: Arguments of :func:`run_of`.
    """
    table = sequential(layers, activation=activation, norm=norm)
    records = []
    for step in steps:
        factor = gain(step) if callable(gain) else gain
        delta, given = backward(table, weight_gain=weight_gain, activation_gain=factor / weight_gain, top=top)
        if not activation:
            delta, given = _functional(table, weight_gain, factor / weight_gain, top)
        records.append(observation(step, table, delta, given))
    return run_of(records, flat(max(steps) + 1) if losses is None else losses, **info)


def decaying(gain: float | Callable[[int], float] = 0.24, **arguments: Any) -> History:
    """Return the history of a deep sigmoid net whose gradient vanishes; see :func:`chain`."""
    return chain(gain=gain, **arguments)


def changed(
    history: History, change: Callable[[StepRecord], StepRecord], losses: Sequence[float] | None = None
) -> History:
    """Return a new history with every record changed and, where they are given, other losses."""
    result = History(history.info)
    steps, values = history.losses
    kept = zip(steps, values, strict=True) if losses is None else enumerate(losses)
    for step, loss in kept:
        result.note_loss(int(step), float(loss))
    for record in history.records:
        result.append(change(record))
    return result


def _functional(
    table: LayerTable, weight_gain: float, activation_gain: float, top: float
) -> tuple[FloatArray, FloatArray]:
    delta, given = np.full(len(table), NAN), np.full(len(table), NAN)
    here = top
    for row in range(len(table) - 1, -1, -1):
        delta[row] = here
        given[row] = here * weight_gain if row else NAN
        here *= weight_gain * activation_gain
    return delta, given
