"""Hypothesis strategies: layer tables, observations, histories, with NaN, infinities and zeros where they may be."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from gradguard.history import History
from gradguard.records import (
    LAYER_STATISTICS,
    PARAMETER_STATISTICS,
    TEMPORAL_STATISTICS,
    FloatArray,
    LayerTable,
    OptimizerInfo,
    ParameterTable,
    RunInfo,
    StepRecord,
)

_LAYER = (*LAYER_STATISTICS, *TEMPORAL_STATISTICS)
ROLES = ("affine", "norm", "activation", "recurrent", "embedding", "attention", "other")
_SHARES = frozenset(
    {
        "zero_fraction",
        "inactive_fraction",
        "dead_fraction",
        "input_inactive_fraction",
        "input_dead_fraction",
        "saturated_fraction",
        "moved_fraction",
    }
)
_FLAGS = frozenset({"trainable", "in_optimizer", "absent"})

numbers = st.one_of(
    st.floats(min_value=1e-300, max_value=1e300),
    st.sampled_from([0.0, 1.0, 1e-45, 1e38, math.nan, math.inf]),
)
"""What a norm may be: anything from an underflow to an overflow, absent, or not finite."""

shares = st.one_of(st.floats(min_value=0.0, max_value=1.0), st.sampled_from([0.0, 1.0, math.nan]))
"""What a share may be."""

directions = st.one_of(
    st.just({}),
    st.builds(
        lambda cosine, steps: {"gradient_cosine": cosine, "gradient_cosine_steps": float(steps)},
        st.floats(min_value=-1.0, max_value=1.0),
        st.integers(min_value=0, max_value=100),
    ),
)
"""What is known of the gradient's direction: nothing, or the cosine with an earlier one."""

any_loss = st.one_of(st.floats(min_value=-1e6, max_value=1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
"""What a loss may be: also negative, NaN and infinite."""


@st.composite
def layer_tables(draw: st.DrawFn, *, most: int = 12) -> LayerTable:
    """Draw a table of up to ``most`` rows of any role."""
    roles = tuple(draw(st.lists(st.sampled_from(ROLES), max_size=most)))
    return LayerTable(
        names=tuple(f"block.{row}" for row in range(len(roles))),
        types=tuple({"activation": "Sigmoid", "norm": "BatchNorm1d"}.get(role, role.title()) for role in roles),
        kinds=roles,
        roles=roles,
        derivative_bounds=tuple(0.25 if role == "activation" else math.nan for role in roles),
    )


@st.composite
def parameter_tables(draw: st.DrawFn, layers: LayerTable, *, most: int = 8) -> ParameterTable:
    """Draw parameters that belong to rows of a table, or to modules that have no row."""
    owners = draw(st.lists(st.sampled_from([*layers.names, "", "block", "elsewhere"]), max_size=most))
    return ParameterTable(
        names=tuple(f"{owner}.weight{row}" for row, owner in enumerate(owners)),
        aliases=((),) * len(owners),
        layers=tuple(owners),
        sizes=tuple(draw(st.integers(min_value=1, max_value=10_000)) for _ in owners),
        dims=tuple(draw(st.integers(min_value=0, max_value=4)) for _ in owners),
    )


def _column(draw: st.DrawFn, name: str, size: int) -> FloatArray:
    kind = shares if name in _SHARES else st.sampled_from([0.0, 1.0]) if name in _FLAGS else numbers
    return np.array(draw(st.lists(kind, min_size=size, max_size=size)), dtype=np.float64)


@st.composite
def records(draw: st.DrawFn, step: int, layers: LayerTable, parameters: ParameterTable) -> StepRecord:
    """Draw one observation over given tables; some statistics may be missing altogether."""
    known = draw(st.sets(st.sampled_from(_LAYER)))
    owned = draw(st.sets(st.sampled_from(PARAMETER_STATISTICS)))
    return StepRecord(
        step=step,
        batch=step,
        optimizer=draw(st.integers(min_value=0, max_value=1)),
        scalars=draw(st.dictionaries(st.sampled_from(["loss", "grad_norm", "lr", "skipped"]), numbers))
        | draw(directions),
        layers=layers,
        layer_values={name: _column(draw, name, len(layers)) for name in _LAYER if name in known},
        parameters=parameters,
        parameter_values={name: _column(draw, name, len(parameters)) for name in PARAMETER_STATISTICS if name in owned},
    )


@st.composite
def histories(draw: st.DrawFn, *, most: int = 6) -> History:
    """Draw a history of up to ``most`` observations, of one or two optimizers, over one or two tables."""
    optimizers = draw(
        st.lists(st.builds(OptimizerInfo, name=st.just("Adam"), label=st.just("a"), adaptive=st.booleans()), max_size=2)
    )
    info = RunInfo(
        model="Model",
        parameter_count=10,
        optimizers=tuple(optimizers),
        preflight=draw(st.booleans()),
        classes=draw(st.sampled_from([0, 1, 2, 10])),
    )
    history = History(info)
    for step, loss in enumerate(draw(st.lists(any_loss, max_size=30))):
        history.note_loss(step, loss)
    tables = [draw(layer_tables()) for _ in range(draw(st.integers(min_value=1, max_value=2)))]
    owned = [draw(parameter_tables(table)) for table in tables]
    for step in range(draw(st.integers(min_value=0, max_value=most))):
        chosen = draw(st.integers(min_value=0, max_value=len(tables) - 1))
        history.append(draw(records(step * 50, tables[chosen], owned[chosen])))
    return history
