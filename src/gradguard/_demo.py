"""What ``gradguard demo`` trains: a sick network and its healthy twin, on scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.errors import MissingExtraError
from gradguard.findings import Diagnosis, Finding
from gradguard.outcomes import TrialResult
from gradguard.remedies.applying import apply
from gradguard.trials import trial
from gradguard.watching import watch

__all__ = [
    "CASES",
    "Case",
    "Digits",
    "Network",
    "accuracy",
    "load_digits",
    "train",
    "train_with_lightning",
    "try_cures",
]

_LAYERS = 20
_WIDTH = 64
_CLASSES = 10
_BATCH_SIZE = 128
_LEARNING_RATE = 1e-3
_TRAINING_EXAMPLES = 1437
"""Four fifths of the 1797 digits; the rest is held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One of the two networks.

    Attributes:
        label: ``"sick"`` or ``"healthy"``.
        title: What it is, in a line.
        activation: Stands after each hidden layer.
        initialize: Fills the weight of a hidden layer in place.
    """

    label: str
    title: str
    activation: type[nn.Module]
    initialize: Callable[[Tensor], Tensor]


def _he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


CASES = (
    Case(
        label="sick",
        title=f"{_LAYERS} layers of sigmoids, Xavier initialization",
        activation=nn.Sigmoid,
        initialize=nn.init.xavier_normal_,
    ),
    Case(
        label="healthy",
        title=f"{_LAYERS} layers of ReLUs, He initialization",
        activation=nn.ReLU,
        initialize=_he,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Scikit-learn's digits, standardized as a whole.

    Attributes:
        inputs: Shape ``[examples, 64]``.
        labels: 0 to 9, shape ``[examples]``.
        held_out_inputs: Like ``inputs``, for examples that no network is trained on.
        held_out_labels: Their labels.
    """

    inputs: Tensor
    labels: Tensor
    held_out_inputs: Tensor
    held_out_labels: Tensor

    def batches(self, count: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` batches of at most 128 examples, shuffled anew for each pass through the data."""
        generator = torch.Generator().manual_seed(seed)
        made = 0
        while True:
            for rows in torch.randperm(len(self.labels), generator=generator).split(_BATCH_SIZE):
                if made == count:
                    return
                yield self.inputs[rows], self.labels[rows]
                made += 1


def load_digits() -> Digits:
    """Return the digits that scikit-learn ships; no network is needed.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(
            "demo needs the digits of scikit-learn, which is not installed. "
            "Install the extra: pip install 'gradguard[demo]'"
        ) from error
    data = load()
    inputs = torch.tensor(data.data, dtype=torch.float32)
    inputs = (inputs - inputs.mean()) / inputs.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learned, held_out = order[:_TRAINING_EXAMPLES], order[_TRAINING_EXAMPLES:]
    return Digits(
        inputs=inputs[learned],
        labels=labels[learned],
        held_out_inputs=inputs[held_out],
        held_out_labels=labels[held_out],
    )


class Network(nn.Module):
    """20 linear layers, 64 wide, with an activation after each but the last: digits in, logits out."""

    def __init__(self, case: Case) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(_LAYERS - 1):
            hidden = nn.Linear(_WIDTH, _WIDTH)
            case.initialize(hidden.weight)
            nn.init.zeros_(hidden.bias)
            layers += [hidden, case.activation()]
        output = nn.Linear(_WIDTH, _CLASSES)
        nn.init.xavier_normal_(output.weight)
        nn.init.zeros_(output.bias)
        self.net = nn.Sequential(*layers, output)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits of shape ``[batch, 10]`` for inputs of shape ``[batch, 64]``."""
        logits: Tensor = self.net(inputs)
        return logits


def train(
    model: Network,
    batches: Iterator[tuple[Tensor, Tensor]],
    on_finding: Callable[[Finding], object],
    advance: Callable[[], None],
) -> Diagnosis:
    """Train a network in a plain loop under a guard.

    Args:
        model: The network.
        batches: Inputs and labels, one pair per optimizer step.
        on_finding: Called when a finding begins.
        advance: Called after each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    with watch(model, optimizer, on_finding=on_finding) as guard:
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
            advance()
        return guard.diagnose()


def train_with_lightning(
    model: Network,
    batches: Iterator[tuple[Tensor, Tensor]],
    on_finding: Callable[[Finding], object],
    advance: Callable[[], None],
) -> Diagnosis:
    """Do what :func:`train` does, through a Lightning Trainer.

    Raises:
        MissingExtraError: If no Lightning is installed.
    """
    from gradguard.integrations._lightning_demo import fit

    return fit(model.net, list(batches), learning_rate=_LEARNING_RATE, on_finding=on_finding, advance=advance)


def try_cures(case: Case, digits: Digits, diagnosis: Diagnosis, *, steps: int, seed: int) -> tuple[TrialResult, float]:
    """Try cures on the network of a case as it was before training; apply the best and train with it.

    Args:
        case: A sick one.
        digits: The data.
        diagnosis: What a run of it found.
        steps: Steps of that run, and of the cured one.
        seed: Seed of the weights and of the order of the batches.

    Returns:
        The trial, and the held-out accuracy of the cured network, NaN where nothing helped.
    """
    torch.manual_seed(seed)
    model = Network(case)
    batches = list(digits.batches(steps, seed=seed))
    result = trial(model, batches, _loss, _adam, diagnosis=diagnosis, run_steps=steps, seed=seed)
    if result.best is None:
        return result, math.nan
    optimizer = _adam(model)
    apply(result.best, model, optimizer=optimizer, batch=batches[0], compute_loss=_loss)
    for batch in batches:
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
    model.eval()
    return result, accuracy(model, digits)


def _adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: Network, digits: Digits) -> float:
    """Return the share of held-out digits that the model names correctly, 0 to 1."""
    with torch.no_grad():
        guesses = model(digits.held_out_inputs).argmax(dim=1)
    return float((guesses == digits.held_out_labels).float().mean())
