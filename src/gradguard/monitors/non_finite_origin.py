"""Looking for the operation that makes NaN or infinity, in a step that is armed for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard.monitors._backward_trace import BackwardTrace
from gradguard.monitors._blame import blame_backward, blame_forward
from gradguard.monitors._describe import clean_name
from gradguard.monitors._hooks import Hook, HookSet, in_backward, in_functorch, is_tracing
from gradguard.monitors._op_trace import OpTrace
from gradguard.monitors._ranges import Measured, Ranges
from gradguard.monitors._targets import is_compiled
from gradguard.monitors._trees import floating_tensors, tensors
from gradguard.records import NonFiniteOrigin

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NonFiniteMonitor"]


class NonFiniteMonitor:
    """Names the operation, the module and the operands behind a NaN or an infinity, forward or backward.

    Armed, it records the range of every operation's operands and result between the beginning of the model's forward
    pass and the end of the step, and the range of every gradient that a graph node gives; idle, it does nothing. It
    reads only: numbers, gradients and random states are those of a step without it.

    Attributes:
        armed: Whether the coming forward passes are looked at.
        failed: Whether it failed, which switches it off.
        cut_short: Whether a step had more operations than are recorded.
        spent_s: Seconds spent since it was made.
    """

    name = "non_finite_origin"

    def __init__(
        self, model: nn.Module, *, on_failure: Callable[[str, BaseException], None], scaled: bool = False
    ) -> None:
        """Prepare for a model; nothing is set before :meth:`listen` and :meth:`arm`.

        Args:
            model: The model to look at.
            on_failure: Called with a place and an exception when something of ours fails.
            scaled: Whether a loss scaler skips the steps in which its own scale makes gradients overflow.
        """
        self._model = model
        self._on_failure = on_failure
        self._scaled = scaled
        self._left = 0
        self._listener = HookSet()
        self._hooks = HookSet()
        self._quick_hooks = HookSet()
        self._quick: list[tuple[nn.Module, str]] = []
        self._inputs: list[tuple[Tensor, int]] = []
        self.armed = False
        self.failed = False
        self.cut_short = False
        self.spent_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self._ranges = Ranges()
        self._where: list[str] = []
        self._named: dict[int, tuple[str, str]] = {}
        self._trace: OpTrace | None = None
        self._thread = 0
        self._stays = False
        self._losses: list[Measured] = []
        self._passes: list[BackwardTrace] = []
        self._segment = 0
        self._passes_before = 0
        self._skipped: list[tuple[int, int]] = []

    def listen(self) -> None:
        """Remember each batch that the model is given, by one hook on the model; calling twice is harmless."""
        model = self._model
        if not len(self._listener) and not isinstance(
            model, (torch.jit.ScriptModule, nn.TransformerEncoderLayer, nn.MultiheadAttention)
        ):
            hook = Hook(self, NonFiniteMonitor._on_batch)
            self._listener.add(model.register_forward_pre_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Remove everything, for good."""
        self.mute()
        self._inputs = []
        self.disarm()

    def mute(self) -> None:
        """Stop remembering batches until :meth:`listen`."""
        self._listener.close()

    def arm(self, steps: int = 1) -> str:
        """Set hooks on every module; calling twice is harmless.

        Args:
            steps: Optimizer steps to search at most; it ends before where one of them is not finite.

        Returns:
            Why it cannot be done with this model, empty where it was.
        """
        self._left = max(self._left, steps)
        if self.armed or self.failed:
            return "" if self.armed else "it has failed before"
        if any(is_compiled(module) for module in self._model.modules()):
            return "a part of the model is compiled, and its operations are no calls of torch functions"
        self.armed = True
        quick = {id(m) for m in self._model.modules() if isinstance(m, nn.TransformerEncoderLayer) for m in m.modules()}
        self._quick = []
        for raw, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if id(module) in quick:
                self._quick.append((module, clean_name(raw)))
            else:
                self._hook(self._hooks, module, clean_name(raw))
        return ""

    def _hook(self, hooks: HookSet, module: nn.Module, name: str) -> None:
        enter, leave = Hook(self, NonFiniteMonitor._enter, name), Hook(self, NonFiniteMonitor._leave, name)
        hooks.add(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.add(module.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def disarm(self) -> None:
        """Remove everything; harmless when called twice."""
        self.armed = False
        self._hooks.close()
        self.pause()
        self._begin()

    def pause(self, loss: object = None) -> None:
        """Stop recording until the next forward pass; what was recorded stays.

        Args:
            loss: The loss of this step, where it is known.
        """
        self._quick_hooks.close()
        trace = self._trace
        if trace is None:
            return
        trace.active = False
        if threading.get_ident() == self._thread:
            trace.close()
        if isinstance(loss, torch.Tensor) and not self._losses:
            try:
                self._add_loss(trace, loss)
            except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's loop
                self._fail(error)

    def close_step(self, step: int) -> NonFiniteOrigin | None:
        """End the step: return where its numbers stopped being finite, ``None`` where they did not. Synchronises.

        Args:
            step: Optimizer step, from 0.
        """
        self._inputs = []
        if not self.armed:
            return None
        self._left -= 1
        if self._trace is None:
            if self._left <= 0:
                self.disarm()
            return None
        started = time.perf_counter()
        self.pause()
        trace = self._trace
        try:
            self._ranges.fetch()
            origin = blame_forward(trace.records, self._losses, step=step)
            if origin is None:
                origin = blame_forward(trace.records, _abandoned(trace, self._skipped), step=step)
            if origin is None:
                passes = self._passes[-1:] if self._scaled else self._passes
                unsure = any(m.unsure for one in passes for node in one.nodes for _, m in node.gave)
                sums = not unsure or self._gradients_may_be_ill()
                origin = blame_backward(trace.records, passes, step=step, trust_sums=sums)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's loop
            origin = None
            self._fail(error)
        self.spent_s += trace.spent_s + time.perf_counter() - started
        self.cut_short = self.cut_short or trace.full
        self._begin()
        if origin is not None or self._left <= 0:
            self._left = 0
            self.disarm()
        return origin

    def _gradients_may_be_ill(self) -> bool:
        """Whether a gradient that is there holds a NaN or an infinity, or one is not there to be asked.

        A sum of finite entries may leave the range of float32; then nothing is wrong yet.
        """
        ranges = Ranges()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        given = [p.grad for p in trained if p.grad is not None]
        found = [measured for gradient in given if (measured := ranges.take(gradient, exact=True)) is not None]
        ranges.fetch()
        return len(found) < len(trained) or not all(measured.finite for measured in found)

    def remember(self, *values: Any) -> None:
        """Keep the floating-point tensors of a batch in host memory until the step is over; no copy is made.

        Those on other devices are of no use: there a loss is not known before the step is over.
        """
        try:
            self._inputs = [
                (t, t._version)
                for t in floating_tensors(values)
                if t.device.type == "cpu" and not t.requires_grad and not t.is_inference()
            ]
        except Exception:  # noqa: BLE001  # a batch of an odd kind is not remembered, and no reason to stop
            self._inputs = []

    def _on_batch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and not in_functorch():
            self.remember(args, kwargs)

    def look_at_batch(self, step: int) -> tuple[bool, NonFiniteOrigin | None]:
        """Look for NaN and infinity in the batch that is remembered. Synchronises.

        A tensor that was written to since says nothing. Infinities below all else are a mask.

        Args:
            step: Optimizer step, from 0.

        Returns:
            Whether every tensor of the batch could be looked at (and there was one); the batch as an origin, or
            ``None`` where what could be looked at is finite.
        """
        ranges = Ranges()
        same = [tensor for tensor, version in self._inputs if tensor._version == version]
        found = [measured for tensor in same if (measured := ranges.take(tensor, exact=True)) is not None]
        ranges.fetch()
        ill = [measured for measured in found if not measured.finite and not measured.masked]
        if not ill:
            return 0 < len(self._inputs) == len(found), None
        value = "NaN" if any(measured.nan for measured in ill) else "infinity"
        return True, NonFiniteOrigin(step=step, kind="input", value=value)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.armed:
            return
        try:
            if not self._where and self._trace is not None:
                self._begin_segment(self._trace)
            if not self._where and (self._trace is None or not self._trace.active):
                if not torch.is_grad_enabled() or not (module.training or self._model.training):
                    return
                if in_functorch() or in_backward() or is_tracing():
                    return
                self._open(args, kwargs)
            self._where.append(name)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's forward pass
            self._fail(error)

    def _begin_segment(self, trace: OpTrace) -> None:
        """Note that another forward pass begins, and whether what the last one gave was gone on with."""
        if self._segment < len(trace.records) and not self._passes_before < len(self._passes):
            self._skipped.append((self._segment, len(trace.records)))
        self._segment, self._passes_before = len(trace.records), len(self._passes)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name not in self._where:
            return
        while self._where.pop() != name:
            pass
        if not self._where and (output is None or not self._stays):  # an exception, or another mode below
            self.pause()

    def _open(self, args: Any, kwargs: Any) -> None:
        if self._trace is None:
            self._trace = OpTrace(
                self._ranges,
                named=self._named,
                where=self._where,
                around_backward=self._around_backward,
                on_failure=self._fail,
            )
        for raw, parameter in self._model.named_parameters():
            self._named[id(parameter)] = "parameter", clean_name(raw)
        for raw, buffer in self._model.named_buffers():
            self._named[id(buffer)] = "buffer", clean_name(raw)
        for tensor in floating_tensors((args, kwargs)):
            measured = self._trace.measure(tensor)
            if measured is not None and measured.kind == "data":
                measured.kind = "input"
        for module, name in self._quick:
            self._hook(self._quick_hooks, module, name)
        self._thread = threading.get_ident()
        self._stays = self._trace.open()

    def _around_backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that starts a backward pass, with a hook on each node that it runs through."""
        trace = self._trace
        with HookSet() as hooks:
            try:
                if trace is not None:
                    losses = tensors(args[0] if args else kwargs.get("tensors"))
                    started = time.perf_counter()
                    self._watch(trace, list(losses), hooks)
                    self.spent_s += time.perf_counter() - started
            except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's backward pass
                self._fail(error)
            return func(*args, **kwargs)

    def _watch(self, trace: OpTrace, losses: list[Tensor], hooks: HookSet) -> None:
        for loss in losses:
            self._add_loss(trace, loss)
        backward = BackwardTrace()
        backward.watch(losses, self._ranges, hooks)
        self._passes.append(backward)

    def _add_loss(self, trace: OpTrace, loss: Tensor) -> None:
        measured = trace.measure(loss)
        self._losses.extend([measured] if measured is not None else [])

    def _fail(self, error: BaseException) -> None:
        self.failed = True
        self.armed = False
        self._on_failure("the search for the origin of NaN or infinity", error)


def _abandoned(trace: OpTrace, segments: Sequence[tuple[int, int]]) -> list[Measured]:
    """Return the scalars that the loop computed from what the model gave and did not go on with: losses it skipped."""
    consumed = {
        operand.source
        for record in trace.records
        if record.results and record.end_node > record.first_node  # loss.isfinite() goes on to nothing
        for operand in record.operands
    }
    return [
        result
        for start, end in segments
        for index in range(start, end)
        if index not in consumed and not (record := trace.records[index]).inside and record.end_node > record.first_node
        for result in record.results
        if result.numel == 1
    ]
