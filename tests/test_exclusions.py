"""What findings say was checked and ruled out: measurements only, each with its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import StepRecord
from tests.histories import NAN, chain, changed, decaying, flat

CONFIG = GuardConfig()


def too_fast(**columns: float) -> History:
    """Return a healthy chain under a learning rate that is too high, with some parameter columns changed."""

    def edit(record: StepRecord) -> StepRecord:
        values = {"update_ratio": 0.5, "rounding_unit": 2.0**-23, **columns}
        filled = {name: np.full(len(record.parameters), value) for name, value in values.items()}
        return replace(record, parameter_values={**record.parameter_values, **filled})

    return changed(chain(activation="ReLU", losses=flat(101)), edit)


def excluded(history: History, code: str) -> dict[Cause, str]:
    """Return what the finding of a rule rules out."""
    (finding,) = [item for item in run_detectors(history, CONFIG) if item.code == code]
    return {item.cause: item.reason for item in finding.ruled_out}


def test_a_rate_that_is_too_high_excludes_everything_else_with_numbers() -> None:
    """The data, the precision, dead units, the scale of the weights and the wiring were looked at."""
    ruled_out = excluded(too_fast(), "GG501")

    assert Cause.LEARNING_RATE not in ruled_out
    assert ruled_out[Cause.PRECISION] == "weights in float32, and no layer's gradient is zero"
    assert ruled_out[Cause.WEIGHT_SCALE].startswith("the gradient keeps its size over ")
    assert ruled_out[Cause.WIRING].startswith("every trainable parameter has a gradient")


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"rounding_unit": 2.0**-7}, Cause.PRECISION),
        ({"rounding_unit": NAN}, Cause.PRECISION),
        ({"underflow_fraction": 0.1}, Cause.PRECISION),
        ({"in_optimizer": 0.0}, Cause.WIRING),
    ],
    ids=["bfloat16", "unknown type", "some underflow", "no optimizer"],
)
def test_only_what_was_measured_excludes(columns: dict[str, float], cause: Cause) -> None:
    """A number that is unknown, or that speaks for a cause, rules it out no more."""
    history = too_fast(**columns)
    found = [item for item in run_detectors(history, CONFIG) if item.severity >= Severity.WARNING]

    assert found
    assert all(cause not in {item.cause for item in finding.ruled_out} for finding in found)


def test_a_cause_is_never_ruled_out_and_named() -> None:
    """Nor is one stated twice."""
    for build in (decaying, too_fast, lambda: chain(gain=2.0, activation="ReLU")):
        for finding in run_detectors(build(), CONFIG):
            causes = [item.cause for item in finding.ruled_out]
            assert finding.cause not in causes
            assert len(causes) == len(set(causes))


@pytest.mark.parametrize("build", [decaying, too_fast], ids=["vanishing", "too fast"])
def test_every_warning_rules_something_out(build: Callable[[], History]) -> None:
    """A reader should see that more than one explanation was weighed."""
    found: list[Finding] = [item for item in run_detectors(build(), CONFIG) if item.severity >= Severity.WARNING]

    assert found
    assert all(finding.ruled_out for finding in found)
