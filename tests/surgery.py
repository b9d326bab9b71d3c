"""Models for surgery, one of each kind, with hidden sigmoids that every operation finds something to do at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import digit_batch


def head(width: int) -> nn.Sequential:
    """Return two hidden layers with sigmoids and an output layer."""
    return nn.Sequential(
        nn.Linear(width, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid(), nn.Dropout(0.0), nn.Linear(16, 10)
    )


class ConvClassifier(nn.Module):
    """Hand-written: layers as attributes, an activation in code, code that reads a layer's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.Sigmoid()
        self.fc1 = nn.Linear(256, 12)
        self.tail = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x.reshape(-1, 1, 8, 8)))
        x = torch.sigmoid(self.conv2(x)).flatten(1)
        x = x.reshape(-1, self.fc1.in_features).to(self.fc1.weight.dtype)
        return self.tail(torch.tanh(self.fc1(x)))


class Block(nn.Module):
    """A block of a residual net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.act = nn.Sigmoid()
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(x)))


class ResidualClassifier(nn.Module):
    """Residual blocks and a head that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(2))
        self.tail = head(64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


class FunctionalBlock(nn.Module):
    """Two layers whose activations are functions, one of them in a method of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def squash(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(self.squash(x)))


class FunctionalClassifier(nn.Module):
    """Blocks whose activations are functions, then one that works in place and one at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(FunctionalBlock(64) for _ in range(2)))
        self.last = nn.Linear(64, 16)
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.out(F.relu(self.last(self.blocks(x)), inplace=True)))


class RecurrentClassifier(nn.Module):
    """Two plain recurrent layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.tail = head(12)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.rnn(x.reshape(-1, 8, 8))
        return self.tail(output[:, -1] + state.sum() * 0)


class TransformerClassifier(nn.Module):
    """A Transformer encoder of eight tokens, whose head works on each token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.tail = head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.encoder(x.reshape(-1, 8, 8))).mean(1)


def batch(size: int = 32) -> tuple[Tensor, Tensor]:
    """Return digits and their classes."""
    return digit_batch(size)


class Net(nn.Module):
    """Code around some layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._code = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._code(self, x)
