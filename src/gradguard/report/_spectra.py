"""The spectra of a report in depth: what each matrix can do to a vector, and what that proves of a recurrent net."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

from gradguard.findings import MatrixSpectrum
from gradguard.report._format import measured
from gradguard.report._lines import elide, pad, wrap
from gradguard.report._story import SHOW_ALL

__all__ = ["SPECTRA_HEAD", "proofs", "spectra_caption", "spectra_cells", "spectra_lines", "spectra_shown"]

_MOST_ROWS = 24
"""Matrices shown unless all are asked for: those with the largest singular values. Ours: a screen."""

_NAME_LEAST = 12

SPECTRA_HEAD = ("matrix", "shape", "sigma", "radius", "stable rank", "condition")


def spectra_caption(spectra: Sequence[MatrixSpectrum]) -> str:
    """Return what the table shows, for who sees one for the first time."""
    text = "Spectra of the weights now; sigma: largest singular value, the most a vector can be stretched by"
    if any(not math.isnan(row.spectral_radius) for row in spectra):
        text += "; radius: largest absolute eigenvalue, what many time steps do"
    rough = [row for row in spectra if not row.certified]
    return f"{text}; ~ was not found to 0.1 %" if rough else text


def spectra_shown(spectra: Sequence[MatrixSpectrum], *, show_all: bool) -> tuple[list[MatrixSpectrum], int]:
    """Return the rows to show, in the model's order, and how many are left out."""
    if show_all or len(spectra) <= _MOST_ROWS:
        return list(spectra), 0
    kept = sorted(range(len(spectra)), key=lambda index: -spectra[index].sigma_max)[:_MOST_ROWS]
    return [spectra[index] for index in sorted(kept)], len(spectra) - _MOST_ROWS


def spectra_cells(row: MatrixSpectrum) -> tuple[str, ...]:
    """Return the cells of one row, in the order of :data:`SPECTRA_HEAD`; empty ones where a number does not apply."""
    rough = "" if row.certified else "~"
    shape = "x".join(map(str, row.shape))
    if row.input_size:
        shape += f" on {'x'.join(map(str, row.input_size))}"
    return (
        row.name,
        shape,
        rough + measured(row.sigma_max),
        "" if math.isnan(row.spectral_radius) else rough + measured(row.spectral_radius),
        "" if math.isnan(row.stable_rank) else measured(row.stable_rank, 2),
        _power(row.condition),
    )


def proofs(spectra: Sequence[MatrixSpectrum]) -> Iterator[str]:
    """Yield what the norms of recurrent matrices prove.

    Source: Pascanu, Mikolov, Bengio (2013), arXiv 1211.5063, section 2.1.
    """
    layers = dict.fromkeys(row.layer for row in spectra if not math.isnan(row.derivative_bound))
    for layer in layers:
        rows = [row for row in spectra if row.layer == layer and not math.isnan(row.derivative_bound)]
        name = layer or "the model"
        if len(rows) == 1 or all(row.derivative_bound == 1.0 for row in rows):
            bound = max(row.sigma_max * row.derivative_bound for row in rows)
            if bound < 1.0:
                yield f"{name}: sigma is below 1, so the gradient vanishes through time for every input"
            else:
                yield f"{name}: sigma is above 1, which exploding needs and does not follow from; the radius is typical"
        else:
            wide = [row for row in rows if row.sigma_max * row.derivative_bound > 1.0]
            parts = ", ".join(row.name.partition("[")[2].rstrip("]") for row in wide)
            yield (
                f"{name}: gates decide what is forgotten; sigma times the largest derivative of its nonlinearity is "
                + (f"above 1 in {parts}, without which nothing explodes" if wide else "below 1 in every gate")
            )


def spectra_lines(spectra: Sequence[MatrixSpectrum], width: int, *, empty: str, show_all: bool) -> list[Text]:
    """Return the lines of the table on a terminal, none without spectra.

    Args:
        spectra: What was measured.
        width: Columns of the terminal; columns that have no room are left out, the last ones first.
        empty: What stands where a number does not apply.
        show_all: Whether to show every matrix.
    """
    if not spectra:
        return []
    shown, hidden = spectra_shown(spectra, show_all=show_all)
    table = [SPECTRA_HEAD, *(tuple(cell or empty for cell in spectra_cells(row)) for row in shown)]
    columns = [column for column in range(len(SPECTRA_HEAD)) if any(row[column] != empty for row in table[1:])]
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(SPECTRA_HEAD))]
    while len(columns) > 3 and _NAME_LEAST + sum(widths[column] + 2 for column in columns[1:]) > width:
        columns.pop()
    rest = sum(widths[column] + 2 for column in columns[1:])
    name = max(5, min(widths[0], width - rest))
    lines = [Text(line.plain, "dim") for line in wrap(spectra_caption(shown), width)]
    for number, row in enumerate(table):
        cells = [pad(Text(elide(row[0], name)), name)]
        cells += [pad(Text(row[column]), widths[column], right=column > 1) for column in columns[1:]]
        line = Text("  ").join(cells)
        line.rstrip()
        lines.append(Text(line.plain, "bold") if number == 0 else line)
    if hidden:
        lines.append(Text(f"... {hidden} more, with smaller sigma ({SHOW_ALL}) ...", "dim"))
    return [*lines, *(line for text in proofs(spectra) for line in wrap(text, width))]


def _power(value: float) -> str:
    """Return a condition number as a power of ten."""
    if math.isnan(value):
        return ""
    return "singular" if math.isinf(value) else f"10^{math.log10(value):.1f}"
