"""The Jacobian probe against Jacobians that are formed by brute force, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradguard
from gradguard.errors import GradientsUnavailableError, UnsupportedModelError
from gradguard.findings import to_plain
from gradguard.jacobian import JacobianStretch, _probe, stretch
from gradguard.jacobian._krylov import extremes


def sequential(*layers: nn.Module) -> nn.Sequential:
    """Return layers one behind the other."""
    return nn.Sequential(*layers)


class LastStep(nn.Module):
    """Recurrent net that gives its last output; time-first, so that dimension 0 is time."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.rnn(x)[0][-1])


def orthogonal(depth: int, width: int) -> nn.Sequential:
    """Return a deep linear net of orthogonal weights."""
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return sequential(*layers)


MLP = (lambda: sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 3)), (5, 6))
WIDENING = (lambda: sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 6)), (5, 3))
CONV = (
    lambda: sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)),
    (3, 1, 6, 6),
)
BATCH_NORM = (lambda: sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)), (7, 5))
LAYER_NORM = (lambda: sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)), (7, 5))
SPECTRAL = (lambda: sequential(nn.utils.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4)), (7, 5))
TRANSFORMER = (
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True),
    (2, 4, 8),
)
RNN = (lambda: LastStep(nn.RNN), (6, 2, 3))
LSTM = (lambda: LastStep(nn.LSTM), (6, 2, 3))
GRU = (lambda: LastStep(nn.GRU), (6, 2, 3))
ALL = {
    "mlp": MLP,
    "widening": WIDENING,
    "conv": CONV,
    "batch norm": BATCH_NORM,
    "layer norm": LAYER_NORM,
    "spectral norm": SPECTRAL,
    "transformer": TRANSFORMER,
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in training mode and its input."""
    make, shape = ALL[name]
    torch.manual_seed(0)
    return make(), torch.randn(shape)


def singular_values(model: nn.Module, x: Tensor) -> Tensor:
    """Return those of the Jacobian of the whole batch, by brute force on a float64 copy; the smaller side's only."""
    twin, point = copy.deepcopy(model).double(), x.double()
    # With running statistics a norm writes in its buffers, which no transform allows; the values are those of training.
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.num_batches_tracked = None
            module.running_mean = module.running_var = None
    rows = torch.autograd.functional.jacobian(twin, point)
    return torch.linalg.svdvals(torch.as_tensor(rows).reshape(-1, point.numel()))


def agrees(found: JacobianStretch, values: Tensor, *, rel: float) -> None:
    """Compare with all singular values; what is certified must be right, what is not must be a bound."""
    assert found.largest == pytest.approx(float(values.max()), rel=rel)
    assert found.largest_certified
    smallest = float(values.min())
    if found.smallest_certified:
        assert found.smallest == pytest.approx(smallest, rel=rel)
    else:
        assert found.smallest >= smallest * (1.0 - 1e-9)


# -------------------------------------------------------------------------------------------------- against brute force


@pytest.mark.parametrize("name", ALL)
def test_small_jacobians_are_decomposed_exactly(name: str) -> None:
    """Largest, smallest and root mean square are those of the Jacobian that autograd forms row by row."""
    model, x = made(name)
    values = singular_values(model, x)
    found = stretch(model, x)

    agrees(found, values, rel=1e-6)
    assert found.exact
    assert found.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-6)
    assert found.smallest_certified is bool(values.min() > 1e-12 * values.max())
    assert (found.inputs, found.outputs) == (x.numel(), model(x).numel())
    assert found.method == "torch.func"


@pytest.mark.parametrize("name", ALL)
def test_products_alone_give_the_same_largest_and_an_honest_smallest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the Jacobian may not be formed, the largest agrees, and the smallest is right or called a bound."""
    monkeypatch.setattr(_probe, "EXACT_PASSES", 0)
    model, x = made(name)
    values = singular_values(model, x)

    readings = [stretch(model, x, rtol=1e-4, max_iterations=iterations) for iterations in (10, 400)]
    for found in readings:
        assert not found.exact
        assert found.largest <= float(values.max()) * (1.0 + 1e-9)
        if found.largest_certified:
            assert found.largest == pytest.approx(float(values.max()), rel=1e-3)
        if found.smallest_certified:
            assert found.smallest == pytest.approx(float(values.min()), rel=1e-3)
        assert found.smallest >= float(values.min()) * (1.0 - 1e-6)
    assert readings[1].largest_certified


def test_a_wide_map_stops_before_its_space_is_exhausted() -> None:
    """Of 300 singular values few products find the largest, and the smallest stays a bound that says so."""
    torch.manual_seed(0)
    model = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        left, _, right = torch.linalg.svd(torch.randn(300, 300))
        model.weight.copy_(left @ torch.diag(torch.logspace(0, -4, 300)) @ right)
    found = stretch(model, torch.zeros(1, 300))

    assert not found.exact
    assert found.iterations < 40
    assert found.largest == pytest.approx(1.0, rel=1e-2)
    assert found.largest_certified
    assert not found.smallest_certified
    assert 1e-4 < found.smallest < 1.0
    assert found.isometry == "not isometric"
    assert found.rms == pytest.approx(math.sqrt(float(torch.logspace(0, -4, 300).square().mean())), rel=0.3)


@pytest.mark.parametrize("width", [16, 300])
def test_a_deep_linear_orthogonal_net_is_isometric(width: int) -> None:
    """Fifty orthogonal layers: every singular value is 1, also where the Jacobian is too wide to be formed."""
    torch.manual_seed(0)
    found = stretch(orthogonal(50, width), torch.randn(2, width))

    assert found.exact is (width == 16)
    assert found.largest == pytest.approx(1.0, abs=1e-5)
    assert found.smallest == pytest.approx(1.0, abs=1e-5)
    assert found.largest_certified
    assert found.smallest_certified
    assert found.isometry == "isometric"
    assert found.decades == pytest.approx(0.0, abs=1e-5)


def test_orthogonal_tanh_nets_can_be_isometric_and_relu_nets_cannot() -> None:
    """At small inputs tanh is linear; ReLU cuts off half of the directions at each layer, whatever the weights."""
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    layers = list(orthogonal(50, 64))
    tanh = stretch(sequential(*(m for layer in layers for m in (layer, nn.Tanh()))), 0.01 * x)
    with torch.no_grad():
        for layer in layers:
            torch.as_tensor(layer.weight).mul_(math.sqrt(2.0))
    relu = stretch(sequential(*(m for layer in layers for m in (layer, nn.ReLU()))), x)

    assert tanh.isometry == "isometric"
    assert relu.isometry == "not isometric"
    assert relu.decades > 10.0


def test_a_sigmoid_net_shrinks_by_more_decades_than_float32_has() -> None:
    """Fifteen decades below 1 the values are still right, for the copy is computed in float64."""
    torch.manual_seed(0)
    model = sequential(*(m for _ in range(20) for m in (nn.Linear(16, 16), nn.Sigmoid())))
    x = torch.randn(2, 16)
    values = singular_values(model, x)
    found = stretch(model, x)

    assert found.largest == pytest.approx(float(values.max()), rel=1e-6)
    assert found.largest < 1e-14
    assert found.isometry == "not isometric"


def test_a_singular_value_within_rounding_is_never_called_a_value() -> None:
    """LayerNorm annihilates two directions of each token: the smallest is a bound at the level of rounding."""
    torch.manual_seed(0)
    found = stretch(nn.LayerNorm(8), torch.randn(3, 8))

    assert not found.smallest_certified
    assert 0.0 < found.smallest <= 1e-13 * found.largest
    assert found.isometry == "not isometric"


def test_the_spectrum_of_a_batch_is_that_of_its_examples() -> None:
    """Without coupling the values are the examples' own; batch normalization in training mode couples them."""
    model, x = made("mlp")
    each = [stretch(model, one[None]) for one in x]
    both = stretch(model, x)

    assert both.largest == pytest.approx(max(one.largest for one in each), rel=1e-9)
    assert both.smallest == pytest.approx(min(one.smallest for one in each), rel=1e-9)
    assert both.iterations == 3
    model, x = made("batch norm")
    assert stretch(model, x).iterations == 28
    assert stretch(model.eval(), x).iterations == 4


def test_weak_coupling_between_two_examples_is_seen() -> None:
    """A pair of examples that share information is no pair of Jacobians, whichever two of the batch it is."""

    class Leaky(nn.Module):
        def __init__(self, source: int, target: int) -> None:
            super().__init__()
            self.pair = (source, target)

        def forward(self, x: Tensor) -> Tensor:
            leak = torch.zeros_like(x)
            leak[self.pair[1]] = 1e-6 * x[self.pair[0]]
            return x + leak

    for source in range(5):
        for target in range(5):
            found = stretch(Leaky(source, target), torch.ones(5, 2))
            assert found.iterations == (2 if source == target else 10)


def test_a_constant_has_no_stretch() -> None:
    """What ignores its input has the Jacobian 0; nothing divides by it."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x) * x

    found = stretch(Constant(), torch.ones(2, 300))

    assert (found.largest, found.smallest, found.isometry) == (0.0, 0.0, "not isometric")
    assert math.isnan(found.decades)


# ----------------------------------------------------------------------------------------------- blocks, sources, modes


def test_a_named_block_is_probed_at_its_own_input() -> None:
    """The block's Jacobian is taken where the net's forward pass arrives."""
    model, x = made("mlp")
    assert isinstance(model, nn.Sequential)
    at_block = model[1](model[0](x)).detach()
    found = stretch(model, x, block="2")

    agrees(found, singular_values(model[2], at_block), rel=1e-6)
    assert (found.name, found.source) == ("2", "the input")
    block = stretch(model, x, block="3")
    slopes = torch.autograd.functional.jacobian(lambda z: F.gelu(z).sum(0), model[2](at_block).double())
    assert block.largest == pytest.approx(float(torch.as_tensor(slopes).abs().max()), rel=1e-6)


def test_integers_are_probed_behind_their_embedding() -> None:
    """Tokens cannot be varied: the output of the embedding is."""
    torch.manual_seed(0)
    model = sequential(nn.Embedding(9, 8), nn.Linear(8, 3), nn.Tanh())
    tokens = torch.randint(0, 9, (2, 5))
    found = stretch(model, tokens)

    agrees(found, singular_values(model[1:], model[0](tokens).detach()), rel=1e-6)
    assert found.source == "the output of 0"
    with pytest.raises(UnsupportedModelError, match="floating-point input"):
        stretch(Lambda(lambda x: x.float()), tokens)


def test_mappings_and_tuples_are_arguments() -> None:
    """The first floating-point tensor is varied, all others are what they are."""
    torch.manual_seed(0)
    model = nn.Bilinear(3, 4, 5)
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    expected = singular_values(_Fixed(model, y), x)

    agrees(stretch(model, (x, y)), expected, rel=1e-6)
    agrees(stretch(model, {"input1": x, "input2": y}), expected, rel=1e-6)


class _Fixed(nn.Module):
    def __init__(self, model: nn.Module, second: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.model(x, self.second))


def test_dropout_keeps_one_mask() -> None:
    """At a rate of one half a Jacobian of one mask has entries 0 and 2, and no others."""
    torch.manual_seed(0)
    model = nn.Dropout(0.5)
    found = stretch(model, torch.ones(1, 300))

    assert found.method == "torch.func"
    assert found.largest == pytest.approx(2.0)
    assert found.smallest == pytest.approx(0.0, abs=1e-12)
    assert stretch(model.eval(), torch.ones(1, 300)).isometry == "isometric"


def test_the_fast_path_of_encoder_layers_is_avoided() -> None:
    """In eval mode torch's fused encoder layer has no derivative forward; the plain one is taken."""
    model, x = made("transformer")

    agrees(stretch(model.eval(), x), singular_values(model, x), rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


# ------------------------------------------------------------------------------------------------------------ fallbacks


class _Cube(torch.autograd.Function):
    """x^3 as before ``setup_context``: not for torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradients[0]


class _OnceCube(_Cube):
    """The same with a backward pass that cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradients[0]


class _WrongCube(_OnceCube):
    """The same with a wrong derivative, which cannot be differentiated either."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.9 * x**2 * gradients[0]


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def in_place(x: Tensor) -> Tensor:
    """Return exp(2x), written over the input."""
    return x.mul_(2.0).exp_()


def branching(x: Tensor) -> Tensor:
    """Return 2x or 3x, by the sign of a number read from the tensor."""
    return x * 2.0 if x.sum().item() > 0.0 else x * 3.0


@pytest.mark.parametrize(
    ("function", "slope", "method"),
    [
        (_Cube.apply, lambda x: 3 * x**2, "double backward"),
        (_OnceCube.apply, lambda x: 3 * x**2, "finite differences"),
        (in_place, lambda x: 2 * (2 * x).exp(), "torch.func"),
        (branching, lambda x: 2.0 + 0 * x, "torch.func"),
        (lambda x: checkpoint(torch.sin, x, use_reentrant=False), torch.cos, "double backward"),
    ],
    ids=["old function", "differentiable once", "in place", "control flow", "checkpoint"],
)
@pytest.mark.parametrize("exact", [True, False])
def test_what_torch_func_cannot_is_done_otherwise(
    function: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    method: str,
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Custom functions of the old kind, checkpoints, in-place operations, control flow: the values are the slopes'."""
    if not exact:
        monkeypatch.setattr(_probe, "EXACT_PASSES", 0)
    x = torch.linspace(0.5, 1.5, 6)[None]
    found = stretch(Lambda(function), x)
    slopes = slope(x.double()).abs()

    assert found.method == method
    assert found.largest == pytest.approx(float(slopes.max()), rel=1e-5)
    assert found.smallest == pytest.approx(float(slopes.min()), rel=1e-5)
    assert found.largest_certified
    assert found.smallest_certified


def test_a_wrong_derivative_is_not_believed() -> None:
    """Where backward and differences disagree there is no number, and the error says by how much and in which way."""
    with pytest.raises(GradientsUnavailableError) as caught:
        stretch(Lambda(_WrongCube.apply), torch.ones(1, 4))

    notes = "\n".join(caught.value.__notes__)
    assert "setup_context" in notes
    assert "finite differences: products with the Jacobian and its transpose disagree by" in notes


def test_a_model_of_one_precision_is_probed_in_it() -> None:
    """A model that makes float32 tensors of its own cannot be converted; rounding is then larger, and said so."""
    weight = torch.diag(torch.tensor([3.0, 0.5, 1e-9]))
    found = stretch(Lambda(lambda x: x @ weight), torch.ones(2, 3))

    assert found.largest == pytest.approx(3.0)
    assert found.noise >= 1e-7
    assert not found.smallest_certified
    assert found.smallest < 1e-5


def test_what_is_not_finite_is_an_error() -> None:
    """NaN has no Jacobian."""
    with pytest.raises(GradientsUnavailableError, match="not finite"):
        stretch(Lambda(lambda x: x.log()), -torch.ones(2, 3))


def test_the_models_own_error_is_raised() -> None:
    """A wrong input gives the error that the model gives."""
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stretch(nn.Linear(3, 2), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "torch.nn.Module, got int"),
        ({"block": "nowhere"}, ValueError, "no block 'nowhere' in Sequential"),
        ({"rtol": 0.0}, ValueError, "between 0 and 1"),
        ({"max_iterations": 0}, ValueError, "at least 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Wrong arguments are named with what is accepted."""
    settled: dict[str, Any] = {"model": sequential(nn.Linear(2, 2)), "inputs": torch.ones(1, 2)}
    with pytest.raises(error, match=message):
        stretch(**(settled | arguments))


def test_a_block_that_never_runs_is_an_error() -> None:
    """A block beside the forward pass has no input."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.used(x))

    with pytest.raises(ValueError, match="'unused' was not called"):
        stretch(Unused(), torch.ones(1, 2), block="unused")


# -------------------------------------------------------------------------------------------------------- without trace


class Everything(nn.Module):
    """What a probe could disturb: statistics, masks, power iterations, hooks, attributes, a tensor left behind."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.inp = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fails = fails
        self.calls = 0
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = self.drop(self.norm(self.inp(x)))
        random.random()  # noqa: S311  # the global state is meant
        np.random.rand()  # noqa: NPY002  # the global state is meant
        if self.fails:
            raise RuntimeError("broken on purpose")
        return self.kept


def state_of(model: Everything) -> dict[str, Any]:
    """Return everything that must not change, as bytes where it is a tensor."""
    tensors = {name: value.detach().numpy().tobytes() for name, value in model.state_dict(keep_vars=True).items()}
    return {
        "tensors": tensors,
        "ids": [id(value) for value in model.state_dict(keep_vars=True).values()],
        "grads": [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "calls": model.calls,
        "kept": None if model.kept is None else model.kept.detach().numpy().tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002  # as above
        "python": random.getstate(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("block", [None, "norm"])
def test_nothing_is_left_behind(block: str | None, fails: bool) -> None:
    """Values, identities, gradients, modes, hooks, attributes and random states are the same, also after an error."""
    torch.manual_seed(0)
    model, x, seen = Everything(), torch.randn(6, 4), []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    model(x).sum().backward()
    model.drop.eval()
    model.fails = fails
    seen.clear()
    before, given = state_of(model), x.clone()

    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            stretch(model, x, block=block)
    else:
        assert stretch(model, x, block=block).largest > 0.0

    assert state_of(model) == before
    assert torch.equal(x, given)
    assert seen == []
    assert x.grad is None


def test_the_probe_works_where_gradients_are_off() -> None:
    """no_grad and inference mode around it change nothing."""
    model, x = made("mlp")
    expected = stretch(model, x)

    with torch.no_grad():
        assert stretch(model, x) == expected
    with torch.inference_mode():
        assert stretch(model, x) == expected


def test_a_probe_is_repeatable() -> None:
    """The same model and input give the same numbers, whatever the random state."""
    torch.manual_seed(0)
    model = sequential(nn.Linear(300, 300), nn.Tanh())
    x = torch.randn(1, 300)
    first = stretch(model, x)
    torch.manual_seed(7)

    assert stretch(model, x) == first


def test_a_reading_is_plain_json() -> None:
    """The numbers go into the JSON of a diagnosis."""
    model, x = made("mlp")
    plain = to_plain(stretch(model, x))

    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["isometry"] in {"isometric", "not isometric", "unknown"}


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("seed", range(20))
def test_the_floor_lies_below_the_smallest_value(seed: int) -> None:
    """Whatever the spectrum, the true smallest value lies between the floor and the bound."""
    generator = torch.Generator().manual_seed(seed)
    size = 120
    values = 1.0 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)
    values[:3] = torch.tensor([0.5, 0.9, 2.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    readings = [
        extremes(lambda v: matrix @ v, lambda v: matrix.T @ v, start, rtol=1e-12, noise=1e-14, max_iterations=count)
        for count in (8, 14, 20, 30)
    ]
    for found in readings:
        assert found.floor <= 0.5 + 1e-9
        assert found.smallest >= 0.5 - 1e-9
        assert found.largest <= 2.0 + 1e-9
    assert readings[-1].smallest == pytest.approx(0.5, rel=1e-6)


def test_a_closed_space_gives_every_value() -> None:
    """Three distinct values take three products, and the smallest is then a value."""
    values = torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 0.25, 0.25], dtype=torch.float64)
    start = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = extremes(lambda v: values * v, lambda v: values * v, start, rtol=1e-3, noise=1e-13, max_iterations=50)

    assert found.iterations == 3
    assert found.closed
    assert found.largest == pytest.approx(3.0)
    assert found.smallest == pytest.approx(0.25)
    assert found.floor == pytest.approx(0.25)


def test_eight_decades_are_resolved_by_products() -> None:
    """Once as many products are spent as there are values, the smallest is right eight decades below the largest."""
    generator = torch.Generator().manual_seed(0)
    size = 60
    values = torch.logspace(0, -8, size, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in "lr")
    matrix = left @ torch.diag(values) @ right
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    found = extremes(lambda v: matrix @ v, lambda v: matrix.T @ v, start, rtol=-1.0, noise=1e-16, max_iterations=size)

    assert found.closed
    assert found.largest == pytest.approx(1.0)
    assert found.smallest == pytest.approx(1e-8, rel=1e-3)


def test_a_null_space_is_found() -> None:
    """A direction that is lost altogether gives the value 0."""
    values = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)
    start = torch.ones(3, dtype=torch.float64)
    found = extremes(lambda v: values * v, lambda v: values * v, start, rtol=1e-3, noise=1e-13, max_iterations=50)

    assert found.largest == pytest.approx(3.0)
    assert found.smallest <= 1e-12


# ------------------------------------------------------------------------------------------------------ in a deep check


def test_a_deep_check_measures_the_jacobian_of_the_whole_net() -> None:
    """It is that of the arguments with which the loss function calls the model; the rest of the check stays."""
    model, x = made("mlp")
    plain = gradguard.check(model, x, lambda m, batch: m(2.0 * batch).square().mean())
    deep = gradguard.check(model, x, lambda m, batch: m(2.0 * batch).square().mean(), deep=True)

    assert plain.jacobian is None
    assert plain.to_dict()["jacobian"] is None
    assert deep.jacobian == stretch(model, 2.0 * x)
    cleared = replace(deep, jacobian=None, summary=replace(deep.summary, overhead_s=plain.summary.overhead_s))
    assert cleared.to_json() == plain.to_json()
    assert deep.to_dict()["jacobian"]["largest"] == deep.jacobian.largest


def test_a_deep_check_leaves_no_trace() -> None:
    """Values, modes, hooks and random states are as after a check, also where the probe fails."""
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(6, 4)
    model(x).sum().backward()
    before = state_of(model)
    gradguard.check(model, x, lambda m, batch: m(batch).square().mean(), deep=True)
    after = state_of(model)

    for changed in ("calls", "kept"):  # what a module does to itself in a forward pass is beyond reach, as in a check
        before.pop(changed)
        after.pop(changed)
    assert after == before


def test_a_deep_check_says_what_it_could_not_measure() -> None:
    """A model that cannot be probed has a diagnosis all the same, with a note."""

    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise TypeError("one of a kind")

    torch.manual_seed(0)
    found = gradguard.check(Stubborn(3, 2), torch.randn(4, 3), lambda m, x: m(x).square().mean(), deep=True)

    assert found.jacobian is None
    assert found.healthy is True
    assert [note.what for note in found.unobserved] == ["the Jacobian of the whole net"]
    assert "one of a kind" in found.unobserved[0].why
    unused = gradguard.check(Stubborn(3, 2), None, lambda m, _: m.weight.square().sum(), deep=True)
    assert "cannot be copied" in unused.unobserved[-1].why
