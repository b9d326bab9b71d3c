"""Convolutional nets with and without normalization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import digits
from benchmarks.clinic.nets import ConvNet, PlainConv
from benchmarks.clinic.tasks import MakeOptimizer, adam, classify, sgd

__all__ = ["CASES"]

GroupNorm = partial(nn.GroupNorm, 4)


def plain(
    depth: int,
    optimizer: MakeOptimizer,
    *,
    init: str = "default",
    norm: Callable[[int], nn.Module] | None = None,
    measure: str = "accuracy",
    **options: Any,
) -> Callable[[int], Job]:
    """Return a builder of a plain stack of convolutions on digits."""
    return lambda seed: classify(
        PlainConv(depth, init=init, norm=norm, **options),
        digits(),
        optimizer,
        seed,
        size=32,
        steps=160,
        measure=measure,
    )


def dead_layer(seed: int) -> Job:
    model = PlainConv(6, init="he")
    bias = model.convs[3].bias
    if isinstance(bias, torch.Tensor):
        nn.init.constant_(bias, -50.0)
    return classify(model, digits(), adam(), seed, size=32, steps=160)


def cut(seed: int) -> Job:
    return plain(8, sgd(0.02), init="he", norm=nn.BatchNorm2d, width=3, cut_before=7, measure="known")(seed)


def residual(norm: Callable[[int], nn.Module] | None, optimizer: MakeOptimizer) -> Callable[[int], Job]:
    return lambda seed: classify(ConvNet(3, norm=norm), digits(), optimizer, seed, size=32, steps=160)


CASES = (
    healthy("conv/plain-6-adam", plain(6, adam(), init="he"), learns=0.9),
    healthy("conv/plain-he-12-sgd", plain(12, sgd(0.005), init="he"), learns=0.7),
    healthy(
        "conv/batchnorm-8-sgd",
        plain(8, sgd(0.02), init="he", norm=nn.BatchNorm2d, width=3, measure="known"),
        learns=0.5,
    ),
    healthy("conv/groupnorm-8-adam", plain(8, adam(), init="he", norm=GroupNorm), learns=0.9),
    healthy("conv/resnet-batchnorm-sgd", residual(nn.BatchNorm2d, sgd(0.05)), "in-place ReLUs", learns=0.85),
    healthy("conv/resnet-no-norm-adam", residual(None, adam(3e-3)), learns=0.5),
    sick(
        "conv/plain-default-12-sgd",
        plain(12, sgd(0.005)),
        "torch's default initialization, too small for twelve ReLU layers",
        code="GG101",
        also=("initialization",),
        twin="conv/plain-he-12-sgd",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "conv/dead-layer",
        dead_layer,
        "a bias of -50 keeps every unit of the fourth convolution at zero",
        code="GG301",
        culprit=("convs.3", "convs.4"),
        twin="conv/plain-6-adam",
        phase="initialization",
        cure="initialise that bias at zero",
    ),
    sick(
        "conv/cut-by-data",
        cut,
        "x.data in the middle: the first seven convolutions get no gradient",
        code="GG104",
        culprit=("convs.6", "norms.6", "convs.7"),
        twin="conv/batchnorm-8-sgd",
        phase="wiring",
        cure="x.data becomes x",
    ),
)
