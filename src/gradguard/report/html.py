"""The report as a self-contained piece of HTML, for notebooks and mails; readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from gradguard.findings import Diagnosis, Finding, LayerProfile
from gradguard.report._format import (
    evidence_text,
    footer_lines,
    illnesses,
    number,
    remarks,
    status,
    summary_line,
    when,
    where,
)
from gradguard.report._layers import Fold, Scale, fold_rows

__all__ = ["to_html"]

_COLOURS = {True: "#2e7d32", False: "#c62828", None: "#b26a00"}
_CELL = "padding:1px 10px 1px 0;text-align:left;border:0;background:none;color:inherit"
_RIGHT = _CELL.replace("left", "right")


def to_html(diagnosis: Diagnosis, *, show_all: bool = False) -> str:
    """Return a diagnosis as an HTML fragment with inline styles and no scripts.

    Args:
        diagnosis: What to draw. Every text in it is escaped.
        show_all: Show every layer.
    """
    return "".join(_parts(diagnosis, show_all=show_all))


def _parts(diagnosis: Diagnosis, *, show_all: bool) -> Iterator[str]:
    colour = _COLOURS[diagnosis.healthy]
    yield '<div style="font-family:system-ui,sans-serif;font-size:14px;line-height:1.45;max-width:60em">'
    yield (
        f'<div role="status" style="border-left:5px solid {colour};padding:6px 12px;margin-bottom:8px">'
        f'<strong style="color:{colour}">{escape(status(diagnosis))}</strong> {escape(diagnosis.verdict)}</div>'
    )
    for index, finding in enumerate(illnesses(diagnosis)):
        yield from _finding(finding, diagnosis, say=index > 0)
    line = summary_line(diagnosis.summary)
    if line and diagnosis.observations:
        yield f"<p>{escape(line)}</p>"
    for finding in remarks(diagnosis):
        note = " · ".join(part for part in (finding.optimizer, when(finding, diagnosis.summary)) if part)
        title = escape(f"{finding.code} {finding.name}")
        yield f"<p><strong>{title}</strong> {escape(note)} {escape(finding.message)}</p>"
    if diagnosis.healthy is False or show_all:
        yield from _table(diagnosis, show_all=show_all)
    for line in footer_lines(diagnosis):
        yield f'<p style="opacity:.75;margin:4px 0">{escape(line)}</p>'
    yield "</div>"


def _finding(finding: Finding, diagnosis: Diagnosis, *, say: bool) -> Iterator[str]:
    head = [
        finding.severity.name,
        finding.optimizer,
        when(finding, diagnosis.summary),
        f"sure {finding.confidence:.2f}",
    ]
    yield (
        f"<h4 style='margin:10px 0 2px'>{escape(f'{finding.code} {finding.name}')} "
        f"<span style='font-weight:normal'>{escape(' · '.join(part for part in head if part))}</span></h4>"
        "<dl style='display:grid;grid-template-columns:6em 1fr;margin:0 0 8px'>"
    )
    rows = [("what", finding.message)] if say else []
    evidence = "; ".join(evidence_text(name, item) for name, item in finding.evidence.items())
    rows += [
        ("where", where(finding)),
        ("because", f"{finding.cause.value}: {evidence}" if evidence else finding.cause),
    ]
    if finding.ruled_out:
        rows.append(("ruled out", " · ".join(f"{item.cause.value} ({item.reason})" for item in finding.ruled_out)))
    rows += [
        ("follows", f"{other.code} {other.name}: {other.message}")
        for other in diagnosis.findings
        if other.standing and other.consequence_of == finding.code and other.optimizer == finding.optimizer
    ]
    for label, text in rows:
        yield f"<dt><strong>{escape(label)}</strong></dt><dd style='margin:0'>{escape(text)}</dd>"
    for index, cure in enumerate(finding.prescriptions[:3]):
        effect = (
            "untried"
            if cure.effect is None
            else f"loss {number(cure.effect.loss_before)} > {number(cure.effect.loss_after)}"
        )
        code = f"<pre style='margin:2px 0 6px;white-space:pre-wrap'>{escape(cure.code)}</pre>" if cure.code else ""
        yield (
            f"<dt><strong>{'cures' if index == 0 else ''}</strong></dt><dd style='margin:0'>"
            f"{index + 1} {escape(cure.remedy)} ({escape(effect)}). {escape(cure.reason)}{code}</dd>"
        )
    yield "</dl>"


def _table(diagnosis: Diagnosis, *, show_all: bool) -> Iterator[str]:
    shown = [row for row in diagnosis.layers if show_all or row.trunk or row.mark]
    scale = Scale.of(shown)
    if not shown:
        return
    title = f" 1e{scale.low} to 1e{scale.high}" if scale else ""
    yield "<table style='border-collapse:collapse;font-variant-numeric:tabular-nums'><thead><tr>"
    for label, style in (
        ("layer", _CELL),
        ("kind", _CELL),
        ("|dL/dy|", _RIGHT),
        (f"log scale{title}", _CELL),
        ("gain", _RIGHT),
        ("active", _RIGHT),
        ("finding", _CELL),
    ):
        yield f"<th scope='col' style='{style}'>{escape(label)}</th>"
    yield "</tr></thead><tbody>"
    for row in fold_rows(shown, show_all=show_all):
        if isinstance(row, Fold):
            alike = ", all alike" if row.alike else ""
            yield f"<tr><td colspan='7' style='{_CELL}'>... {row.count} more{alike} ...</td></tr>"
        else:
            yield _row(row, scale)
    yield "</tbody></table>"


def _row(row: LayerProfile, scale: Scale | None) -> str:
    if math.isnan(row.delta_norm):
        size, bar = "none", "no gradient arrived"
    elif row.delta_norm == 0.0:
        size, bar = "0", "exactly zero"
    elif math.isinf(row.delta_norm) or scale is None:
        size, bar = "not finite", "NaN or infinite"
    else:
        size = f"{row.delta_norm:.1e}"
        colour = "#c62828" if row.mark else "#1976d2"
        share = max(1.0, 100 * scale.share(row.delta_norm))
        bar = f"<div aria-hidden='true' style='background:{colour};height:.8em;width:{share:.1f}%'></div>"
    gain = f"{row.gain:.2g}" if 0.0 < row.gain < math.inf else ""
    active = "" if math.isnan(row.active_fraction) else f"{100 * row.active_fraction:.0f} %"
    return (
        f"<tr><td style='{_CELL}'>{escape(row.name)}</td><td style='{_CELL}'>{escape(row.kind)}</td>"
        f"<td style='{_RIGHT}'>{size}</td><td style='{_CELL};min-width:14em'>{bar}</td>"
        f"<td style='{_RIGHT}'>{gain}</td><td style='{_RIGHT}'>{active}</td>"
        f"<td style='{_CELL}'>{escape(row.mark)}</td></tr>"
    )
