"""Networks that no cure was chosen on, written as people write them; see :mod:`benchmarks.clinic.fresh`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "VAE",
    "DenseNet",
    "Encoder",
    "Highway",
    "Mixer",
    "MultiTask",
    "Plain",
    "Residual",
    "Siamese",
    "Swish",
    "Tabular",
    "UNet",
    "Vgg",
    "groups",
    "no_norm",
    "separable",
    "squeezer",
    "strided",
]

Act: TypeAlias = Callable[[Tensor], Tensor]
Norm: TypeAlias = Callable[[int], nn.Module]


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def groups(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class Vgg(nn.Module):
    """Stages of 3x3 convolutions, each with max pooling behind it."""

    def __init__(self, depth: int = 2, width: int = 12, *, act: Act = F.relu, norm: Norm = no_norm) -> None:
        super().__init__()
        self.act, self.depth = act, depth
        sizes = [1] + [width] * depth + [2 * width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm(size) for size in sizes[1:])
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = x.reshape(-1, 1, 8, 8)
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = self.act(norm(conv(x)))
            if place % self.depth == 0:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.fc(F.dropout(x.flatten(1), 0.1, self.training))
        return logits


def strided(act: Callable[[], nn.Module] = nn.ReLU, norm: Norm = no_norm, width: int = 12) -> nn.Sequential:
    """Return a net whose convolutions take strides instead of pooling."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inp, out, stride in ((1, width, 1), (width, width, 2), (width, 2 * width, 1), (2 * width, 2 * width, 2)):
        layers += [nn.Conv2d(inp, out, 3, stride, 1), norm(out), act()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 32), act(), nn.Linear(32, 10))


def separable(
    blocks: int = 3, width: int = 16, norm: Norm = nn.BatchNorm2d, act: Callable[[], nn.Module] = nn.ReLU6
) -> nn.Sequential:
    """Return a net of depthwise and pointwise convolutions, as in MobileNet."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), norm(width), act()]
    for place in range(blocks):
        stride = 2 if place == 1 else 1
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width), norm(width), act()]
        layers += [nn.Conv2d(width, width, 1), norm(width), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


class _Basic(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, norm: Norm, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.conv1, self.norm1 = nn.Conv2d(inp, out, 3, stride, 1), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1), norm(out)
        self.short = nn.Conv2d(inp, out, 1, stride) if skip and inp != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(hidden + self.short(x)) if self.skip else F.relu(hidden)


class Residual(nn.Module):
    """Small residual net in two stages."""

    def __init__(self, blocks: int = 1, width: int = 12, *, norm: Norm = nn.BatchNorm2d, skip: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), norm(width)
        sizes = [(width, width, 1)] * blocks + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * (blocks - 1)
        self.blocks = nn.Sequential(*(_Basic(*size, norm, skip=skip) for size in sizes))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.blocks(F.relu(self.norm(self.stem(x.view(-1, 1, 8, 8)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class UNet(nn.Module):
    """Convolutional autoencoder, with a skip across the bottleneck if wanted."""

    def __init__(self, width: int = 8, *, skip: bool = True, act: Act = F.relu, middle: int = 1) -> None:
        super().__init__()
        self.skip, self.act = skip, act
        self.first, self.down = nn.Conv2d(1, width, 3, 1, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.middle = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, 1, 1) for _ in range(middle))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge = nn.Conv2d(2 * width if skip else width, width, 3, 1, 1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return 64 pixels."""
        first = self.act(self.first(x.reshape(-1, 1, 8, 8)))
        x = self.act(self.down(first))
        for conv in self.middle:
            x = self.act(conv(x))
        x = self.act(self.up(x))
        x = self.act(self.merge(torch.cat([x, first], 1) if self.skip else x))
        pixels: Tensor = self.out(x).flatten(1)
        return pixels


def squeezer(act: Callable[[], nn.Module] = nn.Tanh, sizes: tuple[int, ...] = (48, 32, 16)) -> nn.Sequential:
    """Return an autoencoder that narrows to the last of some sizes and widens again."""
    widths = [64, *sizes, *reversed(sizes[:-1]), 64]
    layers: list[nn.Module] = []
    for inp, out in pairwise(widths):
        layers += [nn.Linear(inp, out), act()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """Variational autoencoder; gives pixels, means and logarithms of variances."""

    def __init__(self, depth: int = 1, width: int = 64, code: int = 12, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        more = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), act())]
        self.encoder = nn.Sequential(nn.Linear(64, width), act(), *more)
        self.mean, self.logvar = nn.Linear(width, code), nn.Linear(width, code)
        more = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), act())]
        self.decoder = nn.Sequential(nn.Linear(code, width), act(), *more, nn.Linear(width, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, means and logarithms of variances of the code."""
        hidden = self.encoder(x)
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        code = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if self.training else mean
        return self.decoder(code), mean, logvar


class Mixer(nn.Module):
    """MLP-Mixer on 16 patches of 2x2 pixels."""

    def __init__(self, layers: int = 3, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.tokens = nn.ModuleList(self._mlp(16, 32) for _ in range(layers))
        self.channels = nn.ModuleList(self._mlp(width, 2 * width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _mlp(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed(F.unfold(x.reshape(-1, 1, 8, 8), 2, stride=2).transpose(1, 2))
        for place, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * place](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * place + 1](x))
        logits: Tensor = self.head(self.norms[-1](x).mean(1))
        return logits


class Encoder(nn.Module):
    """Torch's own Transformer encoder over the rows of a digit."""

    def __init__(self, layers: int = 2, width: int = 32, *, norm_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 8, width))
        options: dict[str, Any] = {"dropout": dropout, "batch_first": True, "norm_first": norm_first}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed(x.view(-1, 8, 8)) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class Plain(nn.Module):
    """Perceptron whose activation and dropout are plain functions."""

    def __init__(
        self,
        inputs: int = 64,
        outputs: int = 10,
        depth: int = 4,
        width: int = 48,
        *,
        act: Act = F.relu,
        dropout: float = 0.0,
        init: Callable[[Tensor], Any] | None = nn.init.kaiming_normal_,
        norm: Norm = no_norm,
    ) -> None:
        super().__init__()
        self.act, self.dropout = act, dropout
        self.layers = nn.ModuleList(nn.Linear(width if place else inputs, width) for place in range(depth - 1))
        self.norms = nn.ModuleList(norm(width) for _ in range(depth - 1))
        self.out = nn.Linear(width, outputs)
        if init is not None:
            for layer in self.layers:
                init(layer.get_parameter("weight"))
                nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.dropout(self.act(norm(layer(x))), self.dropout, self.training)
        result: Tensor = self.out(x)
        return result


class Highway(nn.Module):
    """Layers that mix their output with their input by a learnt gate."""

    def __init__(self, inputs: int, outputs: int, depth: int = 12, width: int = 32, *, carry: float = 2.0) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.plain = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for gate in self.gates:
            nn.init.constant_(gate.get_parameter("bias"), -carry)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        x = torch.tanh(self.first(x))
        for plain, gate in zip(self.plain, self.gates, strict=True):
            share = torch.sigmoid(gate(x))
            x = share * torch.tanh(plain(x)) + (1 - share) * x
        result: Tensor = self.last(x)
        return result


class DenseNet(nn.Module):
    """Each layer sees the outputs of all before it."""

    def __init__(self, inputs: int, outputs: int, depth: int = 5, growth: int = 16, act: Act = F.relu) -> None:
        super().__init__()
        self.act = act
        self.layers = nn.ModuleList(nn.Linear(inputs + place * growth, growth) for place in range(depth))
        self.out = nn.Linear(inputs + depth * growth, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        for layer in self.layers:
            x = torch.cat([x, self.act(layer(x))], 1)
        result: Tensor = self.out(x)
        return result


class Swish(nn.Module):
    """Gated perceptron: SiLU of one projection times another, as in SwiGLU; residual if wanted."""

    def __init__(self, inputs: int, outputs: int, depth: int = 5, width: int = 32, *, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.embed = nn.Linear(inputs, width)
        self.gate, self.up, self.down = (
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth)) for _ in range(3)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        x = self.embed(x)
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            hidden = down(F.silu(gate(x)) * up(x))
            x = x + hidden if self.skip else hidden
        result: Tensor = self.head(x)
        return result


class Tabular(nn.Module):
    """Embeds whole-numbered columns and joins them with the measured ones."""

    def __init__(self, counted: int = 3, measured: int = 10, width: int = 32, act: Act = F.relu) -> None:
        super().__init__()
        self.counted, self.act = counted, act
        self.embeds = nn.ModuleList(nn.Embedding(8, 4) for _ in range(counted))
        self.first, self.second = nn.Linear(4 * counted + measured, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        columns = [embed(x[:, place].long()) for place, embed in enumerate(self.embeds)]
        x = self.act(self.first(torch.cat([*columns, x[:, self.counted :]], 1)))
        logits: Tensor = self.out(self.act(self.second(x)))
        return logits


class Siamese(nn.Module):
    """One tower for both digits of a pair, and a logit of whether they are the same number."""

    def __init__(self, depth: int = 4, width: int = 48, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        sizes = [64] + [width] * (depth - 1)
        layers = [layer for size in sizes for layer in (nn.Linear(size, width), act())]
        self.tower = nn.Sequential(*layers)
        self.judge = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit of each pair of 128 pixels."""
        logit: Tensor = self.judge((self.tower(x[:, :64]) - self.tower(x[:, 64:])).abs()).squeeze(-1)
        return logit


class MultiTask(nn.Module):
    """A shared body and three heads: the number, whether it is odd, and how much ink it takes."""

    def __init__(self, depth: int = 4, width: int = 48) -> None:
        super().__init__()
        layers = [layer for size in [64] + [width] * (depth - 1) for layer in (nn.Linear(size, width), nn.GELU())]
        self.body = nn.Sequential(*layers)
        self.number, self.odd, self.ink = nn.Linear(width, 10), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the heads by name."""
        x = self.body(x)
        return {"number": self.number(x), "odd": self.odd(x).squeeze(-1), "ink": self.ink(x).squeeze(-1)}
