"""The table of layers on a terminal: the gradient at each layer's output as a bar on a log scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from gradguard.findings import LayerProfile
from gradguard.report._layers import (
    Fold,
    Scale,
    active_text,
    caption,
    fold_rows,
    gain_text,
    rows_to_show,
    size_text,
    size_words,
)
from gradguard.report._lines import elide, pad, wrap
from gradguard.report._story import SHOW_ALL

__all__ = ["layer_table"]

_BLOCKS = " ▏▎▍▌▋▊▉█"

_LEAST_BAR = 12
"""Columns of the narrowest bar: as many as the longest words that can stand in its place."""

_NAME_LEAST, _NAME_MOST = 10, 40
_KIND_MOST = 20

_WIDE = 100
"""Columns from which theory and singular values have room beside a bar that can still be read."""

_NARROW = 60
"""Columns below which columns stand one space apart, not two."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column besides name and bar: its heading, its cells per row, and on which side they stand."""

    head: str
    cells: tuple[str, ...]
    width: int
    right: bool
    style: str

    @classmethod
    def of(cls, head: str, cells: Iterable[str], *, right: bool = False, style: str = "") -> _Column:
        """Return a column as wide as its widest cell."""
        texts = tuple(cells)
        return cls(head, texts, max(cell_len(text) for text in (head, *texts)), right, style)

    def cell(self, index: int | None) -> Text:
        """Return the cell of a row, or the heading for ``None``."""
        return pad(Text(self.head if index is None else self.cells[index], self.style), self.width, right=self.right)


def layer_table(rows: Sequence[LayerProfile], width: int, *, ascii_only: bool, show_all: bool) -> list[Text]:
    """Return the lines of the table, none where there is nothing to show.

    Args:
        rows: Every layer of the diagnosis; without ``show_all`` only those of the trunk and marked ones are shown.
        width: Columns of the terminal. A wider one gets wider bars, not more words.
        ascii_only: Whether the terminal has no block characters.
        show_all: Whether to show every layer.
    """
    shown = rows_to_show(rows, show_all=show_all)
    if not shown:
        return []
    scale = Scale.of(shown)
    folded = fold_rows(shown, show_all=show_all)
    visible = [row for row in folded if isinstance(row, LayerProfile)]
    gap = 1 if width < _NARROW else 2
    before, behind = _columns(visible, width, gap, empty="-" if ascii_only else "·")
    fixed = sum(column.width + gap for column in (*before, *behind)) + gap
    longest = max(5, *(cell_len(row.name or _ROOT) for row in visible))
    bar_width = max(_LEAST_BAR, min(width // 4, width - fixed - _NAME_LEAST), width - fixed - min(longest, _NAME_MOST))
    name_width = max(5, min(longest, width - fixed - bar_width))
    lines = [Text(line.plain, "dim") for line in wrap(caption(visible, theory=width >= _WIDE), width)]
    head = [pad(Text("layer"), name_width), *(c.cell(None) for c in before), _heading(scale, bar_width)]
    lines.append(_line([*head, *(c.cell(None) for c in behind)], gap, "bold"))
    index = 0
    for row in folded:
        if isinstance(row, Fold):
            lines.append(_fold_line(row, width))
            continue
        name = pad(Text(elide(row.name or _ROOT, name_width), "bold red" if row.mark else ""), name_width)
        bar = pad(_bar(row, scale, bar_width, ascii_only=ascii_only), bar_width)
        lines.append(_line([name, *(c.cell(index) for c in before), bar, *(c.cell(index) for c in behind)], gap))
        index += 1
    return lines


_ROOT = "(model)"


def _columns(rows: Sequence[LayerProfile], width: int, gap: int, *, empty: str) -> tuple[list[_Column], list[_Column]]:
    """Return the columns before and behind the bar; what the width has no room for is left out, least needed first."""
    columns = {
        "kind": _Column.of("kind", (elide(row.kind, _KIND_MOST) for row in rows)),
        "size": _Column.of("|dL/dy|", (size_text(row.delta_norm) for row in rows), right=True),
        "gain": _Column.of("gain", (gain_text(row.gain) or empty for row in rows), right=True),
        "theory": _Column.of("theory", (gain_text(row.predicted_gain) or empty for row in rows), right=True),
        "sigma": _Column.of("sigma", (gain_text(row.sigma) or empty for row in rows), right=True),
        "active": _Column.of("active", (active_text(row.active_fraction) or empty for row in rows), right=True),
        "mark": _Column.of("", (row.mark for row in rows), style="bold red"),
    }
    for name in ("gain", "theory", "sigma", "active", "mark", "kind"):
        if set(columns[name].cells) <= {"", empty} or (width < _WIDE and name in {"theory", "sigma"}):
            del columns[name]
    for name in ("sigma", "theory", "active", "kind", "gain"):
        room = width - _NAME_LEAST - _LEAST_BAR - gap - sum(column.width + gap for column in columns.values())
        if room < 0:
            columns.pop(name, None)
    before = [columns[name] for name in ("kind", "size") if name in columns]
    return before, [columns[name] for name in ("gain", "theory", "sigma", "active", "mark") if name in columns]


def _line(cells: Sequence[Text], gap: int, style: str = "") -> Text:
    line = Text(" " * gap).join(cells)
    line.stylize(style)
    line.rstrip()
    return line


def _fold_line(fold: Fold, width: int) -> Text:
    """Return what stands in place of hidden rows, with as much help as there is room for."""
    texts = (f"... {fold.text} ({SHOW_ALL}) ...", f"... {fold.text} ({SHOW_ALL})", f"... {fold.text}")
    return Text(next((text for text in texts if cell_len(text) <= width), f"... {fold.count} more"), "dim")


def _heading(scale: Scale | None, width: int) -> Text:
    if scale is None:
        return pad("", width)
    left, right = scale.ends
    return pad(left, width - len(right)).append(right) if width > len(left) + len(right) else pad("", width)


def _bar(row: LayerProfile, scale: Scale | None, width: int, *, ascii_only: bool) -> Text:
    """Return a bar; what has no size is said in words, never drawn as an empty bar."""
    words = size_words(row.delta_norm)
    if words or scale is None:
        return Text(words, "bold yellow")
    eighths = min(8 * width, max(1, round(scale.share(row.delta_norm) * width * 8)))
    full, part = divmod(eighths, 8)
    drawn = "#" * max(1, round(eighths / 8)) if ascii_only else _BLOCKS[8] * full + (_BLOCKS[part] if part else "")
    return Text(drawn, "red" if row.mark else "cyan")
