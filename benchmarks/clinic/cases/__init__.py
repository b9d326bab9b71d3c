"""Every case of the clinic, by family."""

from __future__ import annotations

from benchmarks.clinic.case import Case
from benchmarks.clinic.cases import (
    autotrainer,
    conv,
    data_faults,
    embedding,
    frozen,
    gan,
    mlp,
    multibranch,
    nonfinite,
    optimizer,
    precision,
    recurrent,
    regression,
    residual,
    transformer,
    traps,
)

__all__ = ["CASES"]

CASES: tuple[Case, ...] = (
    *mlp.CASES,
    *traps.CASES,
    *autotrainer.CASES,
    *conv.CASES,
    *residual.CASES,
    *transformer.CASES,
    *recurrent.CASES,
    *regression.CASES,
    *gan.CASES,
    *frozen.CASES,
    *embedding.CASES,
    *multibranch.CASES,
    *nonfinite.CASES,
    *data_faults.CASES,
    *precision.CASES,
    *optimizer.CASES,
)
"""All of them, healthy and sick, of both halves. What tunes asks :mod:`benchmarks.clinic.catalogue` instead."""
