"""Entropy and largest logit of attention, recomputed from a few queries and all keys.

Fused attention keeps neither logits nor weights, so both are made again here: for at most two entries of the batch and
eight queries, all heads, all keys. That costs 16/(B L) of the product of queries and keys of a batch of B sequences of
length L. Nothing here draws random numbers, keeps a graph, or waits for a device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["READERS", "HeadStatistics", "head_statistics", "read_fused", "read_multi_head", "read_softmax"]

_BATCH_ENTRIES = 2
"""Entries of the batch that are looked at. Ours."""

_QUERIES = 8
"""Queries per entry that are looked at, evenly spaced and with the last. Ours: a collapse is over all rows."""

_HIDDEN = -9000.0
"""Logits at or below this count as masked. Ours: masks add -inf, the lowest number of the type, or -10000."""

_WIDENED_ENTRIES = 1 << 22
"""Keys of half precision are widened up to this size (16 MiB); beyond, the product is taken in their own precision."""


class HeadStatistics(NamedTuple):
    """What one call of attention gave, on its device.

    Attributes:
        entropy: Mean over queries of the entropy over ln(visible keys), 0..1, shape ``[heads]``, float32; NaN where no
            query sees two keys.
        logit_max: Largest visible logit as the softmax gets it, 0-d, float32.
    """

    entropy: Tensor
    logit_max: Tensor


def head_statistics(logits: Tensor, visible: Tensor | None = None) -> HeadStatistics:
    """Return entropy per head and the largest logit.

    Args:
        logits: Shape ``[batch, heads, queries, keys]``, masks that are added included.
        visible: True where a query may look, broadcastable to ``logits``; by default everywhere.

    Source:
        Entropy of attention: Zhai et al. (2023), arXiv 2303.06296, section 3; over ln(keys): ours, so that lengths and
        masks compare. Largest logit: Dehghani et al. (2023), arXiv 2302.05442, section 2.
    """
    logits = logits.float()
    hidden = logits <= _HIDDEN if visible is None else (logits <= _HIDDEN) | ~visible
    counts = (~hidden).sum(-1)
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    counted = counts >= 2
    share = torch.special.entr(weights).sum(-1) / counts.clamp(min=2).log()
    share = torch.where(counted, share, torch.zeros_like(share))
    entropy = share.sum((0, 2)) / counted.sum((0, 2))
    return HeadStatistics(entropy, logits.masked_fill(hidden, -math.inf).amax())


def read_fused(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> HeadStatistics | None:
    """Read a call of ``F.scaled_dot_product_attention``; ``None`` where it cannot be read.

    Inputs without an axis of heads count as one head.
    """
    named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | {**kwargs}
    query, key, mask = named["query"], named["key"], named.get("attn_mask")
    if not _is_plain(query, key, mask) or query.ndim not in {3, 4} or key.ndim != query.ndim:
        return None
    if query.ndim == 3:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    scale = named.get("scale")
    length, keys = query.shape[-2], key.shape[-2]
    entries, rows = _entries(query.shape[0]), _rows(length)
    key = key.expand(query.shape[0], *key.shape[1:])[entries]
    logits = _products(query[entries][:, :, rows], key, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    visible = None
    if named.get("is_causal"):
        visible = torch.arange(keys, device=key.device) <= torch.arange(length, device=key.device)[rows, None]
    if mask is not None:
        mask = mask.expand(*query.shape[:2], length, keys)[entries][:, :, rows]
        logits, visible = (logits, mask) if mask.dtype is torch.bool else (logits + mask, visible)
    return head_statistics(logits, visible)


def read_softmax(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> HeadStatistics | None:
    """Read a softmax over keys; ``None`` for any other.

    One over the last axis of ``[batch, heads, queries, keys]`` counts as attention, and so does one of
    ``[batch, length, length]``, as a single head.
    """
    logits = args[0] if args else kwargs.get("input")
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(logits, torch.Tensor) or not isinstance(axis, int) or not _is_plain(logits):
        return None
    if logits.ndim == 3 and logits.shape[1] == logits.shape[2]:
        logits, axis = logits.unsqueeze(1), -1 if axis in {-1, 2} else 0
    if logits.ndim != 4 or axis not in {-1, 3} or logits.shape[-1] < 2:
        return None
    return head_statistics(logits[_entries(logits.shape[0])][:, :, _rows(logits.shape[2])])


def read_multi_head(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> HeadStatistics | None:
    """Read a call of ``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` makes.

    Queries and keys are projected again, for the rows that are looked at.
    """
    given = _MULTI_HEAD.bind(*args, **kwargs)
    given.apply_defaults()
    named = given.arguments
    query, key = named["query"], named["key"]
    if named["static_k"] is not None or not _is_plain(query, key, named["attn_mask"], named["key_padding_mask"]):
        return None
    batched = query.ndim == 3
    if not batched:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    heads, (length, batch, width) = named["num_heads"], query.shape
    entries, rows = _entries(batch), _rows(length)
    first, second = _projections(named, width)
    q = _project(query[rows, entries], *first)
    k = _project(key[:, entries], *second)
    mask = _multi_head_mask(named, heads, (batch, length, k.shape[0]), entries, rows)
    if named["bias_k"] is not None:
        k = torch.cat([k, named["bias_k"].to(k.dtype).expand(1, k.shape[1], -1)])
    if named["add_zero_attn"]:
        k = torch.cat([k, torch.zeros_like(k[:1])])
    size = width // heads
    q, k = (part.reshape(len(part), -1, heads, size).permute(1, 2, 0, 3) for part in (q, k))
    logits = _products(q, k, 1 / math.sqrt(size))
    if mask is not None:
        logits = logits + F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
    return head_statistics(logits)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)

READERS: Mapping[Any, Callable[[tuple[Any, ...], Mapping[str, Any]], HeadStatistics | None]] = MappingProxyType(
    {
        F.scaled_dot_product_attention: read_fused,
        F.multi_head_attention_forward: read_multi_head,
        F.softmax: read_softmax,
        torch.softmax: read_softmax,
        torch.special.softmax: read_softmax,
        torch.Tensor.softmax: read_softmax,
    }
)
"""Which reader takes in which function of torch."""


def _is_plain(*tensors: Any) -> bool:
    """Whether every tensor is an ordinary one with numbers, so that slices of it can be read without side effects."""
    return all(
        tensor is None
        or (
            type(tensor) in {torch.Tensor, torch.nn.Parameter}
            and tensor.layout is torch.strided
            and not tensor.is_meta
            and not tensor.is_nested
            and (tensor.is_floating_point() or tensor.dtype is torch.bool)
            and tensor.numel() > 0
        )
        for tensor in tensors
    )


def _entries(batch: int) -> slice:
    return slice(None, None, -(-batch // _BATCH_ENTRIES))


def _rows(length: int) -> slice:
    stride = -(-length // _QUERIES)
    return slice((length - 1) % stride, None, stride)


def _products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return scaled products, shape ``[batch, heads, rows, keys]``; groups of query heads may share a key head."""
    batch, heads, rows, size = query.shape
    shared = key.shape[1]
    if key.dtype is not torch.float32 and key.numel() <= _WIDENED_ENTRIES:
        key = key.float()
    grouped = (query.to(key.dtype) * scale).reshape(batch, shared, heads // shared * rows, size)
    return (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2])


def _projections(named: Mapping[str, Any], width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of the queries' and the keys' projection."""
    bias = named["in_proj_bias"]
    if named["use_separate_proj_weight"]:
        weights = [named["q_proj_weight"], named["k_proj_weight"]]
    else:
        weights = [named["in_proj_weight"][:width], named["in_proj_weight"][width : 2 * width]]
    biases = [None, None] if bias is None else [bias[:width], bias[width : 2 * width]]
    return list(zip(weights, biases, strict=True))


def _project(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(values.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _multi_head_mask(
    named: Mapping[str, Any], heads: int, shape: tuple[int, int, int], entries: slice, rows: slice
) -> Tensor | None:
    """Return what is added to the logits, broadcastable to ``[batch, heads, rows, keys]``, -inf at hidden keys."""
    batch, length, keys = shape
    parts = []
    mask, padding = named["attn_mask"], named["key_padding_mask"]
    if mask is not None:
        mask = mask.reshape(batch, heads, length, keys) if mask.ndim == 3 else mask.expand(batch, 1, length, keys)
        parts.append(_additive(mask[entries][:, :, rows]))
    if padding is not None:
        parts.append(_additive(padding.reshape(batch, 1, 1, keys)[entries]))
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.float()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -math.inf)
