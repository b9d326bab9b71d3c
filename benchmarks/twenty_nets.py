"""Ten sick and ten healthy nets on scikit-learn's digits, five seeds each: what does gradguard say of them?

Run from the root of the repository::

    python -m benchmarks.twenty_nets [--seeds 5] [--steps 240] [--json FILE]

Each net is trained for real; the table shows the verdict at the end of the run, when the first warning came, and how
well the net learnt, so that no label has to be believed.
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


@dataclass(frozen=True)
class Outcome:
    """What one run showed."""

    case: str
    seed: int
    expected: str
    found: str
    cause: str
    first_warning: int | None
    accuracy: float

    @property
    def right(self) -> bool:
        """Whether the primary finding is the expected one (none for the healthy)."""
        return self.found == self.expected


def run(case: Case, seed: int, steps: int) -> Outcome:
    torch.manual_seed(seed)
    model = case.make()
    optimizer = case.optimizer(model)
    warned: list[int] = []
    with gradguard.watch(model, optimizer, on_finding=lambda f: warned.append(f.step), on_error="raise") as guard:
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
        primary.code if primary is not None else ("" if diagnosis.healthy else "no verdict"),
        primary.cause.value if primary is not None else "",
        min(warned, default=None),
        accuracy,
    )


def show(outcomes: list[Outcome], console: Console) -> None:
    table = Table("net", "expected", "found (seeds)", "cause", "first warning at step", "accuracy")
    for case in CASES:
        mine = [o for o in outcomes if o.case == case.name]
        found = {o.found or "healthy": sum(p.found == o.found for p in mine) for o in mine}
        steps = sorted({str(o.first_warning) for o in mine})
        table.add_row(
            case.name,
            case.code or "healthy",
            ", ".join(f"{name} {count}" for name, count in found.items()),
            ", ".join(sorted({o.cause for o in mine if o.cause})),
            ", ".join(steps) if steps != ["None"] else "-",
            f"{min(o.accuracy for o in mine):.2f} .. {max(o.accuracy for o in mine):.2f}",
        )
    console.print(table)
    sick, healthy = [o for o in outcomes if o.expected], [o for o in outcomes if not o.expected]
    console.print(f"sick runs named rightly: {sum(o.right for o in sick)} of {len(sick)}")
    console.print(f"healthy runs called healthy: {sum(o.right for o in healthy)} of {len(healthy)}")
    console.print(f"healthy runs warned of at any time: {sum(o.first_warning is not None for o in healthy)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("error", gradguard.GradGuardWarning)
    torch.set_num_threads(1)
    jobs = [(case, seed) for case in CASES for seed in range(arguments.seeds)]
    outcomes = [run(case, seed, arguments.steps) for case, seed in track(jobs, console=Console(stderr=True))]
    show(outcomes, Console(width=140))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(o) for o in outcomes], indent=1))


if __name__ == "__main__":
    main()
