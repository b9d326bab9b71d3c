"""Acting on a running training: at each optimizer step clip, leave out a spike, or step with a smaller rate."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gradguard._closures import wrap_closure
from gradguard.actions import Action, ActionSummary
from gradguard.errors import GradGuardWarning, NonFiniteGradientsError, UnsupportedModelError
from gradguard.monitors._hooks import HookSet, StepHook
from gradguard.remedies.clipping._base import is_first_rank
from gradguard.remedies.live._ledger import Ledger
from gradguard.remedies.live._rate import RateBackoff, illness_of_rate
from gradguard.remedies.live._spikes import SpikeJudge, Untouched
from gradguard.remedies.live.options import LiveOptions, make_clippers, named_parameters

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradguard.config import GuardConfig
    from gradguard.findings import Finding
    from gradguard.remedies.clipping._base import Clipper
    from gradguard.remedies.clipping._result import ClipResult

__all__ = ["LiveRemedies"]

_NEWEST = 5
"""Acts of each optimizer that a diagnosis keeps, beside the last of each kind. Ours; the guard has more."""

_SAME = 0.98
"""Share of the norm read earlier in the step below which somebody has clipped in between. Ours: rounding of half
precision leaves 0.99."""


_ALIKE = 24
"""First characters that two remarks share where they differ in their numbers alone."""


class _Watcher(Protocol):
    """Who watches the run: knows the steps, reads what is about to be changed, is told of failures."""

    @property
    def step_counts(self) -> tuple[int, ...]: ...

    def label(self, index: int) -> str: ...

    def read_unclipped(self, index: int) -> None: ...

    def remedy_failed(self, place: str, error: BaseException) -> None: ...


@dataclass(slots=True, eq=False, kw_only=True)
class _Hand:
    """What acts on the steps of one optimizer, and what it has done."""

    optimizer: Optimizer
    clippers: list[Clipper]
    ours: list[Clipper]
    method: str
    judge: SpikeJudge | None
    rate: RateBackoff | None
    ledger: Ledger = field(default_factory=Ledger)
    held: int = 0
    whole: bool = True
    acted: bool = False
    norm: float = math.nan
    remarks: list[str] = field(default_factory=list)

    def parameters(self) -> list[Any]:
        """Return what the optimizer holds now."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class LiveRemedies:
    """What acts on a run, by optimizer. A failure of its own switches it off, and the training goes on.

    Attributes:
        options: What the user asked for.
        spent_s: Seconds of host time spent.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        options: LiveOptions,
        config: GuardConfig,
        *,
        scaler: Any = None,
        watcher: _Watcher,
    ) -> None:
        """Register hooks on the optimizers; they run before those that are registered later.

        Raises:
            TypeError: See :func:`gradguard.remedies.live.options.make_clippers`.
            ValueError: See there.
            UnsupportedModelError: See there; or if there is no optimizer, or gradients are shards of plain tensors.
        """
        _check_place(model, optimizers)
        self.options = options
        self.spent_s = 0.0
        self._model = model
        self._watcher = watcher
        self._scaled = scaler is not None and scaler.is_enabled()
        self._off = False
        self._hooks = HookSet()
        clippers = make_clippers(options, model, optimizers, scaler)
        self._hands = [
            self._hand(optimizer, clipper, config, scaler)
            for optimizer, clipper in zip(optimizers, clippers, strict=True)
        ]
        for index, optimizer in enumerate(optimizers):
            self._hooks.add(optimizer.register_step_pre_hook(StepHook(self, LiveRemedies._before_step, index)))
            self._hooks.add(optimizer.register_step_post_hook(StepHook(self, LiveRemedies._after_step, index)))

    @property
    def limit(self) -> float:
        """Norm above which the only clipper clips, NaN where there are several, or it has no fixed one."""
        limits = [clipper.norm_limit for hand in self._hands for clipper in hand.clippers if hand.method]
        return limits[0] if len(self._hands) == 1 and limits and math.isfinite(limits[0]) else math.nan

    def act(self, index: int, *, may_skip: bool = True) -> None:
        """Clip or leave out the step that this optimizer is about to take; the step itself then does not again.

        Args:
            index: Which optimizer.
            may_skip: Whether spikes may be left out; not after the first evaluation of a closure.
        """
        hand = self._hands[index]
        if self._off or not hand.clippers:
            return
        started = time.perf_counter()
        self._watcher.read_unclipped(index)
        if self._off:  # reading has failed, and the guard has gone off
            return
        self._safely("acting on the gradients", lambda: self._treat(hand, index, may_skip=may_skip))
        hand.acted = True
        self.spent_s += time.perf_counter() - started

    def consider(self, index: int, findings: Iterable[Finding]) -> None:
        """Back off with the learning rate, if that was asked for and a finding calls for it.

        Args:
            index: The optimizer that was judged.
            findings: What stands now, consequences linked to causes.
        """
        hand = self._hands[index]
        if self._off or hand.rate is None:
            return
        if _process_count() > 1:  # each process judges by its own losses and activations, and would decide alone
            self._remark(hand, "lr_backoff is off in a distributed run, whose processes might not decide alike")
            return
        self._safely("lowering the learning rate", lambda: self._back_off(hand, index, findings))

    def compare(self, index: int, norm: float) -> None:
        """Look whether somebody clips between reading and acting.

        Args:
            index: The optimizer that has stepped.
            norm: L2 norm of its gradients as they were read after ``backward``; NaN where unknown.
        """
        hand = self._hands[index]
        if hand.norm < _SAME * norm < math.inf:
            self._remark(
                hand,
                f"the gradient had a norm of {norm:.3g} after backward, and of {hand.norm:.3g} at the step: your loop "
                "clips it, too. Then clip= clips a second time, and on_spike sees no spikes. Leave your own clipping "
                "out, or call guard.act() before it",
            )
        hand.norm = math.nan

    def was_skipped(self, index: int) -> bool:
        """Whether the step of this optimizer that has just ended was left out."""
        hand = self._hands[index]
        if self._off:
            return False
        return any(clipper.last is not None and clipper.last.skipped for clipper in hand.clippers)

    def actions(self) -> tuple[Action, ...]:
        """Return the newest acts on every optimizer, by step."""
        acts = [act for index, hand in enumerate(self._hands) for act in hand.ledger.actions(self._label(index))]
        return tuple(sorted(acts, key=lambda act: act.step))

    def summary(self) -> tuple[ActionSummary, ...]:
        """Return the sums, one per optimizer."""
        return tuple(
            ActionSummary(
                optimizer=self._label(index),
                method=hand.method,
                **hand.ledger.counts,
                let_through=0 if hand.judge is None else hand.judge.let_through,
                lr_factor=1.0 if hand.rate is None else hand.rate.factor,
                remarks=tuple(hand.remarks),
                newest=_newest(hand.ledger.actions(self._label(index))),
            )
            for index, hand in enumerate(self._hands)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        return {"optimizers": [_state(hand) for hand in self._hands]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier run stopped; parts that are off in this run are left out.

        Raises:
            ValueError: If it is the state of another number of optimizers, or of another clipper.
        """
        saved = state["optimizers"]
        if len(saved) != len(self._hands):
            raise ValueError(f"the state is that of {len(saved)} optimizers, and there are {len(self._hands)}")
        for hand, one in zip(self._hands, saved, strict=True):
            if hand.method and one["clipper"] is not None:
                hand.clippers[-1].load_state_dict(one["clipper"])
            if hand.judge is not None and one["judge"] is not None:
                hand.judge.load_state_dict(one["judge"])
            if hand.rate is not None and one["rate"] is not None:
                hand.rate.load_state_dict(one["rate"])
            hand.ledger.load_state_dict(one["ledger"])

    def close(self) -> None:
        """Do nothing any more: remove every hook, put the learning rates back; calling twice is harmless."""
        self._off = True
        self._hooks.close()
        for hand in self._hands:
            if hand.rate is not None:
                hand.rate.give_back()

    def _hand(self, optimizer: Optimizer, clipper: Clipper | None, config: GuardConfig, scaler: Any) -> _Hand:
        options, given = self.options, self.options.clips()
        clippers = [] if clipper is None else [clipper]
        ours = [made for made in clippers if not any(made is item for item in given)]
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if options.on_spike is not None and (clipper is None or not clipper.covers(held)):
            front = Untouched(named_parameters(self._model, optimizer), scaler=scaler, optimizer=optimizer)
            clippers.insert(0, front)
            ours.append(front)
        return _Hand(
            optimizer=optimizer,
            clippers=clippers,
            ours=ours,
            method="" if clipper is None else type(clipper).__name__,
            judge=SpikeJudge(config, budget=options.spike_budget) if options.on_spike is not None else None,
            rate=RateBackoff(optimizer, options.factor) if options.factor < 1.0 else None,
            held=len(held),
            whole=bool(clippers) and clippers[0].measures_l2 and clippers[0].covers(held),
        )

    def _treat(self, hand: _Hand, index: int, *, may_skip: bool) -> None:
        self._follow(hand)
        judge = hand.judge
        result: ClipResult | None = None
        for position, clipper in enumerate(hand.clippers):
            seen = clipper.steps
            asked = judge is not None and may_skip and position == 0
            result = clipper.step(refuse=judge.refuse) if asked and judge is not None else clipper.step()
            if clipper.steps == seen:  # no gradient at all
                return
            if position == 0 and may_skip and hand.whole and result.on_host:
                hand.norm = result.norm_before
            if result.skipped:
                break
        if result is None:
            return
        why = hand.method
        if result.skipped:
            if judge is not None:  # a clipper may hold only some of them
                for parameter in hand.parameters():
                    parameter.grad = None
            if result.non_finite and self._scaled:  # the scaler skips this step as well, and counts it
                return
            spike = judge is not None and not result.non_finite
            why = f"a spike, {judge.times:.3g} times the usual norm" if judge and spike else "NaN or infinity"
        hand.ledger.note_step(self._watcher.step_counts[index], result, why)

    def _follow(self, hand: _Hand) -> None:
        """Take in parameters that the optimizer was given since, as when layers are unfrozen."""
        held = sum(len(group["params"]) for group in hand.optimizer.param_groups)
        if held != hand.held:
            hand.held, hand.whole = held, False
            for clipper in hand.ours:
                clipper.retarget(named_parameters(self._model, hand.optimizer))

    def _back_off(self, hand: _Hand, index: int, findings: Iterable[Finding]) -> None:
        finding = illness_of_rate(findings, self._watcher.label(index))
        if finding is None or hand.rate is None:
            return
        step = self._watcher.step_counts[index]
        rates = hand.rate.back_off(step)
        if rates is not None:
            hand.ledger.note_rate(step, *rates, f"{finding.code} {finding.name}")

    def _safely(self, what: str, action: Callable[[], object]) -> None:
        try:
            with torch.no_grad():
                action()
        except NonFiniteGradientsError:  # asked for, with a clipper's non_finite="raise"
            raise
        except Exception as error:  # noqa: BLE001  # no failure of ours reaches the user's loop
            self._fail(what, error)

    def _before_step(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hand = self._hands[index]
        if self._off:
            return None
        if hand.rate is not None:
            self._safely("lowering the learning rate for a step", hand.rate.lend)
        if not hand.clippers:
            return None
        evaluations = 0

        def act() -> None:
            nonlocal evaluations
            evaluations += 1
            if not hand.acted:
                self.act(index, may_skip=evaluations == 1)
            hand.acted = False

        wrapped = wrap_closure(args, kwargs, act, every=True)
        if wrapped is None:
            act()
        return wrapped

    def _after_step(self, index: int, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        rate = self._hands[index].rate
        if rate is not None:
            rate.give_back()
        if self._off:  # in the middle of a step, when torch was walking through the hooks
            self._hooks.close()

    def _fail(self, what: str, error: BaseException) -> None:
        self.close()
        for hand in self._hands:
            hand.remarks.append(f"{what} failed with {type(error).__name__}: {error}; nothing is done since then")
        self._watcher.remedy_failed(what, error)

    def _remark(self, hand: _Hand, text: str) -> None:
        """Say once what stands in the way."""
        if not any(text[:_ALIKE] == known[:_ALIKE] for known in hand.remarks):
            hand.remarks.append(text)
            if is_first_rank():
                warnings.warn(f"gradguard: {text}", GradGuardWarning, stacklevel=5)

    def _label(self, index: int) -> str:
        return self._watcher.label(index)


def _newest(acts: Sequence[Action]) -> tuple[Action, ...]:
    """Return the newest acts, and the newest of each kind."""
    last = {act.kind: at for at, act in enumerate(acts)}
    return tuple(act for at, act in enumerate(acts) if at >= len(acts) - _NEWEST or at in last.values())


def _state(hand: _Hand) -> dict[str, Any]:
    return {
        "clipper": hand.clippers[-1].state_dict() if hand.method else None,
        "judge": None if hand.judge is None else hand.judge.state_dict(),
        "rate": None if hand.rate is None else hand.rate.state_dict(),
        "ledger": hand.ledger.state_dict(),
    }


def _check_place(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    if not optimizers:
        raise UnsupportedModelError(
            "clip=, on_spike= and lr_backoff= act before an optimizer's step, and no optimizer was given. Pass it: "
            'gradguard.watch(model, optimizer, clip="adaptive")'
        )
    if any(base.__name__ == "FullyShardedDataParallel" for m in model.modules() for base in type(m).__mro__):
        raise UnsupportedModelError(
            "this model is sharded by FullyShardedDataParallel, whose ranks hold different gradients in plain tensors "
            "and would decide each for itself. Use fully_shard (FSDP2), or leave clip=, on_spike= and lr_backoff= out"
        )


def _process_count() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
