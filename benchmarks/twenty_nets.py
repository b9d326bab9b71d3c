"""Ten sick and ten healthy nets on scikit-learn's digits, five seeds each: what does gradguard say of them?

Run from the root of the repository::

    python -m benchmarks.twenty_nets [--seeds 5] [--steps 240] [--json FILE]

Each net is trained for real. The table shows what was announced during the run and when, the verdict at its end, and
how well the net learnt, so that no label has to be believed. A sick run counts as named where the expected rule was
announced, a healthy one as left alone where nothing was announced at any time. "sigmoid 10, Adam" and, after the
twenty, "ReLU 20 default init, Adam" recover by themselves: announced at once, cleared later.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import gradguard
from tests.models import (
    ConvNet,
    ResidualMLP,
    SequenceClassifier,
    TransformerClassifier,
    classification_loss,
    digit_batch,
    digits,
    mlp,
)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Detached(nn.Module):
    """A residual net whose first half is cut off by a forgotten detach()."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = mlp(4)[:-1], mlp(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.upper(self.lower(x).detach())


def one_dead_layer() -> nn.Module:
    model = mlp(10, init="he")
    nn.init.constant_(model[8].bias, -50.0)
    return model


@dataclass(frozen=True)
class Case:
    """A net, its optimizer, and what is wrong with it (empty: nothing)."""

    name: str
    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    code: str = ""


CASES = (
    Case("sigmoid 10, Adam", lambda: mlp(10, nn.Sigmoid, init="xavier"), adam, "GG101"),
    Case("sigmoid 20, Adam", lambda: mlp(20, nn.Sigmoid, init="xavier"), adam, "GG101"),
    Case("sigmoid 50, Adam", lambda: mlp(50, nn.Sigmoid, init="xavier"), adam, "GG101"),
    Case("sigmoid 20, SGD", lambda: mlp(20, nn.Sigmoid, init="xavier"), sgd, "GG101"),
    Case("ReLU 20 default init, SGD", lambda: mlp(20), sgd, "GG101"),
    Case("ReLU 20 half He, SGD", lambda: mlp(20, init="he", gain=0.5), sgd, "GG101"),
    Case("plain conv 13, SGD", lambda: ConvNet(6, norm=False, skip=False), sgd, "GG101"),
    Case("ReLU 20 double He, Adam", lambda: mlp(20, init="he", gain=2.0), adam, "GG102"),
    Case("one dead layer, Adam", one_dead_layer, adam, "GG301"),
    Case("detached half, Adam", Detached, adam, "GG104"),
    Case("sigmoid 4, Adam", lambda: mlp(4, nn.Sigmoid, init="xavier"), adam),
    Case("tanh 20, Adam", lambda: mlp(20, nn.Tanh, init="xavier"), adam),
    Case("ReLU 20 He, Adam", lambda: mlp(20, init="he"), adam),
    Case("LayerNorm ReLU 20, SGD", lambda: mlp(20, init="he", norm=nn.LayerNorm), sgd),
    Case("BatchNorm sigmoid 20, Adam", lambda: mlp(20, nn.Sigmoid, init="xavier", norm=nn.BatchNorm1d), adam),
    Case("residual MLP 20, SGD", lambda: ResidualMLP(20), sgd),
    Case("ReZero 20, Adam", lambda: ResidualMLP(20, rezero=True), adam),
    Case("conv ResNet 13, SGD", lambda: ConvNet(6), sgd),
    Case("pre-LN Transformer 8, Adam", lambda: TransformerClassifier(8), adam),
    Case("LSTM, Adam", lambda: SequenceClassifier("lstm"), adam),
)
RESCUED = Case("ReLU 20 default init, Adam", lambda: mlp(20), adam, "GG101")


@dataclass(frozen=True)
class Outcome:
    """What one run showed."""

    case: str
    seed: int
    expected: str
    announced: tuple[str, ...]
    first_warning: int | None
    verdict: str
    cause: str
    accuracy: float

    @property
    def right(self) -> bool:
        """Whether the expected rule was announced (for the healthy: none at any time)."""
        return self.expected in self.announced if self.expected else not self.announced


def run(case: Case, seed: int, steps: int) -> Outcome:
    torch.manual_seed(seed)
    model = case.make()
    optimizer = case.optimizer(model)
    told: list[gradguard.Finding] = []
    with gradguard.watch(model, optimizer, on_finding=told.append, on_error="raise") as guard:
        for step in range(steps):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(128, seed=1000 * seed + step))
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        diagnosis = guard.diagnose()
    x, y = digits()
    with torch.no_grad():
        accuracy = float((model.eval()(x).argmax(1) == y).float().mean())
    primary = diagnosis.primary
    return Outcome(
        case.name,
        seed,
        case.code,
        tuple(finding.code for finding in told),
        min((finding.step for finding in told), default=None),
        primary.code if primary is not None else ("healthy" if diagnosis.healthy else "no verdict"),
        ", ".join(sorted({finding.cause.value for finding in told if finding.code == case.code})),
        accuracy,
    )


def show(outcomes: list[Outcome], console: Console) -> None:
    table = Table("net", "expected", "announced (runs)", "at step", "cause", "verdict at the end", "accuracy")
    for case in (*CASES, RESCUED):
        mine = [o for o in outcomes if o.case == case.name]
        steps = sorted({o.first_warning for o in mine if o.first_warning is not None})
        table.add_row(
            case.name,
            case.code or "healthy",
            _count([" ".join(o.announced) or "nothing" for o in mine]),
            ", ".join(map(str, steps)) or "-",
            ", ".join(sorted({o.cause for o in mine if o.cause})),
            _count([o.verdict for o in mine]),
            f"{min(o.accuracy for o in mine):.2f} .. {max(o.accuracy for o in mine):.2f}",
        )
    console.print(table)
    outcomes = [o for o in outcomes if o.case != RESCUED.name]
    sick, healthy = [o for o in outcomes if o.expected], [o for o in outcomes if not o.expected]
    console.print(f"sick runs named: {sum(o.right for o in sick)} of {len(sick)}")
    console.print(f"healthy runs left alone: {sum(o.right for o in healthy)} of {len(healthy)}")
    console.print(f"healthy runs called healthy at the end: {sum(o.verdict == 'healthy' for o in healthy)}")


def _count(items: list[str]) -> str:
    return ", ".join(f"{item} x{items.count(item)}" for item in dict.fromkeys(items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("error", gradguard.GradGuardWarning)
    torch.set_num_threads(1)
    jobs = [(case, seed) for case in (*CASES, RESCUED) for seed in range(arguments.seeds)]
    outcomes = [run(case, seed, arguments.steps) for case, seed in track(jobs, console=Console(stderr=True))]
    show(outcomes, Console(width=140))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(o) for o in outcomes], indent=1))


if __name__ == "__main__":
    main()
