"""Half precision: gradients that underflow, updates that rounding swallows, loss scales that collapse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import digits
from benchmarks.clinic.nets import autoencoder, mlp
from benchmarks.clinic.nets_sequence import DigitTransformer
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, classify, reconstruct, sgd

__all__ = ["CASES"]


def scaler(**options: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)  # type: ignore[arg-type]  # options are floats and one int


def coded(*, scaled: bool) -> Callable[[int], Job]:
    """Return a builder of an autoencoder under fp16 autocast whose loss carries a small weight."""

    def build(seed: int) -> Job:
        model = autoencoder(nn.Tanh, depth=3)
        job = reconstruct(model, digits(), adam(3e-3), seed, factor=1e-5, size=64, steps=160)
        job.autocast = torch.float16
        job.scaler = scaler(init_scale=2.0**24) if scaled else None
        return job

    return build


def halves(*, scaled: bool) -> Callable[[int], Job]:
    """Return a builder of a perceptron under fp16 autocast, by SGD."""

    def build(seed: int) -> Job:
        model = mlp(64, 10, 8, nn.Tanh, init="xavier")
        job = classify(model, digits(), sgd(2e4, momentum=0.9), seed, size=64, steps=160)
        job.loss = lambda model, batch: 1e-6 * F.cross_entropy(model(batch[0]).float(), batch[1])
        job.autocast = torch.float16
        job.scaler = scaler(init_scale=2.0**30) if scaled else None
        return job

    return build


def in_type(
    make: Callable[[], nn.Module], dtype: torch.dtype, optimizer: MakeOptimizer, *, measure: str = "known"
) -> Callable[[int], Job]:
    """Return a builder of a net whose parameters are of a type themselves."""

    def build(seed: int) -> Job:
        model = make().to(dtype)
        job = classify(model, digits(), optimizer, seed, size=64, steps=240, measure=measure)
        job.loss = lambda model, batch: F.cross_entropy(model(batch[0].to(dtype)).float(), batch[1])
        usual = job.quality
        job.quality = lambda model: usual(Cast(model, dtype))
        job.accuracies = None
        return job

    return build


class Cast(nn.Module):
    """A model that is given inputs of its own type."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output in single precision."""
        result: Tensor = self.model(x.to(self.dtype))
        return result.float()


def overflowing(*, sick: bool) -> Callable[[int], Job]:
    """Return a builder under fp16 autocast in which sums of squares overflow (sick) or means are taken."""

    def build(seed: int) -> Job:
        model = mlp(64, 10, 4, init="he")
        job = classify(model, digits(), adam(2e-3), seed, size=64, steps=160)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            logits = model(batch[0])
            penalty: Tensor = (100 * logits).square().sum() if sick else logits.square().mean().float()
            return F.cross_entropy(logits.float(), batch[1]) + 1e-4 * penalty

        job.loss = loss
        job.autocast = torch.float16
        job.scaler = scaler()
        return job

    return build


def greedy(*, sick: bool) -> Callable[[int], Job]:
    """Return a builder whose loss scale grows at every clean step: nearly every other step overflows."""

    def build(seed: int) -> Job:
        model = DigitTransformer(3)
        job = classify(model, digits(), adamw(1e-3), seed, size=32, steps=160)
        job.autocast = torch.float16
        job.scaler = scaler(growth_factor=2.0**12, growth_interval=1) if sick else scaler()
        return job

    return build


def deep() -> nn.Module:
    return mlp(64, 10, 5, nn.Tanh, init="xavier")


CASES = (
    healthy("precision/fp16-scaled-autoencoder", coded(scaled=True), "a loss scaler that fits", learns=0.3),
    healthy("precision/fp16-scaled-sgd", halves(scaled=True), "a loss scaler that fits", learns=0.8),
    healthy("precision/fp16-autocast-adam", overflowing(sick=False), "the usual loss scaler", learns=0.85),
    healthy("precision/fp16-transformer", greedy(sick=False), "the usual loss scaler", learns=0.75),
    healthy(
        "precision/bf16-autocast-adamw",
        lambda seed: classify(
            mlp(64, 10, 6, nn.GELU, init="he"), digits(), adamw(), seed, steps=160, autocast=torch.bfloat16
        ),
        "bf16 autocast over fp32 weights",
        learns=0.85,
    ),
    healthy("precision/fp32-small-rate-adam", in_type(deep, torch.float32, adam(2e-4)), learns=0.5),
    healthy(
        "precision/fp32-relu-sgd", in_type(lambda: mlp(64, 10, 4, init="he"), torch.float32, sgd(1e-3)), learns=0.5
    ),
    sick(
        "precision/fp16-underflow-autoencoder",
        coded(scaled=False),
        "gradients of 1e-8 under fp16 autocast, without a loss scaler",
        code="GG211",
        also=("no_gradient", "vanishing", "no_update", "learning_rate"),
        twin="precision/fp16-scaled-autoencoder",
        phase="initialization",
        cure="a loss scaler",
    ),
    sick(
        "precision/fp16-underflow-sgd",
        halves(scaled=False),
        "gradients of 1e-8 under fp16 autocast, without a loss scaler",
        code="GG211",
        also=("no_gradient", "vanishing", "no_update", "learning_rate"),
        twin="precision/fp16-scaled-sgd",
        phase="initialization",
        cure="a loss scaler",
    ),
    sick(
        "precision/bf16-lost-updates-adam",
        in_type(deep, torch.bfloat16, adam(2e-4)),
        "bf16 weights: an update of 0.0002 is less than half a unit in the last place",
        code="GG212",
        also=("no_update",),
        twin="precision/fp32-small-rate-adam",
        cure="fp32 weights, or stochastic rounding",
    ),
    sick(
        "precision/bf16-lost-updates-sgd",
        in_type(lambda: mlp(64, 10, 4, init="he"), torch.bfloat16, sgd(1e-3)),
        "bf16 weights and a small rate: rounding swallows the updates",
        code="GG212",
        also=("no_update",),
        twin="precision/fp32-relu-sgd",
        cure="fp32 weights, or stochastic rounding",
    ),
    sick(
        "precision/loss-scale-collapse",
        overflowing(sick=True),
        "a sum of squares overflows in fp16 at every step: the scaler skips them all",
        code="GG213",
        also=("non_finite",),
        twin="precision/fp16-autocast-adam",
        cure="take the mean, or compute it in fp32",
    ),
    sick(
        "precision/loss-scale-overgrown",
        greedy(sick=True),
        "the loss scale grows 4096-fold at every clean step: most steps overflow and are skipped",
        code="GG213",
        also=("non_finite",),
        twin="precision/fp16-transformer",
        cure="the usual growth of 2 in 2000 steps",
    ),
)
