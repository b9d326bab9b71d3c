"""Two networks and two optimizers: small generative adversarial nets on points in the plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, Record, healthy, sick
from benchmarks.clinic.nets import Activation, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam

__all__ = ["CASES"]

_NOISE = 4


class Adversaries(nn.Module):
    """Generator and discriminator."""

    def __init__(self, activation: Activation, *, depth: int = 3, width: int = 48) -> None:
        super().__init__()
        self.generator = mlp(_NOISE, 2, depth, activation, width=width, init="he")
        self.discriminator = mlp(2, 1, depth, nn.LeakyReLU, width=width, init="he")

    def forward(self, noise: Tensor) -> Tensor:
        """Return generated points, shape ``[batch, 2]``."""
        points: Tensor = self.generator(noise)
        return points


def real_points(size: int, generator: torch.Generator) -> Tensor:
    """Return points of two clusters away from the origin, shape ``[size, 2]``."""
    centres = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    chosen = torch.randint(0, 2, (size,), generator=generator)
    return centres[chosen] + 0.4 * torch.randn(size, 2, generator=generator)


def energy(first: Tensor, second: Tensor) -> float:
    """Return the energy distance of two samples, 0 for the same distribution."""
    within = torch.cdist(first, first).mean() + torch.cdist(second, second).mean()
    return float(2 * torch.cdist(first, second).mean() - within)


def adversarial(
    generator_rate: MakeOptimizer,
    discriminator_rate: MakeOptimizer,
    *,
    activation: Activation = nn.ReLU,
    cut: bool = False,
    swapped: bool = False,
    least_squares: bool = False,
    steps: int = 240,
) -> Callable[[int], Job]:
    """Return a builder of an adversarial job.

    Args:
        generator_rate: Makes the generator's optimizer.
        discriminator_rate: Makes the discriminator's optimizer.
        activation: Makes the generator's activation.
        cut: Detach the generated points in the generator's own step.
        swapped: Give the generator's optimizer the discriminator's parameters.
        least_squares: Squared losses instead of logistic ones.
        steps: Steps of each optimizer.
    """

    def build(seed: int) -> Job:
        model = Adversaries(activation)
        held = model.discriminator if swapped else model.generator
        optimizers = (discriminator_rate(model.discriminator.parameters()), generator_rate(held.parameters()))

        def batch(step: int) -> tuple[Tensor, Tensor]:
            random = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
            return torch.randn(64, _NOISE, generator=random), real_points(64, random)

        def judge(logits: Tensor, target: float) -> Tensor:
            goal = torch.full_like(logits, target)
            return F.mse_loss(logits, goal) if least_squares else F.binary_cross_entropy_with_logits(logits, goal)

        def discriminate(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            fake = model.generator(batch[0]).detach()
            return judge(model.discriminator(batch[1]), 1.0) + judge(model.discriminator(fake), 0.0)

        def generate(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            fake = model.generator(batch[0])
            return judge(model.discriminator(fake.detach() if cut else fake), 1.0)

        def advance(job: Job, step: int, record: Record) -> None:
            for optimizer, loss, name in (
                (optimizers[0], discriminate, "discriminator"),
                (optimizers[1], generate, "generator"),
            ):
                for each in optimizers:
                    each.zero_grad()
                value = loss(job.model, job.batch(step))
                value.backward()
                record(value, name)
                optimizer.step()

        return Job(
            model=model,
            optimizers=optimizers,
            steps=steps,
            batch=batch,
            loss=lambda model, batch: generate(model, batch) + discriminate(model, batch),
            quality=likeness,
            advance=advance,
        )

    return build


def likeness(model: nn.Module) -> float:
    """Return 1 for points like the real ones, 0 for points no better than one heap at the origin."""
    random = torch.Generator().manual_seed(0)
    real = real_points(400, random)
    with torch.no_grad():
        fake = model(torch.randn(400, _NOISE, generator=random))
    if not torch.isfinite(fake).all():
        return 0.0
    return max(-1.0, 1 - energy(fake, real) / energy(torch.zeros(400, 2), real))


PLAIN = adam(1e-3, betas=(0.5, 0.999))

CASES = (
    healthy("gan/logistic-adam", adversarial(PLAIN, PLAIN), "losses that balance instead of falling", learns=0.6),
    healthy(
        "gan/least-squares-tanh-adam",
        adversarial(PLAIN, PLAIN, activation=nn.Tanh, least_squares=True),
        "losses that balance instead of falling",
        learns=0.5,
    ),
    sick(
        "gan/generator-detached",
        adversarial(PLAIN, PLAIN, cut=True),
        "the generator's step runs on detached points: it gets no gradient",
        code="GG104",
        also=("no_update",),
        culprit=("generator",),
        twin="gan/logistic-adam",
        phase="wiring",
        cure="detach only in the discriminator's step",
    ),
    sick(
        "gan/optimizers-swapped",
        adversarial(PLAIN, PLAIN, activation=nn.Tanh, least_squares=True, swapped=True),
        "the generator's optimizer holds the discriminator's parameters",
        code="GG503",
        culprit=("generator",),
        twin="gan/least-squares-tanh-adam",
        phase="wiring",
        cure="pass generator.parameters()",
    ),
    sick(
        "gan/rate-too-high",
        adversarial(adam(1.0), adam(1.0), activation=nn.Tanh, least_squares=True),
        "learning rates a thousand times too high",
        code="GG501",
        also=("divergence", "saturated", "dead"),
        twin="gan/least-squares-tanh-adam",
        cure="lower learning rates",
    ),
)
