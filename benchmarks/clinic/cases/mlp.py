"""Perceptrons: healthy ones by activation, initialization and optimizer, and those that depth makes sick."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import breast_cancer, digits, wine
from benchmarks.clinic.nets import Activation, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, classify, sgd

__all__ = ["CASES"]


def on_digits(
    depth: int,
    activation: Activation,
    optimizer: MakeOptimizer,
    *,
    init: str = "default",
    gain: float = 1.0,
    norm: Callable[[int], nn.Module] | None = None,
    steps: int = 240,
    width: int = 64,
) -> Callable[[int], Job]:
    """Return a builder of a perceptron on digits."""
    return lambda seed: classify(
        mlp(64, 10, depth, activation, init=init, gain=gain, norm=norm, width=width),
        digits(),
        optimizer,
        seed,
        steps=steps,
    )


def bad_layers(
    depth: int, activation: Activation, layers: tuple[int, ...], factor: float, optimizer: MakeOptimizer
) -> Callable[[int], Job]:
    """Return a builder of a well-initialised perceptron with some hidden weights scaled by ``factor``."""

    def build(seed: int) -> Job:
        model = mlp(64, 10, depth, activation, init="he")
        for layer in layers:
            with torch.no_grad():
                model.get_parameter(f"{2 * layer}.weight").mul_(factor)
        return classify(model, digits(), optimizer, seed)

    return build


class Scale(nn.Module):
    """A factor on the features, as a unit conversion leaves behind."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the features times the factor."""
        return x * self.factor


def rescaled(factor: float) -> Callable[[int], Job]:
    """Return a builder of a perceptron whose features are multiplied on the way."""

    def build(seed: int) -> Job:
        layers = list(mlp(64, 10, 12, nn.LeakyReLU, init="he"))
        layers.insert(12, Scale(factor))
        return classify(nn.Sequential(*layers), digits(), adamw(), seed)

    return build


CASES = (
    healthy("mlp/relu-4-adam", on_digits(4, nn.ReLU, adam()), "default initialization, not deep", learns=0.9),
    healthy("mlp/relu-he-10-adam", on_digits(10, nn.ReLU, adam(), init="he"), learns=0.8),
    healthy("mlp/relu-he-16-adam", on_digits(16, nn.ReLU, adam(), init="he"), learns=0.8),
    healthy("mlp/relu-he-20-sgd", on_digits(20, nn.ReLU, sgd(0.01), init="he"), learns=0.7),
    healthy("mlp/leaky-he-12-adamw", on_digits(12, nn.LeakyReLU, adamw(), init="he"), learns=0.8),
    healthy("mlp/gelu-12-adam", on_digits(12, nn.GELU, adam(), init="he"), learns=0.8),
    healthy("mlp/tanh-8-sgd", on_digits(8, nn.Tanh, sgd(0.02), init="xavier"), learns=0.9),
    healthy("mlp/tanh-20-adam", on_digits(20, nn.Tanh, adam(), init="xavier"), learns=0.8),
    healthy("mlp/tanh-orthogonal-40-adam", on_digits(40, nn.Tanh, adam(5e-4), init="orthogonal"), learns=0.6),
    healthy("mlp/sigmoid-3-adam", on_digits(3, nn.Sigmoid, adam(3e-3), init="xavier"), learns=0.9),
    healthy("mlp/selu-16-sgd", on_digits(16, nn.SELU, sgd(0.005), init="lecun"), learns=0.9),
    healthy(
        "mlp/elu-breast-cancer-plain-sgd",
        lambda seed: classify(mlp(30, 2, 5, nn.ELU, width=32), breast_cancer(), sgd(0.05, momentum=0.0), seed),
        "SGD without momentum",
        learns=0.85,
    ),
    healthy("mlp/layernorm-relu-20-sgd", on_digits(20, nn.ReLU, sgd(0.01), init="he", norm=nn.LayerNorm), learns=0.8),
    healthy(
        "mlp/batchnorm-sigmoid-12-adam",
        on_digits(12, nn.Sigmoid, adam(3e-3), init="xavier", norm=nn.BatchNorm1d),
        "biases in front of BatchNorm have a gradient of zero",
        learns=0.8,
    ),
    healthy(
        "mlp/batchnorm-relu-10-sgd",
        on_digits(10, nn.ReLU, sgd(0.01), init="he", norm=nn.BatchNorm1d),
        "biases in front of BatchNorm have a gradient of zero",
        learns=0.8,
    ),
    healthy(
        "mlp/silu-wine-adamw",
        lambda seed: classify(mlp(13, 3, 6, nn.SiLU, width=32, init="he"), wine(), adamw(), seed, size=32),
        learns=0.8,
    ),
    sick(
        "mlp/sigmoid-8-sgd",
        on_digits(8, nn.Sigmoid, sgd(0.02), init="xavier"),
        "eight sigmoid layers",
        code="GG101",
        twin="mlp/tanh-8-sgd",
        phase="initialization",
        cure="tanh or ReLU",
    ),
    sick(
        "mlp/sigmoid-20-adam",
        on_digits(20, nn.Sigmoid, adam(), init="xavier"),
        "twenty sigmoid layers",
        code="GG101",
        twin="mlp/tanh-20-adam",
        phase="initialization",
        cure="tanh or ReLU",
    ),
    sick(
        "mlp/sigmoid-70-adam",
        on_digits(70, nn.Sigmoid, adam(5e-4), init="xavier", gain=0.5, steps=120),
        "seventy sigmoid layers with small weights: the gradient underflows to exactly zero",
        code="GG101",
        twin="mlp/tanh-orthogonal-40-adam",
        phase="initialization",
        cure="tanh or ReLU",
    ),
    sick(
        "mlp/relu-default-20-sgd",
        on_digits(20, nn.ReLU, sgd(0.01)),
        "torch's default initialization, too small for twenty ReLU layers",
        code="GG101",
        also=("initialization",),
        twin="mlp/relu-he-20-sgd",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "mlp/gelu-small-init-12-adam",
        on_digits(12, nn.GELU, adam(), init="he", gain=0.2),
        "weights of a fifth of the right size",
        code="GG101",
        also=("initialization",),
        twin="mlp/gelu-12-adam",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "mlp/relu-double-he-16-adam",
        on_digits(16, nn.ReLU, adam(), init="he", gain=2.5),
        "weights of two and a half times the right size",
        code="GG102",
        also=("initialization",),
        twin="mlp/relu-he-16-adam",
        phase="initialization",
        cure="He initialization",
    ),
    sick(
        "mlp/selu-large-init-16-sgd",
        on_digits(16, nn.SELU, sgd(0.005), init="lecun", gain=2.5),
        "weights of two and a half times the right size",
        code="GG102",
        also=("initialization", "non_finite", "learning_rate"),
        twin="mlp/selu-16-sgd",
        phase="initialization",
        cure="LeCun initialization",
    ),
    sick(
        "mlp/two-small-layers-sgd",
        bad_layers(20, nn.ReLU, (10, 11), 1e-5, sgd(0.01)),
        "the weights of two layers in a row are 100000 times too small",
        code="GG101",
        also=("initialization",),
        culprit=("20", "22"),
        twin="mlp/relu-he-20-sgd",
        phase="initialization",
        cure="He initialization of those layers",
    ),
    sick(
        "mlp/rescaled-features-adamw",
        rescaled(1e-10),
        "features are multiplied by 1e-10 half way up",
        code="GG101",
        also=("initialization",),
        culprit=("12",),
        twin="mlp/leaky-he-12-adamw",
        phase="initialization",
        cure="drop the factor",
    ),
    sick(
        "mlp/one-large-layer-adam",
        bad_layers(10, nn.ReLU, (4,), 3e4, adam()),
        "one layer's weights are 30000 times too large",
        code="GG102",
        also=("initialization",),
        culprit=("8",),
        twin="mlp/relu-he-10-adam",
        phase="initialization",
        cure="He initialization of that layer",
    ),
)
