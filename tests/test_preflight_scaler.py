"""A check of a model that trains in float16: with its loss scaler, and without one that it would need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard.testing import assert_healthy_gradients


def net(*, cut: bool = False) -> nn.Sequential:
    """Return four layers; ``cut`` puts an operation of slope zero into the middle."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), Rounded() if cut else nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
        nn.Linear(32, 16),
    )  # fmt: skip


class Rounded(nn.Module):
    """Rounds: its derivative is zero wherever it has one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.round()


def batch() -> Tensor:
    """Return standardized data."""
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def half_loss(size: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a reconstruction loss under float16 autocast, multiplied by ``size``."""

    def compute(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return (model(x).float() - x).square().mean() * size

    return compute


def scaler(scale: float = 2.0**16, *, used: bool = False, **options: Any) -> torch.amp.GradScaler:
    """Return a scaler; one that was used has a scale on its device."""
    made = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    if used:
        made.scale(torch.ones(()))
    return made


SMALL = 2.0**-18
"""Size at which float16 loses every gradient of the loss, and at 2^16 times it none."""


def test_a_model_is_checked_as_it_will_be_trained() -> None:
    """Without the scale float16 loses every gradient; with it the same net is healthy."""
    model = net()

    assert gradguard.check(model, batch(), half_loss(SMALL)).healthy is False
    assert gradguard.check(model, batch(), half_loss(SMALL), scaler=scaler()).healthy is True
    assert_healthy_gradients(model, batch(), half_loss(SMALL), scaler=scaler())


def test_float16_is_named_where_it_loses_the_gradient() -> None:
    """A larger scale shows that the zeros are rounding's: GG211 and no GG104."""
    diagnosis = gradguard.check(net(), batch(), half_loss(SMALL))

    assert [finding.code for finding in diagnosis.findings] == ["GG211"]
    finding = diagnosis.findings[0]
    assert float(finding.evidence["share"].value) > 0.9
    assert "of the entries are 0 and would not be with a larger loss" in finding.message
    assert [cure.remedy for cure in finding.prescriptions][:1] == ["loss-scaler"]


@pytest.mark.parametrize("given", [None, scaler()], ids=["without a scaler", "with a scaler"])
def test_a_cut_is_a_cut_in_float16_too(given: Any) -> None:
    """Zeros that no scale brings to life are none of float16's."""
    codes = [finding.code for finding in gradguard.check(net(cut=True), batch(), half_loss(1.0), scaler=given).findings]

    assert "GG104" in codes
    assert "GG211" not in codes


def test_zeros_in_float32_are_looked_at_once() -> None:
    """No further pass where no module computes in float16, and none where few gradients are zero."""
    calls = 0

    def counted(loss: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
        def compute(model: nn.Module, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(model, x)

        return compute

    gradguard.check(net(cut=True), batch(), counted(lambda model, x: (model(x) - x).square().mean()))
    gradguard.check(net(), batch(), counted(half_loss(1.0)))
    gradguard.check(net(), batch(), counted(half_loss(SMALL)), scaler=scaler())

    assert calls == 3


@pytest.mark.parametrize("scale", [2.0**16, 8.0, 1.0])
def test_numbers_are_those_without_the_scale(scale: float) -> None:
    """Norms of gradients and of signals, and the loss, are the unscaled ones: powers of two change no bit of them."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).square().mean()

    plain = gradguard.check(net(), batch(), loss)
    scaled = gradguard.check(net(), batch(), loss, scaler=scaler(scale))

    assert scaled.summary.grad_norm_median == pytest.approx(plain.summary.grad_norm_median, rel=1e-12)
    assert scaled.summary.loss_first == plain.summary.loss_first
    deltas = [[layer.delta_norm for layer in diagnosis.layers] for diagnosis in (scaled, plain)]
    np.testing.assert_allclose(deltas[0], deltas[1], rtol=1e-12)


def test_a_scale_that_overflows_is_lowered_as_in_training() -> None:
    """A scaler begins too high and skips a few steps: that is no fault of the model."""
    diagnosis = gradguard.check(net(), batch(), half_loss(100.0), scaler=scaler(2.0**24))

    assert diagnosis.healthy is True
    assert diagnosis.findings == ()


@pytest.mark.parametrize("given", [None, scaler()], ids=["without a scaler", "with a scaler"])
def test_gradients_that_overflow_at_any_scale_are_found(given: Any) -> None:
    """Where the unscaled gradient is not finite either, the scaler excuses nothing."""
    calls = 0

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return half_loss(1.0)(model, x) + (model(x) * 0.0).abs().sqrt().sum()

    families = {finding.family for finding in gradguard.check(net(), batch(), loss, scaler=given).findings}

    assert "non_finite" in families
    assert calls == (1 if given is None else 2)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("size", [1.0, SMALL, 1e4], ids=["ordinary", "small", "overflowing"])
def test_the_scaler_is_left_as_it_was(used: bool, size: float) -> None:
    """Bit by bit: a new scaler stays without a scale, and no optimizer is noted in it."""
    given = scaler(used=used)
    before = copy.deepcopy(given.__dict__)
    model = net()
    gradguard.check(model, batch(), half_loss(size), optimizer=torch.optim.SGD(model.parameters()), scaler=given)

    assert (given._scale is None) is not used
    assert given.__dict__.keys() == before.keys()
    for name, value in given.__dict__.items():
        assert value == before[name], name


def test_a_scaler_that_is_off_changes_nothing() -> None:
    """Loops pass ``GradScaler(enabled=False)`` where they train in float32 or bfloat16."""
    codes = [f.code for f in gradguard.check(net(), batch(), half_loss(SMALL), scaler=scaler(enabled=False)).findings]

    assert codes == ["GG211"]


def test_further_passes_see_the_same_random_numbers() -> None:
    """Zeros are compared entry by entry, so dropout must drop the same; the user's random state is untouched."""
    drawn: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return half_loss(SMALL)(model, x)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    gradguard.check(net(), batch(), loss)
    torch.manual_seed(5)

    assert len(drawn) == 2
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [65536.0, "scaler", torch.tensor(2.0)])
def test_what_is_no_scaler_is_refused(wrong: Any) -> None:
    """The scale itself is the likeliest mistake; the error says what is accepted."""
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None, got"):
        gradguard.check(net(), batch(), half_loss(1.0), scaler=wrong)
