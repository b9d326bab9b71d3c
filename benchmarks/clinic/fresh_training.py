"""Fresh pairs whose fault lies in stuck units, in the optimizer or in attention."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn import functional as F
from torch.nn import init
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from benchmarks.clinic.fresh_depth import Row
from benchmarks.clinic.fresh_nets import (
    VAE,
    Encoder,
    Mixer,
    Plain,
    Residual,
    Siamese,
    Tabular,
    UNet,
    Vgg,
    separable,
    squeezer,
)
from benchmarks.clinic.fresh_runs import (
    by,
    images,
    multiply,
    numbers,
    pixels,
    redraw,
    set_to,
    siamese,
    table,
    variational,
)
from benchmarks.clinic.fresh_sequences import (
    ConvText,
    LetterLSTM,
    Series,
    TinyGPT,
    WaveNet,
    WordEncoder,
    letters,
    words,
)

__all__ = ["RATES", "STUCK"]

_ADAM = by(Adam, 1e-3)
_SGD = by(SGD, 0.05, momentum=0.9)
_NESTEROV = by(SGD, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
_HE = redraw(init.kaiming_normal_, "", nn.Linear, nn.Conv2d)
_XAVIER = redraw(init.xavier_uniform_, "", nn.Linear, nn.Conv1d)

STUCK: tuple[Row, ...] = (
    (
        "vgg-negative",
        "GG301",
        0.75,
        "biases of convolutions at -3",
        images,
        {"net": partial(Vgg, 2), "optimizer": _ADAM, "start": _HE},
        {"fault": set_to(-3.0, "convs")},
    ),
    (
        "separable-negative",
        "GG301",
        0.75,
        "shifts of batch normalisation at -4",
        images,
        {"net": separable, "optimizer": by(AdamW, 3e-3), "steps": 160, "size": 32},
        {"fault": set_to(-4.0, "", nn.BatchNorm2d)},
    ),
    (
        "dropout-one-sided",
        "GG301",
        0.7,
        "weights drawn below zero only",
        images,
        {"net": partial(Plain, dropout=0.1), "optimizer": _ADAM, "schedule": "one-cycle"},
        {"fault": redraw(partial(init.uniform_, a=-0.2, b=0.0), "layers")},
    ),
    (
        "conv-text-negative",
        "GG301",
        0.6,
        "biases of convolutions over words at -6",
        words,
        {"net": ConvText, "optimizer": by(Adamax, 5e-3)},
        {"fault": set_to(-6.0, "convs")},
    ),
    (
        "columns-raw",
        "GG302",
        0.75,
        "measured columns as they come, into sigmoids",
        table,
        {"task": "columns", "net": partial(Tabular, act=F.sigmoid), "optimizer": by(Adam, 5e-3)},
        {"task": "raw columns"},
    ),
    (
        "lstm-pixels",
        "GG302",
        0.7,
        "pixels of 0 to 255 into a two-way LSTM",
        images,
        {"net": partial(Series, nn.LSTM, 8, 10, bidirectional=True), "optimizer": by(Adam, 2e-3), "steps": 160},
        {"raw": (120.0, 128.0)},
    ),
    (
        "surface-metres",
        "GG302",
        0.75,
        "coordinates in the hundreds into tanh",
        numbers,
        {
            "task": "surface",
            "net": partial(Plain, 2, 1, 4, act=F.tanh, init=init.xavier_normal_),
            "optimizer": by(Adam, 3e-3),
        },
        {"raw": (50.0, 200.0)},
    ),
    (
        "squeezer-saturated",
        "GG302",
        0.35,
        "weights of an autoencoder drawn from the standard normal",
        pixels,
        {"net": partial(squeezer, sizes=(48, 24)), "optimizer": by(RAdam, 3e-3), "start": _XAVIER},
        {"fault": redraw(init.normal_, "", nn.Linear)},
    ),
)

_GPT = {"net": TinyGPT, "optimizer": by(AdamW, 6e-3, weight_decay=0.01), "steps": 250, "size": 12}

RATES: tuple[Row, ...] = (
    (
        "residual-rate",
        "GG501",
        0.75,
        "a learning rate of 20",
        images,
        {"net": Residual, "optimizer": _NESTEROV, "schedule": "cosine", "steps": 160, "size": 32},
        {"optimizer": by(SGD, 20.0, momentum=0.9, nesterov=True, weight_decay=1e-4)},
    ),
    (
        "gpt-rate",
        "GG501",
        0.3,
        "a learning rate of 0.1",
        letters,
        {**_GPT, "clip_norm": 1.0},
        {"optimizer": by(AdamW, 0.1, weight_decay=0.01)},
    ),
    (
        "mixer-rate",
        "GG501",
        0.7,
        "a learning rate of 0.5",
        images,
        {"net": Mixer, "optimizer": by(NAdam, 3e-3), "steps": 150, "size": 32},
        {"optimizer": by(NAdam, 0.5)},
    ),
    (
        "vgg-one-cycle",
        "GG501",
        0.75,
        "a one-cycle schedule up to 0.3",
        images,
        {"net": partial(Vgg, 2), "optimizer": by(SGD, 0.05, momentum=0.9), "schedule": "one-cycle", "start": _HE},
        {"optimizer": by(SGD, 0.3, momentum=0.9)},
    ),
    (
        "vae-rate",
        "GG501",
        0.55,
        "a learning rate of 0.15",
        variational,
        {"net": VAE, "optimizer": by(Adamax, 4e-3), "steps": 300},
        {"optimizer": by(Adamax, 0.15)},
    ),
    (
        "words-rate",
        "GG501",
        0.6,
        "a learning rate of 0.15 in an encoder of words",
        words,
        {"net": WordEncoder, "optimizer": by(Adam, 5e-3), "steps": 150, "size": 32},
        {"optimizer": by(Adam, 0.15)},
    ),
    (
        "wavenet-rate",
        "GG501",
        0.3,
        "a learning rate of 0.4 for gated convolutions",
        letters,
        {"net": WaveNet, "optimizer": by(Adam, 3e-3), "steps": 150, "size": 12},
        {"optimizer": by(Adam, 0.4)},
    ),
    (
        "residual-slow",
        "GG502",
        0.75,
        "a learning rate of 1e-5",
        images,
        {"net": Residual, "optimizer": _NESTEROV, "schedule": "cosine", "steps": 160, "size": 32},
        {"optimizer": by(SGD, 1e-5, momentum=0.9, nesterov=True, weight_decay=1e-4)},
    ),
    (
        "lstm-slow",
        "GG502",
        0.3,
        "a learning rate of 1e-6",
        letters,
        {"net": LetterLSTM, "optimizer": by(Adam, 0.015), "clip_norm": 1.0, "steps": 250, "size": 12},
        {"optimizer": by(Adam, 1e-6)},
    ),
    (
        "conv-text-slow",
        "GG502",
        0.6,
        "a learning rate of 1e-4",
        words,
        {"net": ConvText, "optimizer": by(Adamax, 5e-3), "accumulate": 2, "size": 24},
        {"optimizer": by(Adamax, 1e-4)},
    ),
    (
        "siamese-slow",
        "GG502",
        0.5,
        "a learning rate of 5e-5",
        siamese,
        {"net": partial(Siamese, 3), "optimizer": by(RAdam, 3e-3)},
        {"optimizer": by(RAdam, 5e-5)},
    ),
    (
        "gpt-epsilon",
        "GG504",
        0.3,
        "Adam's epsilon at 1",
        letters,
        _GPT,
        {"optimizer": by(AdamW, 6e-3, weight_decay=0.01, eps=1.0)},
    ),
    (
        "unet-epsilon",
        "GG504",
        0.7,
        "NAdam's epsilon at 1",
        pixels,
        {"net": UNet, "optimizer": by(NAdam, 3e-3), "noise": 0.5},
        {"optimizer": by(NAdam, 3e-3, eps=1.0)},
    ),
    (
        "gpt-large-queries",
        "GG701",
        0.3,
        "queries, keys and values drawn far too large",
        letters,
        _GPT,
        {"fault": multiply(60.0, "qkv")},
    ),
    (
        "encoder-in-proj",
        "GG701",
        0.6,
        "in-projections of torch's attention drawn with a deviation of 3",
        images,
        {"net": partial(Encoder, 2), "optimizer": _ADAM, "steps": 150, "size": 32},
        {"fault": redraw(partial(init.normal_, std=3.0), "self_attn", name="in_proj_weight")},
    ),
    (
        "words-attention-rate",
        "GG702",
        0.5,
        "a learning rate for attention a hundred times that of the rest",
        words,
        {"net": WordEncoder, "optimizer": by(Adam, 2e-3), "steps": 150, "size": 32, "rates": (("in_proj", 1.0),)},
        {"rates": (("in_proj", 100.0),)},
    ),
    (
        "rms-slow-mean",
        "GG703",
        0.75,
        "a mean of squares over ten thousand steps, its batches dim at first",
        images,
        {"net": partial(Plain, 64, 10, 6), "optimizer": by(RMSprop, 4e-3, alpha=0.97), "dim": (60, 0.03)},
        {"optimizer": by(RMSprop, 4e-3, alpha=0.9999)},
    ),
)
