"""Clippers on two real processes: one norm and one decision on every rank, with DDP and with sharded parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import gradguard
from gradguard import clip
from tests.processes import run_ranks

MAKERS: dict[str, Callable[..., clip.Clipper]] = {
    "norm": lambda m, **o: clip.Norm(m, 0.3, **o),
    "norm without the host": lambda m: clip.Norm(m, 0.3, non_finite="zero"),
    "maximum norm": lambda m, **o: clip.Norm(m, 0.1, norm_type=math.inf, **o),
    "value": lambda m, **o: clip.Value(m, 0.02, **o),
    "agc": clip.AGC,
    "autoclip": clip.AutoClip,
    "zclip": lambda m, **o: clip.ZClip(m, warmup_steps=2, **o),
    "adagc": lambda m, **o: clip.AdaGC(m, warmup_steps=2, max_norm=0.3, **o),
    "adaptive": lambda m, **o: clip.Adaptive(m, window=3, warmup_steps=2, max_norm=0.5, **o),
}


def net() -> nn.Sequential:
    """Return a net whose shapes do not divide by two ranks; one of them has nothing of the last bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.PReLU(), nn.Linear(3, 1))


def whole(tensor: Any) -> torch.Tensor:
    """Return all of a tensor that may be sharded."""
    values: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return values.detach().clone()


def train(model: nn.Module, make: Callable[..., clip.Clipper], rows: slice) -> list[Any]:
    """Train for four steps on some rows of a batch; return results and clipped gradients of each step."""
    clipper = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for step in range(4):
        x = torch.randn(8, 5, generator=generator)[rows]
        optimizer.zero_grad()
        (model(x).square().mean() * 3.0 ** (step + 1)).backward()
        result = clipper.step()
        numbers = [result.norm_before, result.norm_after, result.engaged]
        seen.append((numbers, [whole(p.grad) for p in model.parameters()]))
        optimizer.step()
    return seen


def poison_and_step(model: nn.Module, rank: int, spoil: Callable[[], None]) -> dict[str, Any]:
    """Clip gradients that are bad on rank 1 alone; return what was decided and warned of."""
    clipper = clip.Norm(model, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradguard.GradGuardWarning)
        spoil()
        result = clipper.step()
        optimizer.step()
    return {
        "skipped": result.skipped,
        "none": all(p.grad is None for p in model.parameters()),
        "weights": [whole(p) for p in model.parameters()],
        "warnings": len([w for w in caught if issubclass(w.category, gradguard.GradGuardWarning)]),
    }


def ddp_rank(rank: int) -> dict[str, Any]:
    """Train with DDP on half of each batch, then let one rank's batch be NaN."""
    found: dict[str, Any] = {}
    for name in ("norm", "adaptive", "agc"):
        model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=True)
        found[name] = train(model, MAKERS[name], slice(4 * rank, 4 * rank + 4))
    model = nn.parallel.DistributedDataParallel(net())

    def spoil() -> None:
        model(torch.full((2, 5), math.nan if rank == 1 else 1.0)).sum().backward()

    found["poisoned"] = poison_and_step(model, rank, spoil)
    return found


def fsdp_rank(rank: int) -> dict[str, Any]:
    """Train with sharded parameters on the whole batch, then let one rank's shard be NaN."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name, make in MAKERS.items():
        model = net()
        fully_shard(model, mesh=mesh)
        found[name] = train(model, make, slice(None))
    model = net()
    fully_shard(model, mesh=mesh)

    def spoil() -> None:
        model(torch.ones(2, 5)).sum().backward()
        if rank == 1:
            gradient: Any = model.get_parameter("0.weight").grad
            gradient.to_local()[0, 0] = math.inf

    found["poisoned"] = poison_and_step(model, rank, spoil)

    columns = nn.Parameter(distribute_tensor(torch.arange(1.0, 13.0).reshape(3, 4), mesh, [Shard(1)]))
    columns.grad = distribute_tensor(torch.ones(3, 4), mesh, [Shard(1)])
    clip.AGC([columns]).step()
    found["columns"] = whole(columns.grad)
    return found


def assert_same_run(found: list[Any], expected: list[Any]) -> None:
    """Results and gradients of every step agree."""
    for step, ((numbers, gradients), (want, wanted)) in enumerate(zip(found, expected, strict=True)):
        assert numbers == pytest.approx(want, rel=1e-4), step
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), step


@pytest.mark.slow
def test_ddp_ranks_clip_alike_and_skip_together(tmp_path: Path) -> None:
    """Norms and gradients are those of one process; NaN in one rank's batch makes both skip, and one warns."""
    first, second = run_ranks(ddp_rank, tmp_path)

    for name in ("norm", "adaptive", "agc"):
        assert_same_run(first[name], train(net(), MAKERS[name], slice(None)))
        assert_same_run(second[name], first[name])
    check_poisoned(first["poisoned"], second["poisoned"])


@pytest.mark.slow
def test_sharded_gradients_are_clipped_like_whole_ones(tmp_path: Path) -> None:
    """Every method gives with FSDP2 what it gives in one process; inf in one rank's shard makes both skip."""
    first, second = run_ranks(fsdp_rank, tmp_path)

    for name, make in MAKERS.items():
        expected = train(net(), make, slice(None))
        assert any(numbers[2] for numbers, _ in expected), f"{name} must clip something, or this compares nothing"
        assert_same_run(first[name], expected)
        assert_same_run(second[name], expected)
    check_poisoned(first["poisoned"], second["poisoned"])

    weight = nn.Parameter(torch.arange(1.0, 13.0).reshape(3, 4))
    weight.grad = torch.ones(3, 4)
    clip.AGC([weight]).step()
    assert torch.allclose(first["columns"], weight.grad, rtol=1e-6)


def check_poisoned(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Both ranks skipped, kept their weights, and rank 0 alone warned."""
    start_weights = [p.detach() for p in net().parameters()]
    for rank, found in enumerate((first, second)):
        assert found["skipped"]
        assert found["none"]
        assert all(torch.equal(a, b) for a, b in zip(found["weights"], start_weights, strict=True))
        assert found["warnings"] == (rank == 0)
