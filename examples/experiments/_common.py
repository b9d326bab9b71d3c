"""What the experiments share: the digits, a watched training run, and how tables and pictures are written."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.findings import Diagnosis
from gradguard.history import History

BATCH_SIZE = 128
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""


@dataclass(frozen=True, slots=True)
class Data:
    """Images as rows of 64 pixels, standardized as a whole, and their labels; the last fifth is held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of 128 images, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            rows = torch.randint(len(self.labels), (BATCH_SIZE,), generator=generator)
            yield self.images[rows], self.labels[rows]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: what gradguard measured, what it says, and what came of the run."""

    history: History
    diagnosis: Diagnosis
    losses: tuple[float, ...]
    accuracy: float
    clipped: float = 0.0

    @property
    def verdict(self) -> str:
        """The code and name of what is wrong, or that nothing is."""
        primary = self.diagnosis.primary
        return "-" if primary is None else f"{primary.code} {primary.name}"


def digits() -> Data:
    """Return scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which come with the package."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Data(images[train], labels[train], images[test], labels[test])


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    seed: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_clipper: Callable[[nn.Module], gradguard.clip.Clipper] | None = None,
) -> Run:
    """Train a model under a guard, and see how many of the held-out images it names correctly."""
    optimizer = make_optimizer(model)
    clipper = None if make_clipper is None else make_clipper(model)
    losses = []
    with gradguard.watch(model, optimizer, every=20, on_finding="silent") as guard:
        for batch in data.batches(steps, seed):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            guard.record(loss=loss)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break  # it never comes back
            if clipper is not None:
                clipper.step()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()
    clipped = 0.0 if clipper is None else clipper.clipped_fraction
    return Run(guard.history, guard.diagnose(), tuple(losses), accuracy, clipped)


def profile(run: Run, observation: int) -> list[float]:
    """Return the L2 norm of the gradient at the input of each activation, from the input of the net to the loss.

    Args:
        run: A watched run.
        observation: 0 for the first step, -1 for the newest one observed.
    """
    rows = [row for row, role in enumerate(run.history.layers.roles) if role == "activation"]
    return [float(norm) for norm in run.history.layer("input_delta_norm")[observation, rows]]


def decades(run: Run, observation: int) -> float:
    """Return by how many decades the gradient grows on its way from the last activation to the first.

    Below 0 it shrinks. Where it has underflowed to zero on its way it is counted up to there.
    """
    norms = [norm for norm in profile(run, observation) if norm > 0.0]
    return math.log10(norms[0] / norms[-1]) if len(norms) > 1 else math.nan


def factor_per_layer(run: Run, observation: int = 0) -> float:
    """Return the factor by which the gradient changes per layer on its way to the input; 1 keeps its size."""
    norms = [norm for norm in profile(run, observation) if norm > 0.0]
    return (norms[0] / norms[-1]) ** (1.0 / (len(norms) - 1)) if len(norms) > 1 else math.nan


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRow:
    """One kind of net at one depth, averaged over the seeds.

    Attributes:
        depth: Hidden layers.
        runs: The single runs.
    """

    depth: int
    runs: tuple[Run, ...]

    @property
    def accuracy(self) -> float:
        """Share of the held-out digits named correctly."""
        return mean([run.accuracy for run in self.runs])

    @property
    def factor(self) -> float:
        """Factor by which the gradient changes per layer, at the first step."""
        return mean([factor_per_layer(run) for run in self.runs])

    @property
    def decades(self) -> float:
        """The same over all layers, in decades."""
        return mean([decades(run, 0) for run in self.runs])

    @property
    def decades_after(self) -> float:
        """The same at the last observation of the run."""
        return mean([decades(run, -1) for run in self.runs])


def options(description: str, steps: int, seeds: int, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of each run ({steps})")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"runs of each kind, averaged ({seeds})")
    parser.add_argument("--picture", type=Path, default=None, help="file to draw to: PNG or SVG")
    torch.set_num_threads(1)  # layers this small gain nothing from more
    return parser.parse_args(argv)


def temporal(run: Run, column: str, observation: int = 0) -> float:
    """Return a number of the gradient through time in the first recurrent module: see gradguard.records.

    Args:
        run: A watched run of a recurrent net.
        column: For instance ``"temporal_factor"``, per step back, or ``"temporal_span"``, in decades over all of them.
        observation: 0 for the first step, -1 for the newest one observed.
    """
    rows = [row for row, role in enumerate(run.history.layers.roles) if role == "recurrent"]
    return float(run.history.layer(column)[observation, rows[0]])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Print a table; all but the first ``words`` columns and the last are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(column, justify="left" if index < words or last else "right", no_wrap=last or index < words)
    for row in rows:
        table.add_row(*row)
    Console(width=120, highlight=False).print(table)


def draw(path: Path | None, paint: Callable[[Any], None], *, size: tuple[float, float] = (9.0, 3.8)) -> bool:
    """Draw a picture to a file; say what is missing where matplotlib is not installed.

    Args:
        path: Where to; nothing is drawn where it is ``None``.
        paint: Called with an empty figure.
        size: Width and height in inches.
    """
    if path is None:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Console(stderr=True).print(
            "no picture: it needs matplotlib. Install the extra: pip install 'gradguard\\[examples]'"
        )
        return False
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    paint(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path)
    Console(stderr=True).print(f"drawn to {path}")
    return True
