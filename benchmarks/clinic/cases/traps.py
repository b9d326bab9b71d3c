"""Healthy runs that look sick to a careless rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy
from benchmarks.clinic.data import Data, breast_cancer, digits, parity, wine
from benchmarks.clinic.nets import mlp
from benchmarks.clinic.tasks import adam, adamw, classify, sgd, warm_up

__all__ = ["CASES"]


def scaled_loss(factor: float) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Return a cross-entropy multiplied by a factor."""
    return lambda model, batch: factor * F.cross_entropy(model(batch[0]), batch[1])


def with_dropout(seed: int) -> Job:
    net = mlp(64, 10, 5, init="he", width=96)
    layers = [m for layer in net for m in ((layer, nn.Dropout(0.4)) if isinstance(layer, nn.ReLU) else (layer,))]
    return classify(nn.Sequential(*layers), digits(), adam(), seed)


def warmed(seed: int) -> Job:
    job = classify(mlp(64, 10, 8, init="he"), digits(), adamw(3e-3), seed)
    job.before_step = warm_up(job.optimizers[0], 100)
    return job


def annealed(seed: int) -> Job:
    job = classify(mlp(64, 10, 6, nn.GELU, init="he"), digits(), sgd(0.02), seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(job.optimizers[0], job.steps)
    job.before_step = lambda step: schedule.step() if step else None
    return job


def with_noisy_labels(seed: int) -> Job:
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(data.y), generator=generator) < 0.3
    labels = torch.where(wrong, torch.randint(0, 10, data.y.shape, generator=generator), data.y)
    noisy = Data(x=data.x, y=labels, test_x=data.test_x, test_y=data.test_y, classes=10)
    return classify(mlp(64, 10, 6, init="he"), noisy, adam(), seed)


def with_heavy_tails(seed: int) -> Job:
    data = digits()
    torch.manual_seed(seed)
    noise = torch.distributions.StudentT(2.0).sample(data.x.shape)
    noisy = Data(x=data.x + 0.2 * noise, y=data.y, test_x=data.test_x, test_y=data.test_y, classes=10)
    return classify(mlp(64, 10, 6, init="he"), noisy, sgd(0.01), seed, size=16)


def imbalanced(seed: int) -> Job:
    """One digit against all others, 1 in 10; the answer "other" scores 0.9, so quality is information."""
    data = digits()
    two = Data(x=data.x, y=(data.y == 3).long(), test_x=data.test_x, test_y=(data.test_y == 3).long(), classes=2)
    return classify(mlp(64, 2, 6, nn.Tanh, init="xavier"), two, adam(), seed, measure="information")


def plateau(seed: int) -> Job:
    """No feature says anything by itself: the loss stays at chance for a while, and then falls."""
    model = mlp(10, 2, 4, nn.Tanh, width=48, init="xavier")
    return classify(model, parity(10, 5), sgd(0.05), seed, steps=300, size=128)


def resumed(seed: int) -> Job:
    """Training goes on from weights that have converged."""
    first = classify(mlp(13, 3, 4, width=32), wine(), adam(5e-3), seed, size=32, steps=200)
    for step in range(200):
        first.optimizers[0].zero_grad()
        first.loss(first.model, first.batch(step)).backward()
        first.optimizers[0].step()
    return classify(first.model, wine(), adam(1e-3), seed, size=32, steps=200)


CASES = (
    healthy(
        "trap/converged",
        lambda seed: classify(mlp(13, 3, 3, width=32), wine(), adam(1e-2), seed, size=32, steps=300),
        "the loss ends at 1e-4: gradients and updates have all but gone",
        learns=0.85,
    ),
    healthy("trap/resumed", resumed, "starts converged, with tiny gradients from the first step", learns=0.85),
    healthy(
        "trap/loss-x1e-3",
        lambda seed: classify(mlp(64, 10, 5, init="he"), digits(), adam(), seed, loss=scaled_loss(1e-3)),
        "every gradient is a thousand times smaller",
        learns=0.85,
    ),
    healthy(
        "trap/loss-x1e3",
        lambda seed: classify(mlp(64, 10, 5, nn.Tanh, init="xavier"), digits(), sgd(1e-5), seed, loss=scaled_loss(1e3)),
        "every gradient is a thousand times larger, and the rate as much smaller",
        learns=0.85,
    ),
    healthy(
        "trap/dropout",
        with_dropout,
        "four units in ten are zero at random",
        learns=0.7,
    ),
    healthy("trap/warm-up", warmed, "the learning rate starts at a hundredth", learns=0.85),
    healthy("trap/annealed", annealed, "the learning rate ends at zero", learns=0.85),
    healthy(
        "trap/tiny-batch",
        lambda seed: classify(mlp(64, 10, 4, init="he"), digits(), sgd(0.003), seed, size=2, steps=300),
        "two examples in a batch: most units see neither",
        learns=0.6,
    ),
    healthy("trap/heavy-tails", with_heavy_tails, "inputs with infinite variance, batches of 16", learns=0.7),
    healthy("trap/label-noise", with_noisy_labels, "three labels in ten are wrong", learns=0.7),
    healthy("trap/imbalanced", imbalanced, "one class in ten examples", learns=0.6),
    healthy("trap/plateau", plateau, "the loss stays at chance for tens of steps, and then falls", learns=0.8),
    healthy(
        "trap/accumulated",
        lambda seed: classify(
            mlp(30, 2, 6, nn.GELU, width=32, init="he"),
            breast_cancer(),
            adam(),
            seed,
            size=8,
            accumulate=4,
            steps=150,
        ),
        "four batches to a step",
        learns=0.85,
    ),
    healthy(
        "trap/wide-relu",
        lambda seed: classify(mlp(64, 10, 4, width=256, init="he"), digits(), adam(1e-3), seed, size=128, steps=150),
        "wide ReLU layers of which a part is inactive",
        learns=0.9,
    ),
)
