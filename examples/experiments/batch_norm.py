"""BatchNorm on and off, under sigmoid, tanh and ReLU, at 10 and 40 layers, on scikit-learn's digits.

Run: python -m examples.experiments.batch_norm [--picture FILE]        Under a minute on two cores.

Hidden layers are 64 wide with Xavier weights (He under ReLU), so that what is left to blame is the activation. With
BatchNorm there is one before each activation. Nothing has a residual connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from examples.experiments import _common as common

DEPTHS = (10, 40)
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(common.DepthRow):
    """One activation at one depth, with or without BatchNorm; ``runs`` are the single runs."""

    activation: str
    normalized: bool


def net(activation: str, depth: int, *, normalized: bool) -> nn.Sequential:
    """Return a plain stack of so many hidden layers."""
    modules: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(64, 64)
        if activation == "ReLU":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        norm = [nn.BatchNorm1d(64)] if normalized else []
        modules += [layer, *norm, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules, nn.Linear(64, 10))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at its usual rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def run(*, depths: Sequence[int] = DEPTHS, steps: int = 240, seeds: int = 1) -> list[Row]:
    """Train every net with and without BatchNorm."""
    data, rows = common.digits(), []
    for depth in depths:
        for activation in ACTIVATIONS:
            for normalized in (False, True):
                runs = []
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    model = net(activation, depth, normalized=normalized)
                    runs.append(common.train(model, data, steps=steps, seed=seed, make_optimizer=adam))
                rows.append(Row(activation=activation, depth=depth, normalized=normalized, runs=tuple(runs)))
    return rows


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Draw the gradient over the layers, without and with BatchNorm, at the first step of the deepest nets."""
    deepest = max(row.depth for row in rows)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, normalized in zip(panels, (False, True), strict=True):
        for activation, colour in zip(ACTIVATIONS, common.COLOURS, strict=False):
            row = next(r for r in rows if (r.activation, r.depth, r.normalized) == (activation, deepest, normalized))
            norms = [norm if norm > 0.0 else float("nan") for norm in common.profile(row.runs[0], 0)]
            label = f"{activation}: accuracy {row.accuracy:.0%}"
            axes.semilogy(range(1, len(norms) + 1), norms, color=colour, label=label)
        axes.set(xlabel="layer, from the input", title=f"{'With' if normalized else 'No'} BatchNorm, {deepest} layers")
        axes.legend(frameon=False, loc="lower right")
    panels[0].set_ylabel("|dL/dy| at the first step")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table and draw the picture."""
    given = common.options("BatchNorm on and off, under three activations.", 240, 1, argv)
    rows = run(steps=given.steps, seeds=given.seeds)
    common.print_table(
        f"Digits, Adam 1e-3, {given.steps} steps, {given.seeds} seed(s)",
        (
            "hidden layers",
            "activation",
            "BatchNorm",
            "accuracy",
            "factor per layer",
            "decades, first step",
            "decades, last",
            "found",
        ),
        [
            (
                f"{row.depth}",
                row.activation,
                "on" if row.normalized else "off",
                f"{row.accuracy:.1%}",
                f"{row.factor:.2f}",
                f"{row.decades:+.1f}",
                f"{row.decades_after:+.1f}",
                row.runs[0].verdict,
            )
            for row in rows
        ],
        words=3,
    )
    common.draw(given.picture, lambda figure: paint(figure, rows))
    return rows


if __name__ == "__main__":
    main()
