"""Measured curves and spectra that a diagnosis carries beside its findings. Numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TimeProfile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeProfile:
    """The gradient through time in one recurrent module, as the newest observation that followed it saw it.

    The curves have one number per point of ``distance``, at most 64. What vanishes or explodes is judged by
    ``memory``: a loss that reads every step puts gradient in everywhere, and hides in ``loss_gradient`` what is lost on
    the way.

    Attributes:
        name: Dotted module name.
        kind: Type and size, for instance ``"LSTM 8>32"``.
        distance: Time steps back from the last reading, from 0, ascending.
        memory: Gradient of the last reading alone at the module's input, for a reading of length 1 per sequence.
        loss_gradient: L2 norm of the loss gradient at the hidden states, unscaled.
        span: Decades between the farthest and the nearest eighth of the steps; negative where it vanishes.
        factor: Factor per step back; 1 keeps its size.
        horizon: Memory horizon: steps back after which a tenth is left; infinity where that is at none of the steps.
        steps: Time steps looked at.
        reach: How far back the loss reads outputs, as a share of the steps: 0 where it reads the last one only.
        gate: Mean share of the state that is kept per step, 0 to 1; NaN without gates.
        gate_name: ``"forget gate"``, ``"update gate"``, or empty.
        mark: Code of the standing finding whose layer it is, or empty.
    """

    name: str
    kind: str
    distance: tuple[float, ...]
    memory: tuple[float, ...]
    loss_gradient: tuple[float, ...]
    span: float
    factor: float
    horizon: float
    steps: int
    reach: float
    gate: float
    gate_name: str
    mark: str = ""
