"""Closures handed to ``optimizer.step``, which LBFGS and Lightning use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["wrap_closure"]


def wrap_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], after: Callable[[], object], *, every: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of a step with its closure wrapped; ``None`` where it has none.

    Args:
        args: Positional arguments as an optimizer hook gets them: the optimizer comes first.
        kwargs: Keyword arguments.
        after: Called after the closure's first evaluation in this step, and only then.
        every: Call it after each evaluation instead.
    """
    position = next((at for at, value in enumerate(args) if at > 0 and callable(value)), None)
    closure = kwargs.get("closure") if position is None else args[position]
    if closure is None:
        return None
    evaluated = False

    def observed() -> Any:
        nonlocal evaluated
        result = closure()
        if every or not evaluated:
            evaluated = True
            after()
        return result

    if position is None:
        return args, {**kwargs, "closure": observed}
    return (*args[:position], observed, *args[position + 1 :]), kwargs
