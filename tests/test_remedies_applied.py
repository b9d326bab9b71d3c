"""The record of a remedy and the snapshot behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradguard.remedies import Applied
from gradguard.remedies._applied import Snapshot, tensor_names, transaction


def test_values_come_back_bit_for_bit() -> None:
    """NaN, infinities, signed zeros and integers included, in the same tensor object."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    whole = torch.arange(4)
    snapshot = Snapshot()
    snapshot.keep([odd, whole])
    bits, storage = odd.numpy().tobytes(), odd.data_ptr()
    odd.zero_()
    whole.zero_()
    snapshot.restore()

    assert odd.numpy().tobytes() == bits
    assert odd.data_ptr() == storage
    assert whole.tolist() == [0, 1, 2, 3]


def test_first_value_counts() -> None:
    """What is kept twice comes back as it was the first time."""
    value = torch.ones(2)
    snapshot = Snapshot()
    snapshot.keep([value])
    value.fill_(2.0)
    snapshot.keep([value])
    snapshot.restore()

    assert value.tolist() == [1.0, 1.0]


def test_changed_ignores_nan_that_stayed() -> None:
    """A tensor with NaN counts as changed only if something did change."""
    same, other = torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])
    snapshot = Snapshot()
    snapshot.keep([same, other])
    other[1] = 2.0

    assert snapshot.changed() == {id(other)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_transaction_restores_whatever_is_raised(error: type[BaseException]) -> None:
    """Also when the user interrupts."""
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()

    def fail_in_the_middle() -> None:
        with transaction() as snapshot:
            snapshot.keep(layer.parameters())
            nn.init.zeros_(layer.weight)
            raise error

    with pytest.raises(error) as caught:
        fail_in_the_middle()
    assert torch.equal(layer.weight, before)
    assert caught.value.__notes__ == ["the model and the optimizer are as they were before this remedy"]


def test_without_an_error_changes_stay() -> None:
    """A transaction that ends well keeps what was done, until undo."""
    layer = nn.Linear(2, 2)
    with transaction() as snapshot:
        snapshot.keep(layer.parameters())
        nn.init.zeros_(layer.weight)

    assert not layer.weight.any()
    snapshot.restore()
    assert layer.weight.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-2),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
        torch.optim.Adafactor,
    ],
    ids=["adamw", "sgd", "lbfgs", "adafactor"],
)
def test_optimizer_state_is_dropped_and_comes_back(make: Any) -> None:
    """State is gone after the reset, grows anew by training, and is the old one once restored; LBFGS has but one."""
    head = nn.Linear(3, 1)
    weight = next(head.parameters())
    model = nn.Sequential(nn.Linear(3, 3), head)
    optimizer = make(model.parameters())
    x = torch.randn(4, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = dict(optimizer.state)
    snapshot = Snapshot()
    snapshot.reset_state([optimizer], [weight])
    left = set(optimizer.state)
    optimizer.step(closure)
    snapshot.restore()

    assert left == (set() if isinstance(optimizer, torch.optim.LBFGS) else set(before) - {weight})
    assert set(optimizer.state) == set(before)
    assert all(optimizer.state[p] is before[p] for p in set(before) - left)


def test_state_that_was_not_there_goes_again() -> None:
    """An optimizer that had not stepped has no state after restoring, whatever was trained in between."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    snapshot = Snapshot()
    snapshot.reset_state([optimizer], [next(model.parameters())])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    snapshot.restore()

    assert set(optimizer.state) == {model.bias}


def test_tied_tensors_have_each_of_their_names() -> None:
    """A name map must cover every name a checkpoint could hold."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight

    assert set(tensor_names(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_record_reads_as_lines() -> None:
    """Remedy first, then one line per change and per thing left alone."""
    applied = Applied(
        model=nn.Linear(1, 1),
        remedy="lsuv",
        changes=("a: scaled",),
        changed=("a.weight",),
        skipped={"b": "it is frozen"},
    )

    assert str(applied) == "lsuv\n  a: scaled\n  b: left alone, it is frozen"
