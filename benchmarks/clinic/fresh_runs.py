"""Runs of the fresh networks: their data, losses, schedules, and what goes wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.clinic import data, tasks
from benchmarks.clinic.case import Job
from benchmarks.clinic.data import Data

__all__ = [
    "Fault",
    "Make",
    "apart",
    "both",
    "both_tasks",
    "by",
    "finished",
    "glitched",
    "images",
    "multiply",
    "numbers",
    "pixels",
    "redraw",
    "set_to",
    "siamese",
    "spoilt",
    "table",
    "variational",
]

Fault: TypeAlias = Callable[[nn.Module], None]
Make: TypeAlias = Callable[[], nn.Module]


def by(kind: Callable[..., Optimizer], lr: float, **options: Any) -> tasks.MakeOptimizer:
    """Return a maker of an optimizer."""
    return lambda parameters: kind(parameters, lr=lr, **options)


def both(*faults: Fault) -> Fault:
    """Return a fault made of several."""

    def spoil(model: nn.Module) -> None:
        for fault in faults:
            fault(model)

    return spoil


def _chosen(model: nn.Module, part: str, kinds: tuple[type[nn.Module], ...], name: str) -> Iterable[Tensor]:
    for path, module in model.named_modules():
        if part in path and (not kinds or isinstance(module, kinds)):
            for own, parameter in module.named_parameters(recurse=False):
                if name in own:
                    yield parameter


def multiply(factor: float, part: str = "", *kinds: type[nn.Module], name: str = "weight") -> Fault:
    """Return a fault: parameters times a factor, of the modules with ``part`` in their path and of some kinds."""

    def spoil(model: nn.Module) -> None:
        for parameter in _chosen(model, part, kinds, name):
            parameter.mul_(factor)

    return spoil


def set_to(value: float, part: str = "", *kinds: type[nn.Module], name: str = "bias") -> Fault:
    """Return a fault: parameters set to a value; see :func:`multiply`."""

    def spoil(model: nn.Module) -> None:
        for parameter in _chosen(model, part, kinds, name):
            parameter.fill_(value)

    return spoil


def redraw(init: Callable[[Tensor], Any], part: str = "", *kinds: type[nn.Module], name: str = "weight") -> Fault:
    """Return a fault, or the opposite: parameters drawn anew; see :func:`multiply`."""

    def spoil(model: nn.Module) -> None:
        for parameter in _chosen(model, part, kinds, name):
            init(parameter)

    return spoil


def _cosine(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    peaks = [group["lr"] for group in optimizer.param_groups]

    def schedule(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    return schedule


def _one_cycle(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    peaks = [group["lr"] for group in optimizer.param_groups]

    def schedule(step: int) -> None:
        share = step / steps
        height = 0.04 + 0.96 * share / 0.3 if share < 0.3 else (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * max(height, 1e-3)

    return schedule


_SCHEDULES = {"cosine": _cosine, "one-cycle": _one_cycle}


def spoilt(net: Make, start: Fault | None, fault: Fault | None) -> nn.Module:
    """Return a net, as it should start (``start``) and then spoilt."""
    model = net()
    with torch.no_grad():
        for change in (start, fault):
            if change is not None:
                change(model)
    return model


def finished(job: Job, *, schedule: str = "", rates: tuple[tuple[str, float], ...] = (), accumulate: int = 1) -> Job:
    """Return a run with parameter groups of their own learning rates, a schedule, and summed batches."""
    (optimizer,) = job.optimizers
    rest = optimizer.param_groups[0]
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    for part, factor in rates:
        apart = [p for p in rest["params"] if part in names[id(p)]]
        rest["params"] = [p for p in rest["params"] if part not in names[id(p)]]
        optimizer.add_param_group({**rest, "params": apart, "lr": rest["lr"] * factor})
    if schedule:
        job.before_step = _SCHEDULES[schedule](optimizer, job.steps)
    job.accumulate = accumulate
    return job


Options: TypeAlias = dict[str, Any]


def apart(options: Options) -> tuple[Options, Options]:
    """Return the options of :func:`finished`, and the others."""
    mine: Options = {key: options[key] for key in ("schedule", "rates", "accumulate") if key in options}
    return mine, {key: value for key, value in options.items() if key not in mine}


def images(
    seed: int,
    *,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    smoothing: float = 0.0,
    raw: tuple[float, float] = (1.0, 0.0),
    dim: tuple[int, float] = (0, 1.0),
    **options: Any,
) -> Job:
    """Return a run on digits; ``raw`` scales and shifts the pixels, ``dim`` darkens the first batches."""
    mine, rest = apart({"steps": 200, **options})
    model = spoilt(net, start, fault)
    known = data.digits()
    known = replace(known, x=known.x * raw[0] + raw[1], test_x=known.test_x * raw[0] + raw[1])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    job = tasks.classify(model, known, optimizer, seed, loss=loss, **rest)
    if dim[0]:
        draw = job.batch

        def batch(step: int) -> tuple[Tensor, Tensor]:
            x, y = draw(step)
            return (x * dim[1] if step < dim[0] else x), y

        job.batch = batch
    return finished(job, **mine)


@cache
def _columns(*, scaled: bool) -> Data:
    """Return the wines: three columns as whole numbers of 0 to 7, ten as measured."""
    full, raw = data.wine(), data.wine(scaled=False)

    def join(whole: Tensor, measured: Tensor) -> Tensor:
        return torch.cat([(whole[:, :3] * 2 + 4).clamp(0, 7).floor(), measured[:, 3:]], 1)

    kept = full if scaled else raw
    return replace(full, x=join(full.x, kept.x), test_x=join(full.test_x, kept.test_x))


@cache
def _spirals() -> Data:
    """Return two arms of a spiral in the plane."""
    generator = torch.Generator().manual_seed(5)
    turn = torch.rand(1200, generator=generator).sqrt() * 2.2 * math.pi
    y = torch.arange(1200) % 2
    x = torch.stack([turn * (turn + math.pi * y).cos(), turn * (turn + math.pi * y).sin()], 1) / 4
    x = x + 0.06 * torch.randn(1200, 2, generator=generator)
    return Data(x=x[:900], y=y[:900], test_x=x[900:], test_y=y[900:], classes=2)


_TABLES: dict[str, Callable[[], Data]] = {
    "wine": data.wine,
    "cancer": data.breast_cancer,
    "raw cancer": lambda: data.breast_cancer(scaled=False),
    "columns": lambda: _columns(scaled=True),
    "raw columns": lambda: _columns(scaled=False),
    "spirals": _spirals,
}


def table(
    seed: int,
    *,
    task: str,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    **options: Any,
) -> Job:
    """Return a run on rows with classes."""
    mine, rest = apart({"steps": 200, "size": 32, **options})
    rest.setdefault("measure", "information")
    return finished(tasks.classify(spoilt(net, start, fault), _TABLES[task](), optimizer, seed, **rest), **mine)


@cache
def _friedman() -> Data:
    from sklearn.datasets import make_friedman1

    x, y = (torch.tensor(part, dtype=torch.float32) for part in make_friedman1(1200, 8, noise=0.3, random_state=0))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return Data(x=x[:900], y=y[:900], test_x=x[900:], test_y=y[900:])


@cache
def _surface() -> Data:
    """Return places on a sheet and how high it is there."""
    x = torch.rand(1500, 2, generator=torch.Generator().manual_seed(3)) * 2 - 1
    y = torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1]) + 0.5 * x[:, 0] * x[:, 1]
    y = y / y.std()
    return Data(x=x[:1200], y=y[:1200], test_x=x[1200:], test_y=y[1200:])


_VALUES = {"friedman": _friedman, "surface": _surface, "diabetes": data.diabetes}


def numbers(
    seed: int,
    *,
    task: str,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    raw: tuple[float, float] = (1.0, 0.0),
    **options: Any,
) -> Job:
    """Return a regression; ``raw`` scales and shifts the inputs."""
    mine, rest = apart({"steps": 250, **options})
    known = _VALUES[task]()
    known = replace(known, x=known.x * raw[0] + raw[1], test_x=known.test_x * raw[0] + raw[1])
    return finished(tasks.fit(spoilt(net, start, fault), known, optimizer, seed, **rest), **mine)


def pixels(
    seed: int,
    *,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    noise: float = 0.0,
    **options: Any,
) -> Job:
    """Return a run that restores digits, from noisy ones if wanted."""
    mine, rest = apart({"steps": 200, **options})
    known = data.digits()
    if noise:
        generator = torch.Generator().manual_seed(11)
        x, test_x = (part + noise * torch.randn(part.shape, generator=generator) for part in (known.x, known.test_x))
        known = Data(x=x, y=known.x, test_x=test_x, test_y=known.test_x)
        return finished(tasks.fit(spoilt(net, start, fault), known, optimizer, seed, **rest), **mine)
    return finished(tasks.reconstruct(spoilt(net, start, fault), known, optimizer, seed, **rest), **mine)


def _scored(job: Job, score: Callable[[Any, Data], float], known: Data) -> Job:
    """Return a run with a quality of its own, taken on held-out data in evaluation mode."""

    def quality(model: nn.Module) -> float:
        training = model.training
        model.eval()
        with torch.no_grad():
            value = score(model(known.test_x), known)
        model.train(training)
        return max(-1.0, value) if math.isfinite(value) else 0.0

    job.quality, job.accuracies = quality, None
    return job


def variational(seed: int, *, beta: float = 0.002, **options: Any) -> Job:
    """Return the run of a variational autoencoder."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        restored, mean, logvar = model(batch[0])
        surprise = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
        total: Tensor = F.mse_loss(restored, batch[0]) + beta * surprise
        return total

    known = data.digits()
    usual = float((known.test_x - known.test_x.mean(0)).square().mean())
    job = images(seed, **options)
    job.loss = loss
    return _scored(job, lambda given, known: 1 - float(F.mse_loss(given[0], known.test_x)) / usual, known)


def both_tasks(seed: int, **options: Any) -> Job:
    """Return the run of a net with three heads."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        given = model(x)
        total = F.cross_entropy(given["number"], y)
        total = total + 0.3 * F.binary_cross_entropy_with_logits(given["odd"], (y % 2).float())
        return total + 0.3 * F.huber_loss(given["ink"], 4 * x.mean(1))

    job = images(seed, **options)
    job.loss = loss
    return _scored(
        job, lambda given, known: float((given["number"].argmax(1) == known.test_y).float().mean()), data.digits()
    )


def siamese(seed: int, *, net: Make, optimizer: tasks.MakeOptimizer, fault: Fault | None = None, **options: Any) -> Job:
    """Return a run that tells whether two digits are the same number; quality is how far above chance it is right."""
    mine, rest = apart({"steps": 300, **options})
    generator = torch.Generator().manual_seed(7)
    known = data.digits()

    def pair(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
        left = torch.randint(0, len(x), (count,), generator=generator)
        mates = torch.stack([(y == number).float() for number in range(10)])[y[left]]
        same = torch.arange(count) % 2 == 0
        right = torch.multinomial(torch.where(same[:, None], mates, 1 - mates), 1, generator=generator)[:, 0]
        return torch.cat([x[left], x[right]], 1), same.float()

    x, same = pair(known.x, known.y, 4000)
    test_x, test_same = pair(known.test_x, known.test_y, 600)
    pairs = Data(x=x, y=same, test_x=test_x, test_y=test_same)
    loss = F.binary_cross_entropy_with_logits
    job = tasks.fit(spoilt(net, None, fault), pairs, optimizer, seed, loss=loss, **rest)

    def above_chance(given: Tensor, known: Data) -> float:
        return 2 * float(((given > 0) == (known.test_y > 0)).float().mean()) - 1

    return finished(_scored(job, above_chance, pairs), **mine)


def glitched(
    make: Callable[..., Job],
    seed: int,
    *,
    part: int = 0,
    factor: float = 1.0,
    every: int = 50,
    share: float = 0.05,
    **options: Any,
) -> Job:
    """Return a run in whose batches, now and then, a share of the inputs (part 0) or targets (1) is far too large."""
    job = make(seed, **options)
    draw = job.batch

    def batch(step: int) -> Any:
        drawn = list(draw(step))
        if factor != 1.0 and step % every == every - 15:
            drawn[part] = drawn[part].clone()
            drawn[part][: max(1, int(share * len(drawn[part])))] *= factor
        return tuple(drawn)

    job.batch = batch
    return job
