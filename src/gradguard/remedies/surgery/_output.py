"""The output as it comes from the last layer: no activation behind it that cuts off what it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied
from gradguard.remedies.surgery._activations import DYING, not_hidden
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import survey

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["linear_output"]


def linear_output(
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Take ReLU and its like away behind the last layer, in place.

    A ReLU at the output makes negative predictions impossible, and where it is zero for a whole batch no gradient comes
    back at all: the net is dead. Sigmoid and others that bound the output on purpose stay.

    Args:
        model: The model, changed in place.
        batch: A batch to run once, which shows what is at the output; may be left out for a plain ``nn.Sequential``.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        optimizer: The optimizer or optimizers; nothing of theirs changes.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done; ``.undo()`` puts everything back.

    Raises:
        UnsupportedModelError: If there is no such activation, as a module, at the output.

    Source: ours; that the output of a regression is linear: Goodfellow, Bengio, Courville (2016), Deep Learning,
        section 6.2.2.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU())
        >>> print(linear_output(model).changes[0])
        3: ReLU behind the last layer > Identity
    """
    optimizers = checked(model, optimizer)
    found = survey(model, batch, compute_loss)
    edits: list[Edit] = []
    skipped: dict[str, str] = {}
    for raw, module in model.named_modules():
        if type(module) not in DYING:
            continue
        name = clean_name(raw)
        reason = not_hidden(found, module)
        if reason == "it is at the output":
            words = f"{name}: {type(module).__name__} behind the last layer > Identity"
            edits.append(Edit(words=words, make=partial(_take_away, module)))
        else:
            skipped[name] = reason or "it is not at the output"
    return operate(
        "linear-output", model, optimizers, edits, skipped, dry_run=dry_run, batch=batch, compute_loss=compute_loss
    )


def _take_away(module: nn.Module, kept: Ledger) -> nn.Module:
    new = nn.Identity().train(module.training)
    kept.replace(module, new)
    return new
