"""The layers of a report: which rows are shown, on which scale, and what is said in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradguard.findings import LayerProfile
from gradguard.report._format import share

__all__ = [
    "Fold",
    "Scale",
    "active_text",
    "caption",
    "fold_rows",
    "gain_text",
    "rows_to_show",
    "size_text",
    "size_words",
]

_MOST_LINES = 24
"""Lines of a folded table, headings aside. Ours: with the finding above it, a table still fits on a screen."""

_FEW_ROWS = 8
"""Up to this many rows nothing is folded. Ours: folding would save one line or two."""

_EDGE = 3
"""Rows shown at either end of a folded table. Ours: enough to see a slope."""

_MARKED_SHOWN = 5
"""Culprits that are shown with their neighbours. Ours."""

_ALIKE_DECADES = math.log10(2.0)
"""Decades by which a hidden row may lie off the straight line between its shown neighbours and still be called alike.
Ours: gains of layers initialized alike scatter by less."""

_ALIKE_SHARE = 0.05
"""The same as a share of the scale: less cannot be seen in a bar. Ours."""

_LEAST_DECADES = 3
"""Length of the shortest scale. Ours: on a shorter one small differences between healthy layers look large."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows that are not shown.

    Attributes:
        count: How many.
        alike: Whether all of them lie on the line between the rows above and below.
    """

    count: int
    alike: bool

    @property
    def text(self) -> str:
        """What stands in their place."""
        return f"{self.count} more, all alike" if self.alike else f"{self.count} more"


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic scale from ``low`` to ``high`` (powers of ten)."""

    low: int
    high: int

    @classmethod
    def of(cls, rows: Iterable[LayerProfile]) -> Scale | None:
        """Return the scale that holds every finite, positive delta; ``None`` where there is none."""
        return cls.over([math.log10(row.delta_norm) for row in rows if 0.0 < row.delta_norm < math.inf])

    @classmethod
    def over(cls, logs: Sequence[float]) -> Scale | None:
        """Return the scale that holds every one of these decimal logarithms; ``None`` where there is none."""
        if not logs:
            return None
        high = math.ceil(max(logs))
        return cls(min(math.floor(min(logs)), high - _LEAST_DECADES), high)

    def share(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    @property
    def ends(self) -> tuple[str, str]:
        """Both ends as powers of ten."""
        return f"1e{self.low}", f"1e{self.high}"


def rows_to_show(rows: Sequence[LayerProfile], *, show_all: bool) -> list[LayerProfile]:
    """Return the rows of the trunk and the marked ones; all of them on request, or where none is of the trunk."""
    shown = [row for row in rows if row.trunk or row.mark]
    return list(rows) if show_all or not any(row.trunk for row in rows) else shown


def fold_rows(rows: Sequence[LayerProfile], *, show_all: bool) -> list[LayerProfile | Fold]:
    """Keep the ends, the culprits with their neighbours and whatever lies off the line between them; fold the rest.

    A steady decay has two ends and nothing between them; a sudden loss is two rows off any line, and stays.

    Args:
        rows: Layers in execution order.
        show_all: Whether to keep everything.

    Source:
        Ours; after Douglas and Peucker (1973), "Algorithms for the reduction of the number of points required to
        represent a digitized line or its caricature", Cartographica 10.
    """
    count = len(rows)
    if show_all or count <= _FEW_ROWS:
        return list(rows)
    keep = {*range(_EDGE), *range(count - _EDGE, count)}
    for index in itertools.chain(_culprits(rows), _turns(rows)):
        if _lines(keep | {index}, count) <= _MOST_LINES:
            keep.add(index)
    heights = [math.log10(row.delta_norm) if 0.0 < row.delta_norm < math.inf else math.nan for row in rows]
    known = [height for height in heights if not math.isnan(height)]
    tolerance = max(_ALIKE_DECADES, _ALIKE_SHARE * (max(known) - min(known))) if known else 0.0
    while True:
        deviation, index = max(_deviations(keep, heights), default=(0.0, 0))
        if deviation <= tolerance or _lines(keep | {index}, count) > _MOST_LINES:
            break
        keep.add(index)
    return list(_folded(rows, keep, heights, tolerance))


def _culprits(rows: Sequence[LayerProfile]) -> Iterator[int]:
    marked = [index for index, row in enumerate(rows) if row.mark][:_MARKED_SHOWN]
    yield from marked
    for index in marked:
        yield from (at for at in (index - 1, index + 1) if 0 <= at < len(rows))


def _turns(rows: Sequence[LayerProfile]) -> Iterator[int]:
    """Yield the rows at which a gradient begins or ceases to be there, to be zero, or to be finite."""
    for index, (above, below) in enumerate(itertools.pairwise(rows)):
        if size_words(above.delta_norm) != size_words(below.delta_norm):
            yield from (index, index + 1)


def _gaps(keep: set[int]) -> Iterator[tuple[int, int]]:
    """Yield neighbours among the kept rows that have hidden ones between them."""
    yield from ((a, b) for a, b in itertools.pairwise(sorted(keep)) if b > a + 1)


def _deviations(keep: set[int], heights: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Yield, per gap, how far the row furthest off the line lies from it (in decades), and which row that is."""
    for first, last in _gaps(keep):
        slope = (heights[last] - heights[first]) / (last - first)
        offs = [(abs(heights[at] - heights[first] - slope * (at - first)), -at) for at in range(first + 1, last)]
        known = [off for off in offs if not math.isnan(off[0])]
        if known:
            deviation, at = max(known)
            yield deviation, -at


def _lines(keep: set[int], count: int) -> int:
    """Return how many lines the table has: a gap of one row is shown, a longer one takes a line."""
    return len(keep) + len(list(_gaps({-1, *keep, count}))) - (0 if {0, count - 1} <= keep else 1)


def _folded(
    rows: Sequence[LayerProfile], keep: set[int], heights: Sequence[float], tolerance: float
) -> Iterator[LayerProfile | Fold]:
    previous = -1
    for index in sorted(keep):
        hidden = index - previous - 1
        if hidden == 1:
            yield rows[index - 1]
        elif hidden > 1:
            yield Fold(hidden, _alike(rows, previous, index, heights, tolerance))
        yield rows[index]
        previous = index


def _alike(rows: Sequence[LayerProfile], first: int, last: int, heights: Sequence[float], tolerance: float) -> bool:
    words = {size_words(row.delta_norm) for row in rows[first : last + 1]}
    if len(words) > 1:
        return False
    return words != {""} or next(_deviations({first, last}, heights))[0] <= tolerance


def caption(rows: Sequence[LayerProfile], *, theory: bool = True) -> str:
    """Return what the table shows, for who sees one for the first time.

    Args:
        rows: The rows of the table.
        theory: Whether it has columns for theory and for singular values.
    """
    text = "Gradient at each layer's output, input first"
    if any(gain_text(row.gain) for row in rows):
        text += "; gain: factor to the layer above"
    if theory and any(gain_text(row.predicted_gain) for row in rows):
        text += "; theory: what weights and slopes make of it"
    if theory and any(gain_text(row.sigma) for row in rows):
        text += "; sigma: largest singular value"
    return text


def size_text(delta: float) -> str:
    """Return the size of a gradient in digits, or in a short word."""
    if math.isnan(delta):
        return "none"
    if math.isinf(delta):
        return "NaN/inf"
    return "0" if delta == 0.0 else f"{delta:.1e}"


def size_words(delta: float) -> str:
    """Return what is said instead of a bar; empty where there is a size to draw."""
    if math.isnan(delta):
        return "none arrived"
    if math.isinf(delta):
        return "not finite"
    return "exactly zero" if delta == 0.0 else ""


def gain_text(gain: float) -> str:
    """Return the factor from this row's output to the previous row's; empty where unknown."""
    if math.isnan(gain):
        return ""
    if gain == 0.0 or math.isinf(gain):
        return "0" if gain == 0.0 else "inf"
    if 0.01 <= gain < 1000.0:
        return f"{gain:.2f}" if gain < 10.0 else f"{gain:.0f}"
    mantissa, exponent = f"{gain:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def active_text(fraction: float) -> str:
    """Return the share of active units; empty where it does not apply."""
    return "" if math.isnan(fraction) else share(fraction)
