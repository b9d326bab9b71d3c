"""Networks over words, characters and series that no cure was chosen on; see :mod:`benchmarks.clinic.fresh`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic import data, tasks
from benchmarks.clinic.case import Job
from benchmarks.clinic.data import Data
from benchmarks.clinic.fresh_runs import Fault, Make, apart, finished, spoilt

__all__ = [
    "Cells",
    "ConvText",
    "DeepText",
    "LetterLSTM",
    "Series",
    "TinyGPT",
    "WaveNet",
    "WordEncoder",
    "adding",
    "letters",
    "memory",
    "words",
]


class WordEncoder(nn.Module):
    """Word embeddings, a few blocks on ``nn.MultiheadAttention``, and the mean over what is no padding."""

    def __init__(self, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(600, width, padding_idx=0), nn.Embedding(32, width)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        padding = x == 0
        x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for place, (attention, feed) in enumerate(zip(self.attention, self.feeds, strict=True)):
            normed = self.norms[2 * place](x)
            x = x + attention(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
            x = x + feed(self.norms[2 * place + 1](x))
        shown = (~padding).unsqueeze(-1)
        logits: Tensor = self.head((x * shown).sum(1) / shown.sum(1))
        return logits


class _Causal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.ln1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.mlp(self.ln2(x))
        return result


class TinyGPT(nn.Module):
    """Causal Transformer over characters, its output tied to its embedding."""

    def __init__(self, letters: int, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(letters, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(_Causal(width) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, letters, bias=False)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.05)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of each next character."""
        x = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln(x))
        return logits


class LetterLSTM(nn.Module):
    """Stacked LSTM over characters with dropout, its output tied to its embedding."""

    def __init__(self, letters: int, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True, dropout=0.1)
        self.decoder = nn.Linear(width, letters)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.decoder.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of each next character."""
        logits: Tensor = self.decoder(self.rnn(self.embed(x))[0])
        return logits


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions over characters."""

    def __init__(self, letters: int, layers: int = 4, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**place) for place in range(layers))
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of each next character."""
        x = self.embed(x).transpose(1, 2)
        for conv, mix in zip(self.convs, self.mix, strict=True):
            value, gate = conv(F.pad(x, (int(conv.dilation[0]), 0))).chunk(2, 1)  # type: ignore[index]
            x = x + mix(torch.tanh(value) * torch.sigmoid(gate))
        logits: Tensor = self.head(F.relu(x).transpose(1, 2))
        return logits


class ConvText(nn.Module):
    """Convolutions of three widths over words and the maximum of each, as Kim (2014) has them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, size) for size in (2, 3, 4))
        self.fc = nn.Linear(3 * width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed(x).transpose(1, 2)
        x = torch.cat([F.relu(conv(x)).max(-1).values for conv in self.convs], 1)
        logits: Tensor = self.fc(F.dropout(x, 0.2, self.training))
        return logits


class DeepText(nn.Module):
    """Stack of 1-D convolutions over words."""

    def __init__(self, depth: int = 6, width: int = 24, act: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, width)
        self.body = nn.Sequential(
            *(layer for _ in range(depth) for layer in (nn.Conv1d(width, width, 3, padding=1), act()))
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.body(self.embed(x).transpose(1, 2)).amax(2))
        return logits


class Series(nn.Module):
    """Recurrent net of torch's over a series, reading its last step or the mean of all.

    Args:
        kind: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
        inputs: Features of a step; what comes flat is cut into such steps.
        outputs: Classes, or 1.
        hidden: Width of the state.
        mean: Whether to read the mean over time.
        **options: Of the recurrent layer.
    """

    def __init__(
        self,
        kind: Callable[..., nn.RNNBase],
        inputs: int,
        outputs: int,
        hidden: int = 32,
        *,
        mean: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.inputs, self.mean = inputs, mean
        self.rnn = kind(inputs, hidden, batch_first=True, **options)
        self.out = nn.Linear(2 * hidden if self.rnn.bidirectional else hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        states = self.rnn(x.reshape(len(x), -1, self.inputs))[0]
        result: Tensor = self.out(states.mean(1) if self.mean else states[:, -1])
        return result


class Cells(nn.Module):
    """Loop over an ``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``."""

    def __init__(
        self, kind: Callable[..., nn.RNNCellBase], inputs: int, outputs: int, hidden: int = 32, **options: Any
    ) -> None:
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.cell = kind(inputs, hidden, **options)
        self.fc = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        state: Any = x.new_zeros(len(x), self.hidden)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        for step in x.reshape(len(x), -1, self.inputs).unbind(1):
            state = self.cell(step, state)
        result: Tensor = self.fc(state[0] if isinstance(state, tuple) else state)
        return result


def words(
    seed: int,
    *,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    **options: Any,
) -> Job:
    """Return a run that tells which module a stretch of documentation is from."""
    mine, rest = apart({"steps": 200, "size": 48, **options})
    return finished(tasks.classify(spoilt(net, start, fault), data.snippets(), optimizer, seed, **rest), **mine)


def letters(
    seed: int,
    *,
    net: Callable[[int], nn.Module],
    optimizer: tasks.MakeOptimizer,
    start: Fault | None = None,
    fault: Fault | None = None,
    **options: Any,
) -> Job:
    """Return the run of a language model over characters."""
    mine, rest = apart({"steps": 200, "length": 32, **options})
    count = data.characters()[2]
    return finished(tasks.language(spoilt(lambda: net(count), start, fault), optimizer, seed, **rest), **mine)


def memory(
    seed: int,
    *,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    length: int,
    start: Fault | None = None,
    fault: Fault | None = None,
    **options: Any,
) -> Job:
    """Return a run that names the first symbol at the end of a series."""
    mine, rest = apart(options)
    return finished(tasks.remember(spoilt(net, start, fault), optimizer, seed, length=length, **rest), **mine)


def adding(
    seed: int,
    *,
    net: Make,
    optimizer: tasks.MakeOptimizer,
    length: int,
    start: Fault | None = None,
    fault: Fault | None = None,
    **options: Any,
) -> Job:
    """Return a run on series of numbers of which the two marked ones, in the first half, have to be added."""
    mine, rest = apart({"steps": 300, **options})
    generator = torch.Generator().manual_seed(13)
    count = 4000
    values = torch.rand(count, length, generator=generator) * 2 - 1
    marks = torch.zeros(count, length)
    for first in (0, length // 4):
        places = torch.randint(first, first + length // 4, (count,), generator=generator)
        marks[torch.arange(count), places] = 1.0
    x, y = torch.stack([values, marks], 2).flatten(1), (values * marks).sum(1)
    known = Data(x=x[:3600], y=y[:3600], test_x=x[3600:], test_y=y[3600:])
    return finished(tasks.fit(spoilt(net, start, fault), known, optimizer, seed, **rest), **mine)
