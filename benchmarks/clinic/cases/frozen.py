"""Frozen bases, low-rank adapters, thawing: most of the model does not move, and that is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import Data, digits
from benchmarks.clinic.nets import mlp
from benchmarks.clinic.tasks import adam, adamw, classify

__all__ = ["CASES"]


class LowRank(nn.Module):
    """A frozen linear layer and a trainable product of two thin matrices beside it.

    Source: Hu et al. (2022), "LoRA", ICLR: the second matrix starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, *, both_zero: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        if both_zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def inverted() -> Data:
    """Return digits with their classes renamed, the last becoming the first: a task next to the base's own."""
    data = digits()
    return Data(x=-data.x, y=9 - data.y, test_x=-data.test_x, test_y=9 - data.test_y, classes=10)


def pretrained(seed: int, depth: int = 5) -> nn.Sequential:
    """Return a perceptron that has learnt digits."""
    model = mlp(64, 10, depth, init="he")
    job = classify(model, digits(), adam(2e-3), seed + 100)
    for step in range(120):
        job.optimizers[0].zero_grad()
        job.loss(model, job.batch(step)).backward()
        job.optimizers[0].step()
    return model


def adapted(*, both_zero: bool = False) -> Callable[[int], Job]:
    """Return a builder of a pretrained net with adapters at every layer, on another task."""

    def build(seed: int) -> Job:
        layers = [
            LowRank(layer, both_zero=both_zero) if isinstance(layer, nn.Linear) else layer for layer in pretrained(seed)
        ]
        return classify(nn.Sequential(*layers), inverted(), adam(5e-3), seed, measure="known")

    return build


def half_frozen(seed: int) -> Job:
    model = pretrained(seed)
    for parameter in model[:4].parameters():
        parameter.requires_grad_(False)
    return classify(model, inverted(), adam(), seed, measure="known")


def forgotten_flag(seed: int) -> Job:
    """The whole base is passed to the optimizer, and its upper half still runs without gradients."""

    class HalfBlind(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.lower, self.upper = model[:-1], model[-1]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.lower(x)
            logits: Tensor = self.upper(features)
            return logits

    return classify(HalfBlind(pretrained(seed)), inverted(), adam(), seed, measure="known")


def thawing(seed: int) -> Job:
    """Layer after layer begins to train."""
    model = pretrained(seed)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        layer.requires_grad_(False)

    def thaw(step: int) -> None:
        open_layers = 1 + step // 40
        for layer in layers[-open_layers:]:
            layer.requires_grad_(True)

    job = classify(model, inverted(), adam(), seed, parameters=list(model.parameters()), measure="known")
    job.before_step = thaw
    return job


def fine_tuned(seed: int) -> Job:
    """A small rate on a net that has already learnt its task."""
    return classify(pretrained(seed), digits(), adamw(1e-5), seed, steps=200)


def idle(seed: int) -> Job:
    model = pretrained(seed)
    groups = [{"params": model[:-1].parameters(), "lr": 0.0}, {"params": model[-1].parameters()}]
    return classify(model, inverted(), adam(), seed, parameters=groups, measure="known")


CASES = (
    healthy("frozen/low-rank-adam", adapted(), "adapters whose second matrix begins at zero", learns=0.5),
    healthy("frozen/half", half_frozen, "the lower half is frozen on purpose", learns=0.5),
    healthy("frozen/thawing", thawing, "layers begin to train one after the other", learns=0.4),
    healthy("frozen/fine-tuned", fine_tuned, "a rate of 1e-5 on a net that has learnt its task", learns=0.85),
    sick(
        "frozen/low-rank-both-zero",
        adapted(both_zero=True),
        "both matrices of every adapter begin at zero: no gradient ever arrives",
        code="GG104",
        also=("no_update",),
        twin="frozen/low-rank-adam",
        phase="wiring",
        cure="random first matrices",
    ),
    sick(
        "frozen/no-grad-left-over",
        forgotten_flag,
        "torch.no_grad() left around the base: trainable, and without a gradient",
        code="GG104",
        culprit=("lower",),
        twin="frozen/half",
        phase="wiring",
        cure="drop torch.no_grad()",
    ),
    sick(
        "frozen/rate-zero",
        idle,
        "the parameter group of the body has a learning rate of zero",
        code="GG503",
        culprit=("0",),
        twin="frozen/thawing",
        cure="a rate for every group",
    ),
)
