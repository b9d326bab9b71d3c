"""Reports: golden texts at 80 and 120 columns, and laws that hold for any diagnosis.

Golden files stand in ``tests/golden``; ``GRADGUARD_OVERWRITE_GOLDEN=1 pytest tests/test_report.py`` rewrites them.
Read the difference before committing it.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gradguard.findings import Cause, Diagnosis, Effect, Evidence, LayerProfile, Prescription, RunSummary, Severity
from gradguard.prescriptions import prescriptions_for
from gradguard.report import print_report, render, to_html
from gradguard.report._code import wrap_code
from gradguard.report._format import number, share
from gradguard.report._layers import Fold, fold_rows
from gradguard.report._lines import elide, flow, wrap
from gradguard.report._story import illnesses, remarks
from gradguard.rules import RULES
from tests import report_fixtures as made

GOLDEN = Path(__file__).parent / "golden"
EVERY = pytest.mark.parametrize("make", made.ALL, ids=lambda make: make.__name__)


def console(width: int, *, encoding: str = "utf-8", **options: Any) -> Console:
    """Return a console that writes plain text of one width into memory."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    settled: dict[str, Any] = {
        "color_system": None,
        "force_terminal": False,
        "legacy_windows": False,
        "_environ": {},
    } | options
    return Console(file=stream, width=width, **settled)


def written(target: Console) -> str:
    """Return what was written to a console of :func:`console`."""
    stream = target.file
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(stream.encoding)


def printed(
    diagnosis: Diagnosis, width: int = 80, *, encoding: str = "utf-8", show_all: bool = False, **options: Any
) -> str:
    """Return a report as text."""
    target = console(width, encoding=encoding, **options)
    print_report(diagnosis, target, show_all=show_all)
    return written(target)


def drawn_lines(diagnosis: Diagnosis, width: int, *, encoding: str = "utf-8", show_all: bool = False) -> list[str]:
    """Return the lines below the banner as they are drawn, before rich could crop them."""
    parts = render(diagnosis, console(width, encoding=encoding).options, show_all=show_all)
    return [line for part in parts if isinstance(part, Text) for line in part.plain.split("\n")]


def flat(text: str) -> str:
    """Return a text without line breaks and frame."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def section(text: str, label: str) -> str:
    """Return what stands beside a label, down to the next one, in one line."""
    rest = text.split(f"\n   {label} ", 1)[1]
    return flat(re.split(r"\n {3}\S|\n {0,2}\S|\n\n", rest, maxsplit=1)[0])


# ------------------------------------------------------------------------------------------------------ golden texts


def agrees_with_golden(text: str, name: str) -> None:
    """Compare a text with its golden file, which is rewritten on request."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GRADGUARD_OVERWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 120])
@EVERY
def test_report_reads_as_agreed(make: Callable[[], Diagnosis], width: int) -> None:
    """The text is the golden one, character by character."""
    agrees_with_golden(printed(make(), width), f"{make.__name__}_{width}")


def test_full_report_reads_as_agreed() -> None:
    """With everything shown there are all names, all cures with code and source, and all layers."""
    agrees_with_golden(printed(made.sick(), 100, show_all=True), "sick_all_100")


@pytest.mark.parametrize("width", [40, 80])
def test_ascii_report_reads_as_agreed(width: int) -> None:
    """Without Unicode the frame, the bars and the separators are plain characters."""
    agrees_with_golden(printed(made.deep(), width, encoding="ascii"), f"deep_ascii_{width}")
    agrees_with_golden(printed(made.recurrent(), width, encoding="ascii"), f"recurrent_ascii_{width}")


def test_full_healthy_report_draws_every_recurrent_module() -> None:
    """Who asks for everything sees the time profile of each recurrent module, well or not."""
    agrees_with_golden(printed(made.recurrent_healthy(), 80, show_all=True), "recurrent_healthy_all_80")


def test_no_golden_file_is_left_over() -> None:
    """Every golden file belongs to a test."""
    expected = {f"{make.__name__}_{width}" for make in made.ALL for width in (80, 120)}

    others = {"sick_all_100", "deep_ascii_40", "deep_ascii_80", "recurrent_ascii_40", "recurrent_ascii_80"}
    others |= {"recurrent_healthy_all_80"}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == expected | others


# ----------------------------------------------------------------------------------------------------- lines and words


@EVERY
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_too_long(make: Callable[[], Diagnosis], width: int, encoding: str) -> None:
    """Nothing runs over the terminal's edge, with every row shown or folded, and no line ends in spaces."""
    for show_all in (False, True):
        lines = drawn_lines(make(), width, encoding=encoding, show_all=show_all)

        assert max(map(cell_len, lines)) <= width
        assert [line for line in lines if line != line.rstrip()] == []
        assert max(map(cell_len, printed(make(), width, encoding=encoding, show_all=show_all).splitlines())) <= width


@given(made.diagnoses, st.integers(min_value=40, max_value=200), st.booleans(), st.sampled_from(["utf-8", "ascii"]))
@settings(max_examples=40)
def test_any_diagnosis_can_be_drawn(diagnosis: Diagnosis, width: int, show_all: bool, encoding: str) -> None:
    """Whatever the numbers and names: nothing raises, no line is too long, and the verdict is there word by word."""
    assert max(map(cell_len, drawn_lines(diagnosis, width, encoding=encoding, show_all=show_all))) <= width
    text = printed(diagnosis, width, encoding=encoding, show_all=show_all)
    assert max(map(cell_len, text.splitlines())) <= width

    words = " ".join(text.replace("│", " ").replace("|", " ").split())
    word = {True: "HEALTHY", False: "SICK", None: "NO VERDICT"}[diagnosis.healthy]
    assert f"{word} {made.VERDICT}" in words
    assert all(finding.code in words for finding in diagnosis.findings if finding.severity > Severity.INFO)
    assert made.VERDICT in balanced(diagnosis._repr_html_()).text
    assert made.VERDICT in balanced(to_html(diagnosis, show_all=True)).text
    assert json.loads(diagnosis.to_json())


@EVERY
@pytest.mark.parametrize("width", [1, 7, 39])
def test_tiny_terminals_do_not_fail(make: Callable[[], Diagnosis], width: int) -> None:
    """Below 40 columns a report is no pleasure, but no error either."""
    assert printed(make(), width)


@EVERY
def test_terminals_without_unicode_lose_nothing(make: Callable[[], Diagnosis]) -> None:
    """In an ASCII terminal everything is a plain character, also when rich prints the diagnosis itself."""
    direct = console(80, encoding="ascii")
    direct.print(make())

    assert printed(make(), encoding="ascii").isascii()
    assert written(direct) == printed(make(), encoding="ascii")


def test_wider_terminals_get_wider_bars_not_more_words() -> None:
    """The words of a report are the same at any width."""
    narrow, wide = ("".join(c for c in printed(made.sick(), width) if c.isalnum() or c in ".%") for width in (80, 160))
    bars = [max(line.count("█") for line in printed(made.sick(), width).splitlines()) for width in (80, 120, 160)]

    assert narrow == wide
    assert bars[0] < bars[1] < bars[2]


@given(made.printable_sentences, st.integers(min_value=6, max_value=60))
def test_wrapping_never_cuts_a_word_that_fits(text: str, width: int) -> None:
    """Lines are broken at spaces; only words longer than a line are shortened, in their middle."""
    lines = [line.plain for line in wrap(text, width)]
    words = re.findall(r"\S+(?: %\S*)?", text)  # a number and its per cent sign are one word
    expected = " ".join(elide(word, width) for word in words).split()

    assert all(cell_len(line) <= width for line in lines)
    assert " ".join(lines).split() == expected


def test_a_number_keeps_its_per_cent_sign() -> None:
    """``12 %`` stands in one line."""
    assert [line.plain for line in wrap("at most 12 % (a)", 11)] == ["at most", "12 % (a)"]


def test_items_are_not_torn_apart() -> None:
    """Lines are broken between items; one that is longer than a line is broken at its spaces."""
    lines = flow(["first item", "second item", "a third one that is long"], 24, " · ")

    assert [line.plain for line in lines] == ["first item · second item", "a third one that is long"]
    assert [line.plain for line in flow(["one two three", "four"], 8, " · ")] == ["one two", "three", "four"]


@given(made.printable_names, st.integers(min_value=6, max_value=50))
def test_elided_names_fit_and_keep_their_ends(name: str, width: int) -> None:
    """A shortened name fits; a name that fits is not touched."""
    short = elide(name, width)

    assert cell_len(short) <= width
    assert (short == name) == (cell_len(name) <= width)


def test_elided_names_stay_different() -> None:
    """Of a dotted name the last part and the numbers stay, so that layers can be told apart."""
    long = [f"bert.encoder.layer.{index}.attention.output.dense.weight" for index in (3, 11)]

    assert [elide(name, 30) for name in long] == ["bert...3...output.dense.weight", "bert...layer.11...dense.weight"]
    assert [elide(name, 16) for name in long] == ["...3...weight", "...11...weight"]


# -------------------------------------------------------------------------------------------------- hostile texts


def test_markup_in_names_is_printed_as_it_is() -> None:
    """A module called [red] is not a colour, also where colours are on."""
    consoles: tuple[dict[str, Any], ...] = ({}, {"color_system": "truecolor", "force_terminal": True})
    for options in consoles:
        text = printed(made.hostile(), 120, **options)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)

        assert "[bold]wrong[/bold]" in plain
        assert "[red]encoder[/red]..." in plain
        assert "[i]cure[/i]: Because [b]so[/b]." in plain
        assert "[link=x]y[/link]: <img src=x onerror=alert(1)>" in plain


def test_control_characters_in_names_are_escaped() -> None:
    """A name can neither colour nor move what is printed, and one that no encoding has does not end a run."""
    text = printed(made.hostile(), 200)

    assert "\x1b" not in text
    assert r"net.0.\x1b[31m" in text
    assert r"net.1. \u202e\ud800" in text
    assert r"x = '<b>[red]\x1b'" in text


# ------------------------------------------------------------------------------------------------------------ findings


def test_a_finding_says_where_since_when_and_how_sure() -> None:
    """The headline holds severity, optimizer, time and confidence; a check has no steps."""
    sick = printed(made.sick())
    check = printed(made.check())

    assert " GG101 vanishing-gradient · ERROR · since step 0, still there at 239 · sure 0.98\n" in sick
    assert section(sick, "where") == "net.0 to net.38 (20 in all), evenly: 0.62 decades per layer"
    assert "GG101 vanishing-gradient · WARNING · before the first step · sure 0.70" in check
    assert "since step" not in check
    assert "steps" not in check
    assert "overhead" not in check
    assert "╭─ gradguard check ─" in check


def test_evidence_has_its_unit_and_what_to_compare_it_with() -> None:
    """Beside the cause stand numbers with their notes; what the verdict or the table shows is not repeated."""
    text = section(printed(made.sick()), "because")

    assert text == (
        "activation derivative: derivative mean 0.21 (Sigmoid: at most 0.25); "
        "weight gain 1.02 (what the weights alone would pass)"
    )
    assert "span -11.8 decades" in section(printed(made.sick(), show_all=True), "because")


def test_non_finite_evidence_is_said_in_words() -> None:
    """What is infinite or NaN is said so."""
    text = section(printed(made.nan_forward(), 100), "because")

    assert "largest entry infinite" in text
    assert "share 0.4 % (of its outputs)" in text
    assert "weights NaN (L2 norm, encoder.1)" in text
    assert "loss 2.66 > infinite" in printed(made.nan_forward())


def test_unknown_causes_are_not_named() -> None:
    """Where the numbers do not tell why, the report does not pretend."""
    assert section(printed(made.deep()), "because").startswith("not known: culprit gain 1e-5")


def test_the_culprit_of_a_sudden_loss_comes_first() -> None:
    """Of a thousand layers the report names the one that matters; all of them on request."""
    assert section(printed(made.deep(), 100), "where") == (
        "net.1000, the largest loss or gain among net.0 to net.1998 (1000 in all)"
    )
    many = replace(made.FOLLOWING, consequence_of=None, layers=tuple("abcde"), layer=None)
    diagnosis = replace(made.sick(), findings=(many,))

    assert section(printed(diagnosis), "where") == "a to e (5 in all)"
    assert section(printed(diagnosis, show_all=True), "where") == "a to e (5 in all); a, b, c, d, e"


def test_consequences_stand_under_their_illness_and_nowhere_else() -> None:
    """One illness, one finding: what follows from it is said once, with its beginning where that came later."""
    text = printed(made.two_illnesses(), 100)
    first, second = text.split(" GG503 no-update · WARNING")

    assert "GG301 dead-units since step 50: 61 % of the units" in section(first, "follows")
    assert "GG503 no-update since step 100: 14 of 20 layers" in section(first, "follows")
    assert "GG502 learning-rate-too-low: Updates are 1e-8" in section(second, "follows")
    assert text.count("GG301") == text.count("GG502") == 1
    assert "1 more below: GG503 no-update." in first
    assert "optimizer generator" in first
    assert "optimizer critic" in second


@pytest.mark.parametrize("optimizer", ["critic", ""])
def test_consequences_seen_by_another_optimizer_are_not_lost(optimizer: str) -> None:
    """What follows from an illness stands under it even where another optimizer's steps showed it."""
    other = replace(made.FOLLOWING, optimizer=optimizer)
    root = replace(made.VANISHING, optimizer="generator")
    text = section(printed(replace(made.sick(), findings=(root, other)), 120), "follows")

    assert text.startswith(f"GG503 no-update{f' (optimizer {optimizer})' if optimizer else ''}: 14 of 20")


def test_a_consequence_without_its_cause_is_an_illness_of_its_own() -> None:
    """Where the explanation has cleared or is missing, and where two explain each other, nothing is lost."""
    cleared = replace(made.VANISHING, resolved_step=100, severity=Severity.INFO)
    circle = replace(made.VANISHING, consequence_of="GG503")

    alone = replace(made.sick(), findings=(made.FOLLOWING,))
    after = replace(made.sick(), findings=(made.FOLLOWING, cleared))
    round_ = replace(made.sick(), findings=(circle, made.FOLLOWING))

    assert [item.finding.code for item in illnesses(alone)] == ["GG503"]
    assert [item.finding.code for item in illnesses(after)] == ["GG503"]
    assert [finding.code for finding in remarks(after)] == ["GG101"]
    assert [(item.finding.code, len(item.consequences)) for item in illnesses(round_)] == [("GG101", 1)]


@given(st.lists(made.short_findings, max_size=6))
def test_every_finding_has_exactly_one_place(findings: list[object]) -> None:
    """Illness, consequence or note: nothing is shown twice, nothing is left out, and who is sick has an illness."""
    diagnosis = replace(made.sick(), findings=tuple(findings))  # type: ignore[arg-type]  # Hypothesis gives Findings
    ill = illnesses(diagnosis)
    places = [item.finding for item in ill] + [f for item in ill for f in item.consequences] + remarks(diagnosis)

    assert sorted(map(id, places)) == sorted(map(id, findings))
    assert bool(ill) == (diagnosis.healthy is False)


def test_many_consequences_are_counted() -> None:
    """Five consequences are listed, the others counted, all of them shown on request."""
    following = [replace(made.FOLLOWING, message=f"Consequence {index}.") for index in range(8)]
    diagnosis = replace(made.sick(), findings=(made.VANISHING, *following))

    assert "Consequence 4. and 3 more (show_all=True)" in section(printed(diagnosis), "follows")
    assert "Consequence 7." in section(printed(diagnosis, show_all=True), "follows")


def test_notes_and_cleared_findings_are_short() -> None:
    """What is worth knowing and what has passed take a headline and a sentence, without cures."""
    text = printed(made.healthy())

    assert " GG104 no-gradient · INFO · since step 0, still there at 239\n   mask_token never gets a gradient" in text
    assert " GG101 vanishing-gradient · from step 0, cleared at step 100\n   The gradient vanished" in text
    assert "cures" not in text
    assert "gradguard explain" not in text


# --------------------------------------------------------------------------------------------------------------- cures


def test_untried_cures_say_so_and_the_first_comes_with_code() -> None:
    """Advice that nobody tried is labelled; all of it, with sources, on request."""
    text, full = printed(made.sick()), printed(made.sick(), 120, show_all=True)

    assert section(text, "cures").startswith("untried, best first 1 batch-norm: BatchNorm before")
    assert "return torch.nn.Sequential(" in text
    assert "torch.nn.ReLU()" not in text
    assert "and 1 more: residual (show_all=True)" in text
    assert "torch.nn.ReLU()" in full
    assert "Ioffe, Szegedy (2015)" in full
    assert "show_all" not in full


def test_tried_cures_are_ordered_by_what_they_did() -> None:
    """The best stands first, with its line to paste; what does not help has no place; what was not tried says so."""
    lines = printed(made.tried()).splitlines()
    start = next(index for index, line in enumerate(lines) if "cures" in line)

    assert [line.strip() for line in lines[start : start + 11]] == [
        "cures      tried on a copy, 60 steps each; loss 2.30 untreated",
        "1  layer-norm            0.410  best",
        "2  he-initialization     0.550",
        "-  clip-norm              2.30  no effect",
        "-  residual               3.10  worse",
        "-  higher-learning-rate    NaN  diverged",
        "layer-norm: LayerNorm before each activation sets the scale anew",
        "at every layer.",
        "gradguard.apply(result.best, model, optimizer=optimizer)",
        "untried: warm-up (show_all=True)",
        "read       gradguard explain GG101",
    ]


def test_a_cure_that_saves_a_diverged_run_helps() -> None:
    """Against a control that ended in NaN a finite loss is a success, and the smaller one the greater."""
    cures = [
        Prescription(remedy=name, reason="R.", effect=Effect(loss_before=math.nan, loss_after=after, steps=steps))
        for name, after, steps in (("a", 2.0, 40), ("b", 1.0, 60), ("c", math.inf, 60))
    ]
    finding = replace(made.VANISHING, prescriptions=tuple(cures))
    text = section(printed(replace(made.sick(), findings=(finding,))), "cures")

    assert text.startswith("tried on a copy, 40 to 60 steps each; loss NaN untreated 1 b")
    assert re.search(r"1 b +1\.00 best 2 a +2\.00 - c +infinite diverged", text)


def test_cures_tried_against_different_losses_show_both() -> None:
    """Where the untreated losses differ, each row has its own."""
    cures = [
        Prescription(remedy=name, reason="R.", effect=Effect(loss_before=before, loss_after=1.0, steps=60))
        for name, before in (("a", 2.0), ("b", 3.0))
    ]
    finding = replace(made.VANISHING, prescriptions=tuple(cures))
    text = section(printed(replace(made.sick(), findings=(finding,))), "cures")

    assert "1 b 3.00 > 1.00 best 2 a 2.00 > 1.00" in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_long_remedies_keep_their_effect_in_sight(width: int) -> None:
    """However long a remedy's name, the loss and what it means stand in its line, or in the next on a narrow one."""
    cures = tuple(replace(cure, remedy=f"{cure.remedy}-{'x' * 60}") for cure in made.tried().findings[0].prescriptions)
    diagnosis = replace(made.tried(), findings=(replace(made.VANISHING, prescriptions=cures),))
    text = section(printed(diagnosis, width), "cures")

    assert re.search(r"1 layer\S*\.\.\.x+ 0\.410 best 2 ", text)
    assert re.search(r"- higher\S*\.\.\.x+ NaN diverged ", text)
    assert max(map(cell_len, drawn_lines(diagnosis, width))) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_code_to_paste_stays_python(width: int) -> None:
    """Whatever is broken to fit the terminal means the same as before: every cure of the catalogue."""
    ill = [replace(made.VANISHING, code=code, cause=cause) for code in RULES for cause in Cause]
    cures = {(cure.remedy, cure.code): cure for finding in ill for cure in prescriptions_for(finding)}
    assert len(cures) > 20
    for cure in cures.values():
        finding = replace(made.VANISHING, prescriptions=(cure,))
        text = printed(replace(made.sick(), findings=(finding,), layers=()), width)
        block = text.split(f"1  {cure.remedy}: ")[1].split("\n   read")[0]
        pasted = _code_of(block.split("\n"), cure.code)

        assert ast.dump(ast.parse(pasted)) == ast.dump(ast.parse(cure.code)), cure.remedy


def test_what_to_expect_stands_between_reason_and_code() -> None:
    """For cures whose code is shown, on a console and in a page; nothing where nothing is known."""
    cure = Prescription(remedy="r", reason="A reason.", code="x = 1", expected="A factor per layer of 1.")
    ill = replace(made.VANISHING, prescriptions=(cure,))
    sick = replace(made.sick(), findings=(ill,), layers=())
    plain = replace(sick, findings=(replace(ill, prescriptions=(replace(cure, expected=""),)),))

    assert "A reason. Expected: A factor per layer of 1. x = 1" in " ".join(printed(sick, 80).split())
    assert balanced(to_html(sick)).text.count("Expected: A factor per layer of 1.") == 1
    assert "Expected" not in printed(plain, 80) + to_html(plain)


def _code_of(block: list[str], code: str) -> str:
    """Return the code below the reason of a cure, which stands at the same indent."""
    first = code.split("\n", maxsplit=1)[0][:12]
    start = next(index for index, line in enumerate(block) if index and line.lstrip().startswith((first, "#")))
    return textwrap.dedent("\n".join(block[start:]))


@pytest.mark.parametrize(
    ("code", "width", "expected"),
    [
        ("x = f(a)", 20, ["x = f(a)"]),
        ("result = call(argument, another)", 24, ["result = call(argument,", "    another)"]),
        ("total = first_one + second_one", 24, ["total = first_one + \\", "    second_one"]),
        ("y = f(x)  # why this is so, at length", 20, ["# why this is so, at", "# length", "y = f(x)"]),
        ("f(\n    one_argument, two_arguments\n)", 20, ["f(", "    one_argument,", "    two_arguments", ")"]),
        ("if call(argument, another):\n    pass", 20, ["if call(argument,", "        another):", "    pass"]),
        ("text = 'one two three four'", 20, ["text = \\", "    'one two three f", "our'"]),
        ("no python ( at all, really not", 20, ["no python ( at all, ", "really not"]),
    ],
)
def test_code_is_broken_where_python_allows_it(code: str, width: int, expected: list[str]) -> None:
    """Inside brackets, else with a backslash, never inside a string if there is any other place."""
    assert wrap_code(code, width) == expected


# -------------------------------------------------------------------------------------------------- table of layers


def table(text: str) -> list[str]:
    """Return the lines of the table of layers, headings aside."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(" layer "))
    rest = [*lines[start + 1 :], ""]
    return rest[: rest.index("")]


def test_deep_nets_are_folded_around_their_culprit() -> None:
    """Of a thousand layers the ends and the culprit with its neighbours are shown; all of them on request."""
    folded, full = table(printed(made.deep(), 100)), table(printed(made.deep(), 100, show_all=True))

    assert [line.split()[0] for line in folded if "..." not in line] == [
        f"net.{2 * index}" for index in (0, 1, 2, 499, 500, 501, 997, 998, 999)
    ]
    assert [line.strip() for line in folded if "..." in line] == [
        "... 496 more, all alike (show_all=True) ...",
        "... 495 more, all alike (show_all=True) ...",
    ]
    assert [line.split()[0] for line in full] == [f"net.{2 * index}" for index in range(1000)]


def test_a_sudden_loss_is_shown_without_a_mark() -> None:
    """The table finds the largest changes by itself."""
    rows = made.with_loss_at(made.with_loss_at(made.stack(400, gain=0.999), 123, 1e-3), 321, 1e4)
    shown = [row.name for row in fold_rows(rows, show_all=False) if isinstance(row, LayerProfile)]

    assert {"net.244", "net.246", "net.640", "net.642"} <= set(shown)
    assert len(shown) == 10


def test_the_border_of_what_arrived_is_shown() -> None:
    """Where zeros, missing and non-finite gradients begin and end, both sides are shown; equal ones are alike."""
    rows = tuple(replace(row, delta_norm=0.0 if at < 300 else row.delta_norm) for at, row in enumerate(made.stack(600)))
    folded = fold_rows(rows, show_all=False)
    shown = [row.name for row in folded if isinstance(row, LayerProfile)]

    assert {"net.598", "net.600"} <= set(shown)
    assert [(fold.count, fold.alike) for fold in folded if isinstance(fold, Fold)] == [(296, True), (296, True)]


def test_a_restless_gradient_fits_a_screen() -> None:
    """Where every row differs from its neighbours the largest changes are shown, on 24 lines."""
    rows = [replace(row, delta_norm=10.0 ** -(at * 7 % 31)) for at, row in enumerate(made.stack(300))]
    marked = [replace(row, mark="GG301") for row in rows]

    assert 20 <= len(fold_rows(rows, show_all=False)) <= 24
    assert len(fold_rows(marked, show_all=False)) <= 24


@given(st.lists(made.layers, max_size=80))
def test_folding_keeps_order_and_count_and_fits_a_screen(rows: list[LayerProfile]) -> None:
    """Shown and hidden rows are all rows, in order; the ends are shown; no fold hides a single row."""
    folded = fold_rows(rows, show_all=False)
    shown = iter(rows)

    assert len(folded) <= 24
    assert sum(item.count if isinstance(item, Fold) else 1 for item in folded) == len(rows)
    assert all(any(row is item for row in shown) for item in folded if isinstance(item, LayerProfile))
    assert all(item.count > 1 for item in folded if isinstance(item, Fold))
    assert not rows or (folded[0] is rows[0] and folded[-1] is rows[-1])
    assert fold_rows(rows, show_all=True) == rows


def test_what_has_no_size_is_said_in_words() -> None:
    """NaN, absence and exact zero are words, not empty bars; on a narrow terminal, too."""
    for width in (40, 80, 120):
        words = [" ".join(line.split()[-4:]) for line in table(printed(made.nan_forward(), width))]

        assert "none none arrived" in words[0]
        assert "0 exactly zero" in words[1]
        assert "NaN/inf not finite" in words[2]
        assert words[3].endswith("not finite GG202")


def test_bars_are_logarithmic() -> None:
    """Equal factors give equal steps of the bar, and the smallest size still has one."""
    lines = table(printed(made.sick(), 120, show_all=True))
    drawn = [next((part for part in line.split() if part[0] in "█▏▎▍▌▋▊▉"), "") for line in lines if "Linear" in line]
    eighths = [8 * (len(bar) - 1) + " ▏▎▍▌▋▊▉█".index(bar[-1]) for bar in drawn]
    steps = [after - before for before, after in itertools.pairwise(eighths)]

    assert len(eighths) == 20
    assert eighths[0] > 0
    assert max(steps) - min(steps) <= 1


def test_small_differences_are_not_blown_up() -> None:
    """The scale covers three decades at least: among layers alike no bar is less than half of another."""
    lines = table(printed(made.healthy(), 120, show_all=True))
    bars = [line.count("█") for line in lines]

    assert min(bars) > max(bars) / 2


def test_the_mark_of_a_culprit_is_never_left_out() -> None:
    """Colour is not the only sign: the code stands beside the row on the narrowest terminal, too."""
    for width in range(40, 121, 8):
        marked = [line for line in table(printed(made.deep(), width)) if "GG101" in line]

        assert [line.split()[0] for line in marked] == ["net.1000"]


def test_side_branches_are_shown_on_request_or_if_there_is_nothing_else() -> None:
    """Rows that do not count towards the depth criterion are left out, unless marked, asked for, or alone."""
    rows = list(made.stack(5))
    rows[1] = replace(rows[1], trunk=False)
    rows[3] = replace(rows[3], trunk=False, mark="GG301")
    diagnosis = replace(made.sick(), layers=tuple(rows))
    alone = replace(made.sick(), layers=tuple(replace(row, trunk=False, mark="") for row in rows))

    assert [line.split()[0] for line in table(printed(diagnosis))] == ["net.0", "net.4", "net.6", "net.8"]
    assert len(table(printed(diagnosis, show_all=True))) == len(table(printed(alone))) == 5


def test_healthy_reports_show_layers_on_request_only() -> None:
    """Who is well is told so in a few lines."""
    assert len(printed(made.healthy()).splitlines()) <= 12
    assert "|dL/dy|" not in printed(made.healthy())
    assert "|dL/dy|" in printed(made.healthy(), show_all=True)


def test_no_layers_no_table() -> None:
    """Without layers there is no table and no error."""
    assert "|dL/dy|" not in printed(replace(made.sick(), layers=()))


# ----------------------------------------------------------------------------------------------------------- the rest


def test_nothing_seen_is_no_verdict() -> None:
    """Without findings and without observations the report says why, and what was not observed and why."""
    text = flat(printed(made.no_verdict()))

    assert "NO VERDICT 0 optimizer steps seen after 200 backward passes." in text
    assert "not observed: layer signals: no forward hook fired, because the model runs compiled" in text
    assert "not observed: loss: guard.record(loss=loss) was never called" in text
    assert "nothing unobserved" not in text
    assert "nothing unobserved" in printed(made.sick())


def test_healthy_reports_give_the_numbers_of_the_run() -> None:
    """Loss, gradient norm, update ratio, dead units and overhead; how much was seen is not said twice."""
    text = flat(printed(made.healthy()))

    assert "loss 2.66 > 0.0512 · grad norm 0.82 (p5 0.31, p95 1.9) · update/weight 10^-3.1" in text
    assert "dead units at most 12 % (net.7) · overhead 0.8 % of time (0.21 s)" in text
    assert text.count("14 observed") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "from the output of embed on: stretches from 2.3e-9 to 0.21 (8.0 decades), 0.034 in the root mean square"),
        ({"source": "the input", "name": "encoder.0"}, "Jacobian of encoder.0: stretches"),
        ({"smallest_certified": False}, "stretches from at most 2.3e-9 to 0.21, 0.034"),
        ({"largest_certified": False}, "stretches from 2.3e-9 to at least 0.21, 0.034"),
        ({"exact": False}, "about 0.034 in the root mean square"),
        ({"isometry": "isometric"}, "mean square; isometric"),
        ({"isometry": "unknown"}, "is not known"),
    ],
)
def test_a_bound_is_never_printed_as_a_value(changes: dict[str, Any], expected: str) -> None:
    """The line on the Jacobian says which of its numbers are bounds or estimates, and what it is the Jacobian of."""
    text = flat(printed(replace(made.check_deep(), jacobian=replace(made.STRETCH, **changes))))

    assert expected in text
    assert ("decades)" in text) is not any("certified" in name for name in changes)


def test_unknown_numbers_are_left_out() -> None:
    """What was not measured is not printed as NaN."""
    text = printed(replace(made.sick(), summary=RunSummary(steps=3)))

    assert "nan" not in text.lower().replace("nan/inf", "")
    assert "loss" not in text.split("GG101")[0].split("╯")[-1]
    assert "3 steps, 14 observed · nothing unobserved" in text


def test_norms_read_after_clipping_say_so() -> None:
    """A norm that only the optimizer's step saw may have been clipped."""
    assert "grad norm 0.82 (p5 0.31, p95 1.9) at the step (before clipping: not known)" in printed(made.three_layers())
    assert "not known" not in printed(made.sick())


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, "0 %"), (1e-5, "below 0.1 %"), (0.008, "0.8 %"), (0.129, "12.9 %")]
)
def test_overhead_is_never_rounded_to_nothing(fraction: float, expected: str) -> None:
    """A small overhead is small, not absent."""
    diagnosis = replace(made.sick(), summary=replace(made.RUN, overhead_fraction=fraction))

    assert f"overhead {expected} of time (0.21 s)" in printed(diagnosis)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.213456, "", "0.213"),
        (1.23e-14, "", "1.2e-14"),
        (1e-5, "ratio", "1e-5"),
        (65504.0, "", "65504"),
        (123456.7, "", "1.2e5"),
        (-12.43, "decades", "-12.4 decades"),
        (0.21, "fraction", "21 %"),
        (math.nan, "fraction", "NaN"),
        (-math.inf, "", "-infinite"),
        ("falling", "", "falling"),
    ],
)
def test_numbers_have_few_digits(value: float | str, unit: str, expected: str) -> None:
    """Three significant digits at most, powers of ten without padding, words for what is no number."""
    assert number(value, unit) == expected


def test_nearly_all_is_not_all() -> None:
    """A layer with one unit left is not a dead one."""
    assert [share(value) for value in (0.994, 0.9999, 1.0, 0.0004)] == ["99.4 %", "99.9 %", "100 %", "0.04 %"]


def test_colour_appears_on_terminals_only() -> None:
    """Escape codes are for terminals; NO_COLOR and files get none."""
    terminal: dict[str, Any] = {"color_system": "auto", "force_terminal": True}
    coloured = printed(made.sick(), **terminal, _environ={"TERM": "xterm-256color"})
    asked = printed(made.sick(), **terminal, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    dumb = printed(made.sick(), **terminal, _environ={"TERM": "dumb"})
    piped = printed(made.sick(), color_system="auto", force_terminal=None)

    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == asked == dumb == piped


def test_the_report_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a console it is printed where everything is printed, as plain text if that is no terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    print_report(made.sick())

    captured = capsys.readouterr()
    assert captured.out == printed(made.sick())
    assert captured.err == ""


@EVERY
def test_printing_a_diagnosis_with_rich_is_the_same_report(make: Callable[[], Diagnosis]) -> None:
    """``console.print(diagnosis)`` shows what ``print_report`` shows."""
    target = console(80)
    target.print(make())

    assert written(target) == printed(make())


# ------------------------------------------------------------------------------------------------------ HTML and JSON


class _Reader(HTMLParser):
    """Checks that every tag is closed, in order, and keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def balanced(html: str) -> _Reader:
    """Return a reader that has read a well-formed fragment."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@EVERY
def test_html_is_well_formed_and_self_contained(make: Callable[[], Diagnosis]) -> None:
    """The notebook form closes its tags, runs no script, loads nothing, and names every finding."""
    for html in (make()._repr_html_(), to_html(make(), show_all=True)):
        reader = balanced(html)

        assert {tag for tag, _ in reader.seen}.isdisjoint({"script", "style", "link", "img", "iframe"})
        assert not any(name.startswith("on") or name in {"src", "href"} for _, attrs in reader.seen for name in attrs)
        assert all(finding.code in reader.text for finding in make().findings)
        assert all(note.what in reader.text for note in make().unobserved)


def test_html_escapes_what_looks_like_html() -> None:
    """A layer called <script> is text, whole and unchanged."""
    html = to_html(made.hostile())

    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\x1b" not in html
    assert made.LONG_NAME in balanced(html).text


def test_html_leaves_code_as_it_is() -> None:
    """Prose may get no-break spaces, code to paste never does."""
    code = "rest = a % b  # 5 % of <all>"
    finding = replace(made.VANISHING, prescriptions=(Prescription(remedy="r", reason="Loses 5 %.", code=code),))
    html = to_html(replace(made.sick(), findings=(finding,)))

    assert "rest = a % b  # 5 % of &lt;all&gt;</pre>" in html
    assert "Loses 5&nbsp;%." in html


def test_html_tables_can_be_read_aloud() -> None:
    """Columns and rows have headings, a caption says what is shown, and bars are decoration beside their number."""
    reader = balanced(to_html(made.deep()))
    scopes = [attrs.get("scope") for tag, attrs in reader.seen if tag == "th"]

    assert scopes == ["col"] * 7 + ["row"] * 9
    assert [tag for tag, _ in reader.seen].count("caption") == 1
    assert all(
        attrs["aria-hidden"] == "true" for tag, attrs in reader.seen if "background:#" in str(attrs) and tag == "div"
    )
    assert f"net.1000 Linear 64>64 {made.deep().layers[500].delta_norm:.1e}" in " ".join(reader.text.split())
    assert "none arrived" in balanced(to_html(made.nan_forward())).text


@EVERY
def test_html_says_what_the_console_says(make: Callable[[], Diagnosis]) -> None:
    """Verdict, headlines, evidence, cures and numbers are the same words in both forms."""
    page = "".join(balanced(to_html(make())).text.split())
    lines = printed(make(), 1000).split("|dL/dy|")[0].splitlines()[1:]
    drawn = re.compile(r"[▁▂▃▄▅▆▇█]|^ +0 +time steps back +\d+$")
    prose = [line for line in lines if "show_all" not in line and not line.startswith(" layer ")]
    prose = [line for line in prose if not drawn.search(line)]
    parts = [part for line in prose for part in re.split(r" · |^ +\S+ {3,}|^ {3}ruled out +|[│╭╮╰╯─]+", line)]

    missing = [part for part in parts if part.strip() and "".join(part.split()) not in page]
    if make is not made.hostile:
        assert missing == []


@EVERY
def test_json_is_plain_and_versioned(make: Callable[[], Diagnosis]) -> None:
    """The JSON parses strictly, names its schema, and is the dictionary again."""
    diagnosis = make()
    data = json.loads(diagnosis.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert data == diagnosis.to_dict()
    assert data["schema_version"] == 1
    assert data["healthy"] is diagnosis.healthy
    assert data["primary"] == (diagnosis.primary.code if diagnosis.primary else None)
    assert [f["code"] for f in data["findings"]] == [f.code for f in diagnosis.findings]
    assert set(data) == {
        "schema_version",
        "healthy",
        "primary",
        "findings",
        "verdict",
        "observations",
        "sufficient",
        "unobserved",
        "layers",
        "summary",
        "spectra",
        "actions",
        "time_profiles",
        "jacobian",
        "block_profile",
    }


def test_json_keeps_non_finite_numbers_as_words() -> None:
    """NaN is the subject here: it is not lost, and not written as something that is no JSON."""
    finding = replace(made.VANISHING, evidence={"low": Evidence(value=-math.inf)})
    data = json.loads(replace(made.nan_forward(), findings=(finding,)).to_json())

    assert [row["delta_norm"] for row in data["layers"]] == ["NaN", 0.0, "Infinity", "Infinity", 0.12]
    assert data["findings"][0]["evidence"]["low"]["value"] == "-Infinity"
    assert data["summary"]["update_ratio_log10"] == "NaN"


def test_drawing_changes_nothing() -> None:
    """A diagnosis is the same after it was drawn; names are made printable in a copy."""
    diagnosis = made.hostile()
    before = diagnosis.to_json()
    printed(diagnosis, encoding="ascii")

    assert diagnosis.to_json() == before
    assert isinstance(diagnosis.layers, Iterable)
