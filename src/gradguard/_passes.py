"""Forward and backward passes of a check: at the scale at which the model will be trained, and repeatable."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradguard._untouched import cuda_devices
from gradguard.errors import UnsupportedModelError
from gradguard.monitors._reduce import dense

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pass", "Passes", "scalar_loss"]

_FACTORS = (2.0**16, 2.0**12, 2.0**8, 2.0**4)
"""By what the loss is scaled up to see whether zeros are float16's: where PyTorch's scaler begins, and less where that
overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward and one backward pass.

    Attributes:
        loss: Detached, without the scale.
        gradients: By ``id(parameter)``, with the scale; a parameter without one is left out.
        scale: Factor by which the loss was multiplied.
    """

    loss: Tensor
    gradients: Mapping[int, Tensor]
    scale: float

    @property
    def is_finite(self) -> bool:
        """Whether every gradient is."""
        known = (dense(gradient) for gradient in self.gradients.values())
        return all(bool(torch.isfinite(values).all()) for values in known if values is not None)

    def zero_share(self) -> float:
        """Return the share of entries that are exactly zero, 0 to 1."""
        known = [values for values in map(dense, self.gradients.values()) if values is not None]
        zeros = sum(values.numel() - int(torch.count_nonzero(values)) for values in known)
        return zeros / max(1, sum(values.numel() for values in known))


class Passes:
    """Passes of one model on one batch, by ``torch.autograd.grad``: nothing of the user's fires or moves."""

    def __init__(self, model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any]) -> None:
        """Prepare, and note the random states.

        Args:
            model: See :func:`gradguard.check`.
            batch: See :func:`gradguard.check`.
            compute_loss: See :func:`gradguard.check`.
        """
        self._model = model
        self._batch = batch
        self._compute_loss = compute_loss
        self._devices = cuda_devices(model)
        self._states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002  # the user's global state is meant
        self._device_states = [torch.cuda.get_rng_state(index) for index in self._devices]

    def take(self, scale: float = 1.0) -> Pass:
        """Run forward and backward once, with the random numbers that come next.

        Args:
            scale: Factor by which the loss is multiplied before it is differentiated.

        Raises:
            TypeError: If ``compute_loss`` gives no tensor.
            ValueError: If the loss is not a scalar.
            UnsupportedModelError: If the loss depends on no trainable parameter.
        """
        loss = scalar_loss(self._call())
        gradients = _gradients(self._model, loss.reshape(()), scale)
        return Pass(loss=loss.detach(), gradients=gradients, scale=scale)

    def repeat(self, scale: float) -> Pass:
        """Run forward and backward with the random numbers of the first pass."""
        python, numpy, torch_state = self._states
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  # as above
        torch.set_rng_state(torch_state)
        for index, state in zip(self._devices, self._device_states, strict=True):
            torch.cuda.set_rng_state(state, index)
        return self.take(scale)

    def as_trained(self, scaler: Any, *, forget: Callable[[], None]) -> Pass:
        """Run the pass that a loss scaler would let through: at its scale, lowered until the gradients are finite.

        Args:
            scaler: A ``torch.amp.GradScaler`` or what quacks like one, ``None`` for none. Only read: a scaler that has
                scaled nothing yet stays without a scale.
            forget: Called before each further pass.

        Returns:
            A pass with finite gradients, or the unscaled one where that has none: no scale helps then.
        """
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        first = self.take(scale)
        if scale == 1.0 or first.is_finite:
            return first
        forget()
        unscaled = self.repeat(1.0)
        if not unscaled.is_finite:
            return unscaled
        while (scale := 0.5 * scale) > 1.0:
            forget()
            scaled = self.repeat(scale)
            if scaled.is_finite:
                return scaled
        forget()
        return self.repeat(1.0)

    def lost_to_float16(self, seen: Pass) -> dict[int, Tensor]:
        """Return which share of each gradient is exactly zero and is not once the loss is scaled up.

        The backward pass is linear in the loss: only rounding makes such a difference.

        Args:
            seen: The first pass, or a repetition of it.

        Returns:
            Shares, 0-d, 0 to 1, by ``id(parameter)``; empty where every larger scale overflows.
        """
        for factor in _FACTORS:
            other = self.repeat(seen.scale * factor)
            if other.is_finite:
                pairs = ((key, dense(g), dense(other.gradients[key])) for key, g in _both(seen, other))
                return {
                    key: ((here == 0) & (there != 0)).float().mean()
                    for key, here, there in pairs
                    if here is not None and there is not None and here.shape == there.shape and here.numel()
                }
        return {}

    def _call(self) -> Any:
        try:
            return self._compute_loss(self._model, self._batch)
        except Exception as error:
            error.add_note("raised by compute_loss(model, batch) as called by gradguard.check; the model is as it was")
            raise


def _both(one: Pass, other: Pass) -> Iterable[tuple[int, Tensor]]:
    return ((key, gradient) for key, gradient in one.gradients.items() if key in other.gradients)


def scalar_loss(value: Any) -> Tensor:
    """Return the loss out of what ``compute_loss`` gave: a tensor, or a mapping with one under ``"loss"``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is no scalar.
        UnsupportedModelError: If it depends on no trainable parameter.
    """
    loss = value.get("loss") if isinstance(value, Mapping) else value
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"compute_loss must return a scalar tensor, or a mapping with one under 'loss', got {type(value).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"compute_loss must return a scalar, got a tensor of shape {tuple(loss.shape)}; "
            "reduce it, for instance by .mean()"
        )
    if not loss.requires_grad:
        raise UnsupportedModelError(
            "the loss depends on no trainable parameter: it has no gradient function. Look for .detach(), "
            "torch.no_grad(), .item() or a conversion to numpy between the model's output and the loss"
        )
    return loss


def _gradients(model: nn.Module, loss: Tensor, scale: float) -> dict[int, Tensor]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if scale != 1.0:  # a tensor, as in a scaler: times a number, a float16 loss would overflow
        loss = loss * torch.full((), scale, dtype=torch.float32, device=loss.device)
    try:
        found = torch.autograd.grad(loss, trainable, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" in str(error):
            error.add_note("gradguard.check uses torch.autograd.grad: checkpoint with use_reentrant=False")
        raise
    pairs: Iterable[tuple[nn.Parameter, Tensor | None]] = zip(trainable, found, strict=True)
    return {id(p): g for p, g in pairs if g is not None}
