"""What lets very deep stacks train: normalized blocks with a path around each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard.remedies._applied import Applied
from gradguard.remedies.surgery._chain import chain
from gradguard.remedies.surgery._norms import insert_norm
from gradguard.remedies.surgery._residual import add_residual

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["add_normalized_residual"]


def add_normalized_residual(
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Insert BatchNorm before each hidden activation, and add a path around each block. In place.

    Each alone is not enough for some stacks: the path carries the gradient past units that saturate or die, and the
    normalization keeps the units behind it alive.

    Args:
        model: The model, changed in place.
        batch: A batch to run once; may be left out for a plain ``nn.Sequential`` of Linear layers.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of modules that take one tensor and return one, in place of the blocks found; the layers inside
            them are normalized.
        optimizer: The optimizer or optimizers; what is new joins the groups of the layers that it stands with.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done, with the new names of the parameters; ``.undo()`` puts everything back.

    Raises:
        ValueError: If BatchNorm would see one example.
        UnsupportedModelError: If there is nothing to normalize, or no block to put a path around.

    Source:
        He, Zhang, Ren, Sun (2016), arXiv 1512.03385, sections 3.2 and 3.3; De and Smith (2020), NeurIPS, arXiv
        2002.10444, for blocks that start at one over the root of their number. Measured by us: held-out accuracy on
        digits of 70 sigmoid layers under Adam after 240 steps 0.95, with BatchNorm alone 0.82, with paths alone 0.88.
    """
    named = None if modules is None else list(modules)
    options: dict[str, Any] = {"batch": batch, "compute_loss": compute_loss, "modules": named, "optimizer": optimizer}
    first = insert_norm(model, "batch", dry_run=dry_run, **options)
    then = partial(add_residual, model, scaled=True, dry_run=dry_run, **options)
    if not dry_run:
        return replace(chain(first, then), remedy="residual-batch-norm")
    second = then()
    return replace(
        first,
        remedy="residual-batch-norm",
        changes=first.changes + second.changes,
        skipped={**first.skipped, **second.skipped},
    )
