"""The report as a self-contained piece of HTML, for notebooks and mails; readable on light and dark pages.

Everything is written inline, there are no scripts, and text takes the page's own colour. Bars are decoration: the
number stands beside each of them. Every text of the diagnosis is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from types import MappingProxyType

from gradguard.findings import Diagnosis, Finding, LayerProfile, Prescription, Severity
from gradguard.report._actions import action_texts
from gradguard.report._cures import trials, untried
from gradguard.report._format import number
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
from gradguard.report._printable import printable
from gradguard.report._spectra import SPECTRA_HEAD, proofs, spectra_caption, spectra_cells, spectra_shown
from gradguard.report._story import (
    SHOW_ALL,
    Illness,
    because,
    block_text,
    consequence_text,
    cost_items,
    headline,
    illnesses,
    jacobian_text,
    others_below,
    remarks,
    result_items,
    status,
    theory,
    title,
    unobserved_texts,
    where,
)
from gradguard.report._time import NOTHING_DRAWN, TIME_CAPTION, decades, profiles_to_show, time_items

__all__ = ["to_html"]

_BADGES = {True: "#2e7d32", False: "#c62828", None: "#8a5a00"}
"""White text on each of these has a contrast of at least 4.5 to 1. Source: WCAG 2.2, criterion 1.4.3."""

_BARS = {True: "#d9534f", False: "#3d85c6"}
"""Bars of marked and of other rows: at least 3 to 1 against white and against black. Source: WCAG 2.2, 1.4.11."""

_BOX = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.45;text-align:left;overflow-wrap:anywhere"
_CELL = "padding:1px 12px 1px 0;border:0;background:transparent;color:inherit;vertical-align:top;font-weight:normal"
_LEFT = f"{_CELL};text-align:left;white-space:nowrap"
_NAME = f"{_CELL};text-align:left;overflow-wrap:anywhere;min-width:8em"
_RIGHT = f"{_CELL};text-align:right;white-space:nowrap"
_TERM = "margin:0;padding:0;width:auto;float:none;font-weight:bold"
_TEXT = "margin:0;padding:0;width:auto;min-width:0"
_CODE = (
    "margin:2px 0 6px;padding:4px 8px;white-space:pre-wrap;color:inherit;background:rgba(127,127,127,.15);"
    "font-family:ui-monospace,monospace;font-size:13px"
)
_TABLE = "border-collapse:collapse;margin:4px 0;font-variant-numeric:tabular-nums"
_MUTED = "opacity:.8;margin:4px 0"

_CURES_EXPLAINED = 3

_NUMBERS: Mapping[str, Callable[[LayerProfile], str]] = MappingProxyType(
    {
        "gain": lambda row: gain_text(row.gain),
        "theory": lambda row: gain_text(row.predicted_gain),
        "sigma": lambda row: gain_text(row.sigma),
        "active": lambda row: active_text(row.active_fraction),
    }
)
"""Columns of numbers behind the bar; theory and sigma are there where they are known."""


def to_html(diagnosis: Diagnosis, *, show_all: bool = False) -> str:
    """Return a diagnosis as an HTML fragment: one ``section`` with inline styles and no scripts.

    Args:
        diagnosis: What to draw.
        show_all: Show every layer, all evidence, every name, and the code of every cure.
    """
    return "".join(_parts(printable(diagnosis), show_all=show_all))


def _text(text: str) -> str:
    """Return prose that is safe in HTML; a number keeps its per cent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _parts(diagnosis: Diagnosis, *, show_all: bool) -> Iterator[str]:
    summary, ill = diagnosis.summary, illnesses(diagnosis)
    yield f'<section lang="en" aria-label="{_text(title(summary))} report" style="{_BOX}">'
    colour = _BADGES[diagnosis.healthy]
    yield (
        f'<p style="border-left:5px solid {colour};padding:4px 12px;margin:0 0 8px">'
        f'<strong style="background:{colour};color:#fff;padding:1px 8px;border-radius:3px">'
        f"{_text(status(diagnosis))}</strong> {_text(diagnosis.verdict)}"
    )
    yield f"<br>{_text(others_below(ill))}</p>" if len(ill) > 1 else "</p>"
    for index, illness in enumerate(ill):
        yield from _illness(illness, diagnosis, say=index > 0, show_all=show_all)
    results = result_items(summary) if diagnosis.observations else []
    costs = cost_items(diagnosis)
    yield _paragraph(" · ".join(results))
    for text in action_texts(diagnosis):
        yield _paragraph(text)
    yield _paragraph(block_text(diagnosis, show_all=show_all))
    yield _paragraph(jacobian_text(diagnosis))
    for finding in remarks(diagnosis):
        yield f'<p style="margin:4px 0">{_head(finding, diagnosis)}<br>{_text(finding.message)}</p>'
    yield from _time(diagnosis, show_all=show_all)
    if diagnosis.healthy is False or show_all:
        yield from _table(rows_to_show(diagnosis.layers, show_all=show_all), show_all=show_all)
    yield from _spectra(diagnosis, show_all=show_all)
    yield _paragraph(" · ".join(costs), _MUTED)
    for text in unobserved_texts(diagnosis):
        yield _paragraph(text, _MUTED)
    yield "</section>"


def _paragraph(text: str, style: str = "margin:4px 0") -> str:
    return f'<p style="{style}">{_text(text)}</p>' if text else ""


def _head(finding: Finding, diagnosis: Diagnosis) -> str:
    behind = "".join(f" · {_text(text)}" for text in headline(finding, diagnosis.summary))
    return f"<strong>{_text(f'{finding.code} {finding.name}')}</strong>{behind}"


def _illness(illness: Illness, diagnosis: Diagnosis, *, say: bool, show_all: bool) -> Iterator[str]:
    finding = illness.finding
    colour = _BADGES[False] if finding.severity >= Severity.ERROR else _BADGES[None]
    yield (
        f'<div role="heading" aria-level="4" style="border-bottom:1px solid {colour};margin:10px 0 4px">'
        f"{_head(finding, diagnosis)}</div>"
        '<dl style="display:grid;grid-template-columns:6em 1fr;gap:1px 8px;margin:0 0 8px">'
    )
    cause, evidence = because(finding, show_all=show_all)
    following = [consequence_text(other, finding, diagnosis.summary) for other in illness.consequences]
    yield _entry("what", finding.message if say else "")
    yield _entry("where", where(finding, show_all=show_all))
    yield _entry("because", f"{cause}: {evidence}" if evidence else cause)
    yield _entry("theory", theory(finding))
    yield _entry("ruled out", " · ".join(f"{item.cause.value} ({item.reason})" for item in finding.ruled_out))
    yield _term("follows", "<br>".join(_text(text) for text in following))
    yield _term("cures", "".join(_cures(finding, show_all=show_all)))
    yield _term("read", f"<code>gradguard explain {_text(finding.code)}</code>")
    yield "</dl>"


def _entry(label: str, text: str) -> str:
    return _term(label, _text(text))


def _term(label: str, content: str) -> str:
    """Return one pair of a definition list, nothing where there is nothing to say."""
    return f'<dt style="{_TERM}">{label}</dt><dd style="{_TEXT}">{content}</dd>' if content else ""


def _cures(finding: Finding, *, show_all: bool) -> Iterator[str]:
    tried, rest = trials(finding), untried(finding)
    if tried is not None:
        yield f'<table style="{_TABLE}"><caption style="{_LEFT};caption-side:top">{_text(tried.head)}</caption>'
        yield f"<thead>{_header(('', 'cure', 'loss', 'effect'), right=(2,))}</thead><tbody>"
        for item in tried.cures:
            cells = (item.rank, item.cure.remedy, item.loss, item.note)
            yield _table_row(cells, right=(2,), bold=item.note == "best")
        yield "</tbody></table>"
        if tried.best is not None:
            yield f"<div>{_text(tried.best.remedy)}: {_text(tried.best.reason)}</div>{_code(tried.best)}"
    if not rest:
        return
    explained = rest if show_all else rest[: _CURES_EXPLAINED if tried is None else 0]
    if explained:
        yield "<div>untried, best first</div>"
    for index, cure in enumerate(explained):
        yield f"<div>{index + 1} <strong>{_text(cure.remedy)}</strong>: {_text(cure.reason)}</div>"
        if index == 0 or show_all:
            yield f"<div>Expected: {_text(cure.expected)}</div>" if cure.expected else ""
            yield _code(cure)
        if show_all and cure.reference:
            yield f'<div style="{_MUTED}">{_text(cure.reference)}</div>'
    names = ", ".join(cure.remedy for cure in rest[len(explained) :])
    if names:
        before = f"and {len(rest) - len(explained)} more" if explained else "untried"
        yield f"<div>{before}: {_text(names)} ({SHOW_ALL})</div>"


def _code(cure: Prescription) -> str:
    return f'<pre style="{_CODE}">{escape(cure.code)}</pre>' if cure.code else ""


def _table(rows: Sequence[LayerProfile], *, show_all: bool) -> Iterator[str]:
    if not rows:
        return
    scale = Scale.of(rows)
    drawn = f"log scale, {scale.ends[0]} to {scale.ends[1]}" if scale is not None else ""
    marked = any(row.mark for row in rows)
    numbers = [name for name, cell in _NUMBERS.items() if name in {"gain", "active"} or any(cell(row) for row in rows)]
    labels = [*("layer", "kind", "|dL/dy|", drawn), *numbers, *(["finding"] if marked else [])]
    yield f'<table style="{_TABLE}"><caption style="{_LEFT};caption-side:top">{_text(caption(rows))}</caption><thead>'
    yield _header(labels, right=(2, *range(4, 4 + len(numbers))))
    yield "</thead><tbody>"
    for row in fold_rows(rows, show_all=show_all):
        if isinstance(row, Fold):
            text = f"... {row.text} ({SHOW_ALL}) ..."
            cell = f'<td colspan="{len(labels)}" style="{_LEFT};opacity:.8">{text}</td>'
            yield f'<tr style="background:transparent">{cell}</tr>'
        else:
            yield _row(row, scale, numbers, marked=marked)
    yield "</tbody></table>"


def _spectra(diagnosis: Diagnosis, *, show_all: bool) -> Iterator[str]:
    rows, hidden = spectra_shown(diagnosis.spectra, show_all=show_all)
    if not rows:
        return
    caption_style = f"{_LEFT};caption-side:top;white-space:normal"
    yield f'<table style="{_TABLE}"><caption style="{caption_style}">{_text(spectra_caption(rows))}</caption><thead>'
    yield _header(SPECTRA_HEAD, right=(2, 3, 4, 5))
    yield "</thead><tbody>"
    for row in rows:
        yield _table_row(spectra_cells(row), right=(2, 3, 4, 5), bold=False)
    yield "</tbody></table>"
    yield _paragraph(f"{hidden} more, with smaller sigma ({SHOW_ALL})" if hidden else "", _MUTED)
    for text in proofs(diagnosis.spectra):
        yield _paragraph(text)


def _time(diagnosis: Diagnosis, *, show_all: bool) -> Iterator[str]:
    """Yield the gradient through time; the curve is decoration, its numbers stand beside it."""
    shown, hidden = profiles_to_show(diagnosis, show_all=show_all)
    if shown:
        yield _paragraph(TIME_CAPTION, _MUTED)
    for profile in shown:
        items = [profile.kind, *([profile.mark] if profile.mark else []), *time_items(profile)]
        yield f'<div style="margin:4px 0"><strong>{_text(profile.name or "(model)")}</strong> · '
        yield f"{_text(' · '.join(items))}</div>"
        distances, logs = decades(profile)
        scale = Scale.over(logs)
        if scale is None:
            yield _paragraph(NOTHING_DRAWN)
            continue
        far, high, low = float(profile.distance[-1]) or 1.0, scale.high, scale.low
        points = " ".join(
            f"{400.0 * distance / far:.1f},{60.0 * (high - value) / (high - low):.1f}"
            for distance, value in zip(distances, logs, strict=True)
        )
        yield (
            '<svg aria-hidden="true" width="404" height="64" viewBox="-2 -2 404 64">'
            f'<polyline fill="none" stroke-width="2" stroke="{_BARS[bool(profile.mark)]}" points="{points}"></polyline>'
            "</svg>"
        )
        ends = f"{scale.ends[0]} to {scale.ends[1]}, 0 to {number(far)} time steps back"
        yield _paragraph(ends, _MUTED)
    yield _paragraph(f"and {hidden} more ({SHOW_ALL})" if hidden else "", _MUTED)


def _header(labels: Sequence[str], *, right: Sequence[int]) -> str:
    cells = (
        f'<th scope="col" style="{_RIGHT if index in right else _LEFT};font-weight:bold">{_text(label)}</th>'
        for index, label in enumerate(labels)
    )
    return f'<tr style="background:transparent">{"".join(cells)}</tr>'


def _table_row(cells: Sequence[str], *, right: Sequence[int], bold: bool) -> str:
    weight = ";font-weight:bold" if bold else ""
    drawn = (
        f'<td style="{_RIGHT if index in right else _LEFT}{weight}">{_text(text)}</td>'
        for index, text in enumerate(cells)
    )
    return f'<tr style="background:transparent">{"".join(drawn)}</tr>'


def _row(row: LayerProfile, scale: Scale | None, numbers: Sequence[str], *, marked: bool) -> str:
    bar = size_words(row.delta_norm)
    if not bar and scale is not None:
        share = max(0.5, 100.0 * scale.share(row.delta_norm))
        colour = _BARS[bool(row.mark)]
        drawn = f"background:{colour};height:.8em;margin-top:.3em;width:{share:.1f}%"
        bar = f'<div aria-hidden="true" style="{drawn}"></div>'
    bold = ";font-weight:bold" if row.mark else ""
    mark = f'<td style="{_LEFT}{bold}">{_text(row.mark)}</td>' if marked else ""
    drawn = "".join(f'<td style="{_RIGHT}">{_NUMBERS[name](row)}</td>' for name in numbers)
    return (
        '<tr style="background:transparent">'
        f'<th scope="row" style="{_NAME}{bold}">{_text(row.name or "(model)")}</th>'
        f'<td style="{_LEFT}">{_text(row.kind)}</td><td style="{_RIGHT}">{size_text(row.delta_norm)}</td>'
        f'<td style="{_LEFT};min-width:16em">{bar}</td>{drawn}{mark}</tr>'
    )
