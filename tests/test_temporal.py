"""The gradient through time as the monitor reports it: against theory, against autograd, in every way to call a net."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import gradguard
from gradguard.monitors import TemporalMonitor
from gradguard.monitors._profiles import CURVES, Curves, summarise
from gradguard.monitors._reduce import Readback
from gradguard.records import TEMPORAL_STATISTICS, TemporalProfile
from tests.driving import count_hooks, reraise

STEPS = 60
FUSED: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Seen(dict[str, Mapping[str, float]]):
    """Statistics by module name, and the profiles."""

    profiles: Mapping[str, TemporalProfile]


def watch(model: nn.Module, run: Callable[[], Tensor], *, monitor: TemporalMonitor | None = None) -> Seen:
    """Observe a forward and a backward pass; the loss is the sum of what ``run`` returns."""
    own = monitor if monitor is not None else TemporalMonitor(model, on_failure=reraise)
    own.arm()
    run().sum().backward()
    readback = Readback()
    own.read(readback)
    readback.fetch()
    names = tuple(name for name, _ in model.named_modules())
    columns, profiles = own.columns(names, readback)
    measured = np.isfinite(columns["temporal_span"]) if columns else np.zeros(len(names), dtype=bool)
    found = Seen(
        {
            name: {statistic: float(column[row]) for statistic, column in columns.items()}
            for row, name in enumerate(names)
            if measured[row]
        }
    )
    found.profiles = profiles
    own.disarm()
    return found


def net(kind: str, start: str = "default", *, hidden: int = 32) -> nn.Sequential:
    """Return a recurrent net in one of the forms of the table."""
    torch.manual_seed(0)
    module = FUSED[kind](8, hidden, batch_first=True)
    weight, first, second = (module.get_parameter(f"{n}_l0") for n in ("weight_hh", "bias_ih", "bias_hh"))
    keep = slice(hidden, 2 * hidden)
    with torch.no_grad():
        if start.startswith("orthogonal"):
            nn.init.orthogonal_(weight, 2.0 if start.endswith("2") else 1.0)
        elif start == "forget-1":
            first[keep], second[keep] = 1.0, 0.0
        elif start == "chrono":
            first.zero_(), second.zero_()
            first[keep] = torch.empty(hidden).uniform_(1, 63).log()
            first[:hidden] = -first[keep]
    return nn.Sequential(module)


def last_step(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss on the last output."""
    return model(x)[0][:, -1].square().sum()


def decades(curve: np.ndarray) -> float:
    """Return the decades from the nearest to the farthest step."""
    return math.log10(curve[-1] / curve[0])


@pytest.mark.parametrize(
    ("kind", "start", "at_input", "at_hidden", "at_cell", "factor"),
    [
        ("rnn", "default", -15.4, -15.6, None, 0.553),
        ("rnn", "orthogonal", -3.67, -3.72, None, 0.87),
        ("rnn", "orthogonal-2", 3.57, 3.44, None, 1.15),
        ("lstm", "default", -12.4, -12.9, -12.2, 0.62),
        ("lstm", "forget-1", -5.1, -5.8, -4.9, 0.83),
        ("lstm", "chrono", -1.2, -2.9, -0.66, 0.975),
        ("gru", "default", -12.6, -12.4, None, 0.62),
    ],
)
def test_known_nets_have_their_known_spans(
    kind: str, start: str, at_input: float, at_hidden: float, at_cell: float | None, factor: float
) -> None:
    """Sixty steps, hidden size 32, the loss at the last step; the table is of other weights and inputs."""
    model = net(kind, start)
    x = torch.randn(4, STEPS, 8)
    found = watch(model, lambda: last_step(model, x))

    profile = found.profiles["0"]
    assert decades(profile.input) == pytest.approx(at_input, abs=1.0)
    assert decades(profile.hidden) == pytest.approx(at_hidden, abs=1.0)
    if at_cell is not None:
        assert decades(profile.cell) == pytest.approx(at_cell, abs=1.0)
    assert found["0"]["temporal_factor"] == pytest.approx(factor, abs=0.05)
    assert found["0"]["temporal_steps"] == STEPS


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("reads", ["last", "all"])
def test_profile_agrees_with_autograd_in_float64(kind: str, reads: str) -> None:
    """The hidden profile of a float32 net, from its fused kernel, is that of the unrolled cell in float64, to 1e-4."""
    model = net(kind)
    x = torch.randn(4, 40, 8)
    weigh = torch.randn(4, 40, 32)
    if reads == "last":
        weigh[:, :-1] = 0
    found = watch(model, lambda: model(x)[0] * weigh)

    exact = copy.deepcopy(model).double()
    weights = [exact[0].get_parameter(f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    states, h, c = [], torch.zeros(4, 32).double(), torch.zeros(4, 32).double()
    for step in x.double().unbind(1):
        if kind == "lstm":
            h, c = torch.lstm_cell(step, (h, c), *weights)
        else:
            h = (torch.gru_cell if kind == "gru" else torch.rnn_tanh_cell)(step, h, *weights)
        h.retain_grad()
        states.append(h)
    loss = (torch.stack(states, 1) * weigh.double()).sum()
    loss.backward()
    true = [float(h.grad.norm()) for h in reversed(states)]

    np.testing.assert_allclose(found.profiles["0"].hidden, true, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        (lambda y, h: y[:, -1].sum(), 0.0, 0.0),
        (lambda y, h: h[-1].sum(), 0.0, 0.0),
        (lambda y, h: y[:, -3:].sum(), 0.05, 0.15),
        (lambda y, h: y.square().sum(), 0.9, 1.0),
        (lambda y, h: y.mean(1).square().sum(), 0.9, 1.0),
    ],
    ids=["last-output", "last-state", "last-three", "every-output", "mean"],
)
def test_where_the_loss_reads_tells_its_kind(loss: Callable[..., Tensor], low: float, high: float) -> None:
    """One reading at the end reaches back over nothing, a loss at each step over everything."""
    model = net("gru")
    x = torch.randn(4, 20, 8)
    found = watch(model, lambda: loss(*model(x)))

    assert low <= found["0"]["temporal_reach"] <= high


def test_a_loss_at_every_step_does_not_hide_what_is_forgotten() -> None:
    """The span is that of the last reading: as deep with a loss at each step as with one at the end."""
    model = net("lstm")
    x = torch.randn(4, STEPS, 8)
    every = watch(model, lambda: model(x)[0] ** 2)["0"]
    last = watch(model, lambda: last_step(model, x))["0"]

    assert every["temporal_span"] == pytest.approx(last["temporal_span"], abs=0.01)
    assert every["temporal_horizon"] == pytest.approx(last["temporal_horizon"], abs=0.01)
    assert decades(watch(model, lambda: model(x)[0] ** 2).profiles["0"].hidden) > -1.5


def test_padded_sequences_are_measured_from_their_own_ends() -> None:
    """Read at each sequence's last step, padded or packed: the same numbers."""
    model = net("gru")
    lengths = torch.tensor([40, 30, 20, 12])
    x = torch.randn(4, 40, 8)
    padded = watch(model, lambda: model(x)[0][torch.arange(4), lengths - 1])
    packed = watch(model, lambda: model[0](pack_padded_sequence(x, lengths, batch_first=True))[1])

    for name, value in padded["0"].items():
        if name != "gate_mean":  # of padding as well, which nobody can tell from data
            assert packed["0"][name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    np.testing.assert_allclose(packed.profiles["0"].memory, padded.profiles["0"].memory, rtol=1e-4)


class Looped(nn.Module):
    """A cell, or a fused net used like one, called once per step."""

    def __init__(self, fused: nn.Module, *, as_cell: bool) -> None:
        super().__init__()
        assert isinstance(fused, nn.RNNBase)
        kinds = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}
        if as_cell:
            self.cell: nn.Module = kinds[type(fused)](8, fused.hidden_size)
            own = {name.removesuffix("_l0"): value for name, value in fused.state_dict().items()}
            self.cell.load_state_dict(own)
        else:
            self.cell = copy.deepcopy(fused)
        self.as_cell = as_cell
        self.damp = False

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = [], None
        for step in x.unbind(1):
            if self.as_cell:
                state = self.cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            else:
                output, state = self.cell(step[:, None], state)
                outputs.append(output[:, 0])
            if self.damp:
                state = state * 0.99
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("as_cell", [True, False], ids=["cell", "single-step-net"])
@pytest.mark.parametrize("reads", ["last", "all"])
def test_a_cell_in_a_loop_gives_what_the_fused_net_gives(kind: str, as_cell: bool, reads: str) -> None:
    """The same weights, step by step: the same numbers, and the loss's kind is told although each call sees it all."""
    fused = net(kind)
    looped = Looped(fused[0], as_cell=as_cell)
    x = torch.randn(4, 40, 8)
    weigh = torch.randn(4, 40, 32)
    if reads == "last":
        weigh[:, :-1] = 0
    whole = watch(fused, lambda: fused(x)[0] * weigh)
    steps = watch(looped, lambda: looped(x) * weigh)

    for name, value in whole["0"].items():
        assert steps["cell"][name] == pytest.approx(value, rel=1e-3, nan_ok=True), name
    for curve in ("hidden", "input", "memory"):
        expected, found = getattr(whole.profiles["0"], curve), getattr(steps.profiles["cell"], curve)
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_rounding_of_a_half_precision_cell_is_not_taken_for_a_reading() -> None:
    """In a cell's loop what the loss puts in is a difference of gradients, which bfloat16 rounds at 0.4 percent."""
    looped = Looped(net("rnn", "orthogonal-2")[0], as_cell=True).bfloat16()
    x = torch.randn(4, 40, 8).bfloat16()
    last = watch(looped, lambda: looped(x)[:, -1])
    every = watch(looped, lambda: looped(x))

    assert last["cell"]["temporal_reach"] == 0.0
    assert (last.profiles["cell"].injected[1:] > 0.0).any()
    assert every["cell"]["temporal_reach"] > 0.3


def test_a_state_that_is_changed_between_calls_is_not_followed() -> None:
    """What lies between the calls is unknown: a note, no number."""
    looped = Looped(net("gru")[0], as_cell=True)
    looped.damp = True
    monitor = TemporalMonitor(looped, on_failure=reraise)
    monitor.arm()
    looped(torch.randn(4, 20, 8)).sum().backward()
    readback = Readback()
    monitor.read(readback)
    readback.fetch()

    assert monitor.columns(("cell",), readback) == ({}, {})
    assert [note.what for note in monitor.blind()] == ["the gradient through time in cell"]
    monitor.close()


def test_both_directions_are_judged_over_half_the_sequence() -> None:
    """A net that reads both ways sees each input from its nearer side; read at one end, one direction is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(8, 16, batch_first=True, bidirectional=True))
    x = torch.randn(4, 40, 8)
    both = watch(model, lambda: model(x)[1][0])["0"]
    one = watch(model, lambda: model(x)[0][:, -1])["0"]

    assert both["temporal_steps"] == 20
    assert one["temporal_steps"] == 40


def test_a_short_sequence_says_nothing_and_a_long_one_is_cut() -> None:
    """Below eight steps no number; above 256 the last 256."""
    model = net("rnn")
    short, enough, long = (torch.randn(2, steps, 8) for steps in (7, 8, 300))

    assert watch(model, lambda: last_step(model, short)) == {}
    assert watch(model, lambda: last_step(model, enough))["0"]["temporal_steps"] == 8
    found = watch(model, lambda: last_step(model, long))
    assert found["0"]["temporal_steps"] == 256
    assert found.profiles["0"].distance.size == 64
    assert found["0"]["temporal_span"] < -30  # float32 underflows at 38 decades


def test_gates_and_slopes_are_measured() -> None:
    """A forget bias of 1 is a forget gate near sigmoid(1) = 0.73; the derivative of tanh lies between 0 and 1."""
    x = torch.randn(4, 20, 8)

    def of(kind: str, start: str = "default") -> Mapping[str, float]:
        model = net(kind, start)
        return watch(model, lambda: last_step(model, x))["0"]

    assert of("lstm")["gate_mean"] == pytest.approx(0.5, abs=0.03)
    assert of("lstm", "forget-1")["gate_mean"] == pytest.approx(0.73, abs=0.03)
    assert of("gru")["gate_mean"] == pytest.approx(0.5, abs=0.03)
    assert math.isnan(of("rnn")["gate_mean"])
    assert 0.7 < of("rnn")["temporal_derivative"] < 1.0
    assert set(of("rnn")) == set(TEMPORAL_STATISTICS)


class Doubling(nn.GRU):
    """A module whose forward is not torch's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, state = super().forward(*args, **kwargs)
        return 2 * output, state


def test_a_forward_of_its_own_is_not_taken_for_torchs() -> None:
    """The replay's output is compared with the module's; where they differ nothing is said."""
    torch.manual_seed(0)
    odd, plain = (nn.Sequential(kind(8, 16, batch_first=True)) for kind in (Doubling, nn.GRU))
    x = torch.randn(4, 20, 8)

    assert watch(odd, lambda: last_step(odd, x)) == {}
    assert "0" in watch(plain, lambda: last_step(plain, x))


class MambaBlock(nn.Module):
    """Named like a layer that scans."""


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.Sequential(MambaBlock(), nn.Linear(4, 4)), 1),
        (nn.Sequential(parametrizations.orthogonal(nn.RNN(4, 4), "weight_hh_l0")), 1),
        (nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), 0),
    ],
    ids=["scan", "parametrized", "plain"],
)
def test_what_cannot_be_followed_is_named(model: nn.Module, count: int) -> None:
    """Not observed, never zeros."""
    notes = TemporalMonitor(model, on_failure=reraise).unobserved()

    assert len(notes) == count
    assert all(note.why.endswith("not observed") for note in notes)
    with gradguard.watch(model) as guard:
        told = [note.what for note in guard.diagnose().unobserved]
    assert [what for what in told if "through time" in what] == [note.what for note in notes]


def test_hooks_are_gone_after_an_observation_and_copies_are_inert() -> None:
    """Nothing stays on the model, and a copy made in between feeds nothing back."""
    model = net("lstm")
    monitor = TemporalMonitor(model, on_failure=reraise)
    monitor.arm()
    clone = copy.deepcopy(model)
    last_step(clone, torch.randn(4, 20, 8)).backward()
    readback = Readback()
    monitor.read(readback)
    readback.fetch()

    assert monitor.columns(("0",), readback) == ({}, {})
    assert count_hooks(model) == 1
    monitor.close()
    assert count_hooks(model) == 0


@pytest.mark.parametrize("mode", ["evaluation", "no-grad"])
def test_passes_that_train_nothing_are_not_looked_at(mode: str) -> None:
    """Validation inside an armed step is passed over."""
    model = net("gru")
    monitor = TemporalMonitor(model, on_failure=reraise)
    monitor.arm()
    x = torch.randn(4, 20, 8)
    if mode == "evaluation":
        model.eval()
        last_step(model, x)
        model.train()
    else:
        with torch.no_grad():
            last_step(model, x)
    found = watch(model, lambda: last_step(model, x[:, :12]), monitor=monitor)

    assert found["0"]["temporal_steps"] == 12


def test_a_failure_is_reported_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that breaks switches the monitor off, with a warning that names the place."""

    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("gradguard.monitors.temporal.replay", broken)
    model = net("gru")
    optimizer = torch.optim.Adam(model.parameters())
    guard = gradguard.watch(model, optimizer, every=1)
    x = torch.randn(4, 20, 8)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            loss = last_step(model, x)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()

    with pytest.warns(gradguard.GradGuardWarning, match="gradient through time"):
        train()

    assert guard.attached
    assert len(guard.history) == 3
    guard.detach()


class Packed(nn.Module):
    """Two bidirectional layers with dropout between them, on packed sequences, and a cell in a loop behind."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 12, 2, bidirectional=True, dropout=0.3, proj_size=5)
        self.cell = nn.LSTMCell(10, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        steps, _ = nn.utils.rnn.pad_packed_sequence(output)
        state = None
        for step in steps:
            state = self.cell(step, state)
        assert state is not None
        return self.out(state[0])


def test_training_of_a_complicated_recurrent_net_is_bit_identical() -> None:
    """Parameters, optimizer state and random numbers after 20 observed steps, with dropout, packing and cells."""
    outcomes = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Packed()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        options: dict[str, Any] = {"every": 1, "on_error": "raise", "on_finding": "silent"}
        guard = gradguard.watch(model, optimizer, **options) if watched else None
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(20, 4, 8), torch.tensor([20, 5, 17, 20])).square().sum()
            loss.backward()
            if guard is not None:
                guard.record(loss=loss)
            optimizer.step()
        if guard is not None:
            assert np.isfinite(guard.history.layer("temporal_span")).sum() == 40
            assert set(guard.history.profiles) == {"rnn", "cell"}
            assert all(not record.profiles for record in guard.history.records)
            guard.detach()
        outcomes.append((model.state_dict(), torch.get_rng_state(), optimizer.state_dict()["state"]))

    (plain, plain_rng, plain_state), (seen, seen_rng, seen_state) = outcomes
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(plain_rng, seen_rng)
    for key, state in plain_state.items():
        assert all(torch.equal(value, seen_state[key][name]) for name, value in state.items())


def curves(factor: float, steps: int = 50, *, tolerance: float = 0.0, **changes: np.ndarray) -> Curves:
    """Return exponential curves of a loss at the last step."""
    k = np.arange(steps)
    decay = factor**k
    fields = dict.fromkeys(CURVES, decay) | {"injected": (k == 0) * 1.0, "count": np.full(steps, 4.0)} | changes
    return Curves(tolerance=tolerance, **fields)


def test_numbers_of_an_exponential_are_its_own() -> None:
    """Factor 0.8: the slope is exact, a decade takes ln 10 / -ln 0.8 = 10.3 steps, the span that of block centres."""
    found = summarise([curves(0.8)], scale=8.0)
    assert found is not None

    assert found.factor == pytest.approx(0.8)
    assert found.horizon == pytest.approx(math.log(10) / -math.log(0.8))
    assert found.span == pytest.approx(44 * math.log10(0.8))
    assert found.reach == 0.0
    np.testing.assert_allclose(found.profile.hidden[0], 1 / 8)
    np.testing.assert_allclose(found.profile.memory[0], 1.0)


def test_what_is_small_against_the_gradient_there_is_no_reading() -> None:
    """With growth through time, rounding far back is larger than all that the loss puts in at the end."""
    k = np.arange(50)
    rounded = {"injected": (k == 0) + 1e-6 * 1.5**k}

    assert curves(1.5, **rounded).reach > 0.9
    assert curves(1.5, **rounded, tolerance=1e-3).reach == 0.0


def test_growth_has_no_horizon_and_infinities_give_no_numbers() -> None:
    """The horizon of what grows is infinite; an overflow is another rule's matter."""
    grown = summarise([curves(1.2)])
    assert grown is not None

    assert math.isinf(grown.horizon)
    assert grown.span > 3
    broken = np.full(50, 1.0)
    broken[20] = math.inf
    assert summarise([curves(0.9, memory=broken)]) is None
    assert summarise([curves(0.9, memory=np.zeros(50))]) is None
    assert summarise([curves(0.9, steps=7)]) is None
