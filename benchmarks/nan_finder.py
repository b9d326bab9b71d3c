"""What a search for NaN costs: paired step times, interleaved in one process, medians of ratios to a plain step.

Run from the root of the repository::

    python -m benchmarks.nan_finder [--rounds 60] [--threads 1]

"searched" is a step that :meth:`gradguard.Guard.find_non_finite` searches operation by operation, on a healthy net, so
that the search never ends; "idle" a guard that does not observe. "detect_anomaly" is the step under
``torch.autograd.detect_anomaly``, around forward and backward as its documentation says.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import gradguard
from tests.models import ConvNet, TransformerClassifier, classification_loss, digit_batch, mlp

NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP 30x64": lambda: mlp(30, init="he"),
    "MLP 10x512": lambda: mlp(10, init="he", width=512),
    "conv ResNet 13, width 32": lambda: ConvNet(6, width=32),
    "Transformer 6x64": lambda: TransformerClassifier(6, width=64),
}
MODES = ("plain", "idle", "searched", "detect_anomaly")


class Run:
    """One training run that can be advanced a step at a time."""

    def __init__(self, make: Callable[[], nn.Module], mode: str, device: str) -> None:
        torch.manual_seed(0)
        self.mode, self.device = mode, device
        self.model = make().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        x, y = digit_batch(128)
        self.batch = x.to(device), y.to(device)
        self.guard = None
        if mode in {"idle", "searched"}:
            self.guard = gradguard.watch(
                self.model, self.optimizer, every=10**9, dense_steps=(), on_finding="silent", on_error="raise"
            )
        self.advance()
        if self.guard is not None and mode == "searched":
            self.guard.find_non_finite(steps=10**9)
        self.advance()

    def advance(self) -> float:
        """Take one step; return the seconds it took."""
        self._wait()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        around = torch.autograd.detect_anomaly() if self.mode == "detect_anomaly" else contextlib.nullcontext()
        with around:
            loss = classification_loss(self.model, self.batch)
            loss.backward()
        if self.guard is not None:
            self.guard.record(loss=loss)
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(make: Callable[[], nn.Module], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Return per mode the milliseconds per step (median) and the median ratio to the plain step beside it."""
    runs = {mode: Run(make, mode, device) for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for index in range(rounds):
        for mode in MODES if index % 2 == 0 else MODES[::-1]:
            times[mode].append(runs[mode].advance() * 1e3)
    plain = times["plain"]
    return {
        mode: (statistics.median(series), statistics.median(a / b for a, b in zip(series, plain, strict=True)))
        for mode, series in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # detect_anomaly warns that it is slow
    torch.set_num_threads(arguments.threads)
    table = Table("net", "mode", "ms per step", "ratio to plain")
    for name, make in NETS.items():
        for mode, (milliseconds, ratio) in measure(make, arguments.rounds, arguments.device).items():
            table.add_row(name if mode == "plain" else "", mode, f"{milliseconds:.2f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
