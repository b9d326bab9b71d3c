"""Pre-LN against post-LN: which of them a Transformer is, and the gradients that Xiong et al. (2020) predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.findings import Diagnosis
from gradguard.report._story import block_text
from tests import models
from tests import report_fixtures as made
from tests.test_report import flat, printed


class Tokens(nn.Module):
    """Encoder over tokens, with weights drawn as in the paper's experiment: Xavier, each block its own."""

    def __init__(self, depth: int, *, pre: bool, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=pre)
        last = nn.LayerNorm(width) if pre else None
        self.encoder = nn.TransformerEncoder(block, depth, norm=last, enable_nested_tensor=False)
        self.out = nn.Linear(width, 50)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.encoder(self.embed(x))))


def checked(depth: int, *, pre: bool, seed: int = 0) -> tuple[Tokens, Tensor, Tensor, Diagnosis]:
    """Return an encoder, its batch, and what a check says of them."""
    torch.manual_seed(seed)
    model, x, y = Tokens(depth, pre=pre), torch.randint(0, 50, (4, 12)), torch.randint(0, 50, (4, 12))
    found = gradguard.check(model, x, lambda m, batch: F.cross_entropy(m(batch).flatten(0, 1), y.flatten()))
    return model, x, y, found


@pytest.mark.parametrize(("pre", "placement"), [(True, "pre-LN"), (False, "post-LN")])
def test_the_placement_of_norms_is_read_from_the_order_of_execution(pre: bool, placement: str) -> None:
    """The names and the order of definition are the same for both: only what runs first tells."""
    _, _, _, found = checked(6, pre=pre)

    assert found.block_profile is not None
    assert found.block_profile.placement == placement
    assert found.block_profile.blocks == tuple(f"encoder.layers.{index}" for index in range(6))
    assert found.block_profile.step == 0


def test_gradients_are_those_of_autograd() -> None:
    """Per block the norm is that of both feed-forward weights, and no bias, attention or norm counts."""
    model, x, y, found = checked(6, pre=True)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = []
    for layer in model.encoder.layers:
        weights = [linear.weight.grad for linear in (layer.linear1, layer.linear2)]
        expected.append(math.sqrt(sum(float(grad.square().sum()) for grad in weights)))

    assert found.block_profile is not None
    assert found.block_profile.ffn_grad_norm == pytest.approx(expected, rel=1e-4)


def test_the_theorem_shows_at_depth_6_12_and_24() -> None:
    """At the last block the gradient is the same at any depth for post-LN, and falls with its root for pre-LN."""
    last: dict[bool, list[float]] = {True: [], False: []}
    growth: dict[bool, list[float]] = {True: [], False: []}
    for pre in (True, False):
        for depth in (6, 12, 24):
            profile = checked(depth, pre=pre)[3].block_profile
            assert profile is not None
            last[pre].append(profile.ffn_grad_norm[-1])
            growth[pre].append(profile.growth)

    assert last[True][0] / last[True][2] == pytest.approx(2.0, rel=0.25)
    assert last[True][0] / last[True][1] == pytest.approx(math.sqrt(2.0), rel=0.25)
    assert last[False][0] / last[False][2] == pytest.approx(1.0, rel=0.5)
    assert max(growth[True]) < 0.9
    assert min(growth[False]) > max(growth[True])


@pytest.mark.parametrize(
    "make",
    [lambda: models.mlp(8), lambda: models.ResidualMLP(6), lambda: models.ConvNet(6)],
    ids=["mlp", "res", "conv"],
)
def test_other_models_have_none(make: Callable[[], nn.Module]) -> None:
    """Without a stack of normalized blocks there is nothing to tell."""
    torch.manual_seed(0)
    found = gradguard.check(make(), models.digit_batch(16), models.classification_loss)

    assert found.block_profile is None
    assert found.to_dict()["block_profile"] is None


def test_norms_at_both_ends_are_neither() -> None:
    """A block between two norms is not called one or the other."""

    class Sandwich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.down, self.last = (
                nn.LayerNorm(8),
                nn.Linear(8, 16),
                nn.Linear(16, 8),
                nn.LayerNorm(8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.as_tensor(self.last(self.down(F.gelu(self.up(self.first(x))))))

    torch.manual_seed(0)
    model = nn.Sequential(*(Sandwich() for _ in range(6)))
    found = gradguard.check(model, torch.randn(4, 8), lambda m, x: m(x).square().mean())

    assert found.block_profile is None


def test_a_report_tells_it_of_the_sick_and_on_request() -> None:
    """It is no illness: who is well is not told, unless everything is asked for."""
    profile = checked(6, pre=False)[3].block_profile
    ill, well = (replace(diagnosis, block_profile=profile) for diagnosis in (made.sick(), made.healthy()))

    assert "6 Transformer blocks, post-LN (norms after the residual additions)" in flat(printed(ill))
    assert "Transformer blocks" not in printed(well)
    assert "6 Transformer blocks, post-LN" in flat(printed(well, show_all=True))


def test_the_line_reads_as_meant() -> None:
    """Placement, both ends, the trend, and what is usual."""
    profile = checked(6, pre=True)[3].block_profile
    assert profile is not None
    known = replace(profile, ffn_grad_norm=(0.32, 0.3, 0.28, 0.25, 0.2, 0.196), growth=0.6)

    assert block_text(replace(made.healthy(), block_profile=known), show_all=True) == (
        "6 Transformer blocks, pre-LN (norms before the residual additions): feed-forward gradient 0.32 in the first "
        "and 0.20 in the last at step 0, a factor of 0.60 by trend (usual for pre-LN: even, or smaller near the output)"
    )
