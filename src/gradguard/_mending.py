"""Who is recommended where no loss tells: the first cure that a check finds well, or the first that does no harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradguard._entrant import NOTICEABLE, Entrant
from gradguard._health import THROUGH_TIME, Health
from gradguard._judgement import Judgement
from gradguard._race import Lane

__all__ = ["first_that_is_harmless", "first_that_mends"]

_HALF = 0.5
"""Share of an illness's decades that a cure may leave where no loss tells. Ours: over 60 steps orthogonal weights leave
3.7 of 15.5 decades to a tanh RNN."""


def first_that_is_harmless(entrants: Sequence[Entrant], judgement: Judgement) -> Entrant | None:
    """Return the first cure that costs nothing in the steps of a trial."""
    untreated, finished = judgement.control_loss(), judgement.finished()
    allowed = untreated + NOTICEABLE * abs(untreated)
    return next((entrant for entrant in entrants if entrant in finished and entrant.result <= allowed), None)


def first_that_mends(
    entrants: Sequence[Entrant],
    control: Lane,
    health: Health,
    found: Mapping[str, float],
    illness: str,
    *,
    allowed: float,
) -> Entrant | None:
    """Return the first cure after which a check no longer finds the illness.

    Some runs learn nothing for hundreds of steps even when they are healthy, others lose little by little: no trial is
    long enough for their loss. What a check sees of the illness in the untreated copy, and not in the treated one, is
    then all there is to go by; or what leaves the fewest decades of it, half of them at most.

    Of cures that leave as many through time, cells with gates come first: where no loss tells, memories are long. Ours:
    of 2 such runs gates cure both and orthogonal weights none; where a loss tells, those do a little better.

    Args:
        entrants: Candidates, in the order of the prescriptions.
        control: The untreated copy.
        health: Checks copies.
        found: What it finds in the untreated copy; in one that learns, at the end.
        illness: Code of what is to go, among those.
        allowed: By how much the loss may be higher than the untreated one.
    """
    least, mender = _HALF * found[illness], None
    for entrant in sorted(entrants, key=lambda item: -item.remedy.level) if illness in THROUGH_TIME else entrants:
        if not entrant.lanes or entrant.lanes[0].fault or not entrant.lanes[0].losses:
            continue
        last = len(entrant.lanes[0].losses)
        worse = entrant.lanes[0].halves(last)[1] + entrant.lanes[0].beyond - control.halves(last)[1]
        left = health.after(entrant.lanes[0])
        remains = left.get(illness, 0.0)
        if remains < least and left.keys() <= found.keys() and not worse > allowed:
            least, mender = remains, entrant
            entrant.healthy = remains == 0.0
    return mender
