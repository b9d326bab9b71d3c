"""Blocks: which modules a model is stacked from, and the gradient that is measured at their inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradguard.monitors import SignalMonitor, _reduce
from gradguard.monitors._reduce import Readback
from gradguard.monitors._targets import outermost_blocks
from tests.driving import Observation, count_hooks, observe, reraise
from tests.models import ConvNet, TransformerClassifier, classification_loss, digit_batch, mlp


class Residual(nn.Module):
    """``x + f(x)`` with two layers; the first of them takes the stream as it is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Stack(nn.Module):
    """A projection, residual blocks, a head; keeps the blocks' inputs for comparison."""

    def __init__(self, blocks: int = 5, *, use: str = "") -> None:
        super().__init__()
        self.inp = nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.out = nn.Linear(16, 10)
        self.use = use
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = []
        x = self.inp(x)
        for block in self.blocks:
            self.inputs.append(x)
            x = checkpoint(block, x, use_reentrant=self.use == "reentrant") if self.use else block(x)
        return self.out(x)


class Sum(nn.Sequential):
    """``x + f(x)`` with a sequence as ``f``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stages(nn.Module):
    """Two stages of three blocks, as vision nets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(Stage() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


class Stage(nn.Module):
    """Blocks and a projection between stages."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.down = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.blocks(x))


def taps(seen: Observation) -> dict[str, float]:
    """Return the gradient norm at the input of each block, by the name of the block."""
    values = zip(seen.layers.blocks, seen.signals["block_delta_norm"], strict=True)
    return {block: float(value) for block, value in values if not math.isnan(value)}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Stack(4), [f"blocks.{index}" for index in range(4)]),
        (lambda: nn.Sequential(*(Residual() for _ in range(4))), [str(index) for index in range(4)]),
        (lambda: nn.Sequential(*(Sum(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))), list("0123")),
        (Stages, [f"stages.{stage}.blocks.{index}" for stage in range(2) for index in range(3)]),
        (
            lambda: nn.Transformer(16, 2, 2, 2, 16, batch_first=True),
            [f"{p}.layers.{i}" for p in ("encoder", "decoder") for i in range(2)],
        ),
        (lambda: TransformerClassifier(5), [f"encoder.layers.{index}" for index in range(5)]),
    ],
    ids=["list", "sequence", "sequences that add", "stages", "encoder and decoder", "encoder"],
)
def test_blocks_are_the_outermost_stack(make: Callable[[], nn.Module], names: list[str]) -> None:
    """Wherever a model keeps its blocks; stages that are too few give way to the blocks they hold."""
    model = make()
    found = {id(block) for block in outermost_blocks(model)}

    assert [name for name, module in model.named_modules() if id(module) in found] == names


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(20, nn.Sigmoid),
        ConvNet,
        lambda: Stack(3),
        lambda: nn.Sequential(*(nn.MultiheadAttention(4, 1) for _ in range(5))),
        lambda: nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(5))),
        lambda: nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)),
    ],
    ids=["layers", "lists of layers", "three blocks", "attention layers", "parametrized layers", "nested containers"],
)
def test_layers_are_no_blocks(make: Callable[[], nn.Module]) -> None:
    """Plain sequences of layers are measured layer by layer, and so is a stack too short to have a depth."""
    assert outermost_blocks(make()) == []


@pytest.mark.parametrize("use", ["", "reentrant", "not reentrant"])
def test_the_gradient_at_block_inputs_is_that_of_autograd(use: str) -> None:
    """It is the whole stream's, through the block and past it, also where blocks are computed again in backward."""
    model, batch = Stack(use=use), digit_batch(16)
    twin = Stack()
    twin.load_state_dict(model.state_dict())
    loss = classification_loss(twin, batch)
    expected = [float(g.norm()) for g in torch.autograd.grad(loss, twin.inputs)]

    seen = observe(model, lambda: classification_loss(model, batch).backward())

    assert list(taps(seen)) == [f"blocks.{index}" for index in range(5)]
    assert list(taps(seen).values()) == pytest.approx(expected, rel=1e-5)
    first = seen.layers.names.index("blocks.0.first")
    assert seen.signals["block_delta_max_abs"][first] <= seen.signals["block_delta_norm"][first] * (1 + 1e-6)


def test_several_backward_passes_are_pooled() -> None:
    """Accumulated batches add up as squares, like every other norm."""
    model, batches = Stack(), [digit_batch(8, seed) for seed in (0, 1)]
    squares = [0.0] * 5
    for batch in batches:
        loss = classification_loss(model, batch)
        found = torch.autograd.grad(loss, model.inputs)
        squares = [square + float(g.square().sum()) for square, g in zip(squares, found, strict=True)]

    def run() -> None:
        for batch in batches:
            classification_loss(model, batch).backward()

    seen = observe(model, run)

    assert list(taps(seen).values()) == pytest.approx([math.sqrt(square) for square in squares], rel=1e-5)


def test_encoder_layers_are_tapped_in_training_only() -> None:
    """A hook on an encoder layer would switch its fast inference path off; it is set once a training pass begins."""
    model = TransformerClassifier(5)
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    assert count_hooks(model.encoder.layers[0]) == 0
    monitor.disarm()

    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert list(taps(seen)) == [f"encoder.layers.{index}" for index in range(5)]
    assert count_hooks(model) == 0


def test_every_layer_knows_its_block() -> None:
    """Rows inside a block carry its name, rows outside of blocks none."""
    model = Stack()
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    expected = ["", *(f"blocks.{index}" for index in range(5) for _ in range(2)), ""]
    assert list(seen.layers.blocks) == expected


def test_blocks_given_one_tensor_are_branches() -> None:
    """Experts and heads side by side are not a stream: only what comes first is measured at its input."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(64, 16), nn.Linear(16, 10)
            self.experts = nn.ModuleList(Residual() for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            return self.out(sum((expert(h) for expert in self.experts), torch.zeros(())))

    model = Experts()
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert list(taps(seen)) == ["experts.0"]


def test_raw_data_has_no_gradient() -> None:
    """A block that takes the batch itself is measured nowhere, and the others are."""
    model = nn.Sequential(*(Residual(64) for _ in range(5)), nn.Linear(64, 10))
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert list(taps(seen)) == ["1", "2", "3", "4"]


def test_taps_change_no_other_number() -> None:
    """Every other statistic is that of the same net without a stack: units seen at an input, norms, calls."""

    class Flat(Stack):
        """The same layers where no stack is recognized: three blocks in the list, and two attributes."""

        def __init__(self) -> None:
            super().__init__(3)
            self.fourth, self.fifth = Residual(), Residual()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for block in (*self.blocks, self.fourth, self.fifth):
                x = block(x)
            return self.out(x)

    model, twin = Stack(), Flat()
    blocks = (*twin.blocks, twin.fourth, twin.fifth)
    for mine, other in zip((twin.inp, *blocks, twin.out), (model.inp, *model.blocks, model.out), strict=True):
        mine.load_state_dict(other.state_dict())
    batch = digit_batch(16)

    seen = observe(model, lambda: classification_loss(model, batch).backward())
    expected = observe(twin, lambda: classification_loss(twin, batch).backward())

    assert not any(expected.layers.blocks)
    for name in seen.signals:
        if not name.startswith("block_"):
            assert seen.signals[name] == pytest.approx(expected.signals[name], rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize(("shift", "more"), [(False, 0), (True, 4)], ids=["layer takes the stream", "code between"])
def test_a_block_costs_at_most_one_reduction(shift: bool, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None where the gradient there is measured anyway: at a layer's output, or because a layer takes the stream."""

    class Shifted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(F.relu(self.first(x + 1.0)))

    def reductions(*, blocks: bool) -> int:
        model = Stack()
        model.blocks = nn.ModuleList(Shifted() if shift else Residual() for _ in range(5))
        if not blocks:
            monkeypatch.setattr("gradguard.monitors._targets.outermost_blocks", lambda model: [])
        count = 0
        original = _reduce.queue_norm

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]  # passed through

        with monkeypatch.context() as patch:
            patch.setattr("gradguard.monitors.signals.queue_norm", counted)
            observe(model, lambda: classification_loss(model, digit_batch(8)).backward())
        return count

    assert reductions(blocks=True) - reductions(blocks=False) == more


def test_hooks_at_blocks_go_away() -> None:
    """After a step, after an exception in a block, and twice over."""
    model = Stack()
    observe(model, lambda: classification_loss(model, digit_batch(8)).backward())
    assert count_hooks(model) == 0

    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3))
    monitor.disarm()
    monitor.close()
    monitor.close()

    assert count_hooks(model) == 0


def test_copies_of_a_tapped_model_report_nothing() -> None:
    """A deep copy of an armed model (EMA) takes inert hooks along."""
    model = Stack()
    monitor = SignalMonitor(model, on_failure=reraise)
    readback = Readback()
    monitor.reset(readback)
    monitor.arm()
    clone = copy.deepcopy(model)
    classification_loss(clone, digit_batch(8)).backward()
    readback.fetch()
    layers, _ = monitor.columns()
    monitor.close()

    assert len(layers) == 0


def test_training_is_the_same_bit_by_bit_with_taps() -> None:
    """Hooks at blocks read and never write."""
    model, batch = Stack(), digit_batch(16)
    twin = copy.deepcopy(model)
    observe(model, lambda: classification_loss(model, batch).backward())
    classification_loss(twin, batch).backward()

    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_compiled_blocks_are_left_alone() -> None:
    """Torch ignores hooks on compiled blocks: they are no taps, and nothing is recompiled for them."""
    model = Stack()
    model.blocks = nn.ModuleList(torch.compile(Residual(), backend="eager") for _ in range(5))  # type: ignore[misc]  # typed as a callable

    assert outermost_blocks(model) == []
