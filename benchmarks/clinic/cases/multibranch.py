"""Nets of several branches: towers, experts, auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import digits
from benchmarks.clinic.nets import Activation, mlp
from benchmarks.clinic.tasks import adam, classify, sgd

__all__ = ["CASES"]


class Towers(nn.Module):
    """Two towers that each read half of the pixels; their features are joined.

    Attributes:
        use: ``"both"``, ``"left"`` (the right tower is never called) or ``"gated"`` (called, and multiplied by a gate
            that stays at zero).
    """

    def __init__(self, use: str = "both", activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.use = use
        self.left, self.right = (mlp(32, 24, 3, activation, width=32, init="he") for _ in range(2))
        self.register_buffer("gate", torch.zeros(24) if use == "gated" else torch.ones(24))
        self.head = nn.Linear(24 if use == "left" else 48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        features = self.left(x[:, :32])
        if self.use != "left":
            features = torch.cat([features, self.gate * self.right(x[:, 32:])], dim=1)
        logits: Tensor = self.head(features)
        return logits


class Experts(nn.Module):
    """A router that sends each example to the best of four experts."""

    def __init__(self, *, experts: int = 4, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(width, width, 2, width=width, init="he") for _ in range(experts))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        x = self.embed(x)
        weight = self.router(x).softmax(-1)
        best = weight.argmax(-1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = best == index
            if rows.any():
                mixed[rows] = weight[rows, index, None] * expert(x[rows])
        logits: Tensor = self.head(x + mixed)
        return logits


class Auxiliary(nn.Module):
    """A deep net with a second head half way, which the loss uses in training only."""

    def __init__(self, activation: Activation = nn.Tanh) -> None:
        super().__init__()
        self.lower = mlp(64, 32, 4, activation, width=32, init="xavier")
        self.upper = mlp(32, 32, 4, activation, width=32, init="xavier")
        self.side, self.head = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        """Return logits, in training with those of the side head."""
        middle = torch.tanh(self.lower(x))
        logits = self.head(torch.tanh(self.upper(middle)))
        return (logits, self.side(middle)) if self.training else logits


class Steps(nn.Module):
    """Rounds its input: a derivative of zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input rounded to a tenth."""
        return (x * 10).round() / 10


def towers(use: str = "both") -> Callable[[int], Job]:
    return lambda seed: classify(Towers(use), digits(), adam(), seed, measure="known")


def rounded(*, sound: bool) -> Callable[[int], Job]:
    """Return a builder of a net with a code in the middle, rounded (sick) or not (its twin)."""

    def build(seed: int) -> Job:
        model = nn.Sequential()
        model.add_module("encoder", mlp(64, 8, 4, nn.Tanh, width=32, init="xavier"))
        model.add_module("code", nn.Identity() if sound else Steps())
        model.add_module("decoder", mlp(8, 10, 3, nn.Tanh, width=32, init="xavier"))
        return classify(model, digits(), sgd(0.02), seed, measure="known")

    return build


def auxiliary(seed: int) -> Job:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        heads = logits if isinstance(logits, tuple) else (logits,)
        return torch.stack([F.cross_entropy(head, batch[1]) for head in heads]).mean()

    return classify(Auxiliary(), digits(), adam(), seed, loss=loss)


CASES = (
    healthy("multibranch/towers-adam", towers(), learns=0.5),
    healthy(
        "multibranch/experts-adam",
        lambda seed: classify(Experts(), digits(), adam(2e-3), seed),
        "an expert gets no gradient when no example goes to it",
        learns=0.85,
    ),
    healthy("multibranch/auxiliary-head-adam", auxiliary, "a head half way down", learns=0.85),
    healthy("multibranch/code-sgd", rounded(sound=True), learns=0.4),
    sick(
        "multibranch/unused-tower",
        towers("left"),
        "the right tower is never called",
        code="GG104",
        culprit=("right",),
        twin="multibranch/towers-adam",
        phase="wiring",
        cure="join both towers",
    ),
    sick(
        "multibranch/gated-tower",
        towers("gated"),
        "the right tower is multiplied by a gate that stays at zero: zeros between live layers",
        code="GG104",
        culprit=("right",),
        twin="multibranch/towers-adam",
        phase="wiring",
        cure="open the gate",
    ),
    sick(
        "multibranch/rounded-code",
        rounded(sound=False),
        "round() in the middle: a derivative of zero, so zeros from there to the input",
        code="GG104",
        culprit=("code", "encoder.6"),
        twin="multibranch/code-sgd",
        phase="wiring",
        cure="a straight-through estimator",
    ),
)
