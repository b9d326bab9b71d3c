"""What operations share (ties, optimizers, one after another), activations, effects, and names of remedies."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied
from gradguard.remedies.surgery import (
    REMEDIES,
    Residual,
    Standardized,
    Where,
    add_normalized_residual,
    add_residual,
    insert_norm,
    linear_output,
    replace_activations,
    standardize_input,
    swap_recurrent,
)
from tests import surgery
from tests.models import classification_loss, digit_batch, digits, mlp
from tests.surgery import Net


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


def test_a_path_goes_around_the_norm_too() -> None:
    """Before the activation as well as after it."""
    places: tuple[Where, ...] = ("before", "after")
    for where in places:
        model = surgery.head(64)
        insert_norm(model, where=where)

        applied = add_residual(model, batch=surgery.batch()[0])

        assert [line.partition(":")[0] for line in applied.changes] == ["0", "2"]
        assert isinstance(model[0], Residual)
        assert sum(isinstance(module, nn.LayerNorm) for module in model[0].block.modules()) == 1


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


def test_what_is_new_joins_the_group_of_the_bias() -> None:
    """Where weights decay and biases do not, scale and shift of a norm, gates and new cells stand where they belong."""
    x = surgery.batch()[0]
    for operation in (insert_norm, add_residual, swap_recurrent):
        model = surgery.RecurrentClassifier()
        named = dict(model.named_parameters())
        biases = [p for name, p in named.items() if "bias" in name]
        weights = [p for name, p in named.items() if "bias" not in name]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups)

        applied = operation(model, batch=x, optimizer=optimizer)

        decaying = {id(p) for p in optimizer.param_groups[0]["params"]}
        now = dict(model.named_parameters())
        new = {name: id(now[name]) in decaying for name in applied.changed}
        assert new == {name: ".weight_ih" in name or ".weight_hh" in name for name in new}


def test_names_of_the_users_own_stay() -> None:
    """An optimizer whose names are not the model's keeps them; what is new has the model's."""
    model = surgery.head(8)
    optimizer = torch.optim.SGD([(f"net/{name}", p) for name, p in model.named_parameters()], lr=0.1)

    insert_norm(model, optimizer=optimizer)

    names = optimizer.param_groups[0]["param_names"]
    assert names[:4] == ["net/0.weight", "net/0.bias", "0.norm.weight", "0.norm.bias"]
    assert len(names) == len(optimizer.param_groups[0]["params"])


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


def test_functions_in_code_are_replaced_and_said_with_their_place() -> None:
    """Beside modules of the same model: how often, which, and in whose code."""
    model = surgery.ConvClassifier()
    wrapper = nn.Sequential(model, nn.Identity())

    applied = replace_activations(wrapper, batch=surgery.batch()[0])

    assert any(line.startswith("0.act: Sigmoid > ReLU") for line in applied.changes)
    assert "0.forward: sigmoid once and tanh once as a function > relu" in applied.changes


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
        "linear-output": lambda: nn.Sequential(surgery.ConvClassifier(), nn.ReLU()),
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


def test_standardized_input_reaches_the_first_layer_with_mean_zero_and_deviation_one() -> None:
    """Raw features of any scale arrive standardized, also in evaluation; features that never vary are only centred."""
    torch.manual_seed(0)
    data = torch.cat([50.0 + 3.0 * torch.randn(200, 3), torch.full((200, 1), 7.0)], dim=1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    seen: list[Tensor] = []
    applied = standardize_input(model, batch=data)
    model[0].layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.eval()
    model(data)

    torch.testing.assert_close(seen[0].mean(0), torch.zeros(4), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(seen[0][:, :3].std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0.0)
    assert (seen[0][:, 3] == 0.0).all()
    assert [name for name, _ in model.named_parameters()] == ["0.layer.weight", "0.layer.bias", "2.weight", "2.bias"]
    assert applied.names["0.weight"] == "0.layer.weight"
    assert not isinstance(model[2], Standardized)


def test_standardized_input_is_held_within_ten_deviations() -> None:
    """A feature that hardly varies in the batch is a thousand deviations out elsewhere, and would drown the others."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 3)
    data[:, 2] = 5.0
    data[0, 2] = 5.001
    standardize_input(model, batch=data)
    seen: list[torch.Tensor] = []
    first = model[0]
    assert isinstance(first, Standardized)
    first.layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(torch.tensor([[0.0, 0.0, 6.0], [0.0, 0.0, -6.0]]))

    assert seen[0][:, 2].tolist() == [10.0, -10.0]
    assert float(seen[0][:, :2].abs().max()) < 1.0


@pytest.mark.parametrize(
    ("model", "batch", "error", "words"),
    [
        (nn.Sequential(nn.Linear(4, 2)), None, ValueError, "pass batch="),
        (nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4), UnsupportedModelError, "one example"),
        (
            nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)),
            torch.tensor([[0, 1]]),
            UnsupportedModelError,
            "embedding",
        ),
    ],
)
def test_input_that_cannot_be_standardized_is_refused(
    model: nn.Module, batch: Tensor | None, error: type[Exception], words: str
) -> None:
    """Without data, with one example, or where the first layer reads an embedding, nothing is changed."""
    before = str(model)
    with pytest.raises(error, match=words):
        standardize_input(model, batch=batch)
    assert str(model) == before


def test_normalized_blocks_with_paths_let_a_stack_learn_that_neither_saves_alone() -> None:
    """Sixteen ReLU layers of width 5 die one way or the other, unless both the units and the way past them live."""
    x, y = circles()

    def ends_at(operation: Any) -> float:
        torch.manual_seed(0)
        widths = [2, *[5] * 16]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(5, 2))
        operation(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        loss = torch.tensor(math.inf)
        for _ in range(150):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert ends_at(lambda model: insert_norm(model, "layer")) > 0.65
    assert ends_at(add_normalized_residual) < 0.6


def circles() -> tuple[Tensor, Tensor]:
    """Return points of two rings and which ring each is of."""
    random = torch.Generator().manual_seed(0)
    angle, ring = 6.3 * torch.rand(256, generator=random), torch.randint(0, 2, (256,), generator=random)
    radius = 1.0 + ring
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), ring


def test_a_relu_at_the_output_is_taken_away_and_no_other() -> None:
    """Negative targets are reached afterwards; hidden ReLUs, and sigmoids that bound an output, stay."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU())

    applied = linear_output(model, batch=x)

    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Identity]
    assert float(model(x).detach().min()) < 0.0
    applied.undo()
    assert float(model(x).detach().min()) == 0.0
    with pytest.raises(UnsupportedModelError, match="linear-output found nothing"):
        linear_output(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()), batch=x)


def test_scaled_branches_start_at_one_over_the_root_of_their_number() -> None:
    """Four blocks start at a half each, and the record says so; by default they start at 0."""
    torch.manual_seed(0)

    def branches(**options: Any) -> tuple[list[float], str]:
        model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
        applied = add_residual(model, **options)
        return [p.item() for name, p in model.named_parameters() if name.endswith("branch")], applied.changes[0]

    scaled, words = branches(scaled=True)

    assert scaled == [0.5] * 4
    assert "starts at 0.5" in words
    assert branches()[0] == [0.0] * 4
