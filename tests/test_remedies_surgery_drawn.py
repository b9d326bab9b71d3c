"""Which layers are drawn anew where activations are replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradguard.remedies.surgery import replace_activations


class Forked(nn.Module):
    """A sigmoid whose output goes to two heads, registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.first, self.apart = (nn.Linear(64, 64) for _ in range(4))
        self.squash, self.last = nn.Sigmoid(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.squash(self.first(x))
        logits: Tensor = self.last(torch.relu(self.left(hidden) + self.right(hidden.flatten(1)) + self.apart(x)))
        return logits


@pytest.mark.parametrize("batch", [None, torch.ones(4, 64)], ids=["in order", "traced"])
def test_layers_before_and_behind_a_new_activation_are_drawn_anew(batch: Tensor | None) -> None:
    """Behind it, too: a head that a sigmoid has given 0 to 1, or one that is far too large, begins with a huge loss."""
    model: nn.Module = Forked()
    around = {"first", "left", "right"}
    if batch is None:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 10))
        around = {"2", "4"}

    applied = replace_activations(model, "relu", batch=batch, initialize_layers=True)

    assert {name.rpartition(".")[0] for name in applied.changed} == around
    scales = {
        name: float(layer.weight.detach().std())
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert all(0.08 < scale < 0.25 for name, scale in scales.items() if name in around)


def frozen(model: nn.Sequential) -> None:
    """Freeze the head."""
    model[2].weight.requires_grad_(False)


def tied(model: nn.Sequential) -> None:
    """Let the head have the weight of the first layer."""
    model[2].weight = model[0].weight


def parametrized(model: nn.Sequential) -> None:
    """Let something else make the head's weight."""
    nn.utils.parametrizations.spectral_norm(model[2])


def zero(model: nn.Sequential) -> None:
    """Begin as a function that is 0."""
    nn.init.zeros_(model.get_parameter("2.weight"))


@pytest.mark.parametrize("spoil", [frozen, tied, parametrized, zero])
@pytest.mark.parametrize("batch", [None, torch.ones(4, 16)], ids=["in order", "traced"])
def test_what_may_not_be_drawn_anew_behind_an_activation_stays(
    spoil: Callable[[nn.Sequential], None], batch: Tensor | None
) -> None:
    """The cure is possible all the same, and a dry run says what will be."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16))
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    spoil(model)
    before = first.weight.detach().clone(), last.weight.detach().clone()

    dry = replace_activations(model, "relu", batch=batch, initialize_layers=True, dry_run=True)
    replace_activations(model, "relu", batch=batch, initialize_layers=True)

    assert not any(line.startswith("2:") for line in dry.changes)
    assert not torch.equal(first.weight, before[0])
    if spoil is not tied:
        assert torch.allclose(last.weight, before[1], atol=1e-2)
