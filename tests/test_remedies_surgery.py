"""What each operation of surgery does: where, by which shapes, with what effect, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradguard
from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied
from gradguard.remedies.surgery import (
    REMEDIES,
    BareLSTM,
    Normalized,
    QKNormAttention,
    Residual,
    add_qk_norm,
    add_residual,
    insert_norm,
    replace_activations,
    swap_recurrent,
)
from tests import surgery
from tests.models import classification_loss, digit_batch, digits, mlp

# ---------------------------------------------------------------------------------------------------------- norms


class Net(nn.Module):
    """Code around some layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._code = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._code(self, x)


def one_layer(layer: nn.Module) -> Net:
    """Return a net with one hidden layer, an activation in code, and an output that reads the mean of everything."""
    return Net(lambda net, x: net.out(torch.relu(net.layer(x)).mean().reshape(1, 1)), layer=layer, out=nn.Linear(1, 2))


def positions_last(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a function of ``[rows, features]`` to channels on axis 1."""
    return lambda y: norm(y.movedim(1, -1)).movedim(-1, 1)


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "N,C": (lambda: nn.Linear(3, 32), (5, 3)),
    "N,T,C": (lambda: nn.Linear(3, 32), (5, 4, 3)),
    "N,C,L": (lambda: nn.Conv1d(3, 32, 3), (5, 3, 8)),
    "N,C,H,W": (lambda: nn.Conv2d(3, 32, 3), (5, 3, 8, 8)),
    "N,C,D,H,W": (lambda: nn.Conv3d(3, 32, 3), (5, 3, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 32, 3), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("kind", ["layer", "batch", "group", "rms"])
@pytest.mark.parametrize("layout", SHAPES)
def test_norms_are_taken_over_the_axes_of_the_layout(layout: str, kind: Any) -> None:
    """Means and squares over those axes are what each normalization promises, written out."""
    torch.manual_seed(0)
    layer, shape = SHAPES[layout][0](), SHAPES[layout][1]
    net, x = one_layer(layer), torch.randn(shape)
    y = layer(x).detach()

    insert_norm(net, kind, batch=x)

    got = net.layer(x).detach()
    channel = y.ndim - 1 if isinstance(layer, nn.Linear) else 1
    last = y.movedim(channel, -1)
    rest = tuple(range(last.ndim - 1))
    whole = tuple(range(1, last.ndim)) if channel == 1 and y.ndim > 2 else (last.ndim - 1,)
    if kind == "rms":
        expected = last / last.square().mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()
    elif kind == "group":
        groups = last.unflatten(-1, (2, 16))
        axes = (*whole[:-1], groups.ndim - 1)
        mean, var = groups.mean(axes, keepdim=True), groups.var(axes, unbiased=False, keepdim=True)
        expected = ((groups - mean) / (var + 1e-5).sqrt()).flatten(-2)
    else:
        axes = rest if kind == "batch" else whole
        mean, var = last.mean(axes, keepdim=True), last.var(axes, unbiased=False, keepdim=True)
        expected = (last - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(got.movedim(channel, -1), expected, rtol=1e-3, atol=1e-4)


def test_a_norm_stands_before_the_activation_and_not_at_the_output() -> None:
    """By default; the output layer is left alone and said to be."""
    model = surgery.head(8)

    applied = insert_norm(model)

    assert [type(m).__name__ for m in model] == ["Normalized", "Sigmoid", "Normalized", "Sigmoid", "Dropout", "Linear"]
    assert applied.changes[0] == "0: LayerNorm 16 before the sigmoid behind Linear 8>16"
    assert applied.skipped == {"5": "it is the output layer"}
    assert applied.names["0.weight"] == "0.layer.weight"
    assert applied.changed == ("0.norm.weight", "0.norm.bias", "2.norm.weight", "2.norm.bias")


def test_a_norm_after_the_activation_needs_a_module() -> None:
    """It wraps the activation; an activation in code is left alone, with the reason."""
    model = surgery.ConvClassifier()
    x = surgery.batch()[0]

    applied = insert_norm(model, where="after", batch=x)

    assert isinstance(model.act, Normalized)
    assert isinstance(model.act.layer, nn.Sigmoid)
    assert "a function in code" in applied.skipped["conv2"]
    assert "a function in code" in applied.skipped["fc1"]


def test_code_that_reads_the_layer_still_works() -> None:
    """Attributes are read from, and parameters set on, the layer inside; what is in neither is an error as ever."""
    model = surgery.ConvClassifier()
    x = surgery.batch()[0]
    weight = model.fc1.weight

    insert_norm(model, batch=x)

    assert isinstance(model.fc1, Normalized)
    assert model.fc1.weight is weight
    assert model.fc1.in_features == 256
    model.fc1.weight = nn.Parameter(torch.zeros(12, 256))
    assert "fc1.layer.weight" in model.state_dict()
    assert "fc1.weight" not in model.state_dict()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.fc1.nothing_of_the_kind


def test_what_is_normalized_frozen_or_used_past_the_module_is_left_alone() -> None:
    """Each with its reason."""
    net = Net(
        lambda net, x: net.out(
            torch.relu(
                net.b(torch.relu(F.linear(torch.relu(net.frozen(torch.relu(net.norm(net.a(x))))), net.c.weight)))
            )
        ),
        a=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        frozen=nn.Linear(8, 8).requires_grad_(requires_grad=False),
        c=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
        idle=nn.Linear(8, 8),
    )

    applied = insert_norm(net, batch=torch.randn(4, 8))

    assert [line.partition(":")[0] for line in applied.changes] == ["b"]
    assert applied.skipped["a"] == "it is normalized already"
    assert "frozen" in applied.skipped["frozen"]
    assert "code of Net uses its weight without calling it" in applied.skipped["c"]
    assert applied.skipped["idle"] == "it did not run on the batch"


def test_a_gate_is_not_normalized() -> None:
    """A sigmoid whose result multiplies something else is to stay half open."""
    net = Net(
        lambda net, x: net.out(torch.relu(net.mid(net.value(x) * torch.sigmoid(net.gate(x))))),
        value=nn.Linear(8, 8),
        gate=nn.Linear(8, 8),
        mid=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
    )

    applied = insert_norm(net, batch=torch.randn(4, 8))

    assert [line.partition(":")[0] for line in applied.changes] == ["mid"]
    assert applied.skipped["gate"] == "no activation that is not a gate stands behind it"


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 4), (1, 3)), (nn.Conv2d(3, 4, 3), (1, 3, 8, 8))], ids=["linear", "conv"]
)
def test_batch_norm_refuses_a_batch_of_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """It has no mean and variance; the model is as it was, and a layer norm is possible."""
    net = one_layer(layer)

    with pytest.raises(ValueError, match=r"batch has one example .* Pass a larger batch .* kind=\"layer\""):
        insert_norm(net, "batch", batch=torch.randn(shape))
    assert net.layer is layer
    insert_norm(net, "layer", batch=torch.randn(shape))


def test_batch_norm_refuses_a_layer_that_runs_several_times() -> None:
    """One set of running statistics would mix those of all its uses."""
    net = Net(
        lambda net, x: net.out(torch.relu(net.layer(torch.relu(net.layer(x))))),
        layer=nn.Linear(8, 8),
        out=nn.Linear(8, 2),
    )

    with pytest.raises(UnsupportedModelError, match="it runs 2 times per pass"):
        insert_norm(net, "batch", batch=torch.randn(4, 8))
    assert len(insert_norm(net, "rms", batch=torch.randn(4, 8)).changes) == 1


def test_tied_weights_stay_tied() -> None:
    """Two layers with one weight, and one layer at two places: after the operation and after undoing it."""
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first, nn.Tanh(), nn.Linear(8, 2))
    old = copy.deepcopy(model.state_dict())

    applied = insert_norm(model, batch=torch.randn(4, 8))

    assert model[0] is model[4]
    assert model[0].weight is model[2].weight
    assert applied.names["2.weight"] == "2.layer.weight"
    assert applied.names["4.weight"] == "4.layer.weight"
    assert applied.names.keys() == old.keys()
    applied.undo()
    assert model[0] is model[4] is first
    assert model[2].weight is first.weight


def test_a_layer_reached_by_another_way_is_refused() -> None:
    """Code that keeps layers in a list of its own would go past what was inserted: said, and nothing changed."""
    layer = nn.Linear(8, 8)
    hidden = [layer]
    net = Net(lambda net, x: net.out(torch.relu(hidden[0](x))), layer=layer, out=nn.Linear(8, 2))

    with pytest.raises(UnsupportedModelError, match="was put at layer and did not run on the batch"):
        insert_norm(net, batch=torch.randn(4, 8))
    assert net.layer is layer


def test_code_needs_a_batch() -> None:
    """Only a forward pass shows in what order a hand-written class calls its layers."""
    for operation in (insert_norm, replace_activations, add_residual):
        with pytest.raises(ValueError, match=r"ConvClassifier is no plain nn\.Sequential.*Pass batch="):
            operation(surgery.ConvClassifier())


def test_a_second_time_there_is_nothing_to_do() -> None:
    """What is normalized, replaced, or has a path around it is not so again."""
    x = surgery.batch()[0]
    for operation in (insert_norm, replace_activations, add_residual):
        model = surgery.head(64)
        operation(model, batch=x)
        with pytest.raises(UnsupportedModelError, match="found nothing to change"):
            operation(model, batch=x)


def test_operations_add_up_and_are_undone_from_the_last() -> None:
    """Norm, then ReLU, then residual; the optimizer holds all, and undoing gives back the first model."""
    x, y = surgery.batch()
    model = mlp(4, nn.Sigmoid)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    names = list(optimizer.param_groups[0]["param_names"])

    applied = [
        operation(model, batch=x, optimizer=optimizer) for operation in (insert_norm, replace_activations, add_residual)
    ]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    assert optimizer.param_groups[0]["param_names"] == [
        name for p in optimizer.param_groups[0]["params"] for name, own in model.named_parameters() if own is p
    ]
    for one in reversed(applied):
        one.undo()
    assert optimizer.param_groups[0]["param_names"] == names
    assert not optimizer.state
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_optimizer_that_holds_other_layers_only_is_refused() -> None:
    """Nothing would train what is new; several optimizers together are fine."""
    model = surgery.head(64)
    head, rest = torch.optim.SGD(model[5].parameters(), lr=0.1), torch.optim.Adam(model[:5].parameters())

    with pytest.raises(UnsupportedModelError, match=r"no optimizer given holds the layer beside 0\.norm\.weight"):
        insert_norm(model, optimizer=head)
    assert isinstance(model[0], nn.Linear)
    insert_norm(model, optimizer=[head, rest])
    assert len(head.param_groups[0]["params"]) == 2
    assert len(rest.param_groups[0]["params"]) == 8


def test_lbfgs_begins_anew() -> None:
    """Its history is one vector over all parameters, of another length now; undoing gives the old one back."""
    model, (x, y) = surgery.head(64), surgery.batch()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = copy.deepcopy(optimizer.state_dict())
    applied = insert_norm(model, optimizer=optimizer)
    assert not optimizer.state
    optimizer.step(closure)
    applied.undo()
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(a, b) for a, b in zip(before["state"][0]["old_dirs"], after["old_dirs"], strict=True))
    optimizer.step(closure)


# ---------------------------------------------------------------------------------------------------- activations


def test_relu_stays_where_relu_is_wanted() -> None:
    """Saturating activations become ReLU; leaky ReLU takes the place of ReLU as well."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)
    )
    other = copy.deepcopy(model)

    assert replace_activations(model, "relu").changes == ("1: Tanh > ReLU",)
    assert replace_activations(other, "leaky-relu").changes == ("1: Tanh > LeakyReLU", "3: ReLU > LeakyReLU")


def test_outputs_and_gates_stay() -> None:
    """A sigmoid at the output is a probability and one that multiplies is a gate; by name they are replaced."""
    net = Net(
        lambda net, x: net.prob(net.out(net.hidden(net.layer(x)) * net.squeeze(net.gate(x)))),
        layer=nn.Linear(8, 8),
        hidden=nn.Tanh(),
        gate=nn.Linear(8, 8),
        squeeze=nn.Sigmoid(),
        out=nn.Linear(8, 1),
        prob=nn.Sigmoid(),
    )
    x = torch.randn(4, 8)

    with pytest.raises(UnsupportedModelError) as caught:
        replace_activations(net, batch=x)
    assert "squeeze" in str(caught.value)
    assert "it is a gate" in str(caught.value)
    assert "prob: it is at the output" in str(caught.value)
    assert replace_activations(net, batch=x, modules=["hidden", "prob"]).changes == (
        "hidden: Tanh > ReLU",
        "prob: Sigmoid > ReLU",
    )


def test_functions_in_code_are_reported_with_their_place() -> None:
    """They cannot be rewritten: how often, which, and in whose code."""
    model = surgery.ConvClassifier()
    wrapper = nn.Sequential(model, nn.Identity())

    applied = replace_activations(wrapper, batch=surgery.batch()[0])

    assert any(line.startswith("0.act: Sigmoid > ReLU") for line in applied.changes)
    assert "its code calls" in applied.skipped["0.forward"]
    assert "cannot be rewritten" in applied.skipped["0.forward"]
    assert "sigmoid once and tanh once" in applied.skipped["0.forward"]


def test_activations_of_the_loss_are_not_those_of_the_model() -> None:
    """A sigmoid in compute_loss is no business of the model's."""
    model = surgery.head(64)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.sigmoid(net(batch[0])).mean()

    assert not replace_activations(model, batch=surgery.batch(), compute_loss=loss).skipped


def test_an_activation_with_a_hook_is_left_alone() -> None:
    """The hook would be lost with it."""
    model = surgery.head(64)
    model[1].register_forward_hook(lambda *_: None)

    assert "hooks" in replace_activations(model).skipped["1"]


def test_the_encoder_layer_of_torch_keeps_an_activation_that_it_computes_itself() -> None:
    """In evaluation mode it does not call the module; one that it does call is replaced."""
    x = torch.randn(4, 5, 8)
    for activation, replaced in ((nn.ReLU(), False), (nn.Tanh(), True)):
        model = nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation), nn.Linear(8, 2)
        )
        if replaced:
            replace_activations(model, "leaky-relu", batch=x)
            assert isinstance(model[0].activation, nn.LeakyReLU)
        else:
            with pytest.raises(UnsupportedModelError, match="computes its activation itself"):
                replace_activations(model, "leaky-relu", batch=x)


# ------------------------------------------------------------------------------------------------------- residual


@pytest.mark.parametrize("name", ["mlp", "conv", "blocks"])
def test_the_function_is_preserved_where_promised(name: str) -> None:
    """With ``preserve=True`` outputs and gradients are those of before, bit for bit; each new part has a gradient."""
    torch.manual_seed(0)
    x, y = surgery.batch()
    models = {"mlp": surgery.head(64), "conv": convolutions(), "blocks": blocks()}
    model = models[name]
    loss = F.cross_entropy(model(x), y)
    before = torch.autograd.grad(loss, list(model.parameters()))
    parameters, output = list(model.parameters()), model(x)

    applied = add_residual(model, batch=x, preserve=True)

    assert torch.equal(model(x), output)
    F.cross_entropy(model(x), y).backward()
    for parameter, gradient in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    for name_, parameter in model.named_parameters():
        if name_ in applied.changed:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def convolutions() -> nn.Sequential:
    """Return convolutions of every shape that a path can go around: same, wider, strided."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class Plain(nn.Module):
    """A block without a path around it."""

    def __init__(self, takes: int, gives: int) -> None:
        super().__init__()
        self.layer = nn.Linear(takes, gives)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def blocks() -> nn.Sequential:
    """Return blocks of a class of its own, one of which changes the width."""
    return nn.Sequential(Plain(64, 16), Plain(16, 16), Plain(16, 8), nn.Linear(8, 10))


def test_paths_fit_the_shapes() -> None:
    """The identity where shapes agree, else a projection; strides are followed."""
    model = convolutions()
    x = surgery.batch()[0]

    applied = add_residual(model, batch=x)

    assert [line.partition(" around")[0] for line in applied.changes] == [
        "1: a projection 1>4 (1x1)",
        "4: an identity path",
        "6: a projection 4>8 (1x1, stride 2x2)",
    ]
    assert model[6](torch.randn(2, 4, 8, 8)).shape == (2, 8, 4, 4)


def test_without_preserving_each_block_starts_as_its_path() -> None:
    """The identity gives the input itself; a projection copies features in turn."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    add_residual(model)

    x = torch.randn(3, 4)
    assert torch.equal(model[0](x), x)
    assert torch.equal(model[2](x), x[:, [0, 1, 2, 3, 0, 1]])


def test_blocks_that_have_a_path_are_left_alone() -> None:
    """Inside the block or around it; for code one forward pass shows it."""
    x = surgery.batch()[0]

    applied = add_residual(surgery.ResidualClassifier(), batch=x)

    assert applied.skipped == {
        "blocks.0": "there is a path around it already",
        "blocks.1": "there is a path around it already",
    }
    around = Net(
        lambda net, x: net.out(x + net.inner(x)), inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()), out=nn.Linear(8, 2)
    )
    with pytest.raises(UnsupportedModelError, match="there is a path around it already"):
        add_residual(around, batch=torch.randn(4, 8))


def test_float_targets_are_no_path() -> None:
    """A regression's targets come with the inputs, and yet go around nothing."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    applied = add_residual(
        model,
        batch=(torch.randn(4, 8), torch.randn(4, 1)),
        compute_loss=lambda net, batch: F.mse_loss(net(batch[0]), batch[1]),
    )

    assert len(applied.changes) == 1


@pytest.mark.parametrize(
    ("block", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh()), (2, 3, 8, 8), r"shapes do not allow it: .*\[2, 3, 6, 6\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 8)), (2, 2, 4), r"shapes do not allow it: .*\[2, 2, 4\].*\[2, 8\]"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), (2, 8), "changes its input in place"),
        (nn.Linear(8, 8).requires_grad_(requires_grad=False), (2, 8), "it is frozen"),
        (nn.Tanh(), (2, 8), "it has no parameters"),
        (nn.LSTM(8, 8), (2, 3, 8), "it does not take one tensor and return one"),
    ],
    ids=["unpadded", "flattened", "in place", "frozen", "no parameters", "tuple"],
)  # fmt: skip
def test_what_allows_no_path_is_refused_by_name(block: nn.Module, shape: tuple[int, ...], message: str) -> None:
    """The error says why, with the shapes; the model is as it was."""

    def forward(net: Any, x: Tensor) -> Tensor:
        made = net.block(x * 1)
        made = made[0] if isinstance(made, tuple) else made
        return net.out(made.mean().reshape(1, 1))

    net = Net(forward, block=block, out=nn.Linear(1, 2))

    with pytest.raises(UnsupportedModelError, match=f"block cannot have a path around it: .*{message}"):
        add_residual(net, batch=torch.randn(shape), modules="block")
    assert net.block is block


def test_a_lone_module_with_code_is_no_block_unless_named() -> None:
    """It may be the whole net."""
    net = nn.Sequential(Plain(8, 8), nn.Linear(8, 2))
    x = torch.randn(4, 8)

    with pytest.raises(UnsupportedModelError, match="it is the only Plain"):
        add_residual(net, batch=x)
    add_residual(net, batch=x, modules=["0"])
    assert isinstance(net[0], Residual)
    assert net[0].layer.in_features == 8


# ------------------------------------------------------------------------------------------------------ recurrent


@pytest.mark.parametrize("to", ["gru", "lstm"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "num_layers": 2, "dropout": 0.5}, {"bidirectional": True, "bias": False}]
)
def test_swapped_cells_keep_the_interface(to: Any, options: dict[str, Any]) -> None:
    """Shapes of output and state, given state, packed sequences, sizes and options."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5, **options))
    x = torch.randn(4, 6, 3)
    old = net.rnn
    output, state = old(x)

    swap_recurrent(net, to, batch=x)

    new = net.rnn
    assert isinstance(new, BareLSTM if to == "lstm" else nn.GRU)
    again, last = new(x)
    assert (again.shape, last.shape) == (output.shape, state.shape)
    assert new(x, torch.randn_like(state))[1].shape == state.shape
    packed = pack_padded_sequence(
        x, torch.tensor([6, 6, 4, 2] if old.batch_first else [4, 4, 3, 2, 1, 1]), batch_first=bool(old.batch_first)
    )
    assert pad_packed_sequence(new(packed)[0])[0].shape[-1] == output.shape[-1]
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(new, name) == getattr(old, name)


def test_the_bare_lstm_is_an_lstm() -> None:
    """Same weights, same numbers as torch's; a given hidden state meets a cell state of 0."""
    torch.manual_seed(0)
    ours, theirs = BareLSTM(3, 5, 2, batch_first=True), nn.LSTM(3, 5, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(4, 6, 3), torch.randn(2, 4, 5)

    assert torch.equal(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours(x, h)[1], theirs(x, (h, torch.zeros_like(h)))[1][0])


@pytest.mark.parametrize(("to", "gates"), [("lstm", 4), ("gru", 3)])
def test_the_gate_that_keeps_the_state_has_a_bias_of_one(to: Any, gates: int) -> None:
    """Of the two biases that torch adds one is 1 on that gate, everything else is 0."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5))

    swap_recurrent(net, to)

    total = (net.rnn.bias_ih_l0 + net.rnn.bias_hh_l0).detach().chunk(gates)
    assert [float(part.mean()) for part in total] == [float(i == 1) for i in range(gates)]


def test_cells_in_a_loop() -> None:
    """A GRU cell fits the user's loop, an LSTM cell does not."""

    def forward(net: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 5)
        for step in x.unbind(1):
            state = net.cell(step, state)
        return state

    net = Net(forward, cell=nn.RNNCell(3, 5))
    with pytest.raises(UnsupportedModelError, match=r"would have to carry a cell state; use to='gru'"):
        swap_recurrent(net, "lstm")
    swap_recurrent(net, "gru", batch=torch.randn(2, 6, 3))
    assert isinstance(net.cell, nn.GRUCell)


def test_what_cannot_be_swapped_says_why() -> None:
    """Tied, frozen, parametrized, hooked; a model that is itself the RNN."""
    x = torch.randn(6, 4, 5)

    def refused(rnn: nn.Module, message: str, **layers: nn.Module) -> None:
        net = Net(lambda net, x: net.rnn(x)[0], rnn=rnn, spare=nn.Linear(5, 5), **layers)
        with pytest.raises(UnsupportedModelError, match=message):
            swap_recurrent(net, batch=x)
        assert net.rnn is rnn

    rnn, other = nn.RNN(5, 5), nn.RNN(5, 5)
    other.weight_hh_l0 = rnn.weight_hh_l0
    refused(rnn, "tied to those of another module", other=other)
    refused(nn.RNN(5, 5).requires_grad_(requires_grad=False), "it is frozen")
    refused(torch.nn.utils.parametrizations.weight_norm(nn.RNN(5, 5), "weight_hh_l0"), "parametrized")
    hooked = nn.RNN(5, 5)
    hooked.register_forward_hook(lambda *_: None)
    refused(hooked, "it has hooks")
    with pytest.raises(UnsupportedModelError, match="the model is itself the RNN"):
        swap_recurrent(nn.RNN(5, 5))


# ------------------------------------------------------------------------------------------------------ attention

ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 10},
}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding", "padding and bool"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_without_its_norms_is_that_of_torch(name: str, need_weights: bool, mask: str) -> None:
    """Every option of the call gives torch's numbers once the norms are taken out: output, weights, gradients."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **ATTENTIONS[name])
    ours = QKNormAttention.around(theirs)
    ours.q_norm, ours.k_norm = nn.Identity(), nn.Identity()
    lengths = (3, 5)
    sizes = (8, theirs.kdim, theirs.vdim)
    query, key, value = (torch.randn(length, 4, size) for length, size in zip((3, 5, 5), sizes, strict=True))
    if theirs.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    blocked = torch.rand(lengths) < 0.3
    blocked[:, 0] = False
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    masks: dict[str, dict[str, Tensor]] = {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": torch.randn(lengths)},
        "per head": {"attn_mask": torch.randn(8, *lengths)},
        "padding": {"key_padding_mask": padding},
        "padding and bool": {"key_padding_mask": padding, "attn_mask": blocked},
    }
    arguments = {**masks[mask], "need_weights": need_weights}

    results = [attention(query, key, value, **arguments) for attention in (ours, theirs)]

    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
        each = [a(query, key, value, **arguments, average_attn_weights=False)[1] for a in (ours, theirs)]
        torch.testing.assert_close(each[0], each[1], rtol=1e-4, atol=1e-5)
    else:
        assert results[0][1] is None
    if mask == "none":
        alone = [a(*(t.select(0 if a.batch_first else 1, 0) for t in (query, key, value)))[0] for a in (ours, theirs)]
        torch.testing.assert_close(alone[0], alone[1], rtol=1e-4, atol=1e-5)


def test_logits_are_bounded_whatever_the_weights() -> None:
    """With queries and keys a thousand times as large the attention is what it was; without the norm it collapses."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    net = Net(lambda net, x: net.attention(x, x, x)[0], attention=attention)
    x = torch.randn(4, 6, 8)

    with torch.no_grad():
        attention.in_proj_weight[:16] *= 1000.0
    assert float(attention(x, x, x)[1].detach().max()) > 0.9
    add_qk_norm(net, batch=x)
    large = net.attention(x, x, x, average_attn_weights=False)[1]
    with torch.no_grad():
        attention.in_proj_weight[:16] /= 1000.0
    small = net.attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(large, small, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_evaluation_does_not_go_past_the_norm() -> None:
    """The encoder of torch computes from the weights in evaluation mode; not so here, with padding neither."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    net = Net(lambda net, x: net.encoder(x), encoder=nn.TransformerEncoder(layer, 2))
    x = torch.randn(4, 6, 8)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 4:] = True
    plain = net.encoder(x)

    applied = add_qk_norm(net, batch=x)

    net.train()
    expected = net.encoder(x, src_key_padding_mask=padding)
    net.eval()
    with torch.inference_mode():
        got = net.encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net.encoder(x), plain)
    applied.undo()
    assert net.encoder.use_nested_tensor
    torch.testing.assert_close(net.train().encoder(x), plain)


def test_attention_in_code_is_reported() -> None:
    """It cannot be rewritten from outside; with a batch the place is said."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(F.scaled_dot_product_attention(net.q(x), net.k(x), x))

    net = Net(forward, q=nn.Linear(8, 8), k=nn.Linear(8, 8), out=nn.Linear(8, 2))
    outer = nn.Sequential(net)

    with pytest.raises(UnsupportedModelError, match=r"0\.forward: attention written by hand; normalize q and k there"):
        add_qk_norm(outer, batch=torch.randn(2, 5, 8))
    with pytest.raises(UnsupportedModelError, match=r"0 is Net, not nn\.MultiheadAttention"):
        add_qk_norm(outer, modules="0")


def test_attention_with_keys_of_its_own_is_refused() -> None:
    """There is no norm to put behind keys that are no projection."""
    net = Net(lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, add_bias_kv=True))

    with pytest.raises(UnsupportedModelError, match="it adds keys of its own"):
        add_qk_norm(net)


# ------------------------------------------------------------------------------------------------ effect and names


def accuracy_after(model: nn.Module, steps: int = 150) -> float:
    """Train on digits with Adam and return the accuracy on all of them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = classification_loss(model, digit_batch(128, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = digits()
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def sigmoid_net() -> nn.Sequential:
    """Return twenty layers with sigmoids, through which no gradient comes."""
    torch.manual_seed(0)
    return mlp(20, nn.Sigmoid, init="xavier")


@pytest.mark.parametrize(
    "cure",
    [
        lambda model: insert_norm(model, "batch"),
        lambda model: insert_norm(model, "layer", where="after"),
        lambda model: replace_activations(model, "relu", initialize_layers=True),
        add_residual,
    ],
    ids=["batch norm", "layer norm after", "relu", "residual"],
)
def test_twenty_sigmoid_layers_are_cured(cure: Callable[[nn.Module], Applied]) -> None:
    """Ill, they guess one of ten classes; cured, they learn, and undoing the cure gives back the illness."""
    model = sigmoid_net()
    applied = cure(model)
    assert accuracy_after(model) > 0.8

    applied.undo()
    assert accuracy_after(model.train(), 50) < 0.2


def test_a_preserving_path_does_not_cure() -> None:
    """What the documentation says of the trade-off is so."""
    model = sigmoid_net()
    add_residual(model, preserve=True)
    assert accuracy_after(model) < 0.2


@pytest.mark.parametrize("kind", ["layer", "batch", "group", "rms"])
def test_layers_whose_weights_are_too_small_are_cured(kind: Any) -> None:
    """Twelve layers of ReLU with a fifth of He's weights lose the signal; any norm gives it back."""
    torch.manual_seed(0)
    ill = mlp(12, nn.ReLU, init="he", gain=0.2)
    well = copy.deepcopy(ill)
    insert_norm(well, kind)

    assert accuracy_after(ill, 60) < 0.3
    assert accuracy_after(well, 60) > 0.6


@pytest.mark.parametrize("name", REMEDIES)
def test_prescriptions_apply_by_name(name: str) -> None:
    """``gradguard.apply`` does the operation, says the name, and undoes it."""
    torch.manual_seed(0)
    model: nn.Module = {
        "gated-cell": surgery.RecurrentClassifier,
        "lstm": surgery.RecurrentClassifier,
        "qk-norm": surgery.TransformerClassifier,
    }.get(name, surgery.ConvClassifier)()
    before = copy.deepcopy(model.state_dict())

    applied = gradguard.apply(name, model, batch=surgery.batch(), compute_loss=classification_loss)

    assert applied.remedy == name
    assert str(applied).startswith(name)
    applied.undo()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
