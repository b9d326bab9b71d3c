"""The console report: am I well, what is wrong, where, since when, why, what is it not, what do I do."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradguard.findings import Diagnosis
from gradguard.report._findings import finding_block, remark_line
from gradguard.report._format import footer_lines, illnesses, remarks, status, summary_line
from gradguard.report._layers import layer_table

__all__ = ["print_report", "render"]

_COLOURS = {True: "green", False: "red", None: "yellow"}


def print_report(diagnosis: Diagnosis, console: Console | None = None, *, show_all: bool = False) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: What to print.
        console: Where to; standard output otherwise. Colour, width and encoding are the console's affair.
        show_all: Print every layer, all evidence and the code of every cure.
    """
    target = console if console is not None else Console()
    parts = render(diagnosis, target.options, show_all=show_all)
    if not target.options.ascii_only:
        for part in parts:
            target.print(part, highlight=False)
        return
    # Names are the user's, and one that the terminal cannot show must not end a run.
    plain = Console(file=io.StringIO(), width=target.width, color_system=None, force_terminal=False, _environ={})
    with plain.capture() as capture:
        for part in parts:
            plain.print(part, highlight=False)
    target.file.write(capture.get().encode("ascii", "backslashreplace").decode("ascii"))


def render(diagnosis: Diagnosis, options: ConsoleOptions, *, show_all: bool = False) -> Iterable[RenderableType]:
    """Yield the parts of a report, top to bottom.

    Args:
        diagnosis: What to draw.
        options: Width and encoding of the console.
        show_all: See :func:`print_report`.
    """
    ascii_only = options.ascii_only or options.legacy_windows
    separator = " - " if ascii_only else " · "
    yield _banner(diagnosis, ascii_only=ascii_only)
    yield from _body(diagnosis, separator, show_all=show_all)
    if diagnosis.healthy is False or show_all:
        table = layer_table(diagnosis.layers, options.max_width - 1, ascii_only=ascii_only, show_all=show_all)
        if table is not None:
            yield Text("")
            yield _indented(table)
    yield Text("")
    for line in footer_lines(diagnosis):
        yield _paragraph(line.replace(" · ", separator), style="dim")


def _banner(diagnosis: Diagnosis, *, ascii_only: bool) -> RenderableType:
    colour = _COLOURS[diagnosis.healthy]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style=f"bold {colour}")
    grid.add_column(overflow="fold")
    grid.add_row(status(diagnosis), Text(diagnosis.verdict))
    shape = box.ASCII if ascii_only else box.ROUNDED
    return Panel(grid, title="gradguard", title_align="left", border_style=colour, box=shape)


def _body(diagnosis: Diagnosis, separator: str, *, show_all: bool) -> Iterator[RenderableType]:
    ill = illnesses(diagnosis)
    for index, finding in enumerate(ill):
        if index:
            yield Text("")
        consequences = [
            f
            for f in diagnosis.findings
            if f.standing and f.consequence_of == finding.code and f.optimizer == finding.optimizer
        ]
        yield finding_block(
            finding,
            consequences,
            diagnosis.summary,
            separator=separator,
            say=index > 0,
            show_all=show_all,
        )
    line = summary_line(diagnosis.summary)
    if line and diagnosis.observations:
        if ill:
            yield Text("")
        yield _paragraph(line)
    for finding in remarks(diagnosis):
        yield _indented(remark_line(finding, diagnosis.summary, separator))


def _paragraph(text: str, style: str = "") -> RenderableType:
    return _indented(Text(text, style=style))


def _indented(content: RenderableType) -> RenderableType:
    grid = Table.grid()
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row("", content)
    return grid
