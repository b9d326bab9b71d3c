"""Reductions: right at every magnitude, for every kind of tensor, with one transfer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gradguard.monitors._reduce import Readback, dense, queue_norm, queue_norms


def norm_of(tensor: torch.Tensor) -> tuple[float, float]:
    """Queue, fetch and resolve the norm of one tensor."""
    readback = Readback()
    values = dense(tensor)
    assert values is not None
    norm = queue_norm(readback, values, extremes=True)
    readback.fetch()
    return norm.resolve(readback)


@pytest.mark.parametrize("size", [7, 1 << 16, (1 << 16) + 1, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_norm_agrees_with_float64(size: int, dtype: torch.dtype) -> None:
    """Small and large tensors of every floating type have the L2 norm that float64 computes."""
    tensor = torch.randn(size).to(dtype)

    l2, largest = norm_of(tensor)

    assert l2 == pytest.approx(float(tensor.double().norm()), rel=1e-5)
    assert largest == float(tensor.double().abs().max())


@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-25, 1e25, 1e30])
def test_norm_survives_squares_out_of_range(size: int, magnitude: float) -> None:
    """Entries of 1e-25 have a norm, and entries of 1e25 a finite one, although their squares leave float32."""
    tensor = torch.randn(size) * magnitude

    l2, _ = norm_of(tensor)

    assert l2 == pytest.approx(float(tensor.double().norm()), rel=0.03)


def test_half_precision_norm_beyond_its_range_is_finite() -> None:
    """A float16 tensor whose norm exceeds 65504 is not called infinite."""
    l2, _ = norm_of(torch.full((300_000,), 60_000.0, dtype=torch.float16))

    assert l2 == pytest.approx(60_000.0 * math.sqrt(300_000), rel=1e-3)


@pytest.mark.parametrize("size", [5, 100_000])
@pytest.mark.parametrize(("bad", "largest"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_non_finite_entries_are_never_lost(size: int, bad: float, largest: float) -> None:
    """One NaN or inf anywhere makes the norm infinite and shows in the largest entry."""
    tensor = torch.randn(size)
    tensor[size // 2] = bad

    l2, entry = norm_of(tensor)

    assert l2 == math.inf
    assert entry == largest or (math.isnan(entry) and math.isnan(largest))


def test_exact_zero_stays_exact() -> None:
    """A zero tensor has norm 0, in every size, and an empty one as well."""
    for size in (0, 3, 100_000):
        assert norm_of(torch.zeros(size)) == (0.0, 0.0)


def test_sparse_rows_are_summed_before_they_are_measured() -> None:
    """An uncoalesced sparse gradient holds a row twice; its norm is that of the sum."""
    index, values = torch.tensor([[1, 1]]), torch.tensor([[3.0], [4.0]])
    sparse = torch.sparse_coo_tensor(index, values, (4, 1), check_invariants=True)

    assert norm_of(sparse)[0] == pytest.approx(7.0)


def test_complex_norm_counts_both_parts() -> None:
    """A complex tensor has the norm of its real and imaginary parts together."""
    assert norm_of(torch.tensor([3.0 + 4.0j, 0.0]))[0] == pytest.approx(5.0)


@pytest.mark.parametrize("tensor", [torch.empty(3, device="meta"), torch.ones(3, dtype=torch.int64)])
def test_tensors_without_numbers_are_passed_over(tensor: torch.Tensor) -> None:
    """Meta and integer tensors have nothing to measure."""
    assert dense(tensor) is None


def test_channels_last_is_sampled_without_a_copy() -> None:
    """A large channels-last weight has its norm, although it is not contiguous."""
    tensor = torch.randn(64, 64, 6, 6).to(memory_format=torch.channels_last)

    assert norm_of(tensor)[0] == pytest.approx(float(tensor.double().norm()), rel=1e-5)


class _Transfers(TorchDispatchMode):
    """Counts the operations that bring numbers to the host one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_queueing_transfers_nothing() -> None:
    """Nothing waits for the device while numbers are queued, and one transfer fetches them all."""
    with _Transfers() as transfers:
        readback = Readback()
        norms = queue_norms(readback, [torch.randn(10), torch.randn(100_000), torch.randn(3, 3)])
        queued = transfers.count
        readback.fetch()

    assert queued == 0
    assert transfers.count == 0
    assert all(math.isfinite(norm.resolve(readback)[0]) for norm in norms)


@given(st.integers(1, 200), st.floats(-30, 30))
def test_norm_is_homogeneous(size: int, exponent: float) -> None:
    """Scaling a tensor by k scales its norm by k, over sixty decades."""
    tensor = torch.randn(size, dtype=torch.float64)
    factor = 10.0**exponent

    assert norm_of(tensor * factor)[0] == pytest.approx(norm_of(tensor)[0] * factor, rel=1e-9)
