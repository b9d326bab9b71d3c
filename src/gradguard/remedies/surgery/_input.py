"""Raw data made standard in front of the layers that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard._untouched import untouched
from gradguard.detectors.saturated_units import FAR_INPUT
from gradguard.monitors._describe import clean_name, describe
from gradguard.monitors._trees import floating_tensors
from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization._trace import call
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import affine, chosen, pass_over
from gradguard.remedies.surgery.modules import Standardized

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["standardize_input"]

_MADE_IN_A_ROW = 8
"""Features in a row that parameters have made, after which those behind them count as made by parameters, too: such is
the input of a hidden layer. Ours."""

_LEAST_RATIO = 1e-6
"""Deviation of a feature, as a share of the largest, below which it is constant and only centred. Ours: rounding."""


def standardize_input(
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Standardize the data that a model's first Linear and convolution layers read, in place.

    Each of them is replaced by a :class:`Standardized` that subtracts every feature's mean and divides by its standard
    deviation before the layer, both taken from the batch and kept as buffers: they are constants and part of the model,
    so training, evaluation and deployment see the same. Features that do not vary in the batch are only centred. Where
    a layer reads data beside what parameters have made, as columns beside embeddings, the features made standard are
    those of data that reach beyond ten. The better place for this is the data pipeline, with the statistics of the
    whole training set.

    Args:
        model: The model, changed in place.
        batch: A batch with at least two examples; it is run once to see which layers read data.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the layers to look at; ``None`` for all.
        optimizer: The optimizer or optimizers; nothing of theirs changes but names.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done, with the new names of the parameters; ``.undo()`` puts everything back.

    Raises:
        ValueError: If there is no batch.
        UnsupportedModelError: If no layer reads data that are not standardized.

    Source:
        LeCun, Bottou, Orr, Mueller (1998), "Efficient BackProp", section 4.3: inputs of mean zero and equal variances.
    """
    if batch is None:
        raise ValueError("standardize_input takes mean and deviation from data: pass batch=")
    optimizers = checked(model, optimizer)
    named = chosen(model, modules)
    inside = pass_over(model)
    edits: list[Edit] = []
    skipped: dict[str, str] = {}
    for layer, data in _inputs(model, batch, compute_loss):
        name = next(clean_name(raw) for raw, module in model.named_modules() if module is layer)
        if named is not None and all(layer is not child for module in named.values() for child in module.modules()):
            continue
        axis = -1 if isinstance(layer, nn.Linear) else 1
        raw_features = _raw_features(model, data, axis) if data.requires_grad and data.ndim > 1 else None
        if data.requires_grad and (raw_features is None or not raw_features.any()):
            skipped[name] = "what it reads has passed parameters before, an embedding for instance"
            continue
        if id(layer) in inside or data.shape[axis % data.ndim] * 2 > data.numel() or data.ndim < 2:
            skipped[name] = inside.get(id(layer), "the batch has one example, which has no deviation")
            continue
        mean, deviation = _statistics(data.detach(), axis, raw_features)
        words = f"{name}: {describe(layer).kind} reads (x - mean) / deviation of {_count(mean, raw_features)} features"
        words += f"; means {float(mean.min()):.3g} to {float(mean.max()):.3g}, "
        words += f"deviations {float(deviation.min()):.3g} to {float(deviation.max()):.3g}"
        edits.append(Edit(words=words, make=partial(_insert, layer, mean, deviation)))
    return operate(
        "standardize-input", model, optimizers, edits, skipped, dry_run=dry_run, batch=batch, compute_loss=compute_loss
    )


def _count(mean: Tensor, raw_features: Tensor | None) -> int:
    return mean.numel() if raw_features is None else int(raw_features.sum())


def _inputs(
    model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None
) -> list[tuple[nn.Module, Tensor]]:
    """Return the layers that run, each with the input of its first call and how that was made."""
    found: dict[int, tuple[nn.Module, Tensor]] = {}

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        data = next(iter(floating_tensors(given)), None)
        if data is not None and torch.is_grad_enabled():
            found.setdefault(id(module), (module, data.clone()))

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if affine(module)]
    try:
        with untouched(model), torch.enable_grad():
            call(model, batch, compute_loss)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _raw_features(model: nn.Module, data: Tensor, axis: int) -> Tensor:
    """Return which features of a layer's input reach far and are data all the same: no parameter has touched them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [dim for dim in range(data.ndim) if dim != axis % data.ndim]
    far = data.detach().abs().amax(dim=others) > FAR_INPUT
    made = 0
    for place in far.nonzero().flatten().tolist():
        if made < _MADE_IN_A_ROW:
            total = data.select(axis, place).sum()
            slopes: Sequence[Tensor | None] = (
                torch.autograd.grad(total, trainable, retain_graph=True, allow_unused=True) if trainable else ()
            )
            made = made + 1 if any(bool(slope.any()) for slope in slopes if slope is not None) else 0
        far[place] = made == 0
    return far


def _statistics(data: Tensor, axis: int, raw_features: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per feature, in float32 or wider, shaped to go with the data.

    Args:
        data: What a layer reads.
        axis: Of its features.
        raw_features: Those to take; of the others the mean is 0 and the deviation 1. ``None`` for all.
    """
    wide = data if data.dtype == torch.float64 else data.float()
    others = [dim for dim in range(wide.ndim) if dim != axis % wide.ndim]
    mean = wide.mean(dim=others, keepdim=True)
    deviation = (wide - mean).square().mean(dim=others, keepdim=True).sqrt()
    deviation = torch.where(deviation > _LEAST_RATIO * deviation.max(), deviation, torch.ones_like(deviation))
    if raw_features is not None:
        kept = raw_features.reshape(mean.shape)
        mean = torch.where(kept, mean, torch.zeros_like(mean))
        deviation = torch.where(kept, deviation, torch.ones_like(deviation))
    return mean[0].to(data.dtype), deviation[0].to(data.dtype)


def _insert(layer: nn.Module, mean: Tensor, deviation: Tensor, kept: Ledger) -> nn.Module:
    new = Standardized(layer, mean, deviation)
    kept.replace(layer, new)
    return new
