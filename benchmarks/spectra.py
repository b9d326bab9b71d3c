"""What spectra cost: each estimate at three sizes, with its error; then the monitor's part of an observed step.

Run from the root of the repository::

    python -m benchmarks.spectra [--largest 4096] [--rounds 5]

Times are medians; errors are against all singular values or eigenvalues in float64 (at 4096 that takes a minute).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gradguard import spectra
from gradguard.monitors import SpectralMonitor
from gradguard.monitors._reduce import Readback


def timed(function: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call in milliseconds."""
    function()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def of_size(size: int, rounds: int) -> list[tuple[str, str, str, str]]:
    """Measure every estimate on one Gaussian matrix of variance 1/size."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator) / size**0.5
    sigma = float(torch.linalg.svdvals(matrix.double())[0])
    radius = float(torch.linalg.eigvals(matrix.double()).abs().amax())
    warm = spectra.power_iteration(matrix, iterations=50)[1]
    few = rounds if size <= 1024 else 1
    rows: list[tuple[str, Callable[[], object], float, int]] = [
        ("power, 1 warm iteration", lambda: spectra.power_iteration(matrix, start=warm)[0], sigma, rounds),
        ("power, 20 iterations", lambda: spectra.power_iteration(matrix, iterations=20)[0], sigma, rounds),
        ("sigma_max, Lanczos to 1e-3", lambda: spectra.sigma_max(matrix, exact=False), sigma, rounds),
        ("sigma_max, exact", lambda: spectra.sigma_max(matrix, exact=True), sigma, few),
        ("gram_bound, 6 iterations", lambda: spectra.gram_bound(matrix), sigma, few),
        ("spectral_radius, Arnoldi to 1e-3", lambda: spectra.spectral_radius(matrix, exact=False), radius, rounds),
        ("spectral_radius, exact", lambda: spectra.spectral_radius(matrix, exact=True), radius, few),
        ("gelfand_bound, 8 squarings", lambda: spectra.gelfand_bound(matrix), radius, few),
    ]
    return [
        (str(size), name, f"{timed(function, count):.2f}", f"{float(function()) / truth - 1:+.1e}")
        for name, function, truth, count in rows
    ]


class Stack(nn.Sequential):
    """Linear layers of one width with ReLU between them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(*(module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())))


def monitor_share(width: int, depth: int, batch: int, rounds: int) -> tuple[str, str, str, str]:
    """Compare one reading of the monitor with a training step, interleaved."""
    model = Stack(width, depth)
    optimizer = torch.optim.Adam(model.parameters())
    monitor = SpectralMonitor(model, on_failure=_raise, off=False)
    data = torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    def read() -> None:
        readback = Readback()
        monitor.read(readback, {})
        readback.fetch()

    for _ in range(3):
        step()
        read()
    steps, reads = [], []
    for _ in range(rounds):
        steps.append(timed(step, 1))
        reads.append(timed(read, 1))
    plain, ours = statistics.median(steps), statistics.median(reads)
    share = statistics.median(mine / theirs for mine, theirs in zip(reads, steps, strict=True))
    return f"{depth} x {width}, batch {batch}", f"{plain:.1f}", f"{ours:.2f}", f"{share:.0%}"


def _raise(_: str, error: BaseException) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console()
    costs = Table(title=f"Gaussian n x n, {torch.get_num_threads()} threads")
    for head in ("n", "estimate", "ms", "relative error"):
        costs.add_column(head, justify="left" if head == "estimate" else "right")
    for size in (256, 1024, 4096):
        if size <= arguments.largest:
            for row in of_size(size, arguments.rounds):
                costs.add_row(*row)
    console.print(costs)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    console.print(
        f"conv 64>64, 3x3, on 32x32: {timed(lambda: spectra.conv_sigma_max(conv, 32), arguments.rounds):.0f} ms"
    )
    shares = Table(title="The monitor at an observed step")
    for head in ("net", "plain step, ms", "spectra, ms", "share"):
        shares.add_column(head, justify="left" if head == "net" else "right")
    for width, depth, batch in ((64, 20, 128), (256, 10, 128), (1024, 6, 128)):
        shares.add_row(*monitor_share(width, depth, batch, 4 * arguments.rounds))
    console.print(shares)


if __name__ == "__main__":
    main()
