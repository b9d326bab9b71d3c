"""From a network and data to a job: losses, qualities, optimizers, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.clinic.case import Job
from benchmarks.clinic.data import Data, characters, recall, sampler

__all__ = [
    "MakeOptimizer",
    "accuracy",
    "adam",
    "adamw",
    "classify",
    "fit",
    "information",
    "language",
    "reconstruct",
    "remember",
    "sgd",
    "warm_up",
]

MakeOptimizer: TypeAlias = Callable[[Iterable[Any]], Optimizer]


def adam(lr: float = 1e-3, **options: Any) -> MakeOptimizer:
    """Return a maker of Adam."""
    return lambda parameters: Adam(parameters, lr=lr, **options)


def adamw(lr: float = 1e-3, **options: Any) -> MakeOptimizer:
    """Return a maker of AdamW."""
    return lambda parameters: AdamW(parameters, lr=lr, **options)


def sgd(lr: float = 0.01, momentum: float = 0.9, **options: Any) -> MakeOptimizer:
    """Return a maker of SGD."""
    return lambda parameters: SGD(parameters, lr=lr, momentum=momentum, **options)


def warm_up(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    """Return a schedule that raises the learning rate linearly over ``steps`` steps."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def schedule(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / steps)

    return schedule


def _in_evaluation(model: nn.Module, action: Callable[[], float]) -> float:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            value = action()
    finally:
        model.train(training)
    return value if math.isfinite(value) else 0.0


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right classes, 0 to 1."""
    return _in_evaluation(model, lambda: float((model(x).argmax(-1) == y).float().mean()))


def information(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> float:
    """Return the share of ln(classes) that the model knows of the classes: 1 - cross-entropy / ln(classes), -1 to 1.

    Finer than accuracy: a net that ranks rightly and knows little scores low.
    """
    entropy = _in_evaluation(
        model, lambda: 1 - float(F.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())) / math.log(classes)
    )
    return max(-1.0, min(1.0, entropy))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def classify(
    model: nn.Module,
    data: Data,
    optimizer: MakeOptimizer,
    seed: int,
    *,
    steps: int = 240,
    size: int = 64,
    measure: str = "accuracy",
    parameters: Iterable[Any] | None = None,
    **options: Any,
) -> Job:
    """Return a classification job.

    Args:
        model: Gives logits.
        data: What to learn.
        optimizer: Makes the optimizer.
        seed: Of the run; batches depend on it.
        steps: Optimizer steps.
        size: Examples in a batch.
        measure: ``"accuracy"`` or ``"information"``, both held out; ``"known"`` is information on the training data.
        parameters: What the optimizer gets, by default all that is trainable.
        **options: Further fields of :class:`Job`; its loss is the cross-entropy by default.
    """

    def quality(model: nn.Module) -> float:
        if measure == "accuracy":
            return accuracy(model, data.test_x, data.test_y)
        if measure == "known":
            return information(model, data.x, data.y, data.classes)
        return information(model, data.test_x, data.test_y, data.classes)

    return Job(
        model=model,
        optimizers=(optimizer(_trainable(model) if parameters is None else parameters),),
        steps=steps,
        batch=sampler(data, size, seed),
        quality=quality,
        accuracies=lambda model: (
            accuracy(model, data.x[:256], data.y[:256]),
            accuracy(model, data.test_x[:256], data.test_y[:256]),
        ),
        **{"loss": _cross_entropy, **options},
    )


def fit(
    model: nn.Module,
    data: Data,
    optimizer: MakeOptimizer,
    seed: int,
    *,
    steps: int = 240,
    size: int = 64,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    held_out: bool = True,
    **options: Any,
) -> Job:
    """Return a regression job; quality is the share of the variance explained, at least -1. See :func:`classify`."""
    x, y = (data.test_x, data.test_y) if held_out else (data.x, data.y)

    def explained(model: nn.Module) -> float:
        def share() -> float:
            return 1 - float(F.mse_loss(model(x).squeeze(-1).float(), y)) / float(y.var())

        return max(-1.0, _in_evaluation(model, share))

    return Job(
        model=model,
        optimizers=(optimizer(_trainable(model)),),
        steps=steps,
        batch=sampler(data, size, seed),
        loss=lambda model, batch: loss(model(batch[0]).squeeze(-1), batch[1]),
        quality=explained,
        **options,
    )


def reconstruct(
    model: nn.Module,
    data: Data,
    optimizer: MakeOptimizer,
    seed: int,
    *,
    steps: int = 240,
    size: int = 64,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    factor: float = 1.0,
    **options: Any,
) -> Job:
    """Return an autoencoder job; quality is the share of the variance restored, held out. See :func:`classify`."""
    usual = float((data.test_x - data.test_x.mean(0)).square().mean())

    def restored(model: nn.Module) -> float:
        def share() -> float:
            return 1 - float(F.mse_loss(model(data.test_x).float(), data.test_x)) / usual

        return max(-1.0, _in_evaluation(model, share))

    return Job(
        model=model,
        optimizers=(optimizer(_trainable(model)),),
        steps=steps,
        batch=sampler(data, size, seed),
        loss=lambda model, batch: factor * loss(model(batch[0]).float(), batch[0]),
        quality=restored,
        **options,
    )


def language(
    model: nn.Module,
    optimizer: MakeOptimizer,
    seed: int,
    *,
    steps: int = 160,
    size: int = 16,
    length: int = 48,
    parameters: Iterable[Any] | None = None,
    **options: Any,
) -> Job:
    """Return a job of predicting the next character of documentation text; quality is the information held out."""
    train, test, letters = characters()
    starts = torch.arange(0, len(test) - length - 1, length)[:128]
    held_out = torch.stack([test[start : start + length + 1] for start in starts])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        chosen = torch.randint(0, len(train) - length - 1, (size,), generator=generator)
        text = torch.stack([train[start : start + length + 1] for start in chosen.tolist()])
        return text[:, :-1], text[:, 1:]

    return Job(
        model=model,
        optimizers=(optimizer(_trainable(model) if parameters is None else parameters),),
        steps=steps,
        batch=batch,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1).float(), batch[1].flatten()),
        quality=lambda model: information(model, held_out[:, :-1], held_out[:, 1:], letters),
        accuracies=lambda model: (
            accuracy(model, *batch(0)),
            accuracy(model, held_out[:32, :-1], held_out[:32, 1:]),
        ),
        **options,
    )


def remember(
    model: nn.Module,
    optimizer: MakeOptimizer,
    seed: int,
    *,
    length: int,
    steps: int = 300,
    size: int = 64,
    **options: Any,
) -> Job:
    """Return a job of naming the first symbol after ``length`` steps; quality is how far above chance (1/4) it gets."""
    draw = recall(size, length, seed)
    test_x, test_y = recall(512, length, 10_000 + seed)(0)
    return Job(
        model=model,
        optimizers=(optimizer(_trainable(model)),),
        steps=steps,
        batch=draw,
        loss=_cross_entropy,
        quality=lambda model: (accuracy(model, test_x, test_y) - 0.25) / 0.75,
        accuracies=lambda model: (accuracy(model, *draw(0)), accuracy(model, test_x, test_y)),
        **options,
    )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
