"""GG111 and GG112: what a loss needs decides what forgetting means; growth hurts whatever it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors import find_temporal
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.linking import link_findings
from gradguard.prescriptions import prescriptions_for
from gradguard.records import LayerTable, StepRecord
from tests.histories import DENSE, NAN, falling, flat, run_of

CONFIG = GuardConfig()
LONG = (*DENSE, 200)


def recurrent(
    span: float | Callable[[int], float] = -7.0,
    *,
    reach: float = 0.0,
    kind: str = "GRU",
    factor: float = 0.62,
    gate: float = 0.5,
    slope: float = NAN,
    steps: Sequence[int] = LONG,
    losses: Sequence[float] | None = None,
    second: float | None = None,
    **info: Any,
) -> History:
    """Return the history of a recurrent net; ``second`` adds another module with that span."""
    spans = [span, *([] if second is None else [second])]
    table = LayerTable(
        names=tuple(f"rnn{i}" for i in range(len(spans))),
        types=(kind,) * len(spans),
        kinds=(f"{kind} 8>32",) * len(spans),
        roles=("recurrent",) * len(spans),
        derivative_bounds=(NAN,) * len(spans),
    )
    records = []
    for step in steps:
        now = [value(step) if callable(value) else value for value in spans]
        filled = {
            "temporal_factor": factor,
            "temporal_horizon": 4.5,
            "temporal_steps": 40.0,
            "temporal_reach": reach,
            "gate_mean": gate,
            "temporal_derivative": slope,
            "input_max_abs": 3.0,
        }
        columns = {name: np.full(len(spans), value) for name, value in filled.items()}
        records.append(
            StepRecord(step=step, layers=table, layer_values={**columns, "temporal_span": np.array(now, dtype=float)})
        )
    return run_of(records, flat(max(steps) + 1) if losses is None else losses, **info)


def found(history: History, code: str = "GG111") -> Finding | None:
    """Return the finding of one rule."""
    return next((finding for finding in find_temporal(history, CONFIG) if finding.code == code), None)


def severity(history: History, code: str = "GG111") -> str:
    """Return the severity of one rule's finding, ``"none"`` without one."""
    finding = found(history, code)
    return "none" if finding is None else finding.severity.name


@pytest.mark.parametrize(
    ("span", "expected"), [(-7.0, "ERROR"), (-4.0, "WARNING"), (-2.9, "none"), (0.0, "none"), (1.5, "none")]
)
def test_vanishing_with_a_loss_that_reads_the_end_and_does_not_fall(span: float, expected: str) -> None:
    """Three decades are a warning, five an error."""
    assert severity(recurrent(span)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"losses": falling(201)}, "INFO"),
        ({"reach": 0.97}, "INFO"),
        ({"reach": 0.97, "losses": falling(201)}, "none"),
        ({"steps": (0, 1, 2, 5, 10, 20, 50), "losses": flat(51)}, "INFO"),
        ({"steps": (200,), "losses": flat(201)}, "INFO"),
        ({"preflight": True, "steps": (0,), "losses": [2.3]}, "INFO"),
        ({"losses": []}, "WARNING"),
        ({"losses": [], "span": -4.0}, "INFO"),
        ({"losses": flat(201, level=0.3)}, "INFO"),
    ],
    ids=[
        "the-loss-falls",
        "a-loss-at-each-step-stuck",
        "a-loss-at-each-step-falls",
        "too-early",
        "one-look",
        "check",
        "no-losses",
        "no-losses-mild",
        "learnt-before",
    ],
)
def test_forgetting_that_harms_nobody_is_no_illness(changes: dict[str, Any], expected: str) -> None:
    """A net may forget what it need not keep; before 100 steps nobody can tell."""
    assert severity(recurrent(**changes)) == expected


def test_what_comes_back_is_resolved() -> None:
    """A net that has learnt to remember is told to have recovered; hysteresis keeps a value at the limit still."""
    cleared = found(recurrent(lambda step: -4.0 if step < 50 else -1.0))
    edge = found(recurrent(lambda step: -3.1 if step % 2 == 0 else -2.9))

    assert cleared is not None
    assert (cleared.severity, cleared.resolved_step) == (Severity.INFO, 50)
    assert "recovered since step 50" in cleared.message
    assert edge is not None
    assert edge.resolved_step is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ERROR"),
        ({"span": 2.5}, "ERROR"),
        ({"span": 1.9}, "none"),
        ({"reach": 0.97}, "ERROR"),
        ({"losses": falling(201)}, "WARNING"),
        ({"losses": falling(201), "classes": 0}, "WARNING"),
        ({"span": 2.5, "losses": falling(201, end=1.4)}, "INFO"),
        ({"span": lambda step: 0.1 * step, "losses": falling(201, end=1.4)}, "INFO"),
        ({"preflight": True, "steps": (0,), "losses": [2.3]}, "WARNING"),
        ({"steps": (0,), "losses": [2.3]}, "WARNING"),
        ({"steps": (0, 1, 2, 5, 10, 20), "losses": flat(21)}, "WARNING"),
    ],
)
def test_exploding_through_time(changes: dict[str, Any], expected: str) -> None:
    """Two decades are a warning whatever the loss reads; growth that came while the loss fell is mentioned."""
    losses = changes.get("losses")
    if losses is not None and len(losses) > 30 and losses[-1] < 1.0:
        changes = {**changes, "classes": 0}  # a classifier that has learnt is excused
    assert severity(recurrent(**{"span": 7.0, "factor": 1.8, **changes}), "GG112") == expected


def test_a_classifier_that_has_learnt_is_excused() -> None:
    """Its gradient grows through time, and nobody minds."""
    assert severity(recurrent(3.5, factor=1.2, losses=falling(201)), "GG112") == "INFO"


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        ({"gate": 0.5, "factor": 0.62}, Cause.GATES),
        ({"gate": 0.97, "factor": 0.62}, Cause.WEIGHT_SCALE),
        ({"kind": "RNN", "gate": NAN, "slope": 0.9, "factor": 0.55}, Cause.WEIGHT_SCALE),
        ({"kind": "RNN", "gate": NAN, "slope": 0.5, "factor": 0.45}, Cause.ACTIVATION_DERIVATIVE),
    ],
    ids=["gates", "open-gates", "weights", "saturation"],
)
def test_the_larger_part_of_the_loss_per_step_is_the_cause(numbers: dict[str, Any], cause: Cause) -> None:
    """Gates that close, a derivative below 1, or the recurrent weights; the others are ruled out with their number."""
    finding = found(recurrent(**numbers))
    assert finding is not None

    assert finding.cause is cause
    assert cause not in {ruled.cause for ruled in finding.ruled_out}
    assert Cause.LEARNING_RATE in {ruled.cause for ruled in finding.ruled_out}


def test_the_worst_module_is_the_culprit_and_the_finding_says_how_far_it_sees() -> None:
    """The number of steps that are remembered stands in the message."""
    finding = found(recurrent(-5.5, second=-9.0))
    assert finding is not None

    assert finding.layer == "rnn1"
    assert set(finding.layers) == {"rnn0", "rnn1"}
    assert "9.0 decades over 40 steps" in finding.message
    assert "after 4.5 steps" in finding.message
    assert finding.evidence["time_span"].value == -9.0
    assert finding.evidence["mean_gate"].note.startswith("update gate")


def test_modules_that_are_not_recurrent_or_unknown_say_nothing() -> None:
    """NaN and a missing column are no zeros."""
    assert find_temporal(recurrent(NAN), CONFIG) == []
    assert find_temporal(run_of([StepRecord(step=0)]), CONFIG) == []


def test_an_explosion_in_time_explains_one_in_depth_at_the_same_module_only() -> None:
    """The depth rule sees the same growth at the recurrent layer; elsewhere it is an illness of its own."""

    def depth(layer: str) -> Finding:
        return Finding(
            code="GG102",
            name="exploding-gradient",
            family="exploding",
            severity=Severity.WARNING,
            message=".",
            step=0,
            last_step=5,
            layer=layer,
        )

    time = found(recurrent(7.0, factor=1.8), "GG112")
    assert time is not None

    def causes(layer: str) -> dict[str, str | None]:
        return {finding.code: finding.consequence_of for finding in link_findings([depth(layer), time])}

    assert causes("rnn0") == {"GG112": None, "GG102": "GG112"}
    assert causes("head") == {"GG112": None, "GG102": None}


@pytest.mark.parametrize(
    ("history", "code", "names"),
    [
        (
            lambda: recurrent(kind="LSTM"),
            "GG111",
            ["chrono-initialization", "forget-gate-bias", "orthogonal-recurrent"],
        ),
        (recurrent, "GG111", ["chrono-initialization", "forget-gate-bias", "orthogonal-recurrent"]),
        (lambda: recurrent(kind="RNN", gate=NAN, slope=0.9), "GG111", ["orthogonal-recurrent", "gated-cell", "lstm"]),
        (
            lambda: recurrent(7.0, kind="RNN", gate=NAN, slope=0.9, factor=1.8),
            "GG112",
            ["orthogonal-recurrent", "clip-norm", "gated-cell", "truncated-bptt"],
        ),
    ],
    ids=["lstm", "gru", "rnn", "exploding"],
)
def test_cures_suit_the_cell(history: Callable[[], History], code: str, names: list[str]) -> None:
    """A plain RNN has no gates to open, an LSTM and a GRU need no other cell; memories are as long as the sequence."""
    finding = found(history(), code)
    assert finding is not None
    prescriptions = prescriptions_for(finding)

    assert [prescription.remedy for prescription in prescriptions] == names
    for prescription in prescriptions:
        if prescription.remedy == "chrono-initialization":
            assert prescription.arguments == {"max_time": 40}
            assert "max_time=40" in prescription.code


class Recall(nn.Module):
    """Reads a sequence and answers at its end."""

    def __init__(self, kind: str, gain: float = 0.0) -> None:
        super().__init__()
        kinds: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
        self.rnn = kinds[kind](8, 24, batch_first=True)
        self.out = nn.Linear(24, 4)
        if gain:
            nn.init.orthogonal_(self.rnn.get_parameter("weight_hh_l0"), gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def batch(step: int, *, first: bool, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise with a symbol in its first step, or in all."""
    generator = torch.Generator().manual_seed(step)
    symbol = torch.randint(0, 4, (24,), generator=generator)
    x = torch.randn(24, length, 8, generator=generator) * 0.5
    x[:, : 1 if first else length, :4] += F.one_hot(symbol, 4)[:, None].float()
    return x, symbol


def trained(model: nn.Module, *, first: bool, steps: int = 130) -> gradguard.Diagnosis:
    """Return the diagnosis of a short run."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    with gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") as guard:
        for step in range(steps):
            x, symbol = batch(step, first=first)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), symbol)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        return guard.diagnose()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_default_net_that_must_remember_the_first_step_is_sick_and_one_that_need_not_is_not(kind: str) -> None:
    """The same net, start and span: only the task differs, and the loss tells."""
    torch.manual_seed(0)
    sick = trained(Recall(kind), first=True)
    torch.manual_seed(0)
    healthy = trained(Recall(kind), first=False)

    assert sick.primary is not None
    assert (sick.primary.code, sick.primary.layer) == ("GG111", "rnn")
    assert sick.primary.cause is Cause.GATES
    assert healthy.healthy is True


def test_check_finds_explosion_mentions_forgetting_and_passes_the_healthy() -> None:
    """Before training only growth is an illness."""
    torch.manual_seed(0)
    data = batch(0, first=True)

    def checked(model: nn.Module) -> gradguard.Diagnosis:
        return gradguard.check(model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1]))

    exploding, forgetting, fine = checked(Recall("rnn", 3.0)), checked(Recall("gru")), checked(Recall("rnn", 1.0))

    assert exploding.primary is not None
    assert exploding.primary.code == "GG112"
    assert forgetting.healthy is True
    assert [(f.code, f.severity) for f in forgetting.findings] == [("GG111", Severity.INFO)]
    assert fine.findings == ()


def test_the_explanations_name_the_limits_in_force() -> None:
    """What ``gradguard explain`` prints is what the configuration holds."""
    from gradguard.rules import RULES

    vanishing, exploding = RULES["GG111"].mathematics, RULES["GG112"].mathematics
    assert f"below -{CONFIG.temporal_warning:g} decades" in " ".join(vanishing.split())
    assert f"below -{CONFIG.temporal_error:g} an error" in " ".join(vanishing.split())
    assert f"above +{CONFIG.temporal_explosion:g} decades" in " ".join(exploding.split())
    assert math.isclose(CONFIG.temporal_warning, 3.0)
