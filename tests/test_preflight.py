"""check(): a verdict before the first step that leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.errors import GradGuardError, NothingObservedError, UnsupportedModelError
from gradguard.testing import assert_healthy_gradients
from tests.driving import count_hooks
from tests.models import ConvNet, TransformerClassifier, classification_loss, digit_batch, mlp


def sick() -> nn.Sequential:
    """Return a net whose gradient vanishes."""
    return mlp(20, nn.Sigmoid, init="xavier")


def test_a_sick_net_is_found_before_the_first_step() -> None:
    """One forward and backward pass shows the vanishing gradient and its cause."""
    diagnosis = gradguard.check(sick(), digit_batch(64), classification_loss)

    assert diagnosis.healthy is False
    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG101"
    assert diagnosis.primary.cause is gradguard.Cause.ACTIVATION_DERIVATIVE
    assert diagnosis.summary.kind == "check"


@pytest.mark.parametrize(
    "make",
    [lambda: mlp(20, init="he"), lambda: ConvNet(6), lambda: TransformerClassifier(8), lambda: mlp(3)],
    ids=["he-20", "conv-residual", "transformer-8", "three-layers"],
)
def test_healthy_nets_pass(make: Callable[[], nn.Module]) -> None:
    """One observation is enough to call a net healthy before training."""
    assert gradguard.check(make(), digit_batch(64), classification_loss).healthy is True


def test_nothing_of_the_users_moves() -> None:
    """Parameters, buffers, gradients, random states, modes and hooks are as they were, bit for bit."""
    model = ConvNet(2)
    model.norms[0].eval()
    model.register_buffer("noise", torch.randn(3))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    fired: list[int] = []
    handle = next(model.parameters()).register_post_accumulate_grad_hook(lambda _: fired.append(1))
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()  # noqa: NPY002  # the global one

    def compute_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002, S311  # as augmentation would
        net.noise = torch.randn(3)
        return classification_loss(net, batch)

    gradguard.check(model, digit_batch(32), compute_loss)

    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(
        torch.equal(old, p.grad) for old, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None
    )
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state(legacy=False)["state"]["key"]).all()  # noqa: NPY002  # as above
    assert states[2] == random.getstate()
    assert count_hooks(model) == 0
    assert fired == []
    handle.remove()


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    """The user's exception comes through with a note; buffers and hooks are put back."""
    model = ConvNet(2)
    before = copy.deepcopy(model.state_dict())

    def compute_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        net(batch[0])
        raise KeyError("labels")

    with pytest.raises(KeyError) as caught:
        gradguard.check(model, digit_batch(8), compute_loss)

    assert "raised by compute_loss(model, batch)" in caught.value.__notes__[0]
    assert count_hooks(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_and_losses_may_have_any_form() -> None:
    """A batch is whatever compute_loss takes; a mapping with a loss is accepted, as a LightningModule returns it."""
    model = mlp(3)
    x, y = digit_batch(16)

    diagnosis = gradguard.check(
        model, {"x": x, "y": y}, lambda net, batch: {"loss": F.cross_entropy(net(batch["x"]), batch["y"]), "log": 1}
    )

    assert diagnosis.healthy is True


def test_a_lightning_module_needs_no_trainer() -> None:
    """training_step can serve as the loss."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]  # made from an optional import
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(20, nn.Sigmoid, init="xavier")

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    diagnosis = gradguard.check(Module(), digit_batch(32), lambda module, batch: module.training_step(batch, 0))

    assert diagnosis.primary is not None
    assert diagnosis.primary.layers[0].startswith("net.")


class StochasticDepth(nn.Module):
    """A residual net that skips each block now and then while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            if torch.rand(()) < 0.8:
                x = x + block(x).relu()
        return self.out(x)


@pytest.mark.parametrize("seed", range(8))
def test_a_block_skipped_by_chance_is_no_finding(seed: int) -> None:
    """Stochastic depth leaves blocks without a gradient; a few more passes show that they are not cut off."""
    torch.manual_seed(seed)

    assert gradguard.check(StochasticDepth(), digit_batch(32), classification_loss).healthy is True


def test_evaluation_mode_is_checked_as_it_is() -> None:
    """A model in evaluation mode is observed too, and stays in it."""
    model = sick().eval()

    assert gradguard.check(model, digit_batch(32), classification_loss).healthy is False
    assert not model.training


@pytest.mark.parametrize(
    ("compute_loss", "error", "text"),
    [
        (lambda m, b: m(b[0]), ValueError, r"must return a scalar, got a tensor of shape \(8, 10\)"),
        (lambda m, b: 3.0, TypeError, "must return a scalar tensor, .* got float"),
        (
            lambda m, b: m(b[0]).sum().detach(),
            UnsupportedModelError,
            r"depends on no trainable parameter.*\.detach\(\)",
        ),
        ("loss", TypeError, r"compute_loss must be callable as compute_loss\(model, batch\), got str"),
    ],
    ids=["not-scalar", "no-tensor", "detached", "not-callable"],
)
def test_bad_losses_get_a_clear_error(compute_loss: Any, error: type[Exception], text: str) -> None:
    """Each message says what came, what is accepted, and what to do."""
    with pytest.raises(error, match=text):
        gradguard.check(mlp(2), digit_batch(8), compute_loss)


def test_lazy_and_inference_mode_are_refused() -> None:
    """What cannot be checked without changing it is refused with the way out."""
    with pytest.raises(UnsupportedModelError, match="Run one forward pass first"):
        gradguard.check(nn.LazyLinear(10), digit_batch(8), classification_loss)
    with torch.inference_mode(), pytest.raises(GradGuardError, match="inference_mode"):
        gradguard.check(mlp(2), digit_batch(8), classification_loss)


def test_selected_rules_speak_alone() -> None:
    """Select and ignore take codes, names and families."""
    assert gradguard.check(sick(), digit_batch(32), classification_loss, ignore="vanishing").healthy is True
    assert gradguard.check(sick(), digit_batch(32), classification_loss, select="GG201").findings == ()


def test_assertion_for_test_suites() -> None:
    """assert_healthy_gradients passes on the healthy and fails on the sick with the report as its message."""
    assert assert_healthy_gradients(mlp(3), digit_batch(16), classification_loss).healthy is True
    with pytest.raises(AssertionError, match="GG101"):
        assert_healthy_gradients(sick(), digit_batch(16), classification_loss)
    with pytest.raises(ValueError, match="fail_on must be one of 'info', 'warning', 'error', got 'never'"):
        assert_healthy_gradients(mlp(3), digit_batch(16), classification_loss, fail_on="never")


def independent_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss that has a gradient, but not with respect to the model."""
    return torch.zeros((), requires_grad=True) * 1.0


def test_a_loss_that_depends_on_nothing_is_a_finding() -> None:
    """A loss with a gradient function that leads nowhere into the model is named as wiring."""
    diagnosis = gradguard.check(mlp(3), digit_batch(4), independent_loss)

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG104"
    assert diagnosis.primary.cause is gradguard.Cause.WIRING


def test_assertion_needs_something_to_observe() -> None:
    """Where no rule may speak and no gradient was seen, nothing is asserted."""
    with pytest.raises(NothingObservedError):
        assert_healthy_gradients(mlp(3), digit_batch(4), independent_loss, ignore="GG104")
