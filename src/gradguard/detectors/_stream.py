"""The stream of a model that is stacked from blocks: the gradient at the inputs of blocks, branches left out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradguard.detectors._depth import TRUNK_ROLES, supported_spans
from gradguard.records import FloatArray, LayerTable

__all__ = ["Stream", "stream_of", "stream_spans"]


_FEWEST_TAPS = 3
"""Blocks whose input has a gradient from which there is a stream. Ours: of four, the first may be given raw data."""


_SUPPORT = 0.75
"""Share of a span that must be left without one of its ends. Ours: a steady change over six points leaves 0.8 of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Gradient norms along the stream, one column per point, in execution order.

    Attributes:
        values: L2 norms, shape ``[observations, points]``; NaN where unknown.
        rows: Row of the layer table that each point belongs to; for a block the first one that runs in it.
        blocks: Name of the block whose input a point is, empty for points outside of blocks.
    """

    values: FloatArray
    rows: tuple[int, ...]
    blocks: tuple[str, ...]

    def live(self) -> NDArray[np.intp]:
        """Return how many points had a finite gradient above 0, per observation."""
        return np.asarray((np.isfinite(self.values) & (self.values > 0.0)).sum(axis=1), dtype=np.intp)


def stream_of(
    table: LayerTable, taps: FloatArray, delta: FloatArray, given: FloatArray, *, minimum: int = 6
) -> Stream | None:
    """Return the points between which a stacked model's gradient is compared; ``None`` with too few blocks.

    Every block whose input has a gradient is a point; the layers inside it are none, whatever their branches do. Layers
    outside of such blocks count by themselves, at their outputs, where ``minimum`` or more with weights follow one
    another: a plain net before, between or after the blocks has a depth of its own. Fewer are looked at where the
    stream enters them, at their inputs, once it has passed a block. Few layers before the first block are left out: an
    embedding of patches that is joined by a class token gets a small part of the stream's gradient, and learns.

    Args:
        table: The rows.
        taps: Gradient at the inputs of blocks, shape ``[observations, rows]``; NaN in rows that begin no block.
        delta: Gradient at outputs, same shape.
        given: Gradient at inputs, same shape.
        minimum: Layers with weights in a row from which they have a depth of their own.

    Source: ours; over the practice half of benchmarks/clinic the largest healthy span is 1.7 decades by the inputs of
        blocks, 3.8 by the outputs of all layers.
    """
    begins = np.flatnonzero(~np.isnan(taps).all(axis=0))
    tapped = {table.blocks[row] for row in begins} - {""}
    if len(tapped) < _FEWEST_TAPS:
        return None
    known = np.asarray(~np.isnan(delta).all(axis=0), dtype=np.bool_)
    rows = [
        row
        for row, role in enumerate(table.roles)
        if table.blocks[row] in tapped or (role in TRUNK_ROLES and known[row])
    ]
    points: list[tuple[int, str, FloatArray]] = []
    for inside, group in itertools.groupby(rows, key=lambda row: table.blocks[row] in tapped):
        members = list(group)
        if inside:
            points += [(row, table.blocks[row], taps[:, row]) for row in members if row in begins]
            continue
        weights = sum(table.roles[row] != "norm" for row in members)
        if weights >= minimum:
            points += [(row, "", delta[:, row]) for row in members]
        elif points:
            points += [(row, "", given[:, row]) for row in members]
    found, blocks, columns = zip(*points, strict=True)
    return Stream(values=np.stack(columns, axis=1), rows=found, blocks=blocks)


def stream_spans(stream: Stream, *, minimum: int = 6) -> FloatArray:
    """Return the supported span of each observation, shape ``[observations]``; NaN below ``minimum`` live points.

    Where the blocks form several stacks of ``minimum`` or more (an encoder's and a decoder's), each is measured by
    itself as well: gradients may enter one of them from the side, past the layers that lose it. The largest span
    counts.

    Args:
        stream: Of a run.
        minimum: Live points, and blocks of a stack, from which there is a depth to speak of.
    """
    spans = _beyond_its_ends(stream.values, minimum)
    stacks = [block.rpartition(".")[0] for block in stream.blocks]
    deep = [name for name in dict.fromkeys(stacks) if name in _deep(stream, stacks, minimum)]
    for name in deep if len(deep) > 1 else ():
        columns = [index for index, stack in enumerate(stacks) if stack == name and stream.blocks[index]]
        own = _beyond_its_ends(stream.values[:, columns], minimum)
        spans = np.where(np.abs(own) > np.abs(spans), own, spans)
    return np.where(stream.live() >= minimum, spans, np.nan)


def _beyond_its_ends(values: FloatArray, minimum: int) -> FloatArray:
    """Return the supported spans, or what is left of each without its first or its last point, where that is far less.

    A single point is no depth: a class token of zeros is enlarged a thousandfold by the first normalization, and the
    input of a classifier may lie far above a stream that has grown.
    """
    spans = supported_spans(values, minimum_layers=minimum)
    for shorter in (values[:, 1:], values[:, :-1]):
        rest = supported_spans(shorter, minimum_layers=minimum)
        rest = np.where(np.isnan(rest) | (rest * spans < 0.0), 0.0, rest)
        spans = np.where(np.abs(rest) >= _SUPPORT * np.abs(spans), spans, rest)
    return spans


def _deep(stream: Stream, stacks: list[str], minimum: int) -> set[str]:
    """Return the stacks that have enough blocks to have a depth of their own."""
    inside = [stack for stack, block in zip(stacks, stream.blocks, strict=True) if block]
    return {stack for stack in inside if inside.count(stack) >= minimum}
