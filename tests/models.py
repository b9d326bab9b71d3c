"""Tiny models with exactly one illness each, and healthy ones; real data from scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, standardised: 1797 images of shape ``[64]`` and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


def digit_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a reproducible batch of digits."""
    x, y = digits()
    chosen = torch.randint(0, len(x), (size,), generator=torch.Generator().manual_seed(seed))
    return x[chosen], y[chosen]


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of inputs and classes."""
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(
    depth: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    init: str = "default",
    gain: float = 1.0,
    width: int = 64,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """Return an MLP for digits with ``depth`` linear layers.

    Args:
        depth: Linear layers, the output layer included.
        activation: Makes the activation.
        init: ``"default"``, ``"xavier"``, ``"he"`` or ``"orthogonal"``.
        gain: Factor on the hidden weights.
        width: Hidden width.
        norm: Makes a normalization for each hidden layer.
    """
    layers: list[nn.Module] = []
    fan_in = 64
    for _ in range(depth - 1):
        layers.append(initialized(nn.Linear(fan_in, width), init, gain))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
        fan_in = width
    layers.append(initialized(nn.Linear(fan_in, 10), "default" if init == "default" else "xavier"))
    return nn.Sequential(*layers)


def initialized(layer: nn.Linear, init: str, gain: float = 1.0) -> nn.Linear:
    """Initialise a linear layer by name; the bias becomes 0 unless the default is kept."""
    if init == "default":
        return layer
    if init == "xavier":
        nn.init.xavier_normal_(layer.weight, gain)
    elif init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layer.weight.data.mul_(gain)
    else:
        nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualMLP(nn.Module):
    """Residual MLP; ``rezero`` starts every branch at exactly zero."""

    def __init__(self, blocks: int, *, width: int = 64, rezero: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(blocks))
        self.first = nn.ModuleList(initialized(nn.Linear(width, width), "he") for _ in range(blocks))
        self.second = nn.ModuleList(
            initialized(nn.Linear(width, width), "xavier", 1 / math.sqrt(blocks)) for _ in range(blocks)
        )
        self.alpha = nn.Parameter(torch.zeros(blocks)) if rezero else None
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for index, (norm, first, second) in enumerate(zip(self.norms, self.first, self.second, strict=True)):
            branch = second(F.relu(first(norm(x))))
            x = x + (branch if self.alpha is None else self.alpha[index] * branch)
        return self.out(x)


class ConvNet(nn.Module):
    """Convolutional net on 8x8 digits: BatchNorm, in-place ReLU, residual connections if wanted."""

    def __init__(self, blocks: int = 2, *, width: int = 16, norm: bool = True, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=not norm) for _ in range(2 * blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2 * blocks))
        self.relus = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(2 * blocks + 1))
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.inp(x.reshape(-1, 1, 8, 8)))
        for index in range(0, len(self.convs), 2):
            hidden = self.relus[index + 1](self.norms[index](self.convs[index](x)))
            hidden = self.norms[index + 1](self.convs[index + 1](hidden))
            x = self.relus[index + 2](x + hidden if self.skip else hidden)
        return self.out(x.mean((2, 3)))


class SequenceClassifier(nn.Module):
    """Recurrent net that reads a digit row by row."""

    def __init__(self, kind: str = "lstm", hidden: int = 32) -> None:
        super().__init__()
        cells: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
        self.rnn = cells[kind](8, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])


class TransformerClassifier(nn.Module):
    """Transformer encoder that reads a digit as eight tokens."""

    def __init__(self, layers: int = 2, *, pre_norm: bool = True, dropout: float = 0.0, width: int = 32) -> None:
        super().__init__()
        self.inp = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 64, dropout, batch_first=True, norm_first=pre_norm)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.encoder(self.inp(x.reshape(-1, 8, 8)) + self.position)).mean(1))
