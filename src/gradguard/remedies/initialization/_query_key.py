"""Weights of queries and keys, scaled until attention logits are of usual size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradguard._untouched import untouched
from gradguard.monitors._describe import clean_name
from gradguard.monitors._reduce import Readback
from gradguard.monitors.attention import AttentionMonitor
from gradguard.remedies._applied import Applied, Snapshot, tensor_names, transaction
from gradguard.remedies.initialization._attention import query_key_blocks
from gradguard.remedies.initialization._schemes import refuse_chosen
from gradguard.remedies.initialization._targets import check_arguments, expand, finish
from gradguard.remedies.initialization._trace import call

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["scale_query_key"]

_PASSES = 4
"""Forward passes at most: what a layer gets changes with the layers before it. Ours."""


def scale_query_key(
    model: nn.Module,
    batch: Any,
    *,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    largest: float = 5.0,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Scale the weights of queries and keys down where attention logits are too large on a batch, in place.

    Logits go with the product of the two, so each is multiplied by the root of what the logits lack; biases alike. The
    directions that were learnt stay. Found are ``nn.MultiheadAttention`` and, in modules whose code computes attention,
    Linear layers that are called query, key, q_proj, to_k, qkv and the like.

    Args:
        model: The model; it keeps its modules and parameters.
        batch: One batch of real inputs: a mapping is passed as keywords, a tuple or list as arguments.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        largest: Largest logit wanted, > 0. Attention with up to twice as much is left alone.
        modules: Names of the attention modules, or of modules around them; all by default.
        optimizer: Its state for the changed parameters is dropped.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If ``largest`` is not positive and finite, or a module named is one to leave alone.
        UnsupportedModelError: If the weights cannot be set in place, or there is nothing to scale.

    Source:
        Kimi Team (2025), "Kimi K2", arXiv 2507.20534, section 2.1 (QK-Clip), per layer instead of per head. The default
        is ours: among a few thousand logits of unit variance the largest is about 4.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> attention = nn.MultiheadAttention(16, 2, batch_first=True)
        >>> with torch.no_grad(): _ = attention.in_proj_weight[:32].mul_(30.0)
        >>> model, x = nn.Sequential(nn.TransformerEncoderLayer(16, 2, batch_first=True)), torch.randn(4, 6, 16)
        >>> model[0].self_attn = attention
        >>> scale_query_key(model, x).changed
        ('0.self_attn.in_proj_weight',)
    """
    if not 0.0 < largest < math.inf:
        raise ValueError(f"largest must be positive and finite, got {largest!r}")
    optimizers = check_arguments(model, optimizer, verb="change")
    chosen = None if modules is None else set(expand(model, modules))
    named = {clean_name(name): module for name, module in model.named_modules()}
    tensors = tensor_names(model)
    skipped: dict[str, str] = {}
    first: dict[str, float] = {}
    wanted: dict[str, float] = {}
    with transaction() as snapshot:
        for _ in range(_PASSES):
            seen = _largest_logits(model, batch, compute_loss)
            wanted = {name: logit for name, logit in seen.items() if chosen is None or id(named[name]) in chosen}
            large = {
                name: logit for name, logit in wanted.items() if not logit <= 2.0 * largest and name not in skipped
            }
            for name, logit in large.items():
                reason = "its logits are not finite" if not math.isfinite(logit) else None
                reason = reason or _scale(named[name], math.sqrt(largest / logit), snapshot)
                if reason is None:
                    first.setdefault(name, logit)
                else:
                    skipped[name] = reason
            if not large:
                break
        now = _largest_logits(model, batch, compute_loss)
        usual = {name: logit for name, logit in wanted.items() if name not in first}
        skipped = {
            f"{name}": f"its largest logit of {logit:.3g} is of usual size" for name, logit in usual.items()
        } | skipped
        refuse_chosen(modules, skipped)
        changes = [
            f"{name}: queries and keys scaled, largest logit {logit:.3g} to {now[name]:.3g}"
            for name, logit in first.items()
        ]
        return finish(model, "scale-query-key", snapshot, optimizers, changes, skipped, tensors)


def _largest_logits(model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None) -> dict[str, float]:
    """Return the largest attention logit on the batch, by name of the module whose code computes the attention."""
    failures: list[BaseException] = []
    monitor = AttentionMonitor(model, on_failure=lambda _place, error: failures.append(error), any_mode=True)
    readback = Readback()
    monitor.reset(readback)
    with untouched(model), torch.enable_grad():
        torch.manual_seed(0)
        monitor.arm()
        try:
            for name, module in model.named_modules():
                if isinstance(module, nn.MultiheadAttention):
                    monitor.watch(module, clean_name(name))
            call(model, batch, compute_loss)
            rows = monitor.place([])
            readback.fetch()
        finally:
            monitor.disarm()
    if failures:
        raise failures[0]
    return {row.name: max(readback.value(heads.logit_max) for heads in row.heads) for row in rows if row.heads}


def _scale(module: nn.Module, factor: float, snapshot: Snapshot) -> str | None:
    """Scale queries and keys of one attention; return why that cannot be done, in which case nothing was."""
    if any(parametrize.is_parametrized(child) for child in module.modules()):
        return "its weights are parametrized"
    parts = list(_parts(module))
    if not parts:
        return "no weights of queries and keys were found in it by their usual names"
    if not all(parameter.requires_grad for parameter, _ in parts):
        return "it is frozen (requires_grad is False)"
    snapshot.keep(parameter for parameter, _ in parts)
    with torch.no_grad():
        for parameter, rows in parts:
            parameter[rows].mul_(factor)
    return None


def _parts(attention: nn.Module) -> Iterator[tuple[nn.Parameter, slice]]:
    """Yield weights and biases that make queries and keys, each with its rows that do."""
    for name, module in attention.named_modules():
        blocks = list(query_key_blocks(name, module))
        yield from ((block.weight, block.rows) for block in blocks)
        if isinstance(module, nn.MultiheadAttention):
            stacked = module._parameters.get("in_proj_bias")
            if stacked is not None:
                yield stacked, slice(0, 2 * module.embed_dim)
        elif blocks:
            bias = module._parameters.get("bias")
            if bias is not None:
                yield from ((bias, block.rows) for block in blocks)
