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
    attention_scale,
    biases,
    climbing,
    gate,
    grouped,
    heavy,
    query_key,
    recurrent_gain,
    scale_layers,
    shrunk,
)
from benchmarks.clinic.workshop_nets import (
    GRU,
    LSTM,
    RNN,
    autoencoder,
    called,
    classifier,
    convolutions,
    decoder,
    lenet,
    letters,
    reader,
    recall,
    regression,
    residual,
    rows,
    snippets,
    two_branches,
)

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


_DEEP: dict[str, Any] = {"depth": 12, "activation": nn.Tanh}
_ADAM, _ADAMW, _SGD = ({"optimizer": name} for name in ("adam", "adamw", "sgd"))
_OTHERS: tuple[tuple[str, str, Callable[..., Job], dict[str, Any], dict[str, Any]], ...] = (
    ("regression-small", "GG101", regression, {"depth": 10, "optimizer": "adam"}, {"gain": 0.2}),
    ("regression-sigmoid", "GG101", regression, _DEEP, {"activation": nn.Sigmoid, "gain": 0.7}),
    ("regression-large", "GG102", regression, {"depth": 6}, {"gain": 3.0}),
    ("regression-targets", "GG501", regression, {}, {"targets": 100.0}),
    ("regression-spikes", "GG103", regression, {}, {"spike": 1e3}),
    ("regression-spikes-adam", "GG103", regression, _ADAM, {"spike": 1e4}),
    ("regression-targets-adam", "GG502", regression, _ADAM, {"targets": 300.0}),
    ("regression-rate", "GG501", regression, {"activation": nn.Tanh}, {"rate": 60.0}),
    ("regression-rate-low", "GG502", regression, {}, {"rate": 1e-3}),
    ("conv-normal", "GG102", convolutions, {"depth": 4}, {"fault": NORMAL}),
    ("conv-narrow", "GG101", convolutions, {"depth": 6, "optimizer": "sgd"}, {"fault": NARROW}),
    ("conv-negative", "GG301", convolutions, {"depth": 6}, {"fault": biases(-1.0)}),
    ("conv-rate-sgd", "GG501", convolutions, {"depth": 5, "optimizer": "sgd"}, {"rate": 60.0}),
    ("lenet-rate", "GG501", lenet, {}, {"rate": 60.0}),
    ("lenet-tanh-normal", "GG302", lenet, {"activation": nn.Tanh}, {"fault": NORMAL}),
    ("residual-normal", "GG102", residual, {"blocks": 6, "optimizer": "sgd"}, {"branch_gain": 4.0}),
    ("residual-rate-sgd", "GG501", residual, {"blocks": 8, "optimizer": "sgd"}, {"rate": 100.0}),
    ("residual-rate-low", "GG502", residual, {"blocks": 6, "norm": nn.LayerNorm}, {"rate": 1e-4}),
    ("autoencoder-narrow", "GG101", autoencoder, {"depth": 4}, {"gain": 0.1}),
    ("autoencoder-rate-low", "GG502", autoencoder, {}, {"rate": 1e-3}),
    ("decoder-attention-one", "GG701", decoder, {"layers": 3}, {"fault": query_key(40.0, blocks=(1,))}),
    ("reader-unscaled", "GG702", reader, {"layers": 3}, {"fault": attention_scale(8.0)}),
    ("reader-rate-low", "GG502", reader, {}, {"rate": 1e-3}),
    ("reader-post-rate-12", "GG501", reader, {"layers": 8, "pre_norm": False}, {"rate": 30.0}),
    ("recall-lstm-forgets", "GG111", recall, {**LSTM, "length": 40}, {"fault": gate(-3.0)}),
    ("recall-gru-forgets", "GG111", recall, {**GRU, "length": 40}, {"fault": gate(-3.0)}),
    ("recall-rnn-shrinks", "GG111", recall, {**RNN, "length": 30}, {"gain": 0.7}),
    ("recall-rnn-grows", "GG112", recall, {**RNN, "length": 50}, {"gain": 1.6}),
    ("recall-rate", "GG501", recall, {**LSTM, "length": 24}, {"rate": 100.0}),
    ("letters-rnn-rate", "GG501", letters, {"kind": nn.RNN}, {"rate": 60.0}),
    ("letters-gru-rate-low", "GG502", letters, {"kind": nn.GRU}, {"rate": 3e-4}),
    ("rows-rnn-rate-sgd", "GG501", rows, {"kind": nn.RNN, "optimizer": "sgd"}, {"rate": 200.0}),
    ("regression-dead-output", "GG301", regression, {"optimizer": "adam"}, {"relu_output": True}),
    ("conv-default-14", "GG101", convolutions, {"depth": 14}, {"init": "default"}),
    ("conv-small-8", "GG101", convolutions, {"depth": 8}, {"fault": scale_layers(0.3, *range(8))}),
    ("conv-large-8", "GG102", convolutions, {"depth": 8}, {"fault": scale_layers(2.0, *range(8))}),
    ("conv-dead", "GG301", convolutions, {"depth": 5}, {"fault": biases(-5.0, 2)}),
    ("conv-rate", "GG501", convolutions, {"depth": 5}, {"rate": 60.0}),
    ("conv-rate-low", "GG502", convolutions, {"depth": 4, "optimizer": "sgd"}, {"rate": 1e-3}),
    ("lenet-sigmoid", "GG101", lenet, {}, {"activation": nn.Sigmoid}),
    ("lenet-dead", "GG301", lenet, {}, {"fault": biases(-6.0, 2)}),
    ("lenet-large", "GG102", lenet, {"optimizer": "sgd"}, {"fault": scale_layers(4.0, 0, 1, 2, 3)}),
    ("residual-large-12", "GG102", residual, {"blocks": 12}, {"branch_gain": 1.5}),
    ("residual-large-30", "GG102", residual, {"blocks": 30, "optimizer": "sgd"}, {"branch_gain": 1.0}),
    ("residual-rate", "GG501", residual, {"blocks": 6, "norm": nn.LayerNorm}, {"rate": 100.0}),
    ("autoencoder-sigmoid", "GG101", autoencoder, {"depth": 5}, {"activation": nn.Sigmoid}),
    ("autoencoder-small", "GG101", autoencoder, {"activation": nn.ReLU, "depth": 4}, {"gain": 0.2}),
    ("autoencoder-large", "GG302", autoencoder, {"depth": 4}, {"gain": 5.0}),
    ("autoencoder-rate", "GG501", autoencoder, {}, {"rate": 100.0}),
    ("reader-attention-sharp", "GG701", reader, {}, {"fault": query_key(12.0)}),
    ("reader-attention-one", "GG701", reader, {"layers": 4}, {"fault": query_key(30.0, blocks=(2,))}),
    ("decoder-attention-sharp", "GG701", decoder, {}, {"fault": query_key(15.0)}),
    ("decoder-unscaled", "GG702", decoder, {}, {"fault": attention_scale(4.0)}),
    ("reader-post-rate", "GG501", reader, {"layers": 6, "pre_norm": False}, {"rate": 10.0}),
    ("reader-rate", "GG501", reader, {"layers": 3}, {"rate": 60.0}),
    ("decoder-rate", "GG501", decoder, {}, {"rate": 50.0}),
    ("decoder-rate-low", "GG502", decoder, {}, {"rate": 1e-3}),
    ("recall-rnn-40", "GG111", recall, {"kind": nn.RNN, "start": "orthogonal", "length": 40}, {"start": "default"}),
    ("recall-rnn-70", "GG111", recall, {"kind": nn.RNN, "start": "orthogonal", "length": 70}, {"gain": 0.6}),
    ("recall-lstm-60", "GG111", recall, {"kind": nn.LSTM, "start": "chrono", "length": 60}, {"start": "default"}),
    ("recall-gru-80", "GG111", recall, {"kind": nn.GRU, "start": "keep", "length": 80}, {"start": "default"}),
    ("recall-rnn-explodes", "GG112", recall, {"kind": nn.RNN, "start": "orthogonal", "length": 40}, {"gain": 2.5}),
    ("letters-irnn", "GG112", letters, {"kind": nn.RNN, "identity": 1.0}, {"identity": 1.4}),
    ("letters-rate", "GG501", letters, {}, {"rate": 60.0}),
    ("letters-rate-low", "GG502", letters, {}, {"rate": 1e-3}),
    ("snippets-rate", "GG501", snippets, {}, {"rate": 200.0}),
    ("snippets-rate-low", "GG502", snippets, {}, {"rate": 1e-3}),
    ("snippets-dead", "GG301", snippets, {"optimizer": "sgd", "rate": 10.0}, {"fault": biases(-8.0)}),
    ("branches-small", "GG101", two_branches, {"depth": 8}, {"fault": scale_layers(0.2, *range(16))}),
    ("branches-sigmoid", "GG101", two_branches, {"depth": 8}, {"activation": nn.Sigmoid}),
    (
        "branches-large",
        "GG102",
        two_branches,
        {"depth": 6, "optimizer": "sgd"},
        {"fault": scale_layers(3.0, *range(12))},
    ),
    ("branches-rate", "GG501", two_branches, {"activation": nn.Tanh}, {"rate": 100.0}),
    ("climbing-mlp-adam", "GG501", partial(climbing, classifier), {}, {"factor": 1e3}),
    ("climbing-mlp-sgd", "GG501", partial(climbing, classifier), {"optimizer": "sgd"}, {"factor": 1e3}),
    ("climbing-conv", "GG501", partial(climbing, convolutions), {"depth": 4}, {"factor": 1e3}),
    ("climbing-reader", "GG501", partial(climbing, reader), {}, {"factor": 1e3}),
    ("climbing-letters", "GG501", partial(climbing, letters), {}, {"factor": 1e3}),
    ("heavy-mlp-sgd", "GG103", partial(heavy, classifier), {"optimizer": "sgd"}, {"weight": 1e3}),
    ("heavy-mlp-adam", "GG103", partial(heavy, classifier), {"depth": 8}, {"weight": 1e5}),
    ("heavy-conv-sgd", "GG103", partial(heavy, convolutions), {"optimizer": "sgd", "depth": 4}, {"weight": 1e3}),
    ("heavy-reader", "GG103", partial(heavy, reader), {}, {"weight": 1e5}),
    ("heavy-letters-sgd", "GG103", partial(heavy, letters), {"optimizer": "sgd", "rate": 10.0}, {"weight": 1e4}),
    ("heavy-regression", "GG103", partial(heavy, regression), {}, {"weight": 1e4}),
    ("memory-rnn-25", "GG111", recall, {**RNN, "length": 25}, {"start": "default"}),
    ("memory-rnn-60", "GG111", recall, {**RNN, "length": 60}, {"start": "default"}),
    ("memory-lstm-40", "GG111", recall, {**LSTM, "length": 40}, {"start": "default"}),
    ("memory-gru-50", "GG111", recall, {**GRU, "length": 50}, {"start": "default"}),
    ("memory-gru-30-closed", "GG111", recall, {**GRU, "length": 30}, {"fault": gate(-5.0)}),
    ("memory-rnn-30-grows", "GG112", recall, {**RNN, "length": 30}, {"gain": 2.0}),
    ("memory-rnn-60-grows", "GG112", recall, {**RNN, "length": 60}, {"gain": 1.4}),
    ("memory-rate-low", "GG502", recall, {**LSTM, "length": 24}, {"rate": 3e-4}),
    ("letters-irnn-1.2", "GG112", letters, {"kind": nn.RNN, "identity": 1.0}, {"identity": 1.2}),
    ("decoder-sharp-4", "GG701", decoder, {"layers": 4}, {"fault": query_key(8.0)}),
    ("decoder-sharp-first", "GG701", decoder, {"layers": 2}, {"fault": query_key(60.0, blocks=(0,))}),
    ("decoder-unscaled-16", "GG702", decoder, {"layers": 3}, {"fault": attention_scale(16.0)}),
    ("reader-sharp-6", "GG701", reader, {"layers": 6}, {"fault": query_key(20.0)}),
    ("reader-post-sharp", "GG701", reader, {"layers": 3, "pre_norm": False}, {"fault": query_key(15.0)}),
    ("rows-rate", "GG501", rows, {"kind": nn.RNN}, {"rate": 100.0}),
    ("shrunk-mlp-adam", "GG504", partial(shrunk, classifier), {"depth": 5}, {"scale": 1e-9}),
    ("shrunk-mlp-adamw", "GG504", partial(shrunk, classifier), {"activation": nn.GELU, **_ADAMW}, {"scale": 1e-8}),
    ("shrunk-conv", "GG504", partial(shrunk, convolutions), {"depth": 4}, {"scale": 1e-10}),
    ("shrunk-reader", "GG504", partial(shrunk, reader), {"layers": 2}, {"scale": 1e-9}),
    ("shrunk-letters", "GG504", partial(shrunk, letters), {}, {"scale": 1e-8}),
    ("shrunk-regression", "GG504", partial(shrunk, regression), _ADAM, {"scale": 1e-10}),
    ("shrunk-autoencoder", "GG504", partial(shrunk, autoencoder), {}, {"scale": 1e-7}),
    ("shrunk-mlp-sgd", "GG502", partial(shrunk, classifier), {"optimizer": "sgd"}, {"scale": 1e-4}),
    ("shrunk-lenet-sgd", "GG502", partial(shrunk, lenet), {"optimizer": "sgd"}, {"scale": 1e-3}),
    ("grouped-keys-decoder", "GG702", partial(grouped, decoder), {"part": "key", "layers": 2}, {"factor": 100.0}),
    ("grouped-queries-reader", "GG702", partial(grouped, reader), {"part": "query"}, {"factor": 300.0}),
    ("grouped-attention-reader", "GG501", partial(grouped, reader), {"part": "attention"}, {"factor": 100.0}),
    ("grouped-head-reader", "GG501", partial(grouped, reader), {"part": "head"}, {"factor": 3e3}),
    ("grouped-first-mlp", "GG501", partial(grouped, classifier), {"part": "0."}, {"factor": 300.0}),
    ("grouped-middle-mlp", "GG501", partial(grouped, classifier), {"part": "4.", "depth": 4}, {"factor": 1e3}),
    ("grouped-recurrent", "GG501", partial(grouped, letters), {"part": "hh"}, {"factor": 100.0}),
    ("grouped-conv-sgd", "GG501", partial(grouped, convolutions), {"part": "weight", **_SGD}, {"factor": 100.0}),
    ("once-mlp-sgd", "GG103", partial(heavy, classifier), {**_SGD, "every": 121}, {"weight": 1e4}),
    ("once-conv-sgd", "GG103", partial(heavy, convolutions), {**_SGD, "every": 90, "depth": 5}, {"weight": 1e4}),
    ("once-early-mlp-sgd", "GG103", partial(heavy, classifier), {**_SGD, "every": 9}, {"weight": 1e3}),
    ("once-letters-sgd", "GG103", partial(heavy, letters), {**_SGD, "rate": 10.0, "every": 81}, {"weight": 1e4}),
    ("heavy-decoder", "GG703", partial(heavy, decoder), {"layers": 2}, {"weight": 1e4}),
    ("heavy-reader-deep", "GG703", partial(heavy, reader), {"layers": 6, "every": 60}, {"weight": 1e5}),
    ("heavy-rows", "GG703", partial(heavy, rows), {"every": 50}, {"weight": 1e5}),
    ("heavy-lenet", "GG703", partial(heavy, lenet), {"every": 30}, {"weight": 1e5}),
    ("biased-Tanh-5-sgd", "GG302", classifier, {"depth": 5, "activation": _TANH, **_SGD}, {"fault": biases(20.0, 2)}),
    ("biased-Sigmoid-3", "GG302", classifier, {"depth": 3, "activation": _SIGMOID}, {"fault": biases(-30.0, 1)}),
    ("biased-Tanh-lenet", "GG302", lenet, {"activation": nn.Tanh}, {"fault": biases(15.0, 1)}),
    ("offset-Tanh-4", "GG302", classifier, {"depth": 4, "activation": _TANH}, {"offset": 30.0}),
    ("offset-ELU-3-sgd", "GG302", classifier, {"depth": 3, "activation": _ELU, **_SGD}, {"offset": 100.0}),
    ("offset-Sigmoid-2", "GG302", classifier, {"depth": 2, "activation": _SIGMOID, "task": "wine"}, {"offset": -50.0}),
    ("autoencoder-sharp", "GG302", autoencoder, {"activation": nn.Sigmoid, "depth": 2}, {"gain": 40.0}),
    ("rows-rnn-grows", "GG112", rows, {"kind": nn.RNN}, {"fault": recurrent_gain(4.0)}),
    ("letters-rnn-grows", "GG112", letters, {"kind": nn.RNN}, {"fault": recurrent_gain(6.0)}),
    ("letters-lstm-forgets", "GG111", letters, {}, {"fault": gate(-6.0)}),
    ("recall-rnn-35-grows", "GG112", recall, {**RNN, "length": 35}, {"gain": 1.8}),
    ("recall-rnn-20-grows", "GG112", recall, {**RNN, "length": 20}, {"gain": 3.0}),
    ("recall-lstm-30-closed", "GG111", recall, {**LSTM, "length": 30}, {"fault": gate(-2.0)}),
    ("regression-rate-adam", "GG501", regression, {**_ADAM, "depth": 6}, {"rate": 300.0}),
    ("regression-rate-deep", "GG501", regression, {**_ADAM, "depth": 3, "activation": nn.GELU}, {"rate": 1e3}),
)
"""Name, code, maker, options of the healthy twin, and what the sick run has instead."""


@cache
def workshop_cases() -> tuple[Case, ...]:
    """Return the sick cases, each followed by its healthy twin."""
    made: list[Case] = []
    others = (_pair(name, code, twin, fault, make) for name, code, make, twin, fault in _OTHERS)
    for name, code, about, spoilt, sound in (*_scaled(), *_spoilt(), *_narrow(), *_plateaus(), *others):
        twin = healthy(f"{_PREFIX}{name}-twin", sound, "the same without the fault", learns=0.3)
        made += [sick(_PREFIX + name, spoilt, about, code=code, twin=twin.name), twin]
    return tuple(made)
