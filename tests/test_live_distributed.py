"""Remedies that act during a run, on two real processes: both ranks do the same at the same steps."""

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


def rank_main(rank: int) -> dict[str, Any]:
    """Train with DDP on halves of batches; rank 1 alone gets a bad half at step 40 and NaN at step 50."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(mlp(3, init="he"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradguard.GradGuardWarning)
        guard = gradguard.watch(
            model, optimizer, clip="adaptive", on_spike="skip", lr_backoff=True, on_error="raise", on_finding="silent"
        )
        for step in range(60):
            x, y = digit_batch(64, seed=step)
            half = slice(32 * rank, 32 * rank + 32)
            factor = {40: 1000.0, 50: float("nan")}.get(step, 1.0) if rank == 1 else 1.0
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[half] * factor), y[half])
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
    texts = [str(w.message) for w in caught if issubclass(w.category, gradguard.GradGuardWarning)]
    return {
        "acts": [(act.step, act.kind, act.before, act.after, act.why) for act in guard.actions],
        "weights": [p.detach() for p in model.parameters()],
        "state": [v for s in optimizer.state.values() for v in s.values()],
        "remarks": guard.diagnose().actions[0].remarks,
        "told": [text for text in texts if "lr_backoff" in text or "NaN or infinity" in text],
    }


@pytest.mark.slow
def test_ranks_skip_the_same_steps_and_stay_equal(tmp_path: Path) -> None:
    """A bad half batch on one rank is skipped on both; weights stay equal bit for bit, and one rank speaks.

    The learning rate is left alone, since ranks might judge their own losses differently, and that is said.
    """
    first, second = run_ranks(rank_main, tmp_path)

    assert [act[:2] for act in first["acts"]] == [(40, "skip"), (50, "skip")]
    assert [act[:4] for act in first["acts"]][:1] == [act[:4] for act in second["acts"]][:1]
    assert [(act[0], act[4]) for act in first["acts"]] == [(act[0], act[4]) for act in second["acts"]]
    for kind in ("weights", "state"):
        assert all(torch.equal(a, b) for a, b in zip(first[kind], second[kind], strict=True))
        assert all(bool(torch.isfinite(a).all()) for a in first[kind])
    assert [remark[:17] for remark in first["remarks"]] == ["lr_backoff is off"]
    assert (len(first["told"]), second["told"]) == (2, []), first["told"]
