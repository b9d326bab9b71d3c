"""One finding, drawn: where, because of what, what it is not, what follows, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradguard.findings import Finding, Prescription, RunSummary, Severity
from gradguard.report._format import evidence_text, number, when, where

__all__ = ["finding_block", "remark_line"]

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold blue"}

_EVIDENCE_SHOWN = 6

_SHOWN_ELSEWHERE = frozenset({"span", "gain_per_layer", "layers", "first_delta", "last_delta", "activation"})
"""Evidence that the verdict or the table of layers shows already."""

_CURES_SHOWN = 3


def finding_block(
    finding: Finding,
    consequences: Sequence[Finding],
    summary: RunSummary,
    *,
    separator: str,
    say: bool,
    show_all: bool,
) -> RenderableType:
    """Return one illness with everything under it.

    Args:
        finding: The illness.
        consequences: What follows from it.
        summary: The run; says whether this is a check.
        separator: Stands between items of a line.
        say: Whether to repeat the message; the primary's stands in the verdict already.
        show_all: Whether to show all evidence and the code of every cure.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=9, no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for label, value in _rows(finding, consequences, separator=separator, say=say, show_all=show_all):
        grid.add_row(label, value)
    return Group(_headline(finding, summary, separator), Padding(grid, (0, 0, 0, 3)))


def remark_line(finding: Finding, summary: RunSummary, separator: str) -> Text:
    """Return a note, or what has cleared, in one paragraph."""
    text = Text()
    text.append(f"{finding.code} {finding.name}", style="bold")
    parts = [finding.severity.name] if finding.standing else []
    parts += [part for part in (finding.optimizer, when(finding, summary)) if part]
    text.append(f"{separator}{separator.join(parts)}{separator}" if parts else separator)
    text.append(finding.message)
    return text


def _headline(finding: Finding, summary: RunSummary, separator: str) -> Text:
    text = Text(" ")
    text.append(f"{finding.code} {finding.name}", style="bold")
    text.append(separator)
    text.append(finding.severity.name, style=STYLES[finding.severity])
    parts = [finding.optimizer, when(finding, summary), f"sure {finding.confidence:.2f}"]
    text.append("".join(f"{separator}{part}" for part in parts if part))
    return text


def _rows(
    finding: Finding, consequences: Sequence[Finding], *, separator: str, say: bool, show_all: bool
) -> Iterator[tuple[str, RenderableType]]:
    if say:
        yield "what", Text(finding.message)
    yield "where", Text(where(finding))
    shown = list(finding.evidence.items())
    if not show_all:
        shown = [(name, item) for name, item in shown if name not in _SHOWN_ELSEWHERE][:_EVIDENCE_SHOWN]
    because = Text(finding.cause.value, style="bold")
    if shown:
        because.append(": " + "; ".join(evidence_text(name, item) for name, item in shown), style="not bold")
    yield "because", because
    if finding.ruled_out:
        yield "ruled out", Text(separator.join(f"{item.cause.value} ({item.reason})" for item in finding.ruled_out))
    for index, other in enumerate(consequences):
        yield "follows" if index == 0 else "", Text(f"{other.code} {other.name}: {other.message}")
    if finding.prescriptions:
        yield from _cures(finding.prescriptions, show_all=show_all)
    yield "read", Text(f"gradguard explain {finding.code}")


def _cures(prescriptions: Sequence[Prescription], *, show_all: bool) -> Iterator[tuple[str, RenderableType]]:
    tried = [p for p in prescriptions if p.effect is not None]
    if tried:
        yield "cures", _effects(tried)
    untried = [p for p in prescriptions if p.effect is None]
    for index, cure in enumerate(untried if show_all else untried[:_CURES_SHOWN]):
        label = "cures" if index == 0 and not tried else ""
        head = "untried, best first: " if index == 0 else ""
        text = Text(head, style="dim")
        text.append(f"{index + 1} {cure.remedy}", style="bold not dim")
        text.append(f". {cure.reason}", style="not dim")
        yield label, text
        if cure.code and (show_all or index == 0):
            yield "", Padding(Text(cure.code, style="green", overflow="fold"), (0, 0, 0, 2))


def _effects(tried: Sequence[Prescription]) -> RenderableType:
    steps = max(p.effect.steps for p in tried if p.effect is not None)
    before = next(p.effect.loss_before for p in tried if p.effect is not None)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=2)
    grid.add_column()
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    best = max(p.effect.gain for p in tried if p.effect is not None)
    for index, cure in enumerate(tried):
        if cure.effect is not None:
            helps = cure.effect.gain > 0.01 * abs(cure.effect.loss_before)
            note = "best" if helps and cure.effect.gain == best else ("" if helps else "no effect")
            grid.add_row(
                str(index + 1) if helps else "-", Text(cure.remedy), Text(number(cure.effect.loss_after)), Text(note)
            )
    return Group(Text(f"tried on a copy, {steps} steps each; loss {number(before)} before"), grid)
