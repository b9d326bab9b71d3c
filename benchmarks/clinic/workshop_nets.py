"""Networks of the workshop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clinic import data, nets, nets_sequence, tasks
from benchmarks.clinic.case import Job
from benchmarks.clinic.workshop_faults import Fault, spiked

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "autoencoder",
    "called",
    "classifier",
    "convolutions",
    "decoder",
    "lenet",
    "letters",
    "reader",
    "recall",
    "regression",
    "residual",
    "rows",
    "snippets",
    "two_branches",
]

_DATA: dict[str, tuple[Callable[[], data.Data], int]] = {
    "digits": (data.digits, 64),
    "cancer": (data.breast_cancer, 30),
    "wine": (data.wine, 13),
    "circles": (data.circles, 2),
    "blobs": (data.blobs, 2),
    "parity": (partial(data.parity, 10, 4), 10),
    "parity of 3": (data.parity, 8),
    "raw cancer": (partial(data.breast_cancer, scaled=False), 30),
    "raw wine": (partial(data.wine, scaled=False), 13),
}
"""Data sets to classify, and their features."""

_OPTIMIZERS: dict[str, Callable[[float], tasks.MakeOptimizer]] = {
    "sgd": tasks.sgd,
    "adam": tasks.adam,
    "adamw": tasks.adamw,
    "rmsprop": lambda lr: lambda parameters: torch.optim.RMSprop(parameters, lr=lr),
    "adagrad": lambda lr: lambda parameters: torch.optim.Adagrad(parameters, lr=lr),
}
_EPSILON = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}


def _with_epsilon(kind: str, lr: float) -> tasks.MakeOptimizer:
    """Return a maker of an optimizer whose epsilon is far above any gradient."""
    make: Callable[..., torch.optim.Optimizer] = _EPSILON[kind]
    return lambda parameters: make(parameters, lr=lr, eps=0.3)


_OPTIMIZERS |= {f"{kind}-epsilon": partial(_with_epsilon, kind) for kind in _EPSILON}
_RATES = {"sgd": 0.02, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "adagrad": 1e-2}
_RATES |= {f"{kind}-epsilon": _RATES[kind] for kind in _EPSILON}


def _optimizer(kind: str, rate: float) -> tasks.MakeOptimizer:
    """Return a maker of an optimizer at so many times its usual learning rate."""
    return _OPTIMIZERS[kind](_RATES[kind] * rate)


_WELL = {nn.ReLU: "he", nn.LeakyReLU: "he", nn.GELU: "he", nn.SiLU: "he", nn.ELU: "lecun", nn.SELU: "lecun"}
"""Initialization by activation; Xavier for others."""


def _scheme(activation: Callable[[], nn.Module]) -> str:
    return _WELL.get(activation, "xavier")  # type: ignore[call-overload,no-any-return]


def _spoil(model: nn.Module, fault: Fault | None) -> None:
    if fault is not None:
        with torch.no_grad():
            fault(model)


def classifier(  # noqa: PLR0913  # keywords with defaults, one per thing that varies
    seed: int,
    *,
    task: str = "digits",
    depth: int = 6,
    activation: Callable[[], nn.Module] = nn.ReLU,
    width: int = 64,
    init: str = "",
    gain: float = 1.0,
    optimizer: str = "adam",
    rate: float = 1.0,
    steps: int = 240,
    fault: Fault | None = None,
    inputs: float = 1.0,
    offset: float = 0.0,
    norm: Callable[[int], nn.Module] | None = None,
    **options: Any,
) -> Job:
    """Return a perceptron's run; ``rate`` times the usual learning rate, ``inputs`` times the features."""
    make, features = _DATA[task]
    known = make()
    known = replace(known, x=known.x * inputs + offset, test_x=known.test_x * inputs + offset)
    scheme = init or _scheme(activation)
    model = nets.mlp(features, known.classes, depth, activation, width=width, init=scheme, gain=gain, norm=norm)
    _spoil(model, fault)
    return tasks.classify(model, known, _optimizer(optimizer, rate), seed, steps=steps, **options)


def called(kind: Callable[[], nn.Module]) -> str:
    return str(getattr(kind, "__name__", kind))


def regression(
    seed: int,
    *,
    depth: int = 4,
    gain: float = 1.0,
    inputs: float = 1.0,
    targets: float = 1.0,
    spike: float = 0.0,
    waves: int = 0,
    **options: Any,
) -> Job:
    """Return the run of a perceptron that fits diabetes, or a sine of so many features."""
    known = data.waves(waves) if waves else data.diabetes()
    known = replace(known, x=known.x * inputs, test_x=known.test_x * inputs)
    known = replace(known, y=known.y * targets, test_y=known.test_y * targets)
    features, activation, width = known.x.shape[1], options.pop("activation", nn.ReLU), options.pop("width", 32)
    model = nets.mlp(features, 1, depth, activation, width=width, init="he", gain=gain)
    _spoil(model, options.pop("fault", None))
    if options.pop("relu_output", False):
        model.append(nn.ReLU())
        known = replace(known, y=known.y + 1.5, test_y=known.test_y + 1.5)
        with torch.no_grad():
            model.get_parameter(f"{len(model) - 2}.bias").fill_(-4.0)
    name, rate = options.pop("optimizer", "sgd"), options.pop("rate", 1.0)
    job = tasks.fit(model, known, _optimizer(name, rate), seed, held_out=False, **options)
    return spiked(job, 40, spike) if spike else job


def convolutions(
    seed: int,
    *,
    depth: int = 6,
    init: str = "he",
    fault: Fault | None = None,
    optimizer: str = "adam",
    rate: float = 1.0,
) -> Job:
    model = nets.PlainConv(depth, init=init)
    _spoil(model, fault)
    return tasks.classify(model, data.digits(), _optimizer(optimizer, rate), seed, steps=160)


def lenet(
    seed: int, *, activation: Any = nn.ReLU, fault: Fault | None = None, optimizer: str = "adam", rate: float = 1.0
) -> Job:
    model = nets.lenet(activation)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nets.initialize(layer, _scheme(activation))
    _spoil(model, fault)
    return tasks.classify(model, data.digits(), _optimizer(optimizer, rate), seed, steps=240)


def residual(seed: int, *, blocks: int = 12, optimizer: str = "adam", rate: float = 1.0, **options: Any) -> Job:
    return tasks.classify(nets.ResidualMLP(blocks, **options), data.digits(), _optimizer(optimizer, rate), seed)


def autoencoder(
    seed: int,
    *,
    activation: Any = nn.Tanh,
    depth: int = 3,
    gain: float = 1.0,
    rate: float = 1.0,
    optimizer: str = "adam",
) -> Job:
    model = nets.autoencoder(activation, depth=depth, init=_scheme(activation))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    return tasks.reconstruct(model, data.digits(), _optimizer(optimizer, rate), seed)


def reader(
    seed: int,
    *,
    layers: int = 3,
    pre_norm: bool = True,
    fault: Fault | None = None,
    optimizer: str = "adamw",
    rate: float = 1.0,
    steps: int = 200,
) -> Job:
    model = nets_sequence.DigitTransformer(layers, pre_norm=pre_norm)
    _spoil(model, fault)
    return tasks.classify(model, data.digits(), _optimizer(optimizer, rate), seed, steps=steps)


def decoder(seed: int, *, layers: int = 2, fault: Fault | None = None, rate: float = 1.0) -> Job:
    letters = data.characters()[2]
    model = nets_sequence.Decoder(letters, layers)
    _spoil(model, fault)
    return tasks.language(model, tasks.adamw(2e-3 * rate), seed)


def recall(
    seed: int, *, kind: Any, start: str, length: int, gain: float = 1.0, rate: float = 1.0, fault: Fault | None = None
) -> Job:
    model = nets_sequence.RecallNet(kind, start, gain=gain, length=length)
    _spoil(model, fault)
    return tasks.remember(model, tasks.adam(3e-3 * rate), seed, length=length)


LSTM: dict[str, Any] = {"kind": nn.LSTM, "start": "chrono"}
GRU: dict[str, Any] = {"kind": nn.GRU, "start": "keep"}
RNN: dict[str, Any] = {"kind": nn.RNN, "start": "orthogonal"}


def letters(
    seed: int,
    *,
    kind: Any = nn.LSTM,
    identity: float | None = None,
    rate: float = 1.0,
    optimizer: str = "adam",
    fault: Fault | None = None,
) -> Job:
    model = nets_sequence.CharacterRNN(data.characters()[2], kind=kind, identity=identity)
    _spoil(model, fault)
    return tasks.language(model, _optimizer(optimizer, 3 * rate), seed)


def rows(
    seed: int, *, kind: Any = nn.GRU, rate: float = 1.0, optimizer: str = "adam", fault: Fault | None = None
) -> Job:
    model = nets_sequence.RowReader(kind)
    _spoil(model, fault)
    return tasks.classify(model, data.digits(), _optimizer(optimizer, 3 * rate), seed)


def snippets(seed: int, *, rate: float = 1.0, optimizer: str = "adam", fault: Fault | None = None) -> Job:
    """Return the run of a classifier of word sequences."""
    model = nets_sequence.TextNet()
    _spoil(model, fault)
    return tasks.classify(model, data.snippets(), _optimizer(optimizer, 5 * rate), seed)


class _TwoBranches(nn.Module):
    """Two perceptrons, each on half of the features, joined by a third."""

    def __init__(self, depth: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.left, self.right = (
            nets.mlp(32, 32, depth, activation, width=32, init=_scheme(activation)) for _ in range(2)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape ``[batch, 10]``."""
        halves = torch.cat([self.left(x[:, :32]), self.right(x[:, 32:])], dim=1)
        logits: torch.Tensor = self.head(halves)
        return logits


def two_branches(
    seed: int,
    *,
    depth: int = 4,
    activation: Callable[[], nn.Module] = nn.ReLU,
    optimizer: str = "adam",
    rate: float = 1.0,
    fault: Fault | None = None,
) -> Job:
    """Return the run of a net with two branches."""
    model = _TwoBranches(depth, activation)
    _spoil(model, fault)
    return tasks.classify(model, data.digits(), _optimizer(optimizer, rate), seed)
