"""How often thresholds clip a healthy step, and how often a spike: the window of ``clip.Adaptive``, and ZClip.

Run with ``python -m benchmarks.clipping``; half a minute on one core. Norms are drawn around a level that falls
twentyfold in 1000 steps; 20 of the steps after the hundredth are spikes of 3, 5, 10 or 100 times the level. Five runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from gradguard import clip
from gradguard.records import FloatArray

STEPS, SPIKES, RUNS = 1000, 20, 5
SIZES = (3.0, 5.0, 10.0, 100.0)
NOISES: dict[str, Callable[[np.random.Generator, int], FloatArray]] = {
    "log-normal 0.1": lambda generator, count: generator.normal(0.0, 0.1, count),
    "log-normal 0.2": lambda generator, count: generator.normal(0.0, 0.2, count),
    "log-normal 0.4": lambda generator, count: generator.normal(0.0, 0.4, count),
    "t4 x 0.2": lambda generator, count: 0.2 * generator.standard_t(4, count),
}
METHODS: dict[str, Callable[[torch.nn.Parameter], clip.Clipper]] = {
    **{
        f"Adaptive, window {window}": lambda weight, window=window: clip.Adaptive([weight], window=window)  # type: ignore[misc]
        for window in (32, 64, 128, 200)
    },
    "ZClip": lambda weight: clip.ZClip([weight], max_norm=None),
}


def engaged(make: Callable[[torch.nn.Parameter], clip.Clipper], norms: FloatArray) -> FloatArray:
    """Return 1 for each norm that a clipper clips, else 0."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    clipper = make(weight)
    flags = []
    for norm in norms:
        weight.grad = torch.tensor([norm], dtype=torch.float64)
        flags.append(float(clipper.step().engaged))
    return np.array(flags)


def main() -> None:
    """Print the table of docs/clipping.md."""
    torch.set_num_threads(1)
    print("| method | noise | healthy steps clipped, per 1000 | spikes clipped at 3x / 5x / 10x / 100x |")
    print("| --- | --- | --- | --- |")
    level = -np.linspace(0.0, math.log(20.0), STEPS)
    for method, make in METHODS.items():
        for name, noise in NOISES.items():
            generator = np.random.default_rng(0)
            false, caught = 0.0, dict.fromkeys(SIZES, 0.0)
            for _ in range(RUNS):
                norms = np.exp(level + noise(generator, STEPS))
                false += engaged(make, norms).sum()
                for size in SIZES:
                    at = generator.choice(np.arange(100, STEPS), SPIKES, replace=False)
                    spiked = norms.copy()
                    spiked[at] = size * np.exp(level[at] + noise(generator, SPIKES))
                    caught[size] += engaged(make, spiked)[at].sum()
            shares = " / ".join(f"{count / (SPIKES * RUNS):.2f}" for count in caught.values())
            print(f"| {method} | {name} | {1000.0 * false / (STEPS * RUNS):.1f} | {shares} |")


if __name__ == "__main__":
    main()
