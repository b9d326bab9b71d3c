"""One finding on a terminal: where, because of what, what it is not, what follows, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from gradguard.findings import Finding, Prescription, RunSummary, Severity
from gradguard.report._code import wrap_code
from gradguard.report._cures import Trials, trials, untried
from gradguard.report._lines import elide, flow, hang, pad, wrap
from gradguard.report._story import SHOW_ALL, Illness, because, consequence_text, headline, theory, where

__all__ = ["Manner", "illness_lines", "remark_lines"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold blue"}

_INDENT = 3
_LABEL = 11
_MARK = 3
_CODE_WIDTH = 56
"""Columns that code should have; where fewer are left beside the labels, it starts further left. Ours: most lines of
our cures fit."""

_CODE_LEFT = 6

_REMEDY_LEAST = 12
"""Columns without which the effects of cures are no table but plain lines."""

_FOLLOWING_SHOWN = 5
"""Consequences that are listed, unless everything is shown. Ours."""

_CURES_SHOWN = 3
"""Cures that are explained, unless everything is shown. Ours: they are ordered, and the first is the one to try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How to draw.

    Attributes:
        width: Cells per line of prose.
        code_width: Cells per line of code.
        separator: Stands between items of a line.
        show_all: Whether to show all evidence, all names, and the code of every cure.
    """

    width: int
    code_width: int
    separator: str
    show_all: bool = False

    @property
    def text_width(self) -> int:
        """Cells beside the labels."""
        return max(1, self.width - _INDENT - _LABEL)


def illness_lines(illness: Illness, summary: RunSummary, manner: Manner, *, say: bool) -> Iterator[Text]:
    """Yield the lines of one illness.

    Args:
        illness: The finding and what follows from it.
        summary: The run.
        manner: How to draw.
        say: Whether to repeat the message; the primary's stands in the verdict already.
    """
    finding, width = illness.finding, manner.text_width
    yield from _head(finding, summary, manner)
    if say:
        yield from _labelled("what", wrap(finding.message, width))
    yield from _labelled("where", wrap(where(finding, show_all=manner.show_all), width))
    cause, evidence = because(finding, show_all=manner.show_all)
    yield from _labelled("because", wrap(Text.assemble((cause, "bold"), f": {evidence}" if evidence else ""), width))
    yield from _labelled("theory", wrap(told, width) if (told := theory(finding)) else [])
    ruled_out = [f"{item.cause.value} ({item.reason})" for item in finding.ruled_out]
    yield from _labelled("ruled out", flow(ruled_out, width, manner.separator))
    yield from _labelled("follows", _following(illness, summary, manner))
    yield from _cures(finding, manner)
    yield from _labelled("read", wrap(f"gradguard explain {finding.code}", width))


def remark_lines(finding: Finding, summary: RunSummary, manner: Manner) -> Iterator[Text]:
    """Yield a note, or what has cleared."""
    yield from _head(finding, summary, manner)
    yield from hang(wrap(finding.message, max(1, manner.width - _INDENT)), " " * _INDENT, _INDENT)


def _head(finding: Finding, summary: RunSummary, manner: Manner) -> list[Text]:
    items = [Text(f"{finding.code} {finding.name}", "bold")]
    items += [
        Text(text, _STYLES[finding.severity] if text == finding.severity.name else "")
        for text in headline(finding, summary)
    ]
    # The first line starts two columns further left, and may be as much longer.
    lines = flow(items, max(1, manner.width - 1), manner.separator)
    if len(lines) > 1:
        lines = flow(items, max(1, manner.width - _INDENT), manner.separator)
    return hang(lines, " ", _INDENT)


def _labelled(label: str, lines: Sequence[Text]) -> list[Text]:
    first = Text.assemble(" " * _INDENT, pad(Text(label, "bold"), _LABEL))
    return hang(lines, first, _INDENT + _LABEL)


def _following(illness: Illness, summary: RunSummary, manner: Manner) -> list[Text]:
    shown = illness.consequences[: None if manner.show_all else _FOLLOWING_SHOWN]
    texts = [consequence_text(other, illness.finding, summary) for other in shown]
    if len(shown) < len(illness.consequences):
        texts.append(f"and {len(illness.consequences) - len(shown)} more ({SHOW_ALL})")
    rest = 2 if len(texts) > 1 else 0
    return [line for text in texts for line in hang(wrap(text, max(1, manner.text_width - rest)), "", rest)]


def _cures(finding: Finding, manner: Manner) -> Iterator[Text]:
    tried, rest = trials(finding), untried(finding)
    label = "cures"
    if tried is not None:
        yield from _labelled(label, [*wrap(tried.head, manner.text_width), *_effects(tried, manner.text_width)])
        label = ""
        if tried.best is not None:
            reason = wrap(f"{tried.best.remedy}: {tried.best.reason}", manner.text_width)
            yield from _labelled("", reason)
            yield from _code(tried.best, manner)
    if not rest:
        return
    explained = rest if manner.show_all else rest[: _CURES_SHOWN if tried is None else 0]
    if explained:
        yield from _labelled(label, wrap("untried, best first", manner.text_width))
    for index, cure in enumerate(explained):
        reason = wrap(Text.assemble((cure.remedy, "bold"), f": {cure.reason}"), max(1, manner.text_width - _MARK))
        yield from _labelled("", hang(reason, pad(str(index + 1), _MARK), _MARK))
        if index == 0 or manner.show_all:
            if cure.expected:
                effect = wrap(f"Expected: {cure.expected}", max(1, manner.text_width - _MARK))
                yield from _labelled("", hang(effect, " " * _MARK, _MARK))
            yield from _code(cure, manner)
        if manner.show_all and cure.reference:
            source = wrap(Text(cure.reference, "dim"), max(1, manner.text_width - _MARK))
            yield from _labelled("", hang(source, " " * _MARK, _MARK))
    names = [cure.remedy for cure in rest[len(explained) :]]
    if names:
        before = f"and {len(names)} more: " if explained else "untried: "
        yield from _labelled("", wrap(f"{before}{', '.join(names)} ({SHOW_ALL})", manner.text_width))


def _effects(tried: Trials, width: int) -> Iterable[Text]:
    losses = max(cell_len(item.loss) for item in tried.cures)
    notes = max(cell_len(item.note) for item in tried.cures)
    longest = max(cell_len(item.cure.remedy) for item in tried.cures)
    names = min(longest, width - _MARK - losses - notes - 4)
    if names < min(longest, _REMEDY_LEAST):
        for item in tried.cures:
            parts = wrap(f"{item.cure.remedy} {item.loss} {item.note}", max(1, width - _MARK))
            yield from hang(parts, pad(item.rank, _MARK), _MARK)
        return
    for item in tried.cures:
        style = "bold green" if item.note == "best" else ""
        name = pad(elide(item.cure.remedy, names), names)
        line = Text.assemble(pad(item.rank, _MARK), name, "  ", pad(item.loss, losses, right=True), "  ", item.note)
        line.stylize(style)
        line.rstrip()
        yield line


def _code(cure: Prescription, manner: Manner) -> Iterator[Text]:
    """Yield code beside the labels, or further left on a narrow terminal, so that few lines are broken."""
    if not cure.code:
        return
    indent = _INDENT + _LABEL + _MARK
    longest = max(cell_len(line) for line in cure.code.split("\n"))
    if longest > manner.code_width - indent < _CODE_WIDTH:
        indent = _CODE_LEFT
    for line in wrap_code(cure.code, manner.code_width - indent):
        yield Text.assemble(" " * indent, (line, "green"))
