"""The gradient through time on a terminal: one small chart per recurrent module, on a log scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from gradguard.findings import Diagnosis
from gradguard.profiles import TimeProfile
from gradguard.report._format import measured, number
from gradguard.report._layers import Scale
from gradguard.report._lines import elide, flow, hang, pad, wrap
from gradguard.report._story import SHOW_ALL

__all__ = ["NOTHING_DRAWN", "TIME_CAPTION", "decades", "profiles_to_show", "time_charts", "time_items"]

TIME_CAPTION = "Gradient on its way back through time, from the last output read; log scale"

NOTHING_DRAWN = "nothing to draw: no finite gradient came through"

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN = " ..::::##"
"""Without block characters: what a cell filled by so many eighths looks like."""

_ROWS = 4
"""Lines of a chart. Ours: 32 levels show a slope and a bend, and heading and axis included it takes six lines."""

_SHOWN = 3
"""Charts shown unless everything is. Ours."""

_SPARK = 24
"""Columns of the line drawn under a mere note, at most. Ours: who is well is told so in a few lines."""

_LEAST_WIDTH = 12
"""Columns of the narrowest chart."""

_GONE = 1e-38
"""What float32 cannot hold is not drawn but said. Source: records.TemporalProfile is computed in float32."""


def profiles_to_show(diagnosis: Diagnosis, *, show_all: bool) -> tuple[list[TimeProfile], int]:
    """Return the modules whose time profile is drawn, and how many are left out.

    Args:
        diagnosis: What is drawn. Modules with a standing GG111 or GG112 are shown in every report.
        show_all: Whether to show every recurrent module.
    """
    shown = [item for item in diagnosis.time_profiles if item.mark or show_all]
    return (shown, 0) if show_all else (shown[:_SHOWN], len(shown[_SHOWN:]))


def time_items(profile: TimeProfile) -> list[str]:
    """Return a module's numbers in words; unknown ones are left out."""
    items = []
    if math.isfinite(profile.factor):
        items.append(f"factor {number(profile.factor)} per step back")
    if math.isfinite(profile.span):
        items.append(f"{profile.span:+.1f} decades over {profile.steps} steps")
    if math.isfinite(profile.horizon):
        items.append(f"memory horizon {measured(profile.horizon, 2)} steps (a tenth is left)")
    elif math.isinf(profile.horizon):
        items.append(f"memory horizon beyond {profile.steps} steps")
    if math.isfinite(profile.gate):
        items.append(f"{profile.gate_name or 'gate'} {measured(profile.gate, 2)} on average")
    if profile.memory and profile.memory[-1] <= _GONE:
        last = max((at for at, value in zip(profile.distance, profile.memory, strict=True) if value > _GONE), default=0)
        items.append(f"nothing left that float32 can hold beyond {number(last)} steps")
    return items


def time_charts(diagnosis: Diagnosis, width: int, *, ascii_only: bool, separator: str, show_all: bool) -> list[Text]:
    """Return the lines of the charts, none where there is nothing to show.

    Args:
        diagnosis: What is drawn.
        width: Columns of the terminal. A wider one gets wider charts, not more words.
        ascii_only: Whether the terminal has no block characters.
        separator: Stands between items of a line.
        show_all: Whether to show every recurrent module.
    """
    shown, hidden = profiles_to_show(diagnosis, show_all=show_all)
    if not shown:
        return []
    if diagnosis.healthy is not False and not show_all:
        return [line for profile in shown for line in _spark(profile, width, ascii_only=ascii_only)]
    lines = [Text(line.plain, "dim") for line in wrap(TIME_CAPTION, width)]
    for profile in shown:
        lines += _heading(profile, width, separator)
        lines += _chart(profile, width, ascii_only=ascii_only)
    if hidden:
        lines += [Text(line.plain, "dim") for line in wrap(f"and {hidden} more ({SHOW_ALL})", width)]
    return lines


def _heading(profile: TimeProfile, width: int, separator: str) -> list[Text]:
    name = Text(elide(profile.name or "(model)", max(5, width // 2)), "bold red" if profile.mark else "bold")
    head = [Text(part) for part in (profile.kind, profile.mark) if part]
    return hang(flow([name, *head, *time_items(profile)], max(1, width - 2), separator), "", 2)


def decades(profile: TimeProfile) -> tuple[list[float], list[float]]:
    """Return distances and log10 of the gradient where it can be drawn: finite, and large enough for float32."""
    pairs = zip(profile.distance, profile.memory, strict=True)
    drawn = [(distance, math.log10(value)) for distance, value in pairs if _GONE < value < math.inf]
    return [distance for distance, _ in drawn], [value for _, value in drawn]


def _spark(profile: TimeProfile, width: int, *, ascii_only: bool) -> list[Text]:
    """Return a profile in one line, and what it spans in words."""
    distances, logs = decades(profile)
    scale = Scale.over(logs)
    if scale is None:
        return wrap(f"{profile.name or '(model)'}: {NOTHING_DRAWN}", width)
    name = elide(profile.name or "(model)", max(5, width // 4))
    columns = max(1, min(_SPARK, width - cell_len(name) - 2))
    signs = _PLAIN if ascii_only else _BLOCKS
    heights = _heights(distances, logs, float(profile.distance[-1]), scale, columns, rows=1)
    drawn = Text.assemble(name, "  ", ("".join(signs[height] for height in heights), "cyan"))
    drawn.rstrip()
    size = f"1e{round(logs[0])} to 1e{round(logs[-1])}"
    return flow([drawn, f"{size} over {number(distances[-1])} time steps back"], width, "  ")


def _chart(profile: TimeProfile, width: int, *, ascii_only: bool) -> list[Text]:
    distances, logs = decades(profile)
    scale = Scale.over(logs)
    if scale is None:
        return hang(wrap(Text(NOTHING_DRAWN, "bold yellow"), max(1, width - 2)), "  ", 2)
    low, high = scale.ends
    label = max(len(low), len(high))
    columns = max(_LEAST_WIDTH, width - label - 3)
    signs = _PLAIN if ascii_only else _BLOCKS
    heights = _heights(distances, logs, float(profile.distance[-1]), scale, columns)
    lines = []
    for row in range(_ROWS):
        name = high if row == 0 else low if row == _ROWS - 1 else ""
        below = 8 * (_ROWS - 1 - row)
        cells = "".join(signs[min(8, max(0, height - below))] for height in heights)
        line = Text.assemble("  ", pad(name, label, right=True), " ", (cells, "red" if profile.mark else "cyan"))
        line.rstrip()
        lines.append(line)
    lines.append(Text(" " * (label + 3) + _axis(number(profile.distance[-1]), columns), "dim"))
    return lines


def _heights(
    distances: Sequence[float], logs: Sequence[float], farthest: float, scale: Scale, columns: int, *, rows: int = _ROWS
) -> list[int]:
    """Return the height of each column in eighths of a line; what is too small to be drawn has none."""
    at = np.linspace(0.0, farthest, columns)
    values = np.interp(at, distances, logs)
    shares = (values - scale.low) / (scale.high - scale.low)
    heights = np.clip(np.rint(shares * 8 * rows), 1, 8 * rows)
    return [int(height) for height in np.where((at >= distances[0]) & (at <= distances[-1]), heights, 0)]


def _axis(last: str, columns: int) -> str:
    """Return the labels below a chart: 0, what is counted, and the farthest step, as far as there is room."""
    middle = next((text for text in ("time steps back", "back") if cell_len(text) + len(last) + 5 <= columns), "")
    return f"0{middle.center(max(1, columns - 1 - len(last)))}{last}"
