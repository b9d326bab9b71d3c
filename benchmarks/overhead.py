"""What watching costs: paired step times with and without a guard, interleaved in one process, medians of ratios.

Run from the root of the repository::

    python -m benchmarks.overhead [--rounds 40] [--steps 100]

Three nets on one CPU thread: a small MLP whose step takes a few milliseconds (the worst case), a small convolutional
net, and a Transformer. "idle" is a guard between observations, "default" the default cadence over a whole run of
``steps`` optimizer steps, "every step" an observation at each.
"""

from __future__ import annotations

import argparse
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
    "MLP 20x64": lambda: mlp(20, init="he"),
    "MLP 20x256": lambda: mlp(20, init="he", width=256),
    "conv ResNet 13, width 32": lambda: ConvNet(6, width=32),
    "Transformer 6x64": lambda: TransformerClassifier(6, width=64),
}
MODES: dict[str, dict[str, object] | None] = {
    "without": None,
    "idle": {"every": 10**9, "dense_steps": ()},
    "default": {},
    "every step": {"every": 1},
}


class Run:
    """One training run that can be advanced a few steps at a time."""

    def __init__(self, make: Callable[[], nn.Module], options: dict[str, object] | None) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.batch = digit_batch(128)
        self.guard = None
        if options is not None:
            self.guard = gradguard.watch(self.model, self.optimizer, on_finding="silent", on_error="raise", **options)
        self.spent = 0.0
        self.advance(1)

    def advance(self, steps: int) -> float:
        """Take steps; return the seconds they took."""
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = classification_loss(self.model, self.batch)
            loss.backward()
            if self.guard is not None:
                self.guard.record(loss=loss)
            self.optimizer.step()
        self.spent += (elapsed := time.perf_counter() - started)
        return elapsed


def measure(make: Callable[[], nn.Module], rounds: int, steps: int) -> dict[str, tuple[float, float, float]]:
    """Return per mode the milliseconds per step (median), the ratio to "without", and the guard's own share."""
    chunk = max(1, steps // rounds)
    runs = {mode: Run(make, options) for mode, options in MODES.items()}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for index in range(rounds):
        order = list(MODES) if index % 2 == 0 else list(MODES)[::-1]
        for mode in order:
            times[mode].append(runs[mode].advance(chunk) / chunk * 1e3)
    base = times["without"]
    result = {}
    for mode, series in times.items():
        run = runs[mode]
        # The default cadence observes unevenly, so it is the sum over the run that counts there, not the median step.
        ratio = (
            sum(series) / sum(base)
            if mode == "default"
            else statistics.median(a / b for a, b in zip(series, base, strict=True))
        )
        said = run.guard.overhead_s / run.spent if run.guard is not None else 0.0
        result[mode] = (statistics.median(series), ratio, said)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", gradguard.GradGuardWarning)
    torch.set_num_threads(1)
    table = Table("net", "mode", "ms per step", "ratio to without", "said by the guard")
    for name, make in NETS.items():
        for mode, (milliseconds, ratio, said) in measure(make, arguments.rounds, arguments.steps).items():
            table.add_row(
                name if mode == "without" else "",
                mode,
                f"{milliseconds:.2f}",
                f"{ratio:.3f}",
                f"{100 * said:.2f} %" if said else "",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
