"""Faults of the optimizer: rates, forgotten parameters, epsilon, clipping, the wrong sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, Adam, RMSprop

from benchmarks.clinic.case import Job, Record, healthy, sick
from benchmarks.clinic.data import breast_cancer, digits
from benchmarks.clinic.nets import Detach, mlp
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, classify, sgd

__all__ = ["CASES"]


def on_digits(
    optimizer: MakeOptimizer, *, depth: int = 5, factor: float = 1.0, measure: str = "accuracy", **options: Any
) -> Callable[[int], Job]:
    """Return a builder of a well-initialised ReLU net on digits; the loss is multiplied by ``factor``."""
    return lambda seed: classify(
        mlp(64, 10, depth, init="he"),
        digits(),
        optimizer,
        seed,
        loss=lambda model, batch: factor * F.cross_entropy(model(batch[0]), batch[1]),
        measure=measure,
        **options,
    )


def lbfgs(seed: int) -> Job:
    """The closure evaluates a batch several times."""
    job = classify(mlp(30, 2, 3, nn.Tanh, width=16), breast_cancer(), adam(), seed, size=128, steps=40)
    optimizer = LBFGS(job.model.parameters(), lr=0.3, max_iter=4)
    job.optimizers = (optimizer,)

    def advance(job: Job, step: int, record: Record) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = job.loss(job.model, job.batch(step))
            loss.backward()
            return loss

        optimizer.step(closure)

    job.advance = advance
    return job


def bottleneck(*, upto: int = 0, parts: str = "all") -> Callable[[int], Job]:
    """Return a builder of a narrow deep net, of which the optimizer gets a part, or whose lower part is detached.

    Args:
        upto: Layers behind which the signal is detached, 0 for none.
        parts: ``"all"``, ``"head"`` (the last layer alone) or ``"body"`` (all but the last two).
    """

    def build(seed: int) -> Job:
        layers = list(mlp(64, 10, 8, nn.Tanh, width=12, init="xavier"))
        if upto:
            layers.insert(2 * upto, Detach())
        model = nn.Sequential(*layers)
        chosen = {"all": model, "head": model[-1:], "body": model[:-3]}[parts]
        return classify(
            model, digits(), adam(3e-3), seed, measure="known", parameters=list(chosen.parameters()), steps=240
        )

    return build


def from_start(*, backwards: bool) -> MakeOptimizer:
    return lambda parameters: Adam(parameters, lr=1e-3, maximize=backwards)


CASES = (
    healthy("optimizer/relu-5-sgd", on_digits(sgd(0.02)), learns=0.85),
    healthy("optimizer/relu-5-adam", on_digits(adam()), learns=0.85),
    healthy("optimizer/relu-6-adamw", on_digits(adamw(1e-3), depth=6), learns=0.85),
    healthy("optimizer/relu-4-sgd", on_digits(sgd(0.02), depth=4), learns=0.85),
    healthy("optimizer/rmsprop", on_digits(lambda parameters: RMSprop(parameters, lr=5e-4), depth=6), learns=0.85),
    healthy("optimizer/lbfgs", lbfgs, "a closure, evaluated several times a step", learns=0.85),
    healthy("optimizer/clipped-sgd", on_digits(sgd(0.05), clip_norm=1.0), "clipping now and then", learns=0.85),
    healthy("optimizer/clip-never-engages", on_digits(adam(), clip_norm=1e6), "a threshold never reached", learns=0.85),
    healthy("optimizer/narrow-8-adam", bottleneck(), learns=0.5),
    healthy(
        "optimizer/relu-5-breast-cancer-sgd",
        lambda seed: classify(mlp(30, 2, 5, width=32, init="he"), breast_cancer(), sgd(0.02), seed),
        learns=0.85,
    ),
    sick(
        "optimizer/rate-too-high-sgd",
        on_digits(sgd(3.0)),
        "a learning rate 150 times too high",
        code="GG501",
        also=("divergence", "non_finite", "dead"),
        twin="optimizer/relu-5-sgd",
        cure="a lower learning rate",
    ),
    sick(
        "optimizer/rate-too-high-adam",
        on_digits(adam(0.5)),
        "a learning rate 500 times too high",
        code="GG501",
        also=("divergence", "dead"),
        twin="optimizer/relu-5-adam",
        cure="a lower learning rate",
    ),
    sick(
        "optimizer/rate-too-low-adam",
        on_digits(adam(1e-8)),
        "a learning rate of 1e-8",
        code="GG502",
        twin="optimizer/relu-5-adam",
        cure="a higher learning rate",
    ),
    sick(
        "optimizer/rate-too-low-sgd",
        on_digits(sgd(1e-7)),
        "a learning rate of 1e-7",
        code="GG502",
        twin="optimizer/relu-5-sgd",
        cure="a higher learning rate",
    ),
    sick(
        "optimizer/body-forgotten",
        bottleneck(parts="head"),
        "the optimizer got the last layer's parameters only",
        code="GG503",
        culprit=("0",),
        twin="optimizer/narrow-8-adam",
        phase="wiring",
        cure="pass model.parameters()",
        margin=0.1,
    ),
    sick(
        "optimizer/head-forgotten",
        bottleneck(parts="body"),
        "the optimizer does not hold the last two layers",
        code="GG503",
        culprit=("12", "14"),
        twin="optimizer/narrow-8-adam",
        phase="wiring",
        cure="pass model.parameters()",
    ),
    sick(
        "optimizer/detached-in-the-middle",
        bottleneck(upto=6),
        "a forgotten detach() in front of the last two layers",
        code="GG104",
        culprit=("10", "11", "12"),
        twin="optimizer/narrow-8-adam",
        phase="wiring",
        cure="drop the detach()",
        margin=0.1,
    ),
    sick(
        "optimizer/epsilon-limits-adam",
        on_digits(adam(eps=1.0)),
        "Adam's epsilon of 1 dwarfs every gradient",
        code="GG504",
        also=("learning_rate",),
        twin="optimizer/relu-5-adam",
        cure="the usual 1e-8",
    ),
    sick(
        "optimizer/loss-below-epsilon",
        on_digits(adamw(1e-3), depth=6, factor=1e-10),
        "gradients of 1e-11 against Adam's epsilon of 1e-8",
        code="GG504",
        also=("learning_rate",),
        twin="optimizer/relu-6-adamw",
        cure="scale the loss, or an epsilon of 1e-15",
    ),
    sick(
        "optimizer/wrong-sign",
        on_digits(from_start(backwards=True)),
        "the loss is maximised",
        code="GG505",
        also=("exploding",),
        twin="optimizer/relu-5-adam",
        cure="minimise it",
    ),
    sick(
        "optimizer/clipped-away",
        on_digits(sgd(0.05), clip_norm=1e-3),
        "clipping at 0.001 cuts every step to next to nothing",
        code="GG602",
        also=("learning_rate",),
        twin="optimizer/clipped-sgd",
        cure="a threshold near the usual norm",
    ),
    sick(
        "optimizer/values-clipped-away",
        on_digits(sgd(0.02), depth=4, clip_value=1e-6),
        "clipping every entry at 0.000001",
        code="GG602",
        also=("learning_rate",),
        twin="optimizer/relu-4-sgd",
        cure="clip by norm, near the usual one",
    ),
)
