"""Residual connections on and off, over depths of 10 to 100 layers, on scikit-learn's digits.

Run: python -m examples.experiments.residual_depth [--picture FILE]        About a minute on two cores.

Every hidden layer is ``Linear(ReLU(x))``, 64 wide, with torch's own initialization and no normalization. Plain, the
layers follow one another; residual, each is added to what it was given; with SkipInit, times a learnt scalar that
starts at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradguard
from examples.experiments import _common as common

DEPTHS = (10, 20, 50, 100)
KINDS = ("plain", "residual", "residual, SkipInit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(common.DepthRow):
    """One kind of net at one depth, averaged over the seeds; ``runs`` are the single runs."""

    kind: str


class Net(nn.Module):
    """64 pixels in, ten logits out, and so many hidden layers in between."""

    def __init__(self, depth: int, *, residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(64, 64)) for _ in range(depth - 1))
        self.head = nn.Linear(64, 10)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]`` for images of shape ``[batch, 64]``."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x) if self.residual else block(x)
        logits: Tensor = self.head(x)
        return logits


def run(*, depths: Sequence[int] = DEPTHS, steps: int = 200, seeds: int = 1) -> list[Row]:
    """Train every kind of net at every depth."""
    data, rows = common.digits(), []
    for depth in depths:
        for kind in KINDS:
            runs = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = Net(depth, residual=kind != "plain")
                if kind == "residual, SkipInit":
                    gradguard.apply("skip-init", model, batch=data.images[:2])
                runs.append(common.train(model, data, steps=steps, seed=seed, make_optimizer=adam))
            rows.append(Row(kind=kind, depth=depth, runs=tuple(runs)))
    return rows


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at its usual rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Draw accuracy over depth, and the gradient over the layers of the deepest nets."""
    left, right = figure.subplots(1, 2)
    deepest = max(row.depth for row in rows)
    for kind, colour in zip(KINDS, common.COLOURS, strict=False):
        mine = [row for row in rows if row.kind == kind]
        left.plot([row.depth for row in mine], [100.0 * row.accuracy for row in mine], "o-", color=colour, label=kind)
        norms = common.profile(next(row for row in mine if row.depth == deepest).runs[0], 0)
        right.semilogy(range(1, len(norms) + 1), norms, color=colour, label=kind)
    left.axhline(10.0, color="#888888", linewidth=0.8, linestyle=":")
    left.set(
        xlabel="hidden layers", ylabel="held-out accuracy, %", ylim=(0, 102), title="After training (dotted: chance)"
    )
    left.legend(frameon=False, loc="center right")
    right.set(
        xlabel="layer, from the input", ylabel="|dL/dy|", title=f"Gradient of {deepest} layers, at the first step"
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table and draw the picture."""
    given = common.options("Residual connections on and off, over depth.", 200, 1, argv)
    rows = run(steps=given.steps, seeds=given.seeds)
    common.print_table(
        f"Digits, Adam 1e-3, {given.steps} steps, {given.seeds} seed(s)",
        ("hidden layers", "net", "accuracy", "factor per layer", "decades, first step", "decades, last", "found"),
        [
            (
                f"{row.depth}",
                row.kind,
                f"{row.accuracy:.1%}",
                f"{row.factor:.2f}",
                f"{row.decades:+.1f}",
                f"{row.decades_after:+.1f}",
                row.runs[0].verdict,
            )
            for row in rows
        ],
        words=2,
    )
    common.draw(given.picture, lambda figure: paint(figure, rows))
    return rows


if __name__ == "__main__":
    main()
