"""Signals: what the hooks measure is what naive autograd computes, on whatever a module takes and returns."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradguard.monitors import SignalMonitor
from gradguard.monitors._derivatives import _BY_TYPE
from gradguard.monitors._reduce import Readback
from tests.driving import count_hooks, observe, reraise
from tests.models import (
    ConvNet,
    ResidualMLP,
    SequenceClassifier,
    TransformerClassifier,
    classification_loss,
    digit_batch,
    mlp,
)


def naive(model: nn.Sequential, x: Tensor, y: Tensor) -> list[tuple[float, float]]:
    """Return the gradient norm at, and the root mean square of, each output of a sequential net, by plain autograd."""
    outputs = []
    for layer in model:
        x = layer(x)
        x.retain_grad()
        outputs.append(x)
    F.cross_entropy(x, y).backward()
    return [(float(o.grad.norm()), float(o.detach().square().mean().sqrt())) for o in outputs if o.grad is not None]


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU])
def test_signals_agree_with_naive_autograd(activation: type[nn.Module]) -> None:
    """Delta and forward size of every layer are those that plain autograd gives."""
    model, (x, y) = mlp(6, activation), digit_batch(32)
    expected = naive(copy.deepcopy(model), x, y)

    seen = observe(model, lambda: F.cross_entropy(model(x), y).backward())

    assert seen.layers.names == tuple(str(index) for index in range(11))
    for row, (delta, size) in enumerate(expected):
        assert seen.signals["delta_norm"][row] == pytest.approx(delta, rel=1e-5)
        assert seen.signals["forward_rms"][row] == pytest.approx(size, rel=1e-5)
    assert seen.signals["input_delta_norm"][1:] == pytest.approx(seen.signals["delta_norm"][:-1], rel=1e-6)


def test_in_place_layers_give_the_gradients_of_their_out_of_place_twins() -> None:
    """In-place ReLUs neither crash nor blur which gradient belongs before and which after them."""
    model = nn.Sequential(
        nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 10)
    )
    twin = copy.deepcopy(model)
    for index in (1, 3):
        twin[index] = nn.ReLU()
    batch = digit_batch(32)

    seen = observe(model, lambda: classification_loss(model, batch).backward())
    expected = observe(twin, lambda: classification_loss(twin, batch).backward())

    for name in ("delta_norm", "input_delta_norm", "forward_rms", "zero_fraction", "inactive_fraction"):
        assert seen.signals[name] == pytest.approx(expected.signals[name], rel=1e-6, nan_ok=True), name


def test_functional_in_place_between_layers_is_seen_on_both_sides() -> None:
    """After ``y.relu_()`` the next layer's input is not the previous layer's output, although it is the same object."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu_())

    model = Net()
    x, y = digit_batch(32)
    hidden = model.a(x)
    hidden.retain_grad()
    active = hidden.relu()
    active.retain_grad()
    F.cross_entropy(model.b(active), y).backward()
    assert hidden.grad is not None
    assert active.grad is not None
    model.zero_grad()

    seen = observe(model, lambda: F.cross_entropy(model(x), y).backward())

    assert seen.layer("a")["delta_norm"] == pytest.approx(float(hidden.grad.norm()), rel=1e-5)
    assert seen.layer("b")["input_delta_norm"] == pytest.approx(float(active.grad.norm()), rel=1e-5)
    assert seen.layer("b")["input_inactive_fraction"] == pytest.approx(float((active.amax(0) == 0).float().mean()))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    rest: Any = None


class Nested(nn.Module):
    """Returns its tensor wrapped in some structure."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10) * 0.1)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight
        return {
            "tuple": lambda: (y, None),
            "list": lambda: [y],
            "dict": lambda: {"logits": y, "step": 3},
            "dataclass": lambda: Answer(y),
            "deep": lambda: ((y,), {"a": [None]}),
        }[self.shape]()


def unwrap(value: Any) -> Tensor:
    """Return the first tensor of a structure."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Answer):
        return value.logits
    return unwrap(next(iter(value.values())) if isinstance(value, dict) else value[0])


@pytest.mark.parametrize("shape", ["tuple", "list", "dict", "dataclass", "deep"])
def test_nested_outputs_are_read(shape: str) -> None:
    """A tensor is found in whatever structure a module returns."""
    layer = Nested(shape)
    model = nn.Sequential(layer)
    x, y = digit_batch(16)

    seen = observe(model, lambda: F.cross_entropy(unwrap(model(x)), y).backward())

    logits = (x @ layer.weight).detach().requires_grad_()
    F.cross_entropy(logits, y).backward()
    assert logits.grad is not None
    assert seen.layer("0")["delta_norm"] == pytest.approx(float(logits.grad.norm()), rel=1e-5)


def test_keyword_inputs_are_read() -> None:
    """A module called with keywords has an input gradient as well."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=self.a(input=x))

    model = Net()
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert seen.layer("b")["input_delta_norm"] == pytest.approx(seen.layer("a")["delta_norm"])


def test_repeated_calls_are_pooled() -> None:
    """A module called k times is one row: the Frobenius norm over its calls, and their number."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.cell(x).tanh()
            return self.out(x)

    model = Net()
    x, y = digit_batch(16)
    states = [x]
    parts = []
    for _ in range(3):
        z = model.cell(states[-1])
        z.retain_grad()
        parts.append(z)
        states.append(z.tanh())
    F.cross_entropy(model.out(states[-1]), y).backward()
    expected = math.sqrt(sum(float(z.grad.norm()) ** 2 for z in parts if z.grad is not None))
    model.zero_grad()

    seen = observe(model, lambda: F.cross_entropy(model(x), y).backward())

    assert seen.layer("cell")["calls"] == 3
    assert seen.layer("cell")["delta_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointed_blocks_are_measured_once(reentrant: bool, early_stop: bool) -> None:
    """Recomputation neither doubles a row nor hides it; the numbers are those without checkpointing."""

    class Net(nn.Module):
        def __init__(self, use: bool) -> None:
            super().__init__()
            self.inp, self.out, self.use = nn.Linear(64, 16), nn.Linear(16, 10), use
            self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            h = checkpoint(self.block, h, use_reentrant=reentrant) if self.use else self.block(h)
            return self.out(h)

    model = Net(use=True)
    twin = Net(use=False)
    twin.load_state_dict(model.state_dict())
    batch = digit_batch(16)

    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        seen = observe(model, lambda: classification_loss(model, batch).backward())
    expected = observe(twin, lambda: classification_loss(twin, batch).backward())

    assert seen.layers.names == expected.layers.names
    assert seen.signals["calls"].tolist() == expected.signals["calls"].tolist()
    assert seen.signals["delta_norm"] == pytest.approx(expected.signals["delta_norm"], rel=1e-6)


def test_validation_passes_leave_no_trace() -> None:
    """Forward passes without gradients or in evaluation mode do not enter the numbers."""
    model, batch = mlp(4), digit_batch(16)
    expected = observe(model, lambda: classification_loss(model, batch).backward())
    model.zero_grad()

    def run() -> None:
        with torch.no_grad():
            model(torch.full((8, 64), 1e6))
        classification_loss(model, batch).backward()
        model.eval()
        model(torch.full((8, 64), 1e6))
        model.train()

    seen = observe(model, run)

    for name in ("forward_rms", "delta_norm", "calls", "inactive_fraction"):
        assert seen.signals[name] == pytest.approx(expected.signals[name], nan_ok=True), name


def test_detached_layers_say_that_no_gradient_arrived() -> None:
    """A row whose output got no gradient is NaN, not zero; an exact zero is zero."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).detach()) * 0.0)

    model = Net()
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert math.isnan(seen.layer("a")["delta_norm"])
    assert seen.layer("a")["gradient_calls"] == 0
    assert seen.layer("b")["delta_norm"] == 0.0


def test_dead_and_saturated_units_are_counted() -> None:
    """The share of units that are silent for the whole batch, and of those whose derivative is gone, are exact."""
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 10))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1e3, 5.0, 5.0, 5.0]))
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([30.0, -30.0, 0.0, 20.0]))

    seen = observe(model, lambda: classification_loss(model, digit_batch(32)).backward())

    assert seen.layer("1")["inactive_fraction"] == 0.25
    assert seen.layer("3")["saturated_fraction"] == 0.75
    assert seen.layer("3")["derivative_mean"] == pytest.approx(0.125, rel=1e-3)


def test_units_of_convolutions_are_channels() -> None:
    """For images a unit is a channel, whatever the order of the axes after it."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1e3, -1e3, 5.0, 5.0]))
    x, y = digit_batch(8)

    seen = observe(model, lambda: F.cross_entropy(model(x.reshape(-1, 1, 8, 8)), y).backward())

    assert seen.layer("1")["inactive_fraction"] == 0.5


def test_units_are_dead_only_after_several_looks() -> None:
    """Dead means silent in at least three observations that span the patience; one active batch starts afresh."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    monitor = SignalMonitor(model, on_failure=reraise, dead_patience_steps=20)
    dead = []
    for step, sign in ((0, 1), (5, 1), (10, 1), (20, 1), (21, -1), (30, 1)):
        readback = Readback()
        monitor.reset(readback)
        monitor.arm()
        model(torch.tensor([[float(sign), 0.0], [2.0 * sign, 0.0]])).sum().backward()
        monitor.close_step(step, 0)
        readback.fetch()
        table, columns = monitor.columns()
        dead.append(float(columns["dead_fraction"][table.names.index("1")]))
    monitor.disarm()

    assert dead == [0.0, 0.0, 0.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("kind", list(_BY_TYPE))
def test_activation_derivatives_agree_with_autograd(kind: type[nn.Module]) -> None:
    """The closed forms are autograd's, and the stated bounds are reached and never passed."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    module = kind()
    y = module(x)
    (expected,) = torch.autograd.grad(y.sum(), x)

    slope = _BY_TYPE[kind].derivative(module, x.detach(), y.detach())

    kinks = (x.detach().abs() < 1e-9) | ((x.detach().abs() - 1).abs() < 1e-9) | ((x.detach().abs() - 3).abs() < 1e-9)
    assert torch.allclose(slope[~kinks].double(), expected[~kinks], atol=1e-6)
    assert float(slope.abs().max()) == pytest.approx(_BY_TYPE[kind].bound, rel=2e-3)


def test_no_hook_stays_after_an_exception() -> None:
    """A forward pass that raises leaves no hook once the monitor is disarmed, and disarming twice is harmless."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken on purpose")

    model = nn.Sequential(nn.Linear(2, 2), Broken())
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    assert count_hooks(model) > 0
    with pytest.raises(RuntimeError, match="broken on purpose"):
        model(torch.zeros(1, 2))
    monitor.disarm()
    monitor.disarm()

    assert count_hooks(model) == 0


def test_copies_and_pickles_of_an_armed_model_are_inert() -> None:
    """A deep copy, a pickle and a saved model neither fail nor count into the original's monitor."""
    model = mlp(3)
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301  # our own bytes
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for twin in copies:
        classification_loss(twin, digit_batch(4)).backward()
    table, _ = monitor.columns()
    monitor.disarm()

    assert len(table) == 0


def test_backward_after_disarming_is_not_observed() -> None:
    """A graph that outlives the observation finds inert hooks."""
    model = mlp(3)
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    loss = classification_loss(model, digit_batch(4))
    monitor.disarm()
    spent = monitor.spent_s
    loss.backward()

    assert monitor.spent_s == spent


def test_fast_path_of_the_encoder_layer_survives_in_evaluation() -> None:
    """Hooks on an encoder layer would switch its fast inference path off; they are set in training passes only."""
    model = TransformerClassifier(1)
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    assert count_hooks(model.encoder.layers[0]) == 0
    model.eval()
    with torch.no_grad():
        model(digit_batch(4)[0])
    assert count_hooks(model.encoder.layers[0]) == 0
    model.train()
    model(digit_batch(4)[0])
    assert count_hooks(model.encoder.layers[0]) > 0
    monitor.disarm()

    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    "make",
    [
        ConvNet,
        lambda: ResidualMLP(3, rezero=True),
        lambda: SequenceClassifier("gru"),
        lambda: TransformerClassifier(2, pre_norm=False),
    ],
    ids=["conv", "rezero", "gru", "transformer"],
)
def test_every_weighted_layer_of_usual_nets_is_seen(make: Any) -> None:
    """Each layer with weights that runs gives a row with a finite delta, except zero-initialised branches."""
    model = make()
    seen = observe(model, lambda: classification_loss(model, digit_batch(16)).backward())
    weighted = {
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not name.endswith("out_proj") and name
    }

    assert weighted <= set(seen.layers.names)
    assert all(math.isfinite(d) for d in seen.signals["delta_norm"])


def test_compiled_models_are_left_alone() -> None:
    """A compiled model gets no module hook, and the monitor says what it cannot see."""
    model = torch.compile(mlp(3), backend="eager")
    monitor = SignalMonitor(model, on_failure=reraise)  # type: ignore[arg-type]  # torch types the result as a callable
    monitor.arm()

    assert count_hooks(model) == 0  # type: ignore[arg-type]  # as above
    assert "compiled" in monitor.unobserved()[0].why
    monitor.disarm()
