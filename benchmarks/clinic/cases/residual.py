"""Residual perceptrons: without norm, with Layer and Batch normalization, ReZero, LayerScale, stochastic depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import digits
from benchmarks.clinic.nets import ResidualMLP
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, classify, sgd

__all__ = ["CASES"]


def residual(
    blocks: int, optimizer: MakeOptimizer, *, steps: int = 200, measure: str = "accuracy", **options: Any
) -> Callable[[int], Job]:
    """Return a builder of a residual perceptron on digits."""
    return lambda seed: classify(
        ResidualMLP(blocks, **options), digits(), optimizer, seed, steps=steps, measure=measure
    )


CASES = (
    healthy("residual/no-norm-12-sgd", residual(12, sgd(0.01)), learns=0.85),
    healthy("residual/no-norm-24-adam", residual(24, adam(5e-4)), learns=0.85),
    healthy(
        "residual/layernorm-12-sgd",
        residual(12, sgd(0.01), norm=nn.LayerNorm, width=24, measure="known"),
        learns=0.85,
    ),
    healthy("residual/batchnorm-10-adam", residual(10, adam(), norm=nn.BatchNorm1d), learns=0.85),
    healthy(
        "residual/rezero-12-adam",
        residual(12, adam(3e-3), scale=0.0),
        "branches begin at exactly zero: their gradients are zeros between live layers",
        learns=0.85,
    ),
    healthy(
        "residual/layerscale-12-adamw",
        residual(12, adamw(3e-3), scale=1e-6, norm=nn.LayerNorm),
        "branches begin a million times smaller: their gradients lie six decades below the stream's",
        learns=0.85,
    ),
    healthy(
        "residual/zero-last-12-sgd",
        residual(12, sgd(0.02), zero_last=True, norm=nn.LayerNorm),
        "the last layer of every branch begins at zero",
        learns=0.8,
    ),
    healthy(
        "residual/stochastic-depth-12-adam",
        residual(12, adam(), norm=nn.LayerNorm, drop_path=0.3),
        "three branches in ten take no part in a step",
        learns=0.85,
    ),
    sick(
        "residual/large-branches-24-adam",
        residual(24, adam(5e-4), branch_gain=3.0),
        "branches without norm of three times their input: the stream grows by ten at every other block",
        code="GG102",
        also=("initialization", "learning_rate", "non_finite"),
        twin="residual/no-norm-24-adam",
        phase="initialization",
        cure="branches of gain 1/sqrt(blocks), or LayerNorm",
    ),
    sick(
        "residual/cut-in-the-middle",
        residual(12, sgd(0.01), norm=nn.LayerNorm, width=24, measure="known", cut_before=11),
        "x.detach() in front of the last block: what lies before gets no gradient",
        code="GG104",
        culprit=("blocks.10", "blocks.11"),
        twin="residual/layernorm-12-sgd",
        phase="wiring",
        cure="drop the detach()",
        margin=0.1,
    ),
    sick(
        "residual/rate-too-high",
        residual(12, sgd(2.0)),
        "a learning rate two hundred times too high",
        code="GG501",
        also=("divergence", "non_finite"),
        twin="residual/no-norm-12-sgd",
        cure="a lower learning rate",
    ),
    sick(
        "residual/rate-too-low",
        residual(10, adam(1e-8), norm=nn.BatchNorm1d),
        "a learning rate of 1e-8",
        code="GG502",
        twin="residual/batchnorm-10-adam",
        cure="a higher learning rate",
    ),
)
