"""Attention: how sharp each head's softmax is and how large its logits are, on observed steps only.

Fused attention hides its logits, and much attention is no ``nn.MultiheadAttention``. So torch's functions are watched
while a module of the user's runs: a ``TorchFunctionMode``, entered by the outermost module's forward pre-hook and left
by its forward hook, sees calls of ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward`` and softmax
and passes every one on unchanged. It never stays on outside such a call, nor is it used in a module that holds compiled
ones. A compiled function called inside is compiled once more for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gradguard.monitors._attention_math import READERS
from gradguard.monitors._describe import clean_name, describe
from gradguard.monitors._hooks import Hook, in_backward, in_dispatch_mode, in_functorch, top_function_mode
from gradguard.monitors._reduce import Readback
from gradguard.monitors._rows import HeadReadings, Row
from gradguard.monitors._targets import is_closed

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["AttentionMonitor"]

_CALLS = 4
"""Calls of a module's attention that are read per observation. Ours: text generated inside a step calls it often."""


class AttentionMonitor:
    """Reads entropy and largest logit of every attention that runs in a module of the user's.

    Attributes:
        spent_s: Seconds spent here since the monitor was made.
        paused: Whether what follows in this step passes unread.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_failure: Callable[[str, BaseException], None],
        any_mode: bool = False,
        off: bool = False,
    ) -> None:
        """Prepare for a model; no hook is set before :meth:`arm`.

        Args:
            model: The model to observe.
            on_failure: Called with a place and an exception when reading fails; the monitor is off from then on.
            any_mode: Observe in evaluation mode as well; a check before the first step wants that.
            off: Do nothing, ever.
        """
        self._model = model
        self._on_failure = on_failure
        self._any_mode = any_mode
        self._handles: dict[int, tuple[nn.Module, RemovableHandle, RemovableHandle]] = {}
        self._fired: set[int] = set()
        self._mode = _Watch(self)
        self._inside: list[tuple[str, nn.Module]] = []
        self._thread = 0
        self._active = False
        self._off = off
        self.paused = False
        self.spent_s = 0.0
        self.reset(Readback())

    def reset(self, readback: Readback) -> None:
        """Forget the present observation; hooks stay where they are."""
        self._readback = readback
        self._found: dict[str, tuple[nn.Module, list[HeadReadings]]] = {}
        self.paused = False

    def arm(self) -> None:
        """Set the hooks, except those of ``nn.MultiheadAttention``: see :meth:`watch`. Calling twice is harmless."""
        if self._off:
            self.disarm()
        if self._off or self._active or not self._unwind():
            return
        self._active = True
        self._fired.clear()
        for module, name in _candidates(self._model):
            self.watch(module, name)

    def watch(self, module: nn.Module, name: str) -> None:
        """Read the attention that runs in a module, until :meth:`disarm`."""
        if self._active and id(module) not in self._handles:
            self._handles[id(module)] = (
                module,
                module.register_forward_pre_hook(Hook(self, AttentionMonitor._enter, name)),
                module.register_forward_hook(Hook(self, AttentionMonitor._leave), always_call=True),
            )

    def disarm(self, *, ran: bool = False, fired: Collection[int] = ()) -> None:
        """Remove the hooks.

        Args:
            ran: Whether a step ran under them. Hooks of modules in which nothing fired then stay, until :meth:`disarm`
                is called without: such modules are unused, or compiled with the hooks in place.
            fired: Ids of modules on which hooks of others fired.
        """
        self._active = False
        if not self._unwind():
            return
        seen = self._fired.union(fired)
        for key, (module, *handles) in list(self._handles.items()):
            if not ran or any(id(child) in seen for child in module.modules()):
                del self._handles[key]
                for handle in handles:
                    handle.remove()

    def place(self, rows: list[Row]) -> list[Row]:
        """Return the rows with what was read, and with rows of their own for modules that had none.

        Those stand right behind the last of their children, as they end after it.
        """
        rows = list(rows)
        for name, (module, readings) in self._found.items():
            row = next((row for row in rows if row.name == name), None)
            if row is None:
                row = Row(name, type(module).__name__, describe(module))
                behind = [i for i, other in enumerate(rows) if not name or other.name.startswith(f"{name}.")]
                rows.insert(behind[-1] + 1 if behind else len(rows), row)
            row.heads = readings
        return rows

    def read(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Queue what one call of torch's says about attention."""
        started = time.perf_counter()
        name, module = self._inside[-1]
        found = self._found.get(name)
        try:
            if (found is None or len(found[1]) < _CALLS) and self._is_readable(args, kwargs):
                device = next((value.device.type for value in args if isinstance(value, torch.Tensor)), "cpu")
                with torch.no_grad(), torch.autocast(device, enabled=False):
                    heads = READERS[function](args, kwargs)
                if heads is not None:
                    reading = HeadReadings(
                        self._readback.put_vector(heads.entropy),
                        heads.entropy.numel(),
                        self._readback.put(heads.logit_max),
                    )
                    self._found.setdefault(name, (module, []))[1].append(reading)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's forward pass
            self._off = True
            self.disarm()
            self._on_failure(f"reading the attention of {name or 'the model'}", error)
        self.spent_s += time.perf_counter() - started

    def _is_readable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether operations of ours would pass unnoticed here, by other modes, transforms and captured graphs."""
        if not self._active or self.paused or not torch.is_grad_enabled():
            return False
        if in_functorch() or in_dispatch_mode():
            return False
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())

    def _enter(self, name: str, module: nn.Module, *_: Any) -> None:
        self._fired.add(id(module))
        if self._inside:
            if threading.get_ident() == self._thread:
                self._inside.append((name, module))
            return
        if not self._active or self.paused or not torch.is_grad_enabled():
            return
        if not (self._any_mode or module.training or self._model.training):
            return
        if in_backward() and any(f"{found}.".startswith(f"{name}.") for found in self._found):
            return  # the recomputation of a checkpointed block that was read already
        self._thread = threading.get_ident()
        self._inside.append((name, module))
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if not self._inside or self._inside[-1][1] is not module or threading.get_ident() != self._thread:
            return
        self._inside.pop()
        if not self._inside:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the mode off for a while, where it stands last: operations of ours need not pass through it."""
        if not self._inside or top_function_mode() is not self._mode:
            yield
            return
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _unwind(self) -> bool:
        """Leave a mode that an interrupted forward pass left on; ``False`` where it stands below another one."""
        if self._inside:
            if top_function_mode() is not self._mode:
                return False
            self._inside.clear()
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return True


class _Watch(TorchFunctionMode):
    """Passes every function of torch on unchanged, and shows some to the monitor first."""

    def __init__(self, monitor: AttentionMonitor) -> None:
        super().__init__()
        self._monitor = monitor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling() and func in READERS:
            self._monitor.read(func, args, kwargs)
        return func(*args, **kwargs)


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules whose code is the user's and free of compiled parts.

    Nothing inside ``nn.TransformerEncoderLayer``: hooks there close its fast path. See ``_targets`` of the signals.
    """
    unwrap = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    closed: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            closed.update(id(child) for child in module.modules())
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "torch" or id(module) in closed:
            continue
        if not any(is_closed(child) for child in module.modules()):
            yield module, clean_name(name, unwrap=unwrap)
