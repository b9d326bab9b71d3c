"""Two remedies as one: undone together, and undone at once if the second one fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gradguard.remedies._applied import Applied

__all__ = ["chain"]


@dataclass(slots=True, eq=False)
class _Both:
    """Undoes the second remedy, then the first."""

    applied: list[Applied] = field(default_factory=list)

    def restore(self) -> None:
        """Put everything back; once done there is nothing left to put back."""
        while self.applied:
            self.applied.pop().undo()


def chain(first: Applied, then: Callable[[], Applied]) -> Applied:
    """Apply a second remedy behind a first one and return the record of both.

    Args:
        first: What was done.
        then: Does the second; if it raises, the first is undone.
    """
    try:
        second = then()
    except BaseException:
        first.undo()
        raise
    return replace(
        first,
        changes=first.changes + second.changes,
        changed=tuple(dict.fromkeys((*(second.names.get(name, name) for name in first.changed), *second.changed))),
        skipped={**first.skipped, **second.skipped},
        names={old: second.names.get(name, name) for old, name in first.names.items()},
        _snapshot=_Both([first, second]),
    )
