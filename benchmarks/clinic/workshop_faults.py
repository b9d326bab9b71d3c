"""What can be done to the networks and runs of the workshop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clinic import nets_sequence
from benchmarks.clinic.case import Job

__all__ = [
    "NARROW",
    "NORMAL",
    "UNIFORM",
    "Fault",
    "accumulated",
    "attention_scale",
    "biases",
    "climbing",
    "gate",
    "grouped",
    "heavy",
    "norm_biases",
    "norm_scales",
    "outlying",
    "query_key",
    "recurrent_gain",
    "scale_layers",
    "shrunk",
    "spiked",
]

Fault = Callable[[nn.Module], None]


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


def spiked(job: Job, every: int, factor: float, first: int = 60) -> Job:
    """Return a run whose targets are far too large in a batch now and then."""
    draw = job.batch

    def batch(step: int) -> Any:
        x, y = draw(step)
        return x, y * factor if step >= first and step % every == 0 else y

    job.batch = batch
    return job


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


def gate(value: float) -> Fault:
    """Return a fault: the biases of the gate that keeps the state."""

    def spoil(model: nn.Module) -> None:
        rnn = model.get_submodule("rnn")
        width = int(rnn.hidden_size)  # type: ignore[arg-type]
        for name in ("bias_ih_l0", "bias_hh_l0"):
            rnn.get_parameter(name)[width : 2 * width] = value / 2

    return spoil


def norm_biases(value: float) -> Fault:
    """Return a fault: the biases of normalization layers."""
    return _normalization("bias", value)


def norm_scales(value: float) -> Fault:
    """Return a fault: the scales of normalization layers."""
    return _normalization("weight", value)


def _normalization(name: str, value: float) -> Fault:
    def spoil(model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, (nn.LayerNorm, nn.BatchNorm1d)):
                layer.get_parameter(name).fill_(value)

    return spoil


def recurrent_gain(factor: float) -> Fault:
    """Return a fault: hidden matrices of recurrent layers times a factor."""

    def spoil(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(factor)

    return spoil


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


def grouped(make: Callable[..., Job], seed: int, *, part: str, factor: float = 1.0, **options: Any) -> Job:
    """Return a run whose optimizer has a group of its own for some parameters, with another learning rate.

    Args:
        make: Maker of the run.
        seed: Of the run.
        part: The parameters with this in their name form the group.
        factor: Their learning rate, in those of the others.
        **options: Of the maker.
    """
    job = make(seed, **options)
    chosen = {id(parameter) for name, parameter in job.model.named_parameters() if part in name}
    group = job.optimizers[0].param_groups[0]
    apart = {**group, "params": [p for p in group["params"] if id(p) in chosen], "lr": group["lr"] * factor}
    group["params"] = [p for p in group["params"] if id(p) not in chosen]
    job.optimizers[0].add_param_group(apart)
    return job


def shrunk(make: Callable[..., Job], seed: int, *, scale: float = 1.0, **options: Any) -> Job:
    """Return a run whose loss is multiplied by a number."""
    job = make(seed, **options)
    loss = job.loss
    job.loss = lambda model, batch: loss(model, batch) * scale
    return job


def outlying(make: Callable[..., Job], seed: int, *, factor: float = 1.0, every: int = 60, **options: Any) -> Job:
    """Return a run in which the input of one example of a batch now and then is far too large."""
    job = make(seed, **options)
    draw = job.batch

    def batch(step: int) -> Any:
        x, y = draw(step)
        if step % every == every - 1:
            x = x.clone()
            x[0] *= factor
        return x, y

    job.batch = batch
    return job


def accumulated(make: Callable[..., Job], seed: int, **options: Any) -> Job:
    """Return a run whose steps sum the gradients of two batches."""
    job = make(seed, **options)
    job.accumulate = 2
    return job
