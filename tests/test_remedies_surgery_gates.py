"""Gates that reach their product through reshaping, as in squeeze-and-excitation: told from hidden activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import initialize
from gradguard.remedies.surgery import insert_norm, replace_activations

Spread = Callable[[Tensor, Tensor], Tensor]

SPREADS: dict[str, Spread] = {
    "view": lambda gate, h: gate.view(*gate.shape, 1, 1),
    "expanded": lambda gate, h: gate.unsqueeze(-1).unsqueeze(-1).expand_as(h),
    "indexed": lambda gate, h: gate[:, :, None, None],
    "moved": lambda gate, h: gate.reshape(1, 1, *gate.shape).permute(2, 3, 0, 1),
}


class Squeeze(nn.Module):
    """Squeeze-and-excitation: channels weighted by what two layers make of their means. Hu et al. (2018)."""

    def __init__(self, channels: int, spread: Spread) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Linear(channels, 8)
        self.act = nn.ReLU()
        self.expand = nn.Linear(8, channels)
        self.gate = nn.Sigmoid()
        self._spread = spread

    def forward(self, h: Tensor) -> Tensor:
        gate = self.gate(self.expand(self.act(self.reduce(self.pool(h).flatten(1)))))
        return h * self._spread(gate, h)


def squeezing(spread: Spread, act: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """Return two convolutions whose activations saturate, each with such a block behind it."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        act(),
        Squeeze(16, spread),
        nn.Conv2d(16, 16, 3, padding=1),
        act(),
        Squeeze(16, spread),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


IMAGES = torch.linspace(-1.0, 1.0, 4 * 64).reshape(4, 1, 8, 8)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=list(SPREADS))
def test_the_gate_of_a_squeeze_stays_and_what_it_gates_is_replaced(spread: Spread) -> None:
    """The sigmoid that weights channels is a gate; that of the features it weights is a hidden activation."""
    model = squeezing(spread)

    applied = replace_activations(model, batch=IMAGES)

    assert applied.changes == ("1: Sigmoid > ReLU", "4: Sigmoid > ReLU")
    assert isinstance(model[2].gate, nn.Sigmoid)
    assert applied.skipped["2.gate"] == "it is a gate: its result multiplies something else"
    assert applied.skipped["5.gate"] == "it is a gate: its result multiplies something else"


@pytest.mark.parametrize("spread", SPREADS.values(), ids=list(SPREADS))
def test_nothing_is_normalized_before_the_gate_of_a_squeeze(spread: Spread) -> None:
    """The layer before the gate is left alone; the convolutions and the layer inside are normalized."""
    applied = insert_norm(squeezing(spread), batch=IMAGES)

    assert [line.partition(":")[0] for line in applied.changes] == ["0", "2.reduce", "3", "5.reduce"]
    assert applied.skipped["2.expand"] == "no activation that is not a gate stands behind it"
    assert applied.skipped["5.expand"] == "no activation that is not a gate stands behind it"


def test_features_that_are_gated_keep_their_activation_for_initialization() -> None:
    """A ReLU whose result is weighted by a gate made of it has a ReLU's gain; the layer before the gate has none."""
    applied = initialize(squeezing(SPREADS["view"], nn.ReLU), "he", batch=IMAGES, generator=0)

    words = dict(line.split(": ", 1) for line in applied.changes)
    assert "for relu" in words["0"]
    assert "for relu" in words["3"]
    assert "gain 1)" in words["2.expand"]
    assert "sigmoid" not in words["2.expand"]


class Reshaped(nn.Module):
    """Hidden activations that are reshaped, and scaled by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)).view(2, -1).reshape(-1, 16))


def test_reshaping_alone_makes_no_gate() -> None:
    """A saturating activation whose result is only reshaped is a hidden one."""
    assert replace_activations(Reshaped(), batch=torch.randn(4, 8)).changes == ("act: Sigmoid > ReLU",)


class Product(nn.Module):
    """An unbounded activation that is reshaped and then multiplied with something that does not depend on it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.value, self.other, self.act = nn.Linear(8, 16), nn.Linear(8, 16), act
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.value(x)).view(-1, 16) * self.other(x))


def test_only_a_bounded_activation_gates_from_afar() -> None:
    """ReLU behind a reshape is features as much as a gate and may be replaced; a sigmoid there is a gate."""
    x = torch.randn(4, 8)

    assert replace_activations(Product(nn.ReLU()), "leaky-relu", batch=x).changes == ("act: ReLU > LeakyReLU",)
    with pytest.raises(UnsupportedModelError, match="act: it is a gate"):
        replace_activations(Product(nn.Sigmoid()), "leaky-relu", batch=x)
