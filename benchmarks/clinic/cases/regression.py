"""Regression and autoencoders: no accuracy to go by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import Data, diabetes, digits
from benchmarks.clinic.nets import Detach, autoencoder, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, fit, reconstruct, sgd

__all__ = ["CASES"]


def regress(depth: int, optimizer: MakeOptimizer, *, init: str = "he", gain: float = 1.0) -> Callable[[int], Job]:
    return lambda seed: fit(
        mlp(10, 1, depth, width=32, init=init, gain=gain), diabetes(), optimizer, seed, held_out=False
    )


def heavy(seed: int) -> Job:
    """A loss that bears targets with heavy tails."""
    data = diabetes()
    torch.manual_seed(seed)
    noise = torch.distributions.StudentT(1.5).sample(data.y.shape)
    noisy = Data(x=data.x, y=data.y + 0.3 * noise, test_x=data.x, test_y=data.y)
    return fit(mlp(10, 1, 4, nn.Tanh, width=32), noisy, adam(3e-3), seed, loss=F.smooth_l1_loss)


def below_zero(*, sound: bool) -> Callable[[int], Job]:
    """Return a builder with negative targets, for a net with or without (sound) a ReLU behind its last layer."""

    def build(seed: int) -> Job:
        data = diabetes()
        shifted = Data(x=data.x, y=data.y - 3, test_x=data.x, test_y=data.y - 3)
        layers = list(mlp(10, 1, 4, width=32, init="he"))
        model = nn.Sequential(*layers) if sound else nn.Sequential(*layers, nn.ReLU())
        return fit(model, shifted, adam(3e-3), seed, held_out=False)

    return build


def unit_interval(data: Data) -> Data:
    low, high = data.x.min(), data.x.max()
    return Data(
        x=(data.x - low) / (high - low), y=data.y, test_x=(data.test_x - low) / (high - low), test_y=data.test_y
    )


def bootstrapped(discount: float) -> Callable[[int], Job]:
    """Return a builder that learns a value whose target is partly its own prediction, as in temporal differences."""

    def build(seed: int) -> Job:
        model = mlp(10, 1, 3, width=64, init="he")
        job = fit(model, diabetes(), adam(3e-3), seed, held_out=False)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            value = model(batch[0]).squeeze(-1)
            return F.mse_loss(value, batch[1] + discount * value.detach())

        job.loss = loss
        if discount < 1:
            usual = job.quality
            job.quality = lambda model: usual(Rescaled(model, 1 - discount))
        return job

    return build


class Rescaled(nn.Module):
    """A model whose output is multiplied: the fixed point of v = y + d v is y / (1 - d)."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output times the factor."""
        result: Tensor = self.model(x) * self.factor
        return result


def squeezed(model: Callable[[], nn.Module], optimizer: MakeOptimizer) -> Callable[[int], Job]:
    return lambda seed: reconstruct(
        model(), unit_interval(digits()), optimizer, seed, loss=F.binary_cross_entropy, steps=240
    )


def scaled(model: nn.Sequential, factor: float) -> nn.Sequential:
    """Multiply the weights of the encoder."""
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(factor)
    return model


def forgotten_decoder(seed: int) -> Job:
    model = autoencoder(nn.ReLU, depth=4, init="he")
    job = reconstruct(model, digits(), adamw(2e-3), seed)
    job.optimizers = (adamw(2e-3)(model[0].parameters()),)
    return job


def detached_code(seed: int) -> Job:
    whole = autoencoder()
    model = nn.Sequential()
    model.add_module("encoder", whole[0])
    model.add_module("cut", Detach())
    model.add_module("decoder", whole[1])
    return reconstruct(model, digits(), adam(3e-3), seed)


CASES = (
    healthy("regression/relu-5-adam", regress(5, adam()), learns=0.45),
    healthy("regression/relu-3-sgd", regress(3, sgd(0.01)), learns=0.4),
    healthy("regression/huber-heavy-tails", heavy, "targets with infinite variance", learns=0.35),
    healthy("regression/shifted-targets-adam", below_zero(sound=True), learns=0.3),
    healthy("regression/bootstrapped", bootstrapped(0.3), "the target moves with the prediction", learns=0.3),
    healthy(
        "autoencoder/tanh-adam",
        lambda seed: reconstruct(autoencoder(), digits(), adam(3e-3), seed),
        learns=0.45,
    ),
    healthy(
        "autoencoder/relu-8-adamw",
        lambda seed: reconstruct(autoencoder(nn.ReLU, depth=4, init="he"), digits(), adamw(2e-3), seed),
        learns=0.35,
    ),
    healthy(
        "autoencoder/sigmoid-output-adam",
        squeezed(lambda: autoencoder(nn.ReLU, output=nn.Sigmoid, init="he"), adam(3e-3)),
        "the output activation is meant to reach its ends",
        learns=0.35,
    ),
    sick(
        "regression/diverging-bootstrap",
        bootstrapped(3.0),
        "the target is three times the prediction and more: the loss grows without bound",
        code="GG505",
        also=("exploding",),
        twin="regression/bootstrapped",
        cure="a discount below 1",
    ),
    sick(
        "regression/small-init-14-sgd",
        lambda seed: fit(mlp(10, 1, 14, width=32, init="default"), diabetes(), sgd(0.01), seed, held_out=False),
        "torch's default initialization, too small for fourteen ReLU layers",
        code="GG101",
        also=("initialization",),
        twin="regression/relu-3-sgd",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "regression/relu-output",
        below_zero(sound=False),
        "a ReLU behind the last layer, and negative targets: the output dies within a few steps",
        code="GG301",
        also=("no_gradient",),
        culprit=("7", "6"),
        twin="regression/shifted-targets-adam",
        cure="drop the last ReLU",
    ),
    sick(
        "regression/rate-too-high",
        regress(5, adam(1.0)),
        "a learning rate a thousand times too high",
        code="GG501",
        also=("divergence", "dead"),
        twin="regression/relu-5-adam",
        cure="a lower learning rate",
    ),
    sick(
        "autoencoder/saturated-weights",
        squeezed(lambda: scaled(autoencoder(nn.Sigmoid, output=nn.Sigmoid), 60.0), adam(3e-3)),
        "encoder weights sixty times too large: sigmoids stand at their ends",
        code="GG302",
        also=("exploding", "vanishing", "initialization"),
        twin="autoencoder/sigmoid-output-adam",
        phase="initialization",
        cure="Xavier initialization",
    ),
    sick(
        "autoencoder/decoder-forgotten",
        forgotten_decoder,
        "the optimizer got the encoder's parameters only",
        code="GG503",
        culprit=("decoder",),
        twin="autoencoder/relu-8-adamw",
        phase="wiring",
        cure="pass model.parameters()",
    ),
    sick(
        "autoencoder/code-detached",
        detached_code,
        "the code is detached: the encoder gets no gradient",
        code="GG104",
        culprit=("encoder", "cut"),
        twin="autoencoder/tanh-adam",
        phase="wiring",
        cure="drop the detach()",
    ),
)
