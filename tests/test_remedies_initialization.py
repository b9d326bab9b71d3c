"""Variance scaling and orthogonal initialization: the gain that theory gives, and which layers get which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gradguard import theory
from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import initialize, stack_gain

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
}


WIDTH = 256


def stack(activation: Callable[[], nn.Module], depth: int, width: int = WIDTH) -> nn.Sequential:
    """Return ``depth`` linear layers with an activation behind each, and an output layer."""
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, width))


def measured_gain(model: nn.Sequential, seed: int) -> float:
    """Return the factor per layer on the gradient's norm, from the last hidden layer's output to the first's."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(32, WIDTH, generator=generator)
    outputs = []
    for module in model:
        h = module(h)
        if isinstance(module, nn.Linear):
            h.retain_grad()
            outputs.append(h)
    (h * torch.randn(h.shape, generator=generator)).sum().backward()
    ratio = outputs[0].grad.norm() / outputs[-2].grad.norm()
    return ratio.item() ** (1 / (len(outputs) - 2))


@pytest.mark.parametrize(
    ("scheme", "activation", "depth"),
    [
        *(("he", activation, depth) for activation in ACTIVATIONS for depth in (20, 50)),
        ("orthogonal", "tanh", 20),
        ("orthogonal", "relu", 20),
        ("xavier", "tanh", 20),
    ],
)
def test_gradient_keeps_its_norm_through_deep_stacks(scheme: Any, activation: str, depth: int) -> None:
    """After initialisation the gradient's norm changes by less than 6 % per layer, on average over seeds."""
    model = stack(ACTIVATIONS[activation], depth)
    gains = []
    for seed in range(2):
        initialize(model, scheme, generator=seed)
        gains.append(measured_gain(model, seed))

    assert np.mean(gains) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "sigmoid"])
def test_default_initialization_does_not_keep_it(activation: str) -> None:
    """The measurement above can fail: torch's default loses more than 40 % per layer."""
    torch.manual_seed(0)

    assert measured_gain(stack(ACTIVATIONS[activation], 20), 0) < 0.6


def test_selu_with_lecun_keeps_the_gradient() -> None:
    """SELU was made for variance 1 / fan_in; theory says 1.035 per layer."""
    model = stack(nn.SELU, 20)
    initialize(model, "lecun", generator=0)

    assert measured_gain(model, 0) == pytest.approx(theory.gain_per_layer("selu", sigma_w=1.0, q=1.0), abs=0.02)


@pytest.mark.parametrize("activation", [a for a in theory.ACTIVATIONS if a != "threshold"])
def test_every_activation_has_a_gain(activation: str) -> None:
    """Stacks of every activation have a gain; the deep one is nearer to the critical gain where there is one."""
    shallow, deep = stack_gain(activation, 2), stack_gain(activation, 64)
    critical = theory.critical_gain(activation)

    assert 0.5 < shallow < 20.0
    assert 0.5 < deep < 20.0
    if critical is not None:
        assert abs(math.log(deep / critical)) <= abs(math.log(shallow / critical)) + 1e-6


def test_gain_bounds() -> None:
    """A depth below 1 and an activation without gradient are refused."""
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        stack_gain("relu", 0)
    flat = theory.Activation(name="flat", function=np.zeros_like, derivative=np.zeros_like, derivative_bound=0.0)
    with pytest.raises(ValueError, match="flat"):
        stack_gain(flat, 3)


class Functional(nn.Module):
    """Activations as functions, in an order that is not the order of definition."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(30, 4)
        self.late = nn.Linear(30, 30)
        self.early = nn.Linear(30, 30)
        self.norm = nn.LayerNorm(30)
        self.unused = nn.Linear(3, 3)
        self.table = nn.Embedding(5, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(F.dropout(self.early(x), 0.1)), 0.5)
        return self.head(torch.tanh_(self.late(x)))


def std(module: nn.Module) -> float:
    """Return the standard deviation of a layer's weight."""
    return module.weight.detach().std().item()


def test_batch_shows_functional_activations_with_their_parameters() -> None:
    """On a batch the activation is found in execution order, through dropout and norm, with its slope."""
    model = Functional()
    table = model.table.weight.detach().clone()
    applied = initialize(model, "he", batch=torch.randn(8, 30), generator=0)

    slope = stack_gain(theory.activation("leaky_relu", negative_slope=0.5), 1)
    assert std(model.early) == pytest.approx(slope / math.sqrt(30), rel=0.1)
    assert std(model.late) == pytest.approx(stack_gain("tanh", 1) / math.sqrt(30), rel=0.1)
    assert std(model.head) == pytest.approx(1 / math.sqrt(30), rel=0.25)
    assert "leaky_relu" in applied.changes[2]
    assert applied.skipped == {"unused": "it did not run on the batch"}
    assert torch.equal(model.table.weight, table)


def test_without_a_batch_functions_are_invisible_and_that_is_said() -> None:
    """Guessing would be wrong: the error names both ways out, and each works."""
    model = Functional()
    with pytest.raises(ValueError, match="Pass batch=, or activation="):
        initialize(model, "he")
    applied = initialize(model, "he", activation="relu", modules=["early"], generator=0)

    assert applied.changed == ("early.weight", "early.bias")
    initialize(model, "lecun", generator=0)


def test_without_a_batch_modules_count_in_order() -> None:
    """The next activation module in order of definition decides; behind GLU and the output layer the gain is 1."""
    model = nn.Sequential(
        nn.Linear(400, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 400), nn.GLU(), nn.Linear(200, 400)
    )
    initialize(model, "he", generator=0)

    fan_ins = {0: 400, 3: 400, 5: 200}
    assert [round(std(model[i]) * math.sqrt(fan_in), 1) for i, fan_in in fan_ins.items()] == [1.4, 1.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(40, 90), 40, 90),
        (nn.Conv2d(8, 32, 3), 8 * 9, 32 * 9),
        (nn.Conv2d(8, 32, 3, groups=4), 2 * 9, 8 * 9),
        (nn.ConvTranspose2d(32, 8, 4, stride=2), 32 * 16 / 4, 8 * 16),
        (nn.Conv1d(16, 16, 5), 80, 80),
        (nn.Conv3d(4, 16, 3), 108, 16 * 27),
    ],
    ids=lambda value: type(value).__name__,
)
def test_standard_deviations_follow_from_the_fans(layer: nn.Module, fan_in: float, fan_out: float) -> None:
    """He and LeCun divide by fan_in, Xavier by the mean of both fans; groups and transposed strides count."""
    for scheme, expected in (
        ("he", 2.0 / math.sqrt(fan_in)),
        ("xavier", 2.0 * math.sqrt(2.0 / (fan_in + fan_out))),
        ("lecun", 1.0 / math.sqrt(fan_in)),
    ):
        initialize(layer, scheme, gain=None if scheme == "lecun" else 2.0, generator=0)  # type: ignore[arg-type]
        assert std(layer) == pytest.approx(expected, rel=0.05), scheme
        assert not layer.bias.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolutions_keep_the_variance(stride: int) -> None:
    """An output of a transposed convolution sums over fewer inputs the larger the stride."""
    layer = nn.ConvTranspose2d(64, 64, 4, stride=stride)
    initialize(layer, "lecun", generator=0)
    y = layer(torch.randn(4, 64, 12, 12, generator=torch.Generator().manual_seed(1)))

    assert y[..., 4:-4, 4:-4].std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
def test_orthogonal_linear_layers(shape: tuple[int, int]) -> None:
    """Rows or columns, whichever are fewer, are orthonormal times the gain."""
    layer = nn.Linear(shape[1], shape[0]).double()
    initialize(layer, "orthogonal", gain=1.5, generator=0)
    w = layer.weight.detach()
    gram = w @ w.T if shape[0] <= shape[1] else w.T @ w

    torch.testing.assert_close(gram, 2.25 * torch.eye(min(shape), dtype=torch.float64), atol=1e-12, rtol=0)


def test_deep_linear_orthogonal_net_is_an_isometry() -> None:
    """Ground truth of Saxe et al.: every singular value of the end-to-end Jacobian is 1."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(50)))
    initialize(model, "orthogonal", batch=torch.randn(2, 32), generator=0)
    product = torch.linalg.multi_dot([layer.weight.detach().double() for layer in model])

    torch.testing.assert_close(torch.linalg.svdvals(product), torch.ones(32, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 16, 5, padding=2, groups=4),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Conv3d(2, 3, 3, padding=1),
        nn.ConvTranspose2d(6, 8, 3, padding=1),
    ],
    ids=repr,
)
def test_delta_orthogonal_convolutions_keep_the_norm(layer: Any) -> None:
    """With at least as many outputs as inputs the norm of any input is kept exactly, which He's does not do."""
    axes = layer.weight.ndim - 2
    x = torch.randn((3, layer.in_channels, *(9,) * axes), generator=torch.Generator().manual_seed(0))
    initialize(layer, "delta-orthogonal", generator=0)
    y = layer(x)

    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    initialize(layer, "he", generator=0)
    assert not torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-3)


def test_orthogonal_draws_are_uniform_in_sign() -> None:
    """QR alone would favour one sign on the diagonal; over many draws the mean trace is 0."""
    layer = nn.Linear(4, 4, bias=False)
    traces = []
    for seed in range(200):
        initialize(layer, "orthogonal", gain=1.0, generator=seed)
        traces.append(layer.weight.trace().item())

    assert abs(np.mean(traces)) < 0.25  # four standard errors; without the sign correction it is about -2


def test_gates_and_output_activations_have_gain_one() -> None:
    """A sigmoid's gain would slam a gate and saturate an output; ``x * sigmoid(x)`` is SiLU, however it is written."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.swish, self.gate, self.value, self.deep, self.out = (nn.Linear(40, 40) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.swish(x)
            x = x * x.sigmoid()
            x = torch.sigmoid(self.gate(x)) * self.value(x)
            return torch.sigmoid(self.out(torch.sigmoid(self.deep(x))))

    model = Gated()
    initialize(model, "he", batch=torch.randn(3, 40), generator=0)
    gains = {name: std(layer) * math.sqrt(40) for name, layer in model.named_children()}

    assert gains == pytest.approx(
        {"swish": stack_gain("silu", 1), "gate": 1.0, "value": 1.0, "deep": stack_gain("sigmoid", 1), "out": 1.0},
        rel=0.1,
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(self.embed(x))))))


@pytest.mark.parametrize("batched", [False, True])
def test_tied_weights_are_drawn_once_and_embeddings_left_alone(batched: bool) -> None:
    """Two layers that share a weight still share it; one tied to an embedding is not touched."""
    model, twin = Tied(), nn.Linear(8, 8)
    embedding = model.embed.weight.detach().clone()
    given: dict[str, Any] = {"batch": torch.arange(6)} if batched else {"activation": "relu"}
    applied = initialize(model, "he", generator=3, **given)
    initialize(twin, "he", generator=3, gain=math.sqrt(2.0))

    assert model.a.weight is model.b.weight
    torch.testing.assert_close(model.a.weight, twin.weight)
    assert torch.equal(model.embed.weight, embedding)
    assert "tied to an embedding" in applied.skipped["head"]
    assert "set once" in applied.skipped["b"]


def test_frozen_weights_and_biases_are_left_alone() -> None:
    """A frozen weight keeps its layer out; a frozen bias stays while the weight is drawn."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    applied = initialize(model, "he", generator=0)

    assert applied.changed == ("2.weight",)
    assert "frozen" in applied.skipped["0"]
    assert "bias" not in applied.changes[0]
    with pytest.raises(ValueError, match=r"modules names '0'.*frozen"):
        initialize(model, "he", modules="0")


def test_weight_norm_is_set_through_its_parametrization() -> None:
    """The effective weight is the one asked for, with or without a batch; old hook-based weight norm is refused."""
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    both: list[dict[str, Any]] = [{}, {"batch": torch.randn(3, 6)}]
    for given in both:
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2))
        initialize(plain, "he", generator=0)
        applied = initialize(model, "he", generator=0, **given)
        torch.testing.assert_close(model[0].weight, plain[0].weight)
        assert "0.weight.original0" in applied.changed


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrizations_without_a_scale_are_left_alone(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A weight that comes out as something else is put back, and the reason names the parametrization."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), wrap(nn.Linear(6, 6)))
    before = {key: value.clone() for key, value in model[2].state_dict().items()}
    applied = initialize(model, "he", generator=0)

    assert "parametrized" in applied.skipped["2"]
    assert all(torch.equal(value, before[key]) for key, value in model[2].state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_hook_based_weight_norm_is_left_alone() -> None:
    """A weight that a hook makes before each pass would be overwritten; the reason says what to use instead."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.utils.weight_norm(nn.Linear(6, 6)))

    assert "torch.nn.utils.parametrizations" in initialize(model, "he", generator=0).skipped["2"]


class ZeroBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.dead = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.dead(x + self.b(torch.relu(self.a(x))))


def test_zero_branches_stay_zero_and_other_zeros_do_not() -> None:
    """A zero weight at the end of a residual branch is on purpose; one in the trunk cuts the net and is drawn."""
    model = ZeroBranch()
    applied = initialize(model, "he", batch=torch.randn(2, 8), generator=0)

    assert not model.b.weight.any()
    assert "residual branch" in applied.skipped["b"]
    assert model.dead.weight.all()


def test_all_zero_weights_are_drawn_without_a_batch() -> None:
    """A net whose every weight is zero is ill, not residual."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    initialize(model, "xavier", generator=0)

    assert model[0].weight.all()
    assert model[2].weight.all()


def test_attention_projections_are_left_alone() -> None:
    """MultiheadAttention initialises itself; the feed-forward layers around it are drawn, in evaluation mode too."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu").eval()
    before = {key: value.clone() for key, value in layer.self_attn.state_dict().items()}
    applied = initialize(layer, "he", batch=torch.randn(2, 3, 16), generator=0)

    assert applied.changed == ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
    assert "gelu" in applied.changes[0]
    assert all(torch.equal(value, before[key]) for key, value in layer.self_attn.state_dict().items())


def test_half_precision_weights_stay_half() -> None:
    """Weights are drawn in float32 and rounded; the seed gives the same ones."""
    half, full = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8)
    initialize(half, "he", generator=0, gain=1.0)
    initialize(full, "he", generator=0, gain=1.0)

    assert torch.equal(half.weight, full.weight.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "kaiming"}, "scheme must be one of he, xavier, lecun, orthogonal, delta-orthogonal, got 'kaiming'"),
        ({"gain": -1.0}, "gain must be a positive number"),
        ({"scheme": "lecun", "gain": 2.0}, "none with scheme 'lecun'"),
        ({"modules": ["nowhere"]}, "no such module"),
        ({"activation": "reluu"}, "Did you mean 'relu'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """Each error says what came and what is accepted."""
    with pytest.raises(ValueError, match=message):
        initialize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), **arguments)


def test_wrong_kinds_are_named() -> None:
    """A generator must be one, and a model a module."""
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, a seed or None, got 'x'"):
        initialize(nn.Linear(2, 2), generator="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        initialize(torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no layer of the kind"):
        initialize(nn.LayerNorm(3))


def test_batches_of_any_shape() -> None:
    """Mappings go in as keywords, tuples as arguments; with targets compute_loss is needed, and the error says so."""
    model = nn.Bilinear(3, 3, 2)
    net = nn.ModuleDict({"pair": model, "out": nn.Linear(2, 2)})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.net["out"](torch.relu(self.net["pair"](left, right)))

    two, x = Two(), torch.randn(4, 3)
    for seed, batch in enumerate([{"left": x, "right": x}, (x, x), [x, x]]):
        assert initialize(two, "he", batch=batch, generator=seed).changed[0] == "net.out.weight"
    assert initialize(two, "he", batch=(x, x, 1), compute_loss=lambda m, b: m(b[0], b[1]).sum(), generator=0).changes
    with pytest.raises(TypeError) as caught:
        initialize(two, "he", batch=(x, x, 1))
    assert any("pass compute_loss" in note for note in caught.value.__notes__)
