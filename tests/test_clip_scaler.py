"""Clippers beside a loss scaler: before and after unscaling, with overflow, with a fused optimizer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard import clip

SCALE = 1024.0


def run(*, scaled: bool, unscale: bool, make: Any, fused: bool = False, attached: bool = False) -> list[Tensor]:
    """Train a linear layer for a few steps with growing gradients; return its weights after each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused, eps=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    clipper = make(model, scaler=scaler if scaled else None)
    if attached:
        clipper.attach(optimizer)
    history = []
    for step in range(8):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().sum() * (step + 0.1)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if not attached:
            clipper.step()
        scaler.step(optimizer)
        scaler.update()
        history.append(torch.cat([p.detach().clone().flatten() for p in model.parameters()]))
    assert clipper.clipped_steps > 0
    return history


MAKERS = {
    "norm": lambda m, **o: clip.Norm(m, 2.0, **o),
    "norm without the host": lambda m, **o: clip.Norm(m, 2.0, non_finite="zero", **o),
    "value": lambda m, **o: clip.Value(m, 0.5, **o),
    "agc": clip.AGC,
    "autoclip": clip.AutoClip,
    "zclip": lambda m, **o: clip.ZClip(m, warmup_steps=3, max_norm=5.0, **o),
    "adagc": lambda m, **o: clip.AdaGC(m, warmup_steps=3, **o),
    "adaptive": lambda m, **o: clip.Adaptive(m, window=4, warmup_steps=2, max_norm=20.0, **o),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"unscale": True}, id="after unscale_"),
        pytest.param({"unscale": False}, id="before unscale_"),
        pytest.param({"unscale": False, "attached": True}, id="attached"),
        pytest.param({"unscale": False, "attached": True, "fused": True}, id="attached to a fused optimizer"),
    ],
)
def test_a_scaler_changes_nothing(make: Any, options: dict[str, bool]) -> None:
    """Thresholds are true to size wherever the clipper is called: the weights are those of a run without a scaler."""
    expected = run(scaled=False, make=make, **(options | {"unscale": False}))
    with_scaler = run(scaled=True, make=make, **options)

    for step, (ours, theirs) in enumerate(zip(with_scaler, expected, strict=True)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), step


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("policy", ["skip", "raise", "zero"])
def test_overflow_before_unscaling_is_left_to_the_scaler(make: Any, bad: float, policy: str) -> None:
    """Gradients keep their bits, nothing is learnt, counted as skipped or warned of; the scaler skips and backs off."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    try:
        clipper = make(model, scaler=scaler, non_finite=policy)
    except TypeError:  # the one whose policy is fixed
        clipper = make(model, scaler=scaler)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    assert model.weight.grad is not None
    model.weight.grad[0, 1] = bad
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    weights = [p.detach().clone() for p in model.parameters()]
    state = {k: v for k, v in clipper.state_dict().items() if k not in ("steps", "averages", "zero_initialized")}

    result = clipper.step()

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad.nan_to_num(7.0), before[name].nan_to_num(7.0))
    assert (result.non_finite, result.skipped, result.engaged) == (True, False, False)
    after = clipper.state_dict()
    assert all(repr(after[k]) == repr(v) for k, v in state.items())
    assert all(math.isinf(v) for v in after.get("averages", {}).values())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_overflow_after_unscaling_is_skipped_quietly_and_the_scaler_still_backs_off() -> None:
    """``unscale_`` has recorded it: gradients are taken away, the scaler skips too, and one overflow is no news."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = clip.Norm(model, 1.0, scaler=scaler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 4)).sum()).backward()
            assert model.weight.grad is not None
            model.weight.grad[0, 1] = math.inf
            scaler.unscale_(optimizer)
            result = clipper.step()
            scaler.step(optimizer)
            scaler.update()
            assert result.skipped
            assert model.weight.grad is None
            assert len(caught) == (step == 9)

    assert scaler.get_scale() == 1.0
    assert clipper.skipped_steps == 10
    assert issubclass(caught[0].category, gradguard.GradGuardWarning)


def test_clipping_leaves_unscaling_to_the_loop() -> None:
    """The clipper never calls ``unscale_``: the loop's own call after it still works."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()

    result = clip.Norm(model, 1.0, scaler=scaler).step()
    scaler.unscale_(optimizer)

    assert result.norm_before == pytest.approx(math.sqrt(10.0))
    assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item() == pytest.approx(
        1
    )


def test_with_two_optimizers_the_right_one_is_asked() -> None:
    """With ``optimizer=`` the other's unscaling is not mistaken for this one's."""
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for model in (first, second):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizers[0])

    norms = [
        clip.Norm(m, 100.0, scaler=scaler, optimizer=o).step().norm_before
        for m, o in zip((first, second), optimizers, strict=True)
    ]

    assert norms == pytest.approx([math.sqrt(3.0)] * 2)


def test_scaled_gradients_whose_squares_overflow_are_measured_right() -> None:
    """A scale of 2**60 takes the squares beyond float32, not the norm."""
    weight = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**66)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()

    assert clip.Norm([weight], 1.0, scaler=scaler).step().norm_before == pytest.approx(5.0)


def test_overflows_with_healthy_steps_between_are_the_scaler_s_trade() -> None:
    """Only skips in a row are news beside a scaler: thirty single ones are counted and not warned of."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = clip.Norm([weight], 1.0, scaler=scaler)
    for step in range(60):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (math.inf if step % 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        clipper.step()
        scaler.step(optimizer)
        scaler.update(SCALE)

    assert clipper.skipped_steps == 30
