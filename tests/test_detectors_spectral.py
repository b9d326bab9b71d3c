"""GG401 and GG402: evidence beside a measured profile, a warning only where it agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors import find_norm_growth, find_recurrent_radius
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import LayerTable, MatrixTable, StepRecord
from tests.histories import DENSE, NAN, chain, falling, flat, run_of

CONFIG = GuardConfig()
LONG = (*DENSE, 200)


def recurrent(
    radius: float,
    *,
    sigma: float = 1.13,
    factor: float = 0.55,
    span: float = -7.0,
    slope: float = 0.95,
    gate: float = NAN,
    parts: Sequence[str] = ("",),
    bounds: Sequence[float] = (1.0,),
    losses: Sequence[float] | None = None,
) -> History:
    """Return the history of one recurrent layer whose gradient through time and whose matrices are given."""
    layers = LayerTable(
        names=("rnn",), types=("RNN",), kinds=("RNN 8>32",), roles=("recurrent",), derivative_bounds=(NAN,)
    )
    matrices = MatrixTable(
        names=tuple(f"rnn.weight_hh_l0[{part}]" if part else "rnn.weight_hh_l0" for part in parts),
        layers=("rnn",) * len(parts),
        recurrent=(True,) * len(parts),
        derivative_bounds=tuple(bounds),
    )
    columns = {
        "temporal_span": span,
        "temporal_factor": factor,
        "temporal_horizon": 4.5,
        "temporal_steps": 40.0,
        "temporal_reach": 0.0,
        "gate_mean": gate,
        "temporal_derivative": slope,
        "input_max_abs": 3.0,
    }
    records = [
        StepRecord(
            step=step,
            layers=layers,
            layer_values={name: np.array([value]) for name, value in columns.items()},
            matrices=matrices,
            matrix_values={
                "sigma_max": np.full(len(parts), sigma),
                "spectral_radius": np.full(len(parts), radius),
            },
        )
        for step in LONG
    ]
    return run_of(records, flat(LONG[-1] + 1) if losses is None else losses)


def radius_of(history: History) -> Finding | None:
    """Return the GG401 of a history, if there is one."""
    return next(iter(find_recurrent_radius(history, CONFIG)), None)


def test_weights_that_make_the_memory_vanish_are_a_warning_beside_the_profile() -> None:
    """Radius 0.6 and a measured factor of 0.55 with a loss that stays: the weights are the reason."""
    finding = radius_of(recurrent(0.6))
    assert finding is not None
    assert (finding.code, finding.severity, finding.cause) == ("GG401", Severity.WARNING, Cause.WEIGHT_SCALE)
    assert finding.layers == ("rnn.weight_hh_l0",)
    assert finding.evidence["spectral_radius"].value == 0.6
    assert "vanishing is not certain" in finding.evidence["sigma_max"].note


def test_a_norm_below_one_proves_vanishing() -> None:
    """Pascanu's condition: sigma_max below 1/gamma is sufficient, whatever the data; above it nothing is proved."""
    finding = radius_of(recurrent(0.5, sigma=0.8))
    assert finding is not None
    assert "sufficient for vanishing" in finding.evidence["sigma_max"].note


def test_it_stays_a_remark_while_the_loss_falls() -> None:
    """A default RNN that learns all the same is not warned about."""
    finding = radius_of(recurrent(0.6, losses=falling(LONG[-1] + 1)))
    assert finding is None or finding.severity is Severity.INFO


@pytest.mark.parametrize(
    ("history", "why"),
    [
        (recurrent(0.99), "the radius explains little of the measured factor: the activation does"),
        (recurrent(1.4), "the radius is on the other side of 1"),
        (recurrent(0.6, span=-0.5, factor=0.97), "the gradient keeps its size through time"),
        (recurrent(0.6, gate=0.5, slope=NAN), "gates decide what an LSTM forgets, not the radius of their weights"),
    ],
)
def test_it_is_silent_where_the_weights_are_not_the_reason(history: History, why: str) -> None:
    """No radius is worth a word without a profile that it explains."""
    assert radius_of(history) is None, why


def test_growth_through_gates_names_those_whose_weights_allow_it() -> None:
    """In a GRU whose gradient explodes, gates count whose sigma_max times 1/4, or 1 for the candidate, exceeds 1."""
    history = recurrent(
        2.0, sigma=3.0, span=3.5, factor=1.25, gate=0.9, slope=NAN,
        parts=("reset", "update", "candidate"), bounds=(0.25, 0.25, 1.0),
    )  # fmt: skip
    finding = radius_of(history)
    assert finding is not None
    assert finding.layers == ("rnn.weight_hh_l0[candidate]",)
    assert "not sufficient" in finding.evidence["sigma_max candidate"].note


def grown(values: Sequence[float], *, gain: float = 1.0, other: float = 1.0) -> History:
    """Return a chain one of whose matrices has these largest singular values at the observed steps."""
    base = chain(layers=8, activation="ReLU", weight_gain=gain, gain=gain, steps=LONG)
    table = MatrixTable(
        names=("0.weight", "2.weight"), layers=("0", "2"), recurrent=(False, False), derivative_bounds=(NAN, NAN)
    )
    history = History(base.info)
    for record, value in zip(base.records, values, strict=True):
        history.append(
            StepRecord(
                step=record.step,
                scalars=record.scalars,
                layers=record.layers,
                layer_values=record.layer_values,
                parameters=record.parameters,
                parameter_values=record.parameter_values,
                matrices=table,
                matrix_values={"sigma_max": np.array([value, other])},
            )
        )
    return history


GROWING = np.geomspace(1.0, 60.0, len(LONG)).tolist()


def test_a_norm_that_grows_twentyfold_and_on_is_a_remark() -> None:
    """It names the layer, the first step beyond the limit and both values."""
    (finding,) = find_norm_growth(grown(GROWING), CONFIG)
    assert (finding.code, finding.severity, finding.layer) == ("GG402", Severity.INFO, "0")
    assert finding.step == next(s for s, value in zip(LONG, GROWING, strict=True) if value > 20 * GROWING[1])
    assert finding.evidence["growth"].value == pytest.approx(60.0 / GROWING[1])


def test_it_is_a_warning_where_the_gradient_explodes_through_depth_as_well() -> None:
    """The measured span is beyond its limit, and the update ratio is a usual one."""
    (finding,) = find_norm_growth(grown(GROWING, gain=4.0), CONFIG)
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.geomspace(1.0, 10.0, len(LONG)).tolist(), "healthy runs grow tenfold"),
        ([1.0, 1.0, *[30.0] * (len(LONG) - 2)], "it stopped growing long ago"),
        ([1.0] * len(LONG), "nothing grew"),
        ([0.0, 0.0, *np.geomspace(0.01, 1.5, len(LONG) - 2).tolist()], "a zero-initialized branch came to life"),
        ([math.nan] * len(LONG), "nothing is known"),
    ],
)
def test_it_is_silent_on_growth_that_healthy_runs_show(values: list[float], why: str) -> None:
    """Measured on healthy runs: ten times is common."""
    assert not find_norm_growth(grown(values), CONFIG), why


def test_too_few_steps_say_nothing() -> None:
    """A trend needs a hundred steps."""
    short = History(grown(GROWING).info)
    for record in grown([value**2 for value in GROWING]).records[:5]:
        short.append(record)
    assert not find_norm_growth(short, CONFIG)


def test_a_real_rnn_that_cannot_remember_gets_both_the_profile_and_the_radius() -> None:
    """A default nn.RNN on recall over 40 steps: GG111, with GG401 as its reason, nothing for an orthogonal one."""
    torch.manual_seed(0)
    codes = {}
    for orthogonal in (False, True):
        rnn, head = nn.RNN(8, 32, batch_first=True), nn.Linear(32, 8)
        if orthogonal:
            nn.init.orthogonal_(dict(rnn.named_parameters())["weight_hh_l0"])
        model = nn.ModuleDict({"rnn": rnn, "head": head})
        symbols = torch.randint(0, 8, (64, 40))

        def loss_of(model: nn.Module, symbols: torch.Tensor) -> torch.Tensor:
            states, _ = model.get_submodule("rnn")(F.one_hot(symbols, 8).float())
            return F.cross_entropy(model.get_submodule("head")(states[:, -1]), symbols[:, 0])

        codes[orthogonal] = {finding.code for finding in gradguard.check(model, symbols, loss_of).findings}
    assert {"GG111", "GG401"} <= codes[False]
    assert "GG401" not in codes[True]
