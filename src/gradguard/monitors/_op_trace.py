"""A record of the operations of one step: what each took and gave, as ranges that wait on the device.

A ``TorchFunctionMode`` sees every call of a torch function as the user wrote it. It passes each call on as it came, so
numbers, gradients and random states are those of a step without it.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from gradguard.monitors._hooks import in_functorch, is_tracing
from gradguard.monitors._ranges import Measured, Ranges

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKWARD_CALLS", "OpRecord", "OpTrace", "sequence_number"]

BACKWARD_CALLS = (torch.Tensor.backward, torch.autograd.backward)
"""Calls that start a backward pass. ``torch.autograd.grad`` is an operation: what it gives goes on in the forward
pass."""

_MOST_RECORDS = 30_000
"""Operations recorded in one step; what comes later passes unseen. Ours: a bound of about 30 MiB of host memory."""

_MOST_OUTSIDE = 10_000
"""Operations recorded between the model's forward pass and whatever ends the step, which an exception in the user's
loop may put off for good. Ours."""

_FRAMES = 6
"""Frames looked through for the user's line. Ours: torch's own wrappers around an operation are at most four deep."""

_TORCH = os.path.dirname(torch.__file__) + os.sep  # noqa: PTH120  # compared with the file names of code objects
_TORCH_MODULES = os.path.join(_TORCH, "nn", "modules", "")  # noqa: PTH118  # as above
_QUIET = (
    os.path.dirname(__file__) + os.sep,  # noqa: PTH120  # as above
    os.path.join(_TORCH, "optim", ""),  # noqa: PTH118  # as above
)
"""Where calls come from that are no part of a step's forward pass: from here, and from the optimizer's update."""

# What torch offers for the stack of modes is private, as is the way to the caller's frame in Python. Checked with 2.13.
_stack_size: Callable[[], int] = torch._C._len_torch_function_stack  # noqa: SLF001  # see above
_push_mode: Callable[[Any], None] = torch._C._push_on_torch_function_stack  # noqa: SLF001  # see above
_pop_mode: Callable[[], Any] = torch._C._pop_torch_function_stack  # noqa: SLF001  # see above
_frame = sys._getframe  # noqa: SLF001  # see above
_SEQUENCE = getattr(torch.autograd, "_get_sequence_nr", None)

_TAME = frozenset(
    (
        *("linear", "conv1d", "conv2d", "conv3d", "bilinear", "embedding", "matmul", "mm", "bmm", "addmm", "baddbmm"),
        *("relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "dropout", "cat", "stack", "add"),
        *("add_", "sub", "sub_", "mul", "mul_", "__matmul__", "layer_norm", "batch_norm", "group_norm", "max_pool2d"),
        *("avg_pool2d", "adaptive_avg_pool2d", "flatten", "reshape", "view", "transpose", "permute", "contiguous"),
        *("clone", "detach", "to", "float", "mean", "sum", "chunk", "split", "unbind", "expand", "flip", "copy_"),
    )
)
"""Operations that make nothing non-finite but by entries near the end of their type's range: of their large operands
the sum is enough to tell whether they are finite. Ours."""

_NAMES_OF_UNSET = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
"""Functions whose result means nothing until it is written to."""


def sequence_number() -> int:
    """Return the number that this thread's next graph node gets; 0 where torch does not tell (checked with 2.13)."""
    return int(_SEQUENCE()) if _SEQUENCE is not None else 0


@dataclass(slots=True, eq=False)
class OpRecord:
    """One operation.

    Attributes:
        func: The torch function; its name is looked up where it is reported.
        module: Dotted name of the module that called it, empty outside of all but the outermost.
        place: File and line of the user's code, empty where a module of torch called it.
        operands: The tensors it took.
        scalars: The numbers it took.
        results: The tensors it gave, or changed.
        first_node: Sequence number of its first graph node.
        end_node: Sequence number after its last.
        inside: Whether it ran inside the model's forward pass.
        before: What it wrote to, where that was uninitialised memory in parts: an operand only where no other is ill.
    """

    func: Callable[..., Any]
    module: str
    place: str
    operands: list[Measured]
    scalars: tuple[float, ...]
    inside: bool
    results: list[Measured] = field(default_factory=list)
    first_node: int = 0
    end_node: int = 0
    before: Measured | None = None


class OpTrace(TorchFunctionMode):
    """Records the operations between :meth:`open` and :meth:`close` on the thread that opened it.

    Attributes:
        records: Operations in order of execution.
        active: Whether it records.
        full: Whether operations were left out for being too many.
        spent_s: Seconds spent on measuring.
    """

    def __init__(
        self,
        ranges: Ranges,
        *,
        named: dict[int, tuple[str, str]],
        where: list[str],
        around_backward: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Prepare a record.

        Args:
            ranges: Measures.
            named: Kind and name by ``id`` of parameters, buffers and inputs; what it names is kept alive by the caller.
            where: Names of the modules that are running, innermost last; kept by the caller.
            around_backward: Called instead of a call that starts a backward pass; makes that call.
            on_failure: Called when recording fails; nothing is recorded from then on.
        """
        super().__init__()
        self.records: list[OpRecord] = []
        self.active = False
        self._on_stack = False
        self.full = False
        self.spent_s = 0.0
        self._ranges = ranges
        self._named = named
        self._where = where
        self._around_backward = around_backward
        self._on_failure = on_failure
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Measured]] = {}
        self._writers: dict[int, int] = {}
        self._outside = 0

    def open(self) -> bool:
        """Put the mode on the stack of this thread; return whether it may stay there after the model's forward pass.

        Above another mode it may not: whoever leaves that one takes the topmost off.
        """
        alone = _stack_size() == 0
        self.active = self._on_stack = True
        _push_mode(self)
        return alone

    def close(self) -> None:
        """Take the mode off the stack of this thread, wherever in it it is; harmless where it is not there."""
        self.active = False
        above = []
        while self._on_stack and _stack_size():
            mode = _pop_mode()
            if mode is self:
                break
            above.append(mode)
        self._on_stack = False
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs if kwargs is not None else {}
        if not self.active or torch.compiler.is_compiling() or in_functorch() or is_tracing():
            return func(*args, **kwargs)
        if func in BACKWARD_CALLS:
            return self._around_backward(func, args, kwargs)
        started = time.perf_counter()
        begun = self._begin(func, args, kwargs, _frame(1))
        self.spent_s += time.perf_counter() - started
        result = func(*args, **kwargs)
        if begun is not None:
            started = time.perf_counter()
            self._end(*begun, result)
            self.spent_s += time.perf_counter() - started
        return result

    def measure(self, tensor: Tensor, *, exact: bool = False) -> Measured | None:
        """Return what is known of a tensor as it is now; ``None`` where there is nothing to measure.

        Args:
            tensor: Any tensor.
            exact: Whether its range is wanted, however large it is.
        """
        known = self._known.get(id(tensor))
        fresh = known is not None and known[0]() is tensor
        version = _version(tensor)
        if known is not None and fresh and known[1] == version and (known[2].exact or not exact):
            return known[2]
        measured = self._ranges.take(tensor, exact=exact)
        if measured is None:
            return None
        writer = self._writers.get(_storage(tensor), -1) if self._writers else -1
        if writer > (known[2].source if known is not None and fresh else -1):
            measured.source, measured.kind = writer, "op"
        elif known is not None and fresh:
            measured.source, measured.kind, measured.name = known[2].source, known[2].kind, known[2].name
        else:
            measured.kind, measured.name = self._origin(tensor)
        self._known[id(tensor)] = weakref.ref(tensor), version, measured
        return measured

    def _origin(self, tensor: Tensor) -> tuple[str, str]:
        named = self._named.get(id(tensor))
        if named is not None:
            return named
        if tensor.grad_fn is not None:
            return "unseen", tensor.grad_fn.name()
        return "data", ""

    def _begin(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: Any
    ) -> tuple[OpRecord, list[Tensor], list[int]] | None:
        """Measure what an operation takes; ``None`` where it is not to be recorded."""
        try:
            passed, place = _place(frame)
            if passed:
                return None
            if len(self.records) >= _MOST_RECORDS or self._outside >= _MOST_OUTSIDE:
                self.full = True
                return None
            self._outside = 0 if self._where else self._outside + 1
            taken: list[Tensor] = []
            scalars: list[float] = []
            _sort(args, taken, scalars)
            if kwargs:
                _sort(kwargs.values(), taken, scalars)
            if getattr(func, "__name__", "") == "__get__":
                operands: list[Measured] = []
            else:
                exact = getattr(func, "__name__", "") not in _TAME
                operands = [m for t in taken if (m := self.measure(t, exact=exact)) is not None]
            module = self._where[-1] if self._where else ""
            record = OpRecord(func, module, place, operands, tuple(scalars), bool(self._where))
            record.first_node = sequence_number()
            return record, taken, [_version(t) for t in taken]
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's code
            self._fail(error)
            return None

    def _end(self, record: OpRecord, taken: list[Tensor], versions: list[int], result: Any) -> None:
        """Measure what it gave, or changed in place."""
        try:
            record.end_node = sequence_number()
            given: list[Tensor] = []
            _sort((result,), given, [])
            name = getattr(record.func, "__name__", "")
            if name == "__get__":
                for tensor in given:
                    self._inherit(taken, tensor)
                return
            changed = [t for t, v in zip(taken, versions, strict=True) if _version(t) != v]
            if not given and not changed:
                return
            index = len(self.records)
            partial = {id(tensor) for tensor in changed if self._note_write(record, tensor, index)}
            for tensor in [*given, *(t for t in changed if all(t is not g for g in given))]:
                if name in _NAMES_OF_UNSET:
                    unset = Measured(0.0, 0.0, 0.0, True, tensor.numel(), tensor.dtype, partial=True)
                    self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), unset
                    continue
                if self._inherit(taken, tensor):
                    continue
                measured = self._ranges.take(tensor)
                if measured is not None:
                    measured.source, measured.kind = index, "op"
                    measured.partial = id(tensor) in partial
                    record.results.append(measured)
                    self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), measured
            self.records.append(record)
        except Exception as error:  # noqa: BLE001  # as above
            self._fail(error)

    def _note_write(self, record: OpRecord, tensor: Tensor, index: int) -> bool:
        """Note which operation wrote to a tensor; return whether it began as uninitialised memory."""
        self._writers[_storage(tensor)] = index
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or not known[2].partial:
            return False
        record.before = known[2]
        record.operands = [operand for operand in record.operands if operand is not known[2]]
        return True

    def _inherit(self, taken: list[Tensor], tensor: Tensor) -> bool:
        """Take over the range of the tensor that this one shows whole, as after ``view`` or ``transpose``."""
        for base in taken:
            known = self._known.get(id(base))
            if known is None or base is tensor or known[0]() is not base or known[1] != _version(base):
                continue
            if base.numel() == tensor.numel() and base.dtype == tensor.dtype and _storage(base) == _storage(tensor):
                self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), known[2]
                return True
        return False

    def _fail(self, error: BaseException) -> None:
        self.active = False
        self._on_failure(error)


def _sort(values: Any, tensors: list[Tensor], scalars: list[float], depth: int = 2) -> None:
    """Gather the tensors and numbers among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (int, float)):
            scalars.append(value)
        elif depth and isinstance(value, (tuple, list)):
            _sort(value, tensors, scalars, depth - 1)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse and wrapped tensors have none
        return -id(tensor)


def _place(frame: Any) -> tuple[bool, str]:
    """Return whether to pass a call over, and the file and line of the user's code, empty for a module of torch."""
    for _ in range(_FRAMES):
        if frame is None:
            break
        file = frame.f_code.co_filename
        if file.startswith(_QUIET) and frame.f_code.co_name != "__torch_function__":  # another mode passes a call on
            return True, ""
        if file.startswith(_TORCH_MODULES):
            break
        if not file.startswith((_TORCH, *_QUIET)):
            return False, f"{os.path.basename(file)}:{frame.f_lineno}"  # noqa: PTH119  # once per operation, it must be quick
        frame = frame.f_back
    return False, ""
