"""GG101 and GG102 in models that are stacked from blocks: the stream is judged, not the branches beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors._depth import supported_span
from gradguard.detectors._stream import stream_of, stream_spans
from gradguard.detectors.depth import find_depth, observed_spans
from gradguard.findings import Cause, Severity
from gradguard.history import History
from gradguard.records import FloatArray, LayerTable
from tests.driving import observe
from tests.histories import NAN, chain, observation, run_of
from tests.models import classification_loss, digit_batch

CONFIG = GuardConfig()

# ------------------------------------------------------------------------------------------------- made-up streams

Rows = list[tuple[str, str, float, float, float]]
"""Block, role, gradient at the output, at the input and at the block's input, per row."""


def plain(values: Sequence[float], role: str = "affine") -> Rows:
    """Return layers outside of blocks with these gradients at their outputs, and the same at their inputs."""
    return [("", role, value, value, NAN) for value in values]


def stack(values: Sequence[float], *, name: str = "blocks", branch: float = 1e-5) -> Rows:
    """Return blocks of three layers with these gradients at their inputs, and small ones in their branches."""
    rows: Rows = []
    for index, value in enumerate(values):
        block = f"{name}.{index}"
        rows += [
            (block, "norm", branch * value, value, value),
            (block, "affine", branch * value, branch * value, NAN),
            (block, "affine", branch * value, branch * value, NAN),
        ]
    return rows


def history_of(*parts: Rows, steps: Sequence[int] = (0, 1, 2)) -> History:
    """Return a run in which every observation has these rows."""
    rows = [row for part in parts for row in part]
    blocks, roles, delta, given, taps = zip(*rows, strict=True)
    table = LayerTable(
        names=tuple(f"{block or 'plain'}.{index}" for index, block in enumerate(blocks)),
        types=tuple({"norm": "LayerNorm", "affine": "Linear"}[role] for role in roles),
        kinds=roles,
        roles=roles,
        derivative_bounds=(NAN,) * len(rows),
        blocks=blocks,
    )
    columns = {"block_delta_norm": np.array(taps), "block_delta_max_abs": np.array(taps) * 0.1}
    records = [observation(step, table, np.array(delta), np.array(given), layers=columns) for step in steps]
    return run_of(records, [2.3] * (max(steps) + 1))


def spans(*parts: Rows) -> float:
    """Return the span of the first observation."""
    return float(observed_spans(history_of(*parts), CONFIG)[0])


def test_branches_do_not_count() -> None:
    """Branches five decades below an even stream are no vanishing gradient; a stem before a class token is none."""
    parts = (plain([1e-5]), stack([1.0] * 4), plain([1.0, 1.0]))

    assert spans(*parts) == pytest.approx(0.0, abs=1e-9)
    assert find_depth(history_of(*parts), CONFIG) == []


@pytest.mark.parametrize(("factor", "code"), [(0.1, "GG101"), (10.0, "GG102")])
def test_a_stream_that_changes_from_block_to_block_is_found(factor: float, code: str) -> None:
    """A factor of ten per block over eight blocks; the finding speaks of blocks."""
    (finding,) = find_depth(history_of(stack([factor ** (8 - i) for i in range(8)]), plain([1.0])), CONFIG)

    assert (finding.code, finding.severity) == (code, Severity.ERROR)
    assert "decades over 8 blocks" in finding.message
    assert f"a factor of {factor:g} per block" in finding.message
    assert abs(float(finding.evidence["span"].value)) == pytest.approx(8.0)
    assert finding.evidence["blocks"].value == 8


@pytest.mark.parametrize(
    "parts",
    [
        (plain([10.0 ** (i - 8) for i in range(8)]), stack([1.0] * 12), plain([1.0])),
        (stack([1e-8] * 6), plain([10.0 ** (i - 8) for i in range(8)])),
        (stack([1e-5] * 6, name="a"), plain([1e-3] * 2), stack([1.0] * 6, name="b")),
    ],
    ids=["before", "after", "between"],
)
def test_a_stack_does_not_hide_the_rest_of_the_net(parts: tuple[Rows, ...]) -> None:
    """A plain net before or after the blocks, or a bottleneck between two stacks, may lose the gradient as well."""
    (finding,) = find_depth(history_of(*parts), CONFIG)

    assert finding.code == "GG101"


@pytest.mark.parametrize(
    "parts",
    [
        (stack([1e5, 1.0, 1.0, 1.0, 1.0, 1.0]), plain([1.0])),
        (stack([1e-3] * 6), plain([1e-3, 1.0])),
    ],
    ids=["a class token of zeros", "the input of the classifier"],
)
def test_a_single_point_is_no_depth(parts: tuple[Rows, ...]) -> None:
    """Without its first, or its last, nothing is left of the span."""
    assert spans(*parts) == pytest.approx(0.0)


def test_a_decoder_is_measured_by_itself() -> None:
    """The encoder's gradient comes from all decoder blocks: it is large although the decoder loses its own."""
    encoder = stack([1.0] * 6, name="encoder.layers")
    decoder = stack([10.0 ** (i - 6) for i in range(6)], name="decoder.layers")

    assert spans(encoder, decoder, plain([1.0])) == pytest.approx(-5.0)
    assert spans(encoder, stack([0.5] * 6, name="decoder.layers"), plain([1.0])) == pytest.approx(0.0, abs=0.4)


@pytest.mark.parametrize(
    "parts",
    [
        (plain([1e-5]), stack([1.0] * 4)),
        (plain([1e-5] * 2), stack([1.0] * 2), plain([1.0] * 4)),
    ],
    ids=["too few points", "too few blocks"],
)
def test_short_stacks_are_measured_layer_by_layer(parts: tuple[Rows, ...]) -> None:
    """Below six points, or three blocks, there is no stream to speak of: all layers count, as without blocks."""
    delta = np.array([row[2] for part in parts for row in part])

    assert spans(*parts) == pytest.approx(supported_span(delta))


def test_plain_nets_are_measured_as_ever() -> None:
    """Without blocks, and in records that know nothing of them, the layers' outputs count."""
    history = chain(gain=0.5, layers=20)
    record = history.records[0]
    rows = [i for i, role in enumerate(record.layers.roles) if role == "affine"]

    assert observed_spans(history, CONFIG)[0] == pytest.approx(supported_span(record.layer_values["delta_norm"][rows]))
    assert set(record.layers.blocks) == {""}


def test_a_stream_that_underflows_is_extended() -> None:
    """Blocks at which the gradient is exactly zero lost at least what the blocks behind them lose."""
    values = [0.0, 0.0, *(10.0**i for i in range(-6, 0))]

    assert spans(stack(values), plain([1.0])) == pytest.approx(-8.0, abs=0.2)


def test_observations_without_a_stream_fall_back() -> None:
    """Where blocks were skipped in an observation, that observation is measured by its layers."""
    table = history_of(stack([1.0] * 6)).layers
    taps = np.full((2, len(table)), NAN)
    taps[0, ::3] = 1.0
    taps[1, :6:3] = 1.0
    stream = stream_of(table, taps, np.ones_like(taps), np.ones_like(taps))

    assert stream is not None
    result = stream_spans(stream)
    assert result[0] == pytest.approx(0.0)
    assert np.isnan(result[1])


# --------------------------------------------------------------------------------------------------- real models


class Vision(nn.Module):
    """Patches, a class token, blocks whose branches a LayerScale mutes, the class token's head."""

    def __init__(self, blocks: int = 4, *, scale: float = 1e-5) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.blocks = nn.ModuleList(ScaledBlock(scale) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(-1, 8, 8))
        x = torch.cat([self.token.expand(len(x), 1, 16), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class ScaledBlock(nn.Module):
    """Attention and MLP on branches behind a LayerScale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.scale = nn.Parameter(torch.full((16,), scale))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.scale * self.attention(z, z, z, need_weights=False)[0]
        return x + self.scale * self.mlp(self.norm2(x))


class Plain(nn.Module):
    """A block without a way past it."""

    def __init__(self, make: Callable[[], nn.Module], gain: float) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(64, 64), nn.Linear(64, 64), make()
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=gain / 8.0)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


def layer_span(model: nn.Module) -> float:
    """Return the span by the outputs of all layers with weights."""
    seen = observe(model, lambda: classification_loss(model, digit_batch(16)).backward())
    roles = {"affine", "norm", "attention"}
    delta: FloatArray = seen.signals["delta_norm"][[role in roles for role in seen.layers.roles]]
    return supported_span(delta)


def test_layer_scale_with_a_class_token_is_healthy() -> None:
    """It was called a vanishing gradient: layer outputs span more than three decades, the stream does not."""
    torch.manual_seed(0)
    model = Vision()
    assert layer_span(model) < -CONFIG.span_warning

    diagnosis = gradguard.check(
        model, digit_batch(32), classification_loss, optimizer=torch.optim.AdamW(model.parameters())
    )

    assert diagnosis.healthy is True
    assert diagnosis.findings == ()
    assert abs(diagnosis.summary.span_decades) < CONFIG.span_info


def test_a_run_with_layer_scale_is_healthy() -> None:
    """Silent at every step of training as well."""
    torch.manual_seed(0)
    model, batch = Vision(), digit_batch(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradguard.watch(model, optimizer, on_finding="raise", on_error="raise") as guard:
        for _ in range(12):
            optimizer.zero_grad()
            loss = classification_loss(model, batch)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        found = guard.diagnose().findings

    assert [finding for finding in found if finding.family in {"vanishing", "exploding"}] == []


@pytest.mark.parametrize(
    ("make", "gain", "code", "cause"),
    [
        (nn.Sigmoid, 1.0, "GG101", Cause.ACTIVATION_DERIVATIVE),
        (nn.Tanh, 0.3, "GG101", Cause.WEIGHT_SCALE),
        (nn.ReLU, 5.0, "GG102", Cause.WEIGHT_SCALE),
    ],
)
def test_blocks_without_a_way_past_them_are_found(
    make: Callable[[], nn.Module], gain: float, code: str, cause: Cause
) -> None:
    """Ten plain layers in five blocks: the family and the cause are those of ten plain layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), *(Plain(make, gain) for _ in range(5)), nn.Linear(64, 10))
    primary = gradguard.check(model, digit_batch(64), classification_loss).primary

    assert primary is not None
    assert (primary.code, primary.cause) == (code, cause)
    assert "over 5 blocks" in primary.message
