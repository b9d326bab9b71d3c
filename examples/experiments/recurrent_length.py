"""RNN against LSTM over sequence length: scikit-learn's digits are read row by row, and named after a pause.

Run: python -m examples.experiments.recurrent_length [--picture FILE]        About a minute on two cores.

The eight rows of an image come first, then blank rows up to the length; the answer is asked for at the very end. So the
gradient has to travel back over the pause: what a net forgets in it, it cannot learn to name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradguard
from examples.experiments import _common as common

LENGTHS = (8, 16, 32, 64)
HIDDEN = 48
KINDS: dict[str, tuple[Callable[..., nn.RNNBase], str]] = {
    "RNN": (nn.RNN, ""),
    "RNN, orthogonal": (nn.RNN, "orthogonal-recurrent"),
    "LSTM": (nn.LSTM, ""),
    "LSTM, forget bias 1": (nn.LSTM, "forget-gate-bias"),
    "LSTM, chrono": (nn.LSTM, "chrono"),
}
"""Cell, and the remedy that is applied before training."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of net at one length, averaged over the seeds; ``runs`` are the single runs."""

    kind: str
    length: int
    runs: tuple[common.Run, ...]

    @property
    def accuracy(self) -> float:
        """Share of the held-out digits named correctly."""
        return common.mean([run.accuracy for run in self.runs])

    @property
    def factor(self) -> float:
        """Factor by which the gradient changes per time step back, at the first step of training."""
        return common.mean([common.temporal(run, "temporal_factor") for run in self.runs])

    @property
    def decades(self) -> float:
        """Decades over the whole sequence, at the first step; below 0 it shrinks on its way back."""
        return common.mean([common.temporal(run, "temporal_span") for run in self.runs])

    @property
    def decades_after(self) -> float:
        """The same at the last observation of the run."""
        return common.mean([common.temporal(run, "temporal_span", -1) for run in self.runs])


class Reader(nn.Module):
    """Reads the rows of an image, then a pause, and names the digit."""

    def __init__(self, cell: Callable[..., nn.RNNBase], length: int) -> None:
        super().__init__()
        self.rnn = cell(8, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)
        self.length = length

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]`` for images of shape ``[batch, 64]``."""
        rows = images.view(-1, 8, 8)
        pause = rows.new_zeros(len(rows), self.length - 8, 8)
        outputs, _ = self.rnn(torch.cat([rows, pause], dim=1))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


def net(kind: str, length: int) -> Reader:
    """Return a net of a kind, its remedy applied."""
    cell, remedy = KINDS[kind]
    model = Reader(cell, length)
    if remedy == "chrono":
        gradguard.remedies.initialization.chrono_initialize(model, max_time=length)
    elif remedy:
        gradguard.apply(remedy, model)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at a rate that suits all of them."""
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def run(*, lengths: Sequence[int] = LENGTHS, steps: int = 240, seeds: int = 2) -> list[Row]:
    """Train every kind of net at every length."""
    data, rows = common.digits(), []
    for length in lengths:
        for kind in KINDS:
            runs = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                runs.append(common.train(net(kind, length), data, steps=steps, seed=seed, make_optimizer=adam))
            rows.append(Row(kind, length, tuple(runs)))
    return rows


def through_time(kind: str, length: int) -> tuple[list[float], list[float]]:
    """Return steps back from the answer, and the share of its gradient that arrives there, at the first step."""
    torch.manual_seed(0)
    first = common.train(net(kind, length), common.digits(), steps=1, seed=0, make_optimizer=adam)
    profile = next(iter(first.history.profiles.values()))
    return [float(step) for step in profile.distance], [float(norm / profile.memory[0]) for norm in profile.memory]


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Draw accuracy over length, and the gradient over the time steps of the longest sequences."""
    left, right = figure.subplots(1, 2)
    longest = max(row.length for row in rows)
    for kind, colour in zip(KINDS, common.COLOURS, strict=False):
        mine = [row for row in rows if row.kind == kind]
        left.plot([row.length for row in mine], [100.0 * row.accuracy for row in mine], "o-", color=colour, label=kind)
        factor = next(row.factor for row in mine if row.length == longest)
        back, left_over = through_time(kind, longest)
        right.semilogy(back, left_over, color=colour, label=f"{kind}: {factor:.2f} per step")
    left.axhline(10.0, color="#888888", linewidth=0.8, linestyle=":")
    left.set_xscale("log", base=2)
    lengths = sorted({row.length for row in rows})
    left.set_xticks(lengths, [f"{length}" for length in lengths])
    left.set(xlabel="time steps", ylabel="held-out accuracy, %", ylim=(0, 102), title="After training (dotted: chance)")
    left.legend(frameon=False, loc="lower left", fontsize=8)
    right.set(xlabel="steps back from the answer", ylabel="share left", title="Gradient through time, first step")
    right.legend(frameon=False, loc="lower left", fontsize=8)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table and draw the picture."""
    given = common.options("RNN against LSTM, over sequence length.", 240, 2, argv)
    rows = run(steps=given.steps, seeds=given.seeds)
    common.print_table(
        f"Digits row by row and a pause, Adam 3e-3, {given.steps} steps, {given.seeds} seed(s)",
        ("time steps", "net", "accuracy", "factor per step", "decades, first step", "decades, last", "found"),
        [
            (
                f"{row.length}",
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
