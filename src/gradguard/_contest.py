"""The contest of a trial: who enters, who is dropped, who wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard._copies import Copies, OutOfTime
from gradguard._easing import EASED, OVERSHOOTS, UNDERSHOOTS, does_better, halved
from gradguard._entrant import NOTICEABLE, Entrant, by_promise, far_behind, idles, leads_by_far
from gradguard._health import OF_RUNS, SCREENED, THROUGH_TIME, Health, Illness
from gradguard._judgement import Judgement, guesses
from gradguard._measuring import is_coarse, look
from gradguard._mending import first_that_is_harmless, first_that_mends
from gradguard._plan import Plan
from gradguard._race import Lane, Race, steps_to
from gradguard._rates import HALF_A_DECADE
from gradguard._twins import check_memory
from gradguard._untouched import FAILURES
from gradguard.findings import Finding

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Contest"]

_ENOUGH = 2
"""Promising candidates below which reserves enter. Ours: filling up to five costs a third more and cures 2 of 219."""

_CALLED = 6
"""Candidates up to which reserves are called where nobody helps. Ours."""

_SLOW = 40
"""Steps up to which a race for an illness of layers goes on where the untreated copy learns as well as any; beyond them
only those go on that a check finds well. Ours: of 4 such regressions none was cured with 40 steps, 4 with 80 to 160."""

_RETRIES = 2
"""Times that a rate is lowered by half a decade where it diverges after the search. Ours."""


class Contest:
    """Runs candidates against an untreated copy."""

    def __init__(
        self,
        model: nn.Module,
        race: Race,
        make_optimizer: Callable[[Any], Optimizer],
        *,
        plan: Plan,
        illness: Finding | None = None,
        deadline: float = math.inf,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare; nothing is copied before :meth:`run`."""
        self._model = model
        self._copies = Copies(model, race, make_optimizer, deadline=deadline)
        self._race = race
        self._plan = plan
        self._illness = Illness.of(illness)
        self._health = Health(model, race, self._illness.code)
        self._progress = progress
        self._control: list[Lane] = []
        self._entrants: list[Entrant] = []
        self._reserves: Sequence[Entrant] = ()
        self._mender: Entrant | None = None
        self._length = plan.length
        self.shown, self.unproven, self.interrupted = True, False, False

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken on copies so far."""
        return self._race.steps_taken

    def run(self, entrants: Sequence[Entrant], reserves: Sequence[Entrant] = ()) -> None:
        """Run the race to its end, the deadline or an interrupt; what is known by then is kept.

        Args:
            entrants: Candidates, in the order of the prescriptions.
            reserves: Who enters where fewer than two of those can be applied and mend what a check sees, or none helps.
        """
        self._entrants, self._reserves = list(entrants), reserves
        most = max(len(entrants), _CALLED if reserves else 0) + (len(EASED) if self._plan.easing else 0)
        check_memory(self._model, copies=most + 1)
        try:
            self._run()
        except (KeyboardInterrupt, OutOfTime):
            self.interrupted = True

    def _run(self) -> None:
        self._control = [first := self._copies.untreated(0)]
        look(self._race, first)
        others = first.looked
        self._copies.advance(first, 1)
        self._race.set_limit(first, others)
        whole = is_coarse(self._race) or self._illness.came_late
        self._copies.advance_to_end(first, self._plan.length if whole else self._plan.before_last)
        self.shown = self._shows()
        for entrant in self._entrants:
            self._enter(entrant)
        self._screen()
        for rung, keep in zip(self._plan.rungs, (*self._plan.keep, len(self._entrants)), strict=True):
            if rung == self._plan.length and not self._is_decided(self._plan.before_last):
                self._copies.advance_to_end(first, rung)
            self._race_to(rung)
            self._thin(rung, keep)
        self._call_back()
        self._slow_down()
        self._make_sure()
        tuned = self._tune_rate()
        self._run_on()
        if not tuned:
            self._make_sure()
            self._tune_rate()
        for seed in range(1, self._plan.seeds):
            self._repeat(seed)
        self._look_at_health()

    def _shows(self) -> bool:
        """Whether the untreated copy is ill: what began late in a run need not show in its first steps."""
        late = self._illness.came_late and not self._illness.climbed and self._learns()
        return not (late and any(entrant.remedy.level == 0 for entrant in self._entrants))

    def _is_decided(self, rung: int) -> bool:
        """Whether the untreated copy stands still, and so far behind, that its further steps tell nothing."""
        return bool(self._illness.code) and not self._learns() and leads_by_far(self._running(), self._control[0], rung)

    def _call_back(self) -> None:
        """Let those run to the end who stood better when they were dropped than the best one does now."""
        best = min((item.lanes[0].halves(self._length)[1] for item in self.judgement.finished()), default=math.inf)
        for entrant in self._entrants:
            if entrant.may_come_back and entrant.lanes[0].halves(self._length)[1] < best - NOTICEABLE * abs(best):
                entrant.outcome = entrant.out = ""
        self._race_to(self._length)

    def _slow_down(self) -> None:
        """Where nobody helps, let cures that diverged try again at a tenth of the rate."""
        if not self.shown or self.judgement.somebody_helps():
            return
        for entrant in [item for item in self._entrants if item.outcome == "diverged" and not item.remedy.searched]:
            slower = self._copies.at_rate(entrant.prescription, entrant.remedy, EASED[-1], self._length)
            if not slower.lanes[0].fault:
                self._replace(entrant, slower)

    def _make_sure(self) -> None:
        """Let a short race for a regression that a cure with a new module leads go on to where it tells.

        What falls first need not fall furthest: BatchNorm leads in 16 steps where in 60 others do, and LayerNorm, which
        makes of few features little more than their signs, leads before it comes to a stop. The best of those who were
        dropped comes back for it.
        """
        leader, short = self.judgement.leader, self._length < _SLOW <= self._plan.longest
        if leader is None or not short or not self.judgement.is_open(leader):
            return
        waiting = (item for item in self._entrants if item.may_come_back)
        for entrant in sorted(waiting, key=lambda item: item.lanes[0].halves(self._length)[1])[:1]:
            entrant.outcome = entrant.out = ""
        if not self._running()[1:]:
            return
        decided, self._length = self._is_decided(self._length), _SLOW
        self._copies.advance_measured(leader.lanes[0], _SLOW)
        if not decided:
            self._copies.advance_to_end(self._control[0], _SLOW)
        self._race_to(_SLOW)

    def _call_reserves(self) -> None:
        """Let the first of the reserves try that mend what a check sees; who only guesses then leaves again."""
        called: list[Entrant] = []
        for entrant in self._reserves:
            if len(self._running()) + len(called) < _CALLED and entrant not in self._entrants and not entrant.out:
                self._enter(entrant)
                if entrant.lanes and not self._is_hopeless(entrant):
                    called.append(entrant)
        self._entrants += called
        self._race_to(self._length)
        for entrant in called:
            if guesses(entrant.result, self._race.chance) and not entrant.out:
                self._drop(entrant, "dropped", f"guesses after {self._length} steps")

    def _run_on(self) -> None:
        """Where no loss tells a cure from nothing, take those that were dropped for it back in, and run for longer.

        Some runs stand still for fifty steps whatever is done to them; the first ones say nothing about any cure then.
        What is to be remembered through time stands still for hundreds: there a check has to do.
        """
        if self._illness.code in THROUGH_TIME and not self._control[0].fault and self._first_that_mends() is not None:
            return
        for rung, keep in self._plan.overtime:
            lost = bool(self._control[0].fault) and math.isnan(self._race.chance)
            slow = self._learns() and (self._illness.code not in SCREENED or not self._go_on_well(rung))
            if not self.shown or lost or slow or self.judgement.somebody_helps(clearly=rung <= _SLOW):
                return
            anew = rung == self._plan.overtime[0][0] and (rung <= _SLOW or not self._learns())
            back = [item for item in self._entrants if anew and item.outcome == "dropped"]
            lanes = [self._control[0], *(item.lanes[0] for item in (*self._running(), *back) if item.lanes)]
            if self.steps_taken + steps_to(rung, lanes, seeds=self._plan.seeds) > self._plan.budget:
                return
            for entrant in back:
                entrant.outcome = entrant.out = ""
            self._length = rung
            self._copies.advance_to_end(self._control[0], rung)
            self._race_to(rung)
            if rung == _SLOW and not self._learns() and not self.judgement.somebody_helps():
                self._call_reserves()
            if keep:
                self._cut(rung, keep, last=[item for item in self._running() if self._guesses_and_is_ill(item, rung)])

    def _go_on_well(self, rung: int) -> bool:
        """Beyond 40 steps drop whom a check still finds ill; return whether anybody is left."""
        if rung <= _SLOW or self.judgement.somebody_helps():
            return rung <= _SLOW
        for entrant in [item for item in self._running() if self._health.stays(item.lanes[0])]:
            self._drop(entrant, "dropped", f"a check after {self._length} steps still finds {self._illness.code}")
        return bool(self._running())

    def _tune_rate(self) -> bool:
        """Try who leads at other rates: at lower ones where its steps overshoot, at higher ones where they are short.

        Returns whether somebody leads.

        A cure may let a run learn at a rate that is too high for it all the same: in the first steps its loss falls
        as fast as at any other, and later no further. A searched rate has a margin that regressions rarely need.
        """
        leader, late = self.judgement.leader, self._length > max(self._plan.length, self._plan.easing)
        if leader is None or not self._plan.easing:
            return False
        lane = leader.lanes[0]
        cautious = leader.remedy.searched and math.isnan(self._race.chance) and lane.gain >= OVERSHOOTS
        if lane.gain > UNDERSHOOTS or cautious:
            self._raise(leader)
        elif lane.gain < OVERSHOOTS and not late and not halved(lane, self._control[0]):
            self._ease(leader)
        return True

    def _raise(self, leader: Entrant) -> None:
        raised = self._copies.at_rate(leader.prescription, leader.remedy, HALF_A_DECADE, self._length)
        if raised.lanes[0].gain >= OVERSHOOTS and does_better(raised.lanes[0], leader.lanes[0], share=NOTICEABLE):
            self._replace(leader, raised)

    def _ease(self, leader: Entrant) -> None:
        after, self._length = self._length, max(self._plan.easing, self._length)
        if not self._is_decided(after):
            self._copies.advance_to_end(self._control[0], self._length)
        self._copies.advance(leader.lanes[0], self._length)
        for entrant in self._running():
            if entrant is not leader and not leader.lanes[0].fault:
                self._drop(entrant, "dropped", f"behind {leader.prescription.remedy} after {after} steps")
        self._race_to(self._length)
        cure = leader.prescription
        for factor in EASED:
            eased = self._copies.at_rate(cure, leader.remedy, factor, self._length)
            if does_better(eased.lanes[0], leader.lanes[0], share=2.0 * NOTICEABLE):
                self._replace(leader, eased)
                leader = eased

    def _replace(self, old: Entrant, new: Entrant) -> None:
        self._entrants[self._entrants.index(old)] = new

    def _race_to(self, rung: int) -> None:
        for entrant in self._running():
            self._advance(entrant.lanes[0], rung)
            for _ in range(_RETRIES):
                if entrant.lanes[0].fault and entrant.remedy.searched:
                    self._copies.lower_rate(entrant)
                    self._advance(entrant.lanes[0], rung)
            if entrant.lanes[0].fault:
                self._drop(entrant, "diverged", entrant.lanes[0].fault)

    def _advance(self, lane: Lane, rung: int) -> None:
        if rung == self._length:
            self._copies.advance_to_end(lane, rung, gains=bool(self._plan.easing))
        else:
            self._copies.advance(lane, rung)

    def _thin(self, rung: int, keep: int) -> None:
        """Keep the most promising; from the second rung on also drop whoever does as if nothing had been done.

        A new initialization begins at a higher loss than an old one that stands still, so what counts early is where
        the fall leads, not how far it has come.
        """
        if rung == self._plan.length or not self.shown:
            return
        self._cut(rung, keep)
        rest = self._running()
        idle = [entrant for entrant in rest if idles(entrant, self._control[0], rung)]
        if rung != self._plan.rungs[0] and len(idle) < len(rest):
            for entrant in idle:
                self._drop(entrant, "dropped", f"no better than nothing after {rung} steps")
        if rung == self._plan.before_last:
            for entrant in far_behind(self._running(), rung):
                self._drop(entrant, "dropped", f"far behind after {rung} steps")

    def _cut(self, rung: int, keep: int, last: Sequence[Entrant] = ()) -> None:
        for entrant in sorted(by_promise(self._running(), self._control[0], rung), key=last.__contains__)[keep:]:
            self._drop(entrant, "dropped", f"behind the others after {rung} steps")

    def _running(self) -> list[Entrant]:
        return [entrant for entrant in self._entrants if not entrant.out and entrant.lanes]

    def _drop(self, entrant: Entrant, outcome: str, why: str) -> None:
        entrant.outcome, entrant.out = outcome, why or outcome
        if self._progress is not None:
            self._progress(f"{entrant.prescription.remedy}: {outcome}, {why}")

    def _enter(self, entrant: Entrant) -> None:
        if not self.shown and entrant.remedy.level > 0:
            self._drop(entrant, "dropped", f"what began at step {self._illness.onset} does not show here")
            return
        try:
            if entrant.remedy.searched and self.shown:
                self._copies.search_rate(entrant)
            entrant.lanes = [self._copies.treated(entrant)]
        except FAILURES as error:
            self._drop(entrant, "not possible", str(error).splitlines()[0] if str(error) else type(error).__name__)

    def _screen(self) -> None:
        """Drop cures that leave before the first step what a check sees in the untreated model; let reserves enter."""
        promising = [entrant for entrant in self._running() if not self._is_hopeless(entrant)]
        for entrant in self._reserves if self._illness.code in SCREENED else ():
            if len(promising) >= _ENOUGH:
                break
            self._enter(entrant)
            if entrant.lanes and not self._is_hopeless(entrant):
                self._entrants.append(entrant)
                promising.append(entrant)
        for entrant in self._running() if promising else ():
            if self._is_hopeless(entrant):
                entrant.screened = True
                self._drop(entrant, "dropped", f"a check before the first step still finds {self._illness.code}")

    def _is_hopeless(self, entrant: Entrant) -> bool:
        if self._illness.code not in SCREENED or entrant.remedy.acts_on != "model":
            return False
        return self._illness.code in self._health.at_first() and self._health.stays(entrant.lanes[0])

    def _guesses_and_is_ill(self, entrant: Entrant, rung: int) -> bool:
        return guesses(entrant.lanes[0].halves(rung)[1], self._race.chance) and self._health.stays(entrant.lanes[0])

    def _repeat(self, seed: int) -> None:
        """Run the untreated copy and the finalists again under another seed."""
        control = self._copies.untreated(seed)
        self._copies.advance_to_end(control, self._length)
        lanes: list[tuple[Entrant, Lane]] = []
        for entrant in self._running():
            lane = self._copies.treated(entrant, seed)
            self._copies.advance_to_end(lane, self._length)
            lanes.append((entrant, lane))
        self._control.append(control)
        for entrant, lane in lanes:
            entrant.lanes.append(lane)
            if lane.fault:
                self._drop(entrant, "diverged", f"under another seed: {lane.fault}")

    def _look_at_health(self) -> None:
        if not self._illness.code:
            return
        for entrant in self._running():
            entrant.healthy = self._illness.code not in self._health.after(entrant.lanes[0])
        if self.judgement.somebody_helps():
            return
        self._mender = self._first_that_mends() if self.shown else None
        learns = self._control[0].fault or self._learns()
        told = self._illness.lasted > 0 and (self._illness.code in OF_RUNS or not learns)
        self.unproven = self._mender is None and (not self.shown or told)
        if self.unproven:
            self._mender = first_that_is_harmless(self._entrants, self.judgement)

    def _learns(self) -> bool:
        """Whether the untreated copy learns more than to guess."""
        control = self._control[0]
        return control.falls(self._length, share=NOTICEABLE) and not guesses(control.result, self._race.chance)

    def _first_that_mends(self) -> Entrant | None:
        control = self._control[0]
        after = control.halves(self._length)[1]
        found = self._health.after(control)
        if not self._learns():
            found = found | self._health.at_first()
        if self._illness.code not in found:
            return None
        for lane in [item.lanes[0] for item in self._entrants if item.lanes and item.lanes[0].losses]:
            self._copies.advance_to_end(lane, len(lane.losses))
        return first_that_mends(
            self._entrants, control, self._health, found, self._illness.code, allowed=0.5 * NOTICEABLE * abs(after)
        )

    @property
    def judgement(self) -> Judgement:
        """What can be said of the contest as it stands."""
        return Judgement(
            self._control, self._entrants, ill=bool(self._illness.code), mender=self._mender, chance=self._race.chance
        )

    @property
    def goes_by_health(self) -> bool:
        """Whether what is recommended lowers no loss within the trial: a check chose it, or it merely does no harm."""
        return self._mender is not None
