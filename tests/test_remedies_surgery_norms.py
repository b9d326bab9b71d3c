"""Where norms are put, over which axes, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.surgery import (
    Normalized,
    insert_norm,
)
from tests import surgery
from tests.surgery import Net


def one_layer(layer: nn.Module) -> Net:
    """Return a net with one hidden layer, an activation in code, and an output that reads the mean of everything."""
    return Net(lambda net, x: net.out(torch.relu(net.layer(x)).mean().reshape(1, 1)), layer=layer, out=nn.Linear(1, 2))


def positions_last(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a function of ``[rows, features]`` to channels on axis 1."""
    return lambda y: norm(y.movedim(1, -1)).movedim(-1, 1)


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "N,C": (lambda: nn.Linear(3, 32), (5, 3)),
    "N,T,C": (lambda: nn.Linear(3, 32), (5, 4, 3)),
    "N,C,L": (lambda: nn.Conv1d(3, 32, 3), (5, 3, 8)),
    "N,C,H,W": (lambda: nn.Conv2d(3, 32, 3), (5, 3, 8, 8)),
    "N,C,D,H,W": (lambda: nn.Conv3d(3, 32, 3), (5, 3, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 32, 3), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("kind", ["layer", "batch", "group", "rms"])
@pytest.mark.parametrize("layout", SHAPES)
def test_norms_are_taken_over_the_axes_of_the_layout(layout: str, kind: Any) -> None:
    """Means and squares over those axes are what each normalization promises, written out."""
    torch.manual_seed(0)
    layer, shape = SHAPES[layout][0](), SHAPES[layout][1]
    net, x = one_layer(layer), torch.randn(shape)
    y = layer(x).detach()

    insert_norm(net, kind, batch=x)

    got = net.layer(x).detach()
    channel = y.ndim - 1 if isinstance(layer, nn.Linear) else 1
    last = y.movedim(channel, -1)
    rest = tuple(range(last.ndim - 1))
    whole = tuple(range(1, last.ndim)) if channel == 1 and y.ndim > 2 else (last.ndim - 1,)
    if kind == "rms":
        expected = last / last.square().mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()
    elif kind == "group":
        groups = last.unflatten(-1, (2, 16))
        axes = (*whole[:-1], groups.ndim - 1)
        mean, var = groups.mean(axes, keepdim=True), groups.var(axes, unbiased=False, keepdim=True)
        expected = ((groups - mean) / (var + 1e-5).sqrt()).flatten(-2)
    else:
        axes = rest if kind == "batch" else whole
        mean, var = last.mean(axes, keepdim=True), last.var(axes, unbiased=False, keepdim=True)
        expected = (last - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(got.movedim(channel, -1), expected, rtol=1e-3, atol=1e-4)


def test_a_norm_stands_before_the_activation_and_not_at_the_output() -> None:
    """By default; the output layer is left alone and said to be."""
    model = surgery.head(8)

    applied = insert_norm(model)

    assert [type(m).__name__ for m in model] == ["Normalized", "Sigmoid", "Normalized", "Sigmoid", "Dropout", "Linear"]
    assert applied.changes[0] == "0: LayerNorm 16 before the sigmoid behind Linear 8>16"
    assert applied.skipped == {"5": "it is the output layer"}
    assert applied.names["0.weight"] == "0.layer.weight"
    assert applied.changed == ("0.norm.weight", "0.norm.bias", "2.norm.weight", "2.norm.bias")


def test_a_norm_after_the_activation_needs_a_module() -> None:
    """It wraps the activation; an activation in code is left alone, with the reason."""
    model = surgery.ConvClassifier()
    x = surgery.batch()[0]

    applied = insert_norm(model, where="after", batch=x)

    assert isinstance(model.act, Normalized)
    assert isinstance(model.act.layer, nn.Sigmoid)
    assert "a function in code" in applied.skipped["conv2"]
    assert "a function in code" in applied.skipped["fc1"]


def test_code_that_reads_the_layer_still_works() -> None:
    """Attributes are read from, and parameters set on, the layer inside; what is in neither is an error as ever."""
    model = surgery.ConvClassifier()
    x = surgery.batch()[0]
    weight = model.fc1.weight

    insert_norm(model, batch=x)

    assert isinstance(model.fc1, Normalized)
    assert model.fc1.weight is weight
    assert model.fc1.in_features == 256
    model.fc1.weight = nn.Parameter(torch.zeros(12, 256))
    assert "fc1.layer.weight" in model.state_dict()
    assert "fc1.weight" not in model.state_dict()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.fc1.nothing_of_the_kind


def test_what_is_normalized_frozen_or_used_past_the_module_is_left_alone() -> None:
    """Each with its reason."""
    net = Net(
        lambda net, x: net.out(
            torch.relu(
                net.b(torch.relu(F.linear(torch.relu(net.frozen(torch.relu(net.norm(net.a(x))))), net.c.weight)))
            )
        ),
        a=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        frozen=nn.Linear(8, 8).requires_grad_(requires_grad=False),
        c=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
        idle=nn.Linear(8, 8),
    )

    applied = insert_norm(net, batch=torch.randn(4, 8))

    assert [line.partition(":")[0] for line in applied.changes] == ["b"]
    assert applied.skipped["a"] == "it is normalized already"
    assert "frozen" in applied.skipped["frozen"]
    assert "code of Net uses its weight without calling it" in applied.skipped["c"]
    assert applied.skipped["idle"] == "it did not run on the batch"


def test_a_gate_is_not_normalized() -> None:
    """A sigmoid whose result multiplies something else is to stay half open."""
    net = Net(
        lambda net, x: net.out(torch.relu(net.mid(net.value(x) * torch.sigmoid(net.gate(x))))),
        value=nn.Linear(8, 8),
        gate=nn.Linear(8, 8),
        mid=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
    )

    applied = insert_norm(net, batch=torch.randn(4, 8))

    assert [line.partition(":")[0] for line in applied.changes] == ["mid"]
    assert applied.skipped["gate"] == "no activation that is not a gate stands behind it"


@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["layer", "rms", "group", "batch"])
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "by order"])
def test_a_norm_over_fewer_than_four_features_is_refused(kind: Any, features: int, traced: bool) -> None:
    """Two values normalized are -1 and 1; BatchNorm, which is over the batch, takes any number."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, features),
        nn.Tanh(),
        nn.Linear(features, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    )

    applied = insert_norm(model, kind, batch=torch.randn(6, 8) if traced else None, dry_run=True)

    refused = kind != "batch" and features < 4
    assert [line.partition(":")[0] for line in applied.changes] == (["0", "4"] if refused else ["0", "2", "4"])
    if refused:
        count = "1 value " if features == 1 else f"{features} values "
        assert count in applied.skipped["2"]
        assert "would keep little but their order; BatchNorm keeps more" in applied.skipped["2"]
        assert f"2: left alone, {applied.skipped['2']}" in str(applied)
    else:
        assert "2" not in applied.skipped


@pytest.mark.parametrize(
    ("kind", "positions", "refused"),
    [("layer", 8, False), ("group", 8, False), ("rms", 8, True), ("layer", 1, True), ("group", 1, True)],
)
def test_values_of_a_convolution_are_counted_with_its_positions(kind: Any, positions: int, refused: bool) -> None:
    """Two channels at 64 positions are 128 values, but for RMSNorm, which is taken at each position."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * positions**2, 2))
    x = torch.randn(4, 1, positions, positions)

    if refused:
        with pytest.raises(UnsupportedModelError, match="over 2 values would keep little but their order"):
            insert_norm(net, kind, batch=x)
    else:
        assert len(insert_norm(net, kind, batch=x).changes) == 1


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 4), (1, 3)), (nn.Conv2d(3, 4, 3), (1, 3, 8, 8))], ids=["linear", "conv"]
)
def test_batch_norm_refuses_a_batch_of_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """It has no mean and variance; the model is as it was, and a layer norm is possible."""
    net = one_layer(layer)

    with pytest.raises(ValueError, match=r"batch has one example .* Pass a larger batch .* kind=\"layer\""):
        insert_norm(net, "batch", batch=torch.randn(shape))
    assert net.layer is layer
    insert_norm(net, "layer", batch=torch.randn(shape))


def test_batch_norm_refuses_a_layer_that_runs_several_times() -> None:
    """One set of running statistics would mix those of all its uses."""
    net = Net(
        lambda net, x: net.out(torch.relu(net.layer(torch.relu(net.layer(x))))),
        layer=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
    )

    with pytest.raises(UnsupportedModelError, match="it runs 2 times per pass"):
        insert_norm(net, "batch", batch=torch.randn(4, 8))
    assert len(insert_norm(net, "rms", batch=torch.randn(4, 8)).changes) == 1
