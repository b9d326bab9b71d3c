"""Operations that are not safe at zero, forward or backward, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import Data, breast_cancer, digits, wine
from benchmarks.clinic.nets import mlp
from benchmarks.clinic.tasks import adam, classify, sgd

__all__ = ["CASES"]


class Logarithm(nn.Module):
    """x log x of what a ReLU gives: 0 times -inf where ``safe`` is off."""

    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.floor = 1e-6 if safe else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return x log x."""
        return x * (x + self.floor).log()


class Length(nn.Module):
    """Adds the length of the features: the root of a sum of squares, with an infinite slope at zero."""

    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.floor = 1e-12 if safe else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the features and their distance from those of the next example."""
        other = x.flip(0)
        distance = ((x - other).square().sum(1, keepdim=True) + self.floor).sqrt()
        return torch.cat([x, distance], dim=1)


class Chosen(nn.Module):
    """Root of positive entries, 0 of others: ``where`` hides a NaN forward and lets it pass backward."""

    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.safe = safe

    def forward(self, x: Tensor) -> Tensor:
        """Return the root where there is one."""
        inner = x.clamp(min=1e-3) if self.safe else x
        return torch.where(x > 1e-3, inner.sqrt(), torch.zeros_like(x))


class Standardize(nn.Module):
    """Divides each feature by its spread over the batch, which is zero for a feature that never varies."""

    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.floor = 1e-3 if safe else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return features of mean 0 and spread 1."""
        return (x - x.mean(0)) / (x.std(0, unbiased=False) + self.floor)


def with_module(make: Callable[..., nn.Module], *, safe: bool) -> Callable[[int], Job]:
    """Return a builder of a net on digits with a module in the middle; ``safe`` tells whether it bears zeros."""

    def build(seed: int) -> Job:
        model = nn.Sequential()
        model.add_module("first", nn.Linear(64, 48))
        model.add_module("relu", nn.ReLU())
        model.add_module("second", nn.Linear(48, 48))
        model.add_module("relu2", nn.Identity() if make is Chosen else nn.ReLU())
        model.add_module("op", make(safe=safe))
        wide = 49 if make is Length else 48
        model.add_module("third", nn.Linear(wide, 10))
        job = classify(model, digits(), adam(2e-3), seed, size=64)
        if make is Length:
            draw = job.batch
            job.batch = lambda step: paired(draw(step))
        return job

    return build


def paired(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Make the two examples in the middle of a batch the same, as duplicates in a data set do."""
    x, y = (part.clone() for part in batch)
    middle = len(x) // 2
    x[middle], y[middle] = x[middle - 1], y[middle - 1]
    return x, y


def standardized(*, safe: bool) -> Callable[[int], Job]:
    """Return a builder that standardizes pixels by batch; some pixels of digits are always empty."""

    def build(seed: int) -> Job:
        model = nn.Sequential()
        model.add_module("scale", Standardize(safe=safe))
        model.add_module("body", mlp(64, 10, 4, nn.GELU))
        return classify(model, digits(), adam(2e-3), seed)

    return build


def on_cancer(seed: int) -> Job:
    return classify(mlp(30, 2, 4, nn.Tanh, width=32), breast_cancer(), sgd(0.05), seed, size=32)


def on_cancer_adam(seed: int) -> Job:
    return classify(mlp(30, 2, 3, width=32), breast_cancer(), adam(), seed, size=32)


def corrupt(make: Callable[[int], Job], at: int) -> Callable[[int], Job]:
    """Return a builder in which one weight turns non-finite: in the checkpoint (step 0) or during the run."""

    def build(seed: int) -> Job:
        job = make(seed)
        weight = job.model.get_parameter("2.weight")

        def spoil(step: int) -> None:
            if step == at:
                with torch.no_grad():
                    weight[3, 5] = float("nan") if at == 0 else float("inf")

        spoil(0)
        job.before_step = spoil
        return job

    return build


def ignored_targets(seed: int) -> Job:
    """Every target of one batch is to be ignored: the mean over nothing is NaN."""
    job = classify(mlp(13, 3, 3, width=32), wine(), adam(), seed, size=32)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(model(batch[0]), batch[1].clamp(min=0), reduction="none")
        counted = batch[1] >= 0
        return (each * counted).sum() / counted.sum()

    job.loss = loss
    draw = job.batch

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x, y = draw(step)
        return x, torch.full_like(y, -100) if step == 60 else y

    job.batch = batch
    return job


def missing_values(*, at: int, value: float, data: Callable[[], Data] = breast_cancer) -> Callable[[int], Job]:
    """Return a builder whose batches hold a NaN or an infinity from a step on, as a table with gaps does."""

    def build(seed: int) -> Job:
        points = data()
        features, classes = points.x.shape[1], points.classes
        job = classify(mlp(features, classes, 3, width=32), points, adam(), seed, size=32)
        draw = job.batch

        def batch(step: int) -> tuple[Tensor, Tensor]:
            x, y = draw(step)
            if step >= at:
                x = x.clone()
                x[0, 4] = value
            return x, y

        job.batch = batch
        return job

    return build


CASES = (
    healthy("non_finite/logarithm-safe", with_module(Logarithm, safe=True), "log near zero", learns=0.85),
    healthy("non_finite/length-safe", with_module(Length, safe=True), "a root near zero", learns=0.85),
    healthy("non_finite/chosen-safe", with_module(Chosen, safe=True), "where() around a root", learns=0.85),
    healthy("non_finite/standardize-safe", standardized(safe=True), "features without spread", learns=0.85),
    healthy("non_finite/tanh-breast-cancer-sgd", on_cancer, learns=0.85),
    healthy(
        "non_finite/relu-wine-adam",
        lambda seed: classify(mlp(13, 3, 3, width=32), wine(), adam(), seed, size=32),
        learns=0.85,
    ),
    healthy("non_finite/relu-breast-cancer-adam", on_cancer_adam, learns=0.85),
    sick(
        "non_finite/logarithm-of-zero",
        with_module(Logarithm, safe=False),
        "x log x at zero, forward",
        code="GG202",
        culprit=("op",),
        twin="non_finite/logarithm-safe",
        phase="wiring",
        cure="add a small number, or torch.xlogy",
    ),
    sick(
        "non_finite/root-of-zero",
        with_module(Length, safe=False),
        "the root of a squared distance of zero, backward",
        code="GG203",
        culprit=("op",),
        twin="non_finite/length-safe",
        phase="wiring",
        cure="add a small number under the root",
    ),
    sick(
        "non_finite/hidden-by-where",
        with_module(Chosen, safe=False),
        "where() hides the root of zero forward, not backward",
        code="GG203",
        culprit=("op",),
        twin="non_finite/chosen-safe",
        phase="wiring",
        cure="clamp before the root",
    ),
    sick(
        "non_finite/division-by-zero",
        standardized(safe=False),
        "a feature without spread is divided by zero, forward",
        code="GG202",
        also=("non_finite",),
        culprit=("scale", "body.0"),
        twin="non_finite/standardize-safe",
        phase="wiring",
        cure="add a small number to the spread",
    ),
    sick(
        "non_finite/corrupt-checkpoint",
        corrupt(on_cancer, 0),
        "one weight is NaN from the start",
        code="GG204",
        culprit=("2",),
        twin="non_finite/tanh-breast-cancer-sgd",
        phase="initialization",
        cure="another checkpoint",
    ),
    sick(
        "non_finite/corrupted-on-the-way",
        corrupt(on_cancer_adam, 70),
        "one weight turns infinite at step 70",
        code="GG204",
        culprit=("2",),
        twin="non_finite/relu-breast-cancer-adam",
        onset=70,
        cure="resume from before",
    ),
    sick(
        "non_finite/all-targets-ignored",
        ignored_targets,
        "a batch in which every target is ignored: the mean over nothing",
        code="GG202",
        twin="non_finite/relu-wine-adam",
        onset=60,
        cure="skip such batches",
    ),
    sick(
        "non_finite/nan-in-data-from-start",
        missing_values(at=0, value=float("nan"), data=wine),
        "a NaN in every batch",
        code="GG201",
        culprit=("0",),
        twin="non_finite/relu-wine-adam",
        phase="wiring",
        cure="clean the data",
    ),
    sick(
        "non_finite/nan-in-data-later",
        missing_values(at=80, value=float("nan")),
        "a NaN in the batches from step 80 on",
        code="GG201",
        culprit=("0",),
        twin="non_finite/relu-breast-cancer-adam",
        onset=80,
        cure="clean the data",
    ),
    sick(
        "non_finite/infinity-in-data",
        missing_values(at=30, value=float("inf")),
        "an infinity in the batches from step 30 on",
        code="GG201",
        culprit=("0",),
        twin="non_finite/relu-breast-cancer-adam",
        onset=30,
        cure="clean the data",
    ),
)
