"""Recurrent nets: row readers, character models, and a memory task that shows forgetting and explosion through time."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import characters, digits
from benchmarks.clinic.nets_sequence import CharacterRNN, MakeRecurrent, RecallNet, RowReader
from benchmarks.clinic.tasks import adam, classify, language, remember, sgd

__all__ = ["CASES"]


def recalling(
    kind: MakeRecurrent, start: str = "default", *, gain: float = 1.0, length: int = 48, lr: float = 3e-3
) -> Callable[[int], Job]:
    """Return a builder of the memory task; see :class:`benchmarks.clinic.nets_sequence.RecallNet`."""
    return lambda seed: remember(
        RecallNet(kind, start, gain=gain, length=length), adam(lr), seed, length=length, size=32
    )


def reading(kind: MakeRecurrent, lr: float = 5e-3) -> Callable[[int], Job]:
    return lambda seed: classify(RowReader(kind), digits(), adam(lr), seed, steps=240)


def identity_recurrence(factor: float) -> Callable[[int], Job]:
    """Return a builder of a character model whose hidden matrix is a multiple of the identity, with ReLU."""
    return lambda seed: language(
        CharacterRNN(characters()[2], kind=nn.RNN, identity=factor), adam(2e-3), seed, length=32, size=32
    )


CASES = (
    healthy("recurrent/lstm-rows-adam", reading(nn.LSTM), learns=0.8),
    healthy("recurrent/gru-rows-adam", reading(nn.GRU), learns=0.85),
    healthy("recurrent/rnn-rows-adam", reading(nn.RNN, 3e-3), learns=0.8),
    healthy(
        "recurrent/lstm-characters-clipped-sgd",
        lambda seed: language(CharacterRNN(characters()[2]), sgd(1.0), seed, clip_norm=0.5, length=32, size=32),
        "clipping at some of the steps",
        learns=0.25,
    ),
    healthy(
        "recurrent/gru-characters-adam",
        lambda seed: language(CharacterRNN(characters()[2], kind=nn.GRU), adam(5e-3), seed, length=32, size=32),
        learns=0.35,
    ),
    healthy("recurrent/irnn-characters-adam", identity_recurrence(0.9), learns=0.25),
    healthy(
        "recurrent/orthogonal-rnn-recall",
        recalling(nn.RNN, "orthogonal", length=24),
        "an orthogonal hidden matrix remembers over 24 steps",
        learns=0.5,
    ),
    healthy(
        "recurrent/chrono-lstm-recall",
        recalling(nn.LSTM, "chrono", length=40, lr=5e-3),
        "the loss stays at chance for some sixty steps, and then falls",
        learns=0.5,
    ),
    healthy("recurrent/keep-gru-recall", recalling(nn.GRU, "keep", length=40, lr=1e-2), learns=0.5),
    sick(
        "recurrent/forgetting-rnn",
        recalling(nn.RNN, length=24),
        "a hidden matrix of spectral radius 0.6 forgets within ten steps",
        code="GG111",
        culprit=("rnn",),
        twin="recurrent/orthogonal-rnn-recall",
        phase="initialization",
        cure="orthogonal hidden matrix",
    ),
    sick(
        "recurrent/forgetting-lstm",
        recalling(nn.LSTM, length=40, lr=5e-3),
        "forget gates at one half forget within twenty steps",
        code="GG111",
        culprit=("rnn",),
        twin="recurrent/chrono-lstm-recall",
        phase="initialization",
        cure="forget bias for the length needed",
    ),
    sick(
        "recurrent/forgetting-gru",
        recalling(nn.GRU, length=40, lr=1e-2),
        "update gates at one half forget within twenty steps",
        code="GG111",
        culprit=("rnn",),
        twin="recurrent/keep-gru-recall",
        phase="initialization",
        cure="update-gate bias for the length needed",
    ),
    sick(
        "recurrent/exploding-rnn",
        recalling(nn.RNN, "orthogonal", gain=2.5, length=24),
        "a hidden matrix of spectral radius 2.5: chaotic, and the gradient explodes through time",
        code="GG112",
        also=("exploding", "saturated"),
        culprit=("rnn",),
        twin="recurrent/orthogonal-rnn-recall",
        phase="initialization",
        cure="spectral radius 1",
    ),
    sick(
        "recurrent/exploding-irnn",
        identity_recurrence(1.8),
        "a ReLU recurrence of 1.8 times the identity grows by nine decades over 32 steps",
        code="GG112",
        also=("exploding", "non_finite", "learning_rate", "divergence"),
        culprit=("rnn",),
        twin="recurrent/irnn-characters-adam",
        phase="initialization",
        cure="the identity itself, and clipping",
    ),
    sick(
        "recurrent/characters-clipped-away",
        lambda seed: language(CharacterRNN(characters()[2]), sgd(1.0), seed, clip_norm=1e-4, length=32, size=32),
        "clipping at 0.0001 cuts every step to next to nothing",
        code="GG602",
        also=("learning_rate",),
        twin="recurrent/lstm-characters-clipped-sgd",
        cure="a threshold near the usual norm",
    ),
)
