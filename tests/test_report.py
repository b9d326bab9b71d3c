"""Reports: golden texts at 80 and 120 columns, and laws that hold for any diagnosis.

Golden files stand in ``tests/golden``; ``GRADGUARD_OVERWRITE_GOLDEN=1 pytest tests/test_report.py`` rewrites them.
Read the difference before committing it.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradguard.findings import Diagnosis, LayerProfile
from gradguard.report import print_report, to_html
from tests import reports

GOLDEN = Path(__file__).parent / "golden"


def printed(diagnosis: Diagnosis, width: int, *, encoding: str = "utf-8", show_all: bool = False) -> str:
    """Return a report as plain text."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(
        file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False, _environ={}
    )
    print_report(diagnosis, console, show_all=show_all)
    stream.flush()
    return "\n".join(line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()) + "\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
def test_report_reads_as_agreed(make: Callable[[], Diagnosis], width: int) -> None:
    """The text is the golden one, character by character."""
    text = printed(make(), width)
    path = GOLDEN / f"{make.__name__}_{width}.txt"
    if os.environ.get("GRADGUARD_OVERWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_too_long(make: Callable[[], Diagnosis], width: int) -> None:
    """Nothing runs over the terminal's edge, with every row shown or folded."""
    for show_all in (False, True):
        lines = printed(make(), width, show_all=show_all).splitlines()
        assert max(len(line) for line in lines) <= width


@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
def test_terminals_without_unicode_lose_nothing(make: Callable[[], Diagnosis]) -> None:
    """In an ASCII terminal boxes, bars and separators are plain characters."""
    text = printed(make(), 80, encoding="ascii")

    assert text.isascii()
    assert "?" not in text


def test_deep_nets_are_folded_around_their_culprit() -> None:
    """Of a thousand layers the ends and the culprit with its neighbours are shown; all of them on request."""
    folded, full = printed(reports.deep(), 100), printed(reports.deep(), 100, show_all=True)

    assert all(f" net.{2 * index} " in folded for index in (0, 499, 500, 501, 999))
    assert len(folded.splitlines()) < 60
    assert "more" in folded
    assert all(f" net.{2 * index} " in full for index in range(1000))


def test_wider_terminals_get_wider_bars_not_more_words() -> None:
    """The words of a report are the same at any width."""
    narrow, wide = (
        "".join(c for c in printed(reports.sick(), width) if c.isalnum() or c in ".%") for width in (80, 160)
    )

    assert narrow == wide


def test_what_has_no_size_is_said_in_words() -> None:
    """NaN, absence and exact zero are words, not empty bars."""
    text = printed(reports.three_layers(), 100)

    assert "NaN/inf  not finite" in text
    assert "none  none arrived" in text
    assert "0  exactly zero" in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    """A module called [red] is not a colour."""
    text = printed(reports.hostile(), 120)

    assert "[bold]wrong[/bold]" in text
    assert "[red]" in text


def test_consequences_stand_under_their_illness() -> None:
    """One illness, one finding: what follows from it is said there, and nowhere else."""
    text = printed(reports.sick(), 100)

    assert text.count("GG503") == 1
    assert "follows    GG503 no-update" in text


def test_tried_cures_show_their_effect_and_untried_ones_say_so() -> None:
    """A measured effect is a number; a cure that nobody tried is labelled."""
    assert "0.410  best" in printed(reports.tried(), 80)
    assert "no effect" in printed(reports.tried(), 80)
    assert "untried" in printed(reports.sick(), 80)


def test_colour_appears_on_terminals_only() -> None:
    """Escape codes are for terminals; NO_COLOR and files get none."""
    coloured = io.StringIO()
    print_report(
        reports.sick(), Console(file=coloured, width=80, force_terminal=True, _environ={"TERM": "xterm-256color"})
    )
    plain = io.StringIO()
    print_report(reports.sick(), Console(file=plain, width=80, _environ={"NO_COLOR": "1"}))

    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()


def test_printing_a_diagnosis_with_rich_is_the_same_report() -> None:
    """``console.print(diagnosis)`` shows what ``print_report`` shows."""
    text = io.StringIO()
    Console(file=text, width=80, color_system=None, _environ={}).print(reports.sick())

    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert lines == printed(reports.sick(), 80).splitlines()


class _Balance(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
def test_html_is_well_formed_and_escaped(make: Callable[[], Diagnosis]) -> None:
    """The notebook form closes its tags, runs no script and says what the console says."""
    html = make()._repr_html_()
    parser = _Balance()
    parser.feed(html)

    assert parser.open == []
    assert "script" not in parser.seen
    assert all(finding.code in html for finding in make().findings)
    assert to_html(make(), show_all=True).startswith("<")


@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
def test_json_is_plain_and_versioned(make: Callable[[], Diagnosis]) -> None:
    """The JSON parses strictly, names its schema, and keeps non-finite numbers as words."""
    diagnosis = make()
    data = json.loads(diagnosis.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert data["schema_version"] == 1
    assert data["healthy"] is diagnosis.healthy
    assert data["primary"] == (diagnosis.primary.code if diagnosis.primary else None)
    assert [f["code"] for f in data["findings"]] == [f.code for f in diagnosis.findings]
    if make is reports.three_layers:
        assert [row["delta_norm"] for row in data["layers"]] == ["Infinity", "NaN", 0.0]


@pytest.mark.parametrize("make", reports.ALL, ids=lambda make: make.__name__)
def test_diagnosis_can_be_copied_and_pickled(make: Callable[[], Diagnosis]) -> None:
    """A diagnosis travels between processes whole."""
    diagnosis = make()

    for twin in (copy.deepcopy(diagnosis), pickle.loads(pickle.dumps(diagnosis))):  # noqa: S301  # our own bytes
        assert twin.to_json() == diagnosis.to_json()


NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e-300, 1e300]))
ROWS = st.lists(
    st.builds(
        LayerProfile,
        name=st.text(max_size=60),
        kind=st.text(st.characters(codec="ascii"), max_size=30),
        role=st.sampled_from(["affine", "norm", "activation"]),
        delta_norm=NUMBERS.map(abs),
        gain=NUMBERS.map(abs),
        forward_rms=NUMBERS,
        active_fraction=st.one_of(st.just(float("nan")), st.floats(0, 1)),
        trunk=st.booleans(),
        mark=st.sampled_from(["", "", "GG101"]),
    ),
    max_size=40,
)


@given(ROWS, st.integers(60, 200), st.booleans())
def test_any_table_of_layers_can_be_drawn(rows: list[LayerProfile], width: int, show_all: bool) -> None:
    """Whatever the numbers and names, the report is drawn."""
    diagnosis = Diagnosis(
        findings=(reports.VANISHING,), verdict="Sick.", observations=3, sufficient=True, layers=tuple(rows)
    )

    assert "SICK" in printed(diagnosis, width, show_all=show_all)
    assert diagnosis._repr_html_()
    assert json.loads(diagnosis.to_json())
