"""Networks of the clinic: perceptrons, convolutions, residual nets, autoencoders. Its own, so that labels stay put."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Activation",
    "ConvNet",
    "Detach",
    "Exponential",
    "PlainConv",
    "ResidualMLP",
    "autoencoder",
    "initialize",
    "lenet",
    "mlp",
]

Activation: TypeAlias = Callable[[], nn.Module]


class Exponential(nn.Module):
    """exp(x) as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return exp(x)."""
        return x.exp()


class Detach(nn.Module):
    """A forgotten ``detach()``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, cut off from what made it."""
        return x.detach()


def initialize(layer: nn.Linear | nn.Conv2d, scheme: str, gain: float = 1.0) -> None:
    """Initialise a layer by name.

    Args:
        layer: Changed in place.
        scheme: ``"default"``, ``"xavier"``, ``"he"``, ``"he-uniform"``, ``"lecun"`` or ``"orthogonal"``; all but the
            first set the bias to 0.
        gain: Factor on the weight.
    """
    weight = layer.weight
    if scheme == "xavier":
        nn.init.xavier_normal_(weight)
    elif scheme == "he":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    elif scheme == "he-uniform":
        nn.init.kaiming_uniform_(weight, nonlinearity="relu")
    elif scheme == "lecun":
        nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    elif scheme == "orthogonal":
        nn.init.orthogonal_(weight)
    elif scheme != "default":
        raise ValueError(
            f"scheme must be default, xavier, he, he-uniform, lecun or orthogonal, got {scheme!r}: see initialize()"
        )
    with torch.no_grad():
        weight.mul_(gain)
    if scheme != "default" and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def mlp(
    inputs: int,
    outputs: int,
    depth: int,
    activation: Activation = nn.ReLU,
    *,
    width: int = 64,
    init: str = "default",
    gain: float = 1.0,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """Return a perceptron with ``depth`` linear layers, the output layer included.

    Args:
        inputs: Features.
        outputs: Width of the output.
        depth: Linear layers.
        activation: Makes the activation between them.
        width: Hidden width.
        init: See :func:`initialize`; the output layer gets ``"xavier"`` unless it is the default.
        gain: Factor on hidden weights.
        norm: Makes a normalization in front of each activation.
    """
    layers: list[nn.Module] = []
    fan_in = inputs
    for _ in range(depth - 1):
        linear = nn.Linear(fan_in, width)
        initialize(linear, init, gain)
        layers.append(linear)
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
        fan_in = width
    head = nn.Linear(fan_in, outputs)
    initialize(head, "default" if init == "default" else "xavier")
    return nn.Sequential(*layers, head)


class ResidualMLP(nn.Module):
    """Residual perceptron on 64 features: no, Layer or Batch normalization; ReZero, LayerScale, zero-initialised."""

    def __init__(
        self,
        blocks: int,
        *,
        width: int = 64,
        norm: Callable[[int], nn.Module] | None = None,
        branch_gain: float | None = None,
        scale: float | None = None,
        zero_last: bool = False,
        drop_path: float = 0.0,
        cut_before: int | None = None,
    ) -> None:
        """Make the net.

        Args:
            blocks: Residual blocks.
            width: Width of the stream.
            norm: Makes the normalization in front of each branch.
            branch_gain: Gain of a branch's last layer, 1/sqrt(blocks) by default.
            scale: Initial value of a learnt factor on each branch: 0 is ReZero, 1e-6 LayerScale.
            zero_last: Start the last layer of every branch at zero.
            drop_path: Probability of skipping a branch in training.
            cut_before: Block in front of which the stream is detached, for a sick net.
        """
        super().__init__()
        self.drop_path = drop_path
        self.cut_before = cut_before
        self.inp = nn.Linear(64, width)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            first, last = nn.Linear(width, width), nn.Linear(width, width)
            initialize(first, "he")
            initialize(last, "xavier", 1 / math.sqrt(blocks) if branch_gain is None else branch_gain)
            if zero_last:
                nn.init.zeros_(last.weight)
            self.blocks.append(nn.Sequential(norm(width) if norm else nn.Identity(), first, nn.ReLU(), last))
        self.scales = None if scale is None else nn.ParameterList(torch.full((width,), scale) for _ in range(blocks))
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        x = self.inp(x)
        for index, block in enumerate(self.blocks):
            if index == self.cut_before:
                x = x.detach()
            if self.training and self.drop_path and float(torch.rand(())) < self.drop_path:
                continue
            branch = block(x)
            x = x + (branch if self.scales is None else self.scales[index] * branch)
        result: Tensor = self.out(x)
        return result


class ConvNet(nn.Module):
    """Residual convolutional net on 8x8 digits with in-place ReLUs."""

    def __init__(self, blocks: int = 3, *, width: int = 16, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        make = norm if norm is not None else nn.Identity
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=norm is None) for _ in range(2 * blocks))
        self.norms = nn.ModuleList(make(width) for _ in range(2 * blocks))
        self.relus = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(2 * blocks + 1))
        self.out = nn.Linear(width, 10)
        if norm is None:
            for index, conv in enumerate(self.convs):
                if isinstance(conv, nn.Conv2d):
                    initialize(conv, "he", 1.0 if index % 2 == 0 else 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        x = self.relus[0](self.inp(x.reshape(-1, 1, 8, 8)))
        for index in range(0, len(self.convs), 2):
            hidden = self.relus[index + 1](self.norms[index](self.convs[index](x)))
            hidden = self.norms[index + 1](self.convs[index + 1](hidden))
            x = self.relus[index + 2](x + hidden)
        result: Tensor = self.out(x.mean((2, 3)))
        return result


class PlainConv(nn.Module):
    """Stack of 3x3 convolutions on 8x8 digits, without skips; activations are plain functions."""

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        init: str = "default",
        norm: Callable[[int], nn.Module] | None = None,
        cut_before: int | None = None,
    ) -> None:
        super().__init__()
        self.cut_before = cut_before
        self.convs = nn.ModuleList(
            nn.Conv2d(1 if index == 0 else width, width, 3, padding=1, bias=norm is None) for index in range(depth)
        )
        for conv in self.convs:
            if isinstance(conv, nn.Conv2d):
                initialize(conv, init)
        self.norms = nn.ModuleList(norm(width) if norm else nn.Identity() for _ in range(depth))
        self.out = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        x = x.reshape(-1, 1, 8, 8)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index == self.cut_before:
                x = x.data
            x = F.relu(norm(conv(x)))
        result: Tensor = self.out(F.max_pool2d(x, 2).flatten(1))
        return result


def lenet(activation: Activation = nn.ReLU) -> nn.Sequential:
    """Return a LeNet for 8x8 digits, as AUTOTRAINER evaluates on MNIST."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 64),
        activation(),
        nn.Linear(64, 32),
        activation(),
        nn.Linear(32, 10),
    )


def autoencoder(
    activation: Activation = nn.Tanh,
    *,
    bottleneck: int = 12,
    output: Activation | None = None,
    depth: int = 2,
    init: str = "xavier",
) -> nn.Sequential:
    """Return an autoencoder of 64 features with children ``encoder`` and ``decoder``.

    Args:
        activation: Makes the hidden activation.
        bottleneck: Width of the code.
        output: Makes an activation behind the last layer.
        depth: Linear layers of each half.
        init: See :func:`initialize`.
    """
    model = nn.Sequential()
    model.add_module("encoder", mlp(64, bottleneck, depth, activation, init=init))
    model.add_module("decoder", mlp(bottleneck, 64, depth, activation, init=init))
    if output is not None:
        model.add_module("squash", output())
    return model
