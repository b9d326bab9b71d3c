"""DistributedDataParallel on two real processes: true numbers on every rank, one voice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from tests.models import digit_batch, mlp
from tests.processes import run_ranks


def train_rank(rank: int) -> dict[str, Any]:
    """Train a sick net on one rank, and return what its guard saw."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(mlp(12, nn.Sigmoid, init="xavier"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = digit_batch(64)
    mine = slice(32 * rank, 32 * (rank + 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradguard.GradGuardWarning)
        with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[mine]), y[mine])
                loss.backward()
                guard.record(loss=loss)
                optimizer.step()
    diagnosis = guard.report()
    own = [w for w in caught if issubclass(w.category, gradguard.GradGuardWarning)]
    return {
        "norms": guard.history.scalar("grad_norm").tolist(),
        "names": guard.history.parameters.names,
        "primary": diagnosis.primary.code if diagnosis.primary else None,
        "warnings": len(own),
    }


@pytest.mark.slow
def test_two_ranks_see_the_reduced_gradient_and_one_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both ranks read the gradient after the all-reduce, under the user's names; rank 0 warns and reports, once."""
    first, second = run_ranks(train_rank, tmp_path)
    expected = single_process_norms()

    assert first["norms"] == pytest.approx(expected, rel=1e-4)
    assert second["norms"] == first["norms"]
    assert first["names"][0] == "0.weight"
    assert first["primary"] == second["primary"] == "GG101"
    assert (first["warnings"], second["warnings"]) == (1, 0)
    assert capfd.readouterr().out.count("gradguard explain GG101") == 1


def single_process_norms() -> list[float]:
    """Return the gradient norms of the same run in one process on the whole batch."""
    torch.manual_seed(0)
    model = mlp(12, nn.Sigmoid, init="xavier")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch: Any = digit_batch(64)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    return norms
