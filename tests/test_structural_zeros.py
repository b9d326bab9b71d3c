"""Gradients that are zero, or next to it, by construction: real runs on digits, watched at every step, without a word.

One test for each kind that other tools flag: pitfalls.md, R27.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.findings import Finding, Severity
from tests.models import digit_batch, mlp

Batch = tuple[Tensor, Tensor]


class LowRank(nn.Module):
    """A frozen Linear with a trained low-rank update whose second factor begins at zero. Source: Hu et al. (2022)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the update to the frozen layer's output."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


class ZeroResidual(nn.Module):
    """Blocks whose last layer begins at zero, so that each is the identity at first."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(blocks)
        )
        for block in self.blocks:
            nn.init.zeros_(block[2].weight)  # type: ignore[index]
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Add each block's output to its input."""
        for block in self.blocks:
            x = x + block(x)
        result: Tensor = self.head(x)
        return result


class Attentive(nn.Module):
    """Self-attention over the rows of an image; the bias of the keys has no gradient, as softmax ignores a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True),
            3,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and average."""
        result: Tensor = self.head(self.layers(self.embed(x.reshape(-1, 8, 8))).mean(dim=1))
        return result


class Tokens(nn.Module):
    """Pixels as words: rows of the table that no image uses get no gradient, nor does the padding."""

    def __init__(self, *, sparse: bool, padding: int | None) -> None:
        super().__init__()
        self.table = (
            nn.EmbeddingBag(500, 32, mode="sum", sparse=True) if sparse else nn.Embedding(500, 32, padding_idx=padding)
        )
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Add the words up."""
        words = (x.reshape(len(x), -1) > 0.0).long() + 2 * torch.arange(64)
        found = self.table(words)
        result: Tensor = self.head((found if found.ndim == 2 else found.sum(dim=1)) / 8.0)
        return result


def low_rank() -> nn.Module:
    """Return a pretrained-like net whose layers have low-rank updates."""
    wide = mlp(4, init="he")
    return nn.Sequential(*(LowRank(layer) if isinstance(layer, nn.Linear) else layer for layer in wide.children()))


def biased_before_norm() -> nn.Module:
    """Return layers with a bias that the normalization behind them takes away."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Adam, and SparseAdam for sparse tables."""
    sparse = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.EmbeddingBag) and module.sparse
        for parameter in module.parameters()
    ]
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is other for other in sparse)]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=2e-3)]
    return found + ([torch.optim.SparseAdam(sparse, lr=2e-3)] if sparse else [])


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int
) -> tuple[gradguard.Diagnosis, list[Finding]]:
    """Train under a guard that looks at every step; return the verdict and what was announced."""
    told: list[Finding] = []
    with gradguard.watch(model, optimizers, every=1, on_finding=told.append, on_error="raise") as guard:
        for step in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(model, digit_batch(64, seed=step))
            loss.backward()
            guard.record(loss=loss)
            for optimizer in optimizers:
                optimizer.step()
        return guard.diagnose(), told


MODELS: dict[str, Callable[[], nn.Module]] = {
    "low-rank updates that begin at zero": low_rank,
    "residual branches that begin at zero": ZeroResidual,
    "biases before a normalization": biased_before_norm,
    "key biases of attention": Attentive,
    "rows of a sparse table that no batch uses": lambda: Tokens(sparse=True, padding=None),
    "padding of an embedding": lambda: Tokens(sparse=False, padding=0),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_structural_zeros_are_no_illness(make: Callable[[], nn.Module]) -> None:
    """Nothing is announced, nothing stands, and it learns."""
    torch.manual_seed(0)
    model = make()
    optimizers = optimizers_of(model)
    diagnosis, told = train(model, optimizers, 60)

    assert told == []
    assert diagnosis.healthy is True
    assert not [finding for finding in diagnosis.findings if finding.severity >= Severity.WARNING]
    assert diagnosis.summary.loss_last < 0.8 * diagnosis.summary.loss_first


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_check_takes_no_offence_at_structural_zeros(make: Callable[[], nn.Module]) -> None:
    """The first step is where most of them are zero."""
    torch.manual_seed(0)
    model = make()
    diagnosis = gradguard.check(model, digit_batch(64), loss_of, optimizer=optimizers_of(model))

    assert [finding for finding in diagnosis.findings if finding.severity >= Severity.WARNING] == []


def test_zeros_that_no_construction_excuses_are_an_illness() -> None:
    """Low-rank updates behind a detach, and their sum times zero, as is done for unused parameters."""
    torch.manual_seed(0)
    model = low_rank()
    model.register_forward_hook(lambda _, __, output: output.detach() + 0.0 * sum(p.sum() for p in model.parameters()))
    diagnosis, told = train(model, optimizers_of(model), 12)

    assert {finding.code for finding in told} == {"GG104"}
    assert diagnosis.healthy is False
