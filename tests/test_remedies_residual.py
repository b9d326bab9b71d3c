"""Residual remedies: which branches are found, that blocks start as the identity, and that deep nets then train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied
from gradguard.remedies.initialization import ScaledBranch, fixup, rezero, skip_init
from tests.models import classification_loss, digit_batch


class Block(nn.Module):
    """``x + f(x)`` with a hidden layer; parts of it can be asked for."""

    def __init__(self, width: int, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.middle = nn.Linear(width, width) if kind == "three" else nn.Identity()
        self.shortcut = nn.Linear(width, width) if kind == "projection" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if self.kind == "pre-norm" else x
        y = self.down(torch.relu(self.middle(torch.relu(self.up(y)))))
        if self.kind == "post-norm":
            y = self.norm(y)
        if self.kind == "activated":
            y = torch.relu(y)
        if self.kind == "in-place":
            y += x
            return y
        return torch.add(self.shortcut(x), F.dropout(y, 0.0))


def net(blocks: int, kind: str = "plain", width: int = 32) -> nn.Sequential:
    """Return a residual MLP for digits without normalization in the trunk."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), *(Block(width, kind) for _ in range(blocks)), nn.ReLU(), nn.Linear(width, 10)
    )


def loss_after_training(model: nn.Module, steps: int = 60) -> float:
    """Return the mean loss over the last ten of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = classification_loss(model, digit_batch(64, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("kind", ["plain", "three", "projection", "in-place"])
@pytest.mark.parametrize("remedy", [fixup, skip_init, rezero])
def test_blocks_start_as_their_shortcut(remedy: Callable[..., Applied], kind: str) -> None:
    """After the remedy each block returns its shortcut alone, which it did not before."""
    model, x = net(4, kind), torch.randn(5, 32)
    before = [block(x) for block in model if isinstance(block, Block)]
    remedy(model, digit_batch(8)[0])

    for block, was in zip([m for m in model if isinstance(m, Block)], before, strict=True):
        assert torch.equal(block(x), block.shortcut(x))
        assert not torch.allclose(was, block.shortcut(x), atol=0.1)


@pytest.mark.parametrize("remedy", [fixup, skip_init])
def test_fifty_blocks_without_normalization_train(remedy: Callable[..., Applied]) -> None:
    """At the default initialisation the branches add up and SGD diverges; with the remedy the net trains."""
    model = net(50)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    untreated = loss_after_training(model)
    model.load_state_dict(state)
    remedy(model, digit_batch(32)[0], **({"generator": 0} if remedy is fixup else {}))

    assert not untreated < 2.3  # chance is ln 10; NaN counts as failed
    assert loss_after_training(model) < 1.0


@pytest.mark.parametrize(("kind", "depth"), [("plain", 2), ("three", 3)])
def test_fixup_scales_by_branches_and_layers(kind: str, depth: int) -> None:
    """Inner layers of a branch have He's deviation times L^(-1 / (2m - 2)); the first layer has He's."""
    blocks, width = 9, 128
    model = net(blocks, kind, width)
    fixup(model, digit_batch(8)[0], generator=0)
    he = (2.0 / width) ** 0.5

    assert model[0].weight.std().item() == pytest.approx((2.0 / 64) ** 0.5, rel=0.05)
    inner = model[3].up.weight.std().item()
    assert inner == pytest.approx(he * blocks ** (-1 / (2 * depth - 2)), rel=0.05)
    assert not model[3].down.weight.any()
    assert not model[-1].weight.any()
    assert all(not layer.bias.any() for layer in model.modules() if isinstance(layer, nn.Linear))


def test_fixup_multipliers_start_at_one_and_are_optional() -> None:
    """Rule 3 adds a learnt factor per branch that changes nothing at first."""
    plain, scaled, x = net(3), net(3), digit_batch(8)[0]
    fixup(plain, x, generator=0)
    applied = fixup(scaled, x, generator=0, multiplier=True)

    assert torch.equal(plain(x), scaled(x))
    assert [name for name in applied.changed if name.endswith("alpha")] == [f"{i}.down.alpha" for i in (2, 3, 4)]
    assert all(m.alpha.item() == 1.0 for m in scaled.modules() if isinstance(m, ScaledBranch))


def test_normalization_at_the_end_of_a_branch_is_what_gets_scaled() -> None:
    """Scaling the layer before a norm would do nothing; the norm's output is scaled instead."""
    model, x = net(2, "post-norm"), torch.randn(3, 32)
    applied = skip_init(model, digit_batch(8)[0])

    assert all(isinstance(model[i].norm, ScaledBranch) for i in (2, 3))
    assert applied.names["2.norm.weight"] == "2.norm.module.weight"
    assert torch.equal(model[2](x), x)


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
def test_fixup_refuses_normalized_branches(kind: str) -> None:
    """Fixup stands in for normalization; the error names the branch and the way out."""
    with pytest.raises(UnsupportedModelError, match=r"branch of 2\.up has 1 of them. Use skip_init"):
        fixup(net(2, kind), digit_batch(8)[0])


@pytest.mark.parametrize("remedy", [fixup, skip_init, rezero])
def test_an_activation_behind_the_branch_is_refused(remedy: Callable[..., Applied]) -> None:
    """ReLU of zero has no gradient: such a branch could never be learnt."""
    with pytest.raises(UnsupportedModelError, match="an activation stands behind its last layer"):
        remedy(net(2, "activated"), digit_batch(8)[0])


@pytest.mark.parametrize("remedy", [fixup, skip_init, rezero])
def test_plain_nets_have_no_branches(remedy: Callable[..., Applied]) -> None:
    """Without a shortcut there is nothing to scale, and a sum with a constant is none."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 10)
            self.register_buffer("shift", torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) + self.shift) + 1.0)

    with pytest.raises(UnsupportedModelError):
        remedy(Plain(), digit_batch(8)[0])


def test_parallel_paths_of_equal_length_are_no_branch() -> None:
    """Two layers side by side are a wider layer, not a residual block."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.a(x) + self.b(x)))

    with pytest.raises(UnsupportedModelError, match="no residual branch"):
        fixup(Wide(), digit_batch(8)[0])


def test_named_modules_need_no_batch() -> None:
    """Named modules are scaled as they are; without batch and names the error says what is missing."""
    model = net(2)
    applied = rezero(model, modules=["2.down"])

    assert applied.changed == ("2.down.alpha",)
    assert isinstance(model[2].down, ScaledBranch)
    assert not isinstance(model[3].down, ScaledBranch)
    with pytest.raises(ValueError, match="pass batch=, or name the modules"):
        rezero(model)
    with pytest.raises(ValueError, match="no such module inside it"):
        rezero(model, modules=["elsewhere"])


def test_applied_twice_scales_once() -> None:
    """A branch that is scaled already is left alone."""
    model, x = net(2), digit_batch(8)[0]
    rezero(model, x)
    with pytest.raises(UnsupportedModelError, match="scaled already"):
        rezero(model, x)


def test_torch_transformer_layers_are_refused() -> None:
    """Their fast path reads the weights past any wrapper, so a scalar would be ignored in evaluation mode."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(UnsupportedModelError, match="read its weight directly"):
        rezero(layer, torch.randn(2, 3, 16))


def test_code_that_reads_the_wrapped_layer_fails_at_once() -> None:
    """A model that looks into the layer breaks in the remedy's own check, which puts everything back."""

    class Looking(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x))) * (self.down.in_features / 32)

    model = nn.Sequential(nn.Linear(64, 32), Looking(32))
    text = str(model)
    with pytest.raises(AttributeError):
        rezero(model, digit_batch(8)[0], modules=["1.down"])

    assert str(model) == text


@pytest.mark.parametrize("remedy", [skip_init, rezero])
def test_scalars_join_the_group_of_their_layer(remedy: Callable[..., Applied]) -> None:
    """The scalar is trained with the rate of the layer it scales, and schedulers count the same groups as before."""
    model = net(2)
    groups: list[dict[str, Any]] = [
        {"params": list(model[:3].parameters()), "lr": 0.1},
        {"params": list(model[3:].parameters()), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.5])
    applied = remedy(model, digit_batch(8)[0], optimizer=optimizer)

    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert id(model[2].down.alpha) in held[0]
    assert id(model[3].down.alpha) in held[1]
    classification_loss(model, digit_batch(8)).backward()
    optimizer.step()
    schedule.step()
    assert model[2].down.alpha.item() != 0.0
    applied.undo()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_fixup_refuses_what_it_cannot_zero() -> None:
    """A frozen last layer keeps its branch alive; the error says which."""
    model = net(2)
    model[3].down.weight.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"branch of 3\.up to 0, and that is frozen"):
        fixup(model, digit_batch(8)[0])


def test_convolutional_blocks_with_a_strided_projection() -> None:
    """A ResNet-like block whose shortcut is a convolution is found; its shortcut is not zeroed."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
            self.short = nn.Conv2d(3, 6, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(torch.relu(self.a(x))) + self.short(x))

    model = nn.Sequential(Conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    applied = fixup(model, torch.randn(2, 3, 8, 8), generator=0)

    assert not model[0].b.weight.any()
    assert model[0].short.weight.any()
    assert "on one of 1 residual branches" in applied.changes[0]
