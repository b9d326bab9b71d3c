"""GG201 to GG204 on made-up histories: where NaN and infinity come from, and what is no finding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from gradguard.config import GuardConfig
from gradguard.detectors.non_finite import find_non_finite
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray, LayerTable, NonFiniteOrigin, StepRecord, TensorRange
from tests.histories import DENSE, NAN, chain, changed, falling, flat

CONFIG = GuardConfig()
INF = math.inf


def healthy(steps: Sequence[int] = DENSE, **arguments: object) -> History:
    """Return a healthy ReLU chain of six layers: rows 0 to 10, activations at the odd ones."""
    return chain(layers=6, activation="ReLU", steps=steps, **{"losses": [], **arguments})  # type: ignore[arg-type]  # kwargs of chain


def from_step(
    history: History,
    step: int,
    *,
    layers: Mapping[str, Mapping[int, float]] | None = None,
    parameters: Mapping[str, Mapping[int, float]] | None = None,
    until: int = 10**9,
    **scalars: float,
) -> History:
    """Return the history with single entries of columns replaced at the observations from ``step`` on."""

    def put(
        columns: Mapping[str, FloatArray], changes: Mapping[str, Mapping[int, float]] | None
    ) -> dict[str, FloatArray]:
        result = dict(columns)
        for name, entries in (changes or {}).items():
            column = result[name].copy()
            for row, value in entries.items():
                column[row] = value
            result[name] = column
        return result

    def edit(record: StepRecord) -> StepRecord:
        if not step <= record.step < until:
            return record
        return replace(
            record,
            scalars={**record.scalars, **scalars},
            layer_values=put(record.layer_values, layers),
            parameter_values=put(record.parameter_values, parameters),
        )

    return changed(history, edit)


def rows(first: int, last: int, value: float) -> dict[int, float]:
    """Return one value for the rows from ``first`` to ``last``."""
    return dict.fromkeys(range(first, last + 1), value)


FORWARD_FROM = {
    row: {"forward_rms": rows(row, 10, INF), "forward_max_abs": rows(row, 10, NAN)} for row in (0, 2, 3, 10)
}
ALL_GRADIENTS = {"grad_norm": rows(0, 11, INF), "grad_max_abs": rows(0, 11, NAN)}


def only(history: History) -> Finding:
    """Return the one finding of a history."""
    (finding,) = find_non_finite(history, CONFIG)
    return finding


def test_a_nan_in_the_batch_enters_at_the_first_layer() -> None:
    """The first layer's input is not finite: the data, not the net."""
    layers = {**FORWARD_FROM[0], "input_max_abs": rows(0, 10, NAN)}
    finding = only(from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN))

    assert (finding.code, finding.name) == ("GG201", "non-finite-input")
    assert (finding.severity, finding.cause, finding.layer, finding.step) == (Severity.ERROR, Cause.DATA, "0", 5)
    assert finding.message == "NaN or infinity enter at the input of 0, at step 5."


def test_a_second_input_of_raw_data_is_told_from_code_between_layers() -> None:
    """Raw data never get a gradient: a layer whose input never had one takes data."""
    layers = {**FORWARD_FROM[2], "input_max_abs": rows(2, 10, NAN)}
    history = from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN)
    raw = from_step(history, 0, layers={"input_delta_norm": {2: NAN}})

    assert only(raw).code == "GG201"
    finding = only(history)
    assert (finding.code, finding.layer, finding.cause) == ("GG202", "2", Cause.OPERATION)
    assert finding.message == "NaN or infinity appear first in code between 1 and 2, at step 5."


def test_the_first_layer_whose_output_is_not_finite_is_the_producer() -> None:
    """Finite input, finite weights, an output that is not: everything after it only passes it on."""
    layers = {**FORWARD_FROM[3], "input_max_abs": rows(4, 10, NAN)}
    finding = only(from_step(healthy(), 10, layers=layers, parameters=ALL_GRADIENTS, loss=NAN))

    assert (finding.code, finding.layer, finding.cause) == ("GG202", "3", Cause.OPERATION)
    assert finding.layers == tuple(str(row) for row in range(3, 11))
    assert finding.message == "NaN or infinity appear first in the output of 3, at step 10."
    assert finding.evidence["last_finite_step"].value == 5
    assert [item.cause for item in finding.ruled_out] == [Cause.DATA, Cause.CORRUPT_WEIGHTS]


def test_an_overflow_of_half_precision_is_a_matter_of_precision() -> None:
    """An output that was near 65504 before it became infinite."""
    near = from_step(healthy(), 0, layers={"forward_max_abs": {2: 6e4}})
    layers = {"forward_rms": rows(2, 10, INF), "forward_max_abs": {**rows(2, 10, NAN), 2: INF}}

    assert only(from_step(near, 5, layers=layers, parameters=ALL_GRADIENTS, loss=INF)).cause is Cause.PRECISION
    assert only(from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=INF)).cause is Cause.WEIGHT_SCALE


def test_the_loss_function_is_the_origin_where_every_layer_is_finite() -> None:
    """The log of a probability of 0 after the last layer."""
    finding = only(from_step(healthy(), 5, parameters=ALL_GRADIENTS, loss=INF))

    assert (finding.code, finding.layer, finding.cause) == ("GG202", None, Cause.LOSS)
    assert "the loss function, or code after the last layer" in finding.message


def test_unobserved_layers_leave_the_place_open() -> None:
    """A compiled model has no layer rows: only the loss is known not to be finite."""

    def bare(record: StepRecord) -> StepRecord:
        return replace(record, layers=LayerTable(), layer_values={})

    finding = only(changed(from_step(healthy(), 5, parameters=ALL_GRADIENTS, loss=INF), bare))

    assert (finding.code, finding.layer, finding.cause) == ("GG202", None, Cause.UNKNOWN)
    assert "whose layers were not observed" in finding.message


def backward_from(row: int) -> dict[str, dict[int, float]]:
    """Return deltas that are not finite at the outputs of rows 0 to ``row``, and at the input of the next."""
    return {
        "delta_norm": rows(0, row, INF),
        "delta_max_abs": rows(0, row, NAN),
        "input_delta_norm": rows(1, row + 1, INF),
        "input_delta_max_abs": rows(1, row + 1, NAN),
    }


def test_the_module_whose_backward_makes_it_is_named() -> None:
    """A finite gradient at the output, none at the input: the derivative of that module is the place."""
    finding = only(from_step(healthy(losses=flat(101)), 5, layers=backward_from(4), parameters=ALL_GRADIENTS))

    assert (finding.code, finding.layer, finding.cause) == ("GG203", "5", Cause.OPERATION)
    assert finding.message == "NaN or infinity appear first in the backward pass of 5, at step 5."


def test_code_between_two_layers_is_named_by_both() -> None:
    """A root of 0 in the forward of a parent: finite at the next layer's input, not at the last one's output."""
    layers = {**backward_from(4), "input_delta_norm": rows(1, 4, INF), "input_delta_max_abs": rows(1, 4, NAN)}
    finding = only(from_step(healthy(losses=flat(101)), 5, layers=layers, parameters=ALL_GRADIENTS))

    assert (finding.code, finding.layer) == ("GG203", "4")
    assert finding.message == "NaN or infinity appear first in code between 4 and 5, at step 5."


def test_a_gradient_lost_at_the_last_layer_is_the_loss_functions() -> None:
    """The loss is finite and its derivative is not."""
    layers = {"delta_norm": rows(0, 10, INF), "delta_max_abs": rows(0, 10, NAN)}
    finding = only(from_step(healthy(losses=flat(101)), 5, layers=layers, parameters=ALL_GRADIENTS))

    assert (finding.code, finding.cause, finding.layer) == ("GG203", Cause.LOSS, None)


def test_gradients_of_parameters_alone_still_make_a_finding() -> None:
    """No layer's delta shows it: the parameters do."""
    finding = only(
        from_step(healthy(losses=flat(101)), 5, parameters={"grad_norm": {2: INF}, "grad_max_abs": {2: INF}})
    )

    assert (finding.code, finding.layer, finding.confidence) == ("GG203", "2", 0.6)


CORRUPT = {"weight_norm": {2: INF}, "weight_max_abs": {2: NAN}}


def test_an_infinity_that_the_forward_pass_masked_does_its_harm_in_the_backward_pass() -> None:
    """``where(mask, log(x), 0)``: the loss is finite, the gradient of the log is not."""
    layers = {**backward_from(2), "forward_rms": {3: INF}, "forward_max_abs": {3: INF}}
    finding = only(from_step(healthy(losses=flat(101)), 5, layers=layers, parameters=ALL_GRADIENTS))

    assert (finding.code, finding.layer) == ("GG203", "3")


def test_corrupt_weights_at_the_start() -> None:
    """A checkpoint with a NaN in it: nothing else need be asked."""
    finding = only(from_step(healthy(), 0, parameters=CORRUPT, layers=FORWARD_FROM[2], loss=NAN))

    assert (finding.code, finding.layer, finding.cause) == ("GG204", "2.weight", Cause.CORRUPT_WEIGHTS)
    assert finding.message == "NaN or infinity stand in 1 of 12 parameters, at step 0."


def test_weights_that_became_corrupt_unseen_have_no_known_cause() -> None:
    """Between two observations anything may have happened; the losses date it."""
    losses = [*flat(37), *[NAN] * 64]
    finding = only(changed(from_step(healthy(), 50, parameters=CORRUPT), lambda record: record, losses))

    assert (finding.code, finding.step, finding.cause) == ("GG204", 37, Cause.UNKNOWN)
    assert finding.evidence["loss_step"].value == 37
    assert finding.evidence["observed_step"].value == 50
    assert "The loss was the first to show it" in finding.message


def test_a_loss_that_blew_up_before_blames_the_learning_rate() -> None:
    """2.3, then 1e3, then 1e9, then NaN."""
    losses = [*flat(35), 1e3, 1e9, *[NAN] * 64]
    finding = only(changed(from_step(healthy(), 50, parameters=CORRUPT), lambda record: record, losses))

    assert finding.cause is Cause.LEARNING_RATE
    assert finding.evidence["loss_growth"].value > 1e8


def test_updates_that_were_too_large_blame_the_learning_rate() -> None:
    """The median update was three times the weights."""
    fast = from_step(healthy(), 0, parameters={"update_ratio": rows(0, 11, 3.0)})
    finding = only(from_step(fast, 5, parameters=ALL_GRADIENTS, layers=FORWARD_FROM[2], loss=INF))

    assert finding.cause is Cause.LEARNING_RATE
    assert finding.evidence["update_ratio"].value == pytest.approx(3.0)


def test_weights_lost_after_a_nan_in_the_data_are_reported_with_it() -> None:
    """Origin first; GG204 says that the weights are gone."""
    layers = {**FORWARD_FROM[0], "input_max_abs": rows(0, 10, NAN)}
    history = from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN)
    origin, lost = find_non_finite(from_step(history, 10, parameters=CORRUPT), CONFIG)

    assert (origin.code, origin.step) == ("GG201", 5)
    assert (lost.code, lost.step, lost.last_step) == ("GG204", 10, 100)


def test_a_passing_nan_is_info_with_the_step_at_which_it_was_gone() -> None:
    """A bad batch that the loop survived."""
    layers = {**FORWARD_FROM[0], "input_max_abs": rows(0, 10, NAN)}
    finding = only(from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN, until=10))

    assert finding.severity is Severity.INFO
    assert (finding.step, finding.last_step, finding.resolved_step) == (5, 5, 10)
    assert finding.message.endswith("From step 10 on everything is finite again.")


@pytest.mark.parametrize(("tail", "severity"), [([2.3] * 3, Severity.INFO), ([], Severity.ERROR)])
def test_losses_alone_make_a_finding(tail: list[float], severity: Severity) -> None:
    """Between observations only the loss is known: it names the step, not the layer."""
    finding = only(healthy(steps=(0, 1), losses=[*flat(15), NAN, *tail]))

    assert (finding.code, finding.step, finding.layer, finding.cause) == ("GG202", 15, None, Cause.UNKNOWN)
    assert finding.severity is severity
    assert "no observation was made then" in finding.message


MASK = {"forward_rms": {3: INF}, "forward_max_abs": {3: INF}}


@pytest.mark.parametrize(
    "build",
    [
        lambda: healthy(losses=falling(101)),
        lambda: from_step(healthy(losses=flat(101)), 0, layers=MASK),
        lambda: from_step(healthy(losses=flat(101)), 5, layers={"delta_norm": {2: INF}, "input_delta_norm": {3: INF}}),
        lambda: from_step(healthy(losses=flat(101)), 5, parameters={"grad_norm": {2: INF}, "weight_norm": {0: INF}}),
        lambda: from_step(healthy(losses=flat(101)), 5, parameters={"grad_norm": {2: NAN}, "grad_max_abs": {2: NAN}}),
        lambda: from_step(healthy(), 5, parameters=ALL_GRADIENTS, skipped=1.0),
        lambda: from_step(
            healthy(losses=[*flat(5), INF, *flat(95)]), 5, parameters=ALL_GRADIENTS, loss=INF, skipped=1.0, until=6
        ),
    ],
    ids=["healthy", "mask of -inf", "delta overflow", "norm overflow", "absent gradient", "skipped", "skipped, loss"],
)
def test_what_is_no_finding(build: Callable[[], History]) -> None:
    """Overflows of squares, masks that reach nothing, absent gradients, steps that a loss scaler skipped."""
    assert find_non_finite(build(), CONFIG) == []


def test_a_mask_that_was_always_there_is_not_the_producer() -> None:
    """Rows that were infinite while all was well are not blamed for a NaN elsewhere."""
    masked = from_step(healthy(), 0, layers=MASK)
    layers = {"forward_rms": {3: INF, **rows(6, 10, INF)}, "forward_max_abs": {3: INF, **rows(6, 10, NAN)}}

    assert only(from_step(masked, 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN)).layer == "6"


def test_the_scale_of_the_loss_changes_nothing() -> None:
    """Huge finite gradients are no infinities."""
    huge = chain(layers=6, activation="ReLU", top=1e30, losses=flat(101))
    assert find_non_finite(huge, CONFIG) == []
    assert np.isfinite(huge.layer("delta_norm")).all()


def with_origins(history: History, *origins: NonFiniteOrigin) -> History:
    """Return the history with what a search has found."""
    for origin in origins:
        history.note_origin(origin)
    return history


LOG = NonFiniteOrigin(
    step=5,
    kind="forward",
    value="infinity",
    op="torch.log",
    module="3.inner",
    place="net.py:31",
    operands=(TensorRange(low=0.0, high=1.5, dtype="float32"),),
)


def test_a_searched_step_names_the_operation() -> None:
    """The search saw the very step: operation, module, line and operand stand in the finding."""
    layers = {**FORWARD_FROM[3], "input_max_abs": rows(4, 10, NAN)}
    ill = from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN)
    finding = only(with_origins(ill, LOG))

    assert (finding.code, finding.layer, finding.cause, finding.confidence) == (
        "GG202",
        "3.inner",
        Cause.OPERATION,
        0.95,
    )
    assert finding.message == (
        "NaN or infinity appear first in torch.log in 3.inner at net.py:31, at step 5. It took from 0 to 1.5."
    )
    assert (finding.evidence["operation"].value, finding.evidence["operand_max"].value) == ("torch.log", 1.5)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (replace(LOG, operands=(TensorRange(low=0.0, high=6e4, dtype="float16"),)), Cause.PRECISION),
        (replace(LOG, op="F.linear"), Cause.WEIGHT_SCALE),
        (replace(LOG, inside=False), Cause.LOSS),
        (replace(LOG, op="F.linear", value="NaN"), Cause.OPERATION),
    ],
    ids=["half", "product", "outside", "nan"],
)
def test_the_operation_tells_the_cause(found: NonFiniteOrigin, cause: Cause) -> None:
    """An overflow of half precision, of a product, in the loss function, or an unsafe operation."""
    assert only(with_origins(from_step(healthy(), 5, parameters=ALL_GRADIENTS, loss=INF), found)).cause is cause


def test_a_batch_with_a_gap_explains_weights_that_were_lost_unseen() -> None:
    """The step of the first non-finite loss was not observed, but its batch was looked at."""
    losses = [*flat(37), *[NAN] * 64]
    lost = changed(from_step(healthy(), 50, parameters=CORRUPT), lambda record: record, losses)
    origin, *_ = find_non_finite(with_origins(lost, NonFiniteOrigin(step=37, kind="input", value="NaN")), CONFIG)

    assert (origin.code, origin.step, origin.layer, origin.cause) == ("GG201", 37, "0", Cause.DATA)
    assert origin.message == "NaN or infinity enter at the input of 0, at step 37."


def test_weights_that_were_lost_before_the_batch_came_stay_the_origin() -> None:
    """The batch is ill as well, but the weights were first."""
    ill = from_step(healthy(), 5, parameters=CORRUPT, loss=NAN)
    assert only(with_origins(ill, NonFiniteOrigin(step=5, kind="input", value="NaN"))).code == "GG204"


def test_a_later_search_is_told_and_changes_no_verdict() -> None:
    """Step 5 was not searched; at step 6 the search saw what may be the same. Lost weights are no news."""
    layers = {**FORWARD_FROM[3], "input_max_abs": rows(4, 10, NAN)}
    ill = from_step(healthy(), 5, layers=layers, parameters=ALL_GRADIENTS, loss=NAN)
    lost = NonFiniteOrigin(step=6, kind="parameter", value="NaN", name="0.weight")
    finding = only(with_origins(ill, lost, replace(LOG, step=7)))

    assert finding.layer == "3"
    assert finding.message.endswith("Step 7 was searched: torch.log in 3.inner at net.py:31. It took from 0 to 1.5.")


def test_what_only_the_search_saw_is_a_finding_that_clears() -> None:
    """A loop that skips a loss that is not finite: nothing else shows it."""
    finding = only(with_origins(healthy(losses=flat(101)), replace(LOG, step=33)))
    assert (finding.code, finding.severity, finding.step, finding.resolved_step) == ("GG202", Severity.INFO, 33, 34)


def test_a_search_in_a_step_that_a_scaler_skipped_is_nothing() -> None:
    """Skipped steps do not count, whoever saw them."""
    skipped = from_step(healthy(losses=flat(101)), 5, parameters=ALL_GRADIENTS, skipped=1.0, until=6)
    assert find_non_finite(with_origins(skipped, LOG), CONFIG) == []


def test_a_finite_batch_rules_the_data_out() -> None:
    """Layers were not observed at the step, but its batch was looked at."""

    def bare(record: StepRecord) -> StepRecord:
        return replace(record, layers=LayerTable(), layer_values={})

    history = changed(from_step(healthy(), 5, parameters=ALL_GRADIENTS, loss=INF), bare)
    assert Cause.DATA not in [item.cause for item in only(history).ruled_out]
    history.note_finite_batch(5)
    assert Cause.DATA in [item.cause for item in only(history).ruled_out]
