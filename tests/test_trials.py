"""Cures tried on copies: the right one wins, the model stays as it was, the cost is bounded and stated."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import gradguard
from gradguard._plan import SHARE, make_plan
from gradguard._twins import checked_optimizer
from gradguard._untouched import cuda_devices
from gradguard.errors import UnsupportedModelError
from gradguard.findings import Severity
from gradguard.outcomes import TrialResult
from gradguard.preflight import check
from gradguard.remedies import catalogue
from tests.models import classification_loss, digit_batch, mlp

Batch = tuple[Tensor, Tensor]


def batches(count: int = 40) -> list[Batch]:
    """Return batches of digits."""
    return [digit_batch(64, seed=seed) for seed in range(count)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at its usual rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of SGD with momentum."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def net(depth: int = 4, **options: Any) -> nn.Module:
    """Return a net that is the same in every test."""
    torch.manual_seed(0)
    return mlp(depth, **options)


# ------------------------------------------------------------------------------------------------------------- winners


def test_a_rate_that_is_far_too_low_is_searched_by_decades() -> None:
    """1e-8 where 1e-2 would do: six decades in a few steps each."""
    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, sgd(1e-8), candidates=["higher-learning-rate", "clip-norm"]
    )

    assert result.best is not None
    assert result.best.remedy == "higher-learning-rate"
    assert 1e5 <= result.best.arguments["factor"] <= 1e8
    assert f"{result.best.arguments['factor']:.2g}" in result.best.code
    assert result.best.effect is not None
    assert result.best.effect.loss_after < 0.5 * result.best.effect.loss_before


def test_a_rate_that_is_far_too_high_is_lowered() -> None:
    """The untreated copy diverges; what trains is found all the same."""
    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, sgd(30.0), candidates=["lower-learning-rate", "clip-norm"]
    )

    assert result.best is not None
    assert result.best.remedy == "lower-learning-rate"
    assert result.control.why == "diverged"
    assert math.isinf(result.control.loss)


def test_a_stack_that_passes_nothing_on_needs_new_weights_and_not_another_rate() -> None:
    """Twenty ReLU layers at PyTorch's default under SGD: the weights, not the clipping, not the rate."""
    names = ["he-initialization", "clip-norm", "lower-learning-rate"]
    result = gradguard.trial(net(20), batches(), classification_loss, sgd(0.01), candidates=names, steps=30)

    assert result.best is not None
    assert result.best.remedy == "he-initialization"
    assert {run.remedy for run in result.runs if run.outcome in {"best", "helps"}} == {"he-initialization"}
    assert result.runs[0].healthy is True


def test_nothing_is_recommended_where_nothing_is_wrong() -> None:
    """A healthy model costs one check."""
    result = gradguard.trial(net(init="he"), batches(), classification_loss, adam)

    assert (result.best, result.ranking, result.cost_steps) == (None, (), 0)
    assert "Nothing is wrong" in result.note


def test_nothing_is_recommended_where_nothing_helps() -> None:
    """Clipping does not change a healthy run by more than chance."""
    result = gradguard.trial(net(init="he"), batches(), classification_loss, adam, candidates=["clip-norm"], steps=20)

    assert result.best is None
    assert [run.outcome for run in result.runs] == ["no effect"]
    assert result.note == "Nothing that was tried helps."


class Recalls(nn.Module):
    """A GRU that must name the first of many symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, 4]``."""
        return self.head(self.rnn(x)[0][:, -1])


def recalled(length: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of one-hot sequences whose first symbol is the class."""
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 4, (32, length), generator=random) for _ in range(8)]
    return [(nn.functional.one_hot(each, 4).float(), each[:, 0]) for each in drawn]


def test_where_no_loss_moves_yet_the_cure_after_which_the_illness_is_gone_is_recommended() -> None:
    """Remembering over 60 steps takes hundreds of updates, and the gates are what stands in the way."""
    torch.manual_seed(0)
    model, data = Recalls(), recalled(60)
    ill = check(model, data[0], classification_loss)
    finding = replace(ill.findings[0], severity=Severity.WARNING)

    result = gradguard.trial(
        model, data, classification_loss, adam, diagnosis=replace(ill, findings=(finding,)), steps=16
    )

    assert finding.code == "GG111"
    assert result.best is not None
    assert result.best.remedy == "chrono-initialization"
    assert result.runs[0].outcome == "best"
    assert result.runs[0].healthy is True
    assert "no longer finds what is wrong" in result.note


# ------------------------------------------------------------------------------------------------------------ no traces


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that a trial might touch."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Check that a model is bit for bit as it was."""
    after = state_of(model)
    for kind in ("tensors", "gradients"):
        assert after[kind].keys() == before[kind].keys()
        assert all(torch.equal(after[kind][name], before[kind][name]) for name in before[kind])
    assert (after["modes"], after["hooks"]) == (before["modes"], before["hooks"])
    assert torch.equal(after["random"], before["random"])


def with_gradients() -> nn.Module:
    """Return a net with dropout, batch norm, gradients and a part in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 10))
    classification_loss(model, digit_batch(16)).backward()
    model[1].eval()
    return model


def interrupted(calls: int) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a loss that the user interrupts."""
    left = iter(range(calls))

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return classification_loss(model, batch)

    return compute_loss


@pytest.mark.parametrize("calls", [0, 3, 1000], ids=["at once", "in the middle", "never"])
def test_the_model_is_as_it_was_also_after_an_interrupt(calls: int) -> None:
    """Weights, buffers, gradients, modes, hooks and random numbers."""
    model = with_gradients()
    before = state_of(model)
    result = gradguard.trial(
        model, batches(5), interrupted(calls), sgd(1e-6), diagnosis=None if calls else _checked(model), **_OPTIONS
    )

    assert_untouched(model, before)
    assert result.interrupted is (calls < 1000)


_OPTIONS: dict[str, Any] = {"candidates": ["higher-learning-rate", "he-initialization"], "steps": 6}


def _checked(model: nn.Module) -> gradguard.Diagnosis:
    return gradguard.check(model, digit_batch(16), classification_loss)


def test_an_interrupt_keeps_what_was_measured() -> None:
    """After the untreated copy and part of a candidate there is a table."""
    result = gradguard.trial(
        net(init="he"),
        batches(),
        interrupted(60),
        sgd(1e-6),
        diagnosis=_checked(net(init="he")),
        candidates=["higher-learning-rate"],
        steps=20,
    )

    assert result.interrupted
    assert result.control.steps == 10  # the rest of it waits for whether it is needed
    assert "interrupted" in printed(result)


def test_devices_are_those_of_the_parameters() -> None:
    """Each once and in order; a model on the CPU has none."""
    tensors = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:2", "cpu", "cuda:0", "cuda:2")]

    assert cuda_devices(SimpleNamespace(parameters=lambda: tensors)) == [0, 2]  # type: ignore[arg-type]  # no GPU here
    assert cuda_devices(nn.Linear(2, 2)) == []


def test_time_is_a_bound() -> None:
    """A loss that takes long is stopped."""
    now = iter(range(10_000))
    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, sgd(1e-6), seconds=1e-6, candidates=["clip-norm"]
    )

    assert result.interrupted
    assert result.cost_steps < 10
    assert next(now) == 0


def test_the_same_seed_gives_the_same_result() -> None:
    """Copies have random numbers of their own."""
    torch.manual_seed(1)
    first = gradguard.trial(with_gradients(), batches(8), classification_loss, adam, **_OPTIONS)
    torch.manual_seed(2)
    second = gradguard.trial(with_gradients(), batches(8), classification_loss, adam, **_OPTIONS)

    assert [run.loss for run in first.runs] == [run.loss for run in second.runs]


# -------------------------------------------------------------------------------------------------------------- cost


@given(candidates=st.integers(0, 12), run_steps=st.integers(1, 100_000))
def test_a_trial_takes_a_quarter_of_the_run_or_the_least_there_is(candidates: int, run_steps: int) -> None:
    """Longer runs get longer trials; rungs ascend."""
    plan = make_plan(candidates, run_steps=run_steps)

    assert plan.cost(candidates) <= SHARE * run_steps or plan.length == 10
    assert list(plan.rungs) == sorted(set(plan.rungs))
    assert len(plan.keep) == len(plan.rungs) - 1


def test_the_cost_is_stated_and_within_the_plan() -> None:
    """In steps, seconds and as a share of the run."""
    result = gradguard.trial(
        net(20),
        batches(),
        classification_loss,
        sgd(0.01),
        run_steps=4000,
        candidates=["he-initialization", "clip-norm", "adaptive-clip"],
    )

    assert 0 < result.cost_steps <= 1000
    assert result.share == result.cost_steps / 4000
    assert "% of a run of 4000 steps" in printed(result)


# --------------------------------------------------------------------------------------------------------- bad input


def other_optimizer(_: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of something else."""
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": torch.zeros(3)}, TypeError, "for one batch pass [batch]"),
        ({"compute_loss": 3}, TypeError, "compute_loss must be callable, got int"),
        (
            {"make_optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            TypeError,
            "make_optimizer must be callable",
        ),
        ({"make_optimizer": lambda _: 3}, TypeError, "must return a torch.optim.Optimizer, got int"),
        ({"make_optimizer": other_optimizer}, UnsupportedModelError, "holds no parameter of the copy"),
        ({"steps": 0}, ValueError, "steps must be above 0, got 0"),
        ({"run_steps": "many"}, TypeError, "run_steps must be a number or None, got str"),
        ({"seconds": math.nan}, ValueError, "seconds must be above 0"),
        ({"candidates": ["layer-morn"]}, ValueError, "did you mean 'layer-norm'"),
        ({"model": torch.compile(nn.Linear(64, 10), backend="eager")}, UnsupportedModelError, "the model is compiled"),
    ],
)
def test_bad_arguments_get_a_clear_error(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    """What came, and what to pass instead."""
    arguments: dict[str, Any] = {
        "model": net(init="he"),
        "batches": batches(3),
        "compute_loss": classification_loss,
        "make_optimizer": adam,
        "candidates": ["clip-norm"],
    }
    with pytest.raises(error) as caught:
        gradguard.trial(**(arguments | changes))

    assert text in str(caught.value)


def test_a_generator_of_batches_is_read_once() -> None:
    """Every copy gets the same."""
    read: list[int] = []

    def loader() -> Iterator[Batch]:
        for seed in range(100):
            read.append(seed)
            yield digit_batch(16, seed=seed)

    gradguard.trial(net(init="he"), loader(), classification_loss, adam, candidates=["clip-norm"], steps=5)

    assert read == [0, 1, 2, 3, 4]


def test_copies_that_do_not_fit_into_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how much it takes and how much there is."""
    monkeypatch.setattr("gradguard._twins._free_memory", lambda _: 1000.0)

    with pytest.raises(UnsupportedModelError, match=r"4 copies of this model .* GiB are free"):
        gradguard.trial(net(init="he"), batches(3), classification_loss, adam, candidates=["clip-norm"])


def test_an_optimizer_must_train_the_copy() -> None:
    """The function's own checks."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert checked_optimizer(optimizer, model) is optimizer
    with pytest.raises(UnsupportedModelError, match="use its argument"):
        checked_optimizer(optimizer, copy.deepcopy(model))


# ------------------------------------------------------------------------------------------------------------- telling


def printed(result: TrialResult, width: int = 80) -> str:
    """Return what a terminal shows."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(result)
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    """Every line, and every candidate."""
    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, sgd(1e-7), candidates=["higher-learning-rate", "clip-norm"]
    )
    text = printed(result, width)

    assert max(len(line) for line in text.splitlines()) <= width
    assert all(name in text for name in ("untreated", "higher-learning-rate", "clip-norm", "best"))
    assert json.loads(result.to_json())["best"]["remedy"] == "higher-learning-rate"


def test_the_report_of_the_diagnosis_shows_what_was_tried() -> None:
    """Measured effects stand in its prescriptions, best first."""
    model = net(20)
    result = gradguard.trial(
        model,
        batches(),
        classification_loss,
        sgd(0.01),
        diagnosis=gradguard.check(model, batches(1)[0], classification_loss),
    )
    assert result.diagnosis is not None
    assert result.diagnosis.primary is not None
    tried = [cure for cure in result.diagnosis.primary.prescriptions if cure.effect is not None]

    assert tried
    assert tried[0] == result.best
    stream = io.StringIO()
    Console(file=stream, width=100).print(result.diagnosis)
    assert "tried on a copy" in stream.getvalue()


def test_a_guard_tries_cures_for_its_own_run() -> None:
    """Its diagnosis, its number of steps; from fresh weights where they can be made."""
    model = net(20)
    optimizer = sgd(0.01)(model)
    with gradguard.watch(model, optimizer, on_finding="silent", on_error="raise") as guard:
        for batch in batches(25):
            optimizer.zero_grad()
            loss = classification_loss(model, batch)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        result = guard.trial(batches(), classification_loss, sgd(0.01), model=net(20), steps=20)

    assert result.run_steps == 25
    assert result.best is not None
    assert result.diagnosis is not None
    assert result.diagnosis.summary.kind == "run"


# --------------------------------------------------------------------------------------------------------------- apply


@pytest.mark.parametrize(
    "name",
    ["lower-learning-rate", "even-learning-rates", "clip-norm", "adaptive-clip", "smaller-epsilon", "lower-beta2"],
)
def test_cures_of_the_optimizer_are_applied_and_undone(name: str) -> None:
    """Rates, constants and hooks are as before after undo()."""
    model = net(init="he")
    *most, last = model.parameters()
    groups: list[dict[str, Any]] = [{"params": most}, {"params": [last], "lr": 0.3, "initial_lr": 0.6}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    before = copy.deepcopy(optimizer.state_dict()), len(optimizer._optimizer_step_pre_hooks)
    applied = gradguard.apply(name, model, optimizer=optimizer)

    assert applied.changes
    assert (optimizer.state_dict(), len(optimizer._optimizer_step_pre_hooks)) != before
    applied.undo()
    assert (optimizer.state_dict(), len(optimizer._optimizer_step_pre_hooks)) == before


def test_groups_that_train_at_no_rate_do_not_say_what_is_usual() -> None:
    """A frozen backbone at 0, however large, and a group that leaves its rate to the optimizer (``lr=None``)."""
    model = net(init="he")
    *frozen, weight, bias = model.parameters()
    groups: list[dict[str, Any]] = [{"params": frozen, "lr": 0.0}, {"params": [weight]}, {"params": [bias], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    optimizer.param_groups.append({"params": [], "lr": None})
    applied = gradguard.apply("even-learning-rates", model, optimizer=optimizer)

    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 1e-3, 1e-3, None]
    applied.undo()
    gradguard.apply("lower-learning-rate", model, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, pytest.approx(1e-4), pytest.approx(0.03), None]


def test_the_winner_is_applied_with_the_factor_that_was_measured() -> None:
    """One call."""
    model = net(init="he")
    result = gradguard.trial(model, batches(), classification_loss, sgd(1e-8), candidates=["higher-learning-rate"])
    optimizer = sgd(1e-8)(model)
    assert result.best is not None
    gradguard.apply(result.best, model, optimizer=optimizer)

    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-8 * result.best.arguments["factor"])


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("remove-detach", {}, ValueError, "advice for you to follow"),
        ("nonsense", {}, ValueError, "Can be: "),
        (3, {}, TypeError, "must be a Prescription or the name of a remedy, got int"),
        ("clip-norm", {}, ValueError, "pass optimizer="),
        ("clip-norm", {"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer or None"),
    ],
)
def test_what_cannot_be_applied_says_so(name: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    """And leaves the model alone."""
    model = net(init="he")
    before = state_of(model)
    with pytest.raises(error) as caught:
        gradguard.apply(name, model, **options)

    assert text in str(caught.value)
    assert_untouched(model, before)


def test_every_remedy_of_the_catalogue_has_a_level() -> None:
    """The least invasive of equals is well defined."""
    found = [catalogue.find(name) for name in catalogue.names()]

    assert all(remedy is not None and 0 <= remedy.level <= 5 for remedy in found)
    assert catalogue.find("remove-detach") is None


def test_the_cure_that_a_trial_recommends_lets_a_dead_net_train() -> None:
    """The demo's sigmoid stack: at chance without, and below a loss of 1 with what was measured to be best."""
    model = net(20, activation=nn.Sigmoid, init="xavier")
    result = gradguard.trial(model, batches(), classification_loss, adam, run_steps=2000)
    assert result.best is not None
    optimizer = adam(model)
    gradguard.apply(result.best, model, optimizer=optimizer, batch=batches(1)[0], compute_loss=classification_loss)

    losses = []
    for batch in batches(120):
        optimizer.zero_grad()
        loss = classification_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 1.0


def test_a_short_trial_runs_on_where_no_loss_tells() -> None:
    """Sixteen steps of a 16-layer net of width 5 say nothing; the trial goes on, and takes dropped cures back in."""
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    labels = (x.square().sum(1) < 1.4).long()
    layers = [layer for _ in range(16) for layer in (nn.Linear(5, 5), nn.ReLU())]
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), *layers, nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    batches = [(x[i::4], labels[i::4]) for i in range(4)]

    def trial(run_steps: int) -> TrialResult:
        return gradguard.trial(
            model,
            batches,
            lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            lambda model: torch.optim.Adam(model.parameters(), 1e-3),
            candidates=["he-initialization", "lsuv", "clip-norm"],
            run_steps=run_steps,
        )

    short = trial(16)
    longer = trial(240)
    assert short.control.steps == make_plan(3, run_steps=16).length
    assert longer.control.steps > make_plan(3, run_steps=240).length
    assert longer.cost_steps > short.cost_steps
