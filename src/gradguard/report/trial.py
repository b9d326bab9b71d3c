"""The outcome of a trial on a console: what was tried, what came of it, what to apply, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderableType
from rich.text import Text

from gradguard.outcomes import TrialResult, TrialRun
from gradguard.report._format import measured, seconds, share
from gradguard.report._lines import hang, join, pad, wrap

__all__ = ["render_trial"]

_NAME_MOST = 34
"""Columns that a name takes at most. Ours: the longest of our remedies has 25."""

_APPLY = "gradguard.apply(result.best, model, optimizer=optimizer)"
"""How to take the winner."""

_FIXED = 12
"""Columns of the table beside name, loss and outcome."""

_LEAST_OUTCOME = 24
"""Columns that an outcome needs beside the numbers; with fewer it goes below. Ours: a few words per line."""

_STYLES = {"best": "bold green", "helps": "green", "diverged": "red", "worse": "red"}


def render_trial(result: TrialResult, options: ConsoleOptions, *, apply: str = _APPLY) -> Iterator[RenderableType]:
    """Yield the lines of a trial's table, top to bottom.

    Args:
        result: What to draw.
        options: Width of the console.
        apply: Code that takes the winner; by default for who has the result at hand.
    """
    width = max(40, options.max_width)
    yield join(wrap(Text(headline(result), "bold"), width))
    rows = [result.control, *result.runs]
    if len(rows) > 1:
        yield join(list(_table(rows, width)))
    if result.best is not None:
        lines = apply.split("\n")
        yield join([part for line in lines for part in hang(wrap(Text(line), width - 3), "   ", 3)])
    yield join(wrap(Text(_cost(result), "dim"), width))


def headline(result: TrialResult) -> str:
    """Return the outcome in one sentence."""
    if result.best is not None and result.best.effect is not None:
        effect = result.best.effect
        return (
            f"{result.best.remedy}: loss {measured(effect.loss_before)} > {measured(effect.loss_after)} in "
            f"{effect.steps} steps. {result.best.reason}"
        )
    return result.note or "Nothing that was tried helps."


def _table(rows: list[TrialRun], width: int) -> Iterator[Text]:
    names = [row.remedy or "untreated" for row in rows]
    losses = [measured(row.loss) if math.isfinite(row.loss) else "-" for row in rows]
    name_width = min(_NAME_MOST, max(cell_len(name) for name in names))
    loss_width = max(4, *(cell_len(loss) for loss in losses))
    narrow = width - name_width - loss_width - _FIXED < _LEAST_OUTCOME
    head = Text(f" {'cure':<{name_width}}  {'loss':>{loss_width}}  {'steps':>5}", "bold")
    yield head if narrow else Text.assemble(head, ("  outcome", "bold"))
    for row, name, loss in zip(rows, names, losses, strict=True):
        steps = f"{row.steps}x{row.seeds}" if row.seeds > 1 else str(row.steps)
        left = Text.assemble(
            " ", pad(Text(name), name_width), "  ", pad(Text(loss), loss_width, right=True), f"  {steps:>5}  "
        )
        ill = "; a check still finds something" if row.healthy is False and row.outcome in {"best", "helps"} else ""
        told = f"{row.outcome}{f': {row.why}' if row.why else ''}{ill}"
        indent = cell_len(left.plain)
        if narrow:
            yield Text(left.plain.rstrip())
            left, indent = Text("   "), 3
        yield from hang(wrap(Text(told, _STYLES.get(row.outcome, "")), max(10, width - indent)), left, indent)


def _cost(result: TrialResult) -> str:
    items = [f"{result.cost_steps} steps on copies in {seconds(result.cost_s)}"]
    if result.run_steps:
        items.append(f"{share(result.share)} of a run of {result.run_steps} steps")
    if result.interrupted:
        items.append("interrupted: what had been measured by then")
    if result.note and result.best is not None:
        items.append(result.note)
    return " · ".join(items)
