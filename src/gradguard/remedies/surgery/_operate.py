"""What every operation does alike: change or only say what it would change, run once more, write it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization._targets import check_arguments
from gradguard.remedies.surgery._ledger import Ledger, ledger
from gradguard.remedies.surgery._survey import Survey, survey

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Edit", "checked", "operate"]

_NAMED = 3
"""Modules named for each reason in an error. Ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change that is planned.

    Attributes:
        words: What it does, in one line.
        make: Makes it; returns the module that must run from then on, ``None`` where there is no new one.
        check: Takes what runs then, and returns what is wrong with it.
    """

    words: str
    make: Callable[[Ledger], nn.Module | None]
    check: Callable[[Survey], str | None] | None = None


def checked(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the optimizers; refuse models that no operation can change.

    Raises:
        TypeError: If the model is no module or an optimizer is none.
        UnsupportedModelError: If the model is scripted, compiled, wrapped for data parallelism, on the meta device,
            sharded, or not yet materialised, or an optimizer holds none of its parameters.
    """
    return check_arguments(model, optimizer, verb="change")


def operate(
    remedy: str,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    edits: Sequence[Edit],
    skipped: Mapping[str, str],
    *,
    dry_run: bool,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any] | None,
) -> Applied:
    """Make the edits, or only say what they would be; put everything back if one fails.

    With a batch the changed model runs once, so that code which cannot bear the change fails here and not in training.

    Raises:
        UnsupportedModelError: If there is nothing to change, or what was inserted does not run.
    """
    if not edits:
        why = _grouped(skipped) or "It has no module of the kind"
        raise UnsupportedModelError(f"{remedy} found nothing to change in this {type(model).__name__}. {why}")
    changes = [edit.words for edit in edits]
    if dry_run:
        return Applied(model=model, remedy=remedy, changes=tuple(changes), changed=(), skipped=dict(skipped))
    with ledger(model, optimizers) as kept:
        made = [edit.make(kept) for edit in edits]
        if batch is not None:
            found = survey(model, batch, compute_loss)
            _check_runs(remedy, found, [module for module in made if module is not None])
            for wrong in (None if edit.check is None else edit.check(found) for edit in edits):
                if wrong is not None:
                    raise UnsupportedModelError(f"{remedy} was put in, and {wrong}. Change that code by hand")
        return kept.finish(remedy, changes, skipped)


def _grouped(skipped: Mapping[str, str]) -> str:
    """Return the reasons, each with the first few of the modules that it holds for."""
    places: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        places.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}: {reason}"
        for reason, names in places.items()
    )


def _check_runs(remedy: str, found: Survey, made: Sequence[nn.Module]) -> None:
    ran = {id(call.module) for call in found.calls}
    names = {id(module): clean_name(name) for name, module in found.model.named_modules()}
    for module in made:
        if id(module) not in ran:
            raise UnsupportedModelError(
                f"{remedy} was put at {names.get(id(module), 'a place')} and did not run on the batch: code of the "
                "model reaches the layer by another way than its attribute (a list of its own, or its weight). Change "
                "that code by hand"
            )
