"""Embeddings, dense and sparse: a batch touches a few rows, and that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, SparseAdam

from benchmarks.clinic.case import Job, Record, healthy, sick
from benchmarks.clinic.data import snippets
from benchmarks.clinic.nets_sequence import TextNet
from benchmarks.clinic.tasks import MakeOptimizer, adam, classify

__all__ = ["CASES"]


def read(optimizer: MakeOptimizer, *, steps: int = 200, size: int = 32, **options: Any) -> Callable[[int], Job]:
    """Return a builder of a text classifier."""
    return lambda seed: classify(
        TextNet(**options), snippets(), optimizer, seed, steps=steps, size=size, measure="known"
    )


def sparse(seed: int) -> Job:
    """Sparse gradients for the table, with an optimizer of its own."""
    model = TextNet(sparse=True)
    job = classify(model, snippets(), adam(), seed, steps=200, size=32, measure="known")
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("embed")]
    job.optimizers = (Adam(rest, lr=5e-3), SparseAdam(list(model.embed.parameters()), lr=1e-2))

    def advance(job: Job, step: int, record: Record) -> None:
        for optimizer in job.optimizers:
            optimizer.zero_grad()
        loss = job.loss(job.model, job.batch(step))
        loss.backward()
        record(loss)
        for optimizer in job.optimizers:
            optimizer.step()

    job.advance = advance
    return job


def sparse_sgd(seed: int) -> Job:
    """Sparse gradients and plain SGD, which takes them as they are."""
    model = TextNet(sparse=True, padding=False)
    job = classify(model, snippets(), adam(), seed, steps=240, size=64, measure="known")
    job.optimizers = (SGD(model.parameters(), lr=0.3),)
    return job


class LookedUp(TextNet):
    """Reads its table through ``.weight.data``, past autograd."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``[batch, classes]``."""
        shown = (x != 0).unsqueeze(-1)
        mean = (self.embed.weight.data[x] * shown).sum(1) / shown.sum(1).clamp(min=1)
        result: Tensor = self.head(torch.relu(self.hidden(mean)))
        return result


def head_only(seed: int) -> Job:
    model = TextNet()
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("embed")]
    return classify(model, snippets(), adam(5e-3), seed, steps=200, size=32, measure="known", parameters=rest)


def looked_up(seed: int) -> Job:
    return classify(LookedUp(), snippets(), adam(5e-3), seed, steps=200, size=32, measure="known")


def killed(seed: int) -> Job:
    job = sparse_sgd(seed)
    nn.init.constant_(job.model.get_parameter("hidden.bias"), -30.0)
    return job


CASES = (
    healthy("embedding/dense-adam", read(adam(5e-3)), "most rows have no gradient in a step", learns=0.4),
    healthy("embedding/sparse-two-optimizers", sparse, "sparse gradients, two optimizers", learns=0.4),
    healthy("embedding/sparse-sgd", sparse_sgd, "sparse gradients", learns=0.1),
    sick(
        "embedding/forgotten",
        head_only,
        "the optimizer does not hold the table",
        code="GG503",
        culprit=("embed",),
        twin="embedding/dense-adam",
        phase="wiring",
        cure="pass model.parameters()",
        margin=0.1,
    ),
    sick(
        "embedding/read-past-autograd",
        looked_up,
        "the table is read through .weight.data: no gradient comes back to it",
        code="GG104",
        culprit=("embed",),
        twin="embedding/dense-adam",
        phase="wiring",
        cure="call the module",
        margin=0.1,
    ),
    sick(
        "embedding/dead-hidden-layer",
        killed,
        "a bias of -30 keeps the hidden layer at zero",
        code="GG301",
        culprit=("hidden", "head"),
        twin="embedding/sparse-sgd",
        phase="initialization",
        cure="initialise that bias at zero",
    ),
)
