"""Networks of the workshop, and what can be done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clinic import data, nets, nets_sequence, tasks
from benchmarks.clinic.case import Job

__all__ = [
    "GRU",
    "LSTM",
    "NARROW",
    "NORMAL",
    "RNN",
    "UNIFORM",
    "Fault",
    "attention_scale",
    "autoencoder",
    "biases",
    "called",
    "classifier",
    "climbing",
    "convolutions",
    "decoder",
    "gate",
    "heavy",
    "lenet",
    "letters",
    "query_key",
    "reader",
    "recall",
    "regression",
    "residual",
    "rows",
    "scale_layers",
    "snippets",
    "two_branches",
]

_DATA: dict[str, tuple[Callable[[], data.Data], int]] = {
    "digits": (data.digits, 64),
    "cancer": (data.breast_cancer, 30),
    "wine": (data.wine, 13),
    "circles": (data.circles, 2),
    "blobs": (data.blobs, 2),
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

Fault = Callable[[nn.Module], None]


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
    **options: Any,
) -> Job:
    """Return a perceptron's run; ``rate`` times the usual learning rate, ``inputs`` times the features."""
    make, features = _DATA[task]
    known = make()
    known = replace(known, x=known.x * inputs + offset, test_x=known.test_x * inputs + offset)
    scheme = init or _scheme(activation)
    model = nets.mlp(features, known.classes, depth, activation, width=width, init=scheme, gain=gain)
    _spoil(model, fault)
    return tasks.classify(model, known, _optimizer(optimizer, rate), seed, steps=steps, **options)


def _draw(make: Callable[[torch.Tensor], Any]) -> Fault:
    """Return a fault: all weights drawn by a function of torch's, biases zero."""

    def spoil(model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                make(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()

    return spoil


NORMAL, UNIFORM, NARROW = (
    _draw(nn.init.normal_),
    _draw(nn.init.uniform_),
    _draw(partial(nn.init.uniform_, a=-0.02, b=0.02)),
)


def called(kind: Callable[[], nn.Module]) -> str:
    return str(getattr(kind, "__name__", kind))


def scale_layers(factor: float, *places: int) -> Fault:
    """Return a fault: the weights of some layers, counted from the input, times a factor."""

    def spoil(model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for place in places:
            layers[place].weight.mul_(factor)

    return spoil


def biases(value: float, *places: int) -> Fault:
    """Return a fault: the biases of some layers, all but the last where none are named."""

    def spoil(model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for place in places or range(len(layers) - 1):
            bias = layers[place].bias
            if bias is not None:
                bias.fill_(value)

    return spoil


def _spiked(job: Job, every: int, factor: float, first: int = 60) -> Job:
    """Return a run whose targets are far too large in a batch now and then."""
    draw = job.batch

    def batch(step: int) -> Any:
        x, y = draw(step)
        return x, y * factor if step >= first and step % every == 0 else y

    job.batch = batch
    return job


def regression(
    seed: int, *, depth: int = 4, gain: float = 1.0, targets: float = 1.0, spike: float = 0.0, **options: Any
) -> Job:
    known = data.diabetes()
    known = replace(known, y=known.y * targets, test_y=known.test_y * targets)
    model = nets.mlp(
        10, 1, depth, options.pop("activation", nn.ReLU), width=options.pop("width", 32), init="he", gain=gain
    )
    if options.pop("relu_output", False):
        model.append(nn.ReLU())
        known = replace(known, y=known.y + 1.5, test_y=known.test_y + 1.5)
        with torch.no_grad():
            model.get_parameter(f"{len(model) - 2}.bias").fill_(-4.0)
    name, rate = options.pop("optimizer", "sgd"), options.pop("rate", 1.0)
    job = tasks.fit(model, known, _optimizer(name, rate), seed, held_out=False, **options)
    return _spiked(job, 40, spike) if spike else job


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


def query_key(factor: float, *, blocks: tuple[int, ...] = ()) -> Fault:
    def spoil(model: nn.Module) -> None:
        found = [m for m in model.modules() if isinstance(m, nets_sequence.Attention)]
        for place in blocks or range(len(found)):
            for name in ("query", "key"):
                found[place].get_submodule(name).weight.mul_(factor)  # type: ignore[operator]

    return spoil


def attention_scale(scale: float) -> Fault:
    def spoil(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nets_sequence.Attention):
                module.scale = scale

    return spoil


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


def gate(value: float) -> Fault:
    """Return a fault: the biases of the gate that keeps the state."""

    def spoil(model: nn.Module) -> None:
        rnn = model.get_submodule("rnn")
        width = int(rnn.hidden_size)  # type: ignore[arg-type]
        for name in ("bias_ih_l0", "bias_hh_l0"):
            rnn.get_parameter(name)[width : 2 * width] = value / 2

    return spoil


def letters(
    seed: int, *, kind: Any = nn.LSTM, identity: float | None = None, rate: float = 1.0, optimizer: str = "adam"
) -> Job:
    model = nets_sequence.CharacterRNN(data.characters()[2], kind=kind, identity=identity)
    return tasks.language(model, _optimizer(optimizer, 3 * rate), seed)


def rows(seed: int, *, kind: Any = nn.GRU, rate: float = 1.0, optimizer: str = "adam") -> Job:
    return tasks.classify(nets_sequence.RowReader(kind), data.digits(), _optimizer(optimizer, 3 * rate), seed)


def climbing(make: Callable[..., Job], seed: int, *, factor: float = 1.0, **options: Any) -> Job:
    """Return a run whose learning rate climbs from the first step to the last, by a factor in all."""
    job = make(seed, **options)
    groups = [group for optimizer in job.optimizers for group in optimizer.param_groups]
    starts = [float(group["lr"]) for group in groups]

    def schedule(step: int) -> None:
        for group, start in zip(groups, starts, strict=True):
            group["lr"] = start * factor ** (step / job.steps)

    if factor != 1.0:
        job.before_step = schedule
    return job


def heavy(make: Callable[..., Job], seed: int, *, weight: float = 1.0, every: int = 40, **options: Any) -> Job:
    """Return a run in which the loss of a batch now and then weighs far more than that of the others."""
    job = make(seed, **options)
    loss, draw = job.loss, job.batch
    weights = {"now": 1.0}

    def batch(step: int) -> Any:
        weights["now"] = weight if step % every == every - 1 else 1.0
        return (*draw(step), weights["now"])

    job.batch = batch
    job.loss = lambda model, given: loss(model, given[:2]) * given[2]
    return job


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
