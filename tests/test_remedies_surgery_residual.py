"""Paths around blocks: where, of which shape, and what a block starts as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.surgery import (
    Residual,
    add_residual,
)
from tests import surgery
from tests.surgery import Net


@pytest.mark.parametrize("name", ["mlp", "conv", "blocks"])
def test_the_function_is_preserved_where_promised(name: str) -> None:
    """With ``preserve=True`` outputs and gradients are those of before, bit for bit; each new part has a gradient."""
    torch.manual_seed(0)
    x, y = surgery.batch()
    models = {"mlp": surgery.head(64), "conv": convolutions(), "blocks": blocks()}
    model = models[name]
    loss = F.cross_entropy(model(x), y)
    before = torch.autograd.grad(loss, list(model.parameters()))
    parameters, output = list(model.parameters()), model(x)

    applied = add_residual(model, batch=x, preserve=True)

    assert torch.equal(model(x), output)
    F.cross_entropy(model(x), y).backward()
    for parameter, gradient in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    for name_, parameter in model.named_parameters():
        if name_ in applied.changed:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def convolutions() -> nn.Sequential:
    """Return convolutions of every shape that a path can go around: same, wider, strided."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class Plain(nn.Module):
    """A block without a path around it."""

    def __init__(self, takes: int, gives: int) -> None:
        super().__init__()
        self.layer = nn.Linear(takes, gives)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def blocks() -> nn.Sequential:
    """Return blocks of a class of its own, one of which changes the width."""
    return nn.Sequential(Plain(64, 16), Plain(16, 16), Plain(16, 8), nn.Linear(8, 10))


def test_paths_fit_the_shapes() -> None:
    """The identity where shapes agree, else a projection; strides are followed."""
    model = convolutions()
    x = surgery.batch()[0]

    applied = add_residual(model, batch=x)

    assert [line.partition(" around")[0] for line in applied.changes] == [
        "1: a projection 1>4 (1x1)",
        "4: an identity path",
        "6: a projection 4>8 (1x1, stride 2x2)",
    ]
    assert model[6](torch.randn(2, 4, 8, 8)).shape == (2, 8, 4, 4)


def test_without_preserving_each_block_starts_as_its_path() -> None:
    """The identity gives the input itself; a projection copies features in turn."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    add_residual(model)

    x = torch.randn(3, 4)
    assert torch.equal(model[0](x), x)
    assert torch.equal(model[2](x), x[:, [0, 1, 2, 3, 0, 1]])


def test_blocks_that_have_a_path_are_left_alone() -> None:
    """Inside the block or around it; for code one forward pass shows it."""
    x = surgery.batch()[0]

    applied = add_residual(surgery.ResidualClassifier(), batch=x)

    assert applied.skipped == {
        "blocks.0": "there is a path around it already",
        "blocks.1": "there is a path around it already",
    }
    around = Net(
        lambda net, x: net.out(x + net.inner(x)), inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()), out=nn.Linear(8, 2)
    )
    with pytest.raises(UnsupportedModelError, match="there is a path around it already"):
        add_residual(around, batch=torch.randn(4, 8))


def test_float_targets_are_no_path() -> None:
    """A regression's targets come with the inputs, and yet go around nothing."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    applied = add_residual(
        model,
        batch=(torch.randn(4, 8), torch.randn(4, 1)),
        compute_loss=lambda net, batch: F.mse_loss(net(batch[0]), batch[1]),
    )

    assert len(applied.changes) == 1


@pytest.mark.parametrize(
    ("block", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh()), (2, 3, 8, 8), r"shapes do not allow it: .*\[2, 3, 6, 6\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 8)), (2, 2, 4), r"shapes do not allow it: .*\[2, 2, 4\].*\[2, 8\]"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), (2, 8), "changes its input in place"),
        (nn.Linear(8, 8).requires_grad_(requires_grad=False), (2, 8), "it is frozen"),
        (nn.Tanh(), (2, 8), "it has no parameters"),
        (nn.LSTM(8, 8), (2, 3, 8), "it does not take one tensor and return one"),
    ],
    ids=["unpadded", "flattened", "in place", "frozen", "no parameters", "tuple"],
)  # fmt: skip
def test_what_allows_no_path_is_refused_by_name(block: nn.Module, shape: tuple[int, ...], message: str) -> None:
    """The error says why, with the shapes; the model is as it was."""

    def forward(net: Any, x: Tensor) -> Tensor:
        made = net.block(x * 1)
        made = made[0] if isinstance(made, tuple) else made
        return net.out(made.mean().reshape(1, 1))

    net = Net(forward, block=block, out=nn.Linear(1, 2))

    with pytest.raises(UnsupportedModelError, match=f"block cannot have a path around it: .*{message}"):
        add_residual(net, batch=torch.randn(shape), modules="block")
    assert net.block is block


def test_a_lone_module_with_code_is_no_block_unless_named() -> None:
    """It may be the whole net."""
    net = nn.Sequential(Plain(8, 8), nn.Linear(8, 2))
    x = torch.randn(4, 8)

    with pytest.raises(UnsupportedModelError, match="it is the only Plain"):
        add_residual(net, batch=x)
    add_residual(net, batch=x, modules=["0"])
    assert isinstance(net[0], Residual)
    assert net[0].layer.in_features == 8
