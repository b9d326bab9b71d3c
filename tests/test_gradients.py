"""Parameters: norms, updates and what is missing, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradguard.monitors._describe import clean_name
from gradguard.monitors.gradients import find_parameters
from tests.driving import observe
from tests.models import classification_loss, digit_batch, mlp


def test_norms_and_update_ratio_agree_with_plain_torch() -> None:
    """Gradient norm, weight norm and update-to-weight ratio are those that plain torch computes."""
    model, batch = mlp(4), digit_batch(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    seen = observe(
        model, lambda: classification_loss(model, batch).backward(), optimizer=optimizer, update=optimizer.step
    )

    for name, p in model.named_parameters():
        numbers = seen.parameter(name)
        assert p.grad is not None
        assert numbers["grad_norm"] == pytest.approx(float(p.grad.norm()), rel=1e-6)
        assert numbers["grad_max_abs"] >= float(p.grad.abs().max())
        assert numbers["weight_norm"] == pytest.approx(float(before[name].norm()), rel=1e-6)
        expected = float((p.detach() - before[name]).norm() / before[name].norm())
        assert numbers["update_ratio"] == pytest.approx(expected, rel=1e-4)
        assert numbers["lr"] == 0.5


def test_sampled_update_ratio_is_close_to_the_exact_one() -> None:
    """From 1,024 of 65,536 entries the ratio is right to a few per cent."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()

    seen = observe(
        model,
        lambda: model(torch.randn(64, 256)).square().mean().backward(),
        optimizer=optimizer,
        update=optimizer.step,
        sample_size=1024,
    )

    exact = float((model[0].weight.detach() - before).norm() / before.norm())
    assert seen.parameter("0.weight")["update_ratio"] == pytest.approx(exact, rel=0.1)


def test_reading_changes_no_bit() -> None:
    """Gradients with NaN, inf, huge and tiny entries are the same before and after."""
    model = mlp(2)
    for index, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (20 * index - 30)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad.view(-1)[0], first.grad.view(-1)[1] = math.nan, math.inf
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    observe(model, lambda: None)

    for old, p in zip(before, model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(old.view(torch.int32), p.grad.view(torch.int32))


def test_missing_frozen_and_foreign_parameters_are_told_apart() -> None:
    """Absent means due and not there; frozen is not due; a parameter outside the optimizer is marked."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(64, 10), nn.Linear(4, 4), nn.Linear(10, 10)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.used(x))

    model = Net()
    optimizer = torch.optim.SGD([*model.used.parameters(), model.unused.weight], lr=0.1)
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward(), optimizer=optimizer)

    assert seen.parameter("used.weight")["absent"] == 0
    assert seen.parameter("unused.weight")["absent"] == 1
    assert seen.parameter("unused.bias")["in_optimizer"] == 0
    assert seen.parameter("frozen.weight")["trainable"] == 0
    assert seen.parameter("frozen.weight")["absent"] == 0
    assert math.isnan(seen.parameter("unused.weight")["grad_norm"])


def test_lost_updates_show_in_the_moved_fraction() -> None:
    """A bfloat16 weight of 1 does not feel an update of 1e-3; one of 1e-2 it does."""
    for rate, moved in ((1e-3, 0.0), (1e-2, 1.0)):
        layer = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
        nn.init.ones_(layer.weight)
        model = nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        seen = observe(
            model,
            lambda model=model: model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward(),  # type: ignore[misc]
            optimizer=optimizer,
            update=optimizer.step,
        )

        assert seen.parameter("0.weight")["moved_fraction"] == moved


def test_sparse_and_complex_gradients_are_read() -> None:
    """Sparse embeddings and complex weights have norms like any other parameter."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, index: Tensor) -> Tensor:
            return (self.table(index) * self.phase).abs().square().mean()

    model = Net()
    seen = observe(model, lambda: model(torch.tensor([1, 1, 3])).backward())

    assert model.table.weight.grad is not None
    assert model.phase.grad is not None
    dense = model.table.weight.grad.to_dense()
    assert seen.parameter("table.weight")["grad_norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
    assert seen.parameter("phase")["grad_norm"] == pytest.approx(float(model.phase.grad.abs().norm()), rel=1e-5)


def test_tied_weights_stand_once_with_their_aliases() -> None:
    """A tied weight is one row; its other names are aliases."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

    (only,) = find_parameters(Net())

    assert only.name == "table.weight"
    assert only.aliases == ("head.weight",)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("_orig_mod.0.weight", "0.weight"),
        ("_forward_module.net.weight", "net.weight"),
        ("a._orig_mod.b.weight", "a.b.weight"),
        ("layer.parametrizations.weight.original", "layer.weight"),
        ("layer.parametrizations.weight.original0", "layer.weight.original0"),
        ("module.weight", "module.weight"),
        ("_orig_mod", ""),
    ],
)
def test_names_are_those_the_user_wrote(raw: str, clean: str) -> None:
    """Prefixes of compile, Fabric and parametrizations are dropped; a user's own ``module`` is not."""
    assert clean_name(raw) == clean


def test_parallel_wrapper_prefix_is_dropped() -> None:
    """Under DataParallel names are those of the wrapped model."""
    assert [p.name for p in find_parameters(nn.DataParallel(nn.Linear(2, 2)))] == ["weight", "bias"]


def test_lazy_parameters_wait_until_they_have_a_shape() -> None:
    """Uninitialised parameters are passed over, not tripped over."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))

    assert [p.name for p in find_parameters(model)] == ["1.weight", "1.bias"]


def test_unfrozen_and_replaced_parameters_are_found_again() -> None:
    """Parameters are looked up by identity at every reading."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    model[0].requires_grad_(False)
    x, y = digit_batch(8)
    first = observe(model, lambda: F.cross_entropy(model(x), y).backward())
    model[0].requires_grad_(True)
    model[1] = nn.Linear(8, 10)
    second = observe(model, lambda: F.cross_entropy(model(x), y).backward())

    assert math.isnan(first.parameter("0.weight")["grad_norm"])
    assert second.parameter("0.weight")["grad_norm"] > 0
    assert second.parameter("1.weight")["grad_norm"] > 0
