"""A normalization behind each hidden layer, before its activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gradguard.remedies._applied import Applied, tensor_names, transaction
from gradguard.remedies.initialization._following import Following
from gradguard.remedies.initialization._schemes import look_behind, refuse_chosen
from gradguard.remedies.initialization._targets import check_arguments, finish, layers_of
from gradguard.remedies.surgery._places import enlist, put

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Kind", "Normed", "insert_norm"]

Kind = Literal["layer", "batch", "rms", "group"]

_GROUPS = 32
"""Groups of a GroupNorm at most. Source: Wu, He (2018), "Group Normalization", ECCV, arXiv 1803.08494, section 4."""


class Normed(nn.Module):
    """A layer with a normalization behind it; in other respects the layer itself.

    Attributes:
        layer: The layer, whose parameters are now named ``layer.<name>``. What is asked of this module and is not here
            is the layer's: ``weight``, ``bias``, ``in_features``.
        norm: The normalization.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        """Put a normalization behind a layer, in its mode."""
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the normalized output of the layer."""
        output: Tensor = self.norm(self.layer(*args, **kwargs))
        return output

    def __getattr__(self, name: str) -> Any:
        """Return what the layer has under a name that this module lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"layer", "norm"}:
                raise
            return getattr(super().__getattr__("layer"), name)


class BatchNormLast(nn.BatchNorm1d):
    """Batch normalization of the last dimension, whatever stands before it: shape ``[..., features]``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
        """Return the input, each feature normalized over all other dimensions."""
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


def insert_norm(
    model: nn.Module,
    kind: Kind = "layer",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Put a normalization behind each hidden Linear and convolution layer, before the activation that follows.

    A layer whose output is normalized already, is added to a skip connection, runs several times or is the last is left
    alone, as is one behind which no activation is seen. Normalizations begin as plain ones: weight 1, bias 0.

    Args:
        model: The model, changed in place; its layers become :class:`Normed`.
        kind: ``"layer"`` (LayerNorm; over all channels of a convolution, as GroupNorm with one group), ``"batch"``,
            ``"rms"`` or ``"group"``.
        batch: A batch to run once, so that functions such as ``torch.relu`` are seen. Without one module order counts.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the layers, or of modules around them, to consider; ``None`` for all.
        optimizer: The optimizer that is to train the new weights; they join their layer's group.

    Returns:
        What was done, with the new names of the parameters; ``.undo()`` puts it back.

    Raises:
        ValueError: If the kind is unknown, or the batch has one example only and ``kind`` is ``"batch"``.
        UnsupportedModelError: If there is no layer to put one behind, or the model cannot be changed in place.

    Source:
        Ioffe, Szegedy (2015), "Batch Normalization", ICML, arXiv 1502.03167; Ba, Kiros, Hinton (2016), "Layer
        Normalization", arXiv 1607.06450; Wu, He (2018), ECCV, arXiv 1803.08494; Zhang, Sennrich (2019), "Root Mean
        Square Layer Normalization", NeurIPS, arXiv 1910.07467.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> applied = insert_norm(model, "batch")
        >>> print(applied.changes[0])
        0: BatchNorm over 4 features behind it
        >>> sorted(applied.names.items())[0]
        ('0.bias', '0.layer.bias')
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    optimizers = check_arguments(model, optimizer)
    if kind == "batch" and _examples(batch) == 1:
        raise ValueError("a batch of one example has no variance to normalize by: use kind='layer', or larger batches")
    layers, skipped = layers_of(model, modules)
    following = look_behind(model, layers, skipped, batch, compute_loss)
    before = tensor_names(model)
    changes = []
    with transaction() as snapshot:
        for name, layer in layers:
            if name not in following:
                continue
            reason = _unfit(following[name]) or (
                _no_place(kind, layer) and f"no {kind} norm fits {type(layer).__name__}"
            )
            if reason:
                skipped[name] = reason
                continue
            norm = _make(kind, layer)
            put(model, snapshot, layer, Normed(layer, norm))
            enlist(snapshot, optimizers, norm.parameters(), layer)
            changes.append(f"{name}: {_NAMES[kind]} over {_features(layer)} features behind it")
        refuse_chosen(modules, skipped)
        return finish(model, f"{kind}-norm", snapshot, optimizers, changes, skipped, before)


_NAMES = {"layer": "LayerNorm", "batch": "BatchNorm", "rms": "RMSNorm", "group": "GroupNorm"}


def _unfit(following: Following) -> str:
    """Return why no normalization belongs behind a layer; empty where one does."""
    if following.output:
        return "it is the last layer"
    if following.normalized:
        return "its output is normalized already"
    if following.branch_end:
        return "its output is added to a skip connection"
    if following.uses > 1:
        return "it runs several times"
    return "" if following.activation is not None else "no activation is seen behind it"


def _no_place(kind: Kind, layer: nn.Module) -> bool:
    return (kind == "rms" and isinstance(layer, _ConvNd)) or (kind == "group" and not isinstance(layer, _ConvNd))


def _features(layer: nn.Module) -> int:
    return int(layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)  # type: ignore[arg-type]


def _make(kind: Kind, layer: nn.Module) -> nn.Module:
    """Return a normalization for a layer's output, on its device and in its dtype."""
    features = _features(layer)
    if not isinstance(layer, _ConvNd):
        makers = {"layer": nn.LayerNorm, "batch": BatchNormLast, "rms": nn.RMSNorm}
        norm: nn.Module = makers[kind](features)
    elif kind == "batch":
        dims = layer.weight.ndim - 2
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](features)
    else:
        norm = nn.GroupNorm(1 if kind == "layer" else math.gcd(_GROUPS, features), features)
    own = next(layer.parameters())
    return norm.to(device=own.device, dtype=own.dtype).train(layer.training)


def _examples(batch: Any) -> int | None:
    """Return how many examples a batch has, ``None`` where that cannot be seen."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else None
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((_examples(value) for value in values), None)
