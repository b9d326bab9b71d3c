"""The cure score: rows of curable, advisable and healthy cases, what counts as cured, and what is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.clinic import catalogue
from benchmarks.clinic.case import Case, Job, job_loss
from benchmarks.clinic.catalogue import find
from benchmarks.clinic.cures import __main__ as program
from benchmarks.clinic.cures import rows
from benchmarks.clinic.cures.rows import WAYS, CureRow, append, read
from benchmarks.clinic.cures.runs import Setting, advice_only, build, setting_of, train
from benchmarks.clinic.cures.tables import figures, is_cured
from benchmarks.clinic.fresh import fresh_cases, is_sealed
from benchmarks.clinic.results import source_hash
from benchmarks.clinic.workshop import workshop_cases
from gradguard.rules import RULES

RATE, DETACHED, HEALTHY = "optimizer/rate-too-low-sgd", "residual/cut-in-the-middle", "mlp/relu-4-adam"


def shortened(name: str) -> Case:
    """Return a case of the practice half that is over after 24 steps."""
    case = find(name)

    def short(seed: int) -> Job:
        job = case.build(seed)
        job.steps = 24
        return job

    return replace(case, build=short)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "find", shortened)
    monkeypatch.setattr(rows, "trains_every_candidate", lambda name: name == RATE)


def test_a_rate_too_low_is_cured_and_the_others_are_measured_on_the_same_run() -> None:
    """Every way of repairing has an outcome, what was done and a cost; ours finds the rate."""
    row = rows.run_case(RATE, 0)

    assert row.error == ""
    assert row.advice == ""
    assert row.found == "GG502"
    assert set(row.quality) == set(row.done) == set(row.runs) == set(WAYS)
    assert row.done["gradguard"].startswith("higher-learning-rate x")
    assert row.quality["gradguard"] > row.sick + 0.3
    assert row.runs["gradguard"] > 0.0
    assert row.candidates["higher-learning-rate"] == pytest.approx(row.quality["gradguard"], abs=0.01)
    assert row.trial_seconds > 0.0
    assert row.run_seconds > 0.0


def test_a_fault_of_the_code_gets_advice_and_a_healthy_run_gets_nothing() -> None:
    """Nothing is trained anew for either."""
    advised, well = rows.run_case(DETACHED, 0), rows.run_case(HEALTHY, 0)

    assert (advised.error, well.error) == ("", "")
    assert "fault of code" in advised.advice
    assert "remove-detach" in advised.advised
    assert advised.quality == {}
    assert well.recommended == ""


def test_the_optimizer_of_a_copy_is_that_of_the_run() -> None:
    """Class, options and clipping are the run's; parameters that the copy has in addition are trained as well."""
    case = find("optimizer/clip-never-engages")
    setting = setting_of(build(case, 0))
    other = build(case, 0).model

    made = setting.make_optimizer(other)

    assert type(made) is type(setting.optimizer)
    assert made.param_groups[0]["lr"] == setting.optimizer.param_groups[0]["lr"]
    assert {id(p) for p in made.param_groups[0]["params"]} == {id(p) for p in other.parameters()}
    assert len(made._optimizer_step_pre_hooks) == 1
    assert advice_only(find(RATE), build(find(RATE), 0)) == ""


def made_row(case: str, *, ours: float, sick: float = 0.1, twin: float = 0.9, **fields: object) -> CureRow:
    """Return a made-up row."""
    quality = dict.fromkeys(WAYS, sick) | {"gradguard": ours}
    row = CureRow(case=case, seed=0, source="", sick=sick, twin=twin, quality=quality, runs=dict.fromkeys(WAYS, 0.25))
    return replace(row, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ours", "sick", "cured"), [(0.82, 0.1, True), (0.80, 0.1, False), (0.85, 0.845, False)])
def test_cured_is_a_point_gained_and_nine_tenths_of_the_twin(ours: float, sick: float, cured: bool) -> None:
    """Both are asked for."""
    assert is_cured(made_row(RATE, ours=ours, sick=sick), "gradguard") is cured


def test_figures_count_each_run_where_it_belongs() -> None:
    """Curable, advised, healthy, contradicting and failed runs are told apart."""
    found = figures(
        [
            made_row(RATE, ours=0.9, candidates={"a": 0.9, "b": 0.2}),
            made_row("optimizer/rate-too-low-adam", ours=0.2, candidates={"a": 0.9, "b": 0.2}),
            made_row("optimizer/rate-too-high-sgd", ours=0.9, sick=0.9),
            made_row(DETACHED, ours=0.0, advice="code", found="GG104", advised=("remove-detach",)),
            made_row("residual/cut-in-the-middle", ours=0.0, advice="code", found="GG101", advised=("relu",)),
            made_row(HEALTHY, ours=0.0),
            made_row("trap/dropout", ours=0.0, recommended="relu"),
        ]
    )

    assert found["ways"]["gradguard"]["cured"] == 0.5
    assert (found["sick"], found["curable"], found["contradict"]) == (5, 2, 1)
    assert found["near_best"] == (1, 2)
    assert (found["advised"], found["advised_rightly"]) == ((2, 2), (1, 2))
    assert found["healthy_treated"] == (1, 2)


def test_rows_are_resumed_by_source_and_the_score_is_written(tmp_path: Path) -> None:
    """A second run of the program does nothing that the file holds already."""
    results, score = tmp_path / "rows.jsonl", tmp_path / "score.json"
    row = made_row(RATE, ours=0.9, done=dict.fromkeys(WAYS, "x"))
    append(results, replace(row, source="old"))
    append(results, replace(row, source=source_hash()))

    given = ["--cases", RATE, "--results", str(results), "--json", str(score), "--workers", "1"]
    assert program.main(given) == 0

    assert len(list(read(results, source=None))) == 1
    assert len(results.read_text().splitlines()) == 2
    assert json.loads(score.read_text())["practice"]["ways"]["gradguard"]["cured"] == 1.0


@pytest.mark.parametrize("make", [workshop_cases, fresh_cases])
def test_further_pairs_are_sound_and_apart_from_both_halves(make: Callable[[], tuple[Case, ...]]) -> None:
    """Every sick case has a healthy twin that differs from it, both can be built, and none is scored by the clinic."""
    made = make()
    names = [case.name for case in made]

    assert len(set(names)) == len(names)
    assert not {case.name for case in catalogue.cases()} & set(names)
    for case, twin in zip(made[::2], made[1::2], strict=True):
        assert case.is_sick
        assert case.code in RULES
        assert case.twin == twin.name
        assert not twin.is_sick
        assert find(case.name) is case
    for case in made[::31]:
        job = build(case, 0)
        assert bool(torch.isfinite(job_loss(job, job.batch(0)))) or case.is_sick


def test_twins_of_the_fresh_set_are_sealed_together_and_nothing_of_them_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is fixed by the name of the pair; a sealed run enters totals, and its name stands nowhere."""
    made = fresh_cases()
    assert all(is_sealed(case.name) is is_sealed(twin.name) for case, twin in zip(made[::2], made[1::2], strict=True))
    assert sum(is_sealed(case.name) for case in made[::2]) == 21
    sealed, opened = (next(case.name for case in made if is_sealed(case.name) is closed) for closed in (True, False))
    monkeypatch.setattr(program, "_SETS", {"fresh": lambda: tuple(find(name) for name in (sealed, opened))})
    results = tmp_path / "rows.jsonl"
    for name in (sealed, opened):
        ended = {
            "quality": dict.fromkeys(WAYS, 0.9),
            "done": dict.fromkeys(WAYS, "x"),
            "runs": dict.fromkeys(WAYS, 0.2),
        }
        append(results, CureRow(case=name, seed=0, source="", sick=0.1, twin=0.95, found="GG101", **ended))  # type: ignore[arg-type]  # a dict of the fields
    given = ["--half", "fresh", "--any-source", "--results", str(results), "--json", str(tmp_path / "score.json")]

    program.main(given)

    printed = capsys.readouterr().out
    assert opened in printed
    assert sealed not in printed
    assert "sealed: 1 curable sick runs" in printed


def test_a_schedule_works_on_the_rate_that_a_cure_has_set() -> None:
    """It was made with the rate before, and would put that back at every step."""
    case = next(case for case in workshop_cases() if case.name == "workshop/climbing-mlp-sgd")
    seen: list[float] = []

    def treat(setting: Setting) -> nn.Module:
        group = setting.optimizer.param_groups[0]
        group["lr"] *= 0.1
        step = setting.optimizer.step

        def told(*given: Any, **options: Any) -> Any:
            seen.append(group["lr"])
            return step(*given, **options)

        setting.optimizer.step = told  # type: ignore[method-assign]
        return setting.job.model

    train(replace(case, build=partial(_few_steps, case)), 0, treat)

    assert seen[0] == pytest.approx(0.002)
    assert seen[-1] == pytest.approx(0.002 * 1000 ** (5 / 6), rel=1e-6)


def _few_steps(case: Case, seed: int) -> Job:
    job = case.build(seed)
    job.steps = 6
    return job
