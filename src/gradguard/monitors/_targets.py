"""Which modules of a model get a hook, and which of them are the blocks of its trunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gradguard.monitors._describe import clean_name, describe

__all__ = ["Target", "is_closed", "is_compiled", "outermost_blocks", "targets"]

_FEWEST_BLOCKS = 4
"""Blocks from which a model is a stack. Ours: with the two layers that usually follow, four blocks give the six points
that the depth criterion needs."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Target:
    """A module to hook.

    Attributes:
        module: The module.
        name: Its dotted name as the user wrote it.
        late: The module whose training forward pass must begin before this one is hooked; ``None`` to hook at once.
            A target that is its own ``late`` is such a module: it gets the hook that waits.
        is_block: Whether the gradient at its input is wanted, rather than that at its output.
    """

    module: nn.Module
    name: str
    late: nn.Module | None = None
    is_block: bool = False


def targets(model: nn.Module) -> Iterator[Target]:
    """Yield the modules to hook: blocks, leaf modules, and modules with parameters of their own.

    ``nn.TransformerEncoderLayer`` leaves its fast inference path as soon as a hook sits on it or on one of its modules.
    They are hooked when a training forward pass begins in a module around it, which is yielded as its own condition.

    Args:
        model: The model to observe.
    """
    unwrap = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    blocks = {id(block) for block in outermost_blocks(model)}
    skipped: set[int] = set()
    fast: set[int] = set()
    around: list[tuple[nn.Module, str]] = []
    for raw, module in model.named_modules():
        name = clean_name(raw, unwrap=unwrap)
        if id(module) in skipped or is_closed(module):
            skipped.update(id(child) for child in module.modules())
            continue
        if isinstance(module, nn.TransformerEncoderLayer) and id(module) not in fast:
            fast.update(id(child) for child in module.modules())
        if id(module) not in fast:
            around.append((module, name))
        if isinstance(module, nn.MultiheadAttention):  # its projection is used, but never called
            skipped.add(id(module.out_proj))
        late = model if id(module) in fast else None
        if id(module) in blocks:
            yield Target(module, name, late, is_block=True)
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None:
            yield Target(module, name, late)
    if fast:
        yield from (
            Target(module, name, module)
            for module, name in around
            if any(id(child) in fast for child in module.modules())
        )


def outermost_blocks(model: nn.Module, *, minimum: int = _FEWEST_BLOCKS) -> list[nn.Module]:
    """Return the blocks that a model is stacked from: modules with layers inside, two or more of them in a container.

    The outermost level counts. Where it has too few (a backbone and a head in a sequence), those that are stacks
    themselves are replaced by what they hold.

    Args:
        model: The model to look through.
        minimum: With fewer blocks than this there is no stack, and nothing is returned.

    Returns:
        Blocks of all stacks, in registration order; empty for a plain sequence of layers.

    Example:
        >>> import torch
        >>> layers = [torch.nn.TransformerEncoderLayer(4, 1) for _ in range(5)]
        >>> len(outermost_blocks(torch.nn.Sequential(torch.nn.Linear(2, 4), *layers)))
        5
    """
    found = list(_stacked(model))
    while 0 < len(found) < minimum:
        deeper = [inner for block in found for inner in (list(_stacked(block)) or [block])]
        if len(deeper) <= len(found):
            return []
        found = deeper
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch compiles the module: hooks set on it, or inside it, are ignored."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def is_closed(module: nn.Module) -> bool:
    """Whether no hook can look inside a module: it is compiled, or scripted."""
    return is_compiled(module) or isinstance(module, torch.jit.ScriptModule)


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost members of containers that hold at least two modules with layers inside."""
    inside = (child for child in module.children() if not is_closed(child))
    children = [child for child in inside if next(child.children(), None) is not None]
    blocks = [child for child in children if _has_layers_inside(child)] if _is_container(module) else []
    for child in children:
        if len(blocks) >= 2 and child in blocks:
            yield child
        else:
            yield from _stacked(child)


def _has_layers_inside(module: nn.Module) -> bool:
    """Whether this is a user's block: no container, and none of torch's layers, which may have children as well."""
    if _is_container(module) or describe.dispatch(type(module)) is not describe.dispatch(object):
        return False
    return next(module.parameters(), None) is not None


def _is_container(module: nn.Module) -> bool:
    """Whether the module only holds others: a subclass with a forward pass of its own is a block."""
    return isinstance(module, _CONTAINERS) and type(module).forward in (nn.Sequential.forward, nn.Module.forward)
