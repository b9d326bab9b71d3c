"""One observed run: monitors feed a History, detectors judge it. Knows nothing of who drives it.

One observation goes ``arm`` (taps are set) - forward and backward - ``read`` (numbers are queued on the device) -
optimizer step - ``finish`` (the one transfer; a record is appended). ``discard`` gives up what was gathered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradguard._run_info import describe_run
from gradguard.detectors import DEFAULT_DETECTORS, Detector, run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Diagnosis, Finding, MatrixSpectrum, Unobserved
from gradguard.history import History
from gradguard.linking import link_findings
from gradguard.monitors import (
    GradientMonitor,
    LossMonitor,
    NonFiniteMonitor,
    SignalMonitor,
    SpectralMonitor,
    TemporalMonitor,
)
from gradguard.monitors._reduce import Handle, Norm, Readback
from gradguard.monitors.exact_spectra import exact_spectra
from gradguard.monitors.gradients import total_norm
from gradguard.monitors.loss_scale import ScaledLossMonitor, current_scale, is_scaled
from gradguard.prescriptions import prescribe
from gradguard.records import FloatArray, RunInfo, StepRecord

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from gradguard.config import GuardConfig

__all__ = ["Observing"]

_SEARCHED_STEPS = 5
"""Steps searched after an alarm. Ours: what stays non-finite shows at the first; a few more for what comes and goes."""


class Observing:
    """The monitors of one model, and the history they fill.

    Attributes:
        history: What was observed so far.
        notes: What could not be observed, and why, in order of appearance.
        spent_s: Seconds spent outside hooks; :attr:`overhead_s` adds those inside.
        clip_norm: Norm above which the caller clips, where an integration knows it, else NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        config: GuardConfig,
        *,
        on_failure: Callable[[str, BaseException], None],
        scaler: Any = None,
        preflight: bool = False,
        detectors: Sequence[Detector] = DEFAULT_DETECTORS,
    ) -> None:
        """Prepare monitors and an empty history; no hook is set yet."""
        self._model = model
        self._optimizers = tuple(optimizers)
        self._config = config
        self._scaler = scaler
        self._detectors = tuple(detectors)
        self.labels = [""] * max(1, len(self._optimizers))
        self.signals = SignalMonitor(
            model,
            on_failure=on_failure,
            dead_patience_steps=config.dead_patience_steps,
            any_mode=preflight,
            attention=config.wants("GG701") or config.wants("GG702"),
        )
        self.search = NonFiniteMonitor(model, on_failure=self._on_search_failure, scaled=scaler is not None)
        self._searched = False
        if not preflight:
            self.search.listen()
        self.temporal = TemporalMonitor(model, on_failure=on_failure, any_mode=preflight)
        self.spectral = SpectralMonitor(
            model, on_failure=on_failure, off=not (config.wants("GG401") or config.wants("GG402"))
        )
        self.gradients = GradientMonitor(model, sample_size=config.sample_size)
        self.losses = LossMonitor() if scaler is None else ScaledLossMonitor(scaler)
        self.clip_norm = math.nan
        self.history = History(self._run_info(preflight=preflight), capacity=config.history_capacity)
        notes = [*self.signals.unobserved(), *self.temporal.unobserved(), *self.spectral.unobserved()]
        self.notes: dict[str, Unobserved] = {note.what: note for note in notes}
        self.spent_s = 0.0
        self._scaled: list[bool]
        self._scale: Handle | None
        self._at_step: list[Norm]
        self._found_inf: Handle | None
        self._begin()

    @property
    def overhead_s(self) -> float:
        """Seconds spent in gradguard since attaching, as seen from the host."""
        within = (self.signals.spent_s, self.signals.attention.spent_s, self.temporal.spent_s, self.search.spent_s)
        return self.spent_s + sum(within)

    @property
    def has_read(self) -> bool:
        """Whether the gradients of the present step were read."""
        return self._read

    def note(self, what: str, why: str) -> bool:
        """Say once that something could not be observed; return whether that is news."""
        news = what not in self.notes
        self.notes.setdefault(what, Unobserved(what=what, why=why))
        return news

    def start_search(self, steps: int) -> None:
        """Look for the operation that makes NaN or infinity, in the coming steps until one does."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1 optimizer step, got {steps!r}")
        why = self.search.arm(steps)
        if why:
            self.note("the operation that makes NaN or infinity", why)

    def end_search_step(self, index: int, step: int) -> None:
        """Take in what the search found in a step that is over."""
        origin = self.search.close_step(step)
        if self.search.cut_short:
            self.note("the last operations of long steps", "more ran between two optimizer steps than are searched")
        if origin is not None:
            self.history.note_origin(replace(origin, optimizer=index))

    def search_batch(self, step: int) -> None:
        """Look at the batch of a step whose loss is not finite; to be called before the next forward pass."""
        looked_at, origin = self.search.look_at_batch(step)
        if origin is not None:
            self.history.note_origin(origin)
        elif looked_at:
            self.history.note_finite_batch(step)

    def search_after(self, news: Sequence[Finding]) -> None:
        """Search the coming steps, once in a run, after an alarm about numbers that are not finite."""
        if not self._searched and any(finding.family == "non_finite" for finding in news):
            self._searched = True
            self.start_search(_SEARCHED_STEPS)

    def arm(self) -> None:
        """Set the taps for the coming step."""
        self.signals.arm()
        self.temporal.arm()

    def disarm(self) -> None:
        """Remove the taps and forget what the present step gathered."""
        self.signals.disarm()
        self.temporal.disarm()
        self._begin()

    def mute(self) -> None:
        """Remove the hooks on the model, as for a validation pass; what was gathered is kept."""
        self.signals.disarm()
        self.temporal.disarm()
        self.search.mute()

    def discard(self) -> None:
        """Forget what the present step gathered; taps stay."""
        self._begin()

    def read(
        self,
        *,
        before_clipping: bool,
        gradient_of: Callable[[nn.Parameter], Tensor | None] | None = None,
        sample: bool = True,
        loss_scale: Tensor | None = None,
        lost: Mapping[int, Tensor] | None = None,
    ) -> bool:
        """Queue the statistics of gradients and weights; return whether any gradient was there.

        Args:
            before_clipping: Whether the caller has not clipped yet.
            gradient_of: Where a parameter's gradient is; by default in its ``.grad``.
            sample: Whether an update will follow that is worth measuring.
            loss_scale: Factor in all of these gradients, 0-d, where the caller has scaled the loss by himself.
            lost: Share of entries that float16 rounded to zero, 0-d, by ``id(parameter)``, where the caller knows it.
        """
        scaled = [is_scaled(optimizer, self._scaler) for optimizer in self._optimizers]
        self.gradients.read(
            self._readback,
            gradient_of=gradient_of if gradient_of is not None else lambda p: p.grad,
            groups=self._groups(),
            sample=sample,
            state_of=self._state_of if self._optimizers else None,
            divided_by=None if any(scaled) else current_scale(self._optimizers, self._scaler),
            lost=lost,
        )
        if self.gradients.arrived == 0 and not self.history.info.preflight:
            return False
        for name in self.gradients.unreadable[:1]:
            more = len(self.gradients.unreadable) - 1
            self.note(
                f"gradient of {name}" + (f" and {more} more" if more else ""),
                "its tensor is sharded, quantised or of a layout whose norm cannot be read here",
            )
        self.temporal.read(self._readback)
        self.spectral.read(self._readback, self.signals.input_sizes)
        self._read = True
        self._before_clipping = before_clipping
        self._scaled = scaled
        self._all_scaled = loss_scale is not None
        scale = loss_scale if loss_scale is not None else current_scale(self._optimizers, self._scaler)
        self._scale = None if scale is None else self._readback.put(scale)
        return True

    def read_at_step(self, index: int) -> None:
        """Queue the total norm as the optimizer finds it, after whatever clipping the caller did."""
        optimizer = self._optimizers[index]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._at_step = total_norm(self._readback, gradients)
        self._at_step_scaled = is_scaled(optimizer, self._scaler)
        found = getattr(optimizer, "found_inf", None)
        self._found_inf = self._readback.put(found.reshape(())) if isinstance(found, torch.Tensor) else None

    def finish(self, index: int | None, step: int, *, batch: int, cost_s: float = math.nan) -> StepRecord | None:
        """Take the update in, transfer once and append a record; ``None`` where nothing was read.

        Args:
            index: The optimizer that stepped; ``None`` for a check, which concerns all of them.
            step: Its step, from 0.
            batch: Backward passes seen before.
            cost_s: Seconds of host time that this observation cost so far.
        """
        if not self._read:
            self._begin()
            return None
        signals = self.signals.blind()
        for blind in [*self.temporal.blind(), *([] if signals is None else [signals])]:
            self.note(blind.what, blind.why)
        self.gradients.read_update(self._readback, index=index or 0, step=step)
        self.signals.close_step(step, index or 0)
        self._readback.fetch()
        self.drain_losses()
        record = self._record(index, step, batch, cost_s)
        self._begin()
        if record.scalars.get("skipped"):
            return None
        self.history.append(record)
        return record

    def drain_losses(self) -> None:
        """Move the losses that wait into the history, and count the steps that a loss scaler skipped."""
        if isinstance(self.losses, ScaledLossMonitor):
            self.losses.drain_scales()
            self.history.info = replace(self.history.info, **self._scaling())
        for step, optimizer, loss in self.losses.drain():
            self.history.note_loss(step, loss, optimizer=optimizer)

    def findings(self) -> tuple[Finding, ...]:
        """Judge the history as it is now: root causes first, each followed by its consequences."""
        self.drain_losses()
        if self.losses.cross_entropy and not self.history.info.classes:  # known since the first loss with a graph
            self.history.info = self._run_info(preflight=self.history.info.preflight)
        return link_findings(run_detectors(self.history, self._config, self._detectors))

    def diagnose(self, *, steps: int, batches: int, overhead: float) -> Diagnosis:
        """Return the verdict on everything observed so far.

        Args:
            steps: Optimizer steps taken.
            batches: Backward passes seen.
            overhead: Share of wall time spent here, 0 to 1, NaN where unknown.
        """
        self.drain_losses()
        self.history.info = self._run_info(preflight=self.history.info.preflight)
        diagnosis = diagnose(
            self.history,
            self.findings(),
            unobserved=tuple(self.notes.values()),
            overhead=overhead,
            batches=batches,
            steps=steps,
            config=self._config,
        )
        return prescribe(replace(diagnosis, summary=replace(diagnosis.summary, overhead_s=self.overhead_s)))

    def exact_spectra(self) -> tuple[MatrixSpectrum, ...]:
        """Return the spectra of the weights as they are, exact or certified."""
        with torch.no_grad():
            return tuple(exact_spectra(self._model, self.signals.input_sizes))

    def close(self) -> None:
        """Remove every hook and let go of tensors; the history stays."""
        self.disarm()
        self.search.close()
        self.signals.close()
        self.temporal.close()
        self.spectral.close()
        self.gradients.close()

    def _on_search_failure(self, place: str, error: BaseException) -> None:
        if self._config.on_error == "raise":
            raise error
        self.note("the operation that makes NaN or infinity", f"{place} failed with {type(error).__name__}: {error}")

    def _begin(self) -> None:
        self._readback = Readback()
        self.signals.reset(self._readback)
        self.temporal.reset()
        self._read = False
        self._before_clipping = True
        self._scaled = []
        self._all_scaled = False
        self._scale = None
        self._at_step = []
        self._at_step_scaled = False
        self._found_inf = None

    def _record(self, index: int | None, step: int, batch: int, cost_s: float) -> StepRecord:
        readback = self._readback
        scale = 1.0 if self._scale is None else readback.value(self._scale)
        scaled = self._all_scaled or (index is not None and any(self._scaled[index : index + 1]))
        parameter_scale = scale if scaled else 1.0
        mine, others = self._ownership(index)
        parameters = self.gradients.columns(readback, scale=parameter_scale, mine=mine, others=others)
        layers, layer_values = self.signals.columns()
        for place, kind in itertools.product(("delta", "input_delta", "block_delta"), ("norm", "max_abs")):
            layer_values[f"{place}_{kind}"] = layer_values[f"{place}_{kind}"] / scale
        temporal, profiles = self.temporal.columns(layers.names, readback, scale=scale)
        own = parameters["grad_norm"][mine > 0]
        scalars = {
            "grad_norm": math.hypot(*own[~np.isnan(own)]) if not np.isnan(own).all() else math.nan,
            "loss_scale": scale,
            "read_before_clipping": float(self._before_clipping),
            "cost_s": cost_s,
            "skipped": 0.0 if self._found_inf is None else readback.value(self._found_inf),
            **self.gradients.scalars(readback, mine=mine),
        }
        if isinstance(self.losses, ScaledLossMonitor) and not math.isnan(self.losses.scale):
            scalars["skipped_steps"] = float(self.losses.skipped)
        if self.signals.float16_seen:
            scalars["float16"] = 1.0
        rates = parameters["lr"][mine > 0]
        if not np.isnan(rates).all():
            scalars["lr"] = float(np.nanmax(rates))
        if self._at_step:
            total = math.hypot(*(norm.resolve(readback)[0] for norm in self._at_step))
            scalars["grad_norm_at_step"] = total / (scale if self._at_step_scaled else 1.0)
        return StepRecord(
            step=step,
            batch=batch,
            optimizer=index or 0,
            scalars=scalars,
            layers=layers,
            layer_values=layer_values | temporal,
            parameters=self.gradients.table,
            parameter_values=parameters,
            profiles=profiles,
            matrices=self.spectral.table,
            matrix_values=self.spectral.columns(readback),
        )

    def _ownership(self, index: int | None) -> tuple[FloatArray, FloatArray]:
        """Return which parameters this step is about, and which only another watched optimizer holds."""
        ids = [{id(p) for group in opt.param_groups for p in group["params"]} for opt in self._optimizers]
        everyone = self.gradients.held_by(set().union(*ids) if ids else None)
        if index is None or not ids:
            return everyone, everyone * 0.0
        mine = self.gradients.held_by(ids[index])
        return mine, everyone * (1.0 - mine)

    def _groups(self) -> dict[int, Mapping[str, Any]] | None:
        if not self._optimizers:
            return None
        return {id(p): group for opt in self._optimizers for group in opt.param_groups for p in group["params"]}

    def _state_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the state of a parameter, without making one where its optimizer has none yet."""
        return next((opt.state[parameter] for opt in self._optimizers if parameter in opt.state), {})

    def _scaling(self) -> dict[str, Any]:
        if not isinstance(self.losses, ScaledLossMonitor):
            return {}
        return {
            "skipped_steps": self.losses.skipped,
            "skipped_in_a_row": self.losses.in_a_row,
            "loss_scale": self.losses.scale,
        }

    def _run_info(self, *, preflight: bool) -> RunInfo:
        info = describe_run(self._model, self._optimizers, self.labels, cross_entropy=bool(self.losses.cross_entropy))
        return replace(
            info, preflight=preflight, expects_updates=not preflight, clip_norm=self.clip_norm, **self._scaling()
        )
