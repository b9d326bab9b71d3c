"""The search for NaN and infinity: which operation made them, where, out of what; and that it changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradguard
from gradguard.findings import Cause, Severity
from gradguard.monitors import NonFiniteMonitor
from gradguard.records import NonFiniteOrigin
from tests.driving import count_hooks, reraise
from tests.models import ConvNet, SequenceClassifier, TransformerClassifier, classification_loss, digit_batch, mlp

Loss = Callable[[nn.Module, Tensor], Tensor]


class Op(nn.Module):
    """Applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """Return a small net with a function of ReLU outputs, which hold zeros, in the module ``op``."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 8))
    model.add_module("relu", nn.ReLU())
    model.add_module("op", Op(function))
    model.add_module("last", nn.Linear(8, 2))
    return model


def inputs() -> Tensor:
    """Return a batch of six."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss that is finite where the outputs are."""
    return model(x).square().mean()


def search(model: nn.Module, x: Tensor | None = None, loss_of: Loss = mean_square) -> NonFiniteOrigin | None:
    """Search one forward and backward pass."""
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    assert monitor.arm() == ""
    loss = loss_of(model, inputs() if x is None else x)
    loss.backward()
    monitor.pause(loss)
    origin = monitor.close_step(7)
    monitor.close()
    return origin


def found(model: nn.Module, x: Tensor | None = None, loss_of: Loss = mean_square) -> NonFiniteOrigin:
    """Search one step in which something is to be found."""
    origin = search(model, x, loss_of)
    assert origin is not None
    assert origin.step == 7
    return origin


def modes() -> int:
    """Return how many torch function modes are active."""
    return int(torch._C._len_torch_function_stack())


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Every test leaves the stack of modes as it was."""
    before = modes()
    yield
    assert modes() == before


def zero_sum(h: Tensor) -> Tensor:
    """Divide by a sum that is 0."""
    return h / (h - h).sum(dim=1, keepdim=True)


def all_masked(h: Tensor) -> Tensor:
    """Mask every entry of every row."""
    return h.masked_fill(torch.ones_like(h, dtype=torch.bool), -math.inf).softmax(dim=-1)


def masked_by_addition(h: Tensor) -> Tensor:
    """Mask every entry by adding."""
    return F.softmax(h + torch.full_like(h, -math.inf), dim=-1)


def into_slices(h: Tensor) -> Tensor:
    """Write to parts of a tensor."""
    out = torch.empty_like(h)
    out[:, :4] = h[:, :4]  # the other half still holds whatever the memory held
    out[:, 4:] = h[:, 4:].log()
    return out


FORWARD = {
    "log of 0": (lambda h: h.log(), "Tensor.log", "infinity", 0.0),
    "torch.log": (torch.log, "torch.log", "infinity", 0.0),
    "x log x": (lambda h: h * h.log(), "Tensor.log", "infinity", 0.0),
    "in place": (lambda h: h.clone().log_(), "Tensor.log_", "infinity", 0.0),
    "into slices": (into_slices, "Tensor.log", "infinity", 0.0),
    "square root of negative": (lambda h: (h - 0.5).sqrt(), "Tensor.sqrt", "NaN", -0.5),
    "division by 0": (zero_sum, "Tensor.div", "NaN", 0.0),
    "exp overflow": (lambda h: (h * 1e3).exp(), "Tensor.exp", "infinity", 0.0),
    "softmax by hand": (
        lambda h: (h * 1e3).exp() / (h * 1e3).exp().sum(1, keepdim=True),
        "Tensor.exp",
        "infinity",
        0.0,
    ),
    "spread of one": (lambda h: h * h[:1].std(dim=0), "Tensor.std", "NaN", None),
    "all masked": (all_masked, "Tensor.softmax", "NaN", -math.inf),
    "mask added": (masked_by_addition, "F.softmax", "NaN", -math.inf),
    "half overflow": (lambda h: (h.half() * 6e4).float(), "Tensor.mul", "infinity", 0.0),
    "bfloat16 power": (lambda h: ((h + 1).bfloat16() ** 1000).float(), "Tensor.__pow__", "infinity", 1.0),
}


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize(("function", "op", "value", "low"), FORWARD.values(), ids=FORWARD)
def test_the_forward_operation_is_named_with_module_line_and_operands(
    function: Callable[[Tensor], Tensor], op: str, value: str, low: float | None
) -> None:
    """The first operation with finite operands (but for masks) and a result that is not."""
    origin = found(net(function))

    assert (origin.kind, origin.op, origin.value) == ("forward", op, value)
    assert (origin.module, origin.inside) == ("op", True)
    assert origin.place.startswith("test_non_finite_origin.py:")
    assert low is None or origin.operands[0].low == pytest.approx(low) or origin.operands[-1].low == pytest.approx(low)


@pytest.mark.parametrize("first", [True, False])
def test_uninitialised_memory_is_no_origin(first: bool) -> None:
    """A tensor that is written in two parts: what the memory held before is nobody's; the ill part is."""

    def in_parts(h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        out[:, :4] = h[:, :4].log() if first else h[:, :4]
        out[:, 4:] = h[:, 4:] if first else h[:, 4:].log()
        return out

    torch.use_deterministic_algorithms(True)  # which fills such memory with NaN
    try:
        assert found(net(in_parts)).op == "Tensor.log"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_mask_is_named_beside_the_softmax_that_cannot_bear_it() -> None:
    """Infinities put in on purpose are no origin of a NaN; where they came from is told."""
    assert found(net(all_masked)).also.startswith("Tensor.masked_fill at test_non_finite_origin.py:")


def test_an_overflow_of_half_precision_shows_the_type() -> None:
    """The operand's type tells a matter of precision from one of scale."""
    assert found(net(lambda h: (h.half() * 6e4).float())).operands[0].dtype == "float16"


BACKWARD = {
    "root of 0": (
        lambda h: (h * 0).square().sum(1, keepdim=True).sqrt() + h,
        "Tensor.sqrt",
        "SqrtBackward0",
        "infinity",
    ),
    "where": (lambda h: torch.where(h > -1, h, (h - 9).sqrt() * 0 + 1), "Tensor.sqrt", "SqrtBackward0", "NaN"),
    "norm of 0 by hand": (lambda h: (h - h).pow(2).sum().pow(0.5) + h, "Tensor.pow", "PowBackward0", "infinity"),
    "power of 0": (lambda h: (h - h).pow(0.5) + h, "Tensor.pow", "PowBackward0", "infinity"),
}


@pytest.mark.parametrize(("function", "op", "node", "value"), BACKWARD.values(), ids=BACKWARD)
def test_the_backward_operation_is_named(function: Callable[[Tensor], Tensor], op: str, node: str, value: str) -> None:
    """The loss is finite; the derivative of an operation at its operand is not."""
    origin = found(net(function))

    assert (origin.kind, origin.op, origin.node, origin.module) == ("backward", op, node, "op")
    assert origin.value == value
    assert len(origin.operands) >= 1


HARMLESS = {
    "healthy": lambda h: h,
    "norm of 0": lambda h: (h * 0).norm(dim=1, keepdim=True) + h,
    "half masked": lambda h: h.masked_fill(h < h.amax(1, keepdim=True), -math.inf).softmax(dim=-1),
    "infinity behind a ReLU's zeros": lambda h: torch.where(h > 0, h.log(), torch.zeros_like(h)),
    "infinity thrown away": lambda h: h + 0 * torch.nan_to_num(h.log(), neginf=0.0).detach(),
    "sum beyond float32": lambda h: (h[:1, :1] * 0).expand(200, 200).add(3e38).sum(dim=0).clamp(max=1)[:8] + h,
    "uninitialised": lambda h: torch.empty_like(h).fill_(math.nan).fill_(1.0) + h,
}


@pytest.mark.parametrize("function", HARMLESS.values(), ids=HARMLESS)
def test_what_reaches_neither_loss_nor_parameter_is_nothing(function: Callable[[Tensor], Tensor]) -> None:
    """Masks, infinities that are cut off, safe derivatives: no origin."""
    assert search(net(function)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_batch_is_told_from_the_net(value: float) -> None:
    """An argument of the model that is not finite."""
    x = inputs()
    x[2, 1] = value
    origin = found(net(torch.relu), x)

    assert (origin.kind, origin.module, origin.op) == ("input", "first", "F.linear")


def test_a_parameter_is_named() -> None:
    """A weight that holds a NaN, wherever the data first meets it; also where the data is ill as well."""
    model = net(torch.tanh)
    with torch.no_grad():
        model.get_parameter("last.weight")[1, 3] = math.nan
    origin = found(model)

    assert (origin.kind, origin.name, origin.module, origin.value) == ("parameter", "last.weight", "last", "NaN")


def test_a_buffer_is_named() -> None:
    """Running statistics that were lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    model.get_buffer("1.running_var")[0] = math.nan
    assert (found(model).kind, found(model).name) == ("parameter", "1.running_var")


class InForward(nn.Module):
    """Functional code in the forward of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).clamp(min=0).reciprocal()


def test_functional_code_of_the_model_itself() -> None:
    """No child module is to blame."""
    origin = found(InForward(), loss_of=lambda model, x: model(x).mean())
    assert (origin.op, origin.module, origin.inside) == ("Tensor.reciprocal", "", True)


def test_the_loss_function_is_outside_of_the_model() -> None:
    """A log of a probability that is 0, in the loop."""
    origin = found(net(torch.tanh), loss_of=lambda model, x: -(model(x).mean() * 0).log())
    assert (origin.op, origin.inside, origin.module) == ("Tensor.log", False, "")


class Twice(torch.autograd.Function):
    """A custom function whose forward or backward is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.forward_ill = forward
        return x * math.inf if forward else x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * (1.0 if ctx.forward_ill else math.nan), None


@pytest.mark.parametrize(
    ("forward", "kind", "op", "node"), [(True, "forward", "Tensor.mul", ""), (False, "backward", "", "TwiceBackward")]
)
def test_a_custom_function_is_searched(forward: bool, kind: str, op: str, node: str) -> None:
    """Forward its own operations are seen; backward it is one graph node with its name."""
    origin = found(net(lambda h: Twice.apply(h + 1, forward)))
    assert (origin.kind, origin.op, origin.node) == (kind, op, node)


def test_a_checkpointed_block_is_searched_in_its_forward_pass() -> None:
    """Recomputation in the backward pass adds nothing and disturbs nothing."""
    origin = found(net(lambda h: checkpoint(torch.log, h, use_reentrant=False)))
    assert (origin.op, origin.module) == ("torch.log", "op")


def test_two_backward_passes_of_a_step_are_both_searched() -> None:
    """Gradient accumulation: the second batch is the ill one."""
    scale = [1.0]
    model = net(lambda h: ((h + 1) * scale[0]).sum(1, keepdim=True).sqrt() + h)
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    monitor.arm()
    for scale[0] in (1.0, 0.0):
        mean_square(model, inputs()).backward()
    origin = monitor.close_step(0)
    monitor.close()
    assert origin is not None
    assert (origin.kind, origin.op) == ("backward", "Tensor.sqrt")


def test_a_loss_that_the_loop_skips_is_seen() -> None:
    """``if not loss.isfinite(): continue``: no backward pass, no step, and yet an origin at the next step."""
    model = net(torch.tanh)
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    monitor.arm()
    for factor in (0.0, 1.0):
        loss = (model(inputs()).square().mean() * factor).log()
        if loss.isfinite():
            loss.backward()
    origin = monitor.close_step(3)
    monitor.close()
    assert origin is not None
    assert (origin.op, origin.inside) == ("Tensor.log", False)


def test_a_metric_that_overflows_beside_a_finite_loss_is_nothing() -> None:
    """A perplexity with its graph on is no loss."""

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean() + 100
        assert math.isinf(loss.exp().item())
        return loss

    assert search(net(torch.tanh), loss_of=loss_of) is None


def test_gradients_beyond_the_range_of_a_sum_are_nothing_yet() -> None:
    """Huge and finite: their sum leaves float32, they do not."""
    model = nn.Linear(200, 200, bias=False)
    x = torch.ones(2, 200)
    assert search(model, x, lambda net, data: net(data).sum() * 1e36) is None
    gradient = model.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.sum().isinf()

    assert search(model, x, lambda net, data: (net(data) * 1e36).sum() * 1e3) is not None


@pytest.mark.parametrize("function", [torch.log, all_masked, torch.sigmoid], ids=["log", "masked", "healthy"])
def test_numbers_that_wait_on_their_device_say_the_same(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU no number is asked for before the step is over."""
    at_once = search(net(function))
    monkeypatch.setattr("gradguard.monitors._ranges._AT_ONCE", "none")
    assert search(net(function)) == at_once


# ------------------------------------------------------------------------------------------------------- harmlessness


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(6, nn.Tanh),
        lambda: ConvNet(2),
        lambda: SequenceClassifier("lstm"),
        lambda: TransformerClassifier(2, dropout=0.1),
    ],
    ids=["mlp", "conv", "lstm", "transformer"],
)
def test_training_is_bit_identical_while_every_step_is_searched(make: Callable[[], nn.Module]) -> None:
    """Losses, parameters, buffers and random state are the same to the last bit; a healthy net gives nothing."""
    outcomes = []
    for searched in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        guard = gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") if searched else None
        if guard is not None:
            guard.find_non_finite(steps=100)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(16, seed=step))
            loss.backward()
            if guard is not None:
                guard.record(loss=loss)
            optimizer.step()
            losses.append(loss.item())
        if guard is not None:
            assert guard._observing.search.armed
            assert guard.history.origins == ()
            guard.detach()
            assert count_hooks(model) == 0
        outcomes.append((losses, model.state_dict(), torch.get_rng_state()))

    (plain_losses, plain, plain_rng), (losses, seen, rng) = outcomes
    assert plain_losses == losses
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(plain_rng, rng)


@pytest.mark.parametrize("place", ["forward", "loss"])
def test_an_exception_in_the_users_code_leaves_nothing(place: str) -> None:
    """Hooks and mode are gone after detach(), whatever the step was in the middle of."""

    def broken(h: Tensor) -> Tensor:
        raise RuntimeError("broken on purpose")

    model = net(broken if place == "forward" else torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer) as guard:
        guard.find_non_finite()
        with pytest.raises(RuntimeError, match="broken on purpose"):
            broken(model(inputs()))

    assert count_hooks(model) == 0


def test_an_exception_in_the_forward_pass_closes_the_mode_at_once() -> None:
    """Nothing of the search goes on in a notebook where a cell has failed."""

    def broken(h: Tensor) -> Tensor:
        assert modes() > 0
        raise RuntimeError("broken on purpose")

    model = net(broken)
    guard = gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard.find_non_finite()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        model(inputs())

    assert modes() == 0
    guard.detach()


def test_under_another_mode_the_search_ends_with_the_forward_pass() -> None:
    """Who leaves a ``with torch.device(...)`` takes the topmost mode off: it has to be that one."""
    model = net(torch.log)
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    monitor.arm()
    with torch.device("cpu"):
        loss = mean_square(model, inputs())
        assert modes() == 1
    assert modes() == 0
    loss.backward()
    monitor.pause(loss)
    assert monitor.close_step(0) is not None
    monitor.close()


def test_a_mode_entered_in_between_keeps_its_place() -> None:
    """The search takes itself off from below another mode."""
    model = net(torch.tanh)
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    monitor.arm()
    loss = mean_square(model, inputs())
    with torch.device("meta"):
        monitor.pause(loss)
        assert torch.zeros(1).is_meta
    monitor.close()
    assert torch.zeros(1).device.type == "cpu"


def test_evaluation_and_copies_are_not_searched() -> None:
    """A validation pass, a deep copy and a pickled model run as without us."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    monitor = NonFiniteMonitor(model, on_failure=reraise)
    monitor.arm()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301  # our own
    for other in (copied, pickled):
        other(inputs())
        assert modes() == 0
    model.eval()
    model(inputs())
    with torch.no_grad():
        model.train()(inputs())
    assert modes() == 0
    monitor.close()


def test_a_failure_of_ours_is_noted_and_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search switches itself off and says so in the diagnosis."""
    model = net(torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer) as guard:
        monkeypatch.setattr("gradguard.monitors._op_trace._place", lambda frame: 1 / 0)
        guard.find_non_finite()
        for _ in range(3):
            loss = mean_square(model, inputs())
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        notes = [note for note in guard.diagnose().unobserved if "operation" in note.what]

    assert guard.history.observations == 3
    assert "ZeroDivisionError" in notes[0].why


def test_a_compiled_part_is_not_searched() -> None:
    """Compiled code calls no torch functions; the diagnosis says why nothing was searched."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].compile(backend="eager")
    with gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as guard:
        guard.find_non_finite()
        assert any("compiled" in note.why for note in guard.diagnose().unobserved)


# -------------------------------------------------------------------------------------------------------- with a guard


def run(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    loss_of: Loss = mean_square,
    *,
    searched: bool = False,
    steps: int = 40,
    skip: bool = False,
) -> gradguard.Guard:
    """Train for some steps under a guard with the default cadence."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, on_error="raise", on_finding="silent")
    if searched:
        guard.find_non_finite()
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(step)
        loss = loss_of(model, x)
        if skip and not loss.isfinite():
            continue
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
    guard.detach()
    return guard


def gap_at(at: int, value: float = math.nan) -> Callable[[int], Tensor]:
    """Return batches of which one has a gap."""

    def batch(step: int) -> Tensor:
        x = inputs()
        if step == at:
            x[1, 2] = value
        return x

    return batch


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("searched", [False, True])
def test_a_gap_in_the_data_between_observations_is_traced_to_the_data(value: float, searched: bool) -> None:
    """Step 33 is not observed: the batch of the step whose loss is NaN is looked at while it is still there."""
    guard = run(net(torch.relu), gap_at(33, value), searched=searched)
    primary = guard.diagnose().primary

    assert primary is not None
    assert (primary.code, primary.step, primary.layer, primary.cause) == ("GG201", 33, "first", Cause.DATA)
    assert "at step 33" in primary.message


@pytest.mark.parametrize("written", [False, True])
def test_a_batch_that_was_written_to_says_nothing(written: bool) -> None:
    """What the loop changed in place after the forward pass is not what the model saw."""
    model = net(torch.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") as guard:
        x = inputs()
        loss = mean_square(model, x) * math.nan
        loss.backward()
        if written:
            x[0, 0] = math.nan
        guard.record(loss=loss)

    assert guard.history.origins == ()
    assert guard.history.finite_batches == (set() if written else {0})


def test_the_batch_is_let_go_with_the_step() -> None:
    """No batch is kept in memory from one step to the next."""
    model = net(torch.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer):
        x = inputs()
        mean_square(model, x).backward()
        reference = weakref.ref(x)
        optimizer.step()
        del x
        assert reference() is None


def test_an_infinite_input_that_a_bounded_activation_hides_is_found_by_the_search() -> None:
    """The loss is finite; the derivative of the first layer meets the infinity again."""
    x = inputs()
    x[2, 1] = math.inf
    assert found(net(torch.tanh), x).kind == "input"


def test_a_masked_infinity_that_harms_the_backward_pass_is_traced_to_its_maker() -> None:
    """``where`` hides the square of a logarithm: the product's derivative multiplies 0 by infinity."""

    def hidden(h: Tensor) -> Tensor:
        y = torch.log(h * 0 + torch.tensor([0.0]))
        return torch.where(h > -1, h, (y * h).clamp(max=1.0) * y)

    origin = found(net(hidden))
    assert (origin.kind, origin.op) == ("backward", "torch.log")


def test_a_finite_batch_rules_the_data_out() -> None:
    """The loss is NaN in a step that was not observed, and the batch is fine."""
    now = [0]

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        now[0] += 1
        return (mean_square(model, batch) * (now[0] != 34)).log()

    primary = run(net(torch.tanh), lambda _: inputs(), loss_of).diagnose().primary
    assert primary is not None
    assert (primary.code, primary.step, primary.layer) == ("GG202", 33, None)
    assert primary.ruled_out[0].cause is Cause.DATA


def test_the_operation_stands_in_message_and_evidence() -> None:
    """A searched step: where the ladder says which layer, the search says which operation, and of what."""
    primary = run(net(torch.log), lambda _: inputs(), searched=True, steps=5).diagnose().primary

    assert primary is not None
    assert (primary.code, primary.layer, primary.step) == ("GG202", "op", 0)
    assert primary.message.startswith("NaN or infinity appear first in torch.log in op at test_non_finite_origin.py:")
    assert ", at step 0. It took from 0 to " in primary.message
    assert primary.evidence["operation"].value == "torch.log"
    assert primary.evidence["operand_min"].value == 0.0


def test_what_comes_between_observations_is_named_by_a_search() -> None:
    """Without rows of layers, the operation is known all the same; the run survives, so it is only told."""
    ill = range(30, 32)
    now = [0]

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        now[0] += 1
        return (mean_square(model, batch) * (now[0] - 1 not in ill)).log()

    findings = run(net(torch.tanh), lambda _: inputs(), loss_of, searched=True, skip=True).diagnose().findings
    assert [(f.code, f.severity, f.layer) for f in findings] == [("GG202", Severity.INFO, None)]
    assert "Tensor.log outside of the model's forward pass" in findings[0].message
    assert findings[0].resolved_step is not None


def test_an_alarm_starts_the_search_once() -> None:
    """Weights survive (the optimizer holds only a part): the step after the alarm names the operation."""
    model = net(lambda h: (h - h).sqrt() + h)
    optimizer = torch.optim.SGD(model.get_submodule("last").parameters(), lr=0.01)
    guard = gradguard.watch(model, optimizer, on_error="raise", on_finding="silent", dense_steps=(0,))
    for step in range(4):
        loss = mean_square(model, inputs())
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
        assert guard._observing.search.armed is (step == 0)
    assert [(o.step, o.op) for o in guard.history.origins] == [(1, "Tensor.sqrt")]
    message = guard.diagnose().findings[0].message
    guard.detach()

    assert "Step 1 was searched: the backward pass of Tensor.sqrt (SqrtBackward0) in op" in message


def test_the_search_ends_by_itself() -> None:
    """After so many steps, or after the first that is not finite, no hook of the search is left."""
    model = net(torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer, every=1000, dense_steps=(), on_error="raise") as guard:
        guard.find_non_finite(steps=3)
        for step in range(5):
            assert guard._observing.search.armed is (step < 3)
            mean_square(model, inputs()).backward()
            optimizer.step()
        with pytest.raises(ValueError, match="steps must be at least 1 optimizer step, got 0"):
            guard.find_non_finite(steps=0)


def test_steps_that_never_come_hold_no_batch() -> None:
    """A loop that skips step after step keeps nothing of them in memory."""
    model = net(torch.relu)
    with gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as guard:
        guard.find_non_finite()
        references = []
        for _ in range(3):
            x = inputs()
            references.append(weakref.ref(x))
            mean_square(model, x)
            del x
        assert [reference() is None for reference in references] == [True, True, False]  # the last is remembered


def test_a_step_too_long_to_record_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the bound passes unseen, and the diagnosis says that something did."""
    monkeypatch.setattr("gradguard.monitors._op_trace._MOST_RECORDS", 3)
    guard = run(net(torch.log), lambda _: inputs(), searched=True, steps=1)
    assert any("searched" in note.why for note in guard.diagnose().unobserved)


def test_an_overflow_that_a_loss_scaler_skips_is_nothing() -> None:
    """The step that is skipped is not the one that is searched for: the scale is what made it overflow."""
    model = net(torch.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
    with gradguard.watch(model, optimizer, scaler=scaler, on_error="raise", on_finding="silent") as guard:
        guard.find_non_finite()
        for _ in range(3):
            optimizer.zero_grad()
            out = model(inputs() * 100)
            loss = (out - out.detach()).sum()  # 0, with a gradient
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            guard.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()
        origins, steps = guard.history.origins, guard.steps

    assert steps == 2
    assert origins == ()
