"""Records and History: bounded memory, what is kept, what is lost, columns by name, one history per optimizer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradguard.config import GuardConfig
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._updates import matrix_ratios
from gradguard.detectors.depth import observed_spans
from gradguard.history import History
from gradguard.records import LayerTable, OptimizerInfo, ParameterTable, RunInfo, StepRecord
from tests.histories import chain, flat
from tests.strategies import numbers

NAN = math.nan


def layers(*names: str) -> LayerTable:
    """Return a table of affine rows."""
    count = len(names)
    return LayerTable(
        names=names,
        types=("Linear",) * count,
        kinds=("Linear 2>2",) * count,
        roles=("affine",) * count,
        derivative_bounds=(NAN,) * count,
    )


def parameters(*names: str) -> ParameterTable:
    """Return a table of matrices."""
    count = len(names)
    return ParameterTable(names=names, aliases=((),) * count, layers=names, sizes=(4,) * count, dims=(2,) * count)


def record(step: int, *, optimizer: int = 0, **deltas: float) -> StepRecord:
    """Return a record with a delta per named layer."""
    return StepRecord(
        step=step,
        optimizer=optimizer,
        scalars={"grad_norm": float(step)},
        layers=layers(*deltas),
        layer_values={"delta_norm": np.array(list(deltas.values()))},
        parameters=parameters(*deltas),
        parameter_values={"grad_norm": np.array(list(deltas.values()))},
    )


@pytest.mark.parametrize("observations", [0, 1, 96, 97, 500, 5000])
def test_memory_is_bounded_whatever_the_run_s_length(observations: int) -> None:
    """At most ``capacity`` observations and ``loss_capacity`` losses are kept, and all are counted."""
    history = History(capacity=96, loss_capacity=128)
    for step in range(observations):
        history.append(record(step, a=1.0))
        history.note_loss(step, 1.0)

    assert len(history) == min(observations, len(history)) <= 96
    assert history.observations == observations
    assert len(history.losses[0]) <= 128
    assert history.layer("delta_norm").shape == (len(history), 1 if observations else 0)


def test_thinning_keeps_the_start_the_end_and_the_order() -> None:
    """The first 32 observations date an illness, the newest third shows where it stands; both stay complete."""
    history = History(capacity=96, loss_capacity=96)
    for step in range(2000):
        history.append(record(step, a=float(step)))
        history.note_loss(step, float(step))

    for steps in (history.steps, history.losses[0]):
        assert steps[:32].tolist() == list(range(32))
        assert steps[-32:].tolist() == list(range(1968, 2000))
        assert (np.diff(steps) > 0).all()
        assert np.diff(steps[32:-32]).max() <= 4 * np.diff(steps[33:-33]).min()
    np.testing.assert_array_equal(history.layer("delta_norm")[:, 0], history.steps)
    np.testing.assert_array_equal(history.scalar("grad_norm"), history.steps)


@pytest.mark.parametrize("name", ["capacity", "loss_capacity"])
def test_a_capacity_that_cannot_keep_both_ends_is_refused(name: str) -> None:
    """The message says what came, what is accepted and why."""
    with pytest.raises(ValueError, match=f"{name} must be at least 96, to keep the start and the end, got 95"):
        History(**{name: 95})  # type: ignore[arg-type]  # both are whole numbers


@given(st.lists(numbers, min_size=1, max_size=8), st.lists(st.floats(), max_size=8))
def test_non_finite_numbers_survive(deltas: list[float], losses: list[float]) -> None:
    """NaN and infinity are the subject: they come out as they went in."""
    history = History()
    for step, delta in enumerate(deltas):
        history.append(record(step, a=delta))
    for step, loss in enumerate(losses):
        history.note_loss(step, loss)

    np.testing.assert_array_equal(history.layer("delta_norm")[:, 0], np.array(deltas))
    np.testing.assert_array_equal(history.losses[1], np.array(losses))


def test_columns_are_read_only_and_follow_what_is_appended() -> None:
    """A reader cannot change what the next one sees; a new observation makes a new column."""
    history = History()
    history.append(record(0, a=1.0))
    column = history.layer("delta_norm")
    with pytest.raises(ValueError, match="read-only"):
        column[0, 0] = 2.0
    history.append(record(1, a=3.0))

    assert history.layer("delta_norm")[:, 0].tolist() == [1.0, 3.0]


def test_unknown_names_are_nan() -> None:
    """A statistic that was not measured, a scalar that is unknown."""
    history = History()
    history.append(record(0, a=1.0))

    assert np.isnan(history.layer("saturated_fraction")).all()
    assert np.isnan(history.parameter("lr")).all()
    assert np.isnan(history.scalar("loss")).all()


def test_tables_are_merged_in_the_order_of_the_newest_observation() -> None:
    """Layers come and go; a layer that is not there has NaN, and those the newest lacks stand at the end."""
    history = History()
    history.append(record(0, a=1.0, b=2.0))
    history.append(record(1, c=3.0, b=4.0))

    assert history.layers.names == ("c", "b", "a")
    assert history.parameters.names == ("c", "b", "a")
    for column in (history.layer("delta_norm"), history.parameter("grad_norm")):
        np.testing.assert_array_equal(column, [[NAN, 2.0, 1.0], [3.0, 4.0, NAN]])


def test_an_observation_without_layers_keeps_the_others_order() -> None:
    """Parameters read, taps not yet set: the row is all NaN, the table that of the others."""
    history = History()
    history.append(record(0, a=1.0, b=2.0))
    history.append(StepRecord(step=1))

    assert history.layers.names == ("a", "b")
    np.testing.assert_array_equal(history.layer("delta_norm"), [[1.0, 2.0], [NAN, NAN]])


def test_what_a_row_says_is_that_of_the_newest_table() -> None:
    """A layer that was replaced under its name: the newest kind counts."""
    old = record(0, a=1.0)
    new = record(1, a=1.0, b=1.0)
    wide = LayerTable(
        names=("a", "b"),
        types=("Linear", "Linear"),
        kinds=("Linear 8>8", "Linear 2>2"),
        roles=("affine", "affine"),
        derivative_bounds=(NAN, NAN),
    )
    history = History()
    history.append(old)
    history.append(StepRecord(step=1, layers=wide, layer_values=new.layer_values))

    assert history.layers.kinds == ("Linear 8>8", "Linear 2>2")


def test_split_gives_each_optimizer_its_own_history() -> None:
    """Steps, layers and losses by optimizer; thinned parts included."""
    info = RunInfo(optimizers=(OptimizerInfo(name="Adam", label="g"), OptimizerInfo(name="SGD", label="d")))
    history = History(info)
    for step in range(3):
        history.append(record(step, optimizer=1, a=1.0))
        history.note_loss(step, 10.0 + step, optimizer=1)
    history.append(record(0, optimizer=0, b=2.0))
    history.note_loss(0, 5.0, optimizer=0)
    first, second = history.split()

    assert (first.optimizer, second.optimizer) == (0, 1)
    assert (len(first), len(second)) == (1, 3)
    assert second.losses[1].tolist() == [10.0, 11.0, 12.0]
    assert first.layers.names == ("b",)
    assert first.info is info
    assert len(history) == 4


def test_a_run_with_one_optimizer_is_its_own_part() -> None:
    """Nothing is copied, and an empty history has one part as well."""
    history = chain(activation="Tanh")
    empty = History()

    assert history.split() == (history,)
    assert empty.split() == (empty,)


def test_a_column_of_the_wrong_length_is_refused() -> None:
    """The message names the column, the step and the shape that fits."""
    with pytest.raises(ValueError, match=r"layer column 'delta_norm' of step 7 has shape \(2,\), expected \(1,\)"):
        StepRecord(step=7, layers=layers("a"), layer_values={"delta_norm": np.zeros(2)})
    with pytest.raises(ValueError, match=r"parameter column 'lr' of step 7 has shape \(1,\), expected \(0,\)"):
        StepRecord(step=7, parameter_values={"lr": np.zeros(1)})


def test_tables_whose_columns_differ_in_length_are_refused() -> None:
    """A row without a role, a parameter without a size."""
    with pytest.raises(ValueError, match=r"columns of a LayerTable must have one length, got \[0, 1\]"):
        LayerTable(names=("a",))
    with pytest.raises(ValueError, match=r"columns of a ParameterTable must have one length, got \[0, 1\]"):
        ParameterTable(names=("a",))


def test_what_follows_from_a_history_is_computed_once_until_there_is_more() -> None:
    """Spans, ratios and trend are asked for by many rules: shared, read-only, and new when there is more."""
    history = chain(gain=0.5, steps=range(4), losses=flat(4))
    config = GuardConfig()

    spans, ratios = observed_spans(history, config), matrix_ratios(history)
    assert observed_spans(history, config) is spans
    assert matrix_ratios(history) is ratios
    with pytest.raises(ValueError, match="read-only"):
        spans[0] = 0.0

    history.append(replace(history.records[-1], step=4))
    assert observed_spans(history, config).shape == (5,)
    assert matrix_ratios(history).shape == (5, ratios.shape[1])

    assert loss_progress(history).trend is Trend.UNKNOWN
    for step in range(4, 60):
        history.note_loss(step, 2.303)
    assert loss_progress(history).trend is Trend.FLAT


def test_what_follows_with_one_threshold_is_not_taken_for_that_with_another() -> None:
    """The span over the ends of a short net depends on how many layers are a depth."""
    history = chain(gain=0.5, layers=20, steps=(0,))

    wide = observed_spans(history, GuardConfig(minimum_depth_layers=6))
    narrow = observed_spans(history, GuardConfig(minimum_depth_layers=30))

    assert wide[0] != narrow[0]
