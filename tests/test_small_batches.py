"""Batches of a few examples, in a trial: results over more of them than the last steps saw."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import gradguard
from gradguard._copies import Copies, OutOfTime
from gradguard._entrant import Entrant
from gradguard._measuring import look
from gradguard._race import Batches, Lane, Race, paired_gain
from gradguard.prescriptions import plain_prescription
from gradguard.remedies import catalogue
from tests.models import classification_loss
from tests.test_trials import net, sgd


def examples(size: int, count: int = 80) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of three classes that lie apart."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (count, size), generator=generator)
    centres = torch.randn(3, 64, generator=generator)
    return [(centres[y] + torch.randn(size, 64, generator=generator), y) for y in classes]


def lane_of(model: nn.Module, rate: float = 1e-3) -> Lane:
    """Return a copy in training."""
    return Lane("", 0, model, sgd(rate)(model))


@pytest.mark.parametrize(("size", "count"), [(1, 80), (3, 43), (8, 16), (16, 0), (64, 0)])
def test_a_copy_is_measured_on_the_batches_to_come_where_they_are_small(size: int, count: int) -> None:
    """Eight steps see eight examples where each brings one."""
    race, lane = Race(Batches(examples(size), 80), classification_loss, base_seed=0), lane_of(net(2))
    race.advance(lane, 10)
    look(race, lane)

    assert len(lane.looked) == count
    assert lane.result == pytest.approx(np.mean(lane.looked) if count else np.median(lane.losses[-8:]))
    race.advance(lane, 11)
    assert lane.looked == []  # of the copy as it was


def test_rates_are_told_apart_by_sixty_four_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the two that the last steps saw."""
    seen: list[int] = []

    def counted(race: Race, lane: Lane, *, enough: int) -> None:
        look(race, lane, enough=enough)
        seen.append(len(lane.looked))

    monkeypatch.setattr("gradguard._copies.look", counted)
    cure = catalogue.find("lower-learning-rate")
    assert cure is not None
    candidate = Entrant(prescription=plain_prescription("lower-learning-rate"), remedy=cure)
    Copies(net(2), Race(Batches(examples(1), 80), classification_loss, base_seed=0), sgd(1.0)).search_rate(candidate)

    assert set(seen) == {64}


def test_nobody_looks_further_once_the_deadline_has_passed() -> None:
    """A pass may take long, and there are eighty of them."""
    race = Race(Batches(examples(1), 80), classification_loss, base_seed=0)
    copies = Copies(net(2), race, sgd(1e-3), deadline=time.perf_counter() + 60.0)
    lane = copies.untreated(0)
    copies.advance(lane, 8)
    race.deadline = 0.0
    look(race, lane)

    assert lane.looked == []
    assert Race(Batches(examples(1), 80), classification_loss, base_seed=0).deadline == math.inf
    with pytest.raises(OutOfTime):
        Copies(net(2), race, sgd(1e-3), deadline=0.0).evaluate(lane)


def test_what_is_looked_at_are_losses_by_plain_passes_and_nothing_is_moved() -> None:
    """Neither weights nor buffers nor random numbers; the batches are those behind the last step."""
    model = nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.Dropout(0.0), nn.Linear(16, 3))
    data = examples(2)
    race, lane = Race(Batches(data, 80), classification_loss, base_seed=0), lane_of(model)
    race.advance(lane, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, steps = torch.get_rng_state(), race.steps_taken
    look(race, lane)

    plain = [float(classification_loss(model, batch).detach()) for batch in data[8:72]]
    assert lane.looked == pytest.approx(plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert race.steps_taken == steps


def test_gain_over_examples_is_their_mean_and_not_their_median() -> None:
    """A copy that is certain and wrong on one example in four is no better for being right on the others."""
    wrong, modest = lane_of(nn.Linear(1, 1)), lane_of(nn.Linear(1, 1))
    wrong.looked, modest.looked = [0.0, 0.0, 0.0, 9.0] * 16, [0.3] * 64

    gain, error = paired_gain([wrong], [modest])

    assert gain == pytest.approx(2.25 - 0.3)
    assert error == pytest.approx(np.std(wrong.looked, ddof=1) / 8.0)
    modest.looked = []
    wrong.losses, modest.losses = [0.0, 0.0, 0.0, 9.0] * 2, [0.3] * 8
    assert paired_gain([wrong], [modest])[0] < 0.0


def test_a_first_example_that_is_right_by_chance_makes_nothing_a_divergence() -> None:
    """Its loss is zero, and a hundred times zero would be above every other."""
    data = examples(1)
    model = net(2, init="he")

    def lucky(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return classification_loss(model, batch) * (0.0 if batch is data[0] else 1.0)

    race, lane = Race(Batches(data, 80), lucky, base_seed=0), lane_of(model)
    look(race, lane)
    others = lane.looked
    race.advance(lane, 1)
    race.set_limit(lane, others)
    race.advance(lane, 20)

    assert lane.losses[0] == 0.0
    assert race.limit == pytest.approx(100.0 * max(others))
    assert 0.1 < max(others) < 20.0
    assert not lane.fault


def test_a_rate_that_is_too_high_for_single_examples_is_cured() -> None:
    """Of three classes that lie apart a net learns what there is to learn, one example at a time."""

    def fast(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.3)

    torch.manual_seed(0)
    model, data = net(3, init="he"), examples(1, 300)
    result = gradguard.trial(
        model, data, classification_loss, fast, candidates=["lower-learning-rate", "clip-norm"], run_steps=300
    )
    assert result.best is not None
    optimizer = fast(model)
    gradguard.apply(result.best, model, optimizer=optimizer, batch=data[0], compute_loss=classification_loss)
    for batch in data:
        optimizer.zero_grad()
        classification_loss(model, batch).backward()
        optimizer.step()
    x, y = (torch.cat(part) for part in zip(*examples(1, 300)[200:], strict=True))
    assert float((model(x).argmax(-1) == y).float().mean()) > 0.9


def test_a_limit_is_that_of_the_weights_as_they_were_given() -> None:
    """The first step at a rate that is far too high would make every later one look harmless."""
    result = gradguard.trial(
        net(3, init="he"), examples(1), classification_loss, sgd(1e4), candidates=["adaptive-clip"], run_steps=300
    )

    assert result.control.outcome == "untreated"
    assert "diverged" in result.control.why


class Keeping(nn.Module):
    """A net that keeps what it computed, and cannot be copied after that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(2)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        self.last = self.inner(x)
        return self.last


def test_a_model_that_cannot_be_copied_once_it_ran_is_judged_by_its_last_losses() -> None:
    """As it was before anybody looked further."""
    race, lane = Race(Batches(examples(2), 80), classification_loss, base_seed=0), lane_of(Keeping())
    race.advance(lane, 10)
    look(race, lane)

    assert lane.looked == []
    assert lane.result == pytest.approx(np.median(lane.losses[-8:]))


def test_a_single_batch_tells_no_more_than_it_did() -> None:
    """Four examples that are all there is: their loss has no error of its own."""
    race, lane = Race(Batches(examples(4)[:1], 1), classification_loss, base_seed=0), lane_of(net(2))
    race.advance(lane, 10)
    look(race, lane)

    assert lane.looked == []
