"""Whether a Transformer normalizes before or after its residual additions, and what that does to its gradients."""

from __future__ import annotations

import math

import numpy as np

from gradguard.history import History
from gradguard.profiles import BlockProfile
from gradguard.records import LayerTable, StepRecord

__all__ = ["block_profile"]

_LOOKED_AT = 8
"""Observations among which the first that has gradients is searched for. Ours."""

_WEIGHTED = frozenset({"affine", "norm", "attention", "recurrent"})


def block_profile(history: History) -> BlockProfile | None:
    """Return the feed-forward gradients over the blocks of a Transformer, ``None`` for other models.

    A Transformer here is a stack of four blocks or more, in each of which a LayerNorm or RMSNorm stands at one end and
    two linear layers or more lie inside. The first observation counts: the law is one of initialization.

    Args:
        history: Records of one optimizer, oldest first.

    Source:
        Xiong et al. (2020), "On Layer Normalization in the Transformer Architecture", ICML, arXiv 2002.04745, Theorem
        1: at initialization the gradient of the last layer's feed-forward weights is O(d sqrt(ln d)) for post-LN,
        whatever the depth L, and O(d sqrt(ln d / L)) for pre-LN. Post-LN gradients grow towards the output, pre-LN
        ones are even.
    """
    for record in history.records[:_LOOKED_AT]:
        placement = _placement(record.layers)
        if not placement:
            continue
        norms = _ffn_norms(record)
        if len(norms) >= 4 and all(0.0 < norm < math.inf for norm in norms.values()):
            return _profile(record, placement, norms)
    return None


def _profile(record: StepRecord, placement: str, norms: dict[str, float]) -> BlockProfile:
    logs = np.log10(list(norms.values()))
    first, second = np.triu_indices(len(logs), 1)
    slope = float(np.median((logs[second] - logs[first]) / (second - first)))
    return BlockProfile(
        placement=placement,
        blocks=tuple(norms),
        ffn_grad_norm=tuple(norms.values()),
        growth=10.0 ** (slope * (len(logs) - 1)),
        decades_per_block=slope,
        step=record.step,
    )


def _rows(table: LayerTable) -> dict[str, list[int]]:
    """Return the rows with weights of each block, in execution order."""
    rows: dict[str, list[int]] = {}
    for row, block in enumerate(table.blocks):
        if block and table.roles[row] in _WEIGHTED:
            rows.setdefault(block, []).append(row)
    return rows


def _placement(table: LayerTable) -> str:
    """Return where the norms stand in every block; empty where blocks differ, or have norms at both ends or at none."""
    found = set()
    for rows in _rows(table).values():
        first, last = (_is_norm(table, rows[end]) for end in (0, -1))
        found.add("pre-LN" if first and not last else "post-LN" if last and not first else "")
    return found.pop() if len(found) == 1 else ""


def _is_norm(table: LayerTable, row: int) -> bool:
    return table.types[row].endswith(("LayerNorm", "RMSNorm"))


def _ffn_norms(record: StepRecord) -> dict[str, float]:
    """Return the gradient norm of the weights of each block's last two linear layers; blocks without are left out."""
    table, parameters = record.layers, record.parameters
    gradients = record.parameter_values.get("grad_norm")
    if gradients is None:
        return {}
    squares: dict[str, float] = {}
    for layer, dims, value in zip(parameters.layers, parameters.dims, gradients, strict=True):
        if dims == 2:
            squares[layer] = squares.get(layer, 0.0) + float(value) ** 2
    norms = {}
    for block, rows in _rows(table).items():
        linear = [table.names[row] for row in rows if table.roles[row] == "affine" and table.names[row] in squares][-2:]
        if len(linear) == 2:
            norms[block] = math.sqrt(sum(squares[name] for name in linear))
    return norms
