"""Normalizations, activations and skips put into models: what changes, what stays, and the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied
from gradguard.remedies.surgery import Normed, Residual, add_residual, insert_norm, replace_activations
from tests.models import classification_loss, digit_batch, mlp


class Handwritten(nn.Module):
    """Attributes and functions, and code that reads a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Use a layer's attributes."""
        assert self.first.weight.shape == (32, 64)
        assert self.second.in_features == 32
        h = F.relu(self.first(x))
        result: Tensor = self.head(torch.tanh(self.second(h)))
        return result


def image_net() -> nn.Module:
    """Return a small convolutional net."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def chain() -> nn.Module:
    """Return a chain of sigmoid layers."""
    return mlp(6, nn.Sigmoid, init="xavier")


Operation = Callable[..., Applied]


def _any(value: object) -> Any:
    """Return a value that a type checker would refuse."""
    return value


CASES: dict[str, tuple[Callable[[], nn.Module], Operation, dict[str, Any]]] = {
    "layer norm in a chain": (chain, insert_norm, {"kind": "layer"}),
    "batch norm in a chain": (chain, insert_norm, {"kind": "batch"}),
    "RMS norm in a chain": (chain, insert_norm, {"kind": "rms"}),
    "batch norm in a convolutional net": (image_net, insert_norm, {"kind": "batch"}),
    "group norm in a convolutional net": (image_net, insert_norm, {"kind": "group"}),
    "layer norm in hand-written code": (Handwritten, insert_norm, {"kind": "layer"}),
    "batch norm in hand-written code": (Handwritten, insert_norm, {"kind": "batch"}),
    "ReLU in a chain": (chain, replace_activations, {"to": "relu"}),
    "leaky ReLU in a convolutional net": (image_net, replace_activations, {"to": "leaky-relu"}),
    "GELU with the old weights": (chain, replace_activations, {"to": "gelu", "fresh_weights": False}),
    "skips in a chain": (chain, add_residual, {}),
    "skips in a convolutional net": (image_net, add_residual, {}),
}
every_case = pytest.mark.parametrize("name", CASES)


def trained(make: Callable[[], nn.Module], steps: int = 3) -> tuple[nn.Module, torch.optim.Adam]:
    """Return a model that has taken a few steps, with its optimizer."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(steps):
        take_step(model, optimizer, seed)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """Take one step on digits."""
    optimizer.zero_grad()
    loss = classification_loss(model, digit_batch(32, seed=seed))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def operate(name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Applied:
    """Apply one of the cases."""
    _, operation, options = CASES[name]
    return operation(model, batch=digit_batch(32), compute_loss=classification_loss, optimizer=optimizer, **options)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Return everything of a model and its optimizer, to compare bit by bit."""
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    kept = {
        id(p): {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for p, entry in optimizer.state.items()
    }
    return {key: value.clone() for key, value in model.state_dict().items()}, held, kept, str(model)


def assert_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    """Check that two states are the same bit by bit."""
    assert now[1] == before[1]
    assert now[3] == before[3]
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][key], before[0][key]) for key in before[0])
    assert now[2].keys() == before[2].keys()
    for key, entry in before[2].items():
        assert all(
            torch.equal(now[2][key][name], value) if isinstance(value, Tensor) else now[2][key][name] == value
            for name, value in entry.items()
        )


@every_case
def test_it_says_what_it_did_and_training_goes_on(name: str) -> None:
    """Every parameter that is trained is held by the optimizer, and the next steps change it."""
    model, optimizer = trained(CASES[name][0])
    applied = operate(name, model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    assert applied.changes
    assert applied.model is model
    assert {id(p) for p in model.parameters()} <= held
    before = {key: value.clone() for key, value in model.named_parameters()}
    take_step(model, optimizer, 7)
    take_step(model, optimizer, 8)
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters())


@every_case
def test_undo_restores_every_bit(name: str) -> None:
    """Weights, buffers, modules, the optimizer's groups and state."""
    model, optimizer = trained(CASES[name][0])
    before = state(model, optimizer)
    operate(name, model, optimizer).undo()

    assert_same(state(model, optimizer), before)


@every_case
def test_a_failure_in_the_middle_restores_every_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thing that each operation does fails."""
    model, optimizer = trained(CASES[name][0])
    before = state(model, optimizer)
    module = {insert_norm: "_norms", replace_activations: "_activations", add_residual: "_skips"}[CASES[name][1]]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(f"gradguard.remedies.surgery.{module}.finish", fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        operate(name, model, optimizer)

    assert_same(state(model, optimizer), before)


@every_case
def test_an_old_checkpoint_loads_through_the_map_of_names(name: str) -> None:
    """Every old name leads to a new one."""
    model, _ = trained(CASES[name][0])
    old = {key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()}
    applied = operate(name, model)

    assert set(old) <= set(applied.names)
    result = model.load_state_dict({applied.names[key]: value for key, value in old.items()}, strict=False)
    assert not result.unexpected_keys
    assert all(torch.equal(model.state_dict()[applied.names[key]], value) for key, value in old.items())


@every_case
def test_the_model_copies_pickles_and_compiles(name: str) -> None:
    """As it did before."""
    model, _ = trained(CASES[name][0])
    operate(name, model)
    model.eval()
    x = digit_batch(8)[0]
    expected = model(x)

    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)  # noqa: S301  # our own bytes
    assert torch.allclose(torch.compile(model, backend="eager")(x), expected)


@every_case
def test_it_is_deterministic(name: str) -> None:
    """Under the same random numbers."""
    results = []
    for _ in range(2):
        model, _ = trained(CASES[name][0])
        torch.manual_seed(3)
        operate(name, model)
        results.append(model.state_dict())

    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_norms_stand_before_hidden_activations_and_nowhere_else() -> None:
    """Not behind the last layer, not twice."""
    model = nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    applied = insert_norm(model, "layer")

    assert [index for index, module in enumerate(model) if isinstance(module, Normed)] == [3]
    assert applied.skipped == {"0": "its output is normalized already", "5": "it is the last layer"}


def test_functions_are_seen_and_left_alone() -> None:
    """Code cannot be rewritten, and the record says so."""
    with pytest.raises(UnsupportedModelError, match="a function in the model's own code cannot be replaced"):
        replace_activations(Handwritten(), "gelu", batch=digit_batch(8)[0])


def test_gates_and_outputs_stay() -> None:
    """A sigmoid that gates, and one behind the last layer."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)
            self.tanh, self.sigmoid, self.last = nn.Tanh(), nn.Sigmoid(), nn.Softsign()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.head(self.tanh(self.value(x)) * self.sigmoid(self.gate(x))))

    model = nn.Sequential(Gated(), nn.Sigmoid())
    with pytest.raises(UnsupportedModelError):
        replace_activations(model, "relu", batch=digit_batch(8)[0])
    assert isinstance(model[1], nn.Sigmoid)


def test_skips_need_layers_that_keep_their_width() -> None:
    """What cannot be wrapped is told, and the model is as it was."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.raises(UnsupportedModelError, match="fewer than two layers of the same width"):
        add_residual(model)
    assert not any(isinstance(module, Residual) for module in model.modules())
    with pytest.raises(UnsupportedModelError, match="a forward\\(\\) cannot be rewritten"):
        add_residual(Handwritten())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: insert_norm(m, kind=_any("spectral")), ValueError, "kind must be one of layer, batch, rms, group"),
        (lambda m: insert_norm(m, "batch", batch=torch.zeros(1, 64)), ValueError, "a batch of one example"),
        (lambda m: replace_activations(m, "sine"), ValueError, "to must be one of relu"),
        (lambda m: insert_norm(_any(torch.compile(m, backend="eager"))), UnsupportedModelError, "compiled"),
        (lambda m: insert_norm(m, modules=["0", "no-such"]), ValueError, "has no such module"),
        (lambda m: insert_norm(m, modules=["10"]), ValueError, "it is the last layer"),
    ],
)
def test_bad_input_gets_a_clear_error_and_changes_nothing(
    call: Callable[[Any], Any], error: type[Exception], text: str
) -> None:
    """What came, and what to do."""
    model, optimizer = trained(chain)
    before = state(model, optimizer)
    with pytest.raises(error) as caught:
        call(model)

    assert text in str(caught.value)
    assert_same(state(model, optimizer), before)


@pytest.mark.parametrize(
    ("cure", "cured"), [("batch-norm", True), ("relu", True), ("residual", True), ("layer-norm", False)]
)
def test_what_a_sigmoid_stack_needs(cure: str, cured: bool) -> None:
    """Twenty layers: LayerNorm sets the scale anew and leaves the slope of a quarter; the others are a way out."""
    torch.manual_seed(0)
    model = mlp(20, nn.Sigmoid, init="xavier")
    gradguard.apply(cure, model, batch=digit_batch(64), compute_loss=classification_loss)
    diagnosis = gradguard.check(model, digit_batch(64), classification_loss)

    assert ("GG101" not in {finding.code for finding in diagnosis.findings}) is cured


def test_the_cure_that_a_trial_recommends_lets_a_dead_net_train() -> None:
    """The demo's sigmoid stack: chance without, and a third of the loss with what was measured to be best."""
    torch.manual_seed(0)
    model = mlp(20, nn.Sigmoid, init="xavier")
    batches = [digit_batch(64, seed=seed) for seed in range(40)]
    result = gradguard.trial(
        model, batches, classification_loss, lambda m: torch.optim.Adam(m.parameters(), lr=1e-3), run_steps=2000
    )
    assert result.best is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gradguard.apply(result.best, model, optimizer=optimizer, batch=batches[0], compute_loss=classification_loss)

    losses = [take_step(model, optimizer, seed) for seed in range(120)]
    assert sum(losses[-10:]) / 10 < 1.0
