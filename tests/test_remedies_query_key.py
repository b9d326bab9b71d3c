"""Queries and keys scaled: logits of usual size afterwards, whoever wrote the attention, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import gradguard
from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import scale_query_key
from tests.models import TransformerClassifier, classification_loss, digit_batch


class ByHand(nn.Module):
    """Attention with layers of its own, under the names that are given."""

    def __init__(self, query: str = "query", key: str = "key", *, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.factor = (query, key), factor
        self.add_module(query, nn.Linear(16, 16))
        self.add_module(key, nn.Linear(16, 16))
        self.value = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is attended to, shape as ``x``."""
        q, k = (self.get_submodule(name)(x) for name in self.names)
        logits = q @ k.transpose(-1, -2) * (self.factor / 4)
        mixed: Tensor = logits.softmax(-1) @ self.value(x)
        return mixed

    def largest(self, x: Tensor) -> float:
        """Return the largest logit."""
        q, k = (self.get_submodule(name)(x) for name in self.names)
        return float((q @ k.transpose(-1, -2) * (self.factor / 4)).detach().abs().max())


def data() -> Tensor:
    """Return tokens, shape ``[8, 12, 16]``."""
    return torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("query", "key"), [("query", "key"), ("q_proj", "k_proj"), ("to_q", "to_k")])
def test_logits_that_are_too_large_become_usual(query: str, key: str) -> None:
    """A factor forgotten in the code is made up for by the weights; values stay what they are."""
    model, x = nn.Sequential(ByHand(query, key, factor=300.0)), data()
    value = model[0].get_parameter("value.weight").clone()

    applied = gradguard.apply("scale-query-key", model, batch=x)

    assert 2.5 < model[0].largest(x) < 10.0
    assert torch.equal(model[0].get_parameter("value.weight"), value)
    assert "largest logit" in applied.changes[0]


def test_attention_of_torch_is_scaled_in_its_stacked_weight() -> None:
    """The first two thirds of the rows make queries and keys, the last makes values; undo puts back every bit."""
    model, batch = TransformerClassifier(2), digit_batch(16)
    attention = model.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.in_proj_weight[:64].mul_(30.0)
    before = attention.in_proj_weight.detach().clone()

    applied = scale_query_key(model, batch, compute_loss=classification_loss)

    assert torch.equal(attention.in_proj_weight[64:], before[64:])
    assert attention.in_proj_weight[:64].norm() < 0.5 * before[:64].norm()
    assert all("layers.0" in name for name in applied.changed)
    applied.undo()
    assert torch.equal(attention.in_proj_weight, before)


def frozen(model: ByHand) -> None:
    """Freeze the whole."""
    model.requires_grad_(requires_grad=False)
    model.value.requires_grad_(requires_grad=True)


def bounded(model: ByHand) -> None:
    """Let something else make a weight."""
    spectral_norm(model.get_submodule("query"))


@pytest.mark.parametrize(
    ("model", "change", "why"),
    [
        (ByHand(), None, "of usual size"),
        (ByHand("one", "other", factor=300.0), None, "usual names"),
        (ByHand(factor=300.0), frozen, "frozen"),
        (ByHand(factor=300.0), bounded, "parametrized"),
        (nn.Linear(16, 16), None, "no layer of the kind"),
    ],
)
def test_what_cannot_be_scaled_is_left_alone_and_says_why(
    model: nn.Module, change: Callable[[nn.Module], None] | None, why: str
) -> None:
    """Usual logits need nothing; names that say nothing, frozen and parametrized weights are the user's."""
    if change is not None:
        change(model)
    before = [parameter.clone() for parameter in model.parameters()]

    with pytest.raises(UnsupportedModelError, match=why):
        scale_query_key(nn.Sequential(model), data())

    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_the_wanted_size_must_be_a_size() -> None:
    """Zero logits would be no attention at all."""
    with pytest.raises(ValueError, match="largest must be positive"):
        scale_query_key(ByHand(), data(), largest=0.0)
