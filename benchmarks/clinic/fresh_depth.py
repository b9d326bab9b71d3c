"""Fresh pairs whose gradients shrink, grow or jump on their way through layers or time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.nn import functional as F
from torch.nn import init
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from benchmarks.clinic.case import Job
from benchmarks.clinic.fresh_nets import (
    DenseNet,
    Encoder,
    Highway,
    MultiTask,
    Plain,
    Residual,
    Siamese,
    Swish,
    UNet,
    Vgg,
    groups,
    no_norm,
    separable,
    squeezer,
    strided,
)
from benchmarks.clinic.fresh_runs import (
    both,
    both_tasks,
    by,
    glitched,
    images,
    multiply,
    numbers,
    pixels,
    redraw,
    siamese,
    table,
)
from benchmarks.clinic.fresh_sequences import (
    Cells,
    DeepText,
    Series,
    adding,
    memory,
    words,
)

__all__ = ["GROWING", "TIME", "VANISHING", "Row"]

Row: TypeAlias = tuple[str, str, float, str, Callable[..., Job], dict[str, Any], dict[str, Any]]
"""Name, code, quality that the twin must reach, about, maker, options of the twin, and those that the fault changes."""

_ADAM = by(Adam, 1e-3)
_SGD = by(SGD, 0.05, momentum=0.9)
_NESTEROV = by(SGD, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
_HE = redraw(init.kaiming_normal_, "", nn.Linear, nn.Conv2d)
_XAVIER = redraw(init.xavier_uniform_, "", nn.Linear, nn.Conv1d)
_N = partial(init.normal_, std=0.02)
_RECALL = partial(memory, size=48)


def _reset(value: float, hidden: int = 32, gate: int = 1) -> Callable[[nn.Module], None]:
    """Return a change: the biases of one gate, of recurrent layers and cells."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "bias_ih" in name:
                parameter[gate * hidden : (gate + 1) * hidden] = value

    return change


_ORTHOGONAL = redraw(init.orthogonal_, name="weight_hh")

VANISHING: tuple[Row, ...] = (
    (
        "vgg-sigmoid",
        "GG101",
        0.65,
        "sigmoids in a deep convolutional net without normalisation",
        images,
        {"net": partial(Vgg, 3, 8, act=F.relu), "optimizer": by(Adam, 3e-3), "start": _HE, "steps": 70, "size": 24},
        {"net": partial(Vgg, 3, 8, act=F.sigmoid)},
    ),
    (
        "vgg-hundredths",
        "GG101",
        0.75,
        "weights drawn with a deviation of 0.01",
        images,
        {
            "net": partial(Vgg, 3, 8, act=F.elu),
            "optimizer": by(SGD, 0.005, momentum=0.9),
            "start": _HE,
            "steps": 80,
            "size": 16,
        },
        {"fault": redraw(partial(init.normal_, std=0.01), "convs")},
    ),
    (
        "plain-default-14",
        "GG101",
        0.75,
        "torch's own initialization in a deep plain ReLU net",
        table,
        {
            "task": "cancer",
            "net": partial(Plain, 30, 2, 14),
            "optimizer": by(SGD, 0.01, momentum=0.9, nesterov=True),
            "measure": "known",
            "schedule": "cosine",
        },
        {"net": partial(Plain, 30, 2, 14, init=None)},
    ),
    (
        "encoder-post-norm",
        "GG101",
        0.6,
        "normalisation behind the sum in a deep encoder",
        images,
        {"net": partial(Encoder, 8, 24), "optimizer": by(AdamW, 6e-3), "steps": 100, "size": 24},
        {"net": partial(Encoder, 8, 24, norm_first=False)},
    ),
    (
        "squeezer-small",
        "GG101",
        0.5,
        "weights drawn between -0.03 and 0.03 in an autoencoder of tanh",
        pixels,
        {"net": squeezer, "optimizer": _ADAM, "start": _XAVIER, "steps": 300},
        {"fault": redraw(partial(init.uniform_, a=-0.03, b=0.03))},
    ),
    (
        "wine-sigmoid",
        "GG101",
        0.75,
        "six layers of sigmoids",
        table,
        {"task": "wine", "net": partial(Plain, 13, 3, 6, act=F.tanh, init=init.xavier_normal_), "optimizer": _ADAM},
        {"net": partial(Plain, 13, 3, 6, act=F.sigmoid, init=init.xavier_normal_)},
    ),
    (
        "highway-open",
        "GG101",
        0.65,
        "gates of a deep highway net that carry nothing",
        images,
        {"net": partial(Highway, 64, 10, 20), "optimizer": _SGD},
        {"net": partial(Highway, 64, 10, 20, carry=-4.0)},
    ),
    (
        "siamese-tiny",
        "GG101",
        0.6,
        "two layers of the shared tower far too small",
        siamese,
        {"net": Siamese, "optimizer": by(SGD, 0.1, momentum=0.9)},
        {"fault": both(multiply(1e-3, "tower.2"), multiply(0.03, "tower.4"))},
    ),
    (
        "residual-without-skips",
        "GG101",
        0.5,
        "no skips in a deep net of default initialization",
        images,
        {"net": partial(Residual, 4, 8, norm=no_norm), "optimizer": by(NAdam, 2e-3), "steps": 160, "size": 32},
        {"net": partial(Residual, 4, 8, norm=no_norm, skip=False)},
    ),
    (
        "swish-without-skips",
        "GG101",
        0.75,
        "gated layers one behind the other, without skips",
        numbers,
        {"task": "friedman", "net": partial(Swish, 8, 1, 6), "optimizer": by(RAdam, 3e-3)},
        {"net": partial(Swish, 8, 1, 6, skip=False)},
    ),
    (
        "separable-without-norm",
        "GG101",
        0.7,
        "no normalisation between depthwise convolutions",
        images,
        {"net": partial(separable, 4), "optimizer": by(Adam, 3e-3), "smoothing": 0.1, "steps": 160, "size": 32},
        {"net": partial(separable, 4, norm=no_norm)},
    ),
    (
        "deep-text-fiftieths",
        "GG101",
        0.5,
        "weights of 1-D convolutions drawn with a deviation of 0.02",
        words,
        {"net": DeepText, "optimizer": by(AdamW, 3e-3), "start": _XAVIER, "clip_norm": 1.0},
        {"fault": redraw(_N, "body", nn.Conv1d)},
    ),
)

GROWING: tuple[Row, ...] = (
    (
        "strided-normal",
        "GG102",
        0.75,
        "weights of a convolutional net drawn with a deviation of 0.5",
        images,
        {"net": strided, "optimizer": by(SGD, 0.02, momentum=0.9), "start": _HE},
        {"fault": redraw(partial(init.normal_, std=0.5))},
    ),
    (
        "residual-large",
        "GG102",
        0.7,
        "deep residual net whose branches grow, without normalisation",
        images,
        {"net": partial(Residual, 4, 8, norm=groups), "optimizer": _NESTEROV, "steps": 130, "size": 32, "start": _HE},
        {"net": partial(Residual, 4, 8, norm=no_norm)},
    ),
    (
        "plain-leaky-gain",
        "GG102",
        0.8,
        "gain of 2.5 in ten layers of leaky ReLU",
        table,
        {
            "task": "spirals",
            "net": partial(Plain, 2, 2, 10, 32, act=F.leaky_relu),
            "optimizer": by(Adam, 2e-3),
            "steps": 300,
            "size": 64,
        },
        {"fault": multiply(2.5, "layers")},
    ),
    (
        "tasks-huge-layer",
        "GG102",
        0.75,
        "one layer below three heads fifteen times too large",
        both_tasks,
        {"net": partial(MultiTask, 5), "optimizer": by(SGD, 0.05, momentum=0.9), "start": _HE},
        {"fault": multiply(15.0, "body.4")},
    ),
    (
        "dense-orthogonal",
        "GG102",
        0.7,
        "orthogonal weights times four in a densely connected net",
        numbers,
        {"task": "friedman", "net": partial(DenseNet, 8, 1, 6, act=F.silu), "optimizer": by(Adamax, 5e-3)},
        {"fault": redraw(partial(init.orthogonal_, gain=4.0), "layers", nn.Linear)},
    ),
    (
        "friedman-typos",
        "GG103",
        0.75,
        "targets a thousand times too large now and then",
        partial(glitched, numbers),
        {"task": "friedman", "net": partial(Plain, 8, 1, 3), "optimizer": by(SGD, 0.02, momentum=0.9), "part": 1},
        {"factor": 300.0},
    ),
    (
        "vgg-sensor",
        "GG103",
        0.7,
        "pictures inverted and a hundred times too bright now and then",
        partial(glitched, images),
        {"net": partial(Vgg, 2), "optimizer": _SGD, "start": _HE, "steps": 150, "size": 32},
        {"factor": -100.0},
    ),
    (
        "unet-typos",
        "GG103",
        0.7,
        "targets of one picture far too large now and then",
        partial(glitched, pixels),
        {"net": UNet, "optimizer": by(Adam, 3e-3), "noise": 0.5, "part": 1, "every": 40},
        {"factor": 1000.0},
    ),
    (
        "series-typos",
        "GG103",
        0.7,
        "targets far too large now and then",
        partial(glitched, numbers),
        {
            "task": "friedman",
            "net": partial(Series, nn.GRU, 2, 1, mean=True),
            "optimizer": by(RMSprop, 3e-3),
            "part": 1,
            "every": 30,
        },
        {"factor": 1000.0},
    ),
)

TIME: tuple[Row, ...] = (
    (
        "cell-default",
        "GG111",
        0.8,
        "hidden matrix of torch's own initialization over 30 steps",
        _RECALL,
        {
            "net": partial(Cells, nn.RNNCell, 8, 4),
            "optimizer": by(Adam, 2e-3),
            "length": 30,
            "start": _ORTHOGONAL,
            "steps": 250,
            "clip_norm": 1.0,
        },
        {"start": None},
    ),
    (
        "adding-forgets",
        "GG111",
        0.7,
        "forget gates that start nearly closed",
        adding,
        {
            "net": partial(Series, nn.LSTM, 2, 1),
            "optimizer": by(Adam, 5e-3),
            "length": 40,
            "start": _reset(2.0),
            "clip_norm": 1.0,
        },
        {"start": _reset(-3.0)},
    ),
    (
        "stacked-small",
        "GG111",
        0.8,
        "hidden matrices of a stacked net drawn too small",
        _RECALL,
        {
            "net": partial(Series, nn.RNN, 8, 4, num_layers=2),
            "optimizer": by(Adam, 2e-3),
            "length": 24,
            "start": _ORTHOGONAL,
        },
        {"fault": multiply(0.5, name="weight_hh")},
    ),
    (
        "gru-cell-closed",
        "GG111",
        0.8,
        "update gates of a GRU cell that overwrite the state",
        _RECALL,
        {
            "net": partial(Cells, nn.GRUCell, 8, 4),
            "optimizer": by(AdamW, 3e-3),
            "length": 30,
            "start": _reset(3.0),
            "steps": 160,
        },
        {"start": _reset(-3.0)},
    ),
    (
        "adding-large",
        "GG112",
        0.55,
        "hidden matrix drawn with a deviation of 0.4",
        adding,
        {"net": partial(Series, nn.RNN, 2, 1), "optimizer": by(Adam, 3e-3), "length": 24, "start": _ORTHOGONAL},
        {"start": redraw(partial(init.normal_, std=0.4), name="weight_hh")},
    ),
    (
        "rows-relu",
        "GG112",
        0.65,
        "hidden matrix of a ReLU net times 2.2",
        images,
        {"net": partial(Series, nn.RNN, 4, 10, nonlinearity="relu"), "optimizer": by(Adam, 2e-3), "start": _ORTHOGONAL},
        {"fault": multiply(2.2, name="weight_hh")},
    ),
    (
        "both-ways-relu",
        "GG112",
        0.65,
        "hidden matrices of a two-way ReLU net times 3.5",
        images,
        {
            "net": partial(Series, nn.RNN, 4, 10, mean=True, bidirectional=True, nonlinearity="relu"),
            "optimizer": by(RMSprop, 3e-3),
            "start": _ORTHOGONAL,
            "clip_norm": 5.0,
        },
        {"fault": multiply(3.5, name="weight_hh")},
    ),
)
