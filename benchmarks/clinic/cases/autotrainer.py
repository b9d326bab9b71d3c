"""AUTOTRAINER's evaluation configurations, as peers.md, section 3.5, has them; runs are cut to 300 steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adagrad

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import Data, blobs, circles, digits
from benchmarks.clinic.nets import Activation, Exponential, lenet, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam, classify, sgd

__all__ = ["CASES"]


def narrow(
    data: Callable[[], Data],
    depth: int,
    activation: Activation,
    optimizer: MakeOptimizer,
    *,
    init: str = "xavier",
    size: int = 128,
    steps: int = 300,
    measure: str = "accuracy",
) -> Callable[[int], Job]:
    """Return a builder of AUTOTRAINER's dense nets, five units wide. Keras starts weights by Glorot's rule."""

    def build(seed: int) -> Job:
        points = data()
        model = mlp(2, points.classes, depth, activation, width=5, init=init if init != "small" else "xavier")
        if init == "small":
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    nn.init.uniform_(parameter, -0.05, 0.05)
        return classify(model, points, optimizer, seed, size=size, steps=steps, measure=measure)

    return build


def adagrad(lr: float) -> MakeOptimizer:
    return lambda parameters: Adagrad(parameters, lr=lr)


def small_lenet(optimizer: MakeOptimizer) -> Callable[[int], Job]:
    return lambda seed: classify(lenet(), digits(), optimizer, seed, size=64, steps=200)


def with_exponential(seed: int) -> Job:
    """He uniform weights, and exp(x) as the activation of ten layers."""
    torch.manual_seed(seed)
    model = mlp(2, 3, 10, Exponential, width=5, init="he-uniform")
    return classify(model, blobs(), adam(), seed, size=256, steps=200)


CASES = (
    healthy("autotrainer/blob-tanh-6-adam", narrow(blobs, 6, nn.Tanh, adam(3e-3), size=256), learns=0.7),
    healthy("autotrainer/circle-tanh-8-adam", narrow(circles, 8, nn.Tanh, adam(1e-2)), learns=0.6),
    healthy("autotrainer/blob-tanh-12-adagrad", narrow(blobs, 12, nn.Tanh, adagrad(0.03), size=256), learns=0.6),
    healthy("autotrainer/circle-elu-4-adam", narrow(circles, 4, nn.ELU, adam(1e-2), init="he"), learns=0.75),
    healthy("autotrainer/lenet-adam", small_lenet(adam(2e-3)), learns=0.85),
    sick(
        "autotrainer/blob-sigmoid-9",
        narrow(blobs, 9, nn.Sigmoid, adam(3e-3), size=256),
        "nine sigmoid layers of width 5",
        code="GG101",
        twin="autotrainer/blob-tanh-6-adam",
        phase="initialization",
        cure="SELU or ReLU",
    ),
    sick(
        "autotrainer/circle-sigmoid-14",
        narrow(circles, 14, nn.Sigmoid, adam(1e-2)),
        "fourteen sigmoid layers of width 5",
        code="GG101",
        twin="autotrainer/circle-tanh-8-adam",
        phase="initialization",
        cure="SELU or ReLU",
    ),
    sick(
        "autotrainer/blob-exp-10",
        with_exponential,
        "ten layers with exp(x): the forward pass overflows",
        code="GG202",
        also=("exploding", "divergence"),
        twin="autotrainer/blob-tanh-12-adagrad",
        phase="initialization",
        cure="another activation",
    ),
    sick(
        "autotrainer/circle-dying-relu-18",
        narrow(circles, 18, nn.ReLU, adam(1e-2), init="he-uniform"),
        "eighteen ReLU layers of width 5 die within the first steps, or at once",
        code="GG301",
        also=("no_gradient", "vanishing"),
        twin="autotrainer/circle-elu-4-adam",
        phase="initialization",
        cure="LeakyReLU or SELU",
        margin=0.2,
    ),
    sick(
        "autotrainer/circle-small-uniform-16",
        narrow(circles, 16, nn.ReLU, adam(), init="small"),
        "weights within 0.05 of zero",
        code="GG101",
        also=("dead", "initialization"),
        twin="autotrainer/circle-elu-4-adam",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "autotrainer/lenet-slow",
        small_lenet(sgd(1e-6)),
        "a learning rate of a millionth",
        code="GG502",
        twin="autotrainer/lenet-adam",
        cure="a higher learning rate",
    ),
    sick(
        "autotrainer/blob-oscillating",
        narrow(blobs, 6, nn.Tanh, sgd(0.3), size=1),
        "SGD with momentum on single examples, at a rate that makes the accuracy swing",
        code="GG501",
        also=("divergence", "saturated", "spike"),
        twin="autotrainer/blob-tanh-6-adam",
        cure="Adam, or a larger batch",
    ),
)
