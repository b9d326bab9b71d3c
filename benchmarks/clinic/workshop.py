"""Sick networks to choose cures on: the usual faults, each over depths, widths, activations, tasks and optimizers.

They belong to neither half of the clinic and score nothing. The halves hold few cases of each fault, so cures chosen on
one half alone fit its networks; here the same fault comes in many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeAlias

from torch import nn

from benchmarks.clinic.case import Case, Job, healthy, sick
from benchmarks.clinic.workshop_faults import (
    NARROW,
    NORMAL,
    UNIFORM,
    biases,
    scale_layers,
)
from benchmarks.clinic.workshop_nets import (
    called,
    classifier,
)
from benchmarks.clinic.workshop_pairs import OTHERS

__all__ = ["workshop_cases"]

_PREFIX = "workshop/"

_Pair: TypeAlias = tuple[str, str, str, Callable[[int], Job], Callable[[int], Job]]
"""Name, code, about, and the makers of the sick run and of its twin."""


_KINDS: tuple[Callable[[], nn.Module], ...] = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SELU)
_SIGMOID, _TANH, _RELU, _ELU, _GELU, _SELU = _KINDS


def _pair(
    name: str, code: str, twin: dict[str, Any], fault: dict[str, Any], make: Callable[..., Job] = classifier
) -> _Pair:
    return name, code, str(fault), partial(make, **{**twin, **fault}), partial(make, **twin)


def _scaled() -> Iterator[_Pair]:
    """Yield perceptrons whose first weights have the wrong scale for their depth."""
    for depth, width, task, optimizer in (
        (7, 64, "digits", "sgd"),
        (12, 32, "cancer", "adam"),
        (24, 64, "digits", "adamw"),
        (40, 48, "digits", "adam"),
        (60, 64, "digits", "adam"),
    ):
        twin = {"depth": depth, "width": width, "task": task, "optimizer": optimizer, "activation": _TANH}
        twin["init"] = "orthogonal"
        yield _pair(f"sigmoid-{depth}-{optimizer}", "GG101", twin, {"activation": _SIGMOID, "init": "xavier"})
    for kind, depth, gain, task, optimizer in (
        (_RELU, 10, 0.25, "cancer", "sgd"),
        (_RELU, 14, 0.4, "digits", "adam"),
        (_RELU, 26, 0.6, "digits", "adamw"),
        (_RELU, 8, 0.1, "circles", "adam"),
        (_TANH, 16, 0.4, "digits", "adam"),
        (_TANH, 30, 0.6, "digits", "sgd"),
        (_ELU, 12, 0.3, "digits", "rmsprop"),
        (_GELU, 18, 0.5, "digits", "adamw"),
        (nn.SiLU, 12, 0.5, "wine", "adam"),
        (nn.LeakyReLU, 20, 0.5, "digits", "sgd"),
    ):
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"small-{called(kind)}-{depth}-{optimizer}", "GG101", twin, {"gain": gain})
    for kind, depth, task, optimizer in (
        (_RELU, 14, "digits", "adam"),
        (_RELU, 24, "digits", "sgd"),
        (_RELU, 16, "cancer", "adamw"),
        (_GELU, 16, "digits", "sgd"),
        (_ELU, 20, "digits", "sgd"),
    ):
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"default-{called(kind)}-{depth}-{optimizer}", "GG101", twin, {"init": "default"})
    for kind, depth, gain, task, optimizer in (
        (_RELU, 8, 3.0, "digits", "sgd"),
        (_RELU, 12, 1.8, "digits", "adam"),
        (_RELU, 20, 1.5, "cancer", "adamw"),
        (nn.LeakyReLU, 12, 2.0, "wine", "adam"),
        (_ELU, 14, 2.5, "digits", "adam"),
        (_GELU, 10, 2.5, "digits", "sgd"),
    ):
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"large-{called(kind)}-{depth}-{optimizer}", "GG102", twin, {"gain": gain})
    for kind, depth, gain, optimizer in ((_TANH, 6, 6.0, "adam"), (_TANH, 10, 4.0, "sgd"), (_SIGMOID, 4, 12.0, "adam")):
        twin = {"depth": depth, "activation": kind, "optimizer": optimizer}
        yield _pair(f"saturated-{called(kind)}-{depth}-{optimizer}", "GG302", twin, {"gain": gain})


def _spoilt() -> Iterator[_Pair]:
    """Yield perceptrons with single layers, weights, features, epsilons or learning rates spoilt."""
    for name, depth, task, optimizer, fault in (
        ("dead-one", 8, "digits", "adam", biases(-10.0, 4)),
        ("dead-all", 5, "digits", "sgd", biases(-4.0)),
        ("dead-half", 10, "cancer", "adamw", biases(-2.0)),
        ("dead-wine", 6, "wine", "adam", biases(-3.0, 2, 3)),
        ("tiny-one", 8, "digits", "sgd", scale_layers(1e-3, 3)),
        ("tiny-first", 10, "digits", "adam", scale_layers(1e-4, 0, 1)),
        ("huge-one", 8, "digits", "sgd", scale_layers(50.0, 4)),
        ("huge-head", 6, "digits", "adam", scale_layers(100.0, -1)),
    ):
        code = "GG301" if "dead" in name else "GG101" if "tiny" in name else "GG102"
        yield _pair(
            f"{name}-{optimizer}", code, {"depth": depth, "task": task, "optimizer": optimizer}, {"fault": fault}
        )
    for name, kind, task, optimizer, inputs, offset in (
        ("pixels-relu", _RELU, "digits", "sgd", 120.0, 128.0),
        ("pixels-tanh", _TANH, "digits", "adam", 120.0, 128.0),
        ("thousandths", _RELU, "cancer", "sgd", 1e-3, 0.0),
        ("far-off", _RELU, "wine", "adam", 1.0, 300.0),
        ("sigmoid-far", _SIGMOID, "cancer", "adam", 40.0, 100.0),
    ):
        twin = {"depth": 3, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"{name}-{optimizer}", "GG302", twin, {"inputs": inputs, "offset": offset})
    for name, kind, depth, task, optimizer, fault in (
        ("normal", _RELU, 4, "digits", "sgd", NORMAL),
        ("normal", _TANH, 5, "digits", "adam", NORMAL),
        ("normal", _RELU, 6, "cancer", "adam", NORMAL),
        ("uniform", _RELU, 4, "wine", "sgd", UNIFORM),
        ("uniform", _SIGMOID, 3, "digits", "adam", UNIFORM),
        ("narrow", _RELU, 6, "digits", "sgd", NARROW),
        ("narrow", _TANH, 8, "digits", "adam", NARROW),
        ("narrow", _ELU, 5, "circles", "adam", NARROW),
        ("negative", _RELU, 7, "digits", "rmsprop", biases(-1.5)),
        ("negative", _GELU, 5, "digits", "sgd", biases(-4.0)),
        ("saturating", _SIGMOID, 3, "digits", "adam", biases(-12.0)),
        ("saturating", _TANH, 4, "wine", "sgd", biases(6.0)),
    ):
        code = {"narrow": "GG101", "negative": "GG301", "saturating": "GG302"}.get(name, "GG102")
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"{name}-{called(kind)}-{depth}-{optimizer}", code, twin, {"fault": fault})
    for kind, depth, task, optimizer in (
        (_RELU, 5, "digits", "adam"),
        (_TANH, 4, "cancer", "adamw"),
        (_ELU, 6, "digits", "rmsprop"),
    ):
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"epsilon-{called(kind)}-{optimizer}", "GG504", twin, {"optimizer": f"{optimizer}-epsilon"})
    for optimizer, kind, depth, rate in (
        ("sgd", _SIGMOID, 3, 300.0),
        ("adamw", _GELU, 8, 50.0),
        ("adam", _TANH, 10, 30.0),
        ("rmsprop", _ELU, 4, 1e-3),
        ("sgd", _RELU, 4, 60.0),
        ("sgd", _TANH, 6, 100.0),
        ("adam", _RELU, 6, 100.0),
        ("adam", _ELU, 3, 1000.0),
        ("rmsprop", _RELU, 5, 100.0),
        ("adagrad", _TANH, 4, 100.0),
        ("sgd", _RELU, 6, 1e-3),
        ("adam", _GELU, 4, 1e-3),
        ("adamw", _TANH, 8, 1e-4),
        ("adagrad", _RELU, 4, 1e-3),
    ):
        word, code = ("high", "GG501") if rate > 1.0 else ("low", "GG502")
        twin = {"depth": depth, "activation": kind, "optimizer": optimizer}
        yield _pair(f"rate-{word}-{called(kind)}-{depth}-{optimizer}", code, twin, {"rate": rate})


def _narrow() -> Iterator[_Pair]:
    """Yield deep, narrow perceptrons in the plane, and features as they come, in units from 0.001 to 4254."""
    for task, kind, depth, width, optimizer, code, fault in (
        ("circles", _RELU, 14, 16, "adam", "GG101", {"init": "default"}),
        ("circles", _RELU, 18, 12, "adam", "GG101", {"gain": 0.5}),
        ("circles", _TANH, 16, 8, "adam", "GG101", {"gain": 0.4}),
        ("circles", _TANH, 10, 16, "sgd", "GG101", {"fault": NARROW}),
        ("circles", _SIGMOID, 8, 16, "adam", "GG101", {}),
        ("circles", _SIGMOID, 14, 16, "rmsprop", "GG101", {}),
        ("circles", _ELU, 20, 16, "rmsprop", "GG101", {"gain": 0.3}),
        ("circles", _ELU, 12, 12, "adam", "GG101", {"fault": NARROW}),
        ("circles", _SELU, 16, 16, "adam", "GG102", {"gain": 2.5}),
        ("circles", _RELU, 12, 6, "adam", "GG301", {"fault": biases(-0.5)}),
        ("circles", _RELU, 8, 16, "adagrad", "GG301", {"fault": biases(-1.0)}),
        ("circles", _RELU, 10, 16, "sgd", "GG102", {"gain": 4.0}),
        ("circles", _TANH, 8, 16, "adam", "GG302", {"fault": NORMAL}),
        ("blobs", _RELU, 20, 8, "adagrad", "GG101", {"init": "default"}),
        ("blobs", _RELU, 12, 16, "sgd", "GG101", {"fault": NARROW}),
        ("blobs", _RELU, 14, 8, "rmsprop", "GG301", {"fault": biases(-1.0)}),
        ("blobs", _SIGMOID, 10, 8, "adam", "GG101", {}),
        ("blobs", _SIGMOID, 14, 16, "sgd", "GG101", {}),
        ("blobs", _SIGMOID, 6, 16, "adagrad", "GG101", {}),
        ("blobs", _TANH, 12, 16, "adam", "GG102", {"gain": 3.0}),
        ("blobs", _TANH, 20, 16, "sgd", "GG101", {"gain": 0.5}),
        ("blobs", _SELU, 24, 16, "adam", "GG102", {"fault": NORMAL}),
        ("blobs", _RELU, 16, 8, "adam", "GG101", {"fault": NARROW}),
        ("blobs", _ELU, 10, 16, "adagrad", "GG101", {"gain": 0.2}),
    ):
        twin = {"depth": 4, "width": max(12, width), "activation": kind, "task": task, "optimizer": optimizer}
        twin["rate"] = 5.0 if task == "circles" else 2.0
        name = f"narrow-{task}-{called(kind)}-{depth}-{optimizer}"
        yield _pair(name, code, twin, {"depth": depth, "width": width, **fault})
    for task, kind, depth, optimizer in (
        ("wine", _RELU, 3, "sgd"),
        ("wine", _RELU, 4, "adam"),
        ("wine", _SIGMOID, 3, "adagrad"),
        ("cancer", _RELU, 4, "adam"),
        ("cancer", _TANH, 3, "adam"),
        ("cancer", _ELU, 3, "sgd"),
    ):
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer}
        yield _pair(f"raw-{task}-{called(kind)}-{optimizer}", "GG302", twin, {"task": f"raw {task}"})


def _plateaus() -> Iterator[_Pair]:
    """Yield perceptrons that learn parities: even the healthy ones stand still for a hundred steps."""
    for name, code, kind, depth, optimizer, fault in (
        ("small", "GG101", _RELU, 7, "adam", {"gain": 0.4}),
        ("small", "GG101", _TANH, 8, "sgd", {"gain": 0.5}),
        ("default", "GG101", _RELU, 8, "adam", {"init": "default"}),
        ("sigmoid", "GG101", _TANH, 6, "adam", {"activation": _SIGMOID}),
        ("narrow", "GG101", _GELU, 5, "adam", {"fault": NARROW}),
        ("large", "GG102", _RELU, 6, "adam", {"gain": 3.0}),
        ("normal", "GG102", _GELU, 4, "sgd", {"fault": NORMAL}),
        ("dead", "GG301", _RELU, 5, "adam", {"fault": biases(-4.0)}),
        ("dead-one", "GG301", _RELU, 4, "sgd", {"fault": biases(-8.0, 1)}),
        ("saturated", "GG302", _TANH, 4, "adam", {"fault": biases(15.0, 1)}),
        ("far", "GG302", _TANH, 3, "adam", {"inputs": 50.0}),
        ("offset", "GG302", _RELU, 3, "adam", {"offset": 60.0}),
        ("rate", "GG501", _RELU, 5, "adam", {"rate": 300.0}),
        ("rate", "GG501", _TANH, 4, "sgd", {"rate": 300.0}),
        ("rate-low", "GG502", _RELU, 5, "adam", {"rate": 1e-3}),
        ("rate-low", "GG502", _TANH, 4, "sgd", {"rate": 1e-3}),
        ("epsilon", "GG504", _GELU, 5, "adam", {"optimizer": "adam-epsilon"}),
    ):
        task = "parity" if kind is not _TANH else "parity of 3"
        twin = {"depth": depth, "activation": kind, "task": task, "optimizer": optimizer, "rate": 5.0}
        if optimizer == "sgd" and kind is not _TANH:
            twin["rate"] = 1.0
        yield _pair(f"parity-{name}-{called(kind)}-{optimizer}", code, twin, fault)


@cache
def workshop_cases() -> tuple[Case, ...]:
    """Return the sick cases, each followed by its healthy twin."""
    made: list[Case] = []
    others = (_pair(name, code, twin, fault, make) for name, code, make, twin, fault in OTHERS)
    for name, code, about, spoilt, sound in (*_scaled(), *_spoilt(), *_narrow(), *_plateaus(), *others):
        twin = healthy(f"{_PREFIX}{name}-twin", sound, "the same without the fault", learns=0.3)
        made += [sick(_PREFIX + name, spoilt, about, code=code, twin=twin.name), twin]
    return tuple(made)
