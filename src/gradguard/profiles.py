"""Measured curves and spectra that a diagnosis carries beside its findings. Numbers only, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["BlockProfile", "JacobianStretch", "TimeProfile"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianStretch:
    """Largest and smallest singular value of the Jacobian of a net or a block, at one batch.

    The map is that of the whole batch: without coupling between examples its singular values are those of all examples
    together. ``smallest`` is that of the smaller side (inputs or outputs): a net with ten outputs has ten per example.

    Attributes:
        name: Dotted name of the block; empty for the whole net.
        source: What is varied, in words, for instance ``"the input"`` or ``"the output of embed"``.
        inputs: Numbers that are varied, batch included.
        outputs: Numbers at the other end, batch included.
        largest: Largest singular value, >= 0. Never above the true one, but for rounding.
        smallest: Smallest singular value where ``smallest_certified``, else an upper bound of it.
        rms: Root mean square of the singular values on the smaller side; estimated from one random vector unless
            ``exact``. Mean-field theory's ``chi`` to half the power of the depth.
        largest_certified: Whether ``largest`` is known to ``residual``.
        smallest_certified: Whether ``smallest`` is a value and not only a bound.
        residual: Distance from ``largest`` within which a singular value surely lies, as a share of ``largest``.
        noise: Share of ``largest`` below which a singular value is rounding.
        iterations: Products with the Jacobian and its transpose, in pairs; or rows, where ``exact``.
        exact: Whether the whole Jacobian was formed and decomposed.
        method: ``"torch.func"``, ``"double backward"`` or ``"finite differences"``.
        isometry: ``"isometric"``, ``"not isometric"`` or ``"unknown"``.
    """

    name: str = ""
    source: str = "the input"
    inputs: int
    outputs: int
    largest: float
    smallest: float
    rms: float
    largest_certified: bool
    smallest_certified: bool
    residual: float
    noise: float
    iterations: int
    exact: bool
    method: str
    isometry: str

    @property
    def condition(self) -> float:
        """Largest over smallest singular value, >= 1; a lower bound where the smallest is an upper one."""
        return self.largest / self.smallest if self.smallest > 0.0 else math.inf

    @property
    def decades(self) -> float:
        """Decimal logarithm of :attr:`condition`."""
        return math.log10(self.condition) if self.largest > 0.0 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProfile:
    """The gradient of the feed-forward weights over the blocks of a Transformer, at the first observation that has it.

    Attributes:
        placement: ``"pre-LN"`` where each block begins with a norm and ends without one, ``"post-LN"`` where each ends
            with one and begins without.
        blocks: Dotted names in execution order.
        ffn_grad_norm: Per block, L2 norm of the gradient of the last two linear layers' weights, unscaled.
        growth: Last block's over first block's, by the fitted slope.
        decades_per_block: Slope of log10 over the blocks (Theil-Sen); positive where it grows towards the output.
        step: Optimizer step of that observation.
    """

    placement: str
    blocks: tuple[str, ...]
    ffn_grad_norm: tuple[float, ...]
    growth: float
    decades_per_block: float
    step: int
