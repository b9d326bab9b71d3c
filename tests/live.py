"""A model whose gradient is what a test says, and what tests of remedies that act during a run have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard.findings import Severity
from tests.models import digit_batch

ALL: dict[str, Any] = {"clip": "adaptive", "on_spike": "skip", "lr_backoff": True}


class Tilt(nn.Module):
    """A weight whose gradient is what the test says: the loss is ``weight @ slope``."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        return (self.weight * slope).sum()


def slopes(count: int, spikes: dict[int, float], seed: int = 0) -> list[torch.Tensor]:
    """Return gradients of an even size, multiplied at some steps."""
    generator = torch.Generator().manual_seed(seed)
    even = [torch.randn(3, generator=generator) * 0.1 + 1.0 for _ in range(count)]
    return [slope * spikes.get(step, 1.0) for step, slope in enumerate(even)]


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: list[torch.Tensor],
    *,
    guard: gradguard.Guard | None = None,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Train a Tilt on its gradients."""
    for step, slope in enumerate(given):
        optimizer.zero_grad()
        model(slope).backward()
        if guard is not None:
            guard.record()
        optimizer.step()
        after(step)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all parameters and of the optimizer's state."""
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in [*model.parameters(), *state]]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train_digits(model: nn.Module, optimizer: Any, steps: int, **options: Any) -> gradguard.Guard | None:
    """Train on digits; watched where there are options."""
    guard = gradguard.watch(model, optimizer, on_error="raise", **options) if options else None
    for step in range(steps):
        x, y = digit_batch(32, seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if guard is not None:
            guard.record(loss=loss)
        optimizer.step()
    return guard


def hook_counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Count the hooks before and after an optimizer's step."""
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def back_off(guard: gradguard.Guard, code: str = "GG505") -> None:
    """Let the guard believe in an illness."""
    from gradguard.detectors._finding import make_finding

    finding = make_finding(code, Severity.ERROR, "Made up.", step=0, last_step=0)
    assert guard._live is not None
    guard._live.consider(0, [finding])
