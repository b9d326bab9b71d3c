"""Gradient clipping on and off, and at which threshold: a recurrent net that explodes, on scikit-learn's digits.

Run: python -m examples.experiments.clipping [--picture FILE]        About a minute on two cores.

An RNN of ReLUs whose recurrent matrix starts as the identity (Le, Jaitly, Hinton 2015, arXiv 1504.00941) reads the
eight rows of an image, four times over: 32 time steps. What makes the matrix a little larger is felt 32 times. Plain
SGD trains it, so that the size of the gradient is the size of the step. Each threshold gets the same nets and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradguard
from examples.experiments import _common as common

HIDDEN, REPEATS = 48, 4
METHODS: dict[str, Callable[[nn.Module], gradguard.clip.Clipper]] = {
    "off": lambda model: gradguard.clip.Norm(model, math.inf),  # measures only
    "100": lambda model: gradguard.clip.Norm(model, 100.0),
    "10": lambda model: gradguard.clip.Norm(model, 10.0),
    "1": lambda model: gradguard.clip.Norm(model, 1.0),
    "0.1": lambda model: gradguard.clip.Norm(model, 0.1),
    "0.01": lambda model: gradguard.clip.Norm(model, 0.01),
    "adaptive": gradguard.clip.Adaptive,
    "adaptive, 10": lambda model: gradguard.clip.Adaptive(model, max_norm=10.0),
}
"""Thresholds on the norm of the whole gradient; one that follows the run's own norms; the same, never above 10."""


_OUT_OF_SIGHT = 5.0
"""Loss at which the picture ends; chance is ln 10 = 2.3."""


@dataclass(frozen=True, slots=True)
class Row:
    """One threshold, averaged over the seeds; ``runs`` are the single runs."""

    method: str
    runs: tuple[common.Run, ...]

    @property
    def accuracy(self) -> float:
        """Share of the held-out digits named correctly."""
        return common.mean([run.accuracy for run in self.runs])

    @property
    def worst(self) -> float:
        """The same, in the worst of the runs."""
        return min(run.accuracy for run in self.runs)

    @property
    def clipped(self) -> float:
        """Share of the steps that were clipped."""
        return common.mean([run.clipped for run in self.runs])

    @property
    def usual_norm(self) -> float:
        """Median norm of the gradient before clipping, at the observed steps."""
        return common.mean([run.diagnosis.summary.grad_norm_median for run in self.runs])

    @property
    def high_norm(self) -> float:
        """95th percentile of that norm."""
        return common.mean([run.diagnosis.summary.grad_norm_p95 for run in self.runs])

    @property
    def factor(self) -> float:
        """Factor by which the gradient changes per time step back, at the first step of training."""
        return common.mean([common.temporal(run, "temporal_factor") for run in self.runs])

    @property
    def factor_after(self) -> float:
        """The same at the last observation of the run."""
        return common.mean([common.temporal(run, "temporal_factor", -1) for run in self.runs])


class Reader(nn.Module):
    """Reads the rows of an image, four times over, and names the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, HIDDEN, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(HIDDEN, 10)
        nn.init.normal_(self.rnn.get_parameter("weight_ih_l0"), std=0.1)
        nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))
        nn.init.zeros_(self.rnn.get_parameter("bias_ih_l0"))
        nn.init.zeros_(self.rnn.get_parameter("bias_hh_l0"))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]`` for images of shape ``[batch, 64]``."""
        outputs, _ = self.rnn(images.view(-1, 8, 8).repeat(1, REPEATS, 1))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return plain SGD, whose steps are as large as the gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def run(*, methods: Sequence[str] = tuple(METHODS), steps: int = 300, seeds: int = 3) -> list[Row]:
    """Train under each threshold."""
    data, rows = common.digits(), []
    for method in methods:
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            clipper = METHODS[method]
            runs.append(common.train(Reader(), data, steps=steps, seed=seed, make_optimizer=sgd, make_clipper=clipper))
        rows.append(Row(method, tuple(runs)))
    return rows


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Draw the losses, and the accuracy of every run over the thresholds."""
    left, right = figure.subplots(1, 2)
    for row, colour in zip(rows, common.COLOURS, strict=False):
        losses = row.runs[0].losses
        window = 10
        smooth = [common.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        lost = row.runs[0].losses[-1] > _OUT_OF_SIGHT or not math.isfinite(row.runs[0].losses[-1])
        left.plot(smooth, color=colour, label=f"{row.method}{' (diverges)' if lost else ''}", linewidth=1.2)
    left.set(xlabel="step", ylabel="loss, mean of 10 steps", title="Loss of one run", ylim=(0, _OUT_OF_SIGHT))
    left.legend(frameon=False, title="threshold", ncols=2, fontsize=8, title_fontsize=8)
    for place, (row, colour) in enumerate(zip(rows, common.COLOURS, strict=False)):
        right.bar(place, 100.0 * row.accuracy, color=colour, width=0.6)
        right.plot([place] * len(row.runs), [100.0 * run.accuracy for run in row.runs], "k_", markersize=10)
    right.set_xticks(range(len(rows)), [row.method for row in rows], rotation=30, ha="right")
    right.set(
        xlabel="threshold", ylabel="held-out accuracy, %", ylim=(0, 102), title="Mean (bar) and single runs (lines)"
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table and draw the picture."""
    given = common.options("Gradient clipping on and off, and at which threshold.", 300, 3, argv)
    rows = run(steps=given.steps, seeds=given.seeds)
    common.print_table(
        f"Digits read by an RNN, SGD 0.05, {given.steps} steps, {given.seeds} seed(s)",
        ("threshold", "accuracy", "worst", "clipped", "median norm", "95 % below", "factor per step", "last", "found"),
        [
            (
                row.method,
                f"{row.accuracy:.1%}",
                f"{row.worst:.1%}",
                f"{row.clipped:.0%}",
                f"{row.usual_norm:.1e}",
                f"{row.high_norm:.1e}",
                f"{row.factor:.2f}",
                f"{row.factor_after:.2f}",
                row.runs[0].verdict,
            )
            for row in rows
        ],
    )
    common.draw(given.picture, lambda figure: paint(figure, rows))
    return rows


if __name__ == "__main__":
    main()
