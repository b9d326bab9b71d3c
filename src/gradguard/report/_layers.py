"""The table of layers: delta as a bar on a log scale, in execution order, folded to what matters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from gradguard.findings import LayerProfile
from gradguard.report._format import elide

__all__ = ["Fold", "Scale", "fold_rows", "layer_table"]

_MOST_ROWS = 22
"""Rows shown of a deep net; more does not fit beside a finding on a screen of 50 lines. Ours."""

_EDGE = 4
"""Rows shown at either end of a deep net. Ours."""

_ALIKE = 2.0
"""Factor within which gains count as alike. Ours: initial weights of one kind differ by less in what they pass."""

_BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows that are not shown."""

    count: int
    alike: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic scale from ``low`` to ``high`` (powers of ten)."""

    low: int
    high: int

    @classmethod
    def of(cls, rows: Iterable[LayerProfile]) -> Scale | None:
        """Return the scale that holds every finite, positive delta; ``None`` where there is none."""
        logs = [math.log10(row.delta_norm) for row in rows if 0.0 < row.delta_norm < math.inf]
        if not logs:
            return None
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, high if high > low else low + 1)

    def share(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def label(self, width: int) -> str:
        """Return both ends of the scale, as far apart as the width allows."""
        left, right = f"1e{self.low}", f"1e{self.high}"
        return left + right.rjust(width - len(left)) if width > len(left) + len(right) else ""


def fold_rows(rows: Sequence[LayerProfile], *, show_all: bool) -> list[LayerProfile | Fold]:
    """Keep the ends, the culprits with their neighbours and the largest changes; fold the rest.

    Args:
        rows: Layers in execution order.
        show_all: Whether to keep everything.
    """
    if show_all or len(rows) <= _MOST_ROWS:
        return list(rows)
    keep = set(range(_EDGE)) | set(range(len(rows) - _EDGE, len(rows)))
    marked = [index for index, row in enumerate(rows) if row.mark][:4]
    for index in marked:
        keep |= {at for at in (index - 1, index, index + 1) if 0 <= at < len(rows)}
    changes = [abs(math.log10(row.gain)) if 0.0 < row.gain < math.inf else 0.0 for row in rows]
    typical = sorted(changes)[len(changes) // 2]
    for index in sorted(range(len(rows)), key=lambda at: -abs(changes[at] - typical))[:3]:
        if abs(changes[index] - typical) > math.log10(_ALIKE):
            keep.add(index)
    result: list[LayerProfile | Fold] = []
    start = 0
    for index in [*sorted(keep), len(rows)]:
        hidden = rows[start:index]
        if len(hidden) <= 1:
            result.extend(hidden)
        else:
            result.append(Fold(len(hidden), _alike(hidden)))
        if index < len(rows):
            result.append(rows[index])
        start = index + 1
    return result


def _alike(rows: Sequence[LayerProfile]) -> bool:
    gains = [row.gain for row in rows if 0.0 < row.gain < math.inf]
    return len(gains) == len(rows) and max(gains) <= _ALIKE**2 * min(gains)


def layer_table(rows: Sequence[LayerProfile], width: int, *, ascii_only: bool, show_all: bool) -> Table | None:
    """Return the table of layers, ``None`` where there is nothing to show.

    Args:
        rows: Every layer of the diagnosis; without ``show_all`` only those of the trunk and marked ones are shown.
        width: Columns of the terminal. A wider one gets wider bars, not more words.
        ascii_only: Whether the terminal has no block characters.
        show_all: Whether to show every layer.
    """
    shown = [row for row in rows if show_all or row.trunk or row.mark]
    scale = Scale.of(shown)
    if not shown:
        return None
    folded = fold_rows(shown, show_all=show_all)
    visible = [row for row in folded if isinstance(row, LayerProfile)]
    least = 5 if len(visible) == len(folded) else len(f"... {len(shown)} more")
    name_width = min(max(least, *(len(row.name) for row in visible)), max(least, min(40, width // 4)))
    kind_width = min(max(4, *(len(row.kind) for row in visible)), 19)
    marks = any(row.mark for row in visible)
    bar_width = max(4, width - name_width - kind_width - 9 - 6 - 6 - (6 if marks else 0) - 8)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("layer", width=name_width, no_wrap=True)
    table.add_column("kind", width=kind_width, no_wrap=True)
    table.add_column("|dL/dy|", width=9, justify="right", no_wrap=True)
    table.add_column(Text(scale.label(bar_width) if scale else ""), width=bar_width, no_wrap=True)
    table.add_column("gain", width=6, justify="right", no_wrap=True)
    table.add_column("active", width=6, justify="right", no_wrap=True)
    if marks:
        table.add_column("", width=6, no_wrap=True)
    for row in folded:
        if isinstance(row, Fold):
            more = f"... {row.count} more"
            table.add_row(
                Text(elide(more, name_width), style="dim"), Text("all alike" if row.alike else "", style="dim")
            )
        else:
            cells = _cells(row, scale, name_width, kind_width, bar_width, ascii_only=ascii_only)
            table.add_row(*cells, *([Text(row.mark, style="bold red")] if marks else []))
    return table


def _cells(
    row: LayerProfile, scale: Scale | None, name_width: int, kind_width: int, bar_width: int, *, ascii_only: bool
) -> list[Text]:
    style = "bold red" if row.mark else ""
    size, bar = _size_and_bar(row.delta_norm, scale, bar_width, ascii_only=ascii_only)
    gain = f"{row.gain:.2g}" if 0.01 <= row.gain < 1000.0 else (f"{row.gain:.0e}" if row.gain > 0.0 else "")
    active = "" if math.isnan(row.active_fraction) else f"{100 * row.active_fraction:.0f} %"
    return [
        Text(elide(row.name or "(model)", name_width), style=style),
        Text(elide(row.kind, kind_width)),
        Text(size),
        Text(bar, style="red" if row.mark else "cyan"),
        Text("inf" if math.isinf(row.gain) else gain),
        Text(active),
    ]


def _size_and_bar(delta: float, scale: Scale | None, width: int, *, ascii_only: bool) -> tuple[str, str]:
    """Return the size in digits and as a bar; what has no size is said in words, never drawn as an empty bar."""
    if math.isnan(delta):
        return "none", "no gradient arrived"[:width]
    if delta == 0.0:
        return "0", "exactly zero"[:width]
    if math.isinf(delta) or scale is None:
        return "not fin.", "NaN or infinite"[:width]
    eighths = max(1, round(scale.share(delta) * width * 8))
    if ascii_only:
        return f"{delta:.1e}", "#" * max(1, round(eighths / 8))
    full, part = divmod(eighths, 8)
    return f"{delta:.1e}", _BLOCKS[8] * full + (_BLOCKS[part] if part else "")
