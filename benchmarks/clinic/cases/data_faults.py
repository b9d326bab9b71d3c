"""Faults that come with the data: outlier batches, mislabelled scales, inputs that were never standardised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import breast_cancer, diabetes, digits, wine
from benchmarks.clinic.nets import Activation, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam, classify, fit, sgd

__all__ = ["CASES"]

Pair = tuple[Tensor, Tensor]


def spoiled(make: Callable[[int], Job], at: int, spoil: Callable[[Pair], Pair]) -> Callable[[int], Job]:
    """Return a builder in which one batch is changed."""

    def build(seed: int) -> Job:
        job = make(seed)
        draw = job.batch
        job.batch = lambda step: spoil(draw(step)) if step == at else draw(step)
        return job

    return build


def garbage(size: float, rows: int) -> Callable[[Pair], Pair]:
    """Return a change that puts large noise in place of the inputs of some rows."""

    def change(batch: Pair) -> Pair:
        x = batch[0].clone()
        x[:rows] = size * torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(0))
        return x, batch[1]

    return change


def large_target(value: float) -> Callable[[Pair], Pair]:
    """Return a change that gives one row a target far out."""

    def change(batch: Pair) -> Pair:
        y = batch[1].clone()
        y[0] = value
        return batch[0], y

    return change


def table(
    activation: Activation, optimizer: MakeOptimizer, *, scaled: bool, depth: int = 3, init: str = "default"
) -> Callable[[int], Job]:
    return lambda seed: classify(
        mlp(13, 3, depth, activation, width=32, init=init), wine(scaled=scaled), optimizer, seed, size=32
    )


def shifted(offset: float) -> Callable[[int], Job]:
    """Return a builder whose inputs are shifted as a whole, as pixels are that nobody centred."""

    def build(seed: int) -> Job:
        job = classify(mlp(30, 2, 4, width=32), breast_cancer(), sgd(0.02), seed, size=32)
        if offset:
            draw = job.batch
            job.batch = lambda step: (draw(step)[0] + offset, draw(step)[1])
            usual = job.quality
            job.quality = lambda model: usual(Shifted(model, offset))
            job.accuracies = None
        return job

    return build


class Shifted(nn.Module):
    """A model that is given shifted inputs."""

    def __init__(self, model: nn.Module, offset: float) -> None:
        super().__init__()
        self.model, self.offset = model, offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output on what it was trained for."""
        result: Tensor = self.model(x + self.offset)
        return result


def classifier(seed: int) -> Job:
    return classify(mlp(64, 10, 4, init="he"), digits(), sgd(0.02), seed, steps=200)


def regression(seed: int) -> Job:
    return fit(mlp(10, 1, 4, width=32, init="he"), diabetes(), sgd(0.01), seed, steps=200, held_out=False)


def saturating(seed: int) -> Job:
    """A bias far from zero holds one sigmoid layer at its end."""
    model = mlp(13, 3, 4, nn.Sigmoid, width=32, init="xavier")
    layer = model[2]
    if isinstance(layer, nn.Linear):
        nn.init.constant_(layer.bias, 40.0)
    return classify(model, wine(), adam(1e-2), seed, size=32)


CASES = (
    healthy("data/relu-digits-sgd", classifier, learns=0.85),
    healthy("data/relu-diabetes-sgd", regression, learns=0.4),
    healthy("data/tanh-wine-sgd", table(nn.Tanh, sgd(0.02), scaled=True), learns=0.85),
    healthy("data/sigmoid-wine-adam", table(nn.Sigmoid, adam(1e-2), scaled=True, depth=4, init="xavier"), learns=0.85),
    healthy("data/relu-breast-cancer-sgd", shifted(0.0), learns=0.85),
    sick(
        "data/outlier-batch",
        spoiled(classifier, 150, garbage(3000.0, 4)),
        "four examples of one batch are noise, 3000 times too large",
        code="GG103",
        also=("exploding", "divergence"),
        twin="data/relu-digits-sgd",
        onset=150,
        cure="clip, or leave the batch out",
    ),
    sick(
        "data/outlier-target",
        spoiled(regression, 120, large_target(3e4)),
        "one target of one batch is 30000",
        code="GG103",
        also=("exploding", "divergence"),
        twin="data/relu-diabetes-sgd",
        onset=120,
        cure="clip, or a robust loss",
    ),
    sick(
        "data/never-standardised-tanh",
        table(nn.Tanh, sgd(0.02), scaled=False),
        "features up to 1680 drive tanh units to their ends",
        code="GG302",
        also=("vanishing",),
        culprit=("1", "0"),
        twin="data/tanh-wine-sgd",
        phase="initialization",
        cure="standardise the features",
    ),
    sick(
        "data/saturated-layer",
        saturating,
        "a bias of 40 holds a sigmoid layer at its end",
        code="GG302",
        also=("vanishing", "no_gradient"),
        culprit=("3", "2"),
        twin="data/sigmoid-wine-adam",
        phase="initialization",
        cure="initialise that bias at zero",
    ),
    sick(
        "data/shifted-inputs",
        shifted(300.0),
        "inputs around 300 instead of 0: the first updates kill the ReLU units",
        code="GG301",
        also=("learning_rate", "exploding", "divergence"),
        twin="data/relu-breast-cancer-sgd",
        cure="centre the inputs",
    ),
)
