"""What all clippers share: finding gradients, NaN and infinity, loss scalers, counting, saving, attaching."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict

import torch

from gradguard._arguments import check_optimizers
from gradguard._closures import wrap_closure
from gradguard.errors import GradGuardError, GradGuardWarning, NonFiniteGradientsError
from gradguard.monitors._hooks import HookSet, StepHook
from gradguard.remedies.clipping._arguments import NonFinite, check_non_finite
from gradguard.remedies.clipping._gradients import Gradient, Parameters, Targets, gather
from gradguard.remedies.clipping._norms import Norms, measure
from gradguard.remedies.clipping._result import ClipResult, Scalar
from gradguard.remedies.clipping._scaling import check_scaler, scale_in_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Clipped", "Clipper", "Measured", "Options", "is_first_rank"]

_NAMED = 3
"""Names that a message about gradients gives."""

_EMPTY_CALLS = 3
"""Calls without any gradient, from the first on, after which a warning says so. Ours."""

_PATIENCE = 10
"""Skips in a row from which a warning comes although a loss scaler is at work. Ours: halving 65536 ten times leaves 64,
which no search for a scale needs."""


class Options(TypedDict, total=False):
    """Keywords that every clipper takes; :class:`Clipper` explains them."""

    scaler: Any
    non_finite: str
    optimizer: Optimizer | None


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The gradients of one step with their norms, before anything is clipped.

    Attributes:
        gradients: At least one.
        norms: Norms as the gradients stand, so with the scale of a loss scaler where that is still in them.
        scale: That scale on the device, ``None`` for none.
        host_scale: That scale on the host, 1 for none; NaN where it was not copied.
        finite: Whether every entry is finite; on the device where the host was not asked.
        learn: Whether this step may enter a history.
    """

    gradients: list[Gradient]
    norms: Norms
    scale: Tensor | None
    host_scale: float
    finite: Tensor | bool
    learn: Tensor | bool = True

    @property
    def total(self) -> Scalar:
        """Norm of all gradients, true to size."""
        if self.norms.host is not None:
            return self.norms.host / self.host_scale
        return self.norms.total if self.scale is None else self.norms.total / self.scale.to(self.norms.total.device)

    def scaled(self, threshold: float) -> Scalar:
        """Return a threshold in the size of the gradients as they stand."""
        if self.scale is None or not math.isnan(self.host_scale):
            return threshold * self.host_scale
        return self.scale * threshold


@dataclass(frozen=True, slots=True, eq=False)
class Clipped:
    """What a method did: the norm it left, its threshold, and whether anything was clipped."""

    norm_after: Scalar
    threshold: Scalar
    engaged: Tensor | bool


class Clipper:
    """Base of every clipper. Call :meth:`step` between ``backward`` and ``optimizer.step()``, or :meth:`attach` it.

    One step reads the gradients as they are then: after accumulation, after the all-reduce of
    DistributedDataParallel, on every rank. It changes them in place.

    Gradients with NaN or infinity are dealt with before anything is clipped, as ``non_finite`` says:

    * ``"skip"`` sets ``.grad = None`` for every parameter of the clipper, so that the optimizer leaves weights, weight
      decay and moments alone; the step is counted and a warning given at the 1st, 10th, 100th ... of them.
    * ``"raise"`` raises :class:`~gradguard.errors.NonFiniteGradientsError` and changes nothing.
    * ``"zero"`` sets the entries in question to 0, and clips what is left.

    With a loss scaler whose gradients are not unscaled yet, such gradients are left to it untouched: it skips the step
    and lowers its scale. No clipper calls ``unscale_``; thresholds and norms are true to size before and after it.
    Steps with NaN or infinity never enter a method's history.

    The gradients decide alike on all ranks where they are alike on all ranks (DistributedDataParallel) or are sharded
    (FSDP2, DTensor), whose norms are summed over the ranks.

    Whether the host waits for the device: ``"skip"`` and ``"raise"`` need to know whether the gradients are finite, so
    they wait once per step. With ``"zero"``, or gradients left to a scaler, ``Norm``, ``Value``, ``AGC`` and ``AdaGC``
    do not wait. ``AutoClip``, ``ZClip`` and ``Adaptive`` keep their history on the host and wait once per step.

    Attributes:
        non_finite: The policy for NaN and infinity.
        skipped_steps: Steps whose gradients were taken away because some were not finite.
        last: Result of the newest step, ``None`` before the first.
    """

    _on_host: ClassVar[bool] = False
    _norm_type: float = 2.0

    def __init__(
        self,
        parameters: Parameters,
        *,
        scaler: Any = None,
        non_finite: str = "skip",
        optimizer: Optimizer | None = None,
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, an iterable of parameters, or of (name, parameter) pairs; shared ones count once.
            scaler: The ``torch.amp.GradScaler`` of the loop, if there is one.
            non_finite: ``"skip"``, ``"raise"`` or ``"zero"``.
            optimizer: The optimizer of these parameters; needed only with a scaler that serves several optimizers.

        Raises:
            TypeError: If ``parameters`` or ``scaler`` is of another kind.
            ValueError: If there is no parameter, or no such policy.
        """
        self._policy = check_non_finite(non_finite)
        self._targets = Targets(parameters)
        check_scaler(scaler)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer = check_optimizers(optimizer)[0] if optimizer is not None else None
        self._hooks = HookSet()
        self._steps = 0
        self._engaged: Tensor | int = 0
        self._skipped_in_a_row = 0
        self._empty_calls = 0
        self.skipped_steps = 0
        self.last: ClipResult | None = None

    @property
    def non_finite(self) -> str:
        """The policy for NaN and infinity."""
        return self._policy.value

    @property
    def steps(self) -> int:
        """Calls that found gradients."""
        return self._steps

    @property
    def clipped_steps(self) -> int:
        """Steps at which something was clipped; copies a count from the device where it is kept there."""
        self._engaged = int(self._engaged)
        return self._engaged

    @property
    def clipped_fraction(self) -> float:
        """Share of the steps at which something was clipped, 0 to 1; NaN before the first."""
        return self.clipped_steps / self._steps if self._steps else math.nan

    @property
    def norm_limit(self) -> float:
        """Global norm above which the next step is clipped, NaN where the method has none. For ``guard.clip_norm``."""
        return math.nan

    @torch.no_grad()
    def step(self, *, refuse: Callable[[float], bool] | None = None) -> ClipResult:
        """Clip the gradients in place.

        Args:
            refuse: Asked with the norm of finite gradients before anything is clipped; where it says ``True`` they are
                taken away (``.grad = None``), so that the optimizer leaves this step out. Asking waits for the device.

        Raises:
            NonFiniteGradientsError: If a gradient is not finite and the policy is ``"raise"``.
            UnsupportedModelError: If a gradient is of a layout that cannot be clipped.
        """
        pairs = self._targets.pairs()
        gradients = gather(pairs)
        if not gradients:
            return self._nothing_there()
        self._steps += 1
        found = self._measure(gradients)
        if found.finite is False and (found.scale is not None or self._policy is not NonFinite.ZERO):
            self.last = self._give_up(found, pairs)
            return self.last
        self._skipped_in_a_row = 0
        before, non_finite = found.total, _negated(found.finite)
        if refuse is not None and math.isfinite(float(before)) and refuse(float(before)):
            _take_away(pairs)
            self.last = ClipResult(norm_before=before, norm_after=0.0, threshold=math.nan, engaged=False, skipped=True)
            return self.last
        if self._policy is NonFinite.ZERO and found.scale is None and found.finite is not True:
            found = self._cleaned(found)
        clipped = self._clip(found)
        self._engaged = self._engaged + clipped.engaged
        self.last = ClipResult(
            norm_before=before,
            norm_after=clipped.norm_after,
            threshold=clipped.threshold,
            engaged=clipped.engaged,
            non_finite=non_finite,
        )
        return self.last

    def attach(self, optimizer: Optimizer) -> Self:
        """Let every ``optimizer.step()`` clip first, closures included; returns the clipper itself.

        Raises:
            TypeError: If it is no optimizer.
            GradGuardError: If the clipper is attached already.
        """
        if len(self._hooks):
            raise GradGuardError(
                f"this {type(self).__name__} is attached already, and would clip twice. Call detach() first"
            )
        inner = check_optimizers(optimizer)
        if len(inner) != 1:
            raise TypeError(f"optimizer must be one torch.optim.Optimizer, got {optimizer!r}")
        self._optimizer = inner[0]
        self._hooks.add(inner[0].register_step_pre_hook(StepHook(self, Clipper._before_step, 0)))
        return self

    def detach(self) -> None:
        """Take the hook of :meth:`attach` off; calling twice is harmless."""
        self._hooks.close()

    @property
    def attached(self) -> bool:
        """Whether it applies itself before an optimizer's steps, since :meth:`attach`."""
        return bool(len(self._hooks))

    @property
    def scaled(self) -> bool:
        """Whether it knows a loss scaler."""
        return self._scaler is not None

    @property
    def measures_l2(self) -> bool:
        """Whether its norms are L2 norms, and not maxima."""
        return self._norm_type == 2.0

    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all of these are among the parameters that it clips."""
        mine = {id(parameter) for _, parameter in self._targets.pairs()}
        return all(id(parameter) in mine for parameter in parameters)

    def retarget(self, parameters: Parameters) -> None:
        """Clip these from now on, as after a layer was unfrozen or replaced; what was learnt is kept."""
        self._targets = Targets(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain numbers, strings, lists and dicts."""
        return {
            "method": type(self).__name__,
            "steps": self._steps,
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another clipper of the same method stopped. Settings stay those of this one.

        Raises:
            ValueError: If the state is another method's, or lacks something.
        """
        mine = type(self).__name__
        if state.get("method") != mine:
            raise ValueError(
                f"this state is that of {state.get('method')!r}, and the clipper is {mine!r}. Load its own"
            )
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"the state of {mine} lacks {', '.join(missing)}. Load what its state_dict() returned")
        self._load(state)
        self._steps = int(state["steps"])
        self._engaged = int(state["clipped_steps"])
        self.skipped_steps = int(state["skipped_steps"])

    def _clip(self, measured: Measured) -> Clipped:
        """Clip gradients that are finite as far as the host knows."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`_state` returned."""

    def _measure(self, gradients: list[Gradient]) -> Measured:
        scale = scale_in_gradients(self._scaler, self._optimizer)
        asked = self._on_host or (self._policy is not NonFinite.ZERO and scale is None)
        norms = measure(gradients, norm_type=self._norm_type, on_host=asked)
        host_scale = 1.0 if scale is None else float(scale) if asked else math.nan
        finite: Tensor | bool
        finite = torch.isfinite(norms.total) if norms.host is None else math.isfinite(norms.host)
        return Measured(gradients, norms, scale, host_scale, finite)

    def _cleaned(self, found: Measured) -> Measured:
        """Set what is not finite to 0, and measure again."""
        for gradient in found.gradients:
            gradient.values.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        on_host = found.norms.host is not None
        norms = measure(found.gradients, norm_type=self._norm_type, on_host=on_host)
        return Measured(found.gradients, norms, None, 1.0, finite=True, learn=found.finite)

    def _give_up(self, found: Measured, pairs: list[tuple[str, Tensor]]) -> ClipResult:
        """Deal with a step whose gradients are known not to be finite and are not to be mended."""
        before = found.total
        if found.scale is not None:  # the scaler finds them itself, skips the step and lowers its scale
            return ClipResult(norm_before=before, norm_after=before, threshold=math.nan, engaged=False, non_finite=True)
        where = _describe(found)
        if self._policy is NonFinite.RAISE:
            raise NonFiniteGradientsError(
                f"{where}. No gradient was changed, and the optimizer has not stepped. Look at this step's "
                'batch and loss, or pass non_finite="skip" to leave such steps out'
            )
        _take_away(pairs)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        # A scaler that has unscaled finds the same, skips the step as well and lowers its scale: that is its trade.
        count = self.skipped_steps if self._scaler is None else self._skipped_in_a_row
        if _is_power_of_ten(count) and (self._scaler is None or count >= _PATIENCE) and is_first_rank():
            warnings.warn(
                f"gradguard: {where}. Its gradients were set to None, so that the optimizer leaves the weights alone; "
                f"{self.skipped_steps} of {self._steps} steps skipped so far",
                GradGuardWarning,
                stacklevel=4,
            )
        return ClipResult(
            norm_before=before, norm_after=0.0, threshold=math.nan, engaged=False, non_finite=True, skipped=True
        )

    def _nothing_there(self) -> ClipResult:
        """Answer a call that found no gradient at all; a loop that never has one is called at the wrong moment."""
        self._empty_calls += 1
        if self._empty_calls == _EMPTY_CALLS and self._steps == 0:
            warnings.warn(
                f"gradguard: no parameter had a gradient at the first {_EMPTY_CALLS} calls of {type(self).__name__}, "
                "so nothing is clipped. Call step() after backward() and before zero_grad()",
                GradGuardWarning,
                stacklevel=4,
            )
        self.last = ClipResult(norm_before=0.0, norm_after=0.0, threshold=math.nan, engaged=False)
        return self.last

    def _before_step(self, _index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wrapped = wrap_closure(args, kwargs, self.step, every=True)
        if wrapped is None:
            self.step()
        return wrapped


def _take_away(pairs: list[tuple[str, Tensor]]) -> None:
    for _, parameter in pairs:
        parameter.grad = None


def _negated(flag: Tensor | bool) -> Tensor | bool:  # noqa: FBT001  # it is the operand
    return torch.logical_not(flag) if isinstance(flag, torch.Tensor) else not flag


def _describe(found: Measured) -> str:
    bad = (~torch.isfinite(found.norms.each)).tolist()
    names = [gradient.name for gradient, flag in zip(found.gradients, bad, strict=True) if flag]
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} of {len(bad)} gradients of this step hold NaN or infinity ({shown})"


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"


def is_first_rank() -> bool:
    """Whether this is the only process, or the first of a distributed run: the one that speaks."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
