"""What every initialization remedy promises, whatever it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied, _applied
from gradguard.remedies.initialization import REMEDIES
from tests.models import digit_batch


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def mlp() -> nn.Module:
    """Return a plain MLP with a frozen layer that runs but is to be left alone."""
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(model, nn.Linear(16, 16).requires_grad_(False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))


def residual() -> nn.Module:
    """Return a residual MLP whose first layer is frozen."""
    return nn.Sequential(nn.Linear(64, 16).requires_grad_(False), Block(16), Block(16), nn.ReLU(), nn.Linear(16, 10))


class Recurrent(nn.Module):
    """An LSTM whose second layer is frozen, behind a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(12, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 10)
        for name, parameter in self.lstm.named_parameters():
            parameter.requires_grad_("l1" not in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.gru(x.view(-1, 8, 8))[0])[0][:, -1])


class Attention(nn.Module):
    """Two attentions with logits far too large, of which the second is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(requires_grad=False)
        self.head = nn.Linear(8, 10)
        for attention in (self.first, self.second):
            with torch.no_grad():
                attention.in_proj_weight[:16].mul_(100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 8, 8)
        x = x + self.first(x, x, x)[0]
        x = x + self.second(x, x, x)[0]
        return self.head(x.mean(1))


def convolutions() -> nn.Module:
    """Return a small CNN."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


class Attentive(nn.Module):
    """Attention of torch's, and some written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(-1, 8, 8)
        h, _ = self.attention(h, h, h)
        h = (self.query(h) @ h.mT).softmax(-1) @ self.value(h)
        logits: Tensor = self.head(h.flatten(1))
        return logits


CASES: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str]]] = {
    "he-initialization": (mlp, {"generator": 0}, {"0.0", "0.2", "4"}),
    "xavier-initialization": (mlp, {"generator": 0}, {"0.0", "0.2", "4"}),
    "lecun-initialization": (mlp, {"generator": 0}, {"0.0", "0.2", "4"}),
    "orthogonal-initialization": (mlp, {"generator": 0}, {"0.0", "0.2", "4"}),
    "delta-orthogonal-initialization": (convolutions, {"generator": 0}, {"1", "3", "6"}),
    "lsuv": (mlp, {"generator": 0}, {"0.0", "4"}),
    "fixup": (residual, {"generator": 0, "multiplier": True}, {"1.first", "1.second", "2.first", "2.second", "4"}),
    "skip-init": (residual, {}, set()),
    "rezero": (residual, {}, set()),
    "forget-gate-bias": (Recurrent, {"value": 2.0}, {"gru", "lstm"}),
    "chrono-initialization": (Recurrent, {"max_time": 8, "generator": 0}, {"gru", "lstm"}),
    "scale-query-key": (Attention, {}, {"first"}),
    "orthogonal-recurrent": (Recurrent, {"generator": 0}, {"gru", "lstm"}),
    "query-key-initialization": (Attentive, {"generator": 0}, {"attention", "query"}),
}
"""Model, arguments and the modules whose parameters change, by remedy."""

every_remedy = pytest.mark.parametrize("name", CASES)


def trained(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and an optimizer with state, after three steps."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(3):
        take_step(model, optimizer, step)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """Train on one batch of digits and return the loss."""
    x, y = digit_batch(32, seed)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return parameters, buffers and optimizer state as bytes."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    held = {
        f"optimizer {place} {key}": value
        for place, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    return {name: tensor.detach().numpy().tobytes() for name, tensor in {**tensors, **held}.items()}


def apply(name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Applied:
    """Apply a remedy with the arguments of its case."""
    _, arguments, _ = CASES[name]
    return REMEDIES[name](model, batch=digit_batch(32)[0], optimizer=optimizer, **arguments)


def test_every_remedy_has_a_case() -> None:
    """A remedy added to the table must stand this suite as well."""
    assert set(CASES) == set(REMEDIES)


@every_remedy
def test_changes_what_it_says_and_nothing_else(name: str) -> None:
    """The names in ``changed`` are those whose values differ; nothing else moves, frozen parameters least of all."""
    model, optimizer = trained(CASES[name][0])
    before = state(model, optimizer)
    applied = apply(name, model, optimizer)
    after = state(applied.model, optimizer)

    now = {applied.names.get(key, key): value for key, value in before.items() if not key.startswith("optimizer")}
    different = {key for key, value in after.items() if not key.startswith("optimizer") and now.get(key) != value}
    assert different == set(applied.changed)
    modules = {key.rpartition(".")[0].removesuffix(".module") for key in different if not key.endswith("alpha")}
    assert modules == CASES[name][2]
    assert different
    assert all(p.requires_grad for key, p in model.named_parameters() if key in different)


@every_remedy
def test_says_what_it_did(name: str) -> None:
    """Each change is one plain line that names its layer; the whole can be printed."""
    applied = apply(name, CASES[name][0]())

    assert applied.remedy == name
    assert applied.changes
    assert all("\n" not in line and "!" not in line and line.isascii() and ":" in line for line in applied.changes)
    assert str(applied).startswith(name)


@every_remedy
def test_undo_restores_every_bit(name: str) -> None:
    """After undo the parameters, buffers, structure and optimizer state are those of before, after training too."""
    model, optimizer = trained(CASES[name][0])
    before, text, groups = state(model, optimizer), str(model), copy.deepcopy(optimizer.state_dict()["param_groups"])

    assert apply(name, model, optimizer).undo() is model

    assert state(model, optimizer) == before
    assert str(model) == text
    assert optimizer.state_dict()["param_groups"] == groups


@every_remedy
def test_undo_after_training_restores_what_the_remedy_changed(name: str) -> None:
    """Steps taken in between do not stay in what the remedy changed, nor does their optimizer state."""
    model, optimizer = trained(CASES[name][0])
    before = state(model, optimizer)
    applied = apply(name, model, optimizer)
    back = {new: old for old, new in applied.names.items()}
    take_step(model, optimizer)
    applied.undo()

    after = state(model, optimizer)
    restored = [back[key] for key in applied.changed if key in back]
    assert after.keys() == before.keys()
    assert {key: after[key] for key in restored} == {key: before[key] for key in restored}


@every_remedy
def test_second_undo_does_nothing(name: str) -> None:
    """A second call does not throw away what was trained after the first."""
    model, optimizer = trained(CASES[name][0])
    applied = apply(name, model, optimizer)
    applied.undo()
    take_step(model, optimizer)
    before = state(model, optimizer)
    applied.undo()

    assert state(model, optimizer) == before


@every_remedy
def test_failure_in_the_middle_restores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails after it has changed the model, model and optimizer are as they were, and the error says so."""
    model, optimizer = trained(CASES[name][0])
    before, text = state(model, optimizer), str(model)
    changed = []

    def fail(snapshot: _applied.Snapshot, *_: Any) -> None:
        changed.append(state(model, optimizer) != before or str(model) != text)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(_applied.Snapshot, "reset_state", fail)
    with pytest.raises(RuntimeError, match="broken on purpose") as caught:
        apply(name, model, optimizer)

    assert changed == [True]
    assert state(model, optimizer) == before
    assert str(model) == text
    assert any("as they were" in note for note in caught.value.__notes__)


@every_remedy
def test_optimizer_state_starts_afresh_for_what_changed_only(name: str) -> None:
    """Moments of weights that are gone are dropped, those of other weights stay; the optimizer still steps."""
    model, optimizer = trained(CASES[name][0])
    kept = {id(p): id(values) for p, values in optimizer.state.items()}
    applied = apply(name, model, optimizer)

    for key, parameter in model.named_parameters():
        if key in applied.changed:
            assert parameter not in optimizer.state
        elif id(parameter) in kept:
            assert id(optimizer.state[parameter]) == kept[id(parameter)]
    before = state(model, optimizer)
    for _ in range(4):  # behind two layers of zeros the gradient arrives at the third step
        take_step(model, optimizer)
    after = state(model, optimizer)
    assert all(before[key] != after[key] for key in applied.changed), "what was changed or added must train"


@every_remedy
def test_a_seed_decides_everything_and_leaves_random_states_alone(name: str) -> None:
    """The same seed gives the same weights, whatever the global generator is at, and does not move it."""
    results = []
    model = CASES[name][0]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        twin = copy.deepcopy(model)
        apply(name, twin)
        results.append(state(twin, torch.optim.SGD(twin.parameters())))
        assert torch.equal(torch.get_rng_state(), before)

    assert results[0] == results[1]


@every_remedy
def test_model_and_record_copy_and_pickle(name: str) -> None:
    """The changed model can be copied and saved, and a copied record undoes the copy."""
    model = CASES[name][0]()
    before = state(model, torch.optim.SGD(model.parameters()))
    applied = apply(name, model)
    x = digit_batch(4)[0]
    model.eval()
    expected = model(x)

    for twin in (copy.deepcopy(applied), pickle.loads(pickle.dumps(applied))):  # noqa: S301  # our own bytes
        assert torch.equal(twin.model(x), expected)
        twin.undo()
        assert state(twin.model, torch.optim.SGD(twin.model.parameters())) == before
    assert torch.equal(model(x), expected)


@every_remedy
def test_modes_buffers_hooks_and_gradients_are_left_alone(name: str) -> None:
    """Train and eval modes, batch statistics, ``.grad`` and hooks are as before."""
    model, optimizer = trained(CASES[name][0])
    list(model.children())[-1].eval()
    modes = {id(module): module.training for module in model.modules()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    gradients = {id(p): p.grad for p in model.parameters()}
    apply(name, model, optimizer)

    assert all(modes.get(id(m), m.training) == m.training for m in model.modules())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(gradients.get(id(p)) is p.grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@every_remedy
def test_all_frozen_is_refused_and_nothing_moves(name: str) -> None:
    """Where there is nothing to change the remedy says so instead of returning an empty record."""
    model = CASES[name][0]().requires_grad_(False)
    model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    before = state(model, torch.optim.SGD(model.parameters()))
    if name in {"skip-init", "rezero"}:
        apply(name, model)  # a frozen branch may well be scaled
        return
    with pytest.raises(UnsupportedModelError, match="frozen"):
        apply(name, model)

    assert state(model, torch.optim.SGD(model.parameters())) == before


@every_remedy
@pytest.mark.parametrize("kind", ["lazy", "meta", "scripted", "compiled", "parallel", "inference", "foreign"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:Lazy modules:UserWarning")
def test_models_that_cannot_be_set_in_place_are_refused(name: str, kind: str) -> None:
    """Each kind of model that would be damaged, or not reached, is refused with what to do instead."""
    model: nn.Module = CASES[name][0]()
    optimizer = None
    if kind == "lazy":
        model.add_module("late", nn.LazyLinear(3))
    elif kind == "meta":
        model = model.to("meta")
    elif kind == "scripted":
        model.add_module("fast", torch.jit.script(nn.Linear(2, 2)))
    elif kind == "compiled":
        model.compile()
    elif kind == "parallel":
        model = nn.DataParallel(model)
    elif kind == "inference":
        with torch.inference_mode():
            model.register_buffer("table", torch.zeros(2))
    else:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(UnsupportedModelError):
        apply(name, model, optimizer)
