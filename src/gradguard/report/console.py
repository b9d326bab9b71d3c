"""The console report: am I well, what is wrong, where, since when, why, what is it not, what do I do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.text import Text

from gradguard.findings import Diagnosis
from gradguard.report._actions import action_texts
from gradguard.report._findings import Manner, illness_lines, remark_lines
from gradguard.report._lines import flow, hang, join, wrap
from gradguard.report._printable import printable
from gradguard.report._spectra import spectra_lines
from gradguard.report._story import (
    block_text,
    cost_items,
    illnesses,
    jacobian_text,
    others_below,
    remarks,
    result_items,
    status,
    title,
    unobserved_texts,
)
from gradguard.report._table import layer_table
from gradguard.report._time import time_charts

__all__ = ["print_report", "render"]

_COLOURS = {True: "green", False: "red", None: "yellow"}

_PROSE_MOST = 100
"""Columns that prose takes at most. Ours: longer lines are hard to follow; the bars may have the rest."""


def print_report(diagnosis: Diagnosis, console: Console | None = None, *, show_all: bool = False) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: What to print.
        console: Where to; standard output otherwise. Colour, width and encoding are the console's affair.
        show_all: Print every layer, all evidence, every name, and the code of every cure.
    """
    target = console if console is not None else Console()
    options = target.options
    for part in render(diagnosis, options, show_all=show_all):
        # Without colour rich still writes codes for bold; who asks for none wants plain text.
        target.print(Segments(Segment.strip_styles(target.render(part, options))) if target.no_color else part)


def render(diagnosis: Diagnosis, options: ConsoleOptions, *, show_all: bool = False) -> Iterable[RenderableType]:
    """Yield the parts of a report, top to bottom.

    Args:
        diagnosis: What to draw. Its texts are printed as they are, never read as markup.
        options: Width and encoding of the console; from 40 columns on nothing runs over the edge.
        show_all: See :func:`print_report`.
    """
    ascii_only = options.ascii_only or options.legacy_windows
    shown = printable(diagnosis, ascii_only=options.ascii_only)
    manner = Manner(
        width=min(options.max_width, _PROSE_MOST),
        code_width=options.max_width,
        separator=" - " if ascii_only else " · ",
        show_all=show_all,
    )
    yield _banner(shown, manner, ascii_only=ascii_only)
    sections = _sections(shown, manner, options.max_width, ascii_only=ascii_only)
    text: list[Text] = []
    for lines in sections:
        if lines:
            text += [Text(""), *lines] if text else lines
    yield join(text)


def _banner(diagnosis: Diagnosis, manner: Manner, *, ascii_only: bool) -> RenderableType:
    colour = _COLOURS[diagnosis.healthy]
    word = Text(f"{status(diagnosis)}  ", f"bold {colour}")
    width = max(1, manner.width - 4 - cell_len(word.plain))
    lines = [*wrap(diagnosis.verdict, width), *wrap(others_below(illnesses(diagnosis)), width)]
    return Panel(
        join(hang(lines or [Text("")], word, cell_len(word.plain))),
        title=Text(title(diagnosis.summary)),
        title_align="left",
        border_style=colour,
        box=box.ASCII if ascii_only else box.ROUNDED,
    )


def _sections(diagnosis: Diagnosis, manner: Manner, width: int, *, ascii_only: bool) -> Iterator[list[Text]]:
    """Yield the parts below the banner, which are set apart by blank lines; a part may be empty."""
    summary, healthy = diagnosis.summary, diagnosis.healthy
    for index, illness in enumerate(illnesses(diagnosis)):
        yield list(illness_lines(illness, summary, manner, say=index > 0))
    notes = [line for finding in remarks(diagnosis) for line in remark_lines(finding, summary, manner)]
    results = result_items(summary) if diagnosis.observations else []
    done, ending = (_hanging(texts, manner) for texts in (action_texts(diagnosis), unobserved_texts(diagnosis)))
    structure = (block_text(diagnosis, show_all=manner.show_all), jacobian_text(diagnosis))
    done = [*_hanging([text for text in structure if text], manner), *done]
    if healthy is False:
        yield [*_indented(results, manner), *done]
        yield notes
    else:
        yield [*_indented([*results, *cost_items(diagnosis)], manner), *done, *ending, *notes]
    yield _time(diagnosis, manner, width, ascii_only=ascii_only)
    if healthy is False or manner.show_all:
        yield _table(diagnosis, manner, width, ascii_only=ascii_only)
    empty = "-" if ascii_only else "·"
    spectra = spectra_lines(diagnosis.spectra, max(1, manner.width - 1), empty=empty, show_all=manner.show_all)
    yield [Text.assemble(" ", line) for line in spectra]
    if healthy is False:
        yield [*_indented(cost_items(diagnosis), manner), *ending]


def _indented(items: Iterable[str], manner: Manner) -> list[Text]:
    return hang(flow(items, max(1, manner.width - 1), manner.separator), " ", 1)


def _hanging(texts: Iterable[str], manner: Manner) -> list[Text]:
    return [line for text in texts for line in hang(wrap(text, max(1, manner.width - 3)), " ", 3)]


def _table(diagnosis: Diagnosis, manner: Manner, width: int, *, ascii_only: bool) -> list[Text]:
    lines = layer_table(diagnosis.layers, max(1, width - 1), ascii_only=ascii_only, show_all=manner.show_all)
    return [Text.assemble(" ", line) for line in lines]


def _time(diagnosis: Diagnosis, manner: Manner, width: int, *, ascii_only: bool) -> list[Text]:
    lines = time_charts(
        diagnosis,
        max(1, width - 1),
        ascii_only=ascii_only,
        separator=manner.separator,
        show_all=manner.show_all,
    )
    return [Text.assemble(" ", line) for line in lines]
