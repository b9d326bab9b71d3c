"""The clinic: its split is fixed, tuning code cannot see the exam half, and cases run and are scored."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.clinic import catalogue, summaries
from benchmarks.clinic.__main__ import chosen_cases, parse
from benchmarks.clinic.case import Case, Job
from benchmarks.clinic.compare import compare_tools
from benchmarks.clinic.outcome import LabelledRun, check_labels
from benchmarks.clinic.practice import ExamHalfError, practice_case, practice_cases, practice_runs
from benchmarks.clinic.results import Row, Said, append_row, read_rows
from benchmarks.clinic.runner import run_case
from benchmarks.clinic.score import names_culprit, rate, score, verdict
from benchmarks.clinic.tables import as_plain, case_lines
from gradguard.rules import RULES

CLINIC = Path(catalogue.__file__).parent
SPLIT = "87ef33d0b8030ed063fc16a18cdd05fce6de9f6876ed852700ac37ac1153bd8f"
"""SHA-256 of split.json: a change of the split makes every score before it worthless, so it is made here as well."""
TUNING = ("summaries.py",)
"""Modules that choose between statistics or thresholds."""
DOOR = "benchmarks.clinic.practice"
HARMLESS = {DOOR, "benchmarks.clinic.outcome"}


def test_the_split_is_the_committed_one() -> None:
    """Nobody moves a configuration between the halves without saying so here."""
    assert hashlib.sha256(catalogue.SPLIT_FILE.read_bytes()).hexdigest() == SPLIT


def test_the_halves_are_balanced_and_twins_stay_together() -> None:
    """Both halves hold healthy and sick configurations of every fault; a sick one is in the half of its twin."""
    halves = {half: catalogue.cases(half) for half in ("practice", "exam")}
    counts = {half: Counter(case.code for case in cases) for half, cases in halves.items()}

    assert {len(cases) for cases in halves.values()} == {103}
    assert counts["practice"].keys() == counts["exam"].keys()
    for code, practice in counts["practice"].items():
        assert abs(practice - counts["exam"][code]) <= 1, code
    for case in catalogue.cases():
        assert catalogue.half_of(case.group) == catalogue.half_of(case.name), case.name


def test_labels_are_complete() -> None:
    """Every sick case names a rule of the catalogue and a healthy twin; the issue's least numbers are reached."""
    cases = catalogue.cases()
    sick = [case for case in cases if case.is_sick]

    assert len(sick) >= 40
    assert len(cases) - len(sick) >= 40
    for case in sick:
        assert RULES[case.code].family == case.accepted[0], case.name
        assert not catalogue.find(case.twin).is_sick, case.name
        assert case.about, case.name
        assert case.cure, case.name


def test_tuning_code_is_refused_the_exam_half() -> None:
    """The door for tuning gives practice cases only, and says what to do instead."""
    exam = catalogue.cases("exam")[0].name

    with pytest.raises(ExamHalfError, match=f"'{exam}' belongs to the exam half.*practice_cases"):
        practice_case(exam)
    assert {catalogue.half_of(case.name) for case in practice_cases()} == {"practice"}


def test_tuning_code_reads_no_row_of_the_exam_half(tmp_path: Path) -> None:
    """Rows of the exam half in a results file are passed over."""
    for half in ("practice", "exam"):
        case = next(case for case in catalogue.cases(half) if not case.is_sick)
        append_row(tmp_path / "rows.jsonl", Row(case=case.name, seed=0, source="", quality=1.0))

    assert [catalogue.half_of(run.case.name) for run in practice_runs(tmp_path / "rows.jsonl")] == ["practice"]


def clinic_imports(source: str) -> set[str]:
    """Return the clinic's modules that a source imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "benchmarks.clinic":
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name for name in names if name.startswith("benchmarks")}


@pytest.mark.parametrize("module", TUNING)
def test_tuning_code_imports_the_door_and_nothing_else(module: str) -> None:
    """What chooses a statistic reaches cases and results through practice.py alone."""
    found = clinic_imports((CLINIC / module).read_text(encoding="utf-8"))

    assert DOOR in found
    assert found <= HARMLESS


def test_who_uses_the_door_is_known_as_tuning_code() -> None:
    """A new module that imports the door is under the test above; only this test file uses both sides."""
    users = {
        path.name
        for path in CLINIC.rglob("*.py")
        if DOOR in clinic_imports(path.read_text(encoding="utf-8")) and path.name != "practice.py"
    }

    assert users == set(TUNING)


@pytest.mark.parametrize(
    "line",
    [
        "from benchmarks.clinic import catalogue",
        "import benchmarks.clinic.results",
        "def late() -> None:\n    from benchmarks.clinic.cases import CASES",
    ],
)
def test_the_import_check_sees_another_way_in(line: str) -> None:
    """Tuning code that took another way to the exam half would fail the test above."""
    assert not clinic_imports(f"from {DOOR} import practice_runs\n{line}") <= HARMLESS


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Return one healthy and one sick run, made for real."""
    return {name: run_case(name, 0) for name in ("data/tanh-wine-sgd", "data/never-standardised-tanh")}


def test_a_case_runs_under_a_guard_and_its_label_holds(rows: dict[str, Row]) -> None:
    """A healthy case learns, its sick twin does not, and both give what score and rivals need."""
    kept, out = check_labels(rows.values())

    assert not out
    assert [row.error for row in rows.values()] == ["", ""]
    assert [run.case.is_sick for run in kept] == [True, False]
    for row in rows.values():
        assert row.readings[-1]["epoch"]
        assert row.profiles[0]["delta"]


def test_a_row_reads_back_as_it_was_written(tmp_path: Path, rows: dict[str, Row]) -> None:
    """A results file gives equal rows, the newest of each run, and bears a last line cut short."""
    path = tmp_path / "rows.jsonl"
    row = rows["data/never-standardised-tanh"]
    append_row(path, Row(case=row.case, seed=0, source="old"))
    append_row(path, row)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"case": "data/tanh')

    (read,) = read_rows(path)

    assert (read.key, read.quality, read.findings, read.checked) == (row.key, row.quality, row.findings, row.checked)
    assert read_rows(path, source="elsewhere") == []


def run_of(
    case: Case, *, said: Said | None = None, announced: tuple[Said, ...] = (), quality: float = 1.0
) -> LabelledRun:
    """Return a made-up run."""
    findings = () if said is None else (said,)
    return LabelledRun(
        case=case,
        row=Row(
            case=case.name, seed=0, source="", quality=quality, findings=findings, announced=announced, healthy=True
        ),
    )


def made_up(code: str = "", **fields: object) -> Case:
    """Return a case that is never built."""

    def build(seed: int) -> Job:
        raise NotImplementedError

    family = (RULES[code].family,) if code else ()
    return Case(name="made/up", build=build, about="", code=code, accepted=family, **fields)  # type: ignore[arg-type]


def said(code: str, *, at: int = 0, layer: str | None = None, confidence: float = 0.9) -> Said:
    """Return an announced, standing warning."""
    return Said(
        code=code,
        family=RULES[code].family,
        severity="WARNING",
        step=at,
        at=at,
        layer=layer,
        confidence=confidence,
    )


def test_score_counts_what_it_says() -> None:
    """False alarms, recall, family, culprit and lead time of made-up runs come out as counted by hand."""
    vanishing = made_up("GG101", culprit=("body.3",), phase="initialization", onset=10)
    runs = [
        run_of(made_up()),
        run_of(made_up(), announced=(said("GG102"),)),
        run_of(vanishing, said=said("GG101", layer="body.3.weight"), announced=(said("GG101", at=40),)),
        run_of(vanishing, said=said("GG501", layer="body"), announced=(said("GG501", at=100),)),
        run_of(vanishing),
    ]

    result = score(runs)

    assert (result.false_standing.hits, result.false_ever.hits, result.false_ever.total) == (0, 1, 2)
    assert (result.recall.hits, result.recall.total) == (2, 3)
    assert (result.family.hits, result.culprit.hits, result.in_time.hits) == (1, 1, 1)
    assert result.median_lead == 90
    assert ("vanishing", "nothing", 1) in result.confusion


def test_an_earlier_announcement_is_the_verdict_where_nothing_stands() -> None:
    """What was announced and has cleared still counts as found."""
    run = run_of(made_up("GG101"), announced=(said("GG101"),))

    found = verdict(run)

    assert found is not None
    assert found.code == "GG101"


def test_a_culprit_is_right_inside_the_labelled_module_only() -> None:
    """A parameter of the labelled module is right; a module whose name begins alike is not."""
    case = made_up("GG301", culprit=("convs.1",))

    assert names_culprit(case, said("GG301", layer="convs.1.bias"))
    assert not names_culprit(case, said("GG301", layer="convs.12"))
    assert not names_culprit(case, said("GG301"))


def test_wilson_interval_agrees_with_the_textbook() -> None:
    """One of ten: 1.8 to 40.4 percent (Brown, Cai and DasGupta 2001, Statistical Science 16)."""
    interval = rate(1, 10)

    assert math.isclose(interval.low, 0.0179, abs_tol=1e-4)
    assert math.isclose(interval.high, 0.4042, abs_tol=1e-4)


@pytest.mark.parametrize(
    ("quality", "why"),
    [
        pytest.param(0.2, "healthy, and ends at 0.20", id="healthy that does not learn"),
        pytest.param(1.0, "sick, and ends at 1.00 where its twin reaches 1.00", id="sick that learns as well"),
    ],
)
def test_a_run_that_contradicts_its_label_is_listed(quality: float, why: str) -> None:
    """Contradicting runs are left out, and the list says why."""
    twin = Row(case="data/tanh-wine-sgd", seed=0, source="", quality=quality)
    sick = Row(case="data/never-standardised-tanh", seed=0, source="", quality=quality)

    kept, out = check_labels([twin, sick])

    assert any(run.why.startswith(why) for run in out)
    assert len(kept) + len(out) == 2


def test_rivals_are_compared_on_the_same_runs(rows: dict[str, Row]) -> None:
    """Each rule set has a row; on tanh units driven to their ends SageMaker's saturation rule speaks."""
    kept, _ = check_labels(rows.values())
    tools = {row.name: row for row in compare_tools(kept, score(kept))}

    assert set(tools) >= {"gradguard", "AUTOTRAINER", "SageMaker, tensors", "DeepDiagnosis"}
    assert tools["SageMaker, tensors"].family.hits == 1


def test_the_score_is_json_and_lists_single_cases_on_request(rows: dict[str, Row]) -> None:
    """The exam half's JSON holds no single case unless it is revealed."""
    kept, out = check_labels(rows.values())
    own = score(kept)
    kept = [LabelledRun(case=run.case, row=Row(case=run.row.case, seed=0, source="")) for run in kept]

    plain = as_plain(own, compare_tools(kept, own), out, kept, details=False)

    assert "cases" not in json.loads(json.dumps(plain, allow_nan=False))
    assert any(line.startswith("missed: data/never-standardised-tanh") for line in case_lines(kept))


def test_a_quick_clinic_takes_a_part_of_both_halves() -> None:
    """The smoke run holds healthy and sick cases of both halves, with every twin, one seed each."""
    arguments = parse(["--quick"])
    chosen = chosen_cases(arguments)

    assert arguments.seeds == 1
    assert len(chosen) < len(catalogue.cases()) / 2
    assert {(catalogue.half_of(case.name), case.is_sick) for case in chosen} == {
        (half, sick) for half in ("practice", "exam") for sick in (False, True)
    }
    assert {case.twin for case in chosen if case.twin} <= {case.name for case in chosen}


def test_the_candidates_differ_where_a_branch_lies_far_below_the_trunk() -> None:
    """The mean is pulled by one branch among the first eighth; the median is not."""
    norms = [1e-9, 1.0, 1.0, *[1.0] * 21]

    spans = {name: summaries.span(norms, summary) for name, (_, summary) in summaries.CANDIDATES.items()}

    assert spans["mean"] == pytest.approx(-3.0)
    assert spans["median"] == pytest.approx(0.0)
