"""Signals: what flows forward through each layer, and the gradient that comes back to it.

A forward hook per leaf module, set for observed steps only, and a tensor hook on what it returns. Module backward hooks
are never used: they crash on in-place layers and turn compiled frames eager.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard.findings import Unobserved
from gradguard.monitors._blocks import BlockTaps
from gradguard.monitors._derivatives import ActivationInfo, activation_info, function_info
from gradguard.monitors._describe import ModuleInfo, clean_name, describe
from gradguard.monitors._hooks import Hook, HookSet, Taps, in_backward, in_functorch
from gradguard.monitors._reduce import Norm, Readback, dense, queue_norm
from gradguard.monitors._rows import (
    GradientHook,
    KnownTensors,
    Row,
    Slot,
    Streaks,
    layer_columns,
    saturated_units,
    unit_reduce,
)
from gradguard.monitors._targets import Target, is_compiled, targets
from gradguard.monitors._trees import floating_tensors
from gradguard.monitors.attention import AttentionMonitor
from gradguard.spectra._convolution import Conv

if TYPE_CHECKING:
    from torch import Tensor

    from gradguard.records import FloatArray, LayerTable

__all__ = ["SignalMonitor"]

_SAMPLE_ENTRIES = 1 << 16
"""Entries of an activation from which its derivative is measured; a relative error of 0.3 % of the mean."""


class SignalMonitor:
    """Measures delta (the gradient at layer outputs), the forward signal, and inactive and saturated units.

    Attributes:
        spent_s: Seconds spent in hooks since the monitor was made.
        generation: Counts observations; hooks of earlier ones are inert.
        failed: Whether a hook failed, which switches the monitor off.
        eval_calls: Calls in evaluation mode during the present observation.
        backward_seen: Whether a gradient arrived during the present observation.
        input_sizes: Spatial size of the last input of each convolution, by name.
        float16_seen: Whether a module returned a float16 tensor during the present observation.
    """

    name = "signals"

    def __init__(
        self,
        model: nn.Module,
        *,
        on_failure: Callable[[str, BaseException], None],
        dead_patience_steps: int = 20,
        any_mode: bool = False,
        attention: bool = True,
    ) -> None:
        """Prepare for a model; no hook is set before :meth:`arm`.

        Args:
            model: The model to observe.
            on_failure: Called with a place and an exception when a hook of ours fails; the monitor is off from then on.
            dead_patience_steps: Optimizer steps over which a unit must stay inactive to be called dead.
            any_mode: Observe in evaluation mode as well; a check before the first step wants that.
            attention: Read entropy and logits of attention as well.
        """
        self._model = model
        self._on_failure = on_failure
        self._patience = dead_patience_steps
        self._any_mode = any_mode
        self._hooks = HookSet()
        self._taps: Taps[tuple[int, bool]] = Taps()
        self._late: list[Target] = []
        self._blocks = BlockTaps()
        self.attention = AttentionMonitor(model, on_failure=on_failure, any_mode=any_mode, off=not attention)
        self._streaks: dict[tuple[int, str, str], Streaks] = {}
        self.input_sizes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[int, tuple[ModuleInfo, ActivationInfo | None]] = {}
        self.generation = 0
        self._active = False
        self.failed = False
        self.spent_s = 0.0
        self.reset(Readback())

    def reset(self, readback: Readback) -> None:
        """Forget the present observation; hooks stay where they are."""
        self.generation += 1
        self._readback = readback
        self._rows: dict[str, Row] = {}
        self._known: KnownTensors[tuple[Slot | None, Norm, int | None]] = KnownTensors()
        self._blocks.reset()
        self._paused = False
        self.attention.reset(readback)
        self.eval_calls = 0
        self.backward_seen = False
        self.float16_seen = False

    def arm(self) -> None:
        """Set the forward hooks; calling twice is harmless."""
        if self.failed or self._active:
            return
        self._active = True
        self._taps.begin()
        self._late = []
        self.attention.arm()
        found = list(targets(self._model))
        self._blocks.expect(target.name for target in found if target.is_block)
        for target in found:
            if target.late is None:
                self._watch(target)
            elif target.late is target.module:
                self._hooks.add(target.module.register_forward_pre_hook(Hook(self, SignalMonitor._arm_late)))
            else:
                self._late.append(target)

    def disarm(self) -> None:
        """Remove the hooks; gradient hooks of graphs that are still alive become inert. Harmless when called twice.

        See :class:`~gradguard.monitors._hooks.Taps` for those that stay until :meth:`close`.
        """
        self._active = False
        self.attention.disarm(ran=self._taps.ran, fired={module for module, _ in self._taps.fired})
        self._hooks.close()
        self._taps.remove()
        self.generation += 1

    def close(self) -> None:
        """Remove every hook, for good."""
        self._taps.ran = False
        self.disarm()

    def pause(self) -> None:
        """Let what follows in this step pass unobserved, as in further evaluations of a closure."""
        self._paused = self.attention.paused = True
        self.generation += 1

    def close_step(self, step: int, optimizer: int) -> None:
        """Queue what spans observations: for how long units have been inactive."""
        self._taps.ran = True
        for prefix in ("", "input_"):
            groups: dict[torch.device, dict[str, Tensor]] = {}
            for row in self._rows.values():
                peak = (row.input_units if prefix else row.units).peak
                if peak is not None:
                    groups.setdefault(peak.device, {})[row.name] = peak
            for device, peaks in groups.items():
                streaks = self._streaks.setdefault((optimizer, prefix, str(device)), Streaks())
                counts = [self._readback.put_vector(c) for c in streaks.add(peaks, step, self._patience)]
                for offset, (name, peak) in enumerate(peaks.items()):
                    for kind, (queue, position) in zip(("inactive", "dead"), counts, strict=True):
                        handle = (queue, position + offset)
                        self._rows[name].counts[f"{prefix}{kind}_fraction"] = (handle, peak.numel())

    def columns(self) -> tuple[LayerTable, dict[str, FloatArray]]:
        """Return the rows of this observation; call after the transfer. Modules that did not run are left out."""
        rows = [row for row in self._rows.values() if row.calls]
        return layer_columns(self.attention.place(rows), self._readback)

    def blind(self) -> Unobserved | None:
        """Return why no layer was seen in a step that ran under hooks, ``None`` where some were."""
        if not self._active or any(row.calls for row in self._rows.values()):
            return None
        if self.eval_calls:
            why = "the forward pass ran in evaluation mode"
        elif self._taps.fired:
            why = "the forward pass ran without gradients"
        else:
            why = "no forward hook fired: the model runs compiled, or as a copy"
        return Unobserved(what="layer signals", why=f"{why}; parameters are observed")

    def unobserved(self) -> list[Unobserved]:
        """Return what the hooks cannot see in this model."""
        notes = []
        compiled = [
            clean_name(name) or "the model" for name, module in self._model.named_modules() if is_compiled(module)
        ]
        if compiled:
            notes.append(
                Unobserved(
                    what=f"layer signals inside {compiled[0]}",
                    why="it is compiled, and torch ignores hooks set on compiled code; parameters are observed",
                )
            )
        if any(isinstance(module, torch.jit.ScriptModule) for module in self._model.modules()):
            notes.append(
                Unobserved(what="layer signals inside scripted modules", why="TorchScript accepts no module hooks")
            )
        return notes

    def _watch(self, target: Target) -> None:
        key = (id(target.module), target.is_block)
        if isinstance(target.module, nn.MultiheadAttention) and not target.is_block:
            self.attention.watch(target.module, target.name)
        if key in self._taps:
            return
        if target.is_block:
            hook = Hook(self, SignalMonitor._on_block, target.name)
            self._taps.add(key, target.module.register_forward_pre_hook(hook, with_kwargs=True))
            return
        hook = Hook(self, SignalMonitor._on_forward, target.name)
        self._taps.add(key, target.module.register_forward_hook(hook, with_kwargs=True))

    def _arm_late(self, *_: Any) -> None:
        if self._late and torch.is_grad_enabled() and self._in_training(self._model):
            late, self._late = self._late, []
            for target in late:
                self._watch(target)

    def _in_training(self, module: nn.Module) -> bool:
        return self._any_mode or module.training or self._model.training

    def _on_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._active or self._paused:
            return
        self._taps.fired.add((id(module), False))
        started = time.perf_counter()
        try:
            if not in_functorch():
                with self.attention.aside():
                    self._tap(name, module, (args, kwargs) if kwargs else args, output)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's forward pass
            self._fail(f"the forward hook of {name or 'the model'}", error)
        self.spent_s += time.perf_counter() - started

    def _on_block(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._active or self._paused:
            return
        self._taps.fired.add((id(module), True))
        started = time.perf_counter()
        try:
            if not in_functorch() and self._in_training(module):
                self._blocks.enter(name, (args, kwargs), self._listen_at_block)
        except Exception as error:  # noqa: BLE001  # as above
            self._fail(f"the forward pre-hook of {name}", error)
        self.spent_s += time.perf_counter() - started

    def _listen_at_block(self, tensor: Tensor) -> Slot:
        known = self._known.find(tensor)
        return known[0] if known is not None and known[0] is not None else self._listen(tensor)

    def _tap(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._in_training(module):
            self.eval_calls += 1
            return
        row = self._rows.get(name)
        if row is None:
            if in_backward():
                return
            info, activation = self._describe(module)
            row = Row(name, type(module).__name__, info, math.nan if activation is None else activation.bound)
            row.is_step = type(module) is nn.ReLU
            self._blocks.place(row)
            self._rows[name] = row
        if not torch.is_grad_enabled():
            row.placeholders += not in_backward()
            return
        if in_backward():
            if row.placeholders == 0:
                return
            row.placeholders -= 1
        row.calls += 1
        outputs = floating_tensors(output)
        given = next(iter(floating_tensors(inputs)), None)
        if given is not None and isinstance(module, Conv):
            self.input_sizes[name] = tuple(given.shape[-len(module.kernel_size) :])
        in_place = given is not None and any(given is tensor for tensor in outputs)
        axis = self._tap_input(row, given, in_place=in_place)
        for tensor in outputs:
            self._tap_output(row, tensor, axis)
        if outputs and row.info.role == "activation":
            self._tap_activation(row, module, None if in_place else given, outputs[0], axis)

    def _describe(self, module: nn.Module) -> tuple[ModuleInfo, ActivationInfo | None]:
        known = self._kinds.get(id(module))
        if known is None:
            known = self._kinds[id(module)] = describe(module), activation_info(module)
        return known

    def _tap_input(self, row: Row, tensor: Tensor | None, *, in_place: bool) -> int | None:
        """Measure the first input tensor; return the axis of its units where it is known."""
        if tensor is None:
            return None
        known = self._known.find(tensor, any_version=in_place)
        if known is not None:
            slot, norm, axis = known
            row.inputs.append(norm)
            if slot is not None:
                row.input_slots.append(slot)
            return axis
        values = dense(tensor.detach())
        if in_place or values is None:
            return None
        norm = queue_norm(self._readback, values, extremes=True)
        row.inputs.append(norm)
        slot = self._listen(tensor) if tensor.requires_grad else None
        axis = row.info.unit_axis
        self._known.add(tensor, (slot, norm, axis))
        if slot is not None:
            row.input_slots.append(slot)
            if row.info.role == "affine" and axis is not None and tensor.grad_fn is not None and -axis <= tensor.ndim:
                activity = unit_reduce(values, axis, signed=True)
                if activity is not None:
                    row.input_units.add(activity)
                info = function_info(tensor)
                if info is not None and values.ndim > 1 and values.numel():
                    sample = values[:: -(-values.numel() // _SAMPLE_ENTRIES)]
                    row.add_function(self._readback, sample, info, axis)
        return axis

    def _tap_output(self, row: Row, tensor: Tensor, axis: int | None) -> None:
        known = self._known.find(tensor)
        if known is not None and known[0] is not None:
            row.outputs.append(known[0])
            row.forward.append(known[1])
            return
        values = dense(tensor.detach())
        if values is None:
            return
        norm = queue_norm(self._readback, values, extremes=values.dtype in (torch.float16, torch.bfloat16))
        self.float16_seen |= values.dtype == torch.float16
        row.forward.append(norm)
        slot = self._listen(tensor) if tensor.requires_grad else None
        if slot is not None:
            row.outputs.append(slot)
        own = row.info.unit_axis
        self._known.add(tensor, (slot, norm, own if own is not None else axis))

    def _tap_activation(
        self, row: Row, module: nn.Module, given: Tensor | None, output: Tensor, axis: int | None
    ) -> None:
        if axis is None or -axis > output.ndim or axis >= output.ndim:
            axis = 1 if output.ndim >= 4 else -1
        output = output.detach()
        if row.info.zero_is_dead:
            nonzeros = output.bool().sum()  # no branch per entry, as count_nonzero has on a CPU
            row.nonzeros.append((self._readback.put(nonzeros), output.numel()))
            activity = unit_reduce(output, axis, signed=False)
            if activity is not None:
                row.units.add(activity)
        _, info = self._describe(module)
        if row.is_step or info is None or output.numel() == 0 or (info.needs_input and given is None):
            return
        stride = -(-output.numel() // _SAMPLE_ENTRIES)
        y = output[::stride] if output.ndim > 1 else output
        x = y if given is None else (given.detach()[::stride] if output.ndim > 1 else given.detach())
        slope = info.derivative(module, x, y).float()
        row.derivatives.append(queue_norm(self._readback, slope))
        if info.bounded:
            counted = saturated_units(slope, axis, info.bound)
            if counted is not None:
                row.saturated.append((self._readback.put(counted[0]), counted[1]))

    def _listen(self, tensor: Tensor) -> Slot:
        tapped = self._blocks.find(tensor)
        if tapped is not None:
            return tapped
        slot = Slot()
        handle = tensor.register_hook(GradientHook(self, slot, self.generation))
        if tensor.is_leaf:
            self._hooks.add(handle)
        return slot

    def take_gradient(self, slot: Slot, gradient: Tensor) -> None:
        """Queue the norm of a gradient that arrived."""
        started = time.perf_counter()
        self.backward_seen = True
        try:
            values = dense(gradient.detach())
            if values is not None:
                slot.norms.append(queue_norm(self._readback, values))
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's backward pass
            self._fail("a gradient hook", error)
        self.spent_s += time.perf_counter() - started

    def _fail(self, place: str, error: BaseException) -> None:
        self.failed = True
        self.close()
        self._on_failure(place, error)
