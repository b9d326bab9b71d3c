"""The verdict's data: what was found, why, with which evidence, and what to do about it.

Everything here is frozen. What is learnt later (the effect of a trial, the end of an illness) makes a new object
through :func:`dataclasses.replace`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

from gradguard.actions import ActionSummary
from gradguard.profiles import BlockProfile, JacobianStretch, TimeProfile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = [
    "SCHEMA_VERSION",
    "Cause",
    "Diagnosis",
    "Effect",
    "Evidence",
    "Finding",
    "LayerProfile",
    "Prescription",
    "RuledOut",
    "RunSummary",
    "Severity",
    "Unobserved",
]

SCHEMA_VERSION = 1
"""Version of the JSON form of a :class:`Diagnosis`; it grows whenever a field changes its meaning or goes away."""


class Severity(IntEnum):
    """How much a finding matters; comparable with ``<`` and ``>=``."""

    INFO = 10
    WARNING = 20
    ERROR = 30


class Cause(StrEnum):
    """Why the gradient is ill. A finding names one, and lists the others it could rule out."""

    ACTIVATION_DERIVATIVE = "activation derivative"
    WEIGHT_SCALE = "weight scale"
    NORMALIZATION = "normalization"
    GATES = "gates"
    DEAD_UNITS = "dead units"
    SATURATION = "saturation"
    LEARNING_RATE = "learning rate"
    DATA = "data"
    PRECISION = "precision"
    WIRING = "wiring"
    LOSS = "loss function"
    OPERATION = "numerically unsafe operation"
    CORRUPT_WEIGHTS = "corrupt weights"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One measured number behind a finding.

    Attributes:
        value: The number (or a short text where no number exists), as measured.
        unit: Its unit: ``"decades"``, ``"fraction"``, ``"ratio"``, ``"steps"``, ``"layers"``, ``"L2 norm"`` or ``""``.
        note: What to compare it with, for instance ``"sigmoid: at most 0.25"``; may be empty.
    """

    value: float | int | str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledOut:
    """A cause that was checked and does not explain the finding, with the number that says so."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a prescription did when it was tried on a copy of the model.

    Attributes:
        loss_before: Loss of the untreated control at the end of the trial; earlier where it stood still, far behind.
        loss_after: Loss of the treated copy at the end of the trial.
        steps: Optimizer steps that the treated copy was given.
    """

    loss_before: float
    loss_after: float
    steps: int

    @property
    def gain(self) -> float:
        """Loss saved by the treatment; positive means better."""
        return self.loss_before - self.loss_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Prescription:
    """One cure as data: what to do, why, and a line to paste.

    Attributes:
        remedy: Name of the remedy, for instance ``"layer-norm"``.
        reason: Why it should help here, in one sentence.
        code: A line (or a few) of Python to paste.
        expected: What should be different afterwards, in one sentence; what a trial measured is ``effect``.
        reference: Where the remedy comes from.
        arguments: Arguments of the remedy, by name; after a trial with the ``seed`` of the weights that it drew,
            and with ``lr_factor`` where the learning rate is to be multiplied as well.
        effect: Measured effect, or ``None`` while nobody has tried it. Reports label such cures as untried.
    """

    remedy: str
    reason: str
    code: str = ""
    expected: str = ""
    reference: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    effect: Effect | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong: what, where, since when, why, and what it is not.

    Attributes:
        code: Rule code, for instance ``"GG101"``; never changes its meaning.
        name: Rule name, for instance ``"vanishing-gradient"``.
        family: Rule family, for instance ``"vanishing"``.
        severity: How much it matters now. A finding that has cleared is ``INFO``.
        message: One sentence with the numbers that matter.
        layer: Dotted name of the culprit module or parameter, ``None`` where there is no single one.
        layers: All modules or parameters concerned, in execution order.
        step: Optimizer step at which it was first seen, from 0.
        last_step: Optimizer step at which it was last seen.
        resolved_step: First observed step at which it was gone, ``None`` while it stands.
        cause: Why, as far as the numbers tell.
        confidence: Between 0 and 1.
        evidence: Measured numbers by name.
        ruled_out: Causes checked and excluded.
        prescriptions: Cures, best first.
        consequence_of: Code of the finding that explains this one, ``None`` for an illness of its own.
        optimizer: Label of the optimizer in whose steps it was seen; empty where the run has only one.
    """

    code: str
    name: str
    family: str
    severity: Severity
    message: str
    step: int
    last_step: int
    layer: str | None = None
    layers: tuple[str, ...] = ()
    resolved_step: int | None = None
    cause: Cause = Cause.UNKNOWN
    confidence: float = 0.5
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    ruled_out: tuple[RuledOut, ...] = ()
    prescriptions: tuple[Prescription, ...] = ()
    consequence_of: str | None = None
    optimizer: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"confidence of {self.code} must lie between 0 and 1, got {self.confidence!r}")

    @property
    def standing(self) -> bool:
        """Whether it was still there when last looked at."""
        return self.resolved_step is None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer as the last observation saw it, in execution order.

    Attributes:
        name: Dotted module name.
        kind: Type and size, for instance ``"Linear 64>10"``.
        role: ``"affine"``, ``"norm"``, ``"activation"``, ``"recurrent"``, ``"embedding"``, ``"attention"``,
            ``"other"``.
        delta_norm: L2 norm of the loss gradient at the layer's output, ``nan`` where none arrived.
        gain: Factor by which the gradient changes on its way from this row's output to the previous row's, > 0;
            ``nan`` where unknown.
        forward_rms: Root mean square of the layer's output.
        active_fraction: Share of units that were non-zero for at least one example, 0 to 1; ``nan`` where it does not
            apply.
        predicted_gain: What mean-field theory makes of ``gain``, from the layer's weights and the measured slopes of
            the activation before it; ``nan`` where something else lies between.
        sigma: Largest singular value of the layer's weight, from below; ``nan`` where it has several or none.
        trunk: Whether the row counts towards the depth criterion.
        mark: Code of the finding whose culprit it is, or empty.
    """

    name: str
    kind: str
    role: str
    delta_norm: float
    gain: float
    forward_rms: float
    active_fraction: float
    predicted_gain: float = math.nan
    sigma: float = math.nan
    trunk: bool = True
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSpectrum:
    """The spectrum of one matrix, or of one convolution as the linear map that it is; see ``Guard.report(deep=True)``.

    Attributes:
        name: Dotted parameter name, with the part in brackets where it is one of several.
        layer: Dotted name of the module.
        shape: Of the matrix, or of the kernel.
        sigma_max: Largest singular value, >= 0.
        certified: Whether ``sigma_max`` and ``spectral_radius`` are exact or meet a relative residual of 1e-3.
        stable_rank: Squared Frobenius norm over squared ``sigma_max``, from 1; ``nan`` for convolutions and zeros.
        condition: Largest over smallest singular value; inf where that is zero up to rounding, ``nan`` where unknown.
        spectral_radius: Largest absolute eigenvalue of a recurrent matrix; ``nan`` for others.
        derivative_bound: Largest derivative of the nonlinearity behind a recurrent matrix; ``nan`` for others.
        input_size: Spatial size of the input that a convolution was measured on; empty for matrices.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    sigma_max: float
    certified: bool
    stable_rank: float = math.nan
    condition: float = math.nan
    spectral_radius: float = math.nan
    derivative_bound: float = math.nan
    input_size: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unobserved:
    """Something that could not be measured, and the reason."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in a few numbers; unknown ones are ``nan``. Norms are L2 norms of unscaled gradients before clipping.

    Attributes:
        kind: ``"run"`` for a watched run, ``"check"`` for a check before the first step.
        steps: Optimizer steps taken, over all optimizers.
        batches: Backward passes seen.
        layer_count: Layers that count towards the depth criterion.
        parameter_count: Trainable scalars.
        optimizers: Names of the optimizers, for instance ``("Adam",)``.
        loss_first: First recorded loss (median of up to the first 3).
        loss_last: Last recorded loss (median of up to the last 10).
        grad_norm_median: Median total gradient norm over observations, with the 5th and 95th percentile.
        grad_norm_p5: See ``grad_norm_median``.
        grad_norm_p95: See ``grad_norm_median``.
        update_ratio_log10: Median of log10 of the update-to-weight ratio over matrices at the last observation.
        span_decades: Depth span at the last observation, in decades; negative means the gradient shrinks towards the
            input.
        dead_fraction: Largest share of dead units in a layer, 0 to 1.
        dead_layer: That layer.
        overhead_fraction: Time spent in gradguard over wall time since the first step, 0 to 1.
        overhead_s: The same time in seconds.
        clip_known: Whether norms were read before clipping (``record()``), or only at the optimizer step.
    """

    kind: str = "run"
    steps: int = 0
    batches: int = 0
    layer_count: int = 0
    parameter_count: int = 0
    optimizers: tuple[str, ...] = ()
    loss_first: float = math.nan
    loss_last: float = math.nan
    grad_norm_median: float = math.nan
    grad_norm_p5: float = math.nan
    grad_norm_p95: float = math.nan
    update_ratio_log10: float = math.nan
    span_decades: float = math.nan
    dead_fraction: float = math.nan
    dead_layer: str = ""
    overhead_fraction: float = math.nan
    overhead_s: float = math.nan
    clip_known: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The verdict on a run or on a model before its first step.

    Attributes:
        findings: Root cause first, consequences after the finding they follow from.
        verdict: One sentence for people.
        observations: Number of optimizer steps (or checks) at which gradients were read.
        sufficient: Whether enough was observed to call the run healthy.
        unobserved: What could not be measured, and why.
        layers: Layers in execution order at the last observation.
        summary: The run in numbers.
        spectra: Exact spectra of the weights, where a report in depth was asked for.
        actions: What was done to the steps of each optimizer while the run went on; empty where nothing may be done.
        time_profiles: The gradient through time, by recurrent module.
        block_profile: Of a Transformer, the gradient of its feed-forward weights over its blocks; else ``None``.
        jacobian: How far the Jacobian of the whole net stretches; ``None`` where that was not asked for.
    """

    findings: tuple[Finding, ...]
    verdict: str
    observations: int
    sufficient: bool
    unobserved: tuple[Unobserved, ...] = ()
    layers: tuple[LayerProfile, ...] = ()
    summary: RunSummary = field(default_factory=RunSummary)
    spectra: tuple[MatrixSpectrum, ...] = ()
    actions: tuple[ActionSummary, ...] = ()
    time_profiles: tuple[TimeProfile, ...] = ()
    block_profile: BlockProfile | None = None
    jacobian: JacobianStretch | None = None

    @property
    def primary(self) -> Finding | None:
        """The illness of the run: the first standing finding at ``WARNING`` or above, or ``None``."""
        return next((f for f in self.findings if f.standing and f.severity >= Severity.WARNING), None)

    @property
    def healthy(self) -> bool | None:
        """``False`` where a finding at ``WARNING`` or above stands, ``None`` if too little was seen, else ``True``."""
        if self.primary is not None:
            return False
        return True if self.sufficient else None

    def worst(self) -> Severity | None:
        """Severity of the worst standing finding, ``None`` where there is none."""
        return max((f.severity for f in self.findings if f.standing), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready data; non-finite numbers become ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``."""
        primary = self.primary
        return {
            "schema_version": SCHEMA_VERSION,
            "healthy": self.healthy,
            "primary": None if primary is None else primary.code,
            **{f.name: to_plain(getattr(self, f.name)) for f in fields(self)},
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the diagnosis as a JSON text; see :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from gradguard.report.console import render

        yield from render(self, options)

    def _repr_html_(self) -> str:
        from gradguard.report.html import to_html

        return to_html(self)


def to_plain(value: Any) -> Any:
    """Turn dataclasses, enums, mappings and non-finite floats into what JSON can hold."""
    if isinstance(value, Severity):
        return value.name
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [to_plain(item) for item in _ordered(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)


def _ordered(items: Iterable[Any]) -> Iterable[Any]:
    return sorted(items, key=str) if isinstance(items, (set, frozenset)) else items
