"""Networks of the clinic that read sequences: Transformers, recurrent nets, text classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Attention",
    "Block",
    "CharacterRNN",
    "Decoder",
    "DigitTransformer",
    "MakeRecurrent",
    "RecallNet",
    "RowReader",
    "TextNet",
]

MakeRecurrent: TypeAlias = Callable[..., nn.RNNBase]


class Attention(nn.Module):
    """Self-attention with a projection of its own for queries, keys and values.

    Attributes:
        scale: Factor on the logits, 1/sqrt(head width) by default.
        causal: Whether a position sees only those before it.
    """

    def __init__(self, width: int, heads: int = 4, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.scale = 1 / math.sqrt(width // heads)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return an output like ``x``, shape ``[batch, length, width]``.

        Args:
            x: Tokens.
            hidden: True at tokens that nobody may look at, shape ``[batch, length]``.
        """
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        logits = query @ key.transpose(-1, -2) * self.scale
        if self.causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -math.inf)
        if hidden is not None:
            logits = logits.masked_fill(hidden[:, None, None, :], -math.inf)
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        result: Tensor = self.out(mixed)
        return result


class Block(nn.Module):
    """Pre- or post-norm Transformer block, with LayerScale and dropout if wanted."""

    def __init__(
        self, width: int, *, pre_norm: bool = True, causal: bool = False, layer_scale: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, causal=causal)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)
        self.gamma1, self.gamma2 = (
            nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None for _ in range(2)
        )

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return an output like ``x``; see :class:`Attention`."""
        if self.pre_norm:
            branch = self.drop(self.attention(self.norm1(x), hidden))
            x = x + (branch if self.gamma1 is None else self.gamma1 * branch)
            branch = self.drop(self.mlp(self.norm2(x)))
            x = x + (branch if self.gamma2 is None else self.gamma2 * branch)
        else:
            x = self.norm1(x + self.drop(self.attention(x, hidden)))
            x = self.norm2(x + self.drop(self.mlp(x)))
        return x


class DigitTransformer(nn.Module):
    """Encoder that reads a digit as eight rows of eight pixels, with a class token and an unused mask token."""

    def __init__(
        self,
        layers: int,
        *,
        width: int = 32,
        pre_norm: bool = True,
        layer_scale: float = 0.0,
        dropout: float = 0.0,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(9, width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(width)) if mask_token else None
        self.blocks = nn.ModuleList(
            Block(width, pre_norm=pre_norm, layer_scale=layer_scale, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``; rows that hold NaN are taken as padding."""
        rows = x.reshape(-1, 8, 8)
        tokens = torch.cat([self.class_token.expand(len(rows), 1, -1), self.embed(rows)], dim=1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.head(self.norm(tokens)[:, 0])
        return result


class Decoder(nn.Module):
    """Causal language model over characters."""

    def __init__(
        self,
        letters: int,
        layers: int = 2,
        *,
        width: int = 48,
        length: int = 48,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.position = nn.Embedding(length, width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, causal=True, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, length, letters]``."""
        tokens = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.head(self.norm(tokens))
        return result


class CharacterRNN(nn.Module):
    """Recurrent language model over characters."""

    def __init__(
        self, letters: int, *, kind: MakeRecurrent = nn.LSTM, width: int = 64, identity: float | None = None
    ) -> None:
        """Make the model.

        Args:
            letters: Size of the alphabet.
            kind: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
            width: Hidden width.
            identity: Make it an IRNN: ReLU, and a hidden matrix of so many times the identity (Le et al. 2015).
        """
        super().__init__()
        self.embed = nn.Embedding(letters, 32)
        options = {} if identity is None else {"nonlinearity": "relu"}
        self.rnn = kind(32, width, batch_first=True, **options)
        if identity is not None:
            with torch.no_grad():
                nn.init.eye_(self.rnn.get_parameter("weight_hh_l0")).mul_(identity)
                self.rnn.get_parameter("bias_ih_l0").zero_()
                self.rnn.get_parameter("bias_hh_l0").zero_()
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, length, letters]``."""
        result: Tensor = self.head(self.rnn(self.embed(x))[0])
        return result


class RowReader(nn.Module):
    """Recurrent net that reads a digit row by row."""

    def __init__(self, kind: MakeRecurrent, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = kind(8, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]``."""
        result: Tensor = self.out(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])
        return result


class RecallNet(nn.Module):
    """Recurrent net for the memory task, with the initializations that make or break it.

    Args:
        kind: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
        start: ``"default"``, ``"orthogonal"`` (hidden matrix, times ``gain``), ``"chrono"`` (LSTM gates for sequences
            of ``length``) or ``"keep"`` (GRU gate for such sequences).
        gain: Factor on the hidden matrix.
        length: Steps to remember over.
    """

    def __init__(
        self, kind: MakeRecurrent, start: str = "default", *, gain: float = 1.0, length: int = 48, hidden: int = 32
    ) -> None:
        super().__init__()
        self.rnn = kind(8, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 4)
        with torch.no_grad():
            if start == "orthogonal":
                nn.init.orthogonal_(self.rnn.get_parameter("weight_hh_l0"), gain)
            elif start in {"chrono", "keep"}:
                self._remember(start, length, hidden)

    def _remember(self, start: str, length: int, hidden: int) -> None:
        """Set gate biases for memories of up to ``length`` steps: Tallec and Ollivier (2018), ICLR."""
        offset = self.rnn.get_parameter("bias_ih_l0").zero_()
        self.rnn.get_parameter("bias_hh_l0").zero_()
        bias = torch.log(torch.empty(hidden).uniform_(1, length - 1))
        offset[hidden : 2 * hidden] = bias
        if start == "chrono":
            offset[:hidden] = -bias

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 4]``."""
        result: Tensor = self.out(self.rnn(x)[0][:, -1])
        return result


class TextNet(nn.Module):
    """Classifier of word sequences: mean of embeddings, then a small perceptron."""

    def __init__(
        self, words: int = 600, classes: int = 8, *, width: int = 32, sparse: bool = False, padding: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0 if padding else None, sparse=sparse)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, classes]``."""
        shown = (x != 0).unsqueeze(-1)
        mean = (self.embed(x) * shown).sum(1) / shown.sum(1).clamp(min=1)
        result: Tensor = self.head(F.relu(self.hidden(mean)))
        return result
