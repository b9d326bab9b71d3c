"""Every threshold and cadence, with its unit, range, default and where the default comes from.

``GuardConfig`` is what :func:`gradguard.watch`, :func:`gradguard.check` and the Lightning callback take as keywords.
"Ours" marks limits that we measured ourselves; ``docs/thresholds.md`` says on which nets.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gradguard.findings import Finding

__all__ = ["GuardConfig"]

_DEPTH = (
    "Span statistic and limits are ours: 39 nets x 2 seeds x 2 optimizers; "
    "law: Schoenholz et al. 2017, arXiv 1611.01232"
)

_TIME = "Ours: seven nets on a recall over 64 steps; law: Pascanu et al. 2013, arXiv 1211.5063"

_SPIKE = "Ours: 0 to 0.14 false alarms in 1000 steps of log-normal noise"


def _number(default: float, *, unit: str, low: float, high: float = math.inf, source: str) -> Any:
    """Make a numeric field whose metadata states its unit, its closed range and the source of its default."""
    return field(default=default, metadata={"unit": unit, "low": low, "high": high, "source": source})


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """Thresholds and cadence of a guard or a check. Immutable; change one with :meth:`with_overrides`.

    Attributes:
        every: Observe every so many optimizer steps, after the dense first ones.
        dense_steps: First optimizer steps observed in any case; most illnesses show there.
        select: Codes, names or families of rules to apply; empty means all.
        ignore: Codes, names or families of rules to leave out; wins over ``select``.
        on_finding: What to do during a run when a finding at ``WARNING`` or above begins: ``"warn"`` emits a
            ``GradGuardWarning``, ``"raise"`` raises ``UnhealthyGradientsError``, ``"silent"`` keeps it for the
            report, a callable is called with the ``Finding``.
        on_error: ``"warn"`` switches a failing monitor off and lets training go on; ``"raise"`` is for tests.
        history_capacity: Observations kept in memory; see :class:`gradguard.history.History`.
        sample_size: Entries per parameter from which the update ratio is taken.
        minimum_observations: Observations before a run may be called healthy.
        span_info: Decades of depth span from which it is mentioned.
        span_warning: Decades of depth span from which it is a warning.
        span_late_explosion: Decades by which a gradient may still grow towards the input after ``span_patience_steps``.
        span_patience_steps: Steps after which a span beyond the limit is an error with an adaptive optimizer.
        minimum_depth_layers: Layers needed for the depth criterion; with fewer only first and last are compared.
        temporal_warning: Decades lost through time from which a loss that does not fall is put down to it.
        temporal_error: Decades lost through time from which that is an error, and a warning where no loss is known.
        temporal_explosion: Decades gained through time from which it is a warning.
        growth_patience: Consecutive observations in which an absent or zero gradient must recur before it counts.
        unused_fraction: Share of the trainable entries from which modules that never ran are a warning.
        dead_fraction_warning: Share of dead units in a layer that is a warning.
        dead_fraction_error: Share of dead units in a layer that is an error; also the only limit before the first step.
        dead_patience_steps: Optimizer steps over which a unit must stay inactive to be called dead.
        saturated_fraction: Share of saturated units in a layer that is worth a finding.
        update_ratio_high: Update-to-weight ratio above which the learning rate may be too high.
        update_ratio_low: Update-to-weight ratio below which the learning rate may be too low.
        update_patience: Consecutive observations for which an update ratio must stay out of range.
        spike_ratio: Times the median of those before it above which a gradient norm or a loss may be a spike.
        spike_z: Robust standard deviations of the logarithm above which it may be one.
        spike_window: Values before it with which a value is compared.
        spike_minimum: Values before it that are needed.
        divergence_share: Share of the progress made that a loss must have lost, for good, to have diverged.
        underflow_fraction: Share of the trainable entries whose gradient float16 rounds away that is a warning.
        lost_update_fraction: Share of the entries of half-precision weights that no step changes that is a warning.
        skipped_fraction: Share of steps skipped by a loss scaler that is a warning.
        epsilon_fraction: Share of entries whose update ``eps`` limits, in a tensor and of all, that is a warning.
        clip_fraction: Share of steps cut by clipping above which clipping sets the size of the steps.
        update_rms: Adam's update, in units of what it intends, from which it is a spike.
        attention_entropy: Entropy of a layer's attention, over that of equal weights, below which it has collapsed.
        attention_logit: Largest attention logit above which a softmax is held where it is.
        sigma_growth: Times its first value to which a largest singular value must grow to be worth a remark.
        initial_gain: Factor per layer, or its inverse, that is worth a remark at the first step.
    """

    every: int = _number(100, unit="optimizer steps", low=1, source="Ours: benchmarks/overhead.py")
    dense_steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50)
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    on_finding: Literal["warn", "raise", "silent"] | Callable[[Finding], object] = "warn"
    on_error: Literal["warn", "raise"] = "warn"
    history_capacity: int = _number(256, unit="observations", low=96, source="Ours: 42 KiB per layer at most")
    sample_size: int = _number(
        4096, unit="entries", low=16, source="Ours: relative error of a sampled norm is about 1/sqrt(2n), 1 % at 4096"
    )
    minimum_observations: int = _number(
        3,
        unit="observations",
        low=1,
        source="Ours: a span that only shows at initialization needs a second and third look",
    )
    span_info: float = _number(2.0, unit="decades", low=0.0, source=_DEPTH)
    span_warning: float = _number(3.0, unit="decades", low=0.0, source=_DEPTH)
    span_late_explosion: float = _number(2.0, unit="decades", low=0.0, source=_DEPTH)
    span_patience_steps: int = _number(
        100,
        unit="optimizer steps",
        low=1,
        source="Ours: Adam rescues default-initialized 20-layer ReLU nets by step 100",
    )
    minimum_depth_layers: int = _number(6, unit="layers", low=2, source="Ours: fewer rows give no slope")
    temporal_warning: float = _number(3.0, unit="decades", low=0.0, source=_TIME)
    temporal_error: float = _number(5.0, unit="decades", low=0.0, source=_TIME)
    temporal_explosion: float = _number(2.0, unit="decades", low=0.0, source=_TIME)
    growth_patience: int = _number(2, unit="observations", low=1, source="Ours: one look may catch a skipped branch")
    unused_fraction: float = _number(
        0.1, unit="fraction", low=0.0, high=1.0, source="Ours: an unused pooler of BERT-base is 0.5 % of its weights"
    )
    dead_fraction_warning: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="SageMaker Debugger DeadRelu: layer above 50 %"
    )
    dead_fraction_error: float = _number(
        0.9, unit="fraction", low=0.0, high=1.0, source="Ours: nets that train start with up to 62 % in a layer"
    )
    dead_patience_steps: int = _number(20, unit="optimizer steps", low=1, source="Ours: 20 consecutive batches")
    saturated_fraction: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="SageMaker Debugger SaturatedActivation: layer above 50 %"
    )
    update_ratio_high: float = _number(
        1e-1,
        unit="ratio",
        low=0.0,
        source="Karpathy, CS231n notes (healthy about 1e-3); 1e-1: DeepDiagnosis, ICSE 2022",
    )
    update_ratio_low: float = _number(
        1e-6, unit="ratio", low=0.0, source="Ours: healthy nets fall to 10^-5.9 late in training"
    )
    update_patience: int = _number(3, unit="observations", low=1, source="Ours: sparse embeddings jump once")
    spike_ratio: float = _number(2.0, unit="ratio", low=1.0, source=_SPIKE)
    spike_z: float = _number(4.0, unit="standard deviations", low=0.0, source=_SPIKE)
    spike_window: int = _number(64, unit="values", low=8, source=_SPIKE)
    spike_minimum: int = _number(25, unit="values", low=8, source=_SPIKE)
    divergence_share: float = _number(
        0.5, unit="fraction", low=0.0, source="Ours: a restart of a cosine schedule loses a quarter"
    )
    underflow_fraction: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="Ours: most of the model learns nothing"
    )
    lost_update_fraction: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="Ours: bfloat16 loses updates below 2e-3 to 4e-3 of a weight"
    )
    skipped_fraction: float = _number(
        0.05, unit="fraction", low=0.0, high=1.0, source="Ours: a balanced scaler skips one step in 2000"
    )
    epsilon_fraction: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="Wortsman et al. 2024, arXiv 2309.14322, for the mechanism"
    )
    clip_fraction: float = _number(
        0.5, unit="fraction", low=0.0, high=1.0, source="Ours: most steps then have the length of the threshold"
    )
    update_rms: float = _number(2.3, unit="ratio", low=1.0, source="Wortsman et al. 2023, arXiv 2304.13013")
    attention_entropy: float = _number(
        0.1,
        unit="fraction",
        low=0.0,
        high=1.0,
        source="Ours: layers of the clinic's healthy Transformers stay above 0.6",
    )
    attention_logit: float = _number(
        100.0, unit="logit", low=0.0, source="Kimi Team 2025, arXiv 2507.20534: QK-Clip acts above 100"
    )
    sigma_growth: float = _number(
        20.0,
        unit="ratio",
        low=1.0,
        source="Ours: at most 10 times in 58 healthy runs of 40 to 300 steps, 20 and 22 in runs with a rate too high",
    )
    initial_gain: float = _number(
        1.25, unit="ratio", low=1.0, source="Ours: estimates agree with mean-field theory within 6 % at width 64"
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            if "unit" in item.metadata:
                _check_number(item.name, getattr(self, item.name), item.metadata, whole=item.type == "int")
        _check_choice("on_error", self.on_error, ("warn", "raise"))
        if not callable(self.on_finding):
            _check_choice(
                "on_finding", self.on_finding, ("warn", "raise", "silent"), more=" or a callable taking a Finding"
            )
        steps: tuple[object, ...] = tuple(self.dense_steps)
        if not all(isinstance(step, int) and step >= 0 for step in steps):
            raise ValueError(f"dense_steps must be optimizer steps from 0, got {self.dense_steps!r}")
        for name in ("select", "ignore"):
            self._check_rules(name)

    def _check_rules(self, name: str) -> None:
        from gradguard.rules import resolve

        value: object = getattr(self, name)
        if isinstance(value, str):
            object.__setattr__(self, name, (value,))
        elif not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a rule code, name or family, or a sequence of them, got {value!r}")
        else:
            object.__setattr__(self, name, tuple(value))
        for rule in getattr(self, name):
            resolve(rule)

    def with_overrides(self, **overrides: Any) -> GuardConfig:
        """Return a copy with some fields changed.

        Raises:
            TypeError: If a name is no field of the configuration; the message names the closest one.
            ValueError: If a value is out of range.
        """
        known = [item.name for item in fields(self)]
        for name in overrides:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" Accepted: {', '.join(known)}."
                raise TypeError(f"gradguard has no option {name!r}.{hint}")
        return replace(self, **overrides)

    def wants(self, code: str) -> bool:
        """Whether ``select`` and ``ignore`` let this rule speak."""
        from gradguard.rules import resolve

        selected = not self.select or any(code in resolve(rule) for rule in self.select)
        return selected and not any(code in resolve(rule) for rule in self.ignore)


def _check_number(name: str, value: object, metadata: Any, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    low, high, unit = metadata["low"], metadata["high"], metadata["unit"]
    span = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    kind = "a whole number of" if whole else "a number of"
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {kind} {unit}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {span} {unit}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, more: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}{more}, got {value!r}")
