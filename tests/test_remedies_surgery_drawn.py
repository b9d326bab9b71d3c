"""Which layers are drawn anew where activations are replaced."""

from __future__ import annotations

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
