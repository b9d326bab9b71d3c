"""Remedies that act during a run: they harm nothing, can be resumed, and stand in the report."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import gradguard
from gradguard import clip
from tests.live import ALL, Tilt, back_off, everything, hook_counts, run, same, slopes

pytestmark = pytest.mark.filterwarnings("ignore:gradguard. step.*GG:gradguard.GradGuardWarning")

# -------------------------------------------------------------------------------------------------------- doing no harm


@pytest.mark.parametrize(
    ("where", "options"),
    [("the remedy", ALL), ("reading", ALL), ("finishing", ALL), ("reading", {}), ("finishing", {})],
)
def test_failure_amid_other_hooks_breaks_no_step(
    where: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch walks through the hooks when ours fail: those behind them still run, and the step is made."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, **options)
    others: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: others.append("pre"))
    optimizer.register_step_post_hook(lambda *_: others.append("post"))
    owner, name = {
        "the remedy": (guard._live, "_treat"),
        "reading": (guard._observing, "read"),
        "finishing": (guard._observing, "finish"),
    }[where]
    monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
    with pytest.warns(gradguard.GradGuardWarning, match="ZeroDivisionError") as caught:
        run(model, optimizer, slopes(5, {}))
    guard.detach()

    assert len(caught) == 1
    assert others == ["pre", "post"] * 5
    assert hook_counts(optimizer) == (1, 1)
    assert not torch.equal(model.weight.detach(), torch.ones(3))


def test_failure_of_ours_switches_the_remedy_off_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns once, stands in the report, and the run is that without a remedy; the guard goes on."""
    plain, model = Tilt(), Tilt()
    alone, optimizer = (torch.optim.SGD(tilt.parameters(), lr=0.1) for tilt in (plain, model))
    run(plain, alone, slopes(10, {}))
    guard = gradguard.watch(model, optimizer, **ALL)
    monkeypatch.setattr(clip.Adaptive, "step", lambda self, **_: 1 / 0)
    with pytest.warns(gradguard.GradGuardWarning, match="acting on the gradients failed with Zero") as caught:
        run(model, optimizer, slopes(10, {}), guard=guard)

    assert len(caught) == 1
    assert same(everything(plain, alone), everything(model, optimizer))
    assert guard.attached
    assert guard.steps == 10
    (remark,) = guard.diagnose().actions[0].remarks
    assert remark.startswith("acting on the gradients failed with ZeroDivisionError")
    guard.detach()
    assert hook_counts(optimizer) == (0, 0)


def test_detach_removes_everything_and_keeps_the_record() -> None:
    """No hook stays, the rate is the schedule's, and what was done can still be read."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, **ALL)
    run(model, optimizer, slopes(45, {40: 30.0}), guard=guard)
    assert hook_counts(optimizer) != (0, 0)
    guard.detach()

    assert hook_counts(optimizer) == (0, 0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert [act.step for act in guard.actions] == [40]
    assert guard.diagnose().actions[0].spikes == 1


def test_copies_of_a_treated_optimizer_are_free() -> None:
    """A deep copy has no hooks: an EMA or a trial is not clipped by our hand."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradguard.watch(model, optimizer, **ALL)

    assert hook_counts(copy.deepcopy(optimizer)) == (0, 0)


def test_clipping_of_the_loop_is_noticed() -> None:
    """Who clips as well is told so once, with both norms; who does not hears nothing."""
    for own in (True, False):
        model = Tilt()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = gradguard.watch(model, optimizer, clip="adaptive", every=1, on_error="raise")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", gradguard.GradGuardWarning)
            for slope in slopes(20, {}):
                optimizer.zero_grad()
                model(slope).backward()
                guard.record()
                if own:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        told = [str(w.message) for w in caught if "your loop clips it, too" in str(w.message)]
        assert len(told) == own
        assert len(guard.diagnose().actions[0].remarks) == own


def test_act_comes_before_the_loops_own_clipping() -> None:
    """A spike is seen although the loop clips it away before the step; the step does not act a second time."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, on_spike="skip", every=1, on_error="raise")
    for slope in slopes(45, {40: 30.0}):
        optimizer.zero_grad()
        model(slope).backward()
        guard.record()
        guard.act()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    (done,) = guard.diagnose().actions

    assert [act.step for act in guard.actions] == [40]
    assert (done.steps, done.remarks) == (45, ())


def test_watching_again_with_other_remedies_is_an_error() -> None:
    """The same call gives the same guard; another one does not pass silently."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, on_spike="skip")

    assert gradguard.watch(model, optimizer, on_spike="skip") is guard
    assert gradguard.watch(model, optimizer) is guard
    with pytest.raises(gradguard.UnsupportedModelError, match=r"already watched.*detach\(\)"):
        gradguard.watch(model, optimizer, clip="adaptive")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clip": "adaptiv"}, TypeError, "clip must be None, \"adaptive\", a clipper.*got 'adaptiv'"),
    ({"clip": 1.0}, TypeError, "clip must be None.*got 1.0"),
    ({"clip": lambda parameters, **_: 3}, TypeError, "must make a clipper.*made a int"),
    ({"on_spike": "clip"}, ValueError, "on_spike must be None or \"skip\", got 'clip'"),
    ({"on_spike": "skip", "spike_budget": 0.9}, ValueError, "spike_budget must be .* from 0.01 to 0.5, got 0.9"),
    ({"on_spike": "skip", "spike_budget": "5 %"}, TypeError, "spike_budget"),
    ({"lr_backoff": 2.0}, ValueError, "lr_backoff must be True, None or a factor, from 0.01 to 0.99, got 2.0"),
    ({"lr_backoff": "half"}, TypeError, "lr_backoff"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_options_get_a_clear_error(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """The message says what came and what is accepted, and no hook stays."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=text):
        gradguard.watch(model, optimizer, **options)

    assert hook_counts(optimizer) == (0, 0)


def test_clippers_that_cannot_work_here_are_refused() -> None:
    """One that is attached would clip twice, one of another model not at all, one without the scaler wrongly."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    watch = partial(gradguard.watch, model, optimizer)
    attached = clip.Adaptive(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(gradguard.UnsupportedModelError, match=r"attached.*clip twice"):
        watch(clip=attached)
    with pytest.raises(gradguard.UnsupportedModelError, match="none of the 1 parameters"):
        watch(clip=clip.Adaptive(Tilt()))
    with pytest.raises(gradguard.UnsupportedModelError, match="scaler=scaler"):
        watch(clip=clip.Adaptive(model), scaler=scaler)
    with pytest.raises(gradguard.UnsupportedModelError, match="no optimizer was given"):
        gradguard.watch(model, clip="adaptive")
    assert hook_counts(optimizer) == (0, 0)
    watch(clip=clip.Adaptive(model, scaler=scaler), scaler=scaler).detach()


# ---------------------------------------------------------------------------------------------------- resuming, telling


def interrupted(given: list[torch.Tensor], at: int | None) -> tuple[list[torch.Tensor], Any]:
    """Train with every remedy on; resumed from a checkpoint at a step, or in one go."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    guard = gradguard.watch(model, optimizer, on_error="raise", clip="adaptive", on_spike="skip", lr_backoff=0.5)
    done = 0
    if at is not None:
        run(model, optimizer, given[:at], guard=guard)
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guard.step_counts, guard.remedy_state))
        guard.detach()
        model = Tilt()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        guard = gradguard.watch(model, optimizer, on_error="raise", clip="adaptive", on_spike="skip", lr_backoff=0.5)
        guard.resume(checkpoint[2], checkpoint[3])
        done = at
    run(model, optimizer, given[done:], guard=guard)
    return everything(model, optimizer), [replace(act) for act in guard.actions]


@pytest.mark.parametrize("at", [10, 41, 50])
def test_resumed_run_goes_on_as_if_it_had_never_stopped(at: int) -> None:
    """Histories, counters and acts are taken over: weights and record are those of one run."""
    given = slopes(90, {40: 30.0, 60: 30.0, 80: 1.9})
    through, acts = interrupted(given, None)
    resumed, resumed_acts = interrupted(given, at)

    assert [act.step for act in acts if act.kind == "skip"] == [40, 60]
    assert acts == resumed_acts
    assert same(through, resumed)


def test_state_is_plain_and_that_of_others_is_refused() -> None:
    """A checkpoint that loads weights only can hold it."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, **ALL)
    run(model, optimizer, slopes(45, {40: 30.0}), guard=guard)
    file = io.BytesIO()
    torch.save(guard.remedy_state, file)
    file.seek(0)

    assert torch.load(file, weights_only=True) == guard.remedy_state
    with pytest.raises(ValueError, match="state is that of 2 optimizers"):
        guard.resume([45], {"optimizers": [{}, {}]})
    guard.detach()
    other = gradguard.watch(model, optimizer, clip=clip.AutoClip(model))
    with pytest.raises(ValueError, match="'Adaptive'"):
        other.resume([45], guard.remedy_state)


def printed(guard: gradguard.Guard, width: int = 100) -> Iterator[str]:
    """Return the lines of a report."""
    file = io.StringIO()
    guard.report(Console(file=file, width=width, color_system=None))
    return iter(file.getvalue().splitlines())


@pytest.mark.filterwarnings("ignore:gradguard. 1 of . gradients:gradguard.GradGuardWarning")
def test_report_says_what_was_done() -> None:
    """Console, page and JSON tell how many steps were touched, how, and when last."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 2.5), on_spike="skip", lr_backoff=True)
    run(model, optimizer, slopes(50, {30: 1.8, 40: 30.0, 45: math.nan}), guard=guard)
    back_off(guard)
    text = " ".join(line.strip() for line in printed(guard))
    diagnosis = guard.diagnose()

    assert "done during the run: clipped 1 of 50 steps (2 %), last at step 30 (norm 3." in text
    assert "> 2.50); skipped 2 of 50 steps (4 %) 1 as spikes, 1 with NaN or infinity, last at step 45" in text
    assert "learning rate times 0.5 since step 50 (GG505 loss-divergence)" in text
    assert "done during the run" in diagnosis._repr_html_()
    (data,) = diagnosis.to_dict()["actions"]
    assert (data["clipped"], data["spikes"], data["non_finite"], data["lr_factor"]) == (1, 1, 1, 0.5)
    assert [act["kind"] for act in data["newest"]] == ["clip", "skip", "skip", "lr"]


def test_report_of_a_run_without_acts_says_that_nothing_was_done() -> None:
    """Remedies that were on and found nothing to do are worth a line; those that were off are not."""
    rounds: tuple[dict[str, Any], ...] = ({"clip": "adaptive"}, {})
    for options in rounds:
        model = Tilt()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        guard = gradguard.watch(model, optimizer, **options)
        run(model, optimizer, slopes(5, {}), guard=guard)
        text = "\n".join(printed(guard))
        assert ("done during the run: nothing in 5 steps" in text) == bool(options)
        assert ("done during" in text) == bool(options)
