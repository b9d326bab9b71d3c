"""What a contest says: who helps, who wins, and what became of everybody."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gradguard._entrant import NOTICEABLE, Entrant
from gradguard._race import DRAW, SURE, Lane, paired_gain
from gradguard.findings import Effect, Prescription
from gradguard.outcomes import TrialRun
from gradguard.remedies.catalogue import LEVELS

__all__ = ["Judgement", "guesses"]

_NEAR_BEST = 0.95
"""Share of the best gain from which a less invasive cure is preferred. Source: ours, algorithms.md, section K: within
5 % of the best, the least invasive."""

_GUESSING = (0.97, 1.1)
"""Shares of ln(classes) between which a classifier guesses, and is as good as any other that does: a last bias that is
right is all it has learnt. Ours: sigmoid nets of 70 layers, whatever is done to them, go from 2.46 to 2.30 in 12 steps,
and those that are cured go on."""

_LEFT = 0.95
"""Share of ln(classes) below which a classifier that was at chance has left it, and a race has been decided. Ours: of
231 sick runs 8 had a winner between this and guessing after their last step."""

_WON = 0.4
"""Share of any other's loss below which a regression is won by far. Ours: BatchNorm that leads sigmoid regressions at
0.46 and 0.5 of the untreated loss after 16 steps ends at two thirds of what ReLU does; LayerNorm that leads by less
ends at a third of what a new initialization does, or worse than nothing."""

_WORTH_IT = 0.1
"""The same where nothing is wrong: a working run is not changed for less. Ours."""


def guesses(loss: float, chance: float) -> bool:
    """Whether a loss is that of guessing or worse; ``False`` where that is not known."""
    return loss > _GUESSING[0] * chance


class Judgement:
    """Compares entrants with the untreated copies, and with each other."""

    def __init__(
        self,
        control: Sequence[Lane],
        entrants: Sequence[Entrant],
        *,
        ill: bool,
        mender: Entrant | None,
        chance: float = math.nan,
    ) -> None:
        """Look at a contest as it stands.

        Args:
            control: Untreated copies, one per seed.
            entrants: All candidates, in the order of the prescriptions.
            ill: Whether anything is wrong.
            mender: What is recommended where no loss tells.
            chance: Loss of a classifier that guesses, NaN where that is not known.
        """
        self._control = control
        self._entrants = entrants
        self._ill = ill
        self._mender = mender
        self._chance = chance

    def _gain(self, entrant: Entrant) -> tuple[float, float]:
        seeds = min(len(entrant.lanes), len(self._control))
        return paired_gain(self._control[:seeds], entrant.lanes[:seeds])

    def _levelled(self, loss: float) -> float:
        """Return a loss, ln(classes) for all that stand for guessing."""
        low, high = _GUESSING
        return self._chance if low * self._chance < loss <= high * self._chance else loss

    def finished(self) -> list[Entrant]:
        """Return who ran as far as the untreated copy, best first; after an interrupt, whoever ran furthest."""
        alive = [entrant for entrant in self._entrants if not entrant.out and entrant.lanes]
        furthest = max((len(entrant.lanes[0].losses) for entrant in alive), default=0)
        return sorted(
            (entrant for entrant in alive if 0 < furthest == len(entrant.lanes[0].losses)),
            key=lambda entrant: entrant.result,
        )

    def helps(self, entrant: Entrant) -> bool:
        """Whether a cure ends clearly below the untreated copies, and not at guessing as they do."""
        untreated = self.control_loss()
        if guesses(entrant.result, self._chance) and untreated <= _GUESSING[1] * self._chance:
            return False
        gain, error = self._gain(entrant)
        asked = NOTICEABLE if self._ill else _WORTH_IT
        return gain > SURE * error and (not math.isfinite(untreated) or gain > asked * abs(untreated))

    def somebody_helps(self, *, clearly: bool = False) -> bool:
        """Whether any of those who ran to the end helps.

        Args:
            clearly: Whether to leave out what is about to leave chance, and may as well stay there.
        """
        limit = _LEFT * self._chance if clearly and guesses(self.control_loss(), self._chance) else math.nan
        return any(self.helps(entrant) and not entrant.result > limit for entrant in self.finished())

    def is_open(self, leader: Entrant) -> bool:
        """Whether a regression is led by a cure that puts something into the model, and not by far."""
        others = [item.result for item in self.finished() if item is not leader]
        nearest = min([self.control_loss(), *others])
        won = 0.0 < leader.result < _WON * nearest < math.inf
        invasive = leader.remedy.level >= LEVELS["normalization"]
        return math.isnan(self._chance) and invasive and not won and self.helps(leader)

    def control_loss(self) -> float:
        """Return the mean result of the untreated copies, NaN where there is none."""
        return sum(lane.result for lane in self._control) / len(self._control) if self._control else math.nan

    def _start(self, best: Entrant) -> float:
        """Return from where gains are counted: what the untreated copy reached, or began with where it rose.

        Against a copy that has diverged all cures gain the same, and the first one would do as well as the best; so
        they do against one that began in the thousands. Where the best one began itself is far enough.
        """
        first = [lane.losses[0] for lane in (*self._control, *best.lanes) if lane.losses]
        return min((loss for loss in (self.control_loss(), *first) if math.isfinite(loss)), default=best.result)

    def _ranked(self) -> tuple[Entrant | None, list[Entrant]]:
        """Return the winner, if there is one, and all who ran to the end: the winner first, then by result."""
        finished = self.finished()
        helping = [entrant for entrant in finished if self.helps(entrant)]
        if not helping:
            first = [] if self._mender is None else [self._mender]
            return self._mender, [*first, *(entrant for entrant in finished if entrant is not self._mender)]
        best = self._levelled(helping[0].result)
        most = max(0.0, self._start(helping[0]) - best)
        near = [entrant for entrant in helping if self._levelled(entrant.result) <= best + (1.0 - _NEAR_BEST) * most]
        winner = min(near, key=lambda entrant: (entrant.remedy.level, entrant.result))
        return winner, [winner, *(entrant for entrant in finished if entrant is not winner)]

    @property
    def leader(self) -> Entrant | None:
        """Who would be recommended as things stand."""
        return self._ranked()[0]

    def best(self) -> Prescription | None:
        """Return what to recommend, with its effect; ``None`` where nothing helps by more than chance."""
        winner, _ = self._ranked()
        return None if winner is None else self._measured(winner)

    def ranking(self) -> tuple[Prescription, ...]:
        """Return who ran to the end, the recommended one first, then by result."""
        return tuple(self._measured(entrant) for entrant in self._ranked()[1])

    def control_run(self) -> TrialRun:
        """Return what became of the untreated copy."""
        lane = self._control[0] if self._control else None
        return TrialRun(
            remedy="",
            loss=self.control_loss(),
            steps=len(lane.losses) if lane is not None else 0,
            seeds=len(self._control),
            outcome="untreated",
            why=lane.fault if lane is not None else "",
        )

    def runs(self) -> Iterator[TrialRun]:
        """Yield what became of every candidate: by rank, then those dropped, then those that were not possible."""
        winner, ranked = self._ranked()
        rest = [entrant for entrant in self._entrants if entrant not in ranked]
        rest.sort(key=lambda entrant: entrant.outcome == "not possible")
        for entrant in (*ranked, *rest):
            yield TrialRun(
                remedy=entrant.prescription.remedy,
                loss=entrant.result,
                steps=len(entrant.lanes[0].losses) if entrant.lanes else 0,
                seeds=len(entrant.lanes),
                outcome="best" if entrant is winner else self._outcome(entrant, finished=entrant in ranked),
                why=entrant.out,
                level=entrant.remedy.level,
                healthy=entrant.healthy,
            )

    def _outcome(self, entrant: Entrant, *, finished: bool) -> str:
        if entrant.outcome or not finished:
            return entrant.outcome or "dropped"
        if self.helps(entrant):
            return "helps"
        gain, error = self._gain(entrant)
        return "worse" if gain < -SURE * error and gain < -NOTICEABLE * abs(self.control_loss()) else "no effect"

    def _measured(self, entrant: Entrant) -> Prescription:
        """Return a cure with what it did; where it may draw weights, with the seed of the best that were measured."""
        arguments = dict(entrant.prescription.arguments)
        if entrant.remedy.acts_on == "model":
            arguments["seed"] = DRAW + min(entrant.lanes, key=lambda lane: lane.result).seed
        effect = Effect(loss_before=self.control_loss(), loss_after=entrant.result, steps=len(entrant.lanes[0].losses))
        return replace(entrant.prescription, arguments=arguments, effect=effect)
