"""Hooks that can be copied, pickled and removed without leaving a trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

__all__ = [
    "Hook",
    "HookSet",
    "StepHook",
    "Taps",
    "in_backward",
    "in_dispatch_mode",
    "in_functorch",
    "is_tracing",
    "top_function_mode",
]


_GRAPH_TASK = getattr(torch._C, "_current_graph_task_id", None)
_TRACING = getattr(torch._C, "_get_tracing_state", None)
_FUNCTORCH = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_DISPATCH_MODES = getattr(torch._C, "_len_torch_dispatch_stack", None)
_FUNCTION_MODE = getattr(torch.overrides, "_get_current_function_mode", None)


Place = TypeVar("Place")


class _Removable(Protocol):
    def remove(self) -> None: ...


class HookSet:
    """The handles of registered hooks; closing removes them all, twice is harmless.

    Hooks of an optimizer that is walking through them at this moment stay until the next closing, as torch would fail.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> with HookSet() as hooks:
        ...     hooks.add(layer.register_forward_hook(lambda module, args, output: None))
        >>> len(layer._forward_hooks)
        0
    """

    def __init__(self) -> None:
        self._handles: list[_Removable] = []

    def add(self, handle: _Removable) -> None:
        """Keep a handle until :meth:`close`."""
        self._handles.append(handle)

    def close(self) -> None:
        """Remove every hook."""
        kept: list[_Removable] = []
        while self._handles:
            handle = self._handles.pop()
            if _is_walked(handle):
                kept.append(handle)
            else:
                handle.remove()
        self._handles = kept[::-1]

    def __len__(self) -> int:
        return len(self._handles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Taps(Generic[Place]):
    """Hooks that are set for an observation, one per place, and taken off after it.

    A hook that did not fire in a step that ran stays, until :meth:`remove` is called with ``ran`` set to False: its
    module is unused, or compiled with the hook in place, and then removing it would make torch compile again.

    Attributes:
        fired: Places whose hook fired since :meth:`begin`.
        ran: Whether a step ran since then.
    """

    def __init__(self) -> None:
        self._handles: dict[Place, _Removable] = {}
        self.fired: set[Place] = set()
        self.ran = False

    def begin(self) -> None:
        """Begin an observation."""
        self.ran = False
        self.fired.clear()

    def add(self, place: Place, handle: _Removable) -> None:
        """Keep the handle of the hook at a place that had none."""
        self._handles[place] = handle

    def remove(self) -> None:
        """Remove the hooks, but in a step that ran only those that fired; harmless when called twice."""
        for place in [place for place in self._handles if place in self.fired or not self.ran]:
            self._handles.pop(place).remove()

    def __contains__(self, place: Place) -> bool:
        return place in self._handles


class Hook:
    """A hook that holds its owner weakly and calls ``method(owner, *key, *args)``.

    A deep copy or an unpickled one has no owner and does nothing: copies of a watched model (EMA, SWA, spawned
    processes) neither count into the original's monitor nor drag it along.
    """

    __slots__ = ("_key", "_method", "_owner")

    def __init__(self, owner: Any, method: Callable[..., None], *key: Any) -> None:
        self._owner: weakref.ref[Any] | None = None if owner is None else weakref.ref(owner)
        self._method: Callable[..., None] | None = method
        self._key = key

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        owner = None if self._owner is None else self._owner()
        if owner is not None and self._method is not None:
            self._method(owner, *self._key, *args)

    def __deepcopy__(self, memo: object) -> Hook:
        return _inert()

    def __copy__(self) -> Hook:
        return _inert()

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _inert, ()


class StepHook:
    """An optimizer hook that calls ``method(owner, index, args, kwargs)`` and keeps its owner alive.

    Torch drops optimizer hooks when an optimizer is copied or pickled.

    Attributes:
        running: Whether it is being called just now.
    """

    __slots__ = ("_index", "_method", "_owner", "running")

    def __init__(self, owner: Any, method: Callable[..., Any], index: int) -> None:
        self._owner = owner
        self._method = method
        self._index = index
        self.running = False

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        self.running = True
        try:
            return self._method(self._owner, self._index, args, kwargs)
        finally:
            self.running = False


def _is_walked(handle: Any) -> bool:
    """Whether an optimizer is calling one of our hooks from a dictionary of which it has not reached the end.

    An ``OrderedDict`` may lose entries during a walk only once the last one has been reached.
    """
    hooks = getattr(handle, "hooks_dict_ref", lambda: None)()
    if not hooks:
        return False
    running = [key for key, hook in hooks.items() if isinstance(hook, StepHook) and hook.running]
    return bool(running) and running[-1] != next(reversed(hooks))


def _inert(*_: Any) -> Hook:
    return Hook(None, _do_nothing)


def _do_nothing(*_: Any) -> None:
    """Stand in for the method of a copied hook."""


def in_backward() -> bool:
    """Whether the current thread is inside a backward pass, as in the recomputation of a checkpointed block.

    Uses a private function of torch (checked with 2.13); where it is missing the answer is False.
    """
    return _GRAPH_TASK is not None and _GRAPH_TASK() != -1


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform is active; its wrapped tensors cannot be read.

    Uses a private function of torch (checked with 2.13); where it is missing the answer is False.
    """
    return _FUNCTORCH is not None and _FUNCTORCH() is not None


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording, which would keep operations of ours.

    Uses a private function of torch (checked with 2.13); where it is missing the answer is False.
    """
    return _TRACING is not None and _TRACING() is not None


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active, as in selective checkpointing, which would record our operations too.

    Uses a private function of torch (checked with 2.13); where it is missing the answer is False.
    """
    return _DISPATCH_MODES is not None and bool(_DISPATCH_MODES())


def top_function_mode() -> object:
    """Return the ``TorchFunctionMode`` that was entered last in this thread, ``None`` for none.

    Uses a private function of torch (checked with 2.13); where it is missing the answer is ``None``.
    """
    return None if _FUNCTION_MODE is None else _FUNCTION_MODE()
